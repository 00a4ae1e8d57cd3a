"""Faults at chosen calls of the operating system, inside a process of ``cad`` and its workers."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "TORTURE_FAULT"
CALLS = ("replace", "fsync", "unlink", "mkdir", "open")
HOOK = Path(__file__).parent / "hook"
_COUNTS: Counter[str] = Counter()
_real: dict[str, Callable[..., Any]] = {
    "open": io.open,
    **{name: getattr(os, name) for name in CALLS if name != "open"},
}


def arm(fault: str) -> None:
    """``"replace 2 before"`` kills the process group before its second ``os.replace``; "" does nothing.

    ``open`` counts files opened for writing. The same fault is armed in the processes started from here, each
    of which counts for itself. ``"count"`` only counts; ``disarm`` then writes the counts to .counts.
    """
    if not fault:
        return
    name, _, rest = fault.partition(" ")
    if name != "count":
        root = Path(__file__).parents[1]
        os.environ[VARIABLE] = fault
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(root), os.environ.get("PYTHONPATH", "")])
    number, _, when = rest.partition(" ")
    for call in CALLS if name == "count" else (name,):
        _replace(call, _watched(call, int(number or 0), when))


def disarm() -> None:
    if _COUNTS:
        for call in CALLS:
            _replace(call, _real[call])
        Path(".counts").write_text(" ".join(f"{call}={_COUNTS[call]}" for call in CALLS))


def _watched(call: str, number: int, when: str) -> Callable[..., Any]:
    real = _real[call]

    def watched(*arguments: Any, **options: Any) -> Any:
        mode = options.get("mode", arguments[1] if len(arguments) > 1 else "r")
        if call == "open" and (not isinstance(mode, str) or not set(mode) & set("wax+")):
            return real(*arguments, **options)
        _COUNTS[call] += 1
        if _COUNTS[call] != number:
            return real(*arguments, **options)
        if when == "after":
            real(*arguments, **options)
        os.killpg(0, signal.SIGKILL)
        raise AssertionError("killed")

    return watched


def _replace(call: str, function: Callable[..., Any]) -> None:
    if call == "open":
        io.open = builtins.open = function  # type: ignore[assignment]
    else:
        setattr(os, call, function)
