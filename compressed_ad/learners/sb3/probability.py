"""The probability of the actions of Stable-Baselines3's algorithms under the policy that chose them.

An ``ActionDistribution`` belongs to one run. At every step it notes what is only known then (exploration
rate, state of the noise, action masks, LSTM states). Before the policy is trained again, it evaluates the
whole rollout at once. Letters: T steps of the rollout, S environments, d dimensions of an action.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import MissingExtraError, UsageError
from compressed_ad.learners.sb3.algorithms import ALGORITHM, REFUSED
from compressed_ad.types import AnyArray, BoolArray

try:
    import torch
    from stable_baselines3.common import noise as kinds
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.td3.policies import TD3Policy
except ImportError as error:
    raise MissingExtraError("compressed_ad.learners.sb3.probability", "sb3") from error

_PIECE = 8192
"""Observations in one forward pass."""

Doubles = NDArray[np.float64]


def epsilon_greedy(greedy: BoolArray, epsilon: AnyArray, n_action: int) -> tuple[Doubles, Doubles]:
    """Probability and entropy (nats) of actions that are ``greedy`` or not, at the rate ``epsilon``."""
    other = np.asarray(epsilon, np.float64) / n_action
    best = 1 - epsilon + other
    entropy = -_x_log_x(best) - (n_action - 1) * _x_log_x(other)
    return np.where(greedy, best, other), np.broadcast_to(entropy, np.shape(greedy))


def _x_log_x(x: Doubles) -> Doubles:
    return x * np.log(np.where(x > 0, x, 1))


def relative_probability(
    action: AnyArray, mean: AnyArray, std: AnyArray | None = None, noise_mean: AnyArray | None = None,
    noise_std: AnyArray | None = None, rounding: AnyArray | float = 1e-6,
) -> Doubles:  # fmt: skip
    """Density of the draw behind ``action``, divided by the highest density, to the power 1/d: in [0, 1].

    ``action`` (..., d) is ``tanh(u) + n`` clipped to [-1, 1], with ``u ~ Normal(mean, std)`` and the
    exploration noise ``n ~ Normal(noise_mean, noise_std)``. Without ``std`` the policy is deterministic and
    gives ``mean``; without ``noise_std`` there is no noise. ``action`` is known up to ``rounding``, and an
    action at a bound may have been clipped: of all draws that give ``action``, the most likely one counts.
    """
    action, mean = np.asarray(action, np.float64), np.asarray(mean, np.float64)
    if std is None and noise_std is None:
        return np.ones(action.shape[:-1])
    low, high = action - rounding, action + rounding
    if noise_std is None:
        with np.errstate(divide="ignore"):
            low, high = (np.arctanh(np.clip(bound, -1, 1)) for bound in (low, high))
        square = ((np.clip(mean, low, high) - mean) / std) ** 2
        return np.asarray(np.exp(-0.5 * square.mean(-1)))
    low, high = np.where(low <= -1, -np.inf, low), np.where(high >= 1, np.inf, high)
    shift, spread = 0.0 if noise_mean is None else noise_mean, np.maximum(noise_std, 1e-8)

    def noise_square(base: Doubles) -> Doubles:
        """z**2 of the most likely noise that leads from ``base`` to the action."""
        centre = base + shift
        return np.asarray(((np.clip(centre, low, high) - centre) / spread) ** 2)

    square = noise_square(mean) if std is None else _smallest_sum(action - shift, mean, std, noise_square)
    return np.asarray(np.exp(-0.5 * square.mean(-1)))


def _smallest_sum(target: Doubles, mean: Doubles, std: Any, noise_square: Any) -> Doubles:
    """Minimum over u of z(u)**2 + z(noise)**2, on a grid that is refined twice.

    The minimiser is bracketed by ``mean`` and the u that needs no noise: outside, both terms grow.
    """
    first, last = mean, np.arctanh(np.clip(target, -1 + 1e-9, 1 - 1e-9))
    share = np.linspace(0, 1, 65).reshape(-1, *(1 for _ in target.shape))
    for _ in range(3):
        grid = first + (last - first) * share
        square = ((grid - mean) / std) ** 2 + noise_square(np.tanh(grid))
        best = square.argmin(0)[None]
        first, last = (np.take_along_axis(grid, np.clip(best + side, 0, 64), 0)[0] for side in (-1, 1))
    return np.asarray(square.min(0))


_NODES = np.linspace(-8, 8, 129)
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


def squashed_entropy(mean: AnyArray, std: AnyArray) -> Doubles:
    """Entropy (...) in nats of tanh(u), u ~ Normal(mean, std) (..., d), by the trapezoidal rule."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    u = mean[..., None] + std[..., None] * _NODES
    log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))  # log of 1 - tanh(u)**2
    return np.asarray((0.5 * np.log(2 * np.pi * np.e) + np.log(std) + log_slope @ _WEIGHTS).sum(-1))


def find_distribution(model: Any) -> ActionDistribution:
    """The action distribution of ``model``; ``UsageError`` if it is not known for this algorithm."""
    if isinstance(model, OnPolicyAlgorithm):
        return OnPolicy(model)
    if isinstance(model, OffPolicyAlgorithm):
        if hasattr(model, "exploration_rate"):
            return _EpsilonGreedy(model)
        gaussian = hasattr(getattr(model, "actor", None), "get_action_dist_params")
        if gaussian or isinstance(model.policy, TD3Policy):
            return _Continuous(model)
    name = type(model).__name__
    reason = f": {REFUSED[name]}" if name in REFUSED else f"; it knows {', '.join(ALGORITHM)}"
    raise UsageError(f"CompressedHistoryCallback cannot record {name}{reason}")


class OnPolicy:
    """Samples of the policy's distribution: PPO, A2C, TRPO, with action masks or an LSTM."""

    has_entropy = True

    def __init__(self, model: Any) -> None:
        self._model, self._recurrent = model, hasattr(model.policy, "lstm_actor")

    def start(self) -> None:
        """Begin a rollout."""
        self._actions: list[AnyArray] = []  # as the policy sampled them
        self._masks: list[AnyArray] = []
        self._begins: list[AnyArray] = []
        if self._recurrent:
            self._memory = tuple(part.clone() for part in self._model._last_lstm_states.pi)

    def note(self, seen: Mapping[str, Any]) -> None:
        """Note a step; ``seen`` are the local variables of SB3's loop."""
        actions, box = np.array(seen["actions"]), isinstance(self._model.action_space, spaces.Box)
        self._actions.append(actions.reshape(len(actions), -1) if box else actions)
        if seen.get("action_masks") is not None:
            self._masks.append(np.array(seen["action_masks"]))
        if self._recurrent:
            self._begins.append(np.array(self._model._last_episode_starts, np.float32))

    def evaluate(self, states: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Probability and entropy (T, S) of the noted actions, chosen in ``states`` (T, S, ...)."""
        probabilities, entropies = [], []
        for distribution, actions in self._distributions(states):
            probabilities.append(self._probability(distribution, actions))
            if (entropy := distribution.entropy()) is not None:
                entropies.append(_numbers(entropy))
        unknown = np.full(states.shape[:2], np.nan)
        return self._rows(probabilities), self._rows(entropies) if entropies else unknown

    def log_prob(self, states: AnyArray) -> AnyArray:
        """Log-probability (T, S) of the noted actions under the policy as it is now."""
        return self._rows([_numbers(d.log_prob(actions)) for d, actions in self._distributions(states)])

    def _probability(self, distribution: Any, actions: torch.Tensor) -> AnyArray:
        space = self._model.action_space
        if not isinstance(space, spaces.Box):
            n_component = 1 if isinstance(space, spaces.Discrete) else len(space.nvec)
            return np.asarray(np.exp(np.minimum(_numbers(distribution.log_prob(actions)), 0) / n_component))
        drawn, mean, std = (
            _numbers(part).reshape(len(actions), -1)
            for part in (actions, distribution.distribution.mean, distribution.distribution.stddev)
        )
        if self._model.policy.squash_output:
            return relative_probability(drawn, mean, std, rounding=float(np.finfo(np.float32).eps))
        return np.asarray(np.exp(-0.5 * (((drawn - mean) / std) ** 2).mean(-1)))

    def _distributions(self, states: AnyArray) -> Iterator[tuple[Any, torch.Tensor]]:
        """The policy's distributions and the noted actions, in pieces of time.

        Within a piece, environments come first, as SB3's LSTM needs its sequences.
        """
        policy, memory = self._model.policy, getattr(self, "_memory", None)
        policy.set_training_mode(False)
        length = max(1, _PIECE // states.shape[1])
        for start in range(0, len(states), length):
            obs, actions, masks, begins = (
                np.concatenate(np.swapaxes(part[start : start + length], 0, 1)) if len(part) else None
                for part in (states, self._actions, self._masks, self._begins)
            )
            with torch.no_grad():
                observed = policy.obs_to_tensor(obs)[0]
                if self._recurrent:
                    episode = torch.as_tensor(begins, device=policy.device)
                    distribution, memory = policy.get_distribution(observed, memory, episode)
                else:
                    masked = () if masks is None else (masks,)
                    distribution = policy.get_distribution(observed, *masked)
            yield distribution, torch.as_tensor(actions, device=policy.device)

    def _rows(self, pieces: list[AnyArray]) -> AnyArray:
        """(T, S) of pieces whose environments come first."""
        return np.concatenate([piece.reshape(self._model.n_envs, -1).T for piece in pieces])


def _numbers(tensor: torch.Tensor) -> AnyArray:
    return np.asarray(tensor.detach().cpu().numpy(), np.float64)


def _warming_up(model: Any, seen: Mapping[str, Any]) -> bool:
    """Whether the last actions were uniform draws from the action space, before learning starts."""
    before = model.num_timesteps - model.n_envs
    return before < seen["learning_starts"] and not (model.use_sde and model.use_sde_at_warmup)


def _in_pieces(states: AnyArray) -> Iterator[AnyArray]:
    flat = states.reshape(-1, *states.shape[2:])
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))


class _EpsilonGreedy:
    """The action of highest value, or any action at the exploration rate: DQN, QR-DQN."""

    has_entropy = True

    def __init__(self, model: Any) -> None:
        self._model = model

    def start(self) -> None:
        self._actions: list[AnyArray] = []
        self._rates: list[float] = []

    def note(self, seen: Mapping[str, Any]) -> None:
        self._actions.append(np.array(seen["actions"]))
        # SB3 draws once for all environments, which leaves the chance of each unchanged.
        self._rates.append(1.0 if _warming_up(self._model, seen) else self._model.exploration_rate)

    def evaluate(self, states: AnyArray) -> tuple[AnyArray, AnyArray | None]:
        policy, actions = self._model.policy, np.stack(self._actions)
        with torch.no_grad():
            observed = (policy.obs_to_tensor(piece)[0] for piece in _in_pieces(states))
            best = [policy._predict(obs, deterministic=True).cpu().numpy() for obs in observed]
        greedy = actions == np.concatenate(best).reshape(actions.shape)
        rates = np.array(self._rates)[:, None]
        return epsilon_greedy(greedy, rates, int(self._model.action_space.n))


class _Continuous:
    """An actor in [-1, 1]**d, squashed Gaussian or deterministic, and exploration noise.

    SAC, TQC and CrossQ; TD3 and DDPG. With gSDE the Gaussian is the marginal one, as in the algorithm's loss.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sampled = hasattr(getattr(model, "actor", None), "get_action_dist_params")
        self.has_entropy = self._sampled and model.action_noise is None
        space = model.action_space
        low, high = (np.asarray(bound, np.float64).ravel() for bound in (space.low, space.high))
        size = 1 + 2 * np.maximum(np.abs(low), np.abs(high)) / (high - low)
        self._rounding = 2 * np.finfo(np.float32).eps * size  # of scaling to the units of the space and back

    def start(self) -> None:
        self._actions: list[AnyArray] = []
        self._uniform: list[bool] = []
        self._noise: list[tuple[AnyArray, AnyArray]] = []
        self._next = self._coming_noise(np.zeros(self._model.n_envs, bool))

    def note(self, seen: Mapping[str, Any]) -> None:
        self._actions.append(np.array(seen["buffer_actions"], np.float64).reshape(self._model.n_envs, -1))
        self._uniform.append(_warming_up(self._model, seen))
        if self._next is not None:
            self._noise.append(self._next)
            self._next = self._coming_noise(seen["dones"])

    def evaluate(self, states: AnyArray) -> tuple[AnyArray, AnyArray | None]:
        actions, uniform = np.stack(self._actions), np.array(self._uniform)
        with torch.no_grad():
            pieces = [self._actor(piece) for piece in _in_pieces(states)]
        mean = np.concatenate([mean for mean, _ in pieces]).reshape(actions.shape)
        deviations = [std for _, std in pieces if std is not None]
        std = np.concatenate(deviations).reshape(actions.shape) if deviations else None
        noise_mean, noise_std = (
            np.stack([step[k] for step in self._noise]) if self._noise else None for k in (0, 1)
        )
        probability = relative_probability(actions, mean, std, noise_mean, noise_std, self._rounding)
        probability[uniform] = 0
        if std is None or not self.has_entropy:
            return probability, None
        entropy = squashed_entropy(mean, std)
        entropy[uniform] = actions.shape[-1] * np.log(2)
        return probability, entropy

    def _actor(self, states: AnyArray) -> tuple[AnyArray, AnyArray | None]:
        """Mean and deviation before squashing, or the deterministic action and None."""
        actor, observed = self._model.actor, self._model.policy.obs_to_tensor(states)[0]
        if not self._sampled:
            return _numbers(actor(observed)), None
        mean, log_std, extra = actor.get_action_dist_params(observed)
        normal = actor.action_dist.proba_distribution(mean, log_std, **extra).distribution
        return _numbers(normal.mean), _numbers(normal.stddev)

    def _coming_noise(self, done: BoolArray) -> tuple[AnyArray, AnyArray] | None:
        """Mean and deviation (S, d) of the next noise; where ``done``, the noise is reset first."""
        noise = self._model.action_noise
        if noise is None:
            return None
        noises = noise.noises if isinstance(noise, kinds.VectorizedActionNoise) else [noise]
        normals = [_next_noise(one, bool(ended)) for one, ended in zip(noises, done, strict=True)]
        shape = (len(normals), len(self._rounding))
        mean, std = (
            np.stack([np.broadcast_to(part, shape[1:]) for part in parts]).astype(np.float64)
            for parts in zip(*normals, strict=True)
        )
        return mean, std


ActionDistribution = OnPolicy | _EpsilonGreedy | _Continuous
"""From which an algorithm draws its actions; all have the methods of ``OnPolicy``, without ``log_prob``."""


def _next_noise(noise: Any, done: bool) -> tuple[AnyArray, AnyArray]:
    """Mean and deviation of the next ``noise``; NaN for other types, as a subclass may draw differently."""
    if type(noise) is kinds.NormalActionNoise:
        return noise._mu, noise._sigma
    if (
        type(noise) is kinds.OrnsteinUhlenbeckActionNoise
    ):  # given the noise before it, the next one is Gaussian
        first = np.zeros_like(noise._mu) if noise.initial_noise is None else noise.initial_noise
        last = first if done else noise.noise_prev
        return last + noise._theta * (noise._mu - last) * noise._dt, noise._sigma * np.sqrt(noise._dt)
    return np.array(np.nan), np.array(np.nan)
