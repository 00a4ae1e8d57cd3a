"""Algorithm Distillation: predict the source algorithm's next action from its learning history so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressed_ad.errors import ConfigError, SpaceError
from compressed_ad.models.transformer import Cache, Transformer
from compressed_ad.registry import Registry
from compressed_ad.settings import Architecture, ModelConfig, validated
from compressed_ad.spaces import SpaceSpec
from compressed_ad.windows import Batch, Tokens

if TYPE_CHECKING:
    from compressed_ad.evaluate import InContextResult

MODEL: Registry[type[AD]] = Registry("model")


class SpaceEncoder(nn.Module):
    """Elements of a space, (..., *shape), as vectors (..., D).

    Discrete and MultiDiscrete: a sum of learned vectors, one per component. Box: a linear map of the flat
    vector.
    """

    def __init__(self, spec: SpaceSpec, n_embd: int) -> None:
        super().__init__()
        self.kind = spec["kind"]
        if self.kind in ("discrete", "multidiscrete"):
            sizes = [spec["n"]] if self.kind == "discrete" else spec["nvec"]
            self.table = nn.Embedding(sum(sizes), n_embd)
            offset = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            self.register_buffer("offset", offset, persistent=False)
            nn.init.normal_(self.table.weight, std=len(sizes) ** -0.5)
        elif self.kind == "box":
            self.n_axis = len(spec["shape"])
            self.linear = nn.Linear(int(torch.tensor(spec["shape"]).prod()), n_embd)
        else:
            raise SpaceError(f"no encoder for space {spec}")

    def forward(self, x: Tensor) -> Tensor:
        """(..., *shape) -> (..., D)."""
        if self.kind == "discrete":
            return self.table(x)  # type: ignore[no-any-return]
        if self.kind == "multidiscrete":
            return self.table(x + self.offset).sum(dim=-2)  # type: ignore[operator, no-any-return]
        return self.linear(x.flatten(-self.n_axis).float())  # type: ignore[no-any-return]


@MODEL.register("AD")
class AD(nn.Module):
    """Algorithm Distillation (Laskin et al. 2022) with one token per time step.

    Token t holds state t and what came of transition t - 1; the model predicts the distribution of action t
    at every t. Attention is causal, so nothing about transition t is visible when its action is predicted.
    """

    biased = False
    """Whether attention to the tokens that ``attended`` names has a learned bias."""

    def __init__(self, config: Architecture | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = architecture(config)
        observation, action = self.config.observation_space, self.config.action_space
        if observation is None or action is None:
            raise ConfigError(
                "observation_space and action_space are not in the model's config;"
                " take them from a checkpoint: config = torch.load(path)['config']"
            )
        if action["kind"] != "discrete":
            raise SpaceError(f"action space {action} is not supported; supported: discrete")
        width = self.config.tf_n_embd
        self.state = SpaceEncoder(observation, width)
        self.rewarded_state = SpaceEncoder(observation, width)
        self.final_state = SpaceEncoder(observation, width)
        self.action = SpaceEncoder(action, width)
        self.reward = nn.Parameter(torch.randn(width))
        self.ended = nn.Parameter(torch.randn(width))
        self.first = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(
            width,
            self.config.tf_n_head,
            self.config.tf_n_layer,
            self.config.n_transit,
            self.config.dropout,
            self.config.position,
            mark_bias=self.biased,
        )
        self.head = nn.Linear(width, action["n"])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # As in a bandit: the state that an episode ends in then tells nothing of the action that led there.
        self.sees_nothing = self.config.observation_space == {"kind": "discrete", "n": 1}

    def embed(self, tokens: Tokens) -> Tensor:
        """(B, L, D). The reward scales an embedding of the state that earned it, the true next state.

        An episode's last action is not shown, unless there is nothing but actions and rewards to see.
        """
        known, ended = tokens.has_previous[..., None], tokens.ended[..., None]
        reward = tokens.reward[..., None]
        came_of = (
            self.action(tokens.action) * (~ended | self.sees_nothing)
            + reward * (self.reward + self.rewarded_state(tokens.next_state))
            + ended * (self.ended + self.final_state(tokens.next_state))
        )
        return self.state(tokens.state) + torch.where(known, came_of, self.first)  # type: ignore[no-any-return]

    def forward(self, tokens: Tokens, cache: Cache | None = None) -> Tensor:
        """Logits (B, L, K) of the action at every step.

        With a ``cache``, L is 1: the tokens continue the contexts in the cache, which is updated.
        """
        x = self.embed(tokens)
        marked = self.attended(tokens)
        if cache is None:
            return self.head(self.transformer(x, marked))  # type: ignore[no-any-return]
        last = None if marked is None else marked[:, 0]
        return self.head(self.transformer.step(x[:, 0], cache, last)[:, None])  # type: ignore[no-any-return]

    def attended(self, tokens: Tokens) -> Tensor | None:
        """(B, L) bool: tokens to which attention is biased, in a model that has such a bias; else None."""
        return None

    def new_cache(self, n_row: int) -> Cache:
        """An empty cache for ``n_row`` contexts."""
        return self.transformer.new_cache(n_row)

    def prefill(self, tokens: Tokens, lengths: Tensor, cache: Cache, rows: Tensor) -> None:
        """Replace the cache's ``rows`` by the contexts ``tokens`` (A, L) of ``lengths`` (A,) steps."""
        self.transformer.prefill(self.embed(tokens), lengths, cache, rows, self.attended(tokens))

    def loss(self, batch: Batch, at: str = "every", smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (nats), weighted as the batch says, and accuracy over the supervised positions.

        A loss at the query alone is not weighted.
        """
        logits, target, valid = self(batch.tokens), batch.target, batch.valid
        weight = batch.weight
        if at == "query":
            last = valid.sum(dim=1) - 1
            row = torch.arange(len(last), device=last.device)
            logits, target, valid, weight = logits[row, last], target[row, last], valid[row, last], None
        logits, target = logits.flatten(0, -2), target.flatten()
        target = target.masked_fill(~valid.flatten(), -100)
        if weight is None:
            loss = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
        else:
            each = F.cross_entropy(logits.float(), target, label_smoothing=smoothing, reduction="none")
            share = weight.flatten() * valid.flatten()
            loss = (each * share).sum() / share.sum().clamp(min=1e-9)
        hit = (logits.argmax(dim=-1) == target).sum() / valid.sum()
        return loss, hit

    @torch.no_grad()
    def evaluate_in_context(self, vec_env: Any, **options: Any) -> InContextResult:
        """Play in ``vec_env`` with frozen weights while the context grows: see ``evaluate_in_context``."""
        from compressed_ad.evaluate import evaluate_in_context

        return evaluate_in_context(self, vec_env, **options)


def architecture(config: Architecture | Mapping[str, Any]) -> Architecture:
    """The typed architecture of a config, a checkpoint's config or a plain dictionary.

    Keys of other known sections (``batch_size``, ``lr``) are allowed and not used.
    """
    if isinstance(config, Architecture):
        return config
    return validated(ModelConfig, config, "model config")
