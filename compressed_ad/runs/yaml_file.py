"""Reads YAML as plain data that keeps the place of every value, and writes it.

Scalars follow YAML 1.2's core schema, so ``3e-4`` is a number and ``off`` is a word. Duplicate keys, tags,
anchors and aliases are refused: a file can neither run code nor grow when it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from compressed_ad.errors import ConfigError, one_line
from compressed_ad.settings import Settings

Leaves = dict[tuple[str, ...], tuple[Any, str]]
"""Path of keys -> (value, where it was written)."""

MAX_BYTES = 1 << 20
_MAX_NODES, _MAX_SETTINGS = 10_000, 500  # values, settings
_SCALARS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"~|null|Null|NULL|", lambda _: None),
    (r"true|True|TRUE", lambda _: True),
    (r"false|False|FALSE", lambda _: False),
    (r"[-+]?[0-9]{1,299}", int),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)", lambda text: float(text.replace(".", ""))),
    (r"\.(nan|NaN|NAN)", lambda _: math.nan),
)


def read(path: Path) -> Leaves:
    """The leaves of the mapping in ``path``; ``ConfigError`` names the file and the line of a mistake."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB; not a configuration")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    whole = path.resolve()
    shown = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path
    root = _parse(text, f"{shown}:")
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys and values, not a {root.id}")
    leaves = _leaves(root, (), "")
    if len(leaves) > _MAX_SETTINGS:
        raise ConfigError(f"{path}: more than {_MAX_SETTINGS} settings; not a configuration")
    return leaves


def parse(text: str, where: str, path: tuple[str, ...]) -> Leaves:
    """The leaves of a YAML ``text`` that was given for the key at ``path``, e.g. on the command line."""
    return _leaves(_parse(text, where), path, where)


def value(text: str, where: str) -> Any:
    """The plain data in a YAML ``text``."""
    return _plain(_parse(text, where))


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self.name = where  # all places in the text are marked with it
        self.left = _MAX_NODES

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, self.left = self.peek_event(), self.left - 1  # type: ignore[no-untyped-call]
        if self.left < 0:
            problem = f"more than {_MAX_NODES:,} values; not a configuration"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not supported", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag} is refused", event.start_mark)
        return super().compose_node(parent, index)


def _parse(text: str, where: str) -> Any:
    """The root node of ``text``, or None; if ``where`` ends with a colon, places get the line after it."""
    try:
        return _Loader(text, where).get_single_node()
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark) if error.problem_mark else where
        raise ConfigError(f"{place}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where.rstrip(':')}: not YAML ({one_line(error, 100)})") from None


def _place(mark: Any) -> str:
    return f"{mark.name}{mark.line + 1}" if mark.name.endswith(":") else str(mark.name)


def _leaves(node: Any, path: tuple[str, ...], where: str) -> Leaves:
    """``node`` as leaves below ``path``; an empty mapping is a leaf unless it is the whole file."""
    if not isinstance(node, yaml.MappingNode) or (path and not node.value):
        return {path: (_plain(node), where)}
    leaves: Leaves = {}
    for key, (place, child) in _items(node).items():
        leaves |= _leaves(child, (*path, key), place)
    return leaves


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: _plain(child) for key, (_, child) in _items(node).items()}
    if node is None:
        return None
    return _scalar(node.value) if node.style is None else node.value


def _items(mapping: yaml.MappingNode) -> dict[str, tuple[str, Any]]:
    """Key -> (where it was written, node of its value)."""
    items: dict[str, tuple[str, Any]] = {}
    for key, child in mapping.value:
        where = _place(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be a word")
        if key.value in items:
            raise ConfigError(f"{where}: duplicate key {key.value!r}, first given at {items[key.value][0]}")
        items[key.value] = where, child
    return items


def _scalar(text: str) -> Any:
    """What an unquoted scalar stands for."""
    return next((make(text) for pattern, make in _SCALARS if re.fullmatch(pattern, text)), text)


# ---------------------------------------------------------------- writing


def dump(config: Settings) -> str:
    """``config`` as YAML that ``--config`` reads back, every value spelled out."""
    return dump_plain(config.model_dump(mode="json"))


def dump_plain(values: Mapping[str, Any]) -> str:
    """Plain nested data as YAML, strings quoted wherever they would read as something else."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(_scalar(text), str) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.text)
