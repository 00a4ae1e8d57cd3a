from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from compressed_ad.errors import HistoryError, UsageError
from compressed_ad.models.tokens import Batch
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import CompressedADDataset, WindowSampler
from tests.training.test_transforms import history


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(vars(a.tokens).values(), vars(b.tokens).values(), strict=True)
    tokens = all(x is y if x is None else torch.equal(x, y) for x, y in pairs)
    return tokens and torch.equal(a.target, b.target) and torch.equal(a.valid, b.valid)


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_windows_are_runs_of_one_sequence(
    n_stream: int, n_step: int, n_transit: int, first: float, step: int, seed: int
) -> None:
    sequences = from_histories({0: history(n_stream, n_step, seed), 4: history(1, 12, seed + 1)})
    sampler = WindowSampler(sequences, n_transit, 8, seed=seed, first_window=first)
    start, end = sampler.starts(step)
    of = np.searchsorted(sequences.offsets, start, side="right") - 1
    np.testing.assert_array_equal(end, sequences.offsets[of + 1])
    assert np.isin(start, sequences.episodes.start).all()
    inner = start > sequences.offsets[of]
    assert (start[inner] + n_transit <= end[inner]).all()
    batch = sampler.batch(step)
    length = np.minimum(end - start, n_transit)
    np.testing.assert_array_equal(batch.valid.sum(dim=1).numpy(), length)
    for row in range(8):
        steps = slice(start[row], start[row] + length[row])
        np.testing.assert_array_equal(batch.target[row, : length[row]], sequences.actions[steps])
        np.testing.assert_array_equal(batch.tokens.state[row, : length[row]], sequences.states[steps])
        np.testing.assert_array_equal(
            batch.tokens.reward[row, 1 : length[row]], sequences.rewards[steps][:-1]
        )


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    sequences = from_histories({0: history(4, 60)})

    def batch(seed: int, step: int) -> Batch:
        return WindowSampler(sequences, 12, 8, seed=seed).batch(step)

    assert same(batch(0, 3), batch(0, 3))
    assert not same(batch(0, 3), batch(1, 3)) and not same(batch(0, 3), batch(0, 4))


def test_share_of_windows_at_the_beginning() -> None:
    sequences = from_histories({0: history(4, 400)})
    for share in (0.0, 0.3, 1.0):
        sampler = WindowSampler(sequences, 8, 4000, seed=0, first_window=share)
        measured = np.isin(sampler.starts(0)[0], sequences.offsets).mean()
        # Four standard errors of a share of 4000 draws.
        assert abs(measured - share) <= 4 * np.sqrt(share * (1 - share) / 4000)


def test_marker_dropout_drops_all_marks_of_a_window_and_nothing_else() -> None:
    sequences = from_histories({0: history(4, 60)})
    plain = WindowSampler(sequences, 12, 400, seed=0).batch(0)
    dropped = WindowSampler(sequences, 12, 400, seed=0, marker_dropout=0.2).batch(0)
    assert torch.equal(plain.target, dropped.target) and torch.equal(
        plain.tokens.reward, dropped.tokens.reward
    )
    kept = (plain.tokens.start_mark == dropped.tokens.start_mark).all(dim=1)
    silent = ~dropped.tokens.start_mark.any(dim=1) & ~dropped.tokens.end_mark.any(dim=1)
    assert (kept | silent).all() and 0.12 < silent.float().mean() < 0.28


def test_dataset_items_carry_their_segments() -> None:
    sequences = from_histories({0: history(2, 40)})
    dataset = CompressedADDataset(sequences, 12)
    assert len(dataset) == 2 * 8
    for i in range(len(dataset)):
        item = dataset[i]
        mask = np.zeros(12, bool)
        for k, (start, end) in enumerate(item["segments"]):
            assert (start < end) == (k < item["n_segments"])
            assert not mask[start:end].any()
            mask[start:end] = True
        np.testing.assert_array_equal(mask, item["compression_mask"].numpy())
        assert item["states"].shape == (12, 2) and item["actions"].shape == (12,)
    with pytest.raises(HistoryError, match="shorter than n_transit"):
        CompressedADDataset(sequences, 41)
    with pytest.raises(UsageError, match=r"not a dict; .* CompressedADDataset\.from_file\(path, n_transit\)"):
        CompressedADDataset({"n_transit": 12}, 12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n_worker", "shuffle"), [(0, False), (2, True)])
def test_a_data_loader_batches_the_dataset(n_worker: int, shuffle: bool) -> None:
    plain = from_histories({0: history(3, 40)})
    # A mask of single steps has the most segments; torch cannot stack unsigned integers of two bytes.
    sequences = plain.with_columns(
        states=plain.states.astype(np.uint16), mask=np.arange(len(plain.mask)) % 2 == 0
    )
    dataset = CompressedADDataset(sequences, 11)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=shuffle, num_workers=n_worker)
    batches = list(loader)
    assert sum(len(batch["states"]) for batch in batches) == len(dataset)
    assert batches[0]["states"].shape == (5, 11, 2) and batches[0]["segments"].shape == (5, 6, 2)
    assert {int(n) for batch in batches for n in batch["n_segments"]} <= {5, 6}
    if not shuffle:
        for name, tensor in batches[0].items():
            assert torch.equal(tensor, torch.stack([dataset[i][name] for i in range(5)]))


def test_loss_weights_of_marked_steps_before_and_after_the_first_reward() -> None:
    sequences = from_histories({0: history(3, 60), 1: history(2, 44, seed=1)})
    sampler = WindowSampler(sequences, 12, 8, seed=0, weight_marked=2.0, weight_unproven=0.0)
    batch, (index, _) = sampler.batch(5), sampler.indices(5)
    assert batch.weight is not None
    for row, col in np.ndindex(index.shape):
        step = index[row, col]
        start = sequences.offsets[np.searchsorted(sequences.offsets, step, side="right") - 1]
        proven = (sequences.rewards[start:step] > 0).any()
        expected = (2.0 if proven else 0.0) if sequences.mask[step] else 1.0
        assert batch.weight[row, col] == expected
    assert {0.0, 1.0, 2.0} == set(batch.weight.unique().tolist())
    assert WindowSampler(sequences, 12, 8, seed=0).batch(5).weight is None
    unproven = WindowSampler(sequences, 12, 8, seed=0, weight_unproven=0.0).batch(5).weight
    assert unproven is not None
    np.testing.assert_array_equal(unproven.numpy(), np.minimum(batch.weight.numpy(), 1))
    wide = WindowSampler(sequences.with_columns(rewards=sequences.rewards.astype(np.float64)), 12, 8, seed=0)
    assert wide.batch(5).tokens.reward.dtype == torch.float32


def test_improbable_actions_are_shown_but_are_no_targets() -> None:
    sequences = from_histories({0: history(3, 60), 1: history(2, 44, seed=1)})
    probs = np.random.default_rng(0).choice([0.02, 0.05, 0.5, np.nan], len(sequences.actions))
    known = sequences.with_columns(action_probs=probs.astype(np.float64))
    plain = WindowSampler(known, 12, 8, seed=0)
    sampler = WindowSampler(known, 12, 8, seed=0, min_probability=0.05)
    batch, (index, _) = sampler.batch(5), sampler.indices(5)
    assert batch.weight is not None
    np.testing.assert_array_equal(batch.weight.numpy(), np.where(probs[index] == 0.02, 0.0, 1.0))
    shown = {name: x for name, x in vars(plain.batch(5).tokens).items() if x is not None}
    assert all(torch.equal(x, getattr(batch.tokens, name)) for name, x in shown.items())
    both = WindowSampler(known, 12, 8, seed=0, min_probability=0.05, weight_marked=2.0).batch(5).weight
    assert both is not None and set(both[batch.weight == 0].tolist()) == {0.0}
    assert {1.0, 2.0} == set(both[batch.weight == 1].tolist())
    nothing = from_histories({0: replace(history(3, 60), action_probs=None)})
    unknown = WindowSampler(nothing, 12, 8, seed=0, min_probability=0.05)
    assert unknown.batch(5).weight is None


def test_histories_without_any_target_are_refused() -> None:
    sequences = from_histories({0: history(3, 60)})
    probs = np.full(len(sequences.actions), 0.5)
    known = sequences.with_columns(action_probs=probs, mask=np.ones_like(sequences.mask))
    choices: list[dict[str, Any]] = [{"min_probability": 1.0}, {"weight_marked": 0.0}]
    for options in choices:
        with pytest.raises(HistoryError, match=r"no action is left to learn: .* lower loss_min_probability"):
            WindowSampler(known, 12, 8, seed=0, **options)
    WindowSampler(known, 12, 8, seed=0, min_probability=0.5)
