"""Intervals: of a mean over images, of a paired difference, and what several comparisons together may claim.

The columns people measure are full of zeros (the Average Drop of a good method) or of hundreds, and n is small. The usual
intervals are too short there, always on the side that flatters: docs/intervals.md has how often each holds the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from foveate.errors import required

LEVEL = 0.05  # what is missed: 95 % intervals
FEW = 10  # values that differ from the rest: with fewer, resampling does not know what was not seen
NEAR = 0.01  # of the largest deviation from the median: what is nearer does not differ from the rest
HUGE = 1e12  # for infinity, between which and infinity nothing can be interpolated
BLOCK = 1_000_000  # numbers of resampling weights at a time
DRAWN, LEAST = 25_000_000, 500  # of such numbers in all, where that leaves so many samples: 500 of ImageNet's 50 000 images
EXACT = 13  # images up to which every pattern of signs is tried
PATTERNS = (1_999, 9_999)  # of random ones: at least, and at most

Range = tuple[float, float]


def interval(values: np.ndarray, within: Range | None = None, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``[N]``; NaN where there are no values: see :func:`intervals`."""
    low, high = intervals(np.asarray(values, float)[:, None], [within], samples, seed)
    return float(low[0]), float(high[0])


def intervals(
    values: np.ndarray, within: Sequence[Range | None], samples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of the means of the columns of ``[N,k]`` over images, ``[k]`` and ``[k]``; NaN is passed over.

    Where a column can only lie in ``[a, b]``: the bounds of Clopper and Pearson for a share, ``Beta(S, n - S + 1)`` and
    ``Beta(S + 1, n - S)`` at 2.5 and 97.5 %, with ``S = sum_i (x_i - a) / (b - a)`` as the number of hits. For columns of two
    values these are exact; for others they are conservative in every case that was tried, which is no proof. Where 10 values
    or more differ from the rest (by more than a 100th of the largest deviation from the median), the bootstrap-t interval
    ``mean - t* s / sqrt(n)``, ``t*`` the quantiles of ``(mean* - mean) / (s* / sqrt(n))``, cuts them.

    A column without bounds has the bootstrap-t interval on the same condition, and Student's otherwise, which is too short
    where few values differ: nothing bounds what was not seen. Of a single image there is none.
    An interval of width 0 says that all values are equal, and not that the mean is known.

    Args:
        within: the least and the largest value that each column can have; None where it has no bounds.

    Source: Clopper and Pearson, Biometrika 1934; Efron and Tibshirani, An introduction to the bootstrap, 1993, 12.5.
    """
    required("an interval", "scipy")
    from scipy import special, stats

    known = np.isfinite(values)
    n = known.sum(0)  # [k]
    filled = np.where(known, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / n
        away = np.where(known, values - mean, 0.0)
        spread = np.sqrt((away**2).sum(0) / np.maximum(n - 1, 1))
        half = stats.t.ppf(1 - LEVEL / 2, np.maximum(n - 1, 1)) * spread / np.sqrt(n)
    low, high = mean - half, mean + half
    bounded = np.array([limits is not None for limits in within])
    low[(n < 2) & ~bounded] = high[(n < 2) & ~bounded] = np.nan
    differing = np.array([_differing(values[known[:, k], k]) for k in range(len(within))])
    varied = (differing >= FEW) & (spread > 0)
    if varied.any():
        t_low, t_high = _studentised(away[:, varied], known[:, varied], samples, seed)
        low[varied] = mean[varied] - t_high * spread[varied] / np.sqrt(n[varied])
        high[varied] = mean[varied] - t_low * spread[varied] / np.sqrt(n[varied])
    for k, limits in enumerate(within):
        if limits is None or not n[k]:
            continue
        a, b = limits
        hits = float(np.clip((mean[k] - a) / (b - a), 0, 1)) * n[k]
        least = special.betaincinv(hits, n[k] - hits + 1, LEVEL / 2) if hits > 0 else 0.0
        most = special.betaincinv(hits + 1, n[k] - hits, 1 - LEVEL / 2) if hits < n[k] else 1.0
        least, most = a + (b - a) * least, a + (b - a) * most
        trusted = differing[k] >= FEW and len(np.unique(values[known[:, k], k])) > 2
        low[k] = max(least, low[k]) if trusted else least
        high[k] = min(most, high[k]) if trusted else most
    return np.minimum(low, mean), np.maximum(high, mean)  # rounding, where all is equal


def _differing(column: np.ndarray) -> int:
    """How many values differ from the bulk."""
    if not len(column):
        return 0
    away = np.abs(column - np.median(column))
    return int((away > NEAR * away.max()).sum())


def _studentised(away: np.ndarray, known: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The quantiles of bootstrapped t for columns ``[N,k]`` of mean 0, ``[k]`` and ``[k]``."""
    t = []
    for draws in _draws(len(away), samples, seed):
        count = draws @ known.astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = draws @ away / count
            variance = np.maximum(draws @ away**2 / count - mean**2, 0) / (count - 1)
            t.append(np.clip(np.where(mean == 0, 0.0, mean / np.sqrt(variance)), -HUGE, HUGE))
    low, high = np.quantile(np.concatenate(t), [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return low, high


def _draws(n: int, samples: int, seed: int) -> Any:
    """How often each image is drawn, ``[s,N]`` at a time; the same for the same N and seed."""
    rng = np.random.default_rng(seed)
    samples = min(samples, max(LEAST, DRAWN // max(1, n)))
    step = max(1, BLOCK // max(1, n))
    for start in range(0, samples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), min(step, samples - start)).astype(float)


def pseudo_values(values: np.ndarray, pool: Callable[[Any], Any]) -> np.ndarray:
    """What each image adds to a number that only the whole data decides, ``[N,k] -> [N]``; their mean is that number.

    ``theta_i = n theta - (n - 1) theta_without_i``, shifted to the mean ``theta = pool(mean)``. With them a pooled column is
    like any other. An image that has no value has none here.

    Source: Tukey, 1958; Miller, Biometrika 1974.
    """
    known = np.isfinite(values).all(1)
    found = np.full(len(values), np.nan)
    rows = values[known]
    n = len(rows)
    if n:
        whole = np.asarray(pool(rows.mean(0)), float)
        found[known] = whole
        if n > 1:
            parts = n * whole - (n - 1) * np.asarray(pool((rows.sum(0) - rows) / (n - 1)), float)
            found[known] = parts - parts.mean() + whole
    return found


@lru_cache(maxsize=2)  # 100 MB for 50 000 images
def _signs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patterns of -1 and 1, ``[B,N]`` int8, the first without a -1, and how many -1 each has, ``[B]``.

    All of them for few images, else random ones.
    """
    if n <= EXACT:  # a pattern and its opposite are one: the last image keeps its sign
        places = np.arange(2 ** max(0, n - 1))
        flipped = (places[:, None] >> np.arange(n)) & 1
    else:
        count = int(np.clip(10_000_000 // n, *PATTERNS))
        flipped = np.random.default_rng(seed).integers(0, 2, (count + 1, n), dtype=np.int8)
        flipped[0] = 0
    return np.asarray(1 - 2 * flipped, dtype=np.int8), flipped.sum(1)


class Paired:
    """Values of several methods on the same images, compared two by two by flipping the signs of their differences.

    If two methods could be exchanged, image by image, then the sign of each image's difference is a coin's. ``p`` is the
    share of patterns of signs under which the mean difference is as far from 0 as it is, or farther; all patterns up to 13
    images, else 2 to 10 thousand random ones, and Hoeffding's bound ``2 exp(-z^2 / 2)``, ``z = sum d / sqrt(sum d^2)``, where
    that is less than such a count can show. The interval has all shifts that this test does not reject, which is the range
    of means over random halves of the images (Hartigan's typical values): 0 is outside just where ``p <= .05``.

    With k images on which two methods differ ``p`` is at least ``2^(1-k)``: below 6 there is no interval without 0. Where
    differences are skewed the test still asks whether the two can be exchanged, and not whether their means are equal.

    Args:
        values: ``[N,m]``, one column a method; an image counts for two methods where both have a value.

    Source: Fisher, The design of experiments, 1935; Hartigan, JASA 1969; Westfall and Young, 1993 (several at once).
    """

    def __init__(self, values: np.ndarray, seed: int = 0) -> None:
        self.values = np.asarray(values, float)
        self.known = np.isfinite(self.values)
        self.seed = seed
        self._p: dict[tuple[int, int], float] = {}
        self._sums: dict[bytes, np.ndarray] = {}

    def _both(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """The differences of two methods, ``[n]``, and their sum under each pattern, ``[B]``."""
        rows = self.known[:, i] & self.known[:, j]
        d = self.values[rows, i] - self.values[rows, j]
        if not len(d):
            return d, d
        name, alike = rows.tobytes(), (self.known == rows[:, None]).all(0)
        if not (alike[i] and alike[j]):
            return d, self._flipped(d[:, None])[:, 0]
        if name not in self._sums:  # once for all methods that have a value on the same images
            self._sums[name] = self._flipped(np.where(alike, self.values[rows], 0.0))
        return d, self._sums[name][:, i] - self._sums[name][:, j]

    def difference(self, i: int, j: int) -> tuple[float, float, float]:
        """Mean of ``i`` less that of ``j``, with its 95 % interval; NaN where no image has both, infinite where n < 6."""
        d, sums = self._both(i, j)
        if not len(d):
            return (float("nan"),) * 3
        mean, scale, turned = float(d.mean()), self._rounding(i, j) / len(d), _signs(len(d), self.seed)[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            ends = np.stack([(d.sum() - sums) / (2 * turned), (d.sum() + sums) / (2 * (len(d) - turned))])
        ends[np.abs(ends) <= scale] = 0.0  # rounding
        out = ~np.isfinite(ends).all(0)  # nothing was flipped: no shift is rejected
        low, high = np.where(out, -np.inf, ends.min(0)), np.where(out, np.inf, ends.max(0))
        place = int(LEVEL * len(low))
        return mean, float(min(np.partition(low, place)[place], mean)), float(max(-np.partition(-high, place)[place], mean))

    def p(self, i: int, j: int) -> float:
        """How often two methods that could be exchanged differ as much as ``i`` and ``j``; 1 where no image has both."""
        key = (min(i, j), max(i, j))
        if key not in self._p:
            d, sums = self._both(*key)
            if not len(d):
                return 1.0
            share = float((np.abs(sums) >= abs(d.sum()) - self._rounding(*key)).mean())
            bound = 2 * np.exp(-(d.sum() ** 2) / (2 * (d**2).sum())) if len(d) > EXACT and d.any() else 1.0
            self._p[key] = min(share, float(bound))
        return self._p[key]

    def mean(self, i: int, j: int) -> float:
        """Mean of ``i`` less that of ``j``, over the images that both have; NaN where there are none."""
        rows = self.known[:, i] & self.known[:, j]
        return float((self.values[rows, i] - self.values[rows, j]).mean()) if rows.any() else float("nan")

    def above(self, i: int, j: int, sign: int = 1) -> float:
        """How often ``i`` lies as far above ``j`` as now, if the two could be exchanged; one-sided, 1 where it does not.

        Args:
            sign: -1 for below.
        """
        return self.p(i, j) / 2 if sign * self.mean(i, j) > 0 else 1.0

    def beaten_by_any(self, i: int, rivals: Sequence[int], sign: int = 1) -> float:
        """How often the best of several rivals lies as far above ``i`` as now, if all could be exchanged with ``i``; one-sided.

        The best rival is taken under each pattern of signs, so that many rivals are no more often better by chance than one.

        Args:
            sign: -1 for below.
        """
        rows = self.known[:, [i, *rivals]].all(1)
        d = sign * (self.values[rows][:, list(rivals)] - self.values[rows][:, [i]])
        size = np.sqrt((d**2).sum(0))
        d, size = d[:, size > 0], size[size > 0]
        if not d.size:
            return 1.0
        flipped = self._flipped(d) / size
        now = float((d.sum(0) / size).max()) - 1e-12 * len(d)
        return float(((flipped.max(1) >= now).mean() + ((-flipped).max(1) >= now).mean()) / 2)

    def adjusted(self) -> np.ndarray:
        """``p`` of each two methods, corrected by Holm for all pairs of them, ``[m,m]``."""
        count = self.values.shape[1]
        rows, columns = np.triu_indices(count, 1)
        found = np.ones((count, count))
        found[rows, columns] = holm(np.array([self.p(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]))
        return np.minimum(found, found.T)

    def _rounding(self, i: int, j: int) -> float:
        """What sums of two methods may differ by without a difference."""
        return 1e-12 * float(np.nansum(np.abs(self.values[:, [i, j]])))

    def _flipped(self, d: np.ndarray) -> np.ndarray:
        """Sums of differences ``[n,k]`` under each pattern, ``[B,k]``."""
        signs, _ = _signs(len(d), self.seed)
        step = max(1, 16 * BLOCK // len(d))
        return np.concatenate([signs[start : start + step].astype(float) @ d for start in range(0, len(signs), step)])


def correct(cells: Sequence[dict[str, float]], name: str) -> None:
    """Correct the ``p`` that cells of one column hold under a name, by :func:`holm`; those without one, or with NaN, stay."""
    tested = [cell for cell in cells if np.isfinite(cell.get(name, np.nan))]
    for cell, p in zip(tested, holm(np.array([cell[name] for cell in tested])), strict=True):
        cell[name] = float(p)


def holm(p: np.ndarray) -> np.ndarray:
    """``p`` of several comparisons, corrected: at most 5 % of such families have an error below .05.

    The smallest times their number, the next times one less, and so on, none below the one before, none above 1.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(steps, 1)
    return found
