"""Task families by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressed_ad.registry import make
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily


def make_family(name: str, kwargs: Mapping[str, Any]) -> TaskFamily:
    """The task family ``name``, registered or ``module:attribute``, built with ``kwargs``.

    Raises ``UnknownNameError``, ``ConfigError`` listing unknown and missing parameters, and whatever
    ``UsageError`` the family has about their values.
    """
    return make(TASK_FAMILY, name, kwargs, offers="tasks")
