"""What "the same" means: everything final in a folder, by content, without times and names of folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

Contents = dict[str, dict[str, Any]]


def digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def history(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        for key, value in item.attrs.items():
            if key not in ("marked_at", "versions"):
                found[f"{name}@{key}"] = value if isinstance(value, str) else digest(value)
        if isinstance(item, h5py.Dataset):
            found[name] = digest(item[()])

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return found


def weights(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    found = {name: digest(value.numpy()) for name, value in content["model_state_dict"].items()}
    return {**found, **{name: content[name] for name in ("step", "seed", "config")}}


def evaluation(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: digest(file[name]) for name in file.files if file[name].dtype.kind in "fiub"}


def metrics(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    told = [{k: v for k, v in row.items() if k == "step" or k.startswith(("valid", "loss"))} for row in rows]
    return {f"row {number}": row for number, row in enumerate(told) if row}


def summary(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}


def table(path: Path) -> dict[str, Any]:
    head, *lines = [line.split(",") for line in path.read_text().splitlines() if not line.startswith("#")]
    kept = [place for place, name in enumerate(head) if name not in ("seconds", "parameters", "check")]
    return {f"line {number}": [line[k] for k in kept] for number, line in enumerate([head, *lines])}


READ: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "*.hdf5": history,
    "best_model.pt": weights,
    "last_model.pt": weights,
    "evaluation*.npz": evaluation,
    "metrics.jsonl": metrics,
    "summary.json": summary,
    "*.csv": table,
    "config.yaml": lambda path: {"text": path.read_text()},
}
"""How files are read, by pattern; others say nothing."""


def contents(folder: Path) -> Contents:
    found: Contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        reader = next((read for pattern, read in READ.items() if path.match(pattern)), None)
        if reader is not None and path.is_file() and ".shards/" not in name:
            try:
                found[name] = reader(path)
            except Exception as error:  # a file that cannot be read differs from one that can
                found[name] = {"unreadable": f"{type(error).__name__}: {error}"}
    return found


def differences(wanted: Contents, got: Contents) -> list[str]:
    """What is missing, additional or different, by file and key."""
    found = [f"{name}: missing" for name in sorted(set(wanted) - set(got))]
    found += [f"{name}: additional" for name in sorted(set(got) - set(wanted))]
    for name in sorted(set(wanted) & set(got)):
        a, b = wanted[name], got[name]
        keys = [key for key in sorted(set(a) | set(b)) if a.get(key) != b.get(key)]
        if keys:
            found.append(f"{name}: differs in {', '.join(keys[:4])}")
    return found


def said(text: str) -> str:
    """What a command printed, without times, paths, digests and progress."""
    text = re.sub(r"/\S*/", "", text)
    text = re.sub(r"\b[0-9a-f]{40,64}\b", "", text)
    return re.sub(r"^(\w+ +(\d+ %|done in).*|note: .*)$", "", text, flags=re.M).strip()
