"""Observation and action spaces as plain data, so that files and configs can carry them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import SpaceError

if TYPE_CHECKING:
    from compressed_ad.tasks.base import TaskFamily

SpaceSpec = dict[str, Any]


def to_spec(space: gymnasium.Space[Any]) -> SpaceSpec:
    """JSON-able description of a Discrete, MultiDiscrete or Box space; ``SpaceError`` for any other."""
    if isinstance(space, spaces.Discrete):
        return {"kind": "discrete", "n": int(space.n)}
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return {"kind": "multidiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.Box):
        bounds = {k: None if np.isinf(v).any() else v.ravel().tolist() for k, v in _bounds(space).items()}
        return {"kind": "box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    shown = " ".join(str(space).split())
    raise SpaceError(f"{shown} is not supported; supported: Discrete, MultiDiscrete (flat), Box")


def family_specs(family: TaskFamily) -> dict[str, SpaceSpec]:
    """The descriptions of its ``"observation"`` and ``"action"`` space; ``SpaceError`` names both."""
    specs = {}
    for name in ("observation", "action"):
        try:
            specs[name] = to_spec(getattr(family, f"{name}_space"))
        except SpaceError as error:
            raise SpaceError(f"{name} space of {family.name}: {error}") from error
    return specs


def from_spec(spec: SpaceSpec) -> gymnasium.Space[Any]:
    """The gymnasium space of a description made by ``to_spec``."""
    if spec["kind"] == "discrete":
        return spaces.Discrete(spec["n"])
    if spec["kind"] == "multidiscrete":
        return spaces.MultiDiscrete(spec["nvec"])
    if spec["kind"] == "box":
        dtype, shape = np.dtype(spec["dtype"]), tuple(spec["shape"])
        low = -np.inf if spec["low"] is None else np.asarray(spec["low"], dtype).reshape(shape)
        high = np.inf if spec["high"] is None else np.asarray(spec["high"], dtype).reshape(shape)
        return spaces.Box(low, high, shape, dtype.type)
    raise SpaceError(f"unknown space description {spec!r}")


def _bounds(space: spaces.Box) -> dict[str, Any]:
    return {"low": space.low, "high": space.high}


def check_same(where: str, expected: SpaceSpec, got: SpaceSpec) -> None:
    """Raise ``SpaceError`` naming ``where`` unless the two descriptions agree."""
    if expected != got:
        raise SpaceError(f"{where}: expected {expected}, got {got}")
