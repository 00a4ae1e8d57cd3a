"""Aggregates of scores, and their 95 % intervals.

Scores are arrays (R, N) of R runs (training seeds) and N tasks; NaN stands for "not defined here" and is
left out. Which interval is right depends on how the runs came about:

- ``crossed_bootstrap``: all runs learn from one data set and meet the same tasks;
- ``over_runs``: every run has its own data, split and seed, so that runs are independent.

Interquartile mean, probability of improvement and performance profile follow Agarwal et al. 2021, "Deep
reinforcement learning at the edge of the statistical precipice".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from compressed_ad.seeding import rng

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[..., Any]
"""Called as ``statistic(values (n, k), axis=-1) -> (n,)``; ``mean`` or ``iqm``."""

CONFIDENCE = 0.95
_TAIL = (1 + CONFIDENCE) / 2


@dataclass(frozen=True)
class Interval:
    """An aggregate of n runs and its 95 % interval; ``low`` and ``high`` are NaN where there can be none."""

    value: float
    low: float
    high: float
    n: int
    spread: float = math.nan  # standard deviation between independent runs; NaN if they are not
    of: str = "mean"  # or "iqm"

    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0; False where the interval is undefined."""
        return self.low > 0 or self.high < 0

    def span(self, sign: str = "") -> str:
        """``0.712 to 0.996``, with ``sign`` "+" also before positive numbers; empty if undefined."""
        return f"{number(self.low, sign)} to {number(self.high, sign)}" if math.isfinite(self.low) else ""

    def text(self, sign: str = "") -> str:
        """``0.867 (95 % 0.712 to 0.996)``."""
        span = self.span(sign)
        return number(self.value, sign) + (f" (95 % {span})" if span else "")


def number(value: float, sign: str = "") -> str:
    """Three decimals and a true minus sign; a dash for NaN. With ``sign``, what rounds to 0 keeps its own."""
    zero = "" if sign else "z"
    return f"{value + 0.0:{sign}{zero}.3f}".replace("-", "−") if math.isfinite(value) else "–"


def mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean along ``axis``; NaN are ignored, all NaN gives NaN."""
    array = np.asarray(values, dtype=np.float64)
    missing = np.isnan(array)
    return divided(np.where(missing, 0.0, array).sum(axis=axis), (~missing).sum(axis=axis))[()]


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
    return divided(total, weight.sum(axis=-1))[()]


def divided(total: NDArray[Any], count: NDArray[Any]) -> Floats:
    """total / count, NaN where nothing was counted."""
    empty = count == 0
    return np.asarray(np.where(empty, np.nan, total / np.where(empty, 1, count)))


def crossed_bootstrap(
    scores: ArrayLike,
    statistic: Statistic = mean,
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

    Runs and tasks without any score do not count. One task says nothing of other tasks, so it gives no
    interval (NaN). With R = 1 the interval speaks of tasks only. Scores (R,) of whole runs are resampled by
    run alone. ``n`` is the number of resamples, drawn with ``seed``. The interval is cut to ``limits``, the
    range that the true value can have. Paired differences of two methods are scores as well.
    """
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim not in (1, 2):
        raise ValueError(f"scores: expected (runs, tasks) or (runs,), got shape {given.shape}")
    by_task = given.reshape(len(given), -1)
    values = by_task[np.ix_(*counted(by_task))]

    def resampled(runs: Indices, tasks: Indices) -> Floats:
        picked = values[runs[:, :, None], tasks[:, None, :]]
        return np.asarray(statistic(picked.reshape(len(runs), -1), axis=-1))

    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan, len(given), of=statistic.__name__)
    found = _crossed(resampled, values.shape, n, seed, limits, by_task=given.ndim == 2)
    return replace(found, of=statistic.__name__)


def counted(scores: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which runs (R,) and which tasks (N,) have any of the ``scores`` (R, N)."""
    known = ~np.isnan(scores)
    return np.asarray(known.any(axis=1)), np.asarray(known.any(axis=0))


def bootstrap_curve(curves: ArrayLike, statistic: Statistic = mean, *, n: int = 500, seed: int = 0) -> Floats:
    """(3, E): aggregate, low and high of curves (R, N, E), pointwise by ``crossed_bootstrap``."""
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 3:
        raise ValueError(f"curves: expected (runs, tasks, episodes), got shape {values.shape}")
    points = [crossed_bootstrap(values[..., e], statistic, n=n, seed=seed) for e in range(values.shape[-1])]
    return np.array([[p.value, p.low, p.high] for p in points]).T.reshape(3, -1)


def probability_of_improvement(a: ArrayLike, b: ArrayLike, *, n: int = 1000, seed: int = 0) -> Interval:
    """How probable it is that a run of b beats a run of a on a random task (ties count half).

    Scores (R, N) of both methods; all R x R pairs of runs on each task (Agarwal et al. 2021, section 4.3).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores need one shape, got {first.shape} and {second.shape}")
    runs, tasks = counted(second - first)
    first, second = (scores[np.ix_(runs, tasks)] for scores in (first, second))
    if first.size == 0:
        return Interval(math.nan, math.nan, math.nan, len(runs))
    gap = second[:, None, :] - first[None, :, :]
    wins = np.where(np.isnan(gap), np.nan, (gap > 0) + 0.5 * (gap == 0))

    def resampled(runs: Indices, tasks: Indices) -> Floats:
        won = [mean(wins[np.ix_(r, r, k)].ravel()) for r, k in zip(runs, tasks, strict=True)]
        return np.array(won, dtype=np.float64)

    return _crossed(resampled, first.shape, n, seed, (0.0, 1.0))


def performance_profile(scores: ArrayLike, levels: ArrayLike, *, n: int = 500, seed: int = 0) -> Floats:
    """(3, K): share of the scores (R, N) above each of ``levels`` (K,), with its 95 % interval."""
    values, thresholds = np.asarray(scores, dtype=np.float64), np.asarray(levels, dtype=np.float64)
    above = np.where(np.isnan(values), np.nan, 1.0)[..., None] * (values[..., None] > thresholds)
    return np.clip(bootstrap_curve(above, n=n, seed=seed), 0.0, 1.0)


def _crossed(
    resampled: Callable[[Indices, Indices], Floats],
    shape: tuple[int, ...],
    n: int,
    seed: int,
    limits: tuple[float, float],
    by_task: bool = True,
) -> Interval:
    """The interval of ``crossed_bootstrap``; ``resampled`` maps indices (n, R), (n, N) to (n,)."""
    n_run, n_task = shape
    generator = rng(seed, "bootstrap")
    runs, tasks = generator.integers(n_run, size=(n, n_run)), generator.integers(n_task, size=(n, n_task))
    all_runs, all_tasks = np.arange(n_run)[None], np.arange(n_task)[None]
    estimate = float(resampled(all_runs, all_tasks)[0])
    if not np.isfinite(estimate) or (n_task if by_task else n_run) == 1:
        return Interval(estimate, math.nan, math.nan, n_run)

    both = resampled(runs, tasks)
    of_runs = resampled(runs, np.repeat(all_tasks, n, axis=0)) if n_run > 1 else np.full(n, estimate)
    of_tasks = resampled(np.repeat(all_runs, n, axis=0), tasks) if n_task > 1 else np.full(n, estimate)
    total = float(np.nanvar(both))
    if total <= 0.0:
        return Interval(estimate, estimate, estimate, n_run)
    run, task = float(np.nanvar(of_runs)) / total, float(np.nanvar(of_tasks)) / total

    # Unbiased parts of a two-way layout: run = A + E, task = B + E, interaction = E, wanted = A + B + E;
    # all as shares of the variance of the crossed resamples.
    df_run, df_task = n_run - 1, n_task - 1
    extra = max(0.0, 1.0 - run - task)
    run *= n_run / max(1, df_run)
    task *= n_task / max(1, df_task)
    extra = min(extra * n_run * n_task / max(1, df_run * df_task), run, task)
    wanted = run + task - extra
    spread = run**2 / max(1, df_run) + task**2 / max(1, df_task) + extra**2 / max(1, df_run * df_task)
    scale = 1.0
    if wanted > 0.0:  # 0 where only rare combinations of runs and tasks move a trimmed statistic at all
        t_ratio = scipy.special.stdtrit(wanted**2 / spread, _TAIL) / scipy.special.ndtri(_TAIL)
        scale = float(np.sqrt(wanted) * t_ratio)
    below, above = np.nanquantile(both, [1 - _TAIL, _TAIL])
    low = estimate - scale * max(0.0, estimate - float(below))
    high = estimate + scale * max(0.0, float(above) - estimate)
    return Interval(estimate, min(estimate, max(low, limits[0])), max(estimate, min(high, limits[1])), n_run)


def over_runs(values: ArrayLike) -> Interval:
    """Mean of independent runs (R,), or (R, N) averaged over tasks first, with Student's t interval.

    NaN are left out; the interval of one run is NaN.
    """
    known = np.asarray(values, np.float64)
    known = mean(known.reshape(len(known), -1)) if known.size else known.ravel()
    known = known[~np.isnan(known)]
    n = len(known)
    if n < 2:
        return Interval(float(mean(known)), math.nan, math.nan, n)
    spread = float(known.std(ddof=1))
    return _students(float(known.mean()), spread / math.sqrt(n), n, spread)


def pooled(parts: Sequence[Interval]) -> Interval:
    """Mean over independent ``parts``, each counting the same; Welch's degrees of freedom give the n."""
    variances = np.array([part.spread**2 / part.n for part in parts]) / len(parts) ** 2
    middle, total = float(np.mean([part.value for part in parts])), float(variances.sum())
    if total == 0:
        return Interval(middle, middle, middle, sum(part.n for part in parts), 0.0)
    freedom = total**2 / float((variances**2 / (np.array([part.n for part in parts]) - 1)).sum())
    n = max(2, math.floor(freedom) + 1)
    return _students(middle, math.sqrt(total), n, math.sqrt(total * n))


def _students(middle: float, error: float, n: int, spread: float) -> Interval:
    half = float(scipy.special.stdtrit(n - 1, _TAIL)) * error
    return Interval(middle, middle - half, middle + half, n, spread)


def p_value(estimate: Interval) -> float:
    """Two-sided t-test that the mean of independent runs is 0; NaN without their spread."""
    if estimate.n < 2 or math.isnan(estimate.spread):
        return math.nan
    if estimate.spread == 0:
        return 1.0 if estimate.value == 0 else 0.0
    t = -abs(estimate.value) * math.sqrt(estimate.n) / estimate.spread
    return 2 * float(scipy.special.stdtr(estimate.n - 1, t))


def holm(p_values: Sequence[float]) -> list[float]:
    """``p_values`` adjusted for their number by Holm's step-down method (Holm 1979); NaN stay out of it."""
    adjusted, largest = list(p_values), 0.0
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def detectable(spread: float, n: int) -> float:
    """The true mean difference that a paired t-test on ``n`` runs finds with 80 % power at level .05.

    (t(.975) + t(.8)) * spread / sqrt(n), Student's t with n - 1 degrees of freedom: the usual approximation
    (Cohen 1988, chapter 2), within 2 % of the noncentral t from n = 5 on.
    """
    if n < 2:
        return math.nan
    quantiles = scipy.special.stdtrit(n - 1, _TAIL) + scipy.special.stdtrit(n - 1, 0.8)
    return float(quantiles) * spread / math.sqrt(n)
