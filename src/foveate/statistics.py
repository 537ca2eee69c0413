"""Statistics: intervals, paired differences, ranks with ties, agreement of columns, and what to say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import FoveateError
from foveate.registry import METHODS, METRICS, Metric, is_control, title_of
from foveate.results import MODEL, Key, Results

if TYPE_CHECKING:
    import pandas as pd

UNJUDGED = ("sparsity",)  # it describes a map: nobody wins it
LEVEL = (0.025, 0.975)
BLOCK = 4_000_000  # numbers of resampling weights at a time


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

    baseline = baseline_of(results, baseline)
    points: dict[Key, tuple[float, float, float, int]] = {}
    drawn: dict[Key, np.ndarray] = {}
    plain = [(key, values) for key, record, values, pool in _columns(results) if pool is None and record.statistic == "mean"]
    if plain and len(results):
        means = bootstrap(np.stack([values for _, values in plain], 1), samples, seed)
        drawn = {key: means[:, i] for i, (key, _) in enumerate(plain)}
    for key, record, values, pool in _columns(results):
        known = values[np.isfinite(values if values.ndim == 1 else values.sum(1))]
        if record.statistic == "median" or not len(known):
            ends = (np.median(known), known.min(), known.max()) if len(known) else (np.nan,) * 3
            points[key] = (float(ends[0]), float(ends[1]), float(ends[2]), len(known))
            drawn.pop(key, None)
            continue
        if pool is not None:
            drawn[key] = np.asarray(pool(bootstrap(values, samples, seed)), float)
        centre = float(known.mean() if pool is None else pool(known.mean(0)))
        low, high = np.nanquantile(drawn[key], LEVEL)
        points[key] = (centre, float(low), float(high), len(known))
    lines = []
    for (method, column), (mean, low, high, n) in points.items():
        difference = _difference(points, drawn, (method, column), (baseline, column))
        rank = _rank(points, (method, column)) if (method, column) in drawn and method != MODEL else (0, 0)
        lines.append((method, column, mean, low, high, n, *difference, *rank))
    names = ["mean", "low", "high", "n", "difference", "difference_low", "difference_high", "rank", "rank_last"]
    frame = pd.DataFrame(lines, columns=["method", "column", *names]).set_index(["method", "column"])
    frame.attrs["baseline"] = baseline
    return frame


def baseline_of(results: Results, baseline: str | None) -> str:
    """The method that others are compared with."""
    methods = results.methods
    if baseline is not None:
        name = baseline if baseline in methods else METHODS.get(baseline).name
        if name not in methods:
            raise FoveateError(f"baseline {baseline!r} is not in the table: it has {', '.join(methods)}")
        return name
    real = [name for name in methods if not is_control(name)]
    return "grad_cam" if "grad_cam" in methods else (real or methods or [""])[0]


def _difference(points: dict[Key, Any], drawn: dict[Key, np.ndarray], key: Key, other: Key) -> tuple[float, float, float]:
    if key == other or key not in drawn or other not in drawn:
        return (float("nan"),) * 3
    low, high = np.nanquantile(drawn[key] - drawn[other], LEVEL)
    return points[key][0] - points[other][0], float(low), float(high)


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
    """What has to be said about a table: controls that win, methods that are one, maps that say nothing."""
    sentences = []
    methods = results.methods
    controls = [name for name in methods if is_control(name)]
    real = [name for name in methods if name not in controls and name not in results.same]
    for column in dict.fromkeys(frame.index.get_level_values("column")):
        record = metric_of(column)
        if record is None or record.of_model or record.statistic == "median" or record.name in UNJUDGED or not real:
            continue
        sign = 1 if record.columns[column] == "up" else -1
        lines = frame.xs(column, level="column")["mean"].dropna()
        scores = {name: sign * float(lines[name]) for name in lines.index}
        rivals = [scores[name] for name in real if name in scores]
        if not rivals or not (there := [name for name in controls if name in scores]):
            continue
        best = max(there, key=lambda name: scores[name])
        value = f"{round(float(lines[best]), record.digits) + 0.0:.{record.digits}f}"
        beaten = sum(scores[best] > rival for rival in rivals)
        if beaten == len(rivals):
            title = title_of(best)
            sentences.append(f"{column} is won by {title} ({value}): on this data it does not measure the explanation.")
        elif beaten * 2 >= len(rivals) and len(rivals) > 1:
            sentences.append(
                f"{title_of(best)} ({value}), which ignores the model, beats {beaten} of {len(rivals)} methods on "
                f"{column}: what they gain there needs care."
            )
    groups: dict[str, list[str]] = {}
    for name, other in results.same.items():
        groups.setdefault(other, []).append(name)
    sentences += [f"{', '.join(names)} gave the same maps as {other} on every image." for other, names in groups.items()]
    for name, count in results.degenerate.items():
        if count:
            sentences.append(f"{count} of {len(results)} maps of {name} are constant; they count as maps of zeros.")
    return sentences
