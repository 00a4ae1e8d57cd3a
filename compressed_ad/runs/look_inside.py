"""What is inside the model of a trained run: its attention, its border embeddings, and one context's maps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from compressed_ad.errors import CheckpointError, UsageError
from compressed_ad.runs.data import PARTS, RunData
from compressed_ad.runs.directory import stored_provenance
from compressed_ad.runs.job import WEIGHTS, Job, device, trained_job
from compressed_ad.runs.judge import check_unseen, load_model
from compressed_ad.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from compressed_ad.evaluation.attention import Context, Shares
    from compressed_ad.evaluation.border_embeddings import Effects, Geometry
    from compressed_ad.models.tokens import Batch


@dataclass(frozen=True)
class ModelFindings:
    """What ``examine_model`` measures."""

    run: str
    model: str
    step: int  # gradient steps of the weights
    part: str  # of the split, a key of ``PARTS``
    history: str
    shares: Shares
    mark_bias: FloatArray | None  # (layers, H), of a model that biases attention to marked tokens
    geometry: tuple[Geometry, ...]  # by gradient step of all stored weights; empty without border embeddings
    effects: Effects | None  # None without border embeddings
    context: Context
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """All fields as nested dictionaries, without the attention maps."""
        found = asdict(replace(self, context=replace(self.context, maps=np.zeros(0))))
        del found["context"]["maps"]
        return found


def examination_job(path: Path, history: Path | None = None, trust: frozenset[str] = frozenset()) -> Job:
    """The trained run in ``path``, with histories marked like those that it was trained on."""
    job = trained_job(path, history, trust)
    trained_on = stored_provenance(path)
    # Marks without a time were made while the histories were read; no file holds them.
    return replace(job, remark=trained_on.get("marker") is not None and trained_on.get("marked_at") is None)


def examine_model(
    job: Job, *, part: str = "heldout", windows: int = 64, window: int | None = None
) -> ModelFindings:
    """Measure attention and border embeddings of the evaluated weights on tasks of one ``part`` of the split.

    The windows depend on the data alone, so runs on the same histories are measured on the same windows. The
    attention maps are those of ``window``, by default of the one whose marked share is nearest to one half.
    Nothing is written.

    ``UsageError`` for a wrong ``part`` or ``window``, a part without tasks, or if there is no window.
    """
    if part not in PARTS:
        raise UsageError(f"unknown part {part!r} of the split; one of {', '.join(PARTS)}")
    if windows < 1 or not 0 <= (window or 0) < windows:
        raise UsageError(f"there must be at least 1 window, and the one shown must lie in 0..{windows - 1}")
    import torch

    from compressed_ad.evaluation.attention import Context, attention_maps, attention_shares
    from compressed_ad.evaluation.border_embeddings import mark_effects
    from compressed_ad.models.compressed_ad import CompressedAD

    data, where = RunData(job), device(job.config)
    ids: IntArray = data.training_tasks() if part == "train" else getattr(data.file.split, part)
    if len(ids) == 0:
        raise UsageError(f"{data.file.path} has no {PARTS[part]} tasks; choose another part")
    seen = check_unseen(data, part)
    model, step = load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
    model.eval()
    sampler, sequences = data.sampler(ids, data.file.info.seed, windows)
    batch = sampler.batch(0)
    has_embeddings = isinstance(model, CompressedAD)
    over_training, notes = _geometry_over_training(job, data, batch, where) if has_embeddings else ([], [])
    marked = (batch.tokens.marked & batch.valid).sum(dim=1) / batch.valid.sum(dim=1)
    shown = int((marked - 0.5).abs().argmin()) if window is None else window
    start = int(sampler.starts(0)[0][shown])
    sequence = int(np.searchsorted(sequences.offsets, start, side="right") - 1)
    one = batch.part(slice(shown, shown + 1))
    length = int(one.valid.sum())
    maps = attention_maps(model, one.tokens)[:, 0, :, :length, :length]

    def row(tensor: torch.Tensor) -> BoolArray:
        return cast(BoolArray, tensor[0, :length].cpu().numpy())

    biases = [block.attention.mark_bias for block in model.transformer.blocks]  # type: ignore[union-attr]
    return ModelFindings(
        run=job.name,
        model=job.config.model.model,
        step=step,
        part=part,
        history=str(job.history),
        shares=attention_shares(model, batch),
        mark_bias=torch.stack(biases).detach().cpu().numpy() if model.biased else None,  # type: ignore[arg-type]
        geometry=tuple(over_training),
        effects=mark_effects(model, batch) if has_embeddings else None,
        context=Context(
            window=shown,
            task=int(sequences.task[sequence]),
            first_step=start - int(sequences.offsets[sequence]),
            maps=maps.cpu().numpy(),
            marked=row(one.tokens.marked),
            rewarded=row(one.tokens.reward > 0),
            episode_start=row(one.tokens.ended | ~one.tokens.has_previous),
        ),
        notes=(*seen, *notes),
    )


def _geometry_over_training(
    job: Job, data: RunData, batch: Batch, where: str
) -> tuple[list[Geometry], list[str]]:
    """The border embeddings at each gradient step whose weights the run directory holds, and notes."""
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
