"""What a file of this folder says of a command, and what the command gets when it is called."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from compressed_ad.cli.display import Display, print_lines
from compressed_ad.cli.stopping import Stop
from compressed_ad.runs.config_text import dump
from compressed_ad.runs.layers import Request
from compressed_ad.runs.settings import Config


@dataclass(frozen=True)
class Call:
    """One call of ``cad``."""

    name: str
    options: argparse.Namespace
    request: Request | None  # None for commands without settings
    display: Display
    stop: Stop
    words: tuple[str, ...]

    def config(self) -> Config:
        """The validated configuration that was asked for."""
        from compressed_ad.runs.config import load_config

        assert self.request is not None
        return load_config(self.request)

    def explicit(self) -> set[str]:
        """Dotted keys that the user set."""
        from compressed_ad.runs.config import explicit_keys

        assert self.request is not None
        return explicit_keys(self.request)

    def only_shows(self, config: Config) -> bool:
        """Print ``config`` if nothing else was asked for."""
        if self.options.print_config:
            print_lines(dump(config))
        return bool(self.options.print_config)

    def typed(self) -> str:
        """The command line as it was typed."""
        return " ".join(["cad", *self.words])


@dataclass(frozen=True)
class Command:
    """A command of ``cad``."""

    run: Callable[[Call], None]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None  # adds those that are its alone
    text: str = ""  # for its help
    sections: tuple[str, ...] = ()  # of the configuration, whose settings it uses
    common: tuple[str, ...] = ("seed", "device", "dry-run")  # options of many commands that it has
    overrides: bool = False  # takes --section.key although it has no sections
