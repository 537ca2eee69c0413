"""Runs: an evaluation on disk, which can be killed at any moment and goes on where it stopped, on one device or many."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.evaluate import Plan, batches, readable
from foveate.results import Results, joined, read_all, write

ROWS, RECORD = "rows", "run.json"
WIDTH = 6  # digits of a chunk's name


class Workers:
    """The processes of a run: this one alone, or those of Lightning Fabric.

    Attributes:
        rank, count: which of them this is, and how many there are.
        device: where the model of this one goes; None for where it is.
    """

    def __init__(self, devices: int = 1, accelerator: str = "cpu") -> None:
        self.rank, self.count = 0, 1
        self.device: torch.device | None = None
        self._fabric: Any = None
        world = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if devices == 1 and world == 1:
            return
        from lightning.fabric import Fabric

        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else devices
        nodes = max(1, world // local) if world > 1 else 1
        try:
            self._fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=nodes, strategy="ddp")
            self._fabric.launch()
        except (RuntimeError, ValueError) as error:
            raise FoveateError(f"--devices {devices} cannot be used here: {str(error).splitlines()[0]}") from None
        self.rank, self.count, self.device = self._fabric.global_rank, self._fabric.world_size, self._fabric.device
        if accelerator == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))

    def wait(self) -> None:
        """Until all have come here."""
        if self._fabric is not None:
            self._fabric.barrier()


def fingerprint(model: nn.Module, ids: list[str], plan: Plan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on: the call, the protocol, the images and the model's weights."""
    weights = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    images = hashlib.blake2b("\n".join(ids).encode(), digest_size=8).hexdigest()
    own = {name: dict(values) for name, values in plan.own.items()}
    digests = {"images": images, "weights": weights.hexdigest(), "protocol": plan.protocol.record(), "settings": own}
    return json.loads(json.dumps({**arguments, **digests}, default=str))  # type: ignore[no-any-return]


def prepare(folder: Path, identity: Mapping[str, Any], resume: bool, about: Mapping[str, Any]) -> None:
    """Make the folder ready: empty for a new run, checked for one that goes on.

    Raises:
        FoveateError: an unfinished run is there and ``resume`` was not asked for, or it was another run.
    """
    (folder / ROWS).mkdir(parents=True, exist_ok=True)
    record = read_record(folder)
    if record and resume:
        before = record.get("identity", {})
        for name in dict.fromkeys([*identity, *before]):
            if identity.get(name) != before.get(name):
                raise FoveateError(
                    f"{folder} holds another run and cannot be resumed: {name} was {_short(before.get(name))}, and is now "
                    f"{_short(identity.get(name))}; use the same call, or another --out"
                )
    elif record and not record.get("finished", True):
        raise FoveateError(
            f"{folder} holds a run that was not finished: go on with --resume, use another --out, or take the folder away"
        )
    for path in (folder / ROWS).glob("*" if not resume else ".*"):
        path.unlink()
    write_record(folder, {**about, "identity": dict(identity), "finished": False})


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run; empty where there is none.

    Raises:
        FoveateError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise FoveateError(f"{path} is damaged: take it away, or use another --out") from None
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    waiting = folder / f".{RECORD}.{os.getpid()}"
    waiting.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(waiting, folder / RECORD)


def run(
    model: nn.Module,
    source: Any,
    plan: Plan,
    folder: Path,
    *,
    batch_size: int = 8,
    workers: Workers | None = None,
    strict: bool = False,
    tick: Callable[[int], object] = lambda images: None,
) -> None:
    """Measure what is not measured yet, a file a batch: batch k belongs to worker ``k mod count``.

    Batches are the same whatever the number of workers, and so is every value.

    Args:
        source: a data set of single images with a length.
        strict: an image that cannot be read stops the run.
        tick: called with the number of images that were done, for a progress bar.

    Raises:
        FoveateError: nothing can be measured, or with ``strict`` an image cannot be read.
    """
    workers = workers or Workers()
    starts = range(0, len(source), batch_size)
    mine = [number for number in range(len(starts)) if number % workers.count == workers.rank]
    waiting = [number for number in mine if not chunk(folder, number).exists()]
    tick(sum(min(batch_size, len(source) - starts[number]) for number in mine if number not in set(waiting)))
    for number, (loaded, failures) in _ahead(source, waiting, starts, batch_size):
        if strict and failures:
            raise FoveateError(f"{failures[0][1]} (--strict stops here)")
        part = joined(plan.run(model, batch, number) for batch in loaded)
        part.failures = failures
        write(part, chunk(folder, number))
        tick(min(batch_size, len(source) - starts[number]))


def chunk(folder: Path, number: int) -> Path:
    """The file of a batch."""
    return folder / ROWS / f"{number:0{WIDTH}d}.parquet"


def load(folder: Path) -> Results:
    """The results of a run.

    Raises:
        FoveateError: it is not a run, or it is not finished.
    """
    record = read_record(folder)
    if not record or not (folder / ROWS).is_dir():
        raise FoveateError(f"{folder} is not a run of foveate evaluate: it has no {RECORD}")
    if not record.get("finished", True):
        raise FoveateError(f"{folder} is not finished: go on with foveate evaluate ... --resume")
    return read_all(folder / ROWS)


def _ahead(
    source: Any, numbers: list[int], starts: range, batch_size: int
) -> Iterator[tuple[int, tuple[list[Batch], list[tuple[str, str]]]]]:
    """Batches in order, the next one read while this one is measured."""

    def load_one(number: int) -> tuple[list[Batch], list[tuple[str, str]]]:
        failures: list[tuple[str, str]] = []
        order = range(starts[number], min(starts[number] + batch_size, len(source)))
        return list(batches(readable(source, order, failures), batch_size)), failures

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(load_one, numbers[0]) if numbers else None
        for place, number in enumerate(numbers):
            assert following is not None
            loaded = following.result()
            if place + 1 < len(numbers):
                following = pool.submit(load_one, numbers[place + 1])
            yield number, loaded


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."
