"""Elements of a space to vectors: a stem computes features, and learned maps of these give vectors.

A model has several maps of its observations (as state, rewarded state and final state) but one stem, so that
the convolutions of an image are computed once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressed_ad.errors import ConfigError, SpaceError
from compressed_ad.types import FloatArray, SpaceSpec, bounds, channels_first, is_image, sizes, starts

LIMIT = 10.0
"""Standardised observations are clipped here, so that an outlier does not dominate the other components."""


class Scaled(nn.Module):
    """Elements of a Box, (..., *shape) -> (..., D): minus ``centre``, divided by ``spread``, clipped."""

    centre: Tensor
    spread: Tensor

    def __init__(self, spec: SpaceSpec, centre: FloatArray, spread: FloatArray, limit: float) -> None:
        super().__init__()
        self.n_axis, self.n_feature, self.limit = len(spec["shape"]), len(centre), limit
        self.register_buffer("centre", torch.from_numpy(centre).float(), persistent=False)
        self.register_buffer("spread", torch.from_numpy(spread).float(), persistent=False)

    def scaled(self, x: Tensor) -> Tensor:
        return ((x - self.centre) / self.spread).clamp(-self.limit, self.limit)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x.reshape(*x.shape[: x.dim() - self.n_axis], -1).float())


class ImageStem(Scaled):
    """Images, (..., H, W, C) or (..., C, H, W), -> (..., F): three 3 x 3 convolutions and a layer norm.

    The first convolution keeps the size of images of at most 16 pixels, all others halve it.
    ``channels_first`` tells the axis of the channels.
    """

    def __init__(self, spec: SpaceSpec, centre: FloatArray, spread: FloatArray, limit: float) -> None:
        super().__init__(spec, centre[:, None, None], spread[:, None, None], limit)
        self.first = channels_first(spec)
        shape = spec["shape"] if self.first else [spec["shape"][2], *spec["shape"][:2]]
        strides = (1 if min(shape[1:]) <= 16 else 2, 2, 2)
        widths = (shape[0], 16, 32, 32)
        self.layers = nn.ModuleList(
            nn.Conv2d(widths[k], widths[k + 1], 3, stride, padding=1) for k, stride in enumerate(strides)
        )
        height, width = (math.ceil(side / math.prod(strides)) for side in shape[1:])
        self.n_feature = widths[-1] * height * width
        self.norm = nn.LayerNorm(self.n_feature)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:]).float()  # only here, so that histories stay in bytes
        x = self.scaled(x if self.first else x.permute(0, 3, 1, 2))
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.norm(x.flatten(1)).reshape(*lead, -1)  # type: ignore[no-any-return]


def observation_stem(
    spec: SpaceSpec, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Module:
    """The stem of observations; the identity for spaces that are not a Box.

    Boxes are standardised with ``mean`` and ``std`` (D,), by component or, for images, by channel: those of
    the training tasks, from the history file. A component that did not vary there is only centred. Without
    them a vector is not changed and an image is scaled by its bounds, if it has any.
    """
    if spec["kind"] != "box":
        return nn.Identity()
    size, make = math.prod(spec["shape"]), Scaled
    centre, spread = np.zeros(size), np.ones(size)
    if is_image(spec):
        axes = (1, 2) if channels_first(spec) else (0, 1)
        low, high = (limit.reshape(spec["shape"]) for limit in bounds(spec))
        low, high = low.min(axis=axes), high.max(axis=axes)
        known = np.isfinite(high - low) & (high > low)
        centre, spread = np.where(known, low, 0.0), np.where(known, high - low, 1.0)
        size, make = len(low), ImageStem
    if mean is None or std is None:
        return make(spec, centre, spread, math.inf)
    if (len(mean), len(std)) != (size, size):
        raise ConfigError(f"observation_mean and observation_std: expected {size} numbers each for {spec}")
    centre, spread = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    varies = spread > 1e-6 * np.maximum(1, abs(centre))  # a smaller one is zero in float32
    return make(spec, centre, np.where(varies, spread, 1.0), LIMIT)


def action_scale(spec: SpaceSpec) -> tuple[FloatArray, FloatArray]:
    """Centre and half the range (D,) of a Box of actions, to scale it to [-1, 1]; 0 and 1 if unbounded."""
    low, high = bounds(spec)
    known = np.isfinite(low) & np.isfinite(high) & (high > low)
    low, high = np.where(known, low, -1.0), np.where(known, high, 1.0)
    return (low + high) / 2, (high - low) / 2


def action_stem(spec: SpaceSpec) -> nn.Module:
    """The stem of actions: Boxes are scaled to [-1, 1]."""
    return Scaled(spec, *action_scale(spec), math.inf) if spec["kind"] == "box" else nn.Identity()


class SpaceEncoder(nn.Module):
    """Features of a stem, (..., *shape or n_feature), as vectors (..., D).

    Discrete and MultiDiscrete: a sum of learned vectors, one per component. Box: a linear map of its
    ``n_feature`` features, by default the components of its elements.
    """

    offset: Tensor
    start: Tensor
    last: Tensor

    def __init__(self, spec: SpaceSpec, n_embd: int, n_feature: int | None = None) -> None:
        super().__init__()
        self.kind = spec["kind"]
        if self.kind in ("discrete", "multidiscrete"):
            self.sizes, self.starts = sizes(spec), starts(spec)
            self.table = nn.Embedding(sum(self.sizes), n_embd)
            offset = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
            self.register_buffer("offset", offset, persistent=False)
            self.register_buffer("start", torch.tensor(self.starts), persistent=False)
            self.register_buffer("last", torch.tensor(self.sizes) - 1, persistent=False)
            nn.init.normal_(self.table.weight, std=len(self.sizes) ** -0.5)
        elif self.kind == "box":
            self.linear = nn.Linear(n_feature or math.prod(spec["shape"]), n_embd)
        else:
            raise SpaceError(f"no encoder for space {spec}")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "box":
            return self.linear(x.float())  # type: ignore[no-any-return]
        return self.table(self.codes(x)).sum(dim=-2)  # type: ignore[no-any-return]

    def codes(self, x: Tensor) -> Tensor:
        """(..., C) rows of the table for elements of a Discrete or MultiDiscrete space."""
        code = x.long()
        if self.kind == "discrete":
            code = code[..., None]
        if any(self.starts):
            # Tokens are padded with zeros, which may lie outside the space.
            code = torch.minimum((code - self.start).clamp(min=0), self.last)
        return code + self.offset

    def vectors(self) -> dict[str, Tensor]:
        """The learned vectors (D,) of all values, or of the components of a Box, by name."""
        if self.kind == "box":
            return {f"[{k}]": column for k, column in enumerate(self.linear.weight.T)}
        names = []
        for k, (size, start) in enumerate(zip(self.sizes, self.starts, strict=True)):
            prefix = "" if self.kind == "discrete" else f"[{k}] = "
            names += [f"{prefix}{value}" for value in range(start, start + size)]
        return dict(zip(names, self.table.weight, strict=True))
