"""Metrics: insertion and deletion, AD AG AI, a whole table, the randomisation test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytorch_grad_cam
import quantus
import torch
import torchcam.methods
import torchcam.metrics
from benchmarks.peers.agreement import numbers_agree
from benchmarks.peers.networks import Network
from benchmarks.peers.row import Row
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget

import foveate
from foveate import Batch

NINE = ["fake_cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "ablation_cam", "score_cam", "opti_cam", "random"]
softmax = partial(torch.softmax, dim=-1)


def batch_of(network: Network, count: int) -> Batch:
    """Images with their predicted classes, and a box and a mask in the middle: what a metric costs does not depend on them."""
    x, y = network.x[:count], network.y[:count]
    mask = torch.zeros(count, *x.shape[-2:], dtype=torch.bool, device=x.device)
    mask[:, 56:168, 56:168] = True
    boxes = tuple(torch.tensor([[56.0, 56, 168, 168]], device=x.device) for _ in range(count))
    return Batch(x, y, mask, boxes, tuple(f"image {i}" for i in range(count)))


def of_foveate(network: Network, count: int, methods: list[str], metrics: list[str], **settings: Any) -> Callable[[], Any]:
    batch = batch_of(network, count)

    def run() -> list[float]:
        results = foveate.measure(
            network.model, [batch], methods, metrics, layer=network.layer, settings=settings, batch_size=count
        )
        table = results.frame().groupby("column")["value"].mean()
        return [float(table[metric]) for metric in metrics]

    return run


def insertion(networks: dict[str, Network], count: int = 8, steps: int = 24) -> Iterator[Row]:
    for network in networks.values():
        x, y = network.x[:count], network.y[:count]

        def torch_cam(network: Network = network, x: torch.Tensor = x, y: torch.Tensor = y) -> list[float]:
            with torchcam.methods.GradCAM(network.model, network.inner) as extractor:
                metric = torchcam.metrics.DeletionInsertionMetric(extractor, softmax, steps=steps)
                metric.update(x, class_idx=y.tolist())
            found = metric.summary()
            return [100 * found["insertion_auc"], 100 * found["deletion_auc"]]

        yield Row(
            "insertion",
            f"Insertion and deletion of Grad-CAM, {network.name}, {count} images, {steps} steps",
            of_foveate(
                network, count, ["grad_cam"], ["I", "D"], insertion_deletion={"start": "black", "end": "black", "steps": steps}
            ),
            {"torch-cam": torch_cam},
            network.model,
            network.passes.limit("folded", count * (2 * (steps - 1) + 1) + 1),
            f"{count} x (2 x {steps - 1} + 1) + 1 forward, batch norms folded",
            numbers_agree,
            "torch-cam's own maps here explain the probability, foveate's the logit; from one map both give the same areas",
        )
        yield deletion(network, count, steps)


def deletion(network: Network, count: int, steps: int) -> Row:
    """Deletion alone, which is what Quantus has, from maps that foveate makes within the time of both.

    Quantus counts each colour of a pixel, and takes only steps whose size divides the number of pixels: 24 are equal.
    """
    x, y = network.x[:count], network.y[:count]

    def flipping() -> list[float]:
        found = foveate.explain(network.model, x, "grad_cam", layer=network.layer, target=y.tolist())["grad_cam"]
        metric = quantus.PixelFlipping(
            features_in_step=x[0].numel() // steps,
            perturb_baseline="black",
            normalise=False,
            disable_warnings=True,
        )
        curves = metric(
            network.model,
            x.cpu().numpy(),
            y.cpu().numpy(),
            a_batch=found.cpu().numpy()[:, None],
            softmax=True,
            device=x.device,
        )
        points = np.array(curves)  # [B,steps], without the whole image
        return [100 * float((points[:, 1:] + points[:, :-1]).mean()) / 2]

    return Row(
        "insertion",
        f"Deletion of Grad-CAM, {network.name}, {count} images, {steps} steps",
        of_foveate(network, count, ["grad_cam"], ["D"], insertion_deletion={"end": "black", "steps": steps}),
        {"Quantus (PixelFlipping)": flipping},
        network.model,
        network.passes.limit("folded", count * steps + 1),
        f"{count} x ({steps - 1} + 1) + 1 forward, batch norms folded",
        numbers_agree,
        "Quantus' maps here are foveate's; its curve leaves the whole image out",
    )


def recognition(networks: dict[str, Network], count: int = 32) -> Iterator[Row]:
    for network in networks.values():
        x, y = network.x[:count], network.y[:count]

        def torch_cam(network: Network = network, x: torch.Tensor = x, y: torch.Tensor = y) -> list[float]:
            with torchcam.methods.GradCAM(network.model, network.inner) as extractor:
                metric = torchcam.metrics.ClassificationMetric(extractor, softmax)
                metric.update(x, class_idx=y.tolist())
            found = metric.summary()
            return [100 * found["avg_drop"], 100 * found["conf_increase"]]

        def grad_cam(network: Network = network, x: torch.Tensor = x, y: torch.Tensor = y) -> list[float]:
            with pytorch_grad_cam.GradCAM(network.model, [network.inner]) as cam:
                found = cam(input_tensor=x, targets=[ClassifierOutputTarget(c) for c in y.tolist()])
            targets = [ClassifierOutputSoftmaxTarget(c) for c in y.tolist()]
            drop = DropInConfidence()(x, found, targets, network.model)
            rise = IncreaseInConfidence()(x, found, targets, network.model)
            return [100 * float(drop.mean()), 100 * float(rise.mean())]

        yield Row(
            "recognition",
            f"AD, AI (and AG) of Grad-CAM, {network.name}, {count} images",
            of_foveate(network, count, ["grad_cam"], ["AD", "AI"]),
            {"torch-cam": torch_cam, "pytorch-grad-cam": grad_cam},
            network.model,
            network.passes.limit("forward", 2 * count),
            f"{2 * count} forward",
            numbers_agree,
            "pytorch-grad-cam's drop is not relative to the probability; torch-cam explains the probability; neither has AG",
        )


def table(networks: dict[str, Network], count: int = 50) -> Iterator[Row]:
    network = networks["MobileNet-V2"]
    batch = batch_of(network, count)
    data = [Batch(batch.x[i : i + 8], batch.y[i : i + 8], batch.mask[i : i + 8], batch.boxes[i : i + 8], batch.id[i : i + 8])
            for i in range(0, count, 8)]  # fmt: skip
    yield Row(
        "table",
        f"A whole table: {len(NINE)} methods x all metrics on {count} images, {network.name}",
        lambda: foveate.measure(network.model, data, NINE, "all", layer=network.layer),
        model=network.model,
        limit=network.passes.counted,
        fewest="no limit: the passes that foveate itself makes, each at its best, so that overhead shows and waste does not",
        remark="no peer makes this table; 'all' are all metrics but the costly ones, which are asked for by name",
    )


def randomisation(networks: dict[str, Network], count: int = 4) -> Iterator[Row]:
    network = networks["MobileNet-V2"]
    x, y = network.x[:count], network.y[:count]
    layers = sum(1 for m in network.model.modules() if next(m.parameters(recurse=False), None) is not None)

    def saliency(model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        found = captum.attr.Saliency(model).attribute(torch.as_tensor(inputs), target=torch.as_tensor(targets))
        return found.amax(1, keepdim=True).detach().cpu().numpy()

    def theirs() -> list[float]:
        metric = quantus.MPRT(
            similarity_func=quantus.correlation_spearman,
            layer_order="top_down",
            abs=False,
            normalise=False,
            return_average_correlation=True,
            disable_warnings=True,
        )
        return [
            float(np.mean(metric(network.model, x.cpu().numpy(), y.cpu().numpy(), explain_func=saliency, batch_size=count)))
        ]

    yield Row(
        "randomisation",
        f"Model-parameter randomisation of the gradient, {network.name}, {layers} layers, {count} images",
        of_foveate(network, count, ["gradient"], ["randomisation"], randomisation={"stages": 0}),
        {"Quantus (MPRT)": theirs},
        network.model,
        network.passes.limit("backward", (layers + 1) * count, most=count),
        f"({layers} + 1) x {count} forward and backward",
        lambda a, b: f"mean rank correlation {a[0]:.3f} and {b[0]:.3f}",
        "each draws its own weights",
    )
