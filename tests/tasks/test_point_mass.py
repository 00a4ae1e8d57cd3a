"""The point mass: exact optima, the way there, rewards recomputed, wrong use."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compressed_ad import OptimalAgent, check_family, evaluate_tasks
from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.base import OptimalPolicy, RewardFunction
from compressed_ad.tasks.point_mass import PointMass

BOTH = [PointMass("dense"), PointMass("sparse"), PointMass("sparse", horizon=3, speed=0.05)]


@pytest.mark.parametrize("family", BOTH, ids=repr)
def test_it_keeps_the_promises_of_a_family(family):
    check_family(family)
    assert isinstance(family, OptimalPolicy)
    assert isinstance(family, RewardFunction)


@pytest.mark.parametrize("family", BOTH, ids=repr)
def test_the_optimal_policy_earns_the_optimal_return(family):
    tasks = family.tasks()
    returns = evaluate_tasks(OptimalAgent(family, tasks), family, tasks, rollouts=1, episodes=2)
    # Places are float32: each of the steps may be off by the rounding of a number below 2.
    np.testing.assert_allclose(returns[:, 0], family.optimal_return(tasks)[:, None].repeat(2, 1), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(BOTH))
def test_no_actions_earn_more_than_the_optimal_return(seed, family):
    random = np.random.default_rng(seed)
    tasks = family.tasks()[:8]
    # Straight to the goal with some noise: harder to beat than uniform actions are.
    env, obs, total = family.make(tasks, np.arange(8)), np.zeros((8, 2)), np.zeros(8)
    scale = random.choice([0.0, 0.1, 1.0])
    for _ in range(family.horizon):
        best = family.optimal_action(tasks, obs, total)
        step = env.step(np.clip(best + scale * random.normal(size=(8, 2)), -1, 1).astype(np.float32))
        total, obs = total + step.reward, step.next_obs
    assert (total <= family.optimal_return(tasks) + 1e-5).all()


def test_random_return_is_that_of_uniform_actions():
    family = PointMass("dense", n_task=4)
    tasks = family.tasks()
    random = np.random.default_rng(5)
    env, total = family.make(np.repeat(tasks, 2000, 0), np.arange(8000)), np.zeros(8000)
    env.reset()
    for _ in range(family.horizon):
        total += env.step(random.uniform(-1, 1, (8000, 2))).reward
    mine = total.reshape(4, 2000)
    # Two independent means of 2000 and 4000 episodes: five of their common standard errors.
    error = 5 * mine.std(1) * np.sqrt(1 / 2000 + 1 / 4000)
    assert (np.abs(mine.mean(1) - family.random_return(tasks)) < error).all()


def test_goals_lie_uniformly_in_the_disc_and_depend_on_their_seed_alone():
    goals = PointMass(n_task=2000).tasks()
    distance = np.linalg.norm(goals, axis=1)
    assert distance.max() <= 1
    # The share within half the radius is a quarter: 2000 draws, five standard errors.
    assert abs((distance < 0.5).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
    np.testing.assert_array_equal(goals, PointMass("sparse", n_task=2000, speed=0.3).tasks())
    assert not np.array_equal(goals, PointMass(n_task=2000, task_seed=1).tasks())


def test_walls_stop_and_long_actions_are_shortened():
    env = PointMass(speed=0.9, n_task=1).make(np.zeros((1, 2)), np.array([0]))
    env.reset()
    np.testing.assert_allclose(env.step(np.array([[1.0, 1.0]])).next_obs, 0.9 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(
        env.step(np.array([[1.0, 0.0]])).next_obs, [[1.0, 0.9 / np.sqrt(2)]], rtol=1e-6
    )


def test_wrong_use_is_named():
    with pytest.raises(UsageError, match="reward_kind must be one of dense, sparse, got 'shaped'"):
        PointMass("shaped")
    with pytest.raises(UsageError, match="horizon must be a whole number"):
        PointMass(horizon=0)
    with pytest.raises(UsageError, match="speed must be a number above 0 and at most 2, got -1"):
        PointMass(speed=-1.0)
    with pytest.raises(UsageError, match=r"goals \(N, 2\)"):
        PointMass().make(np.zeros((2, 3)), np.arange(2))
    with pytest.raises(SpaceError, match=r"expected \(1, 2\) float actions"):
        PointMass().make(np.zeros((1, 2)), np.arange(1)).step(np.zeros((1, 2), int))
