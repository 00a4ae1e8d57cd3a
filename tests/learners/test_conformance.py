"""``check_learner``: a learner that keeps its promises, and one that breaks each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from compressed_ad import check_learner
from compressed_ad.errors import ConfigError
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.seeding import rng
from compressed_ad.tasks.gridworld import DarkroomHard
from compressed_ad.tasks.replay import play
from compressed_ad.types import History
from tests.cli.test_main import errors, run

__all__ = ["run"]  # the fixture


@dataclass
class Walker:
    """Random actions, recorded as they should be; what a test breaks is passed in."""

    name: str = "Walker"
    change: Callable[[History], Any] = lambda history: history
    purpose: Callable[..., tuple[int, ...]] = lambda seed, ids, task, k: (seed, task, k)
    told: float = 1.0

    def learn(
        self, family, task_ids, tasks, *, n_timesteps, n_learner, n_stream, seed, progress=lambda steps: None
    ):
        return [
            self.change(
                self._one(family, task_ids, int(i), task, n_timesteps, n_learner, n_stream, seed, progress)
            )
            for i, task in zip(task_ids, tasks, strict=True)
        ]

    def _one(self, family, ids, i, task, n_timesteps, n_learner, n_stream, seed, progress):
        continuous = isinstance(family.action_space, spaces.Box)
        shape = (n_stream, n_timesteps, *(family.action_space.shape or ()))
        draws = [rng(*self.purpose(seed, ids, i, k)) for k in range(n_learner)]
        parts = [
            d.uniform(-1, 1, shape) if continuous else d.integers(family.action_space.n, size=shape)
            for d in draws
        ]
        actions = np.concatenate(parts).astype(family.action_space.dtype)
        n = n_learner * n_stream
        played = play(family, np.repeat(task[None], n, axis=0), actions, seed)
        if self.told:
            progress(int(n * n_timesteps * self.told))
        return History(
            states=played.states, actions=actions, rewards=played.rewards, next_states=played.next_states,
            terminated=played.terminated, truncated=played.truncated,
            action_probs=np.full((n, n_timesteps), 0.0 if continuous else 0.2, np.float32),
            update=np.zeros((n, n_timesteps), np.int32),
            learner=np.repeat(np.arange(n_learner, dtype=np.int32), n_stream),
        )  # fmt: skip


class Line:
    """A family of continuous actions: a point that is pushed along a line."""

    name, horizon = "line", 6
    observation_space = spaces.Box(-99, 99, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def tasks(self):
        return np.array([[1.0], [2.0], [3.0]])

    def make(self, tasks, seeds):
        return LineEnv(self, np.asarray(tasks))

    def optimal_return(self, tasks):
        return None

    def random_return(self, tasks):
        return np.zeros(len(tasks))


class LineEnv:
    def __init__(self, family, tasks):
        self.family, self.tasks, self.num_envs = family, tasks, len(tasks)

    def reset(self):
        self.time, self.place = 0, np.zeros((self.num_envs, 1), np.float32)
        return self.place.copy()

    def step(self, actions):
        from compressed_ad.types import Step

        self.place = self.place + actions.sum(-1, keepdims=True).astype(np.float32)
        self.time += 1
        next_obs, end = self.place, np.full(self.num_envs, self.time == 6)
        reward = -np.abs(next_obs - self.tasks)[:, 0].astype(np.float32)
        obs = self.reset() if end[0] else next_obs
        return Step(next_obs, reward, np.zeros_like(end), end, obs)


def test_learners_that_keep_their_promises():
    assert check_learner(Walker()) == []
    assert check_learner(Walker(), DarkroomHard(3, 5)) == []
    assert check_learner(Walker(), Line()) == []
    assert check_learner(BatchedPPO(n_steps=20, batch_size=20, n_epochs=1), n_timesteps=40) == []


def first_obs_of_the_next(history: History) -> History:
    wrong = history.next_states.copy()
    end = history.episode_end[:, :-1]
    wrong[:, :-1][end] = history.states[:, 1:][end]
    return replace(history, next_states=wrong)


def changed(name: str, value: Callable[[Any], Any]) -> Callable[[History], History]:
    return lambda history: replace(history, **{name: value(getattr(history, name))})


def at(place: tuple[int, ...], value: Any) -> Callable[[Any], Any]:
    def put(array: Any) -> Any:
        array = array.copy()
        array[place] = value
        return array

    return put


def shorter(history: History) -> History:
    return History(**{n: a[:, :-1] for n, a in history.per_step()}, learner=history.learner)


def step_of_one_stream_to_another(history: History) -> History:
    return replace(history, states=history.states[::-1].copy())


def reset_late(history: History) -> History:
    none = np.zeros_like(history.truncated)
    states = history.states[:, :1].repeat(history.n_step, axis=1)
    return replace(
        history, states=states, next_states=states.copy(), actions=history.actions * 0, truncated=none
    )


class Raises(Walker):
    def learn(self, *args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("oops")


class Refuses(Walker):
    def learn(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("n_steps is too large")


class Forgets(Walker):
    def learn(self, family, task_ids, tasks, **kwargs: Any) -> Any:
        return super().learn(family, task_ids[:1], tasks[:1], **kwargs)


BROKEN = {
    "raises": (Raises(), "It cannot learn two tasks: learn() fails: oops (ZeroDivisionError in test_c"),
    "refuses": (Refuses(), "It cannot learn two tasks: n_steps is too large"),
    "no name": (Walker(name=""), "Its name must be a string that is not empty, not ''."),
    "forgets a task": (Forgets(), "learn() gives 1 histories of 2 tasks."),
    "other things": (Walker(change=lambda h: 3), "a list of History, one per task, not a list of int."),
    "too few steps": (Walker(change=shorter), "(4, 200) for 2 learners of 2 streams and 200 steps"),
    "integer rewards": (
        Walker(change=changed("rewards", lambda r: r.astype(int))),
        "rewards must be of a float dtype, not int64.",
    ),
    "number flags": (
        Walker(change=changed("truncated", lambda t: t.astype(np.int8))),
        "truncated must be of a bool dtype, not int8.",
    ),
    "flat cells": (
        Walker(change=changed("states", lambda s: s[..., 0])),
        "states hold elements of shape (); the space MultiDiscrete([3 3]) has (2,).",
    ),
    "float cells": (
        Walker(change=changed("states", lambda s: s.astype(float))),
        "states are of dtype float64, which does not fit the space",
    ),
    "outside": (Walker(change=changed("actions", at((1, 2), 9))), "actions hold"),
    "nan": (Walker(change=changed("rewards", at((0, 7), np.nan))), "rewards hold NaN or infinity."),
    "probability 0": (
        Walker(change=changed("action_probs", at((0, 0), 0))),
        "action_probs must lie in (0, 1] (NaN: unknown), but reach from 0 to 0.2.",
    ),
    "probability 2": (Walker(change=changed("action_probs", at((0, 0), 2))), "but reach from 0.2 to 2."),
    "update decreases": (
        Walker(change=changed("update", at((0, slice(0, 9)), 3))),
        "update, the version of the policy that acted, decreases within a stream.",
    ),
    "learner labels": (
        Walker(change=changed("learner", lambda k: k[::-1].copy())),
        "learner must be [0, 0, 1, 1], the learner of each stream, not [1, 1, 0, 0].",
    ),
    "not continuous": (
        Walker(change=step_of_one_stream_to_another),
        "Within an episode states must go on where next_states led; stream 0 does not after step",
    ),
    "no ends": (Walker(change=reset_late), "An episode is longer than the horizon of 5 steps"),
    "reset observations": (
        Walker(change=first_obs_of_the_next),
        "At the ends of episodes next_states hold the first observation of the next episode",
    ),
    "time limit terminates": (
        Walker(change=lambda h: replace(h, terminated=h.truncated, truncated=h.terminated)),
        "Episodes that the time limit ends are called terminated; a time limit truncates.",
    ),
    "rewards of another task": (
        Walker(change=changed("rewards", lambda r: r + 1)),
        "rewards are not those of the task, first in stream 0 at step 0.",
    ),
    "other actions": (
        Walker(change=changed("actions", lambda a: (a + 1) % 5)),
        "states are not where the actions lead, first in stream 0 at step",
    ),
    "not deterministic": (
        Walker(purpose=lambda seed, ids, task, k: (np.random.randint(2**31), task, k)),  # noqa: NPY002
        "The same seed gives other histories a second time",
    ),
    "block": (
        Walker(purpose=lambda seed, ids, task, k: (seed, len(ids), task, k)),
        "Task 7 is learned differently alone than beside another task.",
    ),
    "ignores the seed": (
        Walker(purpose=lambda seed, ids, task, k: (0, task, k)),
        "Another seed gives the same histories.",
    ),
    "same learners": (
        Walker(purpose=lambda seed, ids, task, k: (seed, task)),
        "Its two learners of a task do the same",
    ),
    "silent": (Walker(told=0), "It reports nothing to progress"),
    "half told": (Walker(told=0.5), "It reports 800 of 1,600 steps to progress"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_every_broken_promise_is_a_sentence(kind):
    learner, cause = BROKEN[kind]
    (sentence,) = check_learner(learner)
    assert cause in sentence


def test_what_is_no_learner():
    assert check_learner(object()) == ["It lacks name and learn."]


def test_probabilities_of_continuous_actions_may_be_0():
    low = Walker(change=changed("action_probs", at((0, 0), -0.1)))
    (sentence,) = check_learner(low, Line())
    assert "action_probs must lie in [0, 1] (NaN: unknown)" in sentence
    unknown = Walker(change=changed("action_probs", lambda p: np.full_like(p, np.nan)))
    assert check_learner(unknown) == []


# ---------------------------------------------------------------- cad check


class HalfFamily:
    """Lacks nearly everything."""

    name = "half"


def flips(rewards, seed):
    """A marker that is not random in the way it should be."""
    return np.random.default_rng().random(rewards.shape) < 0.5


def ends(episode_end):
    """A marker that is fine."""
    return episode_end.copy()


HERE = "tests.learners.test_conformance"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["family", f"{HERE}:Forgetful"], "next_obs"),
        (["marker", f"{HERE}:flips"], "draw from the seed argument."),
        (["learner", f"{HERE}:Walker", "--kwargs", "{told: 0}"], "It reports nothing to progress"),
        (["learner", "ppo"], "n_steps 2048 exceeds the 200 steps"),
    ],
)
def test_cad_check_prints_what_is_wrong(run, words, cause):
    code, out, lines = run("check", *words)
    assert (code, out) == (1, "")
    assert all(line.startswith("cad: error: ") for line in lines)
    assert any(cause in line for line in errors(lines))


class Forgetful(DarkroomHard):
    """A family whose ``obs`` goes astray within episodes."""

    def __init__(self) -> None:
        super().__init__(3, 5)

    def make(self, tasks, seeds):
        env = super().make(tasks, seeds)
        step = env.step
        env.step = lambda actions: (lambda s: replace(s, obs=np.zeros_like(s.obs)))(step(actions))
        return env


@pytest.mark.parametrize(
    "words",
    [
        ["family", "darkroom", "--kwargs", "{size: 3, horizon: 4}"],
        ["marker", "threshold", "--kwargs", "{on_policy_threshold: 0.5}"],
        ["marker", f"{HERE}:ends"],
        [
            "learner",
            f"{HERE}:Walker",
            "--family",
            "darkroom_hard",
            "--family-kwargs",
            "{size: 3, horizon: 6}",
        ],
        ["learner", f"{HERE}:Walker", "--steps", "30"],
    ],
)
def test_cad_check_of_what_is_well(run, words):
    assert run("check", *words) == (0, f"{words[0]} {words[1]}: nothing found\n", [])


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (
            ["families", "darkroom"],
            "unknown kind 'families' (did you mean 'family'?); one of family, marker, learner",
        ),
        (["family", "darkrom"], "unknown task family 'darkrom' (did you mean 'darkroom'?)"),
        (["family", f"{HERE}:HalfFamily"], "makes a HalfFamily, which has no 'tasks'"),
        (["family", "darkroom", "--kwargs", "{sise: 3}"], "unknown parameter 'sise' (did you mean 'size'?)"),
        (["family", "darkroom", "--kwargs", "3"], "--kwargs: expected parameters like '{size: 5}', got '3'"),
        (["learner", "pppo"], "unknown learner 'pppo'"),
        (["learner", "os:getcwd"], "is a builtin_function_or_method, not a class or function"),
        (["marker", "treshold"], "unknown marker 'treshold' (did you mean 'threshold'?)"),
        (["marker"], "the following arguments are required: NAME"),
    ],
)
def test_cad_check_usage_errors(run, words, cause):
    code, out, lines = run("check", *words)
    assert (code, out) == (2, "")
    (line,) = errors(lines)
    assert cause in line
