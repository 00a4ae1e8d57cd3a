"""What all pools of workers do: one progress, a polite stop, a retry after a death."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self

from compressed_ad.errors import RunError, raised

Report = Callable[[float, float, str], None]
"""Called with units done, units expected, and a short text. A float is a share: of 1, what is done."""

ShouldStop = Callable[[], bool]
"""True once work should stop: it then saves and raises ``KeyboardInterrupt``."""

Event = tuple[str, str, Any]
"""The name of a unit; "progress", "result", "error" or "died"; and the content that goes with it."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
MOVE = (
    "; classes and functions of a notebook or of __main__ must be moved into a module, a file that"
    " can be imported, or use n_process=1"
)


def silent(done: float, total: float, text: str) -> None:
    """A ``Report`` that shows nothing."""


def never() -> bool:
    """A ``ShouldStop`` that never comes."""
    return False


class Parts:
    """Adds up the progress of many parts that count the same thing; others are ``TimedParts``.

    A part of weight 1 is ``unit`` units. ``before``, weighed alike, was done earlier.
    """

    def __init__(
        self, report: Report, weights: Mapping[str, float], *, unit: int = 1, before: float = 0
    ) -> None:
        self.report, self.weights, self.unit, self.before = report, weights, unit, before
        self.shares = dict.fromkeys(weights, 0.0)
        self.text = ""
        self._show()

    def advance(self, name: str, done: float, total: float, text: str, who: str = "") -> None:
        """A ``Report`` of the part ``name``, once that is bound; the text begins with ``who`` it is."""
        self.text = f"{who} {text}".strip()
        self.set(name, min(done / max(total, 1), 1.0))

    def set(self, name: str, share: float) -> None:
        """A ``share`` of the part ``name`` is done: 1 when it is finished, 0 when it was lost."""
        self.shares[name] = share
        self._show()

    def _show(self) -> None:
        done = self.before + sum(self.weights[name] * share for name, share in self.shares.items())
        self._tell(done, self.before + sum(self.weights.values()))

    def _tell(self, done: float, total: float) -> None:
        self.report(round(done * self.unit), round(total * self.unit), self.text)


class TimedParts(Parts):
    """Adds up parts that count different things to a share; the text says how far the last of them is.

    ``weights`` says how long each takes, in any unit of time.
    """

    def __init__(self, report: Report, weights: Mapping[str, float]) -> None:
        super().__init__(report, weights if any(weights.values()) else dict.fromkeys(weights, 1.0))

    def advance(self, name: str, done: float, total: float, text: str, who: str = "") -> None:
        counted = text if isinstance(done, float) else f"now {done:,} of {total:,} {text}"
        super().advance(name, done, total, counted, who)

    def _tell(self, done: float, total: float) -> None:
        self.report(done / total if total else 1.0, 1, self.text)


class Pool(Protocol):
    """Runs units of work in at most ``n_process`` processes; a context manager that leaves none behind."""

    n_process: int
    timeout: float | None
    memory_limit: int | None = None  # bytes of all processes together
    elsewhere: bool = False  # whether even a single unit must not run in this process

    def __enter__(self) -> Self:
        return self

    def run(
        self,
        function: Callable[..., Any],
        units: Mapping[str, Sequence[Any]],
        *,
        progress: Parts | None = None,
        should_stop: ShouldStop = never,
        finished: Callable[[str, Any], None] = lambda name, result: None,
        retry: bool = False,
        patience: float = 120.0,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Results of ``function(*arguments, report=..., should_stop=...)`` for the arguments of every unit.

        ``function`` is sent to each worker once, so data that all units share belongs to it (as a bound
        method, say). A single unit, and all units if ``n_process`` is 1, run in this process. ``finished`` is
        called with each result as it comes.

        Once ``should_stop()`` is true, units get ``patience`` seconds to save, then ``KeyboardInterrupt`` is
        raised. The first error of a unit stops the others in the same way and is raised, with its traceback
        as a note. The death of a worker is a ``RunError``; with ``retry`` its unit is first tried once more,
        alone. With ``timeout``, all units run in workers of this machine, and one that tells of no progress
        for so many seconds is ended, with a ``RunError``.
        """
        parts = Parts(silent, dict.fromkeys(units, 1)) if progress is None else progress
        results: dict[str, Any] = {}
        self.timeout = timeout
        if min(self.n_process, len(units)) <= 1 and not self.elsewhere and timeout is None:
            for name, arguments in units.items():
                report = partial(parts.advance, name)
                results[name] = function(*arguments, report=report, should_stop=should_stop)
                parts.set(name, 1)
                finished(name, results[name])
                if should_stop():
                    raise KeyboardInterrupt
            return results
        waiting, lost, running, died = list(units), list[str](), set[str](), set[str]()
        failure: BaseException | None = None
        deadline = float("inf")
        self._begin(function, len(units))
        while True:
            if failure is None and should_stop():
                failure = KeyboardInterrupt()
            if failure is not None and deadline == float("inf"):
                deadline = time.monotonic() + patience
                self._ask_to_stop()
            # Only alone does a lost unit show whether it is the cause: memory may have run out.
            while failure is None and (waiting or lost) and len(running) < (self.n_process if waiting else 1):
                name = (waiting or lost).pop(0)
                running.add(name)
                self._start(name, units[name])
            if not running or time.monotonic() > deadline:
                break
            for name, kind, content in self._events():
                if kind == "progress":
                    done, total, text = content
                    parts.advance(name, done, total, text, who=name)
                    continue
                running.remove(name)
                if kind == "result":
                    results[name] = content
                    parts.set(name, 1)
                    finished(name, content)
                elif kind == "error":
                    failure = failure or content
                elif retry and name not in died:
                    died.add(name)
                    lost.append(name)
                    parts.set(name, 0)
                else:
                    failure = failure or RunError(
                        f"the process of {name} died{' twice' if name in died else ''} ({content});"
                        " what it had saved is kept: give the same command again, or resume it"
                    )
        if failure is not None:
            raise failure
        return results

    # What the two kinds of pool do differently:
    def __exit__(self, *exception: object) -> None: ...
    def _begin(self, function: Callable[..., Any], n_unit: int) -> None: ...
    def _start(self, name: str, arguments: Sequence[Any]) -> None: ...
    def _events(self) -> Iterator[Event]: ...  # of running units, after a short wait if there are none
    def _ask_to_stop(self) -> None: ...


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """("result" | "error", content), in a form that can travel between processes."""
    try:
        return "result", function(*arguments)
    except KeyboardInterrupt:
        return "error", KeyboardInterrupt()
    except BaseException as error:
        try:
            if isinstance(error, SystemExit):  # it would end the parent
                raise ValueError
            copy: BaseException = pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a foreign exception does when it is pickled
            copy = RunError(raised(error))
        copy.add_note("".join(traceback.format_exception(error)))
        return "error", copy
