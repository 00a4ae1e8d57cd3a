"""Action distributions from a transformer's output: one head for each kind of action space.

A head is a linear map from vectors (..., D) to the P parameters of a distribution. It also has the operations
on that distribution: loss, sampling, divergence. The distribution of a new head does not depend on its input.
Sampling is done in numpy, in float64, from parameters (N, P).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import scipy
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from compressed_ad.errors import ConfigError, SpaceError
from compressed_ad.models.encoders import action_scale
from compressed_ad.types import AnyArray, FloatArray, SpaceSpec, bounds, sizes, starts

MIN_STD = 0.02
"""Minimum standard deviation of a component of ``MixtureHead``: 1 % of an action's range, scaled to [-1, 1].

Executed actions are clipped, so that many of them are equal: without a minimum the likelihood is unbounded.
"""

N_DRAW = 64
"""Number of draws that estimate ``MixtureHead.divergence``."""

Drawn = tuple[AnyArray, FloatArray]


class Head(nn.Linear, ABC):
    """Base of all heads. ``P`` is ``out_features``."""

    def __init__(self, width: int, n_parameter: int) -> None:
        super().__init__(width, n_parameter)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def loss(
        self, given: Tensor, action: Tensor, valid: Tensor, weight: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood (nats) and accuracy of M actions (M, ...) under ``given`` (M, P).

        Only ``valid`` actions (M,) count, in the loss by their ``weight`` (M,). An accuracy that is not
        defined is NaN.
        """
        share = valid.float() if weight is None else weight * valid
        each = torch.where(valid, self.nll(given.float(), action, smoothing), 0.0)
        loss = (each * share).sum() / share.sum().clamp(min=1e-9)
        return loss, (self.correct(given, action) * valid).sum() / valid.sum()

    def log_prob(self, given: Tensor, action: Tensor) -> Tensor:
        """Log-probability or -density (...), in nats, of actions (..., *shape) under ``given`` (..., P)."""
        return -self.nll(given, action, 0.0)

    @abstractmethod
    def nll(self, given: Tensor, action: Tensor, smoothing: float) -> Tensor:
        """Negative log-likelihood (...); a share ``smoothing`` of the target is spread over all actions."""

    @abstractmethod
    def correct(self, given: Tensor, action: Tensor) -> Tensor:
        """1 where the most likely action is ``action`` (...), else 0; NaN where accuracy is not defined."""

    @abstractmethod
    def act(self, given: FloatArray, temperature: FloatArray, random: Generator | None) -> Drawn:
        """Actions (N, *shape), drawn at ``temperature`` (N, 1), and their action probabilities (N,).

        Without ``random``, the most likely actions. The action probability, in [0, 1], is that of Discrete
        actions, the geometric mean over the components of MultiDiscrete ones, and (density / maximum density)
        to the power 1 / d of continuous ones. Row i depends on row i of ``given`` and the i-th draws alone.
        """

    @abstractmethod
    def blank(self, n: int) -> AnyArray:
        """Placeholder of the shape and dtype of ``n`` actions, for before the first one."""

    def guided(self, shown: Tensor, unmarked: Tensor, guidance: float) -> Tensor:
        """Parameters (..., P): ``shown`` + ``guidance`` times its difference from ``unmarked``."""
        return shown + guidance * (shown - unmarked)

    @abstractmethod
    def divergence(self, given: Tensor, other: Tensor) -> Tensor:
        """KL(given || other) in nats (...) of distributions with parameters (..., P)."""


class MultiCategoricalHead(Head):
    """MultiDiscrete actions: independent choices, the logits of all components one after another.

    An action is correct if all its components are.
    """

    start: Tensor

    def __init__(self, width: int, spec: SpaceSpec, n_mixture: int) -> None:
        super().__init__(width, sum(sizes(spec)))
        self.sizes, self.starts = sizes(spec), starts(spec)
        self.register_buffer("start", torch.tensor(self.starts), persistent=False)

    def nll(self, given: Tensor, action: Tensor, smoothing: float) -> Tensor:
        choice, each = action - self.start, []
        for k, logits in enumerate(torch.split(given, self.sizes, dim=-1)):
            rows, chosen = logits.flatten(0, -2), choice[..., k].flatten()
            found = F.cross_entropy(rows, chosen, label_smoothing=smoothing, reduction="none")
            each.append(found.view(choice.shape[:-1]))
        return torch.stack(each).sum(dim=0)

    def correct(self, given: Tensor, action: Tensor) -> Tensor:
        best = [logits.argmax(dim=-1) for logits in torch.split(given, self.sizes, dim=-1)]
        return (torch.stack(best, dim=-1) + self.start == action).all(dim=-1).float()

    def act(self, given: FloatArray, temperature: FloatArray, random: Generator | None) -> Drawn:
        row = np.arange(len(given))
        uniform = None if random is None else random.random((len(given), len(self.sizes)))
        chosen, chosen_log_probs = [], []
        for k, logits in enumerate(np.split(given, np.cumsum(self.sizes)[:-1], axis=1)):
            log_probs = scipy.special.log_softmax(logits / temperature, axis=1)
            best = log_probs.argmax(axis=1)
            chosen.append(best if uniform is None else _inverted(np.exp(log_probs), uniform[:, k]))
            chosen_log_probs.append(log_probs[row, chosen[-1]])
        return np.stack(chosen, axis=1) + self.starts, np.exp(np.mean(chosen_log_probs, axis=0))

    def blank(self, n: int) -> AnyArray:
        return np.zeros((n, len(self.sizes)), np.int64)

    def divergence(self, given: Tensor, other: Tensor) -> Tensor:
        each = []
        pairs = (torch.split(logits, self.sizes, dim=-1) for logits in (given, other))
        for one, two in zip(*pairs, strict=True):
            reference = one.log_softmax(dim=-1)
            each.append((reference.exp() * (reference - two.log_softmax(dim=-1))).sum(dim=-1))
        return torch.stack(each).sum(dim=0)


class CategoricalHead(MultiCategoricalHead):
    """Discrete actions: P = K logits, one component of a MultiDiscrete action without its axis."""

    def loss(
        self, given: Tensor, action: Tensor, valid: Tensor, weight: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        if weight is not None:
            return super().loss(given, action, valid, weight, smoothing)
        target = (action - self.start).masked_fill(~valid, -100)
        loss = F.cross_entropy(given.float(), target, label_smoothing=smoothing)
        return loss, (given.argmax(dim=-1) == target).sum() / valid.sum()

    def nll(self, given: Tensor, action: Tensor, smoothing: float) -> Tensor:
        return super().nll(given, action[..., None], smoothing)

    def correct(self, given: Tensor, action: Tensor) -> Tensor:
        return super().correct(given, action[..., None])

    def act(self, given: FloatArray, temperature: FloatArray, random: Generator | None) -> Drawn:
        probs = scipy.special.softmax(given / temperature, axis=1)
        chosen = probs.argmax(axis=1) if random is None else _inverted(probs, random.random(len(probs)))
        return chosen + self.starts[0], probs[np.arange(len(probs)), chosen]

    def blank(self, n: int) -> AnyArray:
        return np.zeros(n, np.int64)


class MixtureHead(Head):
    """Continuous actions: a mixture of G diagonal normals (mixture density network: Bishop 1994).

    It is the distribution of the action scaled to [-1, 1] by its bounds (not scaled if it has none), so
    densities and losses are per scaled unit. P = G (1 + 2 d): logits of the weights, means, and parameters
    whose softplus plus ``MIN_STD`` is the standard deviation. Several components are needed to imitate
    clipped actions, which gather at the bounds, and choices, say between left and right.

    A temperature T multiplies the logarithms of weights and densities by 1 / T, component by component:
    logits / T and standard deviations * sqrt(T). Without sampling, the action is the component mean with the
    highest density, an approximation of the mode. Executed actions are clipped to the bounds. Accuracy is not
    defined (NaN), and smoothing is refused (``ConfigError``).
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, spec: SpaceSpec, n_mixture: int) -> None:
        if np.dtype(spec["dtype"]).kind != "f":
            raise SpaceError(f"action space {spec} is not supported: a Box of actions must be of floats")
        centre, spread = action_scale(spec)
        self.n_mixture, self.n_dim = n_mixture, len(centre)
        super().__init__(width, n_mixture * (1 + 2 * self.n_dim))
        self.shape, self.dtype = tuple(spec["shape"]), np.dtype(spec["dtype"])
        self.range = bounds(spec)
        self.scale = centre, spread
        self.register_buffer("centre", torch.from_numpy(centre).float(), persistent=False)
        self.register_buffer("spread", torch.from_numpy(spread).float(), persistent=False)
        # Equal components would get equal gradients and stay equal.
        nn.init.uniform_(self.bias[n_mixture : n_mixture * (1 + self.n_dim)], -0.5, 0.5)

    def parts(self, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (..., G), means and standard deviations (..., G, d)."""
        count = self.n_mixture
        logits, mean, raw = torch.split(given, [count, count * self.n_dim, count * self.n_dim], dim=-1)
        shape = (*given.shape[:-1], count, self.n_dim)
        return logits.log_softmax(dim=-1), mean.view(shape), MIN_STD + F.softplus(raw).view(shape)

    def nll(self, given: Tensor, action: Tensor, smoothing: float) -> Tensor:
        if smoothing:
            raise ConfigError("label_smoothing is for discrete actions; set it to 0 for continuous ones")
        flat = action.reshape(*given.shape[:-1], self.n_dim).to(given.dtype)
        return -self._log_density(given, (flat - self.centre) / self.spread)

    def correct(self, given: Tensor, action: Tensor) -> Tensor:
        return torch.full(given.shape[:-1], math.nan, device=given.device)

    def _log_density(self, given: Tensor, scaled: Tensor) -> Tensor:
        """Log-density (...) of scaled actions (..., d)."""
        weight, mean, std = self.parts(given)
        z = (scaled[..., None, :] - mean) / std
        each = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
        return (weight + each.sum(dim=-1)).logsumexp(dim=-1)

    def act(self, given: FloatArray, temperature: FloatArray, random: Generator | None) -> Drawn:
        weight, mean, std = (part.numpy() for part in self.parts(torch.from_numpy(given).double().cpu()))
        weight = scipy.special.log_softmax(weight / temperature, axis=-1)
        std = std * np.sqrt(temperature)[..., None]
        row = np.arange(len(given))

        def log_density(scaled: FloatArray) -> FloatArray:
            """(N, M) of actions (N, M, d), up to a constant."""
            z = (scaled[:, :, None] - mean[:, None]) / std[:, None]
            each = (-0.5 * z**2 - np.log(std)[:, None]).sum(axis=-1)
            total: FloatArray = scipy.special.logsumexp(weight[:, None] + each, axis=-1)
            return total

        at_means = log_density(mean)
        if random is None:
            scaled = mean[row, at_means.argmax(axis=1)]
        else:
            uniform = random.random((len(given), 1 + self.n_dim))
            chosen = _inverted(np.exp(weight), uniform[:, 0])
            normal = scipy.special.ndtri(uniform[:, 1:].clip(min=2.0**-54))
            scaled = mean[row, chosen] + std[row, chosen] * normal
        below = log_density(scaled[:, None])[:, 0] - at_means.max(axis=1)
        centre, spread = self.scale
        action = np.clip(centre + spread * scaled, *self.range)
        return action.reshape(-1, *self.shape).astype(self.dtype), np.exp(np.minimum(below, 0) / self.n_dim)

    def blank(self, n: int) -> AnyArray:
        return np.zeros((n, *self.shape), self.dtype)

    def guided(self, shown: Tensor, unmarked: Tensor, guidance: float) -> Tensor:
        """Moves the weights and means; the standard deviations are those of ``shown``."""
        moved = super().guided(shown, unmarked, guidance)
        start = self.n_mixture * (1 + self.n_dim)
        return torch.cat([moved[..., :start], shown[..., start:]], dim=-1)

    def divergence(self, given: Tensor, other: Tensor) -> Tensor:
        """The mean over ``N_DRAW`` draws from ``given``, the same draws at every call."""
        generator = torch.Generator(given.device).manual_seed(0)
        weight, mean, std = self.parts(given)
        total = torch.zeros_like(given[..., 0])
        for _ in range(N_DRAW):
            uniform = torch.rand((*given.shape[:-1], 1), generator=generator, device=given.device)
            chosen = (weight.exp().cumsum(dim=-1) < uniform).sum(dim=-1).clamp(max=self.n_mixture - 1)
            at = chosen[..., None, None].expand(*chosen.shape, 1, self.n_dim)
            normal = torch.randn((*chosen.shape, self.n_dim), generator=generator, device=given.device)
            drawn = mean.gather(-2, at)[..., 0, :] + std.gather(-2, at)[..., 0, :] * normal
            total += self._log_density(given, drawn) - self._log_density(other, drawn)
        return total / N_DRAW


def _inverted(probs: FloatArray, uniform: FloatArray) -> AnyArray:
    """(N,) choices from distributions (N, K) by inversion: of their cumulative ones, at ``uniform`` (N,)."""
    below: AnyArray = (probs.cumsum(axis=1) < uniform[:, None]).sum(axis=1)
    return np.asarray(np.minimum(below, probs.shape[1] - 1))


HEAD: dict[str, Callable[[int, SpaceSpec, int], Head]] = {
    "discrete": CategoricalHead,
    "multidiscrete": MultiCategoricalHead,
    "box": MixtureHead,
}
"""Head of each kind of action space; called with width, space and number of mixture components."""
