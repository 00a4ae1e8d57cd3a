"""The history file of a run as training and evaluation need it: windows, return scales, validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import HistoryError
from compressed_ad.evaluation.intervals import mean
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import Scales, short
from compressed_ad.histories.summary import episode_returns
from compressed_ad.marking.apply import mark_task, marker_params
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.registry import check_trust
from compressed_ad.report.measures import area_under_curve, final_return, normalise
from compressed_ad.runs.config import transform_pairs
from compressed_ad.runs.directory import CONFIG
from compressed_ad.runs.job import Job, device, playing
from compressed_ad.seeding import seed64
from compressed_ad.tasks.select import stored_family
from compressed_ad.training.sequences import Sequences
from compressed_ad.training.shared_arrays import shared_sequences
from compressed_ad.training.transforms import apply_transforms
from compressed_ad.types import FloatArray, History, IntArray
from compressed_ad.workers import Report, silent

if TYPE_CHECKING:
    from compressed_ad.models.ad import AD
    from compressed_ad.training.windows import WindowSampler

PARTS = {"heldout": "held-out", "validation": "validation", "train": "training"}
"""Parts of the split, in words."""
FEW_WEIGHTS = 30e6
"""Of all contexts together. For a step of two layers, an H100 starts kernels for 3.5 ms; in that time, one
core of an EPYC with AVX-512 takes 40 million weights through."""


@lru_cache(maxsize=2)
def _sequences(path: Path, digest: str, task_ids: tuple[int, ...], marking: str | None) -> Sequences:
    """Raw sequences of some tasks, shared by the runs of this machine. The digest tells files apart."""
    file = HistoryFile(path, verify=False, digest=digest)

    def histories() -> Iterator[tuple[int, History]]:
        if marking is None:
            return file.each(task_ids)
        settings, seed = MarkerSettings.model_validate_json(marking), file.info.seed
        params = marker_params(settings)
        return (
            (task, history.with_mask(mark_task(settings.marker, history, task, seed=seed, **params)))
            for task, history in file.each(task_ids)
        )

    return shared_sequences(path, f"{digest} {task_ids} {marking}", histories)


@lru_cache(maxsize=8)
def _scales(path: Path, digest: str) -> Scales:
    """The scales stored in a history file, if its training tasks give the same."""
    file = HistoryFile(path, verify=False, digest=digest)
    stored = file.training_scales()
    for name, value in vars(file.training_scales(stored=False)).items():
        found = getattr(stored, name)
        same = np.shape(found) == np.shape(value) and (value is None or np.allclose(found, value, rtol=1e-5))
        if not same:
            raise HistoryError(
                f"{path}: scales/{name}: {short(found)} is stored, but the training tasks give"
                f" {short(value)}; the file was changed: collect or import it again"
            )
    return stored


def where_it_plays_faster(model: AD, n_slot: int) -> AD:
    """``model``, or a copy on the CPU if ``n_slot`` contexts at once are too few for its GPU."""
    n_weight = sum(weight.numel() for weight in model.parameters())
    on_gpu = model.head.weight.device.type != "cpu"
    if not on_gpu or n_slot * n_weight > FEW_WEIGHTS:
        return model
    from compressed_ad.models import MODEL

    played = MODEL[model.config.model](model.config)
    played.load_state_dict(model.state_dict())
    return played


class RunData:
    """The history file of a run, and its task family."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.file = job, job.config, HistoryFile(job.history)
        check_trust(job.path / CONFIG, job.code(), job.trust)
        self.digest, info = self.file.digest(), self.file.info  # what is read later must be of the same file
        self.family = stored_family(self.file.path, info.family, info.family_kwargs, job.trust)
        self._judged: dict[tuple[int, ...], tuple[WindowSampler, Sequences]] = {}

    def raw(self, task_ids: IntArray) -> Sequences:
        """The histories of ``task_ids`` as sequences, marked, before any transform."""
        marking = self.config.marker.model_dump_json() if self.job.remark else None
        ids = tuple(int(i) for i in task_ids)
        return replace(_sequences(self.file.path, self.digest, ids, marking))  # without what others derived

    def sampler(
        self, task_ids: IntArray, seed: int, batch_size: int, **options: Any
    ) -> tuple[WindowSampler, Sequences]:
        """A sampler of windows from the transformed histories of ``task_ids``, and these histories."""
        from compressed_ad.training.windows import WindowSampler

        model = self.config.model
        sequences = apply_transforms(
            self.raw(task_ids), transform_pairs(model), seed=seed, family=self.family, tasks=self.file.tasks
        )
        options |= {"seed": seed, "first_window": model.first_window, "device": device(self.config)}
        return WindowSampler(sequences, model.n_transit, batch_size, **options), sequences

    def training_tasks(self) -> IntArray:
        """The training tasks of the stored split, or those that the configuration chooses from them."""
        chosen = self.config.env.training_tasks
        ids = self.file.split.train if chosen is None else np.array(chosen, np.int64)
        self.file.split.check_training(ids)
        return ids

    def scales(self) -> Scales:
        """What models standardise by: see ``Scales``."""
        return _scales(self.file.path, self.digest)

    def scale(self, task_ids: IntArray) -> tuple[FloatArray, FloatArray]:
        """Random and optimal return (N,) of ``task_ids``.

        Where the optimum is unknown, the source's best episode (mean over streams) takes its place.
        """
        optimal = self.optimal(task_ids)
        for k in np.flatnonzero(np.isnan(optimal)):
            task = int(task_ids[k])
            episodes = episode_returns(self.file.load([task])[task]).mean(axis=0)
            # NaN without a complete episode; max(initial=nan) would always be NaN.
            optimal[k] = episodes.max() if episodes.size else np.nan
        return self.file.random_return[task_ids], optimal

    def optimal(self, task_ids: IntArray) -> FloatArray:
        """Optimal return (N,) of ``task_ids``, NaN where unknown."""
        known = self.file.optimal_return
        return np.full(len(task_ids), np.nan) if known is None else np.array(known[task_ids], np.float64)

    def imitation(self, model: AD, task_ids: IntArray, windows: int) -> dict[str, float]:
        """Accuracy, cross-entropy and behaviour entropy on the histories of ``task_ids``; NaN if undefined.

        Of models whose context steps leave, also ``visible``, how many tokens a query sees on average.

        The windows depend on the data alone, not on the run. Behaviour entropy is the entropy of the source's
        policy, averaged over the supervised steps: no model can have a lower cross-entropy in expectation. It
        is NaN where it was not recorded, and for continuous actions: there it is the differential entropy of
        the action before clipping, in other units than the loss.
        """
        from compressed_ad.evaluation.evaluate import evaluate_imitation

        size, key = min(32, windows), tuple(task_ids.tolist())
        if key not in self._judged:
            self._judged[key] = self.sampler(task_ids, self.file.info.seed, size)
        sampler, sequences = self._judged[key]
        batches = -(-windows // size)
        judged = evaluate_imitation(model, sampler, batches)
        entropy = float("nan")
        if "entropy" in sequences.store and self.file.info.spaces["action"]["kind"] != "box":
            steps = [sampler.indices(k) for k in range(batches)]
            judged_steps = [sequences.gather("entropy", index[valid]) for index, valid in steps]
            entropy = float(np.mean([values.mean() for values in judged_steps]))
        found = {
            "accuracy": judged.accuracy,
            "cross_entropy": judged.cross_entropy,
            "behaviour_entropy": entropy,
        }
        if model.forgets:
            windows_ = [sampler.batch(k) for k in range(batches)]
            seen = np.concatenate([model.visible_tokens(b.tokens)[b.valid].cpu().numpy() for b in windows_])
            found["visible"] = float(seen.mean())
        return found

    def play(
        self,
        model: AD,
        task_ids: IntArray,
        rollouts: int,
        episodes: int,
        seed: int,
        report: Report,
        **options: Any,
    ) -> FloatArray:
        """In-context returns (N, M, E) of the tasks ``task_ids``; ``options`` as of ``evaluate_tasks``."""
        from compressed_ad.evaluation.evaluate import evaluate_tasks

        return evaluate_tasks(
            where_it_plays_faster(model, len(task_ids) * rollouts),
            self.family,
            self.file.tasks[task_ids],
            rollouts=rollouts,
            episodes=episodes,
            seed=seed,
            progress=lambda done, total: report(done, total, "in-context steps"),
            **playing(self.config),
            **options,
        )

    def validate(self, model: AD) -> dict[str, float]:
        settings, ids = self.config.model, self.file.split.validation
        seed = seed64(self.config.seed, "validation")
        rollouts, episodes = settings.validation_rollouts, settings.validation_episodes
        returns = self.play(model, ids, rollouts, episodes, seed, silent)
        curves = normalise(returns, *self.scale(ids)).mean(axis=1)
        imitation = self.imitation(model, ids, windows=128)
        return {
            "validation_return": float(mean(final_return(curves))),
            "validation_auc": float(mean(area_under_curve(curves))),
            "validation_accuracy": imitation["accuracy"],
            "validation_excess_cross_entropy": imitation["cross_entropy"] - imitation["behaviour_entropy"],
        }
