"""``cad import`` and ``cad export``: histories that other programs wrote, and ours for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import compressed_ad.minari_export  # noqa: F401 (registers its format)
from compressed_ad.collect import history_path, split_tasks
from compressed_ad.commands import Call
from compressed_ad.config import build_family, load_config
from compressed_ad.errors import ConfigError, HistoryError, NumericalError
from compressed_ad.histories import HistoryFile
from compressed_ad.importing import MATCH, file_provenance, import_histories, named_split
from compressed_ad.layouts import EXPORT, LAYOUT, only_tasks
from compressed_ad.progress import print_lines
from compressed_ad.settings import Config
from compressed_ad.types import Split

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


def numbers(text: str) -> list[int]:
    """``3,5,9`` as an option's value."""
    parts = text.split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected task numbers like 3,5,9, got {text!r}")
    return [int(part) for part in parts]


def task_order(text: str) -> list[int] | str:
    """``3,5,9`` or ``match``."""
    return text if text == MATCH else numbers(text)
