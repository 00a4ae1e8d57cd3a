"""Figures of single runs for a report: rollouts, attention, border embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compressed_ad.errors import CompressedADError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.runs.explore import figures, play
from compressed_ad.runs.job import Job
from compressed_ad.runs.look_inside import examine_model
from compressed_ad.workers import Report, silent

if TYPE_CHECKING:
    from compressed_ad.report.pages import Drawn

SHOWN = ("paths", "found")
"""Of the figures of ``cad rollouts``."""


def sights(todo: Sequence[Job], report: Report = silent, *, searches: bool = True) -> Iterator[Drawn]:
    """Of the first trained run of each model in ``todo``; what cannot be shown of a run is left out.

    Held-out tasks are played again, as the evaluation played them, and attention is measured on windows of
    their histories. ``searches``: whether a reward must be found by exploration.
    """
    first: dict[str, Job] = {}
    for job in todo:
        if job.trained:
            first.setdefault(job.config.model.model, job)
    for model, job in first.items():
        for look in (_rollouts, _inside) if searches else (_inside,):
            try:
                yield from list(look(model, job, report))
            except CompressedADError:
                continue


def _rollouts(model: str, job: Job, report: Report) -> Iterator[Drawn]:
    played = play(job, HistoryFile(job.history).split.heldout, report)
    for name, caption, figure in figures(played):
        if name in SHOWN:
            yield f"{name}_{model}", f"Rollouts of {job.name}. {caption}", figure


def _inside(model: str, job: Job, report: Report) -> Iterator[Drawn]:
    from compressed_ad.report.figures.attention import attention_summary, border_embeddings

    report(0, 1, "attention")
    found = examine_model(job)
    yield (
        f"attention_{model}",
        f"Attention of {job.name} on held-out histories, by head. Above: its share on marked tokens, rewarded"
        " tokens, the current episode and border marks (filled), and what the head's own preference for lags"
        " alone would give (hollow). Below: their ratio with 95 % intervals over windows; filled where they"
        " exclude 1.",
        attention_summary(found.shares, job.name),
    )
    if found.effects is not None:
        yield (
            f"border_embeddings_{model}",
            f"The border embeddings of {job.name}: their size and direction, and how far the action"
            " distribution moves when marks are taken away or exchanged.",
            border_embeddings(found.geometry, found.effects, job.name),
        )
