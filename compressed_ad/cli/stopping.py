"""What Ctrl-C and SIGTERM do to a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Ctrl-C and SIGTERM: usually an exception at once; inside ``politely`` a wish that work looks for."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._polite = False

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside; only possible in the main thread."""
        try:
            before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def politely(self) -> Iterator[None]:
        """Work inside looks whether it should stop; a second signal does not wait for it."""
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
