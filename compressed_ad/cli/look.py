"""``cad rollouts`` and ``cad attention``: what a trained run explores, and where its model looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.cli import call as cli
from compressed_ad.cli.display import print_lines
from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.files import is_free, locked, write_json
from compressed_ad.histories.file import HistoryFile
from compressed_ad.runs.data import PARTS
from compressed_ad.runs.job import evaluation_job
from compressed_ad.runs.look_inside import ModelFindings, examination_job, examine_model
from compressed_ad.types import AnyArray, FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.runs.explore import Exploration, Explorer


def _check_output(out: Path, file: str) -> None:
    """Raise ``RunDirectoryError`` unless the folder ``out`` is new, empty, or holds ``file`` from before."""
    if not is_free(out, file):
        raise RunDirectoryError(f"{out}: exists and has no {file}; choose another --out")


def _write_output(
    out: Path,
    file: str,
    content: Mapping[str, Any],
    figures: Mapping[str, Figure | None],
    formats: Collection[str],
) -> str:
    """Write ``content`` as JSON to ``file``, then the figures; return the folder and the names as a line.

    The figures go by their names without an ending; files of those that are None are removed.
    """
    from compressed_ad.report.figures.style import forms
    from compressed_ad.report.pages import write_figure

    with locked(out):
        write_json(out / file, content)
        drawn = [write_figure(out / name, forms(figure, formats)) for name, figure in figures.items()]
    return f"{out}: {', '.join([file, *chain.from_iterable(drawn)])}"


# ---------------------------------------------------------------- cad rollouts


def _rollouts(call: cli.Call) -> None:
    config, options, explicit = call.config(), call.options, call.explicit()
    chosen = {key.partition(".")[2] for key in explicit if key.startswith("evaluation.")}
    job = evaluation_job(options.run, options.history, config, chosen, call.trust(config))
    given = {key: getattr(options, key) for key in ("episodes", "rollouts") if getattr(options, key)}
    evaluation = job.config.evaluation.model_copy(update=given)
    seed = config.seed if "seed" in explicit else job.config.seed
    job = replace(job, config=job.config.model_copy(update={"evaluation": evaluation, "seed": seed}))
    ids = _tasks(options.tasks, HistoryFile(job.history))
    out: Path = options.out or job.path / "rollouts"
    _check_output(out, "rollouts.json")
    size = f"{len(ids)} tasks x {evaluation.rollouts} rollouts x {evaluation.episodes} episodes"
    if options.dry_run:
        print_lines(f"Would play {size} of {job.path} into {out}")
        return
    from compressed_ad.runs.explore import FIGURES, figures, play

    with call.display.stage("rollouts") as report:
        played = play(job, ids, report)
    drawn: dict[str, Figure | None] = dict.fromkeys(FIGURES)
    drawn |= {name: figure for name, _, figure in figures(played)}
    written = _write_output(out, "rollouts.json", _summary(played), drawn, options.figures)
    print_lines(f"{job.path}: {size} on {played.description}\n")
    from compressed_ad.report.tables import plain

    print_lines("\n".join([plain(_table(played)), "", *_sentences(played), written]))


ROLLOUTS = cli.Command(
    _rollouts,
    [
        cli.option("run", "RUN", "trained run directory", Path),
        cli.history_option("the one that the run was trained on"),
        cli.option("--tasks", "K,K,...", "tasks to play (default: the held-out ones)"),
        cli.option("--episodes", "N", "in-context episodes (default: the run's)", cli.count),
        cli.option("--rollouts", "N", "rollouts of each task (default: the run's)", cli.count),
        cli.out_option("output folder", "RUN/rollouts"),
        cli.FIGURES,
        cli.setting_option("--seed", "seed", "N", "seed of the rollouts (default: the run's)"),
    ],
    text=(
        "Plays as cad evaluate does and shows what is explored, when the reward is first met and how far "
        "away it was, beside a uniform random walk: a table, rollouts.json, and figures. Settings that are "
        "not given are those of the run."
    ),
    sections=("evaluation",),
    common=("device", "dry-run"),
)


def _tasks(given: str | None, file: HistoryFile) -> IntArray:
    """Indices of the tasks asked for, by default the held-out ones."""
    if given is None:
        if not len(file.split.heldout):
            raise UsageError(f"{file.path}: has no held-out tasks; choose some with --tasks")
        return file.split.heldout
    words = [word.strip() for word in given.split(",")]
    known = len(file.tasks)
    wrong = [word for word in words if not word.isdecimal() or int(word) >= known]
    if wrong:
        raise UsageError(
            f"--tasks: expected numbers from 0 to {known - 1}, got {', '.join(map(repr, wrong))}"
        )
    return np.array(list(dict.fromkeys(int(word) for word in words)), np.int64)


def _half_met(found_by: FloatArray) -> float:
    """The first episode (from 1) by whose end half of the rollouts had met the reward, or infinity."""
    # A curve that is computed exactly may miss one half by a rounding error.
    late = found_by < 0.5 - 1e-12
    return math.inf if late.all() else float(late.argmin() + 1)


def _number(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:,.0f}"


def _table(played: Exploration) -> list[list[str]]:
    first, n_task = played.model.first, len(played.ids)
    columns = [
        ["Task", *map(played.label, range(n_task))],
        ["Part", *played.parts],
        ["Found", *(f"{share:.0%}" for share in first.found.mean(axis=1))],
        ["Median step", *map(_number, first.median("steps"))],
        ["Median episode", *map(_number, first.median("episodes"))],
    ]
    if played.distance is not None:
        columns.insert(2, ["Fewest steps", *map(_number, played.distance)])
    if played.walk_found is not None:
        columns.append(["Random walk", *(f"{share:.0%}" for share in played.walk_found[:, -1])])
        columns.append(["Median episode", *(_number(_half_met(curve)) for curve in played.walk_found)])
    if played.n_place is None:
        columns.append(["Observations", *(f"{number:,.0f}" for number in played.model.explored)])
    else:
        columns.append(["Cells visited", *(f"{share:.0%}" for share in played.model.explored)])
    return [list(line) for line in zip(*columns, strict=True)]


def _sentences(played: Exploration) -> list[str]:
    first, n_episode, walk = played.model.first, played.model.first.n_episode, played.walk_found
    met, total = int(first.found.sum()), first.found.size

    def half(who: str, found_by: FloatArray) -> str:
        episode = _half_met(found_by.mean(axis=0))
        if math.isinf(episode):
            return f"Fewer than half of {who} met the reward within {n_episode} episodes."
        return f"Half of {who} had met the reward by episode {episode:.0f}."

    def measured(what: str, value: Callable[[Explorer], str | None]) -> list[str]:
        """``what``: its value for the model and, where there is one, for the random walk."""
        model, random = value(played.model), None if played.walk is None else value(played.walk)
        beside = "" if random is None else f", random walk {random}"
        return [] if model is None else [f"{what}: {model}{beside}."]

    def correlation(each: Explorer) -> str | None:
        return f"{each.correlation:.2f}" if math.isfinite(each.correlation) else None

    def visited(share: float) -> str:
        return f"{share:,.1f} observations" if played.n_place is None else f"{share:.0%} of the cells"

    return [
        half("the model's rollouts", first.found_by()),
        *([] if walk is None else [half("the uniform random walks", walk)]),
        f"{met} of {total} rollouts ({met / total:.0%}) met the reward within {n_episode} episodes"
        + ("" if walk is None else f", random walk {walk[:, -1].mean():.0%}")
        + f"; the other {total - met} rank after all that did.",
        f"Tasks where no rollout met the reward: {', '.join(map(str, played.ids[first.never])) or 'none'}.",
        *measured("Rank correlation of the fewest steps to the reward with the steps taken", correlation),
        *measured("Visited by the end", lambda each: visited(float(each.coverage[-1]))),
        *measured("Visited before the first reward", lambda each: visited(float(each.searched[-1]))),
        *(f"Note: {note}." for note in played.notes),
    ]


def _summary(played: Exploration) -> dict[str, Any]:
    job, first, walk_found = played.job, played.model.first, played.walk_found
    evaluation = job.config.evaluation
    steps, episodes = _rounded(first.median("steps")), _rounded(first.median("episodes"))
    per_task = [
        {
            "task": int(task),
            "parameters": played.model.record.tasks[k].tolist(),
            "part": played.parts[k],
            "fewest_steps": None if played.distance is None else _rounded(played.distance[k]),
            "found": first.found[k].mean(),
            "median_steps": steps[k],
            "median_episode": episodes[k],
            "explored": _rounded(played.model.explored[k]),
            "random_found": None if walk_found is None else _rounded(walk_found[k, -1]),
            "random_median_episode": None if walk_found is None else _half_met(walk_found[k]),
        }
        for k, task in enumerate(played.ids)
    ]
    return {
        "run": job.path.name,
        "model": job.config.model.model,
        "step": played.step,
        "history": str(job.history),
        "family": played.description,
        "playing": {
            "episodes": evaluation.episodes,
            "rollouts": evaluation.rollouts,
            "seed": job.config.seed,
            "checkpoint": evaluation.checkpoint,
            **played.options,
        },
        "places": played.n_place,
        "notes": played.notes,
        "tasks": per_task,
        "never_found": played.ids[first.never],
        "in_context": _curves(played, played.model),
        "random_walk": None if played.walk is None else _curves(played, played.walk),
        "random_walk_exact_found_by": _rounded(walk_found.mean(axis=0))
        if walk_found is not None and played.exact is not None
        else None,
    }


def _curves(played: Exploration, each: Explorer) -> dict[str, Any]:
    """Means over tasks and rollouts, by in-context episode."""
    return {
        "rollouts": each.first.found.size,
        "censored": int((~each.first.found).sum()),
        "found_by": _rounded(each.first.found_by().mean(axis=0)),
        "coverage": _rounded(each.coverage),
        "coverage_until_reward": _rounded(each.searched),
        "rank_correlation_with_fewest_steps": _rounded(each.correlation),
    }


def _rounded(values: Any) -> AnyArray:
    return np.round(np.asarray(values, np.float64), 6)


# ---------------------------------------------------------------- cad attention


def _attention(call: cli.Call) -> None:
    options = call.options
    job = examination_job(options.run, options.history, call.trust())
    out: Path = options.out or job.path / "attention"
    _check_output(out, "attention.json")
    if options.dry_run:
        print_lines(
            f"Would measure attention in {options.windows} windows of the {PARTS[options.part]} tasks of"
            f" {job.history} and write to {out}"
        )
        return
    with call.display.stage("attention"):
        found = examine_model(job, part=options.part, windows=options.windows, window=options.window)
        written = _write_output(out, "attention.json", found.summary(), _drawn(found), options.figures)
    for note in found.notes:
        call.display.note(f"note: {note}")
    print_lines(f"{_text(found)}\n\n{written}")


_PARTS = f"part of the split whose histories are used: {', '.join(PARTS)}"
_WINDOW = "context that is drawn as a map (default: the one closest to half marked)"
ATTENTION = cli.Command(
    _attention,
    [
        cli.option("run", "RUN", "trained run directory", Path),
        cli.history_option("the one that the run was trained on"),
        cli.option("--part", "PART", _PARTS, cli.one_of("part", PARTS), default="heldout"),
        cli.option("--windows", "N", "contexts drawn from them", cli.count, default=64),
        cli.option("--window", "K", _WINDOW, int),
        cli.out_option("output folder", "RUN/attention"),
        cli.FIGURES,
    ],
    text=(
        "Writes attention.json (all numbers) and the figures attention (attention on marked, rewarded and "
        "other tokens by head, beside what uniform attention and the head's preference for lags alone give), "
        "attention_map (one context) and, for CompressedAD, tokens (its border embeddings and what "
        "they change)."
    ),
    common=("dry-run",),
)


def _drawn(found: ModelFindings) -> dict[str, Figure | None]:
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
            found.geometry, effects, found.step, f"{where}: {effects.n_window} windows with border marks"
        ),
    }


def _text(found: ModelFindings) -> str:
    """The attention ratios of every head and, for a model with border embeddings, what these do."""
    from compressed_ad.report.tables import plain

    shares, effects = found.shares, found.effects
    rows = [["Layer", "Head", *(f"{kind[0].upper()}{kind[1:]}" for kind in shares.kinds)]]
    for layer, h in np.ndindex(shares.ratio.shape[1:]):
        each = (values[:, layer, h] for values in (shares.ratio, shares.low, shares.high))
        ratios = ((r, f"{r:.2f} ({low:.2f} to {high:.2f})") for r, low, high in zip(*each, strict=True))
        rows.append(
            [str(layer + 1), str(h + 1), *("none seen" if np.isnan(r) else cell for r, cell in ratios)]
        )
    lines = [
        f"{found.run} ({found.model}, gradient step {found.step}): {shares.n_window} windows of"
        f" {PARTS[found.part]} tasks, {shares.n_query:,} queries",
        "",
        "Attention on tokens of each kind, divided by what the head's preference for lags alone gives,",
        "with the 95 % interval over windows:",
        plain(rows),
    ]
    if effects is not None:
        shown = next(g for g in found.geometry if g.step == found.step)
        all_queries = effects.places.index("all")
        table = [["Change", "KL divergence", "Added cross-entropy"]]
        for name, *values in zip(effects.changes, effects.divergence, effects.cross_entropy, strict=True):
            nats = (
                (v, f"{v:z.4f} ({low:z.4f} to {high:z.4f})")
                for v, low, high in (at[all_queries] for at in values)
            )
            table.append([name, *("unknown" if np.isnan(v) else cell for v, cell in nats)])
        lines += [
            "",
            f"Effect of border marks in the {effects.n_window} windows with marks (nats per query):",
            plain(table),
            f"Norms at gradient step {shown.step}: <compress> {shown.norm_start / shown.norm_token:.1%},"
            f" \\compress> {shown.norm_end / shown.norm_token:.1%} of a typical token's embedding.",
        ]
    return "\n".join(lines)
