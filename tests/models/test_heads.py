"""Heads against independent computations: losses, densities, draws, divergences; scipy where it has them."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats

from compressed_ad.errors import ConfigError, SpaceError
from compressed_ad.models.heads import HEAD, MIN_STD, Head, MixtureHead
from compressed_ad.models.settings import ModelConfig
from compressed_ad.types import to_spec

BOUNDED = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32))
SPACES = {
    "discrete": spaces.Discrete(5),
    "discrete from 3": spaces.Discrete(4, start=3),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "multidiscrete from 1": spaces.MultiDiscrete([2, 3], start=[1, -1]),
    "box": BOUNDED,
    "box without bounds": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "box of two axes": spaces.Box(-1.0, 1.0, (2, 2), np.float32),
}


def head(space: spaces.Space, n_mixture: int = 3) -> Head:
    spec = to_spec(space)
    return HEAD[spec["kind"]](8, spec, n_mixture)


def parameters(made: Head, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, made.out_features, generator=torch.Generator().manual_seed(seed)).double()


def elements(space: spaces.Space, n: int, seed: int = 0) -> np.ndarray:
    space.seed(seed)
    return np.stack([space.sample() for _ in range(n)])


def log_density(made: Head, space: spaces.Space, row: np.ndarray, action: np.ndarray) -> float:
    """Log-probability, or log-density of the scaled action, of one action, written out with scipy."""
    if isinstance(space, spaces.Discrete):
        return float(special.log_softmax(row)[action - space.start])
    if isinstance(space, spaces.MultiDiscrete):
        ends = np.cumsum(space.nvec)[:-1]
        parts = zip(np.split(row, ends), action - space.start, strict=True)
        return float(sum(special.log_softmax(logits)[choice] for logits, choice in parts))
    assert isinstance(made, MixtureHead)
    flat, low, high = action.ravel().astype(float), space.low.ravel(), space.high.ravel()
    if space.is_bounded():
        flat = 2 * (flat - low) / (high - low) - 1
    g, d = made.n_mixture, flat.size
    weights, means, raw = special.softmax(row[:g]), row[g : g + g * d], row[g + g * d :]
    stds = MIN_STD + np.log1p(np.exp(raw))
    terms = [
        weights[k]
        * stats.multivariate_normal(means[k * d : (k + 1) * d], np.diag(stds[k * d : (k + 1) * d] ** 2)).pdf(
            flat
        )
        for k in range(g)
    ]
    return math.log(sum(terms))


@pytest.mark.parametrize("name", SPACES)
def test_losses_are_those_of_scipy(name: str) -> None:
    space, made = SPACES[name], head(SPACES[name])
    given_, actions = parameters(made, 12), elements(space, 12)
    expected = [log_density(made, space, row, a) for row, a in zip(given_.numpy(), actions, strict=True)]
    target = torch.as_tensor(actions)
    np.testing.assert_allclose(made.log_prob(given_, target).numpy(), expected, rtol=1e-5, atol=1e-5)
    valid = torch.arange(12) < 9
    weight = torch.rand(12, generator=torch.Generator().manual_seed(1))
    loss, accuracy = made.loss(given_.float(), target, valid, None, 0.0)
    assert float(loss) == pytest.approx(-np.mean(expected[:9]), rel=1e-4)
    loss, _ = made.loss(given_.float(), target, valid, weight, 0.0)
    share = (weight * valid).numpy()
    assert float(loss) == pytest.approx(-(share * expected).sum() / share.sum(), rel=1e-4)
    best, _ = made.act(given_.float().numpy(), np.ones((12, 1)), None)
    right = (best.reshape(12, -1) == actions.reshape(12, -1)).all(axis=1)[:9].mean()
    assert float(accuracy) == pytest.approx(right) or (isinstance(space, spaces.Box) and accuracy.isnan())


@pytest.mark.parametrize("name", SPACES)
def test_a_new_head_does_not_look_at_its_input(name: str) -> None:
    made = head(SPACES[name])
    seen = made(torch.randn(2, 8))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("name", ["discrete from 3", "multidiscrete from 1"])
def test_choices_come_as_often_as_they_are_probable(name: str, temperature: float) -> None:
    """A chi-squared test over all actions at level 1e-4, with a fixed seed: it cannot fail by chance anew."""
    space, made = SPACES[name], head(SPACES[name])
    row, n = 0.5 * parameters(made, 1).numpy(), 20000
    drawn, probability = made.act(
        np.repeat(row, n, axis=0), np.full((n, 1), temperature), np.random.default_rng(3)
    )
    flat = drawn.reshape(n, -1)
    every, place, count = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    actions = every[:, 0] if isinstance(space, spaces.Discrete) else every
    assert len(every) == (space.n if isinstance(space, spaces.Discrete) else space.nvec.prod())
    cold = np.exp([log_density(made, space, row[0] / temperature, a) for a in actions])
    assert stats.chisquare(count, n * cold).pvalue > 1e-4
    width = flat.shape[1]
    np.testing.assert_allclose(probability, cold[place.ravel()] ** (1 / width), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_continuous_draws_follow_their_density(temperature: float) -> None:
    """Kolmogorov and Smirnov's test of each coordinate at level 1e-4; component by component at 1 / T."""
    space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    made = head(space)
    row, n = parameters(made, 1, seed=5).numpy(), 8000
    drawn, probability = made.act(
        np.repeat(row, n, axis=0), np.full((n, 1), temperature), np.random.default_rng(3)
    )
    weights = special.softmax(row[0, :3] / temperature)
    means, stds = row[0, 3:9].reshape(3, 2), MIN_STD + np.log1p(np.exp(row[0, 9:].reshape(3, 2)))
    stds = stds * math.sqrt(temperature)

    for k in range(2):

        def cdf(x: np.ndarray, k: int = k) -> np.ndarray:
            return sum(weights[g] * stats.norm(means[g, k], stds[g, k]).cdf(x) for g in range(3))

        assert stats.kstest(drawn[:, k], cdf).pvalue > 1e-4

    def density(x: np.ndarray) -> np.ndarray:
        each = [weights[g] * stats.norm(means[g], stds[g]).pdf(x).prod(axis=-1) for g in range(3)]
        return np.sum(each, axis=0)

    relative = np.minimum(density(drawn) / density(means).max(), 1) ** 0.5
    np.testing.assert_allclose(probability, relative, rtol=1e-6)
    mode, certain = made.act(row, np.full((1, 1), temperature), None)
    np.testing.assert_allclose(mode[0], means[density(means).argmax()])
    assert certain == [1.0]


def test_executed_actions_lie_within_the_bounds_and_draws_belong_to_rows() -> None:
    made = head(BOUNDED)
    given_ = 3 * parameters(made, 50).numpy()
    drawn, probability = made.act(given_, np.ones((50, 1)), np.random.default_rng(0))
    assert drawn.dtype == np.float32 and drawn.shape == (50, 2)
    assert (drawn >= BOUNDED.low).all() and (drawn <= BOUNDED.high).all() and (drawn == BOUNDED.low).any()
    assert ((probability >= 0) & (probability <= 1)).all()
    fewer, _ = made.act(given_[:20], np.ones((20, 1)), np.random.default_rng(0))
    np.testing.assert_array_equal(fewer, drawn[:20])


@pytest.mark.parametrize("name", ["discrete", "multidiscrete"])
def test_divergences_of_choices_are_those_of_scipy(name: str) -> None:
    made = head(SPACES[name])
    a, b = parameters(made, 6), parameters(made, 6, seed=1)
    ends = np.cumsum([5] if name == "discrete" else [3, 4])[:-1]

    def entropy(x: np.ndarray, y: np.ndarray) -> float:
        pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
        return sum(stats.entropy(special.softmax(p), special.softmax(q)) for p, q in pairs)

    expected = [entropy(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(made.divergence(a, b), expected)


def test_divergence_of_mixtures_by_quadrature() -> None:
    """One dimension. 64 draws of log-ratios that spread by about 1: within 5 standard errors."""
    space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    made = head(space)
    a, b = parameters(made, 40, seed=2), parameters(made, 40, seed=3)

    def exact(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
        grid = np.linspace(-15, 15, 20001)[:, None]
        log_p, log_q = (
            made._log_density(torch.from_numpy(x)[None], torch.from_numpy(grid)).numpy() for x in (p, q)
        )
        weight, gap = np.exp(log_p), log_p - log_q
        mean = integrate.trapezoid(weight * gap, grid[:, 0])
        return mean, integrate.trapezoid(weight * (gap - mean) ** 2, grid[:, 0])

    found = made.divergence(a, b).numpy()
    for own, pair in zip(found, zip(a.numpy(), b.numpy(), strict=True), strict=True):
        mean, variance = exact(*pair)
        assert abs(own - mean) < 5 * math.sqrt(variance / 64) + 1e-3
    np.testing.assert_array_equal(made.divergence(a, a), 0)
    np.testing.assert_array_equal(made.divergence(a, b), found)


def test_guidance_moves_weights_and_means_but_not_spreads() -> None:
    made = head(BOUNDED)
    shown, unmarked = parameters(made, 4), parameters(made, 4, seed=1)
    moved = made.guided(shown, unmarked, 1.5)
    torch.testing.assert_close(moved[:, :9], shown[:, :9] + 1.5 * (shown[:, :9] - unmarked[:, :9]))
    assert torch.equal(moved[:, 9:], shown[:, 9:])


def test_smoothing_is_for_choices_only() -> None:
    continuous = {"action_space": to_spec(BOUNDED), "label_smoothing": 0.1}
    with pytest.raises(ValueError, match="label_smoothing is for discrete actions"):
        ModelConfig.model_validate(continuous)
    made = head(BOUNDED)
    action = torch.as_tensor(elements(BOUNDED, 3))
    with pytest.raises(ConfigError, match="label_smoothing"):
        made.loss(parameters(made, 3), action, torch.ones(3, dtype=torch.bool), None, 0.1)
    choices = head(SPACES["multidiscrete"])
    given_, action = parameters(choices, 3), torch.tensor([[0, 1], [2, 3], [1, 0]])
    loss, _ = choices.loss(given_, action, torch.ones(3, dtype=torch.bool), None, 0.2)
    expected = 0.0
    for row, pair in zip(given_.numpy(), action.numpy(), strict=True):
        for logits, choice in zip(np.split(row, [3]), pair, strict=True):
            wanted = np.full(len(logits), 0.2 / len(logits)) + 0.8 * np.eye(len(logits))[choice]
            expected -= (wanted * special.log_softmax(logits)).sum() / 3
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_actions_of_whole_numbers_in_a_box_are_refused() -> None:
    with pytest.raises(SpaceError, match="must be of floats"):
        head(spaces.Box(0, 255, (2,), np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["discrete", "many", "box"]))
def test_any_head_acts_within_its_space_and_scores_what_it_did(n: int, d: int, seed: int, kind: str) -> None:
    made_of = {
        "discrete": spaces.Discrete(n, start=seed - 50),
        "many": spaces.MultiDiscrete([n] * d, start=[seed - 50] * d),
        "box": spaces.Box(-1.0 - seed, 0.5 * n, (d,), np.float32),
    }
    space = made_of[kind]
    made = head(space, n_mixture=n)
    given_ = parameters(made, 7, seed).float()
    for random in (None, np.random.default_rng(seed)):
        actions, probability = made.act(given_.numpy(), np.full((7, 1), 0.7), random)
        assert all(space.contains(action) for action in actions)
        assert ((probability >= 0) & (probability <= 1)).all()
        assert torch.isfinite(made.log_prob(given_, torch.as_tensor(actions))).all()
    assert made.blank(3).shape == actions[:3].shape and made.blank(3).dtype == actions.dtype
