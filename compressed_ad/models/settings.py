"""The flat section of a model file: a model's architecture and its training. Imports no torch.

Both share a section because users' model files do (``tf_n_embd`` beside ``batch_size`` and ``lr``), but each
part reads its own class only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field, model_validator

from compressed_ad.settings import (
    BelowOne,
    Count,
    Fraction,
    FreeParameters,
    NonNegative,
    Positive,
    Problem,
    Settings,
    Whole,
    later,
)

FROM_HISTORY = (
    "observation_space",
    "action_space",
    "observation_mean",
    "observation_std",
    "reward_scale",
    "one_step",
)
"""Settings that are read from the training histories and never set by users."""

_FILLED_IN = "filled in from the history file"


TokenInputName = Literal["previous_state", "episode_return", "episode_time"]


class Architecture(Settings):
    """The architecture of a model; stored in every checkpoint."""

    model: str = Field("CompressedAD", description="name in MODEL, or module:attribute")
    tf_n_embd: Count = Field(96, description="embedding dimension")
    tf_n_head: Count = Field(4, description="attention heads")
    tf_n_layer: Count = Field(2, description="transformer layers")
    n_transit: Count = Field(200, description="context length in time steps")
    position: Literal["rotary", "learned"] = Field("rotary", description="how a token knows its place")
    dropout: BelowOne = Field(0.0, description="dropout on the embedding and on each residual branch")
    action_mixture: Count = later(4, "normal distributions that make up that of a continuous action")
    embedding_dropout: BelowOne | None = later(None, "dropout on the embedding; default: dropout")
    residual_dropout: BelowOne | None = later(None, "dropout on each residual branch; default: dropout")
    attention_dropout: BelowOne = later(0.0, "dropout of attention weights, which dropout leaves alone")
    token_inputs: tuple[TokenInputName, ...] = later(
        (), "further inputs of a token: previous_state, episode_return (so far), episode_time (steps so far)"
    )
    segments: str = later(
        "none", "what closes a segment, whose inside then leaves the context: a name in SEGMENTS"
    )
    segment_gist: bool = later(True, "the token that closes a segment still sees its inside")
    segment_every: Whole = later(
        0, "also keep every so many steps of an episode; for random and thin: spacing"
    )
    kept_tokens: Count = later(32, "tokens of closed segments that stay; the oldest goes first")
    recent_steps: Whole = later(0, "steps that stay visible in any case; without segments, all that do")
    memory_tokens: Count = later(16, "of RecurrentAD: vectors that carry on what it has read")
    memory_steps: Count = later(32, "of RecurrentAD: steps after which it rewrites them")
    kernels: bool = later(True, "compiled attention, gelu and steps of play on CPUs; false: PyTorch's")
    observation_space: dict[str, Any] | None = Field(None, description=_FILLED_IN)
    action_space: dict[str, Any] | None = Field(None, description=_FILLED_IN)
    observation_mean: tuple[float, ...] | None = later(None, _FILLED_IN)
    observation_std: tuple[NonNegative, ...] | None = later(None, _FILLED_IN)
    reward_scale: Positive = later(1.0, _FILLED_IN)
    one_step: bool = later(False, f"whether an episode is one step; {_FILLED_IN}")

    @property
    def segmentation(self) -> str:
        """What closes a segment: ``segments``, or what ``GistAD`` has in place of ``none``."""
        return "episode" if self.model == "GistAD" and self.segments == "none" else self.segments

    @property
    def forgets(self) -> bool:
        """Whether tokens leave the context before it is full."""
        return self.segmentation != "none" or self.recent_steps > 0

    @property
    def recurrent(self) -> bool:
        """Whether a memory of ``memory_tokens`` carries on what was read."""
        return self.model == "RecurrentAD"

    @property
    def dropouts(self) -> tuple[float, float, float]:
        """Shares dropped of the embedding, of attention weights and of each residual branch."""
        embedding = self.dropout if self.embedding_dropout is None else self.embedding_dropout
        residual = self.dropout if self.residual_dropout is None else self.residual_dropout
        return embedding, self.attention_dropout, residual

    @model_validator(mode="after")
    def _fits_together(self) -> Architecture:
        if self.tf_n_embd % self.tf_n_head:
            message = f"tf_n_embd {self.tf_n_embd} is not a multiple of tf_n_head {self.tf_n_head}"
            raise ValueError(Problem(message, ("tf_n_embd",), ("tf_n_head",)))
        if self.position == "rotary" and self.tf_n_embd // self.tf_n_head % 2:
            message = "rotary positions need an even tf_n_embd / tf_n_head"
            raise ValueError(Problem(message, ("tf_n_embd",), ("tf_n_head",), ("position",)))
        if self.forgets and self.position != "rotary":
            message = "contexts whose steps leave need rotary positions"
            raise ValueError(Problem(message, ("segments",), ("recent_steps",), ("position",), ("model",)))
        if self.recurrent and self.forgets:
            message = (
                "RecurrentAD keeps memory_tokens and its last steps; leave segments and recent_steps alone"
            )
            raise ValueError(Problem(message, ("segments",), ("recent_steps",), ("model",)))
        if self.recurrent and self.memory_steps >= self.n_transit:
            message = (
                f"RecurrentAD writes to its memory after memory_steps {self.memory_steps}; with n_transit"
                f" {self.n_transit} no window is that long"
            )
            raise ValueError(Problem(message, ("memory_steps",), ("n_transit",), ("model",)))
        spaced = self.segments in ("random", "thin")
        if spaced and not self.segment_every:
            message = f"segments {self.segments} needs segment_every, in steps"
            raise ValueError(Problem(message, ("segments",), ("segment_every",)))
        if self.segment_every and self.segmentation in ("none", "fruitless", "marks"):
            message = f"segment_every has no effect with segments {self.segments}; set it to 0"
            raise ValueError(Problem(message, ("segment_every",), ("segments",)))
        if twice := [name for name in self.token_inputs if self.token_inputs.count(name) > 1]:
            raise ValueError(Problem(f"token_inputs: {twice[0]} is named twice", ("token_inputs",)))
        return self


class TransformSpec(Settings):
    """Name and parameters of a history transform."""

    name: str
    params: FreeParameters = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Accept ``{name: subsample, every: 8}`` and plain ``subsample``."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "params" not in value:
            return {"name": value.get("name"), "params": {k: v for k, v in value.items() if k != "name"}}
        return value


class Optimisation(Settings):
    """How a model is trained."""

    steps: Count = Field(600, description="gradient steps")
    batch_size: Count = Field(16, description="windows per gradient step")
    accumulate: Count = Field(1, description="a gradient step is split into this many smaller batches")
    lr: Positive = Field(3e-3, description="peak learning rate of AdamW")
    lr_final: Fraction = Field(0.1, description="learning rate at the end, as a share of the peak (cosine)")
    warmup: Fraction = Field(0.05, description="share of the steps with a rising learning rate")
    weight_decay: NonNegative = Field(0.01, description="of the weight matrices; others are not decayed")
    beta1: BelowOne = Field(0.9, description="of AdamW: memory of the gradient")
    beta2: BelowOne = Field(0.99, description="of AdamW: memory of the squared gradient")
    grad_clip: Positive = Field(1.0, description="global norm of the gradient")
    label_smoothing: BelowOne = Field(0.0, description="share of the target spread over all actions")
    loss_at: Literal["every", "query"] = Field("every", description="supervise every position, or the last")
    first_window: Fraction = Field(0.5, description="share of windows from the history's first step on")
    marker_dropout: Fraction = Field(0.0, description="share of windows whose marks are all dropped")
    loss_weight_marked: NonNegative = Field(1.0, description="weight of marked steps in the loss")
    loss_weight_unproven: NonNegative | None = Field(
        None, description="the same before a stream's first reward; default: loss_weight_marked"
    )
    loss_min_probability: Fraction = later(
        0.0, "actions that the source took with a lower probability are shown, but not learned"
    )
    transforms: tuple[TransformSpec, ...] = Field((), description="applied to the histories, in order")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass")
    compile: bool = Field(False, description="torch.compile the model")
    validations: Whole = Field(4, description="in-context evaluations while training")
    validation_episodes: Count = Field(30, description="in-context episodes of a validation")
    validation_rollouts: Count = Field(4, description="rollouts per validation task")
    checkpoints: Annotated[int, Ge(2)] = Field(2, description="checkpoints kept")
    checkpoint_every: Count = Field(250, description="gradient steps between checkpoints")

    @model_validator(mode="after")
    def _query_has_no_weight(self) -> Optimisation:
        if self.loss_at == "query" and self.loss_min_probability > 0:
            message = "loss_min_probability has no effect with loss_at query; set it to 0 or loss_at to every"
            raise ValueError(Problem(message, ("loss_min_probability",), ("loss_at",)))
        return self


class ModelConfig(Architecture, Optimisation):
    """The flat section of a model file such as ``config/model/ad_dr.yaml``."""

    @model_validator(mode="after")
    def _smoothing_needs_choices(self) -> ModelConfig:
        if self.label_smoothing and (self.action_space or {}).get("kind") == "box":
            message = "label_smoothing is for discrete actions; set it to 0 for continuous ones"
            raise ValueError(Problem(message, ("label_smoothing",)))
        return self
