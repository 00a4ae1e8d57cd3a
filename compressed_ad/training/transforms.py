"""History transforms: pure functions, found by name, between the stored histories and the windows.

A transform takes ``Sequences`` and a ``Context`` and returns ``Sequences``. It draws random numbers from the
context's generator only. Masks and update numbers stay with their steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from gymnasium.spaces import Box

from compressed_ad.errors import ConfigError, HistoryError, UsageError, users_code
from compressed_ad.registry import Parameters, Registry, checked, takes
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Fraction, Whole
from compressed_ad.tasks.base import RewardFunction, TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.training.sequences import Episodes, Sequences, TaskRows
from compressed_ad.training.stitching import prolonged, stitched
from compressed_ad.types import AnyArray, BoolArray, IntArray


@dataclass(frozen=True)
class Context:
    """What a transform may use besides the sequences."""

    random: np.random.Generator
    family: TaskFamily | None = None
    tasks: TaskRows | None = None  # parameters of the sequences' tasks: ``context.tasks[sequences.task]``


Transform = Callable[..., Sequences]
TRANSFORM: Registry[Transform] = Registry("history transform", fits=takes("sequences", "context"))
DEPARTURES = {  # from pure Algorithm Distillation, in words for the report
    "stitch": "uses the training tasks' reward function: before a task's goal is first met, its context shows"
    " episodes of other training tasks' learners with rewards recomputed for the task",
    "prolong": "puts fruitless episodes of other streams of the same task before each sequence",
}


@TRANSFORM.register("first_updates")
@checked
def first_updates(sequences: Sequences, context: Context, *, n: Count) -> Sequences:
    """Keep the steps taken by the first ``n`` versions of each source policy."""
    return _keep_steps(sequences, sequences.update < n)


@TRANSFORM.register("streams")
@checked
def streams(sequences: Sequences, context: Context, *, n: Count) -> Sequences:
    """Keep the first ``n`` streams of each learner."""
    key = sequences.task * (sequences.learner.max() + 1) + sequences.learner
    order = np.argsort(key, kind="stable")
    rank = np.empty(len(key), np.int64)
    rank[order] = np.arange(len(key)) - np.searchsorted(key[order], key[order])
    return _keep_steps(sequences, np.repeat(rank < n, sequences.lengths))


@TRANSFORM.register("tasks")
@checked
def tasks(sequences: Sequences, context: Context, *, share: Fraction) -> Sequences:
    """Keep the histories of a random ``share`` of the tasks, at least one."""
    known = np.unique(sequences.task)
    chosen = context.random.permutation(known)[: max(1, round(share * len(known)))]
    return _keep_steps(sequences, np.repeat(np.isin(sequences.task, chosen), sequences.lengths))


@TRANSFORM.register("subsample")
@checked
def subsample(
    sequences: Sequences,
    context: Context,
    *,
    every: Count | Annotated[list[Count], MinLen(1)],
    copies: Count = 1,
    keep_first_reward: bool = True,
) -> Sequences:
    """Keep one episode, drawn at random, of each group of consecutive ones; ``every`` is a group's size.

    A context of a given length then spans ``every`` times as much of the source's learning (Laskin et al.
    2022, section 4.3). With ``keep_first_reward`` the episode in which a stream first met a reward is the one
    kept of its group. Otherwise a context could show a policy that improves without the evidence that made
    it improve. Each sequence is drawn ``copies`` times, for each stride if ``every`` is a list: the model
    then cannot tell the progress of a history from its position. Incomplete last episodes are dropped.
    """
    strides = [every] if isinstance(every, int) else every
    episodes, random = sequences.episodes, context.random

    def grouping(stride: int) -> _Grouping:
        phase = random.integers(stride, size=len(sequences))
        return lambda of, _, some: (some.ordinal + phase[of][some.sequence]) // stride

    groupings = [partial(grouping, stride) for stride in strides * copies]
    return _one_of_each(sequences, groupings, _first_rewarded(episodes) & keep_first_reward, random)


@TRANSFORM.register("thin")
@checked
def thin(
    sequences: Sequences,
    context: Context,
    *,
    marked_every: Whole,
    unmarked_every: Whole,
    copies: Count = 1,
    least: Fraction = 0.5,
    keep_first_reward: bool = True,
) -> Sequences:
    """``subsample`` with one stride for marked episodes and another for unmarked ones.

    An episode is marked if at least the share ``least`` of its steps is. One episode is kept of every
    ``marked_every`` marked or ``unmarked_every`` unmarked ones, in proportion where they alternate; a stride
    of 0 drops all of that kind. The context then spends its length on the phases that the strides favour
    instead of on equal parts of the source's time. ``copies`` and ``keep_first_reward`` as in ``subsample``:
    the first rewarded episode is kept whether it is marked or not.
    """
    if marked_every == unmarked_every == 0:
        raise UsageError("thin: marked_every and unmarked_every are both 0, so nothing would be left")
    episodes, n_seq = sequences.episodes, len(sequences)
    keep = _first_rewarded(episodes) & keep_first_reward
    marked = np.add.reduceat(sequences.mask, episodes.start, dtype=np.int64) >= least * episodes.length
    stride = np.where(marked, marked_every, unmarked_every)
    dropped = (stride == 0) & ~keep
    rate = np.where(stride == 0, 0.0, 1 / np.maximum(stride, 1))
    passed = np.cumsum(rate) - rate
    since = passed - passed[episodes.first[:-1]][episodes.sequence]

    def grouping() -> _Grouping:
        phase = context.random.random(n_seq)
        return lambda of, rows, some: np.where(
            dropped[rows], -1, np.floor(since[rows] + phase[of][some.sequence]).astype(int)
        )

    return _one_of_each(sequences, [grouping] * copies, keep, context.random)


def _first_rewarded(episodes: Episodes) -> BoolArray:
    """(K,) the first rewarded episode of each sequence."""
    first = np.zeros(len(episodes.rewarded), bool)
    rows = np.flatnonzero(episodes.rewarded)
    begin, end = np.searchsorted(rows, (episodes.first[:-1], episodes.first[1:]))
    first[rows[begin[begin < end]]] = True
    return first


_Grouping = Callable[[slice, slice, Episodes], IntArray]
"""The group of each of some episodes; it is given what ``Episodes.parts`` gives."""


def _one_of_each(
    sequences: Sequences,
    groupings: Sequence[Callable[[], _Grouping]],
    preferred: BoolArray,
    random: np.random.Generator,
) -> Sequences:
    """For each grouping of the episodes (K,), new sequences of one complete episode per group.

    The episode is drawn at random, from the preferred ones if the group has any. Group -1 is left out.
    Each grouping is made when its turn comes, so that its random numbers and those of the choice alternate.
    """
    n_seq = len(sequences)

    def chosen() -> Iterator[tuple[IntArray, IntArray]]:
        for copy, new_grouping in enumerate(groupings):
            grouping = new_grouping()
            for of, part, some in sequences.episodes.parts():
                group, sequence = grouping(of, part, some), some.sequence
                priority = random.random(len(group)) + 2.0 * preferred[part]
                order = np.lexsort((-priority, group, sequence))
                order = order[some.complete[order] & (group[order] >= 0)]
                key = sequence[order] * (group.max(initial=0) + 1) + group[order]
                rows = order[np.unique(key, return_index=True)[1]]
                yield part.start + rows, copy * n_seq + of.start + sequence[rows]

    source = np.tile(np.arange(n_seq), len(groupings))
    return sequences.take_blocks(chosen(), len(source), source)


@TRANSFORM.register("stitch")
@checked
def stitch(
    sequences: Sequences,
    context: Context,
    *,
    candidates: Count = 16,
    longest: Count = 20,
    late: Fraction = 1.0,
    skill: Fraction = 0.7,
) -> Sequences:
    """Before the task's goal is first met, show episodes of other training tasks' learners instead.

    For each sequence, episodes are drawn from the last ``late`` share of sequences of other tasks, with
    rewards recomputed for this sequence's task, until one of them is rewarded. The sequence then continues
    with its original episodes, from the first that earns the share ``skill`` of its best. Of ``candidates``
    drawn episodes, the one with most unseen observations is shown. A sequence ends after ``longest``
    episodes without a reward, or after the search if its original episodes never met one. Needs the family's
    reward function and Discrete or MultiDiscrete observations.
    """
    family, tasks = context.family, context.tasks
    if not isinstance(family, RewardFunction) or tasks is None:
        raise UsageError("stitch needs a task family with a reward function (`reward`)")
    return stitched(sequences, context.random, family, tasks, candidates, longest, late, skill)


@TRANSFORM.register("prolong")
@checked
def prolong(
    sequences: Sequences,
    context: Context,
    *,
    longest: Whole = 10,
    candidates: Count = 16,
    rewarded: bool = False,
) -> Sequences:
    """Begin each sequence with up to ``longest`` episodes of the same task that met no reward.

    Streams that share a policy meet the reward within a few episodes of each other, so a model never sees a
    long search and does not learn to continue one. For each sequence a number from 0 to ``longest`` is drawn,
    and that many unmarked, unrewarded episodes of any stream of its task are put before its first episode.
    Of ``candidates`` drawn episodes, the one with most unseen observations is taken, so that the search is
    directed. No reward is recomputed and no other task is shown. ``rewarded`` also draws rewarded episodes,
    as a control. Needs Discrete or MultiDiscrete observations.
    """
    episodes = sequences.episodes
    marked = np.maximum.reduceat(sequences.mask, episodes.start)
    pool = np.flatnonzero(episodes.complete & (rewarded | ~(episodes.rewarded | marked)))
    return prolonged(sequences, context.random, pool, candidates, longest)


def check_episodes(
    transforms: Sequence[tuple[str, Mapping[str, Any]]], family: TaskFamily, tasks: AnyArray, n_timesteps: int
) -> None:
    """``UsageError`` if a transform keeps complete episodes, and histories are too short to hold any.

    Where the horizon is longer than a history, random actions on some of ``tasks`` (N, P) show whether
    episodes end before it.
    """
    needing = [name for name, _ in transforms if name in ("subsample", "thin")]
    space = family.action_space
    if not needing or n_timesteps >= family.horizon or (isinstance(space, Box) and not space.is_bounded()):
        return
    slots, random = np.resize(tasks, (32, tasks.shape[1])), rng(0, "episodes")
    env, actions = checked_slots(family, slots, random.integers(2**31, size=32)), UniformActions(space)
    env.reset()
    for _ in range(n_timesteps):
        step = env.step(actions.draw(random, len(slots)))
        if step.ended.any():
            return
    raise UsageError(
        f"{needing[0]} keeps complete episodes, but none of {family.name} ends within the {n_timesteps} steps"
        f" of a history; raise n_timesteps to the horizon, {family.horizon}, or leave {needing[0]} out"
    )


def apply_transforms(
    sequences: Sequences,
    transforms: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    seed: int,
    family: TaskFamily | None = None,
    tasks: AnyArray | None = None,
) -> Sequences:
    """Apply named transforms in order; the k-th draws from ``rng(seed, "transform", k)``.

    Of ``tasks`` (N, P), the parameters by index in the history file, they see those of ``sequences`` only.
    """
    ids = np.unique(sequences.task)
    known = None if tasks is None else TaskRows(ids, tasks[ids])
    for k, (name, transform, params) in enumerate(check_transforms(transforms)):
        with users_code(f"transform {name!r}"):
            sequences = transform(sequences, Context(rng(seed, "transform", k), family, known), **params)
        if not isinstance(sequences, Sequences):
            raise HistoryError(f"transform {name!r} must return Sequences, not a {type(sequences).__name__}")
        if len(sequences) == 0:
            raise HistoryError(f"the history transform {name!r} left no transition")
    return sequences


def check_transforms(
    transforms: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Transform, dict[str, Any]]]:
    """Names, functions and validated parameters of ``transforms``; ``ConfigError`` lists all wrong ones."""
    steps, found = [], []
    for name, params in transforms:
        transform = TRANSFORM[name]
        handed = list(inspect.signature(transform).parameters)[:2]  # the sequences and the context
        values, mistakes = Parameters(transform, handed).complete(params)
        found += [problem.within(f"transform {name}") for problem in mistakes]
        steps.append((name, transform, values))
    if found:
        raise ConfigError(found)
    return steps


def departures(names: Sequence[str]) -> list[str]:
    """In words: where these transforms depart from pure Algorithm Distillation."""
    return [f"{name} {DEPARTURES[name]}" for name in names if name in DEPARTURES]


def _keep_steps(sequences: Sequences, keep: BoolArray) -> Sequences:
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    lengths = np.add.reduceat(keep, sequences.offsets[:-1], dtype=np.int64)
    return sequences.runs(edges[::2], edges[1::2] - edges[::2], lengths, sequences.task, sequences.learner)
