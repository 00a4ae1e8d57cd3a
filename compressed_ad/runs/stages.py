"""The stages of ``cad run`` as plain functions, which the other commands share, and how long they will take.

Every stage continues where it stopped and leaves what is finished alone. torch is imported only by the stages
that need it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import RunDirectoryError, SplitError
from compressed_ad.files import write_json
from compressed_ad.histories.collector import collect, history_path
from compressed_ad.histories.file import HistoryFile, marking_provenance, remark
from compressed_ad.histories.header import differences, short
from compressed_ad.histories.thinning import kept_steps
from compressed_ad.learners.base import Timed
from compressed_ad.marking.apply import mark_task, marker_params
from compressed_ad.marking.statistics import MarkingStatistics
from compressed_ad.models.settings import ModelConfig
from compressed_ad.registry import call_text, own_names
from compressed_ad.report.results import MethodRuns, check_same_judgement, judgement_text, load_runs
from compressed_ad.report.source import summarise_source
from compressed_ad.runs.config import plan, transform_pairs
from compressed_ad.runs.directory import cores, environment, vectors
from compressed_ad.runs.job import Job
from compressed_ad.runs.memory_limit import tasks_within
from compressed_ad.runs.model_figures import single_run_figures
from compressed_ad.runs.settings import Config
from compressed_ad.tasks.select import family_code
from compressed_ad.training.flops import training_flops
from compressed_ad.training.transforms import check_episodes, departures
from compressed_ad.workers import Pool, Report, ShouldStop, TimedParts, never, silent

if TYPE_CHECKING:
    from compressed_ad.report.run_report import WrittenReport

# ---------------------------------------------------------------- collect and mark


def default_history(config: Config, folder: Path) -> Path:
    """The path in ``folder`` of the histories of ``config``."""
    return history_path(folder, config.env.short_name, plan(config).learner.name, config.seed)


def n_process(config: Config) -> int:
    """Processes to work in."""
    return config.algorithm.n_process or cores()


def source_steps(config: Config) -> int:
    """Environment steps of all source learners together."""
    algorithm = config.algorithm
    return len(plan(config).task_ids) * algorithm.n_learner * algorithm.n_stream * algorithm.n_timesteps


def collect_stage(
    config: Config,
    path: Path,
    *,
    mark: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    report: Report = silent,
    pool: Pool | None = None,
) -> Path:
    """Collect the histories of ``config`` into ``path``, marked unless ``mark`` is False.

    Within the memory limit of ``pool``, workers learn fewer tasks at a time.
    """
    limit = None if pool is None else pool.memory_limit
    env, algorithm, planned = config.env, config.algorithm, plan(config)
    return collect(
        planned.family,
        planned.learner,
        path,
        family_name=env.family,
        family_kwargs=env.kwargs,
        learner_config={"learner": algorithm.learner, **algorithm.learner_kwargs},
        n_timesteps=algorithm.n_timesteps,
        n_learner=algorithm.n_learner,
        n_stream=algorithm.n_stream,
        keep_every=algorithm.keep_every,
        task_ids=planned.task_ids,
        split=planned.split,
        checked=True,
        marker=config.marker.marker if mark else None,
        marker_params=marker_params(config.marker) if mark else None,
        seed=config.seed,
        n_process=n_process(config),
        timeout=algorithm.timeout,
        pool=pool,
        most_tasks=None if pool is None or limit is None else tasks_within(limit, config, pool.n_process),
        resume=resume,
        overwrite=overwrite,
        progress=lambda done, total: report(done, total, "environment steps"),
    )


def check_recipe(config: Config, path: Path) -> None:
    """``UsageError`` if the transforms of ``config`` would leave nothing of what is still to be collected."""
    if not path.exists():
        planned, algorithm = plan(config), config.algorithm
        n_step = kept_steps(planned.family, algorithm.n_timesteps, algorithm.keep_every)
        tasks = planned.family.tasks()[planned.task_ids][planned.split.train]
        check_episodes(transform_pairs(config.model), planned.family, tasks, n_step)


def check_heldout(config: Config) -> None:
    """``SplitError`` if ``config`` holds no task out, so that its models could not be judged."""
    if not len(plan(config).split.heldout):
        few = "has too few tasks to hold one out, so that nothing could be judged"
        raise SplitError(f"env: {config.env.family} {few}; only cad collect and cad train can use it")


def mark_stage(
    config: Config, path: Path, *, output: Path | None = None, report: Report = silent
) -> MarkingStatistics:
    """Mark the history file ``path`` as ``config`` says, unless that has been done."""
    file = HistoryFile(path)
    if output is None and _is_marked(file, config):
        return file.statistics()
    progress, params = counting(report, len(file.task_ids), "tasks"), marker_params(config.marker)
    return remark(path, config.marker.marker, params, seed=config.seed, output=output, progress=progress)


def check_own_marks(config: Config, path: Path, run: Path) -> None:
    """``RunDirectoryError`` if a user's marker now marks other steps of ``path`` than ``run`` has seen."""
    file, marker = HistoryFile(path), config.marker.marker
    if own_names(marker) and (file.marking or {}).get("marker") == marker and not _is_marked(file, config):
        raise RunDirectoryError(
            f"{run}: was begun with other marks than {marker} gives now; take back what was changed in it, or"
            " choose another output folder"
        )


def _is_marked(file: HistoryFile, config: Config) -> bool:
    """Whether ``file`` has the marks of ``config``; a user's own marker may have changed, so it is asked."""
    marker, params, seed = config.marker.marker, marker_params(config.marker), config.seed
    stored = file.marking
    if stored is None or (stored["marker"], stored["seed"]) != (marker, seed):
        return False
    # As files hold them. A parameter that came after a file was marked has its default there.
    default, asked = (
        json.loads(json.dumps(marking_provenance(marker, given, seed)["parameters"]))
        for given in ({}, params)
    )
    if asked != {**default, **stored["parameters"]}:
        return False
    marked = ((h, mark_task(marker, h, task, seed=seed, **params)) for task, h in file.each())
    return not own_names(marker) or all((mask == h.compression_mask).all() for h, mask in marked)


def counting(report: Report, total: int, unit: str) -> Callable[[int], None]:
    """Called with how many of ``total`` are newly done, reports their sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, total, unit)

    return add


# ---------------------------------------------------------------- many runs


def run_jobs(
    function: Callable[..., Any],
    todo: Sequence[Job],
    pool: Pool,
    *,
    report: Report = silent,
    should_stop: ShouldStop = never,
) -> dict[str, Any]:
    """Results of ``function`` (``train_run`` or ``evaluate_run``) for every job, by the name of its run."""
    units = {job.name: (job,) for job in todo}
    if len(units) < len(todo):  # runs of several folders
        units = {str(job.path): (job,) for job in todo}
    progress = TimedParts(report, dict.fromkeys(units, 1))
    return pool.run(function, units, progress=progress, should_stop=should_stop)


# ---------------------------------------------------------------- compare and report


def method_runs(todo: Sequence[Job]) -> list[MethodRuns]:
    """The evaluated runs of each model, in the order in which the models first appear, all judged alike."""
    grouped: dict[str, list[Path]] = {}
    for single in todo:
        grouped.setdefault(single.config.model.model, []).append(single.path)
    methods = {name: load_runs(paths, name=name) for name, paths in grouped.items()}
    check_same_judgement({str(grouped[name][0]): runs.judged for name, runs in methods.items()})
    return list(methods.values())


def require_judged_on(file: HistoryFile, methods: Sequence[MethodRuns]) -> None:
    """Raise ``RunDirectoryError`` unless ``methods`` were judged on ``file`` as it is now, if they tell."""
    digest, ids = methods[0].judged.get("history", file.digest()), methods[0].task_ids
    if digest != file.digest() or not np.array_equal(ids, file.split.heldout):
        raise RunDirectoryError(
            f"{file.path}: holds other histories, marks or another split than the runs were judged on (tasks"
            f" {short(ids.tolist())}); evaluate them again with --overwrite, or give the file with --history"
        )


def _training(job: Job, file: HistoryFile) -> dict[str, Any]:
    """What the training of ``job`` on ``file`` spent, for the report."""
    model, info = job.config.model, file.info
    supervised = model.n_transit if model.loss_at == "every" else 1
    return {
        "gradient_steps": model.steps,
        "windows_per_step": model.batch_size,
        "context": model.n_transit,
        "supervised_actions": model.steps * model.batch_size * supervised,
        "source_steps_per_task": file.n_stream * file.n_step,
        "model": f"d {model.tf_n_embd}, {model.tf_n_layer} layers, {model.tf_n_head} heads",
        **({"histories_hold": f"one of {info.keep_every} episodes"} if info.keep_every > 1 else {}),
        **({"source_was_told": info.config["told"]} if "told" in info.config else {}),
    }


_ALL = "all steps, until it is full"


def _stays(model: ModelConfig) -> str:
    """What stays in the context of ``model``, in words."""
    if model.recurrent:
        return f"{model.memory_tokens} tokens of memory, rewritten every {model.memory_steps} steps"
    parts = []
    if model.segmentation != "none":
        sight = "" if model.segment_gist else ", which do not see its inside"
        kept = f"{model.kept_tokens} tokens of what the rule {model.segmentation} closes{sight}"
        parts.append(f"{kept}, and what is open")
    if model.recent_steps:
        parts.append(f"the last {model.recent_steps} steps")
    return "; ".join(parts) or _ALL


def report_stage(
    todo: Sequence[Job],
    history: Path,
    out: Path,
    *,
    seconds: Mapping[str, float] | None = None,
    command: str,
    formats: Collection[str] = ("png", "svg"),
    progress: Report = silent,
    pool: Pool | None = None,
) -> WrittenReport:
    """Compare the evaluated runs of ``todo`` and write ``index.html``, ``table.csv`` and ``summary.json``."""
    from compressed_ad.report.pages import provenance
    from compressed_ad.report.run_report import Experiment, build_report

    file, methods = HistoryFile(history), method_runs(todo)
    require_judged_on(file, methods)
    code = family_code(file.info.family, file.info.family_kwargs).union(*(job.code() for job in todo))
    untrusted = sorted(code.difference(*(job.trust for job in todo)))
    budget, transforms = _training(todo[0], file), transform_pairs(todo[0].config.model)
    for job in todo[1:]:
        differing = differences(budget, _training(job, file))
        if differing or transform_pairs(job.config.model) != transforms:
            raise RunDirectoryError(
                f"{job.path}: was trained otherwise than {todo[0].path} ("
                f"{'; '.join(differing) or 'transforms'}); a report has one budget; use cad compare"
            )
    stays = {job.config.model.model: _stays(job.config.model) for job in todo}
    if set(stays.values()) != {_ALL}:
        budget["stays_in_context"] = "; ".join(f"{name}: {what}" for name, what in stays.items())
    return build_report(
        out,
        methods,
        experiment=Experiment(
            family=call_text(file.info.family, file.info.family_kwargs),
            split={name: ids.tolist() for name, ids in vars(file.split).items()},
            transforms=[call_text(name, params) for name, params in transforms],
            budget=budget,
        ),
        source=summarise_source(file),
        seconds=seconds,
        commands=[command],
        provenance=provenance(environment())
        | {"history file": f"{file.path.name}, SHA-256 {file.digest()}", "judged": judgement_text(methods)},
        notes=departures([name for name, _ in transforms])
        + [f"What needs the code {name} is not drawn: it was not trusted (--trust)." for name in untrusted],
        further=single_run_figures(todo, searches=methods[0].searches),
        formats=formats,
        pool=pool,
        progress=progress,
    )


# ---------------------------------------------------------------- time


def expected_seconds(config: Config, processes: int | None = None) -> dict[str, float | None]:
    """Rough seconds of each stage of ``cad run`` on CPU cores of today; None where they are unknown.

    ``processes`` work, or as many as ``config`` says.

    Measured on a 2-core server CPU with AVX-512, both cores busy. The whole job took up to 1.7 times as long
    on one without; yours may differ as much.
    """
    slower = 1.0 if vectors() == "AVX-512" else 1.7
    planned, model, evaluation = plan(config), config.model, config.evaluation
    parallel, steps = processes or n_process(config), source_steps(config)
    collection = None
    if isinstance(planned.learner, Timed) and ":" not in config.env.family:  # others step at their own speed
        collection = slower * (10 + steps * planned.learner.step_seconds / parallel)
    rounds = -(-len(config.comparison.methods) * config.comparison.runs // parallel)
    size = model.tf_n_embd**2 * model.tf_n_layer / (64**2 * 3) * 0.7 + 0.3
    # An in-context step of one environment takes 3.5e-5 s at width 64, 3 layers, context 200.
    episode = planned.family.horizon * 3.5e-5 * size
    validation = len(planned.split.validation) * model.validation_rollouts * model.validation_episodes
    heldout = len(planned.split.heldout) * evaluation.rollouts * evaluation.episodes
    return {
        "collect": collection,
        "mark": 1 + steps * 1e-7,  # most of it is done while collecting
        "train": slower
        * rounds
        * (4 + training_flops(model) / 60e9 + model.validations * validation * episode),
        "evaluate": slower * rounds * (2 + 2 * heldout * episode),
        "report": slower * (2 + 12 / min(parallel, 4)),
    }


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
    def stage(self, name: str, report: Report = silent) -> Iterator[Report]:
        """Time a stage; the yielded ``report``, called often, saves the time so far every few seconds."""
        before, started, saved = self.seconds.get(name, 0.0), time.monotonic(), time.monotonic()

        def save() -> None:
            self.seconds[name] = before + time.monotonic() - started
            write_json(self.path, self.seconds)

        def timed(done: float, total: float, text: str) -> None:
            nonlocal saved
            report(done, total, text)
            if time.monotonic() - saved > 5:
                saved = time.monotonic()
                save()

        try:
            yield timed
        finally:
            save()
