"""Trained: a finished training run on disk, as it is written and read again."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from foveate._version import __version__
from foveate.disk import files
from foveate.disk.text import quoted, read_json, read_text, read_yaml
from foveate.errors import FoveateError
from foveate.training.film import Film
from foveate.training.recipe import completed

KIND, RECORD = "training", "run.json"
FILES = ("model.safetensors", "recipe.yaml", "history.csv", RECORD)


@dataclass(frozen=True)
class Trained:
    """What a folder of ``foveate train`` holds.

    Attributes:
        folder: where it is.
        record: ``run.json``: the outcome, seconds, versions.
        recipe: as it was run, with every default.
        history: one line per epoch.
        film: where the model looked after each epoch, or None.
    """

    folder: Path
    record: dict[str, Any]
    recipe: dict[str, Any]
    history: list[dict[str, float]]
    film: Film | None

    @property
    def name(self) -> str:
        """That of the recipe."""
        return str(self.recipe["name"])


def save(
    folder: Path,
    model: nn.Module,
    recipe: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    record: Mapping[str, Any],
) -> None:
    """Write the weights of the user's own model, the recipe, the curves and the outcome of a run.

    A run that was there stays until all of this is on the disk; one that is killed between the first and the last file is
    not finished, and is not read as if it were.
    """
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    names = ("model.safetensors", "recipe.yaml", "history.csv")
    with ExitStack() as stack:
        weights, settings, curves = (stack.enter_context(files.replacing(folder / name)) for name in names)
        files.write_tensors(weights, state, flush=False)
        files.write_text(settings, yaml.safe_dump(dict(recipe), sort_keys=False))
        with curves.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(history[0]))
            writer.writeheader()
            writer.writerows(history)
        begin(folder, recipe)
    versions = {"foveate": __version__, "torch": torch.__version__}
    files.write_json(folder / RECORD, {"kind": KIND, **record, "versions": versions})


def begin(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Say that a run of a recipe is on its way: ``run.json`` without an outcome."""
    files.write_json(folder / RECORD, {"kind": KIND, "finished": False, "recipe": dict(recipe)})


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says, empty where there is none.

    Raises:
        FoveateError: it is damaged.
    """
    return read_json(folder / RECORD) if (folder / RECORD).exists() else {}


def name_of(folder: Path) -> str | None:
    """The recipe's name of a run, finished or begun; None where none is known."""
    record = read_record(folder)
    name = record.get("name", record.get("recipe", {}).get("name"))
    return None if name is None else str(name)


class _Group(BaseModel):
    name: str = ""
    count: int
    accuracy: float


class _Record(BaseModel):
    """What is read of ``run.json``."""

    epoch: int
    seconds: float
    accuracy: dict[str, float]
    groups: dict[str, dict[str, _Group]]
    maps: dict[str, dict[str, dict[str, float]]]
    worst_group: _Group | None = None
    maps_error: str | None = None


def _check(record: Mapping[str, Any]) -> None:
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, and it is {quoted(first['input'])}"
        raise FoveateError(f"run.json is damaged: {reason}") from None


def is_trained(folder: str | Path) -> bool:
    """Whether a folder holds a training run, finished or not, and not an evaluation."""
    return (Path(folder) / "recipe.yaml").is_file() or (Path(folder) / "checkpoints").is_dir()


def read(folder: str | Path) -> Trained:
    """Read what :func:`save` wrote.

    Raises:
        FoveateError: no finished training run is there, or one of its files is damaged; the message names the file.
    """
    folder = Path(folder)
    where = f"{str(folder)!r} holds no finished training run"
    try:
        record = read_record(folder)
        if record.get("kind") == KIND and not record.get("finished", True):
            raise FoveateError("it is not finished; --resume ends it")
        for name in FILES[1:]:
            if not (folder / name).exists():
                raise FoveateError(f"{name} is not there; --resume ends one")
        recipe = read_yaml(folder / "recipe.yaml", "recipe.yaml")
        if record.get("kind") != KIND:
            raise FoveateError("run.json is of another kind of run")
        _check(record)
        recipe = completed(recipe, "recipe.yaml")
        history = _history(folder / "history.csv")
    except FoveateError as error:
        raise FoveateError(f"{where}: {error}") from None
    film = folder / "film.npz"
    return Trained(folder, record, recipe, history, Film.load(film) if film.exists() else None)


def _history(path: Path) -> list[dict[str, float]]:
    """One line per epoch; each a number for every column."""
    lines = []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for line in reader:
            lines.append({key: float(value) for key, value in line.items()})
    except (csv.Error, TypeError, ValueError):
        raise FoveateError(f"{path.name}, line {reader.line_num}: it is not one number for each column") from None
    if not lines or not {"epoch", "train_loss"} <= set(lines[0]):
        raise FoveateError(f"{path.name} has no epochs with a train_loss")
    return lines
