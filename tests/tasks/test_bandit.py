"""Bandits, the rules that learn them, and the noise source: against closed forms, direct loops and chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats as distributions
from scipy.special import betaln

from compressed_ad.errors import ConfigError, SpaceError, UsageError
from compressed_ad.evaluation.agents import OptimalAgent
from compressed_ad.evaluation.evaluate import evaluate_references, evaluate_tasks
from compressed_ad.learners.scripted import NoiseDistillation, NoisyAgent
from compressed_ad.learners.select import make_learner
from compressed_ad.tasks.bandit import (
    Bandit,
    BernoulliBandit,
    BetaPosterior,
    GaussianBandit,
    NormalPosterior,
    Posterior,
    Thompson,
    seeded,
)
from compressed_ad.tasks.base import OptimalPolicy, ReferencePolicies, RewardFunction
from compressed_ad.tasks.conformance import family_problems
from compressed_ad.tasks.gridworld import Darkroom, KeyToDoor
from compressed_ad.tasks.random_play import UniformActions
from compressed_ad.tasks.select import make_family
from compressed_ad.training.checkpoints import load
from compressed_ad.types import AnyArray, History, Step
from tests.conftest import cad

FAMILIES = [
    BernoulliBandit(n_arm=4, n_task=20),
    BernoulliBandit(n_arm=3, n_task=20, alpha=2, beta=0.5, horizon=7),
    GaussianBandit(n_arm=4, n_task=20),
    GaussianBandit(n_arm=2, n_task=20, distribution="normal", sigma=1.0, mean=-1),
]
LEARNERS = ["thompson", "ucb1", "noise"]


def learn(name: str, family: Bandit, ids: list[int], n_timesteps: int = 40, **kwargs: int) -> list[History]:
    options = {"n_learner": 2, "n_stream": 2, "seed": 3, **kwargs}
    return make_learner(name, {}).learn(
        family, np.array(ids), family.tasks()[ids], n_timesteps=n_timesteps, **options
    )


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_bandits_keep_the_promises_of_a_family(family: Bandit) -> None:
    assert family_problems(family) == []
    assert isinstance(family, OptimalPolicy) and isinstance(family, ReferencePolicies)
    assert not isinstance(family, RewardFunction)  # a pull tells nothing of what another task would pay
    more = type(family)(**{**vars_of(family), "n_task": 30})
    np.testing.assert_array_equal(more.tasks()[:20], family.tasks())


def vars_of(family: Bandit) -> dict[str, object]:
    return {key: getattr(family, key) for key in family.__dataclass_fields__ if key != "name"}


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_returns_are_those_that_are_promised(family: Bandit) -> None:
    """Mean of 20 x 100 x 30 / horizon returns within 5 standard errors of the expectation."""
    tasks = family.tasks()
    returns = evaluate_tasks(OptimalAgent(family, tasks), family, tasks, rollouts=100, episodes=30)
    error = returns.std(axis=(1, 2)) / math.sqrt(3000)
    assert (abs(returns.mean(axis=(1, 2)) - family.optimal_return(tasks)) <= 5 * error + 1e-6).all()
    np.testing.assert_allclose(family.random_return(tasks), family.horizon * tasks.mean(axis=1))


def test_a_slot_depends_on_its_own_seed_beyond_a_block() -> None:
    family = GaussianBandit(n_task=5)
    arms = np.random.default_rng(0).integers(10, size=(600, 5))
    together, alone = (
        family.make(family.tasks(), np.arange(5)),
        family.make(family.tasks()[3:4], np.array([3])),
    )
    for row in arms:
        assert together.step(row).reward[3] == alone.step(row[3:4]).reward[0]


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("bernoulli_bandit", {"n_arm": 1}, "n_arm must be a whole number of at least 2"),
        ("bernoulli_bandit", {"alpha": 0}, "alpha must be a number above 0"),
        ("gaussian_bandit", {"sigma": -1}, "sigma must be a number above 0"),
        (
            "gaussian_bandit",
            {"distribution": "unifrom"},
            "must be one of uniform, normal, got 'unifrom'",
        ),
        ("gaussian_bandit", {"mean": "high"}, "mean must be a number"),
    ],
)
def test_wrong_parameters_are_named(name: str, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_family(name, kwargs)


def test_wrong_tasks_and_actions_are_refused() -> None:
    family = BernoulliBandit(n_arm=3)
    with pytest.raises(UsageError, match="chances in"):
        family.make(np.array([[0.1, 0.2, 1.5]]), np.array([0]))
    with pytest.raises(UsageError, match=r"arm means \(N, 3\)"):
        family.optimal_return(np.ones((2, 4)))
    with pytest.raises(SpaceError, match=r"0\.\.2"):
        family.make(family.tasks()[:1], np.array([0])).step(np.array([3]))


# ---------------------------------------------------------------- Thompson sampling


def played(posterior: Posterior, n_slot: int, n_pull: int, binary: bool) -> tuple[AnyArray, AnyArray]:
    """Random pulls of ``n_slot`` bandits; arms and rewards (T, N)."""
    random = np.random.default_rng(1)
    arms = random.integers(posterior.n_arm, size=(n_pull, n_slot))
    rewards = random.normal(0.4, 0.3, size=arms.shape)
    rewards = (rewards > 0.4).astype(float) if binary else rewards
    posterior.reset(n_slot)
    for arm, reward in zip(arms, rewards, strict=True):
        posterior.update(arm, reward)
    return arms, rewards


def test_beta_posteriors_count_and_their_chances_are_the_closed_form_of_two_arms() -> None:
    """P(p1 > p0) of two Beta posteriors with whole parameters is a finite sum (Evan Miller 2014)."""
    posterior = BetaPosterior(2, 1, 1)
    arms, rewards = played(posterior, 6, 60, binary=True)
    for slot, chances in enumerate(posterior.best()):
        won = [int(rewards[arms[:, slot] == a, slot].sum()) for a in (0, 1)]
        tried = [int((arms[:, slot] == a).sum()) for a in (0, 1)]
        (a0, b0), (a1, b1) = ((1 + w, 1 + n - w) for w, n in zip(won, tried, strict=True))
        np.testing.assert_array_equal(posterior.counts[slot], [[a0, b0], [a1, b1]])
        better = sum(
            math.exp(betaln(a0 + i, b0 + b1) - math.log(b1 + i) - betaln(1 + i, b1) - betaln(a0, b0))
            for i in range(a1)
        )
        np.testing.assert_allclose(chances, [1 - better, better], atol=1e-3)


def test_normal_posteriors_are_the_closed_form() -> None:
    posterior = NormalPosterior(2, sigma=0.3, mean=0.5, spread=0.2)
    arms, rewards = played(posterior, 6, 30, binary=False)
    for slot in range(6):
        for arm in (0, 1):
            seen = rewards[arms[:, slot] == arm, slot]
            precision = 1 / 0.2**2 + len(seen) / 0.3**2
            mean = (0.5 / 0.2**2 + seen.sum() / 0.3**2) / precision
            np.testing.assert_allclose(posterior.mean[slot, arm], mean)
            np.testing.assert_allclose(posterior.spread[slot, arm], precision**-0.5)
    gap = np.diff(posterior.mean, axis=1)[:, 0] / np.hypot(*posterior.spread.T)
    np.testing.assert_allclose(posterior.best()[:, 1], distributions.norm.cdf(gap), atol=5e-3)


@pytest.mark.parametrize("binary", [True, False], ids=["beta", "normal"])
def test_the_recorded_chance_is_that_of_a_posterior_draw_to_be_highest(binary: bool) -> None:
    """400,000 draws: 5 standard errors are below 4e-3; the grid may err by 5e-3."""
    posterior = BetaPosterior(5) if binary else NormalPosterior(5, 0.3, 0.5, 0.3)
    played(posterior, 3, 80, binary)
    random = np.random.default_rng(0)
    for slot, chances in enumerate(posterior.best()):
        if isinstance(posterior, BetaPosterior):
            draws = random.beta(*posterior.counts[slot].T, size=(400_000, 5))
        else:
            draws = random.normal(posterior.mean[slot], posterior.spread[slot], size=(400_000, 5))
        won = np.bincount(draws.argmax(axis=1), minlength=5) / len(draws)
        np.testing.assert_allclose(chances, won, atol=9e-3)
        np.testing.assert_allclose(chances.sum(), 1)


def test_arms_are_drawn_with_their_recorded_chance() -> None:
    """20,000 slots with one posterior: frequencies within 5 standard errors."""
    agent = BernoulliBandit(n_arm=3).thompson(seeded(0, "test"))
    assert isinstance(agent, Thompson)
    agent.reset(20_000)
    for arm, reward in ((0, 1), (1, 0), (1, 1), (2, 0)):
        agent.posterior.update(np.full(20_000, arm), np.full(20_000, reward))
    chances = agent.policy()[0]
    arms = agent.act(np.zeros(20_000, int))
    shares = np.bincount(arms, minlength=3) / 20_000
    assert (abs(shares - chances) <= 5 * np.sqrt(chances * (1 - chances) / 20_000)).all()
    np.testing.assert_array_equal(agent.probability, chances[arms])
    np.testing.assert_allclose(agent.entropy, distributions.entropy(chances))


# ---------------------------------------------------------------- UCB1


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[2]], ids=repr)
def test_ucb1_plays_the_highest_bound_of_a_direct_loop(family: Bandit) -> None:
    history = learn("ucb1", family, [4], n_timesteps=120)[0]
    for stream in range(4):
        rewards: list[list[float]] = [[] for _ in range(4)]
        for t, (arm, reward) in enumerate(zip(history.actions[stream], history.rewards[stream], strict=True)):
            bounds = [
                np.mean(r) + family.ucb_scale * math.sqrt(2 * math.log(t) / len(r)) if r else math.inf
                for r in rewards
            ]
            best = [a for a in range(4) if bounds[a] >= max(bounds) - 1e-9]
            assert arm in best
            assert history.action_probs[stream, t] == pytest.approx(1 / len(best))
            assert history.entropy is not None
            assert history.entropy[stream, t] == pytest.approx(math.log(len(best)), abs=1e-6)
            rewards[arm].append(float(reward))


def test_regret_of_both_rules_grows_like_a_logarithm() -> None:
    """UCB1 stays below the bound of Auer et al. 2002, theorem 1; the second half costs less than the first.

    The means of 200 runs have standard errors of a few per cent of what separates both halves.
    """
    chances = np.array([0.9, 0.6, 0.6, 0.5])
    family = BernoulliBandit(n_arm=4)
    n, gaps = 1000, 0.9 - chances
    bound = 8 * sum(math.log(n) / gap for gap in gaps[1:]) + (1 + math.pi**2 / 3) * gaps.sum()
    for name, player in family.references(chances[None]).items():
        agent = player(0)
        env = family.make(np.tile(chances, (200, 1)), np.arange(200))
        agent.reset(200)
        obs, regret = env.reset(), np.zeros((n, 200))
        for t in range(n):
            arms = agent.act(obs)
            step = env.step(arms)
            agent.observe(arms, step)
            regret[t] = gaps[arms]
        total = regret.sum(axis=0).mean()
        assert total < bound, name
        assert regret[n // 2 :].sum() < 0.6 * regret[: n // 2].sum(), name
        assert total < n * gaps.mean() / 3, name  # of what the random policy loses


def test_references_meet_the_luck_of_the_evaluation_and_are_reproducible() -> None:
    family = FAMILIES[0]
    tasks = family.tasks()[:3]
    first = evaluate_references(family, tasks, rollouts=2, episodes=30, seed=1)
    again = evaluate_references(family, tasks, rollouts=2, episodes=30, seed=1)
    assert list(first) == ["Thompson sampling", "UCB1"]
    for name in first:
        assert first[name].shape == (3, 2, 30)
        np.testing.assert_array_equal(first[name], again[name])


# ---------------------------------------------------------------- as source learners


@pytest.mark.parametrize("name", LEARNERS)
def test_a_history_depends_on_seed_and_task_alone(name: str) -> None:
    family = FAMILIES[0]
    together, alone = learn(name, family, [2, 7, 11]), learn(name, family, [7])
    for (key, a), (_, b) in zip(together[1].per_step(), alone[0].per_step(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)
    other = learn(name, family, [7], seed=4)[0]
    assert not np.array_equal(other.actions, alone[0].actions)
    as_streams = learn(name, family, [7], n_learner=1, n_stream=4)[0]
    np.testing.assert_array_equal(as_streams.actions, alone[0].actions)
    np.testing.assert_array_equal(alone[0].learner, np.arange(4))  # every stream is a run of its own
    np.testing.assert_array_equal(alone[0].update, np.tile(np.arange(40), (4, 1)))
    assert len(np.unique(alone[0].actions, axis=0)) == 4
    assert (alone[0].action_probs > 0).all() and (alone[0].action_probs <= 1).all()


@pytest.mark.parametrize("name", ["thompson", "ucb1"])
def test_other_families_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"learns bandits \(bernoulli_bandit, .*\), not darkroom"):
        learn(name, Darkroom(), [0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("thompson", {"prior": [1]}, "prior must be a list of 2 values, each a number, got"),
        ("ucb1", {"scale": -1}, "scale must be a number of at least 0, got -1"),
        ("noise", {"final": 2}, "final must be a number between 0 and 1, got 2"),
        ("noise", {"schedule": "liner"}, "schedule must be one of linear, cosine, quadratic, got 'liner'"),
        ("thompson", {"pior": [1, 1]}, "did you mean 'prior'"),
    ],
)
def test_wrong_settings_are_named(name: str, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_learner(name, kwargs)


# ---------------------------------------------------------------- noise


SPACES = [
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3]),
    spaces.Box(np.array([-1, 0], np.float32), np.array([1, 5], np.float32)),
]


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_noise_has_the_chances_that_it_records(space: spaces.Space[AnyArray]) -> None:
    """40,000 actions at the rate 0.3: every frequency within 5 standard errors of its recorded chance."""
    n, rate = 40_000, 0.3
    space.seed(0)
    best = np.asarray(space.sample())
    agent = NoisyAgent(
        lambda tasks, obs, so_far: np.broadcast_to(best, (n, *best.shape)),
        np.zeros((n, 1)),
        UniformActions(space),
        np.array([rate]),
        lambda n_env: np.random.default_rng(0).spawn(n_env),
    )
    agent.reset(n)
    actions = agent.act(np.zeros(n, int))
    assert all(space.contains(action) for action in actions[:200])
    greedy = (actions == best).reshape(n, -1).all(axis=1)
    if isinstance(space, spaces.Box):
        assert agent.entropy is None
        np.testing.assert_array_equal(agent.probability, greedy)
        assert abs(greedy.mean() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / n)
        noisy = (actions[~greedy] - space.low) / (space.high - space.low)
        assert distributions.kstest(noisy.ravel(), "uniform").pvalue > 1e-3
        return
    kinds, counts = np.unique(actions.reshape(n, -1), axis=0, return_counts=True)
    n_action, n_part = (4, 1) if isinstance(space, spaces.Discrete) else (6, 2)
    assert len(kinds) == n_action
    chances = []
    for kind, count in zip(kinds, counts, strict=True):
        rows = (actions.reshape(n, -1) == kind).all(axis=1)
        recorded = np.unique(agent.probability[rows])
        assert len(recorded) == 1
        chances.append(recorded[0] ** n_part)
        assert abs(count / n - chances[-1]) <= 5 * math.sqrt(chances[-1] / n)
    assert sum(chances) == pytest.approx(1)
    np.testing.assert_allclose(agent.entropy, distributions.entropy(chances))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
def test_noise_falls_from_one_to_final(schedule: str) -> None:
    rate = NoiseDistillation(final=0.2, schedule=schedule).rate(50)
    assert rate[0] == 1 and rate[-1] == pytest.approx(0.2) and (np.diff(rate) <= 0).all()


def test_noise_plays_what_the_family_knows_or_a_policy_of_ones_own() -> None:
    """Without noise left, the optimum: in Key-to-Door it depends on the return so far."""
    family = KeyToDoor(5, 20)
    ids = np.array([3, 100, 444])
    ended = NoiseDistillation().learn(
        family, ids, family.tasks()[ids], n_timesteps=2000, n_learner=1, n_stream=3, seed=0
    )
    own = NoiseDistillation(policy=lambda tasks, obs, so_far: np.zeros(len(obs), np.int64)).learn(
        family, ids, family.tasks()[ids], n_timesteps=200, n_learner=1, n_stream=3, seed=0
    )
    for history, still in zip(ended, own, strict=True):
        last = history.rewards[:, -200:].sum() / history.episode_end[:, -200:].sum()
        assert history.rewards[:, :200].sum() / 200 < history.rewards[:, -200:].sum() / 200
        assert last > 1.8
        assert (still.actions[:, -10:] == 0).mean() > 0.8
    with pytest.raises(UsageError, match="offers no optimal policy"):
        NoiseDistillation().learn(
            Unknowing(), ids, np.zeros((3, 1)), n_timesteps=5, n_learner=1, n_stream=1, seed=0
        )
    with pytest.raises(SpaceError, match="bounded Box"):
        UniformActions(spaces.Box(-np.inf, np.inf, (1,)))


class Unknowing:
    """A family without an optimal policy; it is refused before anything else of it is asked."""

    name = "unknowing"
    observation_space = action_space = spaces.Discrete(2)
    horizon = 1

    def tasks(self) -> AnyArray:
        return np.zeros((3, 1))

    def make(self, tasks: AnyArray, seeds: AnyArray) -> Step:
        raise AssertionError

    def optimal_return(self, tasks: AnyArray) -> None:
        return None

    def random_return(self, tasks: AnyArray) -> AnyArray:
        return np.zeros(len(tasks))


# ---------------------------------------------------------------- from nothing to a report


def test_a_bandit_run_ends_in_its_regret(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "config"
    done = cad(
        "run", "--preset", "smoke", "--out", tmp_path / "run", "--env", "bandit", "--algorithm", "thompson",
        "--env.kwargs", "{n_arm: 3, n_task: 12}", "--env.validation", "2", "--env.heldout", "3",
        "--algorithm.n_timesteps", "60", "--evaluation.episodes", "40", "--comparison.runs", "1",
        "--comparison.methods", "[AD]", "--algorithm.n_process", "1", "--model.steps", "20",
        cwd=config,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Cumulative regret over 40 episodes" in done.stdout
    assert "Met the reward" not in done.stdout  # an episode is one pull: there is nothing to search for
    assert load(tmp_path / "run" / "AD-bandit-seed0" / "best_model.pt")["config"]["one_step"] is True
    report = tmp_path / "run" / "report"
    summary = json.loads((report / "summary.json").read_text())
    assert list(summary["regret"]) == ["AD", "Thompson sampling", "UCB1"]
    assert (report / "figures" / "regret.png").is_file()
    with np.load(tmp_path / "run" / "AD-bandit-seed0" / "evaluation.npz") as file:
        assert int(file["horizon"]) == 1
        earned = file["reference_UCB1"]
        assert earned.shape == file["returns"].shape == (3, 2, 40)
        regret = (file["optimal"] - earned.mean(axis=1).sum(axis=1) / 40).mean() * 40
    assert summary["regret"]["UCB1"]["mean"] == pytest.approx(regret, abs=1e-4)
    assert "UCB1" in (report / "index.html").read_text()
