"""``cad collect``, ``mark``, ``inspect``, ``import`` and ``export``: make, read and convert history files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote

from compressed_ad.cli.call import (
    MEMORY_LIMIT,
    OVERWRITE,
    RAY,
    Call,
    Command,
    count,
    flag,
    option,
    out_option,
)
from compressed_ad.cli.display import duration, print_lines
from compressed_ad.errors import ConfigError, HistoryError, NumericalError, RunError, UsageError, users_code
from compressed_ad.files import write_atomically
from compressed_ad.histories.collector import history_path
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT, Selected, other_layouts
from compressed_ad.histories.exchange.importing import (
    file_provenance,
    import_histories,
    most_bytes,
    read_task,
)
from compressed_ad.histories.exchange.task_ids import named_split
from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.apply import marker_params
from compressed_ad.registry import call_text, own_names
from compressed_ad.runs import memory_limit, stages
from compressed_ad.runs.config import build_family
from compressed_ad.runs.layers import YAML
from compressed_ad.tasks.split import split_tasks
from compressed_ad.workers import open_pool


def _statistics(file: HistoryFile) -> str:
    return file.statistics().text((file.marking or {}).get("parameters", {}))


def _collect(call: Call) -> None:
    config, options = call.config(), call.options
    path = stages.default_history(config, options.out or Path("datasets"))
    if options.dry_run:
        seconds = stages.expected_seconds(config)["collect"]
        time = "time unknown" if seconds is None else f"roughly {duration(seconds)}"
        steps = stages.source_steps(config)
        print_lines(f"Would collect {steps:,} steps of {config.algorithm.learner} into {path} ({time})")
    workers = call.within(memory_limit.collecting(config), stages.n_process(config))
    if options.dry_run:
        return
    call.note_compiling(config.algorithm.learner)
    how = {"resume": options.resume, "overwrite": options.overwrite}
    pool = open_pool(options.ray, workers, options.memory_limit)
    with pool, call.display.stage("collect") as report:
        stages.collect_stage(config, path, report=report, pool=pool, **how)
        if options.resume and any(key.startswith("marker.") for key in call.explicit()):
            stages.mark_stage(config, path, report=report)  # a finished file may have other marks
    call.note_shortfall(path)
    print_lines(f"{path}\n{_statistics(HistoryFile(path, verify=False))}")


COLLECT = Command(
    _collect,
    [
        out_option("folder of the history file", "datasets"),
        flag("--resume", "continue an unfinished collection"),
        OVERWRITE,
        MEMORY_LIMIT,
        RAY,
    ],
    sections=("env", "algorithm", "marker"),
    continued="the same command with --resume continues",
)


def _mark(call: Call) -> None:
    config = call.config()
    path: Path = call.options.file
    file = HistoryFile(path)
    if call.options.dry_run:
        print_lines(
            f"Would mark {len(file.task_ids)} tasks of {path} with"
            f" {call_text(config.marker.marker, marker_params(config.marker))}"
            f" into {call.options.output or 'the file itself'}"
        )
    call.within(memory_limit.marking(memory_limit.task_bytes(file)))
    if call.options.dry_run:
        return
    with call.display.stage("mark") as report:
        statistics = stages.mark_stage(config, path, output=call.options.output, report=report)
    print_lines(statistics.text(marker_params(config.marker)))


MARK = Command(
    _mark,
    [
        option("file", "FILE", "history file", Path),
        option("--output", "FILE", "write a marked copy (default: mark FILE itself)", Path),
        MEMORY_LIMIT,
    ],
    sections=("marker",),
    common=("seed", "dry-run"),
)


def _inspect(call: Call) -> None:
    from compressed_ad.histories.summary import describe

    options = call.options
    text = describe(options.file).text()
    if options.plot is not None:
        _plot(options)
        text += f"\nPlot: {options.plot}"
    print_lines(text)


INSPECT = Command(
    _inspect,
    [
        option("file", "FILE", "history file", Path),
        option("--plot", "PNG", "draw the action probabilities with the marked segments", Path),
        option("--task", None, "task to draw (default: the one closest to half marked)", int),
        option("--stream", None, "stream to draw", int, default=0),
        option("--first", "STEP", "first step drawn (default: so that about half is marked)", int),
        option("--steps", None, "steps drawn", int, default=200),
    ],
    common=(),
)


def _plot(options: argparse.Namespace) -> None:
    from compressed_ad.histories.summary import task_summaries
    from compressed_ad.report.figures.histories import probability_trace
    from compressed_ad.report.figures.style import FORMATS
    from compressed_ad.report.source import half_marked, trace_of

    form = options.plot.suffix[1:]
    if form not in FORMATS:
        raise UsageError(f"--plot {options.plot}: the name must end with .{', .'.join(FORMATS)}")
    file = HistoryFile(options.file, verify=False)
    task = half_marked(list(task_summaries(file))) if options.task is None else options.task
    history = file.load([task])[task]
    if history.compression_mask is None:
        raise HistoryError(f"{options.file}: is not marked yet; mark it with: cad mark {options.file}")
    if not 0 <= options.stream < history.n_stream:
        raise UsageError(f"--stream must lie in 0..{history.n_stream - 1}, got {options.stream}")
    if not 0 <= (options.first or 0) < history.n_step or options.steps < 1:
        raise UsageError(f"--first must lie in 0..{history.n_step - 1} and --steps be at least 1")
    label, stream = f"{file.info.learner} on {file.info.family}, task {task}", options.stream
    trace = trace_of(history, label, stream=stream, first=options.first, length=options.steps)
    figure = probability_trace(
        trace.probs,
        trace.mask,
        threshold=file.threshold,
        episode_end=trace.episode_end,
        first_step=trace.first_step,
        title=trace.label,
    )
    write_atomically(options.plot, FORMATS[form](figure))


# ---------------------------------------------------------------- exchange with other programs


def _task_numbers(text: str) -> list[int]:
    parts = text.split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected task numbers like 3,5,9, got {text!r}")
    return [int(part) for part in parts]


def _range(text: str) -> slice:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < 10**9):
        raise argparse.ArgumentTypeError(f"expected a range like 0-7, or one number, got {text!r}")
    return slice(int(first), int(last or first) + 1)


def _task_ranges(text: str) -> list[int]:
    return [task for part in text.split(",") for task in range(10**9)[_range(part)]]


def _import(call: Call) -> None:
    options, explicit = call.options, call.explicit()
    # The numbers of tasks of the preset, or of a shipped family, are meant for all tasks of a family.
    shipped = options.env is not None and not options.env.endswith(YAML)
    own = {key for key, _ in call.request.overrides} if shipped else explicit
    no_sizes = [(key, "null") for key in ("env.n_task", "env.train", "env.validation", "env.heldout")]
    unset = [pair for pair in no_sizes if pair[0] not in own]
    config = replace(
        call, request=replace(call.request, overrides=[*unset, *call.request.overrides])
    ).config()
    if options.env is None and "env.family" not in explicit:
        raise ConfigError(
            "name the task family of these histories (--family NAME, prefix:ID or module:attribute): models "
            "are evaluated by playing its tasks"
        )
    source: Path = options.file
    try:
        call.leave_out(own_names(options.layout))
        with users_code(f"{source}: layout {options.layout!r}"):
            tasks = LAYOUT[options.layout](source)
            if not isinstance(tasks, Mapping):
                raise TypeError(f"it returns a {type(tasks).__name__}, not a mapping of Recorded by task")
        tasks = Selected(tasks, options.only, (options.streams or slice(None), slice(options.steps)))
        env, seed, drawn = config.env, options.split_seed, None
        if seed is None and "env.split_seed" in explicit:
            seed = env.split_seed
        if seed is not None:
            drawn = partial(
                split_tasks, seed=seed, train=env.train, validation=env.validation, heldout=env.heldout
            )
        split = tasks.split
        if split is None or drawn or options.heldout is not None or options.validation is not None:
            split = named_split(list(tasks), options.heldout, options.validation, drawn)
        out: Path = options.out
        if out.suffix not in (".hdf5", ".h5"):
            out = history_path(out, config.env.short_name, options.source, config.seed)
        n_task = sum(len(ids) for ids in vars(split).values())
        task_bytes = most_bytes(read_task(tasks, int(split.train[0])), 1)
        if options.dry_run:
            size = f"at most {n_task * task_bytes / 1e6:,.1f} MB before compression"
            print_lines(f"Would import {n_task} tasks of {source} ({options.layout}) into {out} ({size})")
        call.within(memory_limit.importing(task_bytes))
        if options.dry_run:
            return
        with call.display.stage("import") as report:
            findings = import_histories(
                tasks, out,
                family=build_family(config), family_name=config.env.family, family_kwargs=config.env.kwargs,
                split=split, task_ids=options.task_ids, actions=options.actions, horizon=options.horizon,
                n_learner=options.n_learner, steps_per_update=options.steps_per_update,
                learner=options.source, config=file_provenance(source, options.layout), seed=config.seed,
                overwrite=options.overwrite, progress=stages.counting(report, n_task, "tasks"),
            )  # fmt: skip
    except (HistoryError, NumericalError) as error:
        text = str(error) if str(source) in str(error) else f"{source}: {error}"
        if fitting := other_layouts(source, options.layout):
            text += f"; it fits another layout: --layout {' or '.join(fitting)}"
        raise type(error)(text) from error
    for line in findings.lines():
        call.display.note(f"note: {line}")
    parts = ", ".join(f"{len(ids)} {name}" for name, ids in vars(split).items())
    marker = ""
    if findings.unknown_probs:  # these markers need none
        marker = f" --marker {'rollout' if options.steps_per_update else 'none'}"
    print_lines(f"{out}: {n_task} tasks ({parts}); mark it with: cad mark {quote(str(out))}{marker}")


_LAYOUTS = f"format of FILE: {', '.join(LAYOUT)}, or module:attribute"
IMPORT = Command(
    _import,
    [
        option("file", "FILE", "histories of another program", Path),
        option("--layout", "NAME", _LAYOUTS, default="ancestor"),
        option("--out", "DIR|FILE", "history file, or folder of it", Path, default=Path("datasets")),
        option(
            "--only",
            "K,K-K,...",
            "import these tasks of FILE, numbers or ranges (default: all)",
            _task_ranges,
        ),
        option(
            "--streams", "K-K", "import these streams of every task, counted from 0 (default: all)", _range
        ),
        option("--steps", "N", "import the first N steps of every stream (default: all)", count),
        option("--heldout", "K,K,...", "tasks for evaluation", _task_numbers),
        option("--validation", "K,K,...", "tasks for choosing a checkpoint", _task_numbers),
        option("--split-seed", "N", "draw the split with this seed instead", int),
        option(
            "--task-ids",
            "K,K,...|match",
            "the family's tasks that FILE holds, in order; match: find them by their rewards "
            "(default: those whose parameters FILE names, else the tasks with the same numbers)",
            lambda text: text if text == "match" else _task_numbers(text),
        ),
        option(
            "--actions",
            "A,A,...",
            "the family's number of each action of FILE, in order (default: the same numbers)",
            _task_numbers,
        ),
        option("--horizon", "N", "steps of every episode, if FILE has no dones", count),
        option("--n-learner", "N", "learners that share the streams", count, default=1),
        option("--steps-per-update", "N", "steps between policy updates (default: unknown)", count),
        option("--source", "NAME", "name of the algorithm", default="imported"),
        OVERWRITE,
        MEMORY_LIMIT,
    ],
    text=(
        "Needs the task family and the held-out tasks, because a history file names both. The recorded "
        "actions are replayed in the family to find where episodes end and what their last steps led to. "
        "What cannot be repaired is kept and reported."
    ),
    sections=("env",),
    common=("seed", "dry-run"),
)


def _export(call: Call) -> None:
    options = call.options
    call.leave_out(own_names(options.to))
    writer, file = EXPORT[options.to], HistoryFile(options.file)
    tasks = f"{len(file.task_ids)} tasks"
    if options.dry_run:
        print_lines(f"Would export {tasks} of {file.path} as {options.to} to {options.out}")
        return
    with call.display.stage("export") as report:
        progress = stages.counting(report, len(file.task_ids), "tasks")
        with users_code(f"{file.path}: export format {options.to!r}"):
            written = writer(file, options.out, options.overwrite, progress)
    if not isinstance(written, str | Path) or not Path(written).exists():
        raise RunError(f"export format {options.to!r} must return the path that it wrote, not {written!r}")
    print_lines(f"{written}: {tasks} as {options.to}")


EXPORT_COMMAND = Command(
    _export,
    [
        option("file", "FILE", "history file", Path),
        option("--to", "FORMAT", f"{', '.join(EXPORT)}, or module:attribute", required=True),
        option("--out", "DIR|FILE", "output file; for minari a folder", Path, required=True),
        OVERWRITE,
    ],
    common=("dry-run",),
)
