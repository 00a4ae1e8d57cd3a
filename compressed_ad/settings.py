"""Every setting of this library, typed, with its range and its meaning. Imports no torch.

Each class is one section of the configuration; an unknown key is an error. Models and training share one
flat section because the user's model files do (``tf_n_embd`` beside ``batch_size`` and ``lr``), but each
part reads only its own class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compressed_ad.errors import ConfigError, nearest

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Whole = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]


class Settings(BaseModel):
    """Base of every section: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, field: ValidationInfo) -> Any:
        """``episodes: true`` is a mistake, not 1."""
        if isinstance(value, bool) and cls.model_fields[field.field_name or ""].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """``values`` as settings of a ``kind``; ``ConfigError`` lists all mistakes, prefixed by ``where``."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([f"{where}: {problem}" for problem in problems(kind, error)]) from None


def problems(kind: type[Settings], error: ValidationError) -> Iterator[str]:
    """One line for each mistake in a validation error: the key, what is wrong, the nearest known key."""
    return (text for _, text in located_problems(kind, error))


def located_problems(kind: type[Settings], error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    """The same with the path of the key that each line is about."""
    for mistake in error.errors():
        path = tuple(str(part) for part in mistake["loc"])
        key = ".".join(path)
        if mistake["type"] == "extra_forbidden":
            yield path, f"unknown key {key!r}{nearest(path[-1], _keys(kind, list(path[:-1])))}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            got = "" if mistake["type"] in ("missing", "value_error") else f", got {mistake['input']!r}"
            yield path, f"{key}: {message}{got}" if key else message


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The known keys of the section that ``path`` leads to."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)


FROM_HISTORY = (
    "observation_space",
    "action_space",
    "observation_mean",
    "observation_std",
    "reward_scale",
    "one_step",
)
"""What a model takes from the history file that it is trained on; nobody sets it."""

_FILLED_IN = "filled in from the history file"


def _given(default: Any) -> Callable[[Any], bool]:
    """Settings that came later are left out of files while they have their default.

    So the files of earlier runs stay what they were, and what is named after their content keeps its name.
    """
    return lambda value: bool(value == default)


MODEL_NAMES = ("AD", "CompressedAD", "CompressedADv2", "MarkedAttentionAD")
"""The registered models, so that a wrong name is found without importing torch."""


class Architecture(Settings):
    """What a model is built from; stored in every checkpoint."""

    model: str = Field("CompressedAD", description="name in MODEL, or module:attribute")
    tf_n_embd: Count = Field(96, description="embedding dimension")
    tf_n_head: Count = Field(4, description="attention heads")
    tf_n_layer: Count = Field(2, description="transformer layers")
    n_transit: Count = Field(200, description="context length in time steps")
    position: Literal["rotary", "learned"] = Field("rotary", description="how a token knows its place")
    dropout: BelowOne = Field(0.0, description="dropout on the embedding and on each residual branch")
    action_mixture: Count = Field(
        4, exclude_if=_given(4), description="normal distributions that make up that of a continuous action"
    )
    observation_space: dict[str, Any] | None = Field(None, description=_FILLED_IN)
    action_space: dict[str, Any] | None = Field(None, description=_FILLED_IN)
    observation_mean: tuple[float, ...] | None = Field(None, exclude_if=_given(None), description=_FILLED_IN)
    observation_std: tuple[NonNegative, ...] | None = Field(
        None, exclude_if=_given(None), description=_FILLED_IN
    )
    reward_scale: Positive = Field(1.0, exclude_if=_given(1.0), description=_FILLED_IN)
    one_step: bool = Field(
        False, exclude_if=_given(False), description=f"whether an episode is one step; {_FILLED_IN}"
    )

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
    loss_at: Literal["every", "query"] = Field(
        "every", description="supervise every position, or only the last"
    )
    first_window: Fraction = Field(
        0.5, description="share of windows that start with the history's first step"
    )
    marker_dropout: Fraction = Field(0.0, description="share of windows whose marks are all dropped")
    loss_weight_marked: NonNegative = Field(1.0, description="weight of marked steps in the loss")
    loss_weight_unproven: NonNegative | None = Field(
        None,
        description="weight of marked steps before their stream's first reward; default: loss_weight_marked",
    )
    transforms: tuple[TransformSpec, ...] = Field((), description="applied to the histories, in order")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass")
    compile: bool = Field(False, description="torch.compile the model")
    validations: Whole = Field(4, description="in-context evaluations while training")
    validation_episodes: Count = Field(30, description="in-context episodes of a validation")
    validation_rollouts: Count = Field(4, description="rollouts per validation task")
    checkpoints: Annotated[int, Ge(2)] = Field(2, description="checkpoints kept")
    checkpoint_every: Count = Field(250, description="gradient steps between checkpoints")


class ModelConfig(Architecture, Optimisation):
    """The flat section of a model file such as ``config/model/ad_dr.yaml``."""

    @model_validator(mode="after")
    def _smoothing_needs_choices(self) -> ModelConfig:
        if self.label_smoothing and (self.action_space or {}).get("kind") == "box":
            raise ValueError("label_smoothing is for discrete actions; set it to 0 for continuous ones")
        return self


class EnvSettings(Settings):
    """The task family, and which of its tasks train, choose and judge."""

    family: str = Field("darkroom", description="task family (cad list families), or module:attribute")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="parameters of the family")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.]+$", description="name in file names; default: the family's"
    )
    n_task: Count | None = Field(None, description="so many of the tasks, drawn at random; default: all")
    train: Count | None = Field(None, description="training tasks; default: those that remain")
    validation: Whole | None = Field(None, description="validation tasks, which choose; default: a tenth")
    heldout: Count | None = Field(None, description="held-out tasks, which judge; default: a tenth")
    split_seed: Seed | None = Field(None, description="seed of the split; default: seed")
    training_tasks: Annotated[tuple[Whole, ...], MinLen(1)] | None = Field(
        None, description="train models on these training tasks only; default: all of them"
    )

    @property
    def short_name(self) -> str:
        """The name in file names."""
        return self.name or re.sub(r"[^A-Za-z0-9_.]+", "_", self.family)


class AlgorithmSettings(Settings):
    """The source algorithm whose learning is recorded."""

    learner: str = Field("ppo", description="ppo, sb3:ALGORITHM or module:attribute")
    n_learner: Count = Field(1, description="independent learners per task")
    n_stream: Count = Field(100, description="parallel environments of each learner, which share its policy")
    n_timesteps: Count = Field(1000, description="environment steps of each stream")
    learner_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters of the learner (cad list learners)"
    )
    n_process: Count | None = Field(None, description="parallel processes; default: the number of cores")


class MarkerSettings(Settings):
    """How steps of the histories are marked."""

    marker: str = Field("threshold", description="marker (cad list markers), or module:attribute")
    on_policy_threshold: Fraction | None = Field(
        None,
        description="minimum probability of a marked action; default: the marker's (threshold: 0.7)",
    )
    compression_window: Count | None = Field(
        None, description="minimum length of a marked segment in steps; default: the marker's (threshold: 10)"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="other parameters of the marker")


class EvaluationSettings(Settings):
    """In-context evaluation on the held-out tasks, and on the validation tasks while training."""

    episodes: Count = Field(50, description="in-context episodes")
    rollouts: Count = Field(8, description="rollouts per held-out task")
    temperature: Positive = Field(1.0, description="of the model's action distribution")
    temperature_rewarded: Positive | None = Field(
        None, description="temperature once the context holds a reward; default: temperature"
    )
    sample: bool = Field(True, description="sample actions; false: the most likely one")
    context: Literal["refill", "sliding"] = Field(
        "refill", description="a full context drops its older half, or one step at a time (exact, slow)"
    )
    marks: Literal["off", "self", "prompt", "prompt_rewarded"] = Field(
        "off", description="border marks shown while playing"
    )
    guidance: float = Field(
        0.0, description="how far the marks move the logits beyond what they do: cond + g (cond - unmarked)"
    )
    training_tasks: Whole = Field(
        0, description="so many training tasks are played as well, to compare with the held-out ones"
    )
    checkpoint: Literal["best", "last"] = Field(
        "best", description="which weights are judged: best on the validation tasks, or last"
    )
    imitation_windows: Count = Field(
        512, description="windows of held-out histories for accuracy and cross-entropy"
    )


class ComparisonSettings(Settings):
    """Which methods are compared, and on how many training runs each."""

    methods: Annotated[tuple[str, ...], MinLen(1)] = Field(
        ("AD", "CompressedAD"), description="models; all are compared with the first"
    )
    runs: Count = Field(3, description="training seeds per method: seed, seed + 1, ...")

    @model_validator(mode="after")
    def _distinct(self) -> ComparisonSettings:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods {list(self.methods)} names a model twice")
        return self


class Config(Settings):
    """Everything that determines a run."""

    env: EnvSettings = EnvSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    marker: MarkerSettings = MarkerSettings()
    model: ModelConfig = ModelConfig()
    evaluation: EvaluationSettings = EvaluationSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    seed: Seed = Field(0, description="seed of the histories, the split and the first run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models are trained")

    @property
    def split_seed(self) -> int:
        """The seed of the split."""
        return self.seed if self.env.split_seed is None else self.env.split_seed

    @property
    def seeds(self) -> range:
        """Training seeds of the runs of each method."""
        return range(self.seed, self.seed + self.comparison.runs)
