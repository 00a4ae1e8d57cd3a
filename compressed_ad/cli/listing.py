"""``cad list``, ``check`` and ``doctor``: what there is to choose from, and whether it works."""

from __future__ import annotations

import argparse
import inspect
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compressed_ad.cli.call import Call, Command, count, one_of, option
from compressed_ad.cli.display import print_lines
from compressed_ad.errors import ConfigError, RunError, install_command
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT
from compressed_ad.learners.base import LEARNER
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.ppo import PPOConfig
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.learners.select import make_learner
from compressed_ad.marking.apply import REQUIRED, find_marker, marker_parameters
from compressed_ad.marking.conformance import check_marker
from compressed_ad.marking.markers import MARKER
from compressed_ad.models import MODEL, SEGMENTS
from compressed_ad.models.settings import Architecture
from compressed_ad.runs import yaml_file
from compressed_ad.runs.directory import EXTRAS, KERNELS, extras, hardware, is_compiled, revision, versions
from compressed_ad.runs.layers import (
    PRESETS,
    shipped_configs,
    shipped_sections,
    shipped_studies,
    show_value,
)
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.select import make_family
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
    "recorded": (
        "Recorded histories of an environment that is not here: nothing can play its tasks.",
        "observation, action, horizon, n_task, random_return, best_return=-",
    ),
}
"""Families of a named environment. They stand here because adapters import the library that they adapt."""


def _sentence(thing: Any) -> str:
    paragraph = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    plain = " ".join(paragraph.split()).replace("`", "")
    return re.split(r"(?<=[.:]) (?=[A-Z])", plain)[0].rstrip(":")


def call_parameters(thing: Callable[..., Any], *, keyword_only: bool = False) -> str:
    """The parameters of a call, with their defaults."""
    given = inspect.signature(thing).parameters.values()
    kinds = {
        inspect.Parameter.KEYWORD_ONLY,
        *([] if keyword_only else [inspect.Parameter.POSITIONAL_OR_KEYWORD]),
    }
    return _with_defaults((p.name, p.default) for p in given if p.kind in kinds)


def _with_defaults(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(
        name if default is REQUIRED else f"{name}={show_value(default)}" for name, default in pairs
    )


def _architecture() -> str:
    fields = Architecture.model_fields.items()
    return _with_defaults((n, f.default) for n, f in fields if n != "model" and not n.endswith("_space"))


def _learners() -> Rows:
    ppo = _with_defaults((name, field.default) for name, field in PPOConfig.model_fields.items())
    rows = [
        (n, _sentence(maker), ppo if n == "ppo" else call_parameters(maker)) for n, maker in LEARNER.items()
    ]
    state = "" if extras()["sb3"] else f" (not installed: {install_command('sb3')})"
    for name, algorithm in ALGORITHM.items():
        rows.append((f"sb3:{name}", f"{algorithm.words} Actions: {', '.join(algorithm.actions)}{state}", ""))
    return rows


def _models() -> Rows:
    first = {model: name for name, model in reversed(list(MODEL.items()))}
    return [
        (name, _sentence(model), _architecture())
        if first[model] == name
        else (name, f"Another name of {first[model]}, from the guide.", "")
        for name, model in MODEL.items()
    ]


def _files(shipped: Mapping[str, Path]) -> Rows:
    """Shipped files with their first line."""
    return [
        (name, file.read_text("utf-8").partition("\n")[0].lstrip("# "), "") for name, file in shipped.items()
    ]


def _question(study: Path) -> str:
    """The first sentence of a study's question."""
    asked = str(yaml_file.read(study)[("question",)][0])
    return re.split(r"(?<=[.?:]) (?=[A-Z])", asked.strip())[0]


LISTS: Mapping[str, Callable[[], Rows]] = {
    "families": lambda: [
        *((name, _sentence(family), call_parameters(family)) for name, family in TASK_FAMILY.items()),
        *((f"{prefix}:ID", *about) for prefix, about in ADAPTERS.items()),
    ],
    "learners": _learners,
    "markers": lambda: [
        (name, _sentence(marker), _with_defaults(marker_parameters(name).items()))
        for name, marker in MARKER.items()
    ],
    "models": _models,
    "segmentations": lambda: [
        (name, _sentence(rule), f"--model.segments {name}") for name, rule in SEGMENTS.items()
    ],
    "transforms": lambda: [
        (
            name,
            _sentence(transform) + (" (departs from pure AD)" if name in DEPARTURES else ""),
            call_parameters(transform, keyword_only=True),
        )
        for name, transform in TRANSFORM.items()
    ],
    "layouts": lambda: sorted(
        [(name, _sentence(read), f"cad import --layout {name}") for name, read in LAYOUT.items()]
        + [(name, _sentence(write), f"cad export --to {name}") for name, write in EXPORT.items()]
    ),
    "presets": lambda: [row for row in _files(shipped_configs()) if row[0] in PRESETS],
    "configs": lambda: _files(shipped_configs()),
    "sections": lambda: _files(shipped_sections()),
    "studies": lambda: [(name, _question(file), "") for name, file in shipped_studies().items()],
    "extras": lambda: [
        (
            name,
            EXTRAS[name][0],
            "installed" if there else f"not installed: {install_command(name)}",
        )
        for name, there in extras().items()
    ],
}


def _list(call: Call) -> None:
    kinds = [call.options.what] if call.options.what else list(LISTS)
    for kind in kinds:
        if len(kinds) > 1:
            print_lines(f"{kind}:")
        rows = LISTS[kind]()
        for name, words, parameters in rows:
            lines = [*([""] * (len(name) > 18)), *textwrap.wrap(words, 80), *textwrap.wrap(parameters, 80)]
            print_lines(f"  {name:<18} " + f"\n{'':<21}".join(lines))
        if any(" guide" in words for _, words, _ in rows):
            print_lines("  (the guide, and where everything in it lives here: docs/from_the_guide.md)")


LISTING = Command(
    _list,
    [option("what", "WHAT", ", ".join(LISTS), one_of("list", LISTS), nargs="?")],
    text=(
        "Shows a line about each name, and its parameters. For all lists but extras, module:attribute also "
        "works in place of a name; the module may be installed or lie in the current folder."
    ),
    common=(),
)


# ---------------------------------------------------------------- check


def _learner(name: str, kwargs: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    family_kwargs = _mapping("--family-kwargs", options.family_kwargs)
    family = None if options.family is None else make_family(options.family, family_kwargs)
    return check_learner(make_learner(name, kwargs), family, n_timesteps=options.steps)


CHECKS: Mapping[str, Callable[[str, Mapping[str, Any], argparse.Namespace], list[str]]] = {
    "family": lambda name, kwargs, options: family_problems(make_family(name, kwargs)),
    "marker": lambda name, kwargs, options: check_marker(find_marker(name), **kwargs),
    "learner": _learner,
}


def _check(call: Call) -> None:
    options = call.options
    found = CHECKS[options.kind](options.what, _mapping("--kwargs", options.kwargs), options)
    if found:
        raise RunError("\n".join(found))
    print_lines(f"{options.kind} {options.what}: nothing found")


CHECK = Command(
    _check,
    [
        option("kind", "KIND", ", ".join(CHECKS), one_of("kind", CHECKS)),
        option("what", "NAME", "a name (cad list), or module:attribute"),
        option("--kwargs", "YAML", "its parameters, e.g. '{size: 5}'", default="{}"),
        option("--family", "NAME", "family that a learner is tried on (default: a small room)"),
        option("--family-kwargs", "YAML", "parameters of that family", default="{}"),
        option("--steps", "N", "steps of a learner's streams", count, default=200),
    ],
    text="Tries it on something small. The exit code is 0 if nothing wrong was found, else 1.",
    common=(),
)


def _mapping(option: str, text: str) -> dict[str, Any]:
    value = yaml_file.value(text, option)
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected parameters like '{{size: 5}}', got {text!r}")
    return value


# ---------------------------------------------------------------- doctor


def _doctor(call: Call) -> None:
    machine, problems = hardware(), list[str]()
    print_lines("versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print_lines(f"revision  {revision() or 'not a git checkout'}")
    about = f"{machine['vectors']}, {machine['cores']} core(s), {machine['memory_gib']} GiB"
    print_lines(f"machine   {machine['processor']}, {about}")
    print_lines(f"device    {_device(problems)}")
    for name, installed in extras().items():
        state = "installed" if installed else f"not installed: {install_command(name)}"
        print_lines(f"extra     {name}: {state}")
    for name, kernels in KERNELS.items():
        state = "compiled" if is_compiled(kernels) else "not compiled yet, which its first use does"
        print_lines(f"kernels   {name}: {state}")
    for folder in (Path(), Path("datasets"), Path("runs"), Path(tempfile.gettempdir())):
        print_lines(f"folder    {folder.resolve()}: {_writable(folder, problems)}")
    if problems:
        raise RunError("\n".join(problems))
    print_lines("all well")


DOCTOR = Command(_doctor, common=())


def _device(problems: list[str]) -> str:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported ({error})")
        return "unknown"
    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"cuda: {', '.join(names)}"


def _writable(folder: Path, problems: list[str]) -> str:
    folder = folder.resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return "writable" if existing == folder else "can be made"
    except OSError as error:
        problems.append(f"{existing}: cannot be written to ({error.strerror})")
        return "NOT writable"
