"""The exceptions of this library: wrong requests (``UsageError``) and errors while running (``RunError``)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class CompressedADError(Exception):
    """Base of all exceptions that this library raises on purpose; ``cad`` prints them without a traceback."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers send errors home by pickle, which would call ``__init__`` with the finished message alone.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class UsageError(CompressedADError):
    """The request is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """Wrong keys or values; ``problems`` lists them, one line each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UnknownNameError(UsageError):
    """A name that is not registered; the message has the nearest match and all names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        listed = f"known: {', '.join(known)}, or module:attribute"
        super().__init__(f"unknown {kind} {name!r}{nearest(name, known)}; {listed}")


class SplitError(UsageError):
    """A task used where the split forbids it."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'compressed-ad[{extra}]'")


class RunError(CompressedADError):
    """An error met while running."""


class HistoryError(RunError):
    """A history file that is damaged, of another kind, or lacks what is needed."""


class MarkerError(RunError):
    """A marker that cannot mark these histories, or that broke the marker protocol."""


class SpaceError(RunError):
    """Observation or action spaces that do not fit each other, or are not supported."""


class CheckpointError(RunError):
    """A checkpoint that is damaged, of another kind, or of another configuration."""


class RunDirectoryError(RunError):
    """A run directory that belongs to another configuration or another process."""


class NumericalError(RunError):
    """NaN or infinity where there must be none; the message says where."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the closest of ``known``; empty if none is close."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of the message of ``error``, at most ``limit`` characters; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
