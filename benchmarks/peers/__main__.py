"""Runs the rows that are asked for, keeps each as it comes, and writes the page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers import cams, gradients, losses, measures, page, processes, searches
from benchmarks.peers.networks import Network, networks
from benchmarks.peers.row import Row, run

import foveate
from foveate.precision import has_bf16

Networks = dict[str, Network]
PARTS: dict[str, Callable[[Networks], Iterator[Row]]] = {
    "cams": cams.rows,
    "ablation": cams.ablation,
    "gradients": gradients.rows,
    "insertion": measures.insertion,
    "recognition": measures.recognition,
    "randomisation": measures.randomisation,
    "losses": lambda _: losses.rows(),
    "opti": searches.opti_cam,
    "extremal": searches.extremal,
    "rise": searches.rise,
    "growth": processes.growth,
    "process": lambda _: processes.rows(),
    "table": measures.table,
    "score": searches.score_cam,
}


CPU_ALONE = ("losses", "process")  # of another device than the one that is asked for


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with zoo.py, weights/ and imagenet/, for real weights")
    parser.add_argument("--rows", default="all", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--give-back", action="store_true", help="give freed memory back, as Python does unasked")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in --out already")
    call = parser.parse_args()
    device = torch.device(call.device)
    parts = {name: rows for name, rows in PARTS.items() if device.type == "cpu" or name not in CPU_ALONE}
    wanted = list(parts) if call.rows == "all" else call.rows.split(",")
    if unknown := [name for name in wanted if name not in parts]:
        sys.exit(f"--rows {unknown[0]!r} is unknown: use {', '.join(parts)}")
    if not call.give_back and not foveate.keep_memory():  # for everybody
        print("freed memory cannot be kept here: batches will be slower, everybody's", file=sys.stderr)
    call.out.mkdir(parents=True, exist_ok=True)
    place = call.out / f"rows_{device.type}.json"
    machine = page.machine(device, call.data is not None)
    print(machine, flush=True)
    kept = known(place, machine)
    if has_bf16(device.type) is False:
        print("no instructions for bf16 here: its rows are left out", file=sys.stderr)
    nets = networks(call.data, device)
    for part in wanted:
        for row in parts[part](nets):
            if row.title in kept and not call.again:
                continue
            kept[row.title] = run(row, device).record()
            print(page.line(kept[row.title]), flush=True)
            place.write_text(json.dumps({"machine": machine, "rows": list(kept.values())}, indent=1), encoding="utf-8")
    print(f"written: {page.write(list(kept.values()), machine, call.out, device.type)}")


def known(place: Path, machine: str) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run; those of another machine, version or data are set aside."""
    if not place.exists():
        return {}
    document = json.loads(place.read_text(encoding="utf-8"))
    if document["machine"] != machine:
        aside = place.with_suffix(".old.json")
        place.replace(aside)
        print(f"{place} is of another source, other versions, data or another machine: it is {aside} now", flush=True)
        return {}
    return {one["title"]: one for one in document["rows"]}


if __name__ == "__main__":
    main()
