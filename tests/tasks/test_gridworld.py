"""The dark rooms: dynamics by hand, returns against every action sequence, batching, wrong use."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.bandit import BernoulliBandit
from compressed_ad.tasks.base import TASK_FAMILY, OptimalPolicy, RewardFunction, TaskFamily
from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.from_gymnasium import GymnasiumFamily
from compressed_ad.tasks.gridworld import (
    Darkroom,
    DarkroomHard,
    DarkroomLarge,
    DarkroomPermuted,
    Grid,
    KeyToDoor,
)
from compressed_ad.tasks.point_mass import PointMass

STAY, UP, DOWN, LEFT, RIGHT = range(5)
SMALL = [
    Darkroom(3, 5),
    Darkroom(2, 1),
    DarkroomHard(4, 5),
    DarkroomPermuted(2, 4),
    KeyToDoor(3, 5),
    KeyToDoor(2, 3),
    KeyToDoor(3, 5, ends=False),
]


def play(family, task, moves):
    """Rewards and ends of one episode; stops where the episode ends."""
    env = family.make(np.array([task]), np.array([0]))
    env.reset()
    steps = []
    for move in moves:
        steps.append(env.step(np.array([move])))
        if steps[-1].terminated[0] or steps[-1].truncated[0]:
            break
    return steps


def every_sequence(family, tasks):
    """Transitions of all 5**horizon action sequences of one episode, (task, sequence, time, ...)."""
    actions = np.array(list(product(range(5), repeat=family.horizon)))
    slots = np.repeat(tasks, len(actions), axis=0)
    env = family.make(slots, np.arange(len(slots)))
    obs, live, record = env.reset(), np.ones(len(slots), bool), []
    for column in np.tile(actions, (len(tasks), 1)).T:
        step = env.step(column)
        record.append((obs, column, step.next_obs, step.reward * live, live.copy()))
        live &= ~(step.terminated | step.truncated)
        obs = step.obs
    assert not live.any()
    shape = (len(tasks), len(actions))
    return [
        np.stack(a, 1).reshape(*shape, family.horizon, *a[0].shape[1:]) for a in zip(*record, strict=True)
    ]


@pytest.mark.parametrize("family", SMALL, ids=repr)
def test_returns_are_exact_over_all_action_sequences(family):
    tasks = family.tasks()
    returns = every_sequence(family, tasks)[3].sum(-1)
    np.testing.assert_array_equal(family.optimal_return(tasks), returns.max(1))
    np.testing.assert_allclose(family.random_return(tasks), returns.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    "family", [Darkroom(3, 4), DarkroomHard(3, 4), KeyToDoor(2, 4), KeyToDoor(2, 4, ends=False)], ids=repr
)
def test_recomputed_rewards_are_those_of_the_environment(family):
    tasks = family.tasks()
    states, actions, successors, rewards, live = every_sequence(family, tasks)
    start = np.zeros(live.shape[1:], bool)
    start[:, 0] = True
    # Steps after an early end belong to a new episode: they are dropped before the comparison.
    named = np.broadcast_to(tasks[:, None, None], (*live.shape, tasks.shape[1]))
    start = np.broadcast_to(start, live.shape)
    got = family.reward(*(a[live] for a in (named, states, actions, successors, start)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, rewards[live])


@pytest.mark.parametrize(
    "name", ["darkroom", "darkroom_large", "darkroom_hard", "darkroom_permuted", "key_to_door"]
)
def test_optimal_policy_reaches_the_optimal_return_on_every_task(name):
    family = TASK_FAMILY[name]()
    tasks = family.tasks()
    env = family.make(tasks, np.arange(len(tasks)))
    obs, total, live = env.reset(), np.zeros(len(tasks)), np.ones(len(tasks), bool)
    for _ in range(family.horizon):
        actions = family.optimal_action(tasks, obs, total)
        step = env.step(actions)
        total += step.reward * live
        live &= ~(step.terminated | step.truncated)
        obs = step.obs
    np.testing.assert_array_equal(total, family.optimal_return(tasks))


def test_known_optima():
    for family, optimum in [
        (Darkroom(), 16.5432),
        (DarkroomLarge(), 43.5289),
        (DarkroomHard(), 1),
        (DarkroomPermuted(), 35),
        (KeyToDoor(), 2),
    ]:
        assert isinstance(family, TaskFamily)
        assert isinstance(family, OptimalPolicy)
        assert family.optimal_return(family.tasks()).mean() == pytest.approx(optimum, abs=1e-4)
    goals = Darkroom().tasks()
    distance = np.abs(goals - 4).sum(1)
    np.testing.assert_array_equal(Darkroom().goal_distance(goals), distance)
    np.testing.assert_array_equal(Darkroom().optimal_return(goals), np.minimum(20, 21 - distance))
    assert Darkroom().random_return(goals).sum() == pytest.approx(20)


def test_sizes_of_the_task_sets():
    assert Darkroom().tasks().shape == (81, 2)
    assert DarkroomPermuted().tasks().shape == (120, 5)
    assert KeyToDoor().tasks().shape == (6561, 4)
    assert len(np.unique(KeyToDoor().tasks(), axis=0)) == 6561
    np.testing.assert_array_equal(KeyToDoor().tasks()[[0, 1, 81]], [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])


def test_moves_walls_and_start():
    steps = play(Darkroom(9, 20), (0, 0), [STAY, UP, DOWN, LEFT, RIGHT, *[LEFT] * 6, *[UP] * 6])
    path = [tuple(s.next_obs[0].tolist()) for s in steps]
    assert path[:5] == [(4, 4), (4, 5), (4, 4), (3, 4), (4, 4)]
    assert path[10] == (0, 4)
    assert path[16] == (0, 8)


def test_time_limit_truncates_and_shows_the_true_successor():
    steps = play(Darkroom(9, 3), (7, 4), [RIGHT] * 9)
    assert [s.reward[0] for s in steps] == [0, 0, 1]
    assert steps[-1].truncated[0]
    assert not steps[-1].terminated[0]
    assert steps[-1].next_obs[0].tolist() == [7, 4]
    assert steps[-1].obs[0].tolist() == [4, 4]
    steps = play(DarkroomHard(9, 3), (7, 4), [RIGHT] * 9)
    assert len(steps) == 3 and steps[-1].terminated[0]
    assert not steps[-1].truncated[0]


def test_permuted_actions():
    task = (RIGHT, STAY, UP, DOWN, LEFT)
    steps = play(DarkroomPermuted(9, 50), task, [0, 0, 2, 1, 3, 4])
    assert [s.next_obs[0].tolist() for s in steps] == [[1, 0], [2, 0], [2, 1], [2, 1], [2, 0], [1, 0]]
    assert not isinstance(DarkroomPermuted(), RewardFunction)


def test_key_opens_door_once():
    family = KeyToDoor()
    steps = play(family, (5, 4, 4, 5), [UP, DOWN, RIGHT, STAY, LEFT, UP])
    assert [s.reward[0] for s in steps] == [0, 0, 1, 0, 0, 1]
    assert steps[-1].terminated[0]
    assert not steps[-1].truncated[0]


def test_key_on_start_and_key_on_door():
    assert [s.reward[0] for s in play(KeyToDoor(), (4, 4, 4, 5), [STAY, UP])] == [1, 1]
    assert [s.reward[0] for s in play(KeyToDoor(), (4, 4, 4, 5), [UP, DOWN, UP])] == [0, 1, 1]
    assert [s.reward[0] for s in play(KeyToDoor(), (4, 5, 4, 5), [UP, UP])] == [2]
    assert [s.reward[0] for s in play(KeyToDoor(), (4, 4, 4, 4), [STAY])] == [2]


def test_a_door_that_does_not_end_the_episode_pays_once():
    moves = [UP, DOWN, UP, STAY, DOWN]
    steps = play(KeyToDoor(9, 5, ends=False), (4, 5, 4, 4), moves)
    assert [s.reward[0] for s in steps] == [1, 1, 0, 0, 0]
    assert [bool(s.terminated[0]) for s in steps] == [False] * 5 and steps[-1].truncated[0]
    assert [s.reward[0] for s in play(KeyToDoor(9, 3, ends=False), (4, 4, 4, 4), [STAY] * 3)] == [2, 0, 0]


def test_random_starts_are_drawn_from_the_seed_of_a_slot_and_never_on_the_key():
    family = KeyToDoor(3, 4, start="random")
    tasks = family.tasks()
    check_family(family)
    env = family.make(np.repeat(tasks[40:41], 4000, axis=0), np.arange(4000))
    started = family.index(env.reset())
    key = int(family.index(tasks[40, :2]))
    counts = np.bincount(started, minlength=9)
    assert counts[key] == 0
    assert np.abs(np.delete(counts, key) - 500).max() < 110  # five standard deviations of a uniform draw
    again = [family.index(env.step(np.full(4000, UP)).obs) for _ in range(4)][-1]
    assert (again != started).mean() > 0.8 and (again != key).all()


def test_returns_with_a_random_start_are_the_mean_over_starts():
    """Against the family with a fixed start in each cell in turn."""

    class From(KeyToDoor):
        cell = (0, 0)

        @property
        def start_cell(self):
            return self.cell

    family = KeyToDoor(3, 4, start="random")
    tasks = family.tasks()
    optimal, random, found = np.zeros((3, 9, len(tasks)))
    for k, cell in enumerate(family.tasks()[:9, 2:].tolist()):
        fixed = From(3, 4)
        From.cell = tuple(cell)
        optimal[k], random[k] = fixed.optimal_return(tasks), fixed.random_return(tasks)
        found[k] = fixed.random_found(tasks)
    elsewhere = np.arange(9)[:, None] != family.index(tasks[:, :2])
    for one, each in (
        (family.optimal_return(tasks), optimal),
        (family.random_return(tasks), random),
        (family.random_found(tasks), found),
    ):
        np.testing.assert_allclose(one, (each * elsewhere).sum(0) / 8)
    assert (family.optimal_return(tasks) < 2).any()


def test_recomputed_rewards_begin_anew_with_each_episode():
    family = KeyToDoor(3, 9)
    successors = np.array([[0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [1, 1], [0, 0]])
    start = np.array([1, 0, 0, 0, 1, 0, 0], bool)
    tasks = np.array([[1, 1, 0, 0]] * 4 + [[0, 0, 1, 1]] * 3)
    got = family.reward(tasks, successors, np.zeros(7), successors, start)
    assert got.tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert len(family.reward(tasks[:0], successors[:0], np.zeros(0), successors[:0], start[:0])) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([Darkroom(4, 6), DarkroomHard(3, 7), DarkroomPermuted(3, 5), KeyToDoor(3, 8)]), st.data()
)
def test_slots_are_independent(family, data):
    """A slot does the same alone as beside others whose episodes end at other times."""
    tasks = family.tasks()
    ids = data.draw(st.lists(st.integers(0, len(tasks) - 1), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    actions = rng.integers(0, 5, (25, len(ids)))

    def run(columns):
        env = family.make(tasks[ids][columns], np.arange(len(columns)))
        rows = [[env.reset()]]
        for row in actions[:, columns]:
            step = env.step(row)
            rows.append([step.next_obs, step.reward, step.terminated, step.truncated, step.obs])
        return rows

    together = run(list(range(len(ids))))
    for i in range(len(ids)):
        for all_slots, alone in zip(together, run([i]), strict=True):
            for a, b in zip(all_slots, alone, strict=True):
                np.testing.assert_array_equal(a[i], b[0])
                assert a.dtype == b.dtype


def test_results_are_not_overwritten_by_later_steps():
    family = KeyToDoor(3, 4)
    env = family.make(family.tasks()[:6], np.arange(6))
    env.reset()
    first = env.step(np.full(6, UP))
    copies = [np.copy(a) for a in vars(first).values() if a is not None]
    for move in (RIGHT, DOWN, LEFT, UP):
        env.step(np.full(6, move))
    for kept, now in zip(copies, (a for a in vars(first).values() if a is not None), strict=True):
        np.testing.assert_array_equal(kept, now)


@pytest.mark.parametrize(("size", "horizon"), [(1, 20), (9, 0), (9.0, 20), (True, 3), ("9", 20)])
def test_wrong_parameters_name_the_key(size, horizon):
    with pytest.raises(
        UsageError,
        match=r"darkroom: (size|horizon) must be a whole number (of at l|between)",
    ):
        TASK_FAMILY["darkroom"](size=size, horizon=horizon)


@pytest.mark.parametrize(
    ("family", "shown"),
    [
        (Darkroom(), "Darkroom(size=9, horizon=20): 81 tasks"),
        (DarkroomPermuted(4), "DarkroomPermuted(size=4, horizon=50): 120 tasks"),
        (KeyToDoor(), "KeyToDoor(size=9, horizon=50, start=centre, ends=True): 6,561 tasks"),
        (
            BernoulliBandit(n_task=30),
            "BernoulliBandit(n_arm=10, task_seed=0, horizon=1, alpha=1.0, beta=1.0): 30 tasks",
        ),
        (
            PointMass("sparse", speed=1),
            "PointMass(reward_kind=sparse, horizon=20, speed=1.0, radius=0.2, task_seed=0): 64 tasks",
        ),
        (
            GymnasiumFamily("Pendulum-v1", horizon=9),
            "GymnasiumFamily(env_id=Pendulum-v1, task_seed=0, horizon=9, random_episodes=20): 1 task",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_family_shows_itself_in_one_line(family, shown, monkeypatch):
    if not isinstance(family, Grid):
        monkeypatch.setattr(type(family), "tasks", None)  # drawing tasks may take long
    assert repr(family) == shown


def test_wrong_tasks_and_actions():
    family = Darkroom()
    for tasks in (np.zeros(2, int), np.zeros((1, 3), int), np.array([[0, 9]]), np.array([[0.5, 1]])):
        with pytest.raises(UsageError, match="darkroom"):
            family.make(tasks, np.arange(len(tasks)))
    with pytest.raises(UsageError, match="permutations"):
        DarkroomPermuted().make(np.array([[0, 1, 2, 3, 3]]), np.array([0]))
    env = family.make(family.tasks()[:2], np.arange(2))
    env.reset()
    for actions in (np.array([0, 5]), np.array([-1, 0]), np.array([0]), np.array([0.0, 1.0])):
        with pytest.raises(SpaceError, match="darkroom"):
            env.step(actions)
