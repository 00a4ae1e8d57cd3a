"""A task family of your own: a windy ring with a hidden goal and hidden steering. Checks it and plays in it.

python examples/own_family.py
"""

from dataclasses import dataclass

import numpy as np
from gymnasium import spaces

from compressed_ad import OptimalAgent, RandomAgent, Step, check_family, evaluate_tasks


@dataclass(frozen=True)
class WindyRing:
    """Walk on a ring of ``size`` cells, from cell 0 to a goal, which pays 1 and ends the episode.

    A task is a row (goal, steering): with steering 1, action 1 adds 1 to the cell and action 0 takes 1 away;
    with -1 the other way round. With chance ``gust`` the wind turns a step around. The agent sees neither.
    """

    name = "windy_ring"
    action_space = spaces.Discrete(2)
    size: int = 15
    horizon: int = 12
    gust: float = 0.1

    @property
    def observation_space(self):
        """The cell."""
        return spaces.Discrete(self.size)

    def tasks(self):
        """(2 * (size - 1), 2) every goal with either steering."""
        return np.array([(goal, steering) for goal in range(1, self.size) for steering in (-1, 1)])

    def make(self, tasks, seeds):
        """One slot per row of ``tasks``, each with random numbers of its own."""
        return WindyRingEnv(self, np.asarray(tasks), [np.random.default_rng(seed) for seed in seeds])

    def optimal_return(self, tasks):
        """(N,) chance to reach the goal in time by walking towards it."""
        return self._chance(tasks, 1 - self.gust)

    def random_return(self, tasks):
        """(N,) chance to reach the goal in time by walking at random."""
        return self._chance(tasks, 0.5)

    def _chance(self, tasks, better):
        """(N,) where a step leads the better way with chance ``better``, else the other way."""
        at_goal = np.arange(self.size)[:, None] == np.asarray(tasks)[:, 0]
        chance = at_goal.astype(float)  # (size, N) from each cell, with no step left, then one, two, ...
        for _ in range(self.horizon):
            ways = np.roll(chance, 1, axis=0), np.roll(chance, -1, axis=0)
            chance = better * np.maximum(*ways) + (1 - better) * np.minimum(*ways)
            chance[at_goal] = 1
        return chance[0]

    def optimal_action(self, tasks, obs, episode_return):
        """(N,) the shorter way to the goal; optional: ``OptimalAgent`` and the source ``noise`` play it."""
        return (((tasks[:, 0] - obs) % self.size <= self.size // 2) == (tasks[:, 1] == 1)).astype(int)

    def reward(self, tasks, states, actions, next_states, start):
        """(T,) rewards of transitions under other tasks; optional: the transform ``stitch`` needs it."""
        return (next_states == tasks[:, 0]).astype(np.float32)


class WindyRingEnv:
    """N rings walked together: ``place`` (N,) and ``time`` (N,) within their present episodes."""

    def __init__(self, family, tasks, random):
        self.family, self.random, self.num_envs = family, random, len(tasks)
        self.goal, self.steering = tasks.T

    def reset(self):
        """Everyone at cell 0; observations (N,)."""
        self.place, self.time = np.zeros((2, self.num_envs), int)
        return self.place

    def step(self, actions):
        """One step in every slot; where an episode ends, the next one begins at once."""
        turned = np.array([random.random() for random in self.random]) < self.family.gust
        move = np.where(turned, -1, 1) * self.steering * (2 * actions - 1)
        next_obs, time = (self.place + move) % self.family.size, self.time + 1
        terminated = next_obs == self.goal
        truncated = ~terminated & (time == self.family.horizon)  # a time limit: the walk would go on
        going = ~(terminated | truncated)
        self.place, self.time = next_obs * going, time * going
        # next_obs is where the step led, at an episode's end as well; obs is what the next action sees.
        return Step(next_obs, terminated.astype(np.float32), terminated, truncated, obs=self.place)


if __name__ == "__main__":
    check_family(family := WindyRing())
    for agent in (RandomAgent(family.action_space), OptimalAgent(family, family.tasks())):
        returns = evaluate_tasks(agent, family, family.tasks(), rollouts=20, episodes=20)
        print(f"{type(agent).__name__}: the goal is reached in {returns.mean():.0%} of the episodes")
