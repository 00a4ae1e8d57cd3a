"""Looking inside a trained run: its attention, its border embeddings and one context to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import CheckpointError, RunDirectoryError, UsageError
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import stored_environment
from compressed_ad.runs.job import WEIGHTS, Job, device, stored_job
from compressed_ad.runs.judge import check_unseen, load_model
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from compressed_ad.evaluation.attention import Context, Shares
    from compressed_ad.evaluation.border_embeddings import Effects, Geometry
    from compressed_ad.models.tokens import Batch

PARTS = ("heldout", "validation", "train")


@dataclass(frozen=True)
class Inside:
    """What ``inside`` found."""

    run: str
    model: str
    step: int  # gradient steps of the weights looked at
    part: str  # of the tasks, one of ``PARTS``
    history: str
    shares: Shares
    mark_bias: FloatArray | None  # (layers, H), of a model whose attention to marked tokens is biased
    geometry: tuple[Geometry, ...]  # by gradient step, the weights looked at among them; empty without tokens
    effects: Effects | None
    context: Context
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """All numbers but the maps, as JSON values; what is not known is None."""
        found = asdict(replace(self, context=replace(self.context, maps=np.zeros(0))))
        del found["context"]["maps"]
        return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trained_job(path: Path, history: Path | None = None) -> Job:
    """The trained run in ``path``, with histories marked as those that it was trained on."""
    job = stored_job(path, history)
    if not job.trained:
        raise RunDirectoryError(f"{path}: its training is not finished; continue it with: cad train --resume")
    trained_on = stored_environment(path)["history"]
    # Marks without a time were made while the histories were read, and no file holds them.
    return replace(job, remark=trained_on.get("marker") is not None and trained_on.get("marked_at") is None)


def inside(job: Job, *, part: str = "heldout", windows: int = 64, window: int | None = None) -> Inside:
    """Look at the weights that ``job`` is judged by, on windows of the tasks of one ``part`` of the split.

    The windows depend on the data alone, so runs on the same histories are seen on the same ones. ``window``
    is the one whose maps are kept, by default the one marked most nearly by half. Nothing is written.

    ``UsageError`` for a wrong ``part`` or ``window``, a part without tasks, or no window at all.
    """
    import torch

    from compressed_ad.evaluation.attention import Context, attention_maps, attention_shares
    from compressed_ad.evaluation.border_embeddings import mark_effects
    from compressed_ad.models.compressed_ad import CompressedAD

    if part not in PARTS:
        raise UsageError(f"unknown part {part!r} of the split; one of {', '.join(PARTS)}")
    if windows < 1 or not 0 <= (window or 0) < windows:
        raise UsageError(f"there must be at least 1 window, and the one shown must lie in 0..{windows - 1}")
    data, where = RunData(job), device(job.config)
    ids = _tasks(job, data, part)
    model, step = load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
    model.eval()
    sampler, sequences = data.sampler(ids, data.file.info.seed, windows)
    batch = sampler.batch(0)
    has_tokens = isinstance(model, CompressedAD)
    over_training, notes = _over_training(job, data, batch, where) if has_tokens else ([], [])
    shown = _nearly_half_marked(batch) if window is None else window
    start = int(sampler.starts(0)[0][shown])
    sequence = int(np.searchsorted(sequences.offsets, start, side="right") - 1)
    one = batch.part(slice(shown, shown + 1))
    length = int(one.valid.sum())
    maps = attention_maps(model, one.tokens)[:, 0, :, :length, :length]
    biases = [block.attention.mark_bias for block in model.transformer.blocks]  # type: ignore[union-attr]
    return Inside(
        run=job.name,
        model=job.config.model.model,
        step=step,
        part=part,
        history=str(job.history),
        shares=attention_shares(model, batch),
        mark_bias=torch.stack(biases).detach().cpu().numpy() if model.biased else None,  # type: ignore[arg-type]
        geometry=tuple(over_training),
        effects=mark_effects(model, batch) if has_tokens else None,
        context=Context(
            window=shown,
            task=int(sequences.task[sequence]),
            first_step=start - int(sequences.offsets[sequence]),
            maps=maps.cpu().numpy(),
            marked=_row(one.tokens.marked, length),
            rewarded=_row(one.tokens.reward > 0, length),
            episode_start=_row(one.tokens.ended | ~one.tokens.has_previous, length),
        ),
        notes=tuple(notes),
    )


def _tasks(job: Job, data: RunData, part: str) -> IntArray:
    ids: IntArray = data.training_tasks() if part == "train" else getattr(data.file.split, part)
    if len(ids) == 0:
        raise UsageError(f"{data.file.path} has no {part} tasks; choose another part")
    if part == "heldout":
        check_unseen(job, data, ids)
    return ids


def _row(tensor: Any, length: int) -> BoolArray:
    row: AnyArray = tensor[0, :length].cpu().numpy()
    return row


def _nearly_half_marked(batch: Batch) -> int:
    """The window whose marked share is nearest to one half, so that both kinds of steps are seen."""
    share = (batch.tokens.marked & batch.valid).sum(dim=1) / batch.valid.sum(dim=1)
    return int((share - 0.5).abs().argmin())


def _over_training(job: Job, data: RunData, batch: Batch, where: str) -> tuple[list[Geometry], list[str]]:
    """The border embeddings at every gradient step of which the run directory holds weights, and notes."""
    from compressed_ad.evaluation.border_embeddings import geometry

    found: dict[int, Geometry] = {}
    notes = []
    kept = [job.path / name for name in WEIGHTS.values()]
    for path in [*kept, *sorted((job.path / "checkpoints").glob("step-*.pt"))]:
        try:
            model, step = load_model(path, data, where)
        except CheckpointError as error:
            if path in kept:
                raise
            notes.append(f"{error}; skipped")
            continue
        if step not in found:
            found[step] = geometry(model, batch, step)
    return [found[step] for step in sorted(found)], notes
