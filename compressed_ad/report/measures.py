"""What is measured of a run: one row of ``MEASURES`` for each measure, and the functions behind them.

The table of a run's report, the tables of a study, both CSV files, ``summary.json`` and every verdict read
``MEASURES``; a further measure is one more row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from compressed_ad.evaluation.intervals import Floats, divided, mean
from compressed_ad.tasks.base import DIRECTED_SEARCH

if TYPE_CHECKING:
    from compressed_ad.report.results import MethodRuns

Limits = tuple[float, float]
ANY: Limits = (-math.inf, math.inf)
SHARE: Limits = (0.0, 1.0)
RETURN: Limits = (-math.inf, 1.0)
"""Of a normalised return: no policy exceeds the optimum. Does not hold where the optimum is unknown."""


@dataclass(frozen=True)
class Measure:
    """One measure of R runs on N tasks."""

    key: str  # in files and study files
    label: str  # in tables and figures
    meaning: str  # half a sentence for the pages
    function: Callable[[MethodRuns], ArrayLike | None]  # (R, N) by task, (R,) by run, None: not measured
    limits: Limits = ANY
    better: int = 1  # 1: more is better, -1: less is better, 0: neither
    needs: str = ""  # a key of ``NEEDS``
    listed: bool = True  # False: in the files, but not in tables

    def scores(self, runs: MethodRuns) -> Floats:
        """(R, N), or (R,) if the measure is of whole runs; NaN where it has no meaning."""
        unknown = np.full(len(runs.seeds), np.nan)
        values = unknown if self.needs == "search" and not runs.searches else self.function(runs)
        return unknown if values is None else np.asarray(values, np.float64)


NEEDS = {
    "search": "a reward that must be found by exploration",
    "imitation": "discrete actions and a source whose entropy is known",
    "training tasks": "evaluation.training_tasks above 0",
    "own data": "histories of its own for each run",
    "limit": "a family whose limit is known",
    "forgetting": "a model whose context loses steps",
}


# ---------------------------------------------------------------- returns


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


SCORES: dict[str, Callable[[ArrayLike], Floats]] = {"final": final_return, "auc": area_under_curve}
"""The measures that single rollouts have, by key."""


def chance_in_play(scores: ArrayLike) -> float:
    """Standard error of the mean of ``scores`` (N, M) if the N tasks stay and are played again, M times each.

    It comes from how rollouts of one task differ, so it is NaN for single rollouts. Tasks that have no score
    do not count.
    """
    by_task = np.asarray(scores, np.float64)
    if by_task.shape[1] < 2:
        return math.nan
    variances = by_task.var(axis=1, ddof=1) / by_task.shape[1]
    return float(np.sqrt(mean(variances) / max(np.isfinite(variances).sum(), 1)))


def in_blocks(curves: ArrayLike, at_most: int = 100) -> tuple[Floats, Floats]:
    """Curves (..., E) as means (..., K) of equally many consecutive episodes, K <= ``at_most``.

    The last block may hold fewer. Also the middle (K,) of each block's episode numbers. Up to ``at_most``
    episodes stay as they are.
    """
    values = np.asarray(curves, dtype=np.float64)
    n_episode = values.shape[-1]
    starts = np.arange(0, n_episode, -(-n_episode // at_most))
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
    return divided(np.where(knew, final_return(normalised), 0.0).sum(axis=-1), knew.sum(axis=-1))


def cumulative_regret(methods: Sequence[MethodRuns]) -> dict[str, Floats]:
    """(R, N, E) optimal minus earned return, summed over the episodes so far, mean over rollouts.

    Of the methods and then the references (R = 1). Empty unless the optimum is known and regret is the usual
    measure: an episode is one step, or the family offers reference algorithms of its own.
    """
    base = methods[0]
    own = base.references.keys() - {DIRECTED_SEARCH}
    if not np.isfinite(base.optimal).all() or not (own or base.horizon == 1):
        return {}
    earned = {m.name: m.returns for m in methods}
    earned |= {name: returns[None] for name, returns in base.references.items()}
    return {
        name: np.cumsum(base.optimal[:, None] - returns.mean(axis=2, dtype=np.float64), axis=-1)
        for name, returns in earned.items()
    }


# ---------------------------------------------------------------- while training


VALIDATED = {
    "validation_return": "return",
    "validation_accuracy": "accuracy",
    "validation_excess_cross_entropy": "excess cross-entropy",
}
"""What a run records of the validation tasks while it is trained: keys of ``metrics.jsonl``."""


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and values (K,) of the rows of a ``metrics.jsonl`` that have a finite number under ``key``."""
    points = [(row.get("step"), row.get(key)) for row in rows]
    known = [point for point in points if all(isinstance(x, int | float) and np.isfinite(x) for x in point)]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def step_to_reach(steps: ArrayLike, values: ArrayLike, level: float) -> float:
    """Where a curve of ``values`` (K,) at ``steps`` (K,) first reaches ``level``; infinity if it never does.

    Interpolated linearly between its points. For a quantity that should fall, such as cross-entropy, hand
    over its negative and the negative level.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if not (y >= level).any():
        return math.inf
    k = int(np.argmax(y >= level))
    if k == 0:
        return float(x[0])
    return float(x[k - 1] + (x[k] - x[k - 1]) * (level - y[k - 1]) / (y[k] - y[k - 1]))


# ---------------------------------------------------------------- the measures


def _generalisation(runs: MethodRuns) -> ArrayLike | None:
    known: ArrayLike | None = runs.training_final
    return None if known is None else mean(final_return(runs.curves)) - mean(known)


def _share_of_limit(runs: MethodRuns) -> ArrayLike | None:
    limit = runs.limit
    return None if limit is None else area_under_curve(runs.curves) / limit.area(runs.curves.shape[-1])


def _regret(runs: MethodRuns) -> ArrayLike | None:
    known = cumulative_regret([runs])
    return known[runs.name][..., -1] if known else None


def _regret_ratio(runs: MethodRuns) -> ArrayLike | None:
    totals = {name: x[..., -1].mean(axis=1) for name, x in cumulative_regret([runs]).items()}
    others = [x for name, x in totals.items() if name != runs.name]
    return totals[runs.name] / min(others) if others else None


def _last_validation(runs: MethodRuns) -> list[float]:
    recorded = [series(rows, "validation_return")[1] for rows in runs.metrics]
    return [values[-1] if len(values) else math.nan for values in recorded]


def _episode(number: int, runs: MethodRuns) -> ArrayLike | None:
    """(R, N) normalised return in one episode, counted from 1."""
    curves = runs.curves
    return curves[..., number - 1] if number <= curves.shape[-1] else None


_ROWS = (
    Measure("final", "Final return", "mean of the last 10 % of the episodes",
            lambda runs: final_return(runs.curves), RETURN),
    Measure("auc", "Area under the curve", "mean of all episodes",
            lambda runs: area_under_curve(runs.curves), RETURN),
    Measure("share_of_limit", "Share of the limit",
            "area under the curve over that of an agent that knows the room, but not the task",
            _share_of_limit, needs="limit"),
    Measure("found_by_10", "Met by episode 10",
            "share of rollouts with a reward in one of the first 10 episodes",
            lambda runs: found_by(runs.returns, 10), SHARE, needs="search"),
    Measure("found", "Met at all", "share of rollouts with a reward in any episode",
            lambda runs: found_by(runs.returns), SHARE, needs="search"),
    Measure("success_given_found", "Final if met",
            "final return of rollouts with a reward before the last 10 %",
            lambda runs: success_given_found(runs.returns, runs.normalised), RETURN, needs="search"),
    Measure("accuracy", "Accuracy",
            "share of the source's actions on held-out histories that the model predicts",
            lambda runs: runs.accuracy, SHARE, needs="imitation"),
    Measure("excess_cross_entropy", "Excess cross-entropy", "above the source's entropy, held-out histories",
            lambda runs: runs.cross_entropy - runs.behaviour_entropy, better=-1, needs="imitation"),
    Measure("final_last", "Final return, last weights",
            "instead of the weights chosen on the validation tasks",
            lambda runs: runs.final_last, RETURN, listed=False),
    Measure("training_final", "Final, training tasks", "final return on training tasks",
            lambda runs: runs.training_final, RETURN, needs="training tasks"),
    Measure("generalisation", "Held-out − training", "final return on held-out minus that on training tasks",
            _generalisation, needs="training tasks"),
    Measure("validation_return", "Validation return",
            "final return on the validation tasks when training ended",
            _last_validation),
    Measure("marked", "Marked", "share of marked steps in the training histories",
            lambda runs: runs.marked, SHARE, better=0, needs="own data"),
    Measure("visible", "Tokens seen", "tokens that a query sees, on average over held-out histories",
            lambda runs: runs.visible, better=0, needs="forgetting"),
    Measure("auc_50", "Area over 50", "mean of the first 50 episodes",
            lambda runs: None if runs.curves.shape[-1] < 50 else area_under_curve(runs.curves[..., :50]),
            RETURN, listed=False),
    Measure("regret", "Regret", "what the best policy would have earned more in all episodes",
            _regret, better=-1, listed=False),
    Measure("regret_ratio", "Regret ratio", "regret over that of the best reference algorithm",
            _regret_ratio, better=-1, listed=False),
    *(Measure(f"episode_{k}", f"Episode {k}", "return in this episode", partial(_episode, k), RETURN,
              listed=False) for k in (1, 2, 5, 10, 20, 50, 100)),
)  # fmt: skip
MEASURES: dict[str, Measure] = {row.key: row for row in _ROWS}
"""Columns of a study's table and rows of a report's, in this order; keys are those of the files."""
