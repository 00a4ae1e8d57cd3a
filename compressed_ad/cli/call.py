"""What the file of a command says of it, what it gets when it is called, and options of many commands."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_ad.cli import torchrun
from compressed_ad.cli.display import Display, complain, print_lines
from compressed_ad.errors import UsageError, nearest
from compressed_ad.runs.layers import Request
from compressed_ad.runs.memory_limit import Need, size, size_text
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import dump


class Stop:
    """Ctrl-C and SIGTERM raise ``KeyboardInterrupt`` at once, or inside ``politely`` ask the work to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._polite = False

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside; only the main thread can."""
        try:
            before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # another thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def politely(self) -> Iterator[None]:
        """Inside, work calls this object to learn that it should stop; a second signal does not wait."""
        self._polite = True
        try:
            yield
        finally:
            self._polite = False
        if self.signum is not None:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: Any) -> None:
        first, self.signum = self.signum is None, number
        if self._polite and torchrun.started() > 1:
            return  # all of them save together, however often a cluster signals
        if self._polite and first:
            complain("cad: saving before it stops; a second signal stops it at once")
        elif _is_finaliser(frame):  # Python drops what is raised there: try again
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        else:
            raise KeyboardInterrupt


def _is_finaliser(frame: Any) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@dataclass(frozen=True)
class Call:
    """One call of ``cad``."""

    name: str
    options: argparse.Namespace
    request: Request  # of a command without settings: that of the defaults
    display: Display
    stop: Stop
    typed: str  # the command line
    sections: Collection[str]  # of the configuration, that the command has

    def config(self) -> Config:
        """The validated configuration asked for; ``--print-config`` prints it and ends the command."""
        from compressed_ad.runs.config import load_config

        own = not (self.options.print_config or self.options.dry_run)
        config = load_config(
            self.request,
            own=own,
            collects="algorithm" in self.sections,
            compares="comparison" in self.sections,
        )
        if self.options.print_config:
            print_lines(dump(config))
            raise SystemExit
        self.leave_untried([config])
        return config

    def within(self, need: Need, wanted: int = 1) -> int:
        """How many of ``wanted`` processes that each ``need`` so much fit within ``--memory-limit``.

        Tells how much is needed in a dry run, and where it is much; ``UsageError`` if not one process fits.
        """
        limit = self.options.memory_limit
        if limit is not None and need.total > limit:
            raise UsageError(f"--memory-limit {size_text(limit)} is too little: a process needs {need}")
        count = need.workers(wanted, limit)
        text = f"{f'{count} processes work, each' if count > 1 else 'One process works, which'} needs {need}"
        if self.options.dry_run:
            print_lines(text)
        elif need.grows > 1e9 or count < wanted:
            self.display.note(f"note: {text}")
        return count

    def leave_untried(self, configs: Iterable[Config]) -> None:
        """In a dry run, name the user's own code, which is not tried; end it where it would be needed."""
        from compressed_ad.runs.config import own_code

        found = [own_code(config) for config in configs] if self.options.dry_run else []
        needed = any(code[section] for code in found for section in ("env", "algorithm", "marker"))
        self.leave_out(frozenset().union(*(part for code in found for part in code.values())), needed)

    def leave_out(self, names: Collection[str], needed: bool = True) -> None:
        """In a dry run, name the user's own code ``names``; the run ends here if it is ``needed``."""
        if names and self.options.dry_run:
            print_lines(f"Not tried, because a dry run imports no code of yours: {', '.join(sorted(names))}")
            if needed:
                raise SystemExit

    def note_compiling(self, *learners: str) -> None:
        """Tell that the kernels of one of ``learners``, or of models, are compiled first."""
        from compressed_ad.runs.directory import KERNELS, is_compiled

        needed = *learners, "training", "playing"
        if not all(is_compiled(file) for name, file in KERNELS.items() if name in needed):
            self.display.note(
                "note: kernels are compiled first, once after installing: up to a minute more, in which the"
                " progress stands still"
            )

    def note_shortfall(self, history: Path) -> None:
        """Tell of a history file whose source did not learn, or forgot what it had learned."""
        from compressed_ad.histories.summary import describe

        if found := describe(history).shortfall:
            self.display.note(f"note: {history.name}: {found}")

    def note_damaged(self, evaluations: Iterable[Path]) -> None:
        """Tell of each evaluation that is there but cannot be read, so that it will be made again."""
        from compressed_ad.runs.judge import stored_evaluation

        for path in evaluations:
            if path.exists() and stored_evaluation(path) is None:
                self.display.note(f"note: {path} is damaged; it will be made again")

    def trust(self, *configs: Config) -> frozenset[str]:
        """The names of code that the user has given: with ``--trust``, or in the configuration."""
        from compressed_ad.runs.config import own_code

        named = (part for config in configs for part in own_code(config).values())
        return frozenset(self.options.trust).union(*named)

    def explicit(self) -> set[str]:
        """Dotted keys that the user set."""
        from compressed_ad.runs.config import explicit_keys

        return explicit_keys(self.request)


Option = Callable[[argparse._ActionsContainer], object]
"""Adds an option, or an argument, to a parser."""


@dataclass(frozen=True)
class Command:
    """A command of ``cad``."""

    run: Callable[[Call], None]
    options: Sequence[Option] = ()  # those that are its alone
    text: str = ""  # for its help
    sections: tuple[str, ...] = ()  # of the configuration, whose settings it uses
    common: tuple[str, ...] = ("seed", "device", "dry-run")  # options of many commands that it has
    overrides: bool = False  # takes --section.key although it has no sections
    continued: str = ""  # how it goes on after an interrupt
    torchrun: bool = False  # may be started by torchrun, in several processes


# ---------------------------------------------------------------- options


def option(
    name: str,
    metavar: str | None,
    help: str,
    kind: Callable[[str], object] = str,
    default: object = None,
    **more: Any,
) -> Option:
    """An option or argument with one value; its help states the ``default`` unless that is None."""
    shown = help if default is None else f"{help} (default: {default})"
    return lambda parser: parser.add_argument(
        name, type=kind, default=default, metavar=metavar, help=shown, **more
    )


def flag(name: str, help: str) -> Option:
    return lambda parser: parser.add_argument(name, action="store_true", help=help)


def out_option(what: str, default: str) -> Option:
    return option("--out", "DIR", f"{what} (default: {default})", Path)


def history_option(default: str) -> Option:
    return option("--history", "FILE", f"history file (default: {default})", Path)


RAY = option("--ray", "ADDRESS", "work on a Ray cluster: its address, or auto")
MEMORY_LIMIT = option(
    "--memory-limit",
    "SIZE",
    "memory of all processes together, like 1GB (default: no limit): fewer processes work at a time, and what"
    " cannot be done within it is refused",
    size,
)
OVERWRITE = flag("--overwrite", "replace what is there")


def several_of(kind: str, known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Some of the words ``known``, with commas between them."""
    check = one_of(kind, known)
    return lambda text: tuple(dict.fromkeys(check(word.strip()) for word in text.split(",")))


def one_of(kind: str, known: Iterable[str]) -> Callable[[str], str]:
    """One of the words ``known``; ``kind`` is what messages call them."""
    words = list(known)

    def check(text: str) -> str:
        if text not in words:
            raise UsageError(f"unknown {kind} {text!r}{nearest(text, words)}; one of {', '.join(words)}")
        return text

    return check


FIGURE_FORMATS = ("png", "svg", "pdf")
FIGURES = option(
    "--figures",
    "FORMATS",
    f"files that figures are written to, one or more of {', '.join(FIGURE_FORMATS)}",
    several_of("format of figures", FIGURE_FORMATS),
    default="png,svg",
)
TABLE_FORMATS = ("text", "markdown", "latex", "csv")
TABLE_FORMAT = option(
    "--format",
    "FORMAT",
    f"of the printed tables: {', '.join(TABLE_FORMATS)}",
    one_of("format of tables", TABLE_FORMATS),
    default="text",
)


def setting_option(
    name: str, key: str, metavar: str, help: str, check: Callable[[str], object] = str
) -> Option:
    """An option that means ``--KEY VALUE``; ``check`` raises an error for values that are wrong."""

    def setting(text: str) -> tuple[str, str]:
        check(text)
        return key, text

    return settings_option(name, setting, metavar, help)


def settings_option(
    name: str, setting: Callable[[str], tuple[str, str]], metavar: str, help: str, **more: Any
) -> Option:
    """An option whose text ``setting`` turns into (dotted key, YAML text)."""
    more = {"action": "append", "dest": "settings", "default": [], **more}
    return lambda parser: parser.add_argument(name, type=setting, metavar=metavar, help=help, **more)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
