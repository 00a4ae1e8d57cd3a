"""What the golden files say, as JSON: read through the library, by its public names and loaders."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressed_ad.evaluation.intervals import mean
from compressed_ad.files import json_value
from compressed_ad.histories.file import HistoryFile
from compressed_ad.models import MODEL
from compressed_ad.models.ad import architecture, evaluating
from compressed_ad.models.tokens import shift
from compressed_ad.report.measures import final_return
from compressed_ad.report.results import load_evaluation, load_metrics, load_runs
from compressed_ad.report.rows import read_rows
from compressed_ad.training.checkpoints import load
from compressed_ad.types import AnyArray, History

GOLDEN = Path(__file__).parent
RUNS = {"AD": GOLDEN / "runs/AD-darkroom-seed0", "CompressedAD": GOLDEN / "runs/CompressedAD-darkroom-seed0"}
HISTORY, CHECKPOINT = GOLDEN / "history.hdf5", GOLDEN / "checkpoint.pt"
STUDY, TABLE, CURVES = GOLDEN / "small.yaml", GOLDEN / "table.csv", GOLDEN / "curves.csv"
EVALUATED = ("returns", "returns_last", "task_ids", "optimal", "random", "marked")


def described(array: AnyArray) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of an array."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}


def history(path: Path = HISTORY) -> dict[str, Any]:
    file = HistoryFile(path)
    info = file.info
    values: dict[str, Any] = {
        "family": info.family,
        "family_kwargs": info.family_kwargs,
        "spaces": info.spaces,
        "horizon": info.horizon,
        "learner": info.learner,
        "seed": info.seed,
        "split": {name: ids.tolist() for name, ids in vars(file.split).items()},
        "tasks": described(file.tasks),
        "random_return": described(file.random_return),
        "optimal_return": described(np.asarray(file.optimal_return)),
        "reward_scale": float(file.training_scales().reward),
        "marker": {key: (file.marking or {}).get(key) for key in ("marker", "parameters", "seed")},
        "digest": file.digest(),
    }
    for task, of_task in file.load().items():
        arrays = {field.name: getattr(of_task, field.name) for field in fields(History)}
        values[f"task {task}"] = {k: described(v) for k, v in arrays.items() if isinstance(v, np.ndarray)}
    return values


def model(path: Path) -> dict[str, Any]:
    """Weights of a model file, and the first five logits at each step of a made-up context."""
    content = load(path)
    network = MODEL[content["config"]["model"]](architecture(content["config"]))
    network.load_state_dict(content["model_state_dict"])
    draw, size = np.random.default_rng(0), (1, 12)
    states, following = (torch.tensor(draw.integers(0, 9, (*size, 2))) for _ in range(2))
    actions = torch.tensor(draw.integers(0, 5, size))
    rewards = torch.tensor(draw.random(size), dtype=torch.float32)
    ended, mask = (torch.tensor(draw.random(size) < 0.3) for _ in range(2))
    with evaluating(network):
        logits = network(shift(states, actions, rewards, following, ended, mask))[0, :, :5]
    weights = {name: described(value.numpy()) for name, value in content["model_state_dict"].items()}
    return {"step": content["step"], "seed": content["seed"], "weights": weights, "logits": logits.tolist()}


def run(path: Path) -> dict[str, Any]:
    arrays = load_evaluation(path / "evaluation.npz")
    (found,) = [load_runs([path])]
    return {
        "evaluation": {name: described(arrays[name]) for name in EVALUATED},
        "scalars": {name: float(arrays[name]) for name in ("accuracy", "cross_entropy", "step")},
        "final_return": float(mean(final_return(found.curves).ravel())),
        "metrics": load_metrics(path / "metrics.jsonl"),
    }


def study() -> dict[str, Any]:
    return {
        path.name: [
            [row.family, row.variant, row.run, dict(sorted(row.values.items()))] for row in read_rows(path)
        ]
        for path in (TABLE, CURVES)
    }


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {"history": history(), "study": study()}
    for name, path in RUNS.items():
        found[name] = {**run(path), "model": model(path / "best_model.pt")}
    found["checkpoint"] = {key: load(CHECKPOINT)[key] for key in ("step", "seed")}
    return json_value(found)  # type: ignore[no-any-return]
