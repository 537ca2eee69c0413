"""CAFO and CASO on real photographs: sparsity along the talk's ladder of lambda_1, and cost at equal objective value.

    python benchmarks/second_order.py DATA --network squeezenet [--images 40] [--raced 8] [--unit network]

DATA has ``imagenet/labels.csv`` and ``weights/``. The cost is in products with the Hessian and in seconds per image, beside an
iteration as the authors describe theirs: ten power steps from a random vector, then accelerated proximal gradient that halves
its step from .03 anew in every iteration, over the sum of the batch; ten iterations, and as many as it takes to come as close
to the best value as ours does. Both solve one problem, with our lambda_2 (theirs would follow from the ten power steps).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import pandas as pd
import torch
from photographs import network
from torch import Tensor

import foveate
from foveate.data.folder import open_folder
from foveate.evaluation.evaluate import batches
from foveate.methods.second_order.curvature import Curvature
from foveate.methods.second_order.proximal import soft
from foveate.methods.second_order.solve import Solution, first_order, path, second_order

FIRST = (1e-4, 6.25e-3, 1.25e-2, 2.5e-2)
SECOND = (0.0, 1e-4, 6.25e-3, 1.25e-2)
BATCH = 4


class Authors:
    """Their iteration on the images of a batch, with a count of its products."""

    def __init__(self, curvature: Curvature, lambda1: Tensor, lambda2: Tensor, rate: float = 0.03) -> None:
        self.curvature, self.g = curvature, curvature.gradient
        self.lambda1, self.shift, self.rate = lambda1[:, None].to(self.g), 2 * lambda2[:, None].to(self.g), rate

    def power(self, steps: int = 10) -> Tensor:
        """Their estimate of the largest eigenvalue."""
        v = torch.rand(self.g.shape, generator=torch.Generator().manual_seed(0)).to(self.g) - 0.5
        v = v / v.norm(dim=1, keepdim=True)
        for _ in range(steps):
            product = self.curvature.multiply(v)
            value = (v * product).sum(1)
            v = product / product.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return value

    def smooth(self, delta: Tensor, product: Tensor) -> Tensor:
        """``-g^T D - D^T H D / 2 + lambda_2 |D|^2`` of each image."""
        quadratic = (delta * (self.shift * delta - product)).double().sum(1) / 2
        return quadratic - (self.g * delta).double().sum(1)

    def value(self, delta: Tensor, product: Tensor) -> Tensor:
        """The whole of what is minimised."""
        return self.smooth(delta, product) + (self.lambda1 * delta.abs()).double().sum(1)

    def run(self, wanted: Tensor, most: int) -> tuple[int, Tensor, Tensor]:
        """Iterations until every image is at ``wanted``, the values after ten, and the values at the end."""
        B = before = torch.zeros_like(self.g)
        product_B = product_before = torch.zeros_like(self.g)
        tenth = torch.zeros(len(B), dtype=torch.float64)
        for k in range(1, most + 1):
            momentum = (k - 2) / (k + 1)
            V, product_V = B + momentum * (B - before), product_B + momentum * (product_B - product_before)
            slope = self.shift * V - self.g - product_V
            t, here = self.rate, self.smooth(V, product_V).sum()
            while True:
                new = soft(V - t * slope, t * self.lambda1)
                product = self.curvature.multiply(new)
                step = new - V
                bound = here + (slope * step).double().sum() + step.double().square().sum() / (2 * t)
                if self.smooth(new, product).sum() <= bound + 1e-12 * here.abs() or t < 1e-8:
                    break
                t /= 2
            before, product_before, B, product_B = B, product_B, new, product
            value = self.value(B, product_B)
            tenth = value if k == 10 else tenth
            if k >= 10 and bool((value <= wanted).all()):
                break
        return k, tenth, value


def ladder(model: torch.nn.Module, data: list[foveate.Batch], unit: str) -> pd.DataFrame:
    """eta of each image at each lambda_1."""
    rows = []
    for batch in data:
        capture = foveate.Capture(model, batch.x)
        target = capture.target(None)
        for value in FIRST:
            rows += [("cafo", value, e) for e in first_order(capture, target, lambda1=value, unit=unit).eta.tolist()]
        for value, found in zip(SECOND, path(capture, target, SECOND, unit=unit), strict=True):
            rows += [("caso", value, e) for e in found.eta.tolist()]
    return pd.DataFrame(rows, columns=["method", "lambda1", "eta"])


def race(model: torch.nn.Module, data: list[foveate.Batch], unit: str) -> pd.DataFrame:
    """Products and seconds an image of both, to the same value."""
    rows = []
    for batch in data:
        capture = foveate.Capture(model, batch.x)
        target = capture.target(None)
        lambda1 = float(second_order(capture, target, unit=unit).lambda1.median())
        times: dict[str, tuple[float, Solution]] = {}
        for hessian in ("products", "auto"):
            start = time.perf_counter()
            found = second_order(capture, target, lambda1=lambda1, hessian=hessian, unit=unit, tolerance=1e-3)
            times[hessian] = (time.perf_counter() - start) / len(batch), found
        found = times["products"][1]
        start = time.perf_counter()
        scale = capture.model.std if unit == "network" else torch.ones(1, 1, 1, 1)
        curvature = Curvature(capture, target, torch.arange(len(batch)), batch.x[:, None], scale)
        authors = Authors(curvature, torch.full((len(batch),), lambda1), found.lambda2)
        top = authors.power()
        delta = found.delta.flatten(1)
        ours = authors.value(delta, curvature.multiply(delta))
        spent = time.perf_counter() - start
        best = -authors.value(delta, curvature.multiply(delta))
        start, curvature.products = time.perf_counter(), 10
        steps, tenth, _ = authors.run(ours + 1e-6 * ours.abs(), 300)
        seconds = (time.perf_counter() - start + spent) / len(batch)
        for i in range(len(batch)):
            rows.append(
                {
                    "products": int(found.products[i]),
                    "seconds": times["products"][0],
                    "seconds (auto)": times["auto"][0],
                    "authors' iterations": steps,
                    "authors' products": curvature.products,
                    "authors' seconds": seconds,
                    "value after ten / best": float(-tenth[i] / best[i]),
                    "L of ten power steps / L": float(top[i] / found.largest[i]),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", choices=["mobilenet", "squeezenet"], default="squeezenet")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--raced", type=int, default=8)
    parser.add_argument("--unit", choices=["network", "image"], default="network")
    call = parser.parse_args()
    model = network(call.data, call.network)
    source = open_folder(call.data / "imagenet", model.preprocess)
    data = list(batches((source[i] for i in range(max(call.images, call.raced))), BATCH))
    etas = ladder(model, data[: -(-call.images // BATCH)], call.unit)
    for method, rows in etas.groupby("method"):
        means = rows.groupby("lambda1")["eta"].mean()
        each = rows.groupby("lambda1")["eta"].apply(list)
        rising = [all(a <= b for a, b in itertools.pairwise(one)) for one in zip(*each, strict=True)]
        print(f"{call.network} {method}, mean eta of {len(rising)} images, unit {call.unit}:", end=" ")
        print(", ".join(f"{value:g}: {eta:.4f}" for value, eta in means.items()), end="; ")
        print(f"rising in {sum(rising)} of {len(rising)}", flush=True)
    print(race(model, data[: -(-call.raced // BATCH)], call.unit).describe().loc[["mean", "min", "max"]].T.to_string())


if __name__ == "__main__":
    main()
