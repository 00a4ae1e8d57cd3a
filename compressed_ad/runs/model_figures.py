"""Figures of single models in the report of a run: how they explore, where they look, what their marks do.

torch is imported only where a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from compressed_ad.errors import CompressedADError
from compressed_ad.runs.job import Job
from compressed_ad.workers import Report

if TYPE_CHECKING:
    from compressed_ad.evaluation.attention import Shares
    from compressed_ad.evaluation.border_embeddings import Effects
    from compressed_ad.report.pages import Drawn


def single_run_figures(
    todo: Sequence[Job], *, searches: bool
) -> dict[str, Callable[[Report], Iterator[Drawn]]]:
    """What draws the first trained run of each model in ``todo``: its rollouts, and what is inside it.

    ``searches``: whether a reward must be found by exploration.
    """
    first: dict[str, Job] = {}
    for job in todo:
        if job.trained:
            first.setdefault(job.config.model.model, job)
    sights: dict[str, Callable[[Report], Iterator[Drawn]]] = {}
    for model, job in first.items():
        sights |= {f"rollouts of {model}": partial(_rollouts, job)} if searches else {}
        sights[f"inside {model}"] = partial(_inside, job)
    return sights


def _rollouts(job: Job, report: Report) -> Iterator[Drawn]:
    """The episodes of the evaluation on the held-out tasks; nothing where they cannot be shown."""
    from compressed_ad.runs.explore import evaluated, figures

    with suppress(CompressedADError):
        for name, caption, figure in figures(evaluated(job, report), ("paths", "found")):
            yield f"{name}_{job.config.model.model}", f"Rollouts of {job.name}. {caption}", figure


def _inside(job: Job, report: Report) -> Iterator[Drawn]:
    """Attention on windows of held-out histories, and border embeddings; nothing where it cannot be shown."""
    from compressed_ad.report.figures.attention import attention_summary, border_embeddings
    from compressed_ad.runs.look_inside import examine_model

    model = job.config.model.model
    with suppress(CompressedADError):
        found = examine_model(job)
        yield (
            f"attention_{model}",
            f"Attention of {job.name} on held-out histories, by head. Above: its share on marked tokens,"
            " rewarded tokens, the current episode and border marks (filled), and what the head's own"
            " preference for lags alone would give (hollow). Below: their ratio with 95 % intervals over"
            f" windows; filled where they exclude 1. {_attention_found(found.shares)}",
            attention_summary(found.shares, job.name),
        )
        if found.effects is not None:
            yield (
                f"border_embeddings_{model}",
                f"The border embeddings of {job.name}: their size and direction, and how far the action"
                " distribution moves when marks are taken away or exchanged."
                f" {_marks_found(found.effects)}",
                border_embeddings(found.geometry, found.effects, found.step, job.name),
            )


def _attention_found(shares: Shares) -> str:
    """The range of the heads' ratios by kind of token, and how many of their intervals exclude 1."""
    said = []
    for kind, ratio, low, high in zip(shares.kinds, shares.ratio, shares.low, shares.high, strict=True):
        if np.isfinite(ratio).any():
            span = f"{kind} {np.nanmin(ratio):.2f} to {np.nanmax(ratio):.2f}"
            said.append(f"{span} ({int(((low > 1) | (high < 1)).sum())} of {ratio.size})")
    return f"Ratios of the heads, and how many intervals exclude 1: {', '.join(said)}." if said else ""


def _marks_found(effects: Effects) -> str:
    """What becomes of all predictions without marks; empty where no query has one in its context."""
    change, place = effects.changes.index("no marks"), effects.places.index("all")
    moved, added = (values[change, place, 0] for values in (effects.divergence, effects.cross_entropy))
    if not np.isfinite([moved, added]).all():
        return ""
    said = (
        f"Without marks it moves by {moved:.2g} nats on average, and the loss changes by {added:+.2g} nats."
    )
    return said.replace("-", "−")
