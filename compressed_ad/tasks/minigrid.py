"""MiniGrid: a task is one layout of an environment, as ``minigrid:MiniGrid-SimpleCrossingS9N1-v0``.

Importing this module needs MiniGrid; without it ``MissingExtraError`` says what to install.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import MissingExtraError, UsageError, users_code
from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Seed
from compressed_ad.tasks.from_gymnasium import Env, GymnasiumFamily
from compressed_ad.types import AnyArray, FloatArray

try:
    from minigrid.wrappers import ImgObsWrapper  # registers MiniGrid's environments
except ImportError as error:
    raise MissingExtraError("minigrid:ID", "minigrid") from error


@checked
class MiniGridFamily(GymnasiumFamily):
    """A MiniGrid environment; tasks are seeds that lay it out differently, for every episode.

    ``n_task`` layouts are drawn with ``task_seed``; a task row is the seed of ``reset``. Randomness within an
    episode (moving obstacles) comes from the slot's own seed. Observations are the egocentric image,
    (7, 7, 3) uint8: object, colour and state of each cell. The text of the mission is not observed: a layout
    has one mission, and a task hides it. ``kwargs``, ``horizon``, ``best_return`` and ``random_episodes`` are
    those of ``GymnasiumFamily``.

    Raises ``UsageError`` for unknown environments, and if the seeds make fewer layouts than ``n_task``.
    """

    prefix: ClassVar[str] = "minigrid"
    by_parameters: ClassVar[bool] = False

    def __init__(
        self, env_id: str, n_task: Count = 64, task_seed: Seed = 0, kwargs: Mapping[str, Any] | None = None,
        horizon: Count | None = None, best_return: float | None = None, random_episodes: Count = 10,
    ) -> None:  # fmt: skip
        super().__init__(env_id, None, n_task, task_seed, kwargs, horizon, best_return, random_episodes)

    def _own_limit(self, env: Env) -> int | None:
        # BabyAI's levels give 0 and choose a limit in each reset.
        return int(getattr(env.unwrapped, "max_steps", 0)) or None

    def _construct(self, arguments: Mapping[str, Any]) -> Env:
        env = super()._construct(arguments)
        if not isinstance(env.observation_space, spaces.Dict) or "image" not in env.observation_space.spaces:
            raise UsageError(f"{self.name}: is no MiniGrid environment: it shows no image of the grid")
        seen: Env = ImgObsWrapper(env)
        return seen

    @cached_property
    def _tasks(self) -> FloatArray:
        draws = rng(self.task_seed, "minigrid layouts", self.env_id)
        seeds = draws.integers(2**31, size=10 * self.n_task).tolist()
        env, found = self._construct({}), dict[bytes, int]()
        for seed in seeds:
            with users_code(f"{self.name}: cannot be laid out", UsageError):
                env.reset(seed=seed)
            bare: Any = env.unwrapped
            agent = (*(int(x) for x in bare.agent_pos), int(bare.agent_dir), bare.mission)
            found.setdefault(bytes(bare.grid.encode().tobytes()) + repr(agent).encode(), seed)
            if len(found) == self.n_task:
                break
        env.close()
        if len(found) < self.n_task:
            raise UsageError(
                f"{self.name}: {len(seeds)} seeds make only {len(found)} different layouts, fewer than "
                f"n_task {self.n_task}; lower n_task, or choose an environment that draws its layout"
            )
        return np.array(list(found.values()), np.float64)[:, None]

    def environment(self, task: AnyArray) -> Env:
        """The environment that resets to the layout of a row of ``tasks()``."""
        return _FixedLayout(self._construct({}), int(task[0]))


class _FixedLayout(gymnasium.Wrapper[AnyArray, Any, AnyArray, Any]):
    """Every reset makes the same layout; the seed of a reset only affects the steps after it."""

    def __init__(self, env: Env, layout_seed: int) -> None:
        super().__init__(env)
        self._layout_seed = layout_seed
        self._random = np.random.default_rng(layout_seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[AnyArray, dict[str, Any]]:
        if seed is not None:
            self._random = rng(seed, "minigrid")
        made = self.env.reset(seed=self._layout_seed, options=options)
        self.env.unwrapped.np_random = self._random
        return made
