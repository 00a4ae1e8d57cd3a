"""Environments under watch: whatever learns, replays or evaluates plays through ``CheckedEnv``.

An environment that breaks a promise is reported at that step, with its name, task and step. Otherwise NumPy
would cast and broadcast in silence what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from compressed_ad.errors import CompressedADError, NumericalError, RunError, SpaceError, users_code
from compressed_ad.tasks.base import BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray, IntArray, Step, cast, outside

OBSERVATIONS, FLAGS = ("next_obs", "obs"), ("terminated", "truncated")


def checked_slots(
    family: TaskFamily, tasks: AnyArray, seeds: IntArray, ids: Sequence[int] | None = None
) -> CheckedEnv:
    """``family.make`` under watch; ``ids`` (N,) name the tasks in messages, by default their parameters."""
    names = np.asarray(tasks).tolist() if ids is None else ids
    return CheckedEnv(
        Slots(family, tasks, seeds, names), family.name, family.observation_space, family.action_space,
        label=lambda slot: f"task {names[slot]}", horizon=family.horizon,
    )  # fmt: skip


class CheckedEnv:
    """A ``BatchedEnv`` that takes and gives elements of its spaces, in their dtypes, or raises an error.

    Messages begin with ``name`` and the ``label`` of a slot. Shapes and dtypes are checked at every step,
    values at the first one; the bounds of a Box only if ``bounded``. Actions are cast too, so that the
    compact ones of a history file do what the recorded ones did. Without an observation space, observations
    keep the shape and dtype of the first ones. An episode must end within ``horizon`` steps.
    """

    def __init__(
        self, env: BatchedEnv, name: str, observation_space: gymnasium.Space[Any] | None = None,
        action_space: gymnasium.Space[Any] | None = None, *, label: Callable[[int], str] = "slot {}".format,
        horizon: int | None = None, bounded: bool = False,
    ) -> None:  # fmt: skip
        self.env, self.name, self.num_envs, self.horizon = env, name, env.num_envs, horizon
        self.observation_space, self.action_space = observation_space, action_space
        self._label, self._bounded, self._count = label, bounded, 0
        self._action = None if action_space is None else (action_space.dtype, self._shape(action_space))

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.env, name)  # action masks, say

    def reset(self) -> AnyArray:
        obs, self._count = self.env.reset(), 0
        space = self.observation_space
        seen = (
            (getattr(obs, "dtype", None), np.shape(obs))
            if space is None
            else (space.dtype, self._shape(space))
        )
        flags = np.dtype(bool), (self.num_envs,)
        self._pairs = (seen, seen, (np.dtype(np.float32), (self.num_envs,)), flags, flags)
        self._kinds = tuple(part for parts in zip(*self._pairs, strict=True) for part in parts)
        obs = self._converted("reset()", obs, *seen)
        self._check_values("reset()", obs)
        self._obs: AnyArray = obs
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
                self._check_values("the action", actions, self.action_space)
        step = self.env.step(actions)
        if _kinds(step) != self._kinds:
            step = self._repaired(step)
        if self._count == 1:
            self._check_first(step)
        if np.may_share_memory(step.obs, self._obs):
            if self._before is not None and not np.array_equal(self._before, self._obs, equal_nan=True):
                raise self._error("arrays of an earlier Step change in later steps; return new arrays")
            self._before = step.obs.copy()
        else:
            self._before = None
        self._obs = step.obs
        if self.horizon is not None:
            self._ended |= step.terminated
            self._ended |= step.truncated
            if self._count % self.horizon == 0:
                if not self._ended.all():
                    longer = f"an episode lasts longer than horizon = {self.horizon} steps"
                    raise self._error(longer, int(np.argmin(self._ended)))
                self._ended[:] = False
        return step

    def _shape(self, space: gymnasium.Space[Any]) -> tuple[int, ...]:
        return (self.num_envs, *(space.shape or ()))

    def _error(
        self, problem: str, slot: int | None = None, kind: type[CompressedADError] = RunError
    ) -> CompressedADError:
        last = self.num_envs - 1
        labels = dict.fromkeys([self._label(0), self._label(last)] if slot is None else [self._label(slot)])
        return kind(f"{self.name}, {' to '.join(labels)}, step {self._count}: {problem}")

    def _converted(self, what: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> AnyArray:
        """``array`` in the dtype of its space; ``SpaceError`` if it has another shape or would change."""
        fitting = cast(array, dtype) if isinstance(array, np.ndarray) and array.shape == shape else None
        if fitting is None:
            got = f"{getattr(array, 'dtype', type(array).__name__)} {np.shape(array)}"
            raise self._error(f"{what} must be an array {dtype} {shape}, not {got}", kind=SpaceError)
        return fitting

    def _repaired(self, step: Step | Any) -> Step:
        """``step`` in the promised dtypes, where that is the same step."""
        if not isinstance(step, Step):
            raise self._error(f"step() must return a Step, not {type(step).__name__}")
        kinds = zip((*OBSERVATIONS, "reward", *FLAGS), self._pairs, strict=True)
        arrays = {name: self._converted(f"step().{name}", getattr(step, name), *kind) for name, kind in kinds}
        return Step(**arrays, played=step.played)

    def _check_first(self, step: Step) -> None:
        for name in OBSERVATIONS:
            self._check_values(f"step().{name}", getattr(step, name))
        inner = ~(step.terminated | step.truncated)
        if not np.array_equal(step.obs[inner], step.next_obs[inner]):
            raise self._error("obs differs from next_obs in a slot whose episode goes on")

    def _check_values(self, what: str, array: AnyArray, space: gymnasium.Space[Any] | None = None) -> None:
        space = space or self.observation_space
        if array.dtype.kind == "f" and not (fine := np.isfinite(array).reshape(len(array), -1).all(1)).all():
            raise self._error(f"{what} is not finite", int(np.argmin(fine)), NumericalError)
        if space is None or (isinstance(space, gymnasium.spaces.Box) and not self._bounded):
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


def family_label(family: TaskFamily) -> str:
    """What messages call ``family``: its name, or ``module:class`` if it is a user's."""
    kind = type(family)
    own = not kind.__module__.startswith("compressed_ad.")
    return f"task family {f'{kind.__module__}:{kind.__qualname__}' if own else family.name!r}"


class Slots:
    """``family.make(tasks, seeds)``; whatever that, ``reset`` and ``step`` raise becomes a ``RunError``.

    ``names`` (N,) are those of the tasks in messages.
    An environment that steps its slots one after another may have an attribute ``slot``: the one it is at.
    """

    def __init__(self, family: TaskFamily, tasks: AnyArray, seeds: IntArray, names: Sequence[object]) -> None:
        self._family, self._names, self._step = family, names, 0
        self._env: BatchedEnv | None = None
        with users_code(lambda: f"{self._where()}: it cannot be made"):
            self._env = family.make(tasks, seeds)
            self.num_envs = self._env.num_envs

    def reset(self) -> AnyArray:
        with users_code(lambda: f"{self._where()}, reset"):
            return self._env.reset()  # type: ignore[union-attr]

    def step(self, actions: AnyArray) -> Step:
        self._step += 1
        try:
            return self._env.step(actions)  # type: ignore[union-attr]
        except BaseException:  # entering a ``with`` at each step would take longer than all other checks
            with users_code(lambda: f"{self._where()}, step {self._step}"):
                raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_env":
            raise AttributeError(name)
        return getattr(self._env, name)

    def _where(self) -> str:
        """The family, and the tasks that may be meant."""
        slot = getattr(self._env, "slot", None)
        names = list(dict.fromkeys(map(str, self._names if slot is None else self._names[slot : slot + 1])))
        shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        return f"{family_label(self._family)}, task{'s' * (len(names) != 1)} {shown}"
