"""R-max (Brafman & Tennenholtz 2002) for deterministic tasks: what is unknown is worth trying."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import ConfigError, SpaceError, UsageError, users_code
from compressed_ad.learners.finite import FiniteLearner, Schedule
from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Fraction, Whole
from compressed_ad.tasks.bandit import seeded
from compressed_ad.tasks.base import (
    MovingRewards,
    RewardedPlaces,
    SuccessorTable,
    TaskFamily,
    successors_of,
)
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import Agent, AnyArray

if TYPE_CHECKING:
    from compressed_ad.learners.finite_players import Player, Shared

MAX_ACTIONS = 62
"""Plans keep sets of first actions in one 64-bit number."""

N_PILOT, PILOT_STEPS = 16, 2000

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
    0) met in the episode, up to ``memory``. With ``shared`` (moves only), 16 pilots first play 2000 steps
    each on training tasks, which are not recorded. Every learner then knows the displacements and the paying
    places on which all pilots agree. Without ``settle``, it tries the unknown before going to a reward that
    is farther away, as in the original algorithm.
    """

    name = "RMax"
    step_seconds = 3.5e-7

    def __init__(
        self,
        dynamics: Literal["moves", "pairs", "given"] = "moves",
        memory: Whole = 0,
        settle: bool = True,
        epsilon: Fraction = 0.1,
        epsilon_final: Fraction = 0.0,
        anneal: Fraction = 0.5,
        episodes: Count | None = None,
        shared: bool = False,
    ) -> None:
        if shared and dynamics != "moves":
            raise ConfigError(f"rmax: shared needs dynamics moves, not {dynamics}")
        self.shares = shared
        self._shared: Shared | None = None
        self.dynamics, self.memory, self.settle = dynamics, memory, settle
        self.schedule = Schedule(epsilon, epsilon_final, anneal, episodes)

    @property
    def told(self) -> str:
        pilots = f"{N_PILOT} pilots with {PILOT_STEPS} steps each on training tasks"
        return TOLD[self.dynamics] + (
            f"; and the displacements and paying places that {pilots} agreed on" if self.shares else ""
        )

    def prepared(self, family: TaskFamily, tasks: AnyArray, seed: int) -> RMax:
        """As ``Prepares.prepared``: with what pilots on some of ``tasks`` agree on, if that is shared."""
        if not self.shares:
            return self
        from compressed_ad.learners.finite_players import RMaxPlayer, TableAgent

        random = rng(seed, "RMax pilots")
        chosen = tasks[np.resize(random.permutation(len(tasks)), N_PILOT)]
        pilot = RMax(memory=self.memory, settle=self.settle)
        pilots = TableAgent(pilot, family, chosen, seed, epsilon=0.1)  # they try actions that they can spare
        env = checked_slots(family, chosen, random.integers(2**31, size=N_PILOT))
        pilots.reset(N_PILOT)
        obs = env.reset()
        for _ in range(PILOT_STEPS):
            actions = pilots.act(obs)
            step = env.step(actions)
            pilots.observe(actions, step)
            obs = step.obs
        assert isinstance(pilots.player, RMaxPlayer)
        learner = copy(self)
        learner._shared = pilots.player.shared()
        return learner

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
        if self.shares and self._shared is None:
            raise UsageError("rmax: shared needs the training tasks first: call prepared")
        kind = {"moves": MOVES, "pairs": PAIRS, "given": GIVEN}[self.dynamics]
        given = None
        if self.dynamics == "given":
            given = successors_of(family, tasks)
        return RMaxPlayer(
            kind, self.settle, observations, actions.n, self.memory, random, given, self._shared
        )


def directed_search(family: TaskFamily, tasks: AnyArray, seed: int) -> Agent:
    """An agent that knows where actions lead in its ``tasks`` (N, P), but not what pays.

    Where rewards move, R-max would not look again where it was not paid once; there it is ``Revisit``.
    Raises ``UsageError`` without a successor table, and what ``RMax.check`` raises.
    """
    from compressed_ad.learners.finite_players import TableAgent
    from compressed_ad.learners.revisit import Revisit

    if isinstance(family, MovingRewards):
        search = Revisit(memory=family.paying_places - 1).agents(family, n_timesteps=1)
        return search(tasks, seeded(seed, "directed search"))
    memory = 0
    if isinstance(family, RewardedPlaces) and not family.pays_on:  # what has paid will not pay again
        with users_code(f"{family.name}: rewarded_places"):
            memory = np.asarray(family.rewarded_places(tasks[:1])).shape[1]
    return TableAgent(RMax("given", memory=memory), family, tasks, seed)
