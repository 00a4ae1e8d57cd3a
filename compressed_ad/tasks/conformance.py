"""Does a task family keep its promises? A sentence for every broken one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from compressed_ad.errors import CompressedADError, SpaceError, UsageError, users_code
from compressed_ad.tasks.base import (
    FixedSplit,
    RewardFunction,
    TaskFamily,
    family_specs,
    has_successors,
    rewards_of,
    successors_of,
)
from compressed_ad.tasks.checked_env import checked_slots, family_label
from compressed_ad.types import AnyArray, SpaceSpec, Step, sizes, starts

_PLAYED = 10_000  # steps, at most
_ASKED, _WALKED = 100, 200  # tasks whose rewards are asked about so many steps, at most


def check_family(family: Any, *, n_task: int = 3, seed: int = 0) -> None:
    """Raise ``UsageError`` listing everything that ``family_problems`` finds."""
    if problems := family_problems(family, n_task=n_task, seed=seed):
        raise UsageError("\n".join(problems))


def family_problems(family: Any, *, n_task: int = 3, seed: int = 0) -> list[str]:
    """The promises of ``TaskFamily`` that ``family`` breaks, one sentence each.

    Plays random actions on up to ``n_task`` tasks, for two episodes. Later checks assume that earlier ones
    passed, so fix the first sentence first.
    """
    members = [name for name in vars(TaskFamily) if not name.startswith("_")]
    missing = [name for name in members if not hasattr(family, name)]
    if missing:
        return [f"{type(family).__name__} lacks {', '.join(missing)}"]
    try:
        with users_code("while it was tried out"):
            problems = (
                list(static_problems(family))
                or list(_member_problems(family))
                or list(_play_problems(family, n_task, seed))
            )
    except CompressedADError as error:
        return [f"{family.name}: {str(error).removeprefix(f'{family_label(family)}, ')}"]
    return [f"{family.name}: {problem}" for problem in problems]


def static_problems(family: TaskFamily) -> Iterator[str]:
    """What is wrong with the spaces, the horizon and the table of tasks; quick, as nothing is played."""
    try:
        family_specs(family)
    except SpaceError as error:
        yield str(error).removeprefix(f"{family.name}: ")
    tasks = family.tasks()
    table = isinstance(tasks, np.ndarray) and tasks.ndim == 2 and len(tasks) > 0
    if not table or tasks.dtype.kind not in "iuf":
        shape = getattr(tasks, "shape", type(tasks).__name__)
        yield f"tasks() must be a numeric array (count, P) with at least one row, not {shape}"
        return
    if not np.array_equal(tasks, family.tasks()):
        yield "tasks() gives another array when called again; the order of the tasks must be fixed"


def _member_problems(family: TaskFamily) -> Iterator[str]:
    tasks = family.tasks()
    if len(np.unique(tasks, axis=0)) < len(tasks):
        yield "tasks() has equal rows; a held-out task could then be a training task as well"
    if isinstance(family, FixedSplit):
        heldout = np.asarray(family.heldout_tasks())
        if not np.isin(heldout, np.arange(len(tasks))).all() or len(np.unique(heldout)) != heldout.size:
            yield f"heldout_tasks() must be different numbers in 0..{len(tasks) - 1}"
        elif heldout.size >= len(tasks):
            yield "heldout_tasks() leaves no task to train on"
    optimal, random = family.optimal_return(tasks), family.random_return(tasks)
    returns = {"random_return": random, **({} if optimal is None else {"optimal_return": optimal})}
    for key, value in returns.items():
        if np.shape(value) != (len(tasks),) or not np.isfinite(value).all():
            yield f"{key}(tasks) must be {len(tasks)} finite numbers"
            return
    if optimal is not None and (optimal < random - 1e-9).any():
        i = int(np.argmax(random - optimal))
        yield f"task {i}: optimal_return {optimal[i]:g} is below random_return {random[i]:g}"
    try:
        pickle.loads(pickle.dumps(family))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        yield f"cannot be pickled, which worker processes need ({error})"


def _play_problems(family: TaskFamily, n_task: int, seed: int) -> Iterator[str]:
    tasks = family.tasks()[:n_task]
    space = copy.deepcopy(family.action_space)
    space.seed(seed)
    n_step = min(2 * family.horizon, _PLAYED)
    actions = np.stack([np.stack([space.sample() for _ in tasks]) for _ in range(n_step)])
    seeds = np.arange(seed, seed + len(tasks))
    env = checked_slots(family, tasks, seeds, range(len(tasks)), strict=True)
    first = env.reset().copy()
    returned, steps = [], []
    for row in actions:
        returned.append(env.step(row))
        steps.append(copy.deepcopy(returned[-1]))
    if not all(map(_same, returned, steps)):
        yield "arrays of an earlier Step change in later steps; return new arrays"
    for i in range(len(tasks)):  # a slot alone must do what it did beside the others
        slot = slice(i, i + 1)
        alone = checked_slots(family, tasks[slot], seeds[slot], [i])
        if not np.array_equal(alone.reset(), first[slot]) or not all(
            _same(step, alone.step(row[slot]), slot) for step, row in zip(steps, actions, strict=True)
        ):
            yield f"task {i} with the same seed and actions plays differently alone than beside other slots"
            break
    states, reached = np.stack([first, *(s.obs for s in steps[:-1])]), np.stack([s.next_obs for s in steps])
    if has_successors(family):
        table = successors_of(family, tasks)
        specs = family_specs(family)
        here, to = (_numbers(specs["observation"], array) for array in (states, reached))
        wrong = table[np.arange(len(tasks)), here, _numbers(specs["action"], actions)] != to
        if wrong.any():
            yield f"successor_table() of task {wrong.any(0).argmax()} does not lead where its actions led"
    if isinstance(family, RewardFunction):
        ended, rewards = (np.stack([getattr(s, name) for s in steps]) for name in ("ended", "reward"))
        start = np.concatenate([np.ones_like(ended[:1]), ended[:-1]])
        named = np.repeat(tasks, n_step, axis=0)
        got = rewards_of(family, named, *map(_one_after_another, (states, actions, reached, start)))
        wrong = ~np.isclose(got, _one_after_another(rewards))
        if wrong.any():
            yield (
                f"reward() of task {wrong.argmax() // n_step} does not give the rewards that its environment"
                " gave"
            )
        # Rewards are rare, so that many tasks are asked about one walk: each alone, and all in one call.
        every = family.tasks()[:: -(-len(family.tasks()) // _ASKED)]
        walk = [array[:_WALKED, 0] for array in (states, actions, reached, start)]
        each = [rewards_of(family, np.repeat(row[None], len(walk[0]), axis=0), *walk) for row in every]
        rows = np.repeat(every, len(walk[0]), axis=0)
        walks = (np.concatenate([array] * len(every)) for array in walk)
        if not np.allclose(np.concatenate(each), rewards_of(family, rows, *walks)):
            yield "reward() of several tasks in one call is not that of each alone: row i is of step i"


def _numbers(spec: SpaceSpec, array: AnyArray) -> AnyArray:
    """(T, N) numbers of the elements (T, N, ...) of a space, the last component changing fastest."""
    digits = array.reshape(*array.shape[:2], -1).astype(np.int64) - starts(spec)
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(digits, -1, 0)), sizes(spec)))


def _one_after_another(array: AnyArray) -> AnyArray:
    """(N * T, ...) what N tasks have in ``array`` (T, N, ...)."""
    return np.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])


def _same(a: Step, b: Step, slot: slice = slice(None)) -> bool:
    pairs = ((array, getattr(b, key)) for key, array in vars(a).items() if array is not None)
    return all(np.array_equal(array[slot], other) for array, other in pairs)
