"""Keep some episodes of a history and drop the others, while it is collected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compressed_ad.errors import RunError, UsageError
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import History


def kept_steps(family: TaskFamily, n_timesteps: int, keep_every: int) -> int:
    """How many steps ``keep_episodes`` leaves of each stream of ``n_timesteps``.

    Raises ``UsageError`` if that is less than an episode may take.
    """
    if keep_every == 1:
        return n_timesteps
    # Whatever the lengths of its episodes, none above the horizon, a stream keeps at least so many.
    kept = (n_timesteps - family.horizon) // keep_every + 1
    if kept < family.horizon:
        raise UsageError(
            f"{family.name}: keep_every {keep_every} leaves {max(kept, 0)} of {n_timesteps} steps, less than "
            f"an episode of {family.horizon}; lower keep_every or raise n_timesteps"
        )
    return kept


def keep_episodes(history: History, keep_every: int, n_step: int) -> History:
    """One of ``keep_every`` episodes of each stream, whole and in order, cut to ``n_step`` (``kept_steps``).

    An episode is kept if no more than one of ``keep_every`` steps before it was: the first one, and where all
    are equally long, every ``keep_every``-th after it. Where lengths differ, streams still keep their share
    of the steps, and what an episode holds does not decide whether it is kept.
    """
    rows = np.empty((history.n_stream, n_step), np.int64)
    for row, end in zip(rows, history.episode_end, strict=True):
        keep, start, count = np.zeros(history.n_step, bool), 0, 0
        for stop in [*(np.flatnonzero(end) + 1).tolist(), history.n_step]:
            if count * keep_every <= start:
                keep[start:stop] = True
                count += stop - start
            start = stop
        if count < n_step:
            raise RunError(f"only {count} of {n_step} steps to keep: an episode is longer than the horizon")
        row[:] = np.flatnonzero(keep)[:n_step]
    stream = np.arange(history.n_stream)[:, None]
    return replace(history, **{name: array[stream, rows] for name, array in history.per_step()})
