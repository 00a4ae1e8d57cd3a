"""R-max (Brafman & Tennenholtz 2002) for deterministic tasks: what is unknown is worth trying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import SpaceError, UsageError, users_code
from compressed_ad.learners.finite import FiniteLearner, Schedule
from compressed_ad.registry import checked
from compressed_ad.settings import Count, Fraction, Whole
from compressed_ad.tasks.base import SuccessorTable, TaskFamily
from compressed_ad.types import AnyArray

if TYPE_CHECKING:
    from compressed_ad.learners.finite_players import Player

MAX_ACTIONS = 62
"""Plans keep sets of first actions in one 64-bit number."""

DIRECTED_SEARCH = "directed search (told the moves)"
"""What reports call R-max with ``dynamics: given`` where it plays beside models."""

TOLD = {
    "moves": (
        "nothing of the task; of the family, that an observation is a place, that an action moves it by a "
        "constant unless something stops it, and that the reward depends on the place"
    ),
    "pairs": "nothing of the task; of the family, that an action has the same outcome whenever it is tried",
    "given": "where each action leads from each place, and that the reward depends on the place",
}


@checked
class RMax(FiniteLearner):
    """R-max: goes for known rewards, else to the nearest unknown; every stream is a run of its own.

    It plans breadth first over what it knows, with random choices among the nearest. A share of random
    actions falls from ``epsilon`` to ``epsilon_final`` as in ``tabular``.
    ``dynamics`` says what it must learn. ``moves``: by how much each action displaces the place, where walls
    are, and which places pay. ``pairs``: the outcome of every action in every place. ``given``: only which
    places pay; the family must have a successor table. What pays is learned for each number of rewards (above
    0) met in the episode, up to ``memory``. Without ``settle``, it tries the unknown before going to a reward
    that is farther away, as in the original algorithm.
    """

    name = "RMax"

    def __init__(
        self,
        dynamics: Literal["moves", "pairs", "given"] = "moves",
        memory: Whole = 0,
        settle: bool = True,
        epsilon: Fraction = 0.1,
        epsilon_final: Fraction = 0.0,
        anneal: Fraction = 0.5,
        episodes: Count | None = None,
    ) -> None:
        self.dynamics, self.memory, self.settle = dynamics, memory, settle
        self.schedule = Schedule(epsilon, epsilon_final, anneal, episodes)

    @property
    def told(self) -> str:
        return TOLD[self.dynamics]

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        super().check(family, n_timesteps=n_timesteps, n_stream=n_stream)
        _, actions = self.spaces(family)
        if actions.n > MAX_ACTIONS:
            raise SpaceError(f"{family.name}: RMax plans with at most {MAX_ACTIONS} actions, not {actions.n}")
        if self.dynamics == "given" and not isinstance(family, SuccessorTable):
            raise UsageError(
                f"{family.name}: dynamics given needs a family with a successor table (successor_table); "
                "try dynamics moves or pairs"
            )
        if self.dynamics == "moves" and not isinstance(family.observation_space, spaces.MultiDiscrete):
            raise SpaceError(
                f"{family.name}: dynamics moves needs MultiDiscrete observations, coordinates of a place, "
                f"not {family.observation_space}; try dynamics pairs"
            )

    def table_bytes(self, n_obs: int, n_action: int) -> int:
        modes, pairs = self.memory + 1, n_obs * n_action
        return modes * 5 * pairs if self.dynamics == "pairs" else 4 * pairs + modes * n_obs

    def player(
        self, family: TaskFamily, tasks: AnyArray, n_stream: int, random: NDArray[np.uint64]
    ) -> Player:
        from compressed_ad.learners.finite_kernels import GIVEN, MOVES, PAIRS
        from compressed_ad.learners.finite_players import RMaxPlayer

        observations, actions = self.spaces(family)
        kind = {"moves": MOVES, "pairs": PAIRS, "given": GIVEN}[self.dynamics]
        given = None
        if self.dynamics == "given":
            given = _successor_table(family, tasks, observations.n, actions.n)
        return RMaxPlayer(kind, self.settle, observations, actions.n, self.memory, random, given)


def _successor_table(family: TaskFamily, tasks: AnyArray, n_obs: int, n_action: int) -> AnyArray:
    """The family's table (N, O, K); ``SpaceError`` if it leads out of the space."""
    assert isinstance(family, SuccessorTable)
    with users_code(f"{family.name}: successor_table"):
        table = np.asarray(family.successor_table(tasks))
    shape = (len(tasks), n_obs, n_action)
    if table.shape != shape or table.dtype.kind not in "iu" or table.min() < -1 or table.max() >= n_obs:
        raise SpaceError(
            f"{family.name}: successor_table must give whole numbers {shape} from -1 to {n_obs - 1}, "
            f"not {table.dtype} {table.shape} from {table.min()} to {table.max()}"
        )
    return table
