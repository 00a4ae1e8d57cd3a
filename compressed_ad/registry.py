"""Registries of what users may extend, and the validation of parameters when it is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from compressed_ad.errors import ConfigError, UnknownNameError, UsageError, nearest, users_code
from compressed_ad.settings import LISTS, MAPPINGS, UNIONS, Problem, problems

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Fits = Callable[[Any], str | None]
"""Says in words why an object does not follow a protocol; None if it does. It calls nothing."""


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping of names to objects whose lookups also accept ``module:attribute``.

    ``kind`` is the word used in error messages ("marker", "task family", ...). ``homes`` are names with the
    ``module:attribute`` of each: what is heavy is imported when it is first asked for. ``fits`` is the
    protocol that other ``module:attribute`` must follow.
    """

    def __init__(
        self, kind: str, homes: Mapping[str, str] | None = None, fits: Fits = lambda found: None
    ) -> None:
        self.kind, self._fits = kind, fits
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
        if name in self._homes:
            return import_attribute(self.kind, self._homes[name])  # type: ignore[no-any-return]
        if ":" in name:
            return import_attribute(self.kind, name, self._fits)  # type: ignore[no-any-return]
        raise UnknownNameError(self.kind, name, self)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._homes, *self._items)))

    def __len__(self) -> int:
        return len(self._homes.keys() | self._items.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._items

    def has(self, name: str) -> bool:
        """Whether ``name`` is registered, or is the ``module:attribute`` of what is registered."""
        return name in self or name in self._homes.values()


def import_attribute(kind: str, path: str, fits: Fits = lambda found: None) -> Any:
    """What ``module:attribute`` names; ``UsageError`` if there is no such thing, or if it does not fit."""
    module, _, attribute = path.partition(":")
    found: Any = import_module(f"{kind} {path!r}", module)
    try:
        found = getattr(found, attribute)
    except AttributeError as error:
        raise UsageError(f"{kind} {path!r}: {module!r} has no attribute {attribute!r}") from error
    if wrong := fits(found):
        raise UsageError(f"{kind} {path!r} {wrong}")
    return found


def import_module(what: str, name: str) -> ModuleType:
    """The module ``name``; ``UsageError`` that begins with ``what`` if it cannot be imported."""
    with users_code(f"{what}: cannot import {name!r}", UsageError):
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError("not the name of a module")
        return importlib.import_module(name)


def makes(protocol: str, *methods: str, functions: bool = True) -> Fits:
    """The protocol of a class with ``methods``, or of a function annotated to return such an object."""

    def fits(found: Any) -> str | None:
        made = found
        if not isinstance(found, type):
            if not functions or not _is_function(found):
                return f"is a {type(found).__name__}, not a class{' or function' * functions}"
            made = _evaluated(inspect.signature(found).return_annotation, found)
            if made in (None, inspect.Signature.empty):
                return f"does not say what it makes: annotate what the function returns, -> {protocol}"
        lacking = next((name for name in methods if not hasattr(made, name)), None)
        return lacking and f"makes a {getattr(made, '__name__', made)}, which has no {lacking!r}"

    return fits


def takes(*names: str, some: bool = False) -> Fits:
    """The protocol of a function with as many arguments as ``names``; all others must be keyword-only.

    With ``some``, of a function that is handed by name what it asks for: at least one of ``names``.
    """

    def fits(found: Any) -> str | None:
        if not _is_function(found):
            return f"is a {type(found).__name__}, not a function"
        parameters = inspect.signature(found).parameters
        given = [p for p in parameters.values() if p.kind < p.KEYWORD_ONLY]
        fixed = all(p.default is p.empty and p.kind < p.VAR_POSITIONAL for p in given)
        if some:
            return None if parameters.keys() & set(names) else f"takes none of {', '.join(names)}"
        wanted = f"must take ({', '.join(names)}), and parameters of its own after a *"
        return None if fixed and len(given) == len(names) else wanted

    return fits


def _is_function(found: Any) -> bool:
    """Whether ``found`` is written in Python, as a function or with a method ``__call__``."""
    inner = inspect.unwrap(found) if callable(found) else found
    call = inspect.getattr_static(type(inner), "__call__", None)
    return isinstance(inner, FunctionType | MethodType) or isinstance(call, FunctionType)


def search_current_folder(names: Collection[str]) -> None:
    """Let ``module:attribute`` find files in the current folder, after everything installed.

    Only if the user has given ``names`` of own code: no file may bring a module in place of a missing one.
    """
    if names and "" not in sys.path:
        sys.path.append("")


def own_names(value: Any) -> frozenset[str]:
    """The texts in plain nested data that may stand for code, as ``module:attribute`` does."""
    if isinstance(value, str):
        number = re.match(r"[-+.\d]+([eE][-+]?\d+)?:", value)  # of a range
        return frozenset([value] if ":" in value and not number else [])
    if isinstance(value, Mapping):
        value = value.values()
    inner = value if isinstance(value, Collection) and not isinstance(value, bytes) else ()
    return frozenset().union(*map(own_names, inner))


def check_trust(where: object, names: Collection[str], trust: str | Collection[str]) -> None:
    """Raise ``UsageError`` if the file ``where`` names code that is not among those named in ``trust``."""
    strange = sorted(set(names) - set([trust] if isinstance(trust, str) else trust))
    if strange:
        shown = reprlib.repr(strange[0]) if len(strange[0]) > 200 else repr(strange[0])
        raise UsageError(
            f"{where}: names {shown}, code from outside this library, which no file may run by itself;"
            f" if you trust it: --trust {shown} (trust=... in Python)"
        )


def make(registry: Registry[Callable[..., T]], name: str, kwargs: Mapping[str, Any], offers: str) -> T:
    """What ``registry[name](**kwargs)`` makes; ``UsageError`` unless it has the attribute ``offers``.

    ``ConfigError`` lists wrong, unknown and missing arguments.
    """
    maker = registry[name]
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
    written_in = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    if isinstance(function, type) and is_dataclass(function):  # fields may be inherited from another module
        owners = (owner for owner in function.__mro__ if parameter.name in inspect.get_annotations(owner))
        written_in = sys.modules[next(owners, function).__module__]
    return _evaluated(parameter.annotation, written_in)


def _evaluated(annotation: Any, written_in: Any) -> Any:
    """What an annotation in a function or module stands for; None if it cannot be evaluated."""
    if not isinstance(annotation, str):
        return annotation
    inner = inspect.unwrap(written_in)
    try:
        return eval(annotation, getattr(inner, "__globals__", None) or vars(inner))
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
