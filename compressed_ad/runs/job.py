"""A training run as a value: its configuration, its history file and its directory.

torch is imported only when a run is trained or evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.marking.apply import GUIDE_SETTINGS
from compressed_ad.runs.config import own_code
from compressed_ad.runs.directory import run_name, runs_inside, stored_config, stored_provenance
from compressed_ad.runs.settings import Config

WEIGHTS = {"best": "best_model.pt", "last": "last_model.pt"}
_PLAYING = ("temperature", "temperature_rewarded", "sample", "context", "marks", "guidance")
TRAINING_KEYS = ("model", "seed", "env.training_tasks", *(f"evaluation.{key}" for key in _PLAYING))
"""The settings that a training run depends on; its validation plays as its evaluation does."""


@dataclass(frozen=True)
class Job:
    """The run of one model, ``config.model.model``, with one seed, ``config.seed``."""

    config: Config
    history: Path
    path: Path
    remark: bool = False
    """Replace the marks of the file by those of ``config.marker`` when the histories are read."""
    trust: frozenset[str] = frozenset()
    """Names of code from outside this library that the files of the run may name."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def trained(self) -> bool:
        return all((self.path / file).exists() for file in WEIGHTS.values())

    def code(self) -> frozenset[str]:
        """The names of code from outside this library in the configuration, as far as it is used."""
        code = own_code(self.config)
        return code["model"] | (code["marker"] if self.remark else frozenset())

    def check_trained(self) -> None:
        """Raise ``RunDirectoryError`` unless training is finished."""
        if not self.trained:
            raise RunDirectoryError(
                f"{self.path}: its training is not finished; continue it with: cad train --resume"
            )


def training_job(
    config: Config, model: str, seed: int, history: Path, out: Path, trust: frozenset[str] = frozenset()
) -> Job:
    """The run of one model with one seed, in a directory of ``out``."""
    update = {"model": config.model.model_copy(update={"model": model}), "seed": seed}
    path = out / run_name(model, config.env.short_name, seed)
    return Job(config.model_copy(update=update), history, path, trust=trust)


def stored_job(path: Path, history: Path | None = None, trust: frozenset[str] = frozenset()) -> Job:
    """The run in the directory ``path``, with the history file that it was trained on or another one."""
    config = stored_config(path)
    if history is None:
        known = stored_provenance(path).get("path")
        if known is None:
            if inside := runs_inside(path):
                raise RunDirectoryError(f"{path}: is a folder of runs, not one; runs lie in it: {inside}")
            raise RunDirectoryError(f"{path}: does not say which history file it was trained on; give one")
        beside = path.parent / Path(known).name  # where it is if run and histories were moved together
        history = beside if beside.exists() and not Path(known).exists() else Path(known)
    return Job(config, history, path, trust=trust)


def trained_job(path: Path, history: Path | None = None, trust: frozenset[str] = frozenset()) -> Job:
    """As ``stored_job``, of a run whose training is finished."""
    job = stored_job(path, history, trust)
    job.check_trained()
    return job


def evaluation_job(
    path: Path, history: Path | None, config: Config, chosen: Iterable[str], trust: frozenset[str]
) -> Job:
    """The trained run in ``path``, to be evaluated on the device of ``config``.

    Its evaluation settings are its own, but those named in ``chosen`` are taken from ``config``.
    """
    job = trained_job(path, history, trust)
    evaluation = {key: getattr(config.evaluation, key) for key in chosen}
    update = {"evaluation": job.config.evaluation.model_copy(update=evaluation), "device": config.device}
    return replace(job, config=job.config.model_copy(update=update))


def playing(config: Config) -> dict[str, Any]:
    """The options of ``InContextAgent`` that ``config`` asks for."""
    options = {key: getattr(config.evaluation, key) for key in _PLAYING}
    if config.evaluation.marks == "self":
        # Online, the guide's rule marks; if the marker lacks these settings, the rule has its defaults.
        guide = {key: getattr(config.marker, key) for key in GUIDE_SETTINGS}
        options |= {key: value for key, value in guide.items() if value is not None}
    return options


def device(config: Config) -> str:
    """The device for computing: with "auto", CUDA if there is any. Sets torch to one CPU thread.

    With one thread per process, results do not depend on how many processes share the machine.
    """
    import torch

    torch.set_num_threads(1)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: no CUDA device was found; use --device cpu")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
