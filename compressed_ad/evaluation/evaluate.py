"""In-context evaluation: episodes played with frozen weights while the context grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressed_ad.errors import NumericalError, RunError, SpaceError, UsageError
from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.evaluation.data_frames import long_frame
from compressed_ad.learners.rmax import directed_search
from compressed_ad.models.ad import AD, evaluating
from compressed_ad.seeding import seed64
from compressed_ad.tasks.as_batched import as_batched
from compressed_ad.tasks.base import DIRECTED_SEARCH, ReferencePolicies, SuccessorTable, TaskFamily
from compressed_ad.tasks.checked_env import CheckedEnv, checked_slots
from compressed_ad.training.windows import WindowSampler
from compressed_ad.types import Agent, AnyArray, FloatArray, check_same, from_spec, to_spec

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class InContextResult:
    """In-context returns; ``result["reward_episode"]`` works as well."""

    reward_episode: FloatArray  # (E, N) undiscounted return of each complete episode; NaN: not played
    steps: int  # environment steps in each slot

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to_pandas(self) -> DataFrame:
        """A row for each ``episode``, from 1 on, and ``slot`` of the vector environment, from 0 on.

        The column ``return`` is NaN where a slot completed fewer episodes than another.
        """
        n_episode, n_slot = self.reward_episode.shape
        axes = {"episode": range(1, n_episode + 1), "slot": range(n_slot)}
        return long_frame(axes, {"return": self.reward_episode})


def evaluate_in_context(
    model: AD | Agent,
    vec_env: Any,
    eval_timesteps: int | None = None,
    episodes: int | None = None,
    *,
    max_steps: int = 100_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[[Agent], Agent] = lambda agent: agent,
    **options: Any,
) -> InContextResult:
    """Play ``episodes`` complete episodes, or ``eval_timesteps`` steps, in every slot of ``vec_env``.

    ``vec_env`` is an SB3 VecEnv, a gymnasium VectorEnv or one of our batched environments; its slots may be
    different tasks, and their episodes may end at different times. ``options`` are those of
    ``InContextAgent``: ``sample``, ``temperature``, ``context``, ``cache``, ``marks``, ``seed``.
    ``progress`` is called with (steps done, steps expected). ``watch`` may wrap the agent, to record what it
    does, say. The result has (E, N) returns: with ``episodes``, exactly E of them; with ``eval_timesteps``,
    as many as the fastest slot completed, NaN where a slot completed fewer.

    Raises ``SpaceError`` if the model was trained for other spaces, and ``RunError`` if one of ``episodes``
    has not ended after ``max_steps`` steps.
    """
    if (eval_timesteps is None) == (episodes is None):
        raise UsageError("evaluate_in_context needs either eval_timesteps or episodes")
    if (eval_timesteps or episodes or 0) < 1:
        raise UsageError("eval_timesteps and episodes must be at least 1")
    env = _checked(model, vec_env)
    agent = watch(InContextAgent(model, **options) if isinstance(model, AD) else model)
    running = np.zeros(env.num_envs, np.float64)
    count, last_end = np.zeros((2, env.num_envs), np.int64)
    returns: list[tuple[AnyArray, AnyArray, AnyArray]] = []
    steps = 0
    with evaluating(model) if isinstance(model, AD) else nullcontext():
        agent.reset(env.num_envs)
        obs = env.reset()
        while steps < eval_timesteps if eval_timesteps is not None else count.min() < (episodes or 0):
            actions = agent.act(obs)
            step = env.step(actions)
            agent.observe(actions, step)
            obs = step.obs
            running += step.reward
            ended = np.flatnonzero(step.ended)
            if len(ended):
                returns.append((count[ended], ended, running[ended]))
                count[ended] += 1
                running[ended], last_end[ended] = 0, steps + 1
            steps += 1
            if episodes is not None and steps % max_steps == 0:
                waiting = np.where(count < episodes, steps - last_end, 0)
                late = int(np.argmax(waiting))
                if waiting[late] >= max_steps:
                    raise RunError(
                        f"{env.name}, slot {late}: an episode has not ended after {max_steps:,} steps;"
                        f" {count[late]} of {episodes} are complete; if episodes are that long, raise"
                        " max_steps"
                    )
            if eval_timesteps is not None:
                progress(steps, eval_timesteps)
            elif len(ended):
                progress(steps, math.ceil(steps * (episodes or 0) / max(count.min(), 1)))
    table = np.full((int(count.max(initial=0)), env.num_envs), np.nan, np.float32)
    for row, slot, value in returns:
        table[row, slot] = value
    return InContextResult(table if episodes is None else table[:episodes], steps)


def _checked(model: AD | Agent, vec_env: Any) -> CheckedEnv:
    """``vec_env`` under watch; ``SpaceError`` unless ``model`` was trained for its spaces.

    An environment that does not tell its spaces must show what the model's spaces contain.
    """
    env = as_batched(vec_env)
    name = env.name if isinstance(env, CheckedEnv) else type(vec_env).__name__
    spaces: dict[str, Any] = {key: getattr(env, key, None) for key in ("observation_space", "action_space")}
    for key, space in spaces.items():
        if isinstance(model, AD) and space is not None:
            where = f"{name} has another {key.replace('_', ' ')} than the model"
            check_same(where, getattr(model.config, key), to_spec(space))
    if strict := isinstance(model, AD) and spaces["observation_space"] is None:
        spaces = {key: from_spec(getattr(model.config, key)) for key in spaces}
    return env if isinstance(env, CheckedEnv) else CheckedEnv(env, name, *spaces.values(), strict=strict)


def evaluate_tasks(
    model: AD | Agent,
    family: TaskFamily,
    tasks: AnyArray,
    *,
    rollouts: int,
    episodes: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> FloatArray:
    """In-context returns (N, M, E) on ``tasks`` (N, P), ``rollouts`` M independent ones per task.

    ``options`` are those of ``evaluate_in_context``.
    """
    if isinstance(model, AD):
        options["seed"] = seed
    env = evaluation_slots(family, tasks, rollouts, seed)
    result = evaluate_in_context(model, env, episodes=episodes, progress=progress, **options)
    return result.reward_episode.T.reshape(len(tasks), rollouts, episodes)


def evaluation_slots(family: TaskFamily, tasks: AnyArray, rollouts: int, seed: int) -> CheckedEnv:
    """``rollouts`` adjacent slots for each of ``tasks`` (N, P); their seeds depend on ``seed`` alone."""
    slots = np.repeat(tasks, rollouts, axis=0)
    seeds = np.array([seed64(seed, "evaluation environment", k) >> 1 for k in range(len(slots))], np.int64)
    return checked_slots(family, slots, seeds)


def evaluate_references(
    family: TaskFamily, tasks: AnyArray, *, rollouts: int, episodes: int, seed: int = 0
) -> dict[str, FloatArray]:
    """Returns (N, M, E) of the family's reference algorithms by name, and of directed search, which is told
    the moves, if the family has a successor table.

    They play in the same environments as ``evaluate_tasks`` with the same ``seed``.
    """
    known = family.references(tasks) if isinstance(family, ReferencePolicies) else {}
    agents = {name: make(seed) for name, make in known.items()}
    if isinstance(family, SuccessorTable):
        with suppress(SpaceError, UsageError):  # it cannot number the spaces, or hold the tables
            agents[DIRECTED_SEARCH] = directed_search(family, tasks, seed)
    return {
        name: evaluate_tasks(agent, family, tasks, rollouts=rollouts, episodes=episodes, seed=seed)
        for name, agent in agents.items()
    }


@dataclass(frozen=True)
class Imitation:
    """How well a model predicts the actions of the source algorithm."""

    accuracy: float
    cross_entropy: float  # nats per step


def evaluate_imitation(model: AD, sampler: WindowSampler, batches: int) -> Imitation:
    """Cross-entropy and accuracy of the first ``batches`` batches of ``sampler``."""
    with evaluating(model):
        losses, hits = zip(*(model.loss(sampler.batch(step)) for step in range(batches)), strict=True)
    if not torch.stack(losses).isfinite().all():
        raise NumericalError(
            f"the cross-entropy of {type(model).__name__} on recorded histories is not finite"
        )
    return Imitation(float(torch.stack(hits).mean()), float(torch.stack(losses).mean()))
