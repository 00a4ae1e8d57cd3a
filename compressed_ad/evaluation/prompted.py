"""Does a model play worse after its own first steps than after those of the source algorithm?

A model that imitates its own clumsy episodes does; one that does not see their inside cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.agents import Watcher
from compressed_ad.evaluation.evaluate import evaluate_in_context, evaluation_slots
from compressed_ad.models.ad import AD
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, BoolArray, Step


@dataclass(frozen=True)
class AfterPrompt:
    """Play after the first S steps, in all slots together."""

    knew: float  # share of slots that met a reward in their first S steps
    success: float  # share of rewarded ones among these slots' later episodes; NaN if there are none
    episodes: int  # later episodes of these slots: begun after the first S steps, and complete


class _Prompted(Watcher):
    """Gives the first S actions, while the agent sees what follows from them."""

    def __init__(self, actions: AnyArray | None, n_first: int) -> None:
        self.actions, self.n_first = actions, n_first

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        self.clock, self.n_episode, self.n_success = 0, 0, 0
        self.knew: BoolArray = np.zeros(n_env, bool)
        self.counts, self.paid = np.zeros((2, n_env), bool)

    def act(self, obs: AnyArray) -> AnyArray:
        own = super().act(obs)
        if self.actions is None or self.clock >= self.n_first:
            return own
        return self.actions[:, self.clock].astype(own.dtype)  # files keep them in fewer bytes

    def observe(self, actions: AnyArray, step: Step) -> None:
        super().observe(actions, step)
        ended, rewarded = step.ended, step.reward > 0
        self.paid |= rewarded
        if self.clock < self.n_first:
            self.knew |= rewarded
        else:
            judged = ended & self.counts & self.knew
            self.n_episode += int(judged.sum())
            self.n_success += int((judged & self.paid).sum())
            self.counts |= ended
        self.paid &= ~ended
        self.clock += 1


def success_after(
    model: AD,
    family: TaskFamily,
    tasks: AnyArray,
    actions: AnyArray | None,
    *,
    first: int,
    steps: int,
    rollouts: int = 1,
    seed: int = 0,
    **options: Any,
) -> AfterPrompt:
    """Success of ``model`` on ``tasks`` (N, P) in ``steps`` steps after its ``first`` steps.

    ``actions`` (N, M, at least ``first``), integers or floats, are those of the source in M ``rollouts`` of
    each task, such as the recorded actions of its histories; None: the model's own. ``options`` are those of
    ``InContextAgent``. Where an environment is random, outcomes are not those that the source saw.
    """
    if actions is not None:
        if actions.shape[:2] != (len(tasks), rollouts) or actions.shape[2] < first:
            expected = f"({len(tasks)}, {rollouts}, at least {first})"
            raise UsageError(f"actions: expected {expected}, got {actions.shape}")
        actions = actions.reshape(-1, *actions.shape[2:])
    env, found = evaluation_slots(family, tasks, rollouts, seed), _Prompted(actions, first)
    evaluate_in_context(model, env, eval_timesteps=first + steps, watch=found.watch, seed=seed, **options)
    success = found.n_success / found.n_episode if found.n_episode else float("nan")
    return AfterPrompt(float(found.knew.mean()), success, found.n_episode)
