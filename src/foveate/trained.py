"""Trained: a finished training run on disk, as it is written and read again."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from foveate._version import __version__
from foveate.errors import FoveateError
from foveate.film import Film

KIND = "training"


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
    """Write the weights of the user's own model, the recipe, the curves and the outcome of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # readable like the rest
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    versions = {"foveate": __version__, "torch": torch.__version__}
    text = json.dumps({"kind": KIND, **record, "versions": versions}, indent=2)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")


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
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
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
