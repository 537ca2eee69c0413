"""Compare: runs side by side, image by image, and a gate for what may not get worse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import FoveateError, required
from foveate.evaluation import runs
from foveate.evaluation.intervals import Paired, correct, pseudo_values
from foveate.evaluation.results import Key, Results
from foveate.evaluation.statistics import metric_of
from foveate.registry import is_control

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """Runs beside the first of them.

    Attributes:
        names: one per run, its folder's.
        frame: index ``method, column``; for run k the columns ``mean k`` and, after the first, ``difference k``, ``low k``,
            ``high k`` of the difference to the first, paired by image; ``p k``, by flipping the signs of the differences and
            corrected for the methods of the column (Holm); ``n k`` images that both have.
        notes: what cannot be compared, and why, in sentences.
    """

    names: list[str]
    frame: pd.DataFrame
    notes: list[str]

    def failures(self, limits: Sequence[Limit]) -> list[str]:
        """The changes that are worse than a limit allows, in sentences; a value that is gone is one.

        A limit without a method does not hold for controls, which change with the model and say nothing about it.

        Raises:
            FoveateError: a limit that fits nothing that was compared: a gate that cannot close is none.
        """
        sentences = []
        for limit in limits:
            met = False
            for (method, column), line in self.frame.iterrows():
                if (
                    column != limit.column
                    or limit.method not in (None, method)
                    or (limit.method is None and is_control(method))
                ):
                    continue
                for k in range(1, len(self.names)):
                    change = float(line[f"difference {k}"])
                    if not np.isfinite(change):
                        if np.isfinite(line["mean 0"]) and not np.isfinite(line[f"mean {k}"]):
                            met = True
                            sentences.append(f"{column} of {method} has a value in {self.names[0]} and none in {self.names[k]}")
                        continue
                    met = True
                    if limit.broken(change):
                        sentences.append(
                            f"{column} of {method} changed by {change:+.3g} in {self.names[k]}; {limit.change:+g} is allowed"
                        )
            if not met:
                raise FoveateError(f"--fail-under {limit.text!r} fits nothing that these runs have in common")
        return sentences


@dataclass(frozen=True)
class Limit:
    """How far a column may get worse: ``AG=-2``, ``AD=3``, or of one method ``grad_cam.AG=-2``."""

    text: str
    method: str | None
    column: str
    change: float
    up: bool

    @staticmethod
    def of(text: str) -> Limit:
        """Read one.

        Raises:
            FoveateError: not of that form, an unknown column, or a change for the better.
        """
        found = re.fullmatch(r"(?:([^=]+)\.)?([^.=]+)=([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text.strip())
        if not found:
            raise FoveateError(f"--fail-under {text!r} is not COLUMN=CHANGE or METHOD.COLUMN=CHANGE, such as AG=-2")
        method, column, change = found[1], found[2], float(found[3])
        record = metric_of(column)
        if record is None:
            raise FoveateError(f"--fail-under {text!r}: there is no column {column!r}")
        up = record.columns[column].better == "up"
        if (change > 0) if up else (change < 0):
            way = "negative" if up else "positive"
            raise FoveateError(
                f"--fail-under {text!r}: {column} is better {'up' if up else 'down'}, so a worse change is {way}: "
                "give the one that is still allowed"
            )
        return Limit(text, method, column, change, up)

    def broken(self, change: float) -> bool:
        """Whether a change is worse than this."""
        return change < self.change if self.up else change > self.change


def compare(folders: Sequence[str | Path], *, seed: int = 0) -> Comparison:
    """Compare finished runs of ``foveate evaluate`` with the first of them.

    A column measured by another protocol is left out, with a note; so are images and methods that not both have.

    Raises:
        FoveateError: fewer than two runs, one that is not finished, or runs that have nothing in common.
    """
    required("compare", "pandas")
    import pandas as pd

    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise FoveateError(f"there is nothing to compare {str(paths[0]) if paths else 'with'!r} with: name two runs or more")
    records, loaded = [runs.read_record(path) for path in paths], [runs.load(path) for path in paths]
    names = [path.name if [p.name for p in paths].count(path.name) == 1 else str(path) for path in paths]
    notes: list[str] = []
    lines: dict[Key, dict[str, Any]] = {}
    for key in loaded[0].values:
        if metric_of(key[1]) is not None and any(key in other.values for other in loaded[1:]):
            lines[key] = {"mean 0": _point(loaded[0], key, np.arange(len(loaded[0])))}
    for k in range(1, len(paths)):
        notes += _differ(records[0], records[k], names[0], names[k])
        there = {name: i for i, name in enumerate(loaded[k].ids)}
        rows = np.array([(i, there[name]) for i, name in enumerate(loaded[0].ids) if name in there], int).reshape(-1, 2)
        if not len(rows):
            raise FoveateError(f"{paths[0]} and {paths[k]} have no image in common: they were run on other data")
        if len(rows) < max(len(loaded[0]), len(loaded[k])):
            notes.append(f"{names[0]} has {len(loaded[0])} images, {names[k]} has {len(loaded[k])}: {len(rows)} are compared.")
        notes += _other_files(loaded[0], loaded[k], rows, names[0], names[k])
        other_protocol = _other_protocol(records[0], records[k])
        for key, line in lines.items():
            record = metric_of(key[1])
            assert record is not None
            comparable = key in loaded[k].values and record.name not in other_protocol
            line[f"mean {k}"] = _point(loaded[k], key, rows[:, 1]) if key in loaded[k].values else np.nan
            if len(paths) == 2:  # of more runs, each has its own images in common with the first
                line["mean 0"] = _point(loaded[0], key, rows[:, 0])
            change = _change(loaded[0], loaded[k], key, rows, seed) if comparable else (*[np.nan] * 4, 0)
            line |= dict(zip((f"difference {k}", f"low {k}", f"high {k}", f"p {k}", f"n {k}"), change, strict=True))
        for column in {column for _, column in lines}:
            correct([line for (_, c), line in lines.items() if c == column], f"p {k}")
        notes += [
            f"{metric} was measured by another protocol in {names[k]} ({a} and {b}): its columns are not compared."
            for metric, (a, b) in other_protocol.items()
        ]
    if not lines:
        raise FoveateError(f"{', '.join(names)} have no method and column in common")
    frame = pd.DataFrame.from_dict(lines, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(lines), names=["method", "column"])
    return Comparison(names, frame, list(dict.fromkeys(notes)))


def _point(results: Results, key: Key, rows: np.ndarray) -> float:
    record = metric_of(key[1])
    values = results.values[key][rows]
    known = values[np.isfinite(values if values.ndim == 1 else values.sum(1))]
    if record is None or not len(known):
        return float("nan")
    if record.statistic == "median":
        return float(np.median(known))
    pool = record.pooled.get(key[1])
    return float(known.mean() if pool is None else pool(known.mean(0)))


def _change(first: Results, other: Results, key: Key, rows: np.ndarray, seed: int) -> tuple[float, float, float, float, int]:
    record = metric_of(key[1])
    assert record is not None
    a, b = first.values[key][rows[:, 0]], other.values[key][rows[:, 1]]
    known = np.isfinite((a + b) if a.ndim == 1 else (a + b).sum(1))
    a, b = a[known], b[known]
    if not len(a):
        return np.nan, np.nan, np.nan, np.nan, 0
    if record.statistic == "median":
        return float(np.median(b) - np.median(a)), np.nan, np.nan, np.nan, len(a)
    if (pool := record.pooled.get(key[1])) is not None:
        a, b = pseudo_values(a, pool), pseudo_values(b, pool)
    paired = Paired(np.stack([b, a], 1), seed)
    point, low, high = paired.difference(0, 1)
    return point, *((low, high) if np.isfinite([low, high]).all() else (np.nan, np.nan)), paired.p(0, 1), len(a)


def _other_files(first: Results, other: Results, rows: np.ndarray, name: str, other_name: str) -> list[str]:
    if not (first.contents and other.contents):
        return []
    changed = [first.ids[i] for i, j in rows.tolist() if first.contents[i] != other.contents[j]]
    if not changed:
        return []
    return [
        f"{len(changed)} of {len(rows)} images that both have are other files under the same name, the first: {changed[0]}: "
        f"differences of {other_name} to {name} are also theirs."
    ]


def _other_protocol(first: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[str, str]]:
    mine, theirs = (record.get("protocol", {}).get("metrics", {}) for record in (first, other))
    return {
        name: (mine[name]["digest"], theirs[name]["digest"])
        for name in mine
        if name in theirs and mine[name]["digest"] != theirs[name]["digest"]
    }


def _differ(first: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> list[str]:
    notes = []
    settings = [record.get("arguments", {}).get("settings", {}) for record in (first, other)]
    for method in dict.fromkeys([*settings[0], *settings[1]]):
        if settings[0].get(method) != settings[1].get(method):
            notes.append(
                f"{method} had other settings: {settings[0].get(method) or 'defaults'} in {name}, "
                f"{settings[1].get(method) or 'defaults'} in {other_name}."
            )
    if first.get("identity", {}).get("images") != other.get("identity", {}).get("images"):
        notes.append(
            f"{name} and {other_name} were not run on the same list of images and labels; what has one name is compared."
        )
    for what in ("layer", "precision", "size"):
        a, b = (record.get("arguments", {}).get(what) for record in (first, other))
        if a != b:
            notes.append(f"{what} was {a} in {name}, and {b} in {other_name}.")
    return notes
