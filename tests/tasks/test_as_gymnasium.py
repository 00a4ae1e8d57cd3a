"""Families as gymnasium environments, vectorised environments as families' batched ones, the checker."""

from dataclasses import dataclass, replace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import compressed_ad.tasks.as_gymnasium as task_gymnasium
from compressed_ad import OptimalAgent
from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.as_batched import as_batched
from compressed_ad.tasks.as_gymnasium import TaskEnv, gymnasium_id
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.tasks.conformance import check_family, family_problems
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, KeyToDoor

FIELDS = ("next_obs", "reward", "terminated", "truncated", "obs")
FAMILY = KeyToDoor(3, 7)
TASKS = FAMILY.tasks()[[5, 12, 40, 77]]  # their episodes end at different times


class Lasting(gymnasium.Env):
    """Counts its steps; ends after ``length`` of them. Its truncation is its own (no TimeLimit wrapper)."""

    observation_space = gymnasium.spaces.Box(0, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length=3, truncates=False):
        self.length, self.truncates, self.time = length, truncates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        end = self.time == self.length
        return np.full(1, self.time, np.float32), 1.0, end and not self.truncates, end and self.truncates, {}


def sb3_vec_env(env_makers):
    return pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv(env_makers)


def makers():
    return [lambda task=task: TaskEnv(FAMILY, task) for task in TASKS]


VECTOR_ENVS = {
    "same-step": lambda: SyncVectorEnv(makers(), autoreset_mode=AutoresetMode.SAME_STEP),
    "next-step": lambda: SyncVectorEnv(makers(), autoreset_mode=AutoresetMode.NEXT_STEP),
    "disabled": lambda: SyncVectorEnv(makers(), autoreset_mode=AutoresetMode.DISABLED),
    "sb3": lambda: sb3_vec_env(makers()),
    "ours": lambda: FAMILY.make(TASKS, np.arange(4)),
}


@pytest.mark.parametrize("make", list(VECTOR_ENVS.values()), ids=list(VECTOR_ENVS))
def test_every_vector_env_gives_the_same_steps(make):
    """Staggered ends, true successors, no dummy step: as the family's own batched environment."""
    reference, env = FAMILY.make(TASKS, np.arange(4)), as_batched(make())
    assert env.num_envs == 4
    obs = reference.reset()
    np.testing.assert_array_equal(env.reset(), obs)
    rng, ends, best = np.random.default_rng(0), np.zeros(4, int), OptimalAgent(FAMILY, TASKS)
    best.reset(4)
    for _ in range(60):
        actions = best.act(obs) if rng.random() < 0.6 else rng.integers(0, 5, 4)
        expected, got = reference.step(actions), env.step(actions)
        best.observe(actions, expected)
        obs = expected.obs
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(got, field), getattr(expected, field), err_msg=field)
            assert getattr(got, field).dtype == getattr(expected, field).dtype
        ends += expected.terminated | expected.truncated
    assert len(set(ends.tolist())) > 1


def test_async_vector_env_in_its_default_mode():
    lengths = (2, 3)
    vec = AsyncVectorEnv([lambda n=n: Lasting(n) for n in lengths], context="spawn")
    env = as_batched(vec)
    env.reset()
    seen = [env.step(np.zeros(2, int)) for _ in range(6)]
    vec.close()
    assert [s.next_obs[:, 0].tolist() for s in seen] == [[1, 1], [2, 2], [1, 3], [2, 1], [1, 2], [2, 3]]
    assert [s.obs[:, 0].tolist() for s in seen] == [[1, 1], [0, 2], [1, 0], [0, 1], [1, 2], [0, 0]]
    assert sum(s.reward.sum() for s in seen) == 12


def test_sb3_tells_time_limits_from_ends():
    env = as_batched(sb3_vec_env([lambda: Lasting(2), lambda: Lasting(2, truncates=True)]))
    env.reset()
    env.step(np.zeros(2, int))
    step = env.step(np.zeros(2, int))
    assert step.terminated.tolist() == [True, False]
    assert step.truncated.tolist() == [False, True]
    assert step.next_obs[:, 0].tolist() == [2, 2]
    assert step.obs[:, 0].tolist() == [0, 0]


def test_a_vector_env_without_partial_reset_is_refused():
    class ResetsAll(SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = as_batched(ResetsAll([lambda: Lasting(2), lambda: Lasting(3)]))
    env.reset()
    env.step(np.zeros(2, int))
    with pytest.raises(SpaceError, match="SAME_STEP"):
        env.step(np.zeros(2, int))


def test_as_batched_refuses_other_things():
    with pytest.raises(UsageError, match="single environment"):
        as_batched(Lasting())
    with pytest.raises(UsageError, match="no vectorised environment"):
        as_batched(object())


@pytest.mark.parametrize(
    "name",
    [
        "darkroom",
        "darkroom_large",
        "darkroom_hard",
        "darkroom_permuted",
        "darkroom_recall",
        "darkroom_switching",
        "key_to_door_switching",
        "key_to_door",
    ],
)
def test_gymnasium_ids(name):
    env = gymnasium.make(gymnasium_id(name), task=7)
    check_env(env.unwrapped)
    np.testing.assert_array_equal(env.unwrapped.task, TASK_FAMILY[name]().tasks()[7])


def test_task_env_takes_rows_and_indices():
    env = gymnasium.make("CompressedAD/Darkroom-v0", task=(4, 5), size=9, horizon=2)
    assert env.reset(seed=0)[0].tolist() == [4, 4]
    obs, reward, terminated, truncated, _ = env.step(1)
    assert (obs.tolist(), reward, terminated, truncated) == ([4, 5], 1.0, False, False)
    obs, reward, terminated, truncated, _ = env.step(np.int64(0))
    assert (obs.tolist(), reward, terminated, truncated) == ([4, 5], 1.0, False, True)
    assert env.reset()[0].tolist() == [4, 4]
    with pytest.raises(UsageError, match=r"out of 0\.\.80"):
        TaskEnv(Darkroom(), 81)
    with pytest.raises(UsageError, match="before reset"):
        TaskEnv(Darkroom(), 0).step(0)


@dataclass(frozen=True)
class Noisy:
    """A family with randomness: the observation is a draw of the slot's own generator."""

    name: ClassVar[str] = "noisy"
    observation_space: ClassVar = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space: ClassVar = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    horizon: ClassVar[int] = 3

    def tasks(self):
        return np.linspace(0, 1, 5)[:, None]

    def make(self, tasks, seeds):
        return NoisyEnv(self, tasks, seeds)

    def optimal_return(self, tasks):
        return None

    def random_return(self, tasks):
        return np.zeros(len(tasks))


class NoisyEnv:
    shared = False
    late = False

    def __init__(self, family, tasks, seeds):
        self.family, self.num_envs = family, len(tasks)
        self.rngs = [np.random.default_rng(seeds[0 if self.shared else i]) for i in range(len(tasks))]
        if self.shared:
            self.rngs = self.rngs[:1] * len(tasks)
        self.time = 0

    def reset(self):
        self.time = 0
        return np.stack([rng.uniform(-1, 1, 2) for rng in self.rngs]).astype(np.float32)

    def step(self, actions):
        from compressed_ad.types import Step

        self.time += 1
        end = self.time == self.family.horizon + self.late
        next_obs = np.stack([rng.uniform(-1, 1, 2) for rng in self.rngs]).astype(np.float32)
        ends, never = np.full(self.num_envs, end), np.zeros(self.num_envs, bool)
        return Step(
            next_obs, actions[:, 0].astype(np.float32), never, ends, self.reset() if end else next_obs
        )


def test_a_task_env_is_seeded():
    env = TaskEnv(Noisy(), 2)
    first = env.reset(seed=5)[0]
    np.testing.assert_array_equal(first, env.reset(seed=5)[0])
    assert not np.array_equal(first, env.reset()[0])


@pytest.mark.parametrize(
    "family", [*[TASK_FAMILY[name]() for name in TASK_FAMILY], DarkroomHard(3, 4), Noisy()], ids=repr
)
def test_good_families_pass(family):
    assert family_problems(family) == []


class BadReward(Darkroom):
    def reward(self, task, states, actions, next_states, start):
        return np.ones(len(start), np.float32)


class FirstTaskReward(Darkroom):
    """Rewards of the first of its tasks for all."""

    def reward(self, tasks, states, actions, next_states, start):
        return super().reward(tasks[:1], states, actions, next_states, start)


class OneReward(Darkroom):
    def reward(self, tasks, states, actions, next_states, start):
        return np.float32(0)


class BrokenReward(Darkroom):
    def reward(self, tasks, states, actions, next_states, start):
        return tasks["goal"]


class ShuffledTasks(Darkroom):
    def tasks(self):
        return np.random.default_rng().permutation(super().tasks())


class TwiceTheSame(Darkroom):
    def tasks(self):
        return np.concatenate([super().tasks(), super().tasks()])


class SharedRng(Noisy):
    def make(self, tasks, seeds):
        env = type("Shared", (NoisyEnv,), {"shared": True})
        return env(self, tasks, seeds)


class TooLong(Noisy):
    def make(self, tasks, seeds):
        env = type("Late", (NoisyEnv,), {"late": True})
        return env(self, tasks, seeds)


class Wrapping(Darkroom):
    """Passes the inner environment's steps through ``change``."""

    def make(self, tasks, seeds):
        inner, outer = super().make(tasks, seeds), type("Outer", (), {})()
        outer.num_envs, outer.reset = inner.num_envs, inner.reset
        outer.step = lambda actions: self.change(inner.step(actions))
        return outer


class HeldOut(Darkroom):
    def __init__(self, ids):
        super().__init__(3, 5)
        object.__setattr__(self, "heldout_tasks", lambda: np.array(ids))


class IntegerReward(Wrapping):
    def change(self, step):
        return replace(step, reward=step.reward.astype(int))


class OutOfSpace(Wrapping):
    def change(self, step):
        return replace(step, next_obs=step.next_obs + 9)


class NotAStep(Wrapping):
    def change(self, step):
        return tuple(vars(step).values())


class Overwrites(Wrapping):
    buffer = np.zeros((3, 2), int)

    def change(self, step):
        self.buffer[: len(step.obs)] = step.next_obs
        return replace(step, next_obs=self.buffer[: len(step.obs)])


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        (object(), "lacks name, observation_space"),
        (BadReward(), r"reward\(\) of task 0"),
        (FirstTaskReward(), r"reward\(\) of several tasks in one call is not that of each alone"),
        (FirstTaskReward(3, 8), r"reward\(\) of task 1 does not give"),
        (OneReward(), r"darkroom: reward\(\) must give \d+ numbers; it gives float32 \(\)"),
        (BrokenReward(), r"darkroom: reward\(\): .*IndexError in .*test_as_gymnasium"),
        (ShuffledTasks(), "order of the tasks must be fixed"),
        (TwiceTheSame(), "equal rows"),
        (HeldOut(range(9)), "leaves no task to train on"),
        (HeldOut([3, 3]), r"must be different numbers in 0\.\.8"),
        (HeldOut([9]), r"must be different numbers in 0\.\.8"),
        (SharedRng(), "plays differently alone"),
        (TooLong(), "longer than horizon = 3"),
        (IntegerReward(), "reward must be float32"),
        (OutOfSpace(), "lies outside"),
        (NotAStep(), "must return a Step, not tuple"),
        (Overwrites(), "arrays of an earlier Step change"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_bad_families_are_told_why(family, sentence):
    with pytest.raises(UsageError, match=sentence):
        check_family(family)


def test_ids_are_registered_once_per_family():
    for name in TASK_FAMILY:
        assert task_gymnasium.gymnasium_id(name) in gymnasium.registry
