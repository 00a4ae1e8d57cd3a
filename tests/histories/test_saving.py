"""``save_histories``: what callbacks recorded becomes a history file that the command line takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv

from compressed_ad import (
    CompressedHistoryCallback,
    History,
    HistoryFile,
    Split,
    apply_marker,
    make_family,
    save_histories,
    threshold,
)
from compressed_ad.cli.main import main
from compressed_ad.errors import HistoryError, MarkerError, UsageError

NAME = "gymnasium:Machine-v0"
KWARGS = {"params": {"best": [0, 1, 2, 3]}, "n_task": 4, "best_return": 5}
MARKS = {"on_policy_threshold": 0.2, "compression_window": 3}


class Machine(gymnasium.Env):
    """Four buttons, of which one pays; observations count the steps of an episode of 5."""

    observation_space = spaces.Discrete(6)
    action_space = spaces.Discrete(4)

    def __init__(self, best: int = 0) -> None:
        self.best = best

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.time, {}

    def step(self, action):
        self.time += 1
        return self.time, float(action == self.best), False, False, {}


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    gymnasium.register("Machine-v0", Machine, max_episode_steps=5)
    yield
    gymnasium.registry.pop("Machine-v0")


def recording(task: int, steps: int = 60, **marks: float) -> CompressedHistoryCallback:
    best = int(make_family(NAME, KWARGS).tasks()[task][0])
    callback = CompressedHistoryCallback(**{**MARKS, **marks})
    env = DummyVecEnv([lambda: gymnasium.make("Machine-v0", best=best)] * 2)
    A2C("MlpPolicy", env, seed=task, policy_kwargs={"net_arch": [4]}).learn(2 * steps, callback=callback)
    return callback


def saved(path: Path, recorded: dict[int, CompressedHistoryCallback | History], **options) -> HistoryFile:
    given = {"family": NAME, "family_kwargs": KWARGS, "learner": "A2C", "heldout": 1, "validation": 1}
    return save_histories(recorded, path, **{**given, **options})


def test_callbacks_become_a_file_that_the_command_line_takes(tmp_path, capsys):
    recorded = {task: recording(task) for task in range(4)}
    file = saved(tmp_path / "own.hdf5", recorded, config={"net_arch": [4]})
    assert repr(file) == (
        f"<HistoryFile own.hdf5: 4 tasks of {NAME}, 2 streams x 60 steps of A2C, marked by threshold>"
    )
    assert file.marking["parameters"].items() >= MARKS.items()
    assert file.info.config["n_stream"] == 2 and file.info.config["task_ids"] == [0, 1, 2, 3]
    for task, history in file.each():
        own = recorded[task].history()
        for name, array in own.per_step():
            np.testing.assert_array_equal(getattr(history, name), array, err_msg=name)
        np.testing.assert_array_equal(history.compression_mask, apply_marker(threshold, own, **MARKS))
    assert any(history.compression_mask.any() for _, history in file.each())
    for words in (
        ["inspect", str(file.path)],
        ["mark", str(file.path), "--output", str(tmp_path / "o.hdf5")],
    ):
        assert main(words) == 0
    small = ["--model.steps", "2", "--model.validation_episodes", "1", "--model.n_transit", "20"]
    assert main(["train", "--history", str(file.path), "--out", str(tmp_path / "runs"), *small]) == 0
    assert capsys.readouterr().out.count("Compression ratio") == 2


def test_histories_serve_as_well_and_some_tasks_are_enough(tmp_path):
    histories = {task: recording(task).history() for task in (1, 3, 2)}
    file = saved(tmp_path / "own.hdf5", histories, split=Split([0, 1], [], [2]), marker_params=MARKS)
    assert file.info.config["task_ids"] == [1, 2, 3]
    np.testing.assert_array_equal(file.tasks, make_family(NAME, KWARGS).tasks()[[1, 2, 3]])
    np.testing.assert_array_equal(file.load([2])[2].rewards, histories[3].rewards)
    bare = saved(tmp_path / "bare.hdf5", histories, marker=None)
    assert bare.marking is None and bare.load([0])[0].compression_mask is None
    with pytest.raises(HistoryError, match="exists; resume it, overwrite it"):
        saved(tmp_path / "own.hdf5", histories)
    saved(tmp_path / "own.hdf5", histories, overwrite=True)


def test_mistakes_are_one_line_that_names_the_task(tmp_path):
    good = {task: recording(task).history() for task in (0, 1)}
    own = tmp_path / "own.hdf5"

    def refused(error: type[Exception], message: str, recorded, **options) -> None:
        with pytest.raises(error, match=message) as caught:
            saved(own, recorded, **{"validation": 0, **options})
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused(UsageError, "no task was recorded", {})
    refused(UsageError, r"has tasks 0..3, not 0..4", {**good, 4: good[1]})
    refused(UsageError, "nothing was recorded; pass it to learn", {**good, 1: CompressedHistoryCallback()})
    other = recording(1, compression_window=4)
    refused(UsageError, "callbacks of tasks 0 and 1 differ in", {0: recording(0), 1: other})
    short = recording(1, steps=40).history()
    refused(HistoryError, r"task 1 has \(streams, steps\) \(2, 40\), task 0 has", {**good, 1: short})
    jumps = replace(good[1], states=good[1].states[:, ::-1])
    refused(HistoryError, "task 1: Within an episode states must", {**good, 1: jumps})
    unknown = replace(good[1], action_probs=np.full_like(good[1].action_probs, np.nan))
    refused(MarkerError, "task 1: ", {**good, 1: unknown})
