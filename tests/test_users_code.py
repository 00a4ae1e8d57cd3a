"""What code of users raises is one line that names the object, the task, the step, and the user's line."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressed_ad.cli.main import main
from compressed_ad.errors import RunError, UsageError, users_code
from compressed_ad.histories.collector import collect
from compressed_ad.histories.file import HistoryFile
from compressed_ad.learners.scripted import NoiseDistillation
from compressed_ad.marking.apply import apply_marker
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.transforms import TRANSFORM, apply_transforms
from compressed_ad.types import History
from compressed_ad.workers import WorkerPool
from tests import jobs

SMALL = [
    "--preset", "smoke", "--algorithm.learner", "noise", "--algorithm.learner_kwargs", "{}",
    "--algorithm.n_stream", "2", "--algorithm.n_timesteps", "40", "--algorithm.n_process", "1",
    "--env.n_task", "4", "--env.validation", "1", "--env.heldout", "1", "--marker", "all",
]  # fmt: skip

OWN = """
import sys
from compressed_ad.learners.scripted import NoiseDistillation
from compressed_ad.tasks.gridworld import Darkroom

HOW = {
    "words": lambda: (_ for _ in ()).throw(ValueError("the simulator\\ncrashed")),
    "exit": lambda: sys.exit(3),
    "exit words": lambda: sys.exit("words"),
    "exit 0": lambda: sys.exit(0),
    "stop": lambda: next(iter([])),
    "memory": lambda: (_ for _ in ()).throw(MemoryError),
}

def fail(here):
    if "HERE" == here:
        HOW["HOW"]()  # the line

class Env:
    def __init__(self, inner):
        self.inner, self.num_envs, self.n = inner, inner.num_envs, 0
    def reset(self):
        fail("reset")
        return self.inner.reset()
    def step(self, actions):
        self.n += 1
        if self.n == 7:
            fail("step")
        return self.inner.step(actions)

class Family(Darkroom):
    def __init__(self, size=3, horizon=5):
        fail("family")
        super().__init__(size, horizon)
    def tasks(self):
        fail("tasks")
        return super().tasks()
    def make(self, tasks, seeds):
        fail("make")
        return Env(super().make(tasks, seeds))
    def random_return(self, tasks):
        fail("random_return")
        return super().random_return(tasks)

class Learner(NoiseDistillation):
    name = "Mine"
    def learn(self, *args, **kwargs):
        fail("learn")
        return super().learn(*args, **kwargs)

def marker(action_probs):
    if action_probs.shape[1] == 40:
        fail("marker")
    return action_probs > 2
"""

PLACES = {
    "family": "task family 'own:Family' cannot be made: {}",
    "tasks": "task family 'own:Family': {}",
    "random_return": "task family 'own:Family': {}",
    "make": "task family 'own:Family', tasks {tasks}: it cannot be made: {}",
    "reset": "task family 'own:Family', tasks {tasks}, step 0, reset: {}",
    "step": "task family 'own:Family', tasks {tasks}, step 7: {}",
    "learn": "learner 'Mine', tasks [0, 1, 2, 3]: {}",
    "marker": "task 0: marker 'own:marker': {}",
}
WORDS = {
    "words": "the simulator crashed (ValueError in own.py:{})",
    "exit": "it calls sys.exit(3) (in own.py:{})",
    "exit words": "it calls sys.exit('words') (in own.py:{})",
    "exit 0": "it calls sys.exit(0) (in own.py:{})",
    "stop": "StopIteration in own.py:{}",
    "memory": "not enough memory (MemoryError in own.py:{})",
}


@pytest.fixture(scope="module")
def history() -> History:
    family, sizes = Darkroom(3, 5), {"n_timesteps": 10, "n_learner": 1, "n_stream": 1}
    return NoiseDistillation().learn(family, np.arange(1), family.tasks()[:1], seed=0, **sizes)[0]


@pytest.fixture
def own(tmp_path, monkeypatch, capsys):
    """Run ``cad`` where ``own.py`` fails at a place in some way: (exit code, lines of the standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(here: str, how: str, *words: object) -> tuple[int, list[str]]:
        monkeypatch.delitem(sys.modules, "own", raising=False)
        source = OWN.replace("HERE", here).replace('HOW["HOW"]', f"HOW[{how!r}]")
        Path("own.py").write_text(source)
        Path("own.py").touch()
        code = main([str(word) for word in words])
        return code, capsys.readouterr().err.splitlines()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield call
    sys.modules.pop("own", None)


def collecting(out: str) -> list[str]:
    return ["collect", *SMALL, "--env.family", "own:Family", "--env.kwargs", "{}", "--out", out]


@pytest.mark.parametrize("how", WORDS)
@pytest.mark.parametrize("here", PLACES)
def test_it_is_one_line_with_its_place(own, tmp_path, here, how):
    words = [*collecting("out"), "--algorithm.learner", "own:Learner", "--marker", "own:marker"]
    code, lines = own(here, how, *words)
    assert code == (2 if here in ("family", "tasks") else 1)
    (line,) = (line for line in lines if line.startswith("cad: error: "))
    assert not any("Traceback" in line or "internal error" in line for line in lines)
    rows = (tmp_path / "own.py").read_text().splitlines()
    inner = next(k for k, row in enumerate(rows, 1) if f'"{how}": ' in row)
    tasks = re.search(r"tasks ([\d, ]+\d)", line)
    wanted = PLACES[here].format(WORDS[how].format(inner), tasks=tasks and tasks[1])
    assert line.endswith(wanted), (line, wanted)


def test_a_sound_family_learner_and_marker_work(own, tmp_path):
    assert own("nowhere", "words", *collecting("out"), "--algorithm.learner", "own:Learner")[0] == 0
    file = next((tmp_path / "out").glob("*.hdf5"))
    before = file.read_bytes()
    code, lines = own("marker", "words", "mark", file, "--marker", "own:marker")
    assert code == 1
    assert lines[-1].startswith(
        "cad: error: task 0: marker 'own:marker': the simulator crashed (ValueError in"
    )
    assert file.read_bytes() == before
    assert HistoryFile(file).marking["marker"] == "all"


def test_an_interrupt_of_users_code_stays_one():
    with pytest.raises(KeyboardInterrupt), users_code("marker 'm'"):
        raise KeyboardInterrupt
    told = pytest.raises(UsageError, match=r"^family 'f': oops \(OSError in test_users_code\.py:\d+\)$")
    with told, users_code("family 'f'", UsageError):
        raise OSError("oops")


def test_a_task_is_named_where_slots_step_one_after_another():
    class Alone:
        num_envs, slot = 3, 2

        def step(self, actions):
            raise ValueError("oops")

    class Family(Darkroom):
        def make(self, tasks, seeds):
            return Alone()

    family = Family(3, 5)
    with pytest.raises(RunError, match=r"Family', task 4, step 1: oops \(ValueError in test_users_code"):
        checked_slots(family, family.tasks()[2:5], np.arange(3), [2, 3, 4]).step(np.zeros(3))


def test_a_transform_that_fails_is_named(history, monkeypatch):
    marked = replace(history, compression_mask=history.truncated)
    sequences = from_histories({0: marked})
    for name, function, cause in (
        (
            "broken",
            lambda sequences, context: 1 / 0,
            "transform 'broken': division by zero (ZeroDivisionError in",
        ),
        ("none", lambda sequences, context: None, "transform 'none' must return Sequences, not a NoneType"),
    ):
        monkeypatch.setitem(TRANSFORM._items, name, function)
        with pytest.raises(RunError) as caught:
            apply_transforms(sequences, [(name, {})], seed=0)
        assert str(caught.value).startswith(cause)


def test_a_marker_keeps_its_place_when_its_message_has_lines(history):
    def marker(rewards):
        raise ValueError("first\n  second")

    with pytest.raises(RunError, match=r": first second \(ValueError in test_users_code\.py:\d+\)$"):
        apply_marker(marker, history)


@pytest.mark.parametrize(
    ("unit", "cause"),
    [
        (
            "leave",
            r"the process of bad died \(exit code 0 without an error: does its code call os\._exit\?\)",
        ),
        ("exit", r"it calls sys\.exit\(3\) \(in jobs\.py:\d+\)"),
        ("hang", r"^bad: no progress for 0\.3 seconds; was ended$"),
    ],
)
def test_units_that_end_or_hang_are_named(unit, cause):
    with WorkerPool(1) as pool, pytest.raises(RunError, match=cause):
        pool.run(jobs.any_of_them, {"bad": (unit,)}, timeout=0.3 if unit == "hang" else 60)


def test_what_a_worker_cannot_load_is_told(monkeypatch):
    class Cell:
        def run(self, k, *, report, should_stop):
            return k

    Cell.__module__, Cell.__qualname__ = "__main__", "Cell"
    monkeypatch.setattr(sys.modules["__main__"], "Cell", Cell, raising=False)
    with WorkerPool(2) as pool, pytest.raises(UsageError, match="must be moved into a module") as caught:
        pool.run(Cell().run, {"a": (1,), "b": (2,)})
    assert "Can't get attribute 'Cell' on <module '__m" in str(caught.value)


class Hanging(Darkroom):
    def make(self, tasks: np.ndarray, seeds: np.ndarray) -> None:
        time.sleep(60)


def test_a_hanging_family_is_ended_by_a_time_out(tmp_path):
    sizes = {"n_timesteps": 10, "n_stream": 1, "n_task": 3, "heldout": 1, "validation": 1}
    with pytest.raises(RunError, match=r"^tasks \[0, 1, 2\]: no progress for 0\.5 seconds; was ended$"):
        collect(
            Hanging(3, 5), NoiseDistillation(), tmp_path / "h.hdf5", family_name="own:Hanging", **sizes,
            marker="all", timeout=0.5,
        )  # fmt: skip


EXCHANGE = """
def fails(path):
    raise ValueError("another\\nformat")

def other(path):
    return 5

def inner(path):
    return {0: "a recording"}

def writes(file, path, overwrite, progress):
    raise KeyError("key")

def nowhere(file, path, overwrite, progress):
    return None
"""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fails", "h.hdf5: layout 'exchange:fails': another format (ValueError in exchange.py:3)"),
        ("other", "h.hdf5: layout 'exchange:other': it returns a int, not a mapping of Recorded by"),
        ("inner", "h.hdf5: task 0 is a str, not Recorded"),
        ("writes", "h.hdf5: export format 'exchange:writes': 'key' (KeyError in exchange.py:12)"),
        ("nowhere", "export format 'exchange:nowhere' must return the path that it wrote, not None"),
    ],
)
def test_own_layouts_and_export_formats_are_named(tmp_path, monkeypatch, capsys, name, wanted):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("exchange.py").write_text(EXCHANGE)
    family = Darkroom(3, 5)
    collect(family, NoiseDistillation(), "h.hdf5", family_name="darkroom", n_timesteps=10, n_stream=1)
    words = ["export", "h.hdf5", "--to", f"exchange:{name}", "--out", "x"]
    if name in ("fails", "other", "inner"):
        words = ["import", "h.hdf5", "--layout", f"exchange:{name}", "--family", "darkroom"]
        words += ["--split-seed" if name == "inner" else "--heldout", "0"]
    assert main(words) == 1
    (line,) = (row for row in capsys.readouterr().err.splitlines() if row.startswith("cad: error: "))
    assert line.startswith(f"cad: error: {wanted}")
    sys.modules.pop("exchange", None)
