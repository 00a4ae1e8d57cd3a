"""The default networks of Stable-Baselines3's algorithms, also for small images."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import MissingExtraError

try:
    import torch
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
except ImportError as error:
    raise MissingExtraError("compressed_ad.learners.sb3.networks", "sb3") from error

_NATURE = 36
"""Side of the smallest image that SB3's own network (NatureCNN) can take."""


class SmallImages(BaseFeaturesExtractor):  # type: ignore[misc]
    """Two 3 x 3 convolutions and a linear layer, for images of any size, channels first or last.

    The first convolution is normalised over the image, so that it does not matter whether pixels range up to
    255 or number ten kinds of objects.
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        shape = observation_space.shape
        # As in SB3: there are fewer channels than rows or columns.
        self._channels_last = int(np.argmin(shape)) != 0
        channels, height, width = (shape[2], *shape[:2]) if self._channels_last else shape
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            torch.nn.GroupNorm(1, 32),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * -(-height // 2) * -(-width // 2), features_dim),
            torch.nn.ReLU(),
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        images = observations.movedim(-1, 1) if self._channels_last else observations
        features: torch.Tensor = self.body(images)
        return features


class _Flat(FlattenExtractor):  # type: ignore[misc]
    """SB3's default with its size as a Python integer, which an LSTM needs, instead of a NumPy one."""

    def __init__(self, observation_space: spaces.MultiDiscrete) -> None:
        super().__init__(observation_space)
        self._features_dim = int(observation_space.nvec.sum())


def choose_policy(
    kind: type[Any], space: gymnasium.Space[Any], policy: str | None, policy_kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the policy of ``kind``, an SB3 class, for observations in ``space``.

    Images get convolutions (NatureCNN from 36 x 36 on, else ``SmallImages``), everything else ``MlpPolicy``.
    A ``policy`` or ``features_extractor_class`` that the user chose is kept.
    """
    names = list(kind.policy_aliases)
    mlp = next(name for name in names if name.startswith("Mlp"))
    cnn = next((name for name in names if name.startswith("Cnn")), None)
    shape = space.shape or ()
    if "features_extractor_class" in policy_kwargs:
        return policy or mlp, policy_kwargs
    if isinstance(space, spaces.Box) and len(shape) == 3 and policy in (None, cnn):
        if cnn is not None and is_image_space(space) and sorted(shape)[1] >= _NATURE:
            return cnn, policy_kwargs
        return policy or mlp, {**policy_kwargs, "features_extractor_class": SmallImages}
    if isinstance(space, spaces.MultiDiscrete) and "Lstm" in mlp:
        policy_kwargs = {**policy_kwargs, "features_extractor_class": _Flat}
    return policy or mlp, policy_kwargs
