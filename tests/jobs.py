"""Units of work for worker processes, in a module that imports nothing heavy."""

import os
import signal
import sys
import time
from pathlib import Path

from compressed_ad.errors import SplitError


def double(x: int, *, report, should_stop) -> int:
    report(1, 1, "doubled")
    return 2 * x


def die(*, report, should_stop) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(folder: str, name: str, *, report, should_stop) -> str:
    report(1, 2, "half")
    died = Path(folder) / f"{name} died"
    if name == "mortal" and not died.exists():
        died.touch()
        die(report=report, should_stop=should_stop)
    return name


def wrong(*, report, should_stop) -> None:
    raise SplitError("task 3 is held out")


def patient(folder: str, *, report, should_stop) -> None:
    (Path(folder) / "started").touch()
    while not should_stop():
        time.sleep(0.01)
    (Path(folder) / "saved").touch()
    raise KeyboardInterrupt


def deaf(folder: str, *, report, should_stop) -> None:
    time.sleep(60)
    (Path(folder) / "slept").touch()


def any_of_them(name: str, *arguments, report, should_stop):
    return globals()[name](*arguments, report=report, should_stop=should_stop)


class Shared:
    """Data that all units share; leaves a note whenever it arrives in a process."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        (Path(self.folder) / f"arrived {os.getpid()} {time.monotonic_ns()}").touch()

    def where(self, k: int, *, report, should_stop) -> int:
        time.sleep(0.05)
        return os.getpid()


def leave(*, report, should_stop) -> None:
    os._exit(0)


def exit(*, report, should_stop) -> None:
    sys.exit(3)


def hang(*, report, should_stop) -> None:
    report(1, 2, "half")
    time.sleep(60)
