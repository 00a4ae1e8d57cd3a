"""Workers on a Ray cluster."""

from __future__ import annotations

import importlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compressed_ad.errors import MissingExtraError, RunError, UsageError, one_line
from compressed_ad.workers.pool import THREAD_VARIABLES, Event, Pool, outcome

_RAY_POLL_S = 0.5


class RayPool(Pool):
    """The cluster at ``address`` ("auto": the one of this machine; "local": one that lives for this pool).

    A unit whose machine dies is started again, up to 3 times, with or without ``retry``; it continues from
    what it saved. Relative paths mean the same as here, where the machines share this folder.
    """

    elsewhere = True

    def __init__(self, address: str, n_process: int) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise MissingExtraError("--ray", "ray") from None
        self.n_process = n_process
        local = address == "local"
        try:
            self.ray.init(
                address=None if local else address,
                runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, "1")},
                log_to_driver=False,
                include_dashboard=False if local else None,
                num_cpus=n_process if local else None,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--ray {address}: no such cluster ({one_line(error)})") from None
        self.task = self.ray.remote(num_cpus=1, max_retries=3)(_call)

    def __exit__(self, *exception: object) -> None:
        self.ray.shutdown()

    def _begin(self, function: Callable[..., Any], n_unit: int) -> None:
        if self.timeout is not None:
            raise UsageError("a timeout works on this machine only; leave out --ray or the timeout")
        try:
            self.function = self.ray.put(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(f"cannot be sent to a cluster ({one_line(error)})") from error
        self.board = self.ray.remote(num_cpus=0)(_Board).remote()
        self.running: dict[Any, str] = {}

    def _start(self, name: str, arguments: Sequence[Any]) -> None:
        reference = self.task.remote(name, self.function, arguments, self.board, Path.cwd())
        self.running[reference] = name

    def _events(self) -> Iterator[Event]:
        latest = self.ray.get(self.board.latest.remote())
        for name in set(self.running.values()) & set(latest):
            yield name, "progress", latest[name]
        for reference in self.ray.wait(list(self.running), timeout=_RAY_POLL_S)[0]:
            name = self.running.pop(reference)
            try:
                kind, content = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                kind, content = "error", RunError(f"{name} was lost: {one_line(cause)}")
            yield name, kind, content

    def _ask_to_stop(self) -> None:
        self.board.stop.remote()


class _Board:
    """Lives on the cluster: units tell it how far they are, and hear whether to stop."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, int, str]] = {}
        self.stopping = False

    def tell(self, name: str, progress: tuple[int, int, str] | None) -> bool:
        if progress is not None:
            self.progress[name] = progress
        return self.stopping

    def latest(self) -> dict[str, tuple[int, int, str]]:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


def _call(
    name: str, function: Callable[..., Any], arguments: Sequence[Any], board: Any, folder: Path
) -> tuple[str, Any]:
    import ray

    try:
        os.chdir(folder)
    except OSError as error:
        where = f"machine {os.uname().nodename} of the Ray cluster"
        return "error", RunError(f"{name}: {where} does not share the folder {folder} ({error.strerror})")
    progress: Any = None
    last, stopping = 0.0, False

    def report(*latest: Any) -> None:
        nonlocal progress
        progress = latest
        should_stop()

    def should_stop() -> bool:
        nonlocal last, stopping
        if not stopping and time.monotonic() - last >= _RAY_POLL_S:
            last, stopping = time.monotonic(), ray.get(board.tell.remote(name, progress))
        return stopping

    return outcome(partial(function, report=report, should_stop=should_stop), *arguments)
