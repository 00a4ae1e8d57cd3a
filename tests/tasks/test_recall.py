"""The room of cues: by hand, against every action sequence, and what memory is worth by counting."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.agents import OptimalAgent
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.base import OptimalPolicy, RewardFunction, SuccessorTable
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.recall import DarkroomRecall, recall_value

STAY, UP, DOWN, LEFT, RIGHT = range(5)
BOUND = (0.2404, 0.6651, 0.9941, 1.0)  # of find_limit(Darkroom(5, 10))


@pytest.mark.parametrize("family", [DarkroomRecall(), DarkroomRecall(2, 3, 3, 20)], ids=repr)
def test_it_keeps_the_promises_of_a_family(family: DarkroomRecall) -> None:
    assert family_problems(family) == []
    assert all(isinstance(family, kind) for kind in (OptimalPolicy, RewardFunction, SuccessorTable))
    more = DarkroomRecall(family.size, family.horizon, family.n_cue, family.n_task + 4)
    np.testing.assert_array_equal(more.tasks()[: family.n_task], family.tasks())
    assert len(np.unique(family.tasks(), axis=0)) == family.n_task


def test_each_cue_has_its_own_goal_and_pays_for_every_step_on_it() -> None:
    family = DarkroomRecall(3, 3, 2, 10)
    env = family.make(np.array([[1, 2, 0, 1]]), np.array([0]))  # cue 0: up; cue 1: left
    obs = env.reset()
    for _ in range(6):
        cue = int(obs[0, 0])
        assert obs.tolist() == [[cue, 1, 1]]
        right, wrong = (UP, LEFT) if cue == 0 else (LEFT, UP)
        steps = [env.step(np.array([move])) for move in (right, STAY, wrong)]
        assert [s.reward[0] for s in steps] == [1, 1, 0]
        assert [bool(s.truncated[0]) for s in steps] == [False, False, True]
        assert steps[-1].next_obs.tolist() == [[cue, 0, 2]]
        obs = steps[-1].obs


def test_returns_are_exact_over_all_action_sequences_of_a_block() -> None:
    """Both cues come once in a block of two episodes, in either order."""
    family = DarkroomRecall(2, 2, 2, 8)
    actions = np.array(list(product(range(5), repeat=4)))
    for i, task in enumerate(family.tasks()):
        env = family.make(np.tile(task, (len(actions), 1)), np.full(len(actions), i))
        env.reset()
        total = np.mean([env.step(column).reward * 2 for column in actions.T], axis=0)
        assert family.optimal_return(task[None])[0] == total.max()
        assert family.random_return(task[None])[0] == pytest.approx(total.mean(), abs=1e-5)


def test_the_optimal_agent_earns_the_optimal_return_in_every_block() -> None:
    family = DarkroomRecall()
    tasks = family.tasks()[:20]
    returns = evaluate_tasks(OptimalAgent(family, tasks), family, tasks, rollouts=2, episodes=18)
    blocks = returns.reshape(20, 2, 3, 6).mean(-1)
    np.testing.assert_allclose(
        blocks, np.broadcast_to(family.optimal_return(tasks)[:, None, None], (20, 2, 3))
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
def test_every_block_shows_each_cue_once_in_an_order_of_the_slots_own_seed(k: int, seeds: list[int]) -> None:
    family = DarkroomRecall(2, 1, k, 10)

    def shown(seeds: list[int]) -> np.ndarray:
        env = family.make(family.tasks()[np.zeros(len(seeds), int)], np.array(seeds))
        still = np.zeros(len(seeds), int)
        return np.stack([env.reset()[:, 0], *(env.step(still).obs[:, 0] for _ in range(3 * k - 1))])

    cues = shown(seeds)
    assert (np.sort(cues.reshape(3, k, -1), axis=1) == np.arange(k)[:, None]).all()
    for i, seed in enumerate(seeds):
        np.testing.assert_array_equal(shown([seed])[:, 0], cues[:, i])


def test_rmax_learns_every_goal_and_recalls_it() -> None:
    """Near the limit, which it cannot exceed but by luck: the standard errors are about .01."""
    family = DarkroomRecall()
    ids = np.arange(60)
    tasks = family.tasks()[ids]
    learner = make_learner("rmax", {"epsilon": 0.0, "epsilon_final": 0.0})
    histories = learner.learn(family, ids, tasks, n_timesteps=420, n_learner=4, n_stream=1, seed=0)
    earned = np.stack([h.rewards for h in histories]).reshape(60, 4, 42, 10).sum(-1)
    best, random = family.optimal_return(tasks)[:, None, None], family.random_return(tasks)[:, None, None]
    curve = ((earned - random) / (best - random)).mean((0, 1))
    limit = recall_value(BOUND, 6, 42)
    assert curve.mean() > 0.9 * limit.mean()
    assert (curve.reshape(7, 6).mean(1) < limit.reshape(7, 6).mean(1) + 0.04).all()
    assert curve[-6:].mean() > 0.98


@pytest.mark.parametrize("memory", [None, 0, 1, 2, 3, 4, 5])
def test_the_worth_of_memory_is_that_of_all_orders(memory: int | None) -> None:
    """Three cues, four blocks: the mean over all 6**4 orders, counted episode by episode."""
    worth, total = np.array([0.1, 0.5, 0.8, 1.0]), np.zeros(12)
    for blocks in product(permutations(range(3)), repeat=4):
        last, known = dict[int, int](), dict[int, int]()
        for episode, cue in enumerate(cue for block in blocks for cue in block):
            remembered = cue in last and (memory is None or episode - last[cue] <= memory)
            known[cue] = known[cue] + 1 if remembered else 0
            last[cue] = episode
            total[episode] += worth[known[cue]]
    np.testing.assert_allclose(recall_value(worth, 3, 12, memory), total / 6**4)
    np.testing.assert_allclose(recall_value(worth, 3, 7, memory), total[:7] / 6**4)


def test_wrong_tasks_and_parameters_are_named() -> None:
    family = DarkroomRecall()
    with pytest.raises(UsageError, match=r"darkroom_recall: expected tasks of shape \(N, 12\)"):
        family.make(np.zeros((1, 2), int), np.array([0]))
    with pytest.raises(UsageError, match="too few different tasks for n_task 300"):
        DarkroomRecall(2, 3, 2, 300).tasks()
    with pytest.raises(UsageError, match="n_cue must be a whole number between 2 and 100"):
        DarkroomRecall(n_cue=1)
