"""Runs the rows that are asked for, keeps each as it comes, and writes the page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.peers import cams, gradients, losses, measures, page, processes, searches
from benchmarks.peers.networks import Network, networks
from benchmarks.peers.row import Row, run

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with zoo.py, weights/ and imagenet/, for real weights")
    parser.add_argument("--rows", default="all", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in --out already")
    call = parser.parse_args()
    wanted = list(PARTS) if call.rows == "all" else call.rows.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        sys.exit(f"--rows {unknown[0]!r} is unknown: use {', '.join(PARTS)}")
    call.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(call.device)
    place = call.out / f"rows_{device.type}.json"
    kept = {one["title"]: one for one in json.loads(place.read_text())["rows"]} if place.exists() else {}
    machine = page.machine(device)
    print(machine, flush=True)
    nets = networks(call.data, device)
    for part in wanted:
        for row in PARTS[part](nets):
            if row.title in kept and not call.again:
                continue
            outcome = run(row, device).record()
            kept[row.title] = outcome
            print(page.line(outcome), flush=True)
            place.write_text(json.dumps({"machine": machine, "rows": list(kept.values())}, indent=1), encoding="utf-8")
    page.write(list(kept.values()), machine, call.out, device.type)
    print(f"written: {call.out / 'performance.md'}, {call.out / 'performance.png'}")


if __name__ == "__main__":
    main()
