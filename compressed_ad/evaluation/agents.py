"""Agents: a model in context, the random policy, the optimal policy."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.models.ad import AD
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Tokens, sent
from compressed_ad.seeding import rng
from compressed_ad.tasks.base import OptimalPolicy, TaskFamily
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.types import Agent, AnyArray, Step

_MARKS = ("start_mark", "end_mark", "marked")


class RandomAgent:
    """Uniformly random actions of a space, or out of K.

    Raises ``UsageError`` for a Box without bounds, where no uniform distribution exists.
    """

    def __init__(self, actions: gymnasium.Space[Any] | int, seed: int = 0) -> None:
        space = gymnasium.spaces.Discrete(actions) if isinstance(actions, int) else actions
        if isinstance(space, gymnasium.spaces.Box) and not space.is_bounded():
            raise UsageError(f"{actions} is not bounded, so no action can be drawn uniformly")
        self.actions, self.random = UniformActions(space), rng(seed, "random agent")

    def reset(self, n_env: int) -> None:
        """Nothing to forget."""

    def act(self, obs: AnyArray) -> AnyArray:
        return self.actions.draw(self.random, len(obs))

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Nothing to learn."""


class OptimalAgent:
    """The optimal policy of a family that has one: an upper bound for other agents.

    ``tasks`` (N, P) are those of the slots. With k slots for each task, the slots of a task are adjacent, as
    in ``evaluate_tasks``. Raises ``UsageError`` if the family has no optimal policy.
    """

    def __init__(self, family: TaskFamily, tasks: AnyArray) -> None:
        if not isinstance(family, OptimalPolicy):
            raise UsageError(f"{family.name}: offers no optimal policy (optimal_action)")
        self.family: OptimalPolicy = family
        self.tasks = np.asarray(tasks)

    def reset(self, n_env: int) -> None:
        """Start in ``n_env`` slots, a multiple of the number of tasks."""
        n_task = len(self.tasks)
        if n_env == 0 or n_env % n_task:
            raise UsageError(
                f"{n_env} slots cannot be shared equally by the {n_task} tasks of the optimal agent"
            )
        self.slots = np.repeat(self.tasks, n_env // n_task, axis=0)
        self.episode_return = np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        return self.family.optimal_action(self.slots, obs, self.episode_return)

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Keep the return of the current episode, which optimal actions may depend on."""
        self.episode_return = np.where(step.ended, 0.0, self.episode_return + step.reward)


class Watcher:
    """Plays as another agent does; subclasses see, or change, what passes."""

    def watch(self, agent: Agent) -> Agent:
        """Begin to watch ``agent``; what ``evaluate_in_context`` takes as its ``watch``."""
        self.agent = agent
        return self

    def reset(self, n_env: int) -> None:
        self.agent.reset(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        return self.agent.act(obs)

    def observe(self, actions: AnyArray, step: Step) -> None:
        self.agent.observe(actions, step)


class InContextAgent:
    """A frozen model that acts with its own history as context.

    When a context of ``n_transit`` steps is full, ``context="refill"`` drops its older half, up to the next
    episode start, and recomputes the rest: every context then looks like a training window, and the cost per
    step is constant on average. ``"sliding"`` drops one step at a time and recomputes each time.
    ``cache=False`` recomputes the whole context at every step: the exact reference.

    The context of a model with ``segments`` or ``recent_steps`` is never full, because steps leave it all the
    time; ``context`` then matters with ``cache=False`` only.

    Actions are sampled at ``temperature`` while a slot's context holds no reward, and at
    ``temperature_rewarded`` (default: the same) once it does. If steps leave the context, the last
    ``n_transit`` steps count.

    ``marks``: ``off`` shows no border marks (the guide's inference); ``self`` applies the threshold rule to
    the model's own action probabilities, online, so a segment opens after ``compression_window`` steps (the
    causal rule of the markers); ``prompt`` opens a segment at the start of each context and never closes it;
    ``prompt_rewarded`` opens it at the first reward in the context.

    ``guidance`` amplifies the effect of the marks on the logits: marked + guidance * (marked - unmarked),
    both from the same weights (classifier-free guidance: Ho & Salimans 2022, equation 6). It needs a model
    that was trained with ``marker_dropout``, and costs a second row per slot. The model's head defines
    guidance, temperature and action probability of continuous actions.
    """

    def __init__(
        self,
        model: AD,
        *,
        sample: bool = True,
        temperature: float = 1.0,
        temperature_rewarded: float | None = None,
        context: Literal["refill", "sliding"] = "refill",
        cache: bool = True,
        marks: Literal["off", "self", "prompt", "prompt_rewarded"] = "off",
        guidance: float = 0.0,
        on_policy_threshold: float = 0.7,
        compression_window: int = 10,
        seed: int = 0,
    ) -> None:
        rewarded = temperature if temperature_rewarded is None else temperature_rewarded
        if min(temperature, rewarded) <= 0:
            raise UsageError(
                f"temperatures must be above 0, got {temperature} and {rewarded}; for greedy, sample=False"
            )
        self.model, self.sample = model, sample
        self.temperature, self.temperature_rewarded = temperature, rewarded
        self.context_rule, self.use_cache, self.marks = context, cache, marks
        self.guidance = 0.0 if marks == "off" else guidance
        self.on_policy_threshold, self.compression_window = on_policy_threshold, compression_window
        self.seed = seed
        self.n_transit = model.config.n_transit
        self.device = model.head.weight.device

    def reset(self, n_env: int) -> None:
        self.n_env, self.clock = n_env, 0
        self.length = torch.zeros(n_env, dtype=torch.long)
        self.memory: dict[str, Tensor] = {}
        # What steps leave behind is in the cache; of their tokens, the last one is needed again.
        self.forgets = self.use_cache and self.model.forgets
        self.size = 2 if self.forgets else self.n_transit
        self.paid = torch.full((n_env,), -self.n_transit)  # where a context last had a reward; else far back
        self.cache = self.model.new_cache(2 * n_env if self.guidance else n_env) if self.use_cache else None
        self.latest: dict[str, Tensor] | None = None
        self.run = np.zeros(n_env, np.int64)
        self.probability = np.ones(n_env, np.float32)

    @torch.inference_mode()
    def act(self, obs: AnyArray) -> AnyArray:
        """Actions (N, ...): sampled or, with ``sample=False``, the most likely."""
        if self.n_transit == 1:  # without memory: what happened before has no place
            self.latest = None
            self._forget(torch.ones(self.n_env, dtype=torch.bool))
        self._make_room()
        state = torch.as_tensor(np.asarray(obs))
        outcome = self.latest or {
            "action": torch.as_tensor(self.model.head.blank(self.n_env)),
            "reward": torch.zeros(self.n_env),
            "next_state": torch.zeros_like(state),
            **dict.fromkeys(("ended", *_MARKS), torch.zeros(self.n_env, dtype=torch.bool)),
        }
        token = {"state": state, **outcome, "has_previous": self.length > 0}
        self.paid = torch.where(token["reward"] > 0, self.length, self.paid)
        token = {name: self._sent(value) for name, value in token.items()}
        rows, asked = self._sent(torch.arange(self.n_env)), self.model.config.token_inputs
        if asked:
            before = self._sent((self.length - 1) % self.size)
            needed = [name for name in ("state", *asked) if name in self.memory]
            last = {name: self.memory[name][rows, before] for name in needed}
            token |= {name: TOKEN_INPUT[name].following(token, last) for name in asked}
        at = self._sent(self.length % self.size)
        for name, value in token.items():
            if name not in self.memory:
                self.memory[name] = value.new_zeros((self.n_env, self.size, *value.shape[1:]))
            self.memory[name][rows, at] = value
        self.length += 1
        given = self._parameters(token).float().cpu().numpy()
        temperature = np.where(self._rewarded()[:, None], self.temperature_rewarded, self.temperature)
        random = rng(self.seed, "act", self.clock) if self.sample else None
        actions, self.probability = self.model.head.act(given, temperature, random)
        self.clock += 1
        return actions

    def _sent(self, value: Tensor) -> Tensor:
        return sent(value, self.device)

    def _rewarded(self) -> AnyArray:
        """(N,) whether a context holds a reward."""
        return (self.length - self.paid <= self.n_transit).numpy()

    def _forget(self, slots: Tensor) -> None:
        """Take back the last token of ``slots``, if they have one."""
        self.length[slots] = (self.length[slots] - 1).clamp(min=0)
        if self.cache is not None:
            self.cache.forget(slots.repeat(len(self.cache.length) // self.n_env))

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Keep the transition for the next token, and decide whether it is marked.

        A slot that was not played is as if ``act`` had not seen it.
        """
        before = np.zeros(self.n_env, bool) if self.latest is None else self.latest["marked"].numpy()
        marked = np.full(self.n_env, self.marks == "prompt")
        if self.marks == "self":
            run = np.where(self.probability >= self.on_policy_threshold, self.run + 1, 0)
            self.run = run if step.played is None else np.where(step.played, run, self.run)
            marked = self.run >= self.compression_window
        elif self.marks == "prompt_rewarded":
            marked = before | (np.asarray(step.reward) > 0) | self._rewarded()
        latest = {
            "action": actions,
            "reward": np.asarray(step.reward, np.float32),
            "next_state": step.next_obs,
            "ended": step.ended,
            "start_mark": marked & ~before,
            "end_mark": before & ~marked,
            "marked": marked,
        }
        new = {name: torch.as_tensor(np.asarray(value)) for name, value in latest.items()}
        if step.played is not None and self.latest is not None:
            idle = torch.as_tensor(~step.played)
            for name, value in self.latest.items():
                new[name] = new[name].clone()
                new[name][idle] = value[idle]
            self._forget(idle)
        self.latest = new

    def _make_room(self) -> None:
        """In full contexts, drop the steps that the ``context`` rule names, and recompute the rest."""
        full = torch.nonzero(self.length == self.n_transit)[:, 0]
        if self.forgets or len(full) == 0:
            return
        if self.context_rule == "sliding":
            first = torch.ones(len(full), dtype=torch.long)
        else:
            half = self.n_transit // 2
            border = self.memory["ended"][self._sent(full), half:].cpu()
            first = half + torch.where(border.any(dim=1), border.long().argmax(dim=1), 0)
        # Entries beyond a row's new end repeat its last token; nothing attends to them.
        at = self._sent((torch.arange(self.n_transit) + first[:, None]).clamp(max=self.n_transit - 1))
        rows = self._sent(full)
        for value in self.memory.values():
            value[rows] = value[rows[:, None], at]
        # As in a training window: the first token has no previous transition, an open segment opens again.
        self.memory["has_previous"][rows, 0] = False
        self.memory["reward"][rows, 0] = 0.0
        for name in _MARKS:
            self.memory[name][rows, 0] = False
        self.memory["start_mark"][rows, 1] = self.memory["marked"][rows, 1]
        self.memory["end_mark"][rows, 1] = False
        self.length[full] = self.n_transit - first
        paid = self.paid[full] - first
        self.paid[full] = torch.where(paid > 0, paid, -self.n_transit)
        if self.cache is not None:
            lengths = self.length[full]
            tokens = self._tokens(rows, int(lengths.max()))
            self.model.prefill(tokens, lengths, self.cache, full)
            if self.guidance:
                self.model.prefill(tokens.without(*_MARKS), lengths, self.cache, full + self.n_env)

    def _tokens(self, rows: Tensor, length: int) -> Tokens:
        return Tokens(**{name: value[rows, :length] for name, value in self.memory.items()})

    def _parameters(self, token: dict[str, Tensor]) -> Tensor:
        """(N, P) parameters of the distributions of the next actions."""
        if self.cache is not None:
            tokens = Tokens(**{name: value[:, None] for name, value in token.items()})
            if self.guidance:
                both = tokens, tokens.without(*_MARKS)
                tokens = Tokens(**{name: torch.cat([getattr(part, name) for part in both]) for name in token})
            given: Tensor = self.model(tokens, self.cache)[:, 0]
        else:
            rows, last = self._sent(torch.arange(self.n_env)), self._sent(self.length - 1)
            tokens = self._tokens(rows, int(self.length.max()))
            given = self.model(tokens)[rows, last]
            if self.guidance:
                given = torch.cat([given, self.model(tokens.without(*_MARKS))[rows, last]])
        if not self.guidance:
            return given
        shown, unmarked = given.chunk(2)
        return self.model.head.guided(shown, unmarked, self.guidance)
