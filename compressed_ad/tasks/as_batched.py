"""Vectorised environments of other libraries as a ``BatchedEnv``.

Libraries differ in what they return when an episode ends. A ``Step`` always holds the true successor in
``next_obs`` and the first observation of the new episode in ``obs``, and every step is a real transition, or
not ``played``.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.base import BatchedEnv
from compressed_ad.types import AnyArray, Step


def as_batched(env: Any) -> BatchedEnv:
    """``env`` as a ``BatchedEnv``.

    Takes an SB3 ``VecEnv`` (recognised by its methods; SB3 is not imported), a gymnasium ``VectorEnv`` in any
    autoreset mode, or a ``BatchedEnv``, which is returned as it is. Raises ``UsageError`` for anything else.
    """
    refuse_moving_scales(env)
    if isinstance(env, VectorEnv):
        return _GymnasiumBatched(env)
    if hasattr(env, "step_wait") and hasattr(env, "num_envs"):
        return _SB3Batched(env)
    if isinstance(env, gymnasium.Env):
        raise UsageError(
            f"{env} is a single environment: wrap it, e.g. gymnasium.vector.SyncVectorEnv([lambda: env])"
        )
    if all(hasattr(env, name) for name in ("num_envs", "reset", "step")):
        return cast(BatchedEnv, env)
    raise UsageError(
        f"{type(env).__name__} is no vectorised environment: expected an SB3 VecEnv, a gymnasium VectorEnv, "
        "or an object with num_envs, reset() and step(actions) -> Step"
    )


_MOVING = {"VecNormalize", "NormalizeObservation", "NormalizeReward"}


def refuse_moving_scales(env: Any) -> None:
    """``UsageError`` if a wrapper in ``env`` scales by numbers that it measures as it goes."""
    while env is not None:
        names = [kind.__name__ for kind in type(env).__mro__ if kind.__name__ in _MOVING]
        if names and getattr(env, "update_running_mean", True):
            raise UsageError(
                f"{names[0]} changes observations or rewards as it goes; train and play without it, or scale"
                " by fixed numbers inside the environment (docs/source_algorithms.md)"
            )
        own = getattr(env, "__dict__", {})  # wrappers would hand on what is asked of them
        for single in inner if isinstance(inner := own.get("envs"), list | tuple) else ():
            refuse_moving_scales(single)
        env = own.get("venv", own.get("env"))


class _GymnasiumBatched:
    """A gymnasium ``VectorEnv``.

    Same-step autoreset: the successor is ``infos["final_obs"]``. Without autoreset, and in gymnasium's own
    vectors of single environments, ended slots are reset at once through ``options["reset_mask"]``. Elsewhere
    next-step autoreset spends a call on the reset of a slot that ended, in which the slot is not ``played``.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env, self.num_envs = env, env.num_envs
        self.observation_space = _supported(env.single_observation_space)
        self.action_space = env.single_action_space
        self.mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._by_mask = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        if self.mode is AutoresetMode.NEXT_STEP and self._by_mask:
            self.mode = AutoresetMode.DISABLED  # a partial reset comes before their own
        self._pending = np.zeros(self.num_envs, bool)  # slots that the next call resets

    def reset(self) -> AnyArray:
        self._pending = np.zeros(self.num_envs, bool)
        return np.array(self.env.reset()[0])

    def step(self, actions: AnyArray) -> Step:
        returned, reward, terminated, truncated, infos = self.env.step(actions)
        obs, played = np.array(returned), ~self._pending
        terminated, truncated = np.array(terminated, bool) & played, np.array(truncated, bool) & played
        ended = terminated | truncated
        truncated &= ~terminated  # an episode that also terminates does not count as truncated
        next_obs = obs
        if ended.any() and self.mode is AutoresetMode.SAME_STEP:
            if "final_obs" not in infos:
                raise SpaceError(f"{self.env} resets in the same step but gives no infos['final_obs']")
            next_obs = obs.copy()
            next_obs[ended] = np.stack(list(infos["final_obs"][ended]))
        elif ended.any() and self.mode is AutoresetMode.DISABLED:
            options = {"reset_mask": ended.copy()}
            obs = next_obs.copy()
            obs[ended] = np.array(self.env.reset(options=options)[0])[ended]
            if self._by_mask and "reset_mask" in options:  # gymnasium's vectors take it out
                raise SpaceError(
                    f"{self.env} ignores reset(options={{'reset_mask': ...}}), which it would need for its "
                    "autoreset mode; pass the options on, or use autoreset_mode=AutoresetMode.SAME_STEP"
                )
        self._pending = ended if self.mode is AutoresetMode.NEXT_STEP else self._pending
        reward = np.where(played, np.asarray(reward, np.float32), np.float32(0))
        return Step(next_obs, reward, terminated, truncated, obs, None if played.all() else played)


class _SB3Batched:
    """An SB3 ``VecEnv``: the successor is ``infos[i]["terminal_observation"]`` where an episode ended."""

    def __init__(self, env: Any) -> None:
        self.env, self.num_envs = env, int(env.num_envs)
        self.observation_space = _supported(env.observation_space)
        self.action_space = env.action_space

    def reset(self) -> AnyArray:
        return np.array(self.env.reset())

    def step(self, actions: AnyArray) -> Step:
        returned, reward, dones, infos = self.env.step(actions)
        obs, ended = np.array(returned), np.array(dones, bool)
        truncated = np.zeros(self.num_envs, bool)
        next_obs = obs
        if ended.any():
            next_obs = obs.copy()
            for i in np.flatnonzero(ended):
                if "terminal_observation" not in infos[i]:
                    raise SpaceError(
                        f"{self.env}: infos[{i}] lacks 'terminal_observation' at an episode's end"
                    )
                next_obs[i] = infos[i]["terminal_observation"]
                truncated[i] = bool(infos[i].get("TimeLimit.truncated", False))
        return Step(next_obs, np.array(reward, np.float32), ended & ~truncated, truncated, obs)


def _supported(space: Any) -> gymnasium.Space[Any]:
    if isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
        raise SpaceError(f"{space} is not supported; flatten it with gymnasium.wrappers.FlattenObservation")
    return cast("gymnasium.Space[Any]", space)
