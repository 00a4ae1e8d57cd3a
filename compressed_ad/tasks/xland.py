"""XLand-MiniGrid: a task is a ruleset, ``xland:XLand-MiniGrid-R1-9x9``; one call steps all slots.

Importing this module needs XLand-MiniGrid and JAX; without them ``MissingExtraError`` says what to install.
JAX runs on the CPU unless ``JAX_PLATFORMS`` says otherwise: on a GPU it would take memory from the models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import product
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces

from compressed_ad.errors import MissingExtraError, UsageError, nearest
from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Seed
from compressed_ad.tasks.base import OneLineRepr
from compressed_ad.tasks.random_play import MeasuredReturns
from compressed_ad.types import AnyArray, FloatArray, IntArray, Step

try:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    import xminigrid
    from xminigrid.core.constants import NUM_ACTIONS, NUM_LAYERS, Colors, Tiles
    from xminigrid.core.goals import MAX_GOAL_ENCODING_LEN, AgentHoldGoal, AgentNearGoal, TileNearGoal
    from xminigrid.core.rules import EmptyRule
    from xminigrid.types import RuleSet
except ImportError as error:
    raise MissingExtraError("xland:ID", "xland") from error

GOALS: tuple[tuple[int, Callable[..., Any]], ...] = (
    (1, AgentHoldGoal),
    (1, AgentNearGoal),
    (2, TileNearGoal),
)
"""The goals that are drawn, each with its number of objects: hold, stand beside, put together."""

_TILES = (Tiles.BALL, Tiles.SQUARE, Tiles.PYRAMID, Tiles.KEY, Tiles.HEX, Tiles.STAR)
_COLORS = (Colors.RED, Colors.GREEN, Colors.BLUE, Colors.PURPLE, Colors.YELLOW, Colors.GREY)
OBJECTS = np.array(list(product(_TILES, _COLORS)))
"""(36, 2) tile and colour of every object that a room can hold."""


@checked
class XLandFamily(OneLineRepr, MeasuredReturns):
    """XLand-MiniGrid; tasks are rulesets: a hidden goal about objects that lie elsewhere in every episode.

    ``n_task`` rulesets are drawn with ``task_seed``: one goal (hold an object, stand beside one, put two
    together) and ``n_object`` different objects, without production rules. A task row is the goal, then the
    objects, in the library's encoding. Observations are the tile and colour, uint8, of the ``view`` x
    ``view`` cells before the agent. Reaching the goal pays 1 - 0.9 * steps / ``horizon`` and ends the
    episode; by default the horizon is the library's, 3 * height * width. The random policy's return is
    measured in ``random_episodes`` seeded episodes of each task; ``best_return`` counts as optimal.

    Raises ``UsageError`` for unknown environments and for parameters out of range.
    """

    # More objects than 16 would crowd the 36 cells of the smallest rooms.
    def __init__(
        self, env_id: str, n_task: Count = 64, task_seed: Seed = 0,
        n_object: Annotated[int, Ge(2), Le(16)] = 4, view: Annotated[int, Ge(3)] = 5,
        horizon: Count | None = None, best_return: float | None = None, random_episodes: Count = 10,
    ) -> None:  # fmt: skip
        self.name = f"xland:{env_id}"
        known = [name for name in xminigrid.registered_environments() if name.startswith("XLand")]
        if env_id not in known:
            raise UsageError(
                f"{self.name}: unknown environment{nearest(env_id, known)}; known: {', '.join(known)}"
            )
        if view % 2 == 0:
            raise UsageError(f"{self.name}: view must be odd, got {view!r}")
        self.env_id, self.n_task, self.task_seed, self.n_object = env_id, n_task, task_seed, n_object
        self.view, self.best_return, self.random_episodes = view, best_return, random_episodes
        self.horizon = horizon or int(xminigrid.make(env_id)[1].max_steps)
        self.observation_space = spaces.Box(0, 255, (view, view, NUM_LAYERS), np.uint8)
        self.action_space = spaces.Discrete(NUM_ACTIONS)

    @cached_property
    def _tasks(self) -> IntArray:
        random = rng(self.task_seed, "xland rulesets", self.env_id)
        rows: dict[bytes, IntArray] = {}
        for _ in range(10 * self.n_task):
            kinds = random.permutation(len(OBJECTS))[: self.n_object]
            about, goal = GOALS[random.integers(len(GOALS))]
            encoded = goal(*(jnp.asarray(tile) for tile in OBJECTS[np.sort(kinds[:about])])).encode()
            # Objects are sorted, so that equivalent rulesets have equal rows.
            row = np.concatenate([encoded, OBJECTS[np.sort(kinds)].ravel()]).astype(np.int64)
            rows.setdefault(row.tobytes(), row)
            if len(rows) == self.n_task:
                return np.stack(list(rows.values()))
        raise UsageError(
            f"{self.name}: only {len(rows)} different rulesets were drawn, fewer than n_task {self.n_task};"
            " lower n_task, or raise n_object"
        )

    def tasks(self) -> IntArray:
        """(n_task, 5 + 2 * n_object): the number of the goal and its objects, then all objects."""
        return self._tasks.copy()

    def make(self, tasks: AnyArray, seeds: IntArray) -> XLandSlots:
        """One slot for each row of ``tasks``; its seed places the objects and the agent."""
        rows = jnp.asarray(np.asarray(tasks), jnp.uint8)
        rules = jnp.broadcast_to(EmptyRule().encode(), (len(rows), 1, len(EmptyRule().encode())))
        goals, objects = rows[:, :MAX_GOAL_ENCODING_LEN], rows[:, MAX_GOAL_ENCODING_LEN:]
        rulesets = RuleSet(goal=goals, rules=rules, init_tiles=objects.reshape(len(rows), -1, 2))
        return XLandSlots(_compiled(self.env_id, self.horizon, self.view), rulesets, seeds)

    def play_randomly(self, tasks: AnyArray) -> FloatArray:
        streams = [  # every episode has its own slot
            rng(self.task_seed, "random return", self.env_id, *row.tolist(), k)
            for row in tasks
            for k in range(self.random_episodes)
        ]
        seeds = np.array([stream.integers(2**63 - 1) for stream in streams])
        env = self.make(np.repeat(tasks, self.random_episodes, axis=0), seeds)
        actions = np.stack([stream.integers(NUM_ACTIONS, size=self.horizon) for stream in streams], axis=1)
        env.reset()
        total, on = np.zeros(len(streams)), np.ones(len(streams), bool)
        for action in actions:
            step = env.step(action)
            total += step.reward * on
            on &= ~step.ended
        return np.asarray(total.reshape(len(tasks), -1).mean(axis=1))


@lru_cache(maxsize=8)
def _compiled(env_id: str, horizon: int, view: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``start(rulesets, keys)`` and ``advance(rulesets, timesteps, actions, keys)`` over all slots.

    ``advance`` returns the time steps after the actions, and those to go on from: the same, or new episodes.
    """
    env, params = xminigrid.make(env_id, max_steps=horizon, view_size=view)

    def start(ruleset: Any, key: Any) -> Any:
        return env.reset(params.replace(ruleset=ruleset), key)

    def advance(ruleset: Any, timestep: Any, action: Any, key: Any) -> Any:
        after = env.step(params.replace(ruleset=ruleset), timestep, action)
        fresh = start(ruleset, key)
        following = jax.tree.map(lambda new, old: jnp.where(after.last(), new, old), fresh, after)
        return after, following

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance))


class XLandSlots:
    """N slots that step together as a ``BatchedEnv``.

    Every number of slots is compiled separately, which takes seconds. So their number is raised to the next
    power of two; the additional slots are copies whose steps are dropped.
    """

    def __init__(
        self, compiled: tuple[Callable[..., Any], Callable[..., Any]], rulesets: Any, seeds: IntArray
    ) -> None:
        self.num_envs = len(seeds)
        self._filled = np.arange(max(8, 1 << (self.num_envs - 1).bit_length())) % self.num_envs
        self._rulesets = jax.tree.map(lambda part: part[self._filled], rulesets)
        self._start, self._advance = compiled
        self._seeds = np.asarray(seeds).astype(np.uint64)[self._filled]
        self._episode = np.zeros(len(self._filled), np.uint64)
        self._timestep: Any = None

    def _keys(self) -> Any:
        """A key for the next episode of each slot, made from its seed and the number of the episode."""
        words = self._seeds + self._episode * np.uint64(0x9E3779B97F4A7C15)
        # The finaliser of SplitMix64: neighbouring words become unrelated ones.
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = words ^ (words >> np.uint64(31))
        halves = np.stack([mixed >> np.uint64(32), mixed & np.uint64(0xFFFFFFFF)], axis=1)
        return jnp.asarray(halves.astype(np.uint32))

    def reset(self) -> AnyArray:
        self._timestep = self._start(self._rulesets, self._keys())
        self._episode += np.uint64(1)
        return np.array(self._timestep.observation)[: self.num_envs]

    def step(self, actions: AnyArray) -> Step:
        filled = jnp.asarray(np.asarray(actions, np.int32)[self._filled])
        after, self._timestep = self._advance(self._rulesets, self._timestep, filled, self._keys())
        over = np.array(after.last())
        terminated = over & (np.array(after.discount) == 0)
        self._episode += over.astype(np.uint64)
        arrays: tuple[Any, ...] = (
            *(np.array(after.observation), np.array(after.reward, np.float32)),
            *(terminated, over & ~terminated, np.array(self._timestep.observation)),
        )
        return Step(*(array[: self.num_envs] for array in arrays))
