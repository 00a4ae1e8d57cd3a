"""What the command line does in each of the processes that torchrun started. Imports no torch at first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO

from compressed_ad.errors import UsageError

_PATIENCE = timedelta(days=1)
"""How long processes wait for each other, for a validation say. Of one that died they hear at once."""


def started() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    return started() == 1 or os.environ["RANK"] == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """Inside, only the first process writes to the standard streams."""
    with ExitStack() as stack:
        if not is_first():
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(redirect_stderr(StringIO()))
        yield


def first_to_fail() -> bool:
    """Whether no other process has asked this before: the others fail for the same cause, and keep silent."""
    if started() == 1:
        return True
    try:
        from torch import distributed

        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
            wait_for_workers=False,
        )
        return store.add(f"cad failed {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except Exception:  # torchrun has gone, or torch was not imported to its end
        return True


@contextmanager
def joined(device: Callable[[], str], batch_size: int) -> Iterator[None]:
    """Inside, the processes form a group of torch.distributed, each with a GPU of its own if they use any.

    ``device()`` says whether the job computes on "cpu" or "cuda".
    """
    if (count := started()) == 1:
        yield
        return
    if count > batch_size:
        raise UsageError(f"model.batch_size: {batch_size} windows cannot be shared by {count} processes")
    import torch
    from torch import distributed

    from compressed_ad.training.ranks import together

    with together():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    distributed.group.WORLD.set_timeout(_PATIENCE)  # type: ignore[union-attr]
    if device() == "cuda":
        local, n_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n_gpu:
            raise UsageError(f"device cuda: more processes than GPUs; give torchrun --nproc-per-node {n_gpu}")
        torch.cuda.set_device(local)
    yield
    distributed.destroy_process_group()  # not after an error: the end of a process tells the others
