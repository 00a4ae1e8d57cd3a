"""Applying markers to histories, checking a user's own, and the statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressed_ad.errors import ConfigError, MarkerError, UnknownNameError, UsageError
from compressed_ad.marking import apply as marking, markers
from compressed_ad.marking.apply import apply_marker
from compressed_ad.marking.conformance import _example, check_marker, marker_faults
from compressed_ad.marking.statistics import marking_statistics
from compressed_ad.types import History


@pytest.fixture
def history():
    return _example(3, 90)


def only_first_stream(action_probs):
    return np.where(np.arange(len(action_probs))[:, None] == 0, action_probs > 0.5, False)


def by_reward(rewards, least, *, episode_end=None, seed):
    return (rewards > least) & ~episode_end & (seed >= 0)


def test_the_marker_gets_what_it_asks_for_by_name(history):
    seen = {}

    def curious(probs, log_prob, entropy, update, terminated, truncated, episode_end, learner, seed, level=3):
        seen.update(locals())
        return np.zeros(probs.shape, dtype=bool)

    apply_marker(curious, history, seed=7, level=4)
    assert (seen["seed"], seen["level"]) == (7, 4)
    np.testing.assert_array_equal(seen["probs"], history.action_probs)
    np.testing.assert_allclose(seen["log_prob"], np.log(history.action_probs))
    np.testing.assert_array_equal(seen["episode_end"], history.terminated | history.truncated)
    np.testing.assert_array_equal(seen["learner"], history.learner)
    assert not seen["probs"].flags.writeable and history.action_probs.flags.writeable


def test_names_callables_and_module_paths_are_markers(history):
    expected = markers.threshold(history.action_probs, 0.6, 5)
    for marker in ("threshold", markers.threshold, "compressed_ad.marking.markers:threshold"):
        got = apply_marker(marker, history, on_policy_threshold=0.6, compression_window=5)
        np.testing.assert_array_equal(got, expected)
    assert apply_marker(by_reward, history, least=0.5).any()
    assert apply_marker(lambda probs, /: probs > 0.5, history).any()
    assert apply_marker(lambda probs, **rest: probs > rest["level"], history, level=0.5).any()
    assert marking.marker_name(markers.nothing) == "none"
    assert marking.marker_name(by_reward).endswith(":by_reward")


@pytest.mark.parametrize("name", sorted(markers.MARKER))
def test_every_registered_marker_marks_and_passes_its_own_check(name, history):
    assert apply_marker(name, history).shape == (3, 90)
    assert check_marker(name) == []


def test_within_episode_needs_no_array_from_the_user(history):
    mask = apply_marker("threshold", history, within_episode=True, compression_window=5)
    _, start, stop = markers.segments(mask)
    assert len(start) and (stop - start).max() <= 15


def test_parameters_a_user_may_set():
    assert marking.marker_parameters("threshold") == {
        "on_policy_threshold": 0.7,
        "compression_window": 10,
        "within_episode": False,
        "causal": False,
    }
    assert marking.marker_parameters(by_reward) == {"least": marking.REQUIRED}


def test_an_unknown_marker_or_parameter_is_named_with_the_nearest(history):
    with pytest.raises(UnknownNameError, match="did you mean 'threshold'"):
        apply_marker("treshold", history)
    with pytest.raises(ConfigError) as error:
        apply_marker("threshold", history, on_policy_treshold=0.5, window=3, probs=history.action_probs)
    assert "'on_policy_treshold' (did you mean 'on_policy_threshold'?)" in error.value.problems[0]
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError, match=r"needs 'actionprobs'.*did you mean 'action_probs'"):
        apply_marker(lambda actionprobs: actionprobs, history)
    with pytest.raises(ConfigError, match="marker 'threshold': compression_window must be a whole number"):
        apply_marker("threshold", history, compression_window=-1)
    with pytest.raises(UsageError, match="not a function"):
        apply_marker("compressed_ad.marking.markers:__doc__", history)


def test_a_history_without_the_array_or_with_nan_is_refused(history):
    with pytest.raises(MarkerError, match="'low_entropy': needs entropy, which this history does not have"):
        apply_marker("low_entropy", replace(history, entropy=None))
    history.action_probs[2, 5] = np.nan
    with pytest.raises(MarkerError, match=r"'threshold': probs: 1 of 270 values .* the first at \[2, 5\]"):
        apply_marker("threshold", history)
    with pytest.raises(MarkerError, match="unknown"):
        apply_marker(lambda action_probs: action_probs > 0, history)
    assert apply_marker("rollout", history).any()


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (lambda probs: (probs > 0.5).astype(int), "dtype of its result is int64"),
        (lambda probs: probs[0] > 0.5, r"shape of its result is \(90,\)"),
        (lambda probs: None, "returns a NoneType"),
    ],
)
def test_a_result_that_is_no_mask_is_refused(marker, message, history):
    with pytest.raises(MarkerError, match=message):
        apply_marker(marker, history)


def test_each_task_has_its_own_seed(history):
    both = marking.mark_all("random", {3: history, 5: history}, seed=1)
    assert (both[3].compression_mask != both[5].compression_mask).any()
    alone = marking.mark_all("random", {5: history}, seed=1)
    np.testing.assert_array_equal(alone[5].compression_mask, both[5].compression_mask)


# ---------------------------------------------------------------- check_marker


def in_place(probs):
    probs[...] = 0
    return probs > 0.5


def across_streams(probs):
    return probs > probs.mean()


def coin(probs):
    return np.random.default_rng().random(probs.shape) > 0.5


def needs_length(probs):
    return np.gradient(probs, axis=1) > 0


def looks_ahead(probs, causal=False):
    return probs > probs.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        (in_place, "It modifies the arrays it is given"),
        (across_streams, "The mask of a stream depends on the other streams"),
        (coin, "Two calls on the same history give different masks"),
        (
            needs_length,
            "It cannot mark histories of one step: marker 'tests.marking.test_apply:need",
        ),
        (looks_ahead, "With causal=True the marking of a prefix is not a prefix"),
        (lambda terminated: terminated, "Its result shares memory with the history"),
        (lambda probs: probs > np.zeros(7), "shapes (4,120) (7,) (ValueError in test_apply.py:"),
        (lambda probs: (probs > 0.5).tolist(), "must return a bool array"),
        ("nonsense", "unknown marker"),
    ],
)
def test_check_marker_finds(marker, sentence):
    assert sentence in " ".join(check_marker(marker))


def test_check_marker_passes_a_good_one():
    assert check_marker(by_reward, least=0.5) == []


def test_a_marker_that_needs_two_steps_may_be_used():
    """The guide's example of a custom strategy is one."""
    assert check_marker(needs_length) and marker_faults(needs_length) == []
    assert marker_faults(across_streams) == check_marker(across_streams) != []


# ---------------------------------------------------------------- statistics


def test_statistics_in_the_guides_form():
    mask = np.zeros((2, 100), dtype=bool)
    mask[:, 60:] = True
    mask[1, 20:25] = True
    statistics = marking_statistics([mask, mask])
    assert statistics.text().splitlines() == [
        "Compression Statistics:",
        "  Total steps: 400",
        "  Compressed steps: 170",
        "  Compression ratio: 42.5%",
        "  By tenth of training: 0% 0% 25% 0% 0% 0% 100% 100% 100% 100%",
    ]


@pytest.mark.parametrize(("marked", "words"), [(5, "try 0.5-0.6"), (85, "try 0.8-0.9"), (40, None)])
def test_the_guides_advice(marked, words):
    text = marking_statistics([np.arange(100)[None] < marked]).text()
    assert (words in text) if words else ("What helps" not in text)


def test_advice_names_only_what_the_marker_has_and_no_number_that_it_has_passed():
    few = marking_statistics([np.arange(100)[None] < 5])
    assert "What helps" not in few.text({})
    low = few.text({"on_policy_threshold": 0.4, "compression_window": 10})
    assert "lower on_policy_threshold\n" in low and "reduce compression_window (try 5)" in low
    edge = few.text({"on_policy_threshold": 0.6, "compression_window": 5})
    assert "lower on_policy_threshold\n" in edge and "reduce compression_window\n" in edge
    assert "threshold" not in few.text({"on_policy_threshold": "auto", "compression_window": 10})
    many = marking_statistics([np.arange(100)[None] < 85])
    edge = many.text({"on_policy_threshold": 0.8, "compression_window": 15})
    assert "raise on_policy_threshold\n" in edge and "increase compression_window\n" in edge
    high = many.text({"on_policy_threshold": 0.95})
    assert "raise on_policy_threshold\n" in high and "compression_window" not in high


@pytest.mark.parametrize("shape", [(2, 0), (0, 9), (2, 3), (2, 10), (3, 37)])
def test_statistics_of_any_shape_count_every_step(shape):
    draw = np.random.default_rng(0)
    mask = draw.random(shape) < 0.5
    statistics = marking_statistics([mask])
    assert (statistics.total_steps, statistics.compressed_steps) == (mask.size, mask.sum())
    phase = np.arange(shape[1]) * 10 // max(shape[1], 1)
    for tenth, ratio in enumerate(statistics.ratio_by_phase):
        part = mask[:, phase == tenth]
        assert ratio == part.mean() if part.size else np.isnan(ratio)
    assert statistics.text()


def test_no_steps_at_all():
    assert marking_statistics([]).compression_ratio == 0
    assert marking_statistics([]).advice() == []


def test_log_probabilities_are_those_of_whole_actions():
    """Geometric means become joint probabilities; relative ones of a density are none, and are refused."""
    probs = np.random.default_rng(0).uniform(0.1, 0.9, (2, 30)).astype(np.float32)
    flags, numbers = np.zeros((2, 30), bool), np.zeros((2, 30), np.int32)

    def history(actions):
        return History(
            states=numbers, actions=actions, rewards=probs, next_states=numbers, terminated=flags,
            truncated=flags, action_probs=probs, update=numbers, learner=np.zeros(2, np.int32),
            log_prob_next=3 * np.log(probs),
        )  # fmt: skip

    options = {"clip_range": 0.01, "compression_window": 1}
    three = np.zeros((2, 30, 3), np.int64)
    assert apply_marker("policy_ratio", history(three), **options).all()
    assert not apply_marker("policy_ratio", history(three[..., 0]), **options).any()
    with pytest.raises(MarkerError, match="needs log_prob, which this history does not have"):
        apply_marker("policy_ratio", history(three.astype(np.float32)), **options)
