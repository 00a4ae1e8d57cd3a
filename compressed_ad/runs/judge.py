"""A trained run is judged on the held-out tasks, or made ready to play as it is judged."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import HistoryError, RunDirectoryError, SplitError
from compressed_ad.files import write_atomically
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.results import REFERENCE
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import stored_environment
from compressed_ad.runs.job import WEIGHTS, Job, device, playing
from compressed_ad.tasks.select import make_family
from compressed_ad.training.sequences import Sequences
from compressed_ad.types import FloatArray, IntArray, check_same
from compressed_ad.workers import Report, ShouldStop, never, silent

if TYPE_CHECKING:
    from compressed_ad.models.ad import AD
    from compressed_ad.tasks.base import TaskFamily

EVALUATION = "evaluation.npz"


@lru_cache(maxsize=1)
def _references(
    path: Path, digest: str, task_ids: tuple[int, ...], rollouts: int, episodes: int
) -> dict[str, FloatArray]:
    """Returns of the family's reference algorithms by name.

    They depend on the histories' seed, not on the run's, so that the runs of one process share them.
    """
    from compressed_ad.evaluation.evaluate import evaluate_references

    file = HistoryFile(path, verify=False)
    return evaluate_references(
        make_family(file.info.family, file.info.family_kwargs),
        file.tasks[np.array(task_ids, np.int64)],
        rollouts=rollouts,
        episodes=episodes,
        seed=file.info.seed,
    )


def evaluation_settings(job: Job) -> str:
    """What an evaluation of this run depends on, as JSON."""
    settings: dict[str, Any] = job.config.evaluation.model_dump(mode="json")
    files = {name: _sha256(job.path / name) for name in WEIGHTS.values()}
    marks = playing(job.config)
    return json.dumps({**settings, **marks, **files, "history": _digest_now(job.history)})


def _digest_now(history: Path) -> str:
    try:
        found = history.stat()
    except OSError:
        return HistoryFile(history).digest()  # says what is wrong
    return _digest(history, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=256)
def _digest(history: Path, mtime_ns: int, size: int) -> str:
    """The digest of a history file; a file that changed is read again."""
    return HistoryFile(history).digest()


def stored_evaluation(path: Path) -> str | None:
    """The settings of the evaluation in ``path``; None if there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str({name: file[name] for name in file.files}["settings"])  # damage shows on reading
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def is_evaluated(job: Job) -> bool:
    """Whether the run has been judged as its configuration says, with its present weights and histories."""
    if not job.trained:
        return False
    return stored_evaluation(job.path / EVALUATION) == evaluation_settings(job)


def evaluate_run(
    job: Job, output: Path | None = None, *, report: Report = silent, should_stop: ShouldStop = never
) -> Path:
    """Judge one trained run on the held-out tasks and leave ``evaluation.npz``, whole or not at all.

    Arrays: ``returns`` (N, M, E), ``returns_last`` (the same with the last weights), ``task_ids``,
    ``optimal``, ``random`` (N,), ``accuracy``, ``cross_entropy``, ``behaviour_entropy``, ``step``,
    ``step_last``, ``marked`` (10,) share of marked steps by tenth of the training histories, ``paying`` share
    of their steps with a reward before anything is learned, ``settings`` (JSON), ``horizon`` of the family,
    and, for each of its reference algorithms, ``reference_<name>`` (N, M, E); with
    ``evaluation.training_tasks`` also ``returns_training`` (N', M, E) and its ``_ids``, ``_optimal``,
    ``_random`` (N',): the first N' training tasks of the split.
    """
    path = output or job.path / EVALUATION
    if not job.trained:
        raise RunDirectoryError(f"{job.path}: its training is not finished; train it first")
    settings = evaluation_settings(job)
    if stored_evaluation(path) == settings:
        return path
    data, evaluation, where = RunData(job), job.config.evaluation, device(job.config)
    ids = data.file.split.heldout
    check_unseen(job, data, ids)
    model, step = load_model(job.path / WEIGHTS[evaluation.checkpoint], data, where)
    last, step_last = load_model(job.path / WEIGHTS["last"], data, where)
    parts = 1 + (step_last != step) + (evaluation.training_tasks > 0)

    def part(k: int) -> Report:
        def show(done: int, total: int, text: str) -> None:
            report(done + k * total, parts * total, text)
            if should_stop():
                raise KeyboardInterrupt

        return show

    def play(model: AD, k: int, task_ids: IntArray) -> FloatArray:
        return data.play(model, task_ids, evaluation.rollouts, evaluation.episodes, job.config.seed, part(k))

    arrays: dict[str, Any] = {"returns": play(model, 0, ids), "step": step}
    arrays |= data.imitation(model, ids, evaluation.imitation_windows)
    arrays["returns_last"] = arrays["returns"] if step_last == step else play(last, 1, ids)
    arrays |= {
        "step_last": step_last,
        "task_ids": ids,
        "optimal": data.optimal(ids),
        "random": data.file.random_return[ids],
        "marked": _marked_by_tenth(data.raw(data.training_tasks())),
        "paying": _paying(data.raw(data.training_tasks())),
        "settings": settings,
        "horizon": data.family.horizon,
    }
    played = _references(
        data.file.path, data.file.digest(), tuple(ids.tolist()), evaluation.rollouts, evaluation.episodes
    )
    arrays |= {f"{REFERENCE}{name}": returns for name, returns in played.items()}
    if evaluation.training_tasks:
        seen = data.training_tasks()[: evaluation.training_tasks]
        random, optimal = data.scale(seen)
        arrays |= {
            "returns_training": play(model, parts - 1, seen),
            "training_ids": seen,
            "training_optimal": optimal,
            "training_random": random,
        }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path


@dataclass(frozen=True)
class Player:
    """A trained run, ready to play as it is judged."""

    model: AD
    step: int  # of the gradient, of its weights
    family: TaskFamily
    file: HistoryFile
    options: dict[str, Any]  # how it plays: those of ``InContextAgent``


def make_player(job: Job) -> Player:
    """What ``evaluate_run`` plays with; raises what it raises, held-out tasks known to the run included."""
    if not job.trained:
        raise RunDirectoryError(f"{job.path}: its training is not finished; train it first")
    data, where = RunData(job), device(job.config)
    check_unseen(job, data, data.file.split.heldout)
    model, step = load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
    return Player(model, step, data.family, data.file, playing(job.config))


def _marked_by_tenth(sequences: Sequences) -> FloatArray:
    """(10,) share of marked steps by tenth of each sequence; what is not marked counts as unmarked."""
    place = np.arange(len(sequences.mask)) - np.repeat(sequences.offsets[:-1], sequences.lengths)
    tenth = 10 * place // np.repeat(sequences.lengths, sequences.lengths)
    return np.bincount(tenth, sequences.mask, minlength=10) / np.bincount(tenth, minlength=10)


def _paying(sequences: Sequences) -> float:
    """Share of steps with a reward other than 0 in the first episodes, before anything is learned."""
    episodes = sequences.episodes
    first = episodes.ordinal == 0
    paid = np.add.reduceat((sequences.rewards != 0).astype(np.int64), episodes.start)
    return float(paid[first].sum() / episodes.length[first].sum())


def check_unseen(job: Job, data: RunData, ids: IntArray) -> None:
    """Refuse to judge a run on tasks that it was trained on, whatever file they come from."""
    trained = stored_environment(job.path).get("history") or {}
    ours, theirs = data.file, trained.get("split")
    if theirs == {name: part.tolist() for name, part in vars(ours.split).items()}:
        return
    path = Path(trained.get("path", ""))
    if not path.is_file():
        raise HistoryError(
            f"{ours.path} has another split than the run {job.path} was trained with, and that history file,"
            f" {path}, is gone: whether these held-out tasks are new to the run cannot be told"
        )
    source = HistoryFile(path)
    if (source.info.family, source.info.family_kwargs) != (ours.info.family, ours.info.family_kwargs):
        return
    seen = source.tasks[np.concatenate([source.split.train, source.split.validation])]
    known = [int(i) for i in ids if (seen == ours.tasks[i]).all(axis=1).any()]
    if known:
        raise SplitError(f"{job.path} was trained on held-out tasks {known} of {ours.path}")


def load_model(path: Path, data: RunData, where: str) -> tuple[AD, int]:
    """A trained model and the gradient step of its weights; ``SpaceError`` if it is of other spaces."""
    from compressed_ad.models import MODEL
    from compressed_ad.models.ad import architecture
    from compressed_ad.training.checkpoints import load

    content = load(path, where)
    config = architecture(content["config"])
    for kind in ("observation", "action"):
        check_same(
            f"{path}: {kind} space of {data.file.info.family}",
            getattr(config, f"{kind}_space"),
            data.file.info.spaces[kind],
        )
    model = MODEL[config.model](config).to(where)
    model.load_state_dict(content["model_state_dict"])
    return model, int(content["step"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
