"""Tasks as environments of gymnasium; for several, put them into one of its vector environments.

Importing this module registers every built-in family, e.g.
``gymnasium.make("CompressedAD/Darkroom-v0", task=(3, 4))``.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.tasks.base import TASK_FAMILY, BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray


class TaskEnv(gymnasium.Env[AnyArray, Any]):
    """One task of ``family``; ``task`` is a row of parameters, or an index into ``family.tasks()``.

    ``reset(seed=...)`` seeds the task's slot; without a seed the random stream continues. Infos are empty.
    """

    def __init__(self, family: TaskFamily, task: AnyArray | int) -> None:
        self.family = family
        tasks = family.tasks()
        if np.ndim(task) == 0 and not 0 <= int(task) < len(tasks):
            raise UsageError(f"{family.name}: task {task} is out of 0..{len(tasks) - 1}")
        self.task = tasks[int(task)] if np.ndim(task) == 0 else np.asarray(task, tasks.dtype)
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self._env: BatchedEnv | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[AnyArray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or self._env is None:
            seeds = self.np_random.integers(2**31, size=1) if seed is None else np.array([seed])
            self._env = self.family.make(self.task[None], seeds)
        return self._env.reset()[0], {}

    def step(self, action: Any) -> tuple[AnyArray, float, bool, bool, dict[str, Any]]:
        """Advance by one action; the observation is the true successor, also at an episode's end."""
        if self._env is None:
            raise UsageError("step() before reset()")
        step = self._env.step(np.asarray(action)[None])
        return step.next_obs[0], float(step.reward[0]), bool(step.terminated[0]), bool(step.truncated[0]), {}


def make_task_env(family: str, task: AnyArray | int, **family_kwargs: Any) -> TaskEnv:
    """``TaskEnv`` of a family given by name; the entry point of the registered ids."""
    return TaskEnv(TASK_FAMILY[family](**family_kwargs), task)


def gymnasium_id(family: str) -> str:
    """``CompressedAD/KeyToDoor-v0`` for ``key_to_door``."""
    return f"CompressedAD/{''.join(word.capitalize() for word in family.split('_'))}-v0"


for _name in TASK_FAMILY:
    gymnasium.register(
        gymnasium_id(_name), f"{__name__}:make_task_env", kwargs={"family": _name}, disable_env_checker=True
    )
