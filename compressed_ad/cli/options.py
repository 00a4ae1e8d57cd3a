"""Options, and types of options, that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from compressed_ad.errors import UsageError, nearest


def option(
    parser: argparse._ActionsContainer,
    name: str,
    metavar: str | None,
    help: str,
    kind: Callable[[str], object] = str,
    default: object = None,
) -> None:
    """Add an option or argument with one value; its help states the ``default`` unless that is None."""
    shown = help if default is None else f"{help} (default: {default})"
    parser.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)


def out_option(parser: argparse.ArgumentParser, what: str, default: str) -> None:
    option(parser, "--out", "DIR", f"{what} (default: {default})", Path)


def history_option(parser: argparse.ArgumentParser, default: str) -> None:
    option(parser, "--history", "FILE", f"history file (default: {default})", Path)


def setting_option(
    parser: argparse._ActionsContainer,
    name: str,
    *,
    key: str,
    metavar: str,
    help: str,
    check: Callable[[str], object] = str,
) -> None:
    """Add an option that means ``--KEY VALUE``; ``check`` raises an error for values that are wrong."""

    def setting(text: str) -> tuple[str, str]:
        check(text)
        return key, text

    parser.add_argument(
        name, action="append", dest="settings", default=[], type=setting, metavar=metavar, help=help
    )


def ray_option(parser: argparse.ArgumentParser) -> None:
    option(parser, "--ray", "ADDRESS", "work on a Ray cluster: its address, or auto")


def overwrite_option(parser: argparse.ArgumentParser, what: str = "what is there") -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def one_of(kind: str, known: Iterable[str]) -> Callable[[str], str]:
    """One of the words ``known``; ``kind`` is what messages call them."""
    words = list(known)

    def check(text: str) -> str:
        if text not in words:
            raise UsageError(f"unknown {kind} {text!r}{nearest(text, words)}; one of {', '.join(words)}")
        return text

    return check
