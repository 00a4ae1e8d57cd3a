"""One training run: its data, its training, its judgement on the held-out tasks.

torch is imported only when a run is trained or judged.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad import stats
from compressed_ad.config import marker_params, transform_pairs
from compressed_ad.errors import HistoryError, RunDirectoryError, SplitError, UsageError
from compressed_ad.files import write_atomically
from compressed_ad.histories import HistoryFile
from compressed_ad.marking import mark_all
from compressed_ad.results import REFERENCE, episode_returns
from compressed_ad.run_directory import (
    claimed,
    history_provenance,
    run_name,
    stored_config,
    stored_environment,
)
from compressed_ad.seeding import seed64
from compressed_ad.sequences import Sequences, from_histories
from compressed_ad.settings import Config, MarkerSettings, ModelConfig, validated
from compressed_ad.spaces import check_same
from compressed_ad.tasks.select import make_family
from compressed_ad.transforms import apply_transforms
from compressed_ad.types import FloatArray, IntArray
from compressed_ad.workers import Report, Stop

if TYPE_CHECKING:
    from compressed_ad.models.ad import AD
    from compressed_ad.tasks.base import TaskFamily
    from compressed_ad.windows import WindowSampler

EVALUATION = "evaluation.npz"
WEIGHTS = {"best": "best_model.pt", "last": "last_model.pt"}
_VALIDATION_WINDOWS = 128
_IMITATION_BATCH = 32
_PLAYING = ("temperature", "temperature_rewarded", "sample", "context", "marks", "guidance")
TRAINING_KEYS = ("model", "seed", "env.training_tasks", *(f"evaluation.{key}" for key in _PLAYING))
"""What a training run depends on besides its data: its validation plays as its evaluation will."""


def silent(done: int, total: int, text: str) -> None:
    """A ``Report`` that shows nothing."""


def never() -> bool:
    """A ``Stop`` that never comes."""
    return False


# ---------------------------------------------------------------- train


@dataclass(frozen=True)
class Job:
    """One model, one seed: ``config.model.model`` and ``config.seed`` say which."""

    config: Config
    history: Path
    path: Path
    remark: bool = False
    """Mark the histories as they are read, as ``config.marker`` says, whatever marks the file holds."""

    @property
    def name(self) -> str:
        """The run directory's name."""
        return self.path.name

    @property
    def trained(self) -> bool:
        """Whether training is finished."""
        return all((self.path / file).exists() for file in ("best_model.pt", "last_model.pt"))


def jobs(config: Config, history: Path, out: Path) -> list[Job]:
    """The training runs of a comparison: every method with every seed, seeds outermost."""
    return [
        job(config, model, seed, history, out) for seed in config.seeds for model in config.comparison.methods
    ]


def job(config: Config, model: str, seed: int, history: Path, out: Path) -> Job:
    """The run of one model with one seed, in a directory of ``out``."""
    own = config.model_copy(update={"model": config.model.model_copy(update={"model": model}), "seed": seed})
    return Job(own, history, out / run_name(model, config.env.short_name, seed))


@lru_cache(maxsize=2)
def _sequences(path: Path, digest: str, task_ids: tuple[int, ...], marking: str | None) -> Sequences:
    """Raw sequences of some tasks; runs of one process share them. The digest tells files apart."""
    file = HistoryFile(path, verify=False)
    histories = file.load(task_ids)
    if marking is not None:
        settings = MarkerSettings.model_validate_json(marking)
        histories = mark_all(settings.marker, histories, seed=file.info.seed, **marker_params(settings))
    return from_histories(histories)


@lru_cache(maxsize=1)
def _references(
    path: Path, digest: str, task_ids: tuple[int, ...], rollouts: int, episodes: int
) -> dict[str, FloatArray]:
    """Returns of the family's reference algorithms by name.

    They depend on the histories' seed, not on the run's, so that the runs of one process share them.
    """
    from compressed_ad.evaluate import evaluate_references

    file = HistoryFile(path, verify=False)
    return evaluate_references(
        make_family(file.info.family, file.info.family_kwargs),
        file.tasks[np.array(task_ids, np.int64)],
        rollouts=rollouts,
        episodes=episodes,
        seed=file.info.seed,
    )


class _Data:
    """What the runs on one history file read from it."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.file = job, job.config, HistoryFile(job.history)
        self.family = make_family(self.file.info.family, self.file.info.family_kwargs)
        self._judged: dict[tuple[int, ...], tuple[WindowSampler, Sequences]] = {}

    def raw(self, task_ids: IntArray) -> Sequences:
        """The histories of ``task_ids`` as sequences, marked, before any transform."""
        marking = self.config.marker.model_dump_json() if self.job.remark else None
        return _sequences(self.file.path, self.file.digest(), tuple(int(i) for i in task_ids), marking)

    def sampler(
        self, task_ids: IntArray, seed: int, batch_size: int, **options: Any
    ) -> tuple[WindowSampler, Sequences]:
        """Windows of the histories of ``task_ids``, transformed as the configuration says."""
        from compressed_ad.windows import WindowSampler

        model = self.config.model
        sequences = apply_transforms(
            self.raw(task_ids),
            transform_pairs(model),
            seed=seed,
            family=self.family,
            tasks=self.file.tasks,
        )
        sampler = WindowSampler(
            sequences,
            model.n_transit,
            batch_size,
            seed=seed,
            first_window=model.first_window,
            device=device(self.config),
            **options,
        )
        return sampler, sequences

    def training_tasks(self) -> IntArray:
        """Training tasks of the stored split, or those of them that the configuration chooses."""
        chosen = self.config.env.training_tasks
        ids = self.file.split.train if chosen is None else np.array(chosen, np.int64)
        self.file.split.check_training(ids)
        return ids

    def scale(self, task_ids: IntArray) -> tuple[FloatArray, FloatArray]:
        """Random and optimal return (N,) of ``task_ids``.

        Where the optimum is unknown, the source's best episode (mean over streams) stands for it.
        """
        optimal = self.optimal(task_ids)
        for k in np.flatnonzero(np.isnan(optimal)):
            task = int(task_ids[k])
            episodes = episode_returns(self.file.load([task])[task]).mean(axis=0)
            # Without a complete episode nothing is known; max(initial=nan) would be NaN in any case.
            optimal[k] = episodes.max() if episodes.size else np.nan
        return self.file.random_return[task_ids], optimal

    def optimal(self, task_ids: IntArray) -> FloatArray:
        """Optimal return (N,) of ``task_ids``, NaN where unknown."""
        known = self.file.optimal_return
        return np.full(len(task_ids), np.nan) if known is None else np.array(known[task_ids], np.float64)

    def imitation(self, model: AD, task_ids: IntArray, windows: int) -> dict[str, float]:
        """Accuracy, cross-entropy and behaviour entropy on the histories of ``task_ids``; NaN: not defined.

        The windows depend on the data alone, not on the run. The entropy is that of the source's policy,
        over exactly the supervised steps: no model can have a lower cross-entropy in expectation. It is NaN
        where it is not recorded, and for continuous actions: theirs is a density's entropy, in other units
        than the loss and of the action before it was clipped.
        """
        from compressed_ad.evaluate import evaluate_imitation

        size, key = min(_IMITATION_BATCH, windows), tuple(task_ids.tolist())
        if key not in self._judged:
            self._judged[key] = self.sampler(task_ids, self.file.info.seed, size)
        sampler, sequences = self._judged[key]
        batches = -(-windows // size)
        judged = evaluate_imitation(model, sampler, batches)
        entropy = float("nan")
        if sequences.entropy is not None and self.file.info.spaces["action"]["kind"] != "box":
            steps = [sampler.indices(k) for k in range(batches)]
            entropy = float(np.mean([sequences.entropy[index[valid]].mean() for index, valid in steps]))
        return {
            "accuracy": judged.accuracy,
            "cross_entropy": judged.cross_entropy,
            "behaviour_entropy": entropy,
        }

    def play(
        self, model: AD, task_ids: IntArray, rollouts: int, episodes: int, seed: int, report: Report
    ) -> FloatArray:
        """In-context returns (N, M, E)."""
        from compressed_ad.evaluate import evaluate_tasks

        return evaluate_tasks(
            model,
            self.family,
            self.file.tasks[task_ids],
            rollouts=rollouts,
            episodes=episodes,
            seed=seed,
            progress=lambda done, total: report(done, total, "in-context steps"),
            **playing(self.config),
        )

    def validate(self, model: AD) -> dict[str, float]:
        """In-context return and imitation on the validation tasks."""
        settings, ids = self.config.model, self.file.split.validation
        seed = seed64(self.config.seed, "validation")
        returns = self.play(
            model, ids, settings.validation_rollouts, settings.validation_episodes, seed, silent
        )
        curves = stats.normalise(returns, *self.scale(ids)).mean(axis=1)
        imitation = self.imitation(model, ids, _VALIDATION_WINDOWS)
        return {
            "validation_return": float(stats.mean(stats.final_return(curves))),
            "validation_auc": float(stats.mean(stats.area_under_curve(curves))),
            "validation_accuracy": imitation["accuracy"],
            "validation_excess_cross_entropy": imitation["cross_entropy"] - imitation["behaviour_entropy"],
        }


def playing(config: Config) -> dict[str, Any]:
    """How models play: the options of ``InContextAgent``."""
    options = {key: getattr(config.evaluation, key) for key in _PLAYING}
    if config.evaluation.marks == "self":
        options["on_policy_threshold"] = config.marker.on_policy_threshold
        options["compression_window"] = config.marker.compression_window
    return options


def device(config: Config) -> str:
    """Where to compute: "auto" is CUDA if there is any. Sets one CPU thread.

    With one thread each, results do not depend on how many processes share the machine.
    """
    import torch

    torch.set_num_threads(1)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: no CUDA device was found; use --device cpu")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def provenance_of(job: Job, file: HistoryFile) -> dict[str, Any]:
    """Which data a run is made from, with the marks that it sees."""
    found = history_provenance(file)
    if job.remark:
        settings = job.config.marker
        found |= {
            "marker": settings.marker,
            "marker_parameters": marker_params(settings),
            "marker_seed": file.info.seed,
            "marked_at": None,
        }
    return found


def train_run(job: Job, *, report: Report = silent, should_stop: Stop = never) -> list[str]:
    """Train one run, or go on where it stopped; notes for the user, one line each.

    Training histories are read only through the stored split. The best checkpoint is chosen on the
    validation tasks, by in-context return.
    """
    from compressed_ad.train import train

    data, notes, where = _Data(job), list[str](), device(job.config)
    task_ids = data.training_tasks()
    config = job.config.model
    for kind in ("observation", "action"):
        asked = getattr(config, f"{kind}_space")
        if asked is not None:
            check_same(f"model.{kind}_space", data.file.info.spaces[kind], asked)
    filled = validated(ModelConfig, {**config.model_dump(), **_from_history(data.file)}, "model")
    provenance = provenance_of(job, data.file)
    with claimed(job.path, job.config, keys=TRAINING_KEYS, history=provenance):
        if job.trained:
            return notes
        unproven = config.loss_weight_unproven
        sampler, sequences = data.sampler(
            task_ids,
            job.config.seed,
            config.batch_size,
            marker_dropout=config.marker_dropout,
            weight_marked=config.loss_weight_marked,
            weight_unproven=config.loss_weight_marked if unproven is None else unproven,
        )
        longest = int(sequences.lengths.max())
        if longest < config.n_transit:
            notes.append(
                f"{job.name}: the longest history has {longest} steps after its transforms, fewer than"
                f" n_transit {config.n_transit}: the model never sees a full context while it is trained"
            )
        judged: dict[str, float] = {}

        def progress(step: int, metrics: Mapping[str, float]) -> None:
            judged.update({k: v for k, v in metrics.items() if k == "validation_return"})
            shown = f"loss {metrics['loss']:.3f}"
            shown += f", validation {judged['validation_return']:.3f}" if judged else ""
            report(step, config.steps, shown)

        trained = train(
            filled,
            sampler,
            job.path,
            seed=job.config.seed,
            validate=data.validate if len(data.file.split.validation) and config.validations else None,
            device=where,
            progress=progress,
            should_stop=should_stop,
        )
        return notes + trained.messages


def _from_history(file: HistoryFile) -> dict[str, Any]:
    """What a model takes from the history file that it is trained on."""
    scales = file.training_scales()
    found: dict[str, Any] = {f"{kind}_space": spec for kind, spec in file.info.spaces.items()}
    for name, values in (("mean", scales.observation_mean), ("std", scales.observation_std)):
        found[f"observation_{name}"] = None if values is None else values.tolist()
    return {**found, "reward_scale": scales.reward, "one_step": file.info.horizon == 1}


# ---------------------------------------------------------------- evaluate


def evaluation_settings(job: Job) -> str:
    """What an evaluation of this run depends on, as JSON."""
    settings: dict[str, Any] = job.config.evaluation.model_dump(mode="json")
    files = {name: _sha256(job.path / name) for name in ("best_model.pt", "last_model.pt")}
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
    job: Job, output: Path | None = None, *, report: Report = silent, should_stop: Stop = never
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
    data, evaluation, where = _Data(job), job.config.evaluation, device(job.config)
    ids = data.file.split.heldout
    _check_unseen(job, data, ids)
    model, step = _load_model(job.path / WEIGHTS[evaluation.checkpoint], data, where)
    last, step_last = _load_model(job.path / WEIGHTS["last"], data, where)
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


def player(job: Job) -> Player:
    """What ``evaluate_run`` plays with; raises what it raises, held-out tasks known to the run included."""
    if not job.trained:
        raise RunDirectoryError(f"{job.path}: its training is not finished; train it first")
    data, where = _Data(job), device(job.config)
    _check_unseen(job, data, data.file.split.heldout)
    model, step = _load_model(job.path / WEIGHTS[job.config.evaluation.checkpoint], data, where)
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


def _check_unseen(job: Job, data: _Data, ids: IntArray) -> None:
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


def _load_model(path: Path, data: _Data, where: str) -> tuple[AD, int]:
    """A trained model and the gradient step of its weights; ``SpaceError`` if it is of other spaces."""
    from compressed_ad.checkpoints import load
    from compressed_ad.models.ad import MODEL, architecture

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


def stored_job(path: Path, history: Path | None = None) -> Job:
    """The run in the directory ``path``, on the history file that it was trained on or another one."""
    config = stored_config(path)
    if history is None:
        known = (stored_environment(path).get("history") or {}).get("path")
        if known is None:
            raise RunDirectoryError(f"{path}: does not say which history file it was trained on; give one")
        beside = path.parent / Path(known).name  # the folder may have been moved as a whole
        history = beside if beside.exists() and not Path(known).exists() else Path(known)
    return Job(config, history, path)
