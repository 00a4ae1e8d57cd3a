"""Replays recorded actions in a task family, so that the outcome can be compared with the record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compressed_ad.seeding import rng
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import AnyArray, BoolArray, IntArray


@dataclass(frozen=True)
class Played:
    """The outcome of given actions, (S, T, ...)."""

    states: AnyArray
    rewards: AnyArray
    next_states: AnyArray
    terminated: BoolArray
    truncated: BoolArray

    @property
    def episode_end(self) -> BoolArray:
        """(S, T) True on the last step of an episode."""
        return self.terminated | self.truncated


def play(family: TaskFamily, tasks: AnyArray, actions: AnyArray, seed: int) -> Played:
    """The outcome of ``actions`` (S, T, ...) in slots of ``family`` with ``tasks`` (S, P)."""
    seeds = rng(seed, "replay").integers(2**31, size=len(tasks))
    env = checked_slots(family, tasks, seeds)
    obs, transitions = env.reset(), []
    for action in actions.swapaxes(0, 1):
        step = env.step(action)
        transitions.append((obs, step.reward, step.next_obs, step.terminated, step.truncated))
        obs = step.obs
    return Played(*(np.stack(arrays, axis=1) for arrays in zip(*transitions, strict=True)))


def differ(a: AnyArray, b: AnyArray) -> BoolArray:
    """(S, T) True where two arrays (S, T, ...) differ by more than rounding."""
    if a.shape != b.shape:
        return np.ones(a.shape[:2], bool)
    floats = "f" in (a.dtype.kind, b.dtype.kind)
    equal = np.asarray(np.isclose(a, b, rtol=1e-4, atol=1e-5) if floats else a == b)
    return ~np.asarray(equal.all(axis=tuple(range(2, equal.ndim))))


def episode_step(end: BoolArray) -> IntArray:
    """(S, T) number of each step within its episode, from 1; ``end`` (S, T) is True on last steps."""
    step = np.broadcast_to(np.arange(end.shape[1]), end.shape)
    start = np.zeros(end.shape, np.int64)
    start[:, 1:] = np.maximum.accumulate(np.where(end[:, :-1], step[:, 1:], 0), axis=1)
    return step - start + 1
