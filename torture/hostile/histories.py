"""Sealed history files with foreign or absurd content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from compressed_ad.histories import hdf5
from torture.hostile.case import CANARY, CASES, Case
from torture.stages import HISTORY

READ = ("inspect", "mark", "train", "evaluate")
Edit = Callable[[h5py.File, Path], object]


def reseal(path: Path, edit: Callable[[h5py.File], object]) -> None:
    """Changes a history file as somebody would who knows the format: the seal is no signature."""
    with h5py.File(path, "r+") as file:
        edit(file)
    data = path.read_bytes()[512:]
    path.write_bytes(hdf5._block(hashlib.sha256(data).hexdigest()) + data)


def history(name: str, edit: Edit, readers: tuple[str, ...] = READ, fine: str = "") -> None:
    def make(d: Path) -> None:
        reseal(d / HISTORY, lambda file: edit(file, d))

    CASES.append(Case("history", name, make, readers, fine=fine))


def put(name: str, value: Any, **more: Any) -> Edit:
    """Replaces a dataset; ``name`` may begin with a part of the split, which means its first task."""

    def edit(file: h5py.File, d: Path) -> None:
        first, _, rest = name.partition("/")
        where = f"{file[f'split/{first}'][0]}/{rest}" if first in ("train", "heldout") else name
        del file[where]
        file.create_dataset(where, data=value, **more)

    return edit


def everywhere(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(file: h5py.File, d: Path) -> None:
        for task in (key for key in file if key.isdecimal()):
            put(f"{task}/{name}", change(file[f"{task}/{name}"][()]))(file, d)

    return edit


def attributes(**values: Any) -> Edit:
    return lambda file, d: file.attrs.update(values)


def says(name: str, old: str, new: str) -> Edit:
    return lambda file, d: file.attrs.update({name: file.attrs[name].replace(old, new)})


def dataset(name: str, **options: Any) -> Edit:
    def edit(file: h5py.File, d: Path) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return edit


def link(name: str, to: Any) -> Edit:
    def edit(file: h5py.File, d: Path) -> None:
        target = file[to] if isinstance(to, str) else to
        del file[name]
        file[name] = target

    return edit


def calls(family: str, **kwargs: str) -> Edit:
    """A family that is somebody's function; {} in its arguments is the canary."""

    def edit(file: h5py.File, d: Path) -> None:
        filled = {key: value.replace("{}", str(d / CANARY)) for key, value in kwargs.items()}
        file.attrs.update({"family": family, "family_kwargs": json.dumps(filled)})

    return edit


def beside(file: h5py.File, d: Path) -> None:
    (d / "payload.py").write_text(f"open({str(d / CANARY)!r}, 'w')\n")
    file.attrs.update({"family": "payload:X", "family_kwargs": "{}"})


history("family os:system", calls("os:system", command="touch {}"))
history("family subprocess:run", calls("subprocess:run", args="touch {}"))
history("family subprocess:getoutput", calls("subprocess:getoutput", cmd="touch {}"))
history("family builtins:exec", calls("builtins:exec", source="open('{}', 'w')"))
history("family builtins:open", calls("builtins:open", file="{}", mode="w"))
history("family pathlib:Path.touch", calls("pathlib:Path.touch", self="{}"))
history("family of a module beside it", beside)
history("family in a package of ours", attributes(family="compressed_ad.files:write_json"))
history("marker os:system", attributes(marker="os:system"), fine="the marker's name is only shown")

ROWS = (2, 200)
history(
    "absurd shape",
    dataset("0/rewards", shape=(1 << 20, 1 << 24), chunks=(1, 1 << 12), dtype="f4", compression="gzip"),
)
history("no streams", lambda f, d: [everywhere(n, lambda a: a[:0])(f, d) for n in list(f["0"])])
history(
    "no steps", lambda f, d: [everywhere(n, lambda a: a[:, :0])(f, d) for n in list(f["0"]) if n != "learner"]
)
history("external link", link("0/rewards", h5py.ExternalLink("/etc/passwd", "/x")))
history("soft link in a circle", link("0/rewards", h5py.SoftLink("/0/rewards")))
history("soft link to a group", link("1", h5py.SoftLink("/0")))
history("hard link: task 1 is task 0", link("1", "0"))
history(
    "hard link: a held-out task's group",
    lambda f, d: link(str(f["split/train"][0]), str(f["split/heldout"][0]))(f, d),
)
history("rewards are words", put("0/rewards", np.array(["a"] * 4, dtype=object), dtype=h5py.string_dtype()))
history("rewards are records", put("0/rewards", np.zeros(ROWS, [("a", "f4"), ("b", "f4")])))
history("rewards are complex", put("0/rewards", np.zeros(ROWS, "c8")))
history(
    "rewards in half precision",
    put("train/rewards", np.ones(ROWS, "f2")),
    fine="the numbers are those of the file",
)
history("rewards of 1e300", put("train/rewards", np.full(ROWS, 1e300)))
history("rewards of 3e38", put("train/rewards", np.full(ROWS, 3e38, "f4")))
for part in ("train", "heldout"):
    history(f"NaN reward ({part})", put(f"{part}/rewards", np.full(ROWS, np.nan, "f4")))
    history(f"infinite reward ({part})", put(f"{part}/rewards", np.full(ROWS, np.inf, "f4")))
for value in (2, -1, np.inf, np.nan):
    seen = "NaN means unknown" if np.isnan(value) else ""
    history(f"probabilities {value}", put("train/action_probs", np.full(ROWS, value, "f4")), fine=seen)
history("entropy NaN", everywhere("entropy", lambda a: a * np.nan), fine="NaN means unknown")
history("actions of 200", put("train/actions", np.full(ROWS, 200, "u1")))
history("actions of -1", put("train/actions", np.full(ROWS, -1, "i1")))
history("actions are fractions", put("train/actions", np.full(ROWS, 1.5, "f4")))
history("actions of another shape", put("train/actions", np.zeros((2, 200, 3), "u1")))
history("states out of range", put("train/states", np.full((*ROWS, 2), 250, "u1")))
history("next states out of range", put("train/next_states", np.full((*ROWS, 2), 250, "u1")))
history("states of another shape", put("train/states", np.zeros((*ROWS, 5), "u1")))
history("terminated is a number", everywhere("terminated", lambda a: a.astype("f4") * 0.5))
history("update negative", everywhere("update", lambda a: a * 0 - 5))
history("learner negative and huge", everywhere("learner", lambda a: np.array([-3, 2**31 - 1], "i4")))
history("mask of sevens", everywhere("compression_mask", lambda a: a.astype("i4") * 7))
history("mask of another shape", everywhere("compression_mask", lambda a: a[:, :5]))
history("a group is missing", lambda f, d: f.__delitem__("3"))
history("an array is missing", lambda f, d: f["3"].__delitem__("next_states"))
history(
    "a task is shorter",
    lambda f, d: [put(f"3/{n}", f[f"3/{n}"][:, :77])(f, d) for n in list(f["3"]) if n != "learner"],
)
history("a group of a task beyond", lambda f, d: f.copy("0", "77"))
history(
    "split overlaps",
    lambda f, d: put("split/heldout", np.array([*f["split/heldout"], f["split/train"][0]]))(f, d),
)
history("split twice", lambda f, d: put("split/train", np.repeat(f["split/train"][()], 2))(f, d))
for name, ids in {
    "negative": [-1, 3],
    "beyond": [99],
    "fractions": [1.5],
    "rows": [[7], [9]],
    "empty": [],
}.items():
    fine = "" if ids else "a file need not hold tasks out: only cad evaluate and what follows refuse it"
    array = np.array(ids, "f8" if name == "fractions" else "i8")
    history(f"held-out {name}", put("split/heldout", array), fine=fine)
history("training part is empty", put("split/train", np.array([], "i8")))
history(
    "validation is one number", lambda f, d: put("split/validation", np.int64(f["split/validation"][0]))(f, d)
)
history("equal tasks", lambda f, d: put("tasks", np.repeat(f["tasks"][:1], len(f["tasks"]), 0))(f, d))
history("tasks NaN", lambda f, d: put("tasks", np.full(f["tasks"].shape, np.nan))(f, d))
history("tasks outside of the room", lambda f, d: put("tasks", f["tasks"][()] + 90)(f, d))
history("tasks of one column", lambda f, d: put("tasks", f["tasks"][:, 0])(f, d))
history("tasks of nine columns", lambda f, d: put("tasks", np.arange(90).reshape(10, 9))(f, d))
for value in (0, -3, 10**9, 2**62):
    history(f"horizon {value}", attributes(horizon=value))
history("horizon a word", attributes(horizon="long"))
history("seed negative", attributes(seed=-1))
history("format version 99", attributes(format_version=99))
for n in (-5, 0, 10**12):
    history(f"{n} actions", says("spaces", '"n": 5', f'"n": {n}'))
history(
    "spaces of an unknown kind", attributes(spaces='{"observation": {"kind": "x"}, "action": {"kind": "y"}}')
)
history("spaces are no mappings", attributes(spaces='{"observation": 3, "action": []}'))
BOX = '{"kind": "box", "low": 0, "high": 1, "shape": [1000000, 1000000], "dtype": "float32"}'
history(
    "a box of absurd shape",
    attributes(spaces=f'{{"observation": {BOX}, "action": {{"kind": "discrete", "n": 5}}}}'),
)
for value in (0.0, np.nan, np.inf, -1.0, 1e-30, 7.5):
    history(f"reward scale {value}", put("scales/reward", value))
history("reward scale a vector", put("scales/reward", np.ones(3)))
for name, change in {
    "random return NaN": ("random_return", lambda a, f: a * np.nan),
    "random return infinite": ("random_return", lambda a, f: a + np.inf),
    "optimal return is random": ("optimal_return", lambda a, f: f["random_return"][()]),
    "optimal return below random": ("optimal_return", lambda a, f: f["random_return"][()] - 1),
    "optimal return infinite": ("optimal_return", lambda a, f: a + np.inf),
    "optimal return of one task": ("optimal_return", lambda a, f: a[:1]),
}.items():  # fmt: skip
    fine = "tasks without a scale do not count, and are told" if name == "optimal return is random" else ""
    history(name, lambda f, d, c=change: put(c[0], c[1](f[c[0]][()], f))(f, d), fine=fine)
history("parameters of the marker not JSON", attributes(marker_parameters="{"))
history("JSON 30,000 deep", attributes(config='{"a":' + "[" * 30000 + "]" * 30000 + "}"))
history("JSON with NaN", attributes(config='{"a": NaN, "b": Infinity}'))
history("arguments of the family unknown", attributes(family_kwargs='{"colour": "red"}'))
history("arguments of the family a list", attributes(family_kwargs="[1]"))
history("size of the room 10**9", attributes(family_kwargs='{"size": 1000000000, "horizon": 20}'))
history("family of 60,000 letters", attributes(family="x" * 60000))
for name in ("<script>alert(1)</script>", "$\\frac{$ a_b^c$", "[red]x[/red]", "a\nb\x1b[31m", "../../escape"):
    history(
        f"learner called {name!r}", attributes(learner=name), ("inspect", "report"), "a name is only shown"
    )
