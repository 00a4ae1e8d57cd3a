from __future__ import annotations

import copy
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from compressed_ad.errors import ConfigError, UnknownNameError, UsageError
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.learners.sb3 import CompressedHistoryCallback, SB3Learner
from compressed_ad.learners.select import make_learner
from compressed_ad.markers import threshold
from compressed_ad.tasks.gridworld import Darkroom


class Witness(gymnasium.Env):
    """A walk of random length on a line that notes what happened before SB3 touches it.

    Odd environments end by a time limit, even ones terminate; lengths differ, so ends are staggered.
    """

    def __init__(self, index, action_space):
        self.observation_space, self.action_space = spaces.Box(-10, 10, (2,)), action_space
        self.index, self.log = index, []
        self.generator = np.random.default_rng(index)

    def reset(self, *, seed=None, options=None):
        self.time, self.length = 0, self.generator.integers(1, 6)
        self.obs = self.generator.normal(size=2).astype(np.float32)
        return self.obs.copy(), {}

    def step(self, action):
        before, self.time = self.obs, self.time + 1
        self.obs = (before + 0.1 * self.generator.normal(size=2)).astype(np.float32)
        end, reward = self.time == self.length, float(self.generator.normal())
        ended = (end and self.index % 2 == 0, end and self.index % 2 == 1)
        self.log.append((before, np.array(action), reward, self.obs.copy(), *ended))
        return self.obs.copy(), reward, *ended, {}


class Versions(BaseCallback):
    """Keeps a copy of every version of the policy."""

    def _on_training_start(self):
        self.policies = []

    def _on_rollout_start(self):
        self.policies.append(copy.deepcopy(self.model.policy))

    def _on_training_end(self):
        self._on_rollout_start()

    def _on_step(self):
        return True


def run(action_space, n_timesteps=48, **kwargs):
    env = DummyVecEnv([lambda i=i: Witness(i, action_space) for i in range(3)])
    callback, versions = CompressedHistoryCallback(**kwargs), Versions()
    model = PPO(
        "MlpPolicy", env, n_steps=8, batch_size=12, n_epochs=3, learning_rate=3e-3, seed=0, device="cpu"
    )
    model.learn(n_timesteps * 3, [callback, versions])
    return callback.history(), env, versions.policies


@pytest.mark.parametrize(
    "action_space",
    [spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.Box(-0.5, 0.5, (2,))],
    ids=["discrete", "multidiscrete", "box"],
)
def test_the_callback_records_what_happened(action_space):
    history, env, policies = run(action_space)
    names = ("states", "actions", "rewards", "next_states", "terminated", "truncated")
    for i, witness in enumerate(env.envs):
        for name, truth in zip(names, zip(*witness.log, strict=True), strict=True):
            np.testing.assert_array_equal(
                getattr(history, name)[i], np.array(truth, dtype=getattr(history, name).dtype)
            )
    assert history.terminated[0].any() and history.truncated[1].any()
    assert not (history.terminated & history.truncated).any()
    np.testing.assert_array_equal(history.update, np.broadcast_to(np.repeat(np.arange(6), 8), (3, 48)))
    if isinstance(action_space, spaces.Box):
        assert (np.abs(history.actions) <= 0.5).all() and (np.abs(history.actions) == 0.5).any()
        assert (history.action_probs > 0).all() and (history.action_probs <= 1).all()
        return  # what was sampled before clipping is not in the history
    for update in range(6):
        part = history.update == update
        obs, actions = torch.as_tensor(history.states[part]), torch.as_tensor(history.actions[part])
        with torch.no_grad():
            _, log_prob, entropy = policies[update].evaluate_actions(obs, actions)
            _, log_prob_next, _ = policies[update + 1].evaluate_actions(obs, actions)
        dimension = max(1, len(action_space.shape) and action_space.shape[0])
        np.testing.assert_allclose(history.action_probs[part], (log_prob / dimension).exp(), rtol=1e-5)
        np.testing.assert_allclose(history.entropy[part], entropy, rtol=1e-5)
        np.testing.assert_allclose(history.log_prob_next[part], log_prob_next, rtol=1e-5)
        assert (log_prob - log_prob_next).abs().max() > 1e-3


def test_box_probabilities_are_relative_to_the_mode():
    history, _, policies = run(spaces.Box(-100.0, 100.0, (2,)), n_timesteps=8)  # wide: nothing is clipped
    obs, actions = (torch.as_tensor(a.reshape(-1, 2)) for a in (history.states, history.actions))
    with torch.no_grad():
        normal = policies[0].get_distribution(obs).distribution
        z = (actions - normal.mean) / normal.stddev
    np.testing.assert_allclose(history.action_probs.ravel(), (-0.25 * (z**2).sum(1)).exp(), rtol=1e-4)


def test_the_mask_is_the_guides_rule():
    history, _, _ = run(spaces.Discrete(2), on_policy_threshold=0.5, compression_window=2)
    np.testing.assert_array_equal(history.compression_mask, threshold(history.action_probs, 0.5, 2))
    assert history.compression_mask.any() and not history.compression_mask.all()


def test_what_the_callback_refuses():
    with pytest.raises(UsageError, match="nothing was recorded"):
        CompressedHistoryCallback().history()
    with pytest.raises(ConfigError, match="compression_window"):
        CompressedHistoryCallback(compression_window=0)
    env = DummyVecEnv([lambda: Witness(0, spaces.Discrete(2))])
    with pytest.raises(UsageError, match=r"on-policy algorithms .* not DQN"):
        DQN("MlpPolicy", env, buffer_size=10).learn(4, CompressedHistoryCallback())
    with pytest.raises(UsageError, match="VecNormalize"):
        PPO("MlpPolicy", VecNormalize(env), n_steps=8, batch_size=8).learn(8, CompressedHistoryCallback())


# ---------------------------------------------------------------- the learner

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 2}


def _learn(learner, tasks, **kwargs):
    family = Darkroom(horizon=5)
    kwargs = {"n_timesteps": 20, "n_learner": 2, "n_stream": 2, "seed": 0, **kwargs}
    return learner.learn(family, np.array(tasks), family.tasks()[tasks], **kwargs)


def test_both_learners_write_the_same_kind_of_history():
    done = []
    ours, theirs = (
        _learn(make_learner(name, SMALL), [40, 3], progress=done.append) for name in ("ppo", "sb3:PPO")
    )
    assert sum(done) == 2 * 2 * 20 * 2 * 2
    for a, b in zip(ours, theirs, strict=True):
        arrays_a, arrays_b = dict(a.per_step()), dict(b.per_step())
        assert arrays_a.keys() == arrays_b.keys()
        for name, x in arrays_a.items():
            assert (x.shape, x.dtype) == (arrays_b[name].shape, arrays_b[name].dtype), name
        np.testing.assert_array_equal(a.learner, b.learner)
        for name in ("update", "terminated", "truncated"):
            np.testing.assert_array_equal(arrays_a[name], arrays_b[name])
        # The trailing steps wait for an update that does not come.
        np.testing.assert_array_equal(np.isnan(a.log_prob_next), np.isnan(b.log_prob_next))
        np.testing.assert_array_equal(np.isnan(a.log_prob_next), a.update == 2)


def test_a_run_too_short_for_an_update_is_refused():
    with pytest.raises(ConfigError, match="n_steps 2048 exceeds the 20 steps"):
        _learn(SB3Learner("PPO"), [3])


def test_a_task_of_sb3_does_not_depend_on_its_neighbours():
    learner = SB3Learner("PPO", **SMALL)
    together, (alone,) = _learn(learner, [40, 3]), _learn(learner, [3])
    for (name, a), (_, b) in zip(together[1].per_step(), alone.per_step(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_learning_curves_agree_with_sb3():
    # Curves are returns per episode, averaged over streams, of three goals 3 to 5 steps away, in thirds of
    # the run. Learners are independent, so the means of 2 SB3 learners and 40 of ours per goal may differ
    # by their standard error, to which the spread between our learners is the yardstick. 4 standard errors:
    # nine comparisons fail by chance with probability 6e-4. The last check keeps the test from being empty:
    # returns must have risen by many standard errors, so that a learner that does not learn would fail.
    config = {"n_steps": 20, "batch_size": 50, "n_epochs": 8, "learning_rate": 2e-3}
    family, goals = Darkroom(), np.array([[4, 7], [6, 6], [2, 1]])
    ids = goals @ [9, 1]
    curves = {}
    for name, learner, n_learner in (
        ("ours", BatchedPPO(**config), 40),
        ("sb3", SB3Learner("PPO", **config), 2),
    ):
        histories = learner.learn(
            family, ids, goals, n_timesteps=360, n_learner=n_learner, n_stream=10, seed=0
        )
        rewards = np.stack([h.rewards for h in histories]).reshape(3, n_learner, 10, 3, 6, 20)
        curves[name] = rewards.sum(-1).mean((2, 4))  # (goal, learner, third)
    spread = curves["ours"].std(axis=1, ddof=1)
    tolerance = 4 * spread * np.sqrt(1 / 40 + 1 / 2)
    difference = curves["sb3"].mean(1) - curves["ours"].mean(1)
    assert (np.abs(difference) < tolerance).all(), (difference, tolerance)
    rise = curves["ours"].mean(1)[:, 2] - curves["ours"].mean(1)[:, 0]
    assert (rise > tolerance[:, 2]).all(), (rise, tolerance)


# ---------------------------------------------------------------- names


def test_learners_by_name():
    assert isinstance(make_learner("ppo", {"n_steps": 5}), BatchedPPO)
    assert make_learner("sb3:A2C", {"net_arch": (8,)}).config == {"policy_kwargs": {"net_arch": [8]}}
    assert isinstance(make_learner("compressed_ad.learners.ppo:BatchedPPO", {}), BatchedPPO)
    with pytest.raises(UnknownNameError, match="did you mean 'ppo'"):
        make_learner("pppo", {})
    with pytest.raises(UsageError, match=r"sb3:PP0 is not supported .did you mean 'PPO'"):
        make_learner("sb3:PP0", {})
    with pytest.raises(ConfigError, match=r"unknown key 'n_step' .did you mean 'n_steps'"):
        make_learner("sb3:PPO", {"n_step": 3})
    with pytest.raises(ConfigError, match="unknown parameter 'colour'"):
        make_learner("tests.probes:Probe", {"colour": 1})
    with pytest.raises(UsageError, match="makes a Probe, which has no 'learn'"):
        make_learner("tests.probes:Probe", {"name": "x", "draw": None, "pay": None})


def test_without_sb3_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['stable_baselines3'] = None\n"
        "from compressed_ad.learners.select import make_learner\n"
        "make_learner('ppo', {})\n"
        "make_learner('sb3:PPO', {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr and "compressed-ad[sb3]" in done.stderr
