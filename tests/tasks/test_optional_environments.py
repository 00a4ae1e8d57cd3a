"""Optional environments: what is said where one is missing; held-out tasks that a family brings."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, strategies as st

from compressed_ad.errors import MissingExtraError, SplitError, UsageError, install_command
from compressed_ad.histories.collector import collect
from compressed_ad.histories.file import HistoryFile
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.runs.config import plan
from compressed_ad.runs.settings import Config
from compressed_ad.tasks.base import FixedSplit
from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.select import make_family
from compressed_ad.tasks.settings import EnvSettings
from compressed_ad.tasks.split import choose_tasks, split_family, split_tasks


@pytest.mark.parametrize(
    ("module", "adapter", "name", "extra"),
    [
        ("minigrid", "minigrid", "minigrid:MiniGrid-FourRooms-v0", "minigrid"),
        ("metaworld", "metaworld", "metaworld:reach-v3", "metaworld"),
        ("xminigrid", "xland", "xland:XLand-MiniGrid-R1-9x9", "xland"),
        ("jax", "xland", "xland:XLand-MiniGrid-R1-9x9", "xland"),
    ],
)
def test_a_missing_extra_is_one_line(module, adapter, name, extra, monkeypatch):
    for part in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, part, None)
    monkeypatch.delitem(sys.modules, f"compressed_ad.tasks.{adapter}", raising=False)
    with pytest.raises(MissingExtraError) as caught:
        make_family(name, {})
    assert str(caught.value).count("\n") == 0
    assert install_command(extra) in str(caught.value)


@dataclass(frozen=True)
class Corners(Darkroom):
    """A room some of whose goals, here and there, are the test goals."""

    size: int = 4
    n_test: int = 5

    def heldout_tasks(self):
        return np.arange(self.n_test) * self.size**2 // self.n_test


def corners(**kwargs) -> Corners:
    return Corners(**kwargs)


@given(
    size=st.integers(3, 6),
    n_test=st.integers(1, 7),
    seed=st.integers(0, 5),
    validation=st.none() | st.integers(0, 1),
)
def test_given_tasks_are_held_out_and_no_others(size, n_test, seed, validation):
    family = Corners(size=size, n_test=n_test)
    split = split_family(family, np.arange(size**2), seed, validation=validation)
    np.testing.assert_array_equal(split.heldout, family.heldout_tasks())
    others = np.sort(np.concatenate([split.train, split.validation]))
    np.testing.assert_array_equal(others, np.setdiff1d(np.arange(size**2), family.heldout_tasks()))
    assert validation is None or len(split.validation) == validation


def test_a_family_without_its_own_is_split_as_ever():
    assert isinstance(Corners(), FixedSplit) and not isinstance(Darkroom(), FixedSplit)
    drawn, split = split_tasks(81, 3), split_family(Darkroom(), np.arange(81), 3)
    for part in ("train", "validation", "heldout"):
        np.testing.assert_array_equal(getattr(split, part), getattr(drawn, part))


def test_given_tasks_cannot_be_chosen_by_number():
    with pytest.raises(SplitError, match="5 of the 16 chosen"):
        split_family(Corners(), np.arange(16), 0, heldout=3)
    assert len(split_family(Corners(), np.arange(16), 0, heldout=5).heldout) == 5


def test_a_collection_of_some_tasks_holds_out_those_of_them_that_are_given(tmp_path):
    """The file numbers its tasks anew; the plan, which is made before, agrees with it."""
    family, n_task = Corners(), 9
    path = collect(
        family, BatchedPPO(n_steps=20), tmp_path / "h.hdf5", family_name="corners",
        n_timesteps=40, n_stream=1, n_task=n_task, seed=1, split_seed=4,
    )  # fmt: skip
    file = HistoryFile(path)
    ids = np.array(file.info.config["task_ids"])
    np.testing.assert_array_equal(ids, choose_tasks(16, 1, n_task))
    assert set(ids[file.split.heldout]) == set(ids) & set(family.heldout_tasks().tolist())
    env = EnvSettings(family=f"{__name__}:corners", n_task=n_task, split_seed=4)
    planned = plan(Config(env=env, seed=1))
    np.testing.assert_array_equal(planned.task_ids, ids)
    for part in ("train", "validation", "heldout"):
        np.testing.assert_array_equal(getattr(planned.split, part), getattr(file.split, part))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([3, 3], r"heldout_tasks\(\) must be different numbers in 0\.\.15"),
        ([16], r"heldout_tasks\(\) must be different numbers in 0\.\.15"),
        (range(16), r"heldout_tasks\(\) leaves no task to train on"),
    ],
)
def test_wrong_heldout_tasks_are_found(ids, said):
    class Wrong(Corners):
        def heldout_tasks(self):
            return np.array(ids)

    with pytest.raises(UsageError, match=said):
        check_family(Wrong())
