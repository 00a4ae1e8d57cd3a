"""What contexts cost that steps leave, beside plain ones: training, play, memory; one thread.

    python -m benchmarks.compression

Training: CPU seconds of a gradient step on windows of 700 and of 300 steps, by the compiled kernel and by
PyTorch's masked attention. Play: CPU seconds of a step of 64 environments after 200 and after 2000 steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.measuring import cpu_seconds, quick_from_command_line, side_by_side, write
from benchmarks.model import FAMILY, _stepper, default_model, synthetic
from compressed_ad import InContextAgent, WindowSampler
from compressed_ad.training.loop import build_model, make_optimiser

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "episode": {"segments": "episode", "kept_tokens": 30},
    "window": {"recent_steps": 64},
}
ROOM = {"tf_n_embd": 64, "batch_size": 4, "n_transit": 700}


def training(quick: bool, **windows: int) -> dict[str, float]:
    """Milliseconds of a gradient step of each kind on ``windows``, and of its attention by PyTorch."""
    calls = {}
    for name, kind in KINDS.items():
        for suffix, kernels in (("", True), ("_pytorch", False)):
            config = default_model(**{**ROOM, **windows}, **kind, kernels=kernels)
            model = build_model(config, 0)
            sampler = WindowSampler(synthetic(), config.n_transit, config.batch_size, seed=0)
            calls[name + suffix] = _stepper(model, make_optimiser(model, config), sampler, config)
    seconds = side_by_side(calls, 3 if quick else 15)
    found = {f"ms_per_step_{name}": 1e3 * value for name, value in seconds.items()}
    return found | {f"ratio_{kind}": seconds[kind] / seconds["plain"] for kind in ("episode", "window")}


def play(quick: bool, n_env: int = 64) -> dict[str, float]:
    """Milliseconds of a step of ``n_env`` environments, and bytes of their caches."""
    found = {}
    for name, kind in KINDS.items():
        model = build_model(
            default_model(**{**ROOM, "n_transit": 400 if name == "plain" else 700}, **kind), 0
        )
        agent = InContextAgent(model.eval(), seed=0)
        env = FAMILY.make(np.repeat(FAMILY.tasks()[:8], n_env // 8, axis=0), np.arange(n_env))
        agent.reset(n_env)
        obs, count = env.reset(), 0
        for until in (200, 2000):
            n = 50 if quick else 200
            while count < min(until, 60) if quick else count < until:
                obs, count = _step(agent, env, obs), count + 1

            def some(n: int = n, agent: InContextAgent = agent, env: Any = env, obs: Any = obs) -> None:
                for _ in range(n):
                    obs = _step(agent, env, obs)

            found[f"ms_{name}_after_{until}"] = 1e3 * cpu_seconds(some) / n
            count += n
        assert agent.cache is not None
        found[f"cache_bytes_{name}"] = 2.0 * agent.cache.key.numel() * agent.cache.key.element_size() / n_env
    return found


def _step(agent: InContextAgent, env: Any, obs: Any) -> Any:
    actions = agent.act(obs)
    step = env.step(actions)
    agent.observe(actions, step)
    return step.obs


def run(quick: bool = False) -> None:
    """All of them."""
    torch.set_num_threads(1)
    write("compression_training", training(quick))
    write("compression_training_300", training(quick, n_transit=300, batch_size=11))
    write("compression_play", play(quick))


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
