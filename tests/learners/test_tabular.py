"""Tabular Q-learning: beside a plain-Python oracle, with the published statistics, on toy texts."""

import math
import runpy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from compressed_ad import Darkroom, History, collect, make_family, make_learner
from compressed_ad.cli.main import main
from compressed_ad.errors import CompressedADError, ConfigError, NumericalError, UsageError
from compressed_ad.learners import finite
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.finite import FiniteLearner
from compressed_ad.seeding import seed64
from compressed_ad.tasks.gridworld import KeyToDoor
from compressed_ad.types import Step
from tests.learners.learning import learn

ROOT = Path(__file__).parents[2]
SMALL = KeyToDoor(3, 8)


class Draws:
    """splitmix64 in Python's integers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def __call__(self) -> float:
        mask = 2**64 - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2**53


def oracle(
    family: Any, task: int, n_timesteps: int, stream: int, p: dict[str, Any]
) -> dict[str, list[float]]:
    """Actions, probabilities, entropies and later log-probabilities of one stream, in plain Python."""
    draw = Draws(seed64(0, "TabularQ", task, stream))
    size, n_action = family.size, 5
    states = [(m, x, y) for m in range(p["memory"] + 1) for x in range(size) for y in range(size)]
    value = (
        {(s, a): np.float32(p["initial"]) for s in states for a in range(n_action)}
        if (p["initial"] != "uniform")
        else {(s, a): np.float32(draw()) for s in states for a in range(n_action)}
    )
    last: dict[Any, Any] = {}  # outcome of every pair
    visits = dict.fromkeys(states, 0)
    order: list[Any] = []

    def row(s: Any) -> list[float]:
        return [float(value[s, a]) for a in range(n_action)]

    def policy(s: Any, epsilon: float) -> list[float]:
        ties = row(s).count(max(row(s)))
        return [epsilon / n_action + (v == max(row(s))) * (1 - epsilon) / ties for v in row(s)]

    env = family.make(family.tasks()[[task]], np.zeros(1, np.int64))
    met, obs, episode = 0, tuple(env.reset()[0].tolist()), 0
    out: dict[str, list[float]] = {n: [] for n in ("actions", "action_probs", "entropy", "log_prob_next")}
    for t in range(n_timesteps):
        passed, length = (episode, p["episodes"]) if p["episodes"] else (t, n_timesteps)
        share = min(1.0, passed / (p["anneal"] * length))
        epsilon = p["epsilon"] + (p["epsilon_final"] - p["epsilon"]) * share
        s, u = (met, *obs), draw()
        chances = policy(s, epsilon)
        if u < epsilon:
            action = int(u / epsilon * n_action)
        else:
            best = [a for a, v in enumerate(row(s)) if v == max(row(s))]
            action = best[int((u - epsilon) / (1 - epsilon) * len(best))]
        step = env.step(np.array([action]))
        reward, ended = float(step.reward[0]), bool(step.terminated[0] or step.truncated[0])
        met = min(met + (reward > 0), p["memory"])
        following = (met, *step.next_obs[0].tolist())
        target = reward + (0.0 if step.terminated[0] else p["gamma"] * max(row(following)))
        if not any((s, a) in last for a in range(n_action)):
            order.append(s)
        last[s, action] = reward, None if step.terminated[0] else following
        visits[following] += 1
        old = float(value[s, action])
        value[s, action] = np.float32(old + p["learning_rate"] * (target - old))
        if ended and p["fade"]:
            for w in states:
                for a in range(n_action):
                    if visits[w] and (w, a) not in last:
                        value[w, a] = np.float32(p["initial"] * (1 + visits[w]) ** -p["fade"])
        for _ in range(p["sweeps"] * ended):
            for w in reversed(order):
                for a in range(n_action):
                    if (w, a) in last:
                        r, z = last[w, a]
                        value[w, a] = np.float32(r + (0.0 if z is None else p["gamma"] * max(row(z))))
        out["actions"].append(action)
        out["action_probs"].append(chances[action])
        out["entropy"].append(-sum(c * math.log(c) for c in chances if c))
        out["log_prob_next"].append(math.log(max(policy(s, epsilon)[action], 1e-38)))
        if ended:
            met, episode = 0, episode + 1
        obs = tuple(step.obs[0].tolist())
    return out


PLAIN = {
    "learning_rate": 0.5,
    "gamma": 0.9,
    "epsilon": 1.0,
    "epsilon_final": 0.05,
    "anneal": 0.5,
    "episodes": None,
    "initial": 0.0,
    "fade": 0.0,
    "sweeps": 0,
    "memory": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"initial": "uniform", "learning_rate": 0.9933, "epsilon_final": 0.0, "anneal": 0.9, "episodes": 20},
        {"initial": 1.0, "epsilon": 0.3, "memory": 0},
        {"initial": 1.0, "epsilon": 0.1, "epsilon_final": 0.0, "fade": 0.5, "sweeps": 3},
        {"initial": 2.0, "epsilon": 0.1, "fade": 0.25},
    ],
)
def test_as_the_oracle(changes: dict[str, Any]) -> None:
    parameters = PLAIN | changes
    (history,) = learn(make_learner("tabular", parameters), SMALL, [29], 250, n_stream=2)
    assert history.rewards.sum() > 4
    for stream in range(2):
        expected = oracle(SMALL, 29, 250, stream, parameters)
        assert history.actions[stream].tolist() == expected["actions"]
        for name in ("action_probs", "entropy"):
            np.testing.assert_allclose(getattr(history, name)[stream], expected[name], rtol=1e-5, atol=1e-6)
        if parameters["sweeps"] == 0:
            np.testing.assert_allclose(history.log_prob_next[stream], expected["log_prob_next"], rtol=1e-5)
        else:
            assert history.log_prob_next is None


@pytest.mark.parametrize(
    ("kwargs", "family"),
    [
        ({}, None),
        ({"initial": "uniform", "episodes": 20, "memory": 1}, SMALL),
        ({"initial": 1.0, "fade": 0.5, "sweeps": 2, "memory": 1}, SMALL),
    ],
)
def test_keeps_the_promises_of_learners(kwargs: dict[str, Any], family: Any) -> None:
    assert check_learner(make_learner("tabular", kwargs), family) == []


def test_a_stream_is_the_same_in_any_company() -> None:
    learner = make_learner("tabular", {"initial": "uniform"})
    together = learn(learner, Darkroom(), [3, 40, 77], 90, n_stream=5)
    (alone,) = learn(learner, Darkroom(), [40], 90, n_stream=2)
    for name, array in alone.per_step():
        np.testing.assert_array_equal(array, getattr(together[1], name)[:2], err_msg=name)


@pytest.mark.parametrize(("name", "kwargs"), [("tabular", {}), ("rmax", {"epsilon": 0.5})])
def test_probabilities_agree_with_counts(name: str, kwargs: dict[str, Any]) -> None:
    """The mean of -log p of the drawn actions is the entropy, and that of 1 / p the number of actions."""
    (history,) = learn(make_learner(name, kwargs), Darkroom(5, 10), [3], 40, n_stream=3000)
    p, entropy = history.action_probs.astype(np.float64), history.entropy.astype(np.float64)
    if name == "rmax":  # epsilon is 0 in the second half
        p, entropy = p[:, :10], entropy[:, :10]
    for surprise in (-np.log(p) - entropy, 1 / p - 5):
        assert abs(surprise.mean()) < 4 * surprise.std() / math.sqrt(surprise.size)
    first = np.bincount(history.actions[:, 0], minlength=5) / 3000
    np.testing.assert_allclose(first, 0.2, atol=4 * math.sqrt(0.16 / 3000))


def test_reproduces_the_published_statistics() -> None:
    """Within 10 %, or .02 where 60 tasks have a standard error of about .01."""
    published = runpy.run_path(str(ROOT / "benchmarks" / "published_histories.py"))
    for room in ("key_to_door 9x9", "darkroom 9x9"):
        found, expected = published["statistics"](room, 60), published["PUBLISHED"][room]
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.02, err_msg=room)


def returns(history: History, last: int) -> float:
    """Mean return of the ``last`` finished episodes of the streams."""
    totals = []
    for rewards, end in zip(history.rewards, history.episode_end, strict=True):
        stops = np.flatnonzero(end) + 1
        totals.append(np.add.reduceat(rewards[: stops[-1]], np.r_[0, stops[:-1]])[-last:])
    return float(np.mean(totals))


@pytest.mark.parametrize(
    ("family", "kwargs", "parameters", "n_timesteps", "least"),
    [
        ("FrozenLake", {"kwargs": {"is_slippery": False}}, {"initial": 1.0, "epsilon": 0.2}, 1500, 0.99),
        ("CliffWalking", {"horizon": 100}, {"gamma": 1.0, "epsilon": 0.1}, 4000, -13.5),
        ("Taxi", {}, {"learning_rate": 1.0, "gamma": 0.95, "epsilon": 0.1}, 30000, 5.0),
    ],
)
def test_learns_toy_texts(
    family: str, kwargs: dict[str, Any], parameters: dict[str, Any], n_timesteps: int, least: float
) -> None:
    newest = max(name for name in gymnasium.registry if name.startswith(f"{family}-v"))
    learner = make_learner("tabular", {"epsilon_final": 0.0, **parameters})
    (history,) = learn(learner, make_family(f"gymnasium:{newest}", kwargs), [0], n_timesteps)
    assert returns(history, 20) >= least


class Switches:
    """Observations 1..3 in turn; only switches (1, 2) pay."""

    name, horizon = "switches", 6
    observation_space = spaces.Discrete(3, start=1)
    action_space = spaces.MultiDiscrete([2, 3])
    pay = 1.0

    def tasks(self) -> Any:
        return np.arange(2)[:, None]

    def make(self, tasks: Any, seeds: Any) -> Any:
        self.num_envs, self.time = len(tasks), 0
        return _SwitchesEnv(len(tasks), self.pay)


class _SwitchesEnv:
    def __init__(self, num_envs: int, pay: float) -> None:
        self.num_envs, self.pay, self.time = num_envs, pay, 0

    def _obs(self, time: int) -> Any:
        return np.full(self.num_envs, 1 + time % 3)

    def reset(self) -> Any:
        return self._obs(0)

    def step(self, actions: Any) -> Step:
        self.time += 1
        reward = np.where((actions == [1, 2]).all(1), self.pay, 0).astype(np.float32)
        ends = np.full(self.num_envs, self.time % 6 == 0)
        following = self._obs(self.time % 6 or 6)
        return Step(following, reward, np.zeros_like(ends), ends, self._obs(self.time % 6))


@pytest.mark.parametrize(
    ("name", "kwargs"), [("tabular", {}), ("rmax", {"dynamics": "pairs", "settle": False})]
)
def test_spaces_with_components_and_other_starts(name: str, kwargs: dict[str, Any]) -> None:
    assert check_learner(make_learner(name, kwargs), Switches()) == []
    (history,) = learn(make_learner(name, {**kwargs, "epsilon_final": 0.0}), Switches(), [0], 300)
    assert history.actions.shape == (1, 300, 2)
    assert (history.rewards[0, -30:] == 1).all()
    if name == "tabular":  # the first action is one of six: the geometric mean of the components is recorded
        assert history.action_probs[0, 0] == pytest.approx((1 / 6) ** 0.5)
    assert history.log_prob_next is None


def test_rewards_that_are_not_finite_are_named() -> None:
    broken = Switches()
    broken.pay = float("nan")
    for name, kwargs in (("tabular", {}), ("rmax", {"dynamics": "pairs"})):
        with pytest.raises(NumericalError, match=r"task 1, step \d+: step\(\).reward is not finite"):
            learn(make_learner(name, kwargs), broken, [1], 100)


@pytest.mark.parametrize(
    ("name", "kwargs", "family", "message"),
    [
        ("tabular", {}, "gymnasium:CartPole-v1", "observations must be Discrete or MultiDiscrete, not Box"),
        ("rmax", {}, "point_mass", "observations must be Discrete or MultiDiscrete, not Box"),
        (
            "tabular",
            {"episodes": 51},
            "darkroom",
            "51 episodes of darkroom take up to 1,020 steps, but a stream",
        ),
        (
            "rmax",
            {"episodes": 51},
            "darkroom",
            "51 episodes of darkroom take up to 1,020 steps, but a stream",
        ),
        ("rmax", {"dynamics": "given"}, "bernoulli_bandit", "needs a family with a successor table"),
        ("rmax", {}, "bernoulli_bandit", "dynamics moves needs MultiDiscrete observations"),
        ("tabular", {"memory": 10**9}, "darkroom", "tables for the 2 stream(s) of one task take 3,017.5 GiB"),
        ("rmax", {"memory": 10**9}, "darkroom", "tables for the 2 stream(s) of one task take 150.9 GiB"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_starts(
    name: str, kwargs: dict[str, Any], family: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "physical_memory", lambda: 2**33)
    learner = make_learner(name, kwargs)
    assert isinstance(learner, FiniteLearner)
    with pytest.raises(CompressedADError) as raised:
        learner.check(make_family(family, {}), n_timesteps=1000, n_stream=2)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_tables_of_many_learners_are_counted_before_anything_starts(tmp_path: Path) -> None:
    learner = make_learner("tabular", {"memory": 1000})
    with pytest.raises(
        UsageError, match=r"tables for the 1,000,000 stream\(s\) of one task take [\d,.]+ GiB"
    ):
        collect(Darkroom(), learner, tmp_path / "no.hdf5", family_name="darkroom", n_timesteps=20,
                n_learner=1000, n_stream=1000)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("tabular", {"initial": "uniform", "fade": 0.5}, "fade lowers initial values from a number"),
        ("tabular", {"initial": "zero"}, "initial must be a number, or one of uniform, got 'zero'"),
        ("tabular", {"learning_rate": 0.0}, "learning_rate must be a number above 0 and at most 1, got 0.0"),
        ("tabular", {"memory": -1}, "memory must be a whole number of at least 0, got -1"),
        ("rmax", {"dynamics": "shared"}, "dynamics must be one of moves, pairs, given, got 'shared'"),
    ],
)
def test_wrong_parameters_are_named(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_learner(name, kwargs)
    assert message in str(raised.value)


def test_the_command_line_starts_nothing_that_cannot_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--algorithm.n_timesteps", "100", "--algorithm.n_stream", "1", "--out", str(tmp_path / "out")]
    code = main(["collect", "--algorithm", "tabular_literature", *size])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert "200 episodes of darkroom take up to 4,000 steps, but a stream has 100" in error
    assert not (tmp_path / "out").exists()
