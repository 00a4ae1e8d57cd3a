"""Settings: each section of the configuration is a class of its own, in the room that it configures.

An unknown key is an error. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from compressed_ad.errors import ConfigError, nearest

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Whole = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]


class Settings(BaseModel):
    """Base of every section: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, field: ValidationInfo) -> Any:
        """``episodes: true`` is a mistake, not 1."""
        if isinstance(value, bool) and cls.model_fields[field.field_name or ""].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """``values`` as settings of a ``kind``; ``ConfigError`` lists all mistakes, prefixed by ``where``."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([f"{where}: {problem}" for problem in problems(kind, error)]) from None


def problems(kind: type[Settings], error: ValidationError) -> Iterator[str]:
    """One line for each mistake in a validation error: the key, what is wrong, the nearest known key."""
    return (text for _, text in located_problems(kind, error))


def located_problems(kind: type[Settings], error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    """The same with the path of the key that each line is about."""
    for mistake in error.errors():
        path = tuple(str(part) for part in mistake["loc"])
        key = ".".join(path)
        if mistake["type"] == "extra_forbidden":
            yield path, f"unknown key {key!r}{nearest(path[-1], _keys(kind, list(path[:-1])))}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            got = "" if mistake["type"] in ("missing", "value_error") else f", got {mistake['input']!r}"
            yield path, f"{key}: {message}{got}" if key else message


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The known keys of the section that ``path`` leads to."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)
