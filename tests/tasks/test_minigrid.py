"""MiniGrid as a task family; skipped where it is not installed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("minigrid", reason="the extra minigrid is not installed")

from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.select import make_family
from tests.conftest import collected_trained_evaluated, refused_in_one_line

CROSSING = "minigrid:MiniGrid-SimpleCrossingS9N1-v0"
OBSTACLES = "minigrid:MiniGrid-Dynamic-Obstacles-6x6-v0"


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (CROSSING, {"kwargs": {"max_steps": 25}}),
        ("minigrid:MiniGrid-Dynamic-Obstacles-Random-6x6-v0", {"horizon": 20}),
        ("minigrid:MiniGrid-GoToDoor-5x5-v0", {"horizon": 20}),  # only missions differ at times
        ("minigrid:BabyAI-GoToLocal-v0", {"horizon": 20}),
    ],
)
def test_keeps_every_promise(name, kwargs):
    family = make_family(name, {"n_task": 5, "random_episodes": 2, **kwargs})
    assert family.observation_space.shape == (7, 7, 3) and family.name == name
    check_family(family)


def test_a_time_limit_is_the_environments_own_or_the_horizon():
    assert make_family(CROSSING, {"n_task": 2}).horizon == 4 * 9**2
    assert make_family(CROSSING, {"n_task": 2, "kwargs": {"max_steps": 25}}).horizon == 25
    assert make_family(CROSSING, {"n_task": 2, "horizon": 7}).horizon == 7


def test_every_episode_has_the_layout_of_its_task_whatever_the_seed():
    family = make_family(CROSSING, {"n_task": 6, "horizon": 5})
    one, other = (family.make(family.tasks(), np.arange(6) + shift) for shift in (0, 100))
    first = one.reset()
    grids = [env.unwrapped.grid.encode() for env in one._envs]
    np.testing.assert_array_equal(first, other.reset())
    random = np.random.default_rng(0)
    for _ in range(3 * 5):
        step = one.step(random.integers(7, size=6))
        ended = step.terminated | step.truncated
        np.testing.assert_array_equal(step.obs[ended], first[ended])
        for slot in np.flatnonzero(ended):
            np.testing.assert_array_equal(one._envs[slot].unwrapped.grid.encode(), grids[slot])
    assert len({grid.tobytes() for grid in grids}) == 6, "tasks are different layouts"


def test_what_moves_within_an_episode_comes_from_the_slots_seed():
    """Obstacles start where the layout has them and walk as the slot's seed says, other ways each episode."""
    family = make_family(OBSTACLES, {"n_task": 1, "horizon": 4})
    tasks = np.repeat(family.tasks(), 3, axis=0)
    env = family.make(tasks, np.array([1, 1, 2]))
    env.reset()
    seen = []
    for _ in range(6 * 4):
        step = env.step(np.zeros(3, int))  # turning on the spot
        seen.append(step.next_obs)
    walks = np.stack(seen).reshape(6, 4, 3, -1)
    np.testing.assert_array_equal(walks[:, :, 0], walks[:, :, 1])
    assert not np.array_equal(walks[:, :, 0], walks[:, :, 2])
    assert not np.array_equal(walks[0, :, 0], walks[1, :, 0]) or not np.array_equal(walks[0], walks[2])


def test_the_random_return_is_that_of_random_play():
    family = make_family(
        "minigrid:MiniGrid-Empty-Random-5x5-v0", {"n_task": 2, "horizon": 40, "random_episodes": 30}
    )
    measured = family.random_return(family.tasks())
    np.testing.assert_array_equal(measured[::-1], family.random_return(family.tasks()[::-1]))
    n_slot, random = 60, np.random.default_rng(3)
    env = family.make(np.repeat(family.tasks(), n_slot, axis=0), np.arange(2 * n_slot))
    env.reset()
    total, on = np.zeros(2 * n_slot), np.ones(2 * n_slot, bool)
    for _ in range(family.horizon):
        step = env.step(random.integers(7, size=2 * n_slot))
        total += on * step.reward
        on &= ~(step.terminated | step.truncated)
    again = total.reshape(2, n_slot)
    error = np.hypot(again.std(axis=1) / np.sqrt(n_slot), again.std(axis=1) / np.sqrt(30))
    assert (np.abs(measured - again.mean(axis=1)) < 4 * error + 1e-9).all()
    assert (again.mean(axis=1) > 0).any(), "nothing was compared"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("minigrid:MiniGrid-Empty-8x8-v0", {}, "make only 1 different layouts, fewer than n_task 64"),
        ("minigrid:MiniGrid-Emty-8x8-v0", {}, "did you mean 'MiniGrid-Empty-8x8-v0'"),
        ("minigrid:CartPole-v1", {}, "is no MiniGrid environment"),
        ("minigrid:BabyAI-GoToLocal-v0", {}, "has no time limit of its own; say which with horizon"),
        (CROSSING, {"n_task": 0}, "n_task must be a whole number"),
        (CROSSING, {"task_seed": -1}, "task_seed must be a whole number of at least 0"),
        (CROSSING, {"kwargs": {"sise": 3}}, "cannot be made: .*sise"),
    ],
)
def test_mistakes_are_one_line(name, kwargs, message):
    refused_in_one_line(name, kwargs, message)


def test_from_histories_to_in_context_returns(tmp_path):
    file, returns = collected_trained_evaluated(
        tmp_path, "--env", "minigrid", "--env.family", CROSSING,
        "--env.kwargs", "{n_task: 5, horizon: 16, random_episodes: 2}",
        "--env.validation", "1", "--env.heldout", "2", "--algorithm.learner", "ppo",
        "--algorithm.learner_kwargs", "{n_steps: 16}", "--algorithm.n_stream", "2",
        "--algorithm.n_timesteps", "48",
    )  # fmt: skip
    np.testing.assert_array_equal(make_family(file.info.family, file.info.family_kwargs).tasks(), file.tasks)
    history = file.load([0])[0]
    assert history.states.shape == (2, 48, 7, 7, 3) and history.states.dtype == np.uint8
    start = np.concatenate([np.ones((2, 1), bool), history.episode_end[:, :-1]], axis=1)
    assert start.sum() >= 6
    assert (history.states[start] == history.states[0, 0]).all(), "each episode has the layout of its task"
    assert returns.shape == (len(file.split.heldout), 1, 2)
