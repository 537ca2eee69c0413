"""Tables: lines and columns of an evaluation as text, in one order everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.evaluation.results import MODEL
from foveate.evaluation.statistics import disagreement, metric_of, number, ordered
from foveate.registry import is_control, title_of

if TYPE_CHECKING:
    import pandas as pd

ARROW = {"up": "↑", "down": "↓"}


@dataclass(frozen=True)
class Heading:
    """A column as a reader meets it: its name and title, its direction, and what the glossary says of it."""

    name: str
    title: str
    arrow: str = ""
    unit: str = ""
    better: str = ""
    about: str = ""
    formula: str = ""
    range: str = ""
    good: str = ""
    bad: str = ""
    paper: str = ""
    key: str = ""

    @property
    def short(self) -> str:
        """The name below the title, with the unit; nothing where the title says both."""
        return ", ".join(part for part in (self.name if self.name != self.key else "", self.unit) if part)


def heading(column: str) -> Heading:
    """What a page says of a column; its name alone where no metric has it."""
    record = metric_of(column)
    if record is None:
        return Heading(column, column)
    known = record.columns[column]
    between = "" if known.range is None else f"{known.range[0]:g} to {known.range[1]:g}"
    return Heading(
        name=column,
        title=known.title,
        arrow=ARROW[known.better],
        unit=known.unit,
        better="Higher" if known.better == "up" else "Lower",
        about=known.about,
        formula=known.formula,
        range=between,
        good=known.good,
        bad=known.bad,
        paper=record.paper,
        key=known.name,
    )


def columns(frame: pd.DataFrame, *, model: bool = False) -> list[str]:
    """The columns of a table of :func:`foveate.evaluation.statistics.table` that have a value, in order.

    Args:
        model: those of the model's own row instead of the methods'.
    """
    there = []
    for column in dict.fromkeys(frame.index.get_level_values("column")):
        record = metric_of(column)
        if record is not None and record.of_model == model and frame.xs(column, level="column")["n"].max() > 0:
            there.append(column)
    return ordered(there)


def methods(frame: pd.DataFrame) -> list[str]:
    """The methods of a table: real ones first, then the controls, each in the order they ran."""
    names = [name for name in dict.fromkeys(frame.index.get_level_values("method")) if name != MODEL]
    return [n for n in names if not is_control(n)] + [n for n in names if is_control(n)]


def title(column: str) -> str:
    """A column with its direction: ``AD ↓``."""
    record = metric_of(column)
    return f"{column} {ARROW[record.columns[column].better]}" if record is not None else column


def cell(frame: pd.DataFrame, method: str, column: str) -> tuple[str, str, str]:
    """Mean, low and high as text; dashes where there is no value."""
    if (method, column) not in frame.index:
        return "–", "–", "–"
    line = frame.loc[(method, column)]
    low, middle, high = (number(float(line[part]), column) for part in ("low", "mean", "high"))
    return middle, low, high


def is_best(frame: pd.DataFrame, method: str, column: str) -> bool:
    """Whether no other method is better in the column, by paired differences corrected for all pairs, and any is worse.

    Where no two methods differ nothing is marked.
    """
    if (method, column) not in frame.index or int(frame.loc[(method, column)]["rank"]) != 1:
        return False
    return int(frame.xs(column, level="column")["rank"].max()) > 1


def markdown(frame: pd.DataFrame, findings: Sequence[str] = ()) -> str:
    """The table with intervals, methods down and columns across; bold are those than which no other is better.

    Then the differences to the baseline with the ranks, what has to be said, and how far the columns agree.
    """
    shown, names = columns(frame), methods(frame)
    head = [["method", *map(title, shown)], ["---"] + ["---:"] * len(shown)]
    means, changes = list(head), list(head)
    for method in names:
        label = f"{title_of(method)} (control)" if is_control(method) else title_of(method)
        cells, differences = [], []
        for column in shown:
            middle, low, high = cell(frame, method, column)
            text = f"**{middle}**" if is_best(frame, method, column) else middle
            cells.append(text if middle == "–" else f"{text} [{low}, {high}]")
            differences.append(f"{change(frame, method, column)} {rank(frame, method, column)}".strip())
        means.append([label, *cells])
        changes.append([label, *differences])
    parts = [
        _lines(means),
        f"Differences to {title_of(frame.attrs['baseline'])}, paired by image, and ranks:\n\n" + _lines(changes),
    ]
    if findings:
        parts.append("".join(f"- {sentence}\n" for sentence in findings))
    agreement = disagreement(frame)
    if len(agreement) > 1:
        rows: list[Sequence[str]] = [["", *agreement.columns], ["---"] + ["---:"] * len(agreement)]
        rows += [
            [name, *(f"{value:.2f}" for value in line)]
            for name, line in zip(agreement.index, agreement.to_numpy(), strict=True)
        ]
        parts.append(f"Spearman's correlation of the columns over {len(names)} methods:\n\n" + _lines(rows))
    words = [heading(column) for column in shown]
    parts.append("".join(f"- {w.name}: {w.title}. {w.about} {w.better} is better.\n" for w in words if w.about))
    return "\n".join(parts)


def legend(shown: Sequence[str]) -> str:
    """What short columns stand for: ``AD Average Drop, AG Average Gain``; those that say it themselves are left out."""
    known = [heading(column) for column in shown]
    return ", ".join(f"{one.name} {one.title}" for one in known if one.name != one.key and one.title != one.name)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def change(frame: pd.DataFrame, method: str, column: str) -> str:
    """The difference to the baseline with its interval; nothing for the baseline itself and for costs."""
    if (method, column) not in frame.index or not np.isfinite(frame.loc[(method, column)]["difference"]):
        return ""
    line = frame.loc[(method, column)]
    middle, low, high = (number(float(line[k]), column) for k in ("difference", "difference_low", "difference_high"))
    return f"{'' if middle.startswith('-') else '+'}{middle} [{low}, {high}]"


def rank(frame: pd.DataFrame, method: str, column: str) -> str:
    """``#1`` or ``#1-3``, tied; nothing for what has no rank."""
    if (method, column) not in frame.index or not int(frame.loc[(method, column)]["rank"]):
        return ""
    first, last = (int(frame.loc[(method, column)][name]) for name in ("rank", "rank_last"))
    return f"#{first}" if first == last else f"#{first}-{last}"
