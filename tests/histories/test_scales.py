"""Scales of observations and rewards: from training tasks only, kept in the file, kept by the model."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import HistoryError
from compressed_ad.histories import header as module
from compressed_ad.histories.file import HistoryFile, HistoryInfo, remark
from compressed_ad.histories.hdf5 import opened, write_file
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.types import History, Split, to_spec

SPLIT = Split(np.array([0, 2]), np.array([1]), np.array([3]))


def history(space: spaces.Space, seed: int, *, shift: float = 0.0, reward: float = 1.0) -> History:
    """Two streams of twelve steps, observations drawn from ``space`` and shifted, rewards 0 or ``reward``."""
    random = np.random.default_rng(seed)
    space.seed(seed)
    states = np.stack([[space.sample() for _ in range(12)] for _ in range(2)])
    states = states + np.asarray(shift, states.dtype)
    shape = (2, 12)
    return History(
        states=states,
        actions=random.uniform(-1, 1, (*shape, 1)).astype(np.float32),
        rewards=(reward * (random.random(shape) < 0.4)).astype(np.float32),
        next_states=np.roll(states, -1, axis=1),
        terminated=np.zeros(shape, bool),
        truncated=np.tile(np.arange(12) % 4 == 3, (2, 1)),
        action_probs=random.random(shape).astype(np.float32),
        update=np.zeros(shape, np.int32),
        learner=np.zeros(2, np.int32),
    )


def collected(path: Path, space: spaces.Space, histories: list[History]) -> HistoryFile:
    info = HistoryInfo(
        "none",
        {},
        {
            "observation": to_spec(space),
            "action": to_spec(spaces.Box(-1.0, 1.0, (1,), np.float32)),
        },
        4,
        "PPO",
        {},
        0,
    )
    writer = HistoryWriter(path, info, SPLIT, np.arange(4)[:, None], None, np.zeros(4))
    for task, own in enumerate(histories):
        writer.append(task, own)
    writer.finish()
    return HistoryFile(path)


VECTOR = spaces.Box(-3.0, 5.0, (3,), np.float64)
IMAGE = spaces.Box(0, 255, (6, 5, 3), np.uint8)


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_scales_are_those_of_the_training_tasks(tmp_path: Path, space: spaces.Box) -> None:
    made = [history(space, k, reward=-5.0 * (k + 1)) for k in range(4)]
    found = collected(tmp_path / "h.hdf5", space, made).training_scales()
    rows = np.concatenate([made[k].states.reshape(-1, 3) for k in (0, 2)]).astype(np.float64)
    np.testing.assert_allclose(found.observation_mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.observation_std, rows.std(axis=0), rtol=1e-6)
    paid = np.concatenate([made[k].rewards[made[k].rewards != 0] for k in (0, 2)])
    assert found.reward == pytest.approx(np.sqrt((paid**2).mean()))


def test_what_is_held_out_never_influences_them(tmp_path: Path) -> None:
    made = [history(VECTOR, k) for k in range(4)]
    one = collected(tmp_path / "one.hdf5", VECTOR, made).training_scales()
    for task in (1, 3):
        made[task] = history(VECTOR, 9 + task, shift=1000.0, reward=77.0)
    other = collected(tmp_path / "other.hdf5", VECTOR, made).training_scales()
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))


def test_marking_keeps_them_and_files_without_them_still_have_them(tmp_path: Path) -> None:
    path, old = tmp_path / "h.hdf5", tmp_path / "old.hdf5"
    file = collected(path, VECTOR, [history(VECTOR, k, reward=3.0) for k in range(4)])
    before = file.training_scales()
    remark(path, "threshold", {"compression_window": 2})
    assert HistoryFile(path).marking is not None
    with h5py.File(path) as content:
        assert set(content[module.SCALES]) == {"observation_mean", "observation_std", "reward"}

    def without(target: h5py.File) -> None:
        with opened(path) as source:
            target.attrs.update(source.attrs)
            for name in source:
                if name != module.SCALES:
                    source.copy(name, target)

    write_file(old, without)
    for later in (HistoryFile(path), HistoryFile(old)):
        for name, value in vars(before).items():
            np.testing.assert_array_equal(value, getattr(later.training_scales(), name))


def test_numbers_need_no_statistics_and_rewards_of_one_no_scale(tmp_path: Path) -> None:
    cells = spaces.MultiDiscrete([4, 4])
    found = collected(tmp_path / "h.hdf5", cells, [history(cells, k) for k in range(4)]).training_scales()
    assert found == module.Scales(None, None, 1.0)
    none = [history(cells, k, reward=0.0) for k in range(4)]
    assert collected(tmp_path / "n.hdf5", cells, none).training_scales().reward == 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_parts_add_up(lengths: list[int], centre: float, spread: float) -> None:
    """Statistics in parts are those of the whole, also where the mean is large beside the spread."""
    random = np.random.default_rng(len(lengths))
    parts = [random.normal(centre, spread, (1, n, 2)) for n in lengths]
    with h5py.File("memory", "w", driver="core", backing_store=False) as file:
        for k, part in enumerate(parts):
            file[f"{k}/states"] = part
            file[f"{k}/rewards"] = part[..., 0].astype(np.float32)
        spec = to_spec(spaces.Box(-np.inf, np.inf, (2,), np.float64))
        found = module.measure_scales((file[str(k)] for k in range(len(parts))), spec)
    whole = np.concatenate(parts, axis=1)[0]
    np.testing.assert_allclose(found.observation_mean, whole.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.observation_std, whole.std(axis=0), rtol=1e-6, atol=1e-9)


def test_numbers_from_elsewhere_than_zero_are_kept(tmp_path: Path) -> None:
    low = spaces.Discrete(4, start=-2)
    made = [history(low, k) for k in range(4)]
    file = collected(tmp_path / "h.hdf5", low, made)
    np.testing.assert_array_equal(file.load([3])[3].states, made[3].states)
    assert file.load([3])[3].states.min() < 0
    with pytest.raises(HistoryError, match="outside"):
        collected(tmp_path / "x.hdf5", low, [history(low, 0, shift=3)])


def test_wide_floats_are_stored_as_float32_and_what_that_cannot_hold_is_refused(tmp_path: Path) -> None:
    made = [history(VECTOR, k) for k in range(4)]
    file = collected(tmp_path / "h.hdf5", VECTOR, made)
    assert file.load([0])[0].states.dtype == np.float32
    with pytest.raises(HistoryError, match="outside"):
        collected(tmp_path / "x.hdf5", VECTOR, [history(VECTOR, 0, shift=1e300)])
