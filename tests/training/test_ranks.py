"""Several processes that train one model do what one does: the same numbers up to rounding."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from compressed_ad.cli import torchrun
from compressed_ad.cli.main import main
from compressed_ad.errors import NumericalError, RunError
from compressed_ad.models.settings import ModelConfig
from compressed_ad.training import loop, ranks
from compressed_ad.training.checkpoints import digest, load
from compressed_ad.training.loop import Interrupted, build_model, gradient, train
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from tests.conftest import SmokeRun
from tests.training.test_loop import config, validate
from tests.training.test_transforms import history


def together(n: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returns in ``n`` processes of one group."""
    children = []
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        with suppress(BaseException):
            try:
                dist.init_process_group("gloo", f"file://{folder}/group{n}", rank=rank, world_size=n)
                (folder / f"result{rank}").write_bytes(pickle.dumps(work(rank)))
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / f"group{n}").unlink()
    assert codes == [0] * n, "see the traceback above"
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(n)]


def windows(c: ModelConfig) -> WindowSampler:
    """Of histories shorter and longer than a window, so that rows have different numbers of targets."""
    both = {0: history(3, 40), 1: history(3, 10, seed=1)}
    return WindowSampler(from_histories(both), c.n_transit, c.batch_size, seed=0, weight_marked=3.0)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    "values", [{}, {"accumulate": 2}, {"loss_at": "query"}, {"batch_size": 7, "accumulate": 3}], ids=str
)
def test_the_gradient_is_that_of_one_process(n: int, values: dict[str, Any], tmp_path: Path) -> None:
    c = config(**{"dropout": 0.0, "n_transit": 20, **values})
    batch = windows(c).batch(0)
    without_target = replace(batch, weight=batch.valid * (torch.arange(c.batch_size) > 4)[:, None].float())
    for given in (batch, without_target):

        def work(rank: int, given: Any = given) -> tuple[Any, list[torch.Tensor | None]]:
            model = build_model(c, 0)
            torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
            numbers = gradient(model, model.loss, given, c).tolist()
            return numbers, [p.grad for p in model.parameters()]

        numbers, alone = work(0)
        for found, gradients in together(n, tmp_path, work):
            assert found == pytest.approx(numbers, rel=1e-5, abs=1e-6)
            torch.testing.assert_close(gradients, alone, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_no_process_has_used_stays_without_gradient(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[float], list[torch.Tensor | None]]:
        model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(2, 2), torch.zeros(1)])
        (model[0].sum() * 2).backward()
        if rank == 1:
            (model[1].sum() * 3).backward()
        return ranks.sum_up([1.5, rank], model), [p.grad for p in model]

    for numbers, gradients in together(2, tmp_path, work):
        assert numbers == [3.0, 1.0]
        assert gradients[2] is None
        torch.testing.assert_close(gradients[:2], [torch.full((2,), 4.0), torch.full((2, 2), 3.0)])


Losses = dict[int, float]


def trained(
    c: ModelConfig, folder: Path, stop: int = 10**6, stopping: tuple[int, ...] = (0, 1)
) -> Callable[[int], Losses]:
    """Trains in ``folder`` until ``stop``, of which the ranks ``stopping`` hear; the losses by step."""

    def work(rank: int) -> Losses:
        losses: Losses = {}
        run_dir, stops = folder, [0]

        def asked() -> bool:
            stops[0] += 1
            return rank in stopping and stops[0] >= stop

        if rank:
            run_dir = folder / "nowhere"
        with suppress(Interrupted):
            train(
                c, windows(c), run_dir, validate=validate, should_stop=asked,
                progress=lambda step, metrics: losses.update({step: metrics["loss"]}),
            )  # fmt: skip
            assert stop > c.steps
        assert bool(losses) == (rank == 0) and not (folder / "nowhere").exists()
        return losses

    return work


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_goes_on_with_another_number_of_processes(precision: str, tmp_path: Path) -> None:
    c = config(dropout=0.0, batch_size=5, n_transit=20, precision=precision, lr_final=1.0, warmup=0.0)
    whole = trained(c, tmp_path / "whole")(0)
    run = tmp_path / "run"
    found = trained(c, run, stop=3)(0)
    found |= together(2, tmp_path, trained(c, run, stop=4, stopping=(1,)))[0]
    assert sorted(found) == list(range(1, 8))
    assert [int(p.stem[5:]) for p in sorted((run / "checkpoints").iterdir())] == [4, 7]
    found |= trained(c, run)(0)
    rough = precision == "bfloat16"  # rounds in the forward pass, by 2 ** -9
    assert found == pytest.approx(whole, rel=2e-2 if rough else 1e-4)
    if not rough:
        ours, theirs = (load(f / "last_model.pt")["model_state_dict"] for f in (run, tmp_path / "whole"))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]


def test_an_interrupted_run_of_two_processes_is_exact_also_with_dropout(tmp_path: Path) -> None:
    c = config(dropout=0.2, steps=8, n_transit=20)
    together(2, tmp_path, trained(c, tmp_path / "whole"))
    together(2, tmp_path, trained(c, tmp_path / "run", stop=3))
    together(2, tmp_path, trained(c, tmp_path / "run"))
    for name in ("last_model.pt", "best_model.pt"):
        assert digest(load(tmp_path / "run" / name)) == digest(load(tmp_path / "whole" / name))


def test_processes_drop_different_things(tmp_path: Path) -> None:
    """If they drew the same, two with equal windows would have the losses of one with this window."""

    class Equal:
        def batch(self, step: int) -> Any:
            return windows(config()).batch(step).part(torch.zeros(ranks.size(), dtype=torch.long))

    def work(rank: int) -> list[float]:
        losses: list[float] = []
        c = config(dropout=0.5, batch_size=ranks.size(), steps=3)
        keep = lambda step, metrics: losses.append(metrics["loss"])  # noqa: E731
        train(c, Equal(), tmp_path / f"{ranks.size()}", progress=keep)  # type: ignore[arg-type]
        return losses

    alone, (two, _) = work(0), together(2, tmp_path, work)
    assert two[0] == pytest.approx(alone[0]) and abs(two[2] - alone[2]) > 1e-3


def test_a_loss_that_is_not_finite_stops_all(tmp_path: Path) -> None:
    c = config(lr=1e30, grad_clip=1e30, dropout=0.0)

    def work(rank: int) -> str:
        with pytest.raises(NumericalError, match=r"loss is (nan|inf) at gradient step \d+") as caught:
            train(c, windows(c), tmp_path / f"run{rank}")
        return str(caught.value).partition(":")[2]

    one, two = together(2, tmp_path, work)
    assert one == two


def test_the_death_of_a_process_is_an_error_of_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            return
        with pytest.raises(RunError, match=r"another process of this job has ended.* --resume continues it"):
            while True:
                ranks.any_of(False)

    together(2, tmp_path, work)


def test_dropout_differs_between_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    c, seeds = config(steps=4, dropout=0.1), list[int]()
    whole = gradient

    def watched(*given: Any) -> tuple[float, float]:
        seeds.append(torch.initial_seed())
        return whole(*given)

    monkeypatch.setattr(loop, "gradient", watched)
    train(c, windows(c), tmp_path, seed=3)
    assert len(set(seeds)) == 4


# ---------------------------------------------------------------- the command line


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes this process the one of that rank which torchrun started, of two."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"RUN_ID": "none", "RESTART_COUNT": "0"}
    values = {f"TORCHELASTIC_{key}": value for key, value in torchrun.items()}
    values |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

    def become(rank: int) -> None:
        for key, value in {**values, "RANK": str(rank)}.items():
            monkeypatch.setenv(key, value)

    yield become
    del store


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--preset", "smoke"], "cad run starts its own processes: give it without torchrun"),
        (["study", "x.yaml"], "cad study starts its own processes: give it without torchrun"),
        (["train", "--model.lrr", "3"], "--model.lrr: unknown key 'model.lrr' (did you mean 'lr'?)"),
        (["train", "--model.batch_size", "1"], "model.batch_size: 1 windows cannot be shared by 2 processes"),
    ],
    ids=["run", "study", "key", "batch_size"],
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_error_of_all_is_told_once(
    words: list[str],
    message: str,
    order: tuple[int, int],
    as_rank: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = []
    for rank in order:
        as_rank(rank)
        assert main(words) == 2
        told += capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"cad: error: {message}")


def test_only_the_first_process_prints(
    as_rank: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        as_rank(rank)
        assert main(["train", "--help"]) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_torchrun_continues_a_run_and_stops_politely(smoke: SmokeRun, tmp_path: Path) -> None:
    """One process, then two, then one; the two are stopped by the signal that a cluster sends."""
    (history_file,) = smoke.out.glob("history_*.hdf5")
    words = ["train", "--preset", "smoke", "--history", str(history_file)]
    sizes = {"steps": 80, "checkpoint_every": 10, "checkpoints": 9, "validations": 1, "batch_size": 24}
    words += [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    run = tmp_path / "run" / whole.name
    shutil.copytree(whole, run)
    checkpoints = run / "checkpoints"
    for file in [*run.glob("*_model.pt"), *(p for p in checkpoints.iterdir() if p.stem > "step-00000010")]:
        file.unlink()
    words += ["--out", str(tmp_path / "run"), "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen([*torchrun, "-m", "compressed_ad", *words], stderr=subprocess.PIPE, text=True)
    while not (checkpoints / "step-00000020.pt").exists() and job.poll() is None:
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=60)
    ours = [line for line in told.splitlines() if line.startswith("cad")]
    assert ours == [
        "cad: stopped; what was finished is kept, and the same command with --resume continues"
    ], told
    assert 20 < max(int(p.stem[5:]) for p in checkpoints.iterdir()) < 80
    assert main(words) == 0
    found, expected = (load(folder / "last_model.pt")["model_state_dict"] for folder in (run, whole))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, whole)]
    assert [row["step"] for row in rows[0]] == [50, 80]
    for one, two in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_only_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # as other launchers do
    assert torchrun.started() == 1 and torchrun.is_first()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun.started() == 4 and not torchrun.is_first()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torchrun.is_first()
