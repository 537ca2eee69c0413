"""Trainings: recipes side by side on one self-contained page: what each scores, and where each ends up looking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.evaluation.intervals import LEVEL
from foveate.maps import upsample
from foveate.overlay import overlay
from foveate.report import pictures, tables
from foveate.report.film import picture
from foveate.report.page import render
from foveate.report.training import TITLES, objective
from foveate.training.compare import Trainings, better
from foveate.training.film import Film
from foveate.training.saved import Trained

if TYPE_CHECKING:
    import pandas as pd

Cell = tuple[str, str, int]


def number(value: float, column: str) -> str:
    """A value as a table has it: accuracies and shares with three digits, percentages with one."""
    return f"{value:.1f}" if column.split()[-1] in ("AD", "AG", "AI") else f"{value:.3f}"


def cell(line: pd.Series, column: str) -> Cell:
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


def table(trainings: Trainings, columns: Sequence[str] | None = None) -> list[tuple[str, list[Cell | None]]]:
    """A line per recipe, a cell per column."""
    frame, columns = trainings.frame, trainings.columns if columns is None else columns
    return [
        (name, [cell(frame.loc[(name, c)], c) if (name, c) in frame.index else None for c in columns])
        for name in trainings.runs
    ]


def parts(trainings: Trainings) -> dict[str, list[str]]:
    """The columns of each table: accuracies with the loss, then the maps of each split."""
    found: dict[str, list[str]] = {}
    for column in trainings.columns:
        split, _, measure = column.rpartition(" ")
        found.setdefault(f"Maps, {TITLES.get(split, split)}" if measure and split else "Accuracy", []).append(column)
    return found


def heading(column: str) -> tables.Heading:
    """How a column is called: an accuracy by its split, a measure of the maps as in every table."""
    split, _, measure = column.rpartition(" ")
    if split:
        return tables.heading(measure)
    title = {"train_loss": "cross-entropy, training", "worst_group": "worst group"}.get(column, TITLES.get(column, column))
    way = "down" if better(column) < 0 else "up"
    words = {"train_loss": "The last epoch's plain cross-entropy.", "worst_group": "Accuracy of the worst group."}
    return tables.Heading(
        column, title, tables.ARROW[way], about=words.get(column, "Share of images with the right answer."), key=column
    )


def write(path: str | Path, trainings: Trainings) -> Path:
    """The page."""
    firsts = {name: runs[0] for name, runs in trainings.runs.items()}
    content = {
        "names": list(trainings.runs),
        "tables": [
            (title, [heading(column) for column in columns], table(trainings, columns))
            for title, columns in parts(trainings).items()
        ],
        "recipes": [
            (name, objective(run.recipe), len(trainings.runs[name]), run.recipe["model"]) for name, run in firsts.items()
        ],
        "notes": trainings.notes,
        "looks": _looks(firsts),
        "curves": pictures.curves(
            {name: run.history for name, run in firsts.items()},
            [("train_loss", "cross-entropy, training"), ("val_accuracy", "accuracy, validation")],
        ),
    }
    return render("trainings.html.j2", path, content)


def _label(film: Film, label: int) -> str:
    return film.class_names[label] if film.class_names else f"class {label}"


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
            cells.append((picture(overlay(x, M)), float(frame.probability[index]), right))
        label = "" if first.batch.y is None else _label(first, int(first.batch.y[index]))
        rows.append((picture(x), label, cells))
    return {"names": list(same), "rows": rows}
