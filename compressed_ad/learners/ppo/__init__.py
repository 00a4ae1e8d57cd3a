"""PPO that trains the source learners of many tasks in one batch, each independently.

The algorithm and its defaults are those of Stable-Baselines3's ``PPO("MlpPolicy")`` (Schulman et al. 2017,
"Proximal Policy Optimization Algorithms"; Raffin et al. 2021): separate tanh networks for policy and value,
orthogonal initialisation, one-hot encoding of discrete observations, GAE (Schulman et al. 2016), advantages
normalised per minibatch, bootstrapping with the value of the true terminal observation at a time limit,
gradients clipped by their global norm, Adam with eps 1e-5.

Nothing is shared between learners, so training N tasks together gives bit for bit what training each alone
gives.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from gymnasium import spaces
from pydantic import Field

from compressed_ad.errors import ConfigError, SpaceError
from compressed_ad.learners.base import Progress
from compressed_ad.settings import Count, Fraction, NonNegative, Positive, Settings, validated
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.types import AnyArray, History, IntArray, sizes

NUMBERED = 1 << 16
"""Observations of discrete spaces up to this size are numbered, so that repeated ones are recognised."""


class PPOConfig(Settings):
    """Hyper-parameters of PPO: names and defaults of Stable-Baselines3, then ours."""

    learning_rate: Positive = 3e-4
    n_steps: Count = Field(2048, description="steps of each environment between updates")
    batch_size: Annotated[int, Ge(2)] = Field(64, description="samples of a gradient step")
    n_epochs: Count = Field(10, description="passes over a rollout")
    gamma: Fraction = 0.99
    gae_lambda: Fraction = 0.95
    clip_range: Positive = 0.2
    ent_coef: float = 0.0
    vf_coef: NonNegative = 0.5
    max_grad_norm: Positive = 0.5
    normalize_advantage: bool = True
    net_arch: Annotated[tuple[Count, ...], MinLen(1)] = Field(
        (64, 64), description="hidden units, the same for the policy's and the value's network"
    )
    count_bonus: NonNegative = Field(
        0.0,
        description="learn from reward + count_bonus / sqrt(visits of the successor by this learner so far); "
        "recorded rewards stay as they are",
    )


class BatchedPPO:
    """PPO that learns many tasks at once, compiled, with Discrete actions.

    Observations are Discrete, MultiDiscrete or Box. Keyword arguments are the fields of ``PPOConfig``;
    ``ConfigError`` names every wrong one.
    """

    name = "PPO"

    def __init__(self, **config: Any) -> None:
        self.config = validated(PPOConfig, config, "ppo")

    @property
    def step_seconds(self) -> float:
        """As ``Timed.step_seconds``."""
        return 2.6e-7 * self.config.n_epochs

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """As ``Checks.check``."""
        if n_timesteps < self.config.n_steps:
            raise ConfigError(
                f"ppo: n_steps {self.config.n_steps} exceeds the {n_timesteps} steps of a stream; "
                "nothing would be learned"
            )
        if not isinstance(family.action_space, spaces.Discrete):
            raise SpaceError(
                f"{family.name}: ppo learns Discrete actions, not {family.action_space}; "
                "try the learner sb3:PPO"
            )
        spec = family_specs(family)["observation"]
        if self.config.count_bonus and (spec["kind"] == "box" or prod(sizes(spec)) > NUMBERED):
            raise SpaceError(
                f"{family.name}: count_bonus needs a discrete observation space of at most {NUMBERED} "
                f"observations, not {family.observation_space}"
            )

    def learn(
        self, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int, n_learner: int,
        n_stream: int, seed: int, progress: Progress = lambda steps: None,
    ) -> list[History]:  # fmt: skip
        """As ``SourceLearner.learn``, with an update of the policy every ``n_steps`` steps.

        If ``n_timesteps`` is no multiple of ``n_steps``, the last policy plays the remaining steps, and their
        ``log_prob_next`` is NaN. Raises ``SpaceError`` for spaces that this PPO cannot learn, ``ConfigError``
        if ``n_timesteps`` is too short for an update, ``NumericalError`` for NaN or infinity.
        """
        # Numba takes a second to import, too long for a command line that only prints help.
        from compressed_ad.learners.ppo.training import train

        self.check(family, n_timesteps=n_timesteps, n_stream=n_stream)
        return train(
            self.config, family, task_ids, tasks,
            n_timesteps=n_timesteps, n_learner=n_learner, n_stream=n_stream, seed=seed, progress=progress,
        )  # fmt: skip
