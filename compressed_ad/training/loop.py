"""Training loop: AdamW with warm-up and cosine decay, in-context validation, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressed_ad.errors import CheckpointError, NumericalError, RunError, raised
from compressed_ad.files import chained, write_atomically
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD, check_finite
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Batch
from compressed_ad.seeding import seed64
from compressed_ad.training import ranks
from compressed_ad.training.checkpoints import CheckpointDirectory, save
from compressed_ad.training.windows import WindowSampler

Metrics = dict[str, float]
Row = dict[str, Any]
"""A line of ``metrics.jsonl``: a step and what was measured there."""
METRICS = "metrics.jsonl"
Validate = Callable[[AD], Metrics]
"""Evaluates a model on the validation tasks; ``validation_return`` chooses the best checkpoint."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and saved a checkpoint first."""


@dataclass
class Trained:
    model: AD  # with its last weights
    best_step: int
    seconds: float
    messages: list[str] = field(default_factory=list)


def build_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> AD:
    """A new model; models of one architecture and seed share the initial weights that they have in common."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed64(seed, "weights") >> 1)
        return MODEL[config.model](config).to(device)


def learning_rate(config: ModelConfig, step: int) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``lr * lr_final`` at the last step.

    Constant with ``warmup`` 0 and ``lr_final`` 1.
    """
    rising = max(1, round(config.warmup * config.steps))
    if step < rising:
        return config.lr * (step + 1) / rising
    share = (step - rising) / max(1, config.steps - 1 - rising)
    cosine = 1 + math.cos(math.pi * min(share, 1.0))
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * cosine)


def make_optimiser(model: nn.Module, config: ModelConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), with weight decay for matrices of the transformer only."""
    decayed = {id(p) for n, p in model.named_parameters() if n.startswith("transformer.") and p.ndim == 2}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def train(
    config: ModelConfig,
    sampler: WindowSampler,
    run_dir: str | Path,
    *,
    seed: int = 0,
    validate: Validate | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, Metrics], None] = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    trained_on: Mapping[str, Any] | None = None,
) -> Trained:
    """Train ``config.model`` on the sampler's windows in ``run_dir``, or resume such a run.

    Writes ``best_model.pt`` (by ``validation_return``; without validation, the last weights),
    ``last_model.pt``, ``checkpoints/`` and ``metrics.jsonl``. An interrupted run that is called again ends
    with bit-identical weights: batches and dropout are functions of the step, the rest is in the checkpoint.
    Raises ``Interrupted`` after saving when ``should_stop()`` is true, ``NumericalError`` if the loss is not
    finite. ``trained_on``, plain data that says what the windows are from, is stored with the weights.

    In a process group of torch.distributed, all processes call this together. Each computes the gradient of
    its share of every batch, the first does the rest; the others need no ``run_dir``.
    """
    run_dir = Path(run_dir)
    run = _Run(config, run_dir, seed, device, trained_on)
    messages = run.resume()
    validation_steps = {round(config.steps * (k + 1) / config.validations) for k in range(config.validations)}
    checkpoint_steps = {*validation_steps, config.steps}
    logged, clock = run.step, time.perf_counter()
    run.model.train()
    if ranks.rank() > 0:
        return run.follow(sampler, should_stop)
    with closing(MetricsLog(run_dir, run.rows)) as log:
        while run.step < config.steps:
            run.update(sampler.batch(run.step))
            due = run.step % 50 == 0 or run.step == config.steps
            if due or run.step in validation_steps or not run.metrics:
                run.read()
            metrics, row = Metrics(run.metrics), Metrics()
            if due:
                now = time.perf_counter()
                rate = (run.step - logged) * config.batch_size * config.n_transit / (now - clock)
                lr = learning_rate(config, run.step - 1)
                row = {**metrics, "lr": lr, "targets_per_second": rate}
                logged, clock = run.step, now
            if run.step in validation_steps and validate is not None:
                paused = time.perf_counter()
                validation = validate(run.model)
                row |= validation
                if validation["validation_return"] > run.best["value"]:
                    run.best = {"step": run.step, "value": validation["validation_return"]}
                    save(run.best_file, run.weights())
                metrics |= validation
                clock += time.perf_counter() - paused
            if row:  # one for each step, so that the last step shows whether a log is whole
                log.write(run.step, row)
            progress(run.step, metrics)
            stopping = run.step < config.steps and ranks.any_of(should_stop())
            if stopping or run.step % config.checkpoint_every == 0 or run.step in checkpoint_steps:
                run.save_checkpoint()
            if stopping:
                ranks.any_of(True)  # it is saved, so all may end
                raise Interrupted
    save(run_dir / "last_model.pt", run.weights())
    if run.best["step"] < 0:
        save(run.best_file, run.weights())
    return run.finished([*messages, *log.notes])


class _Run:
    """What changes while a model is trained, and how it is stored."""

    def __init__(
        self,
        config: ModelConfig,
        run_dir: Path,
        seed: int,
        device: torch.device | str,
        trained_on: Mapping[str, Any] | None,
    ) -> None:
        self.config, self.run_dir, self.seed, self.trained_on = config, run_dir, seed, trained_on
        self.step, self.started = 0, time.perf_counter()  # earlier by what a resumed run took before
        self.model = build_model(config, seed, device)
        self.optimiser = make_optimiser(self.model, config)
        self.loss: Any = torch.compile(self.model.loss) if config.compile else self.model.loss
        self.checkpoints = CheckpointDirectory(run_dir / "checkpoints", config.checkpoints)
        self.best_file = run_dir / "best_model.pt"
        self.pending: dict[int, Tensor] = {}  # loss and accuracy of steps that were not read yet
        self.metrics: Metrics = {}  # of the last step that was read
        self.best = {"step": -1, "value": -math.inf}
        self.rows: list[Row] = []  # of ``metrics.jsonl``

    def resume(self) -> list[str]:
        """Continue from the newest sound checkpoint, if there is one; messages about what was not usable."""
        state, messages = self.checkpoints.latest() if ranks.rank() == 0 else (None, [])
        if state is not None and state["best"]["step"] >= 0 and not self.best_file.exists():
            messages.append(f"{self.best_file}: is missing, so this run is trained again from its start")
            for step in self.checkpoints.steps():
                self.checkpoints.file(step).unlink()
            state = None
        state = ranks.of_first(state)
        if state is None:
            return messages
        if state["model_config"] != self.config.model_dump(mode="json") or state["seed"] != self.seed:
            raise CheckpointError(
                f"{self.checkpoints.path}: belongs to another configuration; choose another run directory"
            )
        self.model.load_state_dict(state["model_state_dict"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best = state["step"], state["best"]
        self.started -= state["seconds"]
        if "rows" in state:
            self.rows = state["rows"]
        else:  # of an earlier version
            self.rows, damaged = readable_rows(self.run_dir / METRICS)
            self.rows = [row for row in self.rows if row["step"] <= self.step]
            messages += damaged
        return messages

    def update(self, batch: Batch) -> None:
        """One gradient step. On a GPU it is only begun, so that the next batch is drawn meanwhile."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if any(self.config.dropouts):
            torch.manual_seed((seed64(self.seed, "dropout", self.step) >> 1) + ranks.rank())
        self.pending[self.step] = found = gradient(self.model, self.loss, batch, self.config)
        if known(found):
            self.read()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def read(self) -> None:
        """Wait for the steps that were begun; ``NumericalError`` if a loss is not finite."""
        numbers = torch.stack(list(self.pending.values())).tolist() if self.pending else []
        for step, (loss, accuracy) in zip(self.pending, numbers, strict=True):
            if not math.isfinite(loss):
                where = f"{self.run_dir}: the loss is {loss} at gradient step {step}"
                raise NumericalError(f"{where}; a lower lr may help")
            self.metrics = {"loss": loss, "accuracy": accuracy}
        self.pending.clear()

    def follow(self, sampler: WindowSampler, should_stop: Callable[[], bool]) -> Trained:
        """What all processes but the first do: the same updates."""
        while self.step < self.config.steps:
            self.update(sampler.batch(self.step))
            if self.step < self.config.steps and ranks.any_of(should_stop()):
                ranks.any_of(True)  # until the first has saved
                raise Interrupted
        return self.finished([])

    def finished(self, messages: list[str]) -> Trained:
        best_step = ranks.of_first(int(self.best["step"]))
        return Trained(self.model, best_step, time.perf_counter() - self.started, messages)

    def weights(self) -> dict[str, Any]:
        """Content of a model file; ``NumericalError`` if a loss so far or a weight is NaN or infinity."""
        self.read()
        weights = self.model.state_dict()
        check_finite(f"{self.run_dir}: after gradient step {self.step} the weight ", weights)
        return {
            "model_state_dict": weights,
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "seed": self.seed,
            **({} if self.trained_on is None else {"trained_on": dict(self.trained_on)}),
        }

    def save_checkpoint(self) -> None:
        content = {
            **self.weights(),
            "optimiser": self.optimiser.state_dict(),
            "model_config": self.config.model_dump(mode="json"),
            "best": self.best,
            "rows": self.rows,
            "seconds": time.perf_counter() - self.started,
        }
        self.checkpoints.save(self.step, content)


def known(numbers: Tensor) -> bool:
    """Whether reading ``numbers`` waits for nothing."""
    return numbers.device.type == "cpu"


def gradient(model: AD, loss: Any, batch: Batch, config: ModelConfig) -> Tensor:
    """Accumulate the gradient of one batch, in ``config.accumulate`` parts.

    Of several processes, each accumulates that of its share of the rows; then all add them up. Gives the mean
    loss and accuracy, (2,) float64, on the CPU if they were added up there, else on the batch's device.
    """
    total = torch.zeros(2, dtype=torch.float64, device=batch.valid.device)
    rows = ranks.share(config.batch_size)
    size = max(1, math.ceil(len(rows) / config.accumulate))
    whole = size == config.batch_size  # its weights are not asked for, which would wait for a GPU
    total_weight, n_target = (1.0, 1.0) if whole else _weights(batch, config)
    half = config.precision == "bfloat16"
    for start in rows[::size]:
        part = batch if whole else batch.part(slice(start, min(start + size, rows.stop)))
        weight, n = (1.0, 1.0) if whole else _weights(part, config)
        share = weight / (total_weight or 1.0)  # without any weight, the batch teaches nothing
        with torch.autocast(batch.valid.device.type, torch.bfloat16) if half else nullcontext():
            part_loss, accuracy = loss(part, config.loss_at, config.label_smoothing)
        (part_loss * share).backward()
        total += torch.stack([part_loss.detach() * share, accuracy * (n / n_target)]).double()
    if ranks.size() == 1:
        return total
    return torch.tensor(ranks.sum_up(total.tolist(), model), dtype=torch.float64)


def _weights(batch: Batch, config: ModelConfig) -> tuple[float, float]:
    """How much a part of a batch counts: in the loss, in the accuracy."""
    both = batch, replace(batch, weight=None)
    weight, n = (float(each.total_weight(config.loss_at)) for each in both)
    return weight, n


class MetricsLog:
    """``metrics.jsonl``, and TensorBoard events if it is installed; starts with ``rows``, and adds to them.

    Each line has a ``check``, see ``files.chained``. The rows are also in the checkpoints, so that a run that
    is continued writes all of them again, whatever became of the file.
    """

    def __init__(self, run_dir: Path, rows: list[Row]) -> None:
        self.path, self.rows, self.check = run_dir / METRICS, rows, ""
        write_atomically(self.path, "".join(map(self._line, rows)).encode())
        self.file = self.path.open("a")
        self.board: Any = None
        self.notes: list[str] = []
        with self._optional(), suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir))

    def _line(self, row: Row) -> str:
        self.check = chained(row, self.check)
        return json.dumps({**row, "check": self.check}) + "\n"

    def write(self, step: int, values: Metrics) -> None:
        """Append one line, without undefined values (NaN)."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self.rows.append({"step": step, **known})
        try:
            self.file.write(self._line(self.rows[-1]))
            self.file.flush()
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from error
        with self._optional():
            for name, value in known.items() if self.board is not None else ():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        with suppress(OSError):  # of a line that could not be written
            self.file.close()
        with self._optional():
            if self.board is not None:
                self.board.close()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Training goes on without TensorBoard if that fails, on a full disk, say."""
        try:
            yield
        except Exception as error:  # whatever TensorBoard raises
            self.notes.append(f"TensorBoard's events end early: {raised(error)}")
            self.board = None


def readable_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a ``metrics.jsonl``; and a message for each line that is damaged, unless it is the last."""
    rows, damaged = list[Row](), list[str]()
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            damaged.append(f"{path}: line {number} is damaged; left out")
    return rows, damaged
