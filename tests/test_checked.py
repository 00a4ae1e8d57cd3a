"""One checked call: parameters validated by their annotations, from Python and through a registry."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from annotated_types import Ge, MinLen
from numpy.typing import ArrayLike

from compressed_ad.errors import ConfigError, UsageError
from compressed_ad.registry import Parameters, Registry, checked, make
from compressed_ad.settings import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Problem,
    Seed,
    Settings,
    Whole,
    requirement,
    validated,
)


@checked
def marker(
    probs: ArrayLike,
    level: Fraction = 0.5,
    window: Count = 10,
    *,
    causal: bool = False,
    mode: Literal["hard", "soft"] = "hard",
    every: Count | list[Count] = 1,
    bounds: tuple[float, float] | None = None,
    layers: Annotated[tuple[Count, ...], MinLen(1)] = (64,),
    names: Sequence[str] = (),
    policy: str | Callable[..., Any] | None = None,
) -> dict[str, Any]:
    return dict(locals())


@checked
@dataclass(frozen=True)
class Room:
    """A family."""

    name: ClassVar[str] = "room"
    size: Annotated[int, Ge(2)] = 9
    noise: NonNegative = 0.0

    def tasks(self) -> None: ...


@checked
@dataclass(frozen=True)
class Door(Room):
    """One that inherits."""

    name: ClassVar[str] = "door"
    key: bool = False


class Learner:
    """One with keyword arguments of its own."""

    @checked
    def __init__(self, rate: Positive, *, prior: tuple[float, float] = (1, 1), **rest: Any) -> None:
        self.rate, self.prior, self.rest = rate, prior, rest

    def learn(self) -> None: ...


def mistakes(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("level", 1.5, "level must be a number between 0 and 1, got 1.5"),
        ("level", "high", "level must be a number between 0 and 1, got 'high'"),
        ("level", "0.5", "level must be a number between 0 and 1, got '0.5'"),
        ("level", True, "level must be a number between 0 and 1, got True"),
        ("level", None, "level must be a number between 0 and 1, got nothing"),
        ("level", float("nan"), "level must be a finite number, got nan"),
        ("window", 0, "window must be a whole number of at least 1, got 0"),
        ("window", 2.5, "window must be a whole number of at least 1, got 2.5"),
        ("window", 2.0, "window must be a whole number of at least 1, got 2.0"),
        ("window", np.True_, "window must be a whole number of at least 1, got True"),
        ("window", 2**40, "window must be at most 2147483647, got 1099511627776"),
        ("causal", 1, "causal must be true or false, got 1"),
        ("causal", "yes", "causal must be true or false, got 'yes'"),
        ("mode", "sofd", "mode must be one of hard, soft, got 'sofd'"),
        ("every", 0, "every must be a whole number of at least 1, or a list of them, got 0"),
        ("every", [2, 0], "every must be a whole number of at least 1, or a list of them, got [2, 0]"),
        ("bounds", [1.0], "bounds must be a list of 2 values, each a number, got [1.0]"),
        ("bounds", 3, "bounds must be a list of 2 values, each a number, got 3"),
        ("bounds", [0, "a"], "bounds.1 must be a number, got 'a'"),
        (
            "layers",
            [],
            "layers must be a list of one or more values, each a whole number of at least 1, got []",
        ),
        ("layers", [8, 0], "layers.1 must be a whole number of at least 1, got 0"),
        ("names", "ab", "names must be a list of values, each text, got 'ab'"),
        (
            "lewel",
            1,
            "unknown parameter 'lewel' (did you mean 'level'?); it has probs, level, window, causal",
        ),
    ],
)
def test_each_mistake_is_one_short_sentence(key: str, value: Any, words: str) -> None:
    (line,) = mistakes(marker, np.zeros(3), **{key: value})
    assert line.startswith(f"marker: {words}")
    assert isinstance(line, Problem)
    assert line.paths[0][0] == key


def test_mistakes_are_listed_together_and_missing_ones_named() -> None:
    lines = mistakes(marker, level=2, windw=3)
    assert [line.paths[0] for line in lines if isinstance(line, Problem)] == [
        ("level",),
        ("windw",),
        ("probs",),
    ]
    assert lines[2] == "marker: parameter 'probs' is missing"


def test_values_come_as_annotated_and_everything_else_is_passed_through() -> None:
    probs, policy = np.zeros(3, np.float32), marker
    got = marker(probs, np.float64(0.7), window=np.int64(3), bounds=[0, np.float32(1)], policy=policy)
    assert got["probs"] is probs
    assert got["policy"] is policy
    assert (got["level"], got["window"], got["bounds"]) == (0.7, 3, (0.0, 1.0))
    assert [type(got[key]) for key in ("level", "window")] == [float, int]
    assert marker(probs, 1)["level"] == 1.0
    assert marker(probs, every=[1, 2])["every"] == [1, 2]
    with pytest.raises(TypeError, match="multiple values"):
        marker(probs, probs=probs)


def test_classes_and_dataclasses_are_checked_and_inherit_their_annotations() -> None:
    assert mistakes(Room, 1) == ["room: size must be a whole number of at least 2, got 1"]
    assert mistakes(Door, size=1, key=0) == [
        "door: size must be a whole number of at least 2, got 1",
        "door: key must be true or false, got 0",
    ]
    assert mistakes(Room, siez=3) == [
        "room: unknown parameter 'siez' (did you mean 'size'?); it has size, noise"
    ]
    assert Door(3, key=True) == Door(size=3, key=True)
    assert pickle.loads(pickle.dumps(Door(3))) == Door(3)


def test_a_registry_checks_the_same_with_its_own_words() -> None:
    registry: Registry[Any] = Registry("family")
    for name, maker in {"room": Room, "learner": Learner, "marker": marker}.items():
        registry.register(name)(maker)
    assert mistakes(make, registry, "room", {"size": 1, "nose": 2}, "tasks") == [
        "family 'room': size must be a whole number of at least 2, got 1",
        "family 'room': unknown parameter 'nose' (did you mean 'noise'?); it has size, noise",
    ]
    assert make(registry, "room", {"size": np.int32(4)}, "tasks") == Room(4)
    assert make(registry, "learner", {"rate": 1, "prior": [0, 2], "more": 3}, "learn").rest == {"more": 3}
    assert mistakes(make, registry, "learner", {}, "learn") == [
        "family 'learner': parameter 'rate' is missing"
    ]
    with pytest.raises(UsageError, match="which has no 'learn'"):
        make(registry, "room", {}, "learn")


def test_what_users_write_without_annotations_is_not_checked() -> None:
    def plain(level=0.5, causal=False):  # type: ignore[no-untyped-def]
        return level, causal

    assert Parameters(plain).validated({"level": "high", "causal": 1})[1] == []
    assert Parameters(plain, guess=True).validated({"level": "high", "causal": 1})[1] == [
        "level must be a number, got 'high'",
        "causal must be true or false, got 1",
    ]
    assert Parameters(plain, guess=True).validated({"level": None})[1] == []


class Part(Settings):
    """A section."""

    sizes: tuple[Count, ...] = (1,)


class Whole_(Settings):
    """Settings in settings."""

    part: Part = Part()
    rate: Positive = 1.0
    n: Count | None = None


def test_settings_are_told_in_the_same_words() -> None:
    values = {"part": {"sizes": [1, 0], "size": 3}, "rate": True, "n": 0.5}
    with pytest.raises(ConfigError) as caught:
        validated(Whole_, values, "file")
    assert caught.value.problems == [
        "file: part.sizes.1 must be a whole number of at least 1, got 0",
        "file: unknown key 'part.size' (did you mean 'sizes'?)",
        "file: rate must be a number above 0, got True",
        "file: n must be a whole number of at least 1, got 0.5",
    ]
    assert next(p.paths[0] for p in caught.value.problems if isinstance(p, Problem)) == ("part", "sizes", "1")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Whole, "a whole number of at least 0"),
        (Seed, "a whole number of at least 0"),
        (BelowOne, "a number of at least 0 and below 1"),
        (float, "a number"),
        (dict[str, int], "keys with values"),
    ],
)
def test_requirements_in_words(hint: Any, words: str) -> None:
    assert requirement(hint) == words
