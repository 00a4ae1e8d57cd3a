import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressed_ad.errors import CheckpointError, NumericalError, RunDirectoryError
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.report.results import load_metrics
from compressed_ad.training import loop
from compressed_ad.training.checkpoints import CheckpointDirectory, digest, load, save
from compressed_ad.training.loop import Interrupted, MetricsLog, build_model, gradient, learning_rate, train
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from tests.models.test_models import SPACES
from tests.training.test_transforms import history

SMALL = {
    **SPACES,
    "model": "CompressedAD",
    "tf_n_embd": 16,
    "tf_n_head": 2,
    "tf_n_layer": 1,
    "n_transit": 12,
    "batch_size": 4,
    "steps": 12,
    "checkpoint_every": 4,
    "validations": 3,
    "dropout": 0.1,
    "lr": 0.01,
}


def config(**values: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **values})


def sampler(c: ModelConfig, seed: int = 0) -> WindowSampler:
    return WindowSampler(from_histories({0: history(6, 40)}), c.n_transit, c.batch_size, seed=seed)


def validate(model: AD) -> dict[str, float]:
    """A number that depends on the weights alone."""
    return {"validation_return": float(model.head.weight.detach().double().sum())}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load(run_dir / "last_model.pt")["model_state_dict"]


@pytest.mark.parametrize("drawn", [{"dropout": 0.1}, {"attention_dropout": 0.2}])
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, drawn: dict[str, float]
) -> None:
    c = config(**{"dropout": 0.0, **drawn})
    plain = train(config(dropout=0.0), sampler(c), tmp_path / "plain", validate=validate).model
    assert not torch.equal(plain.head.weight, train(c, sampler(c), tmp_path / "drawn").model.head.weight)
    train(c, sampler(c), tmp_path / "whole", validate=validate)
    for stop_after in (1, 4, 7, 11):
        run = tmp_path / f"stopped{stop_after}"
        seen: list[int] = []
        with pytest.raises(Interrupted):
            train(
                c,
                sampler(c),
                run,
                validate=validate,
                progress=lambda step, _, seen=seen: seen.append(step),
                should_stop=lambda seen=seen, stop=stop_after: seen[-1] >= stop,
            )
        assert seen[-1] == stop_after
        train(c, sampler(c), run, validate=validate)
        for name in ("last_model.pt", "best_model.pt"):
            assert digest(load(run / name)) == digest(load(tmp_path / "whole" / name))
        steps = [
            [
                (line["step"], line.get("loss"), line.get("validation_return"))
                for line in map(json.loads, text)
            ]
            for text in ((d / "metrics.jsonl").read_text().splitlines() for d in (run, tmp_path / "whole"))
        ]
        assert steps[0] == steps[1]
        numbers = [step for step, _, _ in steps[0]]
        assert numbers == sorted(set(numbers))  # one row for each step, the last for the last step
        assert numbers[-1] == c.steps
        assert None not in steps[0][-1]  # which has both loss and validation


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from compressed_ad.training.loop import train
    from tests.training.test_loop import config, sampler, validate
    c = config(steps=400, checkpoint_every=5, validations=3)
    train(c, sampler(c), Path(sys.argv[1]), validate=validate)
"""


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    c = config(steps=400, checkpoint_every=5, validations=3)
    train(c, sampler(c), tmp_path / "whole", validate=validate)
    run = tmp_path / "killed"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(run)])
        before = set((run / "checkpoints").glob("step-*")) if run.exists() else set()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if run.exists() and len(set((run / "checkpoints").glob("step-*")) - before) > 0:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    train(c, sampler(c), run, validate=validate)
    assert digest(weights(run)) == digest(weights(tmp_path / "whole"))


def test_the_best_checkpoint_is_the_one_with_the_highest_validation_return(tmp_path: Path) -> None:
    c = config()
    values = iter([0.1, 0.9, 0.4])
    done = train(c, sampler(c), tmp_path, validate=lambda model: {"validation_return": next(values)})
    assert done.best_step == 8 == load(tmp_path / "best_model.pt")["step"]
    assert load(tmp_path / "last_model.pt")["step"] == 12


def test_a_lost_best_model_is_trained_again_and_comes_out_the_same(tmp_path: Path) -> None:
    c = config()
    train(c, sampler(c), tmp_path, validate=validate)
    lost = tmp_path / "best_model.pt"
    before = digest(load(lost))
    lost.unlink()
    done = train(c, sampler(c), tmp_path, validate=validate)
    assert digest(load(lost)) == before and "is missing" in done.messages[0]


def test_without_validation_the_last_weights_count(tmp_path: Path) -> None:
    c = config(validations=0)
    train(c, sampler(c), tmp_path)
    assert load(tmp_path / "best_model.pt")["step"] == 12


def test_model_files_load_with_weights_only_and_rebuild_the_model(tmp_path: Path) -> None:
    c = config()
    model = train(c, sampler(c), tmp_path).model
    checkpoint = torch.load(tmp_path / "best_model.pt", weights_only=True)
    again = AD if checkpoint["config"]["model"] == "AD" else type(model)
    loaded = again(checkpoint["config"])
    loaded.load_state_dict(checkpoint["model_state_dict"])
    batch = sampler(c).batch(0)
    torch.testing.assert_close(loaded.eval()(batch.tokens), model.eval()(batch.tokens), rtol=0, atol=0)


def test_methods_with_one_seed_share_batches_and_common_initial_weights() -> None:
    ad, compressed = (build_model(config(model=name), 3) for name in ("AD", "CompressedAD"))
    theirs = compressed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ad.state_dict().items())
    other = build_model(config(model="AD"), 4).state_dict()
    assert not torch.equal(other["state.table.weight"], ad.state_dict()["state.table.weight"])


def test_learning_rate_schedule() -> None:
    c = config(steps=100, warmup=0.1, lr=1.0, lr_final=0.1)
    rates = [learning_rate(c, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) == max(rates)
    assert rates[-1] == pytest.approx(0.1) and all(a >= b for a, b in itertools.pairwise(rates[9:]))
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 89))
    assert rates[55] == pytest.approx(middle)
    constant = config(steps=100, warmup=0.0, lr=3e-4, lr_final=1.0)
    assert {learning_rate(constant, step) for step in range(100)} == {3e-4}


@pytest.mark.parametrize("at", ["every", "query"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(at: str) -> None:
    gradients = []
    for parts in (1, 2, 4):
        c = config(accumulate=parts, dropout=0.0, loss_at=at, n_transit=60)
        model = build_model(c, 0)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        gradient(model, model.loss, sampler(c).batch(0), c)
        gradients.append(model.transformer.blocks[0].up.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_without_a_target_teaches_nothing(parts: int) -> None:
    c = config(accumulate=parts, dropout=0.0)
    model, batch = build_model(c, 0), sampler(c).batch(0)
    _, accuracy = gradient(model, model.loss, batch, c).tolist()
    model.zero_grad()
    found = gradient(model, model.loss, replace(batch, weight=batch.valid.float() * 0), c)
    assert tuple(found.tolist()) == pytest.approx((0.0, accuracy))
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.fixture(params=["cpu", "as on a GPU"])
def losses_known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Losses are read at every step, or only where they are needed."""
    if request.param != "cpu":
        monkeypatch.setattr(loop, "known", lambda numbers: False)
    return str(request.param)


def test_a_loss_that_is_not_finite_stops_with_the_place_named(tmp_path: Path, losses_known: str) -> None:
    c = config(lr=1e30, grad_clip=1e30, dropout=0.0)
    with pytest.raises(NumericalError, match=r"loss is (nan|inf) at gradient step 1;"):
        train(c, sampler(c), tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_losses_that_are_read_late_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and weights, over an interruption; in between, the progress shows the last loss that was read."""
    c = config(steps=120, validations=3, checkpoint_every=30)
    seen: dict[str, list[float]] = {}

    def run(name: str) -> tuple[Any, str]:
        stops, shown = iter([False] * 70 + [True]), seen.setdefault(name, [])

        def progress(step: int, metrics: dict[str, float]) -> None:
            shown.append(metrics["loss"])

        options: Any = {"validate": lambda model: {"validation_return": 0.0}, "progress": progress}
        with pytest.raises(Interrupted):
            train(c, sampler(c), tmp_path / name, should_stop=lambda: next(stops), **options)
        train(c, sampler(c), tmp_path / name, **options)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        timed = {"targets_per_second", "check"}
        return [{k: v for k, v in row.items() if k not in timed} for row in rows], digest(
            weights(tmp_path / name)
        )

    at_once = run("at once")
    monkeypatch.setattr(loop, "known", lambda numbers: False)
    assert run("late") == at_once
    assert len(set(seen["at once"])) > 100 and len(seen["late"]) == 120
    assert len(set(seen["late"])) < 20 and set(seen["late"]) < set(seen["at once"])


def test_weights_that_are_not_finite_are_neither_stored_nor_loaded(tmp_path: Path) -> None:
    """The last update can break the weights after the last finite loss."""
    c = config(steps=1, validations=1, lr=1e38, grad_clip=1e30, dropout=0.0, weight_decay=1e30)
    with pytest.raises(NumericalError, match=r"run: after gradient step 1 the weight \S+ holds NaN"):
        train(c, sampler(c), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.pt"))
    folder = CheckpointDirectory(tmp_path / "folder", keep=3)
    folder.save(1, {"model_state_dict": {"head.weight": torch.ones(3)}})
    save(folder.file(2), {"model_state_dict": {"head.weight": torch.tensor([1.0, math.nan])}})
    with pytest.raises(NumericalError, match=r"step-00000002.pt: model_state_dict.head.weight holds NaN"):
        load(folder.file(2))
    found, messages = folder.latest()
    assert found is not None and len(messages) == 1 and "skipped" in messages[0]


def test_seconds_add_up_over_interruptions(tmp_path: Path) -> None:
    c = config(steps=4)
    with pytest.raises(Interrupted):
        train(c, sampler(c), tmp_path, should_stop=lambda: True)
    folder = CheckpointDirectory(tmp_path / "checkpoints", 3)
    folder.save(1, {**load(folder.file(1)), "seconds": 1000.0})
    assert 1000 < train(c, sampler(c), tmp_path).seconds < 1100


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    c = config()
    train(c, sampler(c), tmp_path)
    before = digest(weights(tmp_path))
    for other, seed in ((config(lr=0.02), 0), (c, 1)):
        with pytest.raises(CheckpointError, match="another configuration"):
            train(other, sampler(c), tmp_path, seed=seed)
    assert digest(weights(tmp_path)) == before


def test_a_history_shorter_than_the_context_trains(tmp_path: Path) -> None:
    c = config(n_transit=64, steps=3)
    done = train(c, sampler(c), tmp_path)
    assert math.isfinite(float(done.model.head.weight.detach().sum()))


def test_bfloat16_runs(tmp_path: Path) -> None:
    c = config(precision="bfloat16", steps=3)
    assert train(c, sampler(c), tmp_path).model.head.weight.dtype == torch.float32


def test_training_learns_what_can_be_learned(tmp_path: Path) -> None:
    """Actions that repeat the previous transition's action: a model must get near zero loss."""
    h = history(8, 40)
    h.actions[:, 1:] = h.actions[:, :1]
    h.truncated[:] = False
    c = config(steps=150, n_transit=20, batch_size=16, lr=0.01, dropout=0.0, first_window=1.0)
    losses: list[float] = []
    windows = WindowSampler(from_histories({0: h}), 20, 16, seed=0)
    train(c, windows, tmp_path, progress=lambda step, metrics: losses.append(metrics["loss"]))
    # Only the first action of each window is a guess among five: log(5) / 20 = 0.08 nats.
    assert losses[0] == pytest.approx(math.log(5), abs=0.01) and losses[-1] < 0.15


def test_checkpoints_are_ordered_by_number_and_the_newest_sound_one_counts(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, keep=3)
    for step in (9, 10, 99, 100, 99_999_999, 100_000_000):
        folder.save(step, {"step": step, "weight": torch.ones(3)})
    assert folder.steps() == [100, 99_999_999, 100_000_000]
    newest = folder.file(100_000_000)
    newest.write_bytes(newest.read_bytes()[:-40])
    content, damaged = folder.latest()
    assert content is not None and content["step"] == 99_999_999
    assert len(damaged) == 1 and "damaged" in damaged[0] and str(newest) in damaged[0]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(path, {"weight": torch.arange(50.0), "step": 3})
    sound = path.read_bytes()
    reference = digest(load(path))
    for position in range(0, len(sound), 37):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 0x40]) + sound[position + 1 :])
        try:
            content = load(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert digest(content) == reference  # a byte of padding


@pytest.mark.parametrize(
    "kind", [IndexError, AttributeError, NotImplementedError, AssertionError, MemoryError]
)
def test_whatever_a_damaged_checkpoint_raises_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    folder = CheckpointDirectory(tmp_path, keep=3)
    for step in (1, 2):
        folder.save(step, {"step": step})
    real = torch.load

    def damaged(path: Path, **options: object) -> object:
        if path == folder.file(2):
            raise kind("words")
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", damaged)
    content, messages = folder.latest()
    assert content == {"step": 1} and len(messages) == 1 and str(folder.file(2)) in messages[0]


@pytest.mark.parametrize("old", [False, True])
def test_a_resumed_run_has_every_row_that_its_checkpoint_has_passed(tmp_path: Path, old: bool) -> None:
    c = config(steps=24)
    run, path = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    seen: list[int] = []

    def stop_at(step: int) -> None:
        with pytest.raises(Interrupted):
            train(
                c, sampler(c), run, validate=validate,
                progress=lambda at, _: seen.append(at), should_stop=lambda: seen[-1] >= step,
            )  # fmt: skip

    stop_at(9)
    rows = load_metrics(path)
    assert rows[-1]["step"] == 8
    sound = path.read_bytes()
    if old:  # as an earlier version left it: no rows in the checkpoint, no check in the file
        folder = CheckpointDirectory(run / "checkpoints", 3)
        content = load(folder.file(9))
        del content["rows"]
        folder.save(9, content)
        path.write_text('{"step": 4, "val\n' + "".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    else:
        for damage in (b"", sound[:30], b"x" + sound, sound.replace(b"4", b"5", 1)):
            path.write_bytes(damage)
            stop_at(0)
            assert path.read_bytes()[: len(sound)] == sound
        path.write_bytes(b"")
    done = train(c, sampler(c), run, validate=validate)
    assert load_metrics(path)[: len(rows)] == rows and load_metrics(path)[-1]["step"] == c.steps
    assert done.messages == ([f"{path}: line 1 is damaged; left out"] if old else [])
    # As the error advises when the rows of a finished run are damaged.
    sound, before = path.read_bytes(), digest(load(run / "last_model.pt"))
    path.write_bytes(sound[:-30])
    (run / "last_model.pt").unlink()
    train(c, sampler(c), run, validate=validate)
    assert path.read_bytes() == sound and digest(load(run / "last_model.pt")) == before


def test_no_changed_digit_of_the_metrics_passes(tmp_path: Path) -> None:
    rows = [{"step": k, "loss": k / 3} for k in range(3)]
    with closing(MetricsLog(tmp_path, rows[:1])) as log:
        for row in rows[1:]:
            log.write(int(row["step"]), {"loss": row["loss"], "nothing": math.nan})
    path = tmp_path / "metrics.jsonl"
    sound, passed = path.read_bytes(), 0
    assert load_metrics(path) == rows
    for place in range(len(sound) - 1):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            assert load_metrics(path) == rows
            passed += 1
        except RunDirectoryError as error:
            assert str(path) in str(error)
    assert passed < 5
    path.write_bytes(b"".join(sound.splitlines(keepends=True)[1:]))
    with pytest.raises(RunDirectoryError, match="line 1 was changed after it was written; remove last_model"):
        load_metrics(path)


def test_foreign_and_hostile_files(tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    cases = {
        "empty": b"",
        "text": b"hello",
        "pickle": pickle.dumps(Hostile()),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)
    torch.save({"weight": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        load(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "missing")
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    save(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"model\.pt.*No space left"):
            save(path, {"step": 2})
    assert load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_training_goes_on_when_tensorboard_cannot_write(tmp_path, monkeypatch):
    class Full:
        def __init__(self, folder: str) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Full))
    log = MetricsLog(tmp_path, [])
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 0.5})
    log.close()
    (note,) = log.notes
    assert note.startswith("TensorBoard's events end early: [Errno 28] No space left on device (OSError in")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_tensorboard_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    log = MetricsLog(tmp_path, [])
    log.write(1, {"loss": 1.0})
    log.close()
    assert log.notes == []
