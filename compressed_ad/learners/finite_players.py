"""The learners that keep tables at play: all slots of a call step together, and every step is recorded.

What a slot does depends on (seed, task id, stream) alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners import finite_kernels as kernels
from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.learners.finite import FiniteLearner, Numbering
from compressed_ad.seeding import seed64
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import AnyArray, History, IntArray, Step

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
    number_into(observations, env.reset(), obs)
    for t in range(n_timesteps):
        row, epsilon = record.row(t), learner.schedule.at(t, episode, n_timesteps)
        row["states"][:] = obs
        player.act(row, epsilon)
        step = env.step(elements.take(row["actions"], axis=0))
        number_into(observations, step.next_obs, row["next_states"])
        row["rewards"][:], row["terminated"][:] = step.reward, step.terminated
        row["truncated"][:] = step.truncated
        player.learn(row, epsilon, step.ended)
        number_into(observations, step.obs, obs)
        episode += step.ended
        progress(len(who))
    return histories_of_tasks(record.arrays(), np.arange(n_stream, dtype=np.int32))


def number_into(numbering: Numbering, elements: AnyArray, out: AnyArray) -> None:
    """Write the number of each of ``elements`` (N, ...) into ``out`` (N,); ``SpaceError`` if one has none."""
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


class Shared(NamedTuple):
    """What several learners by moves agree on."""

    outcome: IntArray  # (O, K) where the actions lead that displace all of them by the same; -1: unknown
    known: NDArray[np.uint8]  # (K,) as in ``Model``
    flags: NDArray[np.uint8]  # (M, O) of the places that pay all of them, else 0


class RMaxPlayer(Player):
    """R-max of a ``kind`` of dynamics.

    ``given`` (tasks, O, K) are the outcomes of all pairs, if known; ``shared`` is what all slots know.
    """

    def __init__(
        self, kind: int, settle: bool, observations: Numbering, n_action: int, memory: int,
        random: NDArray[np.uint64], given: IntArray | None = None, shared: Shared | None = None,
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
        if shared is not None:
            outcome[:], self._model.known[:], self._model.flags[:] = shared
            self._model.tried[:] = shared.known > 0
            self._model.n_paying[:] = (shared.flags > 0).sum(axis=1)
        coordinates = observations.digits
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

    def shared(self) -> Shared:
        """What all learners agree on, by moves: displacements of actions, and places that pay."""
        known, outcome, place = self._model.known, self._model.outcome[:, 0], self._places.coordinates
        here = np.arange(len(place))[:, None]
        moved = ((outcome >= 0) & (outcome != here)).argmax(axis=1)  # (N, K) a place from which it moved
        to = np.take_along_axis(outcome, moved[:, None], 1)[:, 0]
        shift = place[to] - place[moved]
        agreed = (known[0] > 0) & (known == known[0]).all(0) & (shift == shift[0]).all((0, 2))
        target = place[:, None] + shift[0]
        inside = ((target >= 0) & (target < self._places.sizes)).all(-1)
        number = np.ravel_multi_index(tuple(np.moveaxis(target, -1, 0)), tuple(self._places.sizes), "clip")
        flags = np.bitwise_and.reduce(self._model.flags)
        return Shared(
            np.where(agreed, np.where(inside, number, here), -1),
            np.where(agreed, known[0], 0).astype(np.uint8),
            np.where(flags & kernels.PAYS, flags, 0).astype(np.uint8),
        )


class TableAgent:
    """A learner as an agent, at the same ``epsilon`` all the time; each slot learns on its own.

    ``tasks`` (N, P) are those of the slots; the slots of a task are adjacent, as in ``evaluate_tasks``.
    """

    def __init__(
        self, learner: FiniteLearner, family: TaskFamily, tasks: AnyArray, seed: int, epsilon: float = 0.0
    ) -> None:
        learner.check(family, n_timesteps=1, n_stream=len(tasks))
        self._observations, actions = learner.spaces(family)
        self._actions = actions.elements.astype(np.int64)
        self._learner, self._family, self._tasks = learner, family, np.asarray(tasks)
        self._seed, self._share = seed, epsilon

    def reset(self, n_env: int) -> None:
        """Forget everything and start in ``n_env`` slots, a multiple of the number of tasks."""
        if n_env == 0 or n_env % len(self._tasks):
            raise UsageError(f"{n_env} slots cannot be shared equally by {len(self._tasks)} tasks")
        random = np.array([seed64(self._seed, "table agent", k) for k in range(n_env)], np.uint64)
        self.player = self._learner.player(self._family, self._tasks, n_env // len(self._tasks), random)
        self._epsilon = np.full(n_env, self._share)
        self._row: Row = {name: np.zeros(n_env, np.int64) for name in ("states", "actions", "next_states")}
        floats = ("action_probs", "entropy", "log_prob_next")
        self._row |= {name: np.zeros(n_env, np.float32) for name in floats}

    def act(self, obs: AnyArray) -> AnyArray:
        number_into(self._observations, obs, self._row["states"])
        self.player.act(self._row, self._epsilon)
        return self._actions.take(self._row["actions"], axis=0)

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Learn from the step."""
        number_into(self._observations, step.next_obs, self._row["next_states"])
        row = {**self._row, "rewards": np.asarray(step.reward), "terminated": np.asarray(step.terminated)}
        self.player.learn(row, self._epsilon, step.ended)


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
