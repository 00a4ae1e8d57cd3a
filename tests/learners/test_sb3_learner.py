from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise

from compressed_ad.cli.main import main
from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError, UsageError, install_command
from compressed_ad.histories.collector import collect
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.learners.sb3.algorithms import ALGORITHM
from compressed_ad.learners.sb3.learner import (
    SB3Learner,
    SmallImages,
    _make_noise,
    _SlotsVecEnv,
    choose_policy,
)
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.gridworld import Darkroom
from tests.probes import VALUE

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


# ---------------------------------------------------------------- every algorithm

Reach = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_reach.py"))["Reach"]
LITTLE = {
    "A2C": {"n_steps": 5},
    "TRPO": {"n_steps": 10, "batch_size": 10},
    "RecurrentPPO": {"n_steps": 10, "batch_size": 10, "policy_kwargs": {"lstm_hidden_size": 4}},
    "PPO": {"n_steps": 10, "batch_size": 10},
}
OFF_POLICY = {"learning_starts": 8, "batch_size": 4, "train_freq": 4}


class Masked(Darkroom):
    """Darkroom where going back the way one came is forbidden."""

    def make(self, tasks, seeds):
        env = super().make(tasks, seeds)
        env.action_masks = lambda: np.tile([True, True, True, True, False], (env.num_envs, 1))
        return env


def _family(name):
    if name == "MaskablePPO":
        return Masked(horizon=5)
    return Darkroom(horizon=5) if "Discrete" in ALGORITHM[name].actions else Reach(n_task=5, horizon=5)


def _run(name, ids, **config):
    family = _family(name)
    config = {"net_arch": [4], **LITTLE.get(name, OFF_POLICY), **config}
    if name == "MaskablePPO":
        config = {"net_arch": [4], **LITTLE["PPO"]}
    learner = make_learner(f"sb3:{name}", config)
    done = []
    histories = learner.learn(
        family, np.array(ids), family.tasks()[ids],
        n_timesteps=22, n_learner=2, n_stream=2, seed=0, progress=done.append,
    )  # fmt: skip
    assert sum(done) == len(ids) * 2 * 2 * 22
    return histories


@pytest.mark.parametrize("name", ALGORITHM)
def test_every_algorithm_learns_a_family(name):
    first, second = _run(name, [1, 3])
    for history in (first, second):
        assert history.rewards.shape == (4, 22)
        assert history.learner.tolist() == [0, 0, 1, 1]
        assert history.update.max() >= 2
        assert not np.isnan(history.action_probs).any()
        assert (history.episode_end == (np.arange(22) % 5 == 4)).all()
        history.check_finite(name)
    assert (history.states[0] != history.states[2]).any()  # learners are independent
    (alone,) = _run(name, [3])
    for (array_name, a), (_, b) in zip(second.per_step(), alone.per_step(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=array_name)
    if name == "MaskablePPO":
        assert (first.actions != 4).all()


def test_a_replay_buffer_is_as_large_as_the_run_can_fill():
    histories = [_run("SAC", [2], buffer_size=size)[0] for size in (46, 10**6)]
    np.testing.assert_array_equal(histories[0].actions, histories[1].actions)
    family = Reach()
    env = _SlotsVecEnv(
        family.make(family.tasks()[:2], np.arange(2)), family.observation_space, family.action_space
    )
    for given, size in (({}, 62), ({"buffer_size": 40}, 40), ({"buffer_size": 9999}, 62)):
        assert SB3Learner("SAC", **given)._model(env, 30, 0).buffer_size == size


@pytest.mark.parametrize("name", ["PPO", "DQN", "CrossQ", "RecurrentPPO"])
@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 5, 6), (40, 40, 3)])
def test_images_get_convolutions(name, shape):
    space = spaces.Box(0, 255, shape, np.uint8)
    kind = SB3Learner(name)._class
    policy, kwargs = choose_policy(kind, space, None, {})
    if shape[0] == 40 and name != "CrossQ":
        assert (policy, kwargs) == ({"RecurrentPPO": "CnnLstmPolicy"}.get(name, "CnnPolicy"), {})
    else:
        assert kwargs == {"features_extractor_class": SmallImages}
        images = torch.rand(4, *shape)
        assert SmallImages(space)(images).shape == (4, 128)
    assert choose_policy(kind, space, "MlpPolicy", {}) == ("MlpPolicy", {})
    assert choose_policy(kind, spaces.Discrete(3), None, {"net_arch": []})[1] == {"net_arch": []}


class Gallery(Darkroom):
    """Darkroom seen as small images: where one is stands out."""

    observation_space = spaces.Box(0, 255, (7, 7, 3), np.uint8)

    def make(self, tasks, seeds):
        return _Painted(super().make(tasks, seeds))


class _Painted:
    def __init__(self, env):
        self.env, self.num_envs = env, env.num_envs

    def reset(self):
        return self._paint(self.env.reset())

    def step(self, actions):
        step = self.env.step(actions)
        return replace(step, obs=self._paint(step.obs), next_obs=self._paint(step.next_obs))

    def _paint(self, cells):
        images = np.zeros((len(cells), 7, 7, 3), np.uint8)
        images[np.arange(len(cells)), *(cells % 7).T, 0] = 10
        return images


@pytest.mark.parametrize("name", ["PPO", "DQN"])
def test_small_images_are_learned_from(name):
    family = Gallery(horizon=5)
    learner = SB3Learner(name, **(LITTLE["PPO"] if name == "PPO" else OFF_POLICY))
    (history,) = learner.learn(
        family, np.array([3]), family.tasks()[[3]], n_timesteps=20, n_learner=1, n_stream=2, seed=0
    )
    assert history.states.shape == (2, 20, 7, 7, 3) and history.states.dtype == np.uint8
    broken = (history.next_states[:, :-1] != history.states[:, 1:]).any((2, 3, 4))
    assert not (broken & ~history.episode_end[:, :-1]).any()
    assert set(np.unique(history.states)) == {0, 10}


# ---------------------------------------------------------------- what is wrong is said before it starts


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("SACC", {}, "did you mean 'sb3:SAC'"),
        ("qr-dqn", {}, "did you mean 'sb3:QRDQN'"),
        ("ARS", {}, "cannot be recorded: random search plays whole episodes"),
        ("SAC", {"ent_coeff": 1}, "unknown key 'ent_coeff' .did you mean 'ent_coef'"),
        ("SAC", {"seed": 1}, "unknown key 'seed'"),
        ("SAC", {"policy": "MlpPolice"}, "unknown policy 'MlpPolice' .did you mean 'MlpPolicy'"),
        ("TD3", {"action_noise": -1}, "action_noise must be a number >= 0"),
        ("TD3", {"action_noise": {"kind": "normall", "sigma": 1}}, "did you mean 'normal'"),
        ("TD3", {"action_noise": {"sigma": 1, "theta": 1}}, "action_noise: unknown parameter 'theta'"),
        ("TD3", {"action_noise": {"kind": "ornstein_uhlenbeck"}}, "parameter 'sigma' is missing"),
        ("PPO", {"policy_kwargs": {"activation_fn": "Tahn"}}, "has no 'Tahn' .did you mean 'Tanh'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name, config, message):
    with pytest.raises(UsageError, match=message):
        make_learner(f"sb3:{name}", config)


@pytest.mark.parametrize(
    ("name", "config", "kwargs", "message"),
    [
        ("SAC", {}, {}, "darkroom: sb3:SAC learns Box actions, not Discrete; sb3:PPO, .*sb3:DQN.* do"),
        ("MaskablePPO", {}, {}, "needs environments with a method action_masks"),
        ("DQN", {}, {"n_timesteps": 50}, "learning_starts 100 exceeds the 100 steps of all streams"),
        ("DQN", {"train_freq": [1, "episode"]}, {}, "train_freq in episodes needs n_stream 1"),
        ("PPO", {}, {}, "n_steps 2048 exceeds the 200 steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_file_is_made(name, config, kwargs, message, tmp_path):
    kwargs = {"n_timesteps": 200, "n_stream": 2, **kwargs}
    with pytest.raises((SpaceError, UsageError), match=message) as caught:
        collect(Darkroom(), SB3Learner(name, **config), tmp_path / "h.hdf5", family_name="darkroom", **kwargs)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("PPO", {"observation_space": spaces.Discrete(7, start=1)}, "Discrete observations that start at 0"),
        ("A2C", {"observation_space": spaces.MultiDiscrete([3, 3], start=[0, 2])}, "observations that start"),
        ("PPO", {"action_space": spaces.MultiDiscrete([3, 3], start=[1, 0])}, "actions that start at 0"),
        ("PPO", {"action_space": spaces.Box(0, 3, (1,), np.int64)}, "SB3 gives Box actions as floats"),
    ],
)
def test_spaces_that_sb3_does_not_learn_are_refused_before_it_starts(name, what, message):
    family = replace(VALUE, **what)
    with pytest.raises(SpaceError, match=message):
        SB3Learner(name).check(family, n_timesteps=9999, n_stream=1)


def test_the_command_line_refuses_an_algorithm_for_other_actions(capsys):
    assert main(["collect", "--algorithm.learner", "sb3:TD3", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "sb3:TD3 learns Box actions, not Discrete" in error and "--algorithm.learner" in error


def test_arguments_from_yaml():
    space = Reach().action_space
    normal = _make_noise(0.1, space)
    assert isinstance(normal, NormalActionNoise)
    assert (normal._mu.tolist(), normal._sigma.tolist()) == ([0, 0], [0.1, 0.1])
    wander = _make_noise({"kind": "ornstein_uhlenbeck", "sigma": [0.1, 0.2], "theta": 0.3}, space)
    assert (wander._sigma.tolist(), wander._theta) == ([0.1, 0.2], 0.3)
    learner = SB3Learner(
        "SAC",
        net_arch={"pi": [4], "qf": [5]},
        train_freq=[2, "step"],
        policy_kwargs={"activation_fn": "Tanh"},
    )
    family = Reach()
    env = _SlotsVecEnv(family.make(family.tasks()[:1], np.arange(1)), family.observation_space, space)
    model = learner._model(env, 10, 0)
    assert isinstance(model.actor.latent_pi[1], torch.nn.Tanh)
    assert (model.train_freq.frequency, model.actor.mu.in_features) == (2, 4)
    with pytest.raises(ConfigError, match=r"sb3:SAC: .*must be greater than 0"):
        SB3Learner("SAC", ent_coef="auto_0")._model(env, 10, 0)


# ---------------------------------------------------------------- names


def test_learners_by_name():
    assert isinstance(make_learner("ppo", {"n_steps": 5}), BatchedPPO)
    assert make_learner("sb3:A2C", {"net_arch": (8,)}).config == {"policy_kwargs": {"net_arch": [8]}}
    assert isinstance(make_learner("compressed_ad.learners.ppo:BatchedPPO", {}), BatchedPPO)
    with pytest.raises(UnknownNameError, match="did you mean 'ppo'"):
        make_learner("pppo", {})
    with pytest.raises(UsageError, match=r"sb3:PP0 is not supported .did you mean 'sb3:PPO'"):
        make_learner("sb3:PP0", {})
    with pytest.raises(ConfigError, match=r"unknown key 'n_step' .did you mean 'n_steps'"):
        make_learner("sb3:PPO", {"n_step": 3})
    with pytest.raises(ConfigError, match="unknown parameter 'colour'"):
        make_learner("noise", {"colour": 1})
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
    assert "MissingExtraError" in done.stderr and install_command("sb3") in done.stderr
