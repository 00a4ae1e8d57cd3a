"""``cad run``: every stage of a preset, from source learners to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.cli.call import FIGURES, MEMORY_LIMIT, RAY, Call, Command, out_option
from compressed_ad.cli.display import duration, print_lines, print_table
from compressed_ad.errors import ConfigError, listed
from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.apply import marker_params
from compressed_ad.registry import call_text
from compressed_ad.runs import job as runs, stages
from compressed_ad.runs.config import plan
from compressed_ad.runs.directory import CONFIG, check, claimed, history_provenance
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import EVALUATION, evaluate_run, is_evaluated
from compressed_ad.runs.layers import SECTIONS
from compressed_ad.runs.memory_limit import of_runs
from compressed_ad.runs.settings import Config
from compressed_ad.runs.trainer import train_run
from compressed_ad.workers import Pool, open_pool


def run(call: Call) -> None:
    config = call.config()
    methods, asked = config.comparison.methods, config.model.model
    if "model.model" in call.explicit() and asked not in methods:
        instead = f"it trains {', '.join(methods)}; choose with --comparison.methods '[{asked}, ...]'"
        raise ConfigError(f"model.model: cad run does not train {asked}; {instead}")
    out: Path = call.options.out or Path("runs") / call.request.name
    history = stages.default_history(config, out)
    trust = call.trust(config)
    todo = [
        runs.training_job(config, model, seed, history, out, trust)
        for seed in config.seeds
        for model in methods
    ]
    if config.env.training_tasks is not None:
        plan(config).split.check_training(np.array(config.env.training_tasks))
    stages.check_heldout(config)
    check(out, config)
    workers = call.within(of_runs(todo), stages.n_process(config))
    if config.device == "cuda":
        runs.device(config)  # raises before anything is started if there is none
    if call.options.dry_run:
        print_lines(_plan(config, workers, out, history, todo))
        return
    display = call.display
    call.note_compiling(config.algorithm.learner)
    pool = open_pool(call.options.ray, workers, call.options.memory_limit)
    with pool, claimed(out, config):
        watch = stages.Stopwatch(out / "seconds.json")
        with display.stage("collect") as report, watch.stage("collect", report) as both:
            stages.check_recipe(config, history)
            stages.collect_stage(config, history, report=both, pool=pool)
        call.note_shortfall(history)
        if begun := [job.path for job in todo if (job.path / CONFIG).exists()]:
            stages.check_own_marks(config, history, begun[0])
        with display.stage("mark") as report, watch.stage("mark", report) as both:
            statistics = stages.mark_stage(config, history, report=both)
        if pool.memory_limit is not None:  # now episodes can be counted
            pool.n_process = call.within(of_runs(todo), pool.n_process)
        _train_and_evaluate(call, todo, watch, pool)
        with display.stage("report") as report:
            written = stages.report_stage(
                todo,
                history,
                out / "report",
                seconds=watch.seconds,
                command=call.typed,
                formats=call.options.figures,
                progress=report,
                pool=pool,
            )
    from compressed_ad.report.run_tables import terminal_table

    marks = "" if config.marker.marker == "none" else statistics.text(marker_params(config.marker))
    print_table(terminal_table(written.analysis, marks))
    print_lines(f"\nReport: {written.index}")


def _train_and_evaluate(call: Call, todo: Sequence[Job], watch: stages.Stopwatch, pool: Pool) -> None:
    provenance = history_provenance(HistoryFile(todo[0].history))
    for job in todo:
        check(job.path, job.config, keys=runs.TRAINING_KEYS, history=provenance)

    def stage(name: str, function: Callable[..., object], jobs: Sequence[Job]) -> dict[str, Any]:
        if not jobs:
            return {}
        with call.display.stage(name) as report, watch.stage(name, report) as both:
            return stages.run_jobs(function, jobs, pool, report=both, should_stop=call.stop)

    with call.stop.politely():
        notes = stage("train", train_run, [job for job in todo if not job.trained])
        for note in dict.fromkeys(note for lines in notes.values() for note in lines):
            call.display.note(f"note: {note}")
        call.note_damaged(job.path / EVALUATION for job in todo)
        stage("evaluate", evaluate_run, [job for job in todo if not is_evaluated(job)])


def _plan(config: Config, processes: int, out: Path, history: Path, todo: Sequence[Job]) -> str:
    """The stages as ``--dry-run`` lists them: what each does, and whether it is done or how long it takes."""
    model, evaluation, n_run = config.model, config.evaluation, len(todo)
    trained = sum(job.trained for job in todo)
    evaluated = sum(is_evaluated(job) for job in todo)
    rows = {
        "collect": (
            f"{stages.source_steps(config):,} steps of {config.algorithm.learner} on {config.env.family}"
            f" -> {history}",
            "finished" if history.exists() else "",
        ),
        "mark": (call_text(config.marker.marker, marker_params(config.marker)), ""),
        "train": (
            f"{listed(config.comparison.methods)}, seed{'s' * (len(config.seeds) > 1)}"
            f" {', '.join(map(str, config.seeds))}:"
            f" {model.steps:,} gradient steps each",
            f"{trained} of {n_run} finished" if trained else "",
        ),
        "evaluate": (
            f"{evaluation.episodes} in-context episodes, {evaluation.rollouts} rollouts per held-out task",
            f"{evaluated} of {n_run} finished" if evaluated else "",
        ),
        "report": (str(out / "report" / "index.html"), ""),
    }
    expected = stages.expected_seconds(config, processes)
    lines = [f"Would {'continue' if (out / CONFIG).exists() else 'make'} {out}:"]
    for stage, (text, state) in rows.items():
        seconds = expected[stage]
        time = "time unknown" if seconds is None else f"roughly {duration(seconds)}"
        lines.append(f"  {stage:<9} {text} ({state or time})")
    known = [seconds for seconds in expected.values() if seconds is not None]
    if len(known) == len(expected):
        workers = f"{processes} process{'es' * (processes > 1)}"
        lines.append(f"From nothing roughly {duration(sum(known))} in {workers} on CPU.")
    return "\n".join(lines)


RUN = Command(
    run,
    [
        out_option("output folder, continued if it exists", "runs/PRESET, or runs/NAME of --config NAME"),
        MEMORY_LIMIT,
        RAY,
        FIGURES,
    ],
    text=(
        "Does every stage of a preset and continues where it was interrupted. The output folder holds "
        "the history file, one directory per training run, and report/index.html, table.csv, "
        "summary.json."
    ),
    sections=tuple(SECTIONS),
    continued="the same command continues",
)
