"""Meta-World as a task family; skipped where it is not installed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="the extra metaworld is not installed")

import metaworld
from metaworld.policies import SawyerReachV3Policy

from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.select import make_family
from tests.conftest import collected_trained_evaluated, refused_in_one_line

REACH = "metaworld:reach-v3"


@pytest.mark.parametrize("reward", ["success", "dense"])
def test_keeps_every_promise(reward):
    family = make_family(REACH, {"horizon": 15, "reward": reward, "random_episodes": 2})
    check_family(family, n_task=2)
    assert (family.optimal_return(family.tasks()) is None) == (reward == "dense")


def test_tasks_are_those_of_ml1_and_its_test_tasks_are_held_out():
    family, benchmark = make_family(REACH, {"task_seed": 3}), metaworld.ML1("reach-v3", seed=3)
    rows = [pickle.loads(t.data)["rand_vec"] for t in (*benchmark.train_tasks, *benchmark.test_tasks)]
    np.testing.assert_array_equal(family.tasks(), rows)
    np.testing.assert_array_equal(family.heldout_tasks(), np.arange(50, 100))


def play_reach(family, n_step):
    """A scripted policy that knows the goal of a training task; (return, states, rewards)."""
    task = family.tasks()[4]
    env, policy = family.make(task[None], np.zeros(1, int)), SawyerReachV3Policy()
    obs, rewards, states = env.reset()[0], [], []
    for _ in range(n_step):
        knowing = obs.astype(float)
        knowing[-3:] = task[3:]
        step = env.step(np.clip(policy.get_action(knowing), -1, 1)[None].astype(np.float32))
        rewards.append(float(step.reward[0]))
        states.append(step.next_obs[0])
        obs = step.obs[0]
    return np.array(rewards), np.array(states)


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")  # the scripted policy's own
def test_success_pays_once_an_episode_and_the_goal_is_hidden():
    rewards, states = play_reach(make_family(REACH, {"horizon": 150}), 300)
    assert rewards[:150].sum() == 1.0 and rewards[150:].sum() == 1.0 and set(rewards) == {0.0, 1.0}
    assert not states[:, -3:].any()
    np.testing.assert_array_equal(states[:150], states[150:])


def test_dense_pays_what_meta_world_pays():
    """Beside an environment of Meta-World that is used without this library."""
    family = make_family(REACH, {"reward": "dense", "horizon": 20, "task_seed": 1})
    benchmark = metaworld.ML1("reach-v3", seed=1)
    theirs = benchmark.train_classes["reach-v3"]()
    theirs.set_task(benchmark.train_tasks[7])
    ours = family.make(family.tasks()[[2, 7]], np.array([0, 0]))
    np.testing.assert_array_equal(ours.reset()[1], theirs.reset()[0].astype(np.float32))
    random = np.random.default_rng(0)
    for time in range(20):
        actions = random.uniform(-1, 1, (2, 4)).astype(np.float32)
        step, (obs, reward, *_) = ours.step(actions), theirs.step(actions[1])
        np.testing.assert_array_equal(step.next_obs[1], obs.astype(np.float32))
        assert step.reward[1] == np.float32(reward)
        assert step.truncated.tolist() == [time == 19] * 2 and not step.terminated.any()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("metaworld:reech-v3", {}, "did you mean 'reach-v3'"),
        (REACH, {"reward": "sparse"}, "reward must be one of success, dense"),
        (REACH, {"horizon": 501}, "horizon must be a whole number between 1 and 500, got 501"),
        (REACH, {"task_seed": -1}, "task_seed must be a whole number of at least 0"),
        (REACH, {"best_return": "most"}, "best_return must be a number, got 'most'"),
    ],
)
def test_mistakes_are_one_line(name, kwargs, message):
    refused_in_one_line(name, kwargs, message)


def test_from_histories_to_in_context_returns(tmp_path):
    pytest.importorskip("stable_baselines3", reason="the extra sb3 is not installed")
    file, returns = collected_trained_evaluated(
        tmp_path, "--env", "metaworld", "--env.kwargs", "{horizon: 15, reward: dense, random_episodes: 1}",
        "--env.n_task", "4", "--env.validation", "1", "--algorithm.learner", "sb3:SAC",
        "--algorithm.learner_kwargs", "{learning_starts: 10, batch_size: 16, net_arch: [16]}",
        "--algorithm.n_stream", "1", "--algorithm.n_timesteps", "30",
    )  # fmt: skip
    ids = np.array(file.info.config["task_ids"])
    assert set(file.split.heldout) == set(np.flatnonzero(ids >= 50)) and len(file.split.heldout)
    history = file.load([0])[0]
    assert history.states.shape == (1, 30, 39) and history.actions.shape == (1, 30, 4)
    assert np.flatnonzero(history.truncated[0]).tolist() == [14, 29] and not history.terminated.any()
    assert returns.shape == (len(file.split.heldout), 1, 2)
