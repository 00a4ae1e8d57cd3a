"""One training run as it is told to others: its configuration, its history file, its directory.

torch is imported only when a run is trained or judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.apply import GUIDE_SETTINGS, marker_params
from compressed_ad.runs.directory import history_provenance, run_name, stored_config, stored_environment
from compressed_ad.runs.settings import Config

WEIGHTS = {"best": "best_model.pt", "last": "last_model.pt"}
_PLAYING = ("temperature", "temperature_rewarded", "sample", "context", "marks", "guidance")
TRAINING_KEYS = ("model", "seed", "env.training_tasks", *(f"evaluation.{key}" for key in _PLAYING))
"""What a training run depends on besides its data: its validation plays as its evaluation will."""


@dataclass(frozen=True)
class Job:
    """One model, one seed: ``config.model.model`` and ``config.seed`` say which."""

    config: Config
    history: Path
    path: Path
    remark: bool = False
    """Mark the histories as they are read, as ``config.marker`` says, whatever marks the file holds."""

    @property
    def name(self) -> str:
        """The run directory's name."""
        return self.path.name

    @property
    def trained(self) -> bool:
        """Whether training is finished."""
        return all((self.path / file).exists() for file in WEIGHTS.values())


def jobs(config: Config, history: Path, out: Path) -> list[Job]:
    """The training runs of a comparison: every method with every seed, seeds outermost."""
    return [
        job(config, model, seed, history, out) for seed in config.seeds for model in config.comparison.methods
    ]


def job(config: Config, model: str, seed: int, history: Path, out: Path) -> Job:
    """The run of one model with one seed, in a directory of ``out``."""
    own = config.model_copy(update={"model": config.model.model_copy(update={"model": model}), "seed": seed})
    return Job(own, history, out / run_name(model, config.env.short_name, seed))


def stored_job(path: Path, history: Path | None = None) -> Job:
    """The run in the directory ``path``, on the history file that it was trained on or another one."""
    config = stored_config(path)
    if history is None:
        known = (stored_environment(path).get("history") or {}).get("path")
        if known is None:
            raise RunDirectoryError(f"{path}: does not say which history file it was trained on; give one")
        beside = path.parent / Path(known).name  # the folder may have been moved as a whole
        history = beside if beside.exists() and not Path(known).exists() else Path(known)
    return Job(config, history, path)


def playing(config: Config) -> dict[str, Any]:
    """How models play: the options of ``InContextAgent``."""
    options = {key: getattr(config.evaluation, key) for key in _PLAYING}
    if config.evaluation.marks == "self":
        # The rule online is the guide's; a marker without these settings leaves it at its defaults.
        guide = {key: getattr(config.marker, key) for key in GUIDE_SETTINGS}
        options |= {key: value for key, value in guide.items() if value is not None}
    return options


def device(config: Config) -> str:
    """Where to compute: "auto" is CUDA if there is any. Sets one CPU thread.

    With one thread each, results do not depend on how many processes share the machine.
    """
    import torch

    torch.set_num_threads(1)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: no CUDA device was found; use --device cpu")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def provenance_of(job: Job, file: HistoryFile) -> dict[str, Any]:
    """Which data a run is made from, with the marks that it sees."""
    found = history_provenance(file)
    if job.remark:
        settings = job.config.marker
        found |= {
            "marker": settings.marker,
            "marker_parameters": marker_params(settings),
            "marker_seed": file.info.seed,
            "marked_at": None,
        }
    return found
