"""Recorded in-context episodes: when the first reward was found, and how much was explored.

The uniformly random policy is the baseline: what a model gains over it, it has learned about exploration.
Letters used in shapes: N tasks, M rollouts of each, T steps, E in-context episodes.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import scipy
from numpy.typing import NDArray

from compressed_ad.errors import CompressedADError, RunError, UsageError
from compressed_ad.evaluation.agents import OptimalAgent, RandomAgent, Watcher
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.evaluation.intervals import Floats
from compressed_ad.models.ad import AD
from compressed_ad.tasks.base import GoalDistance, OptimalPolicy, RandomFound, TaskFamily
from compressed_ad.tasks.grid import Grid
from compressed_ad.types import Agent, AnyArray, BoolArray, FloatArray, IntArray, Step


@dataclass(frozen=True)
class Rollouts:
    """All T transitions of M rollouts of each of N tasks, until the slowest rollout has its E episodes.

    Faster rollouts continue until then; their further steps have an ``episode`` of E or more, and no measure
    counts them.
    """

    tasks: AnyArray  # (N, P)
    n_episode: int  # E
    observations: AnyArray  # (N, M, T, ...) integers in the smallest dtype that holds them
    successors: AnyArray  # (N, M, T, ...) the true next observations, before any reset
    actions: AnyArray  # (N, M, T, ...)
    rewards: NDArray[np.float32]  # (N, M, T)
    terminated: BoolArray  # (N, M, T)
    truncated: BoolArray  # (N, M, T)

    @property
    def episode(self) -> IntArray:
        """(N, M, T) index of each step's in-context episode, from 0."""
        ends = self.terminated | self.truncated
        return np.cumsum(ends, axis=-1) - ends

    @property
    def played(self) -> BoolArray:
        """(N, M, T) whether the step belongs to the first E episodes."""
        return np.asarray(self.episode < self.n_episode)

    @property
    def returns(self) -> NDArray[np.float32]:
        """(N, M, E) undiscounted returns, as ``evaluate_tasks`` returns them."""
        return self._by_episode(self.rewards).astype(np.float32)

    def _by_episode(self, values: AnyArray) -> Floats:
        """(N, M, E) sums of ``values`` (N, M, T) over the steps of each episode, in time order."""
        shape = (*self.rewards.shape[:2], self.n_episode)
        rows = np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1)
        place, played = rows * self.n_episode + self.episode, self.played
        sums = np.bincount(place[played], values[played], minlength=rows.size * self.n_episode)
        return sums.reshape(shape)


class _Recorder(Watcher):
    """Keeps every transition."""

    def __init__(self) -> None:
        self.obs: list[AnyArray] = []
        self.actions: list[AnyArray] = []
        self.steps: list[Step] = []

    def act(self, obs: AnyArray) -> AnyArray:
        # An environment may return the same array at every step.
        self.obs.append(np.array(obs))
        return super().act(obs)

    def observe(self, actions: AnyArray, step: Step) -> None:
        self.actions.append(np.array(actions))
        self.steps.append(copy.deepcopy(step))
        super().observe(actions, step)


def record_rollouts(
    model: AD | Agent, family: TaskFamily, tasks: AnyArray, *, rollouts: int, episodes: int, **options: Any
) -> Rollouts:
    """Play as ``evaluate_tasks`` with the same arguments, and keep every step.

    ``tasks`` (N, P) are played in ``rollouts`` M independent rollouts of ``episodes`` E; ``options`` are
    those of ``evaluate_tasks``. Raises ``UsageError`` if N, M or E is 0.
    """
    if len(tasks) == 0 or rollouts < 1:
        raise UsageError(f"nothing to play: {len(tasks)} tasks, {rollouts} rollouts of each")
    kept = _Recorder()
    evaluate_tasks(model, family, tasks, rollouts=rollouts, episodes=episodes, watch=kept.watch, **options)

    def stacked(values: list[AnyArray]) -> AnyArray:
        array = np.stack(values, axis=1)
        return array.reshape(len(tasks), rollouts, *array.shape[1:])

    return Rollouts(
        tasks=np.asarray(tasks),
        n_episode=episodes,
        observations=_small(stacked(kept.obs)),
        successors=_small(stacked([step.next_obs for step in kept.steps])),
        actions=_small(stacked(kept.actions)),
        rewards=stacked([step.reward for step in kept.steps]).astype(np.float32),
        terminated=stacked([step.terminated for step in kept.steps]),
        truncated=stacked([step.truncated for step in kept.steps]),
    )


class ActionLog(Watcher):
    """Keeps what the agent does."""

    def __init__(self) -> None:
        self.taken: list[AnyArray] = []

    def act(self, obs: AnyArray) -> AnyArray:
        self.taken.append(np.array(super().act(obs)))
        return self.taken[-1]

    def actions(self) -> AnyArray:
        """(slots, T, ...), integers in the smallest dtype that holds them."""
        return _small(np.stack(self.taken, axis=1))


class _Again:
    """Does again what an ``ActionLog`` kept."""

    def __init__(self, actions: AnyArray) -> None:
        self.actions = actions

    def reset(self, n_env: int) -> None:
        self.clock = 0

    def act(self, obs: AnyArray) -> AnyArray:
        if self.clock == self.actions.shape[1]:
            raise RunError("these environments do not repeat their episodes")
        self.clock += 1
        return np.asarray(self.actions[:, self.clock - 1])

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Nothing to learn."""


def replay_rollouts(
    actions: AnyArray, returns: FloatArray, family: TaskFamily, tasks: AnyArray, *, seed: int
) -> Rollouts | None:
    """What ``record_rollouts`` recorded, from its ``actions`` (N * M, T, ...) and ``returns`` (N, M, E).

    None where the environments, with the same ``seed``, do not repeat their episodes.
    """
    _, rollouts, episodes = returns.shape
    if actions.ndim < 2 or len(actions) != len(tasks) * rollouts:
        return None
    size: Any = {"rollouts": rollouts, "episodes": episodes, "seed": seed}
    with suppress(CompressedADError):
        record = record_rollouts(_Again(actions), family, tasks, **size)
        if np.array_equal(record.returns, returns):
            return record
    return None


def _small(array: AnyArray) -> AnyArray:
    if array.dtype.kind not in "iu" or array.size == 0:
        return array
    return array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))


def random_rollouts(
    family: TaskFamily, tasks: AnyArray, *, rollouts: int, episodes: int, seed: int = 0
) -> Rollouts | None:
    """``record_rollouts`` of the uniformly random policy; None for a Box of actions without bounds."""
    space = family.action_space
    if isinstance(space, gymnasium.spaces.Box) and not space.is_bounded():
        return None
    agent = RandomAgent(space, seed)
    return record_rollouts(agent, family, tasks, rollouts=rollouts, episodes=episodes, seed=seed)


@dataclass(frozen=True)
class FirstReward:
    """When each rollout first got a reward above 0; if it never did, how long it explored.

    A rollout without a reward is censored: its time is only known to be longer. Every share counts it, and
    its ``times`` are infinite, so medians are right if half of the rollouts found a reward.
    """

    found: BoolArray  # (N, M)
    steps: IntArray  # (N, M) environment steps up to and including the one with the reward
    episodes: IntArray  # (N, M) number of the episode, from 1
    n_episode: int

    def times(self, unit: str = "steps") -> Floats:
        """(N, M) ``"steps"`` or ``"episodes"``, infinity where no reward was found."""
        return np.where(self.found, getattr(self, unit), np.inf)

    def median(self, unit: str = "steps") -> Floats:
        """(N,) median over each task's rollouts: the first time by which half of them had found a reward.

        Infinity where fewer than half found one.
        """
        return np.asarray(np.quantile(self.times(unit), 0.5, axis=1, method="inverted_cdf"))

    def found_by(self) -> Floats:
        """(N, E) share of each task's rollouts that had found a reward by the end of episode 1, ..., E.

        This is one minus the survival function of Kaplan and Meier (1958), which is a plain share because all
        rollouts are censored after the same E episodes.
        """
        by = self.times("episodes")[..., None] <= np.arange(1, self.n_episode + 1)
        return np.asarray(by.mean(axis=1))

    @property
    def never(self) -> BoolArray:
        """(N,) whether no rollout of a task found a reward."""
        return np.asarray(~self.found.any(axis=1))


def first_reward(record: Rollouts) -> FirstReward:
    met = (record.rewards > 0) & record.played
    found, step = np.asarray(met.any(axis=-1)), met.argmax(axis=-1)
    episode = np.take_along_axis(record.episode, step[..., None], axis=-1)[..., 0]
    return FirstReward(
        found=found,
        steps=np.where(found, step + 1, record.played.sum(axis=-1)),
        episodes=np.where(found, episode + 1, record.n_episode),
        n_episode=record.n_episode,
    )


def optimal_rollouts(family: TaskFamily, tasks: AnyArray) -> Rollouts | None:
    """One episode of the optimal policy on each of ``tasks`` (N, P); None if the family has none."""
    if not isinstance(family, OptimalPolicy):
        return None
    return record_rollouts(OptimalAgent(family, tasks), family, tasks, rollouts=1, episodes=1)


def shortest(family: TaskFamily, tasks: AnyArray) -> Floats | None:
    """(N,) length of the shortest path to the first reward of ``tasks`` (N, P); None if not known.

    On a grid, which is deterministic, the steps of the optimal policy: the distance of the goal, at least 1,
    or of the key, which pays first; infinity if an episode is too short. Elsewhere ``goal_distance``, if the
    family has it.
    """
    record = optimal_rollouts(family, tasks) if isinstance(family, Grid) else None
    if record is not None:
        return first_reward(record).times()[:, 0]
    if isinstance(family, GoalDistance):
        return np.maximum(np.asarray(family.goal_distance(tasks), np.float64), 1)
    return None


def rank_correlation(distance: FloatArray, times: FloatArray) -> float:
    """Spearman's correlation of ``distance`` (N,) with ``times`` (N, M) over all rollouts.

    Infinite times are the latest and equal. NaN where either does not vary.
    """
    first = scipy.stats.rankdata(np.broadcast_to(np.asarray(distance)[:, None], times.shape).ravel())
    second = scipy.stats.rankdata(times.ravel())
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def random_found_by(family: TaskFamily, tasks: AnyArray, episodes: int) -> Floats | None:
    """(N, E) exact probability that random actions have found a reward by the end of each episode.

    1 - (1 - h)^e, with h the probability within one episode, as episodes are independent. None for families
    without h (``random_found``).
    """
    if not isinstance(family, RandomFound):
        return None
    chance = np.asarray(family.random_found(tasks), np.float64)
    return np.asarray(1 - (1 - chance[:, None]) ** np.arange(1, episodes + 1))


def n_place(family: TaskFamily) -> int | None:
    """Number of distinct observations: the cells of a grid; None for other families."""
    return family.size**2 if isinstance(family, Grid) else None


def coverage(record: Rollouts, *, until_reward: bool = False) -> IntArray:
    """(N, M, E) distinct observations seen by the end of each episode, starts and last successors included.

    ``until_reward`` counts only the steps up to and including the one with the first reward: exploration,
    without the way to a known goal. The count is then constant in all later episodes.
    """
    shape = record.rewards.shape
    n_row, n_step = shape[0] * shape[1], shape[2]
    counted = record.played
    if until_reward:
        counted = counted & (np.arange(n_step) < first_reward(record).steps[..., None])
    # Observation and successor of every step, in time order: (rows, T, 2, features).
    seen = np.stack([record.observations, record.successors], axis=3).reshape(n_row, n_step, 2, -1)
    _, place = np.unique(seen.reshape(n_row * n_step * 2, -1), axis=0, return_inverse=True)
    key = place.reshape(n_row, -1) + np.arange(n_row)[:, None] * (int(place.max()) + 1)
    views = np.flatnonzero(np.repeat(counted.reshape(n_row, n_step), 2, axis=1))
    _, first = np.unique(key.ravel()[views], return_index=True)
    new = np.bincount(views[first] // 2, minlength=n_row * n_step).reshape(shape)
    return np.cumsum(record._by_episode(new), axis=-1).astype(np.int64)
