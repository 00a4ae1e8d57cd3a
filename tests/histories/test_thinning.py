"""Histories that keep one of k episodes: which ones, how many steps, and collections that hold only these."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import RunError, UsageError
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT
from compressed_ad.histories.file import HistoryFile, remark
from compressed_ad.histories.summary import describe
from compressed_ad.histories.thinning import keep_episodes, kept_steps
from compressed_ad.learners.select import make_learner
from compressed_ad.report.source import summarise_source
from compressed_ad.tasks.gridworld import Darkroom, KeyToDoor
from compressed_ad.types import History
from tests.cli.test_main import SMALL, errors, run
from tests.histories.test_collector import FAMILY, assert_same, gather
from tests.histories.test_exchange import imported

__all__ = ["run"]  # the fixture


def streams(ends: Any) -> History:
    """Streams whose every array tells the step; ``ends`` (S, T)."""
    shape = np.shape(ends)
    step = np.broadcast_to(np.arange(shape[1]), shape)
    return History(
        states=step[..., None], actions=step, rewards=step.astype(np.float32),
        next_states=step[..., None] + 1, terminated=np.asarray(ends), truncated=np.zeros(shape, bool),
        action_probs=step.astype(np.float32), update=step.astype(np.int32), learner=np.arange(shape[0]),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whole_episodes_in_order_and_enough_of_them(data: st.DataObject) -> None:
    horizon, every = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 5))
    n_step = data.draw(st.integers((horizon - 1) * every + horizon, 80))
    ends = np.zeros((2, n_step), bool)
    for row in ends:
        lengths = data.draw(st.lists(st.integers(1, horizon), min_size=n_step, max_size=n_step))
        stops = np.cumsum(lengths)
        row[stops[stops <= n_step] - 1] = True
    n_kept = kept_steps(Darkroom(3, horizon), n_step, every)
    assert horizon <= n_kept and abs(n_kept - n_step / every) <= horizon
    history = streams(ends)
    kept = keep_episodes(history, every, n_kept)
    for name, array in kept.per_step():
        assert array.shape[:2] == (2, n_kept) and array.dtype == getattr(history, name).dtype
    for row, chosen in zip(ends, kept.actions, strict=True):
        begins = np.r_[True, row[:-1]]
        episode = np.cumsum(begins) - 1
        for number in range(episode[chosen[-1]] + 1):  # of each, all or nothing but for the cut at the end
            steps, held = np.flatnonzero(episode == number), chosen[episode[chosen] == number]
            before = (chosen < steps[0]).sum()
            assert len(held) == (min(len(steps), n_kept - before) if before * every <= steps[0] else 0)
            np.testing.assert_array_equal(held, steps[: len(held)])


def test_of_equally_long_episodes_every_third() -> None:
    ends = np.arange(1, 61) % 4 == 0
    kept = keep_episodes(streams(ends[None]), 3, 19)
    assert kept.actions[0].tolist() == [*range(4), *range(12, 16), *range(24, 28), *range(36, 40), 48, 49, 50]
    with pytest.raises(RunError, match="longer than the horizon"):
        keep_episodes(streams(np.zeros((1, 20), bool)), 3, 21)


def test_histories_of_less_than_an_episode_are_refused(tmp_path: Path) -> None:
    assert kept_steps(FAMILY, 31, 9) == FAMILY.horizon == 4
    with pytest.raises(UsageError, match=r"keep_every 10 leaves 3 of 31 steps, less than an episode of 4"):
        gather(tmp_path / "h.hdf5", n_timesteps=31, keep_every=10)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gather(tmp_path_factory.mktemp("thinned") / "h.hdf5", n_timesteps=60, keep_every=3)


def test_a_collection_holds_what_thinning_leaves(thinned: Path, tmp_path: Path) -> None:
    file, whole = HistoryFile(thinned), HistoryFile(gather(tmp_path / "h.hdf5", n_timesteps=60))
    assert file.info.keep_every == 3 and file.info.config["n_timesteps"] == 60 and file.n_step == 19
    assert whole.info.keep_every == 1 and "keep_every" not in whole.info.config
    for task, history in whole.load().items():
        for name, array in keep_episodes(history, 3, 19).per_step():
            if name != "compression_mask":
                np.testing.assert_array_equal(getattr(file.load([task])[task], name), array, err_msg=name)
    again = tmp_path / "again.hdf5"  # marks are those of what the file holds
    remark(thinned, "threshold", seed=0, output=again)
    assert_same(thinned, again)
    assert summarise_source(file).name == "Walker, one of 3 episodes"
    assert summarise_source(whole).name == "Walker"
    text = describe(thinned).text()
    assert "keep_every=3" in text and "Kept: about one of 3 episodes; all that follows is of these" in text
    assert "Kept" not in describe(whole.path).text()


@pytest.mark.parametrize("options", [{"n_process": 2}, {"block_size": 2}])
def test_workers_and_blocks_keep_the_same(thinned: Path, tmp_path: Path, options: dict[str, int]) -> None:
    assert_same(thinned, gather(tmp_path / "h.hdf5", n_timesteps=60, keep_every=3, **options))


def test_ends_that_differ_replay_as_they_were_recorded(tmp_path: Path) -> None:
    family, rmax = KeyToDoor(3, 12), make_learner("rmax", {"memory": 1, "epsilon": 0.3})
    path = gather(
        tmp_path / "h.hdf5", rmax, family, n_timesteps=200, keep_every=4, n_task=9, train=5, validation=1,
        heldout=3, family_name="key_to_door", family_kwargs={"size": 3, "horizon": 12},
    )  # fmt: skip
    file = HistoryFile(path)
    assert file.n_step == 48
    EXPORT["npz"](file, tmp_path / "h.npz", False, lambda tasks: None)
    recorded = dict(LAYOUT["npz"](tmp_path / "h.npz"))
    back, findings = imported(
        recorded,
        tmp_path / "back.hdf5",
        family=family,
        split=file.split,
        task_ids=file.info.config["task_ids"],
    )
    assert vars(findings) == vars(type(findings)())
    for task, history in file.load().items():
        np.testing.assert_array_equal(back.load([task])[task].rewards, history.rewards)


def test_by_the_command_line(run: Any, tmp_path: Path) -> None:
    words = [*SMALL, "--algorithm.keep_every", "4"]
    code, out, _ = run("collect", *words)
    assert code == 0 and "Total steps: 126" in out  # 9 tasks x 14 of 60 steps
    (path,) = (tmp_path / "datasets").glob("*.hdf5")
    assert "Kept: about one of 4 episodes" in run("inspect", path)[1]
    code, _, lines = run("collect", *SMALL, "--resume", "--algorithm.keep_every", "5")
    assert code == 1 and "config.keep_every: 4 there, 5 asked for" in errors(lines)[0]
    assert run("collect", *words, "--resume")[0] == 0
    code, _, lines = run("collect", *SMALL, "--algorithm.keep_every", "30")
    assert code == 2 and len(errors(lines)) == 1
    assert errors(lines)[0].startswith(
        "--algorithm.keep_every: algorithm: darkroom: keep_every 30 leaves 2 of 60"
    )
