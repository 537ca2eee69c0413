"""Statistics: the table with its intervals and ranks, and how far columns agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import FoveateError, required
from foveate.evaluation.intervals import LEVEL, Paired, intervals, pseudo_values
from foveate.evaluation.results import MODEL, Key, Results
from foveate.registry import METHODS, METRICS, Metric, is_control

if TYPE_CHECKING:
    import pandas as pd

# The thesis' order first, then what it has not.
ORDER = ("AD", "AG", "AI", "I", "D", "OM", "LE", "F1", "BA", "SP", "EP", "SM", "mass_inside", "sparsity", "gini")
LAST = ("T", "forwards", "backwards", "memory")


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
class Judged:
    """What is known of each method and column of a table.

    Attributes:
        points: ``(value, low, high, images)``.
        paired: of each column the methods, and their values side by side; costs have none.
    """

    points: dict[Key, tuple[float, float, float, int]]
    paired: dict[str, tuple[list[str], Paired]]
    samples: int
    seed: int
    _better: dict[str, np.ndarray] = field(default_factory=dict)

    def difference(self, key: Key, other: Key) -> tuple[float, float, float]:
        """Of two methods in a column, paired by image, with its interval; NaN where there is none."""
        names, paired = self.paired.get(key[1], ([], None))
        if paired is None or key == other or key[0] not in names or other[0] not in names:
            return (float("nan"),) * 3
        mean, low, high = paired.difference(names.index(key[0]), names.index(other[0]))
        return mean, *((low, high) if np.isfinite([low, high]).all() else (float("nan"),) * 2)

    def better(self, column: str) -> np.ndarray:
        """Which methods of a column are better than which, ``[m,m]`` bool, corrected for all pairs: see :class:`Paired`."""
        if column not in self._better:
            names, paired = self.paired[column]
            means = np.array([[paired.mean(i, j) for j in range(len(names))] for i in range(len(names))])
            self._better[column] = (paired.adjusted() <= LEVEL) & (sign_of(column) * means > 0)
        return self._better[column]

    def rank(self, key: Key) -> tuple[int, int]:
        """The first and the last place that a method can have; (0, 0) for what has none."""
        names = self.paired.get(key[1], ([], None))[0]
        if key[0] not in names:
            return 0, 0
        better, i = self.better(key[1]), names.index(key[0])
        return 1 + int(better[:, i].sum()), len(names) - int(better[i].sum())


def range_of(column: str) -> tuple[float, float] | None:
    """The least and the largest value that a column can have; None where it has no bounds."""
    record = metric_of(column)
    return None if record is None else record.columns[column].range


def sign_of(column: str) -> int:
    """1 where more is better, -1 where less is."""
    record = metric_of(column)
    return -1 if record is not None and record.columns[column].better == "down" else 1


def judged(results: Results, samples: int = 2000, seed: int = 0) -> Judged:
    """The values of every column with their intervals, and the methods side by side; done once for the same results."""
    known = results.judged
    if isinstance(known, Judged) and (known.samples, known.seed) == (samples, seed):
        return known
    points: dict[Key, tuple[float, float, float, int]] = {}
    values: dict[Key, np.ndarray] = {}
    within: dict[Key, tuple[float, float] | None] = {}
    for key, record, array, pool in _columns(results):
        if record.statistic == "median":
            finite = array[np.isfinite(array)]
            ends = (np.median(finite), finite.min(), finite.max()) if len(finite) else (np.nan,) * 3
            points[key] = (float(ends[0]), float(ends[1]), float(ends[2]), len(finite))
            continue
        values[key] = array if pool is None else pseudo_values(array, pool)
        points[key] = (np.nan, np.nan, np.nan, 0)  # in the order of the results
        within[key] = record.columns[key[1]].range
    if values and len(results):
        low, high = intervals(np.stack(list(values.values()), 1), list(within.values()), samples, seed)
        for i, (key, array) in enumerate(values.items()):
            finite = array[np.isfinite(array)]
            if len(finite):
                points[key] = (float(finite.mean()), float(low[i]), float(high[i]), len(finite))
    beside: dict[str, list[str]] = {}
    for method, column in values:
        if method != MODEL and points[method, column][3]:
            beside.setdefault(column, []).append(method)
    paired = {c: (names, Paired(np.stack([values[n, c] for n in names], 1), seed)) for c, names in beside.items()}
    results.judged = Judged(points, paired, samples, seed)
    return results.judged  # type: ignore[no-any-return]


def table(results: Results, baseline: str | None = None, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The table: index ``method, column``, one line each.

    Columns: ``mean``, ``low`` and ``high`` of its 95 % interval over images (:func:`foveate.evaluation.intervals.intervals`),
    ``n`` images that count; ``difference`` to the baseline with ``difference_low`` and ``difference_high``, paired by image
    (:class:`foveate.evaluation.intervals.Paired`; NaN for the baseline itself); ``rank`` and ``rank_last``: 1 and more, from
    the number of methods that are better by their paired differences to that of all that are not worse, corrected for all
    pairs of methods. What the whole data decides (BA) enters with the pseudo-values of the jackknife. Costs have the median
    over batches with the range, and no rank.

    Args:
        baseline: a method of the table; ``grad_cam`` where it is there and none is named, else the first that is no control.

    Raises:
        FoveateError: the baseline is not in the table.
    """
    required("evaluate", "pandas")
    import pandas as pd

    baseline = baseline_of(results.methods, baseline)
    found = judged(results, samples, seed)
    lines = []
    for (method, column), (mean, low, high, n) in found.points.items():
        difference = found.difference((method, column), (baseline, column))
        lines.append((method, column, mean, low, high, n, *difference, *found.rank((method, column))))
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


def disagreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation between columns over methods, each turned so that more is better: ``[columns,columns]``.

    1: both order the methods alike. Costs and columns of the model are left out, and so is one on which all methods agree.
    """
    required("evaluate", "pandas")
    import pandas as pd

    usable = {}
    for column in ordered(dict.fromkeys(frame.index.get_level_values("column"))):
        record = metric_of(column)
        if record is None or record.of_model or record.statistic == "median":
            continue
        means = frame.xs(column, level="column")["mean"]
        usable[column] = means if record.columns[column].better == "up" else -means
    wide = pd.DataFrame(usable).dropna(axis=1, thresh=3)
    wide = wide.loc[:, wide.nunique() > 1]
    return wide.corr("spearman", min_periods=3)


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
