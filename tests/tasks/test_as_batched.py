"""``as_batched`` over scripted environments, against a plain loop over the single ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit, TransformObservation
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.evaluation.agents import RandomAgent
from compressed_ad.evaluation.evaluate import evaluate_in_context
from compressed_ad.tasks.as_batched import as_batched
from compressed_ad.types import AnyArray

ENDS = ("terminated", "truncated", "both")


@dataclass(frozen=True)
class Script:
    """What one environment does: its episodes again and again, and a time limit around it."""

    episodes: tuple[tuple[tuple[float, ...], str], ...]  # rewards of each step, how the last one ends
    limit: int | None
    shape: tuple[int, ...]  # of an observation; () is Discrete

    def make(self) -> gymnasium.Env[Any, Any]:
        env = Scripted(self)
        return env if self.limit is None else TimeLimit(env, self.limit)


class Scripted(gymnasium.Env[Any, Any]):
    """An observation tells how often it was reset, the time in the episode and the last action."""

    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, script: Script) -> None:
        self.script, self.resets = script, 0
        box = gymnasium.spaces.Box(-np.inf, np.inf, script.shape, np.float32)
        self.observation_space = box if script.shape else gymnasium.spaces.Discrete(10**6)

    def observe(self, action: int) -> Any:
        code, shape = 100 * self.resets + 10 * self.time + action, self.script.shape
        return code + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) if shape else code

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.rewards, self.end = self.script.episodes[self.resets % len(self.script.episodes)]
        self.resets, self.time = self.resets + 1, 0
        return self.observe(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.time < len(self.rewards), "stepped beyond the end of its episode"
        reward, self.time = self.rewards[self.time], self.time + 1
        ended = self.time == len(self.rewards)
        terminated, truncated = (ended and self.end in (kind, "both") for kind in ENDS[:2])
        return self.observe(int(action)), reward, terminated, truncated, {}


@st.composite
def scripts(draw: st.DrawFn) -> list[Script]:
    """Those of one vector environment: their observations are of one shape."""
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    rewards = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4).map(tuple)
    episodes = st.lists(st.tuples(rewards, st.sampled_from(ENDS)), min_size=1, max_size=3).map(tuple)
    one = st.builds(Script, episodes, st.none() | st.integers(1, 4), st.just(shape))
    return draw(st.lists(one, min_size=1, max_size=4))


def vector(mode: AutoresetMode) -> Callable[[list[Script]], Any]:
    return lambda scripts: SyncVectorEnv([script.make for script in scripts], autoreset_mode=mode)


def sb3(scripts: list[Script]) -> Any:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    return vec_env.DummyVecEnv([script.make for script in scripts])


VECTORS = {**{mode.value: vector(mode) for mode in AutoresetMode}, "sb3": sb3}


def single(script: Script, actions: AnyArray) -> list[tuple[Any, ...]]:
    """(state, reward, next state, terminated, truncated) of each step of one environment, reset by hand."""
    env, rows = script.make(), []
    state, _ = env.reset()
    for action in actions.tolist():
        after, reward, terminated, truncated, _ = env.step(action)
        # Where the world ends just as time is up, it ended.
        rows.append((state, reward, after, terminated, truncated and not terminated))
        state = env.reset()[0] if terminated or truncated else after
    return rows


@pytest.mark.parametrize("make", list(VECTORS.values()), ids=list(VECTORS))
@settings(max_examples=60, deadline=None)
@given(scripts(), st.integers(1, 20), st.integers(0, 99))
def test_every_recorded_transition_is_a_real_one(
    make: Callable[[list[Script]], Any], scripts: list[Script], n_step: int, seed: int
) -> None:
    actions = np.random.default_rng(seed).integers(0, 3, (n_step, len(scripts)))
    env = as_batched(make(scripts))
    states, steps = [env.reset()], []
    for row in actions:
        steps.append(env.step(row))
        states.append(steps[-1].obs)
    for slot, script in enumerate(scripts):
        loop = single(script, actions[:, slot])
        for t, (step, expected) in enumerate(zip(steps, loop, strict=True)):
            ended = step.terminated[slot] | step.truncated[slot]
            got = (states[t], step.reward, step.next_obs, step.terminated, step.truncated)
            for ours, theirs in zip(got, expected, strict=True):
                np.testing.assert_array_equal(ours[slot], theirs)
            # Within an episode the next action sees the successor; after its end, a first observation.
            if not ended:
                np.testing.assert_array_equal(states[t + 1][slot], step.next_obs[slot])
            first = np.ravel(states[t + 1][slot])[0] % 100 == 0  # time 0 and no action
            assert first == ended
        ends = sum(bool(step.terminated[slot] | step.truncated[slot]) for step in steps)
        assert ends == sum(terminated or truncated for *_, terminated, truncated in loop)
        # Nothing was recorded across a reset, and no episode was begun in vain: they are numbered from 1.
        assert int(np.ravel(states[-1][slot])[0]) // 100 == ends + 1


class Native(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Scripts in one object, which as gymnasium's own CartPole knows no partial reset."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, scripts: list[Script]) -> None:
        self.envs, self.num_envs = [script.make() for script in scripts], len(scripts)
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.done = np.zeros(self.num_envs, bool)
        return np.array([env.reset()[0] for env in self.envs]), {}

    def step(self, actions: AnyArray) -> Any:
        rows = [
            (env.reset()[0], 0.0, False, False) if done else env.step(action)[:4]
            for env, action, done in zip(self.envs, actions.tolist(), self.done, strict=True)
        ]
        obs, reward, terminated, truncated = map(np.array, zip(*rows, strict=True))
        self.done = terminated | truncated
        return obs, reward, terminated, truncated, {}


class Repeats:
    """Acts on what it sees and has seen of its slot in this episode alone."""

    def reset(self, n_env: int) -> None:
        self.seen = np.zeros(n_env, int)

    def act(self, obs: AnyArray) -> AnyArray:
        code = obs.reshape(len(obs), -1)[:, 0].astype(int)
        return (code + self.seen) % 3

    def observe(self, actions: AnyArray, step: Any) -> None:
        played = np.ones(len(actions), bool) if step.played is None else step.played
        ended = step.terminated | step.truncated
        assert not (ended & ~played).any() and not step.reward[~played].any()
        self.seen = np.where(ended, 0, self.seen + played)


@pytest.mark.parametrize("make", [*VECTORS.values(), Native], ids=[*VECTORS, "native"])
@settings(max_examples=30, deadline=None)
@given(scripts(), st.integers(1, 4))
def test_returns_are_those_of_single_environments(
    make: Callable[[list[Script]], Any], scripts: list[Script], episodes: int
) -> None:
    together = evaluate_in_context(Repeats(), make(scripts), episodes=episodes).reward_episode
    alone = [
        evaluate_in_context(Repeats(), SyncVectorEnv([script.make]), episodes=episodes).reward_episode
        for script in scripts
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))


def test_gymnasiums_own_vector_of_cartpoles() -> None:
    """Pushed one way, the pole falls after 7 to 12 steps; the call that resets a slot pays nothing."""
    env = as_batched(gymnasium.make_vec("CartPole-v1", num_envs=3))
    env.reset()
    steps = [env.step(np.ones(3, int)) for _ in range(60)]
    ended = np.array([step.terminated | step.truncated for step in steps])
    played = np.array([np.ones(3, bool) if step.played is None else step.played for step in steps])
    np.testing.assert_array_equal(~played[1:], ended[:-1])
    np.testing.assert_array_equal(np.array([step.reward for step in steps]), played)
    for slot in range(3):
        lengths = np.diff([-1, *np.flatnonzero(ended[:, slot])]) - [0, *[1] * (ended[:, slot].sum() - 1)]
        assert len(lengths) > 4 and set(lengths.tolist()) <= set(range(7, 13))
    cartpoles = gymnasium.make_vec("CartPole-v1", num_envs=3)
    returns = evaluate_in_context(RandomAgent(gymnasium.spaces.Discrete(1, start=1)), cartpoles, episodes=5)
    assert set(returns.reward_episode.ravel().tolist()) <= set(range(7, 13))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_noisy_and_blind_environments(mode: AutoresetMode) -> None:
    random = np.random.default_rng(0)
    scripts = [Script((((1.0, 1.0, 1.0), "truncated"),), limit, (2,)) for limit in (None, 2)]
    for change in (lambda obs: obs + random.normal(size=obs.shape).astype(np.float32), np.zeros_like):
        if mode is AutoresetMode.SAME_STEP:  # gymnasium's vector wrapper refuses it
            makers = [lambda s=s, f=change: TransformObservation(s.make(), f, None) for s in scripts]
            env: Any = SyncVectorEnv(makers, autoreset_mode=mode)
        else:
            env = gymnasium.wrappers.vector.TransformObservation(vector(mode)(scripts), change)
        returns = evaluate_in_context(RandomAgent(3), env, episodes=4).reward_episode
        np.testing.assert_array_equal(returns, np.repeat([[3.0, 2.0]], 4, axis=0))


def test_a_wrapper_that_does_not_pass_the_reset_of_single_slots_on_is_told() -> None:
    class Deaf(gymnasium.vector.VectorWrapper):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return self.env.reset(seed=seed)

    script = Script((((1.0, 1.0), "terminated"),), None, (2,))
    env = as_batched(Deaf(SyncVectorEnv([script.make, script.make])))
    env.reset()
    env.step(np.zeros(2, int))
    with pytest.raises(SpaceError, match=r"ignores reset\(options=.*; pass the options on, or use"):
        env.step(np.zeros(2, int))


def test_vecnormalize_is_refused_as_in_recording() -> None:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    env = sb3([Script((((1.0,), "terminated"),), None, (2,))])
    for wrapped in (vec_env.VecNormalize(env), vec_env.VecMonitor(vec_env.VecNormalize(env))):
        with pytest.raises(UsageError, match=r"VecNormalize .*; train and play without it"):
            as_batched(wrapped)


def test_wrappers_of_gymnasium_that_change_their_scale_are_refused_alike() -> None:
    script, wrappers = Script((((1.0,), "terminated"),), None, (2,)), gymnasium.wrappers
    for kind in (wrappers.NormalizeReward, wrappers.NormalizeObservation):
        inner = SyncVectorEnv([script.make, lambda k=kind: TimeLimit(k(script.make()), 9)])
        outer = getattr(wrappers.vector, kind.__name__)(vector(AutoresetMode.NEXT_STEP)([script]))
        for env in (inner, outer, wrappers.vector.ClipReward(outer, 0, 1)):
            with pytest.raises(UsageError, match=rf"{kind.__name__} changes .*; train and play without it"):
                as_batched(env)
    frozen = wrappers.NormalizeReward(script.make())
    frozen.update_running_mean = False
    assert as_batched(SyncVectorEnv([lambda: frozen])).num_envs == 1
