"""Markers: which steps of a learning history belong to a segment.

A marker is a pure function of arrays ``(..., T)``, one stream per leading index, to a mask (bool) of the same
shape. A **segment** is a maximal marked run, half-open ``[start, stop)``. Only masks are stored, so two
segments that touch would become one; markers that could produce touching segments (``rollout``,
``within_episode``) therefore leave the first step of the later one unmarked.

The guide's rule, ``threshold``, measures the confidence of the policy that acted. Whether a step is still
on-policy after learning depends on the later policy: ``policy_ratio`` compares the two.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compressed_ad.errors import ConfigError, MarkerError
from compressed_ad.registry import Registry, checked, takes
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Fraction, NonNegative, Positive
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray

Marker = Callable[..., BoolArray]

FIELD_OF = {
    **dict.fromkeys(("probs", "action_probs", "log_prob"), "action_probs"),
    **{name: name for name in ("log_prob_next", "entropy", "update", "rewards", "terminated", "truncated")},
    **{
        name: name
        for name in ("episode_end", "states", "actions", "next_states", "learner", "optimal_actions")
    },
}
"""Names of arguments that a marker gets from the history, and the field of ``History`` that holds each."""

MARKER: Registry[Marker] = Registry("marker", fits=takes(*FIELD_OF, some=True))


def segments(mask: ArrayLike) -> tuple[IntArray, IntArray, IntArray]:
    """Row, start and stop of every segment of ``mask`` (..., T), ordered by row and start.

    ``row`` counts the streams as ``mask.reshape(-1, T)`` does; a segment still open at the end stops at T.
    """
    rows = _rows(np.asarray(mask, dtype=bool))
    edges = np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    return row, start, np.nonzero(edges == -1)[1]


def borders(mask: ArrayLike) -> tuple[BoolArray, BoolArray]:
    """Where ``<compress>`` and ``\\compress>`` stand, two bool arrays shaped as ``mask`` (..., T).

    For a segment [s, e) the start is on s and the end on e, the first step after it. Steps before the first
    count as unmarked, and an end beyond the last step is not shown.
    """
    mask = np.asarray(mask, dtype=bool)
    before = np.zeros_like(mask)
    before[..., 1:] = mask[..., :-1]
    return mask & ~before, before & ~mask


def _rows(array: AnyArray) -> AnyArray:
    if array.ndim == 0:
        raise MarkerError("markers work on arrays (..., T); got a single number")
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def _paint(shape: tuple[int, ...], row: IntArray, start: IntArray, stop: IntArray) -> BoolArray:
    """The mask of segments sorted by row and start; one that touches its predecessor starts a step later."""
    start = start.copy()
    start[1:] += (row[1:] == row[:-1]) & (start[1:] == stop[:-1])
    change = np.zeros((int(np.prod(shape[:-1])), shape[-1] + 1), dtype=np.int8)
    change[row, start] += 1
    change[row, stop] -= 1
    mask: BoolArray = (np.cumsum(change[:, :-1], axis=1, dtype=np.int8) > 0).reshape(shape)
    return mask


def _long_runs(
    wanted: BoolArray,
    compression_window: int,
    within_episode: bool = False,
    episode_end: ArrayLike | None = None,
    causal: bool = False,
) -> BoolArray:
    """Maximal runs of ``wanted`` (..., T) of at least ``compression_window`` steps, as ``threshold`` says."""
    rows = _rows(wanted)
    joined = rows[:, 1:] & rows[:, :-1]
    if within_episode:
        if episode_end is None:
            raise ConfigError("within_episode: needs episode_end, True on the last step of every episode")
        joined &= ~_rows(np.broadcast_to(np.asarray(episode_end, dtype=bool), wanted.shape))[:, :-1]
    first, last = rows.copy(), rows.copy()
    first[:, 1:] &= ~joined
    last[:, :-1] &= ~joined
    row, start = np.nonzero(first)
    stop = np.nonzero(last)[1] + 1
    long = stop - start >= compression_window
    begin = start[long] + (compression_window - 1 if causal else 0)
    return _paint(wanted.shape, row[long], begin, stop[long])


# ---------------------------------------------------------------- markers


@MARKER.register("threshold")
@checked
def threshold(
    probs: ArrayLike,
    on_policy_threshold: Fraction = 0.7,
    compression_window: Count = 10,
    *,
    within_episode: bool = False,
    episode_end: ArrayLike | None = None,
    causal: bool = False,
) -> BoolArray:
    """The guide's rule: runs of at least ``compression_window`` steps with ``probs >= on_policy_threshold``.

    Runs are maximal, and one that is open at the last step counts. ``within_episode`` cuts them at
    ``episode_end`` (..., T); without it a segment may cross episode ends, as in the guide. With ``causal`` a
    segment [s, e) begins where its evidence is complete, at ``s + compression_window - 1``, so that the
    marking of a prefix is a prefix of the marking.
    """
    wanted = without_nan("probs", probs) >= on_policy_threshold
    return _long_runs(wanted, compression_window, within_episode, episode_end, causal)


@MARKER.register("high_confidence")
@checked
def high_confidence(probs: ArrayLike, on_policy_threshold: Fraction = 0.95) -> BoolArray:
    """Every step with ``probs > on_policy_threshold``, without a minimum run (the guide's custom example)."""
    mask: BoolArray = without_nan("probs", probs) > on_policy_threshold
    return mask


@MARKER.register("rising_confidence")
@checked
def rising_confidence(
    probs: ArrayLike, on_policy_threshold: Fraction = 0.7, *, causal: bool = False
) -> BoolArray:
    """Steps with ``probs > on_policy_threshold`` and a rising ``probs`` (the guide's custom example).

    The slope is ``numpy.gradient``, whose central difference looks one step ahead; ``causal`` takes the
    difference to the step before instead. The slope of a stream of one step, and the first causal one, is 0.
    """
    values = without_nan("probs", probs)
    if causal:
        slope = np.diff(values, axis=-1, prepend=values[..., :1])
    else:
        slope = np.gradient(values, axis=-1) if values.shape[-1] > 1 else np.zeros_like(values)
    mask: BoolArray = (values > on_policy_threshold) & (slope > 0)
    return mask


@MARKER.register("policy_ratio")
@checked
def policy_ratio(
    log_prob: ArrayLike,
    log_prob_next: ArrayLike,
    clip_range: Positive = 0.2,
    compression_window: Count = 10,
    *,
    within_episode: bool = False,
    episode_end: ArrayLike | None = None,
) -> BoolArray:
    """Runs on which the update that used the steps kept PPO's ratio within the clip range.

    ``|exp(log_prob_next - log_prob) - 1| <= clip_range`` (Schulman et al. 2017, section 3), for at least
    ``compression_window`` steps; both log-probabilities (nats) must be of the same kind, which the relative
    probabilities of continuous actions are not. There is no causal form: the ratio is known after the update.
    """
    old, new = without_nan("log_prob", log_prob), without_nan("log_prob_next", log_prob_next)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = np.abs(np.exp(new - old) - 1) <= clip_range
    return _long_runs(wanted, compression_window, within_episode, episode_end)


@MARKER.register("low_entropy")
@checked
def low_entropy(
    entropy: ArrayLike,
    max_entropy: float = 0.61,
    compression_window: Count = 10,
    *,
    within_episode: bool = False,
    episode_end: ArrayLike | None = None,
    causal: bool = False,
) -> BoolArray:
    """Runs of at least ``compression_window`` steps whose policy entropy (nats) is at most ``max_entropy``.

    The default is the entropy of a choice between two actions at 0.7 and 0.3.
    """
    wanted = without_nan("entropy", entropy) <= max_entropy
    return _long_runs(wanted, compression_window, within_episode, episode_end, causal)


@MARKER.register("rollout")
def rollout(update: ArrayLike) -> BoolArray:
    """Each source update is a segment: all its steps but the first, which ends the update before.

    So ``\\compress>`` stands on the first step of a new policy and ``<compress>`` on its second.
    """
    update = np.asarray(update)
    mask = np.zeros(update.shape, dtype=bool)
    mask[..., 1:] = update[..., 1:] == update[..., :-1]
    return mask


@MARKER.register("none")
def nothing(update: ArrayLike) -> BoolArray:
    """No step is marked: CompressedAD then sees exactly what AD sees."""
    return np.zeros(np.shape(update), dtype=bool)


@MARKER.register("all")
def everything(update: ArrayLike) -> BoolArray:
    """Every step: one segment, from the first step on."""
    return np.ones(np.shape(update), dtype=bool)


# ---------------------------------------------------------------- controls


def _control(rearranged: Callable[..., BoolArray]) -> Marker:
    """A marker that rearranges the mask of ``threshold``, with the parameters of both."""
    whole, more = inspect.signature(threshold).parameters, inspect.signature(rearranged).parameters
    probs, *others = whole.values()
    parameters = [probs, *list(more.values())[1:], *others]
    signature = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))

    @functools.wraps(rearranged)
    def marker(*args: Any, **kwargs: Any) -> BoolArray:
        given = signature.bind(*args, **kwargs).arguments
        mask = threshold(**{name: given.pop(name) for name in whole if name in given})
        return rearranged(mask, **given)

    marker.__signature__ = signature  # type: ignore[attr-defined]
    return checked(marker)


@MARKER.register("random")
@_control
def random(mask: BoolArray, *, seed: int = 0) -> BoolArray:
    """Control: the segments of ``threshold``, in number and lengths, at random places of the same stream.

    All orders of the segments and all ways to place them without touching are equally likely.
    """
    row, start, stop = segments(mask)
    length = stop - start
    draw = rng(seed, "marker", "random")
    for ids in _by_row(row):
        count, lengths = len(ids), draw.permutation(length[ids])
        # Stars and bars: choosing which of slack + count places are segments gives every placement once.
        slack = mask.shape[-1] - lengths.sum() - (count - 1)
        place = np.sort(draw.choice(slack + count, size=count, replace=False)) - np.arange(count)
        start[ids] = place + np.cumsum(lengths) - lengths + np.arange(count)
        length[ids] = lengths
    return _paint(mask.shape, row, start, start + length)


@MARKER.register("shuffled")
@_control
def shuffled(mask: BoolArray, *, seed: int = 0) -> BoolArray:
    """Control: every stream gets the ``threshold`` mask of another stream (axis -2) of the same task.

    Each mask is used once, and none by its own stream. ``MarkerError`` if there is only one stream.
    """
    if mask.ndim < 2 or mask.shape[-2] < 2:
        raise MarkerError("needs at least two streams per task; use 'random' instead")
    order = rng(seed, "marker", "shuffled").permutation(mask.shape[-2])
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)
    return mask[..., source, :]


@MARKER.register("reward_matched")
@_control
def reward_matched(
    mask: BoolArray,
    rewards: ArrayLike,
    *,
    reward_tolerance: NonNegative = 0.05,
    sweeps: Count = 4,
    seed: int = 0,
) -> BoolArray:
    """Control: the segments of ``threshold`` moved to random places of equal length and equal mean reward.

    Matching: each segment keeps its length, stays in its stream, and its mean reward per step differs by at
    most ``reward_tolerance`` from that of the ``threshold`` segment that it replaces. Starting from the
    ``threshold`` segments, every segment in turn (random order, ``sweeps`` times) is moved to a place drawn
    uniformly from all places that fulfil this and touch no other segment. Its old place is among them, so a
    match always exists. Where marked steps fill a stream, segments can only slide.
    """
    reward_rows = _rows(without_nan("rewards", rewards)).astype(np.float64)
    if reward_rows.shape != _rows(mask).shape:
        raise MarkerError(f"rewards: expected {mask.shape} as probs have, got {np.shape(rewards)}")
    row, start, stop = segments(mask)
    draw = rng(seed, "marker", "reward_matched")
    cumulative = np.pad(np.cumsum(reward_rows, axis=1), ((0, 0), (1, 0)))
    for ids in _by_row(row):
        total = cumulative[row[ids[0]]]
        goal = (total[stop[ids]] - total[start[ids]]) / (stop[ids] - start[ids])
        blocked = np.zeros(len(total) + 1, dtype=np.int64)  # steps -1 ... T - 1, widened by one for touching
        for k in ids:
            blocked[start[k] : stop[k] + 2] += 1
        for i in itertools.chain.from_iterable(draw.permutation(len(ids)) for _ in range(sweeps)):
            k = ids[i]
            length = stop[k] - start[k]
            blocked[start[k] : stop[k] + 2] -= 1
            used = np.concatenate([[0], np.cumsum(blocked[1:-1] > 0)])
            free = used[length:] == used[:-length]
            # Rounding of the cumulative sums must not exclude the place where the segment already is.
            near = np.abs((total[length:] - total[:-length]) / length - goal[i]) <= reward_tolerance + 1e-9
            place = int(draw.choice(np.nonzero(free & near)[0]))
            start[k], stop[k] = place, place + length
            blocked[place : place + length + 2] += 1
    order = np.lexsort((start, row))
    return _paint(mask.shape, row[order], start[order], stop[order])


def _by_row(row: IntArray) -> list[IntArray]:
    """Index arrays of the segments of each stream that has any."""
    return [ids for ids in np.split(np.arange(len(row)), np.nonzero(np.diff(row))[0] + 1) if len(ids)]


def without_nan(name: str, values: ArrayLike) -> FloatArray:
    """``values`` as a float array; ``MarkerError`` says where the first NaN is, which stands for unknown."""
    array: FloatArray = np.asarray(values)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    unknown = np.isnan(array)
    if unknown.any():
        place = np.argwhere(unknown)[0].tolist()
        raise MarkerError(
            f"{name}: {unknown.sum()} of {array.size} values are unknown (NaN), the first at {place}; "
            "collect with a source algorithm that records them, or choose a marker that does not need them"
        )
    return array
