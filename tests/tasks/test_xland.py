"""XLand-MiniGrid as a task family; skipped where it is not installed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("xminigrid", reason="the extra xland is not installed")

from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.select import make_family
from tests.conftest import collected_trained_evaluated, refused_in_one_line

ROOM = "xland:XLand-MiniGrid-R1-9x9"
SMALL = {"n_task": 4, "horizon": 12, "random_episodes": 2}
HOLD, BESIDE, TOGETHER = 1, 3, 4  # the library's numbers of these goals


@pytest.fixture(scope="module")
def family():
    """Never more than eight slots: every number of slots is compiled, which takes seconds."""
    return make_family(ROOM, {**SMALL, "n_task": 8, "random_episodes": 1})


@pytest.fixture(scope="module")
def tasks():
    return make_family(ROOM, {**SMALL, "n_task": 30}).tasks()


def test_keeps_every_promise(family):
    check_family(family)


def test_rulesets_are_one_goal_about_objects_that_are_there(tasks):
    goals, objects = tasks[:, :5], tasks[:, -8:].reshape(-1, 4, 2)
    assert set(goals[:, 0]) == {HOLD, BESIDE, TOGETHER}
    for goal, present in zip(goals, objects.tolist(), strict=True):
        assert len({tuple(tile) for tile in present}) == 4
        assert goal[1:3].tolist() in present
        assert (goal[3:5].tolist() in present) == (goal[0] == TOGETHER)
        assert present == sorted(present) and (goal[0] != TOGETHER or tuple(goal[1:3]) < tuple(goal[3:5]))
    np.testing.assert_array_equal(tasks[:4], make_family(ROOM, SMALL).tasks())


def test_objects_lie_elsewhere_in_every_episode_as_the_slots_seed_says(family):
    tasks = np.repeat(family.tasks()[:1], 3, axis=0)
    env = family.make(tasks, np.array([5, 5, 2**40 + 5]))
    seen = [env.reset()]
    for _ in range(3 * family.horizon):
        step = env.step(np.full(3, 1))  # turning on the spot, which reaches no goal
        if step.truncated.any():
            assert step.truncated.all() and not step.terminated.any()
            seen.append(step.obs)
    starts = np.stack(seen).reshape(4, 3, -1)
    np.testing.assert_array_equal(starts[:, 0], starts[:, 1])
    assert not np.array_equal(starts[:, 0], starts[:, 2])
    assert len({start.tobytes() for start in starts[:, 0]}) > 1


def test_reaching_the_goal_pays_by_its_time_and_terminates(family, tasks):
    env = family.make(tasks[tasks[:, 0] == BESIDE][:8], np.arange(8))
    assert env.num_envs == 8
    env.reset()
    random, time, paid = np.random.default_rng(0), np.zeros(env.num_envs, int), 0
    for _ in range(20 * family.horizon):
        step = env.step(random.integers(3, size=env.num_envs))
        time += 1
        expected = np.where(step.terminated, 1 - 0.9 * time / family.horizon, 0)
        np.testing.assert_allclose(step.reward, expected, atol=1e-6)
        np.testing.assert_array_equal(step.truncated, (time == family.horizon) & ~step.terminated)
        paid += step.terminated.sum()
        time[step.terminated | step.truncated] = 0
    assert paid > 10


def test_random_returns_do_not_depend_on_what_is_asked_together(family):
    tasks, fresh = family.tasks(), make_family(ROOM, {**SMALL, "random_episodes": 1})
    single = [fresh.random_return(tasks[k : k + 1])[0] for k in (5, 2)]
    np.testing.assert_array_equal(family.random_return(tasks)[[5, 2]], single)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("xland:XLand-MiniGrid-R1-9x8", {}, "did you mean 'XLand-MiniGrid-R1-9x9'"),
        ("xland:MiniGrid-FourRooms", {}, "unknown environment"),
        (ROOM, {"view": 4}, "view must be odd"),
        (ROOM, {"view": "5"}, "view must be a whole number"),
        (ROOM, {"n_object": 1}, "n_object must be a whole number between 2 and 16, got 1"),
        (ROOM, {"n_task": True}, "n_task must be a whole number"),
        (ROOM, {"task_seed": -1}, "task_seed must be a whole number"),
        (ROOM, {"best_return": "most"}, "best_return must be a number"),
    ],
)
def test_mistakes_are_one_line(name, kwargs, message):
    refused_in_one_line(name, kwargs, message)


def test_from_histories_to_in_context_returns(tmp_path):
    file, returns = collected_trained_evaluated(
        tmp_path, "--env", "xland", "--env.kwargs", "{n_task: 4, horizon: 12, random_episodes: 2}",
        "--env.validation", "1", "--env.heldout", "1", "--algorithm.learner", "ppo",
        "--algorithm.learner_kwargs", "{n_steps: 12}", "--algorithm.n_stream", "2",
        "--algorithm.n_timesteps", "36",
    )  # fmt: skip
    assert file.info.family == ROOM
    np.testing.assert_array_equal(make_family(ROOM, file.info.family_kwargs).tasks(), file.tasks)
    history = file.load([0])[0]
    assert history.states.shape == (2, 36, 5, 5, 2) and history.states.dtype == np.uint8
    assert returns.shape == (len(file.split.heldout), 1, 2)
