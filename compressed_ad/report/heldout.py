"""A trained model on the held-out tasks of a history file, and its in-context returns beside the source's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Floats
from compressed_ad.histories.file import HistoryFile
from compressed_ad.registry import call_text
from compressed_ad.report.comparison import Analysis, analyse
from compressed_ad.report.figures.returns import in_context_curves
from compressed_ad.report.figures.style import Figure
from compressed_ad.report.measures import in_blocks, normalise
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.source import SourceSummary, summarise_source
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.select import stored_family

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compressed_ad.models.ad import AD


def evaluate_heldout(
    models: AD | Sequence[AD],
    file: HistoryFile | str | Path,
    *,
    name: str | None = None,
    family: TaskFamily | None = None,
    rollouts: int = 4,
    episodes: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> MethodRuns:
    """Play with frozen weights on the held-out tasks of ``file``. The result is as that of ``load_runs``.

    ``models`` is one model or several training seeds of one method, which is called ``name`` (by default
    after its class). Each plays ``rollouts`` times ``episodes`` episodes of every held-out task. ``family``
    is needed if the file names code of yours. ``options`` are those of ``evaluate_in_context``, such as
    ``temperature``. ``SplitError`` if the file holds out no task.
    """
    from compressed_ad.evaluation.evaluate import evaluate_tasks

    file = file if isinstance(file, HistoryFile) else HistoryFile(file)
    ids, info = file.heldout_tasks(), file.info
    family = stored_family(file.path, info.family, info.family_kwargs) if family is None else family
    runs, returns = list(models) if isinstance(models, Sequence) else [models], []
    for k, model in enumerate(runs):

        def show(done: int, total: int, k: int = k) -> None:
            progress(k * total + done, len(runs) * total)

        size: Any = {"rollouts": rollouts, "episodes": episodes, "seed": seed + k}
        returns.append(evaluate_tasks(model, family, file.tasks[ids], **size, progress=show, **options))
    unknown = np.full(len(runs), np.nan)
    return MethodRuns(
        name=type(runs[0]).__name__ if name is None else name,
        seeds=tuple(range(len(runs))),
        task_ids=ids,
        returns=np.stack(returns),
        random=file.random_return[ids],
        optimal=np.full(len(ids), np.nan) if file.optimal_return is None else file.optimal_return[ids],
        accuracy=unknown,
        cross_entropy=unknown,
        behaviour_entropy=unknown,
        metrics=[[] for _ in runs],
        horizon=info.horizon,
        judged={"family": call_text(info.family, info.family_kwargs)},
    )


def plot_in_context(
    *methods: MethodRuns,
    source: HistoryFile | str | Path | None = None,
    ax: Axes | None = None,
    seed: int = 0,
) -> Figure:
    """The figure of this library: normalised return by in-context episode, beside the source's learning.

    ``methods`` come from ``load_runs`` or ``evaluate_heldout``; ``source`` is the history file that they were
    trained on. Bands are 95 % intervals over runs and tasks, resampled with ``seed``. Where the optimal
    return is unknown, 1 is the source's best episode, so that ``source`` is needed.
    """
    if source is not None and not isinstance(source, HistoryFile):
        source = HistoryFile(source)
    summary = None if source is None else summarise_source(source)
    analysis = analyse(methods, summary, seed=seed)
    if np.isnan(analysis.optimal).all():
        raise UsageError("plot_in_context: the optimal returns are unknown; give source, the history file")
    return draw_in_context(methods[0], analysis, summary, seed=seed, ax=ax)


def source_rows(base: MethodRuns, source: SourceSummary | None) -> list[int] | None:
    """Rows of ``source`` of the tasks of ``base``; None unless the source has learning curves of all."""
    if source is None or not source.returns.shape[1]:
        return None
    places = {task: k for k, task in enumerate(source.task_ids.tolist())}
    rows = [places.get(task) for task in base.task_ids.tolist()]
    return None if None in rows else [row for row in rows if row is not None]


def source_learning(base: MethodRuns, analysis: Analysis, source: SourceSummary | None) -> Floats | None:
    """(K,) the source's normalised return on the tasks of ``base``, from scratch, in blocks of episodes.

    None unless its learning curves are known.
    """
    rows = source_rows(base, source)
    if source is None or rows is None:
        return None
    scaled = normalise(source.returns[rows], base.random, analysis.optimal)
    return in_blocks(intervals.mean(scaled[:, : base.returns.shape[-1]], axis=0))[0]


def draw_in_context(
    base: MethodRuns, analysis: Analysis, source: SourceSummary | None, *, seed: int, ax: Axes | None = None
) -> Figure:
    """The in-context curves of ``analysis``, whose first method is ``base``, in blocks of episodes."""
    blocks = {name: in_blocks(curves)[0] for name, curves in analysis.curves.items()}
    known = {name: in_blocks(curves)[0][0] for name, curves in analysis.references.items()}
    n_episode = base.returns.shape[-1]
    _, episodes = in_blocks(np.zeros(n_episode))
    return in_context_curves(
        {name: intervals.bootstrap_curve(values, seed=seed) for name, values in blocks.items()},
        source=source_learning(base, analysis, source),
        source_name=source.name if source is not None else "source",
        limit=in_blocks(base.limit.curve(n_episode))[0] if base.limit else None,
        references={name: intervals.mean(curves, axis=0) for name, curves in known.items()},
        episodes=episodes,
        ax=ax,
    )
