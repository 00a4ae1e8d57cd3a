"""YAML as configuration: plain data with the place of every value, and nothing that surprises.

Scalars are those of YAML 1.2's core schema, so ``3e-4`` is a number and ``off`` is a word. Duplicate keys,
tags, anchors and aliases are refused: a file can neither run anything nor grow when read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compressed_ad.errors import ConfigError

Leaves = dict[tuple[str, ...], tuple[Any, str]]
"""Path of keys -> (value, where it was written)."""

_MAX_BYTES = 1 << 20
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read(path: Path) -> Leaves:
    """The leaves of the mapping in ``path``; ``ConfigError`` names the file and the line of a mistake."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; not a configuration")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    leaves: Leaves = {}
    root = _compose(text, shown(path))
    if root is None:
        return leaves
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys and values, not a {root.id}")
    _collect(root, (), shown(path), leaves)
    return leaves


def value(text: str, where: str) -> Any:
    """One value written as YAML, e.g. on the command line."""
    root = _compose(text, where)
    return None if root is None else _plain(root, where)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not supported", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag} is refused", event.start_mark)
        return super().compose_node(parent, index)


def _compose(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and where.endswith("ml") else ""
        raise ConfigError(f"{where}{line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML ({str(error).splitlines()[0][:100]})") from None


def _collect(node: yaml.MappingNode, path: tuple[str, ...], where: str, leaves: Leaves) -> None:
    if not node.value and path:
        leaves[path] = ({}, f"{where}:{node.start_mark.line + 1}")
    seen: dict[str, int] = {}
    for key_node, child in node.value:
        key, line = _key(key_node, where), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{where}:{line}: {key!r} stands here and on line {seen[key]}")
        seen[key] = line
        if isinstance(child, yaml.MappingNode):
            _collect(child, (*path, key), where, leaves)
        else:
            leaves[*path, key] = (_plain(child, where), f"{where}:{line}")


def _key(node: Any, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}:{node.start_mark.line + 1}: a key must be a word")
    return str(node.value)


def _plain(node: Any, where: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, where) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        keys = [_key(key, where) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(f"{where}:{node.start_mark.line + 1}: {sorted(twice)[0]!r} stands twice")
        return {key: _plain(child, where) for key, (_, child) in zip(keys, node.value, strict=True)}
    text = str(node.value)
    return text if node.style is not None else scalar(text)


def scalar(text: str) -> Any:
    """What an unquoted scalar stands for."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < 300:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return text


def shown(path: Path) -> str:
    """``path`` as messages name it: relative to the current folder if it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
