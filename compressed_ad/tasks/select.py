"""Task families by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from compressed_ad.errors import ConfigError, nearest
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def make_family(name: str, kwargs: Mapping[str, Any]) -> TaskFamily:
    """The task family ``name``, registered or ``module:attribute``, built with ``kwargs``.

    Raises ``UnknownNameError``, ``ConfigError`` listing unknown and missing parameters, and whatever
    ``UsageError`` the family has about their values.
    """
    maker = TASK_FAMILY[name]
    parameters = inspect.signature(maker).parameters.values()
    known = [p.name for p in parameters if p.kind in _NAMED]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    problems = [
        f"task family {name!r}: unknown parameter {key!r}{nearest(key, known)};"
        f" it has {', '.join(known) or 'none'}"
        for key in kwargs
        if key not in known and not takes_any
    ]
    problems += [
        f"task family {name!r}: parameter {p.name!r} is missing"
        for p in parameters
        if p.kind in _NAMED and p.default is p.empty and p.name not in kwargs
    ]
    if problems:
        raise ConfigError(problems)
    return maker(**kwargs)
