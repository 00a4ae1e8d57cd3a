"""``as_batched`` over scripted environments, against a plain loop over the single ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings, strategies as st

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
