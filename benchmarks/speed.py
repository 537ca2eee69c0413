"""Post-hoc methods beside their limits and beside pytorch-grad-cam: ratios within one process, taken in turns.

    python benchmarks/speed.py [DATA] [--repeats 3] [--rows score,opti,...]

A limit is the fewest passes that the definition allows, times the time of such a pass at its best batch (1 to 32) and memory
layout here, taken in the same turns over as many passes: the least of a few single passes is what no long run sustains.

ResNet-50 has random weights. With DATA, MobileNet-V2 has real ones, and photographs show what bf16 does to a map.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import foveate
from foveate import Capture, maps
from foveate._torchvision import timm, torchvision
from foveate.data.folder import open_folder
from foveate.registry import METHODS

torchvision()
import pytorch_grad_cam  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(
    runs: dict[str, Callable[[], object]], repeats: int, limits: dict[str, Callable[[], float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each, one after the other, ``repeats`` times round; ``limits`` say their seconds themselves."""
    times: dict[str, list[float]] = {name: [] for name in (*runs, *(limits or {}))}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
        for name, limit in (limits or {}).items():
            times[name].append(limit())
    return times


def line(title: str, times: dict[str, list[float]], over: str, under: str) -> None:
    """One ratio, median of the rounds' own ratios, with their range."""
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    print(f"{title:66s} {statistics.median(ratios):8.2f} {spread:16s} {statistics.median(times[over]):9.3f} s", flush=True)


def best_pass(model: nn.Module, size: int, kind: str) -> Callable[[int], float]:
    """The fastest forward pass, or forward and backward pass to the image: from a number of images to their seconds."""
    for p in model.parameters():
        p.requires_grad_(False)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16")

    def run(x: Tensor, layout: torch.memory_format) -> None:
        if kind == "backward":
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(model(leaf.contiguous(memory_format=layout))[:, 0].sum(), leaf)
        else:
            with torch.inference_mode(), cast:
                model(x.contiguous(memory_format=layout))

    found: dict[tuple[int, torch.memory_format], float] = {}
    for count in (1, 4, 8, 16, 32):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.rand(count, 3, size, size)
            run(x, layout)
            found[count, layout] = min(timed(lambda x=x, layout=layout: run(x, layout)) for _ in range(3)) / count
    count, layout = min(found, key=lambda key: found[key])
    x = torch.rand(count, 3, size, size)

    def sustained(images: int) -> float:
        passes = max(1, min(images, 128) // count)
        return timed(lambda: [run(x, layout) for _ in range(passes)]) * images / (passes * count)

    return sustained


def score_cam(name: str, model: nn.Module, layer: str, x: Tensor, repeats: int) -> None:
    inner = dict(model.named_modules())[layer]
    theirs = pytorch_grad_cam.ScoreCAM(model, [inner])
    y = int(model(x[:1]).argmax())
    live = int((~maps.is_constant(Capture(model, x[:1]).activations().detach()[0])).sum())

    def ours(precision: str) -> Tensor:
        capture = Capture(model, x[:1], precision=precision)
        return METHODS.get("score_cam")(capture, None, capture.target(y))

    limit, half = (best_pass(model, x.shape[-1], kind) for kind in ("forward", "bf16"))
    runs = {
        "fp32": lambda: ours("fp32"),
        "bf16": lambda: ours("bf16"),
        "theirs": lambda: theirs(input_tensor=x[:1], targets=[ClassifierOutputTarget(y)]),
    }
    times = in_turns(runs, repeats, {"limit": lambda: limit(live), "half": lambda: half(live)})
    line(f"Score-CAM, {name}: pytorch-grad-cam / foveate fp32", times, "theirs", "fp32")
    line(f"Score-CAM, {name}: pytorch-grad-cam / foveate bf16", times, "theirs", "bf16")
    line(f"Score-CAM, {name}: fp32 / {live} live channels x best forward", times, "fp32", "limit")
    line(f"Score-CAM, {name}: bf16 / {live} live channels x best forward", times, "bf16", "half")


def ablation_cam(name: str, model: nn.Module, x: Tensor, repeats: int) -> None:
    def ours() -> Tensor:
        capture = Capture(model, x[:1])
        return METHODS.get("ablation_cam")(capture, None, capture.target(0))

    ours()
    with torch.inference_mode():
        times = in_turns({"ours": ours, "forward": lambda: model(x[:1])}, 5 * repeats)
    line(f"Ablation-CAM, {name}: foveate, its run included / one forward", times, "ours", "forward")


def opti_cam(name: str, model: nn.Module, x: Tensor, repeats: int, steps: int = 100) -> None:
    def ours() -> Tensor:
        capture = Capture(model, x)
        return METHODS.get("opti_cam")(capture, None, capture.target(0), steps=steps)

    def plain() -> None:
        for _ in range(steps):
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    ours()
    limit = best_pass(model, x.shape[-1], "backward")
    times = in_turns({"ours": ours, "plain": plain}, repeats, {"limit": lambda: limit(steps * len(x))})
    line(f"Opti-CAM, {name}, batch {len(x)}: / steps x forward and backward of that batch", times, "ours", "plain")
    line(f"Opti-CAM, {name}, batch {len(x)}: / steps x best forward and backward", times, "ours", "limit")


def half_precision(model: foveate.models.load.Classifier, data: Path, count: int) -> None:
    source = open_folder(data / "imagenet", model.preprocess)
    x = torch.cat([source[i].x for i in range(count)])
    results = []
    for precision in ("fp32", "bf16"):
        capture = Capture(model, x, precision=precision)
        results.append(METHODS.get("score_cam")(capture, None, capture.target(None)))
    values = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(*results, strict=True)]
    middle, least = statistics.median(values), min(values)
    print(f"Score-CAM on {count} photographs: Spearman of bf16 and fp32, median {middle:.4f}, least {least:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default="ablation,opti,score,bf16")
    call = parser.parse_args()
    torch.manual_seed(0)
    rows = call.rows.split(",")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{'':66s}    ratio [range]                 time",
        flush=True,
    )
    networks: dict[str, tuple[nn.Module, str]] = {
        "ResNet-50": (foveate.normalized(timm().create_model("resnet50").eval()), "model.layer4")
    }
    if call.data:
        mobilenet = foveate.load(f"{call.data / 'zoo.py'}:mobilenet_v2_folded", mean=(0.5,), std=(0.5,))
        networks["MobileNet-V2"] = (mobilenet, "model.features")
        if "bf16" in rows:
            half_precision(mobilenet, call.data, 8)
    for name, (model, layer) in networks.items():
        x = torch.rand(8, 3, 224, 224)
        if "ablation" in rows:
            ablation_cam(name, model, x, call.repeats)
        if "opti" in rows:
            for count in (1, 8):
                opti_cam(name, model, x[:count], call.repeats)
        if "score" in rows:
            score_cam(name, model, layer, x, 1 if name == "ResNet-50" else call.repeats)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
