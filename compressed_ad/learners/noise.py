"""Histories without learning: a policy with random actions that become rarer.

AD-epsilon of Zisman et al. 2024, "Emergence of In-Context Reinforcement Learning from Noise Distillation":
actions of a good policy, replaced by uniformly random ones at a rate that falls from 1 over the history. A
model cannot tell such a history from one of learning, so it distils the improvement as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.learners.scripted import MakeAgent, ScriptedLearner
from compressed_ad.registry import checked, import_attribute
from compressed_ad.seeding import SlotDraws
from compressed_ad.settings import Fraction
from compressed_ad.tasks.bandit import Generators
from compressed_ad.tasks.base import OptimalPolicy, TaskFamily
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.types import AnyArray, FloatArray, Step

Policy = Callable[[AnyArray, AnyArray, FloatArray], AnyArray]
"""Actions (N, ...) from tasks (N, P), obs (N, ...) and episode_return (N,): ``optimal_action``."""


@checked
class NoiseDistillation(ScriptedLearner):
    """``SourceLearner`` that plays a policy with fading noise.

    ``policy`` is a callable (tasks, obs, episode_return) -> actions, or its ``module:attribute``; by default
    the optimal policy of families that know one. The share of random actions falls from 1 to ``final``, as
    ``schedule`` says. Actions must be Discrete, MultiDiscrete or a bounded Box.
    """

    name = "Noise"

    def __init__(
        self,
        policy: str | Policy | None = None,
        final: Fraction = 0.0,
        schedule: Literal["linear", "cosine", "quadratic"] = "linear",
    ) -> None:
        self.policy = import_attribute("policy", policy) if isinstance(policy, str) else policy
        if self.policy is not None and not callable(self.policy):
            raise ConfigError(f"noise: policy {policy!r} is a {type(self.policy).__name__}, not a function")
        self.final, self.schedule = final, schedule

    def rate(self, n_timesteps: int) -> FloatArray:
        """(T,) share of random actions at each step."""
        x = np.arange(n_timesteps) / max(n_timesteps - 1, 1)  # elapsed share of the history
        cosine = (1 + np.cos(np.pi * x)) / 2
        left = {"linear": 1 - x, "cosine": cosine, "quadratic": (1 - x) ** 2}[self.schedule]
        return np.asarray(self.final + (1 - self.final) * left)

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        policy = self.policy
        if policy is None:
            if not isinstance(family, OptimalPolicy):
                raise UsageError(
                    f"noise: {family.name} offers no optimal policy (optimal_action); name one with "
                    "learner_kwargs.policy, module:attribute"
                )
            policy = family.optimal_action
        try:
            actions = UniformActions(family.action_space)
        except SpaceError as error:
            raise SpaceError(f"noise: {family.name}: {error}") from None
        rate = self.rate(n_timesteps)
        return lambda tasks, generators: NoisyAgent(policy, tasks, actions, rate, generators)


class NoisyAgent:
    """The policy's actions, each replaced as a whole by a random one at the ``rate`` (T,) of its step.

    Of K actions, the policy's has the probability 1 - rate + rate / K and every other one rate / K; with C
    components, ``probability`` is the C-th root, their geometric mean. In a Box the policy is a point mass,
    far denser than the noise: the relative probability is 1 for its actions and 0 for random ones.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: AnyArray,
        actions: UniformActions,
        rate: FloatArray,
        generators: Generators,
    ) -> None:
        self.policy, self.tasks, self.actions, self.rate = policy, tasks, actions, rate
        self._generators = generators
        self.entropy: FloatArray | None = None

    def reset(self, n_env: int) -> None:
        self._draws = SlotDraws(self._generators(n_env), shape=(1 + self.actions.n_part,))
        self._time, self._return = 0, np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        rate, numbers = float(self.rate[self._time]), self._draws()
        best = np.asarray(self.policy(self.tasks, obs, self._return))
        if best.shape != (shape := (len(numbers), *self.actions.shape)):
            raise UsageError(f"noise: the policy gave actions of shape {best.shape}, expected {shape}")
        best = best.astype(self.actions.dtype)
        noisy = numbers[:, 0] < rate
        replaced = noisy.reshape(-1, *(1 for _ in self.actions.shape))
        chosen = np.where(replaced, self.actions.scaled(numbers[:, 1:]), best)
        if self.actions.count is None:
            self.probability = 1.0 - noisy
        else:
            other = rate / self.actions.count
            likely, n_other = 1 - rate + other, self.actions.count - 1
            same = (chosen == best).reshape(len(best), -1).all(axis=1)
            self.probability = np.where(same, likely, other) ** (1 / self.actions.n_part)
            entropy = -scipy.special.xlogy(likely, likely) - n_other * scipy.special.xlogy(other, other)
            self.entropy = np.full(len(best), entropy)
        self._time += 1
        return chosen

    def observe(self, actions: AnyArray, step: Step) -> None:
        # The return so far determines what observations may not show (see ``OptimalPolicy``).
        ended = step.terminated | step.truncated
        self._return = np.where(ended, 0.0, self._return + step.reward)
