"""Intervals, paired tests and corrections: against loops, against exact counts, and how often they hold the truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from foveate.evaluation.findings import findings
from foveate.evaluation.intervals import Paired, holm, interval, intervals, pseudo_values
from foveate.evaluation.results import Results
from foveate.evaluation.statistics import table

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever ran before."""
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


class TestMean:
    @pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 20), (19, 20), (20, 20), (7, 50), (120, 200)])
    def test_a_share_has_the_bounds_of_clopper_and_pearson(self, hits: int, n: int) -> None:
        exact = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
        found = interval(np.repeat([100.0, 0.0], [hits, n - hits]), (0, 100))
        assert found == pytest.approx((100 * exact.low, 100 * exact.high), abs=1e-9)

    def test_all_equal_is_no_certainty(self) -> None:
        low, high = interval(np.zeros(32), (0, 100))
        assert low == 0
        assert high == pytest.approx(100 * (1 - 0.025 ** (1 / 32)))

    def test_bootstrap_t_against_a_loop(self) -> None:
        values = rng.gamma(2.0, size=40)
        t = []
        draws = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 2000)
        for row in draws:
            drawn = np.repeat(values, row)
            t.append((drawn.mean() - values.mean()) / (drawn.std(ddof=1) / 40**0.5))
        upper, lower = np.quantile(t, [0.975, 0.025])
        error = values.std(ddof=1) / 40**0.5
        # the draws' own variance: a resample of n has n - 1 degrees of freedom, as the sample has
        assert interval(values) == pytest.approx((values.mean() - upper * error, values.mean() - lower * error), rel=1e-9)

    @pytest.mark.parametrize("values", [np.r_[np.zeros(29), 1], np.r_[np.full(30, 0.5), 0.9], np.r_[np.zeros(500), 3, 3]])
    def test_a_few_that_differ_give_no_wild_interval(self, values: np.ndarray) -> None:
        """Most resamples miss them, and then t is infinite."""
        exact = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        assert interval(values) == pytest.approx(exact)

    def test_the_order_of_images_does_not_matter(self) -> None:
        values = np.r_[np.repeat([0.0, 100.0], [900, 600]), 100 * rng.random(400)]
        shuffled = rng.permutation(values)
        assert interval(values, (0, 100)) == pytest.approx(interval(shuffled, (0, 100)), abs=0.3)

    def test_student_below_ten(self) -> None:
        values = np.array([1.0, 2.0, 3.0, 5.0])
        exact = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
        assert interval(values) == pytest.approx(exact)

    def test_what_is_not_known_is_passed_over(self) -> None:
        whole, holes = rng.random((30, 2)), np.full((60, 2), np.nan)
        holes[::2] = whole
        for a, b in zip(intervals(holes, [(0, 1), None]), intervals(whole, [(0, 1), None]), strict=True):
            assert a == pytest.approx(b, abs=0.03)  # other draws
        assert np.isnan(interval(np.array([np.nan, np.inf]))).all()
        assert np.isnan(interval(np.array([3.0]))).all()

    def test_columns_do_not_depend_on_each_other(self) -> None:
        values = rng.random((50, 3))
        together = intervals(values, [(0, 1), None, (0, 2)])
        for k, within in enumerate([(0, 1), None, (0, 2)]):
            assert interval(values[:, k], within) == pytest.approx((together[0][k], together[1][k]))

    def test_a_linear_change_moves_the_interval_with_it(self) -> None:
        values = rng.beta(0.3, 3, 60)
        low, high = interval(values, (0, 1))
        assert interval(5 - 3 * values, (2, 5)) == pytest.approx((5 - 3 * high, 5 - 3 * low))

    def test_the_mean_lies_inside(self) -> None:
        for n in (2, 5, 9, 10, 40):
            for values in (np.full(n, 0.3), rng.random(n), rng.integers(0, 2, n).astype(float)):
                low, high = interval(values, (0, 1))
                assert 0 <= low <= values.mean() <= high <= 1

    def test_95_of_100_hold_the_mean(self) -> None:
        """Without bounds, of 40 normal values: below 85 of 100 is one in 10^4."""
        covered = sum(low < 0 < high for low, high in (interval(rng.normal(size=40), samples=500) for _ in range(200)))
        assert 170 <= covered <= 200


class TestPaired:
    @pytest.mark.parametrize("n", [4, 7, 10])
    def test_every_pattern_of_signs(self, n: int) -> None:
        values = np.round(rng.normal(size=(n, 2)), 1)
        d = values[:, 0] - values[:, 1]
        sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=n)]
        assert Paired(values).p(0, 1) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))

    def test_few_differences_prove_nothing(self) -> None:
        values = np.zeros((50, 2))
        values[:5, 0] = rng.random(5) + 1
        paired = Paired(values)
        assert paired.p(0, 1) == pytest.approx(2**-4, abs=0.01)
        assert paired.difference(0, 1)[1] == 0
        values[:7, 0] = 1
        assert Paired(values).difference(0, 1)[1] > 0

    def test_the_interval_is_what_the_test_does_not_reject(self) -> None:
        for n in (8, 11, 40):
            values = rng.exponential(size=(n, 2))
            paired = Paired(values)
            _, low, high = paired.difference(0, 1)
            for shift in (low, high):
                inside, outside = (shift + step * (high - low) * (1 if shift == low else -1) for step in (0.01, -0.01))
                p = [Paired(values - np.array([by, 0])).p(0, 1) for by in (inside, outside)]
                assert p[0] > 0.05 >= p[1]

    def test_zero_is_outside_just_where_p_is_small(self) -> None:
        for _ in range(200):
            n = int(rng.integers(4, 40))
            d = np.round(rng.normal(0.4, 1, n) * (rng.random(n) < rng.choice([0.2, 0.5, 1])), 1)
            paired = Paired(np.stack([d, np.zeros(n)], 1))
            _, low, high = paired.difference(0, 1)
            assert (paired.p(0, 1) <= 0.05) == (low > 0 or high < 0)

    def test_fewer_than_six_images_have_no_interval(self) -> None:
        assert np.isinf(Paired(rng.random((5, 2))).difference(0, 1)[1:]).all()
        assert np.isfinite(Paired(rng.random((6, 2))).difference(0, 1)).all()

    def test_images_that_one_of_them_lacks(self) -> None:
        values = rng.random((30, 3))
        values[:4, 1] = np.nan
        paired, both = Paired(values), Paired(values[4:])
        assert paired.p(0, 1) == both.p(0, 1)
        assert paired.difference(1, 0) == pytest.approx(both.difference(1, 0))
        assert paired.p(0, 2) == Paired(values[:, [0, 2]]).p(0, 1)
        values[:, 2] = np.nan
        assert Paired(values).p(0, 2) == 1
        assert np.isnan(Paired(values).difference(0, 2)).all()

    def test_the_best_of_several_is_taken_in_each_pattern(self) -> None:
        values = rng.normal(size=(9, 4))
        d = values[:, 1:] - values[:, :1]
        best = lambda x: (x.sum(0) / np.sqrt((x**2).sum(0))).max()  # noqa: E731
        signs = [np.array(s)[:, None] for s in itertools.product((-1, 1), repeat=9)]
        expected = np.mean([best(s * d) >= best(d) - 1e-9 for s in signs])
        assert Paired(values).beaten_by_any(0, [1, 2, 3]) == pytest.approx(expected)

    def test_corrected_for_all_pairs(self) -> None:
        paired = Paired(rng.normal(size=(20, 4)) + np.array([0, 0.3, 0.6, 2]))
        pairs = list(itertools.combinations(range(4), 2))
        expected = dict(zip(pairs, holm(np.array([paired.p(i, j) for i, j in pairs])), strict=True))
        found = paired.adjusted()
        for i, j in pairs:
            assert found[i, j] == found[j, i] == expected[i, j]

    def test_a_bound_where_no_count_can_show_it(self) -> None:
        """Ten thousand patterns end at .0001; the bound is above what all of them give."""
        values = np.stack([rng.normal(1, 1, 18), np.zeros(18)], 1)
        d = values[:, 0]
        places = np.arange(2**18)
        exact = sum(
            (np.abs((1.0 - 2 * ((block[:, None] >> np.arange(18)) & 1)) @ d) >= abs(d.sum()) - 1e-9).sum()
            for block in np.array_split(places, 16)
        ) / len(places)
        wide = Paired(np.stack([100 + rng.normal(size=400), np.zeros(400)], 1))
        assert wide.p(0, 1) < 1e-50
        assert exact <= 2 * np.exp(-(d.sum() ** 2) / (2 * (d**2).sum()))
        assert Paired(values).p(0, 1) == pytest.approx(exact, abs=0.003)

    def test_holm_by_hand(self) -> None:
        assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
        assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]


def test_pseudo_values_against_leaving_one_out() -> None:
    curves = rng.integers(0, 2, (25, 6)) * 100.0
    curves[3] = np.nan
    known = np.delete(curves, 3, 0)
    whole = known.mean(0).max()
    parts = np.array([24 * whole - 23 * np.delete(known, i, 0).mean(0).max() for i in range(24)])
    found = pseudo_values(curves, lambda means: means.max(-1))
    assert np.isnan(found[3])
    assert np.delete(found, 3) == pytest.approx(parts - parts.mean() + whole)
    assert np.nanmean(found) == pytest.approx(whole)


def zeros(share: float) -> Callable[[int, int], np.ndarray]:
    """Average Drop as good methods have it: mostly 0."""
    return lambda repeats, n: 100 * (rng.random((repeats, n)) >= share) * rng.beta(2, 2, (repeats, n))


POPULATIONS: dict[str, tuple[Callable[[int, int], np.ndarray], float]] = {
    "90 % zeros": (zeros(0.9), 5.0),
    "97 % zeros": (zeros(0.97), 1.5),
    "70 % zeros": (zeros(0.7), 15.0),
    "95 % hundreds": (lambda repeats, n: 100.0 * (rng.random((repeats, n)) < 0.95), 95.0),
    "skewed": (lambda repeats, n: 100 * rng.beta(0.3, 3, (repeats, n)), 100 * 0.3 / 3.3),
    "even": (lambda repeats, n: 100 * rng.beta(5, 1.5, (repeats, n)), 100 * 5 / 6.5),
}


def held(values: np.ndarray, truth: float) -> float:
    low, high = intervals(values.T, [(0, 100)] * len(values), 999)
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("name", POPULATIONS)
def test_small_samples_are_held(name: str) -> None:
    """Of 400 samples of 20 at least 92 %: what holds 95 % does so in 99.6 of 100 runs, and the plain bootstrap's 62 % never."""
    draw, truth = POPULATIONS[name]
    assert held(draw(400, 20), truth) >= 0.92


def called(count: int, draw: Callable[[int], np.ndarray], names: tuple[str, ...]) -> Results:
    values = {(name, "AD"): draw(count) for name in names}
    return Results([str(i) for i in range(count)], values, *(np.zeros(count, int),) * 2, np.ones(count))


@pytest.mark.slow
class TestOfThree:
    """Three thousand samples each, as docs/intervals.md prints them."""

    @pytest.mark.parametrize("n", [20, 50, 200])
    @pytest.mark.parametrize("name", POPULATIONS)
    def test_95_in_100_are_held(self, name: str, n: int) -> None:
        draw, truth = POPULATIONS[name]
        assert held(draw(3000, n), truth) >= 0.94

    @pytest.mark.parametrize("n", [20, 50, 200])
    @pytest.mark.parametrize("share", [0.0, 0.9])
    def test_equal_methods_are_rarely_called_different(self, n: int, share: float) -> None:
        draw = zeros(share)
        values = np.stack([draw(3000, n), draw(3000, n)], 2)
        assert np.mean([Paired(pair).p(0, 1) <= 0.05 for pair in values]) <= 0.06

    @pytest.mark.parametrize("share", [0.0, 0.9])
    def test_a_column_of_equal_methods_rarely_has_a_better_one(self, share: float) -> None:
        columns = zeros(share)(8 * 500, 50).reshape(500, 8, 50)
        assert np.mean([(Paired(column.T).adjusted() <= 0.05).any() for column in columns]) <= 0.08

    @pytest.mark.parametrize("n", [20, 50, 200])
    def test_controls_that_are_methods_rarely_win(self, n: int) -> None:
        won = 0
        for _ in range(3000):
            results = called(n, lambda count: 100 * rng.beta(2, 2, count), ("grad_cam", "random", "centre", "fake_cam"))
            won += any("does not measure the explanation" in sentence for sentence in findings(table(results), results))
        assert won / 3000 <= 0.033
