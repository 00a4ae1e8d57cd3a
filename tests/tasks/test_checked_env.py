"""What an environment gives is what its spaces say, or an error at that step; compact actions do the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import NumericalError, RunError, SpaceError
from compressed_ad.evaluation.agents import RandomAgent
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.learners.scripted import NoiseDistillation
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.bandit import BernoulliBandit, GaussianBandit
from compressed_ad.tasks.checked_env import CheckedEnv, checked_slots
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.from_gymnasium import GymnasiumSlots
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, DarkroomPermuted, KeyToDoor
from compressed_ad.tasks.point_mass import PointMass
from compressed_ad.types import Step


class Changed(Darkroom):
    """A Darkroom whose steps are changed from the second one on."""

    def __init__(self, change):
        super().__init__(3, 5)
        object.__setattr__(self, "change", change)

    def make(self, tasks, seeds):
        env, change, count = super().make(tasks, seeds), self.change, [0]

        def step(actions):
            count[0] += 1
            made = env.step(actions)
            return made if count[0] < 2 else change(made)

        return SimpleNamespace(num_envs=env.num_envs, reset=env.reset, step=step)


def with_(**arrays):
    return lambda step: replace(step, **{name: f(getattr(step, name)) for name, f in arrays.items()})


CHANGES = {
    "half cells": with_(next_obs=lambda a: a + 0.5, obs=lambda a: a + 0.5),
    "one column": with_(next_obs=lambda a: a[:, :1], obs=lambda a: a[:, :1]),
    "fewer slots": with_(obs=lambda a: a[:-1]),
    "no observation": with_(next_obs=lambda a: None),
    "NaN flags": with_(terminated=lambda a: np.full(len(a), np.nan)),
    "integer flags": with_(terminated=lambda a: a.astype(int)),
    "a column of rewards": with_(reward=lambda a: a[:, None]),
    "one reward": with_(reward=lambda a: np.float32(1)),
    "a list of rewards": with_(reward=lambda a: a.tolist()),
    "no reward": with_(reward=lambda a: None),
    "no step": lambda step: None,
}
PLAY = {
    "ppo": lambda family: BatchedPPO(n_steps=4, batch_size=4).learn(
        family, np.array([7]), family.tasks()[7:8], n_timesteps=8, n_learner=1, n_stream=3, seed=0
    ),
    "noise": lambda family: NoiseDistillation().learn(
        family, np.array([7]), family.tasks()[7:8], n_timesteps=8, n_learner=1, n_stream=3, seed=0
    ),
    "sb3": lambda family: make_learner("sb3:PPO", {"n_steps": 4, "batch_size": 4}).learn(
        family, np.array([7]), family.tasks()[7:8], n_timesteps=8, n_learner=1, n_stream=3, seed=0
    ),
    "evaluation": lambda family: evaluate_tasks(
        RandomAgent(5), family, family.tasks()[7:8], rollouts=3, episodes=3
    ),
}


@pytest.mark.parametrize("play", PLAY)
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_told_at_that_step(change, play):
    if play == "sb3":
        pytest.importorskip("stable_baselines3")
    task = r"\[2, 1\]" if play == "evaluation" else "7"
    with pytest.raises(RunError, match=rf"task {task}, step 2: .*step\(\)"):
        PLAY[play](Changed(CHANGES[change]))


def test_other_broken_promises_are_told():
    def endless(step):
        return replace(step, truncated=np.zeros_like(step.truncated))

    with pytest.raises(RunError, match="task 7, step 5: an episode lasts longer than horizon = 5"):
        PLAY["ppo"](Changed(endless))
    for play in ("ppo", "evaluation"):
        with pytest.raises(NumericalError, match=r"step 2: step\(\).reward is not finite"):
            PLAY[play](Changed(with_(reward=lambda a: a * np.nan)))
    family = Changed(None)
    object.__setattr__(family, "make", lambda tasks, seeds: Darkroom(3, 5).make(tasks[:-1], seeds[:-1]))
    with pytest.raises(RunError, match=r"make\(\) of 3 tasks gives num_envs 2"):
        checked_slots(family, family.tasks()[:3], np.arange(3))
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    flags, reward = np.zeros(1, bool), np.zeros(1, np.float32)
    buffer = np.zeros((1, 2), np.float32)

    def reused(actions):
        buffer[:] += 0.25
        return Step(buffer, reward, flags, flags, buffer)

    env = CheckedEnv(SimpleNamespace(num_envs=1, reset=lambda: buffer.copy(), step=reused), "mine", space)
    env.reset()
    with pytest.raises(RunError, match="mine, slot 0, step 3: arrays of an earlier Step change"):
        [env.step(np.zeros(1)) for _ in range(3)]
    nan = SimpleNamespace(num_envs=1, reset=lambda: np.full((1, 2), np.nan))
    with pytest.raises(NumericalError, match=r"mine, slot 0, step 0: reset\(\) is not finite"):
        CheckedEnv(nan, "mine", space).reset()
    with pytest.raises(SpaceError, match="task 0, step 1: the action: 5 lies outside"):
        slots = checked_slots(Darkroom(3, 5), np.array([[0, 1]]), np.arange(1), [0])
        slots.reset()
        slots.step(np.array([5]))


def test_observations_have_the_dtype_of_the_space():
    """Also those of an environment that gives whole numbers in ``reset`` and doubles afterwards."""
    space, half = spaces.Box(-9, 9, (1,), np.float32), np.full((1, 1), 0.5)
    flags, reward = np.zeros(1, bool), np.zeros(1)
    step = Step(half, reward, flags, flags, half)
    env = CheckedEnv(
        SimpleNamespace(num_envs=1, reset=lambda: np.zeros((1, 1), int), step=lambda a: step), "mine", space
    )
    assert env.reset().dtype == np.float32
    got = env.step(np.zeros(1))
    assert (got.obs.dtype, got.obs[0, 0], got.reward.dtype) == (np.float32, 0.5, np.float32)


@pytest.mark.parametrize("horizon", [0, 10**9])
def test_an_absurd_horizon_is_told_at_once(horizon):
    family = Darkroom(3, 5)
    object.__setattr__(family, "horizon", horizon)
    assert any("horizon must be" in problem for problem in family_problems(family))


class Shifted(gymnasium.Env):
    """Calculates with its actions: -1, 0 or 1 in both components."""

    observation_space = spaces.Box(-99, 99, (2,), np.int64)
    action_space = spaces.MultiDiscrete([3, 3])

    def reset(self, *, seed=None, options=None):
        self.place = np.zeros(2, np.int64)
        return self.place, {}

    def step(self, action):
        self.place = self.place + (action - 1) * 100 // 100
        return self.place, float((action - 1).sum()), False, False, {}


class Shifts(Darkroom):
    name = "shifts"
    observation_space, action_space = Shifted.observation_space, Shifted.action_space

    def make(self, tasks, seeds):
        return GymnasiumSlots(self, [Shifted() for _ in tasks], seeds)


FAMILIES = [
    Darkroom(15, 6), DarkroomHard(17, 6), DarkroomPermuted(9, 6), KeyToDoor(9, 6), BernoulliBandit(7),
    GaussianBandit(7), PointMass(horizon=6), Shifts(3, 50),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("checked", [False, True])
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u8"]), st.integers(0, 99))
def test_compact_actions_do_what_the_recorded_ones_did(family, checked, dtype, seed):
    tasks, space = family.tasks()[:4], family.action_space
    space.seed(seed)
    actions = np.array([[space.sample() for _ in tasks] for _ in range(12)])
    compact = actions.astype("f4" if isinstance(space, spaces.Box) else dtype)
    make = partial(checked_slots, family) if checked else family.make
    made = [make(tasks, np.arange(4)) for _ in range(2)]
    np.testing.assert_array_equal(*(env.reset() for env in made))
    for one, other in zip(actions, compact, strict=True):
        steps = made[0].step(one), made[1].step(other)
        for name in ("next_obs", "reward", "terminated", "truncated", "obs"):
            np.testing.assert_array_equal(*(getattr(step, name) for step in steps), err_msg=name)
