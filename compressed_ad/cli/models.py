"""``cad train``, ``evaluate``, ``compare`` and ``report``: single steps from a history file to a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import print_lines, results_console
from compressed_ad.errors import ConfigError, HistoryError, RunDirectoryError, UsageError
from compressed_ad.evaluation.intervals import mean
from compressed_ad.evaluation.settings import EvaluationSettings
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.measures import final_return
from compressed_ad.runs import job as runs, stages
from compressed_ad.runs.directory import (
    CONFIG,
    locked,
)
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import EVALUATION, evaluate_run, is_evaluated, stored_evaluation
from compressed_ad.runs.settings import Config
from compressed_ad.runs.trainer import train_run
from compressed_ad.workers import WorkerPool


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
    path: Path = call.options.history or stages.default_history(config, Path("datasets"))
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
    workers = min(stages.n_process(config), len(todo))
    with call.stop.politely(), WorkerPool(workers) as pool, call.display.stage("evaluate") as report:
        stages.run_jobs(evaluate_run, todo, pool, report=report, should_stop=call.stop)
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
    (runs_of_one,) = stages.method_runs([job])
    if np.isnan(runs_of_one.optimal).any():
        final, unit = float(final_return(runs_of_one.returns).mean()), "return"
    else:
        final, unit = float(mean(final_return(runs_of_one.curves).ravel())), "normalised return"
    accuracy = runs_of_one.accuracy[0]
    return (
        f"{job.path}: final {unit} {final:.3f},{'' if np.isnan(accuracy) else f' accuracy {accuracy:.3f},'}"
        f" cross-entropy {runs_of_one.cross_entropy[0]:.3f} nats ({len(runs_of_one.task_ids)} held-out tasks)"
    )


def compare(call: Call) -> None:
    """``cad compare``."""
    from compressed_ad.report.comparison import analyse
    from compressed_ad.report.results import summarise_source
    from compressed_ad.report.run_report import terminal_table

    todo = [runs.stored_job(path) for path in call.options.runs]
    methods = stages.method_runs(todo)
    unknown = any(np.isnan(method.optimal).any() for method in methods)
    source = summarise_source(HistoryFile(todo[0].history)) if unknown else None
    results_console().print(terminal_table(analyse(methods, source)))


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
        written = stages.report_stage(todo, todo[0].history, out, commands=[call.typed()], progress=show)
    print_lines(f"{' '.join(written.analysis.verdicts)}\nReport: {written.index}")
