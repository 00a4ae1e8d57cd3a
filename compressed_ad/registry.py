"""Names for things that users may extend: a registered name, or ``module:attribute``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from compressed_ad.errors import UnknownNameError, UsageError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping of names to objects whose lookups also accept ``module:attribute``.

    ``kind`` is the word used in error messages ("marker", "task family", ...).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that registers its object under each of ``names``."""

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._items:
            return self._items[name]
        if ":" in name:
            return self._import(name)
        raise UnknownNameError(self.kind, name, self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def _import(self, path: str) -> T:
        module, _, attribute = path.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UsageError(f"{self.kind} {path!r}: cannot import {module!r} ({error})") from error
        except AttributeError as error:
            raise UsageError(f"{self.kind} {path!r}: {module!r} has no attribute {attribute!r}") from error
        return found  # type: ignore[no-any-return]
