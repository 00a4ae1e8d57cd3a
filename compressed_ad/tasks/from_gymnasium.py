"""Any gymnasium environment as a task family: tasks differ in its parameters.

``GymnasiumFamily("CartPole-v1", {"length": "0.25:1.0", "gravity": "5:15"}, n_task=64)``, by name
``gymnasium:CartPole-v1``. A parameter is an argument of the environment's constructor, or else a numeric
attribute of the constructed environment (``env.unwrapped.length``), which is then set.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

from compressed_ad.errors import ConfigError, SpaceError, UsageError, nearest, users_code
from compressed_ad.registry import checked, import_attribute, import_module, takes
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Seed
from compressed_ad.tasks.base import OneLineRepr, TaskFamily, family_specs
from compressed_ad.tasks.random_play import MeasuredReturns
from compressed_ad.types import AnyArray, FloatArray, IntArray, Step, cast

Env = gymnasium.Env[Any, Any]

DERIVED: Mapping[str, Mapping[str, Callable[[Any], float]]] = {
    "CartPoleEnv": {
        "total_mass": lambda env: env.masspole + env.masscart,
        "polemass_length": lambda env: env.masspole * env.length,
    }
}
"""By class name: attributes that a constructor derives from others, and that must be recomputed."""


class Parameter:
    """The values that one parameter of the tasks can take: a range, or a list of choices.

    ``"low:high"`` and ``{low: ..., high: ...}`` are ranges, drawn uniformly (as integers if ``whole``); a
    list, or ``"a,b,c"``, gives the choices. A task row holds the index of a choice that is not a number.
    """

    def __init__(self, key: str, given: Any) -> None:
        self.low, self.high, self.choices = math.nan, math.nan, list[Any]()
        if isinstance(given, str):
            ends, words = ([_word(part) for part in given.split(mark)] for mark in ":,")
            if len(ends) == 2 and all(map(_is_number, ends)):
                given = {"low": ends[0], "high": ends[1]}
            elif len(words) > 1 or _is_number(words[0]):
                given = words
        if isinstance(given, Mapping) and set(given) == {"low", "high"}:
            ends = [given["low"], given["high"]]
            if not all(map(_is_number, ends)) or not ends[0] < ends[1]:
                raise UsageError(
                    f"task parameter {key!r}: a range needs two numbers, low < high; got {given!r}"
                )
            self.low, self.high = ends
        elif isinstance(given, Sequence) and not isinstance(given, str) and len(given):
            self.choices = [choice for k, choice in enumerate(given) if choice not in given[:k]]
        else:
            wanted = "a range low:high or a list of values"
            raise UsageError(f"task parameter {key!r}: expected {wanted}, got {given!r}")
        self.numeric = all(map(_is_number, self.choices))
        self.adopt(None)

    def __repr__(self) -> str:
        return repr(self.choices) if self.choices else f"{self.low:g}:{self.high:g}"

    def adopt(self, default: Any) -> None:
        """Let values be ``whole``, integers, if they are given as such and a numeric ``default`` is one."""
        given = self.choices or [self.low, self.high]
        if not self.numeric or any(value != int(value) for value in given):
            self.whole = False
        elif _is_number(default):
            self.whole = isinstance(default, int | np.integer)
        else:
            self.whole = all(isinstance(value, int) for value in given)

    def probes(self) -> list[Any]:
        """The choices, or both ends of the range."""
        return self.choices or [self.value(end) for end in (self.low, self.high)]

    def draw(self, random: np.random.Generator, n: int) -> FloatArray:
        """(n,) entries of task rows."""
        if not self.choices:
            if self.whole:
                return random.integers(int(self.low), int(self.high) + 1, n).astype(np.float64)
            return random.uniform(self.low, self.high, n)
        index = random.integers(len(self.choices), size=n)
        return np.array(self.choices, np.float64)[index] if self.numeric else index.astype(np.float64)

    def value(self, entry: float) -> Any:
        """The value that an entry of a task row stands for."""
        if self.choices and not self.numeric:
            return self.choices[int(entry)]
        return int(entry) if self.whole else float(entry)


def _word(text: str) -> Any:
    """A word of the command line, as a number or a truth value where it is one."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


@checked
class GymnasiumFamily(OneLineRepr, MeasuredReturns):
    """A gymnasium environment whose constructor arguments and numbers make tasks.

    ``params`` names the parameters that vary: ``{"length": "0.25:1.0", "gravity": [5, 10]}``; ``n_task``
    tasks (64) are drawn with ``task_seed``. Without ``params`` there is one task, the unchanged environment.
    ``kwargs`` are fixed arguments of the constructor. ``horizon`` replaces the environment's own time limit;
    both truncate. ``setup`` (``module:function``) is called with each environment after its attributes are
    set, to recompute attributes that depend on them. ``best_return`` is the return that counts as optimal
    (500 for CartPole-v1); without it, returns are compared with those of the source. The random policy's
    return is measured in ``random_episodes`` seeded episodes of each task.

    Raises ``UsageError`` for unknown environments and parameters, ``SpaceError`` for unsupported spaces.
    """

    prefix: ClassVar[str] = "gymnasium"
    by_parameters: ClassVar[bool] = True
    """Whether tasks differ in ``params``; then there is only one task without them."""

    def __init__(
        self, env_id: str, params: Mapping[str, Any] | None = None, n_task: Count | None = None,
        task_seed: Seed = 0, kwargs: Mapping[str, Any] | None = None, horizon: Count | None = None,
        best_return: float | None = None, random_episodes: Count = 20, setup: str | None = None,
    ) -> None:  # fmt: skip
        self.name = f"{self.prefix}:{env_id}"
        self.env_id, self.task_seed = env_id, task_seed
        self.params = {key: Parameter(key, given) for key, given in (params or {}).items()}
        self.kwargs, self.best_return, self.setup = dict(kwargs or {}), best_return, setup
        self.n_task = n_task if n_task is not None else 64 if self.params else 1
        self.random_episodes = random_episodes
        self._horizon = horizon
        twice = self.params.keys() & self.kwargs.keys()
        if twice:
            raise UsageError(f"{self.name}: {', '.join(sorted(twice))} stands in params and in kwargs")
        self._inspect()
        self.environment(self._tasks[0]).close()

    def _inspect(self) -> None:
        """Construct one environment to read its spaces, its time limit and its parameters."""
        spec = self._spec()
        maker = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        defaults = _arguments(maker) if callable(maker) else {}
        required = [key for key, default in defaults.items() if default is inspect.Parameter.empty]
        first = {key: self.params[key].probes()[0] for key in required if key in self.params}
        env = self._construct(first)
        bare = env.unwrapped
        others = {"np_random_seed", *DERIVED.get(type(bare).__name__, {})}
        names = [name for name in dir(bare) if not name.startswith("_") and name not in others]
        held = {name: inspect.getattr_static(bare, name) for name in names}  # public numbers
        held = {name: value for name, value in held.items() if _is_number(value)}
        arguments = {**_arguments(type(bare)), **first, **spec.kwargs}
        unknown = [key for key in self.params if key not in arguments and key not in held]
        known = sorted({*arguments, *held} - {"render_mode"})
        if self.by_parameters and not self.params and self.n_task > 1:
            raise UsageError(
                f"{self.name}: {self.n_task} tasks, but nothing is said of what they differ in; say it with"
                f" --task-param KEY=LOW:HIGH or params (it has {', '.join(known)})"
            )
        if unknown:
            raise ConfigError(
                f"{self.name}: no parameter {key!r}{nearest(key, known)}; it has {', '.join(known)}"
                for key in unknown
            )
        self.constructed = [key for key in self.params if key in arguments]
        for key in self.params.keys() - set(self.constructed):
            if not self.params[key].numeric:
                raise UsageError(f"{self.name}: task parameter {key!r} is a number, not {self.params[key]}")
        for key, parameter in self.params.items():
            parameter.adopt({**held, **arguments}[key])
        limit = self._horizon or spec.max_episode_steps or self._own_limit(env)
        if limit is None:
            raise UsageError(f"{self.name}: has no time limit of its own; say which with horizon")
        self.horizon = int(limit)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        family_specs(self)
        env.close()
        for key in self.constructed:
            self._check_spaces(key, first)

    def _check_spaces(self, key: str, others: Mapping[str, Any]) -> None:
        """Raise ``SpaceError`` if values of the constructor's argument ``key`` change the spaces."""
        for value in self.params[key].probes():
            env = self._construct({**others, key: value})
            for kind in ("observation_space", "action_space"):
                ours, theirs = getattr(self, kind), getattr(env, kind)
                if ours != theirs:
                    raise SpaceError(
                        f"{self.name}: task parameter {key!r} changes the {kind}: {_line(theirs)} for"
                        f" {value!r}, else {_line(ours)}; all tasks must share it (fix it with kwargs)"
                    )
            env.close()

    def _spec(self) -> EnvSpec:
        """The registered specification; as in gymnasium.make, ``module:EnvId`` imports the module first."""
        module, _, env_id = self.env_id.rpartition(":")
        if module:
            import_module(self.name, module)
        try:
            return gymnasium.spec(env_id)
        except gymnasium.error.Error as error:
            reason = _line(error).partition(" Did you mean")[0]
            raise UsageError(f"{self.name}: {reason}{nearest(env_id, gymnasium.registry)}") from None

    def _own_limit(self, env: Env) -> int | None:
        """The time limit that ``env`` enforces itself, if gymnasium has none for it."""
        return None

    def _construct(self, arguments: Mapping[str, Any]) -> Env:
        given = f" with {dict(arguments)}" if arguments else ""
        with users_code(f"{self.name}: cannot be made{given}", UsageError):
            return gymnasium.make(
                self.env_id, max_episode_steps=self._horizon, disable_env_checker=True,
                **{**self.kwargs, **arguments},
            )  # fmt: skip

    @cached_property
    def _tasks(self) -> FloatArray:
        if not self.params:
            return np.zeros((1, 1))
        # 100 rows for each task that is asked for; if too few of them differ, the parameters allow no more.
        randoms = {key: rng(self.task_seed, "gymnasium tasks", self.env_id, key) for key in self.params}
        drawn = [self.params[key].draw(random, 100 * self.n_task) for key, random in randoms.items()]
        rows = np.stack(drawn, axis=1)
        first = np.sort(np.unique(rows, axis=0, return_index=True)[1])
        if len(first) < self.n_task:
            raise UsageError(
                f"{self.name}: its task parameters make only {len(first)} different tasks, "
                f"fewer than n_task {self.n_task}"
            )
        return rows[first[: self.n_task]]

    def tasks(self) -> FloatArray:
        """(n_task, P) the drawn parameters, in the order of ``params``."""
        return self._tasks.copy()

    def environment(self, task: AnyArray) -> Env:
        """The environment of one row of ``tasks()``."""
        entries = zip(self.params.items(), task, strict=False)
        values = {key: parameter.value(float(entry)) for (key, parameter), entry in entries}
        env = self._construct({key: values[key] for key in self.constructed})
        bare = env.unwrapped
        for key in self.params.keys() - set(self.constructed):
            setattr(bare, key, values[key])
        for key, derive in DERIVED.get(type(bare).__name__, {}).items():
            setattr(bare, key, derive(bare))
        if self.setup:
            setup = import_attribute("setup", self.setup, takes("env"))
            with users_code(f"{self.name}: setup {self.setup} failed", UsageError):
                setup(bare)
        return env

    def make(self, tasks: AnyArray, seeds: IntArray) -> GymnasiumSlots:
        return GymnasiumSlots(self, [self.environment(task) for task in tasks], seeds)

    def play_randomly(self, tasks: AnyArray) -> FloatArray:
        total = np.zeros(len(tasks))
        for i, row in enumerate(tasks):
            random = rng(self.task_seed, "random return", self.env_id, *(repr(float(x)) for x in row))
            env = self.environment(row)
            env.action_space.seed(int(random.integers(2**31)))
            with users_code(f"task family {self.name!r}, random play with parameters {row.tolist()}"):
                for _ in range(self.random_episodes):
                    env.reset(seed=int(random.integers(2**31)))
                    ended = False
                    while not ended:
                        _, reward, terminated, truncated = outcome(env, env.action_space.sample())
                        total[i] += reward
                        ended = terminated or truncated
                env.close()
        return total / self.random_episodes


class GymnasiumSlots:
    """Single environments as a ``BatchedEnv``, stepped one after another."""

    def __init__(self, family: TaskFamily, envs: Sequence[Env], seeds: IntArray) -> None:
        self.num_envs, self._envs = len(envs), list(envs)
        self.slot: int | None = None  # the one that is played
        self._seeds: list[int | None] = [int(seed) for seed in seeds]
        self._dtype = family.observation_space.dtype
        discrete = isinstance(family.action_space, spaces.Discrete)
        action = family.action_space.dtype
        # Environments calculate with actions; the compact ones of a history file would wrap around.
        self._as_action: Callable[[Any], Any] = int if discrete else lambda given: np.asarray(given, action)

    def reset(self) -> AnyArray:
        """Start an episode in every slot; only the first reset uses the slot's seed."""
        first = []
        for i, env in enumerate(self._envs):
            self.slot = i
            first.append(env.reset(seed=self._seeds[i])[0])
        self._seeds = [None] * self.num_envs
        return np.stack([self._seen(obs) for obs in first])

    def _seen(self, obs: Any) -> AnyArray:
        """A copy in the dtype of the space, or in its own where that would be another observation."""
        given = np.array(obs)
        fitting = cast(given, self._dtype)
        return given if fitting is None else fitting

    def step(self, actions: AnyArray) -> Step:
        reward, following = np.zeros(self.num_envs, np.float32), []
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i, (env, action) in enumerate(zip(self._envs, actions, strict=True)):
            self.slot = i
            obs, reward[i], terminated[i], truncated[i] = outcome(env, self._as_action(action))
            following.append(self._seen(obs))
        again = following.copy()
        for i in np.flatnonzero(terminated | truncated).tolist():
            self.slot = i
            again[i] = self._seen(self._envs[i].reset()[0])
        return Step(np.stack(following), reward, terminated, truncated & ~terminated, np.stack(again))


def outcome(env: Env, action: Any) -> tuple[Any, float, bool, bool]:
    """Observation, reward, terminated and truncated of a step; ``TypeError`` if not single values."""
    returned: Any = env.step(action)
    if not isinstance(returned, tuple) or len(returned) != 5:
        got = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise TypeError(f"step() must return (obs, reward, terminated, truncated, info), not {got}")
    obs, *values, _ = returned
    for name, value in zip(("reward", "terminated", "truncated"), values, strict=True):
        if np.shape(value) or np.asarray(value).dtype.kind not in "biuf":
            raise TypeError(f"the {name} of a step must be a single number or truth value, not {value!r}")
    return obs, float(values[0]), bool(values[1]), bool(values[2])


def _arguments(maker: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(maker).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _line(what: object) -> str:
    return " ".join(str(what).split())
