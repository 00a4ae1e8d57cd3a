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
"""By the prefix of a family's name, before the colon: ``module:attribute`` of the class that makes it."""


def make_family(name: str, kwargs: Mapping[str, Any]) -> TaskFamily:
    """The task family ``name`` built with ``kwargs``.

    ``name`` is a registered name (``darkroom``), the prefix of an adapter and the id of an environment
    (``gymnasium:CartPole-v1``), or ``module:attribute``. Raises ``UnknownNameError``, ``ConfigError`` listing
    wrong parameters, ``MissingExtraError``, and any ``UsageError`` of the family itself.
    """
    prefix, _, what = name.partition(":")
    if not what or prefix not in ADAPTER:
        return make(TASK_FAMILY, name, kwargs, offers="tasks")
    module, _, attribute = ADAPTER[prefix].partition(":")
    adapters: Registry[Callable[..., TaskFamily]] = Registry("task family")
    adapters.register(name)(getattr(importlib.import_module(module), attribute))
    return make(adapters, name, {"env_id": what, **kwargs}, offers="tasks")
