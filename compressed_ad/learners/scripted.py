"""Source learners that follow a rule: plays and records all streams of all tasks in one batch.

Thompson sampling and UCB1 record the rules of ``tasks.bandit``, noise distillation a policy that gets better.
Streams share nothing, so ``History.learner`` numbers every stream as a separate learner, whether it was asked
for as a learner or as a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import scipy

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.registry import checked, import_attribute, takes
from compressed_ad.seeding import SlotDraws, rng
from compressed_ad.settings import Fraction, NonNegative
from compressed_ad.tasks.bandit import Bandit, Generators, Rule
from compressed_ad.tasks.base import TASK_FAMILY, OptimalPolicy, TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.types import Agent, AnyArray, FloatArray, History, IntArray, Step

Policy = Callable[[AnyArray, AnyArray, FloatArray], AnyArray]
"""Actions (N, ...) from tasks (N, P), obs (N, ...) and episode_return (N,): ``optimal_action``."""


class ScriptedAgent(Agent, Protocol):
    """An agent that knows the probability of its last actions."""

    @property
    def probability(self) -> FloatArray:
        """(N,) of the last actions, for ``History.action_probs``."""

    @property
    def entropy(self) -> FloatArray | None:
        """(N,) nats, of the policy that chose them; None where undefined."""


MakeAgent = Callable[[AnyArray, Generators], ScriptedAgent]
"""Makes an agent from the task (N, P) of every slot and the slots' generators."""


class ScriptedLearner(ABC):
    """``SourceLearner`` whose agents follow a rule; ``update`` counts the steps before."""

    name: str

    @abstractmethod
    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        """A function that makes the agent; raises an error if the agent cannot play ``family``."""

    def learn(
        self, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int, n_learner: int,
        n_stream: int, seed: int, progress: Progress = lambda steps: None,
    ) -> list[History]:  # fmt: skip
        return record(
            family, task_ids, tasks, self.agents(family, n_timesteps),
            source=self.name, update=np.arange(n_timesteps), n_stream=n_learner * n_stream, seed=seed,
            progress=progress,
        )  # fmt: skip


def record(
    family: TaskFamily, task_ids: IntArray, tasks: AnyArray, make_agent: MakeAgent, *, source: str,
    update: IntArray, n_stream: int, seed: int, progress: Progress,
) -> list[History]:  # fmt: skip
    """One history for each task, with ``n_stream`` independent streams that ``make_agent``'s agent plays.

    ``update`` (T,) is the version of the policy at each step. All random numbers derive from (seed,
    ``source``, task id, stream).
    """
    slots = np.repeat(tasks, n_stream, axis=0)
    who = [(int(task), stream) for task in task_ids for stream in range(n_stream)]
    agent = make_agent(slots, lambda n: [rng(seed, source, *w) for w in who])
    env_seeds = [int(rng(seed, f"{source} environment", *w).integers(2**63 - 1)) for w in who]
    env = checked_slots(family, slots, np.array(env_seeds, np.int64), [task for task, _ in who])
    agent.reset(len(slots))
    obs = env.reset()
    rows: dict[str, list[AnyArray]] = {}
    for _ in range(len(update)):
        actions = agent.act(obs)
        step = env.step(actions)
        row = {"states": obs, "actions": actions, "rewards": step.reward, "next_states": step.next_obs}
        row |= {"terminated": step.terminated, "truncated": step.truncated}
        row["action_probs"] = np.asarray(agent.probability, np.float32)
        if agent.entropy is not None:
            row["entropy"] = np.asarray(agent.entropy, np.float32)
        for name, array in row.items():
            rows.setdefault(name, []).append(np.array(array))  # a copy: an agent may reuse its array
        agent.observe(actions, step)
        obs = step.obs
        progress(len(slots))
    arrays = {name: np.stack(steps, axis=1) for name, steps in rows.items()}
    arrays["update"] = np.broadcast_to(update.astype(np.int32), (len(slots), len(update)))
    return histories_of_tasks(arrays, np.arange(n_stream, dtype=np.int32))


class BanditLearner(ScriptedLearner):
    """Plays ``rule`` in every stream."""

    @abstractmethod
    def rule(self, family: Bandit, generators: Generators) -> Rule: ...

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        if not isinstance(family, Bandit):
            bandits = [n for n, f in TASK_FAMILY.items() if isinstance(f, type) and issubclass(f, Bandit)]
            known = ", ".join(bandits)
            raise UsageError(f"{self.name} learns bandits ({known}), not {family.name}; try ppo or noise")
        return lambda tasks, generators: self.rule(family, generators)


@checked
class ThompsonSampling(BanditLearner):
    """Thompson sampling with conjugate posteriors.

    ``prior`` is (alpha, beta) of the chances of ``bernoulli_bandit``, or (mean, standard deviation) of the
    means of ``gaussian_bandit``, whose noise is known. By default it is what the family draws its tasks from.
    """

    name = "Thompson"

    def __init__(self, prior: tuple[float, float] | None = None) -> None:
        self.prior = prior

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        return family.thompson(generators, self.prior)


@checked
class UCB(BanditLearner):
    """UCB1 (Auer, Cesa-Bianchi & Fischer 2002).

    ``scale`` multiplies the width of its bounds; by default what its guarantee asks for: 1 for
    ``bernoulli_bandit``, twice the noise for ``gaussian_bandit``.
    """

    name = "UCB1"

    def __init__(self, scale: NonNegative | None = None) -> None:
        self.scale = scale

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        return family.ucb1(generators, self.scale)


@checked
class NoiseDistillation(ScriptedLearner):
    """Plays a good policy, the optimal one by default, under noise that fades.

    AD-epsilon (Zisman et al. 2024, "Emergence of In-Context Reinforcement Learning from Noise Distillation"):
    actions of a good policy, replaced by uniformly random ones at a rate that falls over the history. A model
    cannot tell such a history from one of learning, so it distils the improvement as well.

    ``policy`` is a callable (tasks, obs, episode_return) -> actions, or its ``module:attribute``; by default
    the optimal policy of families that know one. The share of random actions falls from 1 to ``final``, as
    ``schedule`` says. Actions must be Discrete, MultiDiscrete or a bounded Box.
    """

    name = "Noise"

    def __init__(
        self,
        policy: str | Policy | None = None,
        final: Fraction = 0.0,
        schedule: Literal["linear", "cosine", "quadratic"] = "linear",
    ) -> None:
        fits = takes("tasks", "obs", "episode_return")
        self.policy = import_attribute("policy", policy, fits) if isinstance(policy, str) else policy
        if self.policy is not None and not callable(self.policy):
            raise ConfigError(f"noise: policy {policy!r} is a {type(self.policy).__name__}, not a function")
        self.final, self.schedule = final, schedule

    def rate(self, n_timesteps: int) -> FloatArray:
        """(T,) share of random actions at each step."""
        x = np.arange(n_timesteps) / max(n_timesteps - 1, 1)  # elapsed share of the history
        cosine = (1 + np.cos(np.pi * x)) / 2
        left = {"linear": 1 - x, "cosine": cosine, "quadratic": (1 - x) ** 2}[self.schedule]
        return np.asarray(self.final + (1 - self.final) * left)

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        policy = self.policy
        if policy is None:
            if not isinstance(family, OptimalPolicy):
                raise UsageError(
                    f"noise: {family.name} offers no optimal policy (optimal_action); name one with "
                    "learner_kwargs.policy, module:attribute"
                )
            policy = family.optimal_action
        try:
            actions = UniformActions(family.action_space)
        except SpaceError as error:
            raise SpaceError(f"noise: {family.name}: {error}") from None
        rate = self.rate(n_timesteps)
        return lambda tasks, generators: NoisyAgent(policy, tasks, actions, rate, generators)


class NoisyAgent:
    """The policy's actions, each replaced as a whole by a random one at the ``rate`` (T,) of its step.

    Of K actions, the policy's has the probability 1 - rate + rate / K and every other one rate / K; with C
    components, ``probability`` is the C-th root, their geometric mean. In a Box the policy is a point mass,
    far denser than the noise: the relative probability is 1 for its actions and 0 for random ones.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: AnyArray,
        actions: UniformActions,
        rate: FloatArray,
        generators: Generators,
    ) -> None:
        self.policy, self.tasks, self.actions, self.rate = policy, tasks, actions, rate
        self._generators = generators
        self.entropy: FloatArray | None = None

    def reset(self, n_env: int) -> None:
        self._draws = SlotDraws(self._generators(n_env), shape=(1 + self.actions.n_part,))
        self._time, self._return = 0, np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        rate, numbers = float(self.rate[self._time]), self._draws()
        best = np.asarray(self.policy(self.tasks, obs, self._return))
        if best.shape != (shape := (len(numbers), *self.actions.shape)):
            raise UsageError(f"noise: the policy gave actions of shape {best.shape}, expected {shape}")
        best = best.astype(self.actions.dtype)
        noisy = numbers[:, 0] < rate
        replaced = noisy.reshape(-1, *(1 for _ in self.actions.shape))
        chosen = np.where(replaced, self.actions.scaled(numbers[:, 1:]), best)
        if self.actions.count is None:
            self.probability = 1.0 - noisy
        else:
            other = rate / self.actions.count
            likely, n_other = 1 - rate + other, self.actions.count - 1
            same = (chosen == best).reshape(len(best), -1).all(axis=1)
            self.probability = np.where(same, likely, other) ** (1 / self.actions.n_part)
            entropy = -scipy.special.xlogy(likely, likely) - n_other * scipy.special.xlogy(other, other)
            self.entropy = np.full(len(best), entropy)
        self._time += 1
        return chosen

    def observe(self, actions: AnyArray, step: Step) -> None:
        # The return so far determines what observations may not show (see ``OptimalPolicy``).
        ended = step.terminated | step.truncated
        self._return = np.where(ended, 0.0, self._return + step.reward)
