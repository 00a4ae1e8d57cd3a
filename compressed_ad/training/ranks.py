"""Several processes, started by torchrun, that train one model: each computes its share of every gradient.

The first one, of rank 0, does the rest: it writes, validates and reports while the others wait. In a process
that works alone, all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, TypeVar

from compressed_ad.errors import RunError, UsageError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
"""How long processes wait for each other, for a validation say. Of one that died they hear at once."""


def started() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def one_voice() -> Iterator[None]:
    """Inside, only the first process writes to the standard streams."""
    with ExitStack() as stack:
        if started() > 1 and os.environ["RANK"] != "0":
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(redirect_stderr(StringIO()))
        yield


def first_to_fail() -> bool:
    """Whether no other process has asked this before; the others fail with this one, for the same cause."""
    if started() == 1:
        return True
    import torch.distributed as dist

    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
            wait_for_workers=False,
        )
        return store.add(f"cad failed {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except RuntimeError:  # torchrun has gone
        return True


@contextmanager
def joined(device: Callable[[], str], batch_size: int) -> Iterator[None]:
    """Inside, the processes that torchrun started work together, each on a GPU of its own if there are any.

    ``device()`` says whether the job computes on "cpu" or "cuda".
    """
    if (count := started()) == 1:
        yield
        return
    if count > batch_size:
        raise UsageError(f"model.batch_size: {batch_size} windows cannot be shared by {count} processes")
    import torch
    import torch.distributed as dist

    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    dist.group.WORLD.set_timeout(_PATIENCE)  # type: ignore[union-attr]
    if device() == "cuda":
        local, n_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n_gpu:
            raise UsageError(
                f"device cuda: more processes than GPUs; torchrun needs --nproc-per-node {n_gpu}"
            )
        torch.cuda.set_device(local)
    yield
    dist.destroy_process_group()  # not after an error: the end of a process tells the others


# ---------------------------------------------------------------- in a process group of torch.distributed


def size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int) -> range:
    """Which of ``n`` rows are those of this process."""
    return range(rank() * n // size(), (rank() + 1) * n // size())


def of_first(value: T) -> T:
    """The ``value`` of the first process, for which the others wait."""
    if size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    with _together():
        dist.broadcast_object_list(values)
    return values[0]


def any_of(value: bool) -> bool:
    """Whether ``value`` is true in any process; each waits for all."""
    return sum_up([float(value)])[0] > 0


def sum_up(numbers: list[float], model: nn.Module | None = None) -> list[float]:
    """Sums of ``numbers`` over the processes, in float32; the gradients of ``model`` are summed in place."""
    if size() == 1:
        return numbers
    import torch
    import torch.distributed as dist

    parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    # A parameter without a gradient in every process has none, so that no optimiser moves it.
    numbers = [*numbers, *(float(p.grad is not None) for p in parameters)]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts.append(torch.tensor(numbers, device=parts[0].device if parts else "cpu"))
    everything = torch.cat([part.flatten() for part in parts])
    with _together():
        dist.all_reduce(everything)
    *gradients, sums = torch.split(everything, [part.numel() for part in parts])
    found: list[float] = sums.tolist()
    used = found[len(found) - len(parameters) :]
    for parameter, gradient, n in zip(parameters, gradients, used, strict=True):
        parameter.grad = gradient.view_as(parameter) if n else None
    return found[: len(found) - len(parameters)]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another process of this job has ended, or cannot be reached; what was saved is kept, and"
            " --resume continues it (--debug shows more)"
        ) from error
