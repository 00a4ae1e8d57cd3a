from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from compressed_ad.errors import ConfigError, UnknownNameError, UsageError
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.learners.sb3 import SB3Learner
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.gridworld import Darkroom

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
