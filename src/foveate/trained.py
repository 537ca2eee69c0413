"""Trained: a finished training run on disk, as it is written and read again."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from foveate import files
from foveate._version import __version__
from foveate.errors import FoveateError
from foveate.film import Film

KIND, RECORD = "training", "run.json"
FILES = ("model.safetensors", "recipe.yaml", "history.csv", RECORD)


@dataclass(frozen=True)
class Trained:
    """What a folder of ``foveate train`` holds.

    Attributes:
        folder: where it is.
        record: ``run.json``: the outcome, seconds, versions.
        recipe: as it was run, with every default.
        history: one line an epoch.
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
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FoveateError(f"{str(folder / RECORD)!r} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise FoveateError(f"{str(folder / RECORD)!r} is not the record of a run: it holds a {type(record).__name__}")
    return record


def name_of(folder: Path) -> str | None:
    """The recipe's name of a run, finished or begun; None where none is known."""
    record = read_record(folder)
    name = record.get("name", record.get("recipe", {}).get("name"))
    return None if name is None else str(name)


def is_trained(folder: str | Path) -> bool:
    """Whether a folder holds a training run, finished or not, and not an evaluation."""
    return (Path(folder) / "recipe.yaml").is_file() or (Path(folder) / "checkpoints").is_dir()


def read(folder: str | Path) -> Trained:
    """Read what :func:`save` wrote.

    Raises:
        FoveateError: no finished training run is there.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("kind") == KIND and not record.get("finished", True):
            raise FoveateError(f"{str(folder)!r} holds a training run that is not finished: --resume ends it")
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
            history = [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file)]
        if record.get("kind") != KIND:
            raise ValueError("run.json is of another kind of run")
    except OSError as error:
        name = Path(str(error.filename)).name
        raise FoveateError(f"{str(folder)!r} holds no finished training run: {name} is not there; --resume ends one") from None
    except (ValueError, yaml.YAMLError) as error:
        raise FoveateError(f"{str(folder)!r} holds no finished training run: {error}") from None
    film = folder / "film.npz"
    return Trained(folder, record, recipe, history, Film.load(film) if film.is_file() else None)
