"""Which figures the report of a run shows, and their captions, computed from the data that they show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Floats
from compressed_ad.report.comparison import IQM, MIN_RUNS, Analysis, Difference
from compressed_ad.report.figures import histories, returns
from compressed_ad.report.figures.comparison import forest
from compressed_ad.report.heldout import draw_in_context, source_learning, source_rows
from compressed_ad.report.measures import MEASURES, final_episodes, final_return, in_blocks, normalise
from compressed_ad.report.pages import Drawn
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.source import SourceSummary
from compressed_ad.workers import Report


def comparison_figures(
    methods: Sequence[MethodRuns],
    analysis: Analysis,
    source: SourceSummary | None,
    seed: int,
    report: Report,
) -> Iterator[Drawn]:
    """The figures of the whole comparison; ``report`` is not used, since none takes long."""
    if all(np.isfinite(row[analysis.metric]).any() for row in analysis.scores.values()):
        yield from _result_figures(methods[0], analysis, source, seed)
    if any(run for m in methods for run in m.metrics):
        validated = _by_method(analysis, "validation_return")
        yield (
            "training",
            "Training, and validation on the validation tasks. Of validations, thin lines are runs, thick"
            " lines their mean; of the loss, the mean."
            + (f" At the end they return, normalised, {validated}." if validated else ""),
            histories.training_curves({"": {m.name: m.metrics for m in methods}}),
        )
    if source is None:
        return
    if source.returns.shape[1]:
        levels: Any = {"optimal": source.optimal, "random": source.random}
        tenth = final_episodes(source.returns.shape[1])
        begins, ends = source.returns[:, :tenth].mean(), source.returns[:, -tenth:].mean()
        yield (
            "source_learning",
            "The learning histories that the models imitate: all tasks of all parts of the split. The mean"
            f" return is {begins:.2f} in the first tenth of the episodes and {ends:.2f} in the last.",
            histories.learning_curves(source.returns, name=source.name, **levels),
        )
    if (t := source.trace) is not None and np.isfinite(t.probs).any():
        places: Any = {"episode_end": t.episode_end, "first_step": t.first_step, "title": t.label}
        yield (
            "probability_trace",
            f"Probability of the executed action under the policy that chose it: {len(t.probs)} steps of "
            f"one stream, of which {t.mask.mean():.0%} are marked (shaded).",
            histories.probability_trace(t.probs, t.mask, threshold=source.threshold, **places),
        )
    if source.marked_by_phase is not None:
        first, *_, last = intervals.mean(source.marked_by_phase, axis=0)
        yield (
            "marked_fraction",
            "Share of marked steps by tenth of the source's training: mean over all tasks; the bands hold "
            f"the middle 50 % and 80 % of the tasks. It is {first:.0%} in the first tenth, {last:.0%} in the"
            " last.",
            histories.marked_by_tenth({"": {source.name: source.marked_by_phase}}),
        )


def _result_figures(
    base: MethodRuns, analysis: Analysis, source: SourceSummary | None, seed: int
) -> Iterator[Drawn]:
    places = {task: k for k, task in enumerate([] if source is None else source.task_ids.tolist())}
    tasks: list[int] = base.task_ids.tolist()
    rows = source_rows(base, source)
    labels = [f"task {task}" for task in tasks]
    if source is not None and source.tasks.shape[1] <= 4:
        words = [", ".join(f"{p:g}" for p in parameters) for parameters in source.tasks]
        labels = [f"({words[places[t]]})" if t in places else f"task {t}" for t in tasks]
    scores = {name: row[analysis.metric] for name, row in analysis.scores.items()}
    n_episode = base.returns.shape[-1]
    _, episodes = in_blocks(np.zeros(n_episode))
    size, limit = -(-n_episode // len(episodes)), base.limit
    learning = source_learning(base, analysis, source)
    yield (
        "in_context",
        "In-context return on the held-out tasks: mean over runs and tasks. The weights are frozen: a model "
        "can improve only by what its context holds. 0 is the uniformly random policy, 1 is "
        f"{analysis.scale}. In the last tenth of the episodes: {_by_method(analysis, 'final')}."
        + f" The band covers {'new training seeds and ' * (len(base.seeds) > 1)}new tasks."
        + (" Dashed: the limit, of an agent that knows the room, but not the task." if limit else "")
        + ("" if learning is None else _from_scratch(learning, episodes))
        + (" Dotted: known algorithms on the same tasks." if analysis.references else "")
        + (f" Points are means of {size} consecutive episodes." if size > 1 else ""),
        draw_in_context(base, analysis, source, seed=seed),
    )
    if analysis.regret:
        yield _regret_figure(analysis, seed)
    for row in analysis.pairs.values():
        d = row[analysis.metric]
        shown = [(MEASURES[key].label, row[key]) for key in analysis.shown if key != IQM]
        yield (
            f"difference_{d.other}",
            f"{d.other} minus {d.one}, paired by training seed and task: mean and 95 % interval. "
            + (_excluding(shown) if d.n_run >= MIN_RUNS else f"{MIN_RUNS} runs are needed to judge."),
            forest({d.label: shown}, "mean paired difference"),
        )
    # As the figure counts them.
    never = int(np.all([v.mean(axis=0) < returns.NEVER_SOLVED for v in scores.values()], axis=0).sum())
    yield (
        "per_task",
        f"Final return by held-out task. Never solved, below {returns.NEVER_SOLVED:g} for every method:"
        f" {never or 'none'} of {len(tasks)}.",
        returns.per_task_scatter(scores, labels),
    )
    cells = np.empty(0) if source is None else source.tasks
    on_grid = cells.shape[1:] == (2,) and cells.dtype.kind in "iu" and cells.min() >= 0 and cells.max() < 64
    if source is not None and rows is not None and on_grid:
        top = np.where(np.isnan(source.optimal), source.returns.max(axis=1), source.optimal)
        learned = final_return(normalise(source.returns, source.random, top))
        maps: dict[str, Floats] = {f"{source.name} at the end of training": learned}
        for name, values in scores.items():
            maps[name] = np.full(len(source.task_ids), np.nan)
            maps[name][rows] = values.mean(axis=0)
        yield (
            "goal_map",
            "Final return by goal. Thick frames: held-out goals; dashed: validation goals; grey: not judged.",
            returns.goal_map(source.tasks, maps, source.kinds),
        )
    levels = np.linspace(0, 1, 51)
    profiles = {name: intervals.performance_profile(v, levels, seed=seed) for name, v in scores.items()}
    half = ", ".join(f"{name} {(v > 0.5).sum() / np.isfinite(v).sum():.0%}" for name, v in scores.items())
    caption = f"Share of runs and tasks whose final return is above each level; above one half: {half}."
    yield "performance_profile", caption, returns.performance_profile(profiles, levels)


def _by_method(analysis: Analysis, key: str) -> str:
    """``AD 0.867, CompressedAD 0.902`` for a measure; empty if it was not measured."""
    known = {name: row[key].value for name, row in analysis.methods.items() if math.isfinite(row[key].value)}
    return ", ".join(f"{name} {intervals.number(value)}" for name, value in known.items())


def _from_scratch(learning: Floats, episodes: Floats) -> str:
    last = len(learning) - 1
    return (
        " The source algorithm learns the same tasks from scratch: it is at"
        f" {intervals.number(float(learning[last]))} by episode {episodes[last]:.0f}."
    )


def _excluding(shown: Sequence[tuple[str, Difference]]) -> str:
    decided = [label.lower() for label, d in shown if d.decided]
    return f"Filled: it excludes 0 ({', '.join(decided)})." if decided else "None excludes 0."


def _regret_figure(analysis: Analysis, seed: int) -> Drawn:
    n_episode = next(iter(analysis.regret.values())).shape[-1]
    shown = np.unique(np.linspace(0, n_episode - 1, 60).round().astype(np.int64))
    curves = {name: values[..., shown] for name, values in analysis.regret.items()}
    return (
        "regret",
        "Cumulative regret on the held-out tasks: what the best policy would have earned more in all "
        "episodes so far, mean over runs, tasks and rollouts."
        + (" Dotted: known algorithms on the same tasks." if analysis.references else ""),
        returns.cumulative_regret(
            {name: intervals.bootstrap_curve(curves[name], seed=seed) for name in analysis.curves},
            references={name: curves[name].mean(axis=(0, 1)) for name in analysis.references},
            episodes=shown + 1,
        ),
    )
