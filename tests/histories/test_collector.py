"""Collection: splits, independence of processes and blocks, crashes, resuming, marks."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from compressed_ad.errors import (
    CompressedADError,
    ConfigError,
    HistoryError,
    MissingExtraError,
    NumericalError,
    RunError,
    SplitError,
    UnknownNameError,
    UsageError,
)
from compressed_ad.histories.collector import collect, history_path
from compressed_ad.histories.file import HistoryFile, remark
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.seeding import rng
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.split import choose_tasks, split_tasks
from compressed_ad.types import History
from compressed_ad.workers import RayPool

FAMILY = Darkroom(3, 4)  # 9 tasks
N_TASK, N_STEP, N_STREAM = 9, 30, 2


class Walker:
    """A cheap source algorithm: random actions, more and more confident. ``trouble`` happens on task 4."""

    name = "Walker"

    def __init__(self, trouble="", notes=None, pause=0.0):
        self.trouble, self.notes, self.pause = trouble, notes, pause

    def learn(
        self, family, task_ids, tasks, *, n_timesteps, n_learner, n_stream, seed, progress=lambda s: None
    ):
        return [
            self.one(family, int(i), task, n_timesteps, n_learner, n_stream, seed, progress)
            for i, task in zip(task_ids, tasks, strict=True)
        ]

    def one(self, family, task_id, task, n_step, n_learner, n_stream, seed, progress):
        if self.notes:
            (Path(self.notes) / f"pid-{os.getpid()}").touch()
        time.sleep(self.pause)
        if task_id == 4:
            self.stumble()
        n = n_learner * n_stream
        draw = rng(seed, "walker", task_id)
        env = family.make(np.repeat(task[None], n, 0), np.arange(n))
        obs, rows = env.reset(), []
        for _ in range(n_step):
            actions = draw.integers(0, 5, n)
            step = env.step(actions)
            rows.append((obs, actions, step.reward, step.next_obs, step.terminated, step.truncated))
            obs = step.obs
            progress(n)
        states, actions, rewards, next_states, terminated, truncated = (
            np.stack(a, 1) for a in zip(*rows, strict=True)
        )
        if self.trouble == "nan" and task_id == 4:
            rewards[0, 3] = np.nan
        probs = np.clip(np.linspace(0.2, 1.2, n_step) + draw.uniform(-0.1, 0.1, (n, n_step)), 0.1, 1)
        return History(
            states, actions, rewards, next_states, terminated, truncated, probs.astype(np.float32),
            update=np.zeros((n, n_step), np.int32),
            learner=np.repeat(np.arange(n_learner, dtype=np.int32), n_stream),
        )  # fmt: skip

    def stumble(self):
        once = Path(self.notes or "") / "died"
        if self.trouble == "always" or (self.trouble == "once" and not once.exists()):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def gather(path, learner=None, family=FAMILY, **options):
    options = {"n_timesteps": N_STEP, "n_stream": N_STREAM, "family_name": "darkroom", **options}
    return collect(family, learner or Walker(), path, **options)


def contents(path):
    """Everything in the file but when it was marked."""
    file = HistoryFile(path)
    arrays = {
        f"{task}/{name}": array
        for task, history in file.load().items()
        for name, array in [*history.per_step(), ("learner", history.learner)]
    }
    marking = {k: v for k, v in (file.marking or {}).items() if k != "time"}
    return arrays, (
        file.info,
        {k: v.tolist() for k, v in vars(file.split).items()},
        file.tasks.tolist(),
        marking,
    )


def assert_same(a, b):
    (arrays_a, head_a), (arrays_b, head_b) = contents(a), contents(b)
    assert head_a == head_b
    assert arrays_a.keys() == arrays_b.keys()
    for name, array in arrays_a.items():
        np.testing.assert_array_equal(array, arrays_b[name], err_msg=name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return gather(tmp_path_factory.mktemp("reference") / "h.hdf5", n_process=1)


# ---------------------------------------------------------------- splits


def test_default_split_of_darkroom():
    split = split_tasks(81, 0)
    assert [len(p) for p in (split.train, split.validation, split.heldout)] == [65, 8, 8]
    assert not np.array_equal(split.heldout, split_tasks(81, 1).heldout)
    literature = split_tasks(81, 0, validation=0, heldout=8)
    assert len(literature.train) == 73
    np.testing.assert_array_equal(literature.heldout, split.heldout)


@given(st.integers(1, 300), st.integers(0, 5))
def test_default_split_is_a_partition(n_tasks, seed):
    split = split_tasks(n_tasks, seed)
    together = np.concatenate([split.train, split.validation, split.heldout])
    np.testing.assert_array_equal(np.sort(together), np.arange(n_tasks))
    if n_tasks >= 3:
        assert min(len(split.heldout), len(split.validation)) >= 1


@pytest.mark.parametrize(
    "sizes", [{"train": 5}, {"heldout": 10}, {"validation": -1}, {"heldout": 5, "validation": 4}]
)
def test_impossible_splits(sizes):
    with pytest.raises(SplitError, match="cannot be made of 9 tasks"):
        split_tasks(9, 0, **sizes)


def test_a_split_of_another_family_says_what_to_change():
    with pytest.raises(SplitError, match=r"8 validation and 8 held-out tasks and one .* 12 tasks"):
        split_tasks(12, 0, validation=8, heldout=8)


def test_choice_of_tasks():
    np.testing.assert_array_equal(choose_tasks(5, 0, None), np.arange(5))
    few = choose_tasks(6561, 0, 10)
    assert len(np.unique(few)) == 10
    assert (np.diff(few) > 0).all()
    for n_task in (0, 6):
        with pytest.raises(UsageError, match=r"1\.\.5"):
            choose_tasks(5, 0, n_task)


def test_file_name_of_the_guide():
    path = history_path("datasets", "darkroom", "PPO", 0)
    assert path == Path("datasets/history_darkroom_PPO_alg-seed0_compressed.hdf5")


# ---------------------------------------------------------------- what is stored


def test_stored_histories(reference):
    file = HistoryFile(reference)
    assert file.info.family == "darkroom"
    assert file.info.learner == "Walker"
    assert file.info.config["n_timesteps"] == N_STEP
    assert file.marking["marker"] == "threshold"
    assert file.marking["parameters"]["on_policy_threshold"] == 0.7
    histories = file.load()
    assert len(histories) == N_TASK
    for task, history in histories.items():
        np.testing.assert_array_equal(history.rewards, (history.next_states == file.tasks[task]).all(-1))
        assert history.compression_mask.any()
        assert not history.compression_mask.all()


def test_marks_are_those_of_marking_the_file_again(reference, tmp_path):
    path = gather(tmp_path / "h.hdf5", marker="random")
    before = contents(path)
    remark(path, "random", seed=0)
    after = contents(path)
    assert before[1] == after[1]
    for name in before[0]:
        np.testing.assert_array_equal(before[0][name], after[0][name])


def test_without_marker(tmp_path):
    file = HistoryFile(gather(tmp_path / "h.hdf5", marker=None))
    assert file.marking is None
    assert file.load([0])[0].compression_mask is None


def test_a_subset_of_tasks_has_the_histories_of_the_whole(reference, tmp_path):
    file = HistoryFile(gather(tmp_path / "h.hdf5", n_task=4))
    ids = file.info.config["task_ids"]
    np.testing.assert_array_equal(file.tasks, FAMILY.tasks()[ids])
    whole = HistoryFile(reference).load(ids)
    for index, original in enumerate(ids):
        np.testing.assert_array_equal(file.load([index])[index].actions, whole[original].actions)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(("n_process", "block_size"), [(1, 2), (2, None), (3, 1)])
def test_result_does_not_depend_on_processes_and_blocks(reference, tmp_path, n_process, block_size):
    seen = []
    path = gather(
        tmp_path / "h.hdf5",
        n_process=n_process,
        block_size=block_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_same(reference, path)
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {N_TASK * N_STEP * N_STREAM}
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0])


def test_a_killed_worker_is_replaced_once(reference, tmp_path):
    learner = Walker("once", notes=tmp_path)
    assert_same(reference, gather(tmp_path / "h.hdf5", learner, n_process=2, block_size=1))
    assert (tmp_path / "died").exists()


@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_ray_cluster_collects_the_same_in_spite_of_a_killed_worker(reference, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.chdir(tmp_path)
    seen = []
    with RayPool("local", 2) as pool:
        gather(
            "h.hdf5",
            Walker("once", notes=tmp_path),
            pool=pool,
            block_size=2,
            progress=lambda done, total: seen.append(done),
        )
    assert_same(reference, tmp_path / "h.hdf5")
    assert (tmp_path / "died").exists()
    assert (seen[0], seen[-1]) == (0, N_TASK * N_STEP * N_STREAM)
    assert all(note.name != f"pid-{os.getpid()}" for note in tmp_path.glob("pid-*"))


def test_a_worker_that_always_dies_is_named_and_the_rest_is_kept(reference, tmp_path):
    path = tmp_path / "h.hdf5"
    with pytest.raises(RunError, match=r"tasks \[4\] died twice"):
        gather(path, Walker("always", notes=tmp_path), n_process=2, block_size=1)
    assert not path.exists()
    kept = {int(shard.stem) for shard in path.with_name("h.hdf5.shards").glob("*.h5")}
    assert len(kept) >= 3
    assert 4 not in kept
    seen = []
    gather(path, resume=True, progress=lambda done, total: seen.append(done))
    assert seen[0] == len(kept) * N_STEP * N_STREAM
    assert_same(reference, path)


@pytest.mark.parametrize("n_process", [1, 2])
def test_errors_keep_their_class_and_finished_tasks(reference, tmp_path, n_process):
    path = tmp_path / "h.hdf5"
    with pytest.raises(NumericalError, match=r"Walker, task 4: rewards\[0, 3\] is nan"):
        gather(path, Walker("nan"), n_process=n_process, block_size=1)
    assert_same(reference, gather(path, resume=True))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def collect_slowly(folder):
    gather(Path(folder) / "h.hdf5", Walker(notes=folder, pause=2.0), n_process=2, block_size=1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_parent_and_resuming_completes(reference, tmp_path, sig):
    # A shell's background jobs start with SIGINT ignored; whoever runs these tests may be one.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"import test_collector; test_collector.collect_slowly({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    )
    shards = tmp_path / "h.hdf5.shards"
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.h5"))) < 2 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(sig)
    message = parent.communicate(timeout=30)[1]
    assert parent.returncode != 0, message
    workers = [int(note.name.partition("-")[2]) for note in tmp_path.glob("pid-*")]
    assert workers
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    assert len(list(shards.glob("*.h5"))) >= 2
    assert_same(reference, gather(tmp_path / "h.hdf5", resume=True))


def test_unpicklable_learner_is_refused(tmp_path):
    learner = Walker()
    learner.lock = (x for x in ())
    with pytest.raises(UsageError, match="n_process=1"):
        gather(tmp_path / "h.hdf5", learner, n_process=2)


def test_errors_survive_the_way_home():
    for error in (
        UnknownNameError("marker", "thresold", ["threshold"]),
        MissingExtraError("SAC", "sb3"),
        ConfigError(["one", "two"]),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


# ---------------------------------------------------------------- existing files, marks


def test_existing_files(reference, tmp_path):
    path = gather(tmp_path / "h.hdf5")
    with pytest.raises(HistoryError, match="exists"):
        gather(path)
    with pytest.raises(HistoryError, match="another configuration"):
        gather(path, resume=True, seed=1)
    remark(path, "all")
    gather(path, resume=True)
    assert HistoryFile(path).marking["marker"] == "all"
    assert_same(reference, gather(path, overwrite=True))


def test_a_second_collection_into_one_file_is_refused_while_the_first_works(reference, tmp_path):
    path, told = tmp_path / "h.hdf5", []

    def second(done, total):
        if done and not told:
            for options in ({}, {"seed": 1}, {"resume": True}, {"overwrite": True, "seed": 1}):
                with pytest.raises(
                    HistoryError, match=rf"h\.hdf5: another process .*\(process {os.getpid()}\)"
                ):
                    gather(path, **options)
                told.append(options)

    gather(path, block_size=3, progress=second)
    assert len(told) == 4
    assert_same(reference, path)
    assert [file.name for file in tmp_path.iterdir()] == ["h.hdf5"]


def test_resuming_with_another_marker_marks_all_tasks_with_it(tmp_path):
    path = tmp_path / "h.hdf5"
    with pytest.raises(NumericalError):
        gather(path, Walker("nan"), block_size=1)
    gather(path, resume=True, marker="high_confidence")
    assert_same(path, gather(tmp_path / "other.hdf5", marker="high_confidence"))


def test_wrong_use_is_found_before_anything_starts(tmp_path):
    path = tmp_path / "h.hdf5"
    with pytest.raises(ConfigError, match="on_policy_treshold"):
        gather(path, marker_params={"on_policy_treshold": 0.5})
    with pytest.raises(UnknownNameError, match="threshold"):
        gather(path, marker="thresold")
    for key in ("n_timesteps", "n_stream", "n_learner", "n_process", "block_size"):
        with pytest.raises(UsageError, match=f"{key} must be a whole number of at least 1"):
            gather(path, **{key: 0})
    with pytest.raises(SplitError):
        gather(path, train=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("optimal", "words"),
    [
        (-1.0, r"optimal_return of task \d+ is -1, but its random_return is"),
        (np.nan, r"optimal_return of task \d+ is nan"),
        (np.inf, r"optimal_return of task \d+ is inf"),
    ],
)
def test_an_optimum_that_cannot_be_stops_before_anything_is_learned(tmp_path, monkeypatch, optimal, words):
    wrong = lambda self, tasks: np.where(np.arange(len(tasks)) == 2, optimal, 5.0)  # noqa: E731
    monkeypatch.setattr(type(FAMILY), "optimal_return", wrong)
    with pytest.raises(CompressedADError, match=words):
        gather(tmp_path / "h.hdf5")
    assert list(tmp_path.iterdir()) == []


class Short(Walker):
    def learn(self, *args, **options):
        return super().learn(*args, **{**options, "n_timesteps": options["n_timesteps"] - 1})


class Fewer(Walker):
    def learn(self, *args, **options):
        return super().learn(*args, **options)[1:]


def test_learners_that_break_their_promise(tmp_path):
    with pytest.raises(RunError, match=r"expected \(stream, time\) \(2, 30\), got \(2, 29\)"):
        gather(tmp_path / "h.hdf5", Short())
    with pytest.raises(RunError, match="7 histories of 8 tasks"):
        gather(tmp_path / "g.hdf5", Fewer(), n_task=8)


def test_ppo(tmp_path):
    learner = BatchedPPO(n_steps=10, batch_size=20, n_epochs=2)
    options = {"n_timesteps": 30, "n_stream": 2, "n_task": 4, "family": Darkroom(9, 5)}
    one = gather(tmp_path / "1.hdf5", learner, **options)
    two = gather(tmp_path / "2.hdf5", learner, **options, n_process=2, block_size=1)
    assert_same(one, two)
    assert HistoryFile(one).info.learner == "PPO"


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "x" * 300, "a\rb", "a\nb", None])
def test_names_that_would_leave_the_folder_are_refused(name):
    for family, learner in ((name, "PPO"), ("darkroom", name)):
        with pytest.raises(UsageError, match="must fit a file name"):
            history_path("datasets", family, learner, 0)


class Careless(Walker):
    """Gives the histories in another order, or the states as next_states."""

    def learn(self, family, task_ids, tasks, **sizes):
        made = super().learn(family, task_ids, tasks, **sizes)
        return made[::-1] if self.notes is None else [replace(h, next_states=h.states) for h in made]


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (lambda tmp: Careless(), r"Walker on darkroom, task \d: rewards are not those of the task"),
        (lambda tmp: Careless(notes=tmp), "states must go on where next_states led"),
    ],
)
def test_histories_of_other_tasks_or_steps_are_told(learner, message, tmp_path):
    with pytest.raises(RunError, match=message):
        collect(
            FAMILY, learner(tmp_path), tmp_path / "h.hdf5", family_name="darkroom", n_timesteps=N_STEP,
            n_stream=N_STREAM, marker=None,
        )  # fmt: skip


def test_what_is_wrong_with_a_family_is_told_before_anything_is_learned(tmp_path):
    family = Darkroom(3, 4)
    object.__setattr__(family, "tasks", lambda: np.random.default_rng().permutation(9)[:, None])
    with pytest.raises(UsageError, match=r"darkroom: tasks\(\) gives another array when called again"):
        collect(family, Walker(), tmp_path / "h.hdf5", family_name="darkroom", n_timesteps=N_STEP)
    assert not list(tmp_path.iterdir())
