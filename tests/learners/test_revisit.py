"""The learner that goes back: what it does by hand, that its records are exact, and what it earns."""

from __future__ import annotations

import numpy as np
import pytest

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.revisit import Revisit
from compressed_ad.tasks.bandit import BernoulliBandit
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.gridworld import Darkroom, DarkroomPermuted, KeyToDoor
from compressed_ad.tasks.recall import DarkroomRecall
from compressed_ad.tasks.switching import DarkroomSwitching
from compressed_ad.types import AnyArray, History


def learn(family: TaskFamily, tasks: AnyArray, n_timesteps: int, **kwargs: int) -> list[History]:
    return Revisit(**kwargs).learn(
        family, np.arange(len(tasks)), tasks, n_timesteps=n_timesteps, n_learner=4, n_stream=1, seed=0
    )


@pytest.mark.parametrize("family", [DarkroomSwitching(), DarkroomRecall(), Darkroom(3, 5)], ids=repr)
def test_it_keeps_the_promises_of_a_learner(family: TaskFamily) -> None:
    assert check_learner(Revisit(), family) == []


def test_it_returns_at_once_to_a_goal_that_is_back() -> None:
    """First cycle: a search at each move. Later: to the goal that was, then to those that were before."""
    family = DarkroomSwitching()
    tasks = family.tasks()[:60]
    rewards = np.stack([h.rewards for h in learn(family, tasks, 648)])
    earned = rewards.reshape(60, 4, 54, 12).sum(-1)
    best, random = family.optimal_return(tasks)[:, None, None], family.random_return(tasks)[:, None, None]
    first, second, third = ((earned - random) / (best - random)).mean((0, 1)).reshape(3, 18).mean(1)
    # The best agent without memory of the last turn earns at most .694: the docs of environments.
    assert first < 0.694 and second > 0.85 and third > 0.85


def test_it_notices_a_move_and_searches_the_known_places_first() -> None:
    """Goals left and right of the start, two episodes each, long after both were found."""
    family = DarkroomSwitching(3, 4, 2, 2, 10)
    history = learn(family, np.array([[0, 1, 2, 1]]), 4 * 40)[0]
    for stream in range(4):
        places = history.next_states[stream].reshape(40, 4, 2).tolist()
        assert places[-3] == [[0, 1]] * 4  # the second episode of the first goal: straight there
        assert places[-2] == [[0, 1], [1, 1], [2, 1], [2, 1]]  # moved: back to where the other one was
        assert places[-1] == [[2, 1]] * 4


def test_recorded_chances_are_those_of_equally_good_moves() -> None:
    """At the start all five moves lead to a place that was not tried; on a goal those that stay are good."""
    family = Darkroom(3, 6)
    tasks = family.tasks()
    for task, history in zip(tasks, learn(family, tasks, 180), strict=True):
        np.testing.assert_allclose(history.action_probs[:, 0], 0.2)
        assert history.entropy is not None
        np.testing.assert_allclose(history.entropy[:, 0], np.log(5), rtol=1e-6)
        found = (history.rewards.cumsum(1) - history.rewards) > 0
        on_goal = (history.states == task).all(-1) & found
        assert on_goal.any() and (history.next_states[on_goal] == task).all()
        stays = 1 + sum(x in (0, 2) for x in task.tolist())  # against a wall, too
        np.testing.assert_allclose(history.action_probs[on_goal], 1 / stays)
        assert (history.rewards[:, -6:].sum(1) == family.optimal_return(task[None])[0]).all()


def test_with_memory_it_learns_key_and_door() -> None:
    family = KeyToDoor(4, 20)
    histories = learn(family, family.tasks()[::17], 600, memory=1)
    for history in histories:
        ends = history.terminated | history.truncated
        last = np.cumsum(ends, axis=1) >= ends.sum(axis=1, keepdims=True) - 3
        assert (history.rewards * last).sum() >= 3 * 2 * 4


def test_families_that_it_cannot_learn_are_refused() -> None:
    for family, kind, why in (
        (BernoulliBandit(), SpaceError, "needs a successor_table"),
        (DarkroomPermuted(), UsageError, "must be the same in all tasks"),
    ):
        with pytest.raises(kind, match=why):
            Revisit().check(family, n_timesteps=1, n_stream=1)
