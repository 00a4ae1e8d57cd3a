"""Sources that follow a rule, all streams of all tasks in one batch: the loop that plays and records them.

Their streams share nothing, so each is a learner of its own in ``History.learner``, whether it was asked for
as a learner or as a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from compressed_ad.learners.base import Progress
from compressed_ad.seeding import rng
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, FloatArray, History, IntArray, Step

Generators = Callable[[int], Sequence[np.random.Generator]]


class ScriptedAgent(Protocol):
    """An agent that knows the probability of what it just did."""

    @property
    def probability(self) -> FloatArray:
        """(N,) of the last actions, as ``History.action_probs``."""

    @property
    def entropy(self) -> FloatArray | None:
        """(N,) nats, of the policy that chose them; None where undefined."""

    def reset(self, n_env: int) -> None:
        """Start anew in ``n_env`` slots."""

    def act(self, obs: AnyArray) -> AnyArray:
        """Actions (N, ...) for observations (N, ...)."""

    def observe(self, actions: AnyArray, step: Step) -> None:
        """What came of ``actions``."""


def record(
    family: TaskFamily,
    task_ids: IntArray,
    tasks: AnyArray,
    make_agent: Callable[[AnyArray, Generators], ScriptedAgent],
    *,
    source: str,
    update: IntArray,
    n_stream: int,
    seed: int,
    progress: Progress,
) -> list[History]:
    """One history per task of ``n_stream`` independent streams, played by what ``make_agent`` makes.

    ``make_agent`` is given the task (N, P) of every slot and the slots' own generators. ``update`` (T,) is
    the version of the policy at each step. Everything random derives from (seed, ``source``, task id,
    stream).
    """
    slots = np.repeat(tasks, n_stream, axis=0)
    who = [(int(task), stream) for task in task_ids for stream in range(n_stream)]
    agent = make_agent(slots, lambda n: [rng(seed, source, *w) for w in who])
    env_seeds = [int(rng(seed, f"{source} environment", *w).integers(2**63 - 1)) for w in who]
    env = family.make(slots, np.array(env_seeds, np.int64))
    agent.reset(len(slots))
    obs = env.reset()
    kept: dict[str, list[AnyArray]] = {}
    for _ in range(len(update)):
        actions = agent.act(obs)
        step = env.step(actions)
        row = {
            "states": obs,
            "actions": actions,
            "rewards": step.reward,
            "next_states": step.next_obs,
            "terminated": step.terminated,
            "truncated": step.truncated,
            "action_probs": np.asarray(agent.probability, np.float32),
        }
        if agent.entropy is not None:
            row["entropy"] = np.asarray(agent.entropy, np.float32)
        for name, array in row.items():
            kept.setdefault(name, []).append(np.array(array))  # a copy: the environment may reuse its array
        agent.observe(actions, step)
        obs = step.obs
        progress(len(slots))
    arrays = {name: np.stack(rows, axis=1) for name, rows in kept.items()}
    arrays["update"] = np.broadcast_to(update.astype(np.int32), (len(slots), len(update)))
    return [
        History(
            learner=np.arange(n_stream, dtype=np.int32),
            **{name: array[i : i + n_stream] for name, array in arrays.items()},
        )
        for i in range(0, len(slots), n_stream)
    ]
