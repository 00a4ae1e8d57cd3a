"""Every setting of this library, typed, with its range and its meaning. Imports no torch.

Each class is one section of the configuration; an unknown key is an error. Models and training share one
flat section because the user's model files do (``tf_n_embd`` beside ``batch_size`` and ``lr``), but each
part reads only its own class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressed_ad.errors import ConfigError, nearest

Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


class Settings(BaseModel):
    """Base of every section: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """``values`` as settings of a ``kind``; ``ConfigError`` lists all mistakes, prefixed by ``where``."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([f"{where}: {problem}" for problem in problems(kind, error)]) from None


def problems(kind: type[Settings], error: ValidationError) -> Iterator[str]:
    """One line for each mistake in a validation error: the key, what is wrong, the nearest known key."""
    for mistake in error.errors():
        path = [str(part) for part in mistake["loc"]]
        key = ".".join(path)
        if mistake["type"] == "extra_forbidden":
            yield f"unknown key {key!r}{nearest(path[-1], _keys(kind, path[:-1]))}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            got = "" if mistake["type"] in ("missing", "value_error") else f", got {mistake['input']!r}"
            yield f"{key}: {message}{got}" if key else message


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The known keys of the section that ``path`` leads to."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)


class Architecture(Settings):
    """What a model is built from; stored in every checkpoint."""

    model: str = Field("CompressedAD", description="name in MODEL, or module:attribute")
    tf_n_embd: Count = Field(64, description="embedding dimension")
    tf_n_head: Count = Field(4, description="attention heads")
    tf_n_layer: Count = Field(3, description="transformer layers")
    n_transit: Count = Field(200, description="context length in time steps")
    position: Literal["rotary", "learned"] = Field("rotary", description="how a token knows its place")
    dropout: BelowOne = Field(0.0, description="dropout on the embedding and on each residual branch")
    observation_space: dict[str, Any] | None = Field(None, description="filled in from the history file")
    action_space: dict[str, Any] | None = Field(None, description="filled in from the history file")

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.tf_n_embd % self.tf_n_head:
            raise ValueError(f"tf_n_embd {self.tf_n_embd} is not a multiple of tf_n_head {self.tf_n_head}")
        if self.position == "rotary" and self.tf_n_embd // self.tf_n_head % 2:
            raise ValueError("rotary positions need an even tf_n_embd / tf_n_head")
        return self


class TransformSpec(Settings):
    """One step between a history and its windows: a transform's name and its parameters."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

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

    steps: Count = Field(2000, description="gradient steps")
    batch_size: Count = Field(16, description="windows per gradient step")
    accumulate: Count = Field(1, description="a gradient step is split into this many smaller batches")
    lr: Positive = Field(1e-3, description="peak learning rate of AdamW")
    lr_final: Fraction = Field(0.1, description="learning rate at the end, as a share of the peak (cosine)")
    warmup: Fraction = Field(0.05, description="share of the steps with a rising learning rate")
    weight_decay: NonNegative = Field(0.01, description="of the weight matrices; others are not decayed")
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.99
    grad_clip: Positive = Field(1.0, description="global norm of the gradient")
    label_smoothing: BelowOne = 0.0
    loss_at: Literal["every", "query"] = Field(
        "every", description="supervise every position, or only the last"
    )
    first_window: Fraction = Field(
        0.5, description="share of windows that start with the history's first step"
    )
    marker_dropout: Fraction = Field(0.0, description="share of windows whose marks are all dropped")
    transforms: tuple[TransformSpec, ...] = Field((), description="applied to the histories, in order")
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = Field(False, description="torch.compile the model")
    validations: Annotated[int, Ge(0)] = Field(4, description="in-context evaluations while training")
    validation_episodes: Count = 30
    validation_rollouts: Count = Field(4, description="rollouts per validation task")
    checkpoints: Annotated[int, Ge(2)] = Field(2, description="checkpoints kept")
    checkpoint_every: Count = Field(250, description="gradient steps between checkpoints")


class ModelConfig(Architecture, Optimisation):
    """The flat section of a model file such as ``config/model/ad_dr.yaml``."""
