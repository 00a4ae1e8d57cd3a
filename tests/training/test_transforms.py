from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from compressed_ad.errors import ConfigError, HistoryError, UnknownNameError, UsageError
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, KeyToDoor
from compressed_ad.tasks.recall import DarkroomRecall
from compressed_ad.training import sequences as module
from compressed_ad.training.sequences import Sequences, expand, from_histories
from compressed_ad.training.transforms import apply_transforms, check_episodes, check_transforms, departures
from compressed_ad.types import History


def history(n_stream: int, n_step: int, seed: int = 0, horizon: int = 4) -> History:
    """Streams whose ``update`` numbers each transition uniquely, so that every step can be traced."""
    random = np.random.default_rng(seed)
    shape = (n_stream, n_step)
    number = np.arange(n_stream * n_step).reshape(shape)
    return History(
        states=random.integers(0, 9, (*shape, 2)).astype(np.uint8),
        actions=random.integers(0, 5, shape).astype(np.uint8),
        rewards=(random.random(shape) < 0.1).astype(np.float32),
        next_states=random.integers(0, 9, (*shape, 2)).astype(np.uint8),
        terminated=np.zeros(shape, bool),
        truncated=np.tile(np.arange(n_step) % horizon == horizon - 1, (n_stream, 1)),
        action_probs=random.random(shape).astype(np.float32),
        update=number.astype(np.int32),
        learner=np.arange(n_stream, dtype=np.int32) // 2,
        compression_mask=random.random(shape) < 0.5,
    )


DARKROOM = Darkroom()


def walk_history(
    n_stream: int, n_episode: int, goal: np.ndarray, seed: int, family: Any = DARKROOM
) -> History:
    """A random walk whose second half goes to what pays and, in Darkroom, stands on it."""
    random = np.random.default_rng(seed)
    tasks = np.repeat(goal[None], n_stream, axis=0)
    env = family.make(tasks, np.arange(n_stream))
    obs, total = env.reset(), np.zeros(n_stream)
    record: dict[str, list[np.ndarray]] = {}
    for step in range(n_episode * family.horizon):
        late = step >= n_episode * family.horizon // 2
        toward = family.optimal_action(tasks, obs, total) if late else random.integers(0, 5, n_stream)
        result = env.step(toward)
        total = np.where(result.terminated | result.truncated, 0.0, total + result.reward)
        for name, value in (
            ("states", obs),
            ("actions", toward),
            ("rewards", result.reward),
            ("next_states", result.next_obs),
            ("terminated", result.terminated),
            ("truncated", result.truncated),
        ):
            record.setdefault(name, []).append(np.array(value))
        obs = result.obs
    arrays = {name: np.stack(values, axis=1) for name, values in record.items()}
    shape = arrays["rewards"].shape
    return History(
        **arrays,
        action_probs=np.ones(shape, np.float32),
        update=np.zeros(shape, np.int32),
        learner=np.arange(n_stream, dtype=np.int32),
    )


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_expand_is_concatenated_ranges(rows: list[tuple[int, int]]) -> None:
    start = np.array([r[0] for r in rows], int)
    length = np.array([r[1] for r in rows], int)
    expected = [i for s, n in rows for i in range(s, s + n)]
    assert expand(start, length).tolist() == expected


def test_streams_become_sequences_with_their_masks() -> None:
    h = history(3, 10)
    s = from_histories({5: h, 7: history(2, 8, 1)})
    assert s.lengths.tolist() == [10, 10, 10, 8, 8]
    assert s.task.tolist() == [5, 5, 5, 7, 7]
    assert s.learner.tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_array_equal(s.mask[10:20], h.compression_mask[1])
    np.testing.assert_array_equal(s.states[20:30], h.states[2])


@pytest.mark.parametrize("name", ["entropy", "action_probs"])
def test_what_one_history_lacks_is_unknown_of_all(name: str) -> None:
    known = replace(history(2, 8), entropy=np.ones((2, 8), np.float32))
    lacks = replace(known, **{name: None})
    np.testing.assert_array_equal(
        getattr(from_histories({0: known, 1: known}), name), np.tile(getattr(known, name).ravel(), 2)
    )
    for mixed in ({0: known, 1: lacks}, {0: lacks, 1: known}, {0: lacks}):
        assert getattr(from_histories(mixed), name) is None


def test_episodes_include_an_incomplete_last_one() -> None:
    e = from_histories({0: history(2, 10)}).episodes
    assert e.length.tolist() == [4, 4, 2, 4, 4, 2]
    assert e.ordinal.tolist() == [0, 1, 2, 0, 1, 2]
    assert e.complete.tolist() == [True, True, False] * 2
    assert e.sequence.tolist() == [0, 0, 0, 1, 1, 1]


@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_subsample_keeps_whole_episodes_in_order(
    n_stream: int, n_step: int, every: int, copies: int, keep: bool, seed: int
) -> None:
    before = from_histories({0: history(n_stream, n_step, seed)})
    spec = [("subsample", {"every": every, "copies": copies, "keep_first_reward": keep})]
    if not before.ended.any():
        return
    after = apply_transforms(before, spec, seed=seed)
    number = {int(u): i for i, u in enumerate(before.update)}
    origin = np.array([number[int(u)] for u in after.update])
    np.testing.assert_array_equal(after.mask, before.mask[origin])
    np.testing.assert_array_equal(after.states, before.states[origin])
    e = before.episodes
    of = np.searchsorted(e.start, origin, side="right") - 1
    for q in range(len(after)):
        steps = slice(after.offsets[q], after.offsets[q + 1])
        assert (np.diff(origin[steps]) > 0).all()
        rows, count = np.unique(of[steps], return_counts=True)
        assert (count == e.length[rows]).all() and e.complete[rows].all()
        assert (np.diff(rows) < 2 * every).all()
        assert len({int(e.sequence[r]) for r in rows}) == 1
        if keep:
            own = np.flatnonzero((e.sequence == e.sequence[rows[0]]) & e.rewarded & e.complete)
            everything = np.flatnonzero((e.sequence == e.sequence[rows[0]]) & e.rewarded)
            if len(own) and own[0] == everything[0]:
                assert own[0] in rows


def test_subsample_draws_differ_between_copies_but_not_between_calls() -> None:
    before = from_histories({0: history(2, 200)})
    spec = [("subsample", {"every": 5, "copies": 2})]
    a, b = (apply_transforms(before, spec, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.update, b.update)
    half = len(a) // 2
    first, second = (a.update[a.offsets[q] : a.offsets[q + 1]] for q in (0, half))
    assert not np.array_equal(first, second)


def test_first_updates_and_streams() -> None:
    before = from_histories({0: history(5, 8), 3: history(3, 8, 1)})
    after = apply_transforms(before, [("streams", {"n": 1})], seed=0)
    assert list(zip(after.task.tolist(), after.learner.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (3, 0), (3, 1),
    ]  # fmt: skip
    after = apply_transforms(before, [("first_updates", {"n": 6})], seed=0)
    assert (after.update < 6).all() and after.task.tolist() == [0, 3]


def test_stitch_recomputes_rewards_and_ends_in_the_own_history() -> None:
    family = Darkroom()
    tasks = family.tasks()
    cells = [[4, 5], [4, 6], [4, 7], [4, 8], [5, 5], [5, 6]]
    ids = [int(np.flatnonzero((tasks == cell).all(axis=1))[0]) for cell in cells]
    histories = {i: walk_history(3, 10, tasks[i], i) for i in ids}
    before = from_histories(histories)
    after = apply_transforms(before, [("stitch", {"longest": 30})], seed=0, family=family, tasks=tasks)
    assert len(after) > 0
    goal = tasks[after.task[np.repeat(np.arange(len(after)), after.lengths)]]
    np.testing.assert_array_equal(after.rewards, (after.next_states == goal).all(axis=1).astype(np.float32))
    e = after.episodes
    found = np.array([e.rewarded[e.sequence == q].any() for q in range(len(after))])
    assert found.mean() > 0.5
    for q in np.flatnonzero(found):
        rewarded = e.rewarded[e.sequence == q]
        first = int(rewarded.argmax())
        assert not rewarded[:first].any() and rewarded[-1]
    assert departures(["subsample", "stitch"]) and not departures(["subsample"])


@pytest.mark.parametrize("family", [DARKROOM, KeyToDoor(4, 20), DarkroomRecall(n_cue=3)], ids=repr)
def test_stitch_gives_the_rewards_of_each_sequences_own_task(family: Any) -> None:
    tasks = family.tasks()[:40:5]
    histories = {i: walk_history(3, 10, task, i, family) for i, task in enumerate(tasks)}
    before = from_histories(histories)
    after = apply_transforms(before, [("stitch", {"longest": 60})], seed=0, family=family, tasks=tasks)
    assert len(after) > 0 and len(np.unique(after.task)) > 1
    for q in range(len(after)):
        steps = slice(after.offsets[q], after.offsets[q + 1])
        start = np.concatenate([[True], after.ended[steps][:-1]])
        task = np.repeat(tasks[after.task[q]][None], len(start), axis=0)
        moved = (after.states[steps], after.actions[steps], after.next_states[steps])
        np.testing.assert_array_equal(after.rewards[steps], family.reward(task, *moved, start))


def test_stitch_without_a_reward_function_is_refused() -> None:
    before = from_histories({0: history(2, 8)})
    with pytest.raises(UsageError, match="reward function"):
        apply_transforms(before, [("stitch", {})], seed=0)


def test_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        check_transforms([("subsample", {"evry": 3}), ("streams", {"n": 1, "m": 2})])
    assert len(error.value.problems) == 3 and "did you mean 'every'" in str(error.value)
    with pytest.raises(UnknownNameError, match="did you mean 'subsample'"):
        check_transforms([("subsampel", {})])
    with pytest.raises(ConfigError, match="every must be a whole number"):
        apply_transforms(from_histories({0: history(1, 8)}), [("subsample", {"every": 0})], seed=0)


def test_an_empty_result_is_an_error() -> None:
    h = history(1, 8)
    with pytest.raises(Exception, match="left no transition"):
        apply_transforms(
            from_histories({0: h}), [("first_updates", {"n": 1}), ("subsample", {"every": 1})], seed=0
        )


def test_sequences_are_plain_data() -> None:
    s = from_histories({0: history(1, 8)})
    assert isinstance(s, Sequences) and len(s) == 1


def marked_episodes(pattern: str) -> Sequences:
    """One stream whose episodes of 4 steps are marked (m) or not (u); only the episodes named R pay."""
    base = history(1, 4 * len(pattern))
    marked = np.repeat([c in "mM" for c in pattern], 4)[None]
    rewards = np.repeat([c in "MU" for c in pattern], 4)[None].astype(np.float32)
    return from_histories({0: replace(base, compression_mask=marked, rewards=rewards)})


@given(st.text("um", min_size=8, max_size=60), st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
def test_thin_keeps_one_episode_of_each_stride(pattern: str, marked: int, unmarked: int, seed: int) -> None:
    if (marked == 0 or "m" not in pattern) and (unmarked == 0 or "u" not in pattern):
        return
    params = {"marked_every": marked, "unmarked_every": unmarked, "keep_first_reward": False}
    result = apply_transforms(marked_episodes(pattern), [("thin", params)], seed=seed)
    kept = result.update[::4] // 4
    assert (np.diff(kept) > 0).all()
    budget = sum((1 / s if s else 0) for s in ({"m": marked, "u": unmarked}[c] for c in pattern))
    # Buckets are one unit of 1 / stride wide with a random phase: at most one more than the budget, and a
    # bucket can only be empty where one episode is worth a whole bucket or more; none is.
    assert np.floor(budget - 1e-9) <= len(kept) <= np.ceil(budget + 1e-9) + 1
    if marked == 0:
        assert all(pattern[k] == "u" for k in kept)
    if unmarked == 0:
        assert all(pattern[k] == "m" for k in kept)


def test_thin_with_equal_strides_is_spaced_as_subsample_and_keeps_the_first_reward() -> None:
    pattern = "u" * 10 + "U" + "u" * 5 + "M" * 20
    for seed in range(20):
        params = {"marked_every": 0, "unmarked_every": 4}
        kept = apply_transforms(marked_episodes(pattern), [("thin", params)], seed=seed).update[::4] // 4
        assert 10 in kept and (kept < 16).all()
    both = apply_transforms(
        marked_episodes("um" * 24), [("thin", {"marked_every": 3, "unmarked_every": 3})], seed=0
    )
    assert abs(len(both.update) / 4 - 16) <= 1
    with pytest.raises(UsageError, match="both 0"):
        apply_transforms(both, [("thin", {"marked_every": 0, "unmarked_every": 0})], seed=0)


def test_tasks_keeps_a_share_of_the_tasks() -> None:
    sequences = from_histories({k: history(2, 20, seed=k) for k in range(10)})
    kept = apply_transforms(sequences, [("tasks", {"share": 0.3})], seed=0)
    assert len(np.unique(kept.task)) == 3 and len(kept) == 6
    assert len(np.unique(apply_transforms(sequences, [("tasks", {"share": 0.01})], seed=0).task)) == 1
    drawn = {
        tuple(np.unique(apply_transforms(sequences, [("tasks", {"share": 0.3})], seed=s).task))
        for s in range(5)
    }
    assert len(drawn) > 1


def test_prolong_puts_fruitless_episodes_of_the_same_task_first() -> None:
    """Every step is traced by its ``update`` number; own episodes follow unchanged and in order."""
    base = history(6, 40, seed=3)
    early = np.arange(40)[None] < 16
    histories = {
        k: replace(
            base,
            update=base.update + 10_000 * k,
            rewards=np.where(early, 0.0, 1.0).repeat(6, axis=0).astype(np.float32),
            compression_mask=np.zeros((6, 40), bool),
        )
        for k in (0, 5)
    }
    sequences = from_histories(histories)
    result = apply_transforms(sequences, [("prolong", {"longest": 7, "candidates": 4})], seed=1)
    added = result.lengths // 4 - 10
    assert len(result) == len(sequences) and added.min() >= 0 and added.max() <= 7 and len(set(added)) > 3
    for q in range(len(result)):
        part = slice(result.offsets[q], result.offsets[q + 1])
        update, rewards = result.update[part], result.rewards[part]
        own = sequences.update[sequences.offsets[q] : sequences.offsets[q + 1]]
        np.testing.assert_array_equal(update[4 * added[q] :], own)
        assert (rewards[: 4 * added[q]] == 0).all()
        assert (update[: 4 * added[q]] // 10_000 * 10_000 == own[0] // 10_000 * 10_000).all()


def test_prolong_prefers_what_is_new_and_its_control_does_not_care_for_rewards() -> None:
    base = history(40, 40, seed=4)
    quiet = replace(base, rewards=np.zeros((40, 40), np.float32), compression_mask=np.zeros((40, 40), bool))

    def coverage(candidates: int) -> float:
        params = {"longest": 8, "candidates": candidates}
        result = apply_transforms(from_histories({0: quiet}), [("prolong", params)], seed=1)
        added = result.lengths - 40
        spans = [result.next_states[o : o + n] for o, n in zip(result.offsets[:-1], added, strict=True)]
        return float(np.mean([len(np.unique(s, axis=0)) / len(s) for s in spans if len(s)]))

    assert coverage(16) > coverage(1) + 0.05
    paid = from_histories({0: replace(quiet, rewards=np.ones((40, 40), np.float32))})
    assert len(apply_transforms(paid, [("prolong", {"longest": 5})], seed=0).rewards) == len(paid.rewards)
    control = apply_transforms(paid, [("prolong", {"longest": 5, "rewarded": True})], seed=0)
    assert len(control.rewards) > len(paid.rewards)
    marked = from_histories({0: replace(quiet, compression_mask=np.ones((40, 40), bool))})
    assert len(apply_transforms(marked, [("prolong", {})], seed=0).rewards) == len(marked.rewards)
    assert departures(["prolong"])[0].startswith("prolong puts fruitless episodes")


@pytest.mark.parametrize(
    ("family", "n_step", "fine"),
    [
        (Darkroom(3, 50), 49, False),
        (Darkroom(3, 50), 50, True),
        (DarkroomHard(3, 50), 49, True),  # goals end its episodes earlier
    ],
)
def test_transforms_that_need_complete_episodes_are_tried_before_anything_is_learned(family, n_step, fine):
    for name in ("subsample", "thin"):
        if fine:
            check_episodes([(name, {})], family, family.tasks(), n_step)
        else:
            with pytest.raises(UsageError, match=f"{name} keeps complete episodes.* to the horizon, 50"):
                check_episodes([(name, {})], family, family.tasks(), n_step)
    check_episodes([("first_updates", {"n": 3})], family, family.tasks(), n_step)


@given(st.integers(0, 10**6))
def test_sequences_of_sequences_are_what_copies_of_their_transitions_would_be(seed: int) -> None:
    random = np.random.default_rng(seed)
    block, module._BLOCK = module._BLOCK, int(random.integers(1, 5))
    try:
        chosen_again(random, seed)
    finally:
        module._BLOCK = block


def chosen_again(random: np.random.Generator, seed: int) -> None:
    """Choose among what was chosen, four times, beside copies."""
    s = from_histories({3: history(int(random.integers(1, 4)), int(random.integers(1, 30)), seed)})
    stored, number = s.states, s.update  # every transition has a number of its own
    for _ in range(4):
        e = s.episodes
        if random.random() < 0.5:
            steps = random.permutation(len(number))[: random.integers(1, len(number) + 1)]
            steps = np.sort(steps) if random.random() < 0.7 else steps  # runs, or nearly none
            cut = np.sort(random.integers(0, len(steps) + 1, 2))
            lengths = np.diff([0, *cut, len(steps)])
            s, number = s.take(steps, lengths, np.arange(3), np.arange(3)), number[steps]
        else:
            rows = random.integers(0, len(e.start), random.integers(1, 8))
            group = np.sort(random.integers(0, 3, len(rows)))
            number = number[expand(e.start[rows], e.length[rows])]
            lengths = np.bincount(group, weights=e.length[rows], minlength=3)
            s = s.take_episodes(rows, group, 3, np.zeros(3, int))
        assert s.lengths.tolist() == [n for n in lengths if n]
        np.testing.assert_array_equal(s.update, number)
        np.testing.assert_array_equal(s.states, stored[number])
        paid = [
            (s.offsets[q] + np.flatnonzero(s.rewards[s.offsets[q] : s.offsets[q + 1]] > 0))
            for q in range(len(s))
        ]
        assert s.first_reward.tolist() == [int(at[0]) if len(at) else len(number) for at in paid]
        some = random.integers(0, len(number), (2, 3))
        np.testing.assert_array_equal(s.gather("states", some), stored[number[some]])
        assert (s.row[1:] != s.row[:-1] + np.diff(s.at)[:-1]).all()  # what follows itself is one piece
        if random.random() < 0.2:
            s = s.with_columns(mask=~s.mask)
            np.testing.assert_array_equal(s.update, number)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("subsample", {"every": [2, 3], "copies": 2}),
        ("thin", {"marked_every": 2, "unmarked_every": 1}),
        ("thin", {"marked_every": 0, "unmarked_every": 1, "keep_first_reward": False}),
    ],
)
def test_episodes_that_are_chosen_part_by_part_are_those_chosen_at_once(
    name: str, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = from_histories({k: history(3, 30 + 9 * k, seed=k) for k in range(4)})
    some = some.with_columns(mask=some.mask | (some.task[some.sequence_of(np.arange(len(some.mask)))] == 2))
    once = apply_transforms(some, [(name, params)], seed=1)
    for size in (8, 80, 320):  # of which an eighth are episodes: a sequence has 8 to 15
        monkeypatch.setattr(module, "_BLOCK", size)
        parts = apply_transforms(replace(some), [(name, params)], seed=1)
        for field in ("row", "at", "offsets", "task", "learner"):
            np.testing.assert_array_equal(getattr(parts, field), getattr(once, field))


def test_lists_of_episodes_are_small() -> None:
    e = from_histories({0: history(4, 400)}).episodes
    assert sum(array.nbytes for array in vars(e).values()) <= 10 * len(e.start) + 100


def test_episodes_are_chosen_without_copying_their_transitions() -> None:
    before = from_histories({0: history(4, 400)})
    after = apply_transforms(before, [("subsample", {"every": 2, "copies": 9})], seed=0)
    assert all(after.store[name] is array for name, array in before.store.items())
    assert np.shares_memory(before.states, before.store["states"])


@given(st.lists(st.sampled_from([np.uint8, np.int16, np.int64]), min_size=1, max_size=6))
def test_histories_that_come_one_by_one_are_read_as_those_of_a_mapping(dtypes: list[type]) -> None:
    some = {
        k: replace(h, states=h.states.astype(dtype), entropy=None if k == 2 else h.action_probs)
        for k, dtype in enumerate(dtypes)
        for h in [history(2, 3 + k, k)]
    }
    whole, each = from_histories(some), from_histories((k, h) for k, h in some.items())
    assert whole.states.dtype == np.result_type(*dtypes) and (each.entropy is None) == (len(dtypes) > 2)
    assert whole.store.keys() == each.store.keys()
    for name, array in whole.store.items():
        np.testing.assert_array_equal(array, each.store[name])
    np.testing.assert_array_equal(
        whole.states, np.concatenate([h.states.reshape(-1, 2) for h in some.values()])
    )


def test_columns_are_replaced_whole_and_never_in_place() -> None:
    before = from_histories({0: history(2, 20)})
    for sequences in (before, apply_transforms(before, [("subsample", {"every": 2})], seed=0)):
        with pytest.raises(ValueError, match="read-only"):
            sequences.rewards[0] = 2
        doubled = sequences.with_columns(rewards=2 * sequences.rewards)
        np.testing.assert_array_equal(doubled.rewards, 2 * sequences.rewards)
        np.testing.assert_array_equal(doubled.update, sequences.update)
        rewards = sequences.rewards
        wrong: list[tuple[dict[str, np.ndarray], str]] = [
            ({"reward": rewards}, "unknown column 'reward' .did you mean 'rewards'"),
            (
                {"rewards": rewards[:-1]},
                f"rewards of shape .{len(rewards) - 1},.: {len(rewards)} transitions",
            ),
            ({"rewards": rewards * np.nan}, "rewards holds NaN or infinity"),
        ]
        for columns, message in wrong:
            with pytest.raises(HistoryError, match=message):
                sequences.with_columns(**columns)
        assert repr(sequences) == f"<Sequences: {len(sequences)} of {len(rewards):,} transitions in all>"


@pytest.mark.parametrize(
    ("states", "found"),
    [
        (
            np.zeros((1, 8, 3), np.uint8),
            r"states are uint8 of shape \(..., 3\), those before uint8 of shape \(..., 2\)",
        ),
        (np.zeros((1, 8, 2), np.float32), "states are float32 of shape"),
        (np.zeros((1, 8, 2), np.uint64), "states are uint64 of shape"),
    ],
)
def test_histories_that_do_not_fit_together_are_refused(states: np.ndarray, found: str) -> None:
    h = history(1, 8)
    before = replace(h, states=h.states.astype(np.int64)) if states.dtype == np.uint64 else h
    with pytest.raises(HistoryError, match=f"task 7: {found}"):
        from_histories({5: before, 7: replace(h, states=states)})


def test_nothing_can_be_taken() -> None:
    nothing = from_histories({0: history(1, 8)}).take(*(np.zeros(0, int) for _ in range(4)))
    assert len(nothing) == len(nothing.episodes.start) == len(nothing.first_reward) == 0
