"""Trainings: recipes side by side on one self-contained page: what each scores, and where each ends up looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveate
from foveate.intervals import LEVEL
from foveate.maps import upsample
from foveate.report import pictures
from foveate.report.film import picture
from foveate.report.page import render
from foveate.report.training import objective
from foveate.trained import Trained
from foveate.trainings import Trainings, better

Cell = tuple[str, str, int]


def number(value: float, column: str) -> str:
    """A value as a table has it: accuracies and shares with three digits, percentages with one."""
    return f"{value:.1f}" if column.split()[-1] in ("AD", "AG", "AI") else f"{value:.3f}"


def cell(line: Any, column: str) -> Cell:
    """Mean with its interval, the difference to the first recipe, and 1 better, -1 worse, 0 neither."""
    text = number(line["mean"], column)
    if np.isfinite(line["low"]):
        text += f" [{number(line['low'], column)}, {number(line['high'], column)}]"
    change, way = "", 0
    if np.isfinite(line["difference"]):
        value = number(line["difference"], column)
        change = value if value.startswith("-") else f"+{value}"
        if line["p"] <= LEVEL:
            way = 1 if (line["difference"] > 0) == (better(column) > 0) else -1
    return text, change, way


def table(trainings: Trainings) -> list[tuple[str, list[Cell | None]]]:
    """A line a recipe, a cell a column."""
    frame, columns = trainings.frame, trainings.columns
    return [
        (name, [cell(frame.loc[(name, c)], c) if (name, c) in frame.index else None for c in columns])
        for name in trainings.runs
    ]


def write(path: str | Path, trainings: Trainings) -> Path:
    """The page."""
    firsts = {name: runs[0] for name, runs in trainings.runs.items()}
    content = {
        "names": list(trainings.runs),
        "columns": [(c, "lower is better" if better(c) < 0 else "") for c in trainings.columns],
        "lines": table(trainings),
        "recipes": [
            (name, objective(run.recipe), len(trainings.runs[name]), run.recipe["model"]) for name, run in firsts.items()
        ],
        "notes": trainings.notes,
        "looks": _looks(firsts),
        "curves": pictures.curves(
            {name: run.history for name, run in firsts.items()},
            [("train_loss", "cross-entropy, training"), ("val_accuracy", "accuracy, validation")],
        ),
        "version": foveate.__version__,
    }
    return render("trainings.html.j2", path, content)


def _looks(runs: dict[str, Trained]) -> dict[str, Any] | None:
    """The last frames of the first run of each recipe, where their films follow the same images."""
    films = {name: run.film for name, run in runs.items() if run.film is not None and run.film.frames}
    if not films:
        return None
    first = next(iter(films.values()))
    same = {name: film for name, film in films.items() if film.batch.id == first.batch.id}
    rows = []
    for index in range(len(first.batch)):
        x = first.batch.x[index]
        cells = []
        for film in same.values():
            frame = film.frames[-1]
            M = upsample(torch.from_numpy(frame.maps[index : index + 1]).float() / 255, (x.shape[-2], x.shape[-1]))[0]
            right = first.batch.y is not None and int(frame.predicted[index]) == int(first.batch.y[index])
            cells.append((picture(pictures.overlay(x, M)), float(frame.probability[index]), right))
        rows.append((picture(x), cells))
    return {"names": list(same), "rows": rows}
