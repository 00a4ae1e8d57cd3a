"""Small data sets, written as the programs do that wrote the published ones.

Each writer follows the program that its docstring names: the same arrays, names, shapes and dtypes.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from compressed_ad import EXPORT, Darkroom, HistoryFile, Recorded, Split, import_histories
from compressed_ad.tasks.replay import play

MOVES = np.array([(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)])
"""Stay, up, right, down, left, as (row, column): the actions of AD-eps, and of Headless-AD in one step."""


def write_ad_eps(
    folder: Path, goals: list[list[int]], episodes: int = 6, size: int = 9, steps: int = 20
) -> Path:
    """corl-team/ad-eps, dark_room/generate_trajectories.py: optimal actions under fading noise."""
    folder.mkdir(parents=True)
    names = []
    for number, goal in enumerate(goals):
        draw = np.random.default_rng(number)
        eps, fade = 1.0, 1 / (steps * episodes * 0.9)
        rows: dict[str, list[list[Any]]] = {
            name: [[] for _ in range(episodes)] for name in ("states", "actions", "rewards", "done", "eps")
        }
        for episode in range(episodes):
            cell = np.array([size // 2, size // 2])
            for step in range(steps):
                action = int(draw.integers(5)) if draw.random() < eps else demonstrated(cell, goal)
                after = np.clip(cell + MOVES[action], 0, size - 1)
                values = (
                    cell[0] * size + cell[1],
                    action,
                    float((after == goal).all()),
                    step == steps - 1,
                    eps,
                )
                for name, value in zip(rows, values, strict=True):
                    rows[name][episode].append(value)
                cell, eps = after, max(0.0, eps - fade)
        names.append(f"trajectories_{number:03x}.npz")
        np.savez(
            folder / names[-1],
            states=np.array(rows["states"], dtype=float), actions=np.array(rows["actions"]),
            rewards=np.array(rows["rewards"], dtype=float), dones=np.int32(np.array(rows["done"])),
            eps=np.array(rows["eps"]),
        )  # fmt: skip
    about = {"algorithm": "opt-eps", "label": "label", "ordered_trajectories": names, "goal": goals}
    (folder / "metadata.metadata").write_text(json.dumps(about, indent=2))
    return folder


def demonstrated(cell: Any, goal: list[int]) -> int:
    """The row of the goal first, then its column."""
    if goal[0] != cell[0]:
        return 3 if goal[0] > cell[0] else 1
    return 0 if goal[1] == cell[1] else 2 if goal[1] > cell[1] else 4


def write_ad_eps_key_to_door(folder: Path) -> Path:
    """corl-team/ad-eps, key_to_door/generate_trajectories.py: lists of episodes of different lengths."""
    folder.mkdir(parents=True)
    states, actions, rewards = [[3, 4, 5], [7, 8]], [[2, 2, 2], [2, 2]], [[0.0, 1.0, 1.0], [1.0, 1.0]]
    arrays = {"states": states, "actions": actions, "rewards": rewards}
    pickled = {name: np.empty(2, object) for name in arrays}
    for name, rows in arrays.items():
        pickled[name][:] = rows  # lists of different lengths
    np.savez(folder / "trajectories_00000.npz", **pickled)
    goal = [[[0, 5], [0, 4]]]
    about = {"algorithm": "opt-eps", "ordered_trajectories": ["trajectories_00000.npz"], "goal": goal}
    (folder / "metadata.metadata").write_text(json.dumps(about))
    return folder


def write_headless_ad(
    folder: Path, goals: list[list[int]], episodes: int = 30, save_every: int = 100
) -> Path:
    """corl-team/headless-ad, src/gridworld/common/generate.py: a folder for each run, in stretches.

    Random actions in a 9x9 room that ends on the goal; as there, one step of a next episode ends the record.
    """
    for run, goal in enumerate(goals):
        draw = np.random.default_rng(run)
        home = folder / f"tabularQ-{run:08x}"
        home.mkdir(parents=True)
        names: list[str] = []
        rows: list[tuple[int, int, float, bool, bool]] = []
        cell, ended, finished, step, count = np.array([4, 4]), False, 0, 0, 0
        while finished < episodes:
            count += 1
            if ended:
                finished, cell, step = finished + 1, np.array([4, 4]), 0
            action = int(draw.integers(5))
            after = np.clip(cell + MOVES[action], 0, 8)
            step += 1
            reward = float((after == goal).all())
            rows.append((cell[0] * 9 + cell[1], action, reward, reward > 0, step == 20))
            ended, cell = reward > 0 or step == 20, after
            if count % save_every == 0 or finished == episodes:
                states, actions, rewards, terminated, truncated = map(np.array, zip(*rows, strict=True))
                names.append(f"trajectories_{count}.npz")
                np.savez(
                    home / names[-1],
                    states=states.astype(float).reshape(-1, 1), actions=actions.reshape(-1, 1),
                    rewards=rewards.astype(float).reshape(-1, 1),
                    dones=np.int32(terminated | truncated).reshape(-1, 1),
                )  # fmt: skip
                rows = []
        about = {"algorithm": "Q-learning", "label": "label", "ordered_trajectories": names, "goal": goal}
        (home / "metadata.metadata").write_text(json.dumps(about, indent=2))
    return folder


def write_headless_bandit(folder: Path, runs: int = 3, steps: int = 30) -> Path:
    """corl-team/headless-ad, src/bandit/common/generate.py: one file for each run, and no goal."""
    for run in range(runs):
        draw = np.random.default_rng(run)
        home = folder / f"LinUCB-{run:08x}"
        home.mkdir(parents=True)
        np.savez(
            home / f"trajectories_{steps}.npz",
            states=np.zeros((steps, 1), np.float32), actions=draw.integers(0, 4, (steps, 1)).astype(np.int32),
            rewards=draw.integers(0, 2, (steps, 1)).astype(np.float32), dones=np.zeros((steps, 1), np.int32),
            num_actions=np.array([4], np.float32),
        )  # fmt: skip
        about = {
            "algorithm": "LinUCB",
            "label": "label",
            "ordered_trajectories": [f"trajectories_{steps}.npz"],
        }
        (home / "metadata.metadata").write_text(json.dumps(about, indent=2))
    return folder


def write_ra_dt(folder: Path, goals: list[list[int]], steps: int = 250) -> Path:
    """ml-jku/RA-DT, src/algos/ppo_with_buffer.py: a replay buffer of one environment, (T, 1, ...).

    A dark room of MiniHack, 10x10, from the corner; observations are (row, column), names and goals (x, y).
    Actions are north, east, south, west, wait; the successor of an episode's last step is the next start.
    """
    folder.mkdir(parents=True)
    moves = np.array([(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])
    for number, goal in enumerate(goals):
        draw = np.random.default_rng(number)
        cell, rows = np.array([0, 0]), []
        for step in range(steps):
            action = int(draw.integers(5))
            after = np.clip(cell + moves[action], 0, 9)
            done, reward = step % 100 == 99, (after[::-1] == goal).all()
            following = np.array([0, 0]) if done else after
            rows.append((cell, following, [action], reward, done))
            cell = following
        observations, next_observations, actions, rewards, dones = map(np.array, zip(*rows, strict=True))
        x, y = goal
        np.savez(
            folder / f"[0,0]_[{x},{y}].npz",
            observations=observations[:, None].astype(np.uint8),
            next_observations=next_observations[:, None].astype(np.uint8),
            actions=actions[:, None], rewards=rewards[:, None].astype(np.float32),
            dones=dones[:, None].astype(np.float32),
        )  # fmt: skip
    return folder


def write_xland_100b(path: Path, rulesets: list[int], streams: int = 4, steps: int = 1000) -> Path:
    """dunnolab/xland-minigrid-datasets, collection/combine.py: a group for each ruleset, streams first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for number, ruleset in enumerate(rulesets):
            draw, shape = np.random.default_rng(number), (streams, steps)
            group = file.create_group(str(number))
            group.attrs.update(
                {"benchmark-id": "trivial-1m", "env-id": "XLand-MiniGrid-R1-9x9", "ruleset-id": ruleset}
            )
            few = draw.integers(0, 13 * 12, (streams, steps // 10, 5, 5))  # compresses fast
            dones = draw.random(shape) < 0.02
            dones[:, 99::100] = True
            arrays = {
                "states": few.repeat(10, axis=1).astype(np.uint8),
                "actions": draw.integers(0, 6, shape).astype(np.uint8),
                "rewards": (dones * draw.random(shape)).astype(np.float16),
                "dones": dones,
                "expert_actions": draw.integers(0, 6, shape).astype(np.uint8),
            }
            for name, array in arrays.items():
                chunks = (1, min(4096, steps), *array.shape[2:])
                group.create_dataset(name, data=array, compression="gzip", compression_opts=6, chunks=chunks)
    return path


GOALS = [[x, y] for x in (1, 3, 6) for y in (0, 4, 7, 8)]


def write_all(folder: Path) -> Path:
    """Every data set, where docs/exchange.md has it."""
    write_ad_eps(folder / "ad_eps" / "1a2b3", GOALS[::-1])
    write_headless_ad(folder / "headless_ad", GOALS + GOALS)
    write_ra_dt(folder / "dark_room" / "10x10", GOALS)
    write_xland_100b(folder / "xland-trivial-20b.hdf5", [7, 3, 4001, 12, 88, 999, 5, 60, 61, 62])
    if find_spec("minari"):
        histories = {goal[0] * 9 + goal[1]: recorded(goal) for goal in GOALS}
        ids = np.array(sorted(histories))
        ours = folder / "ours.hdf5"
        import_histories(
            histories, ours, family=Darkroom(), family_name="darkroom", learner="PPO",
            split=Split(ids[2:], ids[:1], ids[1:2]),
        )  # fmt: skip
        EXPORT["minari"](HistoryFile(ours), folder / "minari", False, lambda tasks: None)
    return folder


def recorded(goal: list[int], steps: int = 50) -> Recorded:
    """Random moves in Darkroom, two streams, with every array that a recording can have."""
    family, draw, shape = Darkroom(), np.random.default_rng(goal), (2, steps)
    actions, task = draw.integers(0, 5, shape), np.array(goal)
    played = play(family, np.stack([task, task]), actions, 0)
    cells = played.states.reshape(-1, 2)
    best = family.optimal_action(np.broadcast_to(task, cells.shape), cells, np.zeros(len(cells)))
    return Recorded(
        actions=actions, **vars(played), optimal_actions=best.reshape(shape), learner=np.array([4, 9]),
        update=np.arange(steps)[None].repeat(2, 0), task=task,
        **{name: draw.random(shape, np.float32) for name in ("action_probs", "entropy", "log_prob_next")},
    )  # fmt: skip
