"""Which task family, and which of its tasks."""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import MinLen
from pydantic import Field

from compressed_ad.settings import Count, FreeParameters, Seed, Settings, Whole


class EnvSettings(Settings):
    """The task family, and which of its tasks train, choose and judge."""

    family: str = Field("darkroom", description="task family (cad list families), or module:attribute")
    kwargs: FreeParameters = Field(default_factory=dict, description="parameters of the family")
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
        return self.name or re.sub(r"[^A-Za-z0-9_.]+", "_", self.family)
