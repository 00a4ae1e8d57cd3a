"""The configuration of a run: every section together. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import Field, field_validator, model_validator

from compressed_ad.evaluation.settings import EvaluationSettings
from compressed_ad.learners.settings import AlgorithmSettings
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.models.settings import ModelConfig
from compressed_ad.settings import Count, Problem, Seed, Settings
from compressed_ad.tasks.settings import EnvSettings


class ComparisonSettings(Settings):
    """Which methods are compared, and on how many training runs each."""

    methods: Annotated[tuple[str, ...], MinLen(1)] = Field(
        ("AD", "CompressedAD"), description="models; all are compared with the first"
    )
    runs: Count = Field(3, description="training seeds per method: seed, seed + 1, ...")

    @field_validator("methods")
    @classmethod
    def _distinct(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError(f"{list(methods)} names a model twice")
        return methods


class Config(Settings):
    """Everything that determines a run."""

    env: EnvSettings = EnvSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    marker: MarkerSettings = MarkerSettings()
    model: ModelConfig = ModelConfig()
    evaluation: EvaluationSettings = EvaluationSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    seed: Seed = Field(0, description="seed of the histories, the split and the first run")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where models are trained; small ones play on the CPU"
    )

    @model_validator(mode="after")
    def _marks_can_close(self) -> Config:
        if self.model.segments == "marks" and self.evaluation.marks == "off":
            message = "segments marks close nothing while playing unless evaluation.marks is set; try self"
            raise ValueError(Problem(message, ("evaluation", "marks"), ("model", "segments")))
        return self

    @property
    def split_seed(self) -> int:
        """The seed of the split."""
        return self.seed if self.env.split_seed is None else self.env.split_seed

    @property
    def seeds(self) -> range:
        """Training seeds of the runs of each method."""
        return range(self.seed, self.seed + self.comparison.runs)


def without_effect(config: Config) -> list[Problem]:
    """Settings that change nothing. They are refused where they are asked for; stored runs may have them."""
    model, found = config.model, list[Problem]()
    names = {model.model, *config.comparison.methods}
    models = [model.model_copy(update={"model": name}) for name in names]

    def changed(*keys: str) -> list[str]:
        return [key for key in keys if getattr(model, key) != ModelConfig.model_fields[key].default]

    own = any(":" in name for name in names)
    if changed("kept_tokens") and not own and all(each.segmentation == "none" for each in models):
        message = "kept_tokens has no effect without segments; set segments, or choose GistAD"
        if any(each.recurrent for each in models):
            message = "kept_tokens is no setting of RecurrentAD, which keeps memory_tokens; GistAD has it"
        found.append(Problem(message, ("model", "kept_tokens")))
    memory = changed("memory_tokens", "memory_steps")
    if memory and not own and not any(each.recurrent for each in models):
        found.append(Problem(f"{memory[0]} is a setting of RecurrentAD alone", ("model", memory[0])))
    if model.recent_steps >= model.n_transit:
        message = f"with recent_steps {model.recent_steps} and n_transit {model.n_transit}, nothing leaves"
        found.append(Problem(message, ("model", "recent_steps"), ("model", "n_transit")))
    if model.segments == "episode" and {"AD", "GistAD"} <= set(config.comparison.methods):
        message = "with segments episode, AD is what GistAD is; leave segments alone to compare the two"
        found.append(Problem(message, ("model", "segments"), ("comparison", "methods")))
    return found
