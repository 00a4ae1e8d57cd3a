"""The training loop of the batched PPO: rollouts in lockstep over all environments, then compiled updates.

Arrays are (T, L, S): steps of a rollout, learners of all tasks, streams of a learner. In environments these
are L * S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import NumericalError
from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.learners.finite import Numbering
from compressed_ad.learners.finite_players import number_into
from compressed_ad.learners.ppo import NUMBERED, kernels
from compressed_ad.learners.ppo.vector_code import PADDING, TILE_ROWS
from compressed_ad.seeding import rng, seed64
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import AnyArray, BoolArray, History, IntArray

if TYPE_CHECKING:
    from compressed_ad.learners.ppo import PPOConfig

Float32Array = NDArray[np.float32]


def train(
    cfg: PPOConfig, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int,
    n_learner: int, n_stream: int, seed: int, progress: Progress,
) -> list[History]:  # fmt: skip
    """``BatchedPPO.learn`` for a family and lengths that its ``check`` accepts."""
    encoder = Encoder(family.observation_space)
    assert isinstance(family.action_space, spaces.Discrete)
    first_action = int(family.action_space.start)
    who = [(int(task), k) for task in task_ids for k in range(n_learner)]
    shape = (len(who), n_stream)
    learners = Learners(cfg, encoder, int(family.action_space.n), who, seed)
    visits = np.zeros((len(who), encoder.n_obs or 0), np.int64)
    learner_index = np.arange(len(who))[:, None]

    env_seeds = [rng(seed, "ppo-env", *w).integers(2**63 - 1, size=n_stream) for w in who]
    slots, ids = (np.repeat(rows, n_learner * n_stream, axis=0) for rows in (tasks, task_ids))
    env = checked_slots(family, slots, np.concatenate(env_seeds), ids.tolist())
    obs = env.reset()
    record: dict[str, AnyArray] = {}
    # Without a table, every version of the policy is evaluated twice per step, in tiles of a few rows.
    n_evaluated = 2 * cfg.n_steps * (-(-n_stream // TILE_ROWS) * TILE_ROWS)
    tabular = encoder.n_obs is not None and encoder.n_obs <= n_evaluated
    policy = Policy(learners, encoder, shape, tabular)

    for number, start in enumerate(range(0, n_timesteps, cfg.n_steps)):
        n_step = min(cfg.n_steps, n_timesteps - start)
        rollout = Rollout(n_step, shape, obs)
        learned_reward = np.empty((n_step, *shape), np.float32)
        for t in range(n_step):
            rollout.states[t] = obs
            seen = policy.at(obs)
            kernels.sample(learners.random, seen.probs, seen.rows, rollout.actions[t])
            chosen = learner_index, seen.rows, rollout.actions[t]
            rollout.prob[t], rollout.log_prob[t] = seen.probs[chosen], seen.log_probs[chosen]
            rollout.entropy[t], rollout.value[t] = seen.pick(seen.entropy), seen.pick(seen.value)
            step = env.step(rollout.actions[t].reshape(-1) + first_action)
            rollout.next_states[t] = step.next_obs
            rollout.rewards[t] = learned_reward[t] = step.reward.reshape(shape)
            rollout.terminated[t] = step.terminated.reshape(shape)
            rollout.truncated[t] = step.truncated.reshape(shape)
            if cfg.count_bonus:
                successor = encoder.number(step.next_obs).reshape(shape)
                np.add.at(visits, (learner_index, successor), 1)
                learned_reward[t] += cfg.count_bonus / np.sqrt(visits[learner_index, successor])
            cut = rollout.truncated[t] & ~rollout.terminated[t]
            if cut.any():
                after = policy.at(step.next_obs)
                bootstrap = np.float32(cfg.gamma) * after.pick(after.value)
                learned_reward[t] += np.where(cut, bootstrap, np.float32(0))
            obs = step.obs
            progress(env.num_envs)
        if n_step == cfg.n_steps:
            last = policy.at(obs)
            advantage, target = generalized_advantage(
                learned_reward, rollout.value, rollout.terminated | rollout.truncated, last.pick(last.value),
                cfg.gamma, cfg.gae_lambda,
            )  # fmt: skip
            _check_finite(target.swapaxes(0, 1), family, who, f"returns from step {start}")
            learners.update(encoder, rollout, advantage, target)
            _check_finite(learners.params, family, who, f"PPO's weights after update {number}")
            policy = Policy(learners, encoder, shape, tabular)
            for t in range(n_step):
                seen = policy.at(rollout.states[t])
                rollout.log_prob_next[t] = seen.log_probs[learner_index, seen.rows, rollout.actions[t]]
        rollout.write(record, n_timesteps, start, number, first_action)

    return histories_of_tasks(record, np.repeat(np.arange(n_learner, dtype=np.int32), n_stream))


def _check_finite(array: AnyArray, family: TaskFamily, who: list[tuple[int, int]], what: str) -> None:
    """Raise ``NumericalError`` naming the first task whose part of ``array`` (L, ...) is not finite."""
    fine = np.isfinite(array).reshape(len(array), -1).all(1)
    if not fine.all():
        raise NumericalError(f"{family.name}, task {who[int(np.argmin(fine))][0]}: {what} are not finite")


def generalized_advantage(
    reward: Float32Array, value: Float32Array, done: BoolArray, last_value: Float32Array, gamma: float,
    gae_lambda: float,
) -> tuple[Float32Array, Float32Array]:  # fmt: skip
    """Advantages and returns (T, ...) of a rollout (Schulman et al. 2016, equation 16).

    ``last_value`` (...) is the value of the observation after it. Nothing after ``done``, the end of an
    episode, counts. At a time limit the caller must have added gamma times the value of the terminal
    observation to the reward (Pardo et al. 2018).
    """
    advantage = np.empty_like(reward)
    running = np.zeros_like(last_value)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller names the task with the overflow
        for t in range(len(reward) - 1, -1, -1):
            goes_on = (~done[t]).astype(np.float32)
            delta = reward[t] + gamma * goes_on * last_value - value[t]
            running = delta + gamma * gae_lambda * goes_on * running
            advantage[t], last_value = running, value[t]
        return advantage, advantage + value


class Encoder:
    """Network inputs as in SB3: one-hot codes of discrete components, or the flat numbers of a Box."""

    def __init__(self, space: Any) -> None:
        self._numbering = None if isinstance(space, spaces.Box) else Numbering(space)
        self.n_input = prod(space.shape) if self._numbering is None else int(self._numbering.sizes.sum())
        self.n_obs: int | None = None
        if self._numbering is not None and self._numbering.n <= NUMBERED:
            self.n_obs = self._numbering.n
            self.table = self._ones(self._numbering, self._numbering.digits)  # of all observations, in order

    def number(self, obs: AnyArray) -> NDArray[np.int64]:
        """(N,) number of each discrete observation (N, ...), meaningless if the space is not numbered."""
        numbers = np.empty(len(obs), np.int64)
        assert self._numbering is not None
        number_into(self._numbering, obs, numbers)
        return numbers

    def encode(self, obs: AnyArray) -> tuple[kernels.Features, NDArray[np.int64]]:
        """Features (R, ...), and for each observation (N, ...) its row (N,) in them."""
        if self.n_obs is not None:
            return self.table, self.number(obs)
        rows = np.arange(len(obs))
        if self._numbering is not None:
            self.number(obs)  # raises an error for what lies outside
            return self._ones(self._numbering, obs.reshape(len(obs), -1) - self._numbering.first), rows
        dense = obs.reshape(len(obs), -1).astype(np.float32)
        return kernels.Features(np.empty((len(obs), 0), np.int32), dense), rows

    @staticmethod
    def _ones(numbering: Numbering, digits: AnyArray) -> kernels.Features:
        offsets = np.concatenate([[0], np.cumsum(numbering.sizes)[:-1]])
        return kernels.Features((digits + offsets).astype(np.int32), np.empty((len(digits), 0), np.float32))


class Learners:
    """Networks, optimiser and random state of L learners, named by ``who``: (task id, learner index)."""

    def __init__(
        self, cfg: PPOConfig, encoder: Encoder, n_action: int, who: list[tuple[int, int]], seed: int
    ) -> None:
        self.net = layout(encoder.n_input, n_action, cfg.net_arch)
        self.params = _aligned(len(who), self.net.size)
        for params, w in zip(self.params, who, strict=True):
            # Orthogonal weights with SB3's gains, zero biases (Saxe et al. 2014).
            generator = rng(seed, "ppo", *w)
            for name, array in views(self.net, params, cfg.net_arch).items():
                if name.endswith("weight"):
                    gain: float = {"action_net.weight": 0.01, "value_net.weight": 1.0}.get(name, 2**0.5)
                    n_in, n_out = array.shape
                    q = generator.standard_normal((max(n_in, n_out), min(n_in, n_out)))
                    kernels.orthonormalise(q)
                    array[:] = gain * (q if n_in >= n_out else q.T)
        self.moment1, self.moment2 = _aligned(*self.params.shape), _aligned(*self.params.shape)
        self.n_gradient_step = np.zeros(len(who), np.int64)
        self.random = np.array([seed64(seed, "ppo-kernel", *w) for w in who], np.uint64)
        self.hyper = kernels.Update(**cfg.model_dump(include=set(kernels.Update._fields)))

    def update(
        self, encoder: Encoder, rollout: Rollout, advantage: Float32Array, target: Float32Array
    ) -> Float32Array:
        """One PPO update of every learner; returns the last minibatch's gradient of the last learner."""
        n_step, *shape = advantage.shape
        features, ids = encoder.encode(rollout.states.reshape(-1, *rollout.states.shape[2:]))
        gradient: Float32Array = kernels.update(
            self.net, self.hyper, self.params, self.moment1, self.moment2, self.n_gradient_step, self.random,
            features, ids.reshape(n_step, *shape), rollout.actions, advantage, target, rollout.log_prob,
        )  # fmt: skip
        return gradient


@dataclass(frozen=True)
class Outputs:
    """Network outputs for K observations per learner, and the ``rows`` that each stream sees."""

    rows: NDArray[np.int64]  # (L, S)
    log_probs: Float32Array  # (L, K, n_action)
    probs: Float32Array  # (L, K, n_action)
    entropy: Float32Array  # (L, K) nats
    value: Float32Array  # (L, K)

    def pick(self, table: Float32Array) -> Float32Array:
        """The (L, S) entries of ``table`` (L, K) that the streams see."""
        return np.take_along_axis(table, self.rows, axis=1)


class Policy:
    """The learners' networks at one version, evaluated once on all observations if ``tabular``."""

    def __init__(self, learners: Learners, encoder: Encoder, shape: tuple[int, int], tabular: bool) -> None:
        self._learners, self._encoder, self._shape = learners, encoder, shape
        self._table: Outputs | None = None
        if tabular:
            rows = np.arange(len(encoder.table.ones))
            self._table = self._evaluate(encoder.table, np.broadcast_to(rows, (shape[0], len(rows))).copy())

    def at(self, obs: AnyArray) -> Outputs:
        """Network outputs for one observation per slot, ``obs`` (L * S, ...)."""
        if self._table is not None:
            rows = self._encoder.number(obs).reshape(self._shape)
            return replace(self._table, rows=rows)
        features, rows = self._encoder.encode(obs)
        return self._evaluate(features, rows.reshape(self._shape))

    def _evaluate(self, features: kernels.Features, rows: NDArray[np.int64]) -> Outputs:
        net = self._learners.net
        log_probs, probs = np.empty((2, *rows.shape, net.n_action), np.float32)
        entropy, value = np.empty((2, *rows.shape), np.float32)
        kernels.evaluate(net, self._learners.params, features, rows, log_probs, probs, entropy, value)
        every = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        return Outputs(np.ascontiguousarray(every), log_probs, probs, entropy, value)


class Rollout:
    """The transitions between two updates, (T, L, S); observations are (T, L * S, ...)."""

    def __init__(self, n_step: int, shape: tuple[int, int], obs: AnyArray) -> None:
        full = (n_step, *shape)
        self.states = np.empty((n_step, *obs.shape), obs.dtype)
        self.next_states = np.empty_like(self.states)
        self.actions = np.empty(full, np.int64)
        self.rewards, self.value = np.empty(full, np.float32), np.empty(full, np.float32)
        self.terminated, self.truncated = np.empty(full, np.bool_), np.empty(full, np.bool_)
        self.prob, self.log_prob, self.entropy = np.empty((3, *full), np.float32)
        self.log_prob_next = np.full(full, np.nan, np.float32)

    def write(
        self, record: dict[str, AnyArray], n_timesteps: int, start: int, number: int, first_action: int
    ) -> None:
        """Write into the (L * S, n_timesteps, ...) arrays of ``record``, from step ``start`` on."""
        n_step, *shape = self.rewards.shape
        recorded = ("states", "rewards", "next_states", "terminated", "truncated", "entropy", "log_prob_next")
        arrays = {name: getattr(self, name) for name in recorded} | {
            "actions": self.actions + first_action,
            "action_probs": self.prob,
            "update": np.broadcast_to(np.int32(number), self.rewards.shape),
        }
        for name, array in arrays.items():
            flat = array.reshape(n_step, prod(shape), *(self.states.shape[2:] if "states" in name else ()))
            if name not in record:
                record[name] = np.empty((flat.shape[1], n_timesteps, *flat.shape[2:]), flat.dtype)
            record[name][:, start : start + n_step] = flat.swapaxes(0, 1)


def _aligned(n_row: int, n_column: int) -> Float32Array:
    """Zeros (n_row, n_column) float32 that start on a cache line of 64 bytes."""
    raw = np.zeros(n_row * n_column * 4 + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + n_row * n_column * 4].view(np.float32).reshape(n_row, n_column)


def layout(n_input: int, n_action: int, net_arch: tuple[int, ...]) -> kernels.Net:
    """The places of a learner's parameters in its flat vector."""
    line = 16  # float32 numbers of a cache line
    widths = [-(-w // PADDING) * PADDING for w in net_arch]
    weights, biases, at = [], [], 0
    for before, width in zip([n_input, *widths], widths, strict=False):
        weights.append(at)
        biases.append(at + before * 2 * width)
        at = biases[-1] + 2 * width
    head_bias = at + (n_action + 1) * widths[-1]
    size = -(-(head_bias + n_action + 1) // line) * line
    places = np.array(widths), np.array(weights), np.array(biases)
    return kernels.Net(*places, at, head_bias, max(widths), n_input, n_action, size)


def views(net: kernels.Net, p: Float32Array, net_arch: tuple[int, ...]) -> dict[str, Float32Array]:
    """The unpadded weights (in, out) and biases of one learner's vector ``p``, by SB3's parameter names."""
    out: dict[str, Float32Array] = {}
    before = n_before = net.n_input
    for i, (real, width, at, b_at) in enumerate(
        zip(net_arch, net.widths.tolist(), net.weights.tolist(), net.biases.tolist(), strict=True)
    ):
        matrix = p[at : at + n_before * 2 * width]
        first = matrix.reshape(n_before, 2, width).swapaxes(0, 1)
        halves = matrix.reshape(2, n_before, width) if i else first
        bias = p[b_at : b_at + 2 * width].reshape(2, width)
        for half, kind in enumerate(("policy", "value")):
            out[f"mlp_extractor.{kind}_net.{2 * i}.weight"] = halves[half, :before, :real]
            out[f"mlp_extractor.{kind}_net.{2 * i}.bias"] = bias[half, :real]
        before, n_before = real, width
    head = p[net.head : net.head_bias].reshape(net.n_action + 1, n_before)[:, :before].T
    bias = p[net.head_bias : net.head_bias + net.n_action + 1]
    out["action_net.weight"], out["action_net.bias"] = head[:, : net.n_action], bias[: net.n_action]
    out["value_net.weight"], out["value_net.bias"] = head[:, net.n_action :], bias[net.n_action :]
    return out
