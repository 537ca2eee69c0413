"""Runs: an evaluation on disk, which can be killed at any moment and goes on where it stopped, on one device or many."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate import images
from foveate._torchvision import torchvision
from foveate._version import __version__
from foveate.batch import Batch
from foveate.errors import FoveateError, ImageError
from foveate.evaluate import COSTED_BATCHES, Plan, batches, readable
from foveate.results import Results, joined, read, read_all, write

ROWS, RECORD, LOCK = "rows", "run.json", ".lock"
WRITTEN = ("run.json", "table.csv", "table.md", "prevalence.csv", "report.html")
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
        torchvision()  # lightning imports it, and beside PyTorch's CPU build that fails where it was not mended before
        from lightning.fabric import Fabric

        for name in ("lightning.fabric", "lightning.pytorch"):  # who is registered where is of no interest here
            logging.getLogger(name).setLevel(logging.ERROR)
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

    def share(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first: a model made with random weights is one model."""
        if self._fabric is not None:
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    torch.distributed.broadcast(tensor.data, 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, an error of one process ends all of them, and the first process says it.

        Raises:
            FoveateError: what went wrong, in the first process; the others end without a word.
        """
        error: FoveateError | None = None
        try:
            yield
        except FoveateError as caught:
            error = caught
            if self._fabric is None:
                raise
        if self._fabric is None:
            return
        said: list[str | None] = [None] * self.count
        torch.distributed.all_gather_object(said, None if error is None else str(error))
        if sentence := next((text for text in said if text is not None), None):
            torch.distributed.barrier()
            if self.rank:
                raise SystemExit(0)
            raise FoveateError(sentence)


def fingerprint(model: nn.Module, ids: list[str], plan: Plan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on: the call, the protocol, the images and the model's weights."""
    weights = hashlib.blake2b(f"{model} {getattr(model, 'preprocess', '')}".encode(), digest_size=8)
    for name, value in (*model.named_parameters(), *model.named_buffers()):  # a normalisation is not in the state dict
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    listed = hashlib.blake2b("\n".join(ids).encode(), digest_size=8).hexdigest()
    own = {name: dict(values) for name, values in plan.own.items()}
    digests = {"images": listed, "weights": weights.hexdigest(), "protocol": plan.protocol.record(), "settings": own}
    digests["version"] = __version__
    return json.loads(json.dumps({**arguments, **digests}, default=str))  # type: ignore[no-any-return]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, until this process ends if nothing else: two runs in one would take each other's files away.

    Raises:
        FoveateError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FoveateError(f"another process is writing to {folder}: wait for it, or use another --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def prepare(folder: Path, identity: Mapping[str, Any], resume: bool, about: Mapping[str, Any]) -> Path | None:
    """Make the folder ready: empty for a new run, checked for one that goes on.

    Returns:
        Where a finished run that was there is kept now; None where there was none.

    Raises:
        FoveateError: an unfinished run is there and ``resume`` was not asked for, or it was another run.
    """
    (folder / ROWS).mkdir(parents=True, exist_ok=True)
    record, kept = read_record(folder), None
    if record and resume:
        before = record.get("identity", {})
        for name in dict.fromkeys([*identity, *before]):
            if identity.get(name) != before.get(name):
                raise FoveateError(
                    f"{folder} holds another run and cannot be resumed: {name} was {_short(before.get(name))}, and is now "
                    f"{_short(identity.get(name))}; use the same call, or another --out"
                )
    elif record and not record.get("finished", True) and any((folder / ROWS).glob("*.parquet")):
        raise FoveateError(
            f"{folder} holds a run that was not finished: go on with --resume, use another --out, or take the folder away"
        )
    elif record.get("finished") and identity != record.get("identity"):
        numbers = (folder / f"previous-{i}" for i in range(1, 10**6))
        kept = next(path for path in numbers if not path.exists())
        kept.mkdir()
        for name in (ROWS, *WRITTEN):
            if (folder / name).exists():
                (folder / name).rename(kept / name)
        (folder / ROWS).mkdir()
    for path in (folder / ROWS).glob("*" if not resume else ".*"):
        path.unlink()
    if resume:
        for path in (folder / ROWS).glob("*.parquet"):
            if any(_can_be_read(file) for file, _ in read(path, maps=False).failures):
                path.unlink()  # an image was mended: its batch is measured anew
    write_record(folder, {**about, "identity": dict(identity), "finished": False})
    return kept


def _can_be_read(file: str) -> bool:
    try:
        images.read(file)
    except ImageError:
        return False
    return True


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
    plan.settle(model, next(readable(source, range(len(source)), []), None))
    mine = [number for number in range(len(starts)) if number % workers.count == workers.rank]
    waiting = [number for number in mine if not chunk(folder, number).exists()]
    tick(sum(min(batch_size, len(source) - starts[number]) for number in mine if number not in set(waiting)))
    for number, (loaded, failures) in _ahead(source, waiting, starts, batch_size):
        if strict and failures:
            raise FoveateError(f"{failures[0][1]} (--strict stops here)")
        part = joined(plan.run(model, batch, number) for batch in loaded)
        part.failures, part.left_out = failures, dict(plan.left_out)
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
            costed = number < COSTED_BATCHES  # nothing else may run while it is measured what a method takes
            if place + 1 < len(numbers) and not costed:
                following = pool.submit(load_one, numbers[place + 1])
            yield number, loaded
            if place + 1 < len(numbers) and costed:
                following = pool.submit(load_one, numbers[place + 1])


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."
