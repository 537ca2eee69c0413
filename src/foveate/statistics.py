"""Statistics: intervals, paired differences, ranks with ties, agreement of columns, and what to say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate import missing
from foveate.errors import FoveateError
from foveate.registry import METHODS, METRICS, Metric, is_control, title_of
from foveate.results import MODEL, Key, Results

if TYPE_CHECKING:
    import pandas as pd

# The thesis' order first, then what it has not.
ORDER = ("AD", "AG", "AI", "I", "D", "OM", "LE", "F1", "BA", "SP", "EP", "SM", "mass_inside", "sparsity", "gini")
LAST = ("T", "forwards", "backwards", "memory")
UNJUDGED = ("sparsity",)  # it describes a map: nobody wins it
LEVEL = (0.025, 0.975)
BLOCK = 1_000_000  # numbers of resampling weights at a time


def interval(values: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; not a number where there are no values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(bootstrap(values[:, None], samples, seed)[:, 0], LEVEL)
    return float(low), float(high)


def bootstrap(values: np.ndarray, samples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of ``[N,k]`` over images drawn with replacement, ``[samples,k]``; what is not a number is not drawn.

    The same draws for every array with the same N and seed, so that differences of two are paired.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    rng = np.random.default_rng(seed)
    means = []
    step = max(1, BLOCK // max(1, len(values)))
    for start in range(0, samples, step):
        draws = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), min(step, samples - start)).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(draws @ filled / (draws @ known.astype(float)))
    return np.concatenate(means)


def metric_of(column: str) -> Metric | None:
    """The metric that has a column; None for a curve or what no metric is registered for."""
    return next((record for record in METRICS.all().values() if column in record.columns), None)


def _columns(results: Results) -> Iterator[tuple[Key, Metric, np.ndarray, Callable[[Any], Any] | None]]:
    for key, values in results.values.items():
        record = metric_of(key[1])
        if record is None:
            continue
        pool = record.pooled.get(key[1])
        if values.ndim == 1 or pool is not None:
            yield key, record, values, pool


@dataclass
class Resampled:
    """What the bootstrap gives: the value of each method and column, and its value in every resample.

    Attributes:
        points: ``(value, low, high, images)``.
        drawn: ``[samples]``; costs have none.
    """

    points: dict[Key, tuple[float, float, float, int]]
    drawn: dict[Key, np.ndarray]
    values: dict[Key, np.ndarray]
    samples: int
    seed: int

    def difference(self, key: Key, other: Key) -> tuple[float, float, float]:
        """Of two methods in a column, with its interval: paired, over the images that both have; not a number without any."""
        if key == other or key not in self.drawn or other not in self.drawn:
            return (float("nan"),) * 3
        a, b = self.values[key], self.values[other]
        if a.ndim == 1 and not np.array_equal(np.isfinite(a), np.isfinite(b)):
            both = (a - b)[np.isfinite(a - b)]
            return (float(both.mean()), *interval(both, self.samples, self.seed)) if len(both) else (float("nan"),) * 3
        low, high = np.nanquantile(self.drawn[key] - self.drawn[other], LEVEL)
        return self.points[key][0] - self.points[other][0], float(low), float(high)


def resampled(results: Results, samples: int = 2000, seed: int = 0) -> Resampled:
    """The bootstrap of every column; done once for the same results."""
    known = results.resampled
    if isinstance(known, Resampled) and (known.samples, known.seed) == (samples, seed):
        return known
    points: dict[Key, tuple[float, float, float, int]] = {}
    drawn: dict[Key, np.ndarray] = {}
    columns = list(_columns(results))
    plain = [(key, values) for key, record, values, pool in columns if pool is None and record.statistic == "mean"]
    if plain and len(results):
        means = bootstrap(np.stack([values for _, values in plain], 1), samples, seed)
        drawn = {key: means[:, i] for i, (key, _) in enumerate(plain)}
    for key, record, values, pool in columns:
        finite = values[np.isfinite(values if values.ndim == 1 else values.sum(1))]
        if record.statistic == "median" or not len(finite):
            ends = (np.median(finite), finite.min(), finite.max()) if len(finite) else (np.nan,) * 3
            points[key] = (float(ends[0]), float(ends[1]), float(ends[2]), len(finite))
            drawn.pop(key, None)
            continue
        if pool is not None:
            drawn[key] = np.asarray(pool(bootstrap(values, samples, seed)), float)
        centre = float(finite.mean() if pool is None else pool(finite.mean(0)))
        low, high = np.nanquantile(drawn[key], LEVEL)
        points[key] = (centre, float(low), float(high), len(finite))
    results.resampled = Resampled(points, drawn, {key: results.values[key] for key in points}, samples, seed)
    return results.resampled


def table(results: Results, baseline: str | None = None, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The table: index ``method, column``, one line each.

    Columns: ``mean``, ``low`` and ``high`` of its 95 % bootstrap interval over images, ``n`` images that count;
    ``difference`` to the baseline with ``difference_low`` and ``difference_high``, paired by image (not a number for the
    baseline itself); ``rank`` and ``rank_last``: 1 and more, from the number of methods whose intervals lie wholly better,
    to that of all that do not lie wholly worse. What the whole data decides (BA) is decided anew in each resample. Costs
    have the median over batches with the range, and no rank.

    Args:
        baseline: a method of the table; ``grad_cam`` where it is there and none is named, else the first that is no control.

    Raises:
        FoveateError: the baseline is not in the table.
    """
    import pandas as pd

    baseline = baseline_of(results.methods, baseline)
    found = resampled(results, samples, seed)
    lines = []
    for (method, column), (mean, low, high, n) in found.points.items():
        difference = found.difference((method, column), (baseline, column))
        rank = _rank(found.points, (method, column)) if (method, column) in found.drawn and method != MODEL else (0, 0)
        lines.append((method, column, mean, low, high, n, *difference, *rank))
    names = ["mean", "low", "high", "n", "difference", "difference_low", "difference_high", "rank", "rank_last"]
    frame = pd.DataFrame(lines, columns=["method", "column", *names]).set_index(["method", "column"])
    frame.attrs["baseline"] = baseline
    return frame


def baseline_of(methods: Sequence[str], baseline: str | None) -> str:
    """The method that others are compared with.

    Raises:
        FoveateError: it is not among them.
    """
    if baseline is not None:
        record = METHODS.known(baseline)
        for name in (baseline, *([record.name] if record else [])):
            if name in methods:
                return name
        raise FoveateError(f"baseline {baseline!r} is not in the table: it has {', '.join(methods)}")
    real = [name for name in methods if not is_control(name)]
    return "grad_cam" if "grad_cam" in methods else (real or list(methods) or [""])[0]


def _rank(points: dict[Key, tuple[float, float, float, int]], key: Key) -> tuple[int, int]:
    record = metric_of(key[1])
    up = record is not None and record.columns[key[1]] == "up"
    _, low, high, _ = points[key]
    others = [point for (m, c), point in points.items() if c == key[1] and m not in (key[0], MODEL) and np.isfinite(point[0])]
    better = sum(point[1] > high if up else point[2] < low for point in others)
    worse = sum(point[2] < low if up else point[1] > high for point in others)
    return 1 + better, 1 + len(others) - worse


def disagreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation between columns over methods, each turned so that more is better: ``[columns,columns]``.

    1: both order the methods alike. Costs and columns of the model are left out, and so is one on which all methods agree.
    """
    import pandas as pd

    usable = {}
    for column in dict.fromkeys(frame.index.get_level_values("column")):
        record = metric_of(column)
        if record is None or record.of_model or record.statistic == "median":
            continue
        means = frame.xs(column, level="column")["mean"]
        usable[column] = means if record.columns[column] == "up" else -means
    wide = pd.DataFrame(usable).dropna(axis=1, thresh=3)
    wide = wide.loc[:, wide.nunique() > 1]
    return wide.corr("spearman", min_periods=3)


def findings(frame: pd.DataFrame, results: Results) -> list[str]:
    """What has to be said about a table: controls that win, methods that are one, maps that say nothing.

    A control wins a column where it is better than every other method, and the paired difference to the best of them has an
    interval without 0; where that interval has 0 in it, the best cannot be told apart from the control.
    """
    found = resampled(results)
    sentences = []
    controls = [name for name in results.methods if is_control(name)]
    real = [name for name in results.methods if name not in controls and name not in results.same]
    if not controls:
        sentences.append("There is no control in this table: nothing shows here which columns measure the explanation.")
    for column in ordered(dict.fromkeys(frame.index.get_level_values("column"))):
        record = metric_of(column)
        if record is None or record.of_model or record.statistic == "median" or record.name in UNJUDGED:
            continue
        sign = 1 if record.columns[column] == "up" else -1
        scores = {m: sign * found.points[m, column][0] for m in (*real, *controls) if (m, column) in found.drawn}
        rivals = [name for name in real if name in scores]
        if not rivals or not any(name in scores for name in controls):
            continue
        control = max((name for name in controls if name in scores), key=lambda name: scores[name])
        best = max(rivals, key=lambda name: scores[name])
        low, high = _margin(found, control, best, column, sign)
        title, value = title_of(control), number(found.points[control, column][0], column)
        rival = f"{title_of(best)} ({number(found.points[best, column][0], column)})"
        beaten = [name for name in rivals if _margin(found, control, name, column, sign)[0] > 0]
        if low > 0:
            sentences.append(f"{column} is won by {title} ({value}): on this data it does not measure the explanation.")
        elif high >= 0:
            sentences.append(
                f"{column}: the best, {rival}, cannot be told apart from {title} ({value}), which ignores the model."
            )
        elif 2 * len(beaten) >= len(rivals) and len(rivals) > 1:
            sentences.append(
                f"{column}: {title} ({value}), which ignores the model, beats {len(beaten)} of {len(rivals)} methods."
            )
    groups: dict[str, list[str]] = {}
    for name, other in results.same.items():
        groups.setdefault(other, []).append(name)
    sentences += [f"{', '.join(names)} gave the same maps as {other} on every image." for other, names in groups.items()]
    sentences += missing.said(results.missing, len(results))
    for name, count in results.degenerate.items():
        if count:
            sentences.append(f"{count} of {len(results)} maps of {name} are constant; they count as maps of zeros.")
    return sentences


def _margin(found: Resampled, name: str, other: str, column: str, sign: int) -> tuple[float, float]:
    """The interval of how much better one method is than another, turned so that more is better."""
    _, low, high = found.difference((name, column), (other, column))
    return (low, high) if sign > 0 else (-high, -low)


def ordered(columns: Iterable[str]) -> list[str]:
    """Columns as the thesis prints them, then the others, the costs last."""
    place = {name: i for i, name in enumerate(ORDER)} | {name: 100 + i for i, name in enumerate(LAST)}
    return sorted(columns, key=lambda column: place.get(column, 50))


def number(value: float, column: str) -> str:
    """A value with the digits that its metric is worth; a dash for none."""
    record = metric_of(column)
    digits = 2 if column == "SM" else 1 if record is None else record.digits
    if not np.isfinite(value):
        return "–"
    if column in ("forwards", "backwards", "memory"):
        digits = 0 if value >= 10 else 1
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
