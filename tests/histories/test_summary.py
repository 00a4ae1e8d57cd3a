"""What ``cad inspect`` says about a history file, against hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from compressed_ad.errors import HistoryError
from compressed_ad.histories.file import HistoryInfo, remark
from compressed_ad.histories.summary import describe, finished_episodes, shortfall
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.types import History, Split

INFO = HistoryInfo(
    family="darkroom",
    family_kwargs={"size": 9},
    spaces={"observation": {"kind": "discrete", "n": 3}, "action": {"kind": "discrete", "n": 2}},
    horizon=5,
    learner="PPO",
    config={"n_steps": 5},
    seed=4,
)


def make_history(probs, rewards, end):
    shape = np.shape(rewards)
    zeros = np.zeros(shape, dtype=np.uint8)
    return History(
        states=zeros,
        actions=zeros,
        rewards=np.asarray(rewards, dtype=np.float32),
        next_states=zeros,
        terminated=np.zeros(shape, dtype=bool),
        truncated=np.broadcast_to(np.asarray(end, dtype=bool), shape),
        action_probs=np.asarray(probs, dtype=np.float32),
        update=np.zeros(shape, dtype=np.int32),
        learner=np.arange(shape[0], dtype=np.int32),
    )


def store(path, histories, optimal):
    count = len(histories)
    tasks, split = np.arange(count)[:, None], Split(np.arange(count), [], [])
    writer = HistoryWriter(path, INFO, split, tasks, optimal, np.arange(count, dtype=float))
    for task, history in enumerate(histories):
        writer.append(task, history)
    writer.finish()
    return path


@pytest.fixture
def path(tmp_path):
    """Two tasks, two streams of 20 steps, episodes of 5; the second task has twice the reward."""
    end = np.arange(20) % 5 == 4
    rewards = np.zeros((2, 20))
    rewards[0, 5:] = 1
    rewards[1, 15:] = 1
    probs = np.full((2, 20), 0.5)
    probs[0, 3:13] = 0.9
    probs[1, 10:15] = 0.9
    both = [make_history(probs, scale * rewards, end) for scale in (1, 2)]
    return store(tmp_path / "h.hdf5", both, np.array([5.0, 11.0]))


def test_returns_of_finished_episodes():
    end = np.array([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    history = make_history(np.ones((3, 6)), np.arange(18).reshape(3, 6), end)
    stream, last, returns = finished_episodes(history)
    assert stream.tolist() == [0, 0, 1]
    assert last.tolist() == [1, 4, 0]
    assert returns.tolist() == [1, 2 + 3 + 4, 6]


def test_numbers_counted_by_hand(path):
    remark(path, "threshold", {"compression_window": 5})
    found = describe(path)
    assert (found.n_stream, found.n_learner, found.n_step, found.total_steps) == (2, 2, 20, 80)
    assert found.n_episode == 16
    assert found.split == {"train": 2, "validation": 0, "heldout": 0}
    # Episodes end in tenths 2, 4, 7, 9; returns 0 5 5 5 and 0 0 0 5, doubled in the second task.
    curve, normalised = np.array(found.learning_curve), np.array(found.normalised_curve)
    np.testing.assert_allclose(curve[[2, 4, 7, 9]], [0, 3.75, 3.75, 7.5])
    assert np.isnan(np.delete(curve, [2, 4, 7, 9])).all()
    # Task 0: (return - 0) / 5; task 1: (return - 1) / 10.
    np.testing.assert_allclose(normalised[[2, 4, 7, 9]], [-0.05, (0.5 + 0.4) / 2, 0.45, (1 + 0.9) / 2])
    assert (found.optimal_return, found.random_return) == (8.0, 0.5)
    assert found.marks.statistics.compressed_steps == 30
    assert sorted(found.marks.lengths) == [5, 5, 10, 10]
    assert found.marks.n_crossing == 2  # steps 3-12 cross, 10-14 end with the episode
    assert found.marks.n_rewarded == 16


def test_text(path):
    assert "Not marked yet; mark it with: cad mark" in describe(path).text()
    remark(path, "threshold", {"compression_window": 5})
    text = describe(path).text()
    for line in (
        "  Task family: darkroom(size=9), horizon 5, observation Discrete(3), action Discrete(2)",
        "  Source algorithm: PPO(n_steps=5), seed 4",
        "  Tasks: 2 (2 train, 0 validation, 0 heldout)",
        "  Streams per task: 2 of 2 learner(s), 20 steps each",
        "  Mean episode return: - - 0.00 - 3.75 - - 3.75 - 7.50 (random 0.500, optimal 8.000)",
        "  Compression ratio: 37.5%",
        "  Segments: 4, lengths 5/5/7.5/10/10 (minimum, quartiles, maximum)",
        "  Segments that cross an episode's end: 50.0%",
        "  Marked steps with reward: 53.3%",
    ):
        assert line in text.splitlines()
    assert "Marked by threshold(causal=False, compression_window=5, on_policy_threshold=0.7" in text


def test_nothing_marked_no_episode_and_no_known_optimum(tmp_path):
    history = make_history(np.full((1, 1), 0.5), np.zeros((1, 1)), np.zeros((1, 1)))
    path = store(tmp_path / "short", [history], None)
    remark(path, "threshold")
    found = describe(path)
    assert found.n_episode == 0 and np.isnan(found.learning_curve).all()
    assert found.normalised_curve is None and len(found.marks.lengths) == 0
    assert "optimal unknown" in found.text() and "Segments" not in found.text()


def test_a_file_without_probabilities_is_told_a_marker_that_can_mark_it(tmp_path):
    zeros, end = np.zeros((1, 6)), np.arange(6) % 3 == 2
    known, unknown = (make_history(zeros + p, zeros, end) for p in (0.5, np.nan))
    optimal = np.ones(2)
    assert "--marker" not in describe(store(tmp_path / "k.hdf5", [known, known], optimal)).text()
    assert "--marker none" in describe(store(tmp_path / "u.hdf5", [known, unknown], optimal)).text()


def test_no_file(tmp_path):
    with pytest.raises(HistoryError, match="No such file"):
        describe(tmp_path / "none")


NAN, NO_GAIN = float("nan"), "; a model that imitates them hardly earns more"


@pytest.mark.parametrize(
    ("curve", "normalised", "said"),
    [
        ((), (0.0, 0.5, 0.9, 0.81), ""),
        ((), (0.1, 0.5, 0.6, 0.62), "earns 0.62 of the optimum (0 is random play)"),
        ((), (0.1, 0.7, 0.99, 0.85), "earns 0.85 of the optimum, after 0.99 (0 is random play)"),
        ((), (0.1, 0.9, 0.85, NAN), ""),  # no episode ends in the last tenth
        ((), (NAN, NAN), ""),
        # Random play earns 2 and no optimum is known.
        ((2.0, 4.0, 12.0, 11.5), None, ""),
        ((2.0, 4.0, 12.0, 7.0), None, "earns 0.50 of its best tenth (0 is random play)"),
        ((2.0, 1.0, 2.0, 2.0), None, "earns 0.00 of its best tenth (0 is random play)"),
        ((NAN, NAN), None, ""),
    ],
)
def test_a_source_that_did_not_learn_or_forgot_is_told_in_one_line(curve, normalised, said):
    found = shortfall(curve, normalised, 2.0)
    assert found == (f"the last tenth of the source's histories {said}{NO_GAIN}" if said else "")


def test_tasks_without_a_scale_do_not_hide_the_others(tmp_path):
    """Random play is optimal on the second task."""
    histories = [make_history(np.ones((1, 10)), np.full((1, 10), 3.0), np.ones((1, 10)))] * 2
    found = describe(store(tmp_path / "h.hdf5", histories, np.array([6.0, 1.0])))
    assert found.normalised_curve == (0.5,) * 10
    assert "earns 0.50 of the optimum" in found.shortfall and f"  Note: {found.shortfall}" in found.text()
