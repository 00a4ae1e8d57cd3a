"""R-max: beside a plain-Python planner, source curves, inner walls, and collections in large blocks."""

import pickle
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressed_ad import Darkroom, History, HistoryFile, collect, make_family, make_learner
from compressed_ad.errors import ConfigError, RunError, SpaceError, UsageError
from compressed_ad.histories.summary import describe
from compressed_ad.learners.base import Prepares
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.finite import BLOCK
from compressed_ad.learners.rmax import RMax
from compressed_ad.tasks.base import SuccessorTable
from compressed_ad.tasks.grid import successors
from compressed_ad.tasks.gridworld import DarkroomHard, DarkroomPermuted, KeyToDoor
from tests.learners.learning import learn

STEPS = ((0, 1), (0, -1), (-1, 0), (1, 0))


class Plain:
    """R-max in plain Python: what one stream should do next, told what it did."""

    def __init__(self, size: int, dynamics: str, settle: bool, memory: int, given: Any = None) -> None:
        self.size, self.dynamics, self.settle, self.memory = size, dynamics, settle, memory
        self.cells = [(x, y) for x in range(size) for y in range(size)]
        self.outcome: dict[Any, Any] = {}  # by (mode, cell, action) in pairs, else by (cell, action)
        if given is not None:
            n = size * size
            self.outcome = {(self.cells[o], a): self.cells[given[o, a]] for o in range(n) for a in range(5)}
        self.shift: dict[int, Any] = {}
        self.blocked: dict[int, set[Any]] = {a: set() for a in range(5)}
        self.tried: set[int] = set()
        self.pays: dict[Any, bool] = {}  # of (mode, cell) stepped onto, in pairs of (mode, cell, action)
        self.ends: set[Any] = set()

    def room(self, cell: Any) -> set[Any]:
        inside = range(self.size)
        return {d for d in STEPS if cell[0] + d[0] in inside and cell[1] + d[1] in inside}

    def leads(self, mode: int, cell: Any, action: int) -> Any:
        if self.dynamics == "pairs":
            return self.outcome.get((mode, cell, action))
        if (cell, action) in self.outcome or action not in self.shift:
            return self.outcome.get((cell, action))
        target = (cell[0] + self.shift[action][0], cell[1] + self.shift[action][1])
        return target if target in self.cells else cell

    def key(self, mode: int, cell: Any, action: int, target: Any) -> Any:
        return (mode, cell, action) if self.dynamics == "pairs" else (mode, target)

    def policy(self, mode: int, here: Any) -> Any:
        """(5,) probabilities without exploration."""
        distance, first = {here: 0}, {here: set[int]()}
        queue, pay, new = deque([here]), [], []  # targets: (steps, what is tried, first actions, stale)
        while queue:
            cell = queue.popleft()
            if cell != here and self.dynamics != "pairs" and (mode, cell) in self.ends:
                continue
            for action in range(5):
                begins = first[cell] or {action}
                target, steps = self.leads(mode, cell, action), distance[cell] + 1
                if target is None:
                    if self.dynamics == "pairs" or self.room(cell) - self.blocked[action]:
                        stale = self.dynamics == "moves" and action in self.tried
                        new.append((steps, (cell, action), begins, stale))
                    continue
                key = self.key(mode, cell, action, target)
                returns = target == here and cell == here
                if self.dynamics == "pairs":
                    if self.pays.get(key):
                        pay.append((steps, key, begins, False))
                    if key in self.ends:
                        continue
                elif returns and self.pays.get(key):
                    pay.append((steps, (key, action), begins, False))
                elif returns and key not in self.pays:
                    new.append((steps, (key, action), begins, False))
                if target not in distance:
                    distance[target], first[target] = steps, set(begins)
                    queue.append(target)
                elif distance[target] == steps:
                    first[target] |= begins
        if self.dynamics != "pairs":
            for cell, steps in distance.items():
                if cell != here and self.pays.get((mode, cell)):
                    pay.append((steps, cell, first[cell], False))
                elif cell != here and (mode, cell) not in self.pays:
                    new.append((steps, cell, first[cell], False))
        near_pay, near_new = (min((t[0] for t in targets), default=10**9) for targets in (pay, new))
        chosen = pay if pay and (self.settle or near_pay <= near_new) else new
        nearest = [t for t in chosen if t[0] == min(near_pay if chosen is pay else near_new, 10**9)]
        fresh = [t for t in nearest if not t[3]] or nearest
        weights = np.zeros(5)
        for _, _, begins, _ in fresh:
            for action in begins:
                weights[action] += 1 / len(begins)
        return weights / weights.sum() if weights.any() else np.full(5, 0.2)

    def learn(self, mode: int, cell: Any, action: int, target: Any, reward: float, terminated: bool) -> None:
        key = self.key(mode, cell, action, target)
        self.pays[key] = reward > 0
        if terminated:
            self.ends.add(key)
        self.tried.add(action)
        if self.dynamics == "pairs":
            self.outcome[key] = target
        elif self.dynamics == "moves":
            self.outcome[cell, action] = target
            if self.shift.get(action, (0, 0)) == (0, 0) and target != cell:
                if action in self.shift:  # it was believed to rest
                    still = [k for k, v in self.outcome.items() if k == (v, action)]
                    for key in still:
                        del self.outcome[key]
                self.shift[action] = (target[0] - cell[0], target[1] - cell[1])
            elif action not in self.shift:
                self.blocked[action] |= self.room(cell)
                if self.blocked[action] == set(STEPS):
                    self.shift[action] = (0, 0)


class Walled(Darkroom):
    """A wall between x = 3 and x = 4 that is open at y = 0."""

    def make(self, tasks: Any, seeds: Any) -> Any:
        env, table = super().make(tasks, seeds), successors(9).copy()
        for y in range(1, 9):
            table[4, 27 + y], table[3, 36 + y] = 27 + y, 36 + y
        env._successors = table.ravel()
        return env


@pytest.mark.parametrize(
    ("family", "task", "kwargs"),
    [
        (Darkroom(4, 9), 3, {}),
        (Darkroom(4, 9), 12, {"settle": False}),
        (Darkroom(4, 9), 10, {"dynamics": "given"}),
        (Darkroom(4, 9), 1, {"dynamics": "pairs", "settle": False}),
        (DarkroomHard(4, 7), 0, {}),
        (KeyToDoor(3, 12), 29, {"memory": 1}),
        (KeyToDoor(3, 12), 29, {"memory": 1, "dynamics": "pairs"}),
        (KeyToDoor(3, 12), 51, {}),
        (DarkroomPermuted(3, 9), 77, {}),
        (Walled(9, 15), 44, {}),
        (DarkroomPermuted(3, 9), 77, {"dynamics": "given"}),
    ],
)
def test_as_a_plain_planner(family: Any, task: int, kwargs: dict[str, Any]) -> None:
    memory, dynamics, n_timesteps = kwargs.get("memory", 0), kwargs.get("dynamics", "moves"), 120
    (history,) = learn(make_learner("rmax", {"epsilon": 0.4, **kwargs}), family, [task], n_timesteps, 2)
    for s in range(2):
        given = family.successor_table(family.tasks()[[task]])[0] if dynamics == "given" else None
        plain, mode = Plain(family.size, dynamics, kwargs.get("settle", True), memory, given), 0
        for t in range(n_timesteps):
            epsilon = max(0.0, 0.4 * (1 - t / (0.5 * n_timesteps)))
            here, target = (tuple(x[s, t].tolist()) for x in (history.states, history.next_states))
            action, reward = int(history.actions[s, t]), float(history.rewards[s, t])
            chances = (1 - epsilon) * plain.policy(mode, here) + epsilon / 5
            assert history.action_probs[s, t] == pytest.approx(chances[action], rel=1e-5), (s, t)
            logs = np.log(chances, where=chances > 0, out=np.zeros(5))
            assert history.entropy[s, t] == pytest.approx(-(chances * logs).sum(), abs=1e-5)
            plain.learn(mode, here, action, target, reward, bool(history.terminated[s, t]))
            mode = 0 if history.episode_end[s, t] else min(mode + (reward > 0), memory)


@pytest.mark.parametrize(
    ("kwargs", "family"),
    [
        ({}, Darkroom()),  # 81 cells: actions in a file's uint8 must not wrap around when they are replayed
        ({"dynamics": "pairs", "memory": 1}, KeyToDoor(4, 10)),
        ({"dynamics": "given"}, DarkroomPermuted(4, 12)),
    ],
)
def test_keeps_the_promises_of_learners(kwargs: dict[str, Any], family: Any) -> None:
    assert check_learner(make_learner("rmax", kwargs), family) == []


def test_a_stream_is_the_same_in_any_company() -> None:
    learner = make_learner("rmax", {"dynamics": "given"})
    together = learn(learner, DarkroomPermuted(), [3, 40, 77], 90, n_stream=5)
    (alone,) = learn(learner, DarkroomPermuted(), [40], 90, n_stream=2)
    for name, array in alone.per_step():
        np.testing.assert_array_equal(array, getattr(together[1], name)[:2], err_msg=name)


def curve(family: Any, kwargs: dict[str, Any], n_task: int, n_episode: int, n_stream: int) -> Any:
    """(E,) normalised return by episode without exploration."""
    ids = np.sort(np.random.default_rng(0).permutation(len(family.tasks()))[:n_task])
    tasks, learner = family.tasks()[ids], make_learner("rmax", {"epsilon": 0.0, **kwargs})
    total = np.zeros((n_task, n_episode))
    for row, history in zip(
        total, learn(learner, family, ids, n_episode * family.horizon, n_stream), strict=True
    ):
        for rewards, end in zip(history.rewards, history.episode_end, strict=True):
            stops = np.flatnonzero(end)[:n_episode] + 1
            row += np.add.reduceat(rewards[: stops[-1]], np.r_[0, stops[:-1]]) / n_stream
    random, optimal = family.random_return(tasks)[:, None], family.optimal_return(tasks)[:, None]
    return ((total - random) / (optimal - random)).mean(0)


@pytest.mark.parametrize(
    ("family", "kwargs", "n_task", "n_stream", "n_episode", "area", "tolerance"),
    [
        (Darkroom(), {}, 81, 4, 10, 0.955, 0.006),
        (Darkroom(), {"dynamics": "given"}, 81, 4, 10, 0.957, 0.006),
        (Darkroom(), {"dynamics": "pairs", "settle": False}, 81, 4, 50, 0.722, 0.02),
        (DarkroomHard(), {}, 289, 1, 30, 0.829, 0.025),
        (KeyToDoor(), {"memory": 1}, 100, 2, 8, 0.979, 0.006),
        (DarkroomPermuted(), {}, 120, 2, 5, 0.987, 0.004),
    ],
)
def test_source_curves(
    family: Any, kwargs: dict[str, Any], n_task: int, n_stream: int, n_episode: int, area: float,
    tolerance: float,
) -> None:  # fmt: skip
    """The area under 50 episodes, after the last of which nothing changes.

    Tolerances are about four standard errors over tasks and streams: a stream's area has a standard deviation
    of .02 (Darkroom), .17 (pairs: half of them by the task), .11 (Hard), .02 (Key-to-Door), .01 (Permuted).
    """
    found = curve(family, kwargs, n_task, n_episode, n_stream)
    assert found[-1] > 0.99
    total = found.sum() + (50 - n_episode) * found[-1]
    assert total / 50 == pytest.approx(area, abs=tolerance)


def test_inner_walls_are_learned_by_bumping() -> None:
    family = Walled(9, 40)
    learner = make_learner("rmax", {"epsilon": 0.0})
    histories = learn(learner, family, np.arange(81), 400, 2)
    final = np.array([history.rewards[:, -40:].sum(1) for history in histories])
    way = {(4, 4): 0}  # breadth first from the start
    queue = deque(way)
    while queue:
        cell = queue.popleft()
        for action in range(5):
            env = family.make(family.tasks()[:1], np.zeros(1, np.int64))
            env.reset()
            env._cell[:] = cell[0] * 9 + cell[1]
            following = tuple(env.step(np.array([action])).next_obs[0].tolist())
            if following not in way:
                way[following] = way[cell] + 1
                queue.append(following)
    best = np.array([40 - max(way[tuple(goal)], 1) + 1 for goal in family.tasks().tolist()])
    assert (final / best[:, None]).mean() > 0.99


def test_frozen_lake_by_pairs() -> None:
    family = make_family("gymnasium:FrozenLake-v1", {"kwargs": {"is_slippery": False}})
    (history,) = learn(make_learner("rmax", {"dynamics": "pairs", "epsilon": 0.0}), family, [0], 400, 4)
    assert (
        history.rewards[:, -30:].sum(1) >= 3
    ).all()  # a hole is fallen into once by each way, not for ever
    with pytest.raises(SpaceError, match="moves needs MultiDiscrete"):
        make_learner("rmax", {}).check(family, n_timesteps=100, n_stream=1)


@pytest.mark.parametrize("family", [Darkroom(4, 9), KeyToDoor(4, 9), DarkroomPermuted(4, 9)])
def test_successor_tables_are_what_environments_do(family: Any) -> None:
    assert isinstance(family, SuccessorTable)
    task = family.tasks()[[50 % len(family.tasks())]]
    table = family.successor_table(task)
    assert table.shape == (1, 16, 5)
    for place in range(16):
        for action in range(5):
            env = family.make(task, np.zeros(1, np.int64))
            env.reset()
            env._cell[:] = place
            x, y = env.step(np.array([action])).next_obs[0]
            assert table[0, place, action] == 4 * x + y


# ---------------------------------------------------------------- what training tasks share


def shared(family: Any, tasks: Any, **kwargs: Any) -> Any:
    learner = make_learner("rmax", {"shared": True, **kwargs})
    assert isinstance(learner, Prepares)
    return learner.prepared(family, tasks, seed=1)


@pytest.mark.parametrize("family", [Darkroom(5, 10), Walled(9, 40), KeyToDoor(4, 20)])
def test_pilots_agree_on_the_moves_where_all_tasks_have_them(family: Any) -> None:
    memory = 1 if isinstance(family, KeyToDoor) else 0
    known = shared(family, family.tasks(), memory=memory)._shared
    np.testing.assert_array_equal(known.outcome, successors(family.size).T)
    assert known.known.tolist() == [2, 1, 1, 1, 1]  # the first rests, the others shift
    assert known.flags.shape == (memory + 1, family.size**2) and not known.flags.any()


def test_pilots_agree_on_the_goal_where_all_tasks_have_it() -> None:
    family = DarkroomPermuted(5, 20)
    known = shared(family, family.tasks())._shared
    assert (known.outcome == -1).all() and not known.known.any()
    assert np.flatnonzero(known.flags).tolist() == [24]
    known = shared(family, family.tasks()[7:8])._shared  # one task: all of it
    np.testing.assert_array_equal(known.outcome, family.successor_table(family.tasks()[7:8])[0])


def test_learners_use_what_pilots_share() -> None:
    family, ids = DarkroomPermuted(), np.arange(40)
    optimal = family.optimal_return(family.tasks()[ids])[0]
    earned = {}
    for name, learner in {
        "alone": make_learner("rmax", {"epsilon": 0.0}),
        "shared": shared(family, family.tasks()[40:], epsilon=0.0),
    }.items():
        histories = learn(pickle.loads(pickle.dumps(learner)), family, ids, family.horizon, 2)
        earned[name] = np.mean([history.rewards.sum(1) for history in histories]) / optimal
    assert earned["alone"] < 0.75 and earned["shared"] > 0.88  # .53 and .93 in the first episode
    assert check_learner(make_learner("rmax", {"shared": True}), DarkroomPermuted(3, 9)) == []


def test_pilots_play_training_tasks_once_for_all_blocks(tmp_path: Path) -> None:
    played: list[Any] = []

    class Watched(Darkroom):
        def make(self, tasks: Any, seeds: Any) -> Any:
            played.append(tasks.tolist())
            return super().make(tasks, seeds)

    kwargs = {"shared": True, "epsilon": 0.2}
    settings = {"family_name": "darkroom", "n_timesteps": 30, "n_stream": 2, "heldout": 2, "validation": 1}
    path = collect(
        Watched(3, 6), make_learner("rmax", kwargs), tmp_path / "one.hdf5", **settings, block_size=5
    )
    file = HistoryFile(path)
    assert [len(tasks) for tasks in played] == [16, 10, 8]
    assert {tuple(task) for task in played[0]} == {tuple(file.tasks[k].tolist()) for k in file.split.train}
    told = "paying places that 16 pilots with 2000 steps each on training tasks agreed on"
    assert told in describe(path).text()
    other = collect(
        Darkroom(3, 6), make_learner("rmax", kwargs), tmp_path / "two.hdf5", **settings, block_size=9
    )
    for task, history in file.load().items():
        again = HistoryFile(other).load([task])[task]
        assert all(np.array_equal(array, getattr(again, name)) for name, array in history.per_step())


def test_sharing_needs_moves_and_training_tasks() -> None:
    with pytest.raises(ConfigError, match="rmax: shared needs dynamics moves, not given"):
        make_learner("rmax", {"shared": True, "dynamics": "given"})
    with pytest.raises(UsageError, match="rmax: shared needs the training tasks first: call prepared"):
        learn(make_learner("rmax", {"shared": True}), Darkroom(3, 5), [0], 10)


def test_what_is_wrong_with_prepared_is_one_line(tmp_path: Path) -> None:
    class Breaks(RMax):
        def prepared(self, family: Any, tasks: Any, seed: int) -> Any:
            return {}["no key"]

    class Forgets(RMax):
        def prepared(self, family: Any, tasks: Any, seed: int) -> Any:
            return None

    fails = r"learner 'RMax': prepared\(\) fails: 'no key' \(KeyError in .*test_rmax.py:\d+\)"
    forgets = r"learner 'RMax': prepared\(\) must return the learner that learns, not None"
    path = tmp_path / "h.hdf5"
    for learner, message in ((Breaks(), fails), (Forgets(), forgets)):
        (problem,) = check_learner(learner)
        assert re.fullmatch("It cannot be tried: " + message, problem)
        with pytest.raises(RunError, match=message):
            collect(Darkroom(3, 5), learner, path, family_name="darkroom", n_timesteps=10, n_stream=1)
        assert not path.exists()


def test_collected_in_large_blocks_with_what_the_source_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, sizes = make_learner("rmax", {}), []
    inner: Callable[..., list[History]] = learner.learn

    def counted(family: Any, task_ids: Any, *args: Any, **kwargs: Any) -> list[History]:
        sizes.append(len(task_ids))
        return inner(family, task_ids, *args, **kwargs)

    monkeypatch.setattr(learner, "learn", counted)
    settings = {"family_name": "darkroom", "n_timesteps": 20, "n_stream": 2, "n_process": 1}
    path = collect(Darkroom(5, 10), learner, tmp_path / "large.hdf5", **settings)
    assert sizes == [25]
    assert "nothing of the task" in HistoryFile(path).info.config["told"]
    assert "The source was told: nothing of the task; of the family" in describe(path).text()
    small = collect(Darkroom(5, 10), learner, tmp_path / "small.hdf5", block_size=4, **settings)
    assert sizes[1:] == [4] * 6 + [1]
    for task, history in HistoryFile(path).load().items():
        again = HistoryFile(small).load([task])[task]
        assert all(np.array_equal(array, getattr(again, name)) for name, array in history.per_step())


def test_blocks_fit_in_memory() -> None:
    learner, family = make_learner("rmax", {}), Darkroom()
    assert learner.block_size(family, n_timesteps=600, n_learner=5, n_stream=1) == BLOCK
    assert learner.block_size(family, n_timesteps=10**5, n_learner=5, n_stream=4) == 4
    assert learner.block_size(family, n_timesteps=10**7, n_learner=5, n_stream=4) == 1
