"""Run directories: whose they are, who works in them, and what they were made with.

A directory holds ``config.yaml`` (every value spelled out) and ``environment.json`` (versions, hardware, the
history file). Whoever works in it holds an exclusive lock that the operating system drops when the process
ends, however it ends. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from compressed_ad.errors import ConfigError, RunDirectoryError
from compressed_ad.files import locked as locked, write_atomically
from compressed_ad.histories.file import HistoryFile
from compressed_ad.runs import yaml_file
from compressed_ad.runs.config_text import differences, dump
from compressed_ad.runs.layers import nested
from compressed_ad.runs.settings import Config
from compressed_ad.settings import validated

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"

ELSEWHERE = ("device", "algorithm.n_process")
"""Settings that say where and how fast, not what: a run may be continued with others."""


def run_name(model: str, env: str, seed: int) -> str:
    """``<Model>-<env>-seed<k>``."""
    return f"{model.replace(':', '_')}-{env}-seed{seed}"


@contextmanager
def claimed(
    path: Path, config: Config, *, keys: Sequence[str] = (), history: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hold the directory ``path`` for a run of ``config``, made if it is not there.

    ``RunDirectoryError`` if another process holds it, if it holds something else, or if it belongs to
    another configuration: if one of the dotted ``keys`` differs (all keys but ``ELSEWHERE`` if there are
    none), or ``history``, the provenance of the data. Nothing is overwritten.
    """
    check(path, config, keys=keys, history=history)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        check(path, config, keys=keys, history=history)
        if not (path / CONFIG).exists():
            facts = {**environment(), **({} if history is None else {"history": history})}
            write_atomically(
                path / ENVIRONMENT, json.dumps(facts, indent=2).encode() + b"\n", error=RunDirectoryError
            )
            write_atomically(path / CONFIG, dump(config).encode(), error=RunDirectoryError)
        yield


def check(
    path: Path, config: Config, *, keys: Sequence[str] = (), history: Mapping[str, Any] | None = None
) -> None:
    """Raise ``RunDirectoryError`` unless ``path`` is free or belongs to this ``config`` and ``history``."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: is a file; choose another output folder")
    if not (path / CONFIG).exists():
        strange = sorted(n for n in (p.name for p in path.iterdir()) if n != ENVIRONMENT and n[0] != ".")
        if strange:
            raise RunDirectoryError(
                f"{path}: is not a run directory (it has {strange[0]}, but no {CONFIG});"
                " choose another output folder"
            )
        return
    stored, wanted = stored_values(path), config.model_dump(mode="json")
    differing = differences(_chosen(stored, keys), _chosen(wanted, keys))
    if history is not None:
        differing += differences(
            _data(stored_environment(path).get("history", {})), _data(history), "history"
        )
    if differing:
        raise RunDirectoryError(
            f"{path}: belongs to another configuration and is left alone ({'; '.join(differing)});"
            " choose another output folder"
        )


def _chosen(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Only ``keys``, or all but ``ELSEWHERE``, as flat dotted keys down to the second level."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            flat[name] = value
    if not keys:
        return {key: value for key, value in flat.items() if key not in ELSEWHERE}
    return {k: v for k, v in flat.items() if any(k == key or k.startswith(f"{key}.") for key in keys)}


def _data(history: Mapping[str, Any]) -> dict[str, Any]:
    """What of a history file's provenance decides its content."""
    return {key: value for key, value in history.items() if key not in ("path", "sha256", "marked_at")}


def stored_values(path: Path) -> dict[str, Any]:
    """The values in the ``config.yaml`` of a run directory; ``RunDirectoryError`` if they cannot be read."""
    if not (path / CONFIG).is_file():
        raise RunDirectoryError(f"{path}: is not a run directory (no {CONFIG})")
    try:
        return nested(yaml_file.read(path / CONFIG))
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from error


def stored_config(path: Path) -> Config:
    """The configuration of a run directory."""
    try:
        return validated(Config, stored_values(path), str(path / CONFIG))
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from error


def stored_environment(path: Path) -> dict[str, Any]:
    """``environment.json`` of a run directory."""
    file = path / ENVIRONMENT
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise RunDirectoryError(f"{file}: not a JSON object")
    return found


def history_provenance(file: HistoryFile) -> dict[str, Any]:
    """Which data a run is made from: what was collected, how it is split and marked."""
    info, marking = file.info, file.marking or {}
    return {
        "path": str(file.path.resolve()),
        "sha256": file.digest(),
        "marked_at": marking.get("time"),
        "family": info.family,
        "family_kwargs": dict(info.family_kwargs),
        "learner": info.learner,
        "config": _json(info.config),
        "seed": info.seed,
        "split": {name: ids.tolist() for name, ids in vars(file.split).items()},
        "marker": marking.get("marker"),
        "marker_parameters": _json(marking.get("parameters")),
        "marker_seed": marking.get("seed"),
    }


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------- environment

PACKAGES = ("torch", "numpy", "scipy", "numba", "h5py", "gymnasium", "pydantic", "matplotlib")
EXTRAS = {
    "sb3": ("stable_baselines3", "sb3_contrib"),
    "tensorboard": ("tensorboard",),
    "ray": ("ray",),
    "minari": ("minari",),
    "minigrid": ("minigrid",),
    "metaworld": ("metaworld",),
    "xland": ("xminigrid", "jax"),
}


def versions(packages: Sequence[str] = ("compressed-ad", *PACKAGES)) -> dict[str, str]:
    """Installed versions; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def extras() -> dict[str, bool]:
    """Which optional dependencies are installed."""
    return {name: all(importlib.util.find_spec(m) for m in modules) for name, modules in EXTRAS.items()}


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory."""
    return {"processor": _processor(), "cores": cores(), "memory_gib": _memory()}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def revision() -> str | None:
    """Git revision of the code, with "+" if it was changed since; None outside a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """What a result may depend on besides its configuration."""
    return {
        "versions": versions(),
        "revision": revision(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "command": " ".join(sys.argv[1:]),
    }
