"""How often intervals hold the truth, equal methods are called different, and controls win by chance: docs/intervals.md.

    python benchmarks/intervals.py [RUN] [--repeats 3000]

RUN is a finished run of ``foveate evaluate``: its columns become populations, from which samples are drawn with replacement.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

from foveate.evaluation import runs
from foveate.evaluation.findings import findings
from foveate.evaluation.intervals import Paired, intervals
from foveate.evaluation.results import Results
from foveate.evaluation.statistics import range_of, table

Bounds = tuple[np.ndarray, np.ndarray]
Sampler = Callable[[int, int], np.ndarray]
SIZES = (20, 50, 200)
BOOTSTRAPS = 999
rng = np.random.default_rng(0)


def weights(n: int) -> np.ndarray:
    """How often each image is drawn, ``[S,n]``."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), BOOTSTRAPS).astype(float)


def student(x: np.ndarray) -> Bounds:
    """``x [R,n]`` in [0, 1]."""
    half = stats.t.ppf(0.975, x.shape[1] - 1) * x.std(1, ddof=1) / x.shape[1] ** 0.5
    return x.mean(1) - half, x.mean(1) + half


def percentile(x: np.ndarray) -> Bounds:
    low, high = np.quantile(x @ weights(x.shape[1]).T / x.shape[1], [0.025, 0.975], axis=1)
    return low, high


def bca(x: np.ndarray) -> Bounds:
    """Efron, JASA 1987."""
    drawn = np.sort(x @ weights(x.shape[1]).T / x.shape[1], 1)
    away = x - x.mean(1, keepdims=True)
    below = (drawn < x.mean(1, keepdims=True)).mean(1) + 0.5 * (drawn == x.mean(1, keepdims=True)).mean(1)
    bias = stats.norm.ppf(np.clip(below, 1e-3, 1 - 1e-3))
    skew = (away**3).sum(1) / (6 * np.maximum((away**2).sum(1), 1e-30) ** 1.5)
    ends = []
    for z in stats.norm.ppf([0.025, 0.975]):
        place = stats.norm.cdf(bias + (bias + z) / (1 - skew * (bias + z))) * BOOTSTRAPS
        ends.append(drawn[np.arange(len(x)), np.clip(place.astype(int), 0, BOOTSTRAPS - 1)])
    return ends[0], ends[1]


def bootstrap_t(x: np.ndarray) -> Bounds:
    low, high = intervals(x.T, [None] * len(x), BOOTSTRAPS)
    return low, high


def empirical_likelihood(x: np.ndarray) -> Bounds:
    """Owen, Biometrika 1988: means whose ``-2 log R`` is below the quantile of chi-squared."""
    limit = stats.chi2.ppf(0.95, 1)

    def ratio(mean: float, row: np.ndarray) -> float:
        d = row - mean
        inner = lambda t: (d / (1 + t * d)).sum()  # noqa: E731
        t = optimize.brentq(inner, (-1 + 1e-9) / d.max(), (-1 + 1e-9) / d.min())
        return float(2 * np.log1p(t * d).sum() - limit)

    ends = np.repeat(x.mean(1)[:, None], 2, 1)
    for i, row in enumerate(x):
        for side, edge in enumerate((row.min(), row.max())):
            if np.ptp(row) > 0:
                ends[i, side] = optimize.brentq(ratio, edge + 1e-6 * (row.mean() - edge), row.mean(), args=(row,))
    return ends[:, 0], ends[:, 1]


def wilson(x: np.ndarray) -> Bounds:
    n, p, z = x.shape[1], x.mean(1), stats.norm.ppf(0.975)
    middle, half = p + z**2 / 2 / n, z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def clopper_pearson(x: np.ndarray) -> Bounds:
    n, hits = x.shape[1], x.sum(1)
    low = np.where(hits > 0, special.betaincinv(np.maximum(hits, 1e-12), n - hits + 1, 0.025), 0)
    return low, np.where(hits < n, special.betaincinv(hits + 1, np.maximum(n - hits, 1e-12), 0.975), 1)


def foveate(x: np.ndarray) -> Bounds:
    return intervals(x.T, [(0, 1)] * len(x), BOOTSTRAPS)


WAYS: dict[str, Callable[[np.ndarray], Bounds]] = {
    "percentile": percentile,
    "Student": student,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
    "empirical likelihood": empirical_likelihood,
    "Wilson": wilson,
    "Clopper-Pearson": clopper_pearson,
    "foveate": foveate,
}
DRAWN: dict[str, tuple[Sampler, float]] = {
    "90 % zeros, else Beta(2, 2)": (lambda r, n: (rng.random((r, n)) < 0.1) * rng.beta(2, 2, (r, n)), 0.05),
    "97 % zeros, else Beta(2, 2)": (lambda r, n: (rng.random((r, n)) < 0.03) * rng.beta(2, 2, (r, n)), 0.015),
    "70 % zeros, else Beta(2, 2)": (lambda r, n: (rng.random((r, n)) < 0.3) * rng.beta(2, 2, (r, n)), 0.15),
    "90 % zeros, else Beta(.5, .5)": (lambda r, n: (rng.random((r, n)) < 0.1) * rng.beta(0.5, 0.5, (r, n)), 0.05),
    "95 % ones": (lambda r, n: 1.0 * (rng.random((r, n)) < 0.95), 0.95),
    "Beta(.05, 1)": (lambda r, n: rng.beta(0.05, 1, (r, n)), 0.05 / 1.05),
    "Beta(.3, 3)": (lambda r, n: rng.beta(0.3, 3, (r, n)), 0.3 / 3.3),
    "Beta(5, 1.5)": (lambda r, n: rng.beta(5, 1.5, (r, n)), 5 / 6.5),
}


def resample(share: np.ndarray, repeats: int, n: int) -> np.ndarray:
    """Samples of a run's images."""
    return np.asarray(rng.choice(share, (repeats, n)))


def of_run(folder: Path) -> dict[str, tuple[Sampler, float]]:
    """The columns of a run in [0, 1] as populations."""
    found: dict[str, tuple[Sampler, float]] = {}
    for (method, column), values in runs.load(folder).values.items():
        limits = range_of(column)
        if values.ndim == 1 and limits is not None:
            share = (values[np.isfinite(values)] - limits[0]) / (limits[1] - limits[0])
            found[f"{column} of {method}"] = partial(resample, share), float(share.mean())
    return found


def coverage(populations: dict[str, tuple[Sampler, float]], repeats: int) -> None:
    """How many of 100 intervals hold the mean, and their mean width in percent of the range."""
    print("| values | images | " + " | ".join(WAYS) + " |\n|---|---:|" + "---:|" * len(WAYS))
    for name, (sampler, truth) in populations.items():
        for n in SIZES:
            cells = []
            for way, of in WAYS.items():
                x = sampler(repeats if way != "empirical likelihood" else min(repeats, 300), n)
                low, high = of(x)
                low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
                held = 100 * ((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean()
                cells.append(f"{held:.1f} / {100 * (high - low).mean():.1f}")
            print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)


def equal_methods(repeats: int) -> None:
    """How many of 100 pairs of methods of one distribution are called different."""
    print("\n| values | images | percentile bootstrap of the difference | signs flipped |\n|---|---:|---:|---:|")
    for name in ("90 % zeros, else Beta(2, 2)", "Beta(.3, 3)", "Beta(5, 1.5)"):
        for n in SIZES:
            pairs = np.stack([DRAWN[name][0](repeats, n) for _ in range(2)], 2)
            low, high = percentile(pairs[:, :, 0] - pairs[:, :, 1])
            flipped = np.mean([Paired(pair).p(0, 1) <= 0.05 for pair in pairs])
            print(f"| {name} | {n} | {100 * ((low > 0) | (high < 0)).mean():.1f} | {100 * flipped:.1f} |", flush=True)


def families(repeats: int) -> None:
    """Of 100 columns of eight methods of one distribution, those in which any is called better than another."""
    print("\n| values | images | any of eight called better |\n|---|---:|---:|")
    for name in ("90 % zeros, else Beta(2, 2)", "Beta(5, 1.5)"):
        for n in SIZES:
            columns = DRAWN[name][0](8 * repeats, n).reshape(repeats, 8, n)
            share = np.mean([(Paired(column.T).adjusted() <= 0.05).any() for column in columns])
            print(f"| {name} | {n} | {100 * share:.1f} |", flush=True)


def controls(repeats: int) -> None:
    """How often one method and three controls, all of one distribution, end with "won by a control"; 2.5 is asked."""
    names = ("grad_cam", "random", "centre", "fake_cam")
    print("\n| values | images | the best control's own interval | the best control under each pattern |\n|---|---:|---:|---:|")
    for name in ("Beta(5, 1.5)", "90 % zeros, else Beta(2, 2)"):
        for n in SIZES:
            before = now = 0
            for _ in range(repeats):
                values = 100 * DRAWN[name][0](4, n)
                best = values[1:][values[1:].mean(1).argmax()]
                before += float(percentile((best - values[0])[None])[0][0]) > 0
                columns = {(method, "AG"): row for method, row in zip(names, values, strict=True)}
                results = Results([str(i) for i in range(n)], columns, *(np.zeros(n, int),) * 2, np.ones(n))
                now += any("is won by" in sentence for sentence in findings(table(results), results))
            print(f"| {name} | {n} | {100 * before / repeats:.1f} | {100 * now / repeats:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=3000)
    call = parser.parse_args()
    coverage(DRAWN if call.run is None else of_run(call.run), call.repeats)
    if call.run is None:
        equal_methods(call.repeats)
        families(call.repeats)
        controls(call.repeats)


if __name__ == "__main__":
    main()
