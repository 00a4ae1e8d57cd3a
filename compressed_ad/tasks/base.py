"""The protocols of task families and batched environments, and the built-in families by name.

Any object with the members of a protocol satisfies it, without inheritance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import SpaceError, users_code
from compressed_ad.registry import Registry, call_text, makes
from compressed_ad.types import (
    LONGEST,
    Agent,
    AnyArray,
    BoolArray,
    FloatArray,
    IntArray,
    SpaceSpec,
    Step,
    sizes,
    to_spec,
)


class BatchedEnv(Protocol):
    """N environment slots that step together; a slot whose episode ends is reset at once."""

    num_envs: int

    def reset(self) -> AnyArray:
        """Start an episode in every slot; observations (N, ...)."""

    def step(self, actions: AnyArray) -> Step:
        """Advance every slot by one action."""


@runtime_checkable
class TaskFamily(Protocol):
    """A set of MDPs that share spaces and horizon; a task is a row of parameters."""

    @property
    def name(self) -> str:
        """The name under which it is registered, or any other short one."""

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Space of one observation."""

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Space of one action."""

    @property
    def horizon(self) -> int:
        """Maximum number of steps of an episode."""

    def tasks(self) -> IntArray | FloatArray:
        """All tasks, (count, P): one row of parameters each, in a fixed order."""

    def make(self, tasks: AnyArray, seeds: IntArray) -> BatchedEnv:
        """One slot for each row of ``tasks`` (N, P), each with its own seed of ``seeds`` (N,)."""

    def optimal_return(self, tasks: AnyArray) -> NDArray[Any] | None:
        """Expected undiscounted return (N,) of an optimal policy, or None if unknown."""

    def random_return(self, tasks: AnyArray) -> NDArray[Any]:
        """Expected undiscounted return (N,) of the uniformly random policy."""


@runtime_checkable
class RewardFunction(Protocol):
    """Optional for a family: rewards can be recomputed for another task (``stitch``)."""

    def reward(
        self, tasks: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> NDArray[Any]:
        """Rewards (T,) float32 of time-ordered transitions, each under its own row of ``tasks`` (T, P).

        ``start`` (T,) is True on the first transition of each episode, for rewards with a memory.
        """


@runtime_checkable
class OptimalPolicy(Protocol):
    """Optional for a family: an optimal policy is known."""

    def optimal_action(self, tasks: AnyArray, obs: AnyArray, episode_return: FloatArray) -> AnyArray:
        """Optimal actions (N, ...) of ``tasks`` (N, P) on seeing ``obs`` (N, ...).

        ``episode_return`` (N,) is the undiscounted return of the current episode so far: together with the
        observation it must determine the family's state (a found key, say). An agent can keep track of it
        without access to the environment.
        """


@runtime_checkable
class FixedSplit(Protocol):
    """Optional for a family: its held-out tasks are fixed, like the test tasks of a benchmark."""

    def heldout_tasks(self) -> IntArray:
        """Ids into ``tasks()`` of the tasks that may only be held out."""


@runtime_checkable
class GoalDistance(Protocol):
    """Optional for a family: every task has a goal at a known distance."""

    def goal_distance(self, tasks: AnyArray) -> IntArray:
        """(N,) steps from the start to the goal of ``tasks`` (N, P)."""


@runtime_checkable
class RandomFound(Protocol):
    """Optional for a family: it is known how well random actions explore."""

    def random_found(self, tasks: AnyArray) -> NDArray[np.float64]:
        """(N,) exact chance that the uniformly random policy meets a reward within one episode.

        Only for families whose episodes all begin in the same state.
        """


DIRECTED_SEARCH = "directed search (told the moves)"
"""What reports call the reference of a family with a successor table: R-max with ``dynamics: given``, or
``revisit`` where rewards move."""


@runtime_checkable
class SuccessorTable(Protocol):
    """Optional for a family: where actions lead is known and deterministic."""

    def successor_table(self, tasks: AnyArray) -> IntArray:
        """(N, O, K) number of the observation that each of K actions leads to from each of O observations.

        Observations and actions are numbered in order, the last component changing fastest; -1: impossible.
        """


@runtime_checkable
class RewardedPlaces(SuccessorTable, Protocol):
    """Optional for a family with a successor table: it is known which places (observations) pay.

    Every reward is 1 and is paid for stepping onto a place, or for staying there.
    """

    @property
    def fixed_start(self) -> int | None:
        """Number of the observation where every episode begins; None if they differ."""

    @property
    def pays_on(self) -> bool:
        """Whether the last of a task's places pays with every step onto it, or once in an episode."""

    def rewarded_places(self, tasks: AnyArray) -> IntArray:
        """(N, 1) or (N, 2) numbers of the observations that pay, in the order in which they must be met.

        The first of two pays once. Where both are the same, one step is paid for both.
        """


@runtime_checkable
class MovingRewards(SuccessorTable, Protocol):
    """Optional for a family with a successor table: places that paid stop to, and pay again later."""

    @property
    def paying_places(self) -> int:
        """How many places pay in an episode, one after the other."""


@runtime_checkable
class ReferencePolicies(Protocol):
    """Optional for a family: models should be compared with known algorithms."""

    def references(self, tasks: AnyArray) -> Mapping[str, Callable[[int], Agent]]:
        """By name, as figures label it: makes the agent from a seed.

        ``tasks`` (N, P) are those of the slots; with k slots for each task, the slots of a task are adjacent.
        A fair reference learns the tasks from its own rewards, as a model does.
        """


class OneLineRepr:
    """Shows a family as ``Darkroom(size=9, horizon=20): 81 tasks``.

    Parameters are attributes of the family. Tasks are only counted if it has no attribute ``n_task``.
    """

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "n_task"]
        parameters = {n: getattr(self, n) for n in names if getattr(self, n, None) not in (None, {})}
        family: Any = self
        n_task = family.n_task if hasattr(self, "n_task") else len(family.tasks())
        return f"{call_text(type(self).__name__, parameters)}: {n_task:,} task{'s' * (n_task != 1)}"


def family_specs(family: TaskFamily) -> dict[str, SpaceSpec]:
    """The space descriptions of ``"observation"`` and ``"action"``; ``SpaceError`` names family and space.

    A horizon that is no number of steps is a ``SpaceError``, too.
    """
    if not isinstance(family.horizon, int | np.integer) or not 1 <= family.horizon <= LONGEST:
        wanted = f"horizon must be a whole number from 1 to {LONGEST:,}"
        raise SpaceError(f"{family.name}: {wanted}, not {family.horizon!r}")
    specs = {}
    for name in ("observation", "action"):
        try:
            specs[name] = to_spec(getattr(family, f"{name}_space"))
        except SpaceError as error:
            raise SpaceError(f"{name} space of {family.name}: {error}") from error
    return specs


def discrete_actions(name: str, actions: AnyArray, n: int, n_action: int) -> IntArray:
    """``actions`` (n,) as int64; ``SpaceError``, with the family's ``name``, unless in 0..n_action - 1."""
    actions = np.asarray(actions)
    if actions.shape != (n,) or actions.dtype.kind not in "iu":
        raise SpaceError(f"{name}: expected ({n},) integer actions, got {actions.dtype} {actions.shape}")
    if n and (actions.min() < 0 or actions.max() >= n_action):
        raise SpaceError(f"{name}: actions must lie in 0..{n_action - 1}")
    return actions.astype(np.int64, copy=False)  # arithmetic in a file's uint8 would wrap around


TASK_FAMILY: Registry[Callable[..., TaskFamily]] = Registry(
    "task family",
    {
        "darkroom": "compressed_ad.tasks.gridworld:Darkroom",
        "darkroom_large": "compressed_ad.tasks.gridworld:DarkroomLarge",
        "darkroom_hard": "compressed_ad.tasks.gridworld:DarkroomHard",
        "darkroom_permuted": "compressed_ad.tasks.gridworld:DarkroomPermuted",
        "key_to_door": "compressed_ad.tasks.gridworld:KeyToDoor",
        "darkroom_recall": "compressed_ad.tasks.recall:DarkroomRecall",
        "darkroom_switching": "compressed_ad.tasks.switching:DarkroomSwitching",
        "key_to_door_switching": "compressed_ad.tasks.switching:KeyToDoorSwitching",
        "bernoulli_bandit": "compressed_ad.tasks.bandit:BernoulliBandit",
        "gaussian_bandit": "compressed_ad.tasks.bandit:GaussianBandit",
        "switching_bandit": "compressed_ad.tasks.switching:SwitchingBandit",
        "point_mass": "compressed_ad.tasks.point_mass:PointMass",
    },
    makes("TaskFamily", "tasks", "make", "optimal_return", "random_return"),
)


def has_successors(family: TaskFamily) -> bool:
    """Whether ``family`` has a successor table, and spaces whose elements can be numbered."""
    return isinstance(family, SuccessorTable) and all(
        spec["kind"] != "box" for spec in family_specs(family).values()
    )


def rewards_of(
    family: RewardFunction,
    tasks: AnyArray,
    states: AnyArray,
    actions: AnyArray,
    next_states: AnyArray,
    start: BoolArray,
) -> AnyArray:
    """``RewardFunction.reward``, of which ``SpaceError`` says that it does not give one number per row."""
    where = f"{getattr(family, 'name', type(family).__name__)}: reward()"
    with users_code(where):
        rewards = np.asarray(family.reward(tasks, states, actions, next_states, start))
    if rewards.shape != start.shape or rewards.dtype.kind not in "biuf":
        raise SpaceError(f"{where} must give {len(start)} numbers; it gives {rewards.dtype} {rewards.shape}")
    return rewards


def successors_of(family: Any, tasks: AnyArray) -> IntArray:
    """``SuccessorTable.successor_table`` of ``tasks``; ``SpaceError`` names a family without such a table."""
    if not has_successors(family):
        raise SpaceError(f"{family.name}: successors need a successor_table, and spaces that can be numbered")
    with users_code(f"{family.name}: successor_table"):
        table = np.asarray(family.successor_table(tasks))
    n_obs, n_action = (prod(sizes(spec)) for spec in family_specs(family).values())
    shape = (len(tasks), n_obs, n_action)
    if table.shape != shape or table.dtype.kind not in "iu" or table.min() < -1 or table.max() >= n_obs:
        raise SpaceError(
            f"{family.name}: successor_table must give whole numbers {shape} from -1 to {n_obs - 1}; "
            f"it gives {table.dtype} {table.shape}"
        )
    return table
