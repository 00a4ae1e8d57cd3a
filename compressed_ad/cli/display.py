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

ShowTable = Callable[[Sequence[Sequence[str]]], None]
"""Shows a table, header first, instead of the one before."""


class Display:
    """Shows one stage after another, each with the time that it still needs."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """A line for the user, above the progress."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Progress of the stage ``name``; at the end a line says how long it took."""
        with self.stage_with_table(name) as (report, _):
            yield report

    @contextmanager
    def stage_with_table(self, name: str) -> Iterator[tuple[Report, ShowTable]]:
        """A stage with a table above it, which only a terminal shows."""
        started, pace = time.monotonic(), _Pace()
        if self.console.is_terminal:
            bar = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=30, complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[text]}"),
            )
            row = bar.add_task(name, total=None, text="")

            def show(done: int, total: int, text: str) -> None:
                bar.update(row, completed=done, total=total, text=pace.text(done, total, text))

            def show_table(table: Sequence[Sequence[str]]) -> None:
                head, *body = table
                above = Table(box=box.SIMPLE_HEAD, pad_edge=False)
                for k, column in enumerate(head):
                    above.add_column(column, justify="left" if k < 2 else "right")
                for line in body:
                    above.add_row(*line)
                live.update(Group(above, bar))

            with Live(bar, console=self.console, transient=True) as live:
                yield show, show_table
        else:
            last = started

            def line(done: int, total: int, text: str) -> None:
                nonlocal last
                shown, now = pace.text(done, total, text), time.monotonic()
                if now - last >= 5:
                    last = now
                    self.note(f"{name:<9} {shown}")

            yield line, lambda table: None
        self.note(f"{name:<9} done in {duration(time.monotonic() - started)}")


class _Pace:
    """Estimates the time left from the pace since the first progress.

    Starting up and what was done before do not count, nor does one stall right after the first progress:
    kernels are compiled then.
    """

    def __init__(self) -> None:
        self.initial: int | None = None
        self.anchor: tuple[float, int] | None = None
        self.heard = 0.0
        self.stalled = False

    def text(self, done: int, total: int, text: str) -> str:
        now, left = time.monotonic(), ""
        if self.initial is None or done < self.initial:
            self.initial, self.anchor = done, None
        elif self.anchor is None:
            self.anchor = (now, done) if done > self.initial else None
        elif not self.stalled and self.heard - self.anchor[0] < 1 and now - self.heard > 5:
            self.anchor, self.stalled = (now, done), True
        elif done > self.anchor[1] and now - self.anchor[0] > 1:
            began, before = self.anchor
            left = f", {duration((total - done) * (now - began) / (done - before))} left"
        self.heard = now
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
    """The standard output, for tables: 100 columns wide unless it is a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def print_lines(text: str) -> None:
    """Write results to the standard output; ``RunError`` if that is impossible."""
    if sys.stdout is None:  # closed by the calling process
        raise RunError("the standard output is closed")
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"the standard output cannot be written ({error.strerror})") from error
