"""Trains a run on the windows of its history file and validates it on the validation tasks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from compressed_ad.models.settings import ModelConfig
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import claimed, content_of, history_provenance
from compressed_ad.runs.job import TRAINING_KEYS, Job, device
from compressed_ad.settings import validated
from compressed_ad.types import check_same
from compressed_ad.workers import Report, ShouldStop, never, silent


def train_run(job: Job, *, report: Report = silent, should_stop: ShouldStop = never) -> list[str]:
    """Train a run, or continue it where it stopped; return notes for the user, one line each.

    Training histories are read only through the stored split. The best checkpoint is the one with the highest
    in-context return on the validation tasks.
    """
    from compressed_ad.training import ranks
    from compressed_ad.training.from_file import sampling, settings_of_file, without_effect
    from compressed_ad.training.loop import train

    data, notes, where = RunData(job), list[str](), device(job.config)
    task_ids, file, config = data.training_tasks(), data.file, job.config.model
    for kind, found in file.info.spaces.items():
        asked = getattr(config, f"{kind}_space")
        if asked is not None:
            check_same(f"model.{kind}_space", found, asked)
    from_history = settings_of_file(file.info, data.scales())
    filled = validated(ModelConfig, {**config.model_dump(), **from_history}, "model")
    provenance = history_provenance(file, job.config.marker if job.remark else None, data.family)
    first = ranks.rank() == 0
    with claimed(job.path, job.config, keys=TRAINING_KEYS, history=provenance) if first else nullcontext():
        if ranks.of_first(job.trained):
            return notes
        sampler, sequences = data.sampler(task_ids, job.config.seed, config.batch_size, **sampling(config))
        notes += [f"{job.name}: {note}" for note in without_effect(config, sequences)]
        validating = bool(len(file.split.validation) and config.validations)
        random, optimal = data.scale(file.split.validation)
        if validating and not (optimal > random).any():
            notes.append(
                f"{job.name}: random play is as good as the best known return in every validation task, so"
                " they cannot choose the best weights: best_model.pt has the last ones"
            )
        judged: dict[str, float] = {}

        def progress(step: int, metrics: Mapping[str, float]) -> None:
            judged.update({k: v for k, v in metrics.items() if k == "validation_return"})
            validation = "".join(f", validation {value:.3f}" for value in judged.values())
            report(step, config.steps, f"steps, loss {metrics['loss']:.3f}{validation}")

        trained = train(
            filled,
            sampler,
            job.path,
            seed=job.config.seed,
            validate=data.validate if validating else None,
            device=where,
            progress=progress,
            should_stop=should_stop,
            trained_on=content_of(provenance),
        )
        return notes + trained.messages
