"""Further inputs of a token that a model may ask for (``token_inputs``): what a step does not tell by itself.

Each is computed in two ways that agree: for whole windows, which start with an episode, and from one token to
the next while playing, where values go on if a context was cut inside an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compressed_ad.models.encoders import SpaceEncoder
from compressed_ad.models.settings import Architecture, TokenInputName
from compressed_ad.models.tokens import Tokens

Values = Mapping[str, Tensor]
"""One token (N, ...) of each of N contexts, by the names in ``Tokens``."""


class TokenInput(nn.Module):
    """One input. A call with its values, the tokens and the observations' stem gives vectors (B, L, D)."""

    of_windows: Callable[[Tokens], Tensor]
    """Values (B, L, ...) of whole windows."""
    following: Callable[[Values, Values], Tensor]
    """Values (N, ...) of new tokens, from these and from those before them, which are none at the start."""


def _opens(token: Values) -> Tensor:
    """Whether a token is the first one of its episode, as far as its context shows."""
    return token["ended"] | ~token["has_previous"]


def _episode_start(tokens: Tokens) -> Tensor:
    """(B, L) place in its window where the episode of each token begins."""
    place = torch.arange(tokens.ended.shape[1], device=tokens.ended.device)
    return torch.where(_opens(vars(tokens)), place, 0).cummax(dim=1).values


class PreviousState(TokenInput):
    """State t - 1, which is not shown across the border of an episode."""

    def __init__(self, config: Architecture, n_feature: int | None) -> None:
        super().__init__()
        self.encoder = SpaceEncoder(config.observation_space or {}, config.tf_n_embd, n_feature)

    @staticmethod
    def of_windows(tokens: Tokens) -> Tensor:
        return torch.cat([tokens.state[:, :1], tokens.state[:, :-1]], dim=1)

    @staticmethod
    def following(token: Values, last: Values) -> Tensor:
        return last.get("state", token["state"])

    def forward(self, value: Tensor, tokens: Tokens, stem: nn.Module) -> Tensor:
        return self.encoder(stem(value)) * ~_opens(vars(tokens))[..., None]  # type: ignore[no-any-return]


class EpisodeReturn(TokenInput):
    """Sum of the episode's rewards before step t; float64, so that both ways agree in float32.

    Its vector is a linear map of x = log(1 + |return| / reward_scale), with the return's sign, and of 16
    learned steps tanh(w x + b): finest near 0, and without a limit.
    """

    def __init__(self, config: Architecture, n_feature: int | None) -> None:
        super().__init__()
        self.scale = config.reward_scale
        self.steps = nn.Linear(1, 16)
        self.linear = nn.Linear(17, config.tf_n_embd, bias=False)
        nn.init.normal_(self.linear.weight, std=17**-0.5)

    @staticmethod
    def of_windows(tokens: Tokens) -> Tensor:
        total = tokens.reward.double().cumsum(dim=1)
        return total - total.gather(1, _episode_start(tokens))

    @staticmethod
    def following(token: Values, last: Values) -> Tensor:
        return torch.where(_opens(token), 0.0, last.get("episode_return", 0.0) + token["reward"].double())

    def forward(self, value: Tensor, tokens: Tokens, stem: nn.Module) -> Tensor:
        x = (value / self.scale).float()[..., None]
        x = x.sign() * x.abs().log1p()
        return self.linear(torch.cat([x, torch.tanh(self.steps(x))], dim=-1))  # type: ignore[no-any-return]


class EpisodeTime(TokenInput):
    """Steps of the episode before step t.

    Its vector is a linear map of sines and cosines of 16 frequencies, from 1 to 1 / 5,600 radians per step
    (Vaswani et al. 2017, section 3.5), so that no horizon is too long.
    """

    frequency: Tensor

    def __init__(self, config: Architecture, n_feature: int | None) -> None:
        super().__init__()
        self.register_buffer("frequency", 10000 ** -(torch.arange(16) / 16), persistent=False)
        self.linear = nn.Linear(32, config.tf_n_embd, bias=False)
        nn.init.normal_(self.linear.weight, std=16**-0.5)

    @staticmethod
    def of_windows(tokens: Tokens) -> Tensor:
        start = _episode_start(tokens)
        return torch.arange(start.shape[1], device=start.device) - start

    @staticmethod
    def following(token: Values, last: Values) -> Tensor:
        opens = _opens(token)
        return torch.where(opens, 0, last.get("episode_time", opens.long()) + 1)

    def forward(self, value: Tensor, tokens: Tokens, stem: nn.Module) -> Tensor:
        angle = value[..., None] * self.frequency
        return self.linear(torch.cat([angle.sin(), angle.cos()], dim=-1))  # type: ignore[no-any-return]


TOKEN_INPUT: Mapping[TokenInputName, type[TokenInput]] = {
    "previous_state": PreviousState,
    "episode_return": EpisodeReturn,
    "episode_time": EpisodeTime,
}
