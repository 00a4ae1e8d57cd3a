"""A user's family, learner and marker that misbehave as the environment variable MODE says.

Modes are functions of the tables below; what a table leaves out behaves as the built-in part that it wraps.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.types import Step


def mode() -> str:
    return os.environ.get("MODE", "")


def fail(error: BaseException | type[BaseException]) -> Any:
    raise error


def hang() -> None:
    time.sleep(10**6)


ANYWHERE: dict[str, Callable[[], Any]] = {
    "raise": lambda: fail(ValueError("the simulator crashed\nsecond line")),
    "exit": lambda: sys.exit(3),
    "exit 0": lambda: sys.exit(0),
    "exit with words": lambda: sys.exit("gone"),
    "os._exit": lambda: os._exit(0),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": hang,
    "interrupt": lambda: fail(KeyboardInterrupt()),
    "stop iteration": lambda: fail(StopIteration()),
    "memory": lambda: fail(MemoryError()),
    "assertion": lambda: fail(AssertionError()),
    "print": lambda: print("HELLO"),
    "warn": lambda: warnings.warn("an environment warns", stacklevel=1),
}
"""What any part may do when it is called."""

STEP: dict[str, Callable[[Step], Any]] = {
    "reward NaN": lambda s: replace(s, reward=s.reward * np.nan),
    "reward infinite": lambda s: replace(s, reward=s.reward + np.inf),
    "reward float64": lambda s: replace(s, reward=s.reward.astype(float)),
    "reward int": lambda s: replace(s, reward=s.reward.astype(int)),
    "reward of two axes": lambda s: replace(s, reward=s.reward[:, None]),
    "reward one number": lambda s: replace(s, reward=np.float32(1)),
    "reward a list": lambda s: replace(s, reward=list(s.reward)),
    "reward words": lambda s: replace(s, reward=np.array(["a"] * len(s.reward))),
    "reward 3e38": lambda s: replace(s, reward=s.reward + np.float32(3e38)),
    "observation narrow": lambda s: replace(s, next_obs=s.next_obs[:, :1], obs=s.obs[:, :1]),
    "observation outside": lambda s: replace(s, next_obs=s.next_obs + 100, obs=s.obs + 100),
    "observation negative": lambda s: replace(s, next_obs=s.next_obs - 50, obs=s.obs - 50),
    "observation and a half": lambda s: replace(s, next_obs=s.next_obs + 0.5, obs=s.obs + 0.5),
    "observation NaN": lambda s: replace(s, next_obs=s.next_obs * np.nan, obs=s.obs * np.nan),
    "observation None": lambda s: replace(s, next_obs=None),
    "never ends": lambda s: replace(s, terminated=s.terminated & False, truncated=s.truncated & False),
    "always ends": lambda s: replace(s, terminated=s.terminated | True),
    "ends in int": lambda s: replace(s, terminated=s.terminated.astype(int)),
    "ends in NaN": lambda s: replace(s, terminated=s.terminated * np.nan),
    "fewer": lambda s: Step(s.next_obs[:1], s.reward[:1], s.terminated[:1], s.truncated[:1], s.obs[:1]),
    "a tuple": lambda s: (s.obs, s.reward, s.terminated, s.truncated, {}),
    "none": lambda s: None,
}
"""What ``step`` may return, from its eighth call on."""

RESET: dict[str, Callable[[Any], Any]] = {
    "reset narrow": lambda obs: obs[:, :1],
    "reset none": lambda obs: None,
    "reset and a half": lambda obs: obs + 0.5,
    "reset a pair": lambda obs: (obs, {}),
}
TASKS: dict[str, Callable[[Any], Any]] = {
    "no tasks": lambda tasks: tasks[:0],
    "tasks a list": lambda tasks: tasks.tolist(),
    "tasks of one axis": lambda tasks: tasks[:, 0],
    "tasks NaN": lambda tasks: tasks * np.nan,
    "tasks equal": lambda tasks: np.repeat(tasks[:5], 5, axis=0),
    "tasks objects": lambda tasks: np.array([object()] * 9)[:, None],
    "tasks at random": lambda tasks: np.random.default_rng().permutation(tasks),
    "tasks raise": lambda tasks: fail(RuntimeError("no tasks")),
}
RETURNS: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda r: r * np.nan,
    "of one task": lambda r: r[:1],
    "a list": lambda r: r.tolist(),
    "infinite": lambda r: r + np.inf,
    "1000 less": lambda r: r - 1000,
    "none": lambda r: None,
    "raises": lambda r: fail(RuntimeError("unknown")),
}
"""Of the optimal and the random return, after those words."""
HORIZON = {"0": 0, "-3": -3, "10.5": 10.5, "10**12": 10**12, "None": None, "ten": "ten"}
MAKE: dict[str, Callable[[], Any]] = {
    "make raises": lambda: fail(RuntimeError("no")),
    "make none": lambda: None,
}

FAMILY = [*ANYWHERE, *STEP, *RESET, *TASKS, *MAKE]
FAMILY += [f"{which} {how}" for which in ("optimal", "random") for how in RETURNS]
FAMILY += [f"horizon {value}" for value in HORIZON] + ["init raises"]


class Env:
    def __init__(self, inner: Any) -> None:
        self.inner, self.num_envs, self.steps = inner, inner.num_envs, 0

    def reset(self) -> Any:
        return RESET.get(mode(), lambda obs: obs)(self.inner.reset())

    def step(self, actions: Any) -> Any:
        self.steps += 1
        step = self.inner.step(actions)
        if self.steps < 8:
            return step
        ANYWHERE.get(mode(), bool)()
        return STEP.get(mode(), lambda step: step)(step)


class Family(Darkroom):
    def __init__(self, size: int = 5, horizon: int = 10) -> None:
        super().__init__(size, horizon)
        if mode() == "init raises":
            raise OSError("no licence")

    def tasks(self) -> Any:
        return TASKS.get(mode(), lambda tasks: tasks)(super().tasks())

    def make(self, tasks: Any, seeds: Any) -> Any:
        return MAKE[mode()]() if mode() in MAKE else Env(super().make(tasks, seeds))

    def optimal_return(self, tasks: Any) -> Any:
        change = RETURNS.get(mode().removeprefix("optimal "), lambda r: r)
        returns = super().optimal_return(tasks)
        return change(returns) if mode().startswith("optimal ") else returns

    def random_return(self, tasks: Any) -> Any:
        change = RETURNS.get(mode().removeprefix("random "), lambda r: r)
        returns = super().random_return(tasks)
        return change(returns) if mode().startswith("random ") else returns

    @property
    def horizon(self) -> Any:
        return HORIZON.get(mode().removeprefix("horizon "), 10) if mode().startswith("horizon ") else 10

    @horizon.setter
    def horizon(self, value: int) -> None:
        """What the family's class would set is not kept."""


HISTORY: dict[str, Callable[[Any], Any]] = {
    "probabilities 2": lambda h: replace(h, action_probs=h.action_probs * 0 + 2),
    "probabilities 0": lambda h: replace(h, action_probs=h.action_probs * 0),
    "probabilities infinite": lambda h: replace(h, action_probs=h.action_probs + np.inf),
    "float64": lambda h: replace(
        h, rewards=h.rewards.astype(float), action_probs=h.action_probs.astype(float)
    ),
    "ends in int": lambda h: replace(h, terminated=h.terminated.astype(int)),
    "update and a half": lambda h: replace(h, update=h.update + 0.5),
    "learner of two axes": lambda h: replace(h, learner=h.learner[:, None]),
    "actions outside": lambda h: replace(h, actions=h.actions + 100),
    "actions and a half": lambda h: replace(h, actions=h.actions + 0.5),
    "next states are states": lambda h: replace(h, next_states=h.states),
    "rewards NaN": lambda h: replace(h, rewards=h.rewards * np.nan),
    "rewards of others": lambda h: replace(h, rewards=h.rewards + 1),
    "shorter": lambda h: replace(h, rewards=h.rewards[:, :-1]),
    "a number": lambda h: 1,
    "without ends": lambda h: replace(h, terminated=h.terminated & False, truncated=h.truncated & False),
}
HISTORIES: dict[str, Callable[[Any], Any]] = {
    "fewer": lambda found: found[:-1],
    "other order": lambda found: found[::-1],
    "none": lambda found: None,
    "twice the first": lambda found: [found[0]] * len(found),
}
NAMES = {
    "path": "../../escape",
    "slash": "a/b",
    "empty": "",
    "none": None,
    "long": "x" * 300,
    "newline": "a\nb",
}
LEARNER = [*ANYWHERE, *HISTORY, *HISTORIES, *(f"name {name}" for name in NAMES)]


class Learner:
    @property
    def name(self) -> Any:
        return NAMES.get(mode().removeprefix("name "), "Mine") if mode().startswith("name ") else "Mine"

    def learn(self, family: Any, task_ids: Any, tasks: Any, **options: Any) -> Any:
        ANYWHERE.get(mode(), bool)()
        inner = make_learner("ppo", {"n_steps": 10, "batch_size": 10})
        found = inner.learn(family, task_ids, tasks, **options)
        if mode() in HISTORIES:
            return HISTORIES[mode()](found)
        return [HISTORY.get(mode(), lambda h: h)(history) for history in found]


MASK: dict[str, Callable[[Any], Any]] = {
    "narrow": lambda m: m[:, :-1],
    "int": lambda m: m.astype(int),
    "floats": lambda m: m * 0.5,
    "none": lambda m: None,
    "a list": lambda m: m.tolist(),
    "at random": lambda m: np.random.default_rng().random(m.shape) > 0.5,
    "masked array": lambda m: np.ma.masked_array(m),
    "one number": lambda m: True,
}
MARKER = [*ANYWHERE, *MASK, *(f"later {name}" for name in (*ANYWHERE, *MASK)), "in place"]


def marker(action_probs: Any, rewards: Any) -> Any:
    mask = action_probs > 0.2
    later = mode().startswith("later ")
    if later and mask.shape[1] != 200:
        return mask
    ANYWHERE.get(mode().removeprefix("later "), bool)()
    if mode() == "in place":
        action_probs[:] = 0
    return MASK.get(mode().removeprefix("later "), lambda m: m)(mask)
