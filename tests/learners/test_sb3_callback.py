"""What the callback records, against environments that keep a log and policies kept at every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from gymnasium import spaces
from hypothesis import given
from scipy.integrate import quad
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.learners.sb3.callback import CompressedHistoryCallback
from compressed_ad.learners.sb3.probability import epsilon_greedy, relative_probability, squashed_entropy
from compressed_ad.marking.markers import threshold

N_ENV = 3
RECORDED = ("states", "actions", "rewards", "next_states", "terminated", "truncated")


class Witness(gymnasium.Env):
    """Episodes of random length with random observations, which note what happened before SB3 touches it.

    Odd environments end by a time limit, even ones terminate; lengths differ, so ends are staggered.
    """

    def __init__(self, index, action_space, observation_space=None):
        self.observation_space = observation_space or spaces.Box(-10, 10, (2,))
        self.action_space, self.index, self.log = action_space, index, []
        self.generator = np.random.default_rng(index)

    def observe(self):
        space = self.observation_space
        if isinstance(space, spaces.Box) and space.dtype == np.uint8:
            return self.generator.integers(256, size=space.shape, dtype=np.uint8)
        if isinstance(space, spaces.Discrete):
            return self.generator.integers(space.n)
        return self.generator.normal(size=space.shape).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.time, self.length = 0, self.generator.integers(1, 6)
        self.obs = self.observe()
        return self.obs.copy(), {}

    def step(self, action):
        before, self.time = self.obs, self.time + 1
        self.obs = self.observe()
        end, reward = self.time == self.length, float(self.generator.normal())
        ended = (end and self.index % 2 == 0, end and self.index % 2 == 1)
        self.log.append((before, np.array(action), reward, self.obs.copy(), *ended))
        return self.obs.copy(), reward, *ended, {}

    def action_masks(self):
        """Which of the actions 0 to 3 are possible: never the one that follows from the observation."""
        return np.arange(4) != int(abs(self.obs[0]) * 10) % 4


def witnesses(action_space, observation_space=None, n_env=N_ENV):
    return DummyVecEnv([lambda i=i: Witness(i, action_space, observation_space) for i in range(n_env)])


class Keeper(BaseCallback):
    """Keeps, at every step, the policy and everything else that decided about the action."""

    def _on_training_start(self):
        self.kept: list[dict[str, Any]] = getattr(self, "kept", [])
        self.noise_before = self._noise_now()

    def _noise_now(self):
        noise = getattr(self.model, "action_noise", None)
        noises = getattr(noise, "noises", [noise])
        return np.array([n.noise_prev for n in noises]) if hasattr(noises[0], "noise_prev") else None

    def _on_step(self):
        model, seen = self.model, self.locals
        distribution = getattr(getattr(model, "actor", None), "action_dist", None)
        self.kept.append(
            {
                "policy": copy.deepcopy(model.policy.state_dict()),
                "n_updates": model._n_updates,
                "obs": np.array(model._last_obs),
                "actions": np.array(seen["actions"]),
                "scaled": np.array(seen.get("buffer_actions", 0)),
                "rate": getattr(model, "exploration_rate", None),
                "warm": model.num_timesteps - N_ENV < getattr(model, "learning_starts", 0),
                "masks": seen.get("action_masks"),
                "lstm": copy.deepcopy(getattr(model, "_last_lstm_states", None)),
                "begins": np.array(model._last_episode_starts, np.float32),
                "drawn": copy.deepcopy(getattr(distribution, "gaussian_actions", None)),
                "noise_before": self.noise_before,
            }
        )
        self.noise_before = self._noise_now()
        if self.noise_before is not None:
            self.noise_before[seen["dones"]] = 0
        return True

    def _on_training_end(self):
        self.last = copy.deepcopy(self.model.policy.state_dict())


@dataclass
class Case:
    """An algorithm on a kind of actions."""

    name: str
    action_space: gymnasium.Space
    kwargs: dict[str, Any] = field(default_factory=dict)
    policy: str = "MlpPolicy"

    def model(self, env=None):
        library = stable_baselines3 if hasattr(stable_baselines3, self.name) else sb3_contrib
        kwargs = {"policy_kwargs": {"net_arch": [8]}, "learning_rate": 0.01, **self.kwargs}
        env = env or witnesses(self.action_space)
        return getattr(library, self.name)(self.policy, env, seed=0, device="cpu", **kwargs)


FOUR, PAIR, BOX = spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.Box(-0.5, 0.5, (2,))
SHIFTED = spaces.Box(np.array([-1.0, 3.0], np.float32), np.array([2.0, 4.0], np.float32))
ROLLOUT = {"n_steps": 8, "batch_size": 12}
LSTM = {"policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 6}}
OFF = {"batch_size": 8, "buffer_size": 500, "learning_starts": 12}


def normal(sigma=0.3):
    return NormalActionNoise(np.zeros(2), np.full(2, sigma))


def wander():
    return OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.5), dt=0.5)


CASES = {
    "PPO-discrete": Case("PPO", FOUR, ROLLOUT),
    "PPO-multidiscrete": Case("PPO", PAIR, ROLLOUT),
    "PPO-box": Case("PPO", BOX, ROLLOUT),
    "PPO-gsde": Case("PPO", BOX, {**ROLLOUT, "use_sde": True, "sde_sample_freq": 3}),
    "A2C": Case("A2C", FOUR),
    "A2C-squashed": Case(
        "A2C", SHIFTED, {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}
    ),
    "TRPO-discrete": Case("TRPO", FOUR, ROLLOUT),
    "TRPO-box": Case("TRPO", BOX, ROLLOUT),
    "RecurrentPPO-discrete": Case("RecurrentPPO", FOUR, {**ROLLOUT, **LSTM}, "MlpLstmPolicy"),
    "RecurrentPPO-box": Case("RecurrentPPO", BOX, {**ROLLOUT, **LSTM}, "MlpLstmPolicy"),
    "MaskablePPO": Case("MaskablePPO", FOUR, ROLLOUT),
    "DQN": Case("DQN", FOUR, {**OFF, "exploration_fraction": 0.8, "target_update_interval": 9}),
    "QRDQN": Case("QRDQN", FOUR, {**OFF, "exploration_fraction": 0.8, "gradient_steps": -1}),
    "SAC": Case("SAC", SHIFTED, OFF),
    "SAC-noise": Case("SAC", SHIFTED, {**OFF, "action_noise": normal()}),
    "SAC-gsde": Case("SAC", SHIFTED, {**OFF, "use_sde": True, "train_freq": 4}),
    "TQC": Case("TQC", SHIFTED, {**OFF, "train_freq": 2, "gradient_steps": 3}),
    "CrossQ": Case("CrossQ", SHIFTED, {**OFF, "policy_delay": 1}),
    "TD3": Case("TD3", SHIFTED, {**OFF, "action_noise": normal()}),
    "TD3-quiet": Case("TD3", SHIFTED, OFF),
    "TD3-wander": Case("TD3", SHIFTED, {**OFF, "action_noise": wander(), "train_freq": 3}),
    "DDPG": Case("DDPG", SHIFTED, {**OFF, "action_noise": normal(0.05)}),
}


def test_every_algorithm_has_a_case():
    assert {case.name for case in CASES.values()} == set(ALGORITHM)


@dataclass
class Run:
    """A finished run: what was recorded, what the environments saw, what the policies were."""

    case: Case
    env: DummyVecEnv
    history: Any
    kept: list[dict[str, Any]]
    last: dict[str, Any]

    @property
    def warm(self):
        return np.array([step["warm"] for step in self.kept])


@pytest.fixture(scope="module")
def runs():
    """Runs by name, made when first asked for."""
    made: dict[str, Run] = {}

    def get(name):
        if name not in made:
            case, env = CASES[name], witnesses(CASES[name].action_space)
            callback, keeper = CompressedHistoryCallback(), Keeper()
            case.model(env).learn(32 * N_ENV, [callback, keeper], log_interval=None)
            made[name] = Run(case, env, callback.history(), keeper.kept, keeper.last)
        return made[name]

    return get


def assert_is_what_was_seen(history, env):
    for i, witness in enumerate(env.envs):
        for name, truth in zip(RECORDED, zip(*witness.log, strict=True), strict=True):
            recorded = getattr(history, name)[i]
            np.testing.assert_array_equal(recorded, np.array(truth, dtype=recorded.dtype), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_it_records_what_happened(name, runs):
    run = runs(name)
    history = run.history
    assert history.rewards.shape[0] == N_ENV
    assert_is_what_was_seen(history, run.env)
    assert history.terminated[0].any() and history.truncated[1].any()
    assert not (history.terminated & history.truncated).any()
    space = run.case.action_space
    assert all(space.contains(action) for action in history.actions.reshape(-1, *space.shape))
    versions = np.unique([step["n_updates"] for step in run.kept], return_inverse=True)[1]
    np.testing.assert_array_equal(history.update, np.broadcast_to(versions, history.update.shape))
    assert versions[-1] > 2


# ---------------------------------------------------------------- probabilities, by kind


def distributions(run, states=None):
    """The policy's distribution at every step, as SB3 gives it; ``states``: other policies than kept."""
    policy = run.case.model().policy
    policy.set_training_mode(False)
    for k, step in enumerate(run.kept):
        policy.load_state_dict(step["policy"] if states is None else states[k])
        extra = []
        if step["lstm"] is not None:
            extra = [step["lstm"].pi, torch.as_tensor(step["begins"])]
        elif step["masks"] is not None:
            extra = [step["masks"]]
        with torch.no_grad():
            got = policy.get_distribution(torch.as_tensor(step["obs"]), *extra)
        yield (got[0] if step["lstm"] is not None else got), torch.as_tensor(step["actions"])


ON_POLICY = [name for name in CASES if "n_steps" in CASES[name].kwargs or CASES[name].name == "A2C"]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_probabilities(name, runs):
    run = runs(name)
    expected, entropy = [], []
    for law, actions in distributions(run):
        if isinstance(run.case.action_space, spaces.Box):
            drawn = torch.arctanh(actions) if name == "A2C-squashed" else actions
            z = (drawn - law.distribution.mean) / law.distribution.stddev
            expected.append(torch.exp(-0.25 * (z**2).sum(1)).numpy())
        else:
            n_component = 2 if isinstance(run.case.action_space, spaces.MultiDiscrete) else 1
            expected.append((law.log_prob(actions) / n_component).exp().numpy())
        entropy.append(np.full(N_ENV, np.nan) if name == "A2C-squashed" else law.entropy().numpy())
    rtol = 5e-3 if name == "A2C-squashed" else 1e-4  # the Gaussian draw is known from its tanh only
    np.testing.assert_allclose(run.history.action_probs, np.array(expected).T, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(run.history.entropy, np.array(entropy).T, rtol=1e-4, atol=1e-6)
    assert np.ptp(run.history.action_probs) > 0.1


@pytest.mark.parametrize("name", ON_POLICY)
def test_log_prob_next_is_that_of_the_next_policy(name, runs):
    """The next policy sees the same rollout; an LSTM starts it in the state in which it began."""
    run = runs(name)
    later = [step["policy"] for step in run.kept] + [run.last]
    update = run.history.update[0]
    after = [later[np.searchsorted(update, u, side="right")] for u in update]
    if run.kept[0]["lstm"] is not None:
        policy = run.case.model().policy
        for k, step in enumerate(run.kept):
            policy.load_state_dict(after[k])
            if k == 0 or update[k] != update[k - 1]:
                memory = step["lstm"].pi
            step["lstm"] = step["lstm"]._replace(pi=memory)
            with torch.no_grad():
                obs, begins = torch.as_tensor(step["obs"]), torch.as_tensor(step["begins"])
                memory = policy.get_distribution(obs, memory, begins)[1]
    expected = [law.log_prob(actions).numpy() for law, actions in distributions(run, after)]
    np.testing.assert_allclose(run.history.log_prob_next, np.array(expected).T, rtol=1e-4, atol=1e-5)
    assert np.abs(np.exp(run.history.log_prob_next) - run.history.action_probs).max() > 1e-3


@pytest.mark.parametrize("name", ["DQN", "QRDQN"])
def test_epsilon_greedy_probabilities(name, runs):
    run = runs(name)
    policy = run.case.model().policy
    for t, step in enumerate(run.kept):
        policy.load_state_dict(step["policy"])
        with torch.no_grad():
            obs = torch.as_tensor(step["obs"])
            values = policy.q_net(obs) if name == "DQN" else policy.quantile_net(obs).mean(1)
        rate = 1.0 if step["warm"] else step["rate"]
        table = np.full((N_ENV, 4), rate / 4)
        table[np.arange(N_ENV), values.argmax(1)] += 1 - rate
        found = run.history.action_probs[:, t]
        np.testing.assert_allclose(found, table[np.arange(N_ENV), step["actions"]], rtol=1e-6)
        logs = np.log(table, where=table > 0, out=np.zeros_like(table))
        np.testing.assert_allclose(run.history.entropy[:, t], -(table * logs).sum(1), rtol=1e-5)
    assert run.warm.any() and (run.history.action_probs[:, run.warm] == 0.25).all()
    rates = [step["rate"] for step in run.kept if not step["warm"]]
    assert max(rates) > 0.5 and min(rates) < 0.2
    assert run.history.log_prob_next is None


def gaussian(run):
    """Mean and deviation before squashing at every step, by SB3's own distribution of a policy kept then."""
    model = run.case.model()
    model.policy.set_training_mode(False)
    for step in run.kept:
        model.policy.load_state_dict(step["policy"])
        with torch.no_grad():
            model.actor(torch.as_tensor(step["obs"]))
        normal = model.actor.action_dist.distribution
        yield step, normal.mean.numpy(), normal.stddev.numpy()


@pytest.mark.parametrize("name", ["SAC", "TQC", "CrossQ", "SAC-gsde"])
def test_squashed_gaussian_probabilities(name, runs):
    run = runs(name)
    for t, (step, mean, std) in enumerate(gaussian(run)):
        found = run.history.action_probs[:, t]
        if step["warm"]:
            assert (found == 0).all()
            assert run.history.entropy[:, t] == pytest.approx(2 * np.log(2))
            continue
        drawn = np.arctanh(step["scaled"]) if step["drawn"] is None else step["drawn"].numpy()
        expected = np.exp(-0.25 * (((drawn - mean) / std) ** 2).sum(1))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
        generator = np.random.default_rng(0)
        many = mean + std * generator.normal(size=(4000, *mean.shape))
        density = -0.5 * ((many - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        surprise = -(density - np.log(1 - np.tanh(many) ** 2 + 1e-12)).sum(-1)
        tolerance = 5 * surprise.std(0) / np.sqrt(4000)
        assert (np.abs(surprise.mean(0) - run.history.entropy[:, t]) < tolerance).all()
    assert run.warm.sum() == 4 and (run.history.action_probs[:, ~run.warm] > 0).all()


def test_a_squashed_gaussian_with_noise(runs):
    """The likeliest pair of draws that gives the action is no less likely than the pair that was drawn."""
    run = runs("SAC-noise")
    for t, (step, mean, std) in enumerate(gaussian(run)):
        if step["warm"]:
            continue
        u = step["drawn"].numpy()
        noise = step["scaled"] - np.tanh(u)
        drawn = np.exp(-0.25 * (((u - mean) / std) ** 2 + (noise / 0.3) ** 2).sum(1))
        found = run.history.action_probs[:, t]
        assert (found >= drawn - 1e-5).all() and (found <= 1).all()
        grid = np.linspace(-6, 6, 20001)[:, None, None]
        rest = step["scaled"] - np.tanh(grid)
        square = ((grid - mean) / std) ** 2 + (rest / 0.3) ** 2
        np.testing.assert_allclose(found, np.exp(-0.25 * square.min(0).sum(1)), rtol=1e-3, atol=1e-5)
    assert run.history.entropy is None


@pytest.mark.parametrize("name", ["TD3", "TD3-quiet", "TD3-wander", "DDPG"])
def test_noise_probabilities(name, runs):
    run = runs(name)
    model = run.case.model()
    for t, step in enumerate(run.kept):
        found = run.history.action_probs[:, t]
        model.policy.load_state_dict(step["policy"])
        with torch.no_grad():
            best = model.actor(torch.as_tensor(step["obs"])).numpy()
        if step["warm"]:
            assert (found == 0).all()
        elif name == "TD3-quiet":
            assert (found == 1).all()
            np.testing.assert_allclose(step["scaled"], best, atol=1e-5)
        else:
            mean, std = 0, {"TD3": 0.3, "DDPG": 0.05}.get(name)
            if name == "TD3-wander":  # x + theta * (0 - x) * dt, sigma * sqrt(dt)
                mean, std = step["noise_before"] * (1 - 0.15 * 0.5), 0.5 * np.sqrt(0.5)
            centre = best + mean
            # What is cut at a bound stands for everything beyond.
            centre = np.where(np.abs(step["scaled"]) < 1, centre, np.clip(centre, -1, 1))
            expected = np.exp(-0.25 * (((step["scaled"] - centre) / std) ** 2).sum(1))
            np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert run.history.entropy is None and run.history.log_prob_next is None


# ---------------------------------------------------------------- formulas

unit = st.floats(-0.999, 0.999)
means, stds = st.floats(-3, 3), st.floats(0.05, 4)


@given(st.booleans(), st.floats(0, 1), st.integers(2, 9))
def test_epsilon_greedy_is_a_distribution(greedy, rate, n):
    best, other = (epsilon_greedy(np.array(g), np.array(rate), n)[0] for g in (True, False))
    assert best + (n - 1) * other == pytest.approx(1)
    assert 0 <= other <= best <= 1
    assert 0 <= epsilon_greedy(np.array(greedy), np.array(rate), n)[1] <= np.log(n) + 1e-9


@given(unit, means, stds, st.floats(0.01, 1))
def test_relative_probability_of_one_dimension(action, mean, std, noise):
    def of(**kwargs):
        return relative_probability(np.array([action]), np.array([mean]), rounding=0.0, **kwargs)

    squashed = np.exp(-0.5 * ((np.arctanh(action) - mean) / std) ** 2)
    assert of(std=np.array([std])) == pytest.approx(squashed)
    both = of(std=np.array([std]), noise_std=np.array([noise]))
    grid = np.linspace(-8, 8, 40001)
    square = ((grid - mean) / std) ** 2 + ((action - np.tanh(grid)) / noise) ** 2
    assert both == pytest.approx(np.exp(-0.5 * square.min()), rel=1e-2, abs=1e-6)
    # Noise that hardly moves the action changes little; beside a nearly certain policy, it is all there is.
    assert of(std=np.array([std]), noise_std=np.array([1e-6])) == pytest.approx(squashed, rel=1e-2, abs=1e-6)
    alone = np.exp(-0.5 * ((action - np.tanh(mean)) / noise) ** 2)
    assert of(std=np.array([1e-6]), noise_std=np.array([noise])) == pytest.approx(alone, rel=1e-2, abs=1e-6)


@given(st.lists(st.tuples(unit, means, stds), min_size=1, max_size=4))
def test_relative_probability_does_not_shrink_with_dimensions(draws):
    action, mean, std = np.array(draws).T
    each = [relative_probability(*(np.array([x]) for x in draw)) for draw in draws]
    assert relative_probability(action, mean, std) == pytest.approx(np.prod(each) ** (1 / len(draws)))
    assert relative_probability(np.tanh(mean), mean, std) == pytest.approx(1)


def test_what_rounding_hides_counts_as_likely():
    """tanh(9) and tanh(12) are the same float32: the policy that wanted 12 got what it wanted."""
    action, std = np.array([np.tanh(np.float32(9))]), np.array([0.1])
    assert relative_probability(action, np.array([12.0]), std) == 1
    assert relative_probability(action, np.array([2.0]), std) < 1e-6


@given(means, stds)
def test_entropy_of_a_squashed_gaussian(mean, std):
    def log_density(u):
        return -0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)

    def integrand(u):
        log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
        return -np.exp(log_density(u)) * (log_density(u) - log_slope)

    exact = quad(integrand, mean - 12 * std, mean + 12 * std, points=[mean], limit=200)[0]
    assert squashed_entropy(np.array([mean]), np.array([std])) == pytest.approx(exact, abs=1e-4)


# ---------------------------------------------------------------- other spaces, other ways to run


@pytest.mark.parametrize(
    "space",
    [spaces.Box(0, 255, (7, 7, 3), np.uint8), spaces.Box(0, 255, (3, 5, 6), np.uint8), spaces.Discrete(9)],
    ids=["channels last", "channels first", "discrete"],
)
def test_images_are_recorded_as_the_environment_has_them(space):
    env, callback = witnesses(FOUR, space), CompressedHistoryCallback()
    A2C("MlpPolicy", env, seed=0, device="cpu").learn(10 * N_ENV, callback)
    history = callback.history()
    assert history.states.shape == history.next_states.shape == (N_ENV, 10, *space.shape)
    assert history.states.dtype == space.dtype
    assert_is_what_was_seen(history, env)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", ["A2C", "DQN"])
def test_learning_that_goes_on(name, reset):
    """A second ``learn`` goes on where the first ended, or begins anew after cutting what was under way."""
    case, callback = CASES[name], CompressedHistoryCallback()
    env = witnesses(case.action_space)
    model = case.model(env)
    model.learn(31 * N_ENV, callback)
    first = callback.history()
    model.learn(150 * N_ENV, callback, reset_num_timesteps=reset)
    history = callback.history()
    n = first.n_step
    np.testing.assert_array_equal(history.states[:, :n], first.states)
    np.testing.assert_array_equal(history.action_probs[:, :n], first.action_probs)
    broken = (history.next_states[:, :-1] != history.states[:, 1:]).any(-1)
    np.testing.assert_array_equal(broken, history.episode_end[:, :-1])
    assert history.episode_end[:, n - 1].all() == reset
    lasting = np.ones_like(history.truncated)
    lasting[:, n - 1] = False
    for i, witness in enumerate(env.envs):
        np.testing.assert_array_equal(history.rewards[i], np.float32([step[2] for step in witness.log]))
        truncated = np.array([step[5] for step in witness.log])
        np.testing.assert_array_equal(history.truncated[i][lasting[i]], truncated[lasting[i]])
    assert (np.diff(history.update) >= 0).all()


def test_one_environment_trained_by_episodes():
    env, callback = witnesses(SHIFTED, n_env=1), CompressedHistoryCallback()
    kwargs = {"learning_starts": 4, "batch_size": 4, "buffer_size": 100, "policy_kwargs": {"net_arch": [4]}}
    model = SAC(
        "MlpPolicy", env, train_freq=(1, "episode"), gradient_steps=-1, seed=0, device="cpu", **kwargs
    )
    model.learn(30, callback)
    history = callback.history()
    assert_is_what_was_seen(history, env)
    new = np.diff(history.update[0]) > 0
    assert new.sum() > 3
    assert not (new & ~history.episode_end[0, :-1]).any()


def test_the_mask_is_the_guides_rule():
    callback = CompressedHistoryCallback(on_policy_threshold=0.3, compression_window=2)
    CASES["A2C"].model().learn(40 * N_ENV, callback)
    history = callback.history()
    np.testing.assert_array_equal(history.compression_mask, threshold(history.action_probs, 0.3, 2))
    assert history.compression_mask.any() and not history.compression_mask.all()


class OwnNoise(NormalActionNoise):
    """May draw in any way."""


def test_unknown_noise_is_unknown_probability():
    callback = CompressedHistoryCallback()
    noise = OwnNoise(np.zeros(2), np.ones(2))
    TD3("MlpPolicy", witnesses(SHIFTED), learning_starts=6, action_noise=noise, buffer_size=99).learn(
        6 * N_ENV, callback
    )
    history = callback.history()
    assert (history.action_probs[:, :2] == 0).all() and np.isnan(history.action_probs[:, 2:]).all()
    assert history.compression_mask is None


class Forgetful(VecEnvWrapper):
    """Gives no terminal observation."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, _ = self.venv.step_wait()
        return obs, rewards, dones, [{} for _ in dones]


def test_what_the_callback_refuses():
    with pytest.raises(UsageError, match="nothing was recorded"):
        CompressedHistoryCallback().history()
    with pytest.raises(ConfigError, match="compression_window"):
        CompressedHistoryCallback(compression_window=0)

    def refused(error, message, model, n_timesteps=24):
        callback = CompressedHistoryCallback()
        with pytest.raises(error, match=message) as caught:
            model.learn(n_timesteps, callback)
        assert "\n" not in str(caught.value)

    case = CASES["A2C"]
    refused(UsageError, "VecNormalize", case.model(VecNormalize(witnesses(FOUR))))
    refused(UsageError, "terminal_observation", case.model(Forgetful(witnesses(FOUR))))
    random_search = sb3_contrib.ARS("LinearPolicy", witnesses(FOUR, n_env=1), n_delta=1)
    refused(UsageError, "cannot record ARS: random search plays whole episodes", random_search)
    mixed = spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
    model = PPO("MultiInputPolicy", witnesses(FOUR, mixed, n_env=1), n_steps=8, batch_size=8)
    model._last_obs, model.env.reset = None, lambda: {"a": np.zeros((1, 2), np.float32)}
    refused(SpaceError, "observations in a Dict space cannot be recorded", model)

    callback = CompressedHistoryCallback()
    case.model().learn(5 * N_ENV, callback)
    with pytest.raises(UsageError, match="one run"):
        case.model().learn(5 * N_ENV, callback)


class Drift(gymnasium.Env):
    """Whole numbers in ``reset``, doubles in ``step``; if ``blind``, nothing is ever seen. 10 steps each."""

    action_space = spaces.Box(-1, 1, (2, 2), np.float32)
    observation_space = spaces.Box(-9, 9, (1,), np.float32)

    def __init__(self, blind=False):
        self.blind = blind

    def _seen(self):
        return np.zeros(1, int) if self.blind or not self.t else np.array([self.t / 4])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._seen(), {}

    def step(self, action):
        self.t += 1
        return self._seen(), 1.0, False, self.t == 10, {}


class Raw(DummyVecEnv):
    """Stacks what its environments give, as a SubprocVecEnv does."""

    def _stacked(self, obs):
        return np.stack([env.unwrapped._seen() for env in self.envs]) if obs is not None else obs

    def reset(self):
        return self._stacked(super().reset())

    def step_wait(self):
        obs, *others = super().step_wait()
        return self._stacked(obs), *others


def test_a_column_has_the_dtype_of_the_space_not_of_its_first_row():
    callback = CompressedHistoryCallback()
    PPO("MlpPolicy", Raw([Drift]), n_steps=8, batch_size=8, n_epochs=1, seed=0).learn(8, callback)
    history = callback.history()
    np.testing.assert_array_equal(history.states[0, :, 0], np.arange(8) / 4)
    np.testing.assert_array_equal(history.next_states[0, :, 0], np.arange(1, 9) / 4)
    # Box actions of two dimensions are recorded, and have probabilities.
    assert history.actions.shape == (1, 8, 2, 2)
    assert np.isfinite(history.log_prob_next).all() and np.isfinite(history.entropy).all()
    assert (history.action_probs > 0).all()


@pytest.mark.parametrize(("reset", "lengths"), [(True, [10, 5, 10]), (False, [10, 10, 10])])
@pytest.mark.parametrize("kind", [PPO, SAC])
def test_a_reset_is_told_not_seen(reset, lengths, kind):
    callback = CompressedHistoryCallback()
    sizes = {"n_steps": 15, "batch_size": 15, "n_epochs": 1} if kind is PPO else {"learning_starts": 99}
    model = kind("MlpPolicy", Drift(blind=True), **sizes)
    model.learn(15, callback)
    model.learn(15, callback, reset_num_timesteps=reset)
    ends = np.flatnonzero(callback.history().episode_end[0])
    assert np.diff([-1, *ends]).tolist() == lengths


def test_observations_that_do_not_fit_are_told_at_that_step():
    class Wide(Raw):
        def _stacked(self, obs):
            return np.zeros((1, 2), np.float32) if self.envs[0].unwrapped.t == 3 else super()._stacked(obs)

    model = PPO("MlpPolicy", Raw([Drift]), n_steps=8, batch_size=8)
    model.env = model.env if isinstance(model.env, Wide) else Wide([Drift])
    with pytest.raises(SpaceError, match="step 2: observations are float32"):
        model.learn(8, CompressedHistoryCallback())
