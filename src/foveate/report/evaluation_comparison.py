"""Comparison: runs side by side on one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foveate.evaluation.compare import Comparison
from foveate.evaluation.intervals import LEVEL
from foveate.evaluation.results import MODEL
from foveate.evaluation.statistics import metric_of, number, ordered
from foveate.registry import title_of
from foveate.report import tables
from foveate.report.page import render

Cell = tuple[str, str, int]


def lines(comparison: Comparison) -> dict[str, list[tuple[str, list[Cell]]]]:
    """For each column the methods with a cell per run: mean, change with its interval, and 1 better, -1 worse, 0 neither.

    Better and worse: by the paired differences, corrected for the methods of the column.
    """
    frame = comparison.frame
    found: dict[str, list[tuple[str, list[Cell]]]] = {}
    for column in ordered(dict.fromkeys(frame.index.get_level_values("column"))):
        record = metric_of(column)
        assert record is not None
        up = record.columns[column].better == "up"
        for method, line in frame.xs(column, level="column").iterrows():
            if not np.isfinite([line[f"mean {k}"] for k in range(len(comparison.names))]).any():
                continue
            cells: list[Cell] = [(number(float(line["mean 0"]), column), "", 0)]
            for k in range(1, len(comparison.names)):
                change, low, high = (float(line[f"{part} {k}"]) for part in ("difference", "low", "high"))
                way = 0
                if line[f"p {k}"] <= LEVEL:
                    way = 1 if (change > 0) == up else -1
                text = "not comparable"
                if np.isfinite(change):
                    sign = "" if number(change, column).startswith("-") else "+"
                    text = f"{sign}{number(change, column)}"
                    if np.isfinite(low):
                        text += f" [{number(low, column)}, {number(high, column)}]"
                cells.append((number(float(line[f"mean {k}"]), column), text, way))
            found.setdefault(column, []).append(("the model" if method == MODEL else title_of(str(method)), cells))
    return found


def write(path: str | Path, comparison: Comparison, failures: Sequence[str]) -> Path:
    """The page."""
    found = lines(comparison)
    content = {
        "names": comparison.names,
        "notes": comparison.notes,
        "failures": failures,
        "tables": [(tables.heading(column), rows) for column, rows in found.items()],
    }
    return render("comparison.html.j2", path, content)
