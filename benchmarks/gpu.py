"""Training and playing on one GPU: targets a second and their share of the peak, environment steps a second.

    python -m benchmarks.gpu                        # or make bench-gpu
    python -m benchmarks.gpu --device cpu --quick   # tiny sizes: only shows that it runs

Training: gradient steps as ``train`` makes them, with batches of about 32,000 tokens that are drawn while the
GPU computes. The peak is that of a large product at the same precision, measured in the same run. Playing:
the default model in Darkroom, 400 steps from empty contexts, from observation to sampled action. A last line
says whether a gradient step waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import RESULTS
from benchmarks.model import FAMILY, default_model, synthetic
from compressed_ad import InContextAgent, WindowSampler
from compressed_ad.errors import raised
from compressed_ad.report.tables import plain
from compressed_ad.training.flops import training_flops
from compressed_ad.training.loop import build_model, gradient, make_optimiser

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ["", "precision", "width", "context", "a second", "TFLOP/s", "of peak"]


def seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Wall seconds of one of ``repeats`` calls in a row, after two that do not count."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def peak(precision: str, size: int, device: str) -> float:
    """FLOP/s of a square product."""
    a, b = (torch.randn(size, size, device=device).to(DTYPE[precision]) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 10, device)


def training(device: str, quick: bool, compiled: bool) -> Iterator[list[str]]:
    widths, contexts, tokens = (
        ((16, 32), (20, 40), 80) if quick else ((64, 256, 512), (200, 1000, 4000), 32_000)
    )
    sequences = synthetic(20 if quick else 400, 4000)
    for precision in DTYPE:
        most = peak(precision, 64 if quick else 8192, device)
        for width in widths:
            for context in contexts:
                config = default_model(
                    tf_n_embd=width,
                    tf_n_head=max(1, width // 32),
                    n_transit=context,
                    batch_size=max(1, tokens // context),
                    precision=precision,
                )
                row = ["targets", precision, f"{width}", f"{context:,}"]
                try:
                    step = stepper(config, sequences, device, compiled)
                    each = seconds(step, 2 if quick else 20, device)
                except torch.OutOfMemoryError:
                    yield [*row, "out of memory", "", ""]
                    continue
                flops = training_flops(config) / config.steps / each
                rate = config.batch_size * context / each
                yield [*row, f"{rate:,.0f}", f"{flops / 1e12:.3g}", f"{flops / most:.0%}"]


def stepper(config: Any, sequences: Any, device: str, compiled: bool) -> Callable[[], None]:
    model = build_model(config, 0, device)
    sampler = WindowSampler(sequences, config.n_transit, config.batch_size, seed=0, device=device)
    optimiser, loss = make_optimiser(model, config), torch.compile(model.loss) if compiled else model.loss
    count = iter(range(10**9))

    def step() -> None:
        gradient(model, loss, sampler.batch(next(count)), config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def playing(device: str, quick: bool) -> Iterator[list[str]]:
    model = build_model(default_model(), 0, device).eval()
    for n_env in (8, 16) if quick else (1000, 3000, 10_000):
        agent = InContextAgent(model, seed=0)
        env = FAMILY.make(np.resize(FAMILY.tasks(), (n_env, 2)), np.arange(n_env))
        agent.reset(n_env)
        obs = [env.reset()]

        def step(agent: InContextAgent = agent, env: Any = env, obs: list[Any] = obs) -> None:
            actions = agent.act(obs[0])
            outcome = env.step(actions)
            agent.observe(actions, outcome)
            obs[0] = outcome.obs

        row = [f"steps of {n_env:,} environments", "float32", f"{model.config.tf_n_embd}", "200"]
        try:
            with torch.no_grad():
                each = seconds(step, 5 if quick else 400, device)
        except torch.OutOfMemoryError:
            yield [*row, "out of memory", "", ""]
            continue
        yield [*row, f"{n_env / each:,.0f}", "", ""]


def run(device: str = "cuda", quick: bool = False, compiled: bool = False) -> list[list[str]]:
    """The table, which is also printed; empty without the device."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found, so nothing was measured (--device cpu --quick shows that it runs)")
        return []
    rows = [*training(device, quick, compiled), *playing(device, quick)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    RESULTS.mkdir(exist_ok=True)
    found = {"device": name, "compiled": compiled, "columns": COLUMNS, "rows": rows}
    (RESULTS / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}\n\n{plain([COLUMNS, *rows])}")
    if device == "cuda":
        step = stepper(default_model(), synthetic(), device, compiled=False)
        print(f"\nA gradient step waits for the GPU: {waits(step)}")
    return rows


def waits(step: Callable[[], None]) -> str:
    """Where ``step`` first waits for the GPU, or "never"."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return raised(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that it runs, not a figure")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, as --model.compile true")
    options = parser.parse_args()
    run(options.device, options.quick, options.compile)
