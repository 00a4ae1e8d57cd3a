"""Aggregates against closed forms and brute force; intervals by their coverage on simulated data."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import trim_mean

from compressed_ad.evaluation import intervals

FINITE = st.floats(-100, 100, allow_nan=False, width=32)


def test_iqm_of_known_samples() -> None:
    assert intervals.iqm([7.0]) == 7.0
    assert intervals.iqm([1.0, 3.0]) == 2.0
    assert intervals.iqm([0.0, 0.0, 10.0]) == pytest.approx((0.25 * 0 + 0 + 0.25 * 10) / 1.5)
    assert intervals.iqm([100.0, 1.0, 3.0, -50.0]) == 2.0
    assert intervals.iqm([[4.0, np.nan, 6.0], [np.nan, np.nan, np.nan]])[0] == 5.0
    assert np.isnan(intervals.iqm([[4.0, np.nan, 6.0], [np.nan, np.nan, np.nan]])[1])


@given(arrays(np.float64, st.sampled_from([4, 8, 12, 40]), elements=FINITE))
def test_iqm_is_the_trimmed_mean_where_a_quarter_is_whole(values: np.ndarray) -> None:
    assert intervals.iqm(values) == pytest.approx(trim_mean(values, 0.25), abs=1e-9)


@given(arrays(np.float64, array_shapes(min_dims=1, max_dims=3, max_side=7), elements=FINITE), FINITE)
def test_iqm_moves_with_the_data_and_stays_inside(values: np.ndarray, shift: float) -> None:
    result = intervals.iqm(values)
    assert np.allclose(intervals.iqm(values + shift), result + shift, atol=1e-6)
    assert np.allclose(intervals.iqm(-values), -result, atol=1e-9)
    assert (values.min(axis=-1) - 1e-9 <= result).all() and (result <= values.max(axis=-1) + 1e-9).all()
    padded = np.concatenate([values, np.full((*values.shape[:-1], 2), np.nan)], axis=-1)
    assert np.allclose(intervals.iqm(padded), result)


def test_normalise_is_per_task() -> None:
    scores = intervals.normalise([[[1.0], [3.0]], [[10.0], [0.0]]], random=[1.0, 0.0], optimal=[3.0, 10.0])
    assert scores.tolist() == [[[0.0], [1.0]], [[1.0], [0.0]]]
    assert np.isnan(intervals.normalise([[1.0], [1.0]], random=[0.0, 2.0], optimal=[np.nan, 2.0])).all()
    with pytest.raises(ValueError, match="each of 2 tasks"):
        intervals.normalise(np.zeros((2, 3)), random=[0.0], optimal=[1.0, 1.0])


def test_mean_leaves_nan_out() -> None:
    assert intervals.mean([1.0, np.nan, 3.0]) == 2.0
    assert np.isnan(intervals.mean([np.nan]))


@pytest.mark.parametrize(("episodes", "last"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (50, 5)])
def test_final_return_is_the_last_tenth(episodes: int, last: int) -> None:
    curve = np.arange(episodes, dtype=np.float64)
    assert intervals.final_return(curve) == curve[-last:].mean()
    assert intervals.area_under_curve(curve) == curve.mean()


def test_found_and_success_given_found() -> None:
    returns = np.zeros((1, 4, 20))
    returns[0, 0, 3:] = 5.0  # found in episode 4 and kept
    returns[0, 1, 10] = 5.0  # found in episode 11 and lost again
    returns[0, 2, 18:] = 5.0  # found only in the last tenth: no time to exploit
    assert intervals.found_by(returns, 3).tolist() == [0.0]
    assert intervals.found_by(returns, 4).tolist() == [0.25]
    assert intervals.found_by(returns, 11).tolist() == [0.5]
    assert intervals.found_by(returns).tolist() == [0.75]
    assert intervals.success_given_found(returns, returns / 10).tolist() == [0.25]
    assert np.isnan(intervals.success_given_found(np.zeros((1, 4, 20)), returns)).all()
    assert np.isnan(intervals.success_given_found(np.ones((2, 1)), np.ones((2, 1))))


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=FINITE), FINITE)
def test_episodes_to_is_the_first_one_at_the_level(curves: np.ndarray, level: float) -> None:
    for curve, got in zip(curves, intervals.episodes_to(curves, level), strict=True):
        wanted = next((e for e, value in enumerate(curve, start=1) if value >= level), None)
        assert np.isnan(got) if wanted is None else got == wanted


def test_steps_to_reach_names_the_recorded_step() -> None:
    assert intervals.steps_to_reach([100, 200, 300], [0.1, 0.5, 0.4], 0.4) == 200
    assert np.isnan(intervals.steps_to_reach([100, 200], [0.1, np.nan], 0.4))
    assert np.isnan(intervals.steps_to_reach([], [], 0.4))


def plain_percentiles(scores: np.ndarray, n: int, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    runs = generator.integers(scores.shape[0], size=(n, scores.shape[0]))
    tasks = generator.integers(scores.shape[1], size=(n, scores.shape[1]))
    means = scores[runs[:, :, None], tasks[:, None, :]].mean(axis=(1, 2))
    return tuple(np.quantile(means, [0.025, 0.975]))


EFFECTS = {
    "runs differ": (1.0, 0.1, 0.1),
    "tasks differ": (0.1, 1.0, 0.1),
    "runs and tasks differ": (0.5, 1.0, 0.5),
    "only the interaction": (0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("effects", EFFECTS.values(), ids=EFFECTS.keys())
@pytest.mark.parametrize(("n_run", "n_task"), [(3, 8), (5, 16)])
@pytest.mark.parametrize("statistic", [intervals.iqm, intervals.mean], ids=["iqm", "mean"])
def test_interval_covers_the_truth(effects, n_run: int, n_task: int, statistic) -> None:
    """Nominal 95 %. With 300 data sets the observed share has a standard error of .0126.

    A true coverage of .92 (allowed: 3 runs carry little information on the spread of runs) falls below
    .885 once in 380 tests. From above: the intervals are cautious where only the interaction varies.
    """
    generator = np.random.default_rng(7)
    by_run, by_task, by_both = effects
    covered = 0
    for i in range(300):
        scores = by_run * generator.normal(size=(n_run, 1)) + by_task * generator.normal(size=(1, n_task))
        scores = 0.6 + scores + by_both * generator.normal(size=(n_run, n_task))
        interval = intervals.hierarchical_bootstrap(scores, statistic, n=300, seed=i)
        covered += interval.low <= 0.6 <= interval.high
    assert covered / 300 >= 0.885


def test_plain_percentiles_would_not_cover() -> None:
    """Why the interval is scaled: three runs that differ, percentiles as they come."""
    generator = np.random.default_rng(7)
    plain = scaled = 0
    for i in range(300):
        scores = generator.normal(size=(3, 1)) + 0.1 * generator.normal(size=(3, 8))
        low, high = plain_percentiles(scores, 300, i)
        plain += low <= 0 <= high
        interval = intervals.hierarchical_bootstrap(scores, intervals.mean, n=300, seed=i)
        scaled += interval.low <= 0 <= interval.high
    assert plain / 300 < 0.8 < 0.885 <= scaled / 300


def test_skewed_bounded_scores_are_covered() -> None:
    """Shares of solved rollouts: most tasks near 1, some never solved; the mean is .75 by construction."""
    generator = np.random.default_rng(3)
    covered = 0
    for i in range(300):
        solved = np.where(generator.random((1, 16)) < 0.2, 0.15, 0.9) + generator.normal(0, 0.05, (5, 1))
        scores = generator.binomial(20, np.clip(solved, 0, 1), size=(5, 16)) / 20
        interval = intervals.hierarchical_bootstrap(scores, intervals.mean, n=300, seed=i, limits=(0.0, 1.0))
        covered += interval.low <= 0.75 <= interval.high
    assert covered / 300 >= 0.885


def test_false_verdicts_are_rare() -> None:
    """Two equal methods: "better" or "worse" is said at most as often as 5 % allows (99.9 % bound: .09)."""
    generator = np.random.default_rng(11)
    wrong = 0
    for i in range(300):
        task = generator.uniform(0, 1, (1, 8, 1))
        a, b = (
            task + 0.1 * generator.normal(size=(3, 1, 1)) + 0.1 * generator.normal(size=(3, 8, 1))
            for _ in "ab"
        )
        wrong += intervals.paired_difference(a[..., 0], b[..., 0], n=300, seed=i).excludes_zero()
    assert wrong / 300 <= 0.09


@settings(max_examples=30)
@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE))
def test_interval_is_ordered_and_reproducible(scores: np.ndarray) -> None:
    interval = intervals.hierarchical_bootstrap(scores, n=50, seed=1)
    assert interval == intervals.hierarchical_bootstrap(scores, n=50, seed=1) or scores.size == 1
    assert interval.iqm == pytest.approx(intervals.iqm(scores.ravel()))
    if scores.size > 1:
        assert interval.low <= interval.iqm <= interval.high
    else:
        assert np.isnan(interval.low) and np.isnan(interval.high) and not interval.excludes_zero()


def test_degenerate_scores() -> None:
    assert intervals.hierarchical_bootstrap(np.full((3, 4), 0.5)) == intervals.Interval(0.5, 0.5, 0.5)
    assert np.isnan(intervals.hierarchical_bootstrap(np.full((3, 4), np.nan)).iqm)
    one_run = intervals.hierarchical_bootstrap(np.arange(8.0)[None])
    assert one_run.low < 3.5 < one_run.high
    rarely_moved = np.array([[0.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert intervals.hierarchical_bootstrap(rarely_moved).low < 1.0
    holes = np.where(np.eye(4, dtype=bool), np.nan, 0.5)
    assert intervals.hierarchical_bootstrap(holes).iqm == 0.5
    limited = intervals.hierarchical_bootstrap([[0.8], [0.9], [1.0]], limits=(0.0, 1.0))
    assert limited.high == 1.0
    with pytest.raises(ValueError, match="runs, tasks"):
        intervals.hierarchical_bootstrap(np.zeros(3))


def test_paired_difference_cancels_what_is_shared() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(4, 10)) + generator.normal(size=(4, 1)) * 5
    interval = intervals.paired_difference(a, a + 0.1)
    assert interval.iqm == pytest.approx(0.1)
    assert interval.high - interval.low < 1e-9
    with pytest.raises(ValueError, match="one shape"):
        intervals.paired_difference(a, a[:3])


def test_probability_of_improvement_counts_all_pairs() -> None:
    a, b = np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[1.0, 1.0], [3.0, 1.0]])
    assert intervals.probability_of_improvement(a, b).iqm == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert intervals.probability_of_improvement(b, a).iqm == pytest.approx(1 - (3 / 4 + 1 / 2) / 2)


def test_performance_profile_is_the_share_above() -> None:
    scores = np.array([[0.1, 0.5, np.nan], [0.9, 0.5, np.nan]])
    share, low, high = intervals.performance_profile(scores, [0.0, 0.3, 0.5, 1.0])
    assert share.tolist() == [1.0, 0.75, 0.25, 0.0]
    assert (low <= share).all() and (share <= high).all()


def test_bootstrap_curve_is_pointwise() -> None:
    curves = np.random.default_rng(0).normal(size=(3, 5, 4))
    band = intervals.bootstrap_curve(curves, n=100)
    point = intervals.hierarchical_bootstrap(curves[..., 2], n=100)
    assert band.shape == (3, 4)
    assert band[:, 2].tolist() == [point.iqm, point.low, point.high]


def curves(level: float, n_run: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return level + 0.02 * generator.normal(size=(n_run, 8, 20))


@pytest.mark.parametrize(
    ("level", "n_run", "outcome", "words"),
    [
        (0.8, 4, "better", "B is better than A"),
        (0.4, 4, "worse", "A is better than B"),
        (0.6, 4, "no difference found", "No difference found between B and A"),
        (0.8, 2, "too few runs", "Too few runs to compare B with A"),
        (0.8, 1, "too few runs", "1 run each"),
    ],
)
def test_verdict(level: float, n_run: int, outcome: str, words: str) -> None:
    result = intervals.compare(curves(0.6, n_run), curves(level, n_run, seed=1), names=("A", "B"))
    assert result.outcome == outcome
    assert words in result.verdict
    assert (result.n_run, result.n_task) == (n_run, 8)
    assert ("better" in result.verdict) == (outcome in ("better", "worse"))


def test_two_thousand_resamples_take_well_under_a_second() -> None:
    scores = np.random.default_rng(0).normal(size=(10, 20))
    start = time.process_time()
    intervals.hierarchical_bootstrap(scores, n=2000)
    assert time.process_time() - start < 1.0
