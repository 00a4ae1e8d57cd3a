"""An own task family: Bernoulli bandits. Checks it and shows the range that its returns can have.

python examples/own_family.py
"""

from dataclasses import dataclass

import numpy as np
from gymnasium import spaces

from compressed_ad import OptimalAgent, RandomAgent, Step, check_family, evaluate_tasks


@dataclass(frozen=True)
class Bandit:
    """``n_arm`` arms that pay 1 with an unknown probability; an episode is ``horizon`` pulls.

    Tasks are ``n_task`` rows of probabilities, drawn uniformly once and for all.
    """

    name = "bandit"
    n_arm: int = 5
    n_task: int = 100
    horizon: int = 10

    @property
    def observation_space(self):
        """Nothing can be seen."""
        return spaces.Discrete(1)

    @property
    def action_space(self):
        """The arms."""
        return spaces.Discrete(self.n_arm)

    def tasks(self):
        """(n_task, n_arm) probabilities."""
        return np.random.default_rng(0).random((self.n_task, self.n_arm))

    def make(self, tasks, seeds):
        """One slot per row of ``tasks``, each with its own random numbers."""
        return BanditEnv(self, np.asarray(tasks), [np.random.default_rng(seed) for seed in seeds])

    def optimal_return(self, tasks):
        """(N,) the best arm at every pull."""
        return self.horizon * np.max(tasks, axis=1)

    def random_return(self, tasks):
        """(N,) the mean of the arms at every pull."""
        return self.horizon * np.mean(tasks, axis=1)

    def optimal_action(self, tasks, obs, episode_return):
        """(N,) the best arm; optional, as are rewards recomputed for another task (``reward``)."""
        return np.argmax(tasks, axis=1)


class BanditEnv:
    """N bandits pulled together."""

    def __init__(self, family, tasks, random):
        self.family, self.tasks, self.random, self.num_envs = family, tasks, random, len(tasks)

    def reset(self):
        """Observations (N,)."""
        self.pulls = 0
        return np.zeros(self.num_envs, np.int64)

    def step(self, actions):
        """All slots end together, so one counter is enough; an ended slot begins anew at once."""
        chance = self.tasks[np.arange(self.num_envs), actions]
        reward = np.array([random.random() for random in self.random]) < chance
        self.pulls = (self.pulls + 1) % self.family.horizon
        obs, never = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, bool)
        # The time limit truncates: the bandit itself would go on.
        truncated = np.full(self.num_envs, self.pulls == 0)
        return Step(
            next_obs=obs, reward=reward.astype(np.float32), terminated=never, truncated=truncated, obs=obs
        )


if __name__ == "__main__":
    family = Bandit()
    check_family(family)
    tasks = family.tasks()
    for agent in (RandomAgent(family.n_arm), OptimalAgent(family, tasks)):
        returns = evaluate_tasks(agent, family, tasks, rollouts=2, episodes=10)
        print(f"{type(agent).__name__}: mean return {returns.mean():.2f} of {family.horizon}")
