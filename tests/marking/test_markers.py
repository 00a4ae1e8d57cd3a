"""Markers against a brute-force oracle, the guide's examples, and the promises of the controls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from compressed_ad.errors import ConfigError, MarkerError
from compressed_ad.marking import markers

GUIDE_PROBS = np.array(
    [0.4, 0.8, 0.9, 0.85, 0.75, 0.72, 0.78, 0.6, 0.5, 0.4, 0.8, 0.85, 0.77, 0.73, 0.65], dtype=np.float32
)

probs_arrays = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.sampled_from([np.float32(x) for x in (0.2, 0.6, 0.7, 0.8, 0.96, 1.0)]),
)
windows = st.integers(1, 12)


def oracle(probs, level, window, ends=None, causal=False):
    """The guide's loop over one stream, with the segment still open at the end closed and kept."""
    mask = np.zeros(len(probs), dtype=bool)
    begin, previous_stop = None, None

    def close(stop):
        nonlocal begin, previous_stop
        if begin is not None and stop - begin >= window:
            first = begin + window - 1 if causal else begin
            mask[first + (first == previous_stop) : stop] = True
            previous_stop = stop
        begin = None

    for i, p in enumerate(probs):
        if p >= np.float32(level):
            begin = i if begin is None else begin
        else:
            close(i)
        if ends is not None and ends[i]:
            close(i + 1)
    close(len(probs))
    return mask


@given(probs_arrays, windows, st.booleans(), st.booleans(), st.data())
def test_threshold_agrees_with_the_loop(probs, window, within_episode, causal, data):
    ends = data.draw(npst.arrays(bool, probs.shape)) if within_episode else None
    got = markers.threshold(
        probs, 0.7, window, within_episode=within_episode, episode_end=ends, causal=causal
    )
    for s, stream in enumerate(probs):
        expected = oracle(stream, 0.7, window, None if ends is None else ends[s], causal)
        np.testing.assert_array_equal(got[s], expected)


@given(probs_arrays, windows, st.booleans(), st.data())
def test_causal_marking_of_a_prefix_is_a_prefix_of_the_marking(probs, window, within_episode, data):
    ends = data.draw(npst.arrays(bool, probs.shape))
    cut = data.draw(st.integers(0, probs.shape[1]))
    options = {"within_episode": within_episode, "causal": True}
    whole = markers.threshold(probs, 0.7, window, episode_end=ends, **options)
    part = markers.threshold(probs[:, :cut], 0.7, window, episode_end=ends[:, :cut], **options)
    np.testing.assert_array_equal(part, whole[:, :cut])
    rising = markers.rising_confidence(probs, causal=True)
    if cut:
        np.testing.assert_array_equal(markers.rising_confidence(probs[:, :cut], causal=True), rising[:, :cut])


@given(probs_arrays, windows)
def test_causal_segments_keep_their_ends_and_begin_where_the_evidence_is_in(probs, window):
    row, start, stop = markers.segments(markers.threshold(probs, 0.7, window))
    causal = markers.segments(markers.threshold(probs, 0.7, window, causal=True))
    for got, expected in zip(causal, (row, start + window - 1, stop), strict=True):
        np.testing.assert_array_equal(got, expected)


@given(npst.arrays(bool, st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20))))
def test_borders_and_segments_describe_the_mask(mask):
    start, end = markers.borders(mask)
    rows = mask.reshape(mask.shape[0] * mask.shape[1], mask.shape[2])
    triples = list(zip(*markers.segments(mask), strict=True))
    expected_start, expected_end = np.zeros_like(rows), np.zeros_like(rows)
    painted = np.zeros_like(rows)
    for row, begin, stop in triples:
        painted[row, begin:stop] = True
        expected_start[row, begin] = True
        if stop < rows.shape[1]:
            expected_end[row, stop] = True
    np.testing.assert_array_equal(painted, rows)
    np.testing.assert_array_equal(start.reshape(rows.shape), expected_start)
    np.testing.assert_array_equal(end.reshape(rows.shape), expected_end)
    assert triples == sorted(triples)


def test_the_guides_worked_example_with_window_4():
    start, end = markers.borders(markers.threshold(GUIDE_PROBS, 0.7, 4))
    assert set(np.nonzero(start)[0]) == {1, 10}
    assert set(np.nonzero(end)[0]) == {7, 14}


def test_the_guides_worked_example_with_the_default_window_marks_nothing():
    assert not markers.threshold(GUIDE_PROBS).any()


def test_a_window_that_opens_inside_a_segment_starts_with_compress_and_hides_an_end_beyond_it():
    mask = markers.threshold(GUIDE_PROBS, 0.7, 4)
    start, end = markers.borders(mask[3:7])
    assert start.tolist() == [True, False, False, False]
    assert not end.any()


def test_a_segment_open_at_the_end_is_kept():
    assert markers.threshold(np.r_[0.1, np.full(10, 0.9)]).tolist() == [False] + [True] * 10


def test_streams_do_not_mix():
    probs = np.array([[0.1] * 5 + [0.9] * 5, [0.9] * 5 + [0.1] * 5])
    assert not markers.threshold(probs, 0.7, 10).any()
    assert markers.threshold(probs, 0.7, 5).sum() == 10


def test_probability_at_the_threshold_counts_in_single_precision():
    assert markers.threshold(np.full(3, 0.7, np.float32), np.float64(0.7), 3).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_no_steps_or_no_streams(shape):
    probs = np.ones(shape)
    for name in ("threshold", "high_confidence", "rising_confidence", "rollout", "none", "all", "random"):
        assert markers.MARKER[name](probs).shape == shape


def test_one_step_and_all_marked():
    assert markers.threshold(np.ones((2, 1)), 0.7, 1).all()
    assert not markers.threshold(np.ones((2, 1))).any()
    assert not markers.rising_confidence(np.ones((2, 1))).any()
    assert markers.threshold(np.ones((2, 50))).all()
    assert markers.everything(np.zeros((2, 3))).all()
    assert not markers.nothing(np.zeros((2, 3))).any()


def test_segments_of_adjacent_episodes_stay_apart():
    ends = np.zeros(20, dtype=bool)
    ends[9] = True
    mask = markers.threshold(np.ones(20), 0.7, 10, within_episode=True, episode_end=ends)
    assert [list(map(int, part)) for part in markers.segments(mask)[1:]] == [[0, 11], [10, 20]]


@given(probs_arrays)
def test_the_guides_custom_examples(probs):
    np.testing.assert_array_equal(markers.high_confidence(probs), probs > 0.95)
    for stream, mask in zip(probs, markers.rising_confidence(probs), strict=True):
        trend = np.gradient(stream) if len(stream) > 1 else np.zeros(1)
        np.testing.assert_array_equal(mask, (stream > np.float32(0.7)) & (trend > 0))


def test_policy_ratio_keeps_runs_within_the_clip_range():
    ratio = np.array([1.0, 1.19, 0.81, 1.3, 1.0, 1.0, 0.79, 1.0])
    old = np.full(8, np.log(0.5))
    assert markers.policy_ratio(old, old + np.log(ratio), 0.2, 2).tolist() == [
        *(True, True, True),
        *(False, True, True),
        *(False, False),
    ]
    assert not markers.policy_ratio(np.full(3, -np.inf), np.full(3, -np.inf), 0.2, 1).any()


def test_low_entropy_is_the_mirror_of_threshold():
    entropy = np.array([2.0, 0.1, 0.61, 0.2, 0.7, 0.1])
    assert markers.low_entropy(entropy, 0.61, 3).tolist() == [False, True, True, True, False, False]


def test_rollout_tells_updates_apart():
    update = np.array([[0, 0, 0, 1, 1, 2, 3, 3]])
    mask = markers.rollout(update)
    assert mask[0].tolist() == [False, True, True, False, True, False, False, True]
    assert len(markers.segments(mask)[0]) == 3


@pytest.mark.parametrize("name", sorted(set(markers.MARKER) - {"rollout", "none", "all"}))
def test_nan_is_refused_with_its_place(name):
    bad = np.ones((2, 30))
    bad[1, 7] = np.nan
    arguments = (bad, np.zeros((2, 30))) if name in ("reward_matched", "policy_ratio") else (bad,)
    with pytest.raises(MarkerError, match=r"1 of 60 values are unknown \(NaN\), the first at \[1, 7\]"):
        markers.MARKER[name](*arguments)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"on_policy_threshold": 1.2}, "on_policy_threshold must be a number between 0 and 1, got 1.2"),
        ({"on_policy_threshold": "high"}, "between 0 and 1, got 'high'"),
        ({"compression_window": 0}, "compression_window must be a whole number of at least 1, got 0"),
        ({"compression_window": 2.5}, "got 2.5"),
        ({"within_episode": True}, "needs episode_end"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ConfigError, match=message):
        markers.threshold(GUIDE_PROBS, **parameters)


# ---------------------------------------------------------------- controls


def lengths_by_row(mask):
    row, start, stop = markers.segments(mask)
    return [sorted((stop - start)[row == r].tolist()) for r in range(mask.shape[0])]


@given(probs_arrays, windows, st.integers(0, 5), st.booleans())
def test_random_keeps_number_and_lengths_of_segments_per_stream(probs, window, seed, causal):
    real = markers.threshold(probs, 0.7, window, causal=causal)
    fake = markers.random(probs, 0.7, window, causal=causal, seed=seed)
    assert lengths_by_row(fake) == lengths_by_row(real)
    np.testing.assert_array_equal(fake, markers.random(probs, 0.7, window, causal=causal, seed=seed))


def test_random_places_are_uniform():
    # Segments of 2 and 1 in 5 steps: 2 orders x C(3, 2) placements of one free step more than needed = 6.
    probs = np.tile(np.array([0.9, 0.9, 0.1, 0.9, 0.1]), (6000, 1))
    masks, counts = np.unique(markers.random(probs, 0.7, 1), axis=0, return_counts=True)
    assert len(masks) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-squared, 5 degrees of freedom: p = 0.001


@given(probs_arrays.filter(lambda p: len(p) > 1), st.integers(0, 5))
def test_shuffled_gives_every_stream_the_mask_of_another(probs, seed):
    probs = probs.copy()
    real = markers.threshold(probs, 0.7, 1)
    fake = markers.shuffled(probs, 0.7, 1, seed=seed)
    assert sorted(map(tuple, fake)) == sorted(map(tuple, real))
    named = np.zeros((len(probs), len(probs)))
    np.fill_diagonal(named, 1)
    assert not (markers.shuffled(named, 0.7, 1, seed=seed) & (named > 0)).any()


def test_shuffled_needs_two_streams():
    with pytest.raises(MarkerError, match="two streams"):
        markers.shuffled(np.ones((1, 5)))


@settings(deadline=None)
@given(probs_arrays, st.integers(1, 5), st.integers(0, 3), st.sampled_from([0.0, 0.05, 0.3]), st.data())
def test_reward_matched_keeps_lengths_and_mean_rewards(probs, window, seed, tolerance, data):
    rewards = data.draw(npst.arrays(np.float32, probs.shape, elements=st.sampled_from([0.0, 0.5, 1.0])))
    real = markers.threshold(probs, 0.7, window)
    fake = markers.reward_matched(probs, rewards, 0.7, window, reward_tolerance=tolerance, seed=seed)
    assert lengths_by_row(fake) == lengths_by_row(real)
    # Sorted means within a length differ by at most the tolerance if the matched ones do.
    for r in range(len(probs)):
        assert sorted_means(fake[r], rewards[r]) == pytest.approx(
            sorted_means(real[r], rewards[r]), abs=tolerance + 1e-6
        )


def sorted_means(mask, rewards):
    _, start, stop = markers.segments(mask[None])
    return [
        m for _, m in sorted((b - a, float(rewards[a:b].mean())) for a, b in zip(start, stop, strict=True))
    ]


def test_reward_matched_moves_segments_to_where_reward_is_equal():
    probs, rewards = np.zeros((50, 200)), np.zeros((50, 200))
    probs[:, 100:110] = 1
    rewards[:, 100:150] = 1
    row, start, stop = markers.segments(markers.reward_matched(probs, rewards))
    assert (stop - start == 10).all() and len(row) == 50
    assert start.min() >= 100 and stop.max() <= 150
    assert len(np.unique(start)) > 15
