"""``cad list`` says what there is, ``module:attribute`` stands for each, and mistakes are one line."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from compressed_ad.cli import listing
from compressed_ad.errors import install_command
from compressed_ad.registry import import_attribute
from compressed_ad.runs.directory import EXTRAS, extras
from compressed_ad.tasks import select
from compressed_ad.tasks.gridworld import Darkroom
from tests.cli.test_main import errors, run, tree

__all__ = ["run"]  # the fixture

# ---------------------------------------------------------------- cad list


def test_adapters_are_listed_with_their_parameters():
    assert list(listing.ADAPTERS) == list(select.ADAPTER)
    for prefix, path in select.ADAPTER.items():
        words, parameters = listing.ADAPTERS[prefix]
        assert words.endswith(".")
        if extras().get(prefix, True):
            maker = import_attribute("task family", path)
            assert listing.call_parameters(maker) == f"env_id, {parameters}"


def test_every_list_has_a_line_about_everything(run):
    for name, rows in listing.LISTS.items():
        found = rows()
        assert found
        assert all(words for _, words, _ in found), name
        assert run("list", name)[0] == 0


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_listing_what_needs_no_torch_imports_none():
    code = (
        "import sys; from compressed_ad.cli.main import main;"
        " [main(['list', name]) for name in ('families', 'learners', 'markers', 'layouts', 'extras')];"
        " bad = {'torch', 'stable_baselines3', 'minari', 'ray', 'jax', 'minigrid'} & set(sys.modules);"
        " assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---------------------------------------------------------------- anything can be module:attribute

OWN = '''
import numpy as np

from compressed_ad import CompressedAD
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.tasks.gridworld import Darkroom


class Room(Darkroom):
    """My room."""

    name = "room"


class Mine(BatchedPPO):
    """My learner."""

    name = "Mine"


class Model(CompressedAD):
    """My model."""


def early(rewards, first: int = 10):
    """My marker."""
    return np.broadcast_to(np.arange(rewards.shape[-1]) < first, rewards.shape).copy()


def all_of_them(sequences, context, *, least: float = 0.0):
    """My transform."""
    return sequences


class Raises(Mine, Room):
    def __init__(self):
        raise RuntimeError("two\\nlines")


def room(size: int = 3):
    return Room(size, 5)


def typed(size: int = 3) -> Room:
    return Room(size, 5)
'''


@pytest.fixture
def own(tmp_path) -> Iterator[Path]:
    (tmp_path / "own_things.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    yield tmp_path
    sys.modules.pop("own_things", None)


def test_everything_may_be_the_users_own(run, own):
    words = [
        "--preset", "smoke", "--env", "own_things:Room", "--env.kwargs", "{size: 3, horizon: 5}",
        "--env.train", "null", "--env.validation", "1", "--env.heldout", "2",
        "--algorithm", "own_things:Mine", "--algorithm.learner_kwargs", "{n_steps: 20, batch_size: 20}",
        "--algorithm.n_learner", "1", "--algorithm.n_stream", "2", "--algorithm.n_timesteps", "60",
        "--algorithm.n_process", "1", "--marker", "own_things:early", "--marker.params", "{first: 12}",
    ]  # fmt: skip
    code, out, lines = run("collect", *words, "--out", "d")
    assert code == 0, lines
    assert "Compressed steps: 216" in out
    path = "d/history_own_things_Room_Mine_alg-seed0_compressed.hdf5"
    code, out, lines = run(
        "train", "--preset", "smoke", "--model", "own_things:Model", "--model.steps", "2",
        "--model.n_transit", "20", "--model.validations", "0", "--model.transforms",
        "[{name: own_things:all_of_them, least: 1.0}]", "--history", path, "--out", "r",
        "--trust", "own_things:Room",
    )  # fmt: skip
    assert code == 0, lines
    trust = [f"--trust=own_things:{name}" for name in ("Room", "Model", "all_of_them")]
    code, out, lines = run("evaluate", *(own / "r").iterdir(), "--evaluation.episodes", "2", *trust)
    assert code == 0, lines
    assert "(2 held-out tasks)" in out


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (
            ["--env", "own_things:Raises"],
            "cannot be made: two lines (RuntimeError in own_things.py:",
        ),
        (
            ["--env", "own_broken:X"],
            "'own_broken': division by zero (ZeroDivisionError in own_broken.py:1)",
        ),
        (["--env", "own_things:Nothing"], "'own_things' has no attribute 'Nothing'"),
        (["--env", "nowhere:CartPole-v1"], "cannot import 'nowhere'"),
        (["--env", "own_things:Room", "--env.kwargs", "{sise: 3}"], "unknown parameter 'sise' (did you mean"),
        (["--algorithm", "own_things:Raises"], "learner 'own_things:Raises' cannot be made"),
        (["--algorithm", "own_things:early"], "annotate what the function returns, -> SourceLearner"),
        (["--env", "own_things:room"], "annotate what the function returns, -> TaskFamily"),
        (["--env", "own_things:typed", "--env.kwargs", "{sise: 3}"], "unknown parameter 'sise'"),
        (["--marker", "own_things:typed"], "marker 'own_things:typed' takes none of probs"),
        (["--marker", "own_broken:X"], "marker 'own_broken:X': cannot import"),
        (["--model", "own_things:early"], "model 'own_things:early' is a function, not a class"),
        (["--model.transforms", "[own_broken:x]"], "cannot import 'own_broken'"),
        (["--model.transforms", "[{name: own_things:all_of_them, most: 1}]"], "most"),
    ],
)
def test_mistakes_in_the_users_own_are_one_line(run, own, words, cause):
    before = tree(own)
    code, out, lines = run("run", *words)
    assert (code, out) == (2, "")
    (line,) = errors(lines)
    assert cause in line
    assert {name for name in tree(own) if "__pycache__" not in name} == set(before)


# ---------------------------------------------------------------- spaces and extras

ODD: Mapping[str, spaces.Space[Any]] = {
    "Dict": spaces.Dict({"a": spaces.Discrete(3)}),
    "Tuple": spaces.Tuple([spaces.Discrete(3)]),
    "Text": spaces.Text(5),
    "Graph": spaces.Graph(spaces.Box(0, 1, (2,)), spaces.Discrete(2)),
    "Sequence": spaces.Sequence(spaces.Discrete(2)),
    "MultiBinary": spaces.MultiBinary(3),
    "MultiDiscrete([[2 2]": spaces.MultiDiscrete([[2, 2], [2, 2]]),
}


class Odd(Darkroom):
    """A room that says its spaces are others."""

    observation_space = action_space = None  # type: ignore[assignment]

    def __init__(self, observation: str = "", action: str = "") -> None:
        super().__init__(3, 5)
        room = Darkroom(3, 5)
        self.__dict__["observation_space"] = ODD.get(observation, room.observation_space)
        self.__dict__["action_space"] = ODD.get(action, room.action_space)


SMALL = [
    "--env",
    "tests.cli.test_choices:Odd",
    "--env.train",
    "null",
    "--env.heldout",
    "1",
    "--env.validation",
    "1",
]


@pytest.mark.parametrize("kind", ["observation", "action"])
@pytest.mark.parametrize("space", ODD)
def test_spaces_that_are_not_supported_are_named(run, tmp_path, space, kind):
    code, out, lines = run("collect", *SMALL, "--env.kwargs", f"{{{kind}: '{space}'}}")
    assert (code, out) == (2, "")
    (line,) = errors(lines)
    assert line.startswith(f"--env.kwargs: env: {kind} space of darkroom: {space}")
    assert line.endswith(" is not supported; supported: Discrete, MultiDiscrete (flat), Box")
    assert not list(tmp_path.rglob("*.hdf5*"))


class Pushed(Darkroom):
    """A room with continuous actions, as far as it says."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)


def test_a_learner_that_cannot_act_there_says_what_it_can(run):
    words = [*SMALL, "--env", "tests.cli.test_choices:Pushed", "--env.kwargs", "{size: 3, horizon: 5}"]
    code, _, lines = run("collect", *words)
    (line,) = errors(lines)
    assert code == 2
    assert "ppo learns Discrete actions, not Box(-1.0, 1.0, (2,), float32); try the learner sb3:PPO" in line


def test_a_missing_extra_is_one_line(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("stable_baselines3")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "compressed_ad.learners.sb3.learner", raising=False)
    for words in (["collect", "--algorithm", "sb3:PPO"], ["check", "learner", "sb3:PPO"]):
        code, out, lines = run(*words)
        assert (code, out) == (2, "")
        (line,) = errors(lines)
        assert line.endswith(f"needs an optional dependency: {install_command('sb3')}")
