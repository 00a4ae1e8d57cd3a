"""Source learners that follow a rule: plays and records all streams of all tasks in one batch.

Streams share nothing, so ``History.learner`` numbers every stream as a separate learner, whether it was asked
for as a learner or as a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import numpy as np

from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.seeding import rng
from compressed_ad.tasks.bandit import Generators
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import Agent, AnyArray, FloatArray, History, IntArray


class ScriptedAgent(Agent, Protocol):
    """An agent that knows the probability of its last actions."""

    @property
    def probability(self) -> FloatArray:
        """(N,) of the last actions, for ``History.action_probs``."""

    @property
    def entropy(self) -> FloatArray | None:
        """(N,) nats, of the policy that chose them; None where undefined."""


MakeAgent = Callable[[AnyArray, Generators], ScriptedAgent]
"""Makes an agent from the task (N, P) of every slot and the slots' generators."""


class ScriptedLearner(ABC):
    """``SourceLearner`` whose agents follow a rule; ``update`` counts the steps before."""

    name: str

    @abstractmethod
    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        """A function that makes the agent; raises an error if the agent cannot play ``family``."""

    def learn(
        self, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int, n_learner: int,
        n_stream: int, seed: int, progress: Progress = lambda steps: None,
    ) -> list[History]:  # fmt: skip
        return record(
            family, task_ids, tasks, self.agents(family, n_timesteps),
            source=self.name, update=np.arange(n_timesteps), n_stream=n_learner * n_stream, seed=seed,
            progress=progress,
        )  # fmt: skip


def record(
    family: TaskFamily, task_ids: IntArray, tasks: AnyArray, make_agent: MakeAgent, *, source: str,
    update: IntArray, n_stream: int, seed: int, progress: Progress,
) -> list[History]:  # fmt: skip
    """One history for each task, with ``n_stream`` independent streams that ``make_agent``'s agent plays.

    ``update`` (T,) is the version of the policy at each step. All random numbers derive from (seed,
    ``source``, task id, stream).
    """
    slots = np.repeat(tasks, n_stream, axis=0)
    who = [(int(task), stream) for task in task_ids for stream in range(n_stream)]
    agent = make_agent(slots, lambda n: [rng(seed, source, *w) for w in who])
    env_seeds = [int(rng(seed, f"{source} environment", *w).integers(2**63 - 1)) for w in who]
    env = family.make(slots, np.array(env_seeds, np.int64))
    agent.reset(len(slots))
    obs = env.reset()
    rows: dict[str, list[AnyArray]] = {}
    for _ in range(len(update)):
        actions = agent.act(obs)
        step = env.step(actions)
        row = {"states": obs, "actions": actions, "rewards": step.reward, "next_states": step.next_obs}
        row |= {"terminated": step.terminated, "truncated": step.truncated}
        row["action_probs"] = np.asarray(agent.probability, np.float32)
        if agent.entropy is not None:
            row["entropy"] = np.asarray(agent.entropy, np.float32)
        for name, array in row.items():
            rows.setdefault(name, []).append(np.array(array))  # a copy: the environment may reuse its array
        agent.observe(actions, step)
        obs = step.obs
        progress(len(slots))
    arrays = {name: np.stack(steps, axis=1) for name, steps in rows.items()}
    arrays["update"] = np.broadcast_to(update.astype(np.int32), (len(slots), len(update)))
    return histories_of_tasks(arrays, np.arange(n_stream, dtype=np.int32))
