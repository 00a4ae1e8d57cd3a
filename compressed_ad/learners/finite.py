"""What the learners that keep tables share: numbered spaces, schedules and checks.

``finite_players`` plays and records, ``finite_kernels`` has what is compiled.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.learners.base import Progress
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, History, IntArray

if TYPE_CHECKING:
    from compressed_ad.learners.finite_players import Player

BLOCK = 256
"""Tasks that are learned together, if their tables and records stay below ``BLOCK_BYTES``."""
BLOCK_BYTES = 1 << 28


class Numbering:
    """A Discrete or MultiDiscrete space with its elements numbered; the last component changes fastest."""

    def __init__(self, space: Any) -> None:
        if isinstance(space, spaces.Discrete):
            self.sizes, self.first = np.array([space.n], np.int64), np.array([space.start], np.int64)
        elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
            self.sizes, self.first = space.nvec.astype(np.int64), space.start.astype(np.int64)
        else:
            raise SpaceError(f"not {' '.join(str(space).split())}")
        self.shape: tuple[int, ...] = space.shape
        self.n = prod(self.sizes.tolist())

    @cached_property
    def digits(self) -> NDArray[np.int64]:
        """(n, C) the components of all elements in order, each counted from 0."""
        return np.stack(np.unravel_index(np.arange(self.n), tuple(self.sizes.tolist())), axis=-1)

    @cached_property
    def elements(self) -> AnyArray:
        """(n, ...) all elements in order, of the smallest dtype that holds them."""
        values = (self.digits + self.first).reshape(self.n, *self.shape)
        low, high = int(values.min()), int(values.max())
        return values.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))


@dataclass(frozen=True)
class Schedule:
    """Epsilon falls from ``first`` to ``final`` over the share ``anneal`` of steps or ``episodes``."""

    first: float
    final: float
    anneal: float
    episodes: int | None

    def check(self, name: str, family: TaskFamily, n_timesteps: int) -> None:
        """Raise ``ConfigError`` if some stream of ``n_timesteps`` steps may end before the schedule does."""
        if self.episodes is not None and self.episodes * family.horizon > n_timesteps:
            raise ConfigError(
                f"{name}: {self.episodes} episodes of {family.name} take up to "
                f"{self.episodes * family.horizon:,} steps, but a stream has {n_timesteps:,}; "
                "lower episodes or raise n_timesteps"
            )

    def at(self, step: int, episode: IntArray, n_timesteps: int) -> NDArray[np.float64]:
        """(N,) epsilon of the slots at ``step``, in which ``episode`` (N,) episodes ended before."""
        if self.episodes is None:
            passed = np.full(len(episode), float(step))
            length = self.anneal * n_timesteps
        else:
            passed, length = episode.astype(np.float64), self.anneal * self.episodes
        share = np.minimum(passed / length, 1.0) if length else np.ones(len(episode))
        return self.first + (self.final - self.first) * share


class FiniteLearner(ABC):
    """``SourceLearner`` for Discrete and MultiDiscrete spaces; every stream is a run of its own."""

    name: str
    schedule: Schedule
    judges_updates: bool = False
    """Whether ``Player.learn`` fills in ``log_prob_next``."""

    @property
    @abstractmethod
    def told(self) -> str:
        """What the learner knows before it learns, for reports."""

    @abstractmethod
    def table_bytes(self, n_obs: int, n_action: int) -> int:
        """Size of the tables of one stream."""

    @abstractmethod
    def player(
        self, family: TaskFamily, tasks: AnyArray, n_stream: int, random: NDArray[np.uint64]
    ) -> Player:
        """The learners of ``tasks`` (N, P), ``n_stream`` each, with the random state of each slot."""

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """As ``Checks.check``."""
        observations, actions = self.spaces(family)
        self.schedule.check(self.name, family, n_timesteps)
        self._check_memory(family, observations.n, actions.n, n_stream)

    def block_size(self, family: TaskFamily, *, n_timesteps: int, n_learner: int, n_stream: int) -> int:
        """As ``Blocks.block_size``; ``UsageError`` if one task is too large for the memory."""
        observations, actions = self.spaces(family)
        self._check_memory(family, observations.n, actions.n, n_learner * n_stream)
        row = 2 * observations.elements.nbytes // observations.n + actions.elements.nbytes // actions.n + 22
        stream = self.table_bytes(observations.n, actions.n) + n_timesteps * row
        most: int = BLOCK_BYTES // (n_learner * n_stream * stream)
        return max(1, min(BLOCK, most))

    def learn(
        self, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int, n_learner: int,
        n_stream: int, seed: int, progress: Progress = lambda steps: None,
    ) -> list[History]:  # fmt: skip
        """As ``SourceLearner.learn``; every stream counts as a learner, and every step as an update."""
        # Numba takes a second to import, too long for a command line that only prints help.
        from compressed_ad.learners.finite_players import play

        self.check(family, n_timesteps=n_timesteps, n_stream=n_learner * n_stream)
        return play(
            self, family, task_ids, np.asarray(tasks),
            n_timesteps=n_timesteps, n_stream=n_learner * n_stream, seed=seed, progress=progress,
        )  # fmt: skip

    def spaces(self, family: TaskFamily) -> tuple[Numbering, Numbering]:
        """The numbered observations and actions; ``SpaceError`` if there are infinitely many."""
        numbered = []
        for kind in ("observation", "action"):
            try:
                numbered.append(Numbering(getattr(family, f"{kind}_space")))
            except SpaceError as error:
                raise SpaceError(
                    f"{family.name}: {self.name} learns from tables, so its {kind}s must be Discrete or "
                    f"MultiDiscrete, {error}; try the learner ppo or sb3:PPO"
                ) from None
        return numbered[0], numbered[1]

    def _check_memory(self, family: TaskFamily, n_obs: int, n_action: int, n_stream: int) -> None:
        needed, there = n_stream * self.table_bytes(n_obs, n_action), physical_memory()
        if needed > there / 2:
            raise UsageError(
                f"{family.name}: {self.name}'s tables for the {n_stream:,} stream(s) of one task take "
                f"{needed / 2**30:,.1f} GiB ({n_obs:,} observations x {n_action:,} actions), more than half "
                f"of this machine's {there / 2**30:,.1f} GiB; choose a smaller family, memory or n_stream"
            )


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
