"""Gymnasium environments as task families: what makes tasks, what is seeded, what is refused."""

import json
import pickle
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from compressed_ad.cli.call import Stop
from compressed_ad.cli.main import parse
from compressed_ad.errors import CompressedADError, ConfigError, SpaceError, UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.seeding import rng
from compressed_ad.tasks.conformance import check_family
from compressed_ad.tasks.from_gymnasium import GymnasiumFamily
from compressed_ad.tasks.select import make_family
from tests.conftest import cad

CART_POLE = {"length": "0.25:1.0", "gravity": "5:15"}


class Levers(gymnasium.Env):
    """Needs an argument, ends by itself, has no time limit; observes float64 in a float32 space."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3, start=1)

    def __init__(self, best, pay=1.0):
        if best not in (1, 2, 3):
            raise KeyError(f"no lever {best}")
        self.best, self.pay, self.doubled = best, pay, 2 * pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.random(2), {}

    def step(self, action):
        self.time += 1
        return self.np_random.random(2), self.pay * (action == self.best), self.time == 3, False, {}


class Nested(Levers):
    """Observes a mapping."""

    observation_space = spaces.Dict({"a": spaces.Discrete(2)})

    def __init__(self):
        super().__init__(1)


class Pair(Nested):
    """Observes a pair."""

    observation_space = spaces.Tuple([spaces.Discrete(2)])


def doubled(env):
    """A ``setup``."""
    env.doubled = 2 * env.pay


def broken(env):
    """A ``setup`` that fails."""
    raise KeyError("nothing\nhere")


for env in (Levers, Nested, Pair):
    gymnasium.register(f"Test{env.__name__}-v0", env)


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {"params": CART_POLE, "n_task": 3}),
        (
            "Pendulum-v1",
            {"params": {"g": "5:15", "m": "0.5:2", "l": [0.5, 1, 2]}, "n_task": 3, "horizon": 20},
        ),
        ("MountainCar-v0", {"params": {"force": "0.0005:0.002"}, "n_task": 3, "horizon": 20}),
        ("TestLevers-v0", {"params": {"best": [1, 2, 3]}, "n_task": 3, "horizon": 5}),
    ],
)
def test_they_keep_the_promises_of_a_family(env_id, kwargs):
    family = make_family(f"gymnasium:{env_id}", {**kwargs, "random_episodes": 2})
    check_family(family)
    check_family(pickle.loads(pickle.dumps(family)))


def test_numbers_are_set_and_what_follows_from_them_too():
    family = GymnasiumFamily("CartPole-v1", {"length": "0.25:1.0", "masspole": "0.1:0.5"}, n_task=8)
    tasks = family.tasks()
    assert ((tasks >= [0.25, 0.1]) & (tasks <= [1.0, 0.5])).all()
    for row in tasks:
        bare = family.environment(row).unwrapped
        assert (bare.length, bare.masspole) == tuple(row)
        assert bare.total_mass == bare.masspole + bare.masscart
        assert bare.polemass_length == bare.masspole * bare.length


def test_arguments_of_the_constructor_are_passed_and_attributes_set():
    family = GymnasiumFamily("Pendulum-v1", {"m": "0.5:2", "g": "5:15"}, n_task=2)
    assert family.constructed == ["g"]
    bare = family.environment(family.tasks()[1]).unwrapped
    assert [bare.m, bare.g] == family.tasks()[1].tolist()


@pytest.mark.parametrize(
    ("env_id", "params", "values"),
    [
        ("Pendulum-v1", {"max_speed": "3:5"}, [3, 4, 5]),  # an int by default
        ("Pendulum-v1", {"max_speed": {"low": 3, "high": 5}}, [3, 4, 5]),
        ("Pendulum-v1", {"g": "5, 9.5"}, [5.0, 9.5]),
        ("FrozenLake-v1", {"is_slippery": "true,false"}, [False, True]),
        ("FrozenLake-v1", {"is_slippery": [True, False, True]}, [False, True]),
        ("TestLevers-v0", {"best": "1,2"}, [1, 2]),  # no default: as it was given
    ],
)
def test_whole_numbers_and_named_choices(env_id, params, values):
    family = GymnasiumFamily(env_id, params, n_task=len(values), horizon=5)
    (key,) = params
    got = [getattr(family.environment(row).unwrapped, key, None) for row in family.tasks()]
    if env_id == "FrozenLake-v1":
        got = [family.environment(row).spec.kwargs[key] for row in family.tasks()]
    assert sorted(got) == values
    assert {type(value) for value in got} == {type(value) for value in values}


def test_a_fractional_range_of_what_is_whole_by_default_is_not_rounded():
    tasks = GymnasiumFamily("MountainCar-v0", {"goal_velocity": "0:0.04"}, n_task=5).tasks()
    assert ((tasks > 0) & (tasks < 0.04)).all()


def test_tasks_are_seeded_distinct_and_more_of_them_begin_alike():
    tasks = GymnasiumFamily("CartPole-v1", CART_POLE, n_task=64).tasks()
    assert tasks.shape == (64, 2)
    assert len(np.unique(tasks, axis=0)) == 64
    np.testing.assert_array_equal(GymnasiumFamily("CartPole-v1", CART_POLE, n_task=9).tasks(), tasks[:9])
    other = GymnasiumFamily("CartPole-v1", CART_POLE, n_task=64, task_seed=1).tasks()
    assert not np.isin(tasks, other).any()
    alone = GymnasiumFamily("CartPole-v1", {"length": "0.25:1.0"}, n_task=64).tasks()
    np.testing.assert_array_equal(alone[:, 0], tasks[:, 0])


def test_slots_depend_on_their_own_seed_alone():
    family = GymnasiumFamily("CartPole-v1", CART_POLE, n_task=4)
    tasks, seeds = family.tasks(), np.array([3, 1, 4, 1])
    actions = np.random.default_rng(0).integers(0, 2, (60, 4))
    together, ended = family.make(tasks, seeds), np.zeros(4, bool)
    alone = [family.make(tasks[k : k + 1], seeds[k : k + 1]) for k in range(4)]
    np.testing.assert_array_equal(together.reset(), np.concatenate([env.reset() for env in alone]))
    for action in actions:
        step, single = together.step(action), [env.step(action[k : k + 1]) for k, env in enumerate(alone)]
        for field in ("next_obs", "reward", "terminated", "truncated", "obs"):
            each = np.concatenate([getattr(one, field) for one in single])
            np.testing.assert_array_equal(getattr(step, field), each, err_msg=field)
        ended |= step.terminated
    assert ended.all()


def test_random_return_is_that_of_an_independent_loop():
    family = GymnasiumFamily("CartPole-v1", CART_POLE, n_task=3, random_episodes=5)
    tasks = family.tasks()
    for row, measured in zip(tasks, family.random_return(tasks), strict=True):
        draws = rng(0, "random return", "CartPole-v1", *map(repr, row.tolist()))
        env, lengths = gymnasium.make("CartPole-v1"), []
        bare = env.unwrapped
        bare.length, bare.gravity = row
        bare.polemass_length = bare.masspole * bare.length
        env.action_space.seed(int(draws.integers(2**31)))
        for _ in range(5):
            env.reset(seed=int(draws.integers(2**31)))
            lengths.append(1)
            while not any(env.step(env.action_space.sample())[2:4]):
                lengths[-1] += 1
        assert measured == np.mean(lengths)
    np.testing.assert_array_equal(family.random_return(tasks[::-1]), family.random_return(tasks)[::-1])


def test_optimal_return_is_what_was_given_or_unknown():
    family = GymnasiumFamily("CartPole-v1", CART_POLE, n_task=2, best_return=500)
    assert family.optimal_return(family.tasks()).tolist() == [500, 500]
    assert GymnasiumFamily("CartPole-v1").optimal_return(np.zeros((1, 1))) is None


def test_without_parameters_there_is_one_task_from_which_nothing_can_be_judged():
    assert GymnasiumFamily("Pendulum-v1").tasks().shape == (1, 1)
    assert GymnasiumFamily("Pendulum-v1", {"g": "5:15"}).tasks().shape == (64, 1)
    for more in ([], ["--tasks", "1"]):
        words = ["collect", "--family", "gymnasium:Pendulum-v1", "--learner", "sb3:SAC", *more]
        with pytest.raises(ConfigError, match=r"has one task; .* say what tasks differ in with --task-param"):
            parse(words, Stop()).config()


def test_horizon_truncates_and_setup_follows_the_numbers():
    family = GymnasiumFamily(
        "TestLevers-v0", {"pay": [3, 5]}, 2, kwargs={"best": 2}, horizon=2, setup=f"{__name__}:doubled"
    )
    assert [family.environment(row).unwrapped.doubled for row in family.tasks()] == [
        2 * pay for pay in family.tasks()[:, 0]
    ]
    env = family.make(family.tasks(), np.arange(2))
    assert env.reset().dtype == np.float32
    assert not env.step(np.array([2, 1])).truncated.any()
    step = env.step(np.array([2, 1]))
    assert (step.reward.tolist(), step.truncated.all()) == ([family.tasks()[0, 0], 0], True)
    assert not step.terminated.any()
    assert not np.array_equal(step.obs, step.next_obs)


def test_ids_with_a_module():
    family = make_family(
        f"gymnasium:{__name__}:TestLevers-v0", {"params": {"best": "1,3"}, "n_task": 2, "horizon": 3}
    )
    check_family(family)


REFUSED = [
    ("CartPol-v1", {}, UsageError, "did you mean 'CartPole-v1'"),
    ("CartPole-v9", {}, UsageError, "did you mean 'CartPole-v1'"),
    ("no_such_module:X-v0", {}, UsageError, "cannot import 'no_such_module'"),
    ("CartPole-v1", {"params": {"lenght": "0:1"}}, ConfigError, "did you mean 'length'"),
    ("CartPole-v1", {"params": {"total_mass": "1:2"}}, ConfigError, "no parameter 'total_mass'"),
    ("CartPole-v1", {"params": {"length": "a:b"}}, UsageError, "expected a range low:high or a list"),
    ("CartPole-v1", {"params": {"length": []}}, UsageError, "expected a range low:high or a list"),
    ("CartPole-v1", {"params": {"length": "2:1"}}, UsageError, "low < high"),
    ("CartPole-v1", {"params": {"length": "a,b"}}, UsageError, "'length' is a number, not"),
    ("CartPole-v1", {"params": {"length": "1,2"}}, UsageError, "only 2 different tasks"),
    ("CartPole-v1", {"params": ["length"]}, ConfigError, "params must be keys with values"),
    ("CartPole-v1", {"n_task": 8}, UsageError, "8 tasks, but .*; say it with --task-param .*gravity"),
    ("CartPole-v1", {"n_task": 0}, ConfigError, "n_task must be a whole number"),
    ("CartPole-v1", {"horizon": True}, ConfigError, "horizon must be a whole number"),
    ("CartPole-v1", {"random_episodes": 1.5}, ConfigError, "random_episodes must be a whole number"),
    ("CartPole-v1", {"best_return": "high"}, ConfigError, "best_return must be a number"),
    ("CartPole-v1", {"n_task": 1, "kwargs": {"blah": 1}}, UsageError, "cannot be made"),
    ("CartPole-v1", {"n_task": 1, "setup": "nowhere:f"}, UsageError, "cannot import 'nowhere'"),
    ("CartPole-v1", {"n_task": 1, "setup": f"{__name__}:broken"}, UsageError, "failed: .*KeyError"),
    (
        "Pendulum-v1",
        {"params": {"g": "5:9"}, "kwargs": {"g": 9}},
        UsageError,
        "g stands in params and in",
    ),
    ("Blackjack-v1", {"n_task": 1}, UsageError, "no time limit of its own; say which with horizon"),
    ("FrozenLake-v1", {"params": {"map_name": "4x4,8x8"}}, SpaceError, "'map_name' changes the observ"),
    ("FrozenLake-v1", {"params": {"map_name": "4x4,3x3"}}, UsageError, "cannot be made with .*3x3"),
    ("TestLevers-v0", {"params": {"best": "1,7"}, "horizon": 3}, UsageError, "no lever 7.*KeyError"),
    ("TestNested-v0", {"n_task": 1, "horizon": 3}, SpaceError, "observation space of .*Dict"),
    ("TestPair-v0", {"n_task": 1, "horizon": 3}, SpaceError, "observation space of .*Tuple"),
]


@pytest.mark.parametrize(("env_id", "options", "kind", "sentence"), REFUSED)
def test_every_mistake_is_one_line_when_the_family_is_made(env_id, options, kind, sentence):
    with pytest.raises(CompressedADError, match=sentence) as caught:
        make_family(f"gymnasium:{env_id}", options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_what_the_page_says_of_mistakes_is_what_is_said():
    """Every message that the table of docs/environments.md quotes comes, word for word."""
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text("utf-8")
    quoted = re.findall(r"^\| `(.*?)` \|", page.partition("| message |")[2], re.MULTILINE)
    said = []
    for env_id, options, *_ in REFUSED:
        with pytest.raises(CompressedADError) as caught:
            make_family(f"gymnasium:{env_id}", options)
        said.append(str(caught.value))
    for words in (
        "--family gymnasium:Pendulum-v1",
        "--family darkroom --tasks 9",
        "--family darkroom --task-param length=1,2",
        "--family gymnasium:CartPole-v1 --task-param length=0.25:1 --tasks 12",
        "--family gymnasium:Pendulum-v1 --task-param g=5:15 --learner sb3:DQN",
    ):
        with pytest.raises(ConfigError) as found:
            parse(["collect", *words.split()], Stop()).config()
        said.append(str(found.value))
    assert len(quoted) >= 12
    assert not [message for message in quoted if not any(message in line for line in said)]


def test_cart_pole_tasks_go_from_the_command_line_to_the_report(tmp_path):
    done = cad(
        "run", "--preset", "smoke", "--out", tmp_path / "run", "--env.name", "cart_pole",
        "--family", "gymnasium:CartPole-v1", "--task-param", "length=0.25:1.0",
        "--task-param", "gravity=5:15", "--tasks", "6", "--env.validation", "1", "--env.heldout", "2",
        "--env.kwargs.horizon", "40", "--env.kwargs.random_episodes", "2",
        "--algorithm.n_timesteps", "200", "--algorithm.n_process", "1", "--model.steps", "4",
        "--comparison.runs", "1", "--comparison.methods", "[AD]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    file = HistoryFile(out / "history_cart_pole_PPO_alg-seed0_compressed.hdf5")
    assert file.tasks.shape == (6, 2) and file.optimal_return is None
    assert ((file.tasks >= [0.25, 5]) & (file.tasks <= [1, 15])).all()
    lost = 0
    for history in file.load().values():
        # True successors: the pole has fallen, or the cart is gone, exactly where an episode terminates.
        cart, _, pole, _ = np.moveaxis(history.next_states, -1, 0)
        fallen = (abs(cart) > 2.4) | (abs(pole) > 12 * np.pi / 180)
        np.testing.assert_array_equal(history.terminated, fallen)
        going = ~history.episode_end[:, :-1]
        np.testing.assert_array_equal(history.states[:, 1:][going], history.next_states[:, :-1][going])
        assert (abs(history.states[:, 1:][~going]) <= 0.05).all()
        lost += int(fallen.sum())
    assert lost > 20
    with np.load(out / "AD-cart_pole-seed0" / "evaluation.npz") as evaluation:
        assert evaluation["paying"] == 1 and np.isnan(evaluation["optimal"]).all()
        assert evaluation["returns"].shape == (2, 2, 5) and (evaluation["returns"] > 0).all()
    # Every step pays, and the best possible return is not known: both is said, in terminal and report.
    shown = " ".join(done.stdout.split())
    assert "Final return" in shown and "Met by episode 10" not in shown
    assert "1 is the best episode of the source algorithm (the optimal return is unknown)" in shown
    page = (out / "report" / "index.html").read_text()
    assert "the best episode of the source algorithm" in page and "Met the reward" not in page
    assert not (out / "report" / "figures" / "found_AD.png").exists()
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["methods"]["AD"]["found"]["iqm"] is None
    assert np.isfinite(summary["methods"]["AD"]["final"]["iqm"])


def test_shorthands_of_the_command_line():
    words = ["collect", "--family", "gymnasium:CartPole-v1", "--task-param", "length=0.25:1.0"]
    words += ["--task-param", "gravity=5,10", "--tasks", "32", "--learner", "ppo"]
    config = parse([*words, "--learner-kwargs", "n_epochs=3", "learning_rate=0.01"], Stop()).config()
    assert config.env.family == "gymnasium:CartPole-v1"
    assert config.env.kwargs == {"params": {"length": "0.25:1.0", "gravity": "5,10"}, "n_task": 32}
    assert config.algorithm.learner_kwargs["n_epochs"] == 3
    mapping = parse([*words, "--learner-kwargs", "{n_epochs: 3, learning_rate: 0.01}"], Stop()).config()
    assert mapping.algorithm == config.algorithm
    with pytest.raises(UsageError, match="--task-param takes KEY=LOW:HIGH"):
        parse(["collect", "--task-param", "length"], Stop())
