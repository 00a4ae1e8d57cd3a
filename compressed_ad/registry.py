"""Names for things that users may extend: a registered name, or ``module:attribute``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from compressed_ad.errors import CompressedADError, ConfigError, UnknownNameError, UsageError, nearest

T = TypeVar("T")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping of names to objects whose lookups also accept ``module:attribute``.

    ``kind`` is the word used in error messages ("marker", "task family", ...). ``homes`` are names with the
    ``module:attribute`` of each: what is heavy is imported when it is first asked for.
    """

    def __init__(self, kind: str, homes: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._homes = dict(homes or {})
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that registers its object under each of ``names``."""

        def add(item: T) -> T:
            for name in names:
                if name in self:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._items:
            return self._items[name]
        path = self._homes.get(name, name)
        if ":" in path:
            return import_attribute(self.kind, path)  # type: ignore[no-any-return]
        raise UnknownNameError(self.kind, name, self)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._homes, *self._items)))

    def __len__(self) -> int:
        return len(self._homes.keys() | self._items.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._items


def import_attribute(kind: str, path: str) -> Any:
    """What ``module:attribute`` names; ``UsageError`` if there is no such thing."""
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except CompressedADError:
        raise
    except (ImportError, ValueError) as error:
        raise UsageError(f"{kind} {path!r}: cannot import {module!r} ({error})") from error
    except Exception as error:  # whatever a user's file raises
        raise UsageError(f"{kind} {path!r}: cannot import {module!r} ({_raised(error)})") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise UsageError(f"{kind} {path!r}: {module!r} has no attribute {attribute!r}") from error


def make(registry: Registry[Callable[..., T]], name: str, kwargs: Mapping[str, Any], offers: str) -> T:
    """What ``registry[name](**kwargs)`` makes; ``UsageError`` unless it has the attribute ``offers``.

    ``ConfigError`` lists unknown and missing arguments.
    """
    maker = registry[name]
    if not callable(maker):
        raise UsageError(f"{registry.kind} {name!r} is a {type(maker).__name__}, not a class or function")
    parameters = inspect.signature(maker).parameters.values()
    known = [p.name for p in parameters if p.kind in _NAMED]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    problems = [
        f"{registry.kind} {name!r}: unknown parameter {key!r}{nearest(key, known)};"
        f" it has {', '.join(known) or 'none'}"
        for key in kwargs
        if key not in known and not takes_any
    ]
    problems += [
        f"{registry.kind} {name!r}: parameter {p.name!r} is missing"
        for p in parameters
        if p.kind in _NAMED and p.default is p.empty and p.name not in kwargs
    ]
    if problems:
        raise ConfigError(problems)
    try:
        made = maker(**kwargs)
    except CompressedADError:
        raise
    except Exception as error:  # whatever a user's class raises
        raise UsageError(f"{registry.kind} {name!r} cannot be made ({_raised(error)})") from error
    if not hasattr(made, offers):
        raise UsageError(f"{registry.kind} {name!r} makes a {type(made).__name__}, which has no {offers!r}")
    return made


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def call_text(name: str, params: Mapping[str, Any]) -> str:
    """``name(key=value, ...)``."""
    return name + (f"({', '.join(f'{k}={v}' for k, v in params.items())})" if params else "")
