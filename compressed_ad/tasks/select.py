"""Task families by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from compressed_ad.registry import Registry, make
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily

ADAPTER: Mapping[str, str] = {
    "gymnasium": "compressed_ad.tasks.from_gymnasium:GymnasiumFamily",
    "minigrid": "compressed_ad.tasks.minigrid:MiniGridFamily",
    "metaworld": "compressed_ad.tasks.metaworld:MetaWorldFamily",
    "xland": "compressed_ad.tasks.xland:XLandFamily",
}
"""Prefix of a family's name -> ``module:attribute`` that makes a family of what stands after the colon."""


def make_family(name: str, kwargs: Mapping[str, Any]) -> TaskFamily:
    """The task family ``name`` built with ``kwargs``.

    ``name`` is a registered name (``darkroom``), the prefix of an adapter and what it adapts
    (``gymnasium:CartPole-v1``), or ``module:attribute``. Raises ``UnknownNameError``, ``ConfigError`` listing
    unknown and missing parameters, ``MissingExtraError``, and whatever ``UsageError`` the family has about
    their values.
    """
    prefix, _, what = name.partition(":")
    if not what or prefix not in ADAPTER:
        return make(TASK_FAMILY, name, kwargs, offers="tasks")
    module, _, attribute = ADAPTER[prefix].partition(":")
    adapters: Registry[Callable[..., TaskFamily]] = Registry("task family")
    adapters.register(name)(getattr(importlib.import_module(module), attribute))
    return make(adapters, name, {"env_id": what, **kwargs}, offers="tasks")
