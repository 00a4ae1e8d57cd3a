"""Configurations and settings as text: YAML, help texts and suggestions."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

import yaml

from compressed_ad.models.settings import FROM_HISTORY
from compressed_ad.runs import yaml_file
from compressed_ad.runs.layers import SECTIONS, section_kinds
from compressed_ad.runs.settings import Config


def dump(config: Config) -> str:
    """``config`` as YAML that ``--config`` reads back, every value spelled out."""
    return dump_plain(config.model_dump(mode="json"))


def dump_plain(values: Mapping[str, Any]) -> str:
    """Plain nested data as YAML, strings quoted wherever they would read as something else."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(yaml_file.scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def describe(section: str) -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every setting of ``section``, "" for those of no section."""
    if not section:
        fields = {k: f for k, f in Config.model_fields.items() if k not in SECTIONS}
    else:
        fields = section_kinds()[section].model_fields
    prefix = f"{section}." if section else ""
    return [
        (prefix + name, show_value(field.get_default(call_default_factory=True)), _words(field))
        for name, field in fields.items()
        if not (section == "model" and name in FROM_HISTORY)
    ]


def _words(field: Any) -> str:
    choices = " | ".join(item for item in get_args(field.annotation) if isinstance(item, str))
    return ": ".join(part for part in (choices, field.description) if part)


def show_value(value: Any) -> str:
    """``value`` as help texts show a default: as it is written in YAML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return str(value)


def suggest(flag: str) -> str:
    """A hint at the setting that an unknown option ``flag`` (without dashes) probably means, or nothing."""
    keys = [key for section in ("", *SECTIONS) for key, _, _ in describe(section)]
    by_end = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = get_close_matches(flag, [*keys, *by_end], n=1, cutoff=0.6)
    return f" (did you mean --{by_end.get(close[0], close[0])}?)" if close else ""
