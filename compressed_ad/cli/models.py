"""``cad train``, ``evaluate``, ``compare`` and ``report``: single steps from a history file to a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressed_ad.cli import torchrun
from compressed_ad.cli.call import (
    FIGURES,
    MEMORY_LIMIT,
    TABLE_FORMAT,
    Call,
    Command,
    flag,
    history_option,
    option,
    out_option,
)
from compressed_ad.cli.display import print_lines, print_table
from compressed_ad.errors import ConfigError, HistoryError, RunDirectoryError, RunError, UsageError
from compressed_ad.evaluation.intervals import mean
from compressed_ad.files import is_free, locked
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.measures import final_return
from compressed_ad.runs import job as runs, memory_limit, stages
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import CONFIG, cores
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import EVALUATION, check_unseen, evaluate_run, is_evaluated, stored_evaluation
from compressed_ad.runs.memory_limit import Histories
from compressed_ad.runs.settings import Config
from compressed_ad.runs.trainer import train_run
from compressed_ad.workers import WorkerPool


def _train(call: Call) -> None:
    config = call.config()
    with torchrun.joined(lambda: runs.device(config), config.model.batch_size):
        _train_here(call, config)


def _train_here(call: Call, config: Config) -> None:
    out = call.options.out or Path("runs")
    history: Path = call.options.history or stages.default_history(config, Path("datasets"))
    if not history.exists() and call.options.history is None:
        others = sorted(history.parent.glob("history_*.hdf5"))
        hint = f"there is --history {others[0]}" if others else "collect one with: cad collect"
        raise HistoryError(f"{history}: no such history file; {hint}")
    trust, file = call.trust(config), HistoryFile(history)
    config = _of_file(config, file, call.explicit())
    model = config.model
    job = runs.training_job(config, model.model, config.seed, history, out, trust)
    if call.options.dry_run:
        state = "continue" if (job.path / CONFIG).exists() else "train"
        print_lines(f"Would {state} {job.path}: {model.steps:,} gradient steps of {model.model} on {history}")
    if torchrun.is_first():
        call.within(memory_limit.training(Histories.of(file), config))
    if call.options.dry_run:
        return
    # The others may come when the first has made the directory; they end with it.
    if torchrun.is_first() and not call.options.resume and (job.path / CONFIG).exists():
        raise RunDirectoryError(f"{job.path}: exists; continue it with --resume, or choose another --out")
    with call.stop.politely(), call.display.stage("train") as report:
        for note in train_run(job, report=report, should_stop=call.stop):
            call.display.note(f"note: {note}")
    judge = f"judge it with: cad evaluate {job.path}"
    print_lines(
        f"{job.path}: trained; {judge if len(file.split.heldout) else f'{history} holds no held-out task'}"
    )


def _of_file(config: Config, file: HistoryFile, explicit: set[str]) -> Config:
    """``config`` with the task family of the history file, which must be the one asked for."""
    info, env = file.info, config.env
    if "env.family" in explicit and env.family != info.family:
        raise ConfigError(f"env.family: {file.path} was collected on {info.family}, not on {env.family}")
    for key, value in env.kwargs.items():
        asked = any(f"{name}.".startswith(f"env.kwargs.{key}.") for name in explicit)
        if asked and info.family_kwargs.get(key) != value:
            stored = info.family_kwargs.get(key, "its default")
            raise ConfigError(f"env.kwargs.{key}: {file.path} was collected with {stored}, not with {value}")
    update = {"family": info.family, "kwargs": info.family_kwargs}
    return config.model_copy(update={"env": env.model_copy(update=update)})


def _evaluate(call: Call) -> None:
    config = call.config()
    chosen = {key.partition(".")[2] for key in call.explicit() if key.startswith("evaluation.")}
    history, trust = call.options.history, call.trust(config)
    todo = [runs.evaluation_job(path, history, config, chosen, trust) for path in call.options.runs]
    sizes = {path: Histories.of(HistoryFile(path)) for path in {job.history for job in todo}}
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
            size = f"{evaluation.episodes} episodes x {evaluation.rollouts} rollouts"
            print_lines(f"{job.path}: {state}, {size}")
    needs = [memory_limit.judging(sizes[job.history], job.config) for job in todo]
    workers = call.within(max(needs, key=lambda need: need.total), stages.n_process(config))
    if call.options.dry_run:
        return
    for note in dict.fromkeys(note for job in todo for note in check_unseen(RunData(job))):
        call.display.note(f"note: {note}")
    call.note_damaged(job.path / EVALUATION for job in todo)
    with call.stop.politely(), WorkerPool(workers) as pool, call.display.stage("evaluate") as report:
        stages.run_jobs(evaluate_run, todo, pool, report=report, should_stop=call.stop)
    for job in todo:
        print_lines(_score(job))


def _score(job: Job) -> str:
    (runs_of_one,) = stages.method_runs([job])
    scores, tasks = final_return(runs_of_one.curves)[0], f"{len(runs_of_one.task_ids)} held-out tasks"
    n_scaled = int(np.count_nonzero(~np.isnan(scores)))
    if unknown := np.isnan(runs_of_one.optimal).any() or not n_scaled:
        final, unit = float(final_return(runs_of_one.returns).mean()), "return"
    else:
        final, unit = float(mean(scores)), "normalised return"
    if n_scaled < len(scores) and np.isfinite(runs_of_one.optimal).all():
        which = tasks if unknown else f"{n_scaled} of {tasks}"
        tasks = f"{which}; random play is as good as the optimum in {'all' if unknown else 'the others'}"
    accuracy = runs_of_one.accuracy[0]
    return (
        f"{job.path}: final {unit} {final:.3f},{'' if np.isnan(accuracy) else f' accuracy {accuracy:.3f},'}"
        f" cross-entropy {runs_of_one.cross_entropy[0]:.3f} nats ({tasks})"
    )


def _compare(call: Call) -> None:
    todo = [runs.stored_job(path) for path in call.options.runs]
    methods = stages.method_runs(todo)
    from compressed_ad.report.comparison import analyse
    from compressed_ad.report.results import judgement_text
    from compressed_ad.report.run_tables import tables, terminal_table
    from compressed_ad.report.source import summarise_source
    from compressed_ad.report.tables import as_text

    unknown = any(np.isnan(method.optimal).any() for method in methods)
    source = None
    try:
        file = HistoryFile(todo[0].history, verify=unknown)
        stages.require_judged_on(file, methods)
        source = summarise_source(file) if unknown else None
    except RunError as error:
        if unknown:
            raise
        call.display.note(f"note: the table stands for the histories of the evaluation alone: {error}")
    found, form = analyse(methods, source), call.options.format
    if form != "text":
        print_lines(as_text(tables(found, methods), form))
        return
    print_table(terminal_table(found))
    print_lines(judgement_text(methods))


def _report(call: Call) -> None:
    todo = [runs.stored_job(path, call.options.history, call.trust()) for path in call.options.runs]
    histories = sorted({str(job.history) for job in todo})
    if len(histories) > 1:
        raise UsageError(f"the runs were trained on different history files: {', '.join(histories)}")
    out: Path = call.options.out or Path("report")
    if not is_free(out, "index.html", parts=("figures", "tables", "table.csv", "summary.json")):
        raise RunDirectoryError(f"{out}: exists and is not a report; choose another --out")
    if call.options.dry_run:
        print_lines(f"Would write {out / 'index.html'} from {len(todo)} run(s)")
        return
    with locked(out), WorkerPool(cores()) as pool, call.display.stage("report") as show:
        settings = {"command": call.typed, "formats": call.options.figures, "progress": show, "pool": pool}
        written = stages.report_stage(todo, todo[0].history, out, **settings)
    said = [written.summary["learning"], written.summary["verdict"], f"Report: {written.index}"]
    print_lines("\n".join(filter(None, said)))


_EVALUATED = option("runs", "RUN", "evaluated run directories", Path, nargs="+")
TRAIN = Command(
    _train,
    [
        history_option("datasets/history_..., as cad collect names it"),
        out_option("folder of the run directory", "runs"),
        flag("--resume", "continue an unfinished run"),
        MEMORY_LIMIT,
    ],
    text=(
        "The task family and the split are those of the history file. Of the section evaluation only "
        "how models play matters here, since the best checkpoint is chosen by in-context return. "
        "torchrun --nproc-per-node N -m compressed_ad train ... shares every batch among N processes."
    ),
    sections=("env", "model", "evaluation"),
    continued="the same command with --resume continues",
    torchrun=True,
)
EVALUATE = Command(
    _evaluate,
    [
        option("runs", "RUN", "run directories", Path, nargs="+"),
        history_option("the one that the run was trained on"),
        flag("--overwrite", "replace an evaluation with other settings"),
        MEMORY_LIMIT,
    ],
    text="Settings that are not given are those of the run.",
    sections=("evaluation",),
    common=("device", "dry-run"),
)
COMPARE = Command(_compare, [_EVALUATED, TABLE_FORMAT], common=())
REPORT = Command(
    _report,
    [
        _EVALUATED,
        history_option("the one that the runs were trained on"),
        out_option("folder of the report", "report"),
        FIGURES,
    ],
    common=("dry-run",),
)
