"""Methods compared: every metric with its interval, paired differences to the first method, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import UsageError
from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Comparison, Interval
from compressed_ad.report.results import MethodRuns, SourceSummary

Floats = NDArray[np.float64]

METRICS = {
    "final": "Final normalised return",
    "auc": "Area under the curve",
    "found_by_10": "Met the reward by episode 10",
    "found": "Met the reward at all",
    "success_given_found": "Final return if met in time",
    "accuracy": "Accuracy on held-out histories",
    "excess_cross_entropy": "Cross-entropy above the source's entropy (nats)",
}
"""What is reported of every method; keys as in ``summary.json``."""

IMITATION = ("accuracy", "excess_cross_entropy")
"""Those that are not defined for continuous actions, or where the source's entropy is not known."""

SEARCH = ("found_by_10", "found", "success_given_found")
"""Those that mean nothing where there is no reward to be met: see ``MethodRuns.searches``."""

OPTIMUM = "the optimal return"
"""What a normalised return of 1 stands for where that is known."""


@dataclass(frozen=True)
class Analysis:
    """Intervals per method and metric, paired differences from the first method, and verdicts."""

    methods: dict[str, dict[str, Interval]]
    means: dict[str, dict[str, float]]
    differences: dict[str, dict[str, Interval]]  # by "B-A"
    comparisons: list[Comparison]
    curves: dict[str, Floats]  # (R, N, E) normalised, mean over rollouts
    seeds: dict[str, tuple[int, ...]]
    scale: str  # what a normalised return of 1 stands for
    searches: bool  # whether there is a reward to be met; where there is none, ``SEARCH`` is NaN
    optimal: Floats  # (N,) the return that 1 stands for
    references: dict[str, Floats]  # (1, N, E) of the family's reference algorithms, normalised as ``curves``
    regret: dict[str, Floats]  # (R, N, E) see ``cumulative_regret``: methods, then references
    total_regret: dict[str, Interval]  # mean over runs and tasks, at the end

    @property
    def verdict(self) -> str:
        """One sentence for each compared method."""
        if not self.comparisons:
            return "Only one method was evaluated, so there is nothing to compare."
        return " ".join(comparison.verdict for comparison in self.comparisons)


def analyse(methods: Sequence[MethodRuns], source: SourceSummary | None = None, *, seed: int = 0) -> Analysis:
    """All statistics of a report. Methods are compared over the seeds they share, on the same tasks.

    Where the optimal return of a task is unknown, a normalised return of 1 stands for the best episode
    (mean over streams) of the source algorithm on that task.
    """
    _check_methods(methods)
    optimal, scale = _scale(methods[0], source)
    searches = methods[0].searches
    scores = {m.name: _scores(m, optimal, searches) for m in methods}
    top = 1.0 if np.isfinite(methods[0].optimal).all() else np.inf
    limits = dict.fromkeys(METRICS, (0.0, 1.0)) | dict.fromkeys(
        ("final", "auc", "success_given_found"), (-np.inf, top)
    )
    limits["excess_cross_entropy"] = (-np.inf, np.inf)
    curves = {m.name: _normalised(m, optimal).mean(axis=2) for m in methods}
    played = {name: returns[None] for name, returns in methods[0].references.items()}
    regret = cumulative_regret(methods)
    base, differences, comparisons = methods[0], {}, []
    for method in methods[1:]:
        ours, theirs = _shared_seeds(base, method)
        a, b = scores[base.name], scores[method.name]
        differences[f"{method.name}-{base.name}"] = {
            key: intervals.paired_difference(a[key][ours], b[key][theirs], seed=seed) for key in METRICS
        }
        pair = (curves[base.name][ours], curves[method.name][theirs])
        comparisons.append(intervals.compare(*pair, names=(base.name, method.name), seed=seed))
    return Analysis(
        methods={
            name: {
                key: intervals.hierarchical_bootstrap(values[key], seed=seed, limits=limits[key])
                for key in METRICS
            }
            for name, values in scores.items()
        },
        means={
            name: {key: float(intervals.mean(v[key].ravel())) for key in METRICS}
            for name, v in scores.items()
        },
        differences=differences,
        comparisons=comparisons,
        curves=curves,
        seeds={m.name: m.seeds for m in methods},
        scale=scale,
        searches=searches,
        optimal=optimal,
        references={
            name: _normalised(methods[0], optimal, returns).mean(axis=2) for name, returns in played.items()
        },
        regret=regret,
        total_regret={
            name: intervals.hierarchical_bootstrap(values[..., -1], intervals.mean, seed=seed)
            for name, values in regret.items()
        },
    )


def cumulative_regret(methods: Sequence[MethodRuns]) -> dict[str, Floats]:
    """(R, N, E) optimal minus earned return, summed over the episodes so far, mean over rollouts.

    Of the methods and then the references (R = 1). Empty unless the optimum is known and regret is the usual
    measure: an episode is one step, or the family offers reference algorithms.
    """
    base = methods[0]
    if not np.isfinite(base.optimal).all() or not (base.references or base.horizon == 1):
        return {}
    earned = {m.name: m.returns for m in methods}
    earned |= {name: returns[None] for name, returns in base.references.items()}
    return {
        name: np.cumsum(base.optimal[:, None] - returns.mean(axis=2, dtype=np.float64), axis=-1)
        for name, returns in earned.items()
    }


def _check_methods(methods: Sequence[MethodRuns]) -> None:
    if not methods:
        raise UsageError("a report needs at least one method")
    names = [m.name for m in methods]
    if len(set(names)) < len(names):
        raise UsageError(f"two methods have the same name: {', '.join(names)}")
    for method in methods[1:]:
        if not np.array_equal(method.task_ids, methods[0].task_ids):
            raise UsageError(
                f"{method.name} and {names[0]} were evaluated on different tasks: not comparable"
            )
        if method.returns.shape[-1] != methods[0].returns.shape[-1]:
            raise UsageError(f"{method.name} and {names[0]} were evaluated for different numbers of episodes")


def _scale(method: MethodRuns, source: SourceSummary | None) -> tuple[Floats, str]:
    optimal = np.array(method.optimal, dtype=np.float64)
    unknown = np.isnan(optimal)
    if not unknown.any():
        return optimal, OPTIMUM
    if source is not None:
        place = {int(task): row for row, task in enumerate(source.task_ids)}
        for n in np.flatnonzero(unknown):
            row = place.get(int(method.task_ids[n]))
            if row is not None and source.returns.shape[1]:
                optimal[n] = source.returns[row].max()
    return optimal, "the best episode of the source algorithm (the optimal return is unknown)"


def _normalised(method: MethodRuns, optimal: Floats, returns: Any = None) -> Floats:
    """(R, N, M, E), of the method's own returns or others on its tasks."""
    returns = method.returns if returns is None else returns
    return np.stack([intervals.normalise(run, method.random, optimal) for run in returns])


def _scores(method: MethodRuns, optimal: Floats, searches: bool) -> dict[str, Floats]:
    """Every metric as (R, N), or (R, 1) where it is one number per run."""
    normalised = _normalised(method, optimal)
    curves = normalised.mean(axis=2)
    excess = np.asarray(method.cross_entropy) - np.asarray(method.behaviour_entropy)
    scores = {
        "final": intervals.final_return(curves),
        "auc": intervals.area_under_curve(curves),
        "found_by_10": intervals.found_by(method.returns, 10),
        "found": intervals.found_by(method.returns),
        "success_given_found": intervals.success_given_found(method.returns, normalised),
        "accuracy": np.asarray(method.accuracy, dtype=np.float64)[:, None],
        "excess_cross_entropy": excess.astype(np.float64)[:, None],
    }
    nothing = np.full(curves.shape[:2], np.nan)
    return scores if searches else scores | dict.fromkeys(SEARCH, nothing)


def _shared_seeds(a: MethodRuns, b: MethodRuns) -> tuple[list[int], list[int]]:
    shared = [seed for seed in a.seeds if seed in b.seeds]
    if not shared:
        raise UsageError(f"{a.name} (seeds {a.seeds}) and {b.name} (seeds {b.seeds}) share no training seed")
    return [a.seeds.index(seed) for seed in shared], [b.seeds.index(seed) for seed in shared]


def convergence(methods: Sequence[MethodRuns]) -> list[list[str]]:
    """The guide's "convergence speed": gradient steps until a run is as good as the first method ends.

    Rows of text (measure, level, method, median step of the runs that get there, how many get there); the
    level is the mean over the first method's runs of their last recorded value.
    """
    rows = []
    for key, label, sign in (
        ("validation_return", "validation return", 1),
        ("validation_excess_cross_entropy", "validation excess cross-entropy", -1),
    ):
        recorded = {m.name: [intervals.series(run, key) for run in m.metrics] for m in methods}
        last = [values[-1] for _, values in recorded[methods[0].name] if len(values)]
        if not last:
            continue
        level = float(np.mean(last))
        for name, runs in recorded.items():
            steps = np.array(
                [intervals.steps_to_reach(x, sign * y, sign * level) for x, y in runs], np.float64
            )
            reached = steps[~np.isnan(steps)]
            when = f"{np.median(reached):,.0f}" if len(reached) else "never"
            rows.append([label, f"{level:.3f}", name, when, f"{len(reached)} of {len(runs)} runs"])
    return rows
