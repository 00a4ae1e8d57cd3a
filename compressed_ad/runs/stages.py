"""The stages of the main job as plain functions: collect, mark, train, evaluate, compare, report.

``cad run`` does them all; the other commands do one each. Every stage continues where it stopped and leaves
what is finished alone. torch is imported only by the stages that need it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressed_ad.errors import RunDirectoryError
from compressed_ad.files import write_atomically
from compressed_ad.histories.collector import collect, history_path
from compressed_ad.histories.file import HistoryFile, remark
from compressed_ad.learners.select import make_learner
from compressed_ad.marking.apply import MarkingStatistics
from compressed_ad.registry import call_text
from compressed_ad.report.results import MethodRuns, load_runs, summarise_source
from compressed_ad.runs.config import build_family, marker_params, planned_split, transform_pairs
from compressed_ad.runs.directory import (
    cores,
    environment,
)
from compressed_ad.runs.job import (
    Job,
    never,
    silent,
)
from compressed_ad.runs.settings import Config
from compressed_ad.training.transforms import departures
from compressed_ad.workers import Report, Stop, WorkerPool

if TYPE_CHECKING:
    from compressed_ad.report.run_report import WrittenReport

# ---------------------------------------------------------------- collect and mark


def default_history(config: Config, folder: Path) -> Path:
    """Where the histories of ``config`` are, in ``folder``."""
    learner = make_learner(config.algorithm.learner, config.algorithm.learner_kwargs)
    return history_path(folder, config.env.short_name, learner.name, config.seed)


def n_process(config: Config) -> int:
    """Processes to work in."""
    return config.algorithm.n_process or cores()


def source_steps(config: Config) -> int:
    """Environment steps of all source learners together."""
    n_task = config.env.n_task or len(build_family(config).tasks())
    algorithm = config.algorithm
    return n_task * algorithm.n_learner * algorithm.n_stream * algorithm.n_timesteps


def collect_stage(
    config: Config,
    path: Path,
    *,
    mark: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    report: Report = silent,
) -> Path:
    """Collect the histories of ``config`` into ``path``, marked unless ``mark`` is False."""
    env, algorithm = config.env, config.algorithm
    planned_split(env, config.seed, config.split_seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    return collect(
        build_family(config),
        make_learner(algorithm.learner, algorithm.learner_kwargs),
        path,
        family_name=env.family,
        family_kwargs=env.kwargs,
        learner_config={"learner": algorithm.learner, **algorithm.learner_kwargs},
        n_timesteps=algorithm.n_timesteps,
        n_learner=algorithm.n_learner,
        n_stream=algorithm.n_stream,
        n_task=env.n_task,
        train=env.train,
        validation=env.validation,
        heldout=env.heldout,
        split_seed=config.split_seed,
        marker=config.marker.marker if mark else None,
        marker_params=marker_params(config.marker) if mark else None,
        seed=config.seed,
        n_process=n_process(config),
        resume=resume,
        overwrite=overwrite,
        progress=lambda done, total: report(done, total, "environment steps"),
    )


def mark_stage(
    config: Config, path: Path, *, output: Path | None = None, report: Report = silent
) -> MarkingStatistics:
    """Mark the history file ``path`` as ``config`` says, unless it is marked so already."""
    file = HistoryFile(path)
    params = marker_params(config.marker)
    if output is None and file.marking is not None:
        there, seed = file.marking, file.marking["seed"]
        same = {**there["parameters"], **params} == there["parameters"]
        if there["marker"] == config.marker.marker and same and seed == config.seed:
            return file.statistics()
    done = 0

    def progress(tasks: int) -> None:
        nonlocal done
        done += tasks
        report(done, len(file.task_ids), "tasks")

    return remark(path, config.marker.marker, params, seed=config.seed, output=output, progress=progress)


# ---------------------------------------------------------------- many runs


def run_jobs(
    function: Callable[..., Any],
    todo: Sequence[Job],
    pool: WorkerPool,
    *,
    report: Report = silent,
    should_stop: Stop = never,
) -> dict[str, Any]:
    """``function`` (``train_run`` or ``evaluate_run``) for every job, in parallel; results by run name.

    Progress is that of all jobs together, in units of the jobs' own.
    """
    if len(todo) == 1 or pool.n_process == 1:
        results = {}
        for k, single in enumerate(todo):
            results[single.name] = function(
                single, report=partial(_one_of_many, report, k, len(todo)), should_stop=should_stop
            )
            if should_stop():
                raise KeyboardInterrupt
        return results
    share = dict.fromkeys((single.name for single in todo), 0.0)
    size = 0
    texts: dict[str, str] = {}

    def progress(name: str, done: int, total: int, text: str) -> None:
        nonlocal size
        size = max(size, total)
        share[name] = done / max(total, 1)
        texts[name] = text
        report(round(sum(share.values()) * size), size * len(todo), f"{name} {text}")

    named = {single.name: (function, (single,)) for single in todo}
    return pool.run(named, progress, should_stop)


def _one_of_many(report: Report, k: int, count: int, done: int, total: int, text: str) -> None:
    report(k * total + done, count * total, text)


# ---------------------------------------------------------------- compare and report


def method_runs(todo: Sequence[Job]) -> list[MethodRuns]:
    """The evaluated runs of each model, in the order in which the models first appear."""
    grouped: dict[str, list[Path]] = {}
    for single in todo:
        grouped.setdefault(single.config.model.model, []).append(single.path)
    return [load_runs(paths, name=name) for name, paths in grouped.items()]


def budget(config: Config) -> dict[str, Any]:
    """What is held equal between the methods."""
    model, algorithm = config.model, config.algorithm
    return {
        "gradient_steps": model.steps,
        "windows_per_step": model.batch_size,
        "context": model.n_transit,
        "supervised_actions": model.steps * model.batch_size * model.n_transit,
        "source_steps_per_task": algorithm.n_learner * algorithm.n_stream * algorithm.n_timesteps,
        "model": f"d {model.tf_n_embd}, {model.tf_n_layer} layers, {model.tf_n_head} heads",
    }


def report_stage(
    todo: Sequence[Job],
    history: Path,
    out: Path,
    *,
    seconds: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
    progress: Report = silent,
) -> WrittenReport:
    """Compare the evaluated runs of ``todo`` and write ``index.html``, ``table.csv`` and ``summary.json``."""
    from compressed_ad.report.pages import provenance
    from compressed_ad.report.run_report import Experiment, build_report
    from compressed_ad.runs.sights import sights

    file, config, methods = HistoryFile(history), todo[0].config, method_runs(todo)
    transforms = transform_pairs(config.model)
    return build_report(
        out,
        methods,
        experiment=Experiment(
            family=call_text(file.info.family, file.info.family_kwargs),
            split={name: ids.tolist() for name, ids in vars(file.split).items()},
            transforms=[call_text(name, params) for name, params in transforms],
            budget=budget(config),
        ),
        source=summarise_source(file),
        seconds=seconds,
        commands=commands,
        provenance={
            **provenance(environment()),
            "history file": f"{file.path.name}, SHA-256 {file.digest()}",
        },
        notes=departures([name for name, _ in transforms]),
        further=sights(todo, progress, searches=methods[0].searches),
    )


class Stopwatch:
    """Wall time of the stages, added up over interruptions in ``seconds.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                self.seconds = {str(k): float(v) for k, v in json.loads(path.read_text()).items()}
            except (ValueError, AttributeError, TypeError):
                raise RunDirectoryError(f"{path}: damaged; remove it (only timings are lost)") from None

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], None]]:
        """Time a stage; the function it gives saves what was spent so far, now and then."""
        before, started, saved = self.seconds.get(name, 0.0), time.monotonic(), time.monotonic()

        def save() -> None:
            self.seconds[name] = before + time.monotonic() - started
            write_atomically(self.path, json.dumps(self.seconds).encode() + b"\n")

        def tick() -> None:
            nonlocal saved
            if time.monotonic() - saved > 5:
                saved = time.monotonic()
                save()

        try:
            yield tick
        finally:
            save()
