"""Task families by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from compressed_ad.errors import ConfigError, MissingExtraError, UnknownNameError, UsageError
from compressed_ad.registry import Registry, check_trust, make, own_names
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily

ADAPTER: Mapping[str, str] = {
    "gymnasium": "compressed_ad.tasks.from_gymnasium:GymnasiumFamily",
    "minigrid": "compressed_ad.tasks.minigrid:MiniGridFamily",
    "metaworld": "compressed_ad.tasks.metaworld:MetaWorldFamily",
    "xland": "compressed_ad.tasks.xland:XLandFamily",
    "recorded": "compressed_ad.tasks.recorded:RecordedFamily",
}
"""By the prefix of a family's name, before the colon: ``module:attribute`` of the class that makes it."""


def make_family(name: str, kwargs: Mapping[str, Any]) -> TaskFamily:
    """The task family ``name`` built with ``kwargs``.

    ``name`` is a registered name (``darkroom``), the prefix of an adapter and the id of an environment
    (``gymnasium:CartPole-v1``), or ``module:attribute``. Raises ``UnknownNameError``, ``ConfigError`` listing
    wrong parameters, ``MissingExtraError``, and any ``UsageError`` of the family itself.
    """
    prefix, _, what = name.partition(":")
    if not what and name not in TASK_FAMILY:
        raise UnknownNameError("task family", name, [*TASK_FAMILY, *(f"{prefix}:ID" for prefix in ADAPTER)])
    if not what or prefix not in ADAPTER:
        return make(TASK_FAMILY, name, kwargs, offers="tasks")
    adapters: Registry[Callable[..., TaskFamily]] = Registry("task family", {name: ADAPTER[prefix]})
    return make(adapters, name, {"env_id": what, **kwargs}, offers="tasks")


def stored_family(
    where: object, name: str, kwargs: Mapping[str, Any], trust: str | Collection[str] = ()
) -> TaskFamily:
    """The task family that the file ``where`` names, built with ``kwargs`` of this file.

    Code from outside this library is imported only if ``trust`` has its name.
    """
    check_trust(where, family_code(name, kwargs), trust)
    try:
        return make_family(name, kwargs)
    except MissingExtraError:
        raise
    except UsageError as error:
        raise ConfigError(f"{where}: {line}" for line in str(error).splitlines()) from error


def family_code(name: str, kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of code from outside this library that a family would import when it is made."""
    prefix, _, what = name.partition(":")
    known = TASK_FAMILY.has(name) or (prefix in ADAPTER and ":" not in what)
    return own_names([kwargs, "" if known else name])
