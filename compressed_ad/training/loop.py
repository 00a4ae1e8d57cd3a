"""Training: AdamW with warm-up and cosine decay, exact resume, in-context validation as it goes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_ad.errors import CheckpointError, NumericalError
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Batch
from compressed_ad.seeding import seed64
from compressed_ad.training.checkpoints import CheckpointDirectory, save
from compressed_ad.training.windows import WindowSampler

Metrics = dict[str, float]
Validate = Callable[[AD], Metrics]
"""Judges a model on the validation tasks; ``validation_return`` chooses the best checkpoint."""

LOG_EVERY = 50


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and saved a checkpoint first."""


@dataclass
class Trained:
    """A finished training run."""

    model: AD  # with its last weights
    best_step: int
    seconds: float
    messages: list[str] = field(default_factory=list)


def build_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> AD:
    """A fresh model; models that share an architecture and a seed share their common initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed64(seed, "weights") >> 1)
        return MODEL[config.model](config).to(device)


def learning_rate(config: ModelConfig, step: int) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``lr * lr_final`` at the last step."""
    rising = max(1, round(config.warmup * config.steps))
    if step < rising:
        return config.lr * (step + 1) / rising
    share = (step - rising) / max(1, config.steps - 1 - rising)
    return config.lr * (
        config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    )


def make_optimiser(model: nn.Module, config: ModelConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); only matrices of the transformer are decayed."""
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
) -> Trained:
    """Train ``config.model`` on the sampler's windows inside ``run_dir``, or go on where it stopped.

    Leaves ``best_model.pt`` (by ``validation_return``; the last weights where there is no validation),
    ``last_model.pt``, ``checkpoints/`` and ``metrics.jsonl``. An interrupted run that is called again ends
    with bit-identical weights: batches and dropout are functions of the step, the rest is in the checkpoint.
    Raises ``Interrupted`` after saving when ``should_stop()`` says so, ``NumericalError`` at a loss that is
    not finite.
    """
    run_dir, started = Path(run_dir), time.perf_counter()
    model = build_model(config, seed, device)
    optimiser = make_optimiser(model, config)
    checkpoints = CheckpointDirectory(run_dir / "checkpoints", config.checkpoints)
    state, messages = checkpoints.latest()
    best_file = run_dir / "best_model.pt"
    if state is not None and state["best"]["step"] >= 0 and not best_file.exists():
        messages.append(f"{best_file}: is missing, so this run is trained again from its start")
        checkpoints.clear()
        state = None
    step, best, spent = 0, {"step": -1, "value": -math.inf}, 0.0
    if state is not None:
        if state["model_config"] != config.model_dump(mode="json") or state["seed"] != seed:
            raise CheckpointError(
                f"{checkpoints.path}: belongs to another configuration; choose another run directory"
            )
        model.load_state_dict(state["model_state_dict"])
        optimiser.load_state_dict(state["optimiser"])
        step, best, spent = state["step"], state["best"], state["seconds"]
    log = MetricsLog(run_dir, step)
    forward: Any = torch.compile(model.loss) if config.compile else model.loss

    def checkpoint() -> None:
        content = {
            **weights(model, config, step, seed),
            "optimiser": optimiser.state_dict(),
            "model_config": config.model_dump(mode="json"),
            "best": best,
            "seconds": spent + time.perf_counter() - started,
        }
        checkpoints.save(step, content)

    validation_steps = {round(config.steps * (k + 1) / config.validations) for k in range(config.validations)}
    since, clock = step, time.perf_counter()
    model.train()
    with log:
        while step < config.steps:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            if config.dropout > 0:
                torch.manual_seed(seed64(seed, "dropout", step) >> 1)
            loss, accuracy = gradient(model, forward, sampler.batch(step), config)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"{run_dir}: the loss is {loss} at gradient step {step}; a lower lr may help"
                )
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            metrics = {"loss": loss, "accuracy": accuracy}
            if step % LOG_EVERY == 0 or step == config.steps:
                now = time.perf_counter()
                rate = (step - since) * config.batch_size * config.n_transit / (now - clock)
                log.write(
                    step, {**metrics, "lr": learning_rate(config, step - 1), "targets_per_second": rate}
                )
                since, clock = step, now
            if step in validation_steps and validate is not None:
                paused = time.perf_counter()
                judged = validate(model)
                log.write(step, judged)
                if judged["validation_return"] > best["value"]:
                    best = {"step": step, "value": judged["validation_return"]}
                    save(best_file, weights(model, config, step, seed))
                metrics |= judged
                clock += time.perf_counter() - paused
            progress(step, metrics)
            if step < config.steps and should_stop():
                checkpoint()
                raise Interrupted
            if step % config.checkpoint_every == 0 or step == config.steps or step in validation_steps:
                checkpoint()
    save(run_dir / "last_model.pt", weights(model, config, step, seed))
    if best["step"] < 0:
        save(best_file, weights(model, config, step, seed))
    return Trained(model, int(best["step"]), spent + time.perf_counter() - started, messages)


def gradient(model: AD, forward: Any, batch: Batch, config: ModelConfig) -> tuple[float, float]:
    """Accumulate the gradient of one batch, in ``config.accumulate`` parts; mean loss and accuracy."""
    total_loss, total_hit = 0.0, 0.0
    size = math.ceil(config.batch_size / config.accumulate)
    targets = batch.total_weight(config.loss_at)
    device = batch.valid.device.type
    for start in range(0, config.batch_size, size):
        part = batch.part(slice(start, start + size)) if config.accumulate > 1 else batch
        share = part.total_weight(config.loss_at) / targets
        half = torch.autocast(device, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
        with half:
            loss, hit = forward(part, config.loss_at, config.label_smoothing)
        (loss * share).backward()
        total_loss += float(loss.detach() * share)
        total_hit += float(hit * share)
    return total_loss, total_hit


def weights(model: AD, config: ModelConfig, step: int, seed: int) -> dict[str, Any]:
    """What a model file holds: ``model_state_dict``, its ``config``, ``step`` and ``seed``."""
    return {
        "model_state_dict": model.state_dict(),
        "config": config.model_dump(mode="json"),
        "step": step,
        "seed": seed,
    }


class MetricsLog:
    """``metrics.jsonl``, and TensorBoard events if it is installed; lines after ``step`` are dropped."""

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break
        path.write_text("".join(kept))
        self.file = path.open("a")
        self.board = _tensorboard(run_dir)

    def write(self, step: int, values: Metrics) -> None:
        """Append one line; what is not defined (NaN) is left out."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self.file.write(json.dumps({"step": step, **known}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in known.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *reason: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir))
