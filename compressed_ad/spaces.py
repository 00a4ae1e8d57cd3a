"""Observation and action spaces as plain data, so that files and configs can carry them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import SpaceError
from compressed_ad.types import AnyArray, FloatArray

if TYPE_CHECKING:
    from compressed_ad.tasks.base import TaskFamily

SpaceSpec = dict[str, Any]

SUPPORTED = "Discrete, MultiDiscrete (flat), Box"


def to_spec(space: gymnasium.Space[Any]) -> SpaceSpec:
    """JSON-able description of a Discrete, MultiDiscrete or Box space; ``SpaceError`` for any other.

    ``start`` stands only where numbers begin elsewhere than at 0. A Box's ``low`` and ``high`` are one number
    per component, None where there is no bound; or, instead of the list, None if no component has one, and
    one number for a Box of several dimensions whose components all have the same.
    """
    if isinstance(space, spaces.Discrete):
        return {"kind": "discrete", "n": int(space.n), **_start(int(space.start))}
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return {"kind": "multidiscrete", "nvec": space.nvec.tolist(), **_start(space.start.tolist())}
    if isinstance(space, spaces.Box):
        limits = {name: _limits(getattr(space, name)) for name in ("low", "high")}
        return {"kind": "box", "shape": list(space.shape), "dtype": str(space.dtype), **limits}
    shown = " ".join(str(space).split())
    raise SpaceError(f"{shown} is not supported; supported: {SUPPORTED}")


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
        return spaces.Discrete(spec["n"], start=spec.get("start", 0))
    if spec["kind"] == "multidiscrete":
        return spaces.MultiDiscrete(spec["nvec"], start=spec.get("start"))
    if spec["kind"] == "box":
        dtype, shape = np.dtype(spec["dtype"]), tuple(spec["shape"])
        low, high = (limit.reshape(shape).astype(dtype) for limit in bounds(spec))
        return spaces.Box(low, high, shape, dtype.type)
    raise SpaceError(f"unknown space description {spec!r}")


def _start(start: Any) -> dict[str, Any]:
    return {"start": start} if np.any(start) else {}


def _limits(values: AnyArray) -> Any:
    flat = values.ravel().tolist()
    known = [None if math.isinf(value) else value for value in flat]
    if all(value is None for value in known):
        return None
    return known[0] if values.ndim > 1 and len(set(known)) == 1 else known


# ---------------------------------------------------------------- what a description says


def shape_of(spec: SpaceSpec) -> tuple[int, ...]:
    """Shape of one element."""
    shapes = {"discrete": (), "multidiscrete": (len(spec.get("nvec", ())),)}
    return tuple(spec["shape"]) if spec["kind"] == "box" else shapes[spec["kind"]]


def sizes(spec: SpaceSpec) -> list[int]:
    """How many values each component of a Discrete or MultiDiscrete space has."""
    return [spec["n"]] if spec["kind"] == "discrete" else list(spec["nvec"])


def starts(spec: SpaceSpec) -> list[int]:
    """The least value of each component of a Discrete or MultiDiscrete space."""
    start = spec.get("start", [0] * len(sizes(spec)))
    return [start] if spec["kind"] == "discrete" and "start" in spec else list(start)


def bounds(spec: SpaceSpec) -> tuple[FloatArray, FloatArray]:
    """Bounds (D,) of a Box, flat; infinite where there are none."""
    size = math.prod(spec["shape"])

    def flat(limit: Any, none: float) -> FloatArray:
        values = np.broadcast_to(np.asarray(limit, np.float64), (size,))  # None becomes NaN
        return np.where(np.isnan(values), none, values)

    return flat(spec["low"], -np.inf), flat(spec["high"], np.inf)


def is_image(spec: SpaceSpec) -> bool:
    """Whether a space is a Box of three dimensions: height, width and channels."""
    return spec["kind"] == "box" and len(spec["shape"]) == 3


def channels_first(spec: SpaceSpec) -> bool:
    """Whether an image is (C, H, W): where its first dimension is smaller than its last one.

    All others are (H, W, C), as gymnasium's environments have them.
    """
    first, _, last = spec["shape"]
    return bool(first < last)


def features(spec: SpaceSpec, array: AnyArray) -> AnyArray:
    """Elements (..., *shape) of a Box as rows (M, D) of its components, or (M, C) of an image's channels."""
    if not is_image(spec):
        return array.reshape(-1, math.prod(spec["shape"]))
    first = channels_first(spec)
    return (np.moveaxis(array, -3, -1) if first else array).reshape(-1, spec["shape"][0 if first else -1])


def check_same(where: str, expected: SpaceSpec, got: SpaceSpec) -> None:
    """Raise ``SpaceError`` naming ``where`` unless the two descriptions agree."""
    if expected != got:
        raise SpaceError(f"{where}: expected {expected}, got {got}")
