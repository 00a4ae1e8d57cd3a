"""Tabular Q-learning as published: do its histories have the published statistics?

    python -m benchmarks.published_histories            # a minute
    python -m benchmarks.published_histories --quick    # only a check that it runs

``config/algorithm/tabular_literature.yaml`` in the rooms of Tarasov et al. 2025 (arXiv 2502.17666): an
episode ends on the goal, or on the door, and starts in the centre, in Key-to-Door in a random cell. Shown are
the mean length, return and success (share of episodes with the full return) of the first 200 episodes of each
stream, by third and in all, beside the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.measuring import quick_from_command_line, write
from compressed_ad import make_learner
from compressed_ad.seeding import rng
from compressed_ad.tasks.gridworld import Darkroom, KeyToDoor

RECIPE = Path(__file__).parents[1] / "config" / "algorithm" / "tabular_literature.yaml"
EPISODES = 200

PUBLISHED = {
    "key_to_door 9x9": [(47.34, 0.64, 0.13), (30.70, 1.69, 0.70), (14.97, 1.98, 0.98), (30.89, 1.44, 0.61)],
    "key_to_door 13x13": [(95.6, 0.56, 0.10), (64.1, 1.55, 0.60), (29.1, 1.95, 0.95), (62.7, 1.36, 0.55)],
    "darkroom 9x9": [(16.84, 0.27, 0.27), (10.66, 0.73, 0.73), (5.54, 0.96, 0.96), (10.98, 0.65, 0.65)],
    "darkroom 19x19": [(86.7, 0.20, 0.20), (59.3, 0.53, 0.53), (30.2, 0.81, 0.81), (58.6, 0.52, 0.52)],
}
"""(length, return, success) of the early, middle and late third, and of all episodes."""


class RandomStart:
    """A grid environment whose slots start every episode in a random cell."""

    def __init__(self, env: Any, seeds: Any) -> None:
        self.env, self.num_envs = env, env.num_envs
        self._random = [rng(int(seed), "start") for seed in seeds]

    def _begin(self, slots: Any) -> Any:
        n_cell = len(self.env._cells)
        self.env._cell[slots] = [self._random[slot].integers(n_cell) for slot in slots]
        return self.env._cells[self.env._cell]

    def reset(self) -> Any:
        self.env.reset()
        return self._begin(range(self.num_envs))

    def step(self, actions: Any) -> Any:
        step = self.env.step(actions)
        ended = np.flatnonzero(step.terminated | step.truncated)
        if len(ended):
            step.obs[ended] = self._begin(ended)[ended]
        return step


@dataclass(frozen=True, repr=False)
class SparseRoom(Darkroom):
    """Darkroom whose episodes end on the goal."""

    terminates = True


@dataclass(frozen=True, repr=False)
class StartAnywhere(KeyToDoor):
    """Key-to-Door whose episodes start anywhere; keys do not lie on doors."""

    def tasks(self) -> Any:
        tasks = super().tasks()
        return tasks[(tasks[:, :2] != tasks[:, 2:]).any(1)]

    def make(self, tasks: Any, seeds: Any) -> Any:
        return RandomStart(super().make(tasks, seeds), seeds)


ROOMS = {
    "key_to_door 9x9": StartAnywhere(9, 50),
    "key_to_door 13x13": StartAnywhere(13, 100),
    "darkroom 9x9": SparseRoom(9, 20),
    "darkroom 19x19": SparseRoom(19, 100),
}


def statistics(name: str, n_task: int, n_learner: int = 1, seed: int = 0) -> list[tuple[float, ...]]:
    """(length, return, success) as in ``PUBLISHED``, of ``n_task`` tasks of the room ``name``."""
    family, recipe = ROOMS[name], yaml.safe_load(RECIPE.read_text())
    ids = np.sort(rng(seed, "tasks").permutation(len(family.tasks()))[:n_task])
    learner = make_learner(recipe["learner"], recipe["learner_kwargs"])
    histories = learner.learn(
        family, ids, family.tasks()[ids], n_timesteps=EPISODES * family.horizon, n_learner=n_learner,
        n_stream=1, seed=seed,
    )  # fmt: skip
    lengths, returns = [], []
    for history in histories:
        for rewards, end in zip(history.rewards, history.episode_end, strict=True):
            stops = np.flatnonzero(end)[:EPISODES] + 1
            starts = np.concatenate([[0], stops[:-1]])
            lengths.append(stops - starts)
            returns.append(np.add.reduceat(rewards[: stops[-1]], starts))
    length, total = np.array(lengths), np.array(returns)
    success = total >= (2 if isinstance(family, KeyToDoor) else 1)
    third = EPISODES // 3
    parts = [slice(0, third), slice(third, 2 * third), slice(2 * third, None), slice(None)]
    return [tuple(float(x[:, part].mean()) for x in (length, total, success)) for part in parts]


def run(quick: bool = False) -> dict[str, Any]:
    """Ours and the published statistics of every room."""
    result: dict[str, Any] = {}
    for name, published in PUBLISHED.items():
        ours = statistics(name, 20 if quick else 1000)
        for part, got, wanted in zip(("early", "middle", "late", "all"), ours, published, strict=True):
            shown = [" ".join(f"{x:.2f}" for x in values) for values in (got, wanted)]
            result[f"{name} {part}"] = f"{shown[0]} (published {shown[1]})"
    write("published_histories", result)
    return result


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
