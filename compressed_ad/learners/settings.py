"""Which source algorithm, and how much of it."""

from __future__ import annotations

from pydantic import Field

from compressed_ad.settings import Count, FreeParameters, Positive, Settings, later


class AlgorithmSettings(Settings):
    """The source algorithm whose learning is recorded."""

    learner: str = Field("ppo", description="ppo, sb3:ALGORITHM or module:attribute")
    n_learner: Count = Field(1, description="independent learners per task")
    n_stream: Count = Field(100, description="parallel environments of each learner, which share its policy")
    n_timesteps: Count = Field(1000, description="environment steps of each stream")
    keep_every: Count = later(1, "the file keeps one of so many episodes")
    learner_kwargs: FreeParameters = Field(
        default_factory=dict, description="hyper-parameters of the learner (cad list learners)"
    )
    n_process: Count | None = Field(None, description="parallel processes; default: the number of cores")
    timeout: Positive | None = Field(
        None, description="seconds without progress after which a worker process is ended; default: never"
    )
