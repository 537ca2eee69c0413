"""Prevalence: where the maps of a whole data set lie: mean and spread a class, drift, the background's share, outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import FoveateError, required
from foveate.evaluation.intervals import interval
from foveate.evaluation.results import MAP, Results
from foveate.registry import title_of

if TYPE_CHECKING:
    import pandas as pd

EVERY = -1  # stands for all classes together


@dataclass(frozen=True)
class Prevalence:
    """The maps of one method over the data.

    Attributes:
        table: index ``class`` (-1: all), with ``n``, ``x`` and ``y`` (centre of mass, in shares of the side, mean over images),
            ``drift`` (its distance from the middle of the image), ``wander`` (mean distance of an image's centre of mass from
            that of its class), ``spread`` (mean over positions of the standard deviation over images), and where the object is
            known ``background`` (share of the map's mass outside of it) and ``mostly_background`` (share of images where that
            is above one half).
        mean, spread: ``{class: [h,w]}``: mean and standard deviation of the maps, each scaled to a mass of 1; of the main
            method only.
        background: the share of each map outside of the object, ``[N]``; NaN where that is not known.
        seen: the images that have a map at all, ``[N]`` bool; the others count nowhere here.
        distance: of each image's map from the mean of its class's other images, ``[N]`` in [0, 1]: half the absolute
            difference of two maps of mass 1; NaN for a class of one, or a map of zeros.
    """

    method: str
    table: pd.DataFrame
    mean: dict[int, np.ndarray]
    spread: dict[int, np.ndarray]
    distance: np.ndarray
    background: np.ndarray
    seen: np.ndarray

    def farthest(self, count: int = 8) -> list[int]:
        """The images farthest from their class, the farthest first."""
        order = np.argsort(-np.nan_to_num(self.distance, nan=-1))
        return [int(i) for i in order[:count] if np.isfinite(self.distance[i])]

    def sentence(self) -> str:
        """The answer to "is it prevalent across the data set?", with its numbers."""
        whole = self.table.loc[EVERY]
        drift, wander = 100 * whole["drift"], 100 * whole["wander"]
        text = (
            f"Over {int(whole['n'])} images the middle of the maps of {title_of(self.method)} lies {drift:.0f} % of the side "
            f"from the middle of the image, and that of one image {wander:.0f} % from their mean."
        )
        if not np.isfinite(self.background).any():
            return text + " How much of it is background is not known: that takes EP or mass_inside, from boxes or masks."
        low, high = interval(100 * self.background[self.seen], (0, 100))
        return (
            f"{100 * whole['background']:.0f} % [{low:.0f}, {high:.0f}] of the map lies on the background; on "
            f"{100 * whole['mostly_background']:.0f} % of the images it is more than half. {text}"
        )


def background_of(results: Results, method: str) -> np.ndarray | None:
    """The share of each map outside of the object, ``[N]``: from masks, else from boxes; None where neither is known."""
    for column, scale in (("mass_inside", 1.0), ("EP", 100.0)):
        if (method, column) in results.values:
            return 1 - results.values[method, column] / scale
    return None


def prevalence(
    parts: Callable[[], Iterable[Results]], methods: Sequence[str], main: str | None = None
) -> dict[str, Prevalence]:
    """Look at the maps of methods over the whole data, from the small copies that a run keeps.

    Args:
        parts: gives the chunks of a run, or whole results, as often as it is called; only one is in memory at a time.
        main: the method whose mean, spread and distances are wanted too; they take a second pass.

    Raises:
        FoveateError: no maps were kept.
    """
    seen: dict[str, _Seen] = {name: _Seen(pictures=name == main) for name in methods}
    for part in parts():
        for name, one in seen.items():
            if len(part) and (name, MAP) not in part.values:
                raise FoveateError(f"no maps of {name!r} were kept: measure with keep_maps=True")
            if len(part):
                one.add(part, name)
    found = {name: one.result(name) for name, one in seen.items() if one.labels}
    if main in found and found[main].mean:
        distances = [seen[main].distances(part.values[main, MAP], part.labels) for part in parts() if len(part)]
        found[main] = replace(found[main], distance=np.concatenate(distances))
    return found


def _unit(maps: np.ndarray) -> np.ndarray:
    """Maps ``[N,hw]`` with a mass of 1, or 0 where there is none."""
    maps = maps.astype(np.float64)
    total = maps.sum(1, keepdims=True)
    returned: np.ndarray = np.divide(maps, total, out=np.zeros_like(maps), where=total > 0)
    return returned


class _Seen:
    """What is gathered of one method: a few numbers per image, and for pictures the sums of each class."""

    def __init__(self, pictures: bool) -> None:
        self.pictures = pictures
        self.side = 1
        self.centres: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.background: list[np.ndarray] = []
        self.sums: dict[int, list[np.ndarray | int]] = {}

    def add(self, part: Results, method: str) -> None:
        unit = _unit(part.values[method, MAP])
        self.side = round(unit.shape[1] ** 0.5)
        places = (np.arange(self.side) + 0.5) / self.side
        grid = unit.reshape(-1, self.side, self.side)
        there = unit.sum(1) > 0
        centre = np.stack([grid.sum(1) @ places, grid.sum(2) @ places], 1)  # [n,2]
        self.centres.append(np.where(there[:, None], centre, np.nan))
        self.labels.append(part.labels)
        behind = background_of(part, method)
        self.background.append(np.full(len(part), np.nan) if behind is None else behind)
        for label in {EVERY, *part.labels.tolist()} if self.pictures else ():  # once, also where no label is known
            rows = unit[there & ((part.labels == label) | (label == EVERY))]
            kept = self.sums.setdefault(label, [np.zeros(unit.shape[1]), np.zeros(unit.shape[1]), 0])
            kept[0] += rows.sum(0)
            kept[1] += (rows**2).sum(0)
            kept[2] += len(rows)

    def result(self, method: str) -> Prevalence:
        required("prevalence", "pandas")
        import pandas as pd

        centres, labels = np.concatenate(self.centres), np.concatenate(self.labels)
        background, seen = np.concatenate(self.background), np.isfinite(centres[:, 0])
        means, spreads, lines = {}, {}, []
        for label in [EVERY, *sorted(set(labels.tolist()) - {EVERY})]:
            rows = np.flatnonzero(seen & ((labels == label) | (label == EVERY)))
            if not len(rows):
                continue
            spread = np.full(1, np.nan)
            if self.pictures:
                total, squares, count = self.sums[label]
                mean = np.asarray(total / count)
                spread = np.sqrt(np.clip(np.asarray(squares / count) - mean**2, 0, None))
                means[label], spreads[label] = (values.reshape(self.side, self.side) for values in (mean, spread))
            middle = centres[rows].mean(0)
            behind = background[rows][np.isfinite(background[rows])]
            lines.append(
                {
                    "class": label,
                    "n": len(rows),
                    "x": middle[0],
                    "y": middle[1],
                    "drift": float(np.hypot(*(middle - 0.5))),
                    "wander": float(np.hypot(*(centres[rows] - middle).T).mean()),
                    "spread": float(spread.mean() * self.side**2),
                    "background": float(behind.mean()) if len(behind) else np.nan,
                    "mostly_background": float((behind > 0.5).mean()) if len(behind) else np.nan,
                }
            )
        columns = ["class", "n", "x", "y", "drift", "wander", "spread", "background", "mostly_background"]
        table = pd.DataFrame(lines, columns=columns).set_index("class")
        return Prevalence(method, table, means, spreads, np.full(len(labels), np.nan), background, seen)

    def distances(self, maps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Of each map from the mean of the others of its class; of all others where every class has one image."""
        unit = _unit(maps)
        several = any(kept[2] > 1 for label, kept in self.sums.items() if label != EVERY)
        found = np.full(len(unit), np.nan)
        for i, label in enumerate(labels.tolist()):
            total, _, count = self.sums.get(label if several else EVERY, (0, 0, 0))
            if count > 1 and unit[i].any():
                found[i] = np.abs(unit[i] - (total - unit[i]) / (count - 1)).sum() / 2
        return found
