"""Collecting learning histories: the batched PPO beside SB3's PPO, on one core, same hyper-parameters.

    python -m benchmarks.collection            # about a minute
    python -m benchmarks.collection --full     # also all 81 goals x 100 streams x 1000 steps, two processes

The protocol is the literature's (81 Darkroom goals, 100 streams, 1000 steps each, n_steps 20, batch 50,
20 epochs, lr 3e-4). Speeds are environment steps per CPU second of one process, gradient steps included and
compilation (once per machine, reported as ``first_call_s``) excluded. Both sides run in turns in one process,
so that what else the machine does hits both.

Two ratios are printed. ``ratio_first_updates`` compares the same first updates of the same goals, where
observations repeat least. ``ratio`` compares with our whole histories; SB3's speed does not depend on the
phase of learning, ours does, because observations that repeat within a minibatch are computed once.

Floor. A gradient step with U distinct observations and P parameters must do 6 * U * (2 * 64 * 64 + 64 *
(n_action + 1)) floating-point operations in products and move 28 * P bytes for Adam (read weight, gradient
and both moments, write all but the gradient). ``floor_us`` is the sum of both at the rates measured in the
same run: the product kernel alone in cache, and a sum of two arrays of the same total size in L2.
``times_floor`` is what a whole gradient step takes, divided by that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import njit

from compressed_ad import BatchedPPO, Darkroom, History, make_learner
from compressed_ad.learners.ppo.training import Encoder, layout
from compressed_ad.learners.ppo.vector_code import product
from compressed_ad.seeding import rng

RESULTS = Path(__file__).parent / "results"
HYPER = {"n_steps": 20, "batch_size": 50, "n_epochs": 20, "learning_rate": 3e-4}
N_STREAM, N_TIMESTEPS = 100, 1000
FAMILY = Darkroom()


def _learn(learner: Any, ids: np.ndarray, **kwargs: int) -> list[History]:
    kwargs = {"n_timesteps": N_TIMESTEPS, "n_learner": 1, "n_stream": N_STREAM, "seed": 0, **kwargs}
    return learner.learn(FAMILY, ids, FAMILY.tasks()[ids], **kwargs)


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _distinct(histories: list[History]) -> float:
    """Mean number of distinct observations in a minibatch."""
    generator = rng(0, "benchmark-distinct")
    counts = []
    for history in histories:
        cells = history.states @ [FAMILY.size, 1]
        for start in range(0, cells.shape[1], HYPER["n_steps"]):
            rollout = cells[:, start : start + HYPER["n_steps"]].ravel()
            counts += [
                len(np.unique(generator.permutation(rollout)[: HYPER["batch_size"]])) for _ in range(4)
            ]
    return float(np.mean(counts))


@njit(fastmath=True)
def _repeat_product(times, c, a, b):
    for _ in range(times):
        product(c, 0, 64, a, 0, 64, 1, b, 0, 64, 48, 64, 64)


def _rates(n_parameter: int) -> tuple[float, float]:
    """GFLOP/s of the product kernel on 48 x 64 x 64 and GB/s of an addition on as much memory as Adam's."""
    c, a, b = (np.ones(64 * 64, np.float32) for _ in range(3))
    _repeat_product(1, c, a, b)
    product = min(_cpu_seconds(lambda: _repeat_product(20_000, c, a, b)) for _ in range(5))
    x, y, z = (np.ones(n_parameter * 7 // 3, np.float32) for _ in range(3))

    def add() -> None:
        for _ in range(5000):
            np.add(x, y, out=z)

    memory = min(_cpu_seconds(add) for _ in range(5))
    return 20_000 * 2 * 48 * 64 * 64 / product / 1e9, 5000 * 3 * x.nbytes / memory / 1e9


def _half(ids: np.ndarray) -> float:
    """One worker's share of the whole collection; returns the mean normalised return as a checksum."""
    histories = _learn(BatchedPPO(**HYPER), ids)
    returns = np.array([h.rewards.sum() for h in histories]) / (N_STREAM * N_TIMESTEPS / FAMILY.horizon)
    return float((returns / FAMILY.optimal_return(FAMILY.tasks()[ids])).mean())


def _whole() -> dict[str, float]:
    """All 81 goals in two processes, wall-clock seconds from start to end of the processes."""
    ids = np.arange(81)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        area = np.mean(pool.map(_half, [ids[::2], ids[1::2]]))
    return {"wall_s": time.perf_counter() - start, "steps": 81e5, "normalised_return": float(area)}


def run(quick: bool, full: bool = False) -> dict[str, Any]:
    """Measure, print and return all figures; ``quick`` takes 15 s, ``full`` adds the whole collection."""
    ours, sb3 = BatchedPPO(**HYPER), make_learner("sb3:PPO", HYPER)
    many = BatchedPPO(**{**HYPER, "n_steps": 100})
    start = time.perf_counter()
    _learn(ours, np.arange(1), n_timesteps=20, n_stream=5)
    first_call = time.perf_counter() - start
    _learn(sb3, np.arange(1), n_timesteps=20, n_stream=5)

    ids = np.array([12, 30, 68] if quick else [3, 12, 25, 30, 46, 59, 68, 77])
    n_round, n_early = (1, 40) if quick else (3, 60)
    histories: list[History] = []
    seconds: dict[str, list[float]] = {"sb3": [], "first": [], "whole": [], "many": []}
    for _ in range(n_round):
        seconds["sb3"].append(_cpu_seconds(lambda: _learn(sb3, ids[:1], n_timesteps=n_early)))
        seconds["first"].append(_cpu_seconds(lambda: _learn(ours, ids, n_timesteps=n_early)))
        seconds["whole"].append(_cpu_seconds(lambda: histories.__setitem__(slice(None), _learn(ours, ids))))
        seconds["many"].append(_cpu_seconds(lambda: _learn(many, ids, n_learner=10, n_stream=1)))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    n_early_steps = n_early * N_STREAM
    speed = {
        "sb3": n_early_steps / median["sb3"],
        "ours_first_updates": len(ids) * n_early_steps / median["first"],
        "ours": len(ids) * N_STREAM * N_TIMESTEPS / median["whole"],
        "ours_10_learners_of_1_stream": len(ids) * 10 * N_TIMESTEPS / median["many"],
    }

    distinct = _distinct(histories)
    n_parameter = layout(Encoder(FAMILY.observation_space).n_input, 5, (64, 64)).size
    gflops, gbytes = _rates(n_parameter)
    flops, moved = 6 * distinct * (2 * 64 * 64 + 64 * 6), 28 * n_parameter
    floor_us = flops / gflops / 1e3 + moved / gbytes / 1e3
    step_us = 1e6 / speed["ours"] * HYPER["batch_size"] / HYPER["n_epochs"]
    result: dict[str, Any] = {
        "cpu": llvm.get_host_cpu_name(),
        "python": platform.python_version(),
        "hyper_parameters": HYPER,
        "first_call_s": first_call,
        "steps_per_cpu_s": speed,
        "ratio_first_updates": speed["ours_first_updates"] / speed["sb3"],
        "ratio": speed["ours"] / speed["sb3"],
        "projected_cpu_s_81x100x1000": {"sb3": 81e5 / speed["sb3"], "ours": 81e5 / speed["ours"]},
        "gradient_step": {
            "distinct_observations": distinct,
            "product_gflops": gflops,
            "memory_gb_per_s": gbytes,
            "floor_us": floor_us,
            "measured_us": step_us,
            "times_floor": step_us / floor_us,
        },
    }
    if full:
        result["measured_81x100x1000_two_processes"] = _whole()
    _print(result)
    return result


def _print(result: dict[str, Any]) -> None:
    speed, step = result["steps_per_cpu_s"], result["gradient_step"]
    print("collection: environment steps per CPU second, learning included")
    for name, value in speed.items():
        print(f"  {name:30s} {value:10,.0f}   {value / speed['sb3']:6.1f} x SB3")
    projected = result["projected_cpu_s_81x100x1000"]
    print("  81 x 100 x 1000 steps, projected CPU seconds:", end=" ")
    print(f"SB3 {projected['sb3']:,.0f}, ours {projected['ours']:,.0f}")
    if whole := result.get("measured_81x100x1000_two_processes"):
        print(f"  81 x 100 x 1000 steps, measured with two processes: {whole['wall_s']:.1f} s")
    print(
        f"  gradient step: {step['measured_us']:.1f} us, floor {step['floor_us']:.1f} us "
        f"({step['distinct_observations']:.1f} distinct observations of {HYPER['batch_size']}, "
        f"{step['product_gflops']:.0f} GFLOP/s, {step['memory_gb_per_s']:.0f} GB/s): "
        f"{step['times_floor']:.2f} x floor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    result = run(args.quick, args.full)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "collection.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
