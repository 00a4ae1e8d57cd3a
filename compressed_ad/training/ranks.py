"""Several processes that train one model, a process group of torch.distributed.

Each computes its share of every gradient. The first one, of rank 0, does the rest: it writes, validates and
reports while the others wait. In a process that works alone, all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed, nn

from compressed_ad.errors import RunError

T = TypeVar("T")


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(n: int) -> range:
    """Which of ``n`` rows are those of this process."""
    return range(rank() * n // size(), (rank() + 1) * n // size())


def of_first(value: T) -> T:
    """The ``value`` of the first process, for which the others wait."""
    values = [value]
    if size() > 1:
        with together():
            distributed.broadcast_object_list(values)
    return values[0]


def any_of(value: bool) -> bool:
    """Whether ``value`` is true in any process; each waits for all."""
    return sum_up([float(value)])[0] > 0


def sum_up(numbers: list[float], model: nn.Module | None = None) -> list[float]:
    """Sums of ``numbers`` over the processes, in float32; the gradients of ``model`` are summed in place."""
    if size() == 1:
        return numbers
    parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # A parameter without a gradient in every process has none, so that no optimiser moves it.
    extra = [*(float(p.grad is not None) for p in parameters), *numbers]
    parts = [*gradients, torch.tensor(extra, device=gradients[0].device if gradients else "cpu")]
    everything = torch.cat([part.flatten() for part in parts])
    with together():
        distributed.all_reduce(everything)
    *gradients, last = torch.split(everything, [part.numel() for part in parts])
    extra = last.tolist()
    for parameter, gradient, users in zip(parameters, gradients, extra, strict=False):
        parameter.grad = gradient.view_as(parameter) if users else None
    return extra[len(parameters) :]


@contextmanager
def together() -> Iterator[None]:
    """Turn the failure of what processes do together inside into a ``RunError``."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another process of this job has ended, or cannot be reached; what was saved is kept, and"
            " --resume continues it (--debug shows more)"
        ) from error
