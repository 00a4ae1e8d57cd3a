"""Jobs for worker processes, in a module that imports nothing heavy."""

import os
import signal
import time
from pathlib import Path

from compressed_ad.errors import SplitError


def double(x: int, *, report, should_stop) -> int:
    report(1, 1, "doubled")
    return 2 * x


def die(*, report, should_stop) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(*, report, should_stop) -> None:
    raise SplitError("task 3 is held out")


def patient(folder: str, *, report, should_stop) -> None:
    (Path(folder) / "started").touch()
    while not should_stop():
        time.sleep(0.01)
    (Path(folder) / "saved").touch()
    raise KeyboardInterrupt
