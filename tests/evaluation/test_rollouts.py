"""In-context episodes kept step by step: the same play, measures against brute force, the command line."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from compressed_ad.cli.main import main
from compressed_ad.errors import UsageError
from compressed_ad.evaluation import evaluate
from compressed_ad.evaluation.agents import OptimalAgent, RandomAgent
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.evaluation.rollouts import (
    ActionLog,
    FirstReward,
    Rollouts,
    coverage,
    first_reward,
    n_place,
    random_found_by,
    random_rollouts,
    rank_correlation,
    record_rollouts,
    replay_rollouts,
    shortest,
)
from compressed_ad.histories.file import HistoryFile
from compressed_ad.models import MODEL
from compressed_ad.models.settings import ModelConfig
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, DarkroomPermuted, KeyToDoor
from tests.cli.test_main import MODEL as MODEL_WORDS, NAME, SMALL, errors, tree
from tests.tasks.test_gridworld import every_sequence

FAMILIES = [Darkroom(4, 6), DarkroomHard(4, 6), DarkroomPermuted(3, 7), KeyToDoor(3, 8)]
ROOT = Path(__file__).parents[2]
ROOM = "{size: 3, horizon: 5}"


def some(family, count: int = 5) -> np.ndarray:
    tasks = family.tasks()
    return tasks[np.linspace(0, len(tasks) - 1, count).astype(int)]


def walked(family, seed: int, rollouts: int = 3, episodes: int = 4) -> Rollouts:
    record = random_rollouts(family, some(family), rollouts=rollouts, episodes=episodes, seed=seed)
    assert record is not None
    return record


# ---------------------------------------------------------------- recording


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_it_plays_as_the_evaluation_does(family) -> None:
    """A model with dropout and marks: the same returns, so the same actions; and it is left in its mode."""
    torch.manual_seed(0)
    spaces = {
        "observation_space": {"kind": "multidiscrete", "nvec": [family.size, family.size]},
        "action_space": {"kind": "discrete", "n": 5},
    }
    config = {"tf_n_embd": 16, "tf_n_head": 2, "tf_n_layer": 1, "n_transit": 20, "dropout": 0.5, **spaces}
    model = MODEL["CompressedAD"](ModelConfig.model_validate({"model": "CompressedAD", **config}))
    torch.nn.init.normal_(model.head.weight)
    model.train()
    size = {"rollouts": 3, "episodes": 5, "seed": 7}
    options = {"marks": "prompt", "temperature": 0.7}
    wanted = evaluate_tasks(model, family, some(family), **size, **options)
    record = record_rollouts(model, family, some(family), **size, **options)
    assert model.training
    assert record.returns.dtype == wanted.dtype and record.returns.shape == (5, 3, 5)
    np.testing.assert_array_equal(record.returns, wanted)
    # Another seed is another play: the equality above is no accident.
    other = record_rollouts(model, family, some(family), **{**size, "seed": 8}, **options)
    steps = min(record.actions.shape[2], other.actions.shape[2])
    assert (record.actions[:, :, :steps] != other.actions[:, :, :steps]).any()


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_every_transition_is_kept_as_it_was(family) -> None:
    """Played again, the recorded actions give what was recorded."""
    record = walked(family, seed=1)
    slots = np.repeat(record.tasks, 3, axis=0)
    env = family.make(slots, np.zeros(len(slots), np.int64))
    obs = env.reset()
    assert record.observations.dtype == record.successors.dtype == record.actions.dtype == np.uint8
    for t in range(record.rewards.shape[2]):
        flat = {
            name: value[:, :, t].reshape(15, *value.shape[3:])
            for name, value in vars(record).items()
            if name not in ("tasks", "n_episode")
        }
        np.testing.assert_array_equal(flat["observations"], obs)
        step = env.step(flat["actions"].astype(np.int64))
        for name, value in (
            ("successors", step.next_obs),
            ("rewards", step.reward),
            ("terminated", step.terminated),
            ("truncated", step.truncated),
        ):
            np.testing.assert_array_equal(flat[name], value)
        obs = step.obs


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_kept_actions_give_the_rollouts_again(family) -> None:
    log, size = ActionLog(), {"rollouts": 3, "episodes": 4, "seed": 3}
    tasks = some(family)
    agent = RandomAgent(family.action_space, 5)
    returns = evaluate_tasks(agent, family, tasks, watch=log.watch, **size)
    wanted = record_rollouts(RandomAgent(family.action_space, 5), family, tasks, **size)
    actions = log.actions()
    assert actions.dtype == np.uint8
    again = replay_rollouts(actions, returns, family, tasks, seed=3)
    assert again is not None
    for name, value in vars(wanted).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    other = np.where(np.arange(4) == 2, returns + 1, returns)
    for wrong in ((actions[:, :5], returns), (actions, other), (actions[1:], returns), (actions[0], returns)):
        assert replay_rollouts(*wrong, family, tasks, seed=3) is None
    assert replay_rollouts(actions + 9, returns, family, tasks, seed=3) is None


def test_what_is_played_after_the_last_episode_does_not_count() -> None:
    """Goals beside the start end their episodes early, so those rollouts play on while others finish."""
    family = DarkroomHard(5, 9)
    tasks = np.array([[2, 3], [0, 0]])
    record = random_rollouts(family, tasks, rollouts=4, episodes=6, seed=2)
    assert record is not None
    late = record.episode >= 6
    assert late.any() and not late.all(axis=-1).any()
    blank = replace(record, rewards=np.where(late, 9, record.rewards).astype(np.float32))
    far = replace(blank, successors=np.where(late[..., None], 77, record.successors))
    np.testing.assert_array_equal(far.returns, record.returns)
    np.testing.assert_array_equal(coverage(far), coverage(record))
    for key in ("found", "steps", "episodes"):
        np.testing.assert_array_equal(getattr(first_reward(far), key), getattr(first_reward(record), key))


def test_nothing_to_play_is_told() -> None:
    family = Darkroom(3, 4)
    with pytest.raises(UsageError, match="nothing to play: 0 tasks"):
        record_rollouts(RandomAgent(5), family, family.tasks()[:0], rollouts=1, episodes=1)
    with pytest.raises(UsageError, match="0 rollouts"):
        record_rollouts(RandomAgent(5), family, family.tasks(), rollouts=0, episodes=1)
    with pytest.raises(UsageError, match="at least 1"):
        record_rollouts(RandomAgent(5), family, family.tasks(), rollouts=1, episodes=0)


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_brute_force(family, seed: int) -> None:
    record = walked(family, seed)
    first = first_reward(record)
    seen, searched = coverage(record), coverage(record, until_reward=True)
    outcomes = set()
    for n, m in np.ndindex(*record.rewards.shape[:2]):
        places, until, episode, found = set(), set(), 0, None
        curve, search = [], []
        for t in range(record.rewards.shape[2]):
            cells = {tuple(record.observations[n, m, t]), tuple(record.successors[n, m, t])}
            places |= cells
            if found is None:
                until |= cells
                if record.rewards[n, m, t] > 0:
                    found = (t + 1, episode + 1)
            if record.terminated[n, m, t] or record.truncated[n, m, t]:
                curve.append(len(places))
                search.append(len(until))
                episode += 1
                if episode == record.n_episode:
                    break
        assert seen[n, m].tolist() == curve
        assert searched[n, m].tolist() == search
        assert first.found[n, m] == (found is not None)
        assert (first.steps[n, m], first.episodes[n, m]) == (found or (t + 1, record.n_episode))
        outcomes.add(found is None)
    assert seen.max() <= n_place(family)
    assert False in outcomes


def test_censored_rollouts_are_later_than_all_others() -> None:
    found = np.array([[True, True, False, False], [True, False, False, False], [False] * 4])
    episodes = np.array([[1, 3, 5, 5], [2, 5, 5, 5], [5] * 4])
    first = FirstReward(found=found, steps=10 * episodes, episodes=episodes, n_episode=5)
    assert first.median("episodes").tolist() == [3, np.inf, np.inf]
    assert first.median().tolist() == [30, np.inf, np.inf]
    assert first.never.tolist() == [False, False, True]
    assert first.found_by().tolist() == [
        [0.25, 0.25, 0.5, 0.5, 0.5], [0, 0.25, 0.25, 0.25, 0.25], [0] * 5
    ]  # fmt: skip


def test_rank_correlation_is_spearmans_with_ties() -> None:
    random = np.random.default_rng(0)
    distance, times = random.integers(1, 5, 6).astype(float), random.integers(1, 9, (6, 4)).astype(float)
    wanted = spearmanr(np.repeat(distance, 4), times.ravel()).statistic
    assert rank_correlation(distance, times) == pytest.approx(wanted)
    # Infinitely late is the same as later than all.
    times[times > 6] = np.inf
    late = np.where(np.isinf(times), 99.0, times)
    assert rank_correlation(distance, times) == pytest.approx(rank_correlation(distance, late))
    assert np.isnan(rank_correlation(np.ones(6), times))


@pytest.mark.parametrize("family", [Darkroom(5, 8), DarkroomHard(6, 11), DarkroomPermuted(3, 7)], ids=repr)
def test_the_optimal_agent_finds_the_goal_in_its_distance(family) -> None:
    """On the start cell itself the goal pays on the first step."""
    tasks = family.tasks()
    record = record_rollouts(OptimalAgent(family, tasks), family, tasks, rollouts=2, episodes=2)
    first = first_reward(record)
    assert first.found.all() and (first.episodes == 1).all()
    distance = np.maximum(family.goal_distance(tasks), 1)
    assert (first.steps == distance[:, None]).all()
    assert (shortest(family, tasks) == distance).all()


def test_what_is_out_of_reach_and_what_pays_first() -> None:
    family = Darkroom(5, 2)
    goals = np.array([[2, 3], [0, 0]])
    assert shortest(family, goals).tolist() == [1, np.inf]
    assert shortest(KeyToDoor(5, 20), np.array([[2, 4, 0, 0]])).tolist() == [2]


@pytest.mark.parametrize(
    "family", [Darkroom(3, 5), DarkroomHard(4, 5), DarkroomPermuted(2, 4), KeyToDoor(2, 4)], ids=repr
)
def test_the_exact_chance_of_the_random_walk_is_that_of_all_action_sequences(family) -> None:
    tasks = some(family)
    met = (every_sequence(family, tasks)[3] > 0).any(axis=-1).mean(axis=1)
    curve = random_found_by(family, tasks, 3)
    np.testing.assert_allclose(curve[:, 0], met, atol=1e-12)
    np.testing.assert_allclose(curve[:, 2], 1 - (1 - met) ** 3, atol=1e-12)


def test_the_played_random_walk_agrees_with_the_exact_one() -> None:
    """400 rollouts: a share's standard error is sqrt(p (1 - p) / 400) <= .025.

    Within 4.5 of them on 75 shares fails by chance once in some 2000 seeds; the seed is fixed.
    """
    family = Darkroom(5, 8)
    tasks = family.tasks()
    record = random_rollouts(family, tasks, rollouts=400, episodes=3, seed=0)
    assert record is not None
    exact = random_found_by(family, tasks, 3)
    error = np.sqrt(exact * (1 - exact) / 400)
    assert (np.abs(first_reward(record).found_by() - exact) <= 4.5 * error).all()


# ---------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """``cad`` in an empty folder: (exit code, standard output, lines of the standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err.splitlines()

    return call


def trained(folder: Path, *collect: str, trust: Sequence[str] = ()) -> Path:
    """A run that was trained for a few steps."""
    assert main(["collect", *collect, "--out", str(folder)]) == 0
    (history,) = folder.glob("history_*.hdf5")
    words = ["train", *MODEL_WORDS, "--model", "AD", "--history", str(history), "--out", str(folder)]
    assert main([*words, *trust]) == 0
    (path,) = folder.glob("AD-*")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("made"), *SMALL)


def test_the_command_writes_what_it_says(run, made: Path, tmp_path: Path) -> None:
    before = tree(made)
    code, out, lines = run("rollouts", made, "--out", "a", "--episodes", "4", "--rollouts", "3")
    assert (code, errors(lines)) == (0, [])
    assert tree(made) == before
    names = {"rollouts.json", "paths.png", "found.png", "coverage.png", "first_reward.png"}
    content = json.loads(Path("a/rollouts.json").read_text(), parse_constant=pytest.fail)
    distances = {task["fewest_steps"] for task in content["tasks"]}
    if len(distances) == 1:
        names -= {"first_reward.png"}
    names |= {name.replace(".png", ".svg") for name in names}
    assert {path.name for path in Path("a").iterdir()} - {".lock"} == names
    heldout = HistoryFile(made.parent / NAME).split.heldout.tolist()
    assert [task["task"] for task in content["tasks"]] == heldout
    assert {task["part"] for task in content["tasks"]} == {"held-out"}
    assert content["playing"]["episodes"] == 4 and content["playing"]["rollouts"] == 3
    assert content["in_context"]["rollouts"] == 3 * len(heldout)
    assert len(content["in_context"]["found_by"]) == len(content["random_walk_exact_found_by"]) == 4
    shares = [task["found"] for task in content["tasks"]]
    assert content["in_context"]["found_by"][-1] == pytest.approx(np.mean(shares), abs=1e-6)
    for task in content["tasks"]:
        assert out.count(f"{task['task']} ({task['parameters'][0]}, {task['parameters'][1]})") == 1
    assert "alf of the model's rollouts " in out and "alf of the uniform random walks " in out
    # Again into the same folder, the same.
    kept = {name: content for name, content in tree(Path("a")).items() if name != ".lock"}
    assert run("rollouts", made, "--out", "a", "--episodes", "4", "--rollouts", "3")[:2] == (0, out)
    assert {name: content for name, content in tree(Path("a")).items() if name != ".lock"} == kept


def test_the_command_plays_what_the_evaluation_plays(run, made: Path, tmp_path: Path, monkeypatch) -> None:
    """With the run's own settings its returns are those of ``evaluation.npz``."""
    path = tmp_path / "copy" / made.name
    shutil.copytree(made.parent, path.parent)
    code, _, lines = run("evaluate", path)
    assert (code, errors(lines)) == (0, [])
    played, original = [], evaluate.evaluate_in_context

    def listening(*arguments, **options):
        played.append(original(*arguments, **options))
        return played[-1]

    monkeypatch.setattr(evaluate, "evaluate_in_context", listening)
    assert run("rollouts", path)[0] == 0
    assert (path / "rollouts" / "rollouts.json").exists()
    with np.load(path / "evaluation.npz") as stored:
        wanted = stored["returns"]
    got = played[0].reward_episode.T.reshape(wanted.shape)
    np.testing.assert_array_equal(got, wanted)


def test_chosen_tasks_are_named_by_their_part(run, made: Path) -> None:
    file = HistoryFile(made.parent / NAME)
    chosen = [int(file.split.train[0]), int(file.split.validation[0]), int(file.split.heldout[0])]
    words = ["--tasks", ",".join(map(str, chosen)), "--episodes", "1", "--rollouts", "1", "--out", "b"]
    assert run("rollouts", made, *words)[0] == 0
    content = json.loads(Path("b/rollouts.json").read_text())
    assert [t["task"] for t in content["tasks"]] == chosen
    assert [t["part"] for t in content["tasks"]] == ["training", "validation", "held-out"]


def test_mistakes_are_one_line_and_write_nothing(run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    cases = [
        (["rollouts", made, "--tasks", "0,9,x"], 2, "--tasks: expected numbers from 0 to 8, got '9', 'x'"),
        (["rollouts", made, "--tasks", ""], 2, "--tasks: expected numbers from 0 to 8, got ''"),
        (["rollouts", made, "--episodes", "0"], 2, "expected a whole number of at least 1, got '0'"),
        (["rollouts", made, "--seed", "-1"], 2, "must be a whole number of at least 0"),
        (["rollouts", made, "--device", "gpu"], 2, "device must be one of auto, cpu, cuda"),
        (["rollouts", tmp_path / "mine"], 1, "is not a run directory"),
        (["rollouts", made, "--out", "mine"], 1, "mine: exists and has no rollouts.json; choose another"),
        (["rollouts", made, "--history", "none.hdf5"], 1, "none.hdf5"),
        (["rollouts"], 2, "the following arguments are required: RUN"),
    ]
    before = tree(tmp_path)
    for words, wanted, cause in cases:
        code, out, lines = run(*words)
        assert (code, out) == (wanted, ""), words
        (line,) = errors(lines)
        assert cause in line
    assert tree(tmp_path) == before
    code, out, _ = run("rollouts", made, "--dry-run")
    assert (code, out.startswith("Would play 2 tasks x ")) == (0, True)
    assert tree(tmp_path) == before


def test_without_a_grid_what_can_be_measured_is(run, tmp_path: Path, monkeypatch) -> None:
    """The example's ring: places are counted, no paths drawn, and how far rewards are is not told."""
    spec = importlib.util.spec_from_file_location("own_family", ROOT / "examples" / "own_family.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_family", module)
    spec.loader.exec_module(module)
    family = ["--env", "own_family:WindyRing", "--env.kwargs", "{size: 5, horizon: 5}"]
    words = family + [w for w in SMALL if w not in ("--env.kwargs", ROOM)]
    trust = ["--trust", "own_family:WindyRing"]
    path = trained(tmp_path / "made", *words, trust=trust)
    code, out, _ = run("rollouts", path, "--episodes", "3", "--out", "c", *trust)
    assert code == 0
    assert "Note: the family tells no distance to its rewards." in out
    assert "Note: no grid: distinct observations are counted, and no paths drawn." in out
    content = json.loads(Path("c/rollouts.json").read_text(), parse_constant=pytest.fail)
    assert content["places"] is None
    coverage = content["in_context"]["coverage"]
    assert 2 <= coverage[0] <= coverage[1] <= coverage[2] <= 5
    assert not Path("c/paths.png").exists() and Path("c/found.png").exists()


def test_where_every_step_may_pay_meeting_a_reward_is_said_to_mean_nothing(run, tmp_path: Path) -> None:
    bandits = [
        "--env",
        "bernoulli_bandit",
        "--env.n_task",
        "6",
        "--env.heldout",
        "2",
        "--env.validation",
        "1",
    ]
    source = ["--algorithm", "thompson", "--algorithm.n_stream", "2", "--algorithm.n_timesteps", "60"]
    path = trained(tmp_path / "made", *bandits, *source)
    code, out, _ = run("rollouts", path, "--episodes", "3", "--out", "c")
    assert code == 0
    assert "Note: random actions are paid as well: meeting a reward says nothing." in out
