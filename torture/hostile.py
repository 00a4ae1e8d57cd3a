"""Hostile and absurd input: nothing runs, nothing hangs, nothing is taken for a number."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from compressed_ad.histories import hdf5
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.replay import play
from compressed_ad.training.checkpoints import load, save
from torture.stages import HISTORY, QUICK, READERS, RUNS, Base, Words, laid, sound
from torture.trials import Trial, Verdict, cad

AD, OTHER = RUNS
CANARY = "PWNED"
LIMIT = 30.0


@dataclass(frozen=True)
class Case:
    """``make`` changes files in a folder with two evaluated runs, ``readers`` then read them.

    A reader must refuse what it reads, or give what it gives on sound files. ``commands`` instead of readers
    must refuse. ``fine`` says why something else is right.
    """

    kind: str
    name: str
    make: Callable[[Path], object]
    readers: tuple[str, ...] = ()
    commands: Callable[[Path], list[Words]] = lambda d: []
    fine: str = ""


CASES: list[Case] = []


def trial(base: Base, case: Case) -> Trial:
    right = {reader: sound(base, reader) for reader in case.readers}

    def run(folder: Path) -> list[Verdict]:
        d, verdicts = laid(base, folder / "d"), list[Verdict]()
        case.make(d)
        for reader in case.readers:
            ended = cad(*READERS[reader].words(base, d), cwd=d, limit=LIMIT)
            verdict = ended.verdict()
            if verdict.kind == "accepted":
                gives = json.loads(json.dumps(READERS[reader].gives(d, ended)))
                fine = READERS[reader].fine
                kind = "same" if gives == right[reader] else "fine" if fine else "accepted"
                verdict = Verdict(kind, fine or verdict.detail)
            verdicts.append(_canaries(d, verdict, case, f"cad {reader}"))
        for words in case.commands(d):
            verdict = cad(*words, cwd=d, limit=LIMIT).verdict()
            verdicts.append(_canaries(d, verdict, case, f"cad {words[0]}"))
        page = next(d.rglob("index.html"), None)
        if page is not None and any(tag in page.read_text() for tag in ("<script>alert", "<img src=x")):
            verdicts.append(Verdict("ran code", "the page has foreign HTML"))
        if any(folder.glob("*escape*")):
            verdicts.append(Verdict("escaped", "a file outside --out"))
        return verdicts

    return Trial(f"hostile: {case.kind}", f"{case.kind}: {case.name}", run, limit=8 * LIMIT)


def _canaries(d: Path, verdict: Verdict, case: Case, what: str) -> Verdict:
    if (d / CANARY).exists():
        (d / CANARY).unlink()
        return Verdict("ran code", what)
    if verdict.kind == "accepted" and case.fine:
        return Verdict("fine", case.fine)
    return Verdict(verdict.kind, f"{what}: {verdict.detail}")


# ---------------------------------------------------------------- history files, sealed

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

# ---------------------------------------------------------------- models and run directories


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def model(name: str, make: Callable[[Path], object], fine: str = "") -> None:
    CASES.append(Case("model file", name, make, ("evaluate stored",), fine=fine))


def sealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(d: Path) -> None:
        content = load(d / AD / "best_model.pt")
        change(content)
        save(d / AD / "best_model.pt", content)

    return make


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return sealed(
        lambda c: c["model_state_dict"].update({k: change(v) for k, v in c["model_state_dict"].items()})
    )


def foreign_module(d: Path) -> None:
    (d / AD / "payload.py").write_text(f"open({str(d / CANARY)!r}, 'w')\nclass M: pass\n")
    sealed(lambda c: c["config"].update(model="runs.AD-darkroom-seed0.payload:M"))(d)


def in_it(d: Path) -> None:
    torch.save(
        {"model_state_dict": {}, "config": {}, "step": 1, "seed": 0, "digest": "", "x": Evil(d / CANARY)},
        d / AD / "best_model.pt",
    )


model("a pickle", lambda d: (d / AD / "best_model.pt").write_bytes(pickle.dumps(Evil(d / CANARY))))
model("an object in it", in_it)
model("its model is a module of the run", foreign_module)
model("its model is os:system", sealed(lambda c: c["config"].update(model="os:system")))
model("its model is subprocess:Popen", sealed(lambda c: c["config"].update(model="subprocess:Popen")))
model("its model is unknown", sealed(lambda c: c["config"].update(model="GPT")))
for value in (np.nan, np.inf):
    model(
        f"weights {value}",
        weights(lambda w, value=value: torch.full_like(w, value) if w.is_floating_point() else w),
    )
model(
    "one weight NaN", sealed(lambda c: next(iter(c["model_state_dict"].values())).view(-1)[:1].fill_(np.nan))
)
model("weights of int8", weights(lambda w: (w * 0).to(torch.int8)))
model(
    "weights of float64",
    weights(lambda w: w.double() if w.is_floating_point() else w),
    "the numbers are the same",
)
model("weights of other shapes", sealed(lambda c: c["config"].update(tf_n_embd=32)))
model("weights of other values", weights(lambda w: w.flip(0)), "valid weights: the seal is no signature")
model("weights missing", sealed(lambda c: c["model_state_dict"].popitem()))
for key in ("config", "model_state_dict", "step", "seed"):
    model(f"no {key}", sealed(lambda c, key=key: c.pop(key)), "not used" if key == "seed" else "")
model("step a word", sealed(lambda c: c.update(step="many")))
model("step negative", sealed(lambda c: c.update(step=-4)))
model("context of 10**9 steps", sealed(lambda c: c["config"].update(n_transit=10**9)))
model("width of 10**7", sealed(lambda c: c["config"].update(tf_n_embd=10**7)))
model("config a list", sealed(lambda c: c.update(config=[1])))
model("another model's", lambda d: shutil.copy(d / OTHER / "best_model.pt", d / AD / "best_model.pt"))
model("empty", lambda d: (d / AD / "best_model.pt").write_bytes(b""))
model("a folder", lambda d: ((d / AD / "best_model.pt").unlink(), (d / AD / "best_model.pt").mkdir()))


def config(name: str, old: str, new: str, fine: str = "") -> None:
    def make(d: Path) -> None:
        (d / AD / "payload.py").write_text(
            f"open({str(d / CANARY)!r}, 'w')\n"
            "def f(s, c): return s\nclass F: pass\ndef m(rewards): return rewards\n"
        )
        text = (d / AD / "config.yaml").read_text()
        assert old in text, text
        (d / AD / "config.yaml").write_text(text.replace(old, new, 1))

    CASES.append(Case("run's config.yaml", name, make, ("evaluate stored", "compare", "report"), fine=fine))


PAYLOAD = "runs.AD-darkroom-seed0.payload"
config("transform of a module in the run", "transforms: []", f"transforms: [{{name: '{PAYLOAD}:f'}}]")
config(
    "transform os:system",
    "transforms: []",
    "transforms: [{name: 'os:system', params: {command: 'touch PWNED'}}]",
)
config("model os:system", "model: AD", "model: 'os:system'")
config("model of a module in the run", "model: AD", f"model: '{PAYLOAD}:F'")
config("marker of a module in the run", "marker: threshold", f"marker: '{PAYLOAD}:m'")
config("marker os:system", "  marker: threshold", "  marker: 'os:system'")
config("family os:system", "family: darkroom", "family: 'os:system'")
config("learner os:system", "learner: ppo", "learner: 'os:system'")
config("another model's name", "model: AD", "model: ED")
config("another width", "tf_n_embd: 16", "tf_n_embd: 18")
config("another context", "n_transit: 60", "n_transit: 50")
config("a python tag", "seed: 0", "seed: !!python/object/apply:os.system ['touch PWNED']")
config("an include", "seed: 0", "include: /etc/passwd\nseed: 0")
CASES.append(
    Case(
        "run's config.yaml",
        "empty",
        lambda d: (d / AD / "config.yaml").write_text(""),
        ("evaluate stored", "compare"),
    )
)


def evaluated(name: str, change: Callable[[dict[str, Any], Path], object], fine: str = "") -> None:
    def make(d: Path) -> None:
        with np.load(d / AD / "evaluation.npz") as file:
            arrays = {key: file[key] for key in file.files}
        change(arrays, d)
        np.savez(d / AD / "evaluation.npz", **arrays)

    CASES.append(Case("evaluation.npz", name, make, ("compare", "report"), fine=fine))


evaluated("a pickled object", lambda a, d: a.update(x=np.array([Evil(d / CANARY)], dtype=object)))
for name in ("<script>alert(1)</script>", "$\\frac{$", "[red]"):
    evaluated(
        f"reference called {name}",
        lambda a, d, n=name: a.update({f"reference_{n}": a["returns"]}),
        "shown as it is",
    )
for key in ("returns", "random", "accuracy", "cross_entropy"):
    unknown = "" if key in ("returns", "random") else "NaN means undefined"
    evaluated(f"{key} NaN", lambda a, d, key=key: a.update({key: a[key] * np.nan}), unknown)
    evaluated(f"{key} infinite", lambda a, d, key=key: a.update({key: a[key] + np.inf}))
evaluated(
    "optimal is random", lambda a, d: a.update(optimal=a["random"]), "tasks without a scale do not count"
)
evaluated("optimal below random", lambda a, d: a.update(optimal=a["random"] - 1))
evaluated("returns 1e300", lambda a, d: a.update(returns=a["returns"].astype(float) + 1e300))
evaluated("settings not JSON", lambda a, d: a.update(settings="{"))
evaluated("horizon a word", lambda a, d: a.update(horizon="twenty"))
evaluated("horizon negative", lambda a, d: a.update(horizon=-1))
evaluated("paying a vector", lambda a, d: a.update(paying=np.zeros(3)))
evaluated("marked of three", lambda a, d: a.update(marked=np.zeros(3)))
evaluated("task ids negative", lambda a, d: a.update(task_ids=-a["task_ids"] - 1))
evaluated("task ids twice", lambda a, d: a.update(task_ids=a["task_ids"] * 0))
evaluated("step negative", lambda a, d: a.update(step=-3))
for key in ("returns", "task_ids", "settings", "optimal"):
    missing = "nothing but the settings is unknown then, and that is said" if key == "settings" else ""
    evaluated(f"no {key}", lambda a, d, key=key: a.pop(key), missing)


def metrics(name: str, text: str) -> None:
    def make(d: Path) -> None:
        (d / AD / "metrics.jsonl").write_text(text)

    CASES.append(Case("metrics.jsonl", name, make, ("compare", "report")))


metrics("no step", '{"loss": 1}\n')
metrics("step a word", '{"step": "x", "loss": 1, "validation_return": 0.1}\n')
metrics("return a word", '{"step": 1, "validation_return": "x"}\n')
metrics("NaN", '{"step": 1, "validation_return": NaN, "validation_accuracy": Infinity, "loss": NaN}\n')
metrics("empty", "")
metrics("a list", "[1]\n")
metrics("5,000 deep", "[" * 5000 + "\n")
metrics("a mapping as a value", '{"step": 1, "validation_return": {"a": 1}}\n')

# ---------------------------------------------------------------- YAML


def yaml(name: str, text: str | bytes, *more: str, fine: str = "", **files: str) -> None:
    def make(d: Path) -> None:
        for other, content in {"evil.yaml": text, **{f"{k}.yaml": v for k, v in files.items()}}.items():
            (d / other).write_bytes(content.encode() if isinstance(content, str) else content)

    words: list[Words] = [
        ["collect", "--config", "evil.yaml", option] for option in more or ("--print-config",)
    ]
    CASES.append(Case("YAML", name, make, commands=lambda d: words, fine=fine))


NOTHING = ("--print-config", "--dry-run")
UNTRIED = "nothing is imported, and the command says so"
yaml("a python tag", "seed: !!python/object/apply:os.system ['touch PWNED']\n", *NOTHING)
for name, text in {
    "marker os:system": "marker: {marker: 'os:system', params: {command: 'touch PWNED'}}\n",
    "marker builtins:print": "marker: {marker: 'builtins:print'}\n",
    "family subprocess:run": "env: {family: 'subprocess:run', kwargs: {args: [touch, PWNED]}}\n",
    "family os:system": "env: {family: 'os:system', kwargs: {command: touch PWNED}}\n",
    "learner os:system": "algorithm: {learner: 'os:system', learner_kwargs: {command: touch PWNED}}\n",
}.items():
    yaml(f"{name}, shown", text, *NOTHING, fine=UNTRIED)
    yaml(f"{name}, run", text, "--out=out")
yaml("anchors", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n")
yaml("3,000 mappings deep", "env: {kwargs: " + "{a: " * 3000 + "1" + "}" * 3001 + "\n")
yaml("30,000 lists deep", "env: {kwargs: {a: " + "[" * 30000 + "]" * 30000 + "}}\n")
yaml("60,000 keys in a list", "env: {kwargs: {a: [{" + ", ".join(f"k{i}: 1" for i in range(60000)) + "}]}}\n")
yaml("20,000 keys", "env:\n  kwargs:\n" + "".join(f"    k{i}: 1\n" for i in range(20000)))
yaml("20,000 sections", "".join(f"k{i}: 1\n" for i in range(20000)))
yaml("an integer of 299 digits", "seed: " + "9" * 299 + "\n")
yaml("control characters", 'seed: "\\0"\nenv: {name: "a\\u001bb"}\n')
yaml("includes itself", "include: evil.yaml\n")
yaml("two include each other", "include: other.yaml\n", other="include: evil.yaml\n")
yaml("includes /etc/passwd", "include: ../../../../../../../../etc/passwd\n")
yaml("a section of /etc/shadow", "include: {env: /etc/shadow}\n")
DOUBLE = {f"i{k}": f"include: [i{k + 1}.yaml, i{k + 1}.yaml]\n" for k in range(21)}
yaml("2^22 includes", "include: [i0.yaml, i0.yaml]\n", **DOUBLE, i21="seed: 1\n")
CHAIN = {f"i{k}": f"include: i{k + 1}.yaml\n" for k in range(1500)}
yaml("1,500 includes in a row", "include: i0.yaml\n", **CHAIN, i1500="seed: 1\n")
yaml("UTF-16", "seed: 1\n".encode("utf-16"))
yaml("not UTF-8", b"seed: \xff\xfe\n")
yaml("no mapping", "- 1\n")
yaml("a key twice", "seed: 1\nseed: 2\n")
yaml(
    "a horizon of 10**12",
    "env: {kwargs: {size: 9, horizon: 1000000000000}}\n",
    "--dry-run",
    fine="only checked",
)
yaml("a name that leaves the folder", "env: {name: '../../escape'}\n", "--dry-run")

# ---------------------------------------------------------------- other programs' files


THREE = {"0": 0, "1": 1, "2": 2}


def recorded(
    plays: Mapping[str, int] = THREE, t: int = 40, s: int = 2, optimal: bool = False
) -> Callable[[h5py.File], None]:
    """Fills a file with groups by name, each with a task played at random, or by an optimal policy."""

    def fill(file: h5py.File) -> None:
        family, draw = Darkroom(9, 20), np.random.default_rng(0)
        for name, task in plays.items():
            tasks = np.repeat(family.tasks()[task][None], s, 0)
            actions = draw.integers(0, 5, (s, t))
            if optimal:
                env = family.make(tasks, np.zeros(s, int))
                obs = env.reset()
                for k in range(t):
                    actions[:, k] = family.optimal_action(tasks, obs, np.zeros(s))
                    obs = env.step(actions[:, k]).obs
            played = play(family, tasks, actions, 0)
            group = file.create_group(name)
            arrays = {key: getattr(played, key) for key in ("states", "rewards", "next_states")}
            for key, array in {**arrays, "actions": actions, "dones": played.episode_end}.items():
                group[key] = np.asarray(array).swapaxes(0, 1)

    return fill


def importing(file: str, layout: str) -> Words:
    split = ["--heldout", "2", "--validation", "1"]
    return ["import", file, "--layout", layout, "--family", "darkroom", *split]


def imported(
    name: str, *edits: Edit, names: tuple[str, ...] = ("0", "1", "2"), words: Words = (), fine: str = ""
) -> None:
    def make(d: Path) -> None:
        with h5py.File(d / "foreign.h5", "w") as file:
            recorded({name: k for k, name in enumerate(names)})(file)
            for edit in edits:
                edit(file, d)

    room = ["--env.kwargs", "{size: 9, horizon: 20}", "--source", "X", "--out", "imported"]
    command = [*importing("foreign.h5", "ancestor"), *room, *map(str, words)]
    CASES.append(Case("import", name, make, commands=lambda d: [command], fine=fine))


imported("a good file", fine="it is sound")
for other in ("00", "٣", "-1", "99999999999999999999", "1e0", " 1"):
    imported(f"a fourth group {other!r}", names=("0", "1", "2", other))
imported("hard link: a held-out task is a training task", link("2", "0"))
imported("soft link in a circle", link("0/rewards", h5py.SoftLink("/0/rewards")))
imported("external link", link("0", h5py.ExternalLink("/etc/passwd", "/")))
imported("absurd shape", dataset("0/rewards", shape=(1 << 30, 1 << 20), chunks=(1 << 12, 1), dtype="f4"))
imported(
    "references",
    lambda f, d: put("0/rewards", np.array([f.ref] * 4, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)(f, d),
)
imported("actions of 2^63", put("0/actions", np.full((40, 2), 2**63 + 5, "u8")))
imported("actions 7 of 5", put("0/actions", np.full((40, 2), 7)))
imported("actions are fractions", put("0/actions", np.full((40, 2), 1.5)))
imported("states 300", put("0/states", np.full((40, 2, 2), 300)))
imported("rewards NaN", put("0/rewards", np.full((40, 2), np.nan)))
imported("rewards 1e39", put("0/rewards", np.full((40, 2), 1e39)))
imported("rewards one number", put("0/rewards", 1.0))
for value in (3.0, -np.inf, -0.5):
    imported(
        f"probabilities {value}",
        lambda f, d, v=value: f["0"].__setitem__("action_probs", np.full((40, 2), v)),
    )
imported(
    "nothing in it",
    *(put(f"0/{n}", np.zeros((0, 2))) for n in ("states", "next_states", "actions", "rewards", "dones")),
)
imported("arrays of two lengths", put("0/rewards", np.zeros((39, 2))))
imported("no rewards", lambda f, d: f["0"].__delitem__("rewards"))
for words in (
    ("--source", "../../../escape"),
    ("--heldout", "1,2"),
    ("--heldout", "7"),
    ("--task-ids", "0,0,2"),
    ("--task-ids", "-1,0,2"),
):
    imported(" ".join(words), words=words)


def npz(name: str, make: Callable[[Path], object]) -> None:
    commands: list[Words] = [[*importing("x.npz", "npz"), "--source", "X", "--out", "imported"]]
    CASES.append(Case("import", f"npz: {name}", lambda d: make(d / "x.npz"), commands=lambda d: commands))


COLUMNS = [f"{k}/{name}" for k in range(3) for name in ("states", "actions", "rewards", "next_states")]


def four_tebibytes(path: Path) -> None:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in COLUMNS:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, shape)
                member.write(b"\0" * 1000)


npz(
    "pickled objects",
    lambda p: np.savez(p, **{c: np.array([Evil(p.parent / CANARY)], dtype=object) for c in COLUMNS}),
)
npz("arrays of 4 TiB", four_tebibytes)
npz("no archive", lambda p: p.write_bytes(b"PK\x03\x04nonsense"))

# ---------------------------------------------------------------- names on the command line

for word in ("os:system", "subprocess:run", "builtins:exec", "json:dumps"):
    given = {
        "--marker": ["mark", HISTORY],
        "--learner": ["collect", "--dry-run"],
        "--family": ["collect", "--dry-run"],
    }
    for option, command in given.items():
        words = [*command, option, word]
        fine = UNTRIED if "--dry-run" in words else ""
        CASES.append(
            Case("names given by hand", f"{option} {word}", bool, commands=lambda d, w=words: [w], fine=fine)
        )
for word in ("../../escape", "x" * 300, "a/b"):
    words = ["collect", *QUICK[:10], "--env.name", word, "--dry-run"]
    CASES.append(
        Case("names given by hand", f"--env.name {word[:20]!r}", bool, commands=lambda d, w=words: [w])
    )


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    base("evaluated")
    for number, case in enumerate(CASES):
        readers = case.readers if long else tuple(r for r in case.readers if r not in ("report", "train"))
        if long or (number % 8 == seed % 8) or "os:system" in case.name:
            yield trial(base, Case(case.kind, case.name, case.make, readers, case.commands, case.fine))
