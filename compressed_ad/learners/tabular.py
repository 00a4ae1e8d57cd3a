"""Tabular Q-learning (Watkins 1989): independent learners, every stream a run of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray

from compressed_ad.errors import ConfigError
from compressed_ad.learners.finite import FiniteLearner, Schedule
from compressed_ad.registry import checked
from compressed_ad.settings import Count, Fraction, NonNegative, Whole
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray

if TYPE_CHECKING:
    from compressed_ad.learners.finite_players import Player


@checked
class TabularQ(FiniteLearner):
    """Tabular Q-learning with epsilon-greedy exploration; every stream is a run of its own.

    A learner's state is its observation and the rewards above 0 that it met in the episode, counted up to
    ``memory``: with 1, it remembers a key that cannot be seen. Equal values share the greedy probability.
    Epsilon falls linearly from ``epsilon`` to ``epsilon_final`` over the share ``anneal`` of a stream's steps
    or, if ``episodes`` is given, over that share of its first ``episodes`` episodes, episode by episode.

    ``initial`` is the value of an action that was not tried yet, or "uniform": drawn from [0, 1). With
    ``fade``, it falls as (1 + n) ** -fade with the n visits of its state. ``sweeps`` (Dyna) passes over all
    tried actions, each with its last outcome, follow each episode; they suit deterministic tasks.
    """

    name = "TabularQ"

    def __init__(
        self,
        learning_rate: Annotated[float, Gt(0), Le(1)] = 0.5,
        gamma: Fraction = 0.9,
        epsilon: Fraction = 1.0,
        epsilon_final: Fraction = 0.05,
        anneal: Fraction = 0.5,
        episodes: Count | None = None,
        initial: float | Literal["uniform"] = 0.0,
        fade: NonNegative = 0.0,
        sweeps: Whole = 0,
        memory: Whole = 0,
    ) -> None:
        if fade and initial == "uniform":
            raise ConfigError("tabular: fade lowers initial values from a number; initial is uniform")
        self.learning_rate, self.gamma, self.initial, self.fade = learning_rate, gamma, initial, fade
        self.sweeps, self.memory = sweeps, memory
        self.schedule = Schedule(epsilon, epsilon_final, anneal, episodes)
        self.judges_updates = sweeps == 0  # a step is used again in later sweeps

    @property
    def step_seconds(self) -> float:
        """As ``Timed.step_seconds``."""
        return 1.6e-7 + 9e-8 * self.sweeps

    @property
    def told(self) -> str:
        return "nothing of the task"

    def table_bytes(self, n_obs: int, n_action: int) -> int:
        marks, plans = bool(self.fade or self.sweeps), bool(self.sweeps)
        by_pair = 4 + marks + 8 * plans
        return (self.memory + 1) * n_obs * (n_action * by_pair + 4 * bool(self.fade) + 4 * plans)

    def player(
        self, family: TaskFamily, tasks: AnyArray, n_stream: int, random: NDArray[np.uint64]
    ) -> Player:
        from compressed_ad.learners.finite_kernels import Rule
        from compressed_ad.learners.finite_players import TabularPlayer

        observations, actions = self.spaces(family)
        uniform = self.initial == "uniform"
        initial = 0.0 if isinstance(self.initial, str) else float(self.initial)
        rule = Rule(self.learning_rate, self.gamma, initial, self.fade, self.sweeps)
        return TabularPlayer(rule, uniform, observations.n, actions.n, self.memory, random)
