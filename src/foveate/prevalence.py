"""Prevalence: where the maps of a whole data set lie: mean and spread a class, drift, the background's share, outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import FoveateError
from foveate.results import MAP, Results
from foveate.statistics import interval

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
        mean, spread: ``{class: [h,w]}``: mean and standard deviation of the maps, each scaled to a mass of 1.
        distance: of each image's map from the mean of its class's other images, ``[N]`` in [0, 1]: half the absolute
            difference of two maps of mass 1; not a number for a class of one, or a map of zeros.
    """

    method: str
    table: pd.DataFrame
    mean: dict[int, np.ndarray]
    spread: dict[int, np.ndarray]
    distance: np.ndarray

    def farthest(self, count: int = 8) -> list[int]:
        """The images farthest from their class, the farthest first."""
        order = np.argsort(-np.nan_to_num(self.distance, nan=-1))
        return [int(i) for i in order[:count] if np.isfinite(self.distance[i])]

    def sentence(self, background: np.ndarray | None) -> str:
        """The answer to "is it prevalent across the data set?", with its numbers."""
        whole = self.table.loc[EVERY]
        drift, wander = 100 * whole["drift"], 100 * whole["wander"]
        text = (
            f"Over {int(whole['n'])} images the middle of {self.method}'s maps lies {drift:.0f} % of the side from the middle "
            f"of the image, and that of one image {wander:.0f} % from their mean."
        )
        if background is None or not np.isfinite(background).any():
            return text + " Without boxes or masks nobody can say how much of it is background."
        low, high = interval(100 * background)
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


def prevalence(results: Results, method: str) -> Prevalence:
    """Look at the maps of one method over the whole data, from the small copies that a run keeps.

    Raises:
        FoveateError: no maps were kept of the method.
    """
    import pandas as pd

    if (method, MAP) not in results.values:
        raise FoveateError(f"no maps of {method!r} were kept: measure with keep_maps=True")
    maps = results.values[method, MAP].astype(np.float64)
    side = round(maps.shape[1] ** 0.5)
    total = maps.sum(1, keepdims=True)
    unit = np.divide(maps, total, out=np.zeros_like(maps), where=total > 0)
    seen = total[:, 0] > 0
    places = (np.arange(side) + 0.5) / side
    grid = unit.reshape(-1, side, side)
    centre = np.stack([grid.sum(1) @ places, grid.sum(2) @ places], 1)  # [N,2]
    background = background_of(results, method)
    distance = np.full(len(unit), np.nan)
    lines, means, spreads = [], {}, {}
    for label in [EVERY, *sorted(set(results.labels.tolist()) - {-1})]:
        rows = np.flatnonzero(seen if label == EVERY else seen & (results.labels == label))
        if not len(rows):
            continue
        mean, spread, middle = unit[rows].mean(0), unit[rows].std(0), centre[rows].mean(0)
        means[label], spreads[label] = mean.reshape(side, side), spread.reshape(side, side)
        if len(rows) > 1 and label != EVERY:
            others = (unit[rows].sum(0) - unit[rows]) / (len(rows) - 1)
            distance[rows] = np.abs(unit[rows] - others).sum(1) / 2
        behind = np.full(1, np.nan) if background is None else background[rows][np.isfinite(background[rows])]
        known = len(behind) > 0 and bool(np.isfinite(behind).all())
        lines.append(
            {
                "class": label,
                "n": len(rows),
                "x": middle[0],
                "y": middle[1],
                "drift": float(np.hypot(*(middle - 0.5))),
                "wander": float(np.hypot(*(centre[rows] - middle).T).mean()),
                "spread": float(spread.mean() * side * side),
                "background": float(behind.mean()) if known else np.nan,
                "mostly_background": float((behind > 0.5).mean()) if known else np.nan,
            }
        )
    if not np.isfinite(distance).any() and seen.sum() > 1:  # every class has one image: compare with all of them
        others = (unit[seen].sum(0) - unit[seen]) / (seen.sum() - 1)
        distance[seen] = np.abs(unit[seen] - others).sum(1) / 2
    columns = ["class", "n", "x", "y", "drift", "wander", "spread", "background", "mostly_background"]
    table = pd.DataFrame(lines, columns=columns).set_index("class")
    return Prevalence(method, table, means, spreads, distance)
