"""Any gymnasium environment as a task family: its parameters make the tasks.

``GymnasiumFamily("CartPole-v1", {"length": "0.25:1.0", "gravity": "5:15"}, n_task=64)``, by name
``gymnasium:CartPole-v1``. A parameter is an argument of the environment's constructor, or else a number that
the constructed environment holds (``env.unwrapped.length``), which is then set.
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

from compressed_ad.errors import ConfigError, UsageError, nearest
from compressed_ad.registry import import_attribute
from compressed_ad.seeding import rng
from compressed_ad.spaces import family_specs
from compressed_ad.types import AnyArray, FloatArray, IntArray, Step

Env = gymnasium.Env[Any, Any]

_DRAWS = 100
"""Times as many rows are drawn as are asked for before equal ones are blamed on the parameters."""


def _cart_pole(env: Any) -> None:
    env.total_mass = env.masspole + env.masscart
    env.polemass_length = env.masspole * env.length


DERIVED: dict[str, Callable[[Any], None]] = {"CartPoleEnv": _cart_pole}
"""By class name: recomputes what an environment derived from its numbers when it was constructed."""


class Parameter:
    """What one parameter of the tasks may be: a range, or a choice from a list.

    ``"low:high"`` and ``{low: ..., high: ...}`` are ranges, drawn uniformly (whole numbers where ``whole``);
    a list, or ``"a,b,c"``, is a choice. Values that are no numbers stand in task rows as their index.
    """

    def __init__(self, key: str, given: Any) -> None:
        self.low = self.high = math.nan
        self.choices: list[Any] = []
        if isinstance(given, str):
            given = _parsed(given)
        if isinstance(given, Mapping) and set(given) == {"low", "high"}:
            ends = [given["low"], given["high"]]
            if not all(_is_number(end) for end in ends) or not ends[0] < ends[1]:
                raise UsageError(
                    f"task parameter {key!r}: a range needs two numbers, low < high; got {given!r}"
                )
            self.low, self.high = map(float, ends)
        elif isinstance(given, Sequence) and not isinstance(given, str) and len(given):
            self.choices = list(given)
        else:
            raise UsageError(
                f"task parameter {key!r}: expected a range low:high or a list of values, got {given!r}"
            )
        self.numeric = all(_is_number(choice) for choice in self.choices)

    def draw(self, random: np.random.Generator, n: int, whole: bool) -> FloatArray:
        """(n,) values as they stand in task rows."""
        if not self.choices:
            if whole:
                return random.integers(math.ceil(self.low), math.floor(self.high) + 1, n).astype(np.float64)
            return random.uniform(self.low, self.high, n)
        index = random.integers(len(self.choices), size=n)
        return np.array(self.choices, np.float64)[index] if self.numeric else index.astype(np.float64)

    def value(self, entry: float, whole: bool) -> Any:
        """What the environment gets for an entry of a task row."""
        if self.choices and not self.numeric:
            return self.choices[int(entry)]
        return int(entry) if whole else float(entry)


def _parsed(text: str) -> Any:
    parts = text.split(":")
    try:
        if len(parts) == 2:
            return {"low": float(parts[0]), "high": float(parts[1])}
        if len(parts) == 1:
            return [float(part) for part in text.split(",")]
    except ValueError:
        if len(parts) == 1 and "," in text:
            return [part.strip() for part in text.split(",")]
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class GymnasiumFamily:
    """A gymnasium environment whose constructor arguments and numbers make tasks.

    ``params`` names what varies: ``{"length": "0.25:1.0", "gravity": [5, 10]}``; ``n_task`` tasks are drawn
    with ``task_seed``. ``kwargs`` are fixed arguments of the constructor. ``horizon`` replaces the
    environment's own time limit, which truncates. ``setup`` (``module:function``) is called with each
    environment once its numbers are set, to recompute what it derives from them. ``best_return`` is the
    return that counts as optimal (500 for CartPole-v1); without it returns are compared with the source's.
    The random policy's return is measured, over ``random_episodes`` seeded episodes of each task.

    Raises ``UsageError`` for unknown environments and parameters, ``SpaceError`` for unsupported spaces.
    """

    prefix: ClassVar[str] = "gymnasium"

    def __init__(
        self,
        env_id: str,
        params: Mapping[str, Any] | None = None,
        n_task: int = 64,
        task_seed: int = 0,
        kwargs: Mapping[str, Any] | None = None,
        horizon: int | None = None,
        best_return: float | None = None,
        random_episodes: int = 20,
        setup: str | None = None,
    ) -> None:
        self.name = f"{self.prefix}:{env_id}"
        self.env_id, self.task_seed, self.n_task = env_id, task_seed, n_task
        self.params = {key: Parameter(key, given) for key, given in (params or {}).items()}
        self.kwargs, self.best_return, self.setup = dict(kwargs or {}), best_return, setup
        self.random_episodes = random_episodes
        self._horizon = horizon
        self._random_return: dict[bytes, float] = {}
        for key, count in (("n_task", n_task), ("random_episodes", random_episodes), ("horizon", horizon)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise UsageError(f"{self.name}: {key} must be a whole number of at least 1, got {count!r}")
        self._look()

    def _look(self) -> None:
        """Construct one environment: spaces, time limit, which parameters it has."""
        try:
            spec = gymnasium.spec(self.env_id)
        except gymnasium.error.Error as error:
            raise UsageError(
                f"{self.name}: {error}{nearest(self.env_id, gymnasium.registry)}".replace("\n", " ")
            ) from None
        env = self._construct({})
        held = _numbers(env)
        arguments = _arguments(env)
        unknown = [key for key in self.params if key not in arguments and key not in held]
        if unknown:
            known = sorted({*arguments, *held} - {"render_mode"})
            raise ConfigError(
                f"{self.name}: no parameter {key!r}{nearest(key, known)}; it has {', '.join(known)}"
                for key in unknown
            )
        now = {**held, **{key: default for key, default in arguments.items() if key in self.params}}
        self.whole = {
            key: isinstance(now.get(key), int) and not isinstance(now.get(key), bool) for key in self.params
        }
        self.constructed = [key for key in self.params if key in arguments]
        limit = self._horizon or spec.max_episode_steps or self._own_limit(env)
        if limit is None:
            raise UsageError(f"{self.name}: has no time limit of its own; say which with horizon")
        self.horizon = int(limit)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        family_specs(self)
        env.close()

    def _own_limit(self, env: Env) -> int | None:
        """The time limit that ``env`` keeps itself, where gymnasium keeps none."""
        return None

    def _construct(self, arguments: Mapping[str, Any]) -> Env:
        try:
            return gymnasium.make(
                self.env_id,
                max_episode_steps=self._horizon,
                disable_env_checker=True,
                **{**self.kwargs, **arguments},
            )
        except (gymnasium.error.Error, TypeError, ValueError, ImportError) as error:
            raise UsageError(f"{self.name}: cannot be made ({error})") from None

    @cached_property
    def _tasks(self) -> FloatArray:
        random = rng(self.task_seed, "gymnasium tasks", self.env_id)
        if not self.params:
            if self.n_task > 1:
                raise UsageError(f"{self.name}: without task parameters there is one task, not {self.n_task}")
            return np.zeros((1, 1))
        drawn = [p.draw(random, _DRAWS * self.n_task, self.whole[key]) for key, p in self.params.items()]
        rows = np.stack(drawn, axis=1)
        first = np.sort(np.unique(rows, axis=0, return_index=True)[1])
        if len(first) < self.n_task:
            raise UsageError(
                f"{self.name}: its task parameters make only {len(first)} different tasks, "
                f"fewer than n_task {self.n_task}"
            )
        return rows[first[: self.n_task]]

    def tasks(self) -> FloatArray:
        """(n_task, P): the drawn parameters, in the order in which they were named."""
        return self._tasks.copy()

    def environment(self, task: AnyArray) -> Env:
        """The environment of one row of ``tasks()``."""
        values = {
            key: parameter.value(float(entry), self.whole[key])
            for (key, parameter), entry in zip(self.params.items(), task, strict=False)
        }
        env = self._construct({key: values[key] for key in self.constructed})
        bare = env.unwrapped
        for key in self.params.keys() - set(self.constructed):
            setattr(bare, key, values[key])
        for derive in (
            DERIVED.get(type(bare).__name__),
            self.setup and import_attribute("setup", self.setup),
        ):
            if derive:
                derive(bare)
        return env

    def make(self, tasks: AnyArray, seeds: IntArray) -> GymnasiumSlots:
        """One environment per row of ``tasks``, each with its own seed."""
        return GymnasiumSlots([self.environment(task) for task in tasks], seeds)

    def optimal_return(self, tasks: AnyArray) -> FloatArray | None:
        """(N,) ``best_return`` for every task, or None if it was not given."""
        return None if self.best_return is None else np.full(len(tasks), float(self.best_return))

    def random_return(self, tasks: AnyArray) -> FloatArray:
        """(N,) mean return of ``random_episodes`` episodes of uniformly random actions, measured once."""
        rows = np.asarray(tasks, np.float64)
        for row in rows:
            if row.tobytes() not in self._random_return:
                self._random_return[row.tobytes()] = self._play_randomly(row)
        return np.array([self._random_return[row.tobytes()] for row in rows])

    def _play_randomly(self, row: FloatArray) -> float:
        random = rng(self.task_seed, "random return", self.env_id, *(repr(float(x)) for x in row))
        env, total = self.environment(row), 0.0
        env.action_space.seed(int(random.integers(2**31)))
        for _ in range(self.random_episodes):
            env.reset(seed=int(random.integers(2**31)))
            ended = False
            while not ended:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total += float(reward)
                ended = terminated or truncated
        env.close()
        return total / self.random_episodes


class GymnasiumSlots:
    """Single environments stepped one after another as a ``BatchedEnv``."""

    def __init__(self, envs: Sequence[Env], seeds: IntArray) -> None:
        self.num_envs, self._envs = len(envs), list(envs)
        self._seeds: list[int | None] = [int(seed) for seed in seeds]
        space = envs[0].action_space if envs else spaces.Discrete(1)
        self._as_action: Callable[[Any], Any] = int if isinstance(space, spaces.Discrete) else np.asarray

    def reset(self) -> AnyArray:
        """Start an episode in every slot: the first with the slot's seed, later ones where it went on."""
        obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self._envs, self._seeds, strict=True)])
        self._seeds = [None] * self.num_envs
        return obs

    def step(self, actions: AnyArray) -> Step:
        """Advance every slot by one action; slots whose episode ends are reset at once."""
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        following = []
        for i, (env, action) in enumerate(zip(self._envs, actions, strict=True)):
            obs, reward[i], terminated[i], truncated[i], _ = env.step(self._as_action(action))
            following.append(obs)
        next_obs = np.stack(following)
        obs = next_obs
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            obs = next_obs.copy()
            for i in ended.tolist():
                obs[i] = self._envs[i].reset()[0]
        return Step(next_obs, reward, terminated, truncated & ~terminated, obs)


def _arguments(env: Env) -> dict[str, Any]:
    """Names and defaults of the constructor's arguments."""
    parameters = inspect.signature(type(env.unwrapped).__init__).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in parameters if p.kind in named and p.name != "self"}


def _numbers(env: Env) -> dict[str, Any]:
    """The public numbers that an environment holds, its class's included."""
    bare = env.unwrapped
    names = [name for name in dir(bare) if not name.startswith("_") and name not in ("np_random_seed",)]
    held = {name: inspect.getattr_static(bare, name) for name in names}
    return {name: value for name, value in held.items() if _is_number(value)}
