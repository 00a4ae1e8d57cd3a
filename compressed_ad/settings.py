"""Base class and number types of all settings, and the wording of their error messages.

Each section of the configuration is a ``Settings`` class in the room that it configures. The parameters of
``registry.checked`` functions use the same types and the same wording. Imports no torch.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from compressed_ad.errors import ConfigError, did_you_mean, nearest

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
TaskCount = Annotated[int, Ge(1), Le(1_000_000)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Whole = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]

_LARGE = 2**31 - 1
"""Messages mention an upper limit of this size only if it is exceeded."""


def later(default: Any, description: str) -> Any:
    """A setting added after the first runs: files leave it out while it has its default.

    So the files of earlier runs do not change, nor do the names that are derived from their content.
    """
    return Field(default, exclude_if=lambda value: bool(value == default), description=description)


class Settings(BaseModel):
    """Base of every section; wrong and unknown keys raise ``ConfigError``."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_number(cls, value: Any, field: ValidationInfo) -> Any:
        # ``episodes: true`` is a mistake, not 1.
        if isinstance(value, bool) and cls.model_fields[field.field_name or ""].annotation is not bool:
            raise PydanticCustomError("truth_value", "not a truth value")
        return value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError([p.within(type(self).__name__) for p in problems(type(self), error)]) from None

    # Without this mark, pydantic calls ``__init__`` for nested settings as well and loses their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


S = TypeVar("S", bound=Settings)


class Problem(str):
    """An error message with the paths of its keys; validators of settings raise ``ValueError(problem)``."""

    paths: tuple[tuple[str, ...], ...]

    def __new__(cls, text: str, *paths: Iterable[str]) -> Problem:
        problem = super().__new__(cls, text)
        problem.paths = tuple(map(tuple, paths))
        return problem

    def within(self, where: str) -> Problem:
        return Problem(f"{where}: {self}", *self.paths)


def _refuse_infinite(values: dict[str, Any]) -> dict[str, Any]:
    def is_finite(value: Any) -> bool:
        if isinstance(value, Mapping | list | tuple):
            return all(map(is_finite, value.values() if isinstance(value, Mapping) else value))
        return not isinstance(value, float) or math.isfinite(value)

    bad = {key: value for key, value in values.items() if not is_finite(value)}
    if bad:
        raise ValueError(Problem(f"numbers must be finite, got {bad}", *((key,) for key in bad)))
    return values


FreeParameters = Annotated[dict[str, Any], AfterValidator(_refuse_infinite)]
"""Keyword arguments of a family, learner, marker or transform, which validates them itself."""


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """``values`` as settings of a ``kind``; ``ConfigError`` lists all problems, prefixed by ``where``."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([problem.within(where) for problem in problems(kind, error)]) from None


def problems(hint: Any, error: ValidationError, name: str = "") -> list[Problem]:
    """The problems of a value of type ``hint``, called ``name``: one for each wrong key."""
    found: dict[tuple[str, ...], Problem] = {}
    for mistake in error.errors(include_url=False):
        kind, loc = mistake["type"], mistake["loc"]
        if kind == "missing" and isinstance(loc[-1], int):
            kind, loc = "too_short", loc[:-1]  # the list is wrong as a whole
        path, wanted = _walk(hint, loc)
        if kind in ("extra_forbidden", "missing"):
            path = tuple(map(str, loc))
        path = (name, *path) if name else path
        key, context = ".".join(path), mistake.get("ctx", {})
        if kind == "extra_forbidden":
            fields = getattr(wanted, "model_fields", {})
            # The first setting of a section names the thing itself, if it is a string.
            itself = next((repr(field) for field in list(fields)[:1] if fields[field].annotation is str), "")
            meant = did_you_mean(itself) if path[-1] == "name" else ""
            text = f"unknown key {key!r}{meant or nearest(path[-1], fields)}"
        elif kind == "missing":
            text = f"{key} is missing"
        elif kind == "value_error":
            text = f"{key}: {context['error']}" if key else str(context["error"])
        else:
            required = requirement(wanted) or str(mistake["msg"])
            if kind == "finite_number":
                required = "a finite number"
            elif context.get("le", 0) >= _LARGE:
                required = f"at most {context['le']}"
            given = mistake["input"]
            text = f"{key} must be {required}, got {'nothing' if given is None else repr(given)}"
            if required.startswith("a list") and isinstance(given, str):
                text += f"; a list is written [{given}]"
        inner = getattr(context.get("error"), "args", ("",))[0]
        paths = [(*path, *below) for below in getattr(inner, "paths", ())] or [path]
        found.setdefault(path, Problem(text, *paths))
    return list(found.values())


def _walk(hint: Any, loc: Iterable[str | int]) -> tuple[tuple[str, ...], Any]:
    """The part of ``loc`` that names keys and items of a value of type ``hint``, and the type found there.

    The rest of ``loc`` tells the members of a union apart, which is of no interest to users.
    """
    path = []
    for part in loc:
        bare, _ = _bare(hint)
        origin, items = get_origin(bare), get_args(bare)
        if isinstance(bare, type) and issubclass(bare, BaseModel) and part in bare.model_fields:
            field = bare.model_fields[str(part)]
            hint = Annotated[field.annotation, *field.metadata, None]
        elif origin in LISTS and isinstance(part, int):
            hint = items[part] if _is_fixed(bare) else items[0]
        elif origin in MAPPINGS:
            hint = items[1]
        else:
            break
        path.append(str(part))
    return tuple(path), hint


def requirement(hint: Any) -> str:
    """What a value of the type ``hint`` must be, in words: "a whole number of at least 1"."""
    bare, limits = _bare(hint)
    origin, items = get_origin(bare), get_args(bare)
    if bare is bool:
        return "true or false"
    if bare in (int, float):
        words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
        bounds = {word: getattr(x, key) for x in limits for key, word in words.items() if hasattr(x, key)}
        if bounds.get("at most", 0) >= _LARGE:
            del bounds["at most"]
        parts = [f"{word} {bound:g}" for word, bound in bounds.items()]
        if bounds.keys() == {"of at least", "at most"}:
            parts = [f"between {bounds['of at least']:g} and {bounds['at most']:g}"]
        return f"{'a whole number' if bare is int else 'a number'} {' and '.join(parts)}".rstrip()
    if bare is str:
        patterns = [limit.pattern for limit in limits if getattr(limit, "pattern", None)]
        return f"text that matches {patterns[0]}" if patterns else "text"
    if origin is Literal:
        return f"one of {', '.join(map(str, items))}"
    if origin in UNIONS:
        kinds = [requirement(item) for item in items]
        return ", or ".join(kind.replace(f"values, each {kinds[0]}", "them") for kind in kinds if kind)
    if origin in LISTS:
        least = max((limit.min_length for limit in limits if isinstance(limit, MinLen)), default=0)
        count = f"{len(items)} " if _is_fixed(bare) else "one or more " if least == 1 else ""
        return f"a list of {count}values, each {requirement(items[0])}"
    if origin in MAPPINGS or (isinstance(bare, type) and issubclass(bare, BaseModel | Mapping)):
        return "keys with values"
    return ""


UNIONS = (Union, types.UnionType)
LISTS = (tuple, list, Sequence)
MAPPINGS = (dict, Mapping)


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """``hint`` without ``Annotated`` and ``None``, and the constraints that it was annotated with."""
    limits: tuple[Any, ...] = ()
    while True:
        others = [item for item in get_args(hint) if item is not type(None)]
        if get_origin(hint) is Annotated:
            hint, limits = others[0], (*hint.__metadata__, *limits)
        elif get_origin(hint) in UNIONS and len(others) == 1:
            hint = others[0]
        else:
            return hint, limits


def _is_fixed(hint: Any) -> bool:
    return get_origin(hint) is tuple and ... not in get_args(hint)
