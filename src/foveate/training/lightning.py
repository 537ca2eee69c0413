"""Lightning: importable beside PyTorch's CPU build, and without advice that is not the user's business."""

from __future__ import annotations

import importlib
import itertools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate._torchvision import mend
from foveate.errors import FoveateError, not_imported, required


def ready(what: str = "train") -> None:
    """Make ``import lightning`` possible beside PyTorch's CPU build: it imports torchvision, which fails there by itself.

    Raises:
        FoveateError: Lightning is not installed.
    """
    mend()
    required(what, "lightning", "torchmetrics")


def made_loggers(names: Sequence[str], folder: Path | None) -> list[Any]:
    """Lightning's loggers by name, into ``folder/logs``.

    Raises:
        FoveateError: an unknown one, no folder, or one whose package is not installed.
    """
    made: list[Any] = []
    for name in names:
        if folder is None:
            raise FoveateError(f"the logger {name!r} writes into the run's folder: name one")
        from lightning.pytorch import loggers

        if name == "csv":
            part = "" if not (folder / "logs" / "metrics.csv").exists() else _free(folder / "logs")
            made.append(loggers.CSVLogger(folder, name="logs", version=part))
        elif name == "tensorboard":
            try:
                made.append(loggers.TensorBoardLogger(folder, name="logs", version=""))
                if (broken := _without("tensorboard")) and _without("tensorboardX"):  # Lightning asks only if it is there
                    raise broken
            except ModuleNotFoundError as error:
                error = _without("tensorboard") or error  # Lightning's own has no name
                raise not_imported("the logger 'tensorboard'", "tensorboard", error) from None
        elif name == "wandb":
            try:
                made.append(loggers.WandbLogger(name=folder.name, save_dir=folder / "logs", project="foveate"))
            except ModuleNotFoundError as error:
                raise not_imported("the logger 'wandb'", "wandb", _without("wandb") or error) from None
        else:
            raise FoveateError(f"logger {name!r} is unknown: use 'csv', 'tensorboard' or 'wandb'")
    return made


def _free(logs: Path) -> str:
    """A folder for the figures of a run that goes on: Lightning deletes a ``metrics.csv`` that is there."""
    return next(name for name in (f"part_{number}" for number in itertools.count(2)) if not (logs / name).exists())


def _without(package: str) -> ModuleNotFoundError | None:
    """The error of a package's import, where something is missing."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return error
    return None


class quiet:
    """Lightning without its advice on GPUs, workers and loggers, which is not the user's business here."""

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|isinstance\\(treespec|LeafSpec).*")
        names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
        self._levels = {name: logging.getLogger(name).level for name in names}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._caught.__exit__(*error)
