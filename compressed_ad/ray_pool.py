"""Jobs on a Ray cluster, behind the same interface as ``WorkerPool``. Needs the extra ``ray``.

The cluster's machines must see the output folder under the same path (a shared file system).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from compressed_ad.errors import RunError, UsageError
from compressed_ad.workers import THREAD_VARIABLES, Stop

_POLL_S = 0.5
_PATIENCE_S = 120.0


class RayPool:
    """At most ``n_process`` jobs at once on the cluster at ``address`` ("auto": the one of this machine).

    A job whose machine dies is started again, up to 3 times; it continues from what it saved.
    """

    def __init__(self, address: str, n_process: int) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError("--ray needs Ray: pip install 'compressed-ad[ray]'") from None
        self.n_process = n_process
        variables = dict.fromkeys(THREAD_VARIABLES, "1")
        try:
            self.ray.init(
                address=None if address == "local" else address,
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
                num_cpus=n_process if address == "local" else None,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--ray {address}: no such cluster ({str(error).splitlines()[0]})") from None
        self.board = self.ray.remote(num_cpus=0)(_Board).remote()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ray.shutdown()

    def run(
        self,
        jobs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
        progress: Callable[[str, int, int, str], None],
        should_stop: Stop,
        finished: Callable[[str, Any], None] = lambda name, result: None,
    ) -> dict[str, Any]:
        """As ``WorkerPool.run``."""
        remote = self.ray.remote(num_cpus=1, max_retries=3)(_call)
        waiting, running, results = list(jobs), dict[Any, str](), dict[str, Any]()
        failure: BaseException | None = None
        deadline = float("inf")
        while (waiting and failure is None) or running:
            while waiting and failure is None and len(running) < self.n_process:
                name = waiting.pop(0)
                running[remote.remote(name, *jobs[name], self.board)] = name
            if should_stop() and failure is None:
                failure = KeyboardInterrupt()
            if failure is not None and deadline == float("inf"):
                deadline = time.monotonic() + _PATIENCE_S
                self.board.stop.remote()
            if time.monotonic() > deadline:
                break
            for name, latest in self.ray.get(self.board.latest.remote()).items():
                progress(name, *latest)
            for reference in self.ray.wait(list(running), timeout=_POLL_S)[0]:
                name = running.pop(reference)
                try:
                    results[name] = self.ray.get(reference)
                    finished(name, results[name])
                except self.ray.exceptions.RayTaskError as error:
                    failure = failure or error.as_instanceof_cause()
                except self.ray.exceptions.RayError as error:
                    failure = failure or RunError(f"{name} was lost: {str(error).splitlines()[0]}")
        if failure is not None:
            raise failure
        return results


class _Board:
    """Where jobs tell how far they are and ask whether to stop; lives on the cluster."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, int, str]] = {}
        self.stopping = False

    def tell(self, name: str, done: int, total: int, text: str) -> bool:
        self.progress[name] = (done, total, text)
        return self.stopping

    def asked(self) -> bool:
        return self.stopping

    def latest(self) -> dict[str, tuple[int, int, str]]:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


def _call(name: str, function: Callable[..., Any], arguments: Sequence[Any], board: Any) -> Any:
    import ray

    last, stopping = 0.0, False

    def hear(answer: Callable[[], Any]) -> None:
        nonlocal last, stopping
        if not stopping:
            last, stopping = time.monotonic(), ray.get(answer())

    def report(done: int, total: int, text: str) -> None:
        if time.monotonic() - last >= _POLL_S or done == total:
            hear(lambda: board.tell.remote(name, done, total, text))

    def should_stop() -> bool:
        if time.monotonic() - last >= _POLL_S:
            hear(board.asked.remote)
        return stopping

    try:
        return function(*arguments, report=report, should_stop=should_stop)
    except KeyboardInterrupt:
        raise RuntimeError("stopped") from None
