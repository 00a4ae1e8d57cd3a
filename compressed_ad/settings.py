"""Settings, and what is said about a wrong one. Imports no torch.

Each section of the configuration is a ``Settings`` class in the room that it configures. Mistakes are
worded here, in one place: for settings, and for the parameters of ``registry.checked`` functions.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compressed_ad.errors import ConfigError, nearest

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Whole = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]

_LARGE = 2**31 - 1
"""Upper limits from here on are mentioned only to whoever exceeds them."""


def _refuse_infinite(values: dict[str, Any]) -> dict[str, Any]:
    bad = {key: value for key, value in values.items() if not _is_finite(value)}
    if bad:
        raise Mistake(f"numbers must be finite, got {bad}", *bad)
    return values


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


FreeParameters = Annotated[dict[str, Any], AfterValidator(_refuse_infinite)]
"""Parameters of something with a name, validated by what has that name."""


class Mistake(ValueError):
    """For validators of settings: ``message``, which is about these ``keys``."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


class Settings(BaseModel):
    """Base of every section: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_number(cls, value: Any, field: ValidationInfo) -> Any:
        """``episodes: true`` is a mistake, not 1."""
        if isinstance(value, bool) and cls.model_fields[field.field_name or ""].annotation is not bool:
            raise PydanticCustomError("truth_value", "not a truth value")
        return value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError([p.within(type(self).__name__) for p in problems(type(self), error)]) from None

    # Pydantic would otherwise call ``__init__`` for settings in settings, and nobody could tell the path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


S = TypeVar("S", bound=Settings)


class Problem(str):
    """One mistake in a sentence, with the paths of the keys that it is about."""

    paths: tuple[tuple[str, ...], ...]

    def __new__(cls, text: str, *paths: Iterable[str]) -> Problem:
        """``text`` about the keys at ``paths``."""
        problem = super().__new__(cls, text)
        problem.paths = tuple(map(tuple, paths))
        return problem

    def within(self, where: str) -> Problem:
        """The same mistake, prefixed by ``where``."""
        return Problem(f"{where}: {self}", *self.paths)


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """``values`` as settings of a ``kind``; ``ConfigError`` lists all mistakes, prefixed by ``where``."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([problem.within(where) for problem in problems(kind, error)]) from None


def problems(hint: Any, error: ValidationError, name: str = "") -> list[Problem]:
    """The mistakes in a value of the type ``hint``, one for each key; the value itself is called ``name``."""
    found: dict[tuple[str, ...], Problem] = {}
    for mistake in error.errors(include_url=False):
        loc = mistake["loc"]
        if mistake["type"] == "missing" and isinstance(loc[-1], int):
            loc = loc[:-1]  # a tuple that is too short is wrong as a whole
        path, wanted = _walk(hint, loc)
        if mistake["type"] in ("extra_forbidden", "missing"):
            path = tuple(map(str, loc))
        path = (name, *path) if name else path
        keys = getattr(mistake.get("ctx", {}).get("error"), "keys", ())
        paths = [(*path, key) for key in keys] or [path]
        found.setdefault(path, Problem(_sentence(".".join(path), wanted, mistake), *paths))
    return list(found.values())


def _sentence(key: str, wanted: Any, mistake: Mapping[str, Any]) -> str:
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{nearest(str(mistake['loc'][-1]), getattr(wanted, 'model_fields', ()))}"
    if kind == "missing" and not isinstance(mistake["loc"][-1], int):
        return f"{key} is missing"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    if kind == "finite_number":
        must = "a finite number"
    elif kind == "less_than_equal" and context["le"] >= _LARGE:
        must = f"at most {context['le']}"
    else:
        must = requirement(wanted) or mistake["msg"]
    return f"{key} must be {must}, got {value!r}"


def _walk(hint: Any, loc: Iterable[str | int]) -> tuple[tuple[str, ...], Any]:
    """As much of ``loc`` as leads to keys and items of a ``hint``, and the type of what it leads to."""
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
        return ("a whole number" if bare is int else "a number") + _range(limits)
    if bare is str:
        patterns = [limit.pattern for limit in limits if getattr(limit, "pattern", None)]
        return f"text that matches {patterns[0]}" if patterns else "text"
    if origin is Literal:
        return f"one of {', '.join(map(str, items))}"
    if origin in UNIONS:
        words = [requirement(item) for item in items if item is not type(None)]
        return ", or ".join(word.replace(f"values, each {words[0]}", "them") for word in words)
    if origin in LISTS:
        least = max((limit.min_length for limit in limits if isinstance(limit, MinLen)), default=0)
        count = f"{len(items)} " if _is_fixed(bare) else "one or more " if least == 1 else ""
        return f"a list of {count}values, each {requirement(items[0])}"
    if origin in MAPPINGS or (isinstance(bare, type) and issubclass(bare, BaseModel | Mapping)):
        return "keys with values"
    return ""


def _range(limits: Iterable[Any]) -> str:
    """`` of at least 1``, `` between 0 and 1``, ..."""
    bounds = {
        word: getattr(limit, key) for limit in limits for key, word in _BOUNDS.items() if hasattr(limit, key)
    }
    if bounds.get("at most", 0) >= _LARGE:
        del bounds["at most"]
    if bounds.keys() == {"of at least", "at most"}:
        return f" between {bounds['of at least']:g} and {bounds['at most']:g}"
    return "".join(
        f"{' and' if k else ''} {word} {bound:g}" for k, (word, bound) in enumerate(bounds.items())
    )


_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
UNIONS = (Union, types.UnionType)
LISTS = (tuple, list, Sequence)
MAPPINGS = (dict, Mapping)


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """``hint`` without ``Annotated`` and without ``None``; and what it was annotated with."""
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
