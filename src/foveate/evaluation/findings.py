"""Findings: what has to be said about a table, in words, and which method its numbers speak for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate import missing
from foveate.data.labels import images_of
from foveate.evaluation.intervals import LEVEL, holm
from foveate.evaluation.results import MODEL, Results
from foveate.evaluation.statistics import Judged, judged, metric_of, number, ordered, sign_of
from foveate.registry import is_control, title_of

if TYPE_CHECKING:
    import pandas as pd

SMALL = 20  # images, below which it is said first that they are few
UNJUDGED = ("sparsity",)  # it describes a map: nobody wins it
NAMED = 3  # methods that an answer names


@dataclass(frozen=True)
class Verdict:
    """What a column says about methods and controls.

    Attributes:
        kind: ``measures`` where a method is better than every control; ``won`` where a control is better than every method;
            ``level`` where the best cannot be told apart from a control.
        best, control: the best method, and the best control.
        beaten: methods that the best control is better than.
        leaders: methods than which no other is better, and which are better than every control themselves.
    """

    column: str
    kind: Literal["measures", "won", "level"]
    best: str
    control: str
    beaten: tuple[str, ...]
    rivals: int
    leaders: tuple[str, ...]


def verdicts(results: Results, frame: pd.DataFrame) -> list[Verdict]:
    """The verdict of every column that judges methods, in the order of the table; none without a method and a control.

    A control wins a column where the best control is better than the best method, by a paired test that takes the best
    control under each pattern of signs (:meth:`foveate.evaluation.intervals.Paired.beaten_by_any`; 2.5 %, one-sided). Where no
    method is better than every control, corrected for the number of methods, the best cannot be told apart from one.
    """
    found = judged(results)
    said = []
    for column in ordered(dict.fromkeys(frame.index.get_level_values("column"))):
        record = metric_of(column)
        if record is None or record.of_model or record.statistic == "median" or record.name in UNJUDGED:
            continue
        there = [name for name in found.paired.get(column, ([], None))[0] if name not in results.same]
        controls = [name for name in there if is_control(name)]
        rivals = [name for name in there if name not in controls]
        if rivals and controls:
            said.append(_verdict(found, column, rivals, controls))
    return said


def _verdict(found: Judged, column: str, rivals: list[str], controls: list[str]) -> Verdict:
    names, paired = found.paired[column]
    sign, place = sign_of(column), names.index
    score = lambda name: sign * found.points[name, column][0]  # noqa: E731
    control, best = max(controls, key=score), max(rivals, key=score)
    better = found.better(column)
    beaten = tuple(name for name in rivals if better[place(control), place(name)])
    first = [name for name in rivals if not any(better[place(other), place(name)] for other in rivals)]
    kind: Literal["measures", "won", "level"] = "measures"
    if paired.beaten_by_any(place(best), [place(name) for name in controls], sign) <= LEVEL / 2:
        kind = "won"
    else:
        above = holm(np.array([max(paired.above(place(r), place(c), sign) for c in controls) for r in rivals])) <= LEVEL / 2
        kind = "measures" if above.any() else "level"
        true = [name for name, one in zip(rivals, above, strict=True) if one]
        first = [name for name in first if name in true] or true
    leaders = tuple(first)
    return Verdict(column, kind, best, control, beaten, len(rivals), leaders)


def findings(frame: pd.DataFrame, results: Results) -> list[str]:
    """What has to be said about a table: too few images, controls that win, methods that are one, maps that say nothing."""
    found = judged(results)
    sentences = []
    if 0 < len(results) < SMALL:
        pairs = max((len(names) * (len(names) - 1) // 2 for names, _ in found.paired.values()), default=0)
        shown = "no" if pairs * 2.0 ** (1 - len(results)) > LEVEL else "hardly any"
        sentences.append(
            f"{len(results)} image{'s are' if len(results) > 1 else ' is'} few: {shown} difference between methods can be "
            f"shown with them, and most of what is seen is chance; take {SMALL} at least."
        )
    if (images := images_of(list(results.ids))) is not None:
        sentences.append(
            f"The {len(results)} rows are labels of {images} images, each measured alone: intervals take them as independent, "
            "and are too narrow where the values of one image are alike."
        )
    if not any(map(is_control, results.methods)):
        sentences.append(
            "There is no control in this table, a map that ignores the model, such as Centre: nothing shows here which columns "
            "measure the explanation."
        )
    tied: dict[str, list[str]] = {}
    for verdict in verdicts(results, frame):
        column, control = verdict.column, title_of(verdict.control)

        def value(name: str, column: str = column) -> str:
            return number(found.points[name, column][0], column)

        if verdict.kind == "won":
            sentences.append(
                f"{spelled(column, True)}: {control}, a control that ignores the model, is better ({value(verdict.control)}) "
                f"than the best method, {title_of(verdict.best)} ({value(verdict.best)}). On this data the column does not "
                "measure the explanation."
            )
        elif verdict.kind == "level":
            tied.setdefault(verdict.control, []).append(column)
        elif 2 * len(verdict.beaten) >= verdict.rivals and verdict.rivals > 1:
            sentences.append(
                f"{spelled(column, True)}: {control} ({value(verdict.control)}), a control that ignores the model, is better "
                f"than {len(verdict.beaten)} of {verdict.rivals}{' different' if results.same else ''} methods."
            )
    for name, columns in tied.items():
        sentences.append(
            f"No method can be told apart from {title_of(name)}, a control that ignores the model, in "
            f"{_and([spelled(column) for column in columns])}: what these columns say of a map may be chance."
        )
    points = [(key, point) for key, point in found.points.items() if np.isfinite(point[0]) and point[3] > 1]
    flat: dict[str, list[str]] = {}
    for (method, column), point in points:
        if point[1] == point[2] and (method, column) in frame.index and _judges(column):
            flat.setdefault("the model" if method == MODEL else title_of(method), []).append(spelled(column))
    if flat:
        listed = "; ".join(f"{_and(columns)} of {owner}" for owner, columns in flat.items())
        sentences.append(f"All values are equal, which leaves no interval: {listed}.")
    groups: dict[str, list[str]] = {}
    for name, other in results.same.items():
        groups.setdefault(other, []).append(title_of(name))
    sentences += [f"{_and(names)} gave the same maps as {title_of(other)} on every image." for other, names in groups.items()]
    lost = {
        "the model" if method == MODEL else title_of(method): {spelled(column): why for column, why in own.items()}
        for method, own in results.missing.items()
    }
    sentences += missing.said(lost, len(results))
    for name, count in results.degenerate.items():
        if count:
            sentences.append(f"{count} of {len(results)} maps of {title_of(name)} are constant; they count as maps of zeros.")
    return sentences


def advice(frame: pd.DataFrame, results: Results) -> str:
    """Which method to use: the columns that mean something on this data, who leads in them, and at what cost.

    A column means something where a method is better than every control in it; a method leads where no other is better. Both
    by paired differences, corrected for the comparisons. Empty where there is no choice: one method, or no control.
    """
    said = verdicts(results, frame)
    rivals = {name for name in results.methods if not is_control(name) and name not in results.same}
    if not said or len(rivals) < 2:
        return ""
    telling = [verdict for verdict in said if verdict.kind == "measures"]
    images = f"{len(results)} image{'s' if len(results) > 1 else ''}"
    if not telling:
        knows = any(getattr(metric_of(verdict.column), "group", "") == "localization" for verdict in said)
        other = "" if knows else ", or columns that know where the object is, from boxes or masks"
        return (
            f"Nothing here says which method to use: in none of the {len(said)} columns is any method better than every "
            f"control, on {images}. More images may tell{other}."
        )
    rest = len(said) - len(telling)
    parts = [
        f"{_and([spelled(verdict.column) for verdict in telling])} mean{'s' if len(telling) == 1 else ''} something on these "
        f"{images}: a method is better there than every control."
    ]
    if rest:
        parts.append(f"In the other {f'{rest} columns' if rest > 1 else 'column'} a control is level with the best, or better.")
    cost = {name: judged(results).points.get((name, "T"), (float("nan"),))[0] for name in rivals}
    leads = {name: sum(name in verdict.leaders for verdict in telling) for name in rivals}
    order = sorted((name for name in leads if leads[name]), key=lambda name: (-leads[name], cost[name], name))
    if all(count == len(telling) for count in leads.values()):
        parts.append(
            "Between the methods themselves no difference is shown" + (", so that the cost decides." if _any(cost) else ".")
        )
        order = sorted(rivals, key=lambda name: (cost[name], name))
    else:
        most = leads[order[0]]
        first = [name for name in order if leads[name] == most]
        where = f"in {most} of these {len(telling)} columns" if len(telling) > 1 else "in it"
        named, verb = _and([title_of(name) for name in first[:NAMED]]), "leads" if len(first) == 1 else "lead"
        parts.append(f"{named} {verb} {where}: better than every control, and no other method is better.")
        if len(first) > NAMED:
            parts[-1] = f"{len(first)} methods lead {where}, among them {_and([title_of(name) for name in first[:NAMED]])}."
        order = first
    for name in order[:NAMED]:
        if twins := [title_of(twin) for twin, other in results.same.items() if other == name and not is_control(twin)]:
            parts.append(f"{_and(twins)} gave{' each' if len(twins) > 1 else ''} the same maps as {title_of(name)}.")
    priced = [name for name in order[:NAMED] if np.isfinite(cost[name])]
    if priced:
        parts.append("Cost of one image: " + ", ".join(f"{title_of(n)} {_seconds(cost[n])}" for n in priced) + ".")
    return " ".join(parts)


def spelled(column: str, direction: bool = False) -> str:
    """A column in a sentence: ``Average Drop (AD)``, and with its direction ``Average Drop (AD, lower is better)``."""
    record = metric_of(column)
    if record is None:
        return column
    known = record.columns[column]
    aside = [] if column == known.title or column == known.name else [column]
    aside += ["higher is better" if known.better == "up" else "lower is better"] if direction else []
    return known.title + (f" ({', '.join(aside)})" if aside else "")


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _any(cost: dict[str, float]) -> bool:
    return bool(np.isfinite(list(cost.values())).any())


def _judges(column: str) -> bool:
    record = metric_of(column)
    return record is not None and record.statistic == "mean" and not (record.of_model and record.costly)


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
