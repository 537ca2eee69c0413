"""What each loss does, and what it costs: the experiments of docs/training.md.

    python benchmarks/training.py scenes --out DIR                 # seven recipes, seeds 0 to 4
    python benchmarks/training.py caltech --data DATA --out DIR    # DATA/caltech: labels.csv (file, name); five folds
    python benchmarks/training.py pets --data DATA --out DIR       # DATA/pets: labels.csv (file, mask, species); five folds
    python benchmarks/training.py cifar10 --data DATA --out DIR    # DATA/cifar10/*.npz and DATA/zoo.py:resnet20_cifar10
    python benchmarks/training.py ca_stream --data DATA --out DIR  # DATA/imagenet, DATA/pets, zoo.py:mobilenet_v2_folded
    python benchmarks/training.py cost                             # a step of each loss over one of cross-entropy

Finished runs are left as they are, so that it goes on where it stopped. ``foveate compare DIR/*`` makes the tables.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import foveate
from foveate.registry import LOSSES
from foveate.report import training
from foveate.training.module import Training
from foveate.training.recipe import Recipe, read_recipe
from foveate.training.train import train

Runs = Iterator[tuple[str, Recipe]]
SCENES = ("plain", "augmented", "cam_loss", "ace", "ace_divergence", "mass_outside", "interpretable_gradients")
IG = {"name": "interpretable_gradients", "weight": 0.0075}
MASKED: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "cam_loss": [{"name": "cam_loss"}],
    "ace": [{"name": "ablated_cross_entropy"}],
    "ace_divergence": [{"name": "ablated_cross_entropy"}, {"name": "divergence", "weight": 0.001}],
    "mass_outside": [{"name": "mass_outside"}],
    "interpretable_gradients": [IG],
}


def scenes(data: Path, out: Path) -> Runs:
    for seed in range(5):
        for name in SCENES:
            yield f"{name}-{seed}", read_recipe(f"scenes_{name}", {"seed": seed})


def caltech(data: Path, out: Path) -> Runs:
    """Leopards and dolphins, no masks."""
    folder = data / "caltech"
    for fold in range(5):
        place = {"data.train": str(folder), "data.fold": fold}
        for name in ("caltech_plain", "caltech_cam_loss", "caltech_cam_loss_constant"):
            yield f"{name.removeprefix('caltech_')}-{fold}", read_recipe(name, place, small=True)
        change = {**place, "losses": [IG], "name": "interpretable_gradients"}
        yield f"interpretable_gradients-{fold}", read_recipe("caltech_plain", change, small=True)


def pets(data: Path, out: Path) -> Runs:
    """Cats and dogs with masks."""
    folder = out / "species"
    folder.mkdir(parents=True, exist_ok=True)
    with (data / "pets" / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "name", "mask"])
        writer.writerows([data / "pets" / row["file"], row["species"], data / "pets" / row["mask"]] for row in rows)
    for fold in range(5):
        for name, losses in MASKED.items():
            change = {"data.train": str(folder), "data.fold": fold, "name": name, "losses": losses, "keep": "last"}
            yield f"{name}-{fold}", read_recipe("pets_species", change, small=True)


def cifar10(data: Path, out: Path) -> Runs:
    """Fine-tuning a trained ResNet-20 on 72 % of 600 images, a tenth of the rest for validation, measured on a fifth."""
    folder = out / "images"
    if not folder.is_dir():
        arrays = np.load(next((data / "cifar10").glob("*.npz")))
        for index, (pixels, label) in enumerate(zip(arrays["x"], arrays["y"], strict=True)):
            place = folder / f"{int(label)}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index:04d}.png")
    base = {
        "model": f"{data / 'zoo.py'}:resnet20_cifar10",
        "size": 32,
        "epochs": 6,
        "learning_rate": 0.001,
        "augment.flip": True,
        "augment.crop_padding": 4,
        "augment.rotation": 0,
        "rebalance": False,
        "data.folds": 5,
        "data.train": str(folder),
        "data.hold_out": 0.1,
        "measure.method": "grad_cam",
        "measure.images": 120,
    }
    arms = {
        "plain": 0.0,
        "interpretable_gradients": 0.0075,
        "interpretable_gradients_0.1": 0.1,
        "interpretable_gradients_1": 1.0,
    }
    for fold in range(5):
        for name, weight in arms.items():
            losses = [{"name": "interpretable_gradients", "weight": weight}] if weight else []
            yield f"{name}-{fold}", read_recipe("caltech_plain", {**base, "data.fold": fold, "name": name, "losses": losses})


def ca_stream(data: Path, out: Path) -> Runs:
    """A stream beside a MobileNet-V2 with real weights, on the photographs of ImageNet and pets; backbone frozen."""
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in ("imagenet", "pets"):
        with (data / name / "labels.csv").open(encoding="utf-8") as file:
            lines += [[data / name / row["file"], row["class_index"]] for row in csv.DictReader(file)]
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "class_index"], *lines])
    base = {
        "model": f"{data / 'zoo.py'}:mobilenet_v2_folded",
        "pretrained": False,
        "mean": [0.5],
        "std": [0.5],
        "data": {"train": str(folder), "folds": 5, "hold_out": 0.1},
        "size": None,
        "measure.images": 0,
        "film.images": 0,
    }
    for fold in range(5):
        yield f"ca_stream-{fold}", read_recipe("imagenet_ca_stream", {**base, "data.fold": fold}, small=True)


def ca_scenes(data: Path, out: Path) -> Runs:
    """A stream beside each of the five networks that plain training on the scenes gave; --data is their folder."""
    for seed in range(5):
        change = {
            "seed": seed,
            "name": "ca_stream",
            "ca_stream": True,
            "weights": str(data / f"plain-{seed}" / "model.safetensors"),
        }
        yield f"ca_stream-{seed}", read_recipe("scenes_plain", {**change, "cache_features": True})


def cost(rounds: int = 15) -> None:
    """Time of a training step, each loss in turns with cross-entropy, and what it keeps in memory."""
    for name, size, count in (("foveate:small_cnn", 96, 32), ("torchvision:resnet18", 112, 16)):
        print(f"{name}, {count} images of {size} pixels, {torch.get_num_threads()} threads")
        loaded = {loss: load(name, size, count, loss) for loss in (None, *LOSSES.all())}
        steps = {loss: step(*loaded[loss]) for loss in loaded}
        times: dict[Any, list[float]] = {loss: [] for loss in steps}
        for _ in range(rounds + 2):
            for loss, run in steps.items():
                start = time.perf_counter()
                run()
                times[loss].append(time.perf_counter() - start)
        plain = times[None][2:]
        for loss, values in times.items():
            ratios = sorted(v / p for v, p in zip(values[2:], plain, strict=True))
            low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4 - 1]
            ratio = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
            milliseconds, kept = 1000 * statistics.median(values[2:]), memory(*loaded[loss])
            print(f"| {loss or 'cross-entropy'} | {milliseconds:.0f} ms | {ratio} | {kept:.0f} MB |", flush=True)


def load(name: str, size: int, count: int, loss: str | None) -> tuple[Training, foveate.Batch]:
    """A network that is trained by a loss, and a batch for it."""
    torch.manual_seed(0)
    x, y = torch.rand(count, 3, size, size), torch.randint(2, (count,))
    mask = torch.zeros(count, size, size, dtype=torch.bool)
    mask[:, size // 4 : -size // 4, size // 4 : -size // 4] = True
    batch = foveate.Batch(x.contiguous(memory_format=torch.channels_last), y, mask)
    model = foveate.load(name, num_classes=2).train().to(memory_format=torch.channels_last)
    return Training(model, Recipe(losses=[] if loss is None else [{"name": loss}], epochs=1)), batch


def step(module: Training, batch: foveate.Batch) -> Callable[[], None]:
    """One training step: forward, backward, optimiser."""
    optimizer = torch.optim.SGD(module.parameters(), 0.001, momentum=0.9)

    def run() -> None:
        module._sums = {}
        optimizer.zero_grad()
        module.loss_of(batch, 0.0).backward()
        optimizer.step()

    return run


def memory(module: Training, batch: foveate.Batch) -> float:
    """Megabytes that a step keeps for its backward pass, each storage once; what is freed on the way does not count."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.loss_of(batch, 0.0)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total / 1e6


EXPERIMENTS = {
    "scenes": scenes,
    "caltech": caltech,
    "pets": pets,
    "cifar10": cifar10,
    "ca_stream": ca_stream,
    "ca_scenes": ca_scenes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", *EXPERIMENTS])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("training"))
    call = parser.parse_args()
    if call.what == "cost":
        cost()
        return
    out = call.out
    for name, recipe in EXPERIMENTS[call.what](call.data, out):
        folder = out / "runs" / name
        if not (folder / "run.json").is_file():
            run = train(recipe, folder, overwrite=True)
            training.write(folder)
            print(name, run.outcome["accuracy"], flush=True)


if __name__ == "__main__":
    main()
