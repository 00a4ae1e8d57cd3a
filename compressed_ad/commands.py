"""What the commands of ``cad`` do. Each is a function of a ``Call``; results go to the standard output."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console

from compressed_ad import pipeline, runs, stats
from compressed_ad.config import explicit_keys, load_config, marker_params, planned_split
from compressed_ad.config_layers import Request
from compressed_ad.config_text import dump
from compressed_ad.errors import ConfigError, HistoryError, RunDirectoryError, RunError, UsageError
from compressed_ad.histories import HistoryFile
from compressed_ad.judge_run import EVALUATION, evaluate_run, is_evaluated, stored_evaluation
from compressed_ad.progress import Display, duration, print_lines
from compressed_ad.registry import call_text
from compressed_ad.run_directory import (
    CONFIG,
    check,
    claimed,
    history_provenance,
    locked,
)
from compressed_ad.runs import Job
from compressed_ad.settings import Config, EvaluationSettings
from compressed_ad.train_run import train_run
from compressed_ad.workers import Report, WorkerPool


class Stopper(Protocol):
    """Whether the user wants to stop."""

    def __call__(self) -> bool:
        """True once a signal has come."""

    def politely(self) -> AbstractContextManager[None]:
        """Inside, a signal only sets the wish; work looks for it and saves."""


@dataclass(frozen=True)
class Call:
    """One call of ``cad``."""

    name: str
    options: argparse.Namespace
    request: Request | None  # None for commands without settings
    display: Display
    stop: Stopper
    words: tuple[str, ...]

    def config(self) -> Config:
        """The validated configuration that was asked for."""
        assert self.request is not None
        return load_config(self.request)

    def explicit(self) -> set[str]:
        """Dotted keys that the user set."""
        assert self.request is not None
        return explicit_keys(self.request)

    def only_shows(self, config: Config) -> bool:
        """Print ``config`` if that is all that was asked for."""
        if self.options.print_config:
            print_lines(dump(config))
        return bool(self.options.print_config)


# ---------------------------------------------------------------- the main job


def run(call: Call) -> None:
    """``cad run``."""
    config = call.config()
    if call.only_shows(config):
        return
    out: Path = call.options.out or Path("runs") / call.options.preset
    history = pipeline.default_history(config, out)
    todo = runs.jobs(config, history, out)
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
        watch = pipeline.Stopwatch(out / "seconds.json")
        with watch.stage("collect") as tick, display.stage("collect") as report:
            pipeline.collect_stage(config, history, mark=False, report=_both(report, tick))
        with watch.stage("mark") as tick, display.stage("mark") as report:
            statistics = pipeline.mark_stage(config, history, report=_both(report, tick))
        _train_and_evaluate(call, config, todo, watch)
        with display.stage("report") as report:
            written = pipeline.report_stage(
                todo,
                history,
                out / "report",
                seconds=watch.seconds,
                commands=[_typed(call)],
                progress=report,
            )
    from compressed_ad.report import terminal_table

    print_lines(statistics.text() + "\n")
    _console().print(terminal_table(written.analysis))
    print_lines(f"\nReport: {written.index}")


def _train_and_evaluate(call: Call, config: Config, todo: Sequence[Job], watch: pipeline.Stopwatch) -> None:
    provenance = history_provenance(HistoryFile(todo[0].history))
    for job in todo:
        check(job.path, job.config, keys=runs.TRAINING_KEYS, history=provenance)
    with call.stop.politely(), WorkerPool(min(pipeline.n_process(config), len(todo))) as pool:
        untrained = [job for job in todo if not job.trained]
        if untrained:
            with watch.stage("train") as tick, call.display.stage("train") as report:
                notes = pipeline.run_jobs(
                    train_run, untrained, pool, report=_both(report, tick), should_stop=call.stop
                )
            for note in dict.fromkeys(note for lines in notes.values() for note in lines):
                call.display.note(f"note: {note}")
        unjudged = [job for job in todo if not is_evaluated(job)]
        if unjudged:
            with watch.stage("evaluate") as tick, call.display.stage("evaluate") as report:
                pipeline.run_jobs(
                    evaluate_run, unjudged, pool, report=_both(report, tick), should_stop=call.stop
                )


def _both(report: Report, tick: Callable[[], None]) -> Report:
    def show(done: int, total: int, text: str) -> None:
        report(done, total, text)
        tick()

    return show


def _plan(config: Config, out: Path, history: Path, todo: Sequence[Job]) -> str:
    from compressed_ad.estimates import expected_seconds

    expected = expected_seconds(config)
    steps = pipeline.source_steps(config)
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
        cores = pipeline.n_process(config)
        lines.append(f"From nothing roughly {duration(sum(known))} in {cores} process(es) on CPU.")
    return "\n".join(lines)


def _typed(call: Call) -> str:
    return " ".join(["cad", *call.words])


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


# ---------------------------------------------------------------- histories


def collect(call: Call) -> None:
    """``cad collect``."""
    config = call.config()
    if call.only_shows(config):
        return
    path = pipeline.default_history(config, call.options.out or Path("datasets"))
    if call.options.dry_run:
        from compressed_ad.estimates import expected_seconds

        seconds = expected_seconds(config)["collect"]
        time = "time unknown" if seconds is None else f"roughly {duration(seconds)}"
        steps = pipeline.source_steps(config)
        print_lines(f"Would collect {steps:,} steps of {config.algorithm.learner} into {path} ({time})")
        return
    with call.display.stage("collect") as report:
        pipeline.collect_stage(
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
        statistics = pipeline.mark_stage(config, path, output=call.options.output, report=report)
    print_lines(statistics.text())


def inspect(call: Call) -> None:
    """``cad inspect``."""
    from compressed_ad.overview import describe

    options = call.options
    text = describe(options.file).text()
    if options.plot is not None:
        _plot(options)
        text += f"\nPlot: {options.plot}"
    print_lines(text)


def _plot(options: argparse.Namespace) -> None:
    from compressed_ad.plots import figure_to_png, figure_to_svg, probability_trace

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


# ---------------------------------------------------------------- training and evaluation


def train(call: Call) -> None:
    """``cad train``."""
    config = call.config()
    if call.only_shows(config):
        return
    history = _history(call, config)
    config = _of_file(config, HistoryFile(history), call.explicit())
    job = runs.job(config, config.model.model, config.seed, history, call.options.out or Path("runs"))
    if call.options.dry_run:
        state = "continue" if (job.path / CONFIG).exists() else "train"
        model = config.model
        print_lines(f"Would {state} {job.path}: {model.steps:,} gradient steps of {model.model} on {history}")
        return
    if not call.options.resume and (job.path / CONFIG).exists():
        raise RunDirectoryError(f"{job.path}: exists; continue it with --resume, or choose another --out")
    with call.stop.politely(), call.display.stage("train") as report:
        for note in train_run(job, report=report, should_stop=call.stop):
            call.display.note(f"note: {note}")
    print_lines(f"{job.path}: trained; judge it with: cad evaluate {job.path}")


def _history(call: Call, config: Config) -> Path:
    path: Path = call.options.history or pipeline.default_history(config, Path("datasets"))
    if path.exists() or call.options.history is not None:
        return path
    others = sorted(path.parent.glob("history_*.hdf5"))
    hint = f"there is --history {others[0]}" if others else "collect one with: cad collect"
    raise HistoryError(f"{path}: no such history file; {hint}")


def _of_file(config: Config, file: HistoryFile, explicit: set[str]) -> Config:
    """``config`` with the task family of the history file, which must be the one asked for."""
    info, env = file.info, config.env
    if "env.family" in explicit and env.family != info.family:
        raise ConfigError(f"env.family: {file.path} was collected on {info.family}, not on {env.family}")
    update = {"family": info.family, "kwargs": info.family_kwargs}
    return config.model_copy(update={"env": env.model_copy(update=update)})


def evaluate(call: Call) -> None:
    """``cad evaluate``."""
    config = call.config()
    if call.only_shows(config):
        return
    chosen = {key.partition(".")[2] for key in call.explicit() if key.startswith("evaluation.")}
    todo = [judged(path, call.options.history, config, chosen) for path in call.options.runs]
    for job in todo:
        there = stored_evaluation(job.path / EVALUATION)
        if not call.options.overwrite and there is not None and not is_evaluated(job):
            raise RunDirectoryError(
                f"{job.path / EVALUATION}: was made with other settings; replace it with --overwrite"
            )
    if call.options.dry_run:
        for job in todo:
            state = "already evaluated" if is_evaluated(job) else "would be evaluated"
            evaluation = job.config.evaluation
            print_lines(
                f"{job.path}: {state}, {evaluation.episodes} episodes x {evaluation.rollouts} rollouts"
            )
        return
    workers = min(pipeline.n_process(config), len(todo))
    with call.stop.politely(), WorkerPool(workers) as pool, call.display.stage("evaluate") as report:
        pipeline.run_jobs(evaluate_run, todo, pool, report=report, should_stop=call.stop)
    for job in todo:
        print_lines(_score(job))


def judged(path: Path, history: Path | None, config: Config, chosen: set[str]) -> Job:
    """The trained run in ``path``, with the ``chosen`` evaluation settings of ``config``, and its device."""
    job = runs.stored_job(path, history)
    if not job.trained:
        raise RunDirectoryError(f"{path}: its training is not finished; continue it with: cad train --resume")
    update = {key: getattr(config.evaluation, key) for key in chosen}
    evaluation: EvaluationSettings = job.config.evaluation.model_copy(update=update)
    own = job.config.model_copy(update={"evaluation": evaluation, "device": config.device})
    return Job(own, job.history, job.path)


def _score(job: Job) -> str:
    (own,) = pipeline.method_runs([job])
    curves = stats.normalise(own.returns[0], own.random, own.optimal).mean(axis=1)
    if np.isnan(own.optimal).any():
        final, unit = own.returns[0][..., -stats.final_episodes(own.returns.shape[-1]) :].mean(), "return"
    else:
        final, unit = float(stats.mean(stats.final_return(curves))), "normalised return"
    measured = "" if np.isnan(own.accuracy[0]) else f" accuracy {own.accuracy[0]:.3f},"
    return (
        f"{job.path}: final {unit} {final:.3f},{measured} cross-entropy"
        f" {own.cross_entropy[0]:.3f} nats ({len(own.task_ids)} held-out tasks)"
    )


def compare(call: Call) -> None:
    """``cad compare``."""
    from compressed_ad.analysis import analyse
    from compressed_ad.report import terminal_table
    from compressed_ad.results import summarise_source

    todo = [runs.stored_job(path) for path in call.options.runs]
    methods = pipeline.method_runs(todo)
    unknown = any(np.isnan(method.optimal).any() for method in methods)
    source = summarise_source(HistoryFile(todo[0].history)) if unknown else None
    _console().print(terminal_table(analyse(methods, source)))


def report(call: Call) -> None:
    """``cad report``."""
    todo = [runs.stored_job(path, call.options.history) for path in call.options.runs]
    histories = sorted({str(job.history) for job in todo})
    if len(histories) > 1:
        raise UsageError(f"the runs were trained on different history files: {', '.join(histories)}")
    out: Path = call.options.out or Path("report")
    if out.exists() and not (out / "index.html").exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out}: exists and is not a report; choose another --out")
    if call.options.dry_run:
        print_lines(f"Would write {out / 'index.html'} from {len(todo)} run(s)")
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), call.display.stage("report") as show:
        written = pipeline.report_stage(todo, todo[0].history, out, commands=[_typed(call)], progress=show)
    print_lines(f"{written.analysis.verdict}\nReport: {written.index}")
