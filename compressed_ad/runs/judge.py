"""Evaluates a trained run on held-out tasks, and loads its model to play as in the evaluation."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from compressed_ad.errors import (
    CheckpointError,
    CompressedADError,
    HistoryError,
    RunDirectoryError,
    SplitError,
    one_line,
)
from compressed_ad.files import file_digest, write_atomically
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import differences
from compressed_ad.marking.statistics import marking_statistics
from compressed_ad.models.settings import FROM_HISTORY
from compressed_ad.registry import call_text, check_trust, own_names
from compressed_ad.report.results import DIGEST, REFERENCE, content_digest, stored_arrays
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import (
    CONFIG,
    ENVIRONMENT,
    content_of,
    history_provenance,
    other_data,
    stored_config,
    stored_provenance,
)
from compressed_ad.runs.job import WEIGHTS, Job, device, playing
from compressed_ad.tasks.select import stored_family
from compressed_ad.training.sequences import Sequences
from compressed_ad.types import FloatArray, as_compared, check_same
from compressed_ad.workers import Report, ShouldStop, TimedParts, never, silent

if TYPE_CHECKING:
    from compressed_ad.evaluation.rollouts import Rollouts
    from compressed_ad.models.ad import AD

EVALUATION = "evaluation.npz"
KEPT = 2**25
"""Bytes up to which the actions of an evaluation are kept, with 8 for each number."""


@lru_cache(maxsize=1)
def _references(
    path: Path, digest: str, task_ids: tuple[int, ...], rollouts: int, episodes: int, trust: frozenset[str]
) -> dict[str, FloatArray]:
    """Returns of ``evaluate_references`` by name.

    They depend on the seed of the histories, not of the run, so that the runs of one process share them.
    """
    from compressed_ad.evaluation.evaluate import evaluate_references

    file = HistoryFile(path, verify=False, digest=digest)
    return evaluate_references(
        stored_family(path, file.info.family, file.info.family_kwargs, trust),
        file.tasks[np.array(task_ids, np.int64)],
        rollouts=rollouts,
        episodes=episodes,
        seed=file.info.seed,
    )


def evaluation_settings(job: Job) -> str:
    """What an evaluation of this run depends on, as JSON."""
    settings: dict[str, Any] = job.config.evaluation.model_dump(mode="json")
    weights = {name: file_digest(job.path / name) for name in WEIGHTS.values()}
    found = job.history.stat() if job.history.exists() else None
    digest = _digest(job.history, found and (found.st_mtime_ns, found.st_size))
    return json.dumps({**settings, **playing(job.config), **weights, "history": digest})


@lru_cache(maxsize=256)
def _digest(history: Path, state: tuple[int, int] | None) -> str:
    """The digest of a history file, read again if its ``state`` has changed."""
    return HistoryFile(history).digest()


def stored_evaluation(path: Path) -> str | None:
    """The settings of the evaluation in ``path``; None if there is no readable evaluation."""
    try:
        return str(stored_arrays(path)["settings"])  # all are read, so that damage shows
    except (RunDirectoryError, KeyError):
        return None


def is_evaluated(job: Job, path: Path | None = None) -> bool:
    """Whether an evaluation of these weights on these histories, with these settings, is stored."""
    there = stored_evaluation(path or job.path / EVALUATION)
    known = job.trained and there is not None and job.history.exists()
    return known and there == evaluation_settings(job)


def evaluate_run(
    job: Job, output: Path | None = None, *, report: Report = silent, should_stop: ShouldStop = never
) -> Path:
    """Evaluate a trained run on the held-out tasks and write ``evaluation.npz`` as a whole.

    Its arrays: ``returns`` (N, M, E), ``returns_last`` (the same with the last weights), ``task_ids``,
    ``optimal``, ``random`` (N,), ``accuracy``, ``cross_entropy``, ``behaviour_entropy``, ``step``,
    ``step_last``; ``marked`` (10,), the share of marked steps by tenth of the training histories; ``paying``,
    the share of rewarded steps in their first episodes; ``settings`` (JSON); ``judged`` (JSON), the family,
    the source, the split and the rows of the held-out tasks; ``horizon`` of the family; and
    ``reference_<name>`` (N, M, E) for each of ``evaluate_references``; ``actions`` (N * M, T, ...), which
    repeat the episodes, unless they are more than ``KEPT``. If ``evaluation.training_tasks`` is N' > 0, also
    ``returns_training`` (N', M, E), ``training_ids``, ``training_optimal`` and ``training_random`` (N',), of
    the first N' training tasks of the split.
    """
    from compressed_ad.evaluation.rollouts import ActionLog

    path = output or job.path / EVALUATION
    job.check_trained()
    settings = evaluation_settings(job)
    if stored_evaluation(path) == settings:
        return path
    player, evaluation = make_player(job), job.config.evaluation
    data, model, step = player.data, player.model, player.step
    ids, training_ids = data.file.heldout_tasks(), data.training_tasks()
    last, step_last = load_model(job.path / WEIGHTS["last"], data, device(job.config))
    size = (evaluation.rollouts, evaluation.episodes)
    seen = training_ids[: evaluation.training_tasks]
    plays = {"best": ids, "last": ids[: len(ids) * (step_last != step)], "training": seen}
    parts = TimedParts(report, {name: len(tasks) for name, tasks in plays.items()})

    def play(model: AD, name: str, **options: Any) -> FloatArray:
        def show(done: float, total: float, text: str) -> None:
            parts.advance(name, done, total, text)
            if should_stop():
                raise KeyboardInterrupt

        return data.play(model, plays[name], *size, job.config.seed, show, **options)

    references = _references(data.file.path, data.file.digest(), tuple(ids.tolist()), *size, job.trust)
    width = 8 * math.prod(data.family.action_space.shape or ()) * data.family.horizon
    log = ActionLog() if len(ids) * math.prod(size) * width <= KEPT else None
    returns = play(model, "best") if log is None else play(model, "best", watch=log.watch)
    histories = data.raw(training_ids)
    arrays: dict[str, Any] = {
        "returns": returns,
        "step": step,
        **data.imitation(model, ids, evaluation.imitation_windows),
        "returns_last": returns if step_last == step else play(last, "last"),
        "step_last": step_last,
        "task_ids": ids,
        "optimal": data.optimal(ids),
        "random": data.file.random_return[ids],
        "marked": np.array(
            marking_statistics(np.split(histories.mask, histories.offsets[1:-1])).ratio_by_phase
        ),
        "paying": _paying(histories),
        "settings": settings,
        "judged": json.dumps(_judged(data.file)),
        "horizon": data.family.horizon,
    }
    arrays |= {f"{REFERENCE}{name}": theirs for name, theirs in references.items()}
    arrays |= {} if log is None else {"actions": log.actions()}
    if evaluation.training_tasks:
        random, optimal = data.scale(seen)
        arrays |= {"returns_training": play(model, "training"), "training_ids": seen}
        arrays |= {"training_optimal": optimal, "training_random": random}
    buffer = io.BytesIO()
    arrays = {DIGEST: content_digest(arrays), **arrays}  # first, so that a damaged index cannot hide it alone
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path


def evaluated_rollouts(job: Job) -> Rollouts | None:
    """The episodes of the stored evaluation of ``job`` on the held-out tasks; None where it cannot tell."""
    from compressed_ad.evaluation.rollouts import replay_rollouts

    if not is_evaluated(job) or "actions" not in (found := stored_arrays(job.path / EVALUATION)):
        return None
    data = RunData(job)
    tasks = data.file.tasks[data.file.split.heldout]
    return replay_rollouts(found["actions"], found["returns"], data.family, tasks, seed=job.config.seed)


def _judged(file: HistoryFile) -> dict[str, Any]:
    """What an evaluation on ``file`` is about, for those who read it later."""
    found = history_provenance(file)
    family = call_text(file.info.family, file.info.family_kwargs)
    return {"family": family, "rows": found["rows"]["heldout"], **{k: found[k] for k in ("learner", "split")}}


@dataclass(frozen=True)
class Player:
    """A trained run, ready to play as in its evaluation."""

    model: AD
    step: int  # gradient steps of its weights
    data: RunData
    options: dict[str, Any]  # of ``InContextAgent``
    notes: list[str]  # of ``check_unseen``


def make_player(job: Job) -> Player:
    """The model that ``evaluate_run`` plays with; ``SplitError`` if the run was trained on held-out tasks."""
    job.check_trained()
    data, where = RunData(job), device(job.config)
    notes = check_unseen(data)
    model, step = load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
    return Player(model, step, data, playing(job.config), notes)


def _paying(sequences: Sequences) -> float:
    """Share of steps with a reward other than 0 in the first episodes, before the source has learned."""
    episodes, paid = sequences.episodes, 0
    end = episodes.edge[episodes.first[:-1] + 1]
    for before, rewards in sequences.parts("rewards"):
        steps = before + np.flatnonzero(rewards)
        paid += int((steps < end[sequences.sequence_of(steps)]).sum())
    return float(paid / (end - sequences.offsets[:-1]).sum())


def check_unseen(data: RunData, part: str = "heldout") -> list[str]:
    """Raise ``SplitError`` if the run has seen a held-out task of ``data``, its own file or another one.

    The run has seen its training tasks, and its validation tasks chose the checkpoint. Tasks are compared by
    their rows of parameters, however files number them and whatever they call the family. Equal rows of a
    family that is shown to be another one, by its class or its parameters, may be other tasks: then a note
    says so. Another note tells that the histories are not those that the run was trained on; for another
    ``part`` than the held-out tasks it is the only one.
    """
    job, ours, notes = data.job, data.file, list[str]()
    trained = stored_provenance(job.path)
    here = history_provenance(ours, job.config.marker if job.remark else None, data.family)
    if trained.get("sha256") != here["sha256"]:
        changed = "; ".join(other_data(trained, here)[:3]) or "only its marks, or when it was written"
        notes.append(f"{job.path} was not trained on {ours.path} as it is now ({changed})")
    rows = trained.get("rows") or _rows_of_old_run(job, trained, ours)
    seen = {tuple(as_compared(row).tolist()) for name in ("train", "validation") for row in rows[name]}
    here_rows = as_compared(ours.tasks).tolist()
    known = [i for i in ours.split.heldout.tolist() if tuple(here_rows[i]) in seen]
    if not known or part != "heldout":
        return notes
    differing = differences(trained.get("meaning", {}), here["meaning"], "family", shared=True)
    if not differing:
        raise SplitError(
            f"{job.path} was trained on held-out tasks {known} of {ours.path}, or they chose its checkpoint;"
            " judge it on a file whose held-out tasks it has not seen"
        )
    return [
        *notes,
        f"tasks {known} of {ours.path} have the parameters of tasks that {job.path} was trained on, in"
        f" another family ({'; '.join(differing)}): they count as new",
    ]


def _rows_of_old_run(job: Job, trained: Mapping[str, Any], ours: HistoryFile) -> dict[str, Any]:
    """The rows by part of the split of a run that did not store them: of its file, or of one like it."""
    path = Path(trained.get("path", ""))
    known = {key: value for key, value in trained.items() if not key.startswith("marker")}
    for file in (ours, HistoryFile(path)) if path.is_file() else (ours,):
        found = history_provenance(file)
        if not other_data(known, found):
            return cast(dict[str, Any], found["rows"])
    raise HistoryError(
        f"{job.path} does not store the tasks that it was trained on, and {path}, which had them, is gone"
        f" or has changed: it is unknown whether the held-out tasks of {ours.path} are new to the run"
    )


def _check_origin(path: Path, content: Mapping[str, Any], job: Job) -> None:
    """Raise ``RunDirectoryError`` unless the weights in ``path`` are of the run that its directory describes.

    ``config.yaml`` and ``environment.json`` are held against the copies in the weights' file.
    """
    stored, history = stored_config(job.path), content_of(stored_provenance(job.path))
    asked = stored.model.model_dump(mode="json", exclude=set(FROM_HISTORY))
    differing = differences(content["config"], asked, "model", shared=True)
    differing += differences(content.get("seed", stored.seed), stored.seed, "seed")
    if differing := differing + differences(content.get("trained_on", history), history, "history"):
        raise RunDirectoryError(
            f"{path}: is not of the run that {CONFIG} and {ENVIRONMENT} describe ({'; '.join(differing[:3])})"
        )


def load_model(path: Path, data: RunData, where: str) -> tuple[AD, int]:
    """A trained model and its gradient step; ``SpaceError`` if its spaces are not those of the data."""
    from compressed_ad.models import MODEL
    from compressed_ad.models.ad import architecture
    from compressed_ad.training.checkpoints import load

    content = load(path)
    try:
        config, weights, step = architecture(content["config"]), content["model_state_dict"], content["step"]
    except (CompressedADError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not hold a model ({one_line(error, 200)})") from error
    check_trust(path, own_names((config.model, config.segments)), data.job.trust)
    _check_origin(path, content, data.job)
    for kind in ("observation", "action"):
        what = f"{path}: {kind} space of {data.file.info.family}"
        check_same(what, getattr(config, f"{kind}_space"), data.file.info.spaces[kind])
    model = MODEL[config.model](config).to(where)
    try:
        model.load_state_dict(weights)
        wrong = [name for name, now in model.state_dict().items() if weights[name].dtype != now.dtype]
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: its weights are not those of a {config.model} ({cause})") from error
    if wrong or not isinstance(step, int) or step < 0:
        cause = f"{wrong[0]} is {weights[wrong[0]].dtype}" if wrong else f"its step is {step!r}"
        raise CheckpointError(f"{path}: its weights are not those of a {config.model} ({cause})")
    return model, step
