"""Source learners by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressed_ad.errors import UnknownNameError
from compressed_ad.learners.base import LEARNER, SourceLearner
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.registry import make, own_names


def make_learner(name: str, config: Mapping[str, Any]) -> SourceLearner:
    """The learner ``name`` built with the keyword arguments ``config``.

    ``name`` is a registered name (``ppo``, ``thompson``, ...), ``sb3:`` and an algorithm of
    Stable-Baselines3 (``sb3:PPO``), or ``module:attribute``. Raises ``UnknownNameError``, ``ConfigError``,
    ``MissingExtraError``.
    """
    prefix, _, algorithm = name.partition(":")
    if prefix == "sb3":
        from compressed_ad.learners.sb3.learner import SB3Learner

        return SB3Learner(algorithm, **config)
    if not algorithm and name not in LEARNER:
        raise UnknownNameError("learner", name, [*LEARNER, *(f"sb3:{known}" for known in ALGORITHM)])
    return make(LEARNER, name, config, offers="learn")


def learner_code(name: str, config: Mapping[str, Any]) -> frozenset[str]:
    """The names of code from outside this library that a learner would import when it is made."""
    known = LEARNER.has(name) or name.startswith("sb3:")
    return own_names([config, "" if known else name])
