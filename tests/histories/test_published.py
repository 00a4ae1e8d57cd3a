"""The layouts of published data sets, on small ones that are written as their programs write them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from compressed_ad import Darkroom, HistoryFile, apply_marker, make_family
from compressed_ad.errors import HistoryError, UsageError
from compressed_ad.histories.exchange import importing, published
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT, Selected
from compressed_ad.tasks.gridworld import DarkroomHard
from compressed_ad.tasks.replay import play
from tests.cli.test_main import errors, run, tree
from tests.histories import published_data as data
from tests.test_docs import blocks, commands

__all__ = ["run"]  # the fixture

PAGE = Path(__file__).parents[2] / "docs" / "exchange.md"
COMMANDS = {words[words.index("--layout") + 1]: words for words in commands(PAGE) if "--layout" in words}
ROOM = ["--family", "darkroom", "--actions", "0,3,1,4,2", "--split-seed", "0", "--out", "h.hdf5"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_all(tmp_path_factory.mktemp("published"))


@pytest.fixture
def here(run: Any, tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs ``cad`` where the page's data and modules are."""
    (tmp_path / "data").symlink_to(written)
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks(PAGE, "python"):
        name = block.partition("\n")[0].lstrip("# ")
        if name.endswith(".py"):
            (tmp_path / name).write_text(block)
    return run  # type: ignore[no-any-return]


def page(here: Any, layout: str, tmp_path: Path) -> tuple[HistoryFile, list[str]]:
    """What the command of the page makes, and its notes."""
    code, out, lines = here(*COMMANDS[layout])
    assert (code, errors(lines)) == (0, [])
    return HistoryFile(tmp_path / out.partition(":")[0]), [line for line in lines if "note:" in line]


def truth(family: Any, file: HistoryFile, task: int) -> Any:
    history = file.load([task])[task]
    rows = np.repeat(file.tasks[task][None], history.n_stream, axis=0)
    return history, play(family, rows, history.actions, 0)


def test_ad_eps_is_darkroom_with_known_probabilities(here, tmp_path, written):
    file, notes = page(here, "ad_eps", tmp_path)
    assert len(notes) == 1 and "next_states are not recorded" in notes[0]
    family, names = Darkroom(), {}
    about = json.loads((written / "ad_eps" / "1a2b3" / "metadata.metadata").read_text())
    for name, goal in zip(about["ordered_trajectories"], about["goal"], strict=True):
        names[tuple(goal)] = name
    assert sorted(names) == [tuple(row) for row in file.tasks.tolist()]
    for task in file.task_ids.tolist():
        history, played = truth(family, file, task)
        for name in ("states", "next_states", "rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(history, name), getattr(played, name)), name
        with np.load(written / "ad_eps" / "1a2b3" / names[tuple(file.tasks[task].tolist())]) as raw:
            eps, states = raw["eps"].ravel(), raw["states"].ravel()
        assert np.array_equal(history.states[0] @ [9, 1], states)
        rows = np.broadcast_to(file.tasks[task], (len(eps), 2))
        best = family.optimal_action(rows, history.states[0].astype(int), np.zeros(len(eps)))
        assert np.array_equal(history.optimal_actions[0], best)
        followed = history.actions[0] == best
        assert np.allclose(history.action_probs[0], eps / 5 + (1 - eps) * followed, atol=1e-6)
        assert followed[eps == 0].all() and (eps == 0).any() and not followed.all()
    assert here("mark", file.path, "--marker", "threshold")[0] == 0
    marked = HistoryFile(file.path).load()
    share = np.mean([h.actions == h.optimal_actions for h in marked.values()], axis=(0, 1))
    tenths = " ".join(f"{share[k : k + 12].mean():.2f}" for k in range(0, 120, 12))
    assert f"  Optimal action taken: {tenths} (of" in here("inspect", file.path)[1]
    expert = apply_marker(lambda actions, optimal_actions: actions == optimal_actions, marked[0])
    assert np.array_equal(expert, marked[0].actions == marked[0].optimal_actions)


def test_a_recording_that_contradicts_the_demonstrator_has_no_optimal_actions(here, tmp_path):
    folder = data.write_ad_eps(tmp_path / "own", data.GOALS)
    first = folder / "trajectories_000.npz"
    with np.load(first) as file:
        arrays = dict(file)
    arrays["actions"][-1] = 3  # without noise, and away from the goal
    np.savez(first, **arrays)
    tasks = LAYOUT["ad_eps"](folder)
    assert tasks[0].optimal_actions is None and tasks[0].action_probs is None
    assert tasks[1].optimal_actions is not None and tasks[1].action_probs is not None


def test_headless_ad_has_a_task_for_each_goal_and_a_stream_for_each_run(here, tmp_path, written):
    file, notes = page(here, "headless_ad", tmp_path)
    assert not any("does not reproduce" in note for note in notes)
    assert [tuple(row) for row in file.tasks.tolist()] == sorted(map(tuple, data.GOALS))
    assert (file.n_stream, file.n_step, file.info.config["n_learner"]) == (2, 300, 2)
    ended = 0
    for task in file.task_ids.tolist():
        history, played = truth(DarkroomHard(9, 20), file, task)
        assert np.array_equal(history.terminated, played.terminated)
        assert history.learner.tolist() == [0, 1] and history.optimal_actions is None
        ended += int(history.terminated.sum())
    assert ended > 20
    words = COMMANDS["headless_ad"]
    code, _, lines = here(*words[: words.index("--steps")], *words[words.index("--steps") + 2 :])
    assert code == 1 and "have different numbers of steps, the shortest of all tasks 331" in lines[-1]


def test_bandits_of_headless_ad_are_tasks_of_their_own(here, tmp_path):
    data.write_headless_bandit(tmp_path / "bandit")
    words = ["--family", "bernoulli_bandit", "--env.kwargs", "{n_arm: 4, horizon: 30}", "--split-seed", "0"]
    assert here("import", "bandit", "--layout", "headless_ad", *words, "--out", "h.hdf5")[0] == 0
    with np.load(tmp_path / "bandit" / "LinUCB-00000001" / "trajectories_30.npz") as raw:
        assert np.array_equal(HistoryFile("h.hdf5").load([1])[1].actions[0], raw["actions"][:, 0])


def test_key_to_door_of_ad_eps_is_refused_unless_the_user_trusts_it(here, tmp_path):
    data.write_ad_eps_key_to_door(tmp_path / "own")
    code, _, lines = here("import", "own", "--layout", "ad_eps", *ROOM)
    assert code == 1
    text = "states holds pickled Python objects, which can run code and are never loaded"
    assert errors(lines) == [f"own/trajectories_00000.npz: {text}"]
    scope: dict[str, Any] = {}
    exec((tmp_path / "own_key_to_door.py").read_text(), scope)
    (recorded,) = scope["read"](tmp_path / "own").values()
    assert recorded.dones.tolist() == [[False, False, True, False, True]]
    assert (recorded.task.tolist(), recorded.states.tolist()) == ([0, 4, 0, 5], [[3, 4, 5, 7, 8]])


def test_rooms_of_ra_dt_are_repaired(here, tmp_path, written):
    file, notes = page(here, "ra_dt", tmp_path)
    assert "next_states at the ends of episodes" in notes[0] and not any("reproduce" in n for n in notes)
    for task in file.task_ids.tolist():
        column, row = file.tasks[task][::-1]
        history = file.load([task])[task]
        with np.load(written / "dark_room" / "10x10" / f"[0,0]_[{column},{row}].npz") as raw:
            assert np.array_equal(history.states[0], raw["observations"][:, 0])
            wrong = (history.next_states[0] != raw["next_observations"][:, 0]).any(axis=-1)
            assert np.array_equal(history.rewards[0], raw["rewards"][:, 0])
        assert set(np.flatnonzero(wrong)) <= {99, 199}
        assert np.flatnonzero(history.truncated[0]).tolist() == [99, 199]
    assert sum(history.rewards.sum() for history in file.load().values()) > 0


@pytest.mark.parametrize("columns", [False, True])
def test_one_environment_may_have_no_axis(tmp_path, columns):
    data.write_ra_dt(tmp_path / "a", data.GOALS[:1])
    with np.load(tmp_path / "a" / "[0,0]_[1,0].npz") as file:
        arrays = {name: array[:, 0] for name, array in file.items()}
        arrays |= {name: file[name] for name in ("rewards", "dones") if columns}
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "7.npz", **arrays)
    (one,), (other,) = LAYOUT["ra_dt"](tmp_path / "a").values(), LAYOUT["ra_dt"](tmp_path / "b").values()
    assert list(LAYOUT["ra_dt"](tmp_path / "b")) == [7]
    assert (one.task.tolist(), other.task) == ([0, 1], None)
    for name, array in vars(one).items():
        assert name == "task" or np.array_equal(array, getattr(other, name)), name


def test_xland_is_read_part_by_part(here, tmp_path, written, monkeypatch):
    sizes = []

    def noted(*args: Any) -> Any:
        sizes.append(read(*args).shape[:2])
        return read(*args)

    read = published.read
    monkeypatch.setattr(published, "read", noted)
    words = [*COMMANDS["xland_100b"], "--out", "h.hdf5"]
    words[words.index("0-9")], words[words.index("0-3")], words[words.index("1000")] = "1-4,9", "1-2", "300"
    words[words.index("8,9")] = "9"
    code, _, lines = here(*words)
    assert (code, errors(lines)) == (0, [])
    assert set(sizes) == {(2, 300)}
    file = HistoryFile("h.hdf5")
    assert file.info.config["task_ids"] == [3, 4001, 12, 88, 62]
    assert file.tasks[:, 0].tolist() == [3, 4001, 12, 88, 62]
    assert [ids.tolist() for ids in vars(file.split).values()] == [[0, 1, 2, 3], [], [4]]
    with h5py.File(written / "xland-trivial-20b.hdf5") as raw:
        for task, group in enumerate(raw[name] for name in ("1", "2", "3", "4", "9")):
            history = file.load([task])[task]
            assert np.array_equal(history.states @ [12, 1], group["states"][1:3, :300])
            assert np.array_equal(history.optimal_actions, group["expert_actions"][1:3, :300])
            assert np.array_equal(history.rewards, group["rewards"][1:3, :300].astype(np.float32))
            assert np.array_equal(history.terminated, group["dones"][1:3, :300])
            assert np.array_equal(history.next_states[:, :-1], history.states[:, 1:])
    family = make_family(file.info.family, file.info.family_kwargs)
    assert repr(family) == "RecordedFamily(recorded:XLand-MiniGrid-R1-9x9, horizon=243): 1,000,000 tasks"
    with pytest.raises(UsageError, match=r"recorded:XLand-MiniGrid-R1-9x9 has no environment, so its tasks"):
        family.make(family.tasks()[:1], np.zeros(1, int))
    EXPORT["npz"](file, tmp_path / "h.npz", False, lambda tasks: None)
    back = LAYOUT["npz"](tmp_path / "h.npz")[0]
    assert back.task.tolist() == [3] and np.array_equal(
        back.optimal_actions, file.load([0])[0].optimal_actions
    )


def test_minari_comes_back_from_the_command_line(here, tmp_path, written):
    pytest.importorskip("minari")
    file, notes = page(here, "minari", tmp_path)
    assert all("no step is rewarded" in note for note in notes)
    ours = HistoryFile(written / "ours.hdf5")
    assert file.info.spaces == ours.info.spaces and np.array_equal(file.tasks, ours.tasks)
    assert [ids.tolist() for ids in vars(file.split).values()] == [
        ids.tolist() for ids in vars(ours.split).values()
    ]
    for task, history in ours.load().items():
        again = dict(file.load([task])[task].per_step())
        assert again.keys() == dict(history.per_step()).keys() >= {"optimal_actions", "entropy"}
        assert all(np.array_equal(again[name], array) for name, array in history.per_step())
        assert file.load([task])[task].learner.tolist() == [4, 9]
    assert here(*COMMANDS["minari"], "--heldout", "3,4", "--out", "i.hdf5")[0] == 0
    assert HistoryFile("i.hdf5").split.heldout.tolist() == [3, 4]


# ---------------------------------------------------------------- what is refused


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits an npz file, or a JSON object, below the folder."""

    def apply(folder: Path) -> None:
        (path,) = folder.glob(name)
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays = dict(file)
            edit(arrays)
            np.savez(path, **arrays)
        else:
            about = json.loads(path.read_text())
            edit(about)
            path.write_text(json.dumps(about))

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:-200])

    return apply


EPS, META, MAZE = "trajectories_001.npz", "metadata.metadata", "[[]0,0[]]_[[]3,4[]].npz"
BROKEN = {
    "ad_eps": [
        (cut(EPS), EPS, "is not an npz file"),
        (lambda folder: (folder / EPS).unlink(), EPS, "No such file"),
        (lambda folder: (folder / META).unlink(), "own", "no folder with a file metadata.metadata"),
        (lambda folder: (folder / META).write_text("{"), META, "is not a JSON object"),
        (change(EPS, lambda a: a.pop("rewards")), EPS, "has no array 'rewards'; it has ["),
        (change(EPS, lambda a: a.update(actions=a["actions"][:3])), EPS, "actions have shape (3, 20)"),
        (change(EPS, lambda a: a.update(states=np.full((6, 20), "up"))), EPS, "states of dtype <U2"),
        (change(EPS, lambda a: a.update(states=a["states"] + 81)), "own", "states hold 121.0, which is none"),
        (change(EPS, lambda a: a.update(actions=a["actions"] + 4)), "own", "actions hold"),
        (change(META, lambda a: a.pop("ordered_trajectories")), META, "'ordered_trajectories' must list"),
        (change(META, lambda a: a["ordered_trajectories"].__setitem__(0, "../../x.npz")), META, "must list"),
        (change(META, lambda a: a.update(goal=[[1, 2, 3]])), META, "'goal' must be"),
        (change(META, lambda a: a.update(goal=[1, [2, [3]]])), META, "'goal' must be"),
        (change(META, lambda a: a["goal"].__setitem__(0, [9, 9])), "--task-ids", "which no task of"),
        (
            change(META, lambda a: a["ordered_trajectories"].__setitem__(0, EPS)),
            EPS,
            "is named for the tasks [0, 1]: one recording has overwritten the other",
        ),
    ],
    "ra_dt": [
        (cut(MAZE), "[0,0]_[3,4].npz", "is not an npz file"),
        (change(MAZE, lambda a: a.pop("dones")), "[0,0]_[3,4].npz", "has no array 'dones'"),
        (change(MAZE, lambda a: a.update(rewards=a["rewards"][:9])), "[0,0]_[3,4].npz", "have shape (250,"),
        (
            change(MAZE, lambda a: a.update(observations=np.array([{}] * 250))),
            "[0,0]_[3,4].npz",
            "observations holds pickled Python objects",
        ),
        (
            lambda folder: [path.rename(path.with_suffix(".pkl")) for path in folder.glob("*.npz")],
            "own",
            "pickles can run code and are never loaded",
        ),
    ],
}  # fmt: skip
CASES = [
    pytest.param(layout, *case, id=f"{layout}: {case[2][:40]}")
    for layout, cases in BROKEN.items()
    for case in cases
]


@pytest.mark.parametrize(("layout", "edit", "name", "cause"), CASES)
def test_broken_folders_are_one_line_and_leave_nothing(here, tmp_path, layout, edit, name, cause):
    write = {"ad_eps": data.write_ad_eps, "ra_dt": data.write_ra_dt}[layout]
    write(tmp_path / "own", data.GOALS)
    edit(tmp_path / "own")
    family = ["--family", "corner_room:CornerRoom", "--env.kwargs", "{size: 10, horizon: 100}"]
    words = ROOM if layout == "ad_eps" else [*family, *ROOM[2:]]
    before = tree(tmp_path / "own")
    code, out, lines = here("import", "own", "--layout", layout, *words)
    assert (code in (1, 2), out) == (True, "")
    (line,) = errors(lines)
    assert name in line and cause in line, line
    assert tree(tmp_path / "own") == before and not (tmp_path / "h.hdf5").exists()


HDF5 = {
    "xland_100b": [
        (lambda file: file["1"].__delitem__("dones"), "/1: 'dones' is missing"),
        (lambda file: file["1"].attrs.__delitem__("ruleset-id"), "attribute 'ruleset-id' is missing"),
        (lambda file: file["1/states"].__setitem__((0, 0, 0, 0), 200), "/1/states: 200 is no tile"),
        (lambda file: file.create_group("x"), "'x' is not the index of a task"),
        (
            lambda file: (
                file["1"].pop("states"),
                file["1"].create_dataset("states", (2, 10**9, 5, 5), "u1"),
            ),
            "/1/states: shape (2, 1000000000, 5, 5) does not fit its 0 stored bytes",
        ),
        (lambda file: file["1"].update({"states": h5py.ExternalLink("/etc/passwd", "x")}), "or a link"),
        (
            lambda file: (file["1"].pop("actions"), file["1"].update({"actions": np.ones((2, 9))})),
            "/1/actions",
        ),
    ],
    "minari": [
        (lambda file: file["episode_3"].attrs.__delitem__("stream"), "episode_3: has no number 'stream'"),
        (lambda file: file["episode_3"].attrs.__setitem__("task", "x"), "episode_3: has no number 'task'"),
        (lambda file: file.pop("episode_3"), "the episodes before episode_4 do not make 20 steps"),
        (lambda file: file["episode_3"].pop("rewards"), "'rewards' is missing"),
    ],
}
HDF5_CASES = [
    pytest.param(layout, *case, id=f"{layout}: {case[1][:40]}")
    for layout, cases in HDF5.items()
    for case in cases
]


@pytest.mark.parametrize(("layout", "edit", "cause"), HDF5_CASES)
def test_broken_hdf5_is_one_line(tmp_path, written, layout, edit, cause):
    if layout == "minari":
        pytest.importorskip("minari")
        path = tmp_path / "main_data.hdf5"
        for name in ("main_data.hdf5", "metadata.json"):
            raw = (written / "minari" / "darkroom-PPO-seed0-v0" / "data" / name).read_bytes()
            (tmp_path / name).write_bytes(raw)
    else:
        path = data.write_xland_100b(tmp_path / "x.hdf5", [3, 4], 2, 20)
    with h5py.File(path, "r+") as file:
        if "/1/states" in cause and "stored" not in cause:
            file["1"].pop("states")
            file["1/states"] = np.zeros((2, 20, 5, 5), np.uint8)
        if "link" in cause:
            file["1"].pop("states")
        edit(file)
    with pytest.raises(HistoryError) as found:
        dict(LAYOUT[layout](path))
    assert str(path) in str(found.value) and cause in str(found.value)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(HistoryError, match="cannot be read as an HDF5 file"):
        dict(LAYOUT[layout](path))


def test_another_layout_that_fits_is_named(here, tmp_path, written):
    data.write_ad_eps_key_to_door(tmp_path / "pickled")
    fits = {
        "data/ad_eps": "ad_eps or headless_ad", "data/dark_room/10x10": "ra_dt", "pickled": None,
        "data/xland-trivial-20b.hdf5": "xland_100b", "data": "ad_eps or headless_ad", "nothing": None,
    }  # fmt: skip
    if LAYOUT and (written / "minari").exists():
        fits["data/minari/darkroom-PPO-seed0-v0"] = "minari"
    for path, layout in fits.items():
        code, _, lines = here("import", path, *ROOM)
        (line,) = errors(lines)
        assert code == 1 and ("fits another layout" in line) == (layout is not None)
        assert layout is None or line.endswith(f"; it fits another layout: --layout {layout}"), line
    code, _, lines = here("import", "data/minari", "--layout", "minari", "--family", "darkroom")
    assert code == 1 and ("name one of them" in errors(lines)[0] or not (written / "minari").exists())


def test_parts_of_what_is_there(here, tmp_path):
    data.write_ad_eps(tmp_path / "own", data.GOALS)
    words = ["import", "own", "--layout", "ad_eps", *ROOM]
    assert here(*words, "--only", "1-3,7", "--steps", "50", "--streams", "0")[0] == 0
    file = HistoryFile("h.hdf5")
    assert file.tasks.tolist() == [data.GOALS[k] for k in (1, 2, 3, 7)] and file.n_step == 50
    for more, cause, status in (
        (["--only", "1,12"], "has no task [12] (--only)", 1),
        (["--streams", "0-2"], "task 0 does not have all of the streams 0 to 2 that --streams asks for", 1),
        (["--streams", "1-2"], "task 0 has 1 streams, none of those asked for", 1),
        (["--steps", "121"], "task 0 does not have all of the steps 0 to 120 that --steps asks for", 1),
        (["--streams", "3-1"], "argument --streams: expected a range like 0-7, or one number, got '3-1'", 2),
        (["--only", "a"], "argument --only: expected a range", 2),
        (["--actions", "0,3,1,4,5"], "--actions: darkroom has the actions 0..4, not [5]", 2),
        (["--actions", "0,3"], "actions hold", 1),
    ):
        code, _, lines = here(*words, *more, "--overwrite")
        assert code == status and cause in errors(lines)[-1], lines
    plain = {task: LAYOUT["ad_eps"](tmp_path / "own")[task] for task in (0, 5)}
    one = Selected(plain, [5], (slice(0, 1), slice(7)))
    assert list(one) == [5] and np.array_equal(one[5].states, plain[5].states[:, :7])
    assert one[5].task.tolist() == data.GOALS[5] and one[5].learner.tolist() == [0]


def test_large_files_are_announced(here, tmp_path, monkeypatch):
    data.write_ad_eps(tmp_path / "own", data.GOALS)
    words = ["import", "own", "--layout", "ad_eps", *ROOM]
    size = 12 * 120 * (2 * 8 + 2 * 8 + 22) / 1e6  # float64 states, twice, and two int64 actions
    assert (
        here(*words, "--dry-run")[1].splitlines()[0].endswith(f"(at most {size:.1f} MB before compression)")
    )
    monkeypatch.setattr("compressed_ad.cli.histories.most_bytes", lambda one, n_task: 3 * 10**9)
    monkeypatch.setattr(importing, "_LONG_TO_READ", 1000)
    code, _, lines = here(*words)
    assert code == 0 and any("24.0 GB of it for one task" in line for line in lines)
    config = HistoryFile("h.hdf5").info.config
    assert "sha256" not in config
    assert config["bytes"] == sum(path.stat().st_size for path in (tmp_path / "own").iterdir())


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    folder = data.write_ad_eps(tmp_path / "own", data.GOALS[:2])
    bomb = np.empty((6, 20), dtype=object)
    bomb[:] = Bomb()
    np.savez(folder / "trajectories_000.npz", states=bomb, actions=bomb, rewards=np.zeros((6, 20)))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(HistoryError, match="pickled"):
        LAYOUT["ad_eps"](folder)[0]
    with pytest.raises(HistoryError, match="is not an npz file"):
        LAYOUT["ra_dt"](tmp_path / "raw")[1]
    assert not (tmp_path / "exploded").exists()
