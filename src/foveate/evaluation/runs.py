"""Runs: an evaluation on disk, which can be killed at any moment and goes on where it stopped, on one device or many."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate._torchvision import mend
from foveate.batch import Batch
from foveate.disk import files
from foveate.errors import FoveateError, required
from foveate.evaluation.evaluate import COSTED_BATCHES, NOT_FINITE, Plan, batches, readable
from foveate.evaluation.identity import contents, digest_of, listing, short
from foveate.evaluation.results import Origin, Results, joined, origin_of, read_all, write

ROWS, RECORD = "rows", "run.json"
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
        mend()  # lightning imports torchvision
        required(f"--devices {devices}" if world == 1 else "a run of several processes", "lightning")
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
            FoveateError: what went wrong, in the first process; the other processes exit silently.
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


@dataclass(frozen=True)
class Images:
    """The images of a run, a batch at a time.

    Attributes:
        source: a data set of single images with a length.
        names, listed: what each is called, and what is said of it (see :func:`foveate.evaluation.identity.listing`).
    """

    source: Any
    batch_size: int
    names: list[str]
    listed: list[str]

    @staticmethod
    def of(source: Any, batch_size: int) -> Images:
        """Ask a data set for its names and labels; no image is read."""
        return Images(source, batch_size, *listing(source))

    def __len__(self) -> int:
        return -(-len(self.names) // self.batch_size)

    def batch(self, number: int) -> range:
        """The images of a batch."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.names)))

    def origin(self, run: str, number: int) -> Origin:
        """What the file of a batch is to say that it is about."""
        order = self.batch(number)
        about = zip(order, contents(self.source, order), strict=True)
        return Origin(run, tuple((self.names[i], short(self.listed[i]), content) for i, content in about))


def prepare(
    folder: Path,
    identity: Mapping[str, Any],
    resume: bool,
    about: Mapping[str, Any],
    images: Images,
    overwrite: bool = False,
) -> list[str]:
    """Make the folder ready: empty for a new run, checked for one that goes on.

    Nothing is deleted but results of this very run that are measured again; what else stands in the way of new files is moved
    to ``previous-N``, and what foveate does not write is let be.

    Returns:
        What was kept aside or has to be measured again, in sentences.

    Raises:
        FoveateError: a run is there and neither ``resume`` nor ``overwrite`` was asked for, it was another run, or the files
            that would be replaced are not of foveate.
    """
    rows = folder / ROWS
    if rows.exists() and not rows.is_dir():
        raise FoveateError(f"{rows} is a file, and results are to be written into a folder of that name: use another --out")
    record, trouble = _known_record(folder)
    there, own = _named(rows), [folder / name for name in WRITTEN if (folder / name).exists()]
    if trouble:
        _refuse_strangers(folder, trouble, bool(there), own, resume)
    elif record and resume:
        _refuse_another(folder, record["identity"], identity, images)
    elif record and not overwrite and record.get("finished", True):
        raise FoveateError(
            f"{str(folder)!r} holds a run already ({RECORD}): name another folder, or ask to "
            "resume it (--resume) or to overwrite it (--overwrite)"
        )
    elif record and not overwrite and there:
        raise FoveateError(
            f"{folder} holds a run that was not finished: go on with --resume, use another --out, or ask to overwrite it"
        )
    rows.mkdir(parents=True, exist_ok=True)
    for place in (folder, rows):
        files.clear_waiting(place)
    run, said, aside = digest_of(identity), list[str](), list[Path]()
    changed: list[str] = []
    again = bool(record) and not resume
    for path in there:
        origin, why = _misfit(path, run, images)
        if origin is None:
            aside.append(path)
            said.append(why)
        elif why or again:
            files.delete(path)  # of this very run, and about to be measured again
            changed += [why] if why else []
    if trouble or (again and record["identity"] != identity):
        aside += own
    kept = _aside(folder, aside)
    write_record(folder, {**about, "identity": dict(identity), "batches": len(images), "finished": False})
    if again and kept is not None:
        return [f"the run that was in {folder} is kept in {kept}"]
    sentences = []
    if trouble and resume and (there or kept):
        moved = f", and what was written of it is kept in {kept}" if kept else ""
        sentences = [f"{RECORD} of {folder} {trouble}: results that fit this call are taken, others are measured again{moved}"]
    for reasons, where in ((said, f"; kept in {kept}"), (changed if resume else [], "")):
        counts = Counter(reason.split(NAMED)[0] for reason in reasons)
        for reason, count in counts.items():
            first = next(r for r in reasons if r.split(NAMED)[0] == reason)
            first = f" (the first: {first.split(NAMED)[1]})" if NAMED in first else ""
            sentences.append(f"{count} of {len(images)} batches are measured again: {reason}{first}{where}")
    return sentences


NAMED = " \0"  # between a reason and what it is about
OTHER = "their files are of another run"
DAMAGED = "their files are damaged, or were written by another version"
CHANGED = "images have changed since"
MENDED = "an image that could not be read can be read now"


def _misfit(path: Path, run: str, images: Images) -> tuple[Origin | None, str]:
    """What a file of results is about, None where it is not of this run; and why its batch is measured again, if it is."""
    try:
        origin, ids, failures = origin_of(path)
    except FoveateError:
        return None, f"{DAMAGED}{NAMED}{path.name}"
    number = int(path.stem)
    if origin.run != run or number >= len(images) or path != chunk(path.parent.parent, number):
        return None, f"{OTHER}{NAMED}{path.name}"
    now = images.origin(run, number)
    if origin.images != now.images:
        pairs = zip(origin.images, now.images, strict=False)
        first = next((new[0] for old, new in pairs if old != new), now.images[-1][0])
        return origin, f"{CHANGED}{NAMED}{first}"
    if any(NOT_FINITE not in reason for _, reason in failures):
        lost = [index for index in images.batch(number) if images.names[index] not in ids]
        mended = next(
            (batch.id for batch in readable(images.source, lost, []) if batch.id[0] not in _unmeasured(failures)), None
        )
        if mended:
            return origin, f"{MENDED}{NAMED}{mended[0]}"
    return origin, ""


def _unmeasured(failures: list[tuple[str, str]]) -> set[str]:
    """Images that can be read, and on which the model gives NaN: it does so again."""
    return {file for file, reason in failures if NOT_FINITE in reason}


def _named(rows: Path) -> list[Path]:
    """What is called as the files of batches are; other names in the folder are none of ours."""
    return sorted(path for path in rows.glob("*.parquet") if re.fullmatch(r"\d{6,}", path.stem) and path.is_file())


def _aside(folder: Path, paths: list[Path]) -> Path | None:
    """Move files to a new folder beside them, ``previous-N``; None where there are none."""
    if not paths:
        return None
    kept = next(path for path in (folder / f"previous-{i}" for i in range(1, 10**6)) if not path.exists())
    for path in paths:
        target = kept / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.move(path, target)
    return kept


def _refuse_strangers(folder: Path, trouble: str, rows: bool, own: list[Path], resume: bool) -> None:
    """Where no ``run.json`` says that a run of ours is here: what would be replaced may be anybody's."""
    if rows and resume:
        return
    if rows:
        raise FoveateError(
            f"{folder / ROWS} holds results, and {RECORD} {trouble}: go on with --resume, which keeps what fits this call and "
            "moves the rest aside, or use another --out"
        )
    torn = [path for path in own if path.name == RECORD and trouble == TORN]
    if own and not (resume and own == torn):
        hint = "go on with --resume, which moves it aside, or use" if own == torn else "use"
        raise FoveateError(
            f"{own[0]} is there and would be replaced, but {folder} is no run of foveate evaluate ({RECORD} {trouble}): "
            f"{hint} another --out"
        )


def _refuse_another(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], images: Images) -> None:
    for name in dict.fromkeys([*now, *before]):
        if now.get(name) != before.get(name):
            which = _other_images(folder, images) if name == "images" else ""
            raise FoveateError(
                f"{folder} holds another run and cannot be resumed: {name} was {_short(before.get(name))}, and is now "
                f"{_short(now.get(name))}{which}; use the same call, or another --out"
            )


def _other_images(folder: Path, images: Images) -> str:
    """How many images have another name, label or box than those that were measured, and the first of them."""
    known, changed = 0, list[str]()
    for path in _named(folder / ROWS):
        with suppress(FoveateError):
            for place, (name, listed, _) in enumerate(origin_of(path)[0].images, int(path.stem) * images.batch_size):
                known += 1
                if place >= len(images.names) or (images.names[place], short(images.listed[place])) != (name, listed):
                    changed.append(name)
    return (
        f" ({len(changed)} of {known} that were measured have another name, label or box, the first: {changed[0]})"
        if changed
        else ""
    )


MISSING, TORN, STRANGE = "is missing", "is damaged", "says nothing of a run"


def _known_record(folder: Path) -> tuple[dict[str, Any], str]:
    """``run.json`` of a run of ours, and otherwise what is the matter with it."""
    if not (folder / RECORD).exists():
        return {}, MISSING
    try:
        record = read_record(folder)
    except FoveateError:
        return {}, TORN
    return (record, "") if isinstance(record.get("identity"), dict) else ({}, STRANGE)


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
    except (OSError, ValueError, RecursionError):
        raise FoveateError(
            f"{path} is damaged: foveate evaluate ... --resume writes it again, and measures only what does not match"
        ) from None
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    files.write_json(folder / RECORD, record)


def run(
    model: nn.Module,
    images: Images,
    plan: Plan,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    workers: Workers | None = None,
    strict: bool = False,
    tick: Callable[[int], object] = lambda images: None,
) -> None:
    """Measure what is not measured yet, a file per batch: batch k belongs to worker ``k mod count``.

    Batches are the same whatever the number of workers, and so is every value. Images that cannot be read, and those on which
    the model gives NaN, are left out and named in the batch's failures.

    Args:
        identity: of the run, as :func:`foveate.evaluation.identity.fingerprint` gives it.
        strict: an image that has to be left out stops the run.
        tick: called with the number of images that were done, for a progress bar.

    Raises:
        FoveateError: nothing can be measured, or with ``strict`` an image has to be left out.
    """
    workers, run_digest = workers or Workers(), digest_of(identity)
    source = images.source
    plan.settle(model, readable(source, range(len(source)), []))
    mine = [number for number in range(len(images)) if number % workers.count == workers.rank]
    waiting = [number for number in mine if not chunk(folder, number).exists()]
    tick(sum(len(images.batch(number)) for number in mine if number not in set(waiting)))
    for number, (origin, loaded, failures) in _ahead(images, waiting, run_digest):
        part = joined(plan.run(model, batch, number) for batch in loaded) if failures == [] or not strict else Results()
        part.failures, part.left_out = failures + part.failures, dict(plan.left_out)
        if strict and part.failures:
            raise FoveateError(f"{part.failures[0][1]} (--strict stops here)")
        write(part, chunk(folder, number), origin)
        tick(len(images.batch(number)))


def chunk(folder: Path, number: int) -> Path:
    """The file of a batch."""
    return folder / ROWS / f"{number:0{WIDTH}d}.parquet"


def chunks(folder: Path) -> list[Path]:
    """The files of all batches of a run, in order.

    Raises:
        FoveateError: one is missing; the message has its name.
    """
    paths, count = _named(folder / ROWS), read_record(folder).get("batches")
    if isinstance(count, int) and paths != (wanted := [chunk(folder, number) for number in range(count)]):
        gone = next((path for path in wanted if path not in paths), None)
        extra = next((path for path in paths if path not in wanted), None)
        what = f"{gone} is missing" if gone else f"{extra} is not of this run"
        raise FoveateError(f"{what}: foveate evaluate ... --resume measures it again")
    return paths


def results_of(folder: Path) -> Results:
    """What the files of a run hold, finished or not.

    Raises:
        FoveateError: one is missing, damaged or of another run; the message has its name.
    """
    identity = read_record(folder).get("identity")
    return read_all(chunks(folder), run=digest_of(identity) if isinstance(identity, dict) else None)


def load(folder: Path) -> Results:
    """The results of a run.

    Raises:
        FoveateError: it is not a run, it is not finished, or a file of it is damaged, missing or of another run.
    """
    record = read_record(folder)
    if not record or not (folder / ROWS).is_dir():
        raise FoveateError(f"{folder} is not a run of foveate evaluate: it has no {RECORD}")
    if not record.get("finished", True):
        raise FoveateError(f"{folder} is not finished: go on with foveate evaluate ... --resume")
    return results_of(folder)


def _ahead(
    images: Images, numbers: list[int], run_digest: str
) -> Iterator[tuple[int, tuple[Origin, list[Batch], list[tuple[str, str]]]]]:
    """Batches in order, the next one read while this one is measured."""

    def load_one(number: int) -> tuple[Origin, list[Batch], list[tuple[str, str]]]:
        failures: list[tuple[str, str]] = []
        # Before they are read: an image that changes meanwhile is seen the next time.
        origin = images.origin(run_digest, number)
        return origin, list(batches(readable(images.source, images.batch(number), failures), images.batch_size)), failures

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
