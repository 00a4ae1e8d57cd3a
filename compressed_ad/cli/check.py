"""``cad check``: what is wrong with a user's own family, marker or learner."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import print_lines
from compressed_ad.errors import ConfigError, RunError
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.select import make_learner
from compressed_ad.marking.apply import find_marker
from compressed_ad.marking.conformance import check_marker
from compressed_ad.runs import yaml_file
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.select import make_family


def run(call: Call) -> None:
    """``cad check``."""
    options = call.options
    found = CHECKS[options.kind](options.what, mapping("--kwargs", options.kwargs), options)
    if found:
        raise RunError("\n".join(found))
    print_lines(f"{options.kind} {options.what}: nothing found")


def _family(name: str, kwargs: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    return family_problems(make_family(name, kwargs))


def _marker(name: str, kwargs: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    return check_marker(find_marker(name), **kwargs)


def _learner(name: str, kwargs: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    family_kwargs = mapping("--family-kwargs", options.family_kwargs)
    family = None if options.family is None else make_family(options.family, family_kwargs)
    return check_learner(make_learner(name, kwargs), family, n_timesteps=options.steps)


CHECKS: Mapping[str, Callable[[str, Mapping[str, Any], argparse.Namespace], list[str]]] = {
    "family": _family,
    "marker": _marker,
    "learner": _learner,
}


def mapping(option: str, text: str) -> dict[str, Any]:
    """The YAML mapping that an option holds."""
    value = yaml_file.value(text, option)
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected parameters like '{{size: 5}}', got {text!r}")
    return value
