"""The source algorithms of Stable-Baselines3 and sb3-contrib, as data: imports neither of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressed_ad.errors import UsageError, nearest

DISCRETE, MULTIDISCRETE, BOX = "Discrete", "MultiDiscrete", "Box"
_ANY = (DISCRETE, MULTIDISCRETE, BOX)


@dataclass(frozen=True)
class Algorithm:
    """A source algorithm: the library of its class, its description, the action spaces that it learns."""

    library: str
    words: str
    actions: tuple[str, ...]


ALGORITHM: Mapping[str, Algorithm] = {
    "PPO": Algorithm("stable_baselines3", "Proximal policy optimisation.", _ANY),
    "A2C": Algorithm("stable_baselines3", "Advantage actor-critic, short rollouts.", _ANY),
    "TRPO": Algorithm("sb3_contrib", "Trust region policy optimisation.", _ANY),
    "RecurrentPPO": Algorithm("sb3_contrib", "PPO whose policy has a memory (LSTM).", _ANY),
    "MaskablePPO": Algorithm(
        "sb3_contrib",
        "PPO that is told which actions are possible (environments with action_masks).",
        (DISCRETE, MULTIDISCRETE),
    ),
    "DQN": Algorithm("stable_baselines3", "Deep Q-learning, epsilon-greedy.", (DISCRETE,)),
    "QRDQN": Algorithm("sb3_contrib", "Quantile-regression DQN, epsilon-greedy.", (DISCRETE,)),
    "SAC": Algorithm("stable_baselines3", "Soft actor-critic, squashed Gaussian policy.", (BOX,)),
    "TQC": Algorithm("sb3_contrib", "SAC with truncated quantile critics.", (BOX,)),
    "CrossQ": Algorithm("sb3_contrib", "SAC with batch normalisation, without target networks.", (BOX,)),
    "TD3": Algorithm("stable_baselines3", "Twin delayed DDPG; explores by action_noise.", (BOX,)),
    "DDPG": Algorithm(
        "stable_baselines3", "Deterministic policy gradient; explores by action_noise.", (BOX,)
    ),
}

REFUSED: Mapping[str, str] = {
    "ARS": "random search plays whole episodes inside SB3's evaluation, which tells a callback neither "
    "observations nor actions"
}
"""Algorithms that cannot be recorded, and the reason."""


def find_algorithm(name: str) -> Algorithm:
    """The algorithm ``name``; ``UsageError`` gives the nearest name, or why it cannot be recorded."""
    if name in REFUSED:
        raise UsageError(f"sb3:{name} cannot be recorded: {REFUSED[name]}")
    if name not in ALGORITHM:
        known = [f"sb3:{one}" for one in ALGORITHM]
        meant = nearest(f"sb3:{name.replace('-', '').replace('_', '')}", known)
        raise UsageError(f"sb3:{name} is not supported{meant}; supported: {', '.join(known)}")
    return ALGORITHM[name]
