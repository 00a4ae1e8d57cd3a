"""What there is to choose from, and whether this installation works: ``cad list`` and ``cad doctor``."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import print_lines
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT
from compressed_ad.learners.base import LEARNER
from compressed_ad.learners.ppo import PPOConfig
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.marking.apply import REQUIRED, marker_parameters
from compressed_ad.marking.markers import MARKER
from compressed_ad.models import MODEL
from compressed_ad.models.settings import Architecture
from compressed_ad.runs.config_text import show_value
from compressed_ad.runs.directory import extras
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.tasks.select import ADAPTER
from compressed_ad.training.transforms import DEPARTURES, TRANSFORM


def listing(call: Call) -> None:
    """``cad list``."""
    kinds = [call.options.what] if call.options.what else list(LISTS)
    for kind in kinds:
        if len(kinds) > 1:
            print_lines(f"{kind}:")
        for name, words, parameters in LISTS[kind]():
            lines = [*textwrap.wrap(words, 80), *textwrap.wrap(parameters, 80)]
            print_lines(f"  {name:<18} " + f"\n{'':<21}".join(lines))


def _first_line(thing: Any) -> str:
    """The first paragraph of the docstring, up to its first sentence's end."""
    return _sentence(inspect.getdoc(thing) or "")


def _sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=[.:]) (?=[A-Z])", paragraph)[0].rstrip(":")


def _call_parameters(thing: Any, *, keyword_only: bool = False) -> str:
    parameters = [
        p
        for p in inspect.signature(thing).parameters.values()
        if p.kind is p.KEYWORD_ONLY or (not keyword_only and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]
    return _defaults((p.name, p.default) for p in parameters)


def _defaults(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(
        name if default is REQUIRED else f"{name}={show_value(default)}" for name, default in pairs
    )


Rows = list[tuple[str, str, str]]


def _families() -> Rows:
    own = [(name, _first_line(f), _call_parameters(f)) for name, f in TASK_FAMILY.items()]
    return [*own, *((f"{prefix}:ID", *unimported(path)) for prefix, path in ADAPTER.items())]


def unimported(path: str) -> tuple[str, str]:
    """First line and parameters of what ``module:attribute`` names, read from its source.

    Adapters import what they adapt; a list must work without it, and fast. Two empty texts if there is no
    such thing.
    """
    module, _, attribute = path.partition(":")
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_text("utf-8")) if spec and spec.origin else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            return _sentence(text), ", ".join(_source_parameters(node))
    return "", ""


def _source_parameters(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """``name`` or ``name=default`` of a function, of a class's ``__init__``, or of a dataclass's fields."""
    if isinstance(node, ast.ClassDef):
        inits = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
        init = next((inner for inner in inits if inner.name == "__init__"), None)
        pairs = _fields(node) if init is None else _arguments(init)
    else:
        pairs = _arguments(node)
    for name, default in pairs:
        if name not in ("self", "env_id"):  # what stands after the prefix is the id
            yield name if default is None else f"{name}={ast.unparse(default)}"


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            yield ast.unparse(line.target), line.value


def _arguments(node: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None]]:
    taken = [*node.args.posonlyargs, *node.args.args]
    defaults = [*[None] * (len(taken) - len(node.args.defaults)), *node.args.defaults]
    for argument, default in zip(
        [*taken, *node.args.kwonlyargs], [*defaults, *node.args.kw_defaults], strict=True
    ):
        yield argument.arg, default


def _learners() -> Rows:
    own = ((name, field.default) for name, field in PPOConfig.model_fields.items())
    rows = [
        (name, _first_line(maker), _defaults(own) if name == "ppo" else _call_parameters(maker))
        for name, maker in LEARNER.items()
    ]
    state = "" if extras()["sb3"] else " (not installed: pip install 'compressed-ad[sb3]')"
    sb3 = [
        (f"sb3:{name}", f"{algorithm.words} Actions: {', '.join(algorithm.actions)}{state}", "")
        for name, algorithm in ALGORITHM.items()
    ]
    return [*rows, *sb3]


def _markers() -> Rows:
    return [(n, _first_line(m), _defaults(marker_parameters(n).items())) for n, m in MARKER.items()]


def _models() -> Rows:
    own = _defaults(
        (name, field.default)
        for name, field in Architecture.model_fields.items()
        if name != "model" and not name.endswith("_space")
    )
    return [(name, _first_line(MODEL[name]), own) for name in MODEL]


def _transforms() -> Rows:
    return [
        (
            name,
            _first_line(transform) + (" (departs from pure AD)" if name in DEPARTURES else ""),
            _call_parameters(transform, keyword_only=True),
        )
        for name, transform in TRANSFORM.items()
    ]


def _layouts() -> Rows:
    readers = [(name, _first_line(f), f"cad import --layout {name}") for name, f in LAYOUT.items()]
    writers = [(name, _first_line(f), f"cad export --to {name}") for name, f in EXPORT.items()]
    return sorted(readers + writers)


def _extras() -> Rows:
    state = {True: "installed", False: "not installed: pip install 'compressed-ad[{}]'"}
    return [
        (name, EXTRA_FOR.get(name, ""), state[there].format(name)) for name, there in sorted(extras().items())
    ]


EXTRA_FOR = {
    "metaworld": "Meta-World's ML1 as task families, metaworld:reach-v3.",
    "minari": "Export of histories as Minari datasets.",
    "minigrid": "MiniGrid's layouts as task families, minigrid:MiniGrid-FourRooms-v0.",
    "ray": "Studies on a Ray cluster.",
    "sb3": "Algorithms of Stable-Baselines3 as source learners.",
    "tensorboard": "Training curves in TensorBoard.",
    "xland": "XLand-MiniGrid's rulesets as task families, xland:XLand-MiniGrid-R1-9x9.",
}
"""What each optional dependency is for."""

LISTS: Mapping[str, Callable[[], Rows]] = {
    "families": _families,
    "learners": _learners,
    "markers": _markers,
    "models": _models,
    "transforms": _transforms,
    "layouts": _layouts,
    "extras": _extras,
}
