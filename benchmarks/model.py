"""Window sampling, training and in-context evaluation, one thread, the default model of ``config/``.

    python -m benchmarks.model

Sampling: a batch gathered by index beside the same batch made item by item from the dataset, as tokens.
Training: supervised actions per CPU second with every position supervised, beside the guide's loss at the
query alone and beside PyTorch's attention and gelu, and the share of the matmul peak that was measured in the
same run; for the default model and for that of the large rooms. The floor of a step is
``flops.training_flops`` at peak.
Evaluation: environment steps with the key-value cache beside the uncached reference, 32 environments, once
the context (``n_transit`` 200) has filled up; both compute the same logits.
Playing: the same steps of 8 to 1024 environments, compiled and by PyTorch, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.measuring import cpu_seconds, matmul_peak, quick_from_command_line, side_by_side, write
from compressed_ad import (
    AD,
    CompressedADDataset,
    Darkroom,
    InContextAgent,
    ModelConfig,
    WindowSampler,
    to_spec,
)
from compressed_ad.models.tokens import shift
from compressed_ad.runs.layers import config_folder
from compressed_ad.training.flops import cache_bytes, training_flops
from compressed_ad.training.loop import build_model, gradient, make_optimiser
from compressed_ad.training.sequences import Sequences

FAMILY = Darkroom()
MODEL_FILE = yaml.safe_load((config_folder() / "model" / "ad_dr.yaml").read_text())


def synthetic(n_stream: int = 400, n_step: int = 1000, horizon: int = 20) -> Sequences:
    """Random transitions in the shape of Darkroom's."""
    random = np.random.default_rng(0)
    m = n_stream * n_step
    store = {
        "states": random.integers(0, 9, (m, 2)).astype(np.uint8),
        "actions": random.integers(0, 5, m).astype(np.uint8),
        "rewards": (random.random(m) < 0.1).astype(np.float32),
        "next_states": random.integers(0, 9, (m, 2)).astype(np.uint8),
        "ended": np.arange(m) % horizon == horizon - 1,
        "mask": random.random(m) < 0.5,
        "update": np.zeros(m, np.int32),
    }
    return Sequences.of(store, np.arange(0, m + 1, n_step), np.arange(n_stream), np.zeros(n_stream, np.int64))


def default_model(**changes: Any) -> ModelConfig:
    """The shipped model file, unbound to its transforms."""
    spaces = {
        "observation_space": to_spec(FAMILY.observation_space),
        "action_space": to_spec(FAMILY.action_space),
    }
    return ModelConfig.model_validate({**MODEL_FILE, **spaces, "n_transit": 200, **changes})


def sampling(quick: bool) -> dict[str, Any]:
    """Batches per CPU second, gathered by index and item by item."""
    config, sequences = default_model(), synthetic()
    sampler = WindowSampler(sequences, config.n_transit, config.batch_size, seed=0)
    dataset = CompressedADDataset(sequences, config.n_transit)
    items = np.random.default_rng(0).integers(len(dataset), size=config.batch_size)

    def by_item() -> None:
        rows = [dataset[int(i)] for i in items]
        names = ("states", "actions", "rewards", "next_states", "ended", "compression_mask")
        states, actions, rewards, next_states, ended, mask = (
            torch.stack([row[name] for row in rows]) for name in names
        )
        shift(states.long(), actions.long(), rewards, next_states.long(), ended, mask)

    seconds = side_by_side({"index": lambda: sampler.batch(3), "item": by_item}, 20 if quick else 200)
    return {
        "ms_per_batch": 1e3 * seconds["index"],
        "windows_per_s": config.batch_size / seconds["index"],
        "windows_per_s_item_by_item": config.batch_size / seconds["item"],
        "ratio": seconds["item"] / seconds["index"],
    }


def training(quick: bool, **changes: Any) -> dict[str, Any]:
    """Supervised actions per CPU second and the share of the matmul peak."""
    config = default_model(**changes)
    sampler = WindowSampler(synthetic(), config.n_transit, config.batch_size, seed=0)
    calls = {}
    for name, other in {"every": {}, "query": {"loss_at": "query"}, "pytorch": {"kernels": False}}.items():
        c = config.model_copy(update=other)
        model = build_model(c, 0)
        optimiser = make_optimiser(model, c)
        calls[name] = _stepper(model, optimiser, sampler, c)
    seconds = side_by_side(calls, 3 if quick else 15)
    tokens = config.batch_size * config.n_transit
    peak = matmul_peak()
    flops = training_flops(config) / config.steps
    rate = flops / seconds["every"] / 1e9
    return {
        "parameters": sum(p.numel() for p in build_model(config, 0).parameters()),
        "ms_per_step": 1e3 * seconds["every"],
        "ms_per_step_pytorch": 1e3 * seconds["pytorch"],
        "ratio_pytorch": seconds["pytorch"] / seconds["every"],
        "floor_ms_per_step": 1e3 * flops / peak / 1e9,
        "targets_per_s": tokens / seconds["every"],
        "targets_per_s_query_only": config.batch_size / seconds["query"],
        "ratio_targets": tokens / seconds["every"] / (config.batch_size / seconds["query"]),
        "gflops": rate,
        "matmul_peak_gflops": peak,
        "share_of_peak": rate / peak,
    }


def _stepper(model: AD, optimiser: torch.optim.Optimizer, sampler: WindowSampler, config: ModelConfig) -> Any:
    def step() -> None:
        gradient(model, model.loss, sampler.batch(0), config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def _player(model: AD, n_env: int, **options: Any) -> tuple[InContextAgent, Callable[[int], None]]:
    """An agent in ``n_env`` environments, and a function that plays so many further steps."""
    agent = InContextAgent(model.eval(), seed=0, **options)
    env = FAMILY.make(np.repeat(FAMILY.tasks()[:8], n_env // 8, axis=0), np.arange(n_env))
    agent.reset(n_env)
    obs = env.reset()

    def play(count: int) -> None:
        nonlocal obs
        for _ in range(count):
            actions = agent.act(obs)
            step = env.step(actions)
            agent.observe(actions, step)
            obs = step.obs

    return agent, play


def playing(quick: bool) -> dict[str, Any]:
    """Milliseconds per step with full contexts, compiled and by PyTorch, beside the reading of the cache.

    Contexts swing between half full and full, refills included. What a step reads of keys and values, it
    reads from the same level of memory as a product of two vectors of that size: its time is the floor.
    """
    found: dict[str, Any] = {}
    for n_env in (8, 32) if quick else (8, 32, 128, 1024):
        models = {
            name: build_model(default_model(kernels=name == "compiled"), 0)
            for name in ("compiled", "pytorch")
        }
        players = {name: _player(model, n_env)[1] for name, model in models.items()}
        config = models["compiled"].config
        for play in players.values():
            play(config.n_transit)
        cycle, times = config.n_transit // 2, dict.fromkeys(players, 0.0)
        cycles = 1 if quick else max(1, 512 // n_env)
        for _ in range(5 * cycles):
            for name, play in players.items():
                part = cpu_seconds(lambda play=play, count=cycle // 5: play(count))
                times[name] += part / cycle / cycles
        size = cache_bytes(config, 0.75 * config.n_transit) * n_env
        key, value = torch.ones(2, int(size / 8))
        read = side_by_side({"read": lambda key=key, value=value: key @ value}, 5 if quick else 30)["read"]
        found |= {
            f"ms_{n_env}": 1e3 * times["compiled"],
            f"ms_{n_env}_pytorch": 1e3 * times["pytorch"],
            f"ms_{n_env}_reading": 1e3 * read,
            f"ratio_{n_env}_pytorch": times["pytorch"] / times["compiled"],
            f"gb_per_s_{n_env}": size / read / 1e9,
        }
    return found


def evaluation(quick: bool, n_env: int = 32) -> dict[str, Any]:
    """Milliseconds per step of ``n_env`` environments with full contexts: cached and uncached."""
    model = build_model(default_model(), 0)
    _, play = _player(model, n_env)
    play(200)
    n_step = 200 if quick else 400
    cached = cpu_seconds(lambda: play(n_step)) / n_step
    agent, play = _player(model, n_env)
    play(200)
    agent.cache = None  # contexts swing between half full and full; the cost is taken over one such swing
    uncached = float(np.mean([cpu_seconds(lambda: play(20)) / 20 for _ in range(1 if quick else 5)]))
    return {
        "environments": n_env,
        "n_transit": model.config.n_transit,
        "ms_per_step_cached": 1e3 * cached,
        "ms_per_step_uncached": 1e3 * uncached,
        "steps_per_s_cached": n_env / cached,
        "ratio": uncached / cached,
    }


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """All of them."""
    torch.set_num_threads(1)
    results = {
        "sampling": sampling(quick),
        "training": training(quick),
        "training_rooms": training(quick, tf_n_embd=64, n_transit=400, batch_size=8),
        "evaluation": evaluation(quick),
        "playing": playing(quick),
    }
    for name, result in results.items():
        write(name, result)
    return results


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
