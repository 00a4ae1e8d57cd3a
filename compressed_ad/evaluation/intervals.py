"""Statistics of runs x tasks x episodes: aggregates, intervals and comparisons.

Scores are arrays (R, N) of R runs (training seeds) and N tasks; NaN stands for "not defined here" and is
left out. Aggregates follow Agarwal et al. 2021, "Deep reinforcement learning at the edge of the
statistical precipice" (interquartile mean, probability of improvement, performance profiles).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from compressed_ad.seeding import rng

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[..., Any]
"""Called as ``statistic(values (n, k), axis=-1) -> (n,)``; ``iqm`` or ``mean``."""

CONFIDENCE = 0.95
MIN_RUNS = 3
"""Fewer runs than this never support the word "better"."""


@dataclass(frozen=True)
class Interval:
    """An aggregate and its 95 % interval; ``low`` and ``high`` are NaN where nothing was resampled."""

    iqm: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0; False where the interval is undefined."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Method ``b`` against method ``a``: paired differences b - a, and what may be said about them."""

    a: str
    b: str
    n_run: int
    n_task: int
    final: Interval  # IQM of the differences of the final return
    auc: Interval  # IQM of the differences of the area under the curve
    final_mean: Interval  # mean of the differences of the final return; its field ``iqm`` holds the mean
    probability_of_improvement: Interval
    outcome: str  # "better", "worse", "no difference found" or "too few runs"
    verdict: str  # the outcome in plain words, with the figures it rests on


def mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean along ``axis``; NaN are ignored, all NaN gives NaN."""
    array = np.asarray(values, dtype=np.float64)
    missing = np.isnan(array)
    return _divide(np.where(missing, 0.0, array).sum(axis=axis), (~missing).sum(axis=axis))[()]


def normalise(returns: ArrayLike, random: ArrayLike, optimal: ArrayLike) -> Floats:
    """(return - random) / (optimal - random) for returns (N, ...), per task; NaN where optimal is unknown.

    0 is the uniformly random policy and 1 the optimal one. A task whose optimum does not exceed the
    random return has no scale: its scores are NaN.
    """
    values = np.asarray(returns, dtype=np.float64)
    low, high = np.asarray(random, dtype=np.float64), np.asarray(optimal, dtype=np.float64)
    if low.shape != values.shape[:1] or high.shape != values.shape[:1]:
        raise ValueError(f"expected one random and optimal return for each of {values.shape[0]} tasks")
    span = np.where(high > low, high - low, np.nan)
    shape = (-1,) + (1,) * (values.ndim - 1)
    return (values - low.reshape(shape)) / span.reshape(shape)


def iqm(values: ArrayLike, axis: int = -1) -> Any:
    """Interquartile mean along ``axis``: the mean of the middle half, values at its edges by their share.

    Of n values the lowest and highest n/4 are cut; a value that the cut goes through counts with the part
    that remains, so that the result changes smoothly with n. NaN are ignored; all NaN gives NaN.
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1), axis=-1)
    missing = np.isnan(ordered)
    count = (~missing).sum(axis=-1, keepdims=True)
    place = np.arange(ordered.shape[-1])
    weight = np.clip(np.minimum(place + 1, 0.75 * count) - np.maximum(place, 0.25 * count), 0.0, None)
    total = np.where(missing, 0.0, ordered * weight).sum(axis=-1)
    return _divide(total, weight.sum(axis=-1))[()]


def final_episodes(n_episode: int) -> int:
    """How many episodes are "the last 10 %": the tenth part rounded down, at least one."""
    return max(1, n_episode // 10)


def final_return(curves: ArrayLike) -> Floats:
    """Mean over the last 10 % of the episodes of curves (..., E) -> (...)."""
    values = np.asarray(curves, dtype=np.float64)
    return np.asarray(values[..., -final_episodes(values.shape[-1]) :].mean(axis=-1))


def area_under_curve(curves: ArrayLike) -> Floats:
    """Mean over all episodes of curves (..., E) -> (...)."""
    return np.asarray(np.asarray(curves, dtype=np.float64).mean(axis=-1))


def in_blocks(curves: ArrayLike, most: int = 100) -> tuple[Floats, Floats]:
    """Curves (..., E) as means (..., K) of equally many consecutive episodes, K <= ``most`` (the last may be
    of fewer), and the middle (K,) of each block's episode numbers. Up to ``most`` episodes stay as they are.
    """
    values = np.asarray(curves, dtype=np.float64)
    n_episode = values.shape[-1]
    starts = np.arange(0, n_episode, -(-n_episode // most))
    sizes = np.diff(np.append(starts, n_episode))
    return np.add.reduceat(values, starts, axis=-1) / sizes, starts + (sizes + 1) / 2


def found_by(returns: ArrayLike, k: int | None = None) -> Floats:
    """Share of rollouts (..., M, E) with a return > 0 in one of their first k episodes (all if None)."""
    values = np.asarray(returns)[..., :k]
    return np.asarray((values > 0).any(axis=-1).mean(axis=-1))


def success_given_found(returns: ArrayLike, normalised: ArrayLike) -> Floats:
    """Final normalised return of the rollouts that knew the reward in time: (..., M, E) -> (...).

    A rollout knew it in time if an episode *before* the last 10 % had a return > 0: what it does in the
    last 10 % is then exploitation, and 1 minus this number is what exploitation loses. NaN where no
    rollout of the task qualifies.

    Args:
        returns: undiscounted returns (..., M, E) that tell whether the reward was met.
        normalised: the same returns, normalised.
    """
    values = np.asarray(returns)
    knew = (values[..., : -final_episodes(values.shape[-1])] > 0).any(axis=-1)
    return _divide(np.where(knew, final_return(normalised), 0.0).sum(axis=-1), knew.sum(axis=-1))


def episodes_to(curve: ArrayLike, level: float) -> Floats:
    """Number (from 1) of the first episode at which curves (..., E) reach ``level``; NaN if never."""
    return steps_to_reach(np.arange(1, np.shape(curve)[-1] + 1), curve, level)


def steps_to_reach(steps: ArrayLike, values: ArrayLike, level: float) -> Floats:
    """The first of ``steps`` (E,) at which ``values`` (..., E) are at least ``level``; NaN if never.

    For a quantity that should fall, such as cross-entropy, hand over its negative and the negative level.
    """
    reached = np.asarray(values, dtype=np.float64) >= level
    places = np.asarray(steps, dtype=np.float64)
    if places.size == 0:
        return np.full(reached.shape[:-1], np.nan)
    return np.where(reached.any(axis=-1), places[reached.argmax(axis=-1)], np.nan)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and values (K,) of the rows of a ``metrics.jsonl`` that have a finite number under ``key``."""
    points = [(row.get("step"), row.get(key)) for row in rows]
    known = [point for point in points if all(isinstance(x, int | float) and np.isfinite(x) for x in point)]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def hierarchical_bootstrap(
    scores: ArrayLike,
    statistic: Statistic = iqm,
    *,
    n: int = 2000,
    seed: int = 0,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """The statistic of all scores (R, N) and a 95 % interval that covers new runs *and* new tasks.

    What is random: the R training seeds, and the N held-out tasks, which are a draw from the family. All
    runs meet the *same* tasks, so runs and tasks are crossed, not nested. Resampling tasks inside each
    run would count a hard task as R independent hard tasks and give intervals far too narrow; so runs are
    resampled, then tasks, jointly for all runs (the "pigeonhole bootstrap": McCullagh 2000; Owen 2007,
    Annals of Applied Statistics 1(2)).

    Its percentiles err in two known ways, both put right by scaling their distance from the estimate:
    few runs (3 is usual) give intervals far too short, and the run-by-task interaction is counted three
    times instead of once. The scale is the unbiased variance of a two-way random layout, made of three
    bootstrap variances (runs only, tasks only, both), times Student's t over the normal quantile with
    Satterthwaite's degrees of freedom. The shape (skewness) stays that of the percentiles.

    With R = 1 the interval speaks of tasks only, with N = 1 of runs only; with both 1 it is NaN.

    Args:
        scores: (R, N); NaN are left out.
        statistic: reduces ``axis=-1``.
        n: number of resamples.
        seed: of the resampling; the same seed gives the same interval.
        limits: the range the true value can have; the interval is cut to it.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"scores: expected (runs, tasks), got shape {values.shape}")

    def resampled(runs: Indices, tasks: Indices) -> Floats:
        picked = values[runs[:, :, None], tasks[:, None, :]]
        return np.asarray(statistic(picked.reshape(len(runs), -1), axis=-1))

    return _crossed_interval(resampled, *values.shape, n=n, seed=seed, limits=limits)


def bootstrap_curve(curves: ArrayLike, statistic: Statistic = iqm, *, n: int = 500, seed: int = 0) -> Floats:
    """(3, E): aggregate, low and high of curves (R, N, E), pointwise by ``hierarchical_bootstrap``."""
    values = np.asarray(curves, dtype=np.float64)
    points = [
        hierarchical_bootstrap(values[..., e], statistic, n=n, seed=seed) for e in range(values.shape[-1])
    ]
    return np.array([[p.iqm, p.low, p.high] for p in points]).T.reshape(3, -1)


def paired_difference(
    a: ArrayLike, b: ArrayLike, statistic: Statistic = iqm, *, n: int = 2000, seed: int = 0
) -> Interval:
    """Aggregate of b - a over scores (R, N) of two methods that share seeds (rows) and tasks (columns).

    A run of one method and the run of the other with the same seed are resampled together, so what the
    seed, the data and the task do to both cancels.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores need one shape, got {first.shape} and {second.shape}")
    return hierarchical_bootstrap(second - first, statistic, n=n, seed=seed)


def probability_of_improvement(a: ArrayLike, b: ArrayLike, *, n: int = 2000, seed: int = 0) -> Interval:
    """How probable it is that a run of b beats a run of a on a random task (ties count half).

    Scores (R, N) of both methods; all R x R pairs of runs on each task (Agarwal et al. 2021, section 4.3).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores need one shape, got {first.shape} and {second.shape}")
    gap = second[:, None, :] - first[None, :, :]
    wins = np.where(np.isnan(gap), np.nan, (gap > 0) + 0.5 * (gap == 0))

    def resampled(runs: Indices, tasks: Indices) -> Floats:
        won = np.empty(len(runs))
        for i, (r, k) in enumerate(zip(runs, tasks, strict=True)):
            won[i] = mean(wins[np.ix_(r, r, k)].ravel())
        return won

    return _crossed_interval(resampled, *first.shape, n=min(n, 1000), seed=seed, limits=(0.0, 1.0))


def performance_profile(scores: ArrayLike, levels: ArrayLike, *, n: int = 500, seed: int = 0) -> Floats:
    """(3, K): share of the scores (R, N) above each of ``levels`` (K,), with its 95 % interval."""
    values, thresholds = np.asarray(scores, dtype=np.float64), np.asarray(levels, dtype=np.float64)
    above = np.where(np.isnan(values), np.nan, 1.0)[..., None] * (values[..., None] > thresholds)
    return np.clip(bootstrap_curve(above, mean, n=n, seed=seed), 0.0, 1.0)


def compare(
    a: ArrayLike, b: ArrayLike, *, names: tuple[str, str] = ("a", "b"), n: int = 2000, seed: int = 0
) -> Comparison:
    """Method b against method a by normalised in-context curves (R, N, E) that share seeds, tasks and data.

    The verdict rests on one measure fixed beforehand, the final return: "better" (or "worse") is said only
    if the interval of its paired difference excludes 0 and there are at least 3 runs of each.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 3 or first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"expected curves (runs, tasks, episodes) of equal runs and tasks, got {first.shape}, "
            f"{second.shape}"
        )
    n_run, n_task = first.shape[:2]
    ends = final_return(first), final_return(second)
    final = paired_difference(*ends, n=n, seed=seed)
    average = paired_difference(*ends, mean, n=n, seed=seed)
    facts = (
        f"Paired difference of the final normalised return: interquartile mean {final.iqm:+z.3f}"
        f"{_range(final)}, mean {average.iqm:+z.3f}{_range(average)}; "
        f"{n_run} run{'s' * (n_run != 1)} each, {n_task} held-out task{'s' * (n_task != 1)}."
    )
    if n_run < MIN_RUNS:
        outcome = "too few runs"
        said = f"Too few runs to compare {names[1]} with {names[0]}: {MIN_RUNS} of each are needed"
    elif final.excludes_zero():
        outcome = "better" if final.low > 0 else "worse"
        better, other = (names[1], names[0]) if final.low > 0 else names
        said = f"{better} is better than {other}"
    else:
        outcome = "no difference found"
        said = f"No difference found between {names[1]} and {names[0]}"
    return Comparison(
        a=names[0],
        b=names[1],
        n_run=n_run,
        n_task=n_task,
        final=final,
        auc=paired_difference(area_under_curve(first), area_under_curve(second), n=n, seed=seed),
        final_mean=average,
        probability_of_improvement=probability_of_improvement(*ends, n=n, seed=seed),
        outcome=outcome,
        verdict=f"{said}. {facts}",
    )


def _crossed_interval(
    resampled: Callable[[Indices, Indices], Floats],
    n_run: int,
    n_task: int,
    *,
    n: int,
    seed: int,
    limits: tuple[float, float],
) -> Interval:
    """The interval of ``hierarchical_bootstrap``; ``resampled`` maps indices (n, R), (n, N) to (n,)."""
    generator = rng(seed, "bootstrap")
    runs, tasks = generator.integers(n_run, size=(n, n_run)), generator.integers(n_task, size=(n, n_task))
    all_runs, all_tasks = np.arange(n_run)[None], np.arange(n_task)[None]
    estimate = float(resampled(all_runs, all_tasks)[0])
    if not np.isfinite(estimate) or n_run * n_task == 1:
        return Interval(estimate, np.nan, np.nan)

    both = resampled(runs, tasks)
    by_run = resampled(runs, np.repeat(all_tasks, n, axis=0)) if n_run > 1 else np.full(n, estimate)
    by_task = resampled(np.repeat(all_runs, n, axis=0), tasks) if n_task > 1 else np.full(n, estimate)
    total = float(np.nanvar(both))
    if total <= 0.0:
        return Interval(estimate, estimate, estimate)
    run, task = float(np.nanvar(by_run)) / total, float(np.nanvar(by_task)) / total

    # Unbiased parts of a two-way layout: run = A + E, task = B + E, interaction = E, wanted = A + B + E;
    # all as shares of the variance of the crossed resamples.
    df_run, df_task = n_run - 1, n_task - 1
    extra = max(0.0, 1.0 - run - task)
    run *= n_run / max(1, df_run)
    task *= n_task / max(1, df_task)
    extra = min(extra * n_run * n_task / max(1, df_run * df_task), run, task)
    wanted = run + task - extra
    spread = run**2 / max(1, df_run) + task**2 / max(1, df_task) + extra**2 / max(1, df_run * df_task)
    tail, scale = (1 - CONFIDENCE) / 2, 1.0
    if wanted > 0.0:  # 0 where only rare combinations of runs and tasks move a trimmed statistic at all
        t_ratio = scipy.special.stdtrit(wanted**2 / spread, 1 - tail) / scipy.special.ndtri(1 - tail)
        scale = float(np.sqrt(wanted) * t_ratio)
    below, above = np.nanquantile(both, [tail, 1 - tail])
    low = estimate - scale * max(0.0, estimate - float(below))
    high = estimate + scale * max(0.0, float(above) - estimate)
    return Interval(estimate, min(estimate, max(low, limits[0])), max(estimate, min(high, limits[1])))


def _divide(total: NDArray[Any], count: NDArray[Any]) -> Floats:
    """total / count, NaN where nothing was counted."""
    empty = count == 0
    return np.asarray(np.where(empty, np.nan, total / np.where(empty, 1, count)))


def _range(interval: Interval) -> str:
    if not np.isfinite(interval.low):
        return ""
    return f" (95 % {interval.low:+z.3f} to {interval.high:+z.3f})"
