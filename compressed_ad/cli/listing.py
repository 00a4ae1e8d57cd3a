"""``cad list``: the names that there are to choose from, each with a line about it and its parameters."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import print_lines
from compressed_ad.cli.options import one_of
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT
from compressed_ad.learners.base import LEARNER
from compressed_ad.learners.ppo import PPOConfig
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.marking.apply import REQUIRED, marker_parameters
from compressed_ad.marking.markers import MARKER
from compressed_ad.models import MODEL
from compressed_ad.models.settings import Architecture
from compressed_ad.runs.config_text import show_value
from compressed_ad.runs.directory import EXTRAS, extras
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.training.transforms import DEPARTURES, TRANSFORM

Rows = list[tuple[str, str, str]]  # name, a sentence about it, parameters

ADAPTERS = {
    "gymnasium": (
        "A gymnasium environment; tasks differ in its constructor arguments and numbers.",
        "params=-, n_task=-, task_seed=0, kwargs=-, horizon=-, best_return=-, random_episodes=20, setup=-",
    ),
    "minigrid": (
        "A MiniGrid environment; tasks are seeds that lay it out differently.",
        "n_task=64, task_seed=0, kwargs=-, horizon=-, best_return=-, random_episodes=10",
    ),
    "metaworld": (
        "Meta-World's ML1 of one name; its 50 test goals are the held-out tasks.",
        "reward=success, task_seed=0, horizon=500, best_return=-, random_episodes=10",
    ),
    "xland": (
        "XLand-MiniGrid; tasks are rulesets, each with a hidden goal about objects.",
        "n_task=64, task_seed=0, n_object=4, view=5, horizon=-, best_return=-, random_episodes=10",
    ),
}
"""Families of other libraries. This is written here because adapters import the library that they adapt."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", type=one_of("list", LISTS), metavar="WHAT", help=", ".join(LISTS))


def run(call: Call) -> None:
    kinds = [call.options.what] if call.options.what else list(LISTS)
    for kind in kinds:
        if len(kinds) > 1:
            print_lines(f"{kind}:")
        for name, words, parameters in LISTS[kind]():
            lines = [*textwrap.wrap(words, 80), *textwrap.wrap(parameters, 80)]
            print_lines(f"  {name:<18} " + f"\n{'':<21}".join(lines))


LISTING = Command(
    run,
    _options,
    text=(
        "Shows a line about each name, and its parameters. For all lists but extras, module:attribute also "
        "works in place of a name; the module may be installed or lie in the current folder."
    ),
    common=(),
)


def _sentence(thing: Any) -> str:
    """The first sentence of the docstring."""
    paragraph = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    plain = " ".join(paragraph.split()).replace("`", "")
    return re.split(r"(?<=[.:]) (?=[A-Z])", plain)[0].rstrip(":")


def call_parameters(thing: Callable[..., Any], *, keyword_only: bool = False) -> str:
    """The parameters of a call, with their defaults."""
    kinds = {inspect.Parameter.KEYWORD_ONLY} | (
        set() if keyword_only else {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    )
    parameters = inspect.signature(thing).parameters.values()
    return _with_defaults((p.name, p.default) for p in parameters if p.kind in kinds)


def _with_defaults(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(
        name if default is REQUIRED else f"{name}={show_value(default)}" for name, default in pairs
    )


def _families() -> Rows:
    ours = [(name, _sentence(family), call_parameters(family)) for name, family in TASK_FAMILY.items()]
    return [*ours, *((f"{prefix}:ID", *about) for prefix, about in ADAPTERS.items())]


def _learners() -> Rows:
    ppo = _with_defaults((name, field.default) for name, field in PPOConfig.model_fields.items())
    ours = [
        (name, _sentence(maker), ppo if name == "ppo" else call_parameters(maker))
        for name, maker in LEARNER.items()
    ]
    state = "" if extras()["sb3"] else " (not installed: pip install 'compressed-ad[sb3]')"
    sb3 = [
        (f"sb3:{name}", f"{algorithm.words} Actions: {', '.join(algorithm.actions)}{state}", "")
        for name, algorithm in ALGORITHM.items()
    ]
    return [*ours, *sb3]


def _markers() -> Rows:
    return [(n, _sentence(m), _with_defaults(marker_parameters(n).items())) for n, m in MARKER.items()]


def _models() -> Rows:
    settings = _with_defaults(
        (name, field.default)
        for name, field in Architecture.model_fields.items()
        if name != "model" and not name.endswith("_space")
    )
    return [(name, _sentence(MODEL[name]), settings) for name in MODEL]


def _transforms() -> Rows:
    return [
        (
            name,
            _sentence(transform) + (" (departs from pure AD)" if name in DEPARTURES else ""),
            call_parameters(transform, keyword_only=True),
        )
        for name, transform in TRANSFORM.items()
    ]


def _layouts() -> Rows:
    readers = [(name, _sentence(read), f"cad import --layout {name}") for name, read in LAYOUT.items()]
    writers = [(name, _sentence(write), f"cad export --to {name}") for name, write in EXPORT.items()]
    return sorted(readers + writers)


def _extras() -> Rows:
    state = {True: "installed", False: "not installed: pip install 'compressed-ad[{}]'"}
    return [(name, EXTRAS[name][0], state[there].format(name)) for name, there in extras().items()]


LISTS: Mapping[str, Callable[[], Rows]] = {
    "families": _families,
    "learners": _learners,
    "markers": _markers,
    "models": _models,
    "transforms": _transforms,
    "layouts": _layouts,
    "extras": _extras,
}
