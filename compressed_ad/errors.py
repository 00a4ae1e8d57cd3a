"""The exceptions of this library: wrong requests (``UsageError``) and errors while running (``RunError``)."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
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
        super().__init__(f"{what} needs an optional dependency: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The command that installs the packages of ``extra``: through this clone, or else by their names."""
    clone = Path(__file__).parents[1]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{'.' if Path().samefile(clone) else clone}[{extra}]'"
    lines = [line.split(";") for line in metadata.requires("compressed-ad") or ()]
    names = [name.strip() for name, *when in lines if when and re.search(rf"""["']{extra}["']""", when[0])]
    return f"pip install {' '.join(map(repr, names))}"


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
    """`` (did you mean 'x'?)`` with the closest of ``known`` in any case; empty if none is close."""
    exact = {word.lower(): word for word in known}
    close = get_close_matches(name.lower(), exact, n=1, cutoff=0.5)
    return did_you_mean(repr(exact[close[0]]) if close else "")


def did_you_mean(meant: str) -> str:
    """`` (did you mean x?)``, with ``meant`` as it is to be typed; empty if it is."""
    return f" (did you mean {meant}?)" if meant else ""


def listed(words: Iterable[str]) -> str:
    """``words``, of which there is at least one, with commas and "and"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of the message of ``error``, at most ``limit`` characters; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


# ---------------------------------------------------------------- code of users


@contextmanager
def users_code(
    what: str | Callable[[], str], error: type[CompressedADError] = RunError, *, advice: str = ""
) -> Iterator[None]:
    """Turn whatever the code of a user raises inside into an ``error`` of one line.

    The line begins with ``what`` was done (called only if it is needed) and ends with the user's file and
    line. Errors of this library and ``KeyboardInterrupt`` pass.
    """
    try:
        yield
    except (CompressedADError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as cause:
        text = what if isinstance(what, str) else what()
        raise error(f"{text}: {raised(cause)}{advice}") from cause


def raised(error: BaseException | None) -> str:
    """The message of ``error`` in one line, with its kind and place: ``broke (ValueError in own.py:43)``."""
    if error is None:
        return "unknown"
    words = " ".join(str(error).split())[:500]
    kind = type(error).__name__
    if isinstance(error, SystemExit):
        words, kind = f"it calls sys.exit({error.code!r})", ""
    elif isinstance(error, MemoryError):
        words = words or "not enough memory"
    place = users_line(error) or _line(error, (_OURS,))
    where = " ".join(filter(None, (kind, place and f"in {place}")))
    return f"{words} ({where})" if words and where else words or where


def users_line(error: BaseException) -> str | None:
    """``file:line`` of the user's code in the traceback of ``error``, innermost; None if there is none."""
    installed = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    return _line(error, (_OURS, *installed, "<frozen", "<__array"))


_OURS = str(Path(__file__).parent)


def _line(error: BaseException, without: tuple[str, ...]) -> str | None:
    found = traceback.extract_tb(error.__traceback__)
    places = [p for p in found if p.filename[:1] in "/<" and not p.filename.startswith(without)]
    return f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else None
