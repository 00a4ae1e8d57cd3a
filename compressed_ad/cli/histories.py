"""``cad collect``, ``mark``, ``inspect``, ``import`` and ``export``: what makes and reads history files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import duration, print_lines
from compressed_ad.errors import (
    ConfigError,
    HistoryError,
    NumericalError,
    RunError,
    UsageError,
)
from compressed_ad.histories.collector import history_path
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT, only_tasks
from compressed_ad.histories.exchange.importing import file_provenance, import_histories, named_split
from compressed_ad.histories.file import HistoryFile
from compressed_ad.registry import call_text
from compressed_ad.runs import stages
from compressed_ad.runs.config import build_family, load_config, marker_params
from compressed_ad.runs.settings import Config
from compressed_ad.tasks.split import split_tasks
from compressed_ad.types import Split


def collect(call: Call) -> None:
    """``cad collect``."""
    config = call.config()
    if call.only_shows(config):
        return
    path = stages.default_history(config, call.options.out or Path("datasets"))
    if call.options.dry_run:
        from compressed_ad.runs.estimates import expected_seconds

        seconds = expected_seconds(config)["collect"]
        time = "time unknown" if seconds is None else f"roughly {duration(seconds)}"
        steps = stages.source_steps(config)
        print_lines(f"Would collect {steps:,} steps of {config.algorithm.learner} into {path} ({time})")
        return
    with call.display.stage("collect") as report:
        stages.collect_stage(
            config, path, resume=call.options.resume, overwrite=call.options.overwrite, report=report
        )
    print_lines(f"{path}\n{HistoryFile(path, verify=False).statistics().text()}")


def mark(call: Call) -> None:
    """``cad mark``."""
    config = call.config()
    if call.only_shows(config):
        return
    path: Path = call.options.file
    if call.options.dry_run:
        file = HistoryFile(path)
        print_lines(
            f"Would mark {len(file.task_ids)} tasks of {path} with"
            f" {call_text(config.marker.marker, marker_params(config.marker))}"
            f" into {call.options.output or 'the file itself'}"
        )
        return
    with call.display.stage("mark") as report:
        statistics = stages.mark_stage(config, path, output=call.options.output, report=report)
    print_lines(statistics.text())


def inspect(call: Call) -> None:
    """``cad inspect``."""
    from compressed_ad.histories.summary import describe

    options = call.options
    text = describe(options.file).text()
    if options.plot is not None:
        _plot(options)
        text += f"\nPlot: {options.plot}"
    print_lines(text)


def _plot(options: argparse.Namespace) -> None:
    from compressed_ad.report.figures.style import figure_to_png, figure_to_svg, probability_trace

    if options.plot.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {options.plot}: the name must end with .png or .svg")
    file = HistoryFile(options.file, verify=False)
    history = file.load([options.task])[options.task]
    if history.compression_mask is None:
        raise HistoryError(f"{options.file}: is not marked yet; mark it with: cad mark {options.file}")
    if not 0 <= options.stream < history.n_stream:
        raise UsageError(f"--stream must lie in 0..{history.n_stream - 1}, got {options.stream}")
    if not 0 <= options.first < history.n_step or options.steps < 1:
        raise UsageError(f"--first must lie in 0..{history.n_step - 1} and --steps be at least 1")
    part = (options.stream, slice(options.first, options.first + options.steps))
    parameters = (file.marking or {}).get("parameters", {})
    figure = probability_trace(
        history.action_probs[part],
        history.compression_mask[part],
        threshold=parameters.get("on_policy_threshold"),
        episode_end=history.episode_end[part],
        first_step=options.first,
        title=f"{file.info.learner} on {file.info.family}, task {options.task}, stream {options.stream}",
    )
    draw = figure_to_svg if options.plot.suffix == ".svg" else figure_to_png
    try:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_bytes(draw(figure))
    except OSError as error:
        raise RunError(f"{options.plot}: cannot be written ({error.strerror})") from error


# ---------------------------------------------------------------- exchange with other programs

_SUFFIXES = (".hdf5", ".h5")


def run_import(call: Call) -> None:
    """``cad import``."""
    options, explicit = call.options, call.explicit()
    config = _config(call, explicit)
    if call.only_shows(config):
        return
    if options.env is None and "env.family" not in explicit:
        raise ConfigError(
            "name the task family of these histories (--family NAME, prefix:ID or module:attribute): models "
            "are judged by playing its tasks"
        )
    source: Path = options.file
    try:
        tasks = LAYOUT[options.layout](source)
        split = _split(config, options.split_seed, explicit, list(tasks), options.heldout, options.validation)
        only_tasks(source, tasks, {name: ids.tolist() for name, ids in vars(split).items()})
        out = _history_path(options.out, config, options.source)
        n_task = sum(len(ids) for ids in vars(split).values())
        if options.dry_run:
            print_lines(f"Would import {n_task} tasks of {source} ({options.layout}) into {out}")
            return
        done = 0
        with call.display.stage("import") as report:

            def progress(count: int) -> None:
                nonlocal done
                done += count
                report(done, n_task, "tasks")

            findings = import_histories(
                tasks, out,
                family=build_family(config), family_name=config.env.family, family_kwargs=config.env.kwargs,
                split=split, task_ids=options.task_ids, horizon=options.horizon,
                n_learner=options.n_learner, steps_per_update=options.steps_per_update,
                learner=options.source, config=file_provenance(source, options.layout), seed=config.seed,
                overwrite=options.overwrite, progress=progress,
            )  # fmt: skip
    except (HistoryError, NumericalError) as error:
        raise type(error)(_named(source, str(error))) from error
    for line in findings.lines():
        call.display.note(f"note: {line}")
    parts = ", ".join(f"{len(ids)} {name}" for name, ids in vars(split).items())
    print_lines(f"{out}: {n_task} tasks ({parts}); mark it with: cad mark {out}")


def _config(call: Call, explicit: set[str]) -> Config:
    """The configuration without the sizes of the preset's split, which are those of another file."""
    assert call.request is not None
    sizes = [(key, "null") for key in ("env.n_task", "env.train", "env.validation", "env.heldout")]
    unset = [pair for pair in sizes if pair[0] not in explicit]
    return load_config(replace(call.request, overrides=[*unset, *call.request.overrides]))


def _named(source: Path, text: str) -> str:
    return text if str(source) in text else f"{source}: {text}"


def _split(
    config: Config,
    seed: int | None,
    explicit: set[str],
    tasks: Sequence[int],
    heldout: Sequence[int] | None,
    validation: Sequence[int] | None,
) -> Split:
    env = config.env
    if seed is None and "env.split_seed" in explicit:
        seed = env.split_seed
    drawn = None
    if seed is not None:
        drawn = partial(
            split_tasks, seed=seed, train=env.train, validation=env.validation, heldout=env.heldout
        )
    return named_split(tasks, heldout, validation, drawn)


def _history_path(out: Path, config: Config, learner: str) -> Path:
    """A history file of that name, or one named as collections are in the folder ``out``."""
    if out.suffix in _SUFFIXES:
        return out
    return history_path(out, config.env.short_name, learner, config.seed)


def run_export(call: Call) -> None:
    """``cad export``."""
    options = call.options
    writer, file = EXPORT[options.to], HistoryFile(options.file)
    if options.dry_run:
        print_lines(
            f"Would export {len(file.task_ids)} tasks of {file.path} as {options.to} to {options.out}"
        )
        return
    done = 0
    with call.display.stage("export") as report:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            report(done, len(file.task_ids), "tasks")

        written = writer(file, options.out, options.overwrite, progress)
    print_lines(f"{written}: {len(file.task_ids)} tasks as {options.to}")
