"""Inputs and targets of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the CPU, on a ``device``; nobody waits for what that device still has to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # other memory is copied in step with the device
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Tokens:
    """Inputs of a model: B contexts of L steps.

    Token t is state t with the action, reward, episode end, true next state and border marks of the
    *previous* transition, t - 1; ``has_previous`` is False where the context holds no previous transition.
    """

    state: Tensor  # (B, L, ...)
    action: Tensor  # (B, L, ...) of t - 1, as are all below
    reward: Tensor  # (B, L) float32
    next_state: Tensor  # (B, L, ...) true successor
    ended: Tensor  # (B, L) bool: t - 1 was the last transition of its episode
    start_mark: Tensor  # (B, L) bool: <compress>
    end_mark: Tensor  # (B, L) bool: \compress>
    marked: Tensor  # (B, L) bool: t - 1 is inside a marked segment
    has_previous: Tensor  # (B, L) bool
    # Further inputs of some models (``token_inputs``), None where a model computes them from a whole window:
    previous_state: Tensor | None = None  # (B, L, ...)
    episode_return: Tensor | None = None  # (B, L) float64 rewards of the episode before step t
    episode_time: Tensor | None = None  # (B, L) int64 steps of the episode before step t

    def part(self, rows: slice | Tensor) -> Tokens:
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """``change`` of every tensor."""
        return Tokens(**{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def without(self, *names: str) -> Tokens:
        """The same tokens with the named tensors set to 0, or False."""
        return replace(self, **{name: torch.zeros_like(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Batch:
    """Windows for supervised training."""

    tokens: Tokens
    target: Tensor  # (B, L, ...) the action of step t
    valid: Tensor  # (B, L) bool: False beyond the end of a sequence shorter than the window
    weight: Tensor | None = None  # (B, L) float32 weight of each position in the loss; None: all equal

    def part(self, rows: slice | Tensor) -> Batch:
        weight = None if self.weight is None else self.weight[rows]
        return Batch(self.tokens.part(rows), self.target[rows], self.valid[rows], weight)

    def total_weight(self, at: str) -> Tensor:
        """Sum of the weights of the targets in the loss; with ``at="query"``, the number of windows."""
        if at == "query":
            return torch.tensor(float(len(self.valid)))
        return self.valid.sum() if self.weight is None else (self.weight * self.valid).sum()


def shift(
    states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, ended: Tensor, mask: Tensor
) -> Tokens:
    """Tokens of B windows of L transitions: everything but the state moves one step to the right.

    Borders are those of ``markers.borders``: before the window, steps count as unmarked.
    """

    def previous(array: Tensor) -> Tensor:
        shifted = torch.zeros_like(array)
        shifted[:, 1:] = array[:, :-1]
        return shifted

    before = previous(mask)
    has_previous = torch.ones_like(ended)
    has_previous[:, 0] = False
    return Tokens(
        state=states,
        action=previous(actions),
        reward=previous(rewards),
        next_state=previous(next_states),
        ended=previous(ended),
        start_mark=previous(mask & ~before),
        end_mark=previous(before & ~mask),
        marked=before,
        has_previous=has_previous,
    )
