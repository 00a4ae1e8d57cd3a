"""Every source algorithm of SB3 and sb3-contrib: how fast it learns, and what markers mark of its histories.

    python -m benchmarks.source_algorithms            # seven minutes
    python -m benchmarks.source_algorithms --quick    # only a check that it runs

One learner of one stream learns a small task alone, with SB3's own hyper-parameters except rollouts of 100
steps (A2C: 5): algorithms for Discrete actions a goal of Darkroom, those for Box actions a goal of
``examples/own_reach.py``. Speeds are environment steps per CPU second of one process, learning and recording
included. PPO learns both tasks; ratios are to PPO on the same task. Shares are of all steps, each marker with
its defaults; a marker that needs what an algorithm does not have (entropy, ``log_prob_next``) marks nothing
of it and is shown as None.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import quick_from_command_line, write
from compressed_ad import Darkroom, History, apply_marker, make_learner
from compressed_ad.errors import MarkerError
from compressed_ad.learners.sb3.algorithms import ALGORITHM, DISCRETE

MARKERS = ("threshold", "high_confidence", "low_entropy", "policy_ratio", "rollout")
ROLLOUT = {"n_steps": 100, "batch_size": 50}
HYPER: Mapping[str, Mapping[str, Any]] = {
    "PPO": ROLLOUT,
    "MaskablePPO": ROLLOUT,
    "RecurrentPPO": ROLLOUT,
    "TRPO": ROLLOUT,
    "TD3": {"action_noise": 0.1},
    "DDPG": {"action_noise": 0.1},
}


class Allowed(Darkroom):
    """Darkroom for MaskablePPO: every action is always possible."""

    def make(self, tasks: Any, seeds: Any) -> Any:
        env = super().make(tasks, seeds)
        env.action_masks = lambda: np.ones((env.num_envs, 5), bool)  # type: ignore[attr-defined]
        return env


def _learn(name: str, family: Any, n_timesteps: int) -> tuple[float, History]:
    """CPU seconds, and the history."""
    learner, task = make_learner(f"sb3:{name}", HYPER.get(name, {})), np.array([30])
    start = time.process_time()
    (history,) = learner.learn(
        family, task, family.tasks()[task], n_timesteps=n_timesteps, n_learner=1, n_stream=1, seed=0
    )
    return time.process_time() - start, history


def _shares(history: History) -> dict[str, float | None]:
    """Marked share by marker, None where it does not apply."""
    shares: dict[str, float | None] = {}
    for marker in MARKERS:
        try:
            shares[marker] = float(apply_marker(marker, history).mean())
        except MarkerError:
            shares[marker] = None
    return shares


def run(quick: bool = False) -> dict[str, Any]:
    """Steps per CPU second, ratio to PPO and marked shares of every algorithm."""
    n_timesteps = 300 if quick else 1500
    reach = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_reach.py"))["Reach"]()
    families = {"darkroom": Allowed(), "reach": reach}
    _learn("PPO", reach, 100)  # imports and first calls
    result: dict[str, Any] = {"n_timesteps": n_timesteps}
    base = 1.0
    for task, family in families.items():
        algorithms = [n for n, a in ALGORITHM.items() if (DISCRETE in a.actions) == (task == "darkroom")]
        for name in dict.fromkeys(["PPO", *algorithms]):
            seconds, history = _learn(name, family, n_timesteps)
            speed = n_timesteps / seconds
            base = speed if name == "PPO" else base
            result[f"{name} on {task}"] = {
                "steps_per_cpu_s": round(speed),
                "x_ppo": round(speed / base, 3),
                "return": round(float(history.rewards[:, -200:].sum() / (200 / family.horizon)), 2),
                **{k: v if v is None else round(v, 3) for k, v in _shares(history).items()},
            }
    write("source_algorithms", result)
    return result


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
