"""Slots of a task family that say where its code failed: family, task, step, and the user's file and line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressed_ad.errors import users_code
from compressed_ad.tasks.base import BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray, IntArray, Step


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
        with users_code(lambda: f"{self._where()}, step {self._step}"):
            return self._env.step(actions)  # type: ignore[union-attr]

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
