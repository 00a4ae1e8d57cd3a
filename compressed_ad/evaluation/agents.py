"""Agents: a model in context, the random policy, the optimal policy."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.marking.markers import borders
from compressed_ad.models.ad import AD
from compressed_ad.models.tokens import Tokens
from compressed_ad.seeding import rng
from compressed_ad.tasks.base import OptimalPolicy, TaskFamily
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.types import Agent, AnyArray, Step

Marks = Literal["off", "self", "prompt", "prompt_rewarded"]
ContextRule = Literal["refill", "sliding"]


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
        """Uniformly random actions (N, ...)."""
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
        if n_env == 0 or n_env % len(self.tasks):
            raise UsageError(
                f"{n_env} slots cannot be shared equally by the {len(self.tasks)} tasks of the optimal agent"
            )
        self.slots = np.repeat(self.tasks, n_env // len(self.tasks), axis=0)
        self.episode_return = np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        """The family's optimal actions (N, ...)."""
        return self.family.optimal_action(self.slots, obs, self.episode_return)

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Keep the return of the current episode, which optimal actions may depend on."""
        ended = step.terminated | step.truncated
        self.episode_return = np.where(ended, 0.0, self.episode_return + step.reward)


class InContextAgent:
    """A frozen model that acts with its own history as context.

    When a context of ``n_transit`` steps is full, ``context="refill"`` drops its older half, up to the next
    episode start, and recomputes the rest: every context then looks like a training window, and the cost per
    step is constant on average. ``"sliding"`` drops one step at a time and recomputes each time.
    ``cache=False`` recomputes the whole context at every step: the exact reference.

    Actions are sampled at ``temperature`` while a slot's context holds no reward, and at
    ``temperature_rewarded`` (default: the same) once it does.

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
        context: ContextRule = "refill",
        cache: bool = True,
        marks: Marks = "off",
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
        """Start in ``n_env`` slots with empty contexts."""
        self.n_env, self.clock = n_env, 0
        self.length = torch.zeros(n_env, dtype=torch.long)
        self.memory: dict[str, Tensor] = {}
        n_row = 2 * n_env if self.guidance else n_env
        self.cache = self.model.new_cache(n_row) if self.use_cache else None
        self.latest: dict[str, Tensor] | None = None
        self.run = np.zeros(n_env, np.int64)
        self.probability = np.ones(n_env, np.float32)

    @torch.inference_mode()
    def act(self, obs: AnyArray) -> AnyArray:
        """Actions (N, ...): sampled or, with ``sample=False``, the most likely."""
        self._make_room()
        token = self._token(torch.as_tensor(np.asarray(obs)))
        self._remember(token)
        given = self._parameters(token).float().cpu().numpy()
        temperature = np.where(self._rewarded()[:, None], self.temperature_rewarded, self.temperature)
        random = rng(self.seed, "act", self.clock) if self.sample else None
        actions, self.probability = self.model.head.act(given, temperature, random)
        self.clock += 1
        return actions

    def _rewarded(self) -> AnyArray:
        """(N,) whether a context holds a reward; beyond a context's end, memory repeats its last token."""
        return (self.memory["reward"] > 0).any(dim=1).numpy()

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Keep the transition for the next token."""
        start, end, marked = self._border_marks(np.asarray(step.reward) > 0)
        self.latest = {
            "action": torch.as_tensor(np.asarray(actions)),
            "reward": torch.as_tensor(np.asarray(step.reward, dtype=np.float32)),
            "next_state": torch.as_tensor(np.asarray(step.next_obs)),
            "ended": torch.as_tensor(np.asarray(step.terminated | step.truncated)),
            "start_mark": torch.as_tensor(start),
            "end_mark": torch.as_tensor(end),
            "marked": torch.as_tensor(marked),
        }

    def _border_marks(self, rewarded: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
        """Start marks, end marks and mask (N,) of the last transition, which was ``rewarded`` (N,) or not."""
        unmarked = np.zeros(self.n_env, bool)
        if self.marks == "off":
            return unmarked, unmarked, unmarked
        before = self.memory["marked"][torch.arange(self.n_env), self.length - 1].numpy()
        if self.marks == "self":
            confident = self.probability >= self.on_policy_threshold
            self.run = np.where(confident, self.run + 1, 0)
            marked = self.run >= self.compression_window
        elif self.marks == "prompt":
            marked = ~unmarked
        else:
            marked = before | rewarded | self._rewarded()
        start, end = borders(np.stack([before, marked], axis=1))
        return start[:, 1], end[:, 1], marked

    def _token(self, obs: Tensor) -> dict[str, Tensor]:
        known = self.length > 0
        if self.latest is None:
            flag = torch.zeros(self.n_env, dtype=torch.bool)
            rest = {
                "action": torch.as_tensor(self.model.head.blank(self.n_env)),
                "reward": torch.zeros(self.n_env),
                "next_state": torch.zeros_like(obs),
                **dict.fromkeys(("ended", *_MARKS), flag),
            }
        else:
            rest = self.latest
        return {"state": obs, **rest, "has_previous": known}

    def _remember(self, token: dict[str, Tensor]) -> None:
        if not self.memory:
            self.memory = {
                name: torch.zeros((self.n_env, self.n_transit, *value.shape[1:]), dtype=value.dtype)
                for name, value in token.items()
            }
        row = torch.arange(self.n_env)
        for name, value in token.items():
            self.memory[name][row, self.length] = value
        self.length += 1

    def _make_room(self) -> None:
        full = torch.nonzero(self.length == self.n_transit)[:, 0]
        if len(full) == 0:
            return
        if self.context_rule == "sliding":
            first = torch.ones(len(full), dtype=torch.long)
        else:
            half = self.n_transit // 2
            border = self.memory["ended"][full, half:]
            first = half + torch.where(border.any(dim=1), border.long().argmax(dim=1), 0)
        # Entries beyond a row's new end repeat its last token; nothing attends to them.
        at = (torch.arange(self.n_transit) + first[:, None]).clamp(max=self.n_transit - 1)
        for value in self.memory.values():
            value[full] = value[full[:, None], at]
        # As in a training window: the first token has no previous transition, an open segment opens again.
        self.memory["has_previous"][full, 0] = False
        self.memory["reward"][full, 0] = 0.0
        for name in _MARKS:
            self.memory[name][full, 0] = False
        self.memory["start_mark"][full, 1] = self.memory["marked"][full, 1]
        self.memory["end_mark"][full, 1] = False
        self.length[full] = self.n_transit - first
        if self.cache is not None:
            longest = int(self.length[full].max())
            tokens = self._tokens(full, longest)
            rows, lengths = full.to(self.device), self.length[full].to(self.device)
            self.model.prefill(tokens, lengths, self.cache, rows)
            if self.guidance:
                self.model.prefill(tokens.without(*_MARKS), lengths, self.cache, rows + self.n_env)

    def _tokens(self, rows: Tensor, length: int) -> Tokens:
        return Tokens(**{name: value[rows, :length].to(self.device) for name, value in self.memory.items()})

    def _parameters(self, token: dict[str, Tensor]) -> Tensor:
        """(N, P) parameters of the distributions of the next actions."""
        if self.cache is not None:
            tokens = Tokens(**{name: value[:, None].to(self.device) for name, value in token.items()})
            if self.guidance:
                both = vars(tokens), vars(tokens.without(*_MARKS))
                tokens = Tokens(**{name: torch.cat([part[name] for part in both]) for name in both[0]})
            given: Tensor = self.model(tokens, self.cache)[:, 0]
        else:
            rows, last = torch.arange(self.n_env), self.length - 1
            tokens = self._tokens(rows, int(self.length.max()))
            given = self.model(tokens)[rows, last]
            if self.guidance:
                given = torch.cat([given, self.model(tokens.without(*_MARKS))[rows, last]])
        if not self.guidance:
            return given
        shown, unmarked = given.chunk(2)
        return self.model.head.guided(shown, unmarked, self.guidance)


_MARKS = ("start_mark", "end_mark", "marked")


def as_agent(player: AD | Agent, **options: Any) -> Agent:
    """An agent as it is, or a model with ``InContextAgent``'s options."""
    return InContextAgent(player, **options) if isinstance(player, AD) else player
