"""Progress on the standard error stream: a bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from compressed_ad.errors import RunError
from compressed_ad.workers import Report

_LINE_S = 5.0


class Display:
    """Shows one stage after another, each with the time it will still take."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet

    def note(self, text: str) -> None:
        """A line for the user beside the progress."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Progress of the stage ``name``; a line says at last how long it took."""
        started, ticket = time.monotonic(), _Pace()
        if self.quiet:
            yield lambda done, total, text: None
            return
        if self.console.is_terminal:
            with self._bar() as bar:
                row = bar.add_task(name, total=None, text="")

                def show(done: int, total: int, text: str) -> None:
                    bar.update(row, completed=done, total=total, text=ticket.text(done, total, text))

                yield show
        else:
            last = started

            def line(done: int, total: int, text: str) -> None:
                nonlocal last
                shown, now = ticket.text(done, total, text), time.monotonic()
                if now - last >= _LINE_S:
                    last = now
                    self.note(f"{name:<9} {shown}")

            yield line
        self.note(f"{name:<9} done in {duration(time.monotonic() - started)}")

    @contextmanager
    def filling(self, name: str) -> Iterator[tuple[Report, Callable[[Sequence[Sequence[str]]], None]]]:
        """A stage beside a table (header first) that is shown anew whenever it changes; terminals only."""
        if self.quiet or not self.console.is_terminal:
            with self.stage(name) as report:
                yield report, lambda table: None
            return
        started, ticket = time.monotonic(), _Pace()
        bar = self._bar()
        row = bar.add_task(name, total=None, text="")
        with Live(bar, console=self.console, transient=True) as live:

            def show(done: int, total: int, text: str) -> None:
                bar.update(row, completed=done, total=total, text=ticket.text(done, total, text))

            yield show, lambda table: live.update(Group(rich_table(table), bar))
        self.note(f"{name:<9} done in {duration(time.monotonic() - started)}")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )


def rich_table(table: Sequence[Sequence[str]]) -> Table:
    """Lines of text, the header first."""
    head, *body = table
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(head):
        shown.add_column(name, justify="left" if k < 2 else "right")
    for line in body:
        shown.add_row(*line)
    return shown


class _Pace:
    """Time left by the pace since the first advance: starting, and what was done before, do not count."""

    def __init__(self) -> None:
        self.initial: int | None = None
        self.anchor: tuple[float, int] | None = None

    def text(self, done: int, total: int, text: str) -> str:
        now, left = time.monotonic(), ""
        if self.initial is None or done < self.initial:
            self.initial, self.anchor = done, None
        elif self.anchor is None:
            self.anchor = (now, done) if done > self.initial else None
        elif done > self.anchor[1] and now - self.anchor[0] > 1:
            began, before = self.anchor
            left = f", {duration((total - done) * (now - began) / (done - before))} left"
        return f"{100 * done / max(total, 1):3.0f} % ({done:,} of {total:,}) {text}{left}"


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def results_console() -> Console:
    """Where tables go: the standard output, 100 columns wide unless it is a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def print_lines(text: str) -> None:
    """Results go to the standard output, as they are; ``RunError`` if it takes nothing."""
    if sys.stdout is None:  # closed by whoever started us
        raise RunError("the standard output is closed")
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"the standard output cannot be written ({error.strerror})") from error
