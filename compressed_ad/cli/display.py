"""Progress on the standard error stream: a bar on a terminal, else a plain line every few seconds.

``progress_line`` is for programs and notebooks.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import IO, Any, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from compressed_ad.errors import RunError, raised
from compressed_ad.workers import Report

ShowTable = Callable[[Sequence[Sequence[str]]], None]
"""Shows a table, header first, instead of the one before."""


class Display:
    """Shows one stage after another, each with the time that it still needs."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=cast(IO[str], _Progress()), highlight=False)

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
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            bar = Progress(
                TextColumn("{task.description:<9}", table_column=Column(min_width=9, no_wrap=True)),
                BarColumn(
                    bar_width=min(30, max(8, self.console.width - 50)),
                    complete_style="cyan",
                    finished_style="green",
                ),
                TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
                expand=True,
            )
            row = bar.add_task(name, total=None, text="")

            def show(done: float, total: float, text: str) -> None:
                bar.update(row, completed=done, total=total, text=pace.text(done, total, text))

            def show_table(table: Sequence[Sequence[str]]) -> None:
                if len(table) < 2:
                    return
                # As many columns as fit, with a space on each side.
                widths = [max(map(len, cells)) + 2 for cells in zip(*table, strict=True)]
                fit = sum(end <= self.console.width for end in accumulate(widths))
                head, *body = (line[:fit] for line in table)
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

            def line(done: float, total: float, text: str) -> None:
                nonlocal last
                shown, now = pace.text(done, total, text), time.monotonic()
                if now - last >= 5:
                    last = now
                    self.note(f"{name:<9} {shown}")

            yield line, lambda table: None
        self.note(f"{name:<9} done in {duration(time.monotonic() - started)}")


def progress_line(
    name: str, total: int | None = None, *, every: float = 0.5
) -> Callable[[int, int | Mapping[str, float]], None]:
    """An argument ``progress`` for ``train``, ``collect`` and the evaluations: one line, written over.

    ``train`` tells the step and its metrics, so it needs ``total=config.steps``; all others tell the total
    themselves. The line goes to the standard output, as notebooks show it, at most once in ``every`` seconds.
    It ends with the time that was needed.
    """
    started, pace = time.monotonic(), _Pace()
    last, width = -every, 0

    def show(done: int, of: int | Mapping[str, float]) -> None:
        nonlocal last, width
        now = time.monotonic()
        metrics, count = (of, total or done) if isinstance(of, Mapping) else ({}, of)
        text = pace.text(done, count, " ".join(f"{key} {value:.3g}" for key, value in metrics.items()))
        if done < count and now - last < every:
            return
        last = now
        text = text.rstrip() if done < count else f"done in {duration(now - started)}"
        line = f"{name}: {text}"
        sys.stdout.write(f"\r{line:<{width}}" + "\n" * (done >= count))
        sys.stdout.flush()
        width = len(line)

    return show


class _Pace:
    """Estimates the time left from the pace since the first progress.

    Starting up and what was done before do not count, nor does one stall right after the first progress:
    kernels are compiled then. The first seconds of progress are too few to tell.
    """

    def __init__(self) -> None:
        self.initial: float | None = None
        self.anchor: tuple[float, float] | None = None
        self.heard = 0.0
        self.stalled = False

    def text(self, done: float, total: float, text: str) -> str:
        now, left = time.monotonic(), ""
        if self.initial is None or done < self.initial:
            self.initial, self.anchor = done, None
        elif self.anchor is None:
            self.anchor = (now, done) if done > self.initial else None
        elif not self.stalled and self.heard - self.anchor[0] < 1 and now - self.heard > 5:
            self.anchor, self.stalled = (now, done), True
        elif done > self.anchor[1] and now - self.anchor[0] > 5:
            began, before = self.anchor
            left = f"{duration((total - done) * (now - began) / (done - before))} left:"
        self.heard = now
        share = f"{100 * done / max(total, 1):3.0f} %"
        count = "" if isinstance(done, float) else f"({done:,} of {total:,})"
        # The time left comes before the text: a narrow terminal cuts the end of the line.
        return " ".join(filter(None, (share, count, left, text))).rstrip(":")


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ---------------------------------------------------------------- streams


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Inside, the standard streams replace what their encoding lacks, and failing threads say one line.

    The numbers of closed streams are taken, so that no file gets them and what libraries print to them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        with suppress(OSError, ValueError):  # a pipe that nobody reads
            stream.reconfigure(errors="replace")
    hook = threading.excepthook
    threading.excepthook = lambda failed: complain(f"note: a thread failed: {raised(failed.exc_value)}")
    try:
        yield
    finally:
        threading.excepthook = hook
        for stream, errors in zip(streams, before, strict=True):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def drop(stream: Any) -> None:
    """Send what a broken ``stream`` still holds, and all that follows, to nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(text: str) -> None:
    """A line on the standard error stream, if that can be written."""
    _Progress().write(f"{text}\n")


class _Progress(io.TextIOBase):
    """The standard error stream as it is now; no work ends because its progress cannot be shown.

    While a bar is shown, ``sys.stderr`` is a stream of rich's, which writes to this one.
    """

    def __init__(self) -> None:
        self.stream = sys.stderr

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError, AttributeError):
            drop(self.stream)
        return len(text)

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def print_table(table: RenderableType) -> None:
    """Write a table to the standard output: 100 columns wide unless that is a terminal."""
    shown, text = Console(), io.StringIO()
    width = shown.width if shown.is_terminal else 100
    Console(file=text, force_terminal=shown.is_terminal, width=width, highlight=False).print(table)
    print_lines("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


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
        drop(sys.stdout)
        raise RunError(f"the standard output cannot be written ({error.strerror})") from error
