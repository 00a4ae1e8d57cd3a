"""The learners that keep tables: environment steps per CPU second, beside their floor.

    python -m benchmarks.table_learners            # half a minute
    python -m benchmarks.table_learners --quick    # only a check that it runs

One block as ``collect`` makes it, 250 tasks (or all) x 5 streams, in one process. ``environment`` is the
floor of all learners: the environment alone, with the same number of slots and actions that are drawn before.
Steps per second count learning and recording; compilation, once per machine, is excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.measuring import quick_from_command_line, side_by_side, write
from compressed_ad import make_family, make_learner
from compressed_ad.seeding import rng

N_TASK, N_STREAM = 250, 5
PLANNED = {"epsilon": 0.1, "initial": 1.0, "fade": 0.5, "sweeps": 5}
LEARNERS = {
    "tabular": ("tabular", {}),
    "tabular, planning": ("tabular", PLANNED),
    "rmax": ("rmax", {}),
    "rmax, pairs": ("rmax", {"dynamics": "pairs", "settle": False}),
    "rmax, given": ("rmax", {"dynamics": "given"}),
}
ROOMS = {
    "darkroom": (0, 400),
    "darkroom_large": (0, 750),
    "darkroom_hard": (0, 700),
    "darkroom_permuted": (0, 400),
    "key_to_door": (1, 600),
}
"""The memory that a learner needs, and the length of a stream."""


def _environment(family: Any, tasks: Any, n_timesteps: int) -> None:
    env = family.make(np.repeat(tasks, N_STREAM, axis=0), np.arange(len(tasks) * N_STREAM))
    actions = rng(0, "actions").integers(5, size=(16, env.num_envs))
    env.reset()
    for t in range(n_timesteps):
        env.step(actions[t % 16])


def _room(family: Any, memory: int, n_timesteps: int, repeats: int) -> dict[str, str]:
    """Steps per CPU second of the environment and of every learner."""
    ids = np.sort(rng(0, "tasks").permutation(len(family.tasks()))[:N_TASK])
    tasks, lengths = family.tasks()[ids], {"n_timesteps": n_timesteps, "n_learner": N_STREAM, "n_stream": 1}
    calls: dict[str, Callable[[], Any]] = {"environment": lambda: _environment(family, tasks, n_timesteps)}
    for name, (kind, kwargs) in LEARNERS.items():
        learner = make_learner(kind, {**kwargs, "memory": memory})
        calls[name] = partial(learner.learn, family, ids, tasks, **lengths, seed=0)
    steps = len(ids) * N_STREAM * n_timesteps
    return {name: f"{steps / time / 1e6:.2f} M" for name, time in side_by_side(calls, repeats).items()}


def run(quick: bool = False) -> dict[str, Any]:
    """Steps per CPU second of the environment and of every learner, by room."""
    result: dict[str, Any] = {}
    for room, (memory, n_timesteps) in ROOMS.items():
        result[room] = _room(make_family(room, {}), memory, 40 if quick else n_timesteps, 1 if quick else 3)
    write("table_learners", result)
    return result


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
