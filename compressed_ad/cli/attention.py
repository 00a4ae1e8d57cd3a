"""``cad attention``: where a trained run looks, and what it made of the border marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import print_lines
from compressed_ad.errors import RunDirectoryError
from compressed_ad.files import write_atomically
from compressed_ad.report.pages import plain
from compressed_ad.runs.directory import locked
from compressed_ad.runs.look_inside import Inside, inside, trained_job
from compressed_ad.types import FloatArray

if TYPE_CHECKING:
    from compressed_ad.evaluation.border_embeddings import Effects

FILE = "attention.json"
_PARTS = {"heldout": "held-out", "validation": "validation", "train": "training"}


def run(call: Call) -> None:
    """``cad attention``."""
    options = call.options
    job = trained_job(options.run, options.history)
    out: Path = options.out or job.path / "attention"
    if out.exists() and not (out / FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out}: exists and has no {FILE}; choose another --out")
    tasks = f"{_PARTS[options.part]} tasks"
    if options.dry_run:
        print_lines(f"Would look at {options.windows} windows of the {tasks} of {job.history} into {out}")
        return
    with call.display.stage("attention"):
        found = inside(job, part=options.part, windows=options.windows, window=options.window)
        files = _write(out, found)
    for note in found.notes:
        call.display.note(f"note: {note}")
    print_lines(text(found))
    print_lines(f"\n{out}: {', '.join(files)}")


def _write(out: Path, found: Inside) -> list[str]:
    """The numbers, and figures beside them; the numbers last, so that a folder with them is whole."""
    from compressed_ad.report.figures import attention as draw
    from compressed_ad.report.figures.style import figure_to_png

    where = f"{found.run}, gradient step {found.step}"
    context = found.context
    figures = {
        "attention.png": draw.attention_summary(
            found.shares, f"{where}: {found.shares.n_window} windows of {_PARTS[found.part]} tasks"
        ),
        "attention_map.png": draw.attention_map(
            context,
            f"{where}: {_PARTS[found.part]} task {context.task} from step {context.first_step}"
            f" of its history (window {context.window})",
        ),
    }
    if found.effects is not None:
        figures["tokens.png"] = draw.border_embeddings(
            found.geometry, found.effects, f"{where}: {found.effects.n_window} windows with border marks"
        )
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        (out / "tokens.png").unlink(missing_ok=True)
        for name, figure in figures.items():
            write_atomically(out / name, figure_to_png(figure))
        content = json.dumps(found.summary(), indent=2, allow_nan=False) + "\n"
        write_atomically(out / FILE, content.encode())
    return [FILE, *figures]


# ---------------------------------------------------------------- in words


def text(found: Inside) -> str:
    """The ratios of every head and, for a model with border embeddings, what they do."""
    shares = found.shares
    head = ["Layer", "Head", *(f"{kind[0].upper()}{kind[1:]}" for kind in shares.kinds)]
    rows = [
        [str(layer + 1), str(h + 1), *_cells(shares.ratio, shares.low, shares.high, layer, h)]
        for layer, h in np.ndindex(shares.ratio.shape[1:])
    ]
    lines = [
        f"{found.run} ({found.model}, gradient step {found.step}): {shares.n_window} windows of"
        f" {_PARTS[found.part]} tasks, {shares.n_query:,} queries",
        "",
        "Attention on tokens of each kind, divided by what the head's preference for lags alone gives,",
        "with its 95 % interval over windows:",
        plain([head, *rows]),
    ]
    if found.effects is not None:
        last = found.geometry[-1]
        lines += [
            "",
            f"Border marks, in {found.effects.n_window} windows that have some (nats per query):",
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
