"""Limits against every agent there is, on rooms so small that all action sequences can be played."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import UsageError
from compressed_ad.tasks import limit_search
from compressed_ad.tasks.bandit import BernoulliBandit
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, DarkroomPermuted, KeyToDoor
from compressed_ad.tasks.limit_search import HiddenPlaces, find_limit
from compressed_ad.tasks.limits import FILE, Limit, shipped_limit
from compressed_ad.types import Step

KEPT = json.loads(FILE.read_text())


@dataclass(frozen=True)
class Corridor:
    """A family of a user's own: 5 places in a row, actions left and right, the hidden one pays once."""

    horizon: int = 3
    name = "corridor"
    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(2)
    fixed_start = 1
    pays_on = False

    def tasks(self) -> Any:
        return np.arange(5)[:, None]

    def rewarded_places(self, tasks: Any) -> Any:
        return tasks

    def successor_table(self, tasks: Any) -> Any:
        moves = np.stack([np.maximum(np.arange(5) - 1, 0), np.minimum(np.arange(5) + 1, 4)], axis=1)
        return np.broadcast_to(moves, (len(tasks), 5, 2))

    def optimal_return(self, tasks: Any) -> Any:
        return (np.array([1, 2, 1, 2, 3]) <= self.horizon)[tasks[:, 0]].astype(float)

    def random_return(self, tasks: Any) -> Any:
        return np.array([0.5, 0.4, 0.5, 0.25, 0.125])[tasks[:, 0]] * self.optimal_return(tasks)

    def make(self, tasks: Any, seeds: Any) -> Any:
        return _CorridorEnv(self, tasks[:, 0])


class _CorridorEnv:
    def __init__(self, family: Corridor, goals: Any) -> None:
        self.family, self.goals, self.num_envs = family, goals, len(goals)

    def reset(self) -> Any:
        self.place, self.time = np.ones(self.num_envs, int), np.zeros(self.num_envs, int)
        return self.place.copy()

    def step(self, actions: Any) -> Step:
        self.place = np.clip(self.place + np.where(actions == 1, 1, -1), 0, 4)
        self.time += 1
        reached, paid = self.place.copy(), self.place == self.goals
        over = paid | (self.time >= self.family.horizon)
        self.place[over], self.time[over] = 1, 0
        return Step(reached, paid.astype(np.float32), paid, over & ~paid, self.place.copy())


def best_of_all_agents(family: TaskFamily, n_episode: int) -> tuple[float, list[float]]:
    """The most that any agent earns: in the mean of the episodes, and in each of them. By trying everything.

    Every sequence of actions is played in every task. Then the best action is chosen from the end on, in each
    history of observations, rewards and ends: these are all adaptive agents that do not know the task.
    """
    tasks, n_action = family.tasks(), int(family.action_space.n)  # type: ignore[attr-defined]
    random, optimal = family.random_return(tasks), np.asarray(family.optimal_return(tasks), float)
    length, (n_task,) = n_episode * family.horizon, optimal.shape
    sequences = np.array(list(product(range(n_action), repeat=length)))
    env = family.make(np.repeat(tasks, len(sequences), axis=0), np.zeros(n_task * len(sequences), int))
    env.reset()
    slots = np.arange(n_task * len(sequences))
    returns, episode, seen = np.zeros((len(slots), length + 1)), np.zeros(len(slots), int), []
    for actions in np.tile(sequences, (n_task, 1)).T:
        step = env.step(actions)
        ended = step.terminated | step.truncated
        returns[slots, episode] += step.reward
        episode += ended
        place = np.asarray(step.next_obs).reshape(len(slots), -1) @ [10, 1][-np.ndim(step.next_obs) :]
        seen.append((place * 10 + step.reward.astype(int) * 2 + ended).reshape(n_task, len(sequences)))
    counts = optimal > random
    normalised = (returns[:, :n_episode].reshape(n_task, -1, n_episode) - random[:, None, None])[counts]
    normalised /= (optimal - random)[counts, None, None]
    seen = [column[counts].astype(int) for column in seen]

    def best(scores: Any, t: int, first: int, group: Any) -> float:
        if len(group) == 1 or t == length:  # the task is known, or all is over
            return float(scores[group, first : first + n_action ** (length - t)].sum(0).max())
        values = []
        for action in range(n_action):
            at = first + action * n_action ** (length - t - 1)
            outcome = seen[t][group, at]
            values.append(sum(best(scores, t + 1, at, group[outcome == o]) for o in np.unique(outcome)))
        return max(values)

    everything = np.arange(counts.sum())
    each = [best(normalised[..., k], 0, 0, everything) / counts.sum() for k in range(n_episode)]
    return best(normalised.mean(2), 0, 0, everything) / counts.sum(), each


@pytest.mark.parametrize(
    ("family", "n_episode"),
    [
        (Darkroom(3, 2), 3),
        (Darkroom(3, 3), 2),
        (Darkroom(2, 5), 1),
        (DarkroomHard(3, 2), 3),
        (DarkroomHard(3, 5), 1),
        (KeyToDoor(2, 3), 2),
        (KeyToDoor(2, 2, ends=False), 2),
        (DarkroomPermuted(2, 4), 1),
        (DarkroomPermuted(2, 2), 2),
        (Corridor(3), 3),
        (Corridor(4), 2),
    ],
    ids=str,
)
def test_the_best_of_all_agents_lies_between_what_is_reached_and_the_bound(
    family: Any, n_episode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_search, "ROUNDS", 20)
    limit = find_limit(family)
    area, each = best_of_all_agents(family, n_episode)
    assert limit.area(n_episode) <= area + 1e-9
    assert area <= limit.bound_area(n_episode) + 1e-9
    assert (limit.curve(n_episode) <= np.add(each, 1e-9)).all()
    assert (limit.bound_curve(n_episode) >= np.subtract(each, 1e-9)).all()
    if isinstance(family, DarkroomPermuted):  # where moves are hidden, the first episode is exact
        assert limit.reached[0] == pytest.approx(each[0], abs=1e-9)
        assert limit.bound[0] == pytest.approx(each[0], abs=1e-9)
    if isinstance(family, Corridor):  # so simple that nothing is between plan and bound
        assert limit.area(n_episode) == pytest.approx(area, abs=1e-9)
        assert limit.bound_area(n_episode) == pytest.approx(area, abs=1e-9)


SMALL = st.one_of(
    st.builds(Darkroom, st.integers(2, 4), st.integers(2, 7)),
    st.builds(DarkroomHard, st.integers(2, 4), st.integers(2, 7)),
    st.builds(KeyToDoor, st.integers(2, 3), st.integers(3, 7), st.just("centre"), st.booleans()),
    st.builds(Corridor, st.integers(2, 6)),
)


@given(SMALL)
@settings(max_examples=15, deadline=None)
def test_limits_rise_to_1_and_stay_below_the_bound(family: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit_search, "ROUNDS", 5)
        limit = find_limit(family)
    for values in (limit.reached, limit.bound):
        assert (np.diff(values) >= -1e-9).all()
        assert values[-1] == pytest.approx(1)
    for n in (1, 2, 3, 7, 30):
        assert limit.area(n) == pytest.approx(limit.curve(n).mean())
        assert limit.area(n) <= limit.bound_area(n) + 1e-9 <= limit.bound_curve(n).mean() + 2e-9
        assert limit.curve(n).shape == limit.bound_curve(n).shape == (n,)


def test_a_plan_earns_in_the_environment_what_the_limit_says() -> None:
    """An agent that follows the plan until a reward comes, and is optimal from then on."""
    kept: list[Any] = []

    def remember(self: HiddenPlaces, *args: Any) -> Any:
        kept.append(original(self, *args))
        return kept[-1]

    original = HiddenPlaces.plan
    for family in (Darkroom(5, 6), DarkroomHard(5, 6)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HiddenPlaces, "plan", remember)
            patch.setattr(limit_search, "ROUNDS", 20)
            limit = find_limit(family)
        tasks, moves = family.tasks(), family.successor_table(family.tasks())[0]
        env = family.make(tasks, np.zeros(len(tasks), int))
        obs, known = env.reset(), np.zeros(len(tasks), bool)
        returns = np.zeros((len(tasks), len(limit.reached)))
        time, episode = np.zeros(len(tasks), int), np.zeros(len(tasks), int)
        slots = np.arange(len(tasks))
        while (episode < len(limit.reached)).any():
            actions = family.optimal_action(tasks, obs, np.zeros(len(tasks)))
            for slot in np.flatnonzero(~known & (episode < len(kept[-1]))):
                to = kept[-1][episode[slot]][time[slot]]
                actions[slot] = int(np.argmax(moves[family.index(obs[slot])] == to))
            step = env.step(actions)
            ended = step.terminated | step.truncated
            live = episode < len(limit.reached)
            returns[slots[live], episode[live]] += step.reward[live]
            known |= step.reward > 0
            time, episode, obs = np.where(ended, 0, time + 1), episode + ended, step.obs
        random, optimal = family.random_return(tasks)[:, None], family.optimal_return(tasks)[:, None]
        curve = ((returns - random) / (optimal - random)).mean(0)
        np.testing.assert_allclose(curve, limit.reached, atol=1e-9)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", KEPT)
def test_kept_limits_are_of_the_default_parameters_and_tight(name: str) -> None:
    family, limit = TASK_FAMILY[name](), shipped_limit(name)
    assert limit is not None
    parameters = KEPT[name]["parameters"]
    assert {key: getattr(family, key) for key in parameters} == parameters
    assert set(parameters) == {field.name for field in fields(family)}  # type: ignore[arg-type]
    assert limit.reached[-1] == limit.bound[-1] == 1
    for n in range(1, 101):
        assert limit.area(n) <= limit.bound_area(n) + 1e-6
        assert limit.curve(n)[-1] <= limit.bound_curve(n)[-1] + 1e-6
    assert (np.diff(limit.reached) > 0).all()
    assert limit.bound_area(50) - limit.area(50) < 0.003


def test_kept_limits_are_what_is_found() -> None:
    found = find_limit(DarkroomPermuted())
    assert {part: pytest.approx(values, abs=1e-6) for part, values in vars(found).items()} == {
        part: tuple(KEPT["darkroom_permuted"][part]) for part in vars(found)
    }
    # Three of five moves are of no use. In expectation one is tried before the first good move, at the cost
    # of a step, and one before the second, where one of three leads back and costs two: 7/3 steps of 35.
    random = DarkroomPermuted().random_return(DarkroomPermuted().tasks())[0]
    assert found.reached[0] == pytest.approx((35 - 7 / 3 - random) / (35 - random))


def test_limits_are_known_for_default_parameters_only() -> None:
    for text in ("darkroom", "darkroom(size=9, horizon=20)", "darkroom(horizon=20)"):
        assert shipped_limit(text) == shipped_limit("darkroom") is not None
    assert shipped_limit("key_to_door(start=centre, ends=True)") is not None
    for text in (
        *("darkroom(size=8)", "darkroom(size=9, horizon=21)", "darkroom(size=9, other=1)", "Darkroom"),
        *("key_to_door(start=random)", "key_to_door(ends=False)", "mine:darkroom", "point_mass", ""),
    ):
        assert shipped_limit(text) is None, text


def test_curves_and_areas_go_on_with_the_last_value() -> None:
    limit = Limit((0.2, 0.6, 1.0), (0.3, 1.0), (0.3, 1.2))
    np.testing.assert_array_equal(limit.curve(5), [0.2, 0.6, 1, 1, 1])
    np.testing.assert_array_equal(limit.bound_curve(1), [0.3])
    assert limit.area(4) == pytest.approx(0.7)
    assert [limit.bound_area(n) for n in (1, 2, 4)] == pytest.approx([0.3, 0.6, 0.8])


def test_families_without_a_limit_say_why() -> None:
    class Both(DarkroomPermuted):
        """Moves and goal are hidden."""

        def rewarded_places(self, tasks: Any) -> Any:
            return np.arange(len(tasks))[:, None] % 4

    class Blocked(Darkroom):
        def successor_table(self, tasks: Any) -> Any:
            return np.where(np.arange(5) == 1, -1, super().successor_table(tasks))

    class Three(Darkroom):
        def rewarded_places(self, tasks: Any) -> Any:
            return np.repeat(super().rewarded_places(tasks), 3, axis=1)

    class Outside(Darkroom):
        def rewarded_places(self, tasks: Any) -> Any:
            return super().rewarded_places(tasks) + 1

    for family, why in (
        (Blocked(3, 5), "-1 stands for none"),
        (Outside(3, 5), "from places to places"),
        (Three(3, 5), r"one or two places for each task, not \(9, 3\)"),
        (BernoulliBandit(), "needs known moves"),
        (KeyToDoor(start="random"), "one place to start"),
        (DarkroomPermuted(9, 3), "no task pays more than random actions"),
        (Both(2, 4), "one must be known"),
    ):
        with pytest.raises(UsageError, match=why):
            find_limit(family)
