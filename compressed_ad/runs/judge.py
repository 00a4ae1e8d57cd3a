"""Evaluates a trained run on held-out tasks, and loads its model to play as in the evaluation."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import CheckpointError, HistoryError, SplitError
from compressed_ad.files import file_digest, write_atomically
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

EVALUATION = "evaluation.npz"


@lru_cache(maxsize=1)
def _references(
    path: Path, digest: str, task_ids: tuple[int, ...], rollouts: int, episodes: int
) -> dict[str, FloatArray]:
    """Returns of the family's reference algorithms by name.

    They depend on the seed of the histories, not of the run, so that the runs of one process share them.
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
    weights = {name: file_digest(job.path / name) for name in WEIGHTS.values()}
    try:
        found = job.history.stat()
        digest = _digest(job.history, found.st_mtime_ns, found.st_size)
    except OSError:
        digest = HistoryFile(job.history).digest()  # raises the error that says what is wrong
    return json.dumps({**settings, **playing(job.config), **weights, "history": digest})


@lru_cache(maxsize=256)
def _digest(history: Path, mtime_ns: int, size: int) -> str:
    """The digest of a history file, read again if the file has changed."""
    return HistoryFile(history).digest()


def stored_evaluation(path: Path) -> str | None:
    """The settings of the evaluation in ``path``; None if there is no readable evaluation."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str({name: file[name] for name in file.files}["settings"])  # damage shows on reading
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def is_evaluated(job: Job) -> bool:
    """Whether an evaluation of these weights on these histories, with these settings, is stored."""
    return job.trained and stored_evaluation(job.path / EVALUATION) == evaluation_settings(job)


def evaluate_run(
    job: Job, output: Path | None = None, *, report: Report = silent, should_stop: ShouldStop = never
) -> Path:
    """Evaluate a trained run on the held-out tasks and write ``evaluation.npz`` as a whole.

    Its arrays: ``returns`` (N, M, E), ``returns_last`` (the same with the last weights), ``task_ids``,
    ``optimal``, ``random`` (N,), ``accuracy``, ``cross_entropy``, ``behaviour_entropy``, ``step``,
    ``step_last``; ``marked`` (10,), the share of marked steps by tenth of the training histories; ``paying``,
    the share of rewarded steps in their first episodes; ``settings`` (JSON); ``horizon`` of the family; and
    ``reference_<name>`` (N, M, E) for each of its reference algorithms. If ``evaluation.training_tasks`` is
    N' > 0, also ``returns_training`` (N', M, E), ``training_ids``, ``training_optimal`` and
    ``training_random`` (N',), of the first N' training tasks of the split.
    """
    path = output or job.path / EVALUATION
    job.check_trained()
    settings = evaluation_settings(job)
    if stored_evaluation(path) == settings:
        return path
    player, evaluation = make_player(job), job.config.evaluation
    data, model, step = player.data, player.model, player.step
    ids, training_ids = data.heldout_tasks(), data.training_tasks()
    last, step_last = load_model(job.path / WEIGHTS["last"], data, device(job.config))
    size = (evaluation.rollouts, evaluation.episodes)
    parts = 1 + (step_last != step) + (evaluation.training_tasks > 0)

    def play(model: AD, k: int, task_ids: IntArray) -> FloatArray:
        def show(done: int, total: int, text: str) -> None:
            report(done + k * total, parts * total, text)
            if should_stop():
                raise KeyboardInterrupt

        return data.play(model, task_ids, *size, job.config.seed, show)

    returns, histories = play(model, 0, ids), data.raw(training_ids)
    arrays: dict[str, Any] = {
        "returns": returns,
        "step": step,
        **data.imitation(model, ids, evaluation.imitation_windows),
        "returns_last": returns if step_last == step else play(last, 1, ids),
        "step_last": step_last,
        "task_ids": ids,
        "optimal": data.optimal(ids),
        "random": data.file.random_return[ids],
        "marked": _marked_by_tenth(histories),
        "paying": _paying(histories),
        "settings": settings,
        "horizon": data.family.horizon,
    }
    references = _references(data.file.path, data.file.digest(), tuple(ids.tolist()), *size)
    arrays |= {f"{REFERENCE}{name}": theirs for name, theirs in references.items()}
    if evaluation.training_tasks:
        seen = training_ids[: evaluation.training_tasks]
        random, optimal = data.scale(seen)
        arrays |= {"returns_training": play(model, parts - 1, seen), "training_ids": seen}
        arrays |= {"training_optimal": optimal, "training_random": random}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path


@dataclass(frozen=True)
class Player:
    """A trained run, ready to play as in its evaluation."""

    model: AD
    step: int  # gradient steps of its weights
    data: RunData
    options: dict[str, Any]  # of ``InContextAgent``


def make_player(job: Job) -> Player:
    """The model that ``evaluate_run`` plays with; ``SplitError`` if the run was trained on held-out tasks."""
    job.check_trained()
    data, where = RunData(job), device(job.config)
    check_unseen(job, data, data.file.split.heldout)
    model, step = load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
    return Player(model, step, data, playing(job.config))


def _marked_by_tenth(sequences: Sequences) -> FloatArray:
    """(10,) share of marked steps by tenth of each sequence; without marks 0."""
    place = np.arange(len(sequences.mask)) - np.repeat(sequences.offsets[:-1], sequences.lengths)
    tenth = 10 * place // np.repeat(sequences.lengths, sequences.lengths)
    return np.bincount(tenth, sequences.mask, minlength=10) / np.bincount(tenth, minlength=10)


def _paying(sequences: Sequences) -> float:
    """Share of steps with a reward other than 0 in the first episodes, before the source has learned."""
    episodes = sequences.episodes
    first = episodes.ordinal == 0
    paid = np.add.reduceat((sequences.rewards != 0).astype(np.int64), episodes.start)
    return float(paid[first].sum() / episodes.length[first].sum())


def check_unseen(job: Job, data: RunData, ids: IntArray) -> None:
    """Raise ``SplitError`` if the run was trained on any of ``ids``, whatever file these tasks are from."""
    trained = stored_environment(job.path).get("history") or {}
    ours = data.file
    if trained.get("split") == {name: part.tolist() for name, part in vars(ours.split).items()}:
        return
    path = Path(trained.get("path", ""))
    if not path.is_file():
        raise HistoryError(
            f"{ours.path} has another split than the history file that the run {job.path} was trained on,"
            f" and that file, {path}, is gone: it is unknown whether these held-out tasks are new to the run"
        )
    source = HistoryFile(path)
    if (source.info.family, source.info.family_kwargs) != (ours.info.family, ours.info.family_kwargs):
        return
    seen = source.tasks[np.concatenate([source.split.train, source.split.validation])]
    known = [int(i) for i in ids if (seen == ours.tasks[i]).all(axis=1).any()]
    if known:
        raise SplitError(f"{job.path} was trained on held-out tasks {known} of {ours.path}")


def load_model(path: Path, data: RunData, where: str) -> tuple[AD, int]:
    """A trained model and its gradient step; ``SpaceError`` if its spaces are not those of the data."""
    from compressed_ad.models import MODEL
    from compressed_ad.models.ad import architecture
    from compressed_ad.training.checkpoints import load

    content = load(path, where)
    config = architecture(content["config"])
    for kind in ("observation", "action"):
        what = f"{path}: {kind} space of {data.file.info.family}"
        check_same(what, getattr(config, f"{kind}_space"), data.file.info.spaces[kind])
    for name, weight in content["model_state_dict"].items():
        if not weight.is_floating_point():
            raise CheckpointError(f"{path}: {name} has dtype {weight.dtype}, which is not that of a weight")
    model = MODEL[config.model](config).to(where)
    model.load_state_dict(content["model_state_dict"])
    return model, int(content["step"])
