"""What a recurrent memory is worth: that of a context zeroed, exchanged between tasks, or transplanted.

A *change* turns the memories (B, k, D) of B contexts into others. ``change_memory`` applies it to a cache,
``Intervened`` while an agent plays. With c, the model's ``memory_steps``, this plays without any memory::

    always = range(c, 10**6, c)
    evaluate_tasks(model, family, tasks, ..., watch=lambda agent: Intervened(agent, zeroed, always))
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.agents import InContextAgent, Watcher
from compressed_ad.models.recurrent import RecurrentAD, RecurrentCache
from compressed_ad.seeding import rng
from compressed_ad.types import Agent, AnyArray

Change = Callable[[Tensor], Tensor]


def zeroed(memory: Tensor) -> Tensor:
    """The memory of a history that has just begun, for all contexts."""
    return torch.zeros_like(memory)


def shuffled(memory: Tensor, n_task: int, seed: int = 0) -> Tensor:
    """Every context gets the memory of another task; which one, ``seed`` decides.

    The contexts of a task are adjacent, as in ``evaluate_tasks``. ``UsageError`` for fewer than two tasks.
    """
    if n_task < 2 or len(memory) % n_task:
        raise UsageError(f"cannot exchange the memories of {len(memory)} contexts between {n_task} tasks")
    # Along one random ring of all tasks, so that none gets its own.
    order = torch.as_tensor(rng(seed, "shuffled memory").permutation(n_task), device=memory.device)
    by_task = memory.reshape(n_task, -1, *memory.shape[1:])
    given = torch.empty_like(by_task)
    given[order] = by_task[order.roll(1)]
    return given.reshape(memory.shape)


def transplanted(memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The contexts ``target`` (A,) get the memories of ``source`` (A,); all others keep theirs."""
    changed = memory.clone()
    changed[target] = memory[source]
    return changed


@torch.inference_mode()
def change_memory(model: RecurrentAD, cache: RecurrentCache, change: Change) -> None:
    """Replace the memories in ``cache`` before its next step. Chunks that are full are written first.

    The steps of the present chunk stay visible; at its start there are none.
    """
    model.turn(cache)
    model.remember(cache, change(cache.memory))


class Intervened(Watcher):
    """An agent whose memory is changed before it acts in some ``steps``, counted from 0.

    ``UsageError`` unless ``agent`` is an ``InContextAgent`` that plays a ``RecurrentAD`` with a cache.
    """

    def __init__(self, agent: Agent, change: Change, steps: Container[int]) -> None:
        if not (
            isinstance(agent, InContextAgent) and isinstance(agent.model, RecurrentAD) and agent.use_cache
        ):
            raise UsageError("only an in-context agent that plays RecurrentAD with a cache has such a memory")
        self.agent: InContextAgent = agent
        self.model, self.change, self.steps = agent.model, change, steps

    def act(self, obs: AnyArray) -> AnyArray:
        cache = self.agent.cache
        if self.agent.clock in self.steps and isinstance(cache, RecurrentCache):
            change_memory(self.model, cache, self.change)
        return super().act(obs)
