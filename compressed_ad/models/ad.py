"""Algorithm Distillation: predict the source algorithm's next action from its learning history so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressed_ad.errors import ConfigError, NumericalError, UsageError
from compressed_ad.models import fused
from compressed_ad.models.compact_cache import CompactCache
from compressed_ad.models.encoders import SpaceEncoder, action_stem, observation_stem
from compressed_ad.models.heads import HEAD
from compressed_ad.models.segments import in_windows
from compressed_ad.models.settings import Architecture, ModelConfig
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Batch, Tokens
from compressed_ad.models.transformer import Cache, Transformer, visible
from compressed_ad.settings import validated

if TYPE_CHECKING:
    from compressed_ad.evaluation.evaluate import InContextResult


Marks = Sequence[tuple[Tensor, Tensor]]
"""Where (B, L) each of some marks stands, and its vector (D,)."""


class AD(nn.Module):
    """Algorithm Distillation (Laskin et al. 2022) with one token per time step.

    Token t holds state t and the outcome of transition t - 1; the model predicts the distribution of action t
    at every t. Attention is causal, so nothing about transition t is visible when its action is predicted.

    With ``segments``, what closes leaves the context: see ``models.segments``. The token that closes a
    segment has a learned vector added, drawn after all other weights.
    """

    reads_marks = False
    """Whether marks of its histories change what the model sees."""
    biased = False
    """Whether attention to the tokens of ``attended`` has a learned bias."""

    def __init__(self, config: Architecture | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = architecture(config)
        observation, action = self.config.observation_space, self.config.action_space
        if observation is None or action is None:
            raise ConfigError(
                "observation_space and action_space are not in the model's config. For a first training on a"
                " history file, config_and_sampler(path) takes them from it; of an environment they are"
                " to_spec(env.observation_space) and to_spec(env.action_space). For a trained model take them"
                " from its checkpoint, config = torch.load(path)['config']"
            )
        width = self.config.tf_n_embd
        self.stem = observation_stem(observation, self.config.observation_mean, self.config.observation_std)
        n_feature = getattr(self.stem, "n_feature", None)
        self.state = SpaceEncoder(observation, width, n_feature)
        self.rewarded_state = SpaceEncoder(observation, width, n_feature)
        self.final_state = SpaceEncoder(observation, width, n_feature)
        self.action_stem = action_stem(action)
        self.action = SpaceEncoder(action, width)
        self.reward = nn.Parameter(torch.randn(width))
        self.ended = nn.Parameter(torch.randn(width))
        self.first = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(self.config, self.n_token, mark_bias=self.biased)
        self.head = HEAD[action["kind"]](width, action, self.config.action_mixture)
        # Last, so that models with and without them share all other initial weights.
        self.token_inputs = nn.ModuleDict()
        for name in self.config.token_inputs:
            self.token_inputs[name] = TOKEN_INPUT[name](self.config, n_feature)
        if self.config.segmentation != "none":
            self.embed_gist = nn.Parameter(0.02 * torch.randn(width))
        # In bandits, contextual or not, the last state of an episode does not depend on the last action.
        self.shows_last_action = self.config.one_step or observation == {"kind": "discrete", "n": 1}

    @property
    def n_token(self) -> int:
        """Most tokens that the transformer takes at once."""
        return self.config.n_transit

    @property
    def forgets(self) -> bool:
        """Whether steps leave its contexts all the time, so that they are never full."""
        return self.config.forgets

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.parameters())
        return f"<{type(self).__name__}: {size:,} parameters, context of {self.config.n_transit} steps>"

    def embed(self, tokens: Tokens) -> Tensor:
        """(B, L, D). The reward, in units of ``reward_scale``, scales an embedding of the true next state.

        An episode's last action is not shown, unless episodes have one step or there is only one observation.
        """
        marks = self.marks(tokens)
        x = self._compiled_embedding(tokens, marks)
        if x is None:
            x = self._embedding(tokens)
        else:
            marks = ()  # which it has added
        for name in self.config.token_inputs:
            value = getattr(tokens, name)
            value = TOKEN_INPUT[name].of_windows(tokens) if value is None else value
            x = x + self.token_inputs[name](value, tokens, self.stem)
        for stands, vector in marks:
            x = x + stands[..., None] * vector
        return x

    def marks(self, tokens: Tokens) -> Marks:
        """What else may stand at tokens: where (B, L) each mark does, and the vector (D,) that it adds."""
        return ()

    def _embedding(self, tokens: Tokens) -> Tensor:
        known, ended = tokens.has_previous[..., None], tokens.ended[..., None]
        reward = tokens.reward[..., None] / self.config.reward_scale
        next_state = self.stem(tokens.next_state)
        outcome = (
            self.action(self.action_stem(tokens.action)) * (~ended | self.shows_last_action)
            + reward * (self.reward + self.rewarded_state(next_state))
            + ended * (self.ended + self.final_state(next_state))
        )
        x: Tensor = self.state(self.stem(tokens.state)) + torch.where(known, outcome, self.first)
        return x

    def _compiled_embedding(self, tokens: Tokens, marks: Marks) -> Tensor | None:
        """The same with ``marks``, by a compiled kernel; None if it cannot, or a gradient is asked for."""
        encoders = self.state, self.action, self.rewarded_state, self.final_state
        coded = self.state.kind != "box" and self.action.kind != "box"
        if not (self.config.kernels and coded and fused.usable(self.first)) or torch.is_grad_enabled():
            return None
        given = (self.state, tokens.state), (self.action, tokens.action), (self.state, tokens.next_state)
        return fused.embed(
            [encoder.codes(value) for encoder, value in given],
            (tokens.reward / self.config.reward_scale, tokens.ended, tokens.has_previous),
            [stands for stands, _ in marks],
            self.shows_last_action,
            [encoder.table.weight for encoder in encoders],
            torch.stack([self.reward, self.ended, self.first, *(vector for _, vector in marks)]),
        )

    def forward(self, tokens: Tokens, cache: Cache | None = None) -> Tensor:
        """Parameters (B, L, P) of the head's distribution of the action at every step; for Discrete, logits.

        With a ``cache``, L is 1: the tokens continue the contexts in the cache, which is updated.
        """
        if cache is not None and any(getattr(tokens, name) is None for name in self.config.token_inputs):
            raise UsageError(
                f"tokens that continue a context need their {', '.join(self.config.token_inputs)}"
            )
        x = self.embed(tokens)
        return self.head(  # type: ignore[no-any-return]
            self.over_windows(x, tokens) if cache is None else self.next_step(x, tokens, cache)
        )

    def over_windows(self, x: Tensor, tokens: Tokens) -> Tensor:
        """What the transformer makes of the embedded ``tokens`` x (B, L, D) of whole windows: (B, L, D)."""
        until = None
        if self.config.forgets:
            found, until = in_windows(self.config, tokens)
            if found is not None:
                x = x + found.closes[..., None] * self.embed_gist
        return self.transformer(x, self.attended(tokens), until)  # type: ignore[no-any-return]

    def next_step(self, x: Tensor, tokens: Tokens, cache: Cache) -> Tensor:
        """The same of the next token, x (B, 1, D), of each context in the ``cache``."""
        found = cache.admit(tokens) if isinstance(cache, CompactCache) else None
        if found is not None:
            x = x + found.closes[:, None, None] * self.embed_gist
        marked = self.attended(tokens)
        return self.transformer.step(x[:, 0], cache, None if marked is None else marked[:, 0])[:, None]

    def visible_tokens(self, tokens: Tokens) -> Tensor:
        """(B, L) how many tokens each query of the windows ``tokens`` sees, itself included."""
        if self.config.forgets:
            return visible(in_windows(self.config, tokens)[1]).sum(dim=-1)
        return torch.ones_like(tokens.ended, dtype=torch.long).cumsum(dim=1)

    def attended(self, tokens: Tokens) -> Tensor | None:
        """(B, L) bool: tokens to which attention is biased, in a model that has such a bias; else None."""
        return None

    def new_cache(self, n_row: int) -> Cache:
        """An empty cache for ``n_row`` contexts; a compact one, which is never full, if tokens leave."""
        if self.config.forgets:
            return CompactCache(self.transformer, n_row, self.config)
        return Cache(self.transformer, n_row)

    def prefill(self, tokens: Tokens, lengths: Tensor, cache: Cache, rows: Tensor) -> None:
        """Replace the cache's ``rows`` by the contexts ``tokens`` (A, L) of ``lengths`` (A,) steps.

        ``UsageError`` if steps leave the contexts, which then need no refill.
        """
        if self.forgets:
            raise UsageError("a context whose steps leave is never full, so it is not filled again")
        self.transformer.prefill(self.embed(tokens), self.attended(tokens), cache, rows)
        cache.length[rows.cpu()] = lengths.cpu()

    def loss(self, batch: Batch, at: str = "every", smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood (nats) with the batch's weights, and accuracy, as the head has them.

        They are over all valid positions; with ``at="query"``, over the last one of each window, unweighted.
        """
        given, target, valid, weight = self(batch.tokens), batch.target, batch.valid, batch.weight
        if at == "query":
            last = valid.sum(dim=1) - 1
            row = torch.arange(len(last), device=last.device)
            given, target, valid, weight = given[row, last], target[row, last], valid[row, last], None
        else:
            given, target, valid = given.flatten(0, 1), target.flatten(0, 1), valid.flatten()
            weight = None if weight is None else weight.flatten()
        return self.head.loss(given, target, valid, weight, smoothing)

    @torch.no_grad()
    def evaluate_in_context(self, vec_env: Any, **options: Any) -> InContextResult:
        """``compressed_ad.evaluate_in_context`` of this model."""
        from compressed_ad.evaluation.evaluate import evaluate_in_context

        return evaluate_in_context(self, vec_env, **options)


def check_finite(where: str, content: Mapping[str, Any]) -> None:
    """Raise ``NumericalError`` with the first tensor of nested ``content`` that holds NaN or infinity."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            check_finite(f"{where}{key}.", value)
        elif isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise NumericalError(f"{where}{key} holds NaN or infinity")


@contextmanager
def evaluating(model: AD) -> Iterator[None]:
    """``model`` without dropout and gradients; afterwards it trains again if it did before.

    Raises ``NumericalError`` naming the first weight that holds NaN or infinity.
    """
    check_finite(f"{type(model).__name__}: the weight ", model.state_dict())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def architecture(config: Architecture | Mapping[str, Any]) -> Architecture:
    """The typed architecture of a config, a checkpoint's config or a plain dictionary.

    Keys of other known sections (``batch_size``, ``lr``) are allowed and not used.
    """
    if isinstance(config, Architecture):
        return config
    return validated(ModelConfig, config, "model config")
