"""``cad check``: tests a user's own family, marker or learner and lists what it finds wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import print_lines
from compressed_ad.cli.options import count, one_of, option
from compressed_ad.errors import ConfigError, RunError
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.select import make_learner
from compressed_ad.marking.apply import find_marker
from compressed_ad.marking.conformance import check_marker
from compressed_ad.runs import yaml_file
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.select import make_family


def _options(parser: argparse.ArgumentParser) -> None:
    option(parser, "kind", "KIND", ", ".join(CHECKS), one_of("kind", CHECKS))
    option(parser, "what", "NAME", "a name (cad list), or module:attribute")
    option(parser, "--kwargs", "YAML", "its parameters, e.g. '{size: 5}'", default="{}")
    option(parser, "--family", "NAME", "family that a learner is tried on (default: a small room)")
    option(parser, "--family-kwargs", "YAML", "parameters of that family", default="{}")
    option(parser, "--steps", "N", "steps of a learner's streams", count, default=200)


def run(call: Call) -> None:
    options = call.options
    found = CHECKS[options.kind](options.what, _mapping("--kwargs", options.kwargs), options)
    if found:
        raise RunError("\n".join(found))
    print_lines(f"{options.kind} {options.what}: nothing found")


CHECK = Command(
    run,
    _options,
    text="Tries it on something small. The exit code is 0 if nothing wrong was found, else 1.",
    common=(),
)


def _learner(name: str, kwargs: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    family_kwargs = _mapping("--family-kwargs", options.family_kwargs)
    family = None if options.family is None else make_family(options.family, family_kwargs)
    return check_learner(make_learner(name, kwargs), family, n_timesteps=options.steps)


CHECKS: Mapping[str, Callable[[str, Mapping[str, Any], argparse.Namespace], list[str]]] = {
    "family": lambda name, kwargs, options: family_problems(make_family(name, kwargs)),
    "marker": lambda name, kwargs, options: check_marker(find_marker(name), **kwargs),
    "learner": _learner,
}


def _mapping(option: str, text: str) -> dict[str, Any]:
    value = yaml_file.value(text, option)
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected parameters like '{{size: 5}}', got {text!r}")
    return value
