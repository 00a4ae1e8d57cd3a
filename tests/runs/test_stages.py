import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from compressed_ad.cli.main import main
from compressed_ad.errors import HistoryError, RunDirectoryError, SpaceError, SplitError
from compressed_ad.histories import file as history_file
from compressed_ad.histories.file import HistoryFile, marking_provenance, remark
from compressed_ad.marking.apply import marker_params
from compressed_ad.models import compressed_ad
from compressed_ad.models.ad import AD
from compressed_ad.runs import explore, job as runs, judge, stages
from compressed_ad.runs.config import load_config
from compressed_ad.runs.data import RunData
from compressed_ad.runs.directory import check, claimed, history_provenance
from compressed_ad.runs.judge import (
    evaluate_run,
    evaluated_rollouts,
    is_evaluated,
    load_model,
    stored_evaluation,
)
from compressed_ad.runs.layers import Request
from compressed_ad.runs.look_inside import examination_job
from compressed_ad.runs.stages import Stopwatch, collect_stage, mark_stage, report_stage
from compressed_ad.runs.trainer import train_run
from compressed_ad.training.checkpoints import digest, load
from tests.conftest import SmokeRun

TINY = [
    ("env.kwargs", "{size: 3, horizon: 5}"),
    ("env.validation", "1"),
    ("env.heldout", "2"),
    ("algorithm.n_learner", "1"),
    ("algorithm.n_timesteps", "60"),
    ("algorithm.n_process", "1"),
    ("algorithm.learner_kwargs", "{n_steps: 20, batch_size: 20, n_epochs: 2}"),
    ("model.steps", "4"),
    ("model.n_transit", "20"),
    ("model.validation_episodes", "2"),
    ("evaluation.episodes", "3"),
]


def tiny(*overrides: tuple[str, str]):
    return load_config(Request("smoke", overrides=[*TINY, *overrides]))


@pytest.fixture(scope="module")
def histories(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "h.hdf5"
    return collect_stage(tiny(), path)


def weights(path: Path) -> str:
    return digest(load(path)["model_state_dict"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- the whole job


def test_smoke_run_leaves_everything_and_says_it(smoke: SmokeRun):
    learned = "AD and CompressedAD did not learn in context: AD from "
    assert smoke.stdout.startswith(learned)
    assert f"<p>{learned}" in (smoke.out / "report" / "index.html").read_text()
    assert "Compression Statistics:\n  Total steps: 64800\n  Compressed steps: " in smoke.stdout
    assert not any(line.endswith(" ") for line in smoke.stdout.splitlines())
    assert "CompressedAD − AD" in smoke.stdout
    assert "Too few runs to compare CompressedAD with AD" in smoke.stdout
    assert smoke.stdout.rstrip().endswith(f"Report: {smoke.out / 'report' / 'index.html'}")
    assert "\x1b" not in smoke.stdout + smoke.stderr  # plain lines off a terminal
    for stage in ("collect", "mark", "train", "evaluate", "report"):
        assert f"{stage:<9} done in " in smoke.stderr
    assert (smoke.out / "history_darkroom_PPO_alg-seed0_compressed.hdf5").exists()
    for name in ("index.html", "table.csv", "summary.json"):
        assert (smoke.out / "report" / name).stat().st_size > 0


def test_a_source_that_did_not_learn_is_told_when_it_is_collected_and_in_the_report(smoke: SmokeRun):
    (note,) = [line for line in smoke.stderr.splitlines() if line.startswith("note: history_darkroom_PPO")]
    said = re.search(r"the last tenth of the source's histories earns -?0\.\d\d of the optimum.*", note)
    assert said is not None
    page = html.unescape((smoke.out / "report" / "index.html").read_text())
    assert f"Note: {said[0]}." in page


def test_a_benchmark_in_miniature(tmp_path, monkeypatch, capsys):
    """By its name, with one method: nothing is compared, and nothing is said of marks."""
    monkeypatch.chdir(tmp_path)
    small = {
        "env.kwargs": "{size: 4, horizon: 10}", "env.validation": "2", "env.heldout": "3",
        "algorithm.n_learner": "2", "algorithm.n_timesteps": "100", "algorithm.n_process": "1",
        "model.tf_n_embd": "16", "model.steps": "3", "model.n_transit": "40",
        "model.validations": "1", "model.validation_episodes": "2",
        "evaluation.episodes": "3", "evaluation.rollouts": "1",
    }  # fmt: skip
    words = [word for key, value in small.items() for word in (f"--{key}", value)]
    assert main(["run", "--config", "benchmark/darkroom", "--seed", "1", *words]) == 0
    out, err = capsys.readouterr()
    plain = " ".join(out.split())
    assert "Held-out tasks: mean over runs and tasks, 95 % interval" in out  # in one line
    assert re.match(r"AD (learned|did not learn) in context: from ", plain)
    assert "Only one method was evaluated (1 run, 3 held-out tasks), so there is nothing to compare." in plain
    assert out.rstrip().endswith("Report: runs/benchmark/darkroom/report/index.html")
    page = Path("runs/benchmark/darkroom/report/index.html").read_text()
    assert "Source was told" in page and "nothing of the task" in page
    search = "directed search (told the moves)"
    assert f"<td>{search}</td>" in page and search in out and "regret" not in (out + page).lower()
    with np.load("runs/benchmark/darkroom/AD-darkroom-seed1/evaluation.npz") as file:
        earned = file[f"reference_{search}"]
        assert earned.shape == file["returns"].shape
        scaled = (earned[..., -1].mean(1) - file["random"]) / (file["optimal"] - file["random"])
    summary = json.loads(Path("runs/benchmark/darkroom/report/summary.json").read_text())
    assert summary["references"][search]["final"] == pytest.approx(scaled.mean())
    for words_of_marks_or_pairs in ("Compression Statistics", "paired difference", "Marking", "Convergence"):
        assert words_of_marks_or_pairs not in out + page
    assert "note:" not in err and "Note:" not in page  # the source learned


def test_a_report_draws_what_was_evaluated_in_any_number_of_processes(smoke: SmokeRun, tmp_path, monkeypatch):
    """The same files whether the evaluation kept its actions, in one process as in two."""
    folders = sorted(smoke.out.glob("*-darkroom-seed*"))
    history = next(smoke.out.glob("history_*.hdf5"))
    todo = [runs.stored_job(folder, history) for folder in folders]
    wanted = tree(smoke.out / "report" / "figures")

    def played_again(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(explore, "play", played_again)
    report_stage(todo, history, tmp_path / "kept", command="")
    drawn = tree(tmp_path / "kept" / "figures")
    assert {name: content for name, content in drawn.items() if name in wanted} == wanted

    played = explore.evaluated(todo[0]).model.record
    monkeypatch.undo()
    monkeypatch.setattr(explore, "evaluated_rollouts", lambda job: None)  # as of earlier versions
    again = explore.evaluated(todo[0]).model.record
    assert played.actions.any()
    for name, value in vars(again).items():
        np.testing.assert_array_equal(getattr(played, name), value)


def test_random_walks_of_a_report_are_many_but_bounded(smoke: SmokeRun, monkeypatch):
    job = examination_job(smoke.out / "AD-darkroom-seed0", next(smoke.out.glob("history_*.hdf5")))
    assert explore.play(job, np.array([3])).walk.record.rewards.shape[:2] == (1, 64)
    monkeypatch.setattr(explore, "WALKED", 3 * 2 * 5 * 20)  # three walks: two tasks, five episodes of 20
    assert explore.play(job, np.array([3, 4])).walk.record.rewards.shape[:2] == (2, 3)
    monkeypatch.setattr(explore, "WALKED", 0)  # as many as the model plays
    assert explore.play(job, np.array([3])).walk.record.rewards.shape[:2] == (1, 2)


def test_summary_is_complete(smoke: SmokeRun):
    summary = json.loads((smoke.out / "report" / "summary.json").read_text())
    metrics = {
        "final",
        "auc",
        "accuracy",
        "excess_cross_entropy",
        "found_by_10",
        "found",
        "success_given_found",
    }
    assert set(summary["methods"]) == {"AD", "CompressedAD"}
    for row in (*summary["methods"].values(), summary["differences"]["CompressedAD-AD"]):
        assert set(row) >= metrics
        assert all(
            set(interval) == {"mean", "iqm", "low", "high", "interval_of"} for interval in row.values()
        )
    assert set(summary["marking"]) == {"total_steps", "compressed_steps", "compression_ratio"}
    assert 0.1 < summary["marking"]["compression_ratio"] < 0.8
    seconds = summary["seconds"]
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    assert min(seconds[k] for k in ("collect", "mark", "train", "evaluate", "report")) > 0
    split = summary["protocol"]["split"]
    assert [len(split[k]) for k in ("train", "validation", "heldout")] == [65, 8, 8]
    assert summary["protocol"]["seeds"] == {"AD": [0, 1], "CompressedAD": [0, 1]}
    assert summary["protocol"]["budget"]["gradient_steps"] == 60
    assert summary["verdict"].startswith("Too few runs")


def test_run_directories_say_what_they_were_made_with(smoke: SmokeRun):
    history = HistoryFile(smoke.out / "history_darkroom_PPO_alg-seed0_compressed.hdf5")
    for model in ("AD", "CompressedAD"):
        for seed in (0, 1):
            path = smoke.out / f"{model}-darkroom-seed{seed}"
            facts = json.loads((path / "environment.json").read_text())
            assert facts["history"]["sha256"] == history.digest()
            assert facts["versions"]["torch"] == facts["packages"]["torch"]
            assert {"numpy", "PyYAML", "pytest"} <= facts["packages"].keys()
            assert facts["hardware"]["cores"] >= 1 and facts["hardware"]["vectors"]
            assert facts["numerics"]["torch_threads"] == "1" and facts["numerics"]["numpy_blas"]
            job = runs.stored_job(path)
            assert (job.config.model.model, job.config.seed) == (model, seed)
            assert load(path / "best_model.pt")["config"]["model"] == model


def test_evaluations_are_paired_and_bounded_by_the_behaviour(smoke: SmokeRun):
    history = HistoryFile(smoke.out / "history_darkroom_PPO_alg-seed0_compressed.hdf5")
    entropies = set()
    for path in sorted(smoke.out.glob("*-darkroom-seed*")):
        with np.load(path / "evaluation.npz") as file:
            assert file["returns"].shape == file["returns_last"].shape == (8, 2, 5)
            np.testing.assert_array_equal(file["task_ids"], history.split.heldout)
            np.testing.assert_allclose(file["random"], history.random_return[history.split.heldout])
            entropies.add(float(file["behaviour_entropy"]))
            assert file["cross_entropy"] > file["behaviour_entropy"]
            assert 0 < file["accuracy"] < 1
            train = history.load(history.split.train).values()
            paid = [(h.rewards[:, :20] != 0).mean() for h in train]  # of the first episodes
            assert file["paying"] == pytest.approx(np.mean(paid)) and file["paying"] < 0.25
    assert len(entropies) == 1  # all runs are judged on the same windows
    # The source is nearly uniform over five actions after so little training.
    assert 1.4 < entropies.pop() <= np.log(5) + 1e-6


def test_behaviour_entropy_is_the_mean_over_the_supervised_steps(smoke: SmokeRun):
    job = runs.stored_job(smoke.out / "AD-darkroom-seed0")
    data = RunData(job)
    ids = data.file.split.heldout
    model, _ = load_model(job.path / "last_model.pt", data, "cpu")
    found = data.imitation(model, ids, 64)
    sampler, sequences = data.sampler(ids, data.file.info.seed, 32)
    expected = []
    for step in range(2):
        start, end = sampler.starts(step)
        rows = [sequences.entropy[s : min(s + sampler.n_transit, e)] for s, e in zip(start, end, strict=True)]
        expected.append(np.concatenate(rows).mean())
    assert found["behaviour_entropy"] == pytest.approx(np.mean(expected), rel=1e-6)


# ---------------------------------------------------------------- interruptions


def _spawn(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compressed_ad", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _when(process: subprocess.Popen[str], there, number: int) -> int:
    """Send ``number`` to the whole process group once ``there()``; the exit code."""
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.communicate(timeout=120)
    return process.returncode


def test_a_job_that_is_interrupted_everywhere_ends_with_the_same_numbers(smoke: SmokeRun, tmp_path):
    out = tmp_path / "run"
    words = ("run", "--preset", "smoke", "--out", out, "--algorithm.n_process", "2")
    name = "history_darkroom_PPO_alg-seed0_compressed.hdf5"
    shards = out / f"{name}.shards"
    assert _when(_spawn(*words), lambda: len(list(shards.glob("*.h5"))) > 3, signal.SIGINT) == 130
    assert 3 < len(list(shards.glob("*.h5"))) < 81  # what was finished is kept
    first = out / "AD-darkroom-seed0" / "checkpoints"
    assert _when(_spawn(*words), lambda: any(first.glob("*.pt")), signal.SIGKILL) == -signal.SIGKILL
    spent = json.loads((out / "seconds.json").read_text())["collect"]
    last = _spawn(*words)
    text, _ = last.communicate(timeout=240)
    assert last.returncode == 0, text
    assert json.loads((out / "seconds.json").read_text())["collect"] > spent
    ours, theirs = HistoryFile(out / name).load(), HistoryFile(smoke.out / name).load()
    for task, history in theirs.items():
        for key, array in history.per_step():
            np.testing.assert_array_equal(getattr(ours[task], key), array)
    for path in sorted(smoke.out.glob("*-darkroom-seed*")):
        for file in ("last_model.pt", "best_model.pt"):
            assert weights(out / path.name / file) == weights(path / file)
        with np.load(path / "evaluation.npz") as a, np.load(out / path.name / "evaluation.npz") as b:
            np.testing.assert_array_equal(a["returns"], b["returns"])
            assert a["cross_entropy"] == b["cross_entropy"]


def test_training_stops_politely_and_continues_exactly(smoke: SmokeRun, tmp_path, capsys):
    from compressed_ad.cli.main import main

    history = smoke.out / "history_darkroom_PPO_alg-seed0_compressed.hdf5"
    words = ["train", "--preset", "smoke", "--history", str(history), "--model", "AD"]
    words += ["--model.steps", "600", "--model.checkpoint_every", "100000"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    path = tmp_path / "parts" / "AD-darkroom-seed0"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = _spawn(*words, "--out", tmp_path / "parts", "--resume")
        before = _logged(path)

        def under_way(before: int = before) -> bool:
            return _logged(path) > before

        if number == signal.SIGTERM:
            deadline = time.monotonic() + 120
            while not under_way():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            capsys.readouterr()
            assert main([*words, "--out", str(tmp_path / "parts"), "--resume"]) == 1
            assert f"another process works here (process {process.pid})" in capsys.readouterr().err
        assert _when(process, under_way, number) == code
        assert any((path / "checkpoints").glob("*.pt"))  # written because it was asked to stop
        assert not (path / "last_model.pt").exists()
    assert main([*words, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert weights(path / "last_model.pt") == weights(tmp_path / "whole" / path.name / "last_model.pt")


def _logged(path: Path) -> int:
    file = path / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


# ---------------------------------------------------------------- runs


def test_only_training_tasks_are_trained_on(histories, tmp_path):
    split = HistoryFile(histories).split
    wanted = [int(split.train[0]), int(split.heldout[0])]
    job = runs.training_job(tiny(("env.training_tasks", str(wanted))), "AD", 0, histories, tmp_path)
    with pytest.raises(SplitError, match=rf"heldout tasks \[{wanted[1]}\]"):
        train_run(job)
    assert not job.path.exists()
    data = RunData(runs.training_job(tiny(), "AD", 0, histories, tmp_path))
    _, sequences = data.sampler(data.training_tasks(), 0, 4)
    assert set(sequences.task.tolist()) == set(split.train.tolist())


def test_a_model_may_be_trained_on_fewer_tasks(histories, tmp_path):
    wanted = [int(i) for i in HistoryFile(histories).split.train[:2]]
    job = runs.training_job(tiny(("env.training_tasks", str(wanted))), "AD", 0, histories, tmp_path)
    train_run(job)
    with pytest.raises(RunDirectoryError, match=r"env\.training_tasks"):
        train_run(runs.training_job(tiny(), "AD", 0, histories, tmp_path))


def test_a_history_shorter_than_the_context_works_and_is_told(histories, tmp_path):
    (note,) = train_run(
        runs.training_job(tiny(("model.n_transit", "100")), "CompressedAD", 0, histories, tmp_path)
    )
    assert "the longest history has 60 steps after its transforms, fewer than n_transit 100" in note


def test_unknown_probabilities_leave_no_action_out_and_it_is_told(histories, tmp_path, monkeypatch):
    raw = RunData.raw
    unknown = np.float32(np.nan)
    monkeypatch.setattr(
        RunData, "raw", lambda *args: (s := raw(*args)).with_columns(action_probs=s.action_probs * unknown)
    )
    job = runs.training_job(tiny(("model.loss_min_probability", "0.9")), "AD", 0, histories, tmp_path)
    (note,) = train_run(job)
    assert "do not tell how probable their actions were, so loss_min_probability leaves none out" in note


def test_without_validation_tasks_the_last_weights_count(tmp_path):
    config = tiny(("env.validation", "0"))
    history = collect_stage(config, tmp_path / "h.hdf5")
    job = runs.training_job(config, "AD", 0, history, tmp_path)
    train_run(job)
    assert weights(job.path / "best_model.pt") == weights(job.path / "last_model.pt")


def test_where_the_optimum_is_unknown_the_source_s_best_episode_scales_validation(tmp_path):
    cart_pole = [
        ("env.family", "gymnasium:CartPole-v1"),
        ("env.kwargs", "{params: {length: '0.25:1.0'}, n_task: 5, horizon: 20}"),
    ]
    config = load_config(Request("smoke", overrides=[*TINY[1:], *cart_pole]))
    history = collect_stage(config, tmp_path / "h.hdf5")
    job = runs.training_job(config, "AD", 0, history, tmp_path)
    data = RunData(job)
    ids = data.file.split.validation
    random, best = data.scale(ids)
    assert data.file.optimal_return is None
    for task, scale in zip(ids.tolist(), best, strict=True):
        recorded = data.file.load([task])[task]
        streams = []
        for rewards, ended in zip(recorded.rewards, recorded.episode_end, strict=True):
            pieces = np.split(rewards, np.flatnonzero(ended) + 1)[: ended.sum()]
            streams.append([piece.sum() for piece in pieces])
        shortest = min(map(len, streams))
        assert scale == np.mean([returns[:shortest] for returns in streams], axis=0).max()
    assert (best > random).all()
    train_run(job)
    judged = [json.loads(line) for line in (job.path / "metrics.jsonl").read_text().splitlines()]
    returns = {row["step"]: row["validation_return"] for row in judged if "validation_return" in row}
    assert returns and np.isfinite(list(returns.values())).all()
    assert load(job.path / "best_model.pt")["step"] == max(returns, key=returns.__getitem__)


def test_a_run_directory_of_another_configuration_is_left_alone(histories, tmp_path):
    job = runs.training_job(tiny(), "AD", 0, histories, tmp_path)
    train_run(job)
    before = tree(job.path)
    other = runs.training_job(tiny(("model.lr", "0.5"), ("model.steps", "5")), "AD", 0, histories, tmp_path)
    with pytest.raises(
        RunDirectoryError, match=r"model.steps: 4 there, 5 asked for; model.lr: 0.003 there, 0.5"
    ):
        train_run(other)
    # A setting that does not touch training may differ, and so may the place of work.
    train_run(
        runs.training_job(tiny(("evaluation.rollouts", "1"), ("device", "cpu")), "AD", 0, histories, tmp_path)
    )
    assert tree(job.path) == before


def test_data_marked_anew_is_other_data(histories, tmp_path):
    copy = tmp_path / "copy.hdf5"
    mark_stage(tiny(("marker.marker", "none")), histories, output=copy)
    job = runs.training_job(tiny(), "CompressedAD", 0, histories, tmp_path)
    train_run(job)
    with pytest.raises(RunDirectoryError, match=r"history.marker: 'threshold' there, 'none' asked for"):
        train_run(runs.training_job(tiny(), "CompressedAD", 0, copy, tmp_path))


def test_marking_as_it_is_marked_changes_nothing(histories):
    before = histories.read_bytes()
    assert mark_stage(tiny(), histories) == HistoryFile(histories).statistics()
    assert histories.read_bytes() == before


def test_what_is_not_said_is_the_markers_default(histories, tmp_path):
    copy, rule = Path(shutil.copy(histories, tmp_path / "h.hdf5")), ("marker.marker", "low_entropy")
    loose = mark_stage(tiny(rule, ("marker.params.max_entropy", "5")), copy)
    strict = mark_stage(tiny(rule), copy)
    assert strict != loose and strict == HistoryFile(copy).statistics()
    assert HistoryFile(copy).marking["parameters"]["max_entropy"] < 1


def test_a_file_from_before_a_parameter_came_is_not_marked_again(histories, tmp_path, monkeypatch):
    def without_causal(*arguments):
        now = marking_provenance(*arguments)
        return {**now, "parameters": {k: v for k, v in now["parameters"].items() if k != "causal"}}

    copy = Path(shutil.copy(histories, tmp_path / "h.hdf5"))
    with monkeypatch.context() as earlier:
        earlier.setattr(history_file, "marking_provenance", without_causal)
        remark(copy, "threshold", marker_params(tiny().marker), seed=tiny().seed)
    assert "causal" not in HistoryFile(copy).marking["parameters"]
    before = copy.read_bytes()
    mark_stage(tiny(), copy)
    assert copy.read_bytes() == before
    mark_stage(tiny(("marker.params.causal", "true")), copy)
    assert HistoryFile(copy).marking["parameters"]["causal"] is True


def test_only_what_the_loss_reads_counts_as_supervised(histories, tmp_path):
    for at, each in (("every", 20), ("query", 1)):
        config = tiny(("model.loss_at", at), ("model.n_transit", "20"))
        job = runs.training_job(config, "AD", 0, histories, tmp_path)
        spent = stages._training(job, HistoryFile(histories))
        assert spent["supervised_actions"] == config.model.steps * config.model.batch_size * each


def test_an_own_marker_that_was_changed_marks_anew(histories, tmp_path, monkeypatch):
    module, copy = ModuleType("changing"), Path(shutil.copy(histories, tmp_path / "h.hdf5"))
    monkeypatch.setitem(sys.modules, "changing", module)
    module.rule = lambda rewards: rewards > 0
    mark_stage(tiny(("marker.marker", "changing:rule")), copy)
    before = copy.read_bytes()
    mark_stage(tiny(("marker.marker", "changing:rule")), copy)
    assert copy.read_bytes() == before
    module.rule = lambda rewards: rewards > 5
    assert mark_stage(tiny(("marker.marker", "changing:rule")), copy).compressed_steps == 0
    assert not any(history.compression_mask.any() for _, history in HistoryFile(copy).each())


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("seed", "1"), "seed", 1),
        (("marker.marker", "rollout"), "marker", "rollout"),
        (("marker.on_policy_threshold", "0.3"), "parameters", {"on_policy_threshold": 0.3}),
    ],
)
def test_other_marks_are_made(histories, tmp_path, words, key, value):
    copy = Path(shutil.copy(histories, tmp_path / "h.hdf5"))
    mark_stage(tiny(words), copy)
    found = HistoryFile(copy).marking[key]
    assert ({**found, **value} if isinstance(value, dict) else value) == found


def test_judging_on_tasks_of_the_training_split_is_refused(histories, tmp_path):
    job = runs.training_job(tiny(), "AD", 0, histories, tmp_path / "runs")
    train_run(job)
    other = collect_stage(tiny(("env.split_seed", "1")), tmp_path / "other.hdf5")
    with pytest.raises(SplitError, match=r"was trained on held-out tasks \[.*\] of"):
        evaluate_run(runs.stored_job(job.path, other))
    environment = job.path / "environment.json"
    facts = json.loads(environment.read_text())
    facts["history"]["path"] = str(tmp_path / "gone.hdf5")
    del facts["history"]["rows"]  # as the first versions left it
    environment.write_text(json.dumps(facts))
    with pytest.raises(HistoryError, match="it is unknown whether"):
        evaluate_run(runs.stored_job(job.path, other))
    assert not (job.path / "evaluation.npz").exists()


def test_a_model_of_other_spaces_is_refused(histories, tmp_path):
    job = runs.training_job(tiny(), "AD", 0, histories, tmp_path / "runs")
    train_run(job)
    other = collect_stage(tiny(("env.kwargs", "{size: 4, horizon: 5}")), tmp_path / "other.hdf5")
    with pytest.raises(SpaceError, match="observation space of darkroom"):
        evaluate_run(runs.stored_job(job.path, other))


def test_evaluation_is_done_once_and_again_after_a_change(histories, tmp_path, monkeypatch):
    job = runs.training_job(tiny(), "AD", 0, histories, tmp_path)
    with pytest.raises(RunDirectoryError, match="its training is not finished"):
        evaluate_run(job)
    train_run(job)
    path = evaluate_run(job)
    first = path.stat().st_mtime_ns
    assert is_evaluated(job) and evaluated_rollouts(job) is not None
    evaluate_run(job)
    assert path.stat().st_mtime_ns == first
    path.write_bytes(b"half a file")
    assert not is_evaluated(job) and evaluated_rollouts(job) is None
    monkeypatch.setattr(judge, "KEPT", 7)
    evaluate_run(job)
    assert is_evaluated(job) and evaluated_rollouts(job) is None
    last = runs.training_job(tiny(("evaluation.checkpoint", "last")), "AD", 0, histories, tmp_path)
    assert not is_evaluated(last)
    evaluate_run(last)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["returns"], file["returns_last"])
        assert file["step"] == 4
    (job.path / "last_model.pt").unlink()
    with pytest.raises(RunDirectoryError, match="its training is not finished"):
        evaluate_run(job)


@pytest.mark.parametrize("marks", ["off", "self", "prompt"])
def test_models_play_as_the_settings_say(histories, tmp_path, marks):
    words = ("evaluation.temperature", "0.7"), ("evaluation.temperature_rewarded", "0.3")
    job = runs.training_job(tiny(*words, ("evaluation.marks", marks)), "CompressedAD", 0, histories, tmp_path)
    options = runs.playing(job.config)
    assert (options["temperature"], options["temperature_rewarded"], options["marks"]) == (0.7, 0.3, marks)
    assert options.get("on_policy_threshold") == (0.2 if marks == "self" else None)
    train_run(job)
    evaluate_run(job)
    plain = runs.training_job(tiny(), "CompressedAD", 0, histories, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"evaluation\.temperature: 0.7 there, 1.0 asked for"):
        train_run(plain)


def test_a_moved_folder_is_still_evaluated(histories, tmp_path):
    (tmp_path / "a").mkdir()
    history = tmp_path / "a" / "h.hdf5"
    history.write_bytes(histories.read_bytes())
    train_run(runs.training_job(tiny(), "AD", 0, history, tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    job = runs.stored_job(tmp_path / "b" / "AD-darkroom-seed0")
    assert job.history == tmp_path / "b" / "h.hdf5"
    evaluate_run(job)
    (tmp_path / "a").mkdir()
    shutil.copy(histories, history)
    assert runs.stored_job(job.path).history == history  # the one that it names goes first


# ---------------------------------------------------------------- directories


def claim(path, config):
    """Hold a run directory and let it go."""
    with claimed(path, config):
        assert (path / "config.yaml").exists()


def test_directories_of_others_are_refused(tmp_path):
    config = tiny()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"it has notes.txt, but no config.yaml"):
        claim(tmp_path, config)
    assert tree(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(RunDirectoryError, match="is a file"):
        check(tmp_path / "notes.txt", config)


def test_a_directory_is_held_by_one(tmp_path):
    config, path = tiny(), tmp_path / "run"
    mine = rf"another process works here \(process {os.getpid()}\)"
    with claimed(path, config), pytest.raises(RunDirectoryError, match=mine):
        claim(path, config)
    claim(path, config)  # free again
    before = tree(path)
    assert set(before) == {"config.yaml", "environment.json"}
    with pytest.raises(KeyError), claimed(path, config):
        raise KeyError
    assert tree(path) == before  # it is not taken back, as it was there


class Broken(AD):
    def __init__(self, config) -> None:
        raise ValueError("no such size")


def test_a_run_that_fails_at_once_leaves_the_directory_free(histories, tmp_path, monkeypatch):
    path, marked = tmp_path / "CompressedAD-darkroom-seed0", tmp_path / "h.hdf5"
    shutil.copy(histories, marked)
    job = runs.training_job(tiny(), "CompressedAD", 0, marked, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(compressed_ad, "CompressedAD", Broken)
        with pytest.raises(ValueError, match="no such size"):
            train_run(job)
    assert tree(path) == {}
    with monkeypatch.context() as meanwhile:  # marked anew after its provenance was taken
        window = RunData.sampler
        again = partial(mark_stage, tiny(("marker.marker", "none")), marked)
        meanwhile.setattr(RunData, "sampler", lambda *args, **options: (again(), window(*args, **options))[1])
        with pytest.raises(HistoryError, match="has changed since it was opened"):
            train_run(job)
    assert tree(path) == {}
    train_run(job)
    assert runs.stored_provenance(path)["marker"] == "none"


def test_a_damaged_config_is_named(tmp_path):
    path = tmp_path / "run"
    claim(path, tiny())
    (path / "config.yaml").write_text("model: [")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml"):
        check(path, tiny())


def test_provenance_names_the_data(histories):
    facts = history_provenance(HistoryFile(histories))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["marker_parameters"]["on_policy_threshold"] == 0.2
    assert len(facts["split"]["heldout"]) == 2


def test_stopwatch_adds_up(tmp_path):
    for _ in range(2):
        with Stopwatch(tmp_path / "seconds.json").stage("train"):
            time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt), Stopwatch(tmp_path / "seconds.json").stage("train"):
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert 0.15 < json.loads((tmp_path / "seconds.json").read_text())["train"] < 2
    (tmp_path / "seconds.json").write_text("[")
    with pytest.raises(RunDirectoryError, match="only timings are lost"):
        Stopwatch(tmp_path / "seconds.json")


def test_a_damaged_evaluation_counts_as_none(tmp_path):
    path = tmp_path / "evaluation.npz"
    np.savez(path, settings=np.array("{}"), returns=np.arange(400.0))
    assert stored_evaluation(path) == "{}"
    content = path.read_bytes()
    middle = content.index(np.arange(100.0, 110.0).tobytes())
    path.write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])
    assert stored_evaluation(path) is None


# ---------------------------------------------------------------- collection


def test_a_collection_is_planned_and_checked_once(tmp_path, monkeypatch):
    from compressed_ad.cli.main import main
    from compressed_ad.learners.ppo import BatchedPPO
    from compressed_ad.marking import conformance
    from compressed_ad.tasks import split
    from compressed_ad.tasks.gridworld import Darkroom

    calls: Counter[str] = Counter()

    def count(owner, name: str, label: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments, **options):
            calls[label] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(Darkroom, "__init__", "family")
    count(BatchedPPO, "__init__", "learner")
    count(split, "split_tasks", "split")
    count(conformance, "check_marker", "check of the marker")
    kinds = ("env", "algorithm", "marker")
    words = [word for key, value in TINY if key.startswith(kinds) for word in (f"--{key}", value)]
    assert main(["collect", "--preset", "smoke", *words, "--out", str(tmp_path)]) == 0
    assert HistoryFile(next(tmp_path.glob("*.hdf5"))).marking is not None
    assert calls == {"family": 1, "learner": 1, "split": 1, "check of the marker": 1}
