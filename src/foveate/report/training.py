"""Training: a finished run on one self-contained page: what it scores, where it looked over time, and its worst group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from foveate.evaluation.statistics import number
from foveate.registry import LOSSES, METHODS
from foveate.report import pictures, tables
from foveate.report.film import film_strip
from foveate.report.page import render
from foveate.training.saved import Trained, read

TITLES = {"train": "training", "val": "validation", "test": "test"}
COLUMNS = ("AD", "AG", "AI", "mass_inside")


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write ``report.html`` of a training run from what its folder holds.

    Raises:
        FoveateError: there is no finished training run.
    """
    run = read(folder)
    record = run.record
    known = [(split, measures["mass_inside"]) for split, measures in record["maps"].items() if "mass_inside" in measures]
    inside = known[-1] if known else None
    shown = [column for column in COLUMNS if any(column in measures for measures in record["maps"].values())]
    accuracy = {TITLES.get(split, split): value for split, value in record["accuracy"].items()}
    content = {
        "name": run.name,
        "model": run.recipe["model"],
        "data": _data(run.recipe["data"]),
        "objective": objective(run.recipe),
        "epochs": len(run.history),
        "epoch": record["epoch"],
        "seconds": record["seconds"],
        "accuracy": accuracy,
        "worst": record.get("worst_group"),
        "inside": inside and inside[1],
        "inside_split": inside and TITLES.get(inside[0], inside[0]),
        "film": None if run.film is None or not run.film.frames else film_strip(run.film),
        "method": METHODS.get(run.recipe["measure"]["method"]).title,
        "groups": [
            {"split": TITLES.get(split, split), "name": name, **group}
            for split, parts in record["groups"].items()
            if split != "train"
            for name, group in parts.items()
        ],
        "columns": [tables.heading(column) for column in shown],
        "maps": [_line(split, measures, shown) for split, measures in record["maps"].items()],
        "maps_error": record.get("maps_error"),
        "curves": _curves(run),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False),
    }
    return render("training.html.j2", Path(folder) / "report.html" if path is None else path, content)


def _line(split: str, measures: Mapping[str, Mapping[str, float]], shown: Sequence[str]) -> dict[str, Any]:
    """A split in the table of maps; dashes where a column is not known."""
    cells = []
    for column in shown:
        known = measures.get(column)
        parts = ("mean", "low", "high")
        cells.append({part: number(known[part], column) if known else "–" if part == "mean" else "" for part in parts})
    count = max((int(values["n"]) for values in measures.values()), default=0)
    return {"split": TITLES.get(split, split), "cells": cells, "n": count}


def objective(recipe: dict[str, Any]) -> str:
    """The sum of losses of a recipe in words."""
    parts = []
    weight = recipe.get("cross_entropy")
    replaced = any(LOSSES.get(term["name"]).replaces for term in recipe["losses"])
    if weight is None:
        weight = 0.0 if replaced else 1.0
    if weight:
        parts.append("cross-entropy" if weight == 1 else f"{weight:g} × cross-entropy")
    for term in recipe["losses"]:
        name = LOSSES.get(term["name"]).title
        words = name if term["weight"] == 1 else f"{term['weight']:g} × {name}"
        schedule = term["schedule"] if isinstance(term["schedule"], str) else f"{len(term['schedule'])} phases"
        parts.append(words if schedule == "constant" else f"{words} ({schedule.replace('_', ' ')})")
    augment = [key.replace("_", " ") for key, value in recipe["augment"].items() if value]
    changes = [f"augmented ({', '.join(augment)})"] if augment else []
    changes += ["classes rebalanced"] if recipe["rebalance"] else []
    return " + ".join(parts) + "".join(f"; {change}" for change in changes)


def _data(data: str | Mapping[str, Any]) -> str:
    if isinstance(data, str):
        return data
    fold = f", fold {data['fold'] + 1} of {data['folds']}" if data.get("folds") else ""
    return f"{data['train']}{fold}"


def _curves(run: Trained) -> pictures.Curves:
    panels = [("train_loss", "cross-entropy, training"), ("val_accuracy", "accuracy, validation")]
    panels += [(term["name"], LOSSES.get(term["name"]).title) for term in run.recipe["losses"]]
    history: list[dict[str, float]] = [dict(line) for line in run.history]
    if run.film is not None:
        for frame in run.film.frames:
            known = frame.inside[np.isfinite(frame.inside)]
            for line in history:
                if line["epoch"] == frame.epoch and len(known):
                    line["inside"] = float(known.mean())
        panels.append(("inside", "share of the film's maps on the object"))
    return pictures.curves({run.name: history}, panels)
