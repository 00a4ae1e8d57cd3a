"""No task that judges a run was trained on or chose its weights, however files are edited or spelled."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from compressed_ad.cli.main import main
from compressed_ad.errors import HistoryError, RunDirectoryError, SplitError
from compressed_ad.histories import hdf5
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import FEW_STEPS, same_steps
from compressed_ad.report.results import load_runs
from compressed_ad.runs import job as runs
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import family_meaning, stored_environment, stored_provenance
from compressed_ad.runs.judge import evaluate_run
from compressed_ad.runs.stages import report_stage
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard
from compressed_ad.tasks.replay import play
from compressed_ad.tasks.select import make_family
from compressed_ad.training.checkpoints import load, save
from compressed_ad.training.transforms import TRANSFORM
from compressed_ad.types import Split

PRESET = ["--preset", "smoke", "--device", "cpu"]
FAMILY = ["--env.kwargs", "{size: 4, horizon: 5}", "--env.n_task", "10"]
FAMILY += ["--env.validation", "2", "--env.heldout", "2"]
COLLECT = [
    *(*PRESET, *FAMILY),
    *("--algorithm.n_learner", "1", "--algorithm.n_timesteps", "80", "--algorithm.n_process", "1"),
    *("--algorithm.learner_kwargs", "{n_steps: 20, batch_size: 20, n_epochs: 1}"),
]
TRAIN = [*PRESET, *FAMILY, "--model.steps", "2", "--model.n_transit", "20", "--model.validations", "0"]
TRAIN += ["--evaluation.episodes", "2", "--evaluation.rollouts", "1"]
HISTORY = "history_darkroom_PPO_alg-seed0_compressed.hdf5"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with histories and two evaluated runs, moved once so that copies of it use their own file."""
    there = tmp_path_factory.mktemp("leaks")
    made = there / "made"
    assert main(["collect", *map(str, COLLECT), "--out", str(made)]) == 0
    for model in ("AD", "CompressedAD"):
        words = ["--model", model, "--history", str(made / HISTORY), "--out", str(made)]
        assert main(["train", *TRAIN, *words]) == 0
        assert main(["evaluate", str(made / f"{model}-darkroom-seed0"), "--device", "cpu"]) == 0
    return made.rename(there / "moved")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d"))


@pytest.fixture
def said(capsys) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, "".join(capsys.readouterr())

    return run


def sealed(path: Path, edit: Callable[[h5py.File], None]) -> None:
    """Edit a history file as somebody would who knows the format: the seal is no signature."""

    def fill(file: h5py.File) -> None:
        with h5py.File(path, "r") as old:
            for name in old:
                old.copy(name, file)
            file.attrs.update(old.attrs)
        edit(file)

    hdf5.write_file(path, fill)


def put(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


def exchange(part: str) -> Callable[[h5py.File], None]:
    """Exchange the held-out tasks with as many of ``part``."""

    def edit(file: h5py.File) -> None:
        theirs, held = file[f"split/{part}"][()], file["split/heldout"][()]
        put(file, "split/heldout", theirs[: len(held)])
        put(file, f"split/{part}", np.concatenate([held, theirs[len(held) :]]))

    return edit


def evaluate(path: Path, *words: object) -> list[object]:
    return ["evaluate", path / "AD-darkroom-seed0", "--device", "cpu", "--overwrite", *words]


# ---------------------------------------------------------------- what a run has seen


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("command", ["evaluate", "rollouts", "attention"])
def test_a_split_edited_in_place_is_noticed(folder, said, part, command):
    sealed(folder / HISTORY, exchange(part))
    words = ["--overwrite"] if command == "evaluate" else []
    code, text = said(command, folder / "AD-darkroom-seed0", *words)
    assert code == 2
    assert "was trained on held-out tasks [" in text


@pytest.mark.parametrize("family", ["darkroom", "compressed_ad.tasks.gridworld:Darkroom"])
def test_another_file_of_the_family_however_it_is_spelled(folder, said, family):
    def edit(file: h5py.File) -> None:
        exchange("train")(file)
        file.attrs["family"] = family

    shutil.copy(folder / HISTORY, folder / "copy.hdf5")
    sealed(folder / "copy.hdf5", edit)
    code, text = said(*evaluate(folder, "--history", folder / "copy.hdf5"))
    assert (code, "was trained on held-out tasks" in text) == (2, True), text


def test_other_numbers_of_the_same_tasks(folder):
    """Two files whose splits have the same numbers: only the rows tell that the tasks are exchanged."""

    def edit(file: h5py.File) -> None:
        tasks, split = file["tasks"][()], {name: file[f"split/{name}"][()] for name in ("train", "heldout")}
        tasks[[split["train"][0], split["heldout"][0]]] = tasks[[split["heldout"][0], split["train"][0]]]
        put(file, "tasks", tasks)

    sealed(folder / HISTORY, edit)
    held = int(HistoryFile(folder / HISTORY).split.heldout[0])
    with pytest.raises(SplitError, match=rf"was trained on held-out tasks \[{held}\] of"):
        evaluate_run(runs.stored_job(folder / "AD-darkroom-seed0"))


def test_rows_that_went_through_float32_are_the_same_tasks(folder, said):
    place = folder / "AD-darkroom-seed0" / "environment.json"
    facts = json.loads(place.read_text())
    facts["history"]["rows"]["train"] = [[x + 0.1 for x in row] for row in facts["history"]["rows"]["train"]]
    place.write_text(json.dumps(facts))
    sealed(folder / HISTORY, exchange("train"))
    sealed(folder / HISTORY, lambda file: put(file, "tasks", (file["tasks"][()] + 0.1).astype(np.float32)))
    code, text = said(*evaluate(folder))
    assert (code, "was trained on held-out tasks" in text) == (2, True), text
    tasks = np.array([[0.1, 16777217], [np.float32(0.1), 16777217], [0.1, 16777216]])
    assert Split([0], [], [2]).shared_task(tasks) is None  # whole numbers may be seeds
    assert "tasks 0 (train) and 1 (heldout) have equal" in str(Split([0], [], [1]).shared_task(tasks))


def test_tasks_of_another_family_with_equal_rows_are_said(folder, said):
    def edit(file: h5py.File) -> None:
        exchange("train")(file)
        file.attrs["family_kwargs"] = '{"size": 4, "horizon": 6}'
        file.attrs["horizon"] = 6

    sealed(folder / HISTORY, edit)
    code, text = said(*evaluate(folder))
    assert code == 0, text
    assert "in another family (family.horizon: 5 there, 6 asked for): they count as new" in text
    assert "was not trained on" in text


def test_new_marks_are_said(folder, said):
    assert said("mark", folder / HISTORY, "--marker", "none")[0] == 0
    code, text = said(*evaluate(folder))
    assert code == 0
    assert "was not trained on" in text
    assert "history.marker: 'threshold' there, 'none' asked for" in text


def test_the_same_family_means_the_same():
    spelled = [
        ("darkroom", {}),
        ("compressed_ad.tasks.gridworld:Darkroom", {"horizon": 20}),
        ("compressed_ad:Darkroom", {"size": 9}),
    ]
    meanings = [family_meaning(make_family(name, kwargs), kwargs) for name, kwargs in spelled]
    assert meanings[0] == meanings[1] == meanings[2]
    assert meanings[0] != family_meaning(Darkroom(9, 21), {})
    assert meanings[0] != family_meaning(DarkroomHard(9, 20), {})


def test_weights_know_what_they_were_trained_on(folder):
    job = runs.stored_job(folder / "AD-darkroom-seed0")
    file, facts = HistoryFile(job.history), json.loads((job.path / "environment.json").read_text())
    rows = {name: file.tasks[ids].tolist() for name, ids in vars(file.split).items()}
    for weights in ("best_model.pt", "last_model.pt"):
        assert load(job.path / weights)["trained_on"]["rows"] == rows == facts["history"]["rows"]
    facts["history"]["rows"]["train"] = facts["history"]["rows"]["train"][1:]
    (job.path / "environment.json").write_text(json.dumps(facts))
    (job.path / "evaluation.npz").unlink()
    with pytest.raises(RunDirectoryError, match=r"environment.json describe \(history.rows.train: "):
        evaluate_run(job)


# ---------------------------------------------------------------- one task in two parts


def test_equal_tasks_in_two_parts_are_refused_before_learning(tmp_path, said, monkeypatch):
    monkeypatch.setattr(Darkroom, "tasks", lambda family: np.repeat(np.arange(10).reshape(5, 2), 2, axis=0))
    for dry in ([], ["--dry-run"]):
        code, text = said("collect", *COLLECT, "--out", tmp_path / "h", *dry)
        assert (code, "have equal parameters, so one task would be in two parts" in text) == (2, True), text
    assert not list(tmp_path.rglob("*.h*5"))


def test_equal_tasks_in_one_part_are_harmless():
    tasks = np.array([[1], [1], [2], [3]])
    assert Split([0, 1], [2], [3]).shared_task(tasks) is None
    problem = Split([0], [2], [1, 3]).shared_task(tasks)
    assert problem == "tasks 0 (train) and 1 (heldout) have equal parameters, so one task would be in two" + (
        " parts of the split"
    )


def linked(file: h5py.File) -> None:
    train, held = (str(file[f"split/{part}"][0]) for part in ("train", "heldout"))
    del file[train]
    file[train] = file[held]


def copied(file: h5py.File) -> None:
    train, held = (str(file[f"split/{part}"][0]) for part in ("train", "heldout"))
    del file[train]
    file.copy(held, train)


def one_array_linked(file: h5py.File) -> None:
    train, held = (str(file[f"split/{part}"][0]) for part in ("train", "heldout"))
    put(file, f"{train}/states", file[f"{held}/states"])


def equal_rows(file: h5py.File) -> None:
    tasks = file["tasks"][()]
    tasks[file["split/heldout"][()]] = tasks[file["split/train"][0]]
    put(file, "tasks", tasks)


@pytest.mark.parametrize("edit", [linked, copied, one_array_linked, equal_rows])
def test_a_file_with_one_task_in_two_parts_is_not_opened(folder, edit):
    sealed(folder / HISTORY, edit)
    with pytest.raises(HistoryError, match=r"(?s)hdf5: task.*\((train|heldout)\)"):
        HistoryFile(folder / HISTORY)


def recorded(folder: Path, plays: dict[int, int], *, greedy: bool, seed: int = 0) -> Path:
    """A file of two streams of 40 steps for each number, that play the task of ``plays``."""
    family, path, draw = Darkroom(4, 10), folder / "theirs.h5", np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for number, task in plays.items():
            rows = np.repeat(family.tasks()[[task]], 2, axis=0)
            actions = draw.integers(0, 2 if not greedy else 5, (2, 40))
            if greedy:
                env = family.make(rows, np.zeros(2, int))
                seen, steps = env.reset(), []
                for _ in range(40):
                    steps.append(family.optimal_action(rows, seen, np.zeros(2)))
                    seen = env.step(steps[-1]).obs
                actions = np.stack(steps, axis=1)
            played = play(family, rows, actions, 0)
            arrays = {"states": played.states, "actions": actions, "rewards": played.rewards}
            arrays |= {"next_states": played.next_states, "dones": played.episode_end}
            for name, array in arrays.items():
                file[f"{number}/{name}"] = np.asarray(array).swapaxes(0, 1)
    return path


IMPORT = [
    "--family",
    "darkroom",
    "--env.kwargs",
    "{size: 4, horizon: 10}",
    "--heldout",
    "2",
    "--validation",
    "1",
]


def test_histories_of_a_held_out_task_under_a_training_number_are_not_imported(tmp_path, said):
    path = recorded(tmp_path, {0: 2, 1: 1, 2: 0}, greedy=True)
    code, text = said("import", path, *IMPORT, "--out", tmp_path / "out")
    assert (code, "task 0 (train) holds the histories of task 2 (heldout)" in text) == (1, True), text
    assert not list(tmp_path.rglob("*.hdf5*"))
    code, text = said("import", path, *IMPORT, "--out", tmp_path / "out", "--task-ids", "2,1,0")
    assert code == 0, text
    code, text = said("import", path, *IMPORT, "--out", tmp_path / "again", "--task-ids", "0,1,0")
    assert (code, "are given twice" in text) == (2, True), text


def test_histories_without_a_reward_are_said_to_tell_nothing(tmp_path, said):
    family = Darkroom(4, 10)
    far = [k for k, task in enumerate(family.tasks().tolist()) if task[0] > 2][:3]  # never met by two moves
    path = recorded(tmp_path, dict(enumerate(far)), greedy=False)
    words = ["--task-ids", ",".join(map(str, far)), "--out", tmp_path / "out"]
    code, text = said("import", path, *IMPORT, *words)
    assert code == 0, text
    assert "no step is rewarded, so that nothing shows whether these histories are of these tasks" in text


def test_steps_that_agree_by_chance_are_no_copies():
    actions, rewards = np.arange(FEW_STEPS) % 5, np.zeros(FEW_STEPS)
    assert same_steps(actions, rewards) == same_steps(actions.copy(), rewards.copy()) is not None
    assert same_steps(actions, rewards) != same_steps(actions, rewards + 1)
    assert same_steps(actions[1:], rewards[1:]) is None
    assert same_steps(actions * 0 + 3, rewards) is None


def test_copies_under_two_numbers_are_not_imported(tmp_path, said):
    path = recorded(tmp_path, {0: 0, 1: 1, 2: 2}, greedy=False)
    with h5py.File(path, "r+") as file:
        del file["2"]
        file.copy("0", "2")
    code, text = said("import", path, *IMPORT, "--out", tmp_path / "out")
    assert (code, "tasks 0 and 2 hold the same recording" in text) == (1, True), text


# ---------------------------------------------------------------- what training sees


@pytest.fixture
def peeking():
    seen: list[Any] = []

    def peek(sequences, context):
        seen.append((len(context.tasks), np.unique(sequences.task), context.tasks[sequences.task]))
        return sequences

    def read(sequences, context):
        context.tasks[np.arange(10)]
        return sequences

    TRANSFORM._items |= {"peek": peek, "read": read}
    yield seen
    del TRANSFORM._items["peek"], TRANSFORM._items["read"]


def test_a_transform_sees_rows_of_training_tasks_only(folder, said, peeking):
    words = ["train", *TRAIN, "--history", folder / HISTORY, "--out", folder / "new"]
    assert said(*words, "--model.transforms", "[peek]")[0] == 0
    file = HistoryFile(folder / HISTORY)
    ((count, tasks, rows),) = peeking
    assert count == len(file.split.train) == 6
    assert tasks.tolist() == file.split.train.tolist()
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in file.tasks[tasks].tolist()}
    code, text = said(*words, "--model.transforms", "[read]", "--seed", "1")
    others = sorted({*file.split.validation.tolist(), *file.split.heldout.tolist()})
    assert (code, f"may know the tasks of its sequences only, not {others}" in text) == (2, True), text


def test_marks_that_change_while_a_run_reads_them_stop_it(folder, said):
    job = runs.stored_job(folder / "AD-darkroom-seed0")
    data = RunData(job)
    assert said("mark", folder / HISTORY, "--marker", "none")[0] == 0
    with pytest.raises(HistoryError, match="has changed since it was opened"):
        data.raw(data.file.split.train)


@pytest.mark.parametrize("scale", [7.5, 1.001])
def test_edited_scales_are_noticed(folder, scale):
    sealed(folder / HISTORY, lambda file: put(file, "scales/reward", scale))
    with pytest.raises(
        HistoryError, match=rf"scales/reward: {scale} is stored, but the training tasks give 1.0"
    ):
        RunData(runs.stored_job(folder / "AD-darkroom-seed0")).scales()


def test_held_out_tasks_are_not_trained_on(folder, said):
    held = HistoryFile(folder / HISTORY).split.heldout.tolist()
    words = ["--history", folder / HISTORY, "--out", folder / "new", "--env.training_tasks", json.dumps(held)]
    code, text = said("train", *TRAIN, *words)
    assert (code, f"heldout tasks {held}" in text) == (2, True)


def test_continuing_with_another_split_is_refused(folder, said):
    assert said("collect", *COLLECT, "--out", folder, "--overwrite", "--env.split_seed", "3")[0] == 0
    words = ["--model", "AD", "--history", folder / HISTORY, "--out", folder, "--resume"]
    code, text = said("train", *TRAIN, *words)
    assert (code, "history.split.train: " in text) == (1, True), text
    code, text = said("collect", *COLLECT, "--out", folder, "--resume", "--env.split_seed", "5")
    assert (code, "was collected with another configuration" in text) == (1, True), text


# ---------------------------------------------------------------- what is shown together


def both(folder: Path) -> list[Path]:
    return [folder / f"{model}-darkroom-seed0" for model in ("AD", "CompressedAD")]


def test_compare_says_what_was_judged(folder, said):
    file = HistoryFile(folder / HISTORY)
    line = f"Judged on held-out tasks {file.split.heldout.tolist()}: family darkroom(horizon=5, size=4)"
    code, text = said("compare", *both(folder))
    assert code == 0
    (judged,) = [found for found in text.splitlines() if found.startswith(line)]
    assert ", learner PPO, split 6 train, 2 validation, 2 heldout, " in judged
    assert f"history SHA-256 {file.digest()[:12]}" in judged
    assert "episodes 2, rollouts 1" in judged


@pytest.mark.parametrize(
    "words",
    [
        ["collect", *COLLECT, "--overwrite", "--env.split_seed", "5"],
        ["collect", *COLLECT, "--overwrite", "--algorithm.n_timesteps", "100"],
        ["mark", HISTORY, "--marker", "none"],
    ],
    ids=["split", "histories", "marks"],
)
def test_a_report_is_of_the_histories_that_were_judged(folder, said, words):
    there = ["--out", folder] if words[0] == "collect" else []
    assert said(*(folder / word if word == HISTORY else word for word in words), *there)[0] == 0
    code, text = said("report", *both(folder), "--out", folder / "report")
    assert (code, "holds other histories, marks or another split than the runs were judged on" in text) == (
        1,
        True,
    )
    code, text = said("compare", *both(folder))
    assert (code, "note: the table stands for the histories of the evaluation alone" in text) == (0, True), (
        text
    )


def test_runs_of_other_transforms_have_no_common_report(folder):
    one, two = map(runs.stored_job, both(folder))
    settings = {**two.config.model.model_dump(), "transforms": [{"name": "streams", "n": 1}]}
    model = type(two.config.model).model_validate(settings)
    other = replace(two, config=two.config.model_copy(update={"model": model}))
    with pytest.raises(RunDirectoryError, match=r"was trained otherwise than .* \(transforms\);"):
        report_stage([one, other], folder / HISTORY, folder / "report", command="")
    assert not (folder / "report").exists()


def test_weights_replaced_after_the_evaluation_are_noticed(folder, said):
    shutil.copy(folder / "AD-darkroom-seed0" / "last_model.pt", both(folder)[1] / "best_model.pt")
    code, text = said("compare", *both(folder))
    assert (code, "was made with other weights than best_model.pt has now" in text) == (1, True), text
    code, text = said("evaluate", both(folder)[1], "--overwrite")
    assert (code, "model.model: 'AD' there, 'CompressedAD' asked for" in text) == (1, True), text


@pytest.mark.parametrize("change", [["--evaluation.temperature", "0.5"], ["--evaluation.checkpoint", "last"]])
def test_other_settings_are_not_compared(folder, said, change):
    assert said("evaluate", both(folder)[1], "--overwrite", *change)[0] == 0
    code, text = said("compare", *both(folder))
    key = change[0].partition(".")[2]
    assert code == 1
    assert f"was judged otherwise than {both(folder)[0]}" in text
    assert f"({key}: " in text


def test_other_splits_are_not_compared(folder, said):
    other = folder / "other"
    assert said("collect", *COLLECT, "--out", other, "--env.split_seed", "4")[0] == 0
    words = ["--history", other / HISTORY, "--out", other, "--model", "CompressedAD"]
    assert said("train", *TRAIN, *words)[0] == 0
    assert said("evaluate", both(other)[1])[0] == 0
    code, text = said("compare", both(folder)[0], both(other)[1])
    assert (code, "was judged otherwise" in text and "split.heldout: " in text) == (1, True), text
    with pytest.raises(RunDirectoryError):
        load_runs([both(folder)[0], both(other)[1].rename(other / "AD-seed1")])


# ---------------------------------------------------------------- files without a digest


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda text: "", "seed|env|model"),
        (lambda text: text[: len(text) // 2], "could not find|there"),
        (lambda text: text.replace("episodes: 2", "episodes: 3", 1), "evaluation.episodes: 2 there, 3"),
        (lambda text: text.replace("\nseed: 0", "\nseed: 1"), "seed: 0 there, 1"),
        (lambda text: text.replace("n_transit: 20", "n_transit: 30"), "model.n_transit: 20 there, 30"),
        (lambda text: text.replace("model: AD", "model: ED"), "model.model: 'AD' there, 'ED'"),
    ],
)
def test_a_changed_configuration_is_named(folder, change, key):
    path = folder / "AD-darkroom-seed0" / "config.yaml"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(RunDirectoryError, match=rf"config\.yaml:.*({key})"):
        runs.stored_job(path.parent)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ((), [1], "cannot be read"),
        (("history",), [1], "history "),
        (("config",), "text", "config "),
        (("history", "path"), 3, r"history\.path "),
        (("history", "meaning"), "Darkroom", r"history\.meaning "),
        (("history", "rows", "train"), ["text"], r"history\.rows\.train"),
        (("history", "rows", "validation"), None, r"history\.rows\.validation"),
        (("history", "rows", "heldout"), 3, r"history\.rows\.heldout"),
        (("history", "marker"), ["threshold"], r"history\.marker "),
    ],
)
def test_a_damaged_description_of_a_run_is_told(folder, keys, value, said):
    place = folder / "AD-darkroom-seed0" / "environment.json"
    facts = json.loads(place.read_text())
    part = {"whole": facts}
    for key in (path := ("whole", *keys))[:-1]:
        part = part[key]
    part[path[-1]] = value
    place.write_text(json.dumps(facts if keys else value))
    with pytest.raises(RunDirectoryError, match=rf"environment\.json: .*{said}"):
        evaluate_run(runs.stored_job(place.parent))


def test_without_the_copy_the_weights_tell(folder):
    path = folder / "AD-darkroom-seed0"
    facts = json.loads((path / "environment.json").read_text())
    del facts["config"]  # as earlier versions left it
    (path / "environment.json").write_text(json.dumps(facts))
    assert runs.stored_job(path).config.model.n_transit == 20
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace("n_transit: 20", "n_transit: 30"))
    (path / "evaluation.npz").unlink()
    with pytest.raises(RunDirectoryError, match=r"model\.n_transit: 20 there, 30 asked for"):
        evaluate_run(runs.stored_job(path))


def test_a_run_of_an_earlier_version_is_judged_by_its_file(folder, tmp_path):
    path = folder / "AD-darkroom-seed0"
    facts = json.loads((path / "environment.json").read_text())
    del facts["history"]["rows"], facts["history"]["meaning"]
    (path / "environment.json").write_text(json.dumps(facts))
    for name in ("best_model.pt", "last_model.pt"):
        content = load(path / name)
        del content["trained_on"]
        save(path / name, content)
    evaluate_run(runs.stored_job(path))
    sealed(folder / HISTORY, exchange("train"))
    with pytest.raises(HistoryError, match="it is unknown whether"):
        evaluate_run(runs.stored_job(path))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "3", "null", "{"])
def test_an_environment_that_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"environment\.json: cannot be read \("):
        stored_environment(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"history": null}'])
def test_an_environment_may_lack_the_histories(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert stored_provenance(tmp_path) == {}
