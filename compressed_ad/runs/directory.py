"""Run directories: which configuration they belong to, which process uses them, and where their data is from.

A directory holds ``config.yaml`` (every value spelled out) and ``environment.json`` (a copy of these values,
versions, hardware, the history file). A process that works in it holds an exclusive lock; the operating
system releases it when the process ends, however it ends. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import Field

from compressed_ad.errors import ConfigError, RunDirectoryError
from compressed_ad.files import is_free, locked, write_atomically, write_json
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import differences, installed
from compressed_ad.marking.apply import marker_params
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.registry import own_names
from compressed_ad.runs import yaml_file
from compressed_ad.runs.layers import nested
from compressed_ad.runs.settings import Config
from compressed_ad.settings import Settings, validated
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.workers import THREAD_VARIABLES

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"

ELSEWHERE = ("device", "algorithm.n_process", "algorithm.timeout")
"""Settings that change no result: a run may be continued with others."""
_OF_THE_FILE = ("path", "sha256", "marked_at")
"""Parts of a provenance that do not determine a history file's content."""


def run_name(model: str, env: str, seed: int) -> str:
    return f"{model.replace(':', '_')}-{env}-seed{seed}"


@contextmanager
def claimed(
    path: Path, config: Config, *, keys: Sequence[str] = (), history: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Create the directory ``path`` for a run of ``config`` if it does not exist, and hold its lock.

    ``RunDirectoryError`` if another process holds the lock, or for what ``check`` refuses. Nothing is
    overwritten. A run that fails before anything else is written leaves the directory free.
    """
    check(path, config, keys=keys, history=history)
    with locked(path):
        check(path, config, keys=keys, history=history)
        new = not (path / CONFIG).exists()
        if new:
            facts = {**environment(), "config": config.model_dump(mode="json")}
            facts |= {} if history is None else {"history": history}
            write_json(path / ENVIRONMENT, facts, error=RunDirectoryError)
            write_atomically(path / CONFIG, yaml_file.dump(config).encode(), error=RunDirectoryError)
        try:
            yield
        except BaseException:
            others = _others(path)
            kept = [o for o in others if not o.is_file() or (o.stat().st_size and "tfevents" not in o.name)]
            if new and not kept:
                for file in (path / CONFIG, path / ENVIRONMENT, *others):
                    file.unlink()
            raise


def _others(path: Path) -> list[Path]:
    """What a directory holds beside the files that ``claimed`` writes, and hidden ones."""
    return sorted(p for p in path.iterdir() if p.name not in (CONFIG, ENVIRONMENT) and p.name[0] != ".")


def check(
    path: Path, config: Config, *, keys: Sequence[str] = (), history: Mapping[str, Any] | None = None
) -> None:
    """Raise ``RunDirectoryError`` unless ``path`` is free, or belongs to this ``config`` and ``history``.

    Compared are the dotted ``keys``, or all keys but ``ELSEWHERE`` if there are none, and ``history``, the
    provenance of the data.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: is a file; choose another output folder")
    if not is_free(path, CONFIG, parts=[ENVIRONMENT]):
        strange = min(p.name for p in path.iterdir() if p.name[0] != ".")
        raise RunDirectoryError(
            f"{path}: is not a run directory (it has {strange}, but no {CONFIG});"
            " choose another output folder"
        )
    if not (path / CONFIG).exists():
        return
    stored, wanted = _stored_values(path), config.model_dump(mode="json")
    differing = differences(_compared(stored, keys), _compared(wanted, keys))
    if history is not None:
        differing += other_data(stored_provenance(path), history)
    if differing:
        raise RunDirectoryError(
            f"{path}: belongs to another configuration and is left alone ({'; '.join(differing)});"
            " choose another output folder"
        )


def content_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that determines what the histories are, wherever the file lies."""
    return {key: value for key, value in provenance.items() if key not in _OF_THE_FILE}


def other_data(known: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where two provenances name other data, as far as an earlier version stored it."""
    # The meaning follows from family and kwargs, which are there.
    wanted = {key: value for key, value in content_of(given).items() if key != "meaning"}
    found = differences(known, wanted, "history", shared=bool(known))
    marker, file = given.get("marker"), given.get("sha256")
    if own_names(marker) and known.get("marker") == marker and known.get("sha256", file) != file:
        found.append(f"history: it was marked anew by {marker}, whose code may be another now")
    return found


def _compared(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The values of ``keys``, or of all keys but ``ELSEWHERE``, by dotted key down to the second level."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            flat[name] = value
    if not keys:
        return {key: value for key, value in flat.items() if key not in ELSEWHERE}
    return {k: v for k, v in flat.items() if any(k == key or k.startswith(f"{key}.") for key in keys)}


def stored_config(path: Path) -> Config:
    """The configuration in a run directory; ``RunDirectoryError`` if it cannot be read."""
    try:
        return validated(Config, _stored_values(path), str(path / CONFIG))
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from error


def runs_inside(path: Path) -> str:
    """The run directories in the folder ``path``, a few of them, with commas; empty if there is none."""
    inside = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
    return ", ".join([*inside[:4], *["..."][: len(inside) > 4]])


def _stored_values(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file, not a run directory" if path.exists() else "no such run directory"
        raise RunDirectoryError(f"{path}: {what}")
    if not (path / CONFIG).is_file():
        more = f"; runs lie in it: {inside}" if (inside := runs_inside(path)) else ""
        raise RunDirectoryError(f"{path}: is not a run directory (no {CONFIG}){more}")
    try:
        found = nested(yaml_file.read(path / CONFIG))
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from error
    copy = stored_environment(path).get("config") if (path / ENVIRONMENT).exists() else None
    if isinstance(copy, dict) and (differing := differences(_compared(copy, ()), _compared(found, ()))):
        raise RunDirectoryError(
            f"{path / CONFIG}: was changed since the run was made ({'; '.join(differing[:3])}); undo that,"
            " and give other settings on the command line"
        )
    return found


class _Rows(Settings):
    train: list[list[float]]
    validation: list[list[float]]
    heldout: list[list[float]]


class _Provenance(Settings, extra="allow"):
    path: str | None = None
    rows: _Rows | None = None
    meaning: dict[str, Any] = Field(default_factory=dict)
    marker: str | None = None


class _Environment(Settings, extra="allow"):
    """The entries of ``environment.json`` that are used one by one; earlier versions lack some of them."""

    config: dict[str, Any] | None = None
    history: _Provenance | None = None


def stored_environment(path: Path) -> dict[str, Any]:
    file = path / ENVIRONMENT
    try:
        found: dict[str, Any] = {**json.loads(file.read_text("utf-8"))}
        validated(_Environment, found, str(file))
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunDirectoryError(f"{file}: cannot be read ({error})") from error
    return found


def stored_provenance(path: Path) -> dict[str, Any]:
    """The ``history_provenance`` of the run in ``path``; empty if it stores none."""
    return stored_environment(path).get("history") or {}


def history_provenance(
    file: HistoryFile, marks: MarkerSettings | None = None, family: TaskFamily | None = None
) -> dict[str, Any]:
    """How the histories that a run is trained on were collected, split and marked.

    ``rows`` are the tasks themselves, as rows of parameters by part of the split. ``family``, the task family
    of ``file``, tells what it is however it is spelled. The run sees the marks of the file, or those that
    ``marks`` make when the histories are read.
    """
    info, marking = file.info, file.marking or {}
    if marks is not None:
        marking = {"marker": marks.marker, "parameters": marker_params(marks), "seed": info.seed}
    found = {
        "path": str(file.path.resolve()),
        "sha256": file.digest(),
        "marked_at": marking.get("time"),
        "family": info.family,
        "family_kwargs": dict(info.family_kwargs),
        "learner": info.learner,
        "config": info.config,
        "seed": info.seed,
        "split": {name: ids.tolist() for name, ids in vars(file.split).items()},
        "rows": {name: file.tasks[ids].tolist() for name, ids in vars(file.split).items()},
        "marker": marking.get("marker"),
        "marker_parameters": marking.get("parameters"),
        "marker_seed": marking.get("seed"),
    }
    found |= {} if family is None else {"meaning": family_meaning(family, info.family_kwargs)}
    return cast(dict[str, Any], json.loads(json.dumps(found)))  # as it is stored, without tuples


def family_meaning(family: TaskFamily, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Class and parameters of ``family`` with its defaults, so that two spellings of one family are equal.

    Left out are ``n_task``, as how many tasks a family draws does not change what a task is, and the module.
    """
    kind = type(family)
    declared = inspect.signature(kind).parameters
    values = {name: p.default for name, p in declared.items() if p.default is not p.empty} | dict(kwargs)
    values |= {name: getattr(family, name) for name in declared if hasattr(family, name)}
    plain: dict[str, Any] = {"class": kind.__qualname__}
    for name in values.keys() - {"n_task"}:
        with suppress(TypeError, ValueError):  # what is not plain data has another text in every process
            plain[name] = json.loads(json.dumps(values[name]))
    return plain


# ---------------------------------------------------------------- environment

EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "metaworld": ("Meta-World's ML1 as task families, metaworld:reach-v3.", ("metaworld",)),
    "minari": ("Export of histories as Minari datasets.", ("minari",)),
    "minigrid": ("MiniGrid's layouts as task families, minigrid:MiniGrid-FourRooms-v0.", ("minigrid",)),
    "pandas": ("Results as data frames, to_pandas().", ("pandas",)),
    "ray": ("Collection, training and studies on a Ray cluster.", ("ray",)),
    "sb3": ("Algorithms of Stable-Baselines3 as source learners.", ("stable_baselines3", "sb3_contrib")),
    "tensorboard": ("Training curves in TensorBoard.", ("tensorboard",)),
    "xland": (
        "XLand-MiniGrid's rulesets as task families, xland:XLand-MiniGrid-R1-9x9.",
        ("xminigrid", "jax"),
    ),
}
"""What each optional dependency is for, and its modules."""


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    names = "compressed-ad torch numpy scipy numba h5py gymnasium pydantic matplotlib"
    return {"python": platform.python_version(), **installed(names.split())}


KERNELS = {
    "ppo": "learners/ppo/kernels.py",
    "rmax": "learners/finite_kernels.py",
    "tabular": "learners/finite_kernels.py",
    "thompson": "tasks/bandit_kernels.py",
    "training": "models/training_kernels.py",
    "playing": "models/playing_kernels.py",
}
"""Files of compiled functions, by what needs them: a source learner, or models."""


def is_compiled(file: str) -> bool:
    """Whether the functions in ``file``, one of ``KERNELS``, were compiled since it was last changed."""
    source = Path(__file__).parents[1] / file
    cache = Path(os.environ.get("NUMBA_CACHE_DIR", source.parent / "__pycache__"))
    changed = source.stat().st_mtime
    return any(index.stat().st_mtime > changed for index in cache.rglob(f"{source.stem}.*.nbi"))


def packages() -> dict[str, str]:
    """All installed packages with their versions, as ``pip freeze`` names them."""
    found = {one.metadata["Name"]: one.version for one in metadata.distributions() if one.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def extras() -> dict[str, bool]:
    """Whether each optional dependency is installed."""
    return {name: all(map(importlib.util.find_spec, modules)) for name, (_, modules) in EXTRAS.items()}


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB (None where it is unknown)."""
    processor, memory = platform.processor() or platform.machine(), None
    with suppress(OSError):
        named = re.search(r"^model name\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = named[1].strip() if named else processor
    with suppress(ValueError, OSError, AttributeError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {"processor": processor, "vectors": vectors(), "cores": cores(), "memory_gib": memory}


def vectors() -> str:
    """The widest vector instructions that NumPy finds, on which the last digits of models depend."""
    known = (np.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    found = [*known.get("baseline", ()), *known.get("found", ())]
    for level, names in (("AVX-512", r"X86_V4|AVX512"), ("AVX2", r"X86_V3|AVX2")):
        if any(re.match(names, name) for name in found):
            return level
    return found[-1] if found else "unknown"


def numerics() -> dict[str, str]:
    """The linear algebra of NumPy and, once it is loaded, torch, and how many threads they may use."""
    blas = (np.show_config(mode="dicts") or {}).get("Build Dependencies", {}).get("blas", {})
    facts = {"numpy_blas": f"{blas.get('name')} {blas.get('version')}" if blas else "unknown"}
    if torch := sys.modules.get("torch"):
        built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        facts["torch_blas"] = built[1] if built else "unknown"
        facts["torch_threads"] = str(torch.get_num_threads())
    return facts | {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def revision() -> str | None:
    """Git revision of the code, with "+" if files were changed since; None outside a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """What a result may depend on besides its configuration."""
    return {
        "versions": versions(),
        "revision": revision(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "numerics": numerics(),
        "packages": packages(),
        "command": " ".join(sys.argv[1:]),
    }
