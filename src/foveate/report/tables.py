"""Tables: lines and columns of an evaluation as text, in one order everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from foveate.registry import is_control
from foveate.results import MODEL
from foveate.statistics import metric_of

if TYPE_CHECKING:
    import pandas as pd

# The thesis' order first, then what it has not.
ORDER = ("AD", "AG", "AI", "I", "D", "OM", "LE", "F1", "BA", "SP", "EP", "SM", "mass_inside", "sparsity", "gini")
LAST = ("T", "forwards", "backwards", "memory")
ARROW = {"up": "↑", "down": "↓"}


def columns(frame: pd.DataFrame, *, model: bool = False) -> list[str]:
    """The columns of a table of :func:`foveate.statistics.table` that have a value, in order.

    Args:
        model: those of the model's own row instead of the methods'.
    """
    there = []
    for column in dict.fromkeys(frame.index.get_level_values("column")):
        record = metric_of(column)
        if record is not None and record.of_model == model and frame.xs(column, level="column")["n"].max() > 0:
            there.append(column)
    place = {name: i for i, name in enumerate(ORDER)} | {name: 100 + i for i, name in enumerate(LAST)}
    return sorted(there, key=lambda column: place.get(column, 50))


def methods(frame: pd.DataFrame) -> list[str]:
    """The methods of a table: real ones first, then the controls, each in the order they ran."""
    names = [name for name in dict.fromkeys(frame.index.get_level_values("method")) if name != MODEL]
    return [n for n in names if not is_control(n)] + [n for n in names if is_control(n)]


def title(column: str) -> str:
    """A column with its direction: ``AD ↓``."""
    record = metric_of(column)
    return f"{column} {ARROW[record.columns[column]]}" if record is not None else column


def number(value: float, column: str) -> str:
    """A value with the digits that its metric is worth; a dash for none."""
    record = metric_of(column)
    digits = 1 if record is None else record.digits
    if not np.isfinite(value):
        return "–"
    if column == "SM":
        digits = 2
    if column in ("forwards", "backwards", "memory"):
        digits = 0 if value >= 10 else 1
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def cell(frame: pd.DataFrame, method: str, column: str) -> tuple[str, str, str]:
    """Mean, low and high as text; dashes where there is no value."""
    if (method, column) not in frame.index:
        return "–", "–", "–"
    line = frame.loc[(method, column)]
    low, middle, high = (number(float(line[part]), column) for part in ("low", "mean", "high"))
    return middle, low, high


def is_best(frame: pd.DataFrame, method: str, column: str) -> bool:
    """Whether nothing in the column has an interval that lies wholly better."""
    return (method, column) in frame.index and int(frame.loc[(method, column)]["rank"]) == 1


def markdown(frame: pd.DataFrame) -> str:
    """The table with intervals, methods down and columns across; the best in bold, with all that are tied with it."""
    shown = columns(frame)
    lines: list[Sequence[str]] = [["method", *map(title, shown)], ["---"] + ["---:"] * len(shown)]
    for method in methods(frame):
        cells = []
        for column in shown:
            middle, low, high = cell(frame, method, column)
            text = f"**{middle}**" if is_best(frame, method, column) else middle
            cells.append(text if middle == "–" else f"{text} [{low}, {high}]")
        lines.append([f"{method} (control)" if is_control(method) else method, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
