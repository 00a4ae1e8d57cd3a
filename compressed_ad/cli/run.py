"""``cad run``: the main job, every stage of a preset."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import duration, print_lines, results_console
from compressed_ad.cli.options import out_option
from compressed_ad.histories.file import HistoryFile
from compressed_ad.registry import call_text
from compressed_ad.runs import job as runs, stages
from compressed_ad.runs.config import marker_params, planned_split
from compressed_ad.runs.directory import (
    CONFIG,
    check,
    claimed,
    history_provenance,
)
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import EVALUATION, evaluate_run, is_evaluated
from compressed_ad.runs.layers import SECTIONS
from compressed_ad.runs.settings import Config
from compressed_ad.runs.trainer import train_run
from compressed_ad.workers import Report, WorkerPool


def run(call: Call) -> None:
    """``cad run``."""
    config = call.config()
    if call.only_shows(config):
        return
    out: Path = call.options.out or Path("runs") / call.options.preset
    history = stages.default_history(config, out)
    todo = runs.training_jobs(config, history, out)
    if config.env.training_tasks is not None:
        split = planned_split(config.env, config.seed, config.split_seed)
        split.check_training(np.array(config.env.training_tasks))
    check(out, config)
    if call.options.dry_run:
        print_lines(_plan(config, out, history, todo))
        return
    if config.device == "cuda":
        runs.device(config)  # refuses before anything is started
    display = call.display
    with claimed(out, config):
        watch = stages.Stopwatch(out / "seconds.json")
        with watch.stage("collect") as tick, display.stage("collect") as report:
            stages.collect_stage(config, history, mark=False, report=_both(report, tick))
        with watch.stage("mark") as tick, display.stage("mark") as report:
            statistics = stages.mark_stage(config, history, report=_both(report, tick))
        _train_and_evaluate(call, config, todo, watch)
        with display.stage("report") as report:
            written = stages.report_stage(
                todo,
                history,
                out / "report",
                seconds=watch.seconds,
                commands=[call.typed()],
                progress=report,
            )
    from compressed_ad.report.run_report import terminal_table

    print_lines(statistics.text() + "\n")
    results_console().print(terminal_table(written.analysis))
    print_lines(f"\nReport: {written.index}")


def _train_and_evaluate(call: Call, config: Config, todo: Sequence[Job], watch: stages.Stopwatch) -> None:
    provenance = history_provenance(HistoryFile(todo[0].history))
    for job in todo:
        check(job.path, job.config, keys=runs.TRAINING_KEYS, history=provenance)
    with call.stop.politely(), WorkerPool(min(stages.n_process(config), len(todo))) as pool:
        untrained = [job for job in todo if not job.trained]
        if untrained:
            with watch.stage("train") as tick, call.display.stage("train") as report:
                notes = stages.run_jobs(
                    train_run, untrained, pool, report=_both(report, tick), should_stop=call.stop
                )
            for note in dict.fromkeys(note for lines in notes.values() for note in lines):
                call.display.note(f"note: {note}")
        unjudged = [job for job in todo if not is_evaluated(job)]
        if unjudged:
            with watch.stage("evaluate") as tick, call.display.stage("evaluate") as report:
                stages.run_jobs(
                    evaluate_run, unjudged, pool, report=_both(report, tick), should_stop=call.stop
                )


def _both(report: Report, tick: Callable[[], None]) -> Report:
    def show(done: int, total: int, text: str) -> None:
        report(done, total, text)
        tick()

    return show


def _plan(config: Config, out: Path, history: Path, todo: Sequence[Job]) -> str:
    from compressed_ad.runs.estimates import expected_seconds

    expected = expected_seconds(config)
    steps = stages.source_steps(config)
    model, n_run = config.model, len(todo)
    trained = sum(job.trained for job in todo)
    judged = sum((job.path / EVALUATION).exists() for job in todo)
    done = {
        "collect": "finished" if history.exists() else "",
        "mark": "",
        "train": f"{trained} of {n_run} finished" if trained else "",
        "evaluate": f"{judged} of {n_run} finished" if judged else "",
        "report": "",
    }
    what = {
        "collect": f"{steps:,} steps of {config.algorithm.learner} on {config.env.family} -> {history}",
        "mark": call_text(config.marker.marker, marker_params(config.marker)),
        "train": f"{' and '.join(config.comparison.methods)}, seeds {', '.join(map(str, config.seeds))}:"
        f" {model.steps:,} gradient steps each",
        "evaluate": f"{config.evaluation.episodes} in-context episodes,"
        f" {config.evaluation.rollouts} rollouts per held-out task",
        "report": str(out / "report" / "index.html"),
    }
    lines = [f"Would {'continue' if (out / CONFIG).exists() else 'make'} {out}:"]
    for stage, text in what.items():
        seconds = expected[stage]
        time = f"roughly {duration(seconds)}" if seconds is not None else "time unknown"
        lines.append(f"  {stage:<9} {text} ({done[stage] or time})")
    known = [seconds for seconds in expected.values() if seconds is not None]
    if len(known) == len(expected):
        cores = stages.n_process(config)
        lines.append(f"From nothing roughly {duration(sum(known))} in {cores} process(es) on CPU.")
    return "\n".join(lines)


# ---------------------------------------------------------------- options


def _options(parser: argparse.ArgumentParser) -> None:
    out_option(parser, "output folder, continued if it exists", "runs/PRESET")


RUN = Command(
    run,
    _options,
    text=(
        "Does every stage of a preset and continues where it was interrupted. The output folder holds "
        "the history file, one directory per training run, and report/index.html, table.csv, "
        "summary.json."
    ),
    sections=tuple(SECTIONS),
)
