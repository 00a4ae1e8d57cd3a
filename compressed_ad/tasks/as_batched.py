"""Vectorised environments of other libraries as a ``BatchedEnv``, and a task family as one of gymnasium's.

Libraries differ in what they return when an episode ends. A ``Step`` always holds the true successor in
``next_obs`` and the first observation of the new episode in ``obs``, and every step is a real transition:
where an environment would spend a dummy step on a reset, the adapter resets those slots itself.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.base import BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray, BoolArray, IntArray, Step


def as_batched(env: Any) -> BatchedEnv:
    """``env`` as a ``BatchedEnv``.

    Takes an SB3 ``VecEnv`` (recognised by its methods; SB3 is not imported), a gymnasium ``VectorEnv`` in any
    autoreset mode, or a ``BatchedEnv``, which is returned as it is. Raises ``UsageError`` for anything else.
    """
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


class _GymnasiumBatched:
    """A gymnasium ``VectorEnv``.

    Same-step autoreset: the successor is ``infos["final_obs"]``. Next-step autoreset and no autoreset: ended
    slots are reset at once through ``options["reset_mask"]``, so that gymnasium's dummy step never happens.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.observation_space = _supported(env.single_observation_space)
        self.action_space = env.single_action_space
        mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._same_step = AutoresetMode(mode) is AutoresetMode.SAME_STEP

    def reset(self) -> AnyArray:
        return np.array(self.env.reset()[0])

    def step(self, actions: AnyArray) -> Step:
        returned, reward, terminated, truncated, infos = self.env.step(actions)
        obs = np.array(returned)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        ended = terminated | truncated
        truncated &= ~terminated  # where the world ends just as time is up, it ended
        next_obs = obs
        if ended.any() and self._same_step:
            if "final_obs" not in infos:
                raise SpaceError(f"{self.env} resets in the same step but gives no infos['final_obs']")
            next_obs = obs.copy()
            next_obs[ended] = np.stack(list(infos["final_obs"][ended]))
        elif ended.any():
            obs = np.array(self.env.reset(options={"reset_mask": ended.copy()})[0])
            if not np.array_equal(obs[~ended], next_obs[~ended]):
                raise SpaceError(
                    f"{self.env} ignores reset(options={{'reset_mask': ...}}), which it would need for its "
                    "autoreset mode; make it with autoreset_mode=AutoresetMode.SAME_STEP"
                )
        return Step(next_obs, np.asarray(reward, np.float32), terminated, truncated, obs)


class _SB3Batched:
    """An SB3 ``VecEnv``: the successor is ``infos[i]["terminal_observation"]`` where an episode ended."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.num_envs = int(env.num_envs)
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


class FamilyVectorEnv(VectorEnv[AnyArray, AnyArray, AnyArray]):
    """Slots of a task family as a gymnasium ``VectorEnv`` with same-step autoreset.

    ``tasks`` is (N, P), one row per slot. Slots are seeded by ``reset(seed=...)``: an integer s gives slot i
    the seed s + i, as in gymnasium; without a seed, from entropy at first and then continued.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(self, family: TaskFamily, tasks: AnyArray) -> None:
        self.family, self.tasks, self.num_envs = family, np.asarray(tasks), len(tasks)
        self.single_observation_space = family.observation_space
        self.single_action_space = family.action_space
        self.observation_space = batch_space(family.observation_space, self.num_envs)
        self.action_space = batch_space(family.action_space, self.num_envs)
        self._env: BatchedEnv | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[AnyArray, dict[str, Any]]:
        """Start an episode in every slot; (N, ...) observations and no infos."""
        if seed is not None or self._env is None:
            self._env = self.family.make(self.tasks, self._seeds(seed))
        return self._env.reset(), {}

    def step(self, actions: AnyArray) -> tuple[AnyArray, AnyArray, BoolArray, BoolArray, dict[str, Any]]:
        """Advance every slot; where one ended, ``infos["final_obs"]`` holds the true successor."""
        if self._env is None:
            raise UsageError("step() before reset()")
        step = self._env.step(actions)
        ended = step.terminated | step.truncated
        infos: dict[str, Any] = {}
        if ended.any():
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(ended):
                final[i] = step.next_obs[i]
            infos = {"final_obs": final, "_final_obs": ended}
        return step.obs, step.reward, step.terminated, step.truncated, infos

    def _seeds(self, seed: int | list[int | None] | None) -> IntArray:
        if isinstance(seed, int):
            return np.arange(seed, seed + self.num_envs)
        fresh = np.random.default_rng().integers(2**31, size=self.num_envs)
        if seed is None:
            return fresh
        return np.array([fresh[i] if s is None else s for i, s in enumerate(seed)])
