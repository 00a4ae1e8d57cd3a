"""How trained models play. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressed_ad.settings import Count, Positive, Settings, Whole


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
    training_tasks: Whole = Field(0, description="training tasks that are played as well, to compare")
    checkpoint: Literal["best", "last"] = Field(
        "best", description="which weights are judged: best on the validation tasks, or last"
    )
    imitation_windows: Count = Field(512, description="held-out windows for accuracy and cross-entropy")
