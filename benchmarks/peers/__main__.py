"""Runs the rows that are asked for, keeps each as it comes, and writes the page."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.peers import cams, gradients, losses, measures, page, processes, searches
from benchmarks.peers.kept import Kept
from benchmarks.peers.networks import Network, networks
from benchmarks.peers.row import Row, run

import foveate

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


CPU_ALONE = ("losses", "process")  # of another device than the one that is asked for, and without the networks
NEEDED = ("zoo.py", "imagenet/labels.csv", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help=f"folder with {', '.join(NEEDED)}, for real weights")
    parser.add_argument("--rows", default="all", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--give-back", action="store_true", help="give freed memory back, as Python does unasked")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in --out already")
    call = parser.parse_args()
    device = known_device(call.device)
    parts = {name: rows for name, rows in PARTS.items() if device.type == "cpu" or name not in CPU_ALONE}
    wanted = list(parts) if call.rows == "all" else [name.strip() for name in call.rows.split(",")]
    if unknown := [name for name in wanted if name not in parts]:
        sys.exit(f"--rows {unknown[0]!r} is unknown: use {', '.join(parts)}")
    if call.data is not None and (missing := [name for name in NEEDED if not (call.data / name).exists()]):
        sys.exit(f"{str(call.data)!r} has no {missing[0]}: leave the folder out for random weights and noise")
    if not call.give_back and not foveate.keep_memory():  # for everybody
        print("freed memory cannot be kept here: batches will be slower, everybody's", file=sys.stderr)
    kept = Kept(call.out, device.type, page.machine(device, call.data), page.commit())
    print(kept.machine, flush=True)
    if kept.rows:
        print(f"{len(kept.rows)} row(s) of earlier runs are in {kept.place}", flush=True)
    nets = functools.cache(lambda: networks(call.data, device))
    try:
        for part in wanted:
            for row in parts[part]({} if part in CPU_ALONE else nets()):
                if row.title in kept.rows and not call.again:
                    continue
                kept.add(run(row, device).record())
                print(page.line(kept.rows[row.title]), flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        if kept.rows:
            print(f"written: {page.write(list(kept.rows.values()), kept.machine, call.out, device.type)}")


def known_device(name: str) -> torch.device:
    """The device, if it is there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}")
    return device


if __name__ == "__main__":
    main()
