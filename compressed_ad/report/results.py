"""What runs left behind, read into the arrays that pages show, and the files of a study."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import RunDirectoryError, UsageError, one_line
from compressed_ad.evaluation.data_frames import long_frame
from compressed_ad.evaluation.intervals import Floats, mean
from compressed_ad.files import chained, file_digest, json_object, json_value
from compressed_ad.histories.header import LARGEST_RETURN, differences, short
from compressed_ad.report.measures import MEASURES, SCORES, chance_in_play, final_return, normalise, series
from compressed_ad.report.rows import CHANCES, TENTHS, Row
from compressed_ad.tasks.limits import Limit, shipped_limit
from compressed_ad.types import AnyArray, FloatArray, IntArray

if TYPE_CHECKING:
    from pandas import DataFrame

    from compressed_ad.runs.study import Cell

DIGEST = "digest"
"""The array of an evaluation file that holds the ``content_digest`` of the others."""
REFERENCE = "reference_"
"""Before the names of reference algorithms in an evaluation file."""
PAYS_ALWAYS = 0.25
"""With a larger share of paying steps than this before anything is learned, no reward has to be found."""
_SCALARS = ("accuracy", "cross_entropy", "behaviour_entropy")
_OPTIONAL = (
    "returns_last",
    "returns_training",
    "training_optimal",
    "training_random",
    "horizon",
    "paying",
    "marked",
    "visible",
)
_MAY_BE_NAN = ("optimal", "training_optimal", "accuracy", "behaviour_entropy")  # unknown


# ---------------------------------------------------------------- run directories


@dataclass(frozen=True, repr=False)
class MethodRuns:
    """All runs of one method: R training seeds, N held-out tasks, M rollouts, E in-context episodes."""

    name: str
    seeds: tuple[int, ...]  # (R,) runs of two methods with one seed are paired
    task_ids: IntArray  # (N,)
    returns: FloatArray  # (R, N, M, E) undiscounted
    random: FloatArray  # (N,)
    optimal: FloatArray  # (N,) NaN where unknown
    accuracy: FloatArray  # (R,) NaN where not measured, as the two below
    cross_entropy: FloatArray  # (R,) nats
    behaviour_entropy: FloatArray  # (R,) nats
    metrics: Sequence[Sequence[Mapping[str, Any]]]  # (R,) rows of metrics.jsonl
    references: Mapping[str, FloatArray] = field(default_factory=dict)  # (N, M, E) by name, undiscounted
    horizon: int | None = None  # of the family; None where not known
    paying: float | None = None  # share of steps with a reward other than 0, before anything is learned
    final_last: FloatArray | None = None  # (R, N) normalised final return of the last weights
    training_final: FloatArray | None = None  # (R, N') normalised final return on N' training tasks
    visible: FloatArray | None = None  # (R,) tokens that a query sees; of models whose context steps leave
    marked: FloatArray | None = None  # (R, 10) share of marked steps by tenth of the training histories
    judged: Mapping[str, Any] = field(default_factory=dict)  # ``judgement``, the same for all runs

    def __repr__(self) -> str:
        n_run, n_task, n_rollout, n_episode = self.returns.shape
        played = f"{n_task} held-out tasks x {n_rollout} rollouts x {n_episode} episodes"
        return f"<MethodRuns {self.name}: {n_run} runs, {played}>"

    @property
    def searches(self) -> bool:
        """Whether a reward must be found by exploration.

        It need not be where an episode is one step or random play is paid anyway.
        """
        return self.horizon != 1 and (self.paying is None or self.paying <= PAYS_ALWAYS)

    @property
    def limit(self) -> Limit | None:
        """That of the family; None where it is unknown."""
        return shipped_limit(str(self.judged.get("family", "")))

    @cached_property
    def normalised(self) -> Floats:
        """(R, N, M, E) ``returns`` as ``measures.normalise`` scales them."""
        return np.stack([normalise(run, self.random, self.optimal) for run in self.returns])

    @cached_property
    def curves(self) -> Floats:
        """(R, N, E) normalised returns, mean over rollouts."""
        return np.asarray(self.normalised.mean(axis=2))

    def to_pandas(self) -> DataFrame:
        """A row for each run (``seed``), held-out ``task``, ``rollout`` and ``episode``, both from 1 on.

        Columns ``return`` and ``normalised``: 0 random, 1 optimal; NaN where the optimum is unknown.
        """
        _, _, n_rollout, n_episode = self.returns.shape
        axes: dict[str, Any] = {"method": [self.name], "seed": self.seeds, "task": self.task_ids}
        axes |= {"rollout": range(1, n_rollout + 1), "episode": range(1, n_episode + 1)}
        return long_frame(axes, {"return": self.returns, "normalised": self.normalised})


def load_runs(run_dirs: Sequence[str | Path], name: str | None = None) -> MethodRuns:
    """The runs of one method, one run directory per training seed.

    Each directory holds ``evaluation.npz`` and ``metrics.jsonl``. The method is called ``name``, or as the
    directories are up to the first "-"; the seed is the number after the last "seed" in a directory's name.

    Raises ``RunDirectoryError`` naming the file, and the key, that is missing, damaged, or that does not
    fit the other runs: only those judged on the same histories with the same settings, and with the weights
    that they have now, can be put together.
    """
    if not run_dirs:
        raise UsageError("no run directory given")
    named = [re.findall(r"seed(\d+)", Path(path).name) for path in run_dirs]
    places = [int(digits[-1]) if digits else i for i, digits in enumerate(named)]
    seeds, paths = zip(*sorted(zip(places, map(Path, run_dirs), strict=True)), strict=True)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"two run directories of one seed: {', '.join(map(str, paths))}")
    files = [path / "evaluation.npz" for path in paths]
    runs = [load_evaluation(file) for file in files]
    known = [judgement(file, run) for file, run in zip(files, runs, strict=True)]
    facts = {}
    for file, run, stated in zip(files, runs, known, strict=True):
        shown = {key: json_value(run[key].round(6)) for key in ("task_ids", "optimal", "random")}
        facts[str(file)] = {"returns": run["returns"].shape, **shown, **stated}
    check_same_judgement(facts)
    metrics = [
        load_metrics(path / "metrics.jsonl", run.get("step_last"))
        for path, run in zip(paths, runs, strict=True)
    ]
    return _method(paths[0].name.split("-")[0] if name is None else name, seeds, runs, metrics, known[0])


def _method(
    name: str,
    seeds: tuple[int, ...],
    runs: Sequence[dict[str, AnyArray]],
    metrics: Sequence[Sequence[Mapping[str, Any]]],
    judged: Mapping[str, Any] | None = None,
) -> MethodRuns:
    first, known = runs[0], set.intersection(*(set(run) for run in runs))

    def final(returns: str, random: str, optimal: str) -> FloatArray | None:
        if not {returns, random, optimal} <= known:
            return None
        curves = [normalise(run[returns], run[random], run[optimal]).mean(axis=1) for run in runs]
        return final_return(np.stack(curves))

    return MethodRuns(
        name=name,
        seeds=seeds,
        task_ids=first["task_ids"].astype(np.int64),
        returns=np.stack([run["returns"] for run in runs]),
        random=first["random"].astype(np.float64),
        optimal=first["optimal"].astype(np.float64),
        metrics=metrics,
        references={k.removeprefix(REFERENCE): x for k, x in first.items() if k.startswith(REFERENCE)},
        horizon=int(first["horizon"]) if "horizon" in first else None,
        paying=float(first["paying"]) if "paying" in first else None,
        final_last=final("returns_last", "random", "optimal"),
        training_final=final("returns_training", "training_random", "training_optimal"),
        visible=np.array([float(run["visible"]) for run in runs]) if "visible" in known else None,
        marked=np.stack([run["marked"] for run in runs]) if "marked" in known else None,
        judged=judged or {},
        **{key: np.array([float(run[key]) for run in runs]) for key in _SCALARS},
    )


def judgement(path: Path, arrays: Mapping[str, AnyArray]) -> dict[str, Any]:
    """What the evaluation in ``path`` was made with and on; empty in a file that does not say.

    ``RunDirectoryError`` if the weights beside it are others by now.
    """
    found: dict[str, Any] = {}
    for key in [key for key in ("judged", "settings") if key in arrays]:
        try:
            found |= json_object(str(arrays[key]))
        except ValueError as error:
            raise RunDirectoryError(f"{path}: {key} is not a JSON object ({error})") from error
    split = found.get("split", {})
    if not isinstance(split, dict) or not all(isinstance(ids, list) for ids in split.values()):
        raise RunDirectoryError(f"{path}: the split in judged must list the tasks of each part")
    for name in [key for key in found if re.fullmatch(r"\w+\.pt", key)]:
        weights, digest = path.with_name(name), found.pop(name)
        if weights.is_file() and file_digest(weights) != digest:
            raise RunDirectoryError(
                f"{path}: was made with other weights than {name} has now; replace it with:"
                f" cad evaluate --overwrite {path.parent}"
            )
    return found


def check_same_judgement(judgements: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``RunDirectoryError`` naming two of ``judgements`` that differ where both are known."""
    (first, ours), *others = judgements.items()
    for name, theirs in others:
        if differing := differences(theirs, ours, shared=True):
            raise RunDirectoryError(
                f"{name}: was judged otherwise than {first} ({'; '.join(differing[:4])}); only runs evaluated"
                " on the same histories with the same settings can be put together"
            )


def judgement_text(methods: Sequence[MethodRuns]) -> str:
    """On what and with which settings ``methods`` were judged, in one line."""
    found = methods[0].judged
    split = ", ".join(f"{len(ids)} {part}" for part, ids in found.get("split", {}).items()) or None
    history = f"SHA-256 {found['history'][:12]}" if "history" in found else "unknown"
    about = {**found, "split": split, "history": history, "rows": None}
    known = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
    tasks = short(methods[0].task_ids.tolist())
    return f"Judged on held-out tasks {tasks}: {known if found else 'on which histories is unknown'}"


def load_evaluation(path: Path) -> dict[str, AnyArray]:
    """The arrays of one ``evaluation.npz``; those that every report needs are checked."""
    arrays = stored_arrays(path)
    needed = ("returns", "task_ids", "optimal", "random", *_SCALARS)
    if missing := [key for key in needed if key not in arrays]:
        raise RunDirectoryError(f"{path}: has no {', '.join(missing)}")
    optional = [key for key in arrays if key in _OPTIONAL or key.startswith(REFERENCE)]
    if strange := [key for key in (*needed, *optional) if arrays[key].dtype.kind not in "fiu"]:
        raise RunDirectoryError(f"{path}: {', '.join(strange)} must be numbers")
    returns = arrays["returns"]
    if returns.ndim != 3 or 0 in returns.shape:
        raise RunDirectoryError(f"{path}: returns: expected (tasks, rollouts, episodes), got {returns.shape}")
    shapes = dict.fromkeys(("task_ids", "optimal", "random"), returns.shape[:1])
    shapes |= {key: returns.shape for key in arrays if key.startswith(REFERENCE)}
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise RunDirectoryError(f"{path}: {key}: expected {shape}, got {arrays[key].shape}")
    for key in (*_SCALARS, *{"horizon", "paying", "step_last", "visible"} & set(arrays)):
        if arrays[key].size != 1 or arrays[key].dtype.kind not in "fiu":
            raise RunDirectoryError(f"{path}: {key}: expected one number, got shape {arrays[key].shape}")
    for key in (*needed, *optional):
        known = arrays[key] if key not in _MAY_BE_NAN else arrays[key][~np.isnan(arrays[key])]
        if not (np.abs(known) <= LARGEST_RETURN).all():
            raise RunDirectoryError(f"{path}: {key} has NaN, infinity, or a number beyond float32")
    if (arrays["optimal"] < arrays["random"] - 1e-6).any():  # rounded to float32 in some files
        raise RunDirectoryError(f"{path}: optimal is below random, but no policy earns more")
    if (horizon := arrays.get("horizon")) is not None and horizon < 1:
        raise RunDirectoryError(f"{path}: horizon is {horizon}, but episodes have at least one step")
    return arrays | {key: arrays[key].reshape(()) for key in _SCALARS}


def stored_arrays(path: Path) -> dict[str, AnyArray]:
    """The arrays of an npz file, unchecked; ``RunDirectoryError`` if it is missing or damaged."""
    if not path.is_file():
        raise RunDirectoryError(f"{path}: not found; evaluate this run first")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {key: np.asarray(loaded[key]) for key in loaded.files}
    except Exception as error:  # a changed byte can make zipfile and NumPy raise anything
        raise RunDirectoryError(f"{path}: damaged or not an evaluation file ({one_line(error)})") from error
    digest = arrays.pop(DIGEST, None)  # files of earlier versions have none
    if digest is not None and str(digest) != content_digest(arrays):
        raise RunDirectoryError(f"{path}: damaged (its arrays do not match its digest)")
    return arrays


def content_digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of named arrays. The archive itself has checksums of contents, but none of names."""
    digest = hashlib.sha256()
    for name, array in sorted((name, np.asarray(value)) for name, value in arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_metrics(path: Path, end: AnyArray | int | None = None) -> list[dict[str, Any]]:
    """The rows of one ``metrics.jsonl``, without a last line that was never completed (no newline).

    Rows of earlier versions have no ``check``; where there is one, it is verified and left out. ``end``: the
    step of the last weights that were evaluated, with which the rows must end.
    """
    restore = "remove last_model.pt beside it and run cad train --resume to write it again"
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path}: not found; train this run first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({error})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({**json.loads(line)})  # of an earlier version it may hold NaN, which is unknown
        except (ValueError, TypeError, RecursionError) as error:
            raise RunDirectoryError(f"{path}: line {number} is not a JSON object ({error})") from error
    before = ""
    for number, row in enumerate(rows if any("check" in row for row in rows) else (), start=1):
        check = row.pop("check", None)
        before = chained(row, before)
        if check != before:
            raise RunDirectoryError(f"{path}: line {number} was changed after it was written; {restore}")
    last = rows[-1].get("step") if rows else "none"
    if end is not None and end != last:
        raise RunDirectoryError(f"{path}: ends at step {last}, but the run was trained to {end}; {restore}")
    return rows


# ---------------------------------------------------------------- runs of a study


def cell_row(cell: Cell, run_dir: Path, evaluation: Path) -> Row:
    """What ``cell`` left behind; ``RunDirectoryError`` names the file that is missing or damaged."""
    found = load_evaluation(evaluation)
    metrics = load_metrics(run_dir / "metrics.jsonl", found.get("step_last"))
    runs = _method(cell.variant, (cell.run,), [found], [metrics], judgement(evaluation, found))
    if np.isnan(runs.optimal).any():
        raise RunDirectoryError(f"{evaluation}: a study needs families whose optimal return is known")
    values = {key: float(mean(measure.scores(runs).ravel())) for key, measure in MEASURES.items()}
    played = runs.normalised[0]
    values |= {CHANCES[key]: chance_in_play(score(played)) for key, score in SCORES.items()}
    steps, rates = series(metrics, "targets_per_second")
    model = cell.trained.model
    targets = model.batch_size * model.n_transit * np.diff(steps, prepend=0.0)
    values |= {"seed": cell.trained.seed, "seconds": float((targets / rates).sum())}
    values |= dict(zip(TENTHS, found["marked"].tolist(), strict=True))
    parameters = f"{cell.data_key}/{cell.training_key}/{cell.playing_key}"
    return Row(cell.family, cell.variant, cell.run, values, parameters)
