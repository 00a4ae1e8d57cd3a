"""Registries of what users may extend, and the validation of parameters when it is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from compressed_ad.errors import ConfigError, UnknownNameError, UsageError, nearest, users_code
from compressed_ad.settings import LISTS, MAPPINGS, UNIONS, Problem, problems

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


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
    with users_code(f"{kind} {path!r}: cannot import {module!r}", UsageError):
        found = importlib.import_module(module)
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise UsageError(f"{kind} {path!r}: {module!r} has no attribute {attribute!r}") from error


def make(registry: Registry[Callable[..., T]], name: str, kwargs: Mapping[str, Any], offers: str) -> T:
    """What ``registry[name](**kwargs)`` makes; ``UsageError`` unless it has the attribute ``offers``.

    ``ConfigError`` lists wrong, unknown and missing arguments.
    """
    maker = registry[name]
    if not callable(maker):
        raise UsageError(f"{registry.kind} {name!r} is a {type(maker).__name__}, not a class or function")
    values, found = Parameters(maker).complete(kwargs)
    if found:
        raise ConfigError([problem.within(f"{registry.kind} {name!r}") for problem in found])
    with users_code(f"{registry.kind} {name!r} cannot be made", UsageError):
        made = maker(**values)
    if not hasattr(made, offers):
        raise UsageError(f"{registry.kind} {name!r} makes a {type(made).__name__}, which has no {offers!r}")
    return made


def checked(function: F) -> F:
    """Decorator: validate the parameters of a function or class (dataclasses too) whenever it is called.

    ``ConfigError`` lists the wrong, unknown and missing ones, prefixed by the ``name`` of the class, or by
    the function's. Put it below ``register`` and above ``dataclass``.
    """
    is_class = isinstance(function, type)
    inner = function.__init__ if is_class else function
    parameters = functools.cache(lambda: Parameters(function))

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        known, instance = parameters(), args[:1] if is_class else ()
        given = known.signature.bind_partial(*args[len(instance) :]).arguments
        if given.keys() & kwargs.keys():
            return inner(*args, **kwargs)  # Python raises its own error
        values, found = known.complete({**given, **kwargs})
        if found:
            label = getattr(type(args[0]), "name", None) if is_class else function.__name__
            label = label if isinstance(label, str) else type(args[0]).__name__
            raise ConfigError([problem.within(label) for problem in found])
        return inner(*instance, **values)

    if not is_class:
        return cast(F, call)
    function.__init__ = call  # type: ignore[method-assign]
    return function


class Parameters:
    """The parameters of a function or class that a user may set, and their validation by annotation.

    Numbers, truth values, texts, ``Literal``, and lists, tuples, mappings and unions of these are validated
    as in ``Settings``, but strictly: a text is no number. Parameters with another annotation, or with none,
    are passed through. ``handed`` are parameters that the user may not set. With ``guess``, a default that
    is a number or a truth value stands for a missing annotation.
    """

    def __init__(
        self, function: Callable[..., Any], handed: Collection[str] = (), *, guess: bool = False
    ) -> None:
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters
        named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self.settable = {n: p for n, p in named.items() if n not in handed}
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._function, self._handed, self._guess = function, parameters.keys() & set(handed), guess
        self._types: dict[str, tuple[Any, TypeAdapter[Any] | None]] = {}

    def validated(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        """The validated values of the parameters ``given``, and the problems with them."""
        values, found = dict(given), list[Problem]()
        for name, value in given.items():
            if name in self.settable:
                hint, adapter = self._type(name)
                if adapter is None or value is self.settable[name].default:
                    continue
                try:
                    values[name] = adapter.validate_python(_without_numpy(value))
                except ValidationError as error:
                    found += problems(hint, error, name)
            elif not self.takes_any or name in self._handed:
                has = ", ".join(self.settable) or "none"
                text = f"unknown parameter {name!r}{nearest(name, self.settable)}; it has {has}"
                found.append(Problem(text, (name,)))
        return values, found

    def complete(
        self, given: Mapping[str, Any], missing: Callable[[str], str] = "parameter {!r} is missing".format
    ) -> tuple[dict[str, Any], list[Problem]]:
        """As ``validated``; missing parameters are problems, too, with the text ``missing(name)``."""
        values, found = self.validated(given)
        needed = [name for name, p in self.settable.items() if p.default is p.empty and name not in given]
        return values, found + [Problem(missing(name), (name,)) for name in needed]

    def _type(self, name: str) -> tuple[Any, TypeAdapter[Any] | None]:
        """The annotation of a parameter, and its validator; both are made when they are first needed."""
        if name not in self._types:
            parameter = self.settable[name]
            hint = _annotation(self._function, parameter)
            if self._guess and hint is parameter.empty and isinstance(parameter.default, int | float):
                number = Annotated[Any, BeforeValidator(_refuse_text)]
                hint = bool if isinstance(parameter.default, bool) else number
            strict, config = _strict(hint), ConfigDict(allow_inf_nan=False)
            self._types[name] = hint, None if strict is None else TypeAdapter(strict, config=config)
        return self._types[name]


def _refuse_text(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("text_for_number", "a number")
    return value


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type that a parameter is annotated with; None if the annotation cannot be evaluated."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    written_in = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    namespace = getattr(inspect.unwrap(written_in), "__globals__", {})
    if isinstance(function, type) and is_dataclass(function):  # fields may be inherited from another module
        owners = (owner for owner in function.__mro__ if parameter.name in inspect.get_annotations(owner))
        namespace = vars(sys.modules[next(owners, function).__module__])
    try:
        return eval(parameter.annotation, namespace)
    except Exception:  # a name that is imported for type checkers only
        return None


def _strict(hint: Any) -> Any:
    """``hint`` without conversions, except from lists to tuples; None if it is not plain."""
    origin, items = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str):
        return Annotated[hint, Strict()]
    if hint in (Any, type(None)) or origin is Literal:
        return hint
    if origin is Annotated:
        inner = _strict(items[0])
        return inner and Annotated[inner, *hint.__metadata__]
    strict = tuple(item if item is ... else _strict(item) for item in items)
    if origin in (*UNIONS, *LISTS, *MAPPINGS) and all(strict):
        return Union[strict] if origin in UNIONS else origin[strict]  # noqa: UP007
    return None


def _without_numpy(value: Any) -> Any:
    """NumPy scalars as Python numbers, which compare with arrays at the precision of the array."""
    import numpy as np  # here, because ``cad --help`` needs no NumPy

    if isinstance(value, list | tuple):
        return [_without_numpy(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def call_text(name: str, params: Mapping[str, Any]) -> str:
    """``name(key=value, ...)``; of long lists the first six values."""
    listed = (f"{k}={reprlib.repr(v) if isinstance(v, list) else v}" for k, v in params.items())
    return name + (f"({', '.join(listed)})" if params else "")
