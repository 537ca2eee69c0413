"""Peak memory and time of a whole evaluation, page included, as the number of images grows; synthetic images, a small network.

    python benchmarks/growth.py [--counts 100,1000,10000]

Each count runs in a process of its own; memory is the most that the process held (VmHWM), beside that of a run of 8 images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import foveate
from foveate import Batch
from foveate.evaluation import runs
from foveate.evaluation.evaluate import Plan
from foveate.report import evaluation

SIZE, BATCH = 32, 50
METHODS, METRICS = ["grad_cam", "layer_cam", "fake_cam", "random", "centre"], "all"


class Synthetic(Dataset[Batch]):
    """Noise with a box and a mask, made when it is asked for."""

    class_names = None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(1, 3, SIZE, SIZE, generator=generator)
        mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
        mask[:, 8:24, 4:20] = True
        return Batch(x, torch.tensor([index % 10]), mask, (torch.tensor([[4.0, 8, 20, 24]]),), (f"image {index:05d}",))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(self.count))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def one(count: int) -> None:
    model, source, plan = network(), Synthetic(count), Plan.of(METHODS, METRICS, keep_maps=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.perf_counter()
        images = runs.Images.of(source, BATCH)
        runs.prepare(folder, {}, False, {}, images)
        runs.run(model, images, plan, folder, {})
        measured = time.perf_counter()
        evaluation.write(folder, runs.results_of(folder), plan, source, model, None, {})
        written = time.perf_counter()
        page = (folder / "report.html").stat().st_size / 2**20
        rows = sum(path.stat().st_size for path in (folder / "rows").iterdir()) / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    peak = float(status["VmHWM"].split()[0]) / 1024
    print(
        f"{count:7d} images  {peak:7.0f} MB  {measured - start:7.1f} s measured  {written - measured:6.1f} s table and page  "
        f"rows {rows:6.1f} MB  page {page:5.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="8,100,1000,10000")
    parser.add_argument("--one", type=int)
    call = parser.parse_args()
    if call.one:
        torch.set_num_threads(1)
        one(call.one)
        return
    print(f"foveate {foveate.__version__}, torch {torch.__version__}, {len(METHODS)} methods, metrics {METRICS}")
    for count in call.counts.split(","):
        subprocess.run([sys.executable, __file__, "--one", count], check=True)


if __name__ == "__main__":
    main()
