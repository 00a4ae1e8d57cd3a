"""Rooms that change and change back: by hand, against every action sequence, and by counting."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.evaluate import evaluate_references
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.bandit import NormalPosterior
from compressed_ad.tasks.base import OptimalPolicy, ReferencePolicies, RewardFunction, SuccessorTable
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.gridworld import KeyToDoor
from compressed_ad.tasks.switching import (
    DarkroomSwitching,
    KeyToDoorSwitching,
    SwitchingBandit,
    switching_value,
)

STAY, UP, DOWN, LEFT, RIGHT = range(5)


ROOMS = [
    DarkroomSwitching(),
    DarkroomSwitching(2, 3, 2, 1, 10),
    KeyToDoorSwitching(),
    KeyToDoorSwitching(2, 4, 2, 1, 9),
]


@pytest.mark.parametrize("family", ROOMS, ids=repr)
def test_it_keeps_the_promises_of_a_family(family: DarkroomSwitching | KeyToDoorSwitching) -> None:
    assert family_problems(family) == []
    assert isinstance(family, SuccessorTable)
    assert not isinstance(family, OptimalPolicy | RewardFunction)  # what is seen does not say which goal pays
    assert len(np.unique(family.tasks(), axis=0)) == family.n_task


def test_goals_take_turns_in_the_order_of_the_task() -> None:
    family = DarkroomSwitching(3, 2, 3, 2)
    env = family.make(np.array([[1, 2, 0, 1, 1, 0], [2, 1, 2, 1, 1, 2]]), np.array([0, 1]))
    env.reset()
    paid = []
    for _ in range(14):
        first, second = env.step(np.array([UP, RIGHT])), env.step(np.array([STAY, STAY]))
        np.testing.assert_array_equal(first.reward, second.reward)
        assert second.truncated.all() and not first.truncated.any()
        paid.append(second.reward.tolist())
    first_goal, second_goals = [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(np.transpose(paid), [(x * 3)[:14] for x in (first_goal, second_goals)])


def test_returns_are_exact_over_all_action_sequences_of_a_cycle() -> None:
    family = DarkroomSwitching(2, 2, 2, 1, 16)
    actions = np.array(list(product(range(5), repeat=4)))
    for task in family.tasks():
        env = family.make(np.tile(task, (len(actions), 1)), np.zeros(len(actions), int))
        env.reset()
        total = np.sum([env.step(column).reward for column in actions.T], axis=0) / 2
        assert family.optimal_return(task[None])[0] == total.max()
        assert family.random_return(task[None])[0] == pytest.approx(total.mean(), abs=1e-5)


def test_keys_take_turns_and_the_door_stays() -> None:
    """Two keys, right and left of the centre of a 3x3 room, two episodes each; the centre is the door."""
    family = KeyToDoorSwitching(3, 4, 2, 2)
    env = family.make(np.array([[2, 1, 0, 1, 1, 1]]), np.array([0]))
    env.reset()
    paid = []
    for _ in range(5):
        steps = [env.step(np.array([RIGHT])), env.step(np.array([LEFT]))]
        if not steps[-1].terminated[0]:  # the key was to the left
            steps += [env.step(np.array([LEFT])), env.step(np.array([RIGHT]))]
        assert steps[-1].terminated[0] and not any(step.terminated[0] for step in steps[:-1])
        paid.append([float(step.reward[0]) for step in steps])
    right, left = [1.0, 1.0], [0.0, 0.0, 1.0, 1.0]
    assert paid == [right, right, left, left, right]


def test_the_returns_of_moving_keys_are_means_over_rooms_with_one_key() -> None:
    family, room = KeyToDoorSwitching(3, 5, 3, 1, 40), KeyToDoor(3, 5)
    for task in family.tasks():
        pairs = np.array([[*task[k : k + 2], *task[-2:]] for k in (0, 2, 4)])
        assert family.optimal_return(task[None])[0] == room.optimal_return(pairs).mean()
        assert family.random_return(task[None])[0] == pytest.approx(room.random_return(pairs).mean())


@pytest.mark.parametrize("memory", [None, 0, 1, 4, 5, 9])
def test_the_worth_of_memory_is_what_counting_gives(memory: int | None) -> None:
    """Three goals, two episodes each: a goal's last turn ended four episodes before its next one."""
    worth, found = [0.1, 0.3, 0.6, 0.8, 1.0], []
    last, known = dict[int, int](), dict[int, int]()
    for episode in range(20):
        goal = episode // 2 % 3
        remembered = goal in last and (memory is None or episode - last[goal] <= memory)
        known[goal] = known[goal] + 1 if remembered else 0
        last[goal] = episode
        found.append(worth[min(known[goal], 4)])
    np.testing.assert_array_equal(switching_value(worth, 3, 2, 20, memory), found)


# ---------------------------------------------------------------- the bandit


def test_the_bandit_keeps_the_promises_of_a_family() -> None:
    family = SwitchingBandit(n_arm=3, n_task=20)
    assert family_problems(family) == []
    assert not isinstance(family, OptimalPolicy) and isinstance(family, ReferencePolicies)
    sets = family.tasks().reshape(20, 3, 3)
    np.testing.assert_allclose(family.optimal_return(family.tasks()), sets.max(2).mean(1))
    np.testing.assert_allclose(family.random_return(family.tasks()), sets.mean((1, 2)))
    np.testing.assert_array_equal(SwitchingBandit(n_arm=3, n_task=30).tasks()[:20], family.tasks())


def test_sets_of_means_take_turns() -> None:
    family = SwitchingBandit(n_arm=2, n_set=2, period=3, sigma=1e-6)
    env = family.make(np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]), np.array([0, 1]))
    env.reset()
    paid = np.stack([env.step(np.array([0, 1])).reward for _ in range(8)])
    np.testing.assert_allclose(paid[:, 0], [0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.1, 0.1], atol=1e-4)
    np.testing.assert_allclose(paid[:, 1], [0.6, 0.6, 0.6, 0.8, 0.8, 0.8, 0.6, 0.6], atol=1e-4)


def test_a_pull_counts_by_its_share() -> None:
    """Two halves are a whole; none is nothing."""
    whole, halves = NormalPosterior(3, 0.2, 0.5, 0.3), NormalPosterior(3, 0.2, 0.5, 0.3)
    arms, rewards = np.array([0, 2]), np.array([0.9, 0.1])
    for posterior in (whole, halves):
        posterior.reset(2)
    whole.update(arms, rewards)
    for share in (np.array([0.5, 0.5]), 0.5, 0.0):
        halves.update(arms, rewards, share)
    np.testing.assert_allclose(halves.mean, whole.mean)
    np.testing.assert_allclose(halves.spread, whole.spread)


def test_thompson_notices_changes_and_remembers_what_starting_anew_forgets() -> None:
    """Regret of the second cycle: 50 tasks, standard errors of some 7 per cent."""
    family = SwitchingBandit(n_arm=6, n_set=2, period=25, n_task=50)
    tasks = family.tasks()
    best = np.repeat(np.tile(tasks.reshape(50, 2, 6).max(2), (1, 2)), 25, axis=1)
    regret = {
        name: (best[:, None] - returns).mean((0, 1)).reshape(2, 50).sum(1)
        for name, returns in evaluate_references(family, tasks, rollouts=1, episodes=100).items()
    }
    remembers, anew = regret.values()
    assert remembers[1] < 0.6 * anew[1]
    assert anew[1] == pytest.approx(anew[0], rel=0.3)


def test_the_learner_thompson_records_what_the_reference_plays() -> None:
    family = SwitchingBandit(n_arm=4, n_task=8)
    assert check_learner(make_learner("thompson", {}), family, n_timesteps=60) == []


def test_wrong_tasks_and_parameters_are_named() -> None:
    with pytest.raises(UsageError, match=r"darkroom_switching: expected tasks of shape \(N, 6\)"):
        DarkroomSwitching().make(np.zeros((1, 2), int), np.array([0]))
    with pytest.raises(UsageError, match="n_goal must be a whole number between 2 and 100"):
        DarkroomSwitching(n_goal=1)
    with pytest.raises(UsageError, match=r"expected finite arm means \(N, 30\)"):
        SwitchingBandit().make(np.zeros((1, 10)), np.array([0]))
