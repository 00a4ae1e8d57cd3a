"""Spaces as plain data, and what a model makes of their elements."""

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.evaluation.agents import RandomAgent
from compressed_ad.models.encoders import ImageStem, SpaceEncoder, action_stem, observation_stem
from compressed_ad.types import cast, channels_first, features, from_spec, is_image, shape_of, to_spec


def boxes() -> st.SearchStrategy[spaces.Box]:
    """Boxes of any shape up to three axes, of floats or bytes, some of whose components have no bound."""

    @st.composite
    def box(draw: st.DrawFn) -> spaces.Box:
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        if draw(st.booleans()):
            return spaces.Box(0, draw(st.integers(1, 255)), shape, np.uint8)
        random = np.random.default_rng(draw(st.integers(0, 999)))
        low = random.uniform(-100, 100, shape)
        high = low + random.uniform(0.5, 50, shape)
        share = draw(st.sampled_from([0.0, 0.3, 1.0]))
        low[random.random(shape) < share] = -np.inf
        high[random.random(shape) < share] = np.inf
        dtype = draw(st.sampled_from([np.float32, np.float64]))
        return spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)

    return box()


def numbers() -> st.SearchStrategy[spaces.Space]:
    """Discrete and MultiDiscrete spaces, from any number on."""
    one = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-5, 5))
    pairs = st.lists(st.tuples(st.integers(1, 5), st.integers(-3, 3)), min_size=1, max_size=4)
    return one | pairs.map(lambda p: spaces.MultiDiscrete([n for n, _ in p], start=[s for _, s in p]))


@settings(max_examples=60, deadline=None)
@given(boxes() | numbers())
def test_descriptions_survive_json_and_give_the_space_back(space: spaces.Space) -> None:
    spec = json.loads(json.dumps(to_spec(space), allow_nan=False))
    assert spec == to_spec(space) and from_spec(spec) == space and shape_of(spec) == space.shape


def test_descriptions_are_short_and_stay_what_they_were() -> None:
    assert to_spec(spaces.Discrete(5)) == {"kind": "discrete", "n": 5}
    assert to_spec(spaces.MultiDiscrete([9, 9])) == {"kind": "multidiscrete", "nvec": [9, 9]}
    image = to_spec(spaces.Box(0, 255, (84, 84, 4), np.uint8))
    assert image == {"kind": "box", "shape": [84, 84, 4], "dtype": "uint8", "low": 0, "high": 255}
    with pytest.raises(SpaceError, match="not supported"):
        to_spec(spaces.Text(3))


def test_images_and_their_channels() -> None:
    shapes = {(7, 7, 3): False, (84, 84, 4): False, (4, 84, 84): True, (3, 8, 6): True, (5, 5, 5): False}
    for shape, first in shapes.items():
        spec = to_spec(spaces.Box(0, 255, shape, np.uint8))
        assert is_image(spec) and channels_first(spec) == first
        image = np.arange(2 * np.prod(shape)).reshape(2, *shape)
        rows = features(spec, image)
        channel = image[:, 0] if first else image[..., 0]
        np.testing.assert_array_equal(rows[:, 0], channel.ravel())
    assert not is_image(to_spec(spaces.Box(-1, 1, (3,)))) and not is_image(to_spec(spaces.Discrete(3)))


@settings(max_examples=60, deadline=None)
@given(boxes() | numbers(), st.integers(0, 99))
def test_every_space_has_vectors(space: spaces.Space, seed: int) -> None:
    """Finite, of the right shape, different for different numbers; padding is no element and does no harm."""
    torch.manual_seed(seed)
    spec = to_spec(space)
    stem = observation_stem(spec)
    encoder = SpaceEncoder(spec, 6, getattr(stem, "n_feature", None))
    space.seed(seed)
    x = torch.as_tensor(np.stack([space.sample() for _ in range(6)]))
    batch = x.view(2, 3, *x.shape[1:])
    vectors = encoder(stem(batch))
    assert vectors.shape == (2, 3, 6) and torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors[1, 2], encoder(stem(x[5:6]))[0])
    assert torch.isfinite(encoder(stem(torch.zeros_like(batch)))).all()
    if not isinstance(space, spaces.Box):
        assert len({tuple(v.tolist()) for v in vectors.flatten(0, 1)}) == len(x.unique(dim=0))
        total = space.n if isinstance(space, spaces.Discrete) else space.nvec.sum()
        assert len(encoder.vectors()) == total


@settings(max_examples=40, deadline=None)
@given(boxes() | numbers(), st.integers(0, 99))
def test_the_random_agent_plays_in_any_bounded_space(space: spaces.Space, seed: int) -> None:
    if isinstance(space, spaces.Box) and not space.is_bounded():
        with pytest.raises(UsageError, match="not bounded"):
            RandomAgent(space)
        return
    actions = RandomAgent(space, seed).act(np.zeros(9))
    assert all(space.contains(action) for action in actions)


def test_the_random_agent_is_uniform() -> None:
    box = spaces.Box(np.array([-2.0, 5.0], np.float32), np.array([2.0, 6.0], np.float32))
    drawn = RandomAgent(box).act(np.zeros(4000))
    # Four standard errors of the mean of a uniform distribution.
    assert (abs(drawn.mean(axis=0) - [0.0, 5.5]) < 4 * np.array([4, 1]) / np.sqrt(12 * 4000)).all()
    np.testing.assert_array_equal(
        RandomAgent(5, seed=3).act(np.zeros(50)), RandomAgent(spaces.Discrete(5), seed=3).act(np.zeros(50))
    )


def test_vectors_are_standardised_and_cut_off() -> None:
    spec = to_spec(spaces.Box(-np.inf, np.inf, (3,), np.float64))
    stem = observation_stem(spec, mean=[1.0, -100.0, 7.0], std=[2.0, 50.0, 0.0])
    x = torch.tensor([[3.0, 0.0, 7.5], [1e6, -100.0, 7.0]])
    torch.testing.assert_close(stem(x), torch.tensor([[1.0, 2.0, 0.5], [10.0, 0.0, 0.0]]))
    torch.testing.assert_close(observation_stem(spec)(x), x)  # nothing is known: as it is
    with pytest.raises(ConfigError, match="expected 3 numbers"):
        observation_stem(spec, mean=[1.0], std=[1.0])


def test_actions_are_scaled_by_their_bounds() -> None:
    low, high = np.array([-2.0, 0.0, -np.inf], np.float32), np.array([2.0, 10.0, 1.0], np.float32)
    stem = action_stem(to_spec(spaces.Box(low, high)))
    x = torch.tensor([[-2.0, 10.0, -30.0], [1.0, 5.0, 0.5]])
    torch.testing.assert_close(stem(x), torch.tensor([[-1.0, 1.0, -30.0], [0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 9, 6), (40, 30, 1), (5, 4, 4)])
def test_images_of_both_orders_are_one_to_the_stem(shape: tuple[int, ...]) -> None:
    """Channels moved to the other end give the same features; bytes are scaled or standardised."""
    first = shape[0] < shape[2]
    other = (*shape[1:], shape[0]) if first else (shape[2], *shape[:2])
    image = torch.randint(0, 256, (4, 2, *shape), dtype=torch.uint8)
    moved = image.movedim(-3, -1) if first else image.movedim(-1, -3)
    spec, other_spec = (to_spec(spaces.Box(0, 255, s, np.uint8)) for s in (shape, other))
    for scale in ({}, {"mean": [100.0] * min(shape[0], shape[2]), "std": [50.0] * min(shape[0], shape[2])}):
        torch.manual_seed(0)
        stem = observation_stem(spec, **scale)
        assert isinstance(stem, ImageStem)
        out = stem(image)
        assert out.shape == (4, 2, stem.n_feature) and not torch.equal(out[0, 0], out[1, 0])
        if channels_first(other_spec) != first:
            torch.manual_seed(0)
            torch.testing.assert_close(observation_stem(other_spec, **scale)(moved), out)
    torch.manual_seed(0)
    unit = observation_stem(to_spec(spaces.Box(0.0, 1.0, shape, np.float32)))
    torch.manual_seed(0)
    torch.testing.assert_close(unit(image.float() / 255), observation_stem(spec)(image), rtol=1e-4, atol=1e-5)


def test_boxes_of_truth_values_are_refused_with_what_to_do():
    with pytest.raises(SpaceError, match=r"Box of dtype bool \(3,\) is not supported; make it Box\(0, 1"):
        to_spec(spaces.Box(0, 1, (3,), bool))


@given(
    st.sampled_from(["u1", "i1", "i2", "i8", "f4", "f8", "?"]),
    st.sampled_from(["u1", "i8", "f4", "?"]),
    st.data(),
)
def test_a_cast_changes_nothing_or_is_refused(given_dtype, wanted, data):
    values = data.draw(
        st.lists(st.sampled_from([0, 1, 0.5, 3, -1, 255, 300, np.nan]), min_size=1, max_size=4)
    )
    with np.errstate(invalid="ignore"):
        array = np.array(values).astype(given_dtype)
    result = cast(array, np.dtype(wanted))
    with np.errstate(invalid="ignore"):
        exact = wanted == "f4" or np.array_equal(array.astype(float), array.astype(wanted).astype(float))
    assert (result is not None) == (exact and (given_dtype == "?" or wanted != "?"))
    if result is not None:
        assert result.dtype == wanted
        np.testing.assert_array_equal(result.astype(float), array.astype("f4").astype(float))
