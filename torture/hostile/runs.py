"""Model files and run directories with foreign or absurd content."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressed_ad.training.checkpoints import load, save
from torture.hostile.case import CANARY, CASES, Case, Evil
from torture.stages import RUNS

AD, OTHER = RUNS


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
