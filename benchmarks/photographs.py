"""A table of AD, AG, AI and seconds per image: every method and control on real photographs.

    python benchmarks/photographs.py DATA --network squeezenet [--methods a,b@setting=value] [--limit 200] [--out DIR]

DATA has ``imagenet/labels.csv`` and ``weights/``. Rows are appended as they come: started again, it goes on where it
stopped. Some methods take long: extremal perturbation of 200 images hours, of which ``--precision bf16`` saves two
thirds on a processor that has it. Seconds are of the method alone, on a fresh run of the model, batches of 8, median over
batches.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

import foveate
from foveate import maps
from foveate.cli.options import own_settings
from foveate.data.folder import open_folder
from foveate.evaluation.evaluate import batches
from foveate.evaluation.intervals import interval
from foveate.metrics.recognition import recognition
from foveate.models.classifier import Classifier
from foveate.registry import METHODS, check_settings

BATCH = 8
SETTINGS: dict[str, dict[str, object]] = {"rise": {"masks": 1000}}
VARIANTS = ("score_cam@weighting=probability", "score_cam@weighting=increase", "opti_cam@objective=probability")


def network(data: Path, name: str) -> Classifier:
    weights = data / "weights"
    if name == "squeezenet":
        return foveate.load("torchvision:squeezenet1_1", weights=weights / "squeezenet1_1.safetensors")
    if name == "vit":
        return foveate.load("timm:vit_tiny_patch16_224", weights=weights / "vit_tiny_patch16_224.safetensors")
    return foveate.load(f"{data / 'zoo.py'}:mobilenet_v2_folded", mean=(0.5,), std=(0.5,))


def measure(model: Classifier, name: str, data: Path, file: Path, limit: int, precision: str) -> None:
    """Append the rows of one method: id, AD, AG, AI, constant or not, seconds."""
    base, _, variant = name.partition("@")
    record, settings = METHODS.get(base), dict(SETTINGS.get(base, {}))
    if variant:
        settings |= check_settings(record, own_settings([f"{base}.{variant}"])[base])
    source = open_folder(data / "imagenet", model.preprocess)
    count = min(limit, len(source))
    done = {row["id"] for row in csv.DictReader(file.open())} if file.exists() else set()
    for batch in batches((source[i] for i in range(count)), BATCH):
        if set(batch.id) <= done:
            continue
        capture = foveate.Capture(model, batch.x, precision=precision)
        target = capture.target("label", labels=batch.y)
        start = time.perf_counter()
        raw = record(capture, capture.layer, target, **settings).detach()
        seconds = (time.perf_counter() - start) / len(batch)
        values = recognition(foveate.Capture(model, batch.x), maps.prepare(raw, capture.size), batch)
        constant = maps.is_constant(raw.clamp(min=0))
        with file.open("a", newline="") as out:
            writer = csv.writer(out)
            if out.tell() == 0:
                writer.writerow(["id", "AD", "AG", "AI", "constant", "seconds"])
            for i, id_ in enumerate(batch.id):
                writer.writerow([id_, *(float(values[c][i]) for c in ("AD", "AG", "AI")), int(constant[i]), seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", choices=["mobilenet", "squeezenet", "vit"], default="squeezenet")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, default=Path("photographs"))
    call = parser.parse_args()
    folder = call.out / call.network
    folder.mkdir(parents=True, exist_ok=True)
    model = network(call.data, call.network)
    lines = []
    for name in [*METHODS.all(), *VARIANTS] if call.methods == "all" else call.methods.split(","):
        file = folder / f"{name}.csv"
        try:
            measure(model, name, call.data, file, call.limit, call.precision)
        except foveate.FoveateError as error:
            print(f"{name}: {error}", flush=True)
            continue
        rows = pd.read_csv(file)
        cells = []
        for column in ("AD", "AG", "AI"):
            low, high = interval(rows[column].to_numpy(), (0, 100))
            cells.append(f"{rows[column].mean():.1f} [{low:.1f}, {high:.1f}]")
        seconds = statistics.median(rows["seconds"])
        lines.append([name, *cells, f"{seconds:.3f}", str(len(rows)), str(int(rows["constant"].sum()))])
        print("  ".join(lines[-1]), flush=True)
    header = ["method", "AD ↓", "AG ↑", "AI ↑", "seconds", "images", "constant"]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(2)
    foveate.keep_memory()
    main()
