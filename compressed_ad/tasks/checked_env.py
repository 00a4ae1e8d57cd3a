"""Environments under watch: whatever learns, replays or evaluates plays through ``CheckedEnv``.

An environment that breaks a promise is reported at that step, with its name, task and step. Otherwise NumPy
would cast and broadcast in silence what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np

from compressed_ad.errors import CompressedADError, NumericalError, RunError, SpaceError, users_code
from compressed_ad.tasks.base import BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray, IntArray, Step, cast, outside

OBSERVATIONS, FLAGS = ("next_obs", "obs"), ("terminated", "truncated")


def checked_slots(
    family: TaskFamily, tasks: AnyArray, seeds: IntArray, ids: Sequence[int] | None = None, *,
    strict: bool = False,
) -> CheckedEnv:  # fmt: skip
    """``family.make`` under watch; ``ids`` (N,) name the tasks in messages, by default their parameters."""
    names, label = np.asarray(tasks).tolist() if ids is None else ids, family_label(family)
    with users_code(lambda: f"{label}, {_listed('task', names)}: it cannot be made"):
        env = CheckedEnv(
            family.make(tasks, seeds), label, family.observation_space, family.action_space,
            tasks=names, horizon=family.horizon, strict=strict,
        )  # fmt: skip
    if env.num_envs != len(tasks):
        raise RunError(f"{label}: make() of {len(tasks)} tasks gives num_envs {env.num_envs}")
    return env


class CheckedEnv:
    """A ``BatchedEnv`` that takes and gives elements of its spaces, in their dtypes, or raises an error.

    Messages begin with ``name`` and the task of a slot. Shapes, dtypes and finite numbers are checked at
    every step, limits of discrete spaces at the first one; if ``strict``, those of a Box too, and at every
    step. Actions are cast too, so that the compact ones of a history file do what the recorded ones did.
    Without an observation space, observations keep the shape and dtype of the first ones. An episode must end
    within ``horizon`` steps. An environment that steps its slots one after another may have an attribute
    ``slot``: the one it is at.
    """

    def __init__(
        self, env: BatchedEnv, name: str, observation_space: gymnasium.Space[Any] | None = None,
        action_space: gymnasium.Space[Any] | None = None, *, tasks: Sequence[object] | None = None,
        horizon: int | None = None, strict: bool = False,
    ) -> None:  # fmt: skip
        self.env, self.name, self.num_envs, self.horizon = env, name, env.num_envs, horizon
        self.observation_space, self.action_space = observation_space, action_space
        self._tasks, self._strict, self._count = tasks, strict, 0
        self._action = None if action_space is None else (action_space.dtype, self._shape(action_space))

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.env, name)  # action masks, say

    def reset(self) -> AnyArray:
        self._count, space = 0, self.observation_space
        with users_code(lambda: f"{self._where(getattr(self.env, 'slot', None))}, reset"):
            obs: AnyArray = self.env.reset()
        seen = getattr(obs, "dtype", None), np.shape(obs)
        if space is not None:
            seen = space.dtype, self._shape(space)
        flags = np.dtype(bool), (self.num_envs,)
        self._pairs = (seen, seen, (np.dtype(np.float32), (self.num_envs,)), flags, flags)
        self._kinds = tuple(part for parts in zip(*self._pairs, strict=True) for part in parts)
        self._obs = obs = self._converted("reset()", obs, *seen)
        self._check_finite("reset()", obs)
        self._check_limits("reset()", obs, space)
        self._before: AnyArray | None = obs.copy()
        self._ended = np.zeros(self.num_envs, bool)
        return obs

    def step(self, actions: AnyArray) -> Step:
        self._count += 1
        if self._action is not None:
            actions = np.asarray(actions)
            if (actions.dtype, actions.shape) != self._action:
                actions = self._converted("the action", actions, *self._action)
            if self._count == 1:
                self._check_finite("the action", actions)
                self._check_limits("the action", actions, self.action_space)
        try:
            step = self.env.step(actions)
        except BaseException:  # entering a ``with`` at each step would take longer than most checks
            with users_code(lambda: self._where(getattr(self.env, "slot", None))):
                raise
        if _kinds(step) != self._kinds:
            step = self._repaired(step)
        for name in (*OBSERVATIONS, "reward"):
            self._check_finite(f"step().{name}", getattr(step, name))
        if self._strict or self._count == 1:
            for name in OBSERVATIONS:
                self._check_limits(f"step().{name}", getattr(step, name), self.observation_space)
            inner = ~step.ended
            if not np.array_equal(step.obs[inner], step.next_obs[inner]):
                raise self._error("obs differs from next_obs in a slot whose episode goes on")
        if np.may_share_memory(step.obs, self._obs):
            if self._before is not None and not np.array_equal(self._before, self._obs):
                raise self._error("arrays of an earlier Step change in later steps; return new arrays")
            self._before = step.obs.copy()
        else:
            self._before = None
        self._obs = step.obs
        if self.horizon is not None:
            self._ended |= step.ended
            if self._count % self.horizon == 0:
                if not self._ended.all():
                    longer = f"an episode lasts longer than horizon = {self.horizon} steps"
                    raise self._error(longer, int(np.argmin(self._ended)))
                self._ended[:] = False
        return step

    def _shape(self, space: gymnasium.Space[Any]) -> tuple[int, ...]:
        return (self.num_envs, *(space.shape or ()))

    def _where(self, slot: int | None = None) -> str:
        names = range(self.num_envs) if self._tasks is None else self._tasks
        listed = _listed("slot" if self._tasks is None else "task", names if slot is None else [names[slot]])
        return f"{self.name}, {listed}, step {self._count}"

    def _error(
        self, problem: str, slot: int | None = None, kind: type[CompressedADError] = RunError
    ) -> CompressedADError:
        return kind(f"{self._where(slot)}: {problem}")

    def _converted(
        self, what: str, array: Any, dtype: Any, shape: tuple[int, ...], exact: bool = False
    ) -> AnyArray:
        """``array`` in the dtype of its space; ``SpaceError`` if it has another shape or would change."""
        fitting = cast(array, dtype) if isinstance(array, np.ndarray) and array.shape == shape else None
        if fitting is None or (exact and array.dtype != dtype):
            got = f"{getattr(array, 'dtype', type(array).__name__)} {np.shape(array)}"
            raise self._error(f"{what} must be {dtype} {shape}, not {got}", kind=SpaceError)
        return fitting

    def _repaired(self, step: Step | Any) -> Step:
        """``step`` in the promised dtypes, where that is the same step."""
        if not isinstance(step, Step):
            raise self._error(f"step() must return a Step, not {type(step).__name__}")
        arrays: dict[str, AnyArray] = {}
        for name, kind in zip((*OBSERVATIONS, "reward", *FLAGS), self._pairs, strict=True):
            exact = self._strict and name not in OBSERVATIONS
            arrays[name] = self._converted(f"step().{name}", getattr(step, name), *kind, exact)
        return Step(**arrays, played=step.played)

    def _check_finite(self, what: str, array: AnyArray) -> None:
        if array.dtype.kind == "f" and not (fine := np.isfinite(array).reshape(len(array), -1)).all():
            raise self._error(f"{what} is not finite", int(np.argmin(fine.all(1))), NumericalError)

    def _check_limits(self, what: str, array: AnyArray, space: gymnasium.Space[Any] | None) -> None:
        if space is None or (isinstance(space, gymnasium.spaces.Box) and not self._strict):
            return
        if (wrong := outside(space, array)).any():
            slot = int(np.argmax(wrong))
            raise self._error(f"{what}: {array[slot]} lies outside {space}", slot, SpaceError)


def _kinds(step: Any) -> Any:
    """Dtypes and shapes of the arrays of ``step``; None if it has others."""
    try:
        n, o, r, t, u = step.next_obs, step.obs, step.reward, step.terminated, step.truncated
        shapes = n.shape, o.shape, r.shape, t.shape, u.shape  # flat tuples compare fast
        return (n.dtype, o.dtype, r.dtype, t.dtype, u.dtype, *shapes)
    except AttributeError:
        return None


def _listed(word: str, names: Iterable[object]) -> str:
    shown = list(dict.fromkeys(map(str, names)))
    return f"{word}{'s' * (len(shown) != 1)} {', '.join(shown[:8])}{', ...' * (len(shown) > 8)}"


def family_label(family: TaskFamily) -> str:
    """What messages call ``family``: its name, or ``module:class`` if it is a user's."""
    kind = type(family)
    own = not kind.__module__.startswith("compressed_ad.")
    return f"task family {f'{kind.__module__}:{kind.__qualname__}' if own else family.name!r}"
