"""The learners that keep tables at play: all slots of a call step together, and every step is recorded.

What a slot does depends on (seed, task id, stream) alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import SpaceError
from compressed_ad.learners import finite_kernels as kernels
from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.learners.finite import FiniteLearner, Numbering
from compressed_ad.seeding import seed64
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import AnyArray, History, IntArray

_CHUNK = 64  # steps recorded in time order before they are sorted by stream
Row = dict[str, AnyArray]
"""The arrays (N,) of a step, with numbers in place of observations and actions."""


class Player(ABC):
    """N learners that play side by side."""

    @abstractmethod
    def act(self, row: Row, epsilon: AnyArray) -> None:
        """Fill in the numbers of the actions, their probabilities, and the entropies of the policies."""

    @abstractmethod
    def learn(self, row: Row, epsilon: AnyArray, ended: AnyArray) -> None:
        """Learn from the step in ``row``, and fill in ``log_prob_next`` if that is known."""


def play(
    learner: FiniteLearner, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int,
    n_stream: int, seed: int, progress: Progress,
) -> list[History]:  # fmt: skip
    """``FiniteLearner.learn`` for a family that its ``check`` accepts, ``n_stream`` streams for each task."""
    observations, actions = learner.spaces(family)
    who = [(int(task), stream) for task in task_ids for stream in range(n_stream)]
    random = np.array([seed64(seed, learner.name, *w) for w in who], np.uint64)
    seeds = [seed64(seed, f"{learner.name} environment", *w) >> 1 for w in who]
    ids = [task for task, _ in who]
    env = checked_slots(family, np.repeat(tasks, n_stream, axis=0), np.array(seeds, np.int64), ids)
    player = learner.player(family, tasks, n_stream, random)
    record = _Record(observations, actions, len(who), n_timesteps, learner.judges_updates)
    elements = actions.elements.astype(np.int64)
    episode, obs = np.zeros(len(who), np.int64), np.empty(len(who), np.int64)
    number(observations, env.reset(), obs)
    for t in range(n_timesteps):
        row, epsilon = record.row(t), learner.schedule.at(t, episode, n_timesteps)
        row["states"][:] = obs
        player.act(row, epsilon)
        step = env.step(elements.take(row["actions"], axis=0))
        number(observations, step.next_obs, row["next_states"])
        row["rewards"][:], row["terminated"][:] = step.reward, step.terminated
        row["truncated"][:] = step.truncated
        ended = step.terminated | step.truncated
        player.learn(row, epsilon, ended)
        number(observations, step.obs, obs)
        episode += ended
        progress(len(who))
    return histories_of_tasks(record.arrays(), np.arange(n_stream, dtype=np.int32))


def number(numbering: Numbering, elements: AnyArray, out: AnyArray) -> None:
    """Write the number (N,) of each of ``elements`` (N, ...) into ``out``."""
    rows = np.asarray(elements, np.int64).reshape(len(out), len(numbering.sizes))
    wrong = kernels.number(rows, numbering.first, numbering.sizes, out)
    if wrong >= 0:
        raise SpaceError(f"observation {np.asarray(elements)[wrong]} lies outside its space")


class TabularPlayer(Player):
    """Q-learning by ``rule``; ``uniform``: initial values are drawn from [0, 1)."""

    def __init__(
        self, rule: kernels.Rule, uniform: bool, n_obs: int, n_action: int, memory: int,
        random: NDArray[np.uint64],
    ) -> None:  # fmt: skip
        n, n_state = len(random), n_obs * (memory + 1)
        full, by_state, nothing = (n, n_state, n_action), (n, n_state), (0, 0)
        plans, marks = rule.sweeps > 0, rule.sweeps > 0 or rule.fade > 0
        self._values = kernels.Values(
            q=np.full(full, rule.initial, np.float32),
            tried=np.zeros(full if marks else (0, 0, 0), np.uint8),
            visits=np.zeros(by_state if rule.fade > 0 else nothing, np.int32),
            successor=np.full(full if plans else (0, 0, 0), -1, np.int32),
            reward=np.zeros(full if plans else (0, 0, 0), np.float32),
            order=np.zeros(by_state if plans else nothing, np.int32),
            n_order=np.zeros(n, np.int32),
        )
        if uniform:
            kernels.fill_uniform(self._values.q, random)
        self._rule, self._n_obs, self._memory, self._random = rule, n_obs, memory, random
        self._met = np.zeros(n, np.int64)  # rewards in this episode so far, at most ``memory``

    def act(self, row: Row, epsilon: AnyArray) -> None:
        kernels.act_greedily(
            self._values.q, row["states"], self._met, self._n_obs, epsilon, self._random, row["actions"],
            row["action_probs"], row["entropy"],
        )  # fmt: skip

    def learn(self, row: Row, epsilon: AnyArray, ended: AnyArray) -> None:
        kernels.learn_values(
            self._values, self._rule, self._n_obs, self._memory, row["states"], self._met, epsilon,
            row["actions"], row["rewards"], row["next_states"], row["terminated"], ended,
            row["log_prob_next"],
        )  # fmt: skip


class RMaxPlayer(Player):
    """R-max of a ``kind`` of dynamics; ``given`` (tasks, O, K) are the outcomes of all pairs, if known."""

    def __init__(
        self, kind: int, settle: bool, observations: Numbering, n_action: int, memory: int,
        random: NDArray[np.uint64], given: IntArray | None = None,
    ) -> None:  # fmt: skip
        n, n_obs, n_mode = len(random), observations.n, memory + 1
        pairs = kind == kernels.PAIRS
        if given is None:
            outcome = np.full((n, n_mode if pairs else 1, n_obs, n_action), -1, np.int32)
        else:
            outcome = np.ascontiguousarray(given, np.int32)[:, None]
        self._per_table = n // len(outcome)
        self._model = kernels.Model(
            outcome=outcome,
            flags=np.zeros((n, n_mode, n_obs * n_action if pairs else n_obs), np.uint8),
            n_paying=np.zeros((n, n_mode), np.int32),
            known=np.zeros((n, n_action), np.uint8),
            ruled=np.zeros((n, n_action), np.int64),
            tried=np.zeros((n, n_action), np.uint8),
        )
        coordinates = np.stack(
            np.unravel_index(np.arange(n_obs), tuple(observations.sizes.tolist())), axis=-1
        )
        up, down = coordinates < observations.sizes - 1, coordinates > 0
        bits = 1 << 2 * np.arange(len(observations.sizes))
        self._places = kernels.Places(coordinates, observations.sizes, up @ bits + down @ (2 * bits))
        self._kind, self._settle, self._memory, self._random = kind, settle, memory, random
        self._met = np.zeros(n, np.int64)

    def act(self, row: Row, epsilon: AnyArray) -> None:
        kernels.act_by_plan(
            self._model, self._places, self._kind, self._settle, self._per_table, row["states"], self._met,
            epsilon, self._random, row["actions"], row["action_probs"], row["entropy"],
        )  # fmt: skip

    def learn(self, row: Row, epsilon: AnyArray, ended: AnyArray) -> None:
        kernels.learn_model(
            self._model, self._places, self._kind, self._memory, row["states"], self._met, row["actions"],
            row["rewards"], row["next_states"], row["terminated"], ended,
        )  # fmt: skip


class _Record:
    """The transitions of N slots, written step by step, with numbers in place of observations and actions."""

    def __init__(
        self, observations: Numbering, actions: Numbering, n: int, n_timesteps: int, judges_updates: bool
    ) -> None:
        self._shape, self._at, self._filled = (n, n_timesteps), 0, 0
        self._n_part = len(actions.sizes)
        self._elements = {
            "states": observations.elements,
            "next_states": observations.elements,
            "actions": actions.elements,
        }
        kinds: dict[str, Any] = {
            **dict.fromkeys(self._elements, np.int64),
            **dict.fromkeys(("terminated", "truncated"), np.bool_),
            **dict.fromkeys(("rewards", "action_probs", "entropy", "log_prob_next"), np.float32),
        }
        self._chunk = {name: np.empty((_CHUNK, n), kind) for name, kind in kinds.items()}
        # With several components, probabilities are geometric means, and no ratio of whole actions is known.
        kept = [name for name in kinds if name != "log_prob_next" or (judges_updates and self._n_part == 1)]
        self._arrays: dict[str, AnyArray] = {}
        for name in kept:
            like = self._elements.get(name, self._chunk[name][0])
            shape = like.shape[1:] if name in self._elements else ()
            self._arrays[name] = np.empty((*self._shape, *shape), like.dtype)

    def row(self, t: int) -> Row:
        """The (N,) arrays of step ``t``, to be filled in; steps are asked for in order."""
        if t - self._at == _CHUNK:
            self._sort()
        self._filled = t + 1
        return {name: array[t - self._at] for name, array in self._chunk.items()}

    def arrays(self) -> dict[str, AnyArray]:
        """The arrays (N, T, ...) of ``History``."""
        self._sort()
        if self._n_part > 1:
            self._arrays["action_probs"] **= 1 / self._n_part
        update = np.arange(self._shape[1], dtype=np.int32)
        return {**self._arrays, "update": np.broadcast_to(update, self._shape)}

    def _sort(self) -> None:
        count = self._filled - self._at
        for name, array in self._arrays.items():
            values = np.ascontiguousarray(self._chunk[name][:count].T)
            if name in self._elements:
                values = self._elements[name].take(values, axis=0)
            array[:, self._at : self._filled] = values
        self._at = self._filled
