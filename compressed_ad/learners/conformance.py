"""Does a source learner keep its promises? A sentence for every broken one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

from compressed_ad.errors import CompressedADError, users_code
from compressed_ad.learners.base import SourceLearner, prepared
from compressed_ad.tasks.base import RewardFunction, TaskFamily, rewards_of
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.replay import differ, episode_step, play
from compressed_ad.types import AnyArray, History, IntArray, outside

_N_LEARNER, _N_STREAM = 2, 2
_KINDS = {
    **dict.fromkeys(("rewards", "action_probs"), ("f", "float")),
    **dict.fromkeys(("terminated", "truncated"), ("b", "bool")),
    **dict.fromkeys(("update", "learner"), ("iu", "integer")),
}


def check_learner(
    learner: Any, family: TaskFamily | None = None, *, n_timesteps: int = 200, seed: int = 0
) -> list[str]:
    """The promises of ``SourceLearner`` that ``learner`` breaks, one sentence each.

    It learns two tasks of ``family`` (None: a Darkroom of 3 x 3 cells) with two learners of two streams each,
    together and each alone. If the family is deterministic, the recorded actions are replayed and compared.
    Later checks assume that earlier ones passed, so fix the first sentence first.
    """
    members = [name for name in ("name", "learn") if not hasattr(learner, name)]
    if members:
        return [f"It lacks {' and '.join(members)}."]
    problems = []
    if not isinstance(learner.name, str) or not learner.name:
        problems.append(f"Its name must be a string that is not empty, not {learner.name!r}.")
    family = family or Darkroom(3, 5)
    try:
        learner = prepared(learner, family, family.tasks(), seed)
    except CompressedADError as error:
        return [*problems, f"It cannot be tried: {error}"]
    return [*problems, *_Trial(learner, family, n_timesteps, seed).problems()]


class _Failed(Exception):
    """The learner could not be run; the message says why."""


class _Trial:
    """A learner tried on two tasks of a family."""

    def __init__(self, learner: SourceLearner, family: TaskFamily, n_timesteps: int, seed: int) -> None:
        self.learner, self.family, self.n_timesteps, self.seed = learner, family, n_timesteps, seed
        self.tasks = family.tasks()[-2:]
        self.ids = np.arange(len(family.tasks()))[-2:]
        observation: Any = family.observation_space
        action: Any = family.action_space
        self._spaces = (("states", observation), ("actions", action), ("next_states", observation))
        self.reported = 0

    def problems(self) -> Iterator[str]:
        try:
            histories = self._learn("two tasks", self.ids, self.tasks)
            reported = self.reported
            pairs = zip(histories, self.tasks, strict=True)
            found = [problem for history, task in pairs for problem in self._history_problems(history, task)]
            yield from dict.fromkeys(found)
            if not found:
                yield from self._call_problems(histories)
        except _Failed as failure:
            yield str(failure)
            return
        steps = len(self.tasks) * _N_LEARNER * _N_STREAM * self.n_timesteps
        if reported != steps:
            what = f"{reported:,} of {steps:,} steps" if reported else "nothing"
            yield f"It reports {what} to progress, which must hear of every environment step once."

    def _learn(self, what: str, ids: IntArray, tasks: AnyArray, seed: int | None = None) -> list[History]:
        self.reported = 0
        try:
            with users_code("learn() fails"):
                histories = self.learner.learn(
                    self.family, ids.copy(), tasks.copy(), n_timesteps=self.n_timesteps,
                    n_learner=_N_LEARNER, n_stream=_N_STREAM, seed=self.seed if seed is None else seed,
                    progress=self._progress,
                )  # fmt: skip
        except CompressedADError as error:
            raise _Failed(f"It cannot learn {what}: {error}") from error
        if problem := return_problem(histories, len(tasks)):
            raise _Failed(f"{problem}.")
        return histories

    def _progress(self, steps: int) -> None:
        self.reported += steps

    def _history_problems(self, history: History, task: AnyArray) -> list[str]:
        found = list(self._shape_problems(history)) or list(self._value_problems(history))
        return (
            found or list(_order_problems(self.family, history)) or list(self._replay_problems(history, task))
        )

    def _shape_problems(self, history: History) -> Iterator[str]:
        shape = (_N_LEARNER * _N_STREAM, self.n_timesteps)
        if history.rewards.shape != shape:
            yield (
                f"Its arrays must be (stream, time, ...) {shape} for {_N_LEARNER} learners of {_N_STREAM} "
                f"streams and {self.n_timesteps} steps; rewards have {history.rewards.shape}."
            )
        for name, (kinds, word) in _KINDS.items():
            dtype = getattr(history, name).dtype
            if dtype.kind not in kinds:
                yield f"{name} must be of a {word} dtype, not {dtype}."
        for name, space in self._spaces:
            array = getattr(history, name)
            if array.shape[2:] != space.shape:
                yield f"{name} hold elements of shape {array.shape[2:]}; the space {space} has {space.shape}."
                continue
            wanted = space.dtype if isinstance(space, spaces.Box) else np.int64
            if not np.can_cast(array.dtype, wanted, "same_kind"):
                yield f"{name} are of dtype {array.dtype}, which does not fit the space {space}."

    def _value_problems(self, history: History) -> Iterator[str]:
        for name, array in history.per_step():
            if name in ("states", "actions", "next_states", "rewards") and not np.isfinite(array).all():
                yield f"{name} hold NaN or infinity."
                return
        for name, space in self._spaces:
            rows = getattr(history, name).reshape(-1, *space.shape)
            if (wrong := outside(space, rows)).any():
                yield f"{name} hold {rows[np.argmax(wrong)]!r}, which lies outside {space}."
        probs = history.action_probs[~np.isnan(history.action_probs)]
        continuous = isinstance(self.family.action_space, spaces.Box)
        low, wanted = (probs < 0, "[0, 1]") if continuous else (probs <= 0, "(0, 1]")
        if (low | (probs > 1 + 1e-5)).any():
            reach = f"from {probs.min():g} to {probs.max():g}"
            yield f"action_probs must lie in {wanted} (NaN: unknown), but reach {reach}."
        if (np.diff(history.update.astype(np.int64), axis=1) < 0).any():
            yield "update, the version of the policy that acted, decreases within a stream."
        expected = np.repeat(np.arange(_N_LEARNER), _N_STREAM)
        independent = np.arange(_N_LEARNER * _N_STREAM)
        if not any(np.array_equal(history.learner, labels) for labels in (expected, independent)):
            got = history.learner.tolist()
            yield f"learner must be {expected.tolist()}, the learner of each stream, not {got}."

    def _replay_problems(self, history: History, task: AnyArray) -> Iterator[str]:
        """Differences from a replay of the actions, if the family is deterministic."""
        slots = np.repeat(task[None], history.n_stream, axis=0)
        played, again = (play(self.family, slots, history.actions, seed) for seed in (1, 2))
        if any(differ(getattr(played, name), getattr(again, name)).any() for name in vars(played)):
            return
        wrong = {name: differ(getattr(history, name), getattr(played, name)) for name in vars(played)}
        if wrong["states"].any():
            yield f"states are not where the actions lead, first in {_place(wrong['states'])}."
            return
        if wrong["rewards"].any():
            yield f"rewards are not those of the task, first in {_place(wrong['rewards'])}."
        ends = wrong["terminated"] | wrong["truncated"]
        if (history.terminated & played.truncated & ~played.terminated).any():
            yield "Episodes that the time limit ends are called terminated; a time limit truncates."
        elif ends.any():
            yield f"terminated or truncated is not as the family says, first in {_place(ends)}."
        following = wrong["next_states"]
        continued = ~differ(history.next_states[:, :-1], history.states[:, 1:])
        if (following[:, :-1] & history.episode_end[:, :-1] & continued).any():
            yield (
                "At the ends of episodes next_states hold the first observation of the next episode instead "
                "of where the action led."
            )
        elif following.any():
            yield f"next_states are not where the actions lead, first in {_place(following)}."

    def _call_problems(self, histories: list[History]) -> Iterator[str]:
        """Wrong dependence on the call, the other tasks, the seed or the learner."""
        if not all(map(_same, histories, self._learn("the same again", self.ids, self.tasks))):
            yield "The same seed gives other histories a second time; draw from seed, task id and learner."
            return
        for k, task in enumerate(self.ids.tolist()):
            (alone,) = self._learn(f"task {task} alone", self.ids[k : k + 1], self.tasks[k : k + 1])
            if not _same(histories[k], alone):
                yield f"Task {task} is learned differently alone than beside another task."
                break
        if any(map(_same, histories, self._learn("with another seed", self.ids, self.tasks, self.seed + 1))):
            yield "Another seed gives the same histories."
        for history in histories:
            one, other = history.actions[:_N_STREAM], history.actions[_N_STREAM:]
            if np.array_equal(one, other):
                yield "Its two learners of a task do the same; each must draw numbers of its own."
                break


def return_problem(histories: Any, n_task: int) -> str | None:
    """What is wrong with the kind or the number of what ``learn`` has returned, if anything."""
    if not isinstance(histories, list) or not all(isinstance(h, History) for h in histories):
        kinds = [type(history).__name__ for history in histories] if isinstance(histories, list) else []
        of = f" of {', '.join(sorted(set(kinds)))}" if kinds else ""
        return f"learn() must return a list of History, one per task, not a {type(histories).__name__}{of}"
    if len(histories) != n_task:
        return f"learn() gives {len(histories)} histories of {n_task} tasks"
    return None


def first_stream_problem(family: TaskFamily, task: AnyArray, history: History) -> str | None:
    """What the first stream of ``history`` shows that it cannot be a record of ``task`` (P,), if anything."""
    arrays = {name: array[:1] for name, array in history.per_step()}
    one = History(learner=history.learner[:1], **arrays)
    for problem in _order_problems(family, one):
        return problem
    if isinstance(family, RewardFunction):
        start = np.concatenate([[True], one.episode_end[0, :-1]])
        tasks = np.repeat(task[None], len(start), axis=0)
        expected = rewards_of(family, tasks, one.states[0], one.actions[0], one.next_states[0], start)
        wrong = differ(one.rewards, expected[None])
        if wrong.any():
            return (
                f"rewards are not those of the task, first in {_place(wrong)}; are histories in task order?"
            )
    return None


def _order_problems(family: TaskFamily, history: History) -> Iterator[str]:
    """Wrong transitions from one step to the next."""
    inner = ~history.episode_end[:, :-1]
    broken = np.argwhere(inner & differ(history.next_states[:, :-1], history.states[:, 1:]))
    for stream, step in broken[:1]:
        where = f"stream {stream} does not after step {step}"
        yield f"Within an episode states must go on where next_states led; {where}."
    if (episode_step(history.episode_end) > family.horizon).any():
        yield (
            f"An episode is longer than the horizon of {family.horizon} steps; is its end neither "
            "terminated nor truncated?"
        )


def _place(wrong: AnyArray) -> str:
    stream, step = np.argwhere(wrong)[0]
    return f"stream {stream} at step {step}"


def _same(a: History, b: History) -> bool:
    ours, theirs = dict(a.per_step()), dict(b.per_step())
    return set(ours) == set(theirs) and all(
        np.array_equal(ours[name], theirs[name], equal_nan=ours[name].dtype.kind == "f") for name in ours
    )
