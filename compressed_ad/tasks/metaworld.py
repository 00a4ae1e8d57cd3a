"""Meta-World's ML1 benchmarks: one manipulation with hidden goals, as ``metaworld:reach-v3``.

Importing this module needs Meta-World; without it ``MissingExtraError`` says what to install.
"""

from __future__ import annotations

import pickle
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal

import gymnasium
import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces

from compressed_ad.errors import MissingExtraError, UsageError, nearest
from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.tasks.base import OneLineRepr
from compressed_ad.tasks.from_gymnasium import GymnasiumSlots
from compressed_ad.tasks.random_play import MeasuredReturns
from compressed_ad.types import AnyArray, FloatArray, IntArray

try:
    import metaworld
except ImportError as error:
    raise MissingExtraError("metaworld:NAME", "metaworld") from error

LIMIT = 500
"""Meta-World's own limit on the steps of an episode."""

N_GOAL = 50
"""Training goals of ML1, and as many test goals."""


@checked
class MetaWorldFamily(OneLineRepr, MeasuredReturns):
    """Meta-World's ML1 of one name: 50 training goals, then its 50 test goals, which are the held-out tasks.

    A task row holds the numbers that ML1 draws with ``task_seed`` (positions of the object and of the goal).
    Observations are Meta-World's 39 numbers, float32, of which the goal's three are always 0; actions are 4
    numbers in [-1, 1]. ``reward`` is ``success``, 1 at the first successful step of an episode and 0
    otherwise, so that the return tells whether the episode succeeded at any step; or ``dense``, Meta-World's
    own, 0 to 10 a step. Episodes last ``horizon`` steps, success or not, and are truncated. ``best_return``
    is the return that counts as optimal, by default 1 for ``success``. The random policy's return is measured
    in ``random_episodes`` seeded episodes, each of another training task, and is one number for all tasks.

    Raises ``UsageError`` for a name that ML1 lacks and for parameters out of range.
    """

    n_task: ClassVar[int] = 2 * N_GOAL

    def __init__(
        self,
        env_id: str,
        reward: Literal["success", "dense"] = "success",
        task_seed: Annotated[int, Ge(0), Le(2**32 - 2)] = 0,  # ML1 seeds its test goals with one more
        horizon: Annotated[int, Ge(1), Le(LIMIT)] = LIMIT,
        best_return: float | None = None,
        random_episodes: Annotated[int, Ge(1), Le(N_GOAL)] = 10,
    ) -> None:
        self.name = f"metaworld:{env_id}"
        known = metaworld.ML1.ENV_NAMES
        if env_id not in known:
            raise UsageError(
                f"{self.name}: ML1 has no {env_id!r}{nearest(env_id, known)}; it has {', '.join(known)}"
            )
        self.env_id, self.reward_kind, self.task_seed, self.horizon = env_id, reward, task_seed, horizon
        self.best_return = 1.0 if best_return is None and reward == "success" else best_return
        self.random_episodes = random_episodes
        self.observation_space = spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def tasks(self) -> FloatArray:
        """(100, P): the 50 training tasks, then the 50 test tasks."""
        return np.array([_data(task)["rand_vec"] for task in _goals(self.env_id, self.task_seed)])

    def heldout_tasks(self) -> IntArray:
        return np.arange(N_GOAL, 2 * N_GOAL)

    def make(self, tasks: AnyArray, seeds: IntArray) -> GymnasiumSlots:
        """One simulation for each row of ``tasks``. Everything is deterministic; ``seeds`` have no effect."""
        return GymnasiumSlots(self, [_Episodes(self, row) for row in np.asarray(tasks, np.float64)], seeds)

    def play_randomly(self, tasks: AnyArray) -> FloatArray:
        return np.full(len(tasks), self._mean_random_return)

    @cached_property
    def _mean_random_return(self) -> float:
        returns = []
        for k in range(self.random_episodes):
            random = rng(self.task_seed, "random return", self.env_id, k)
            env = _Episodes(self, self.tasks()[k])
            env.reset()
            actions = random.uniform(-1, 1, (self.horizon, 4)).astype(np.float32)
            returns.append(sum(env.step(action)[1] for action in actions))
            env.close()
        return float(np.mean(returns))


class _Episodes(gymnasium.Env[AnyArray, AnyArray]):
    """A simulation in single precision, with the family's reward and horizon."""

    def __init__(self, family: MetaWorldFamily, row: FloatArray) -> None:
        template = _goals(family.env_id, family.task_seed)[0]
        data = {**_data(template), "rand_vec": row}
        self._env = data["env_cls"]()
        self._env.set_task(template._replace(data=pickle.dumps(data)))
        self._dense, self._horizon = family.reward_kind == "dense", family.horizon
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self._time, self._succeeded = 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[AnyArray, dict[str, Any]]:
        self._time, self._succeeded = 0, False
        return np.asarray(self._env.reset()[0], np.float32), {}

    def step(self, action: AnyArray) -> tuple[AnyArray, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        first_success = bool(info["success"]) and not self._succeeded
        self._succeeded |= first_success
        self._time += 1
        paid = float(reward) if self._dense else float(first_success)
        return np.asarray(obs, np.float32), paid, False, self._time == self._horizon, {}

    def close(self) -> None:
        self._env.close()


@lru_cache(maxsize=8)
def _goals(name: str, seed: int) -> tuple[Any, ...]:
    """The training and the test tasks of ML1, which take seconds to make."""
    benchmark = metaworld.ML1(name, seed=seed)
    return (*benchmark.train_tasks, *benchmark.test_tasks)


def _data(task: Any) -> dict[str, Any]:
    # ML1 pickled this in the same process, so unpickling it is safe.
    found: dict[str, Any] = pickle.loads(task.data)
    return found
