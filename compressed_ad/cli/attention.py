"""``cad attention``: where the model of a trained run looks, and what its border embeddings do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import print_lines
from compressed_ad.cli.options import count, history_option, one_of, option, out_option
from compressed_ad.cli.output import check_output, write_output
from compressed_ad.runs.data import PARTS
from compressed_ad.runs.look_inside import ModelFindings, examination_job, examine_model
from compressed_ad.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.evaluation.border_embeddings import Effects

FILE = "attention.json"


def _options(parser: argparse.ArgumentParser) -> None:
    option(parser, "run", "RUN", "trained run directory", Path)
    history_option(parser, "the one that the run was trained on")
    parts = f"part of the split whose histories are used: {', '.join(PARTS)}"
    option(parser, "--part", "PART", parts, one_of("part", PARTS), default="heldout")
    option(parser, "--windows", "N", "contexts drawn from them", count, default=64)
    closest = "the one closest to half marked"
    option(parser, "--window", "K", f"context that is drawn as a map (default: {closest})", int)
    out_option(parser, "output folder", "RUN/attention")


def run(call: Call) -> None:
    options = call.options
    job = examination_job(options.run, options.history)
    out: Path = options.out or job.path / "attention"
    check_output(out, FILE)
    if options.dry_run:
        print_lines(
            f"Would measure attention in {options.windows} windows of the {PARTS[options.part]} tasks of"
            f" {job.history} and write to {out}"
        )
        return
    with call.display.stage("attention"):
        found = examine_model(job, part=options.part, windows=options.windows, window=options.window)
        written = write_output(out, FILE, found.summary(), _figures(found))
    for note in found.notes:
        call.display.note(f"note: {note}")
    print_lines(f"{text(found)}\n\n{written}")


ATTENTION = Command(
    run,
    _options,
    text=(
        "Writes attention.json (all numbers), attention.png (attention on marked, rewarded and other tokens "
        "by head, beside what uniform attention and the head's preference for lags alone give), "
        "attention_map.png (one context) and, for CompressedAD, tokens.png (its border embeddings and what "
        "they change)."
    ),
    common=("dry-run",),
)


def _figures(found: ModelFindings) -> dict[str, Figure | None]:
    from compressed_ad.report.figures import attention as draw

    where, context, effects = f"{found.run}, gradient step {found.step}", found.context, found.effects
    return {
        "attention": draw.attention_summary(
            found.shares, f"{where}: {found.shares.n_window} windows of {PARTS[found.part]} tasks"
        ),
        "attention_map": draw.attention_map(
            context,
            f"{where}: {PARTS[found.part]} task {context.task} from step {context.first_step}"
            f" of its history (window {context.window})",
        ),
        "tokens": None
        if effects is None
        else draw.border_embeddings(
            found.geometry, effects, f"{where}: {effects.n_window} windows with border marks"
        ),
    }


def text(found: ModelFindings) -> str:
    """The attention ratios of every head and, for a model with border embeddings, what these do."""
    from compressed_ad.report.pages import plain

    shares = found.shares
    head = ["Layer", "Head", *(f"{kind[0].upper()}{kind[1:]}" for kind in shares.kinds)]
    rows = [
        [str(layer + 1), str(h + 1), *_cells(shares.ratio, shares.low, shares.high, layer, h)]
        for layer, h in np.ndindex(shares.ratio.shape[1:])
    ]
    lines = [
        f"{found.run} ({found.model}, gradient step {found.step}): {shares.n_window} windows of"
        f" {PARTS[found.part]} tasks, {shares.n_query:,} queries",
        "",
        "Attention on tokens of each kind, divided by what the head's preference for lags alone gives,",
        "with the 95 % interval over windows:",
        plain([head, *rows]),
    ]
    if found.effects is not None:
        last = found.geometry[-1]
        lines += [
            "",
            f"Effect of border marks in the {found.effects.n_window} windows with marks (nats per query):",
            plain(_effects_table(found.effects)),
            f"Norms at gradient step {last.step}: <compress> {last.norm_start / last.norm_token:.1%},"
            f" \\compress> {last.norm_end / last.norm_token:.1%} of a typical token's embedding.",
        ]
    return "\n".join(lines)


def _cells(ratio: FloatArray, low: FloatArray, high: FloatArray, layer: int, head: int) -> list[str]:
    each = zip(ratio[:, layer, head], low[:, layer, head], high[:, layer, head], strict=True)
    return ["none seen" if np.isnan(r) else f"{r:.2f} ({a:.2f} to {b:.2f})" for r, a, b in each]


def _effects_table(effects: Effects) -> list[list[str]]:
    all_queries = effects.places.index("all")
    rows = [["Change", "KL divergence", "Added cross-entropy"]]
    for name, *values in zip(effects.changes, effects.divergence, effects.cross_entropy, strict=True):
        shown = (value[all_queries] for value in values)
        rows.append([name, *("unknown" if np.isnan(v[0]) else _nats(*v) for v in shown)])
    return rows


def _nats(value: float, low: float, high: float) -> str:
    return f"{value:z.4f} ({low:z.4f} to {high:z.4f})"
