"""What Ctrl-C and SIGTERM do to a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
        if not (self._polite and first):
            raise KeyboardInterrupt
        print("cad: saving (once more to stop at once)", file=sys.stderr)
