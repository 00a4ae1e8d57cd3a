"""A task family of your own with continuous actions: go to a hidden place. For SAC, TD3, PPO, ...

python examples/own_reach.py
cad collect --env.family own_reach:Reach --algorithm.learner sb3:SAC    (in this folder)
"""

from dataclasses import dataclass

import numpy as np
from gymnasium import spaces

from compressed_ad import OptimalAgent, Step, check_family, evaluate_tasks

SPEED = 0.2


@dataclass(frozen=True)
class Reach:
    """A point in a square that is paid for being close to a goal it cannot see.

    An action is the velocity. Goals stand on a circle, one for each of ``n_task`` tasks.
    """

    name = "reach"
    n_task: int = 40
    horizon: int = 20

    @property
    def observation_space(self):
        """Where the point is."""
        return spaces.Box(-1, 1, (2,), np.float32)

    @property
    def action_space(self):
        """Velocity, in units of ``SPEED`` a step."""
        return spaces.Box(-1, 1, (2,), np.float32)

    def tasks(self):
        """(n_task, 2) goals."""
        angle = 2 * np.pi * np.arange(self.n_task) / self.n_task
        return 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def make(self, tasks, seeds):
        """One slot per row of ``tasks``; nothing is random."""
        return ReachEnv(np.asarray(tasks), self.horizon)

    def optimal_return(self, tasks):
        """(N,) both coordinates approach the goal as fast as they can."""
        gone = SPEED * np.arange(1, self.horizon + 1)[:, None, None]
        left = np.maximum(np.abs(tasks) - gone, 0)
        return (1 - np.linalg.norm(left, axis=2)).sum(0)

    def random_return(self, tasks):
        """(N,) mean of 200 episodes of uniform actions."""
        generator = np.random.default_rng(0)
        env = ReachEnv(np.repeat(tasks, 200, axis=0), self.horizon)
        env.reset()
        total = sum(env.step(generator.uniform(-1, 1, env.goals.shape)).reward for _ in range(self.horizon))
        return total.reshape(-1, 200).mean(1)

    def optimal_action(self, tasks, obs, episode_return):
        """(N, 2) straight to the goal."""
        return np.clip((tasks - obs) / SPEED, -1, 1).astype(np.float32)


class ReachEnv:
    """N points that move together."""

    def __init__(self, goals, horizon):
        self.num_envs, self.goals, self.horizon = len(goals), goals, horizon

    def reset(self):
        """Every point in the middle."""
        self.time, self.place = 0, np.zeros((self.num_envs, 2), np.float32)
        return self.place.copy()

    def step(self, actions):
        """Move; the reward falls with the distance to the goal."""
        move = SPEED * np.clip(actions, -1, 1)
        self.place = np.clip(self.place + move, -1, 1).astype(np.float32)
        self.time += 1
        reward = (1 - np.linalg.norm(self.goals - self.place, axis=1)).astype(np.float32)
        end = np.full(self.num_envs, self.time == self.horizon)
        after = self.place.copy()
        return Step(
            after, reward, np.zeros(self.num_envs, bool), end, self.reset() if end[0] else after.copy()
        )


if __name__ == "__main__":
    family = Reach()
    check_family(family)
    tasks = family.tasks()[::8]
    returns = evaluate_tasks(OptimalAgent(family, tasks), family, tasks, rollouts=2, episodes=5)
    print(
        f"OptimalAgent: mean return {returns.mean():.2f}, expected {family.optimal_return(tasks).mean():.2f}"
    )
    print(f"random actions: {family.random_return(tasks).mean():.2f}")
