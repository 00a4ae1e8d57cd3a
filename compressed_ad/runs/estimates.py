"""How long the stages will roughly take on CPU cores of today, for ``--dry-run``.

The three rates were measured on one core of a 2-core server CPU; yours may be twice as fast or slow.
"""

from __future__ import annotations

from compressed_ad.learners.ppo import PPOConfig
from compressed_ad.runs.config import plan
from compressed_ad.runs.settings import Config
from compressed_ad.runs.stages import n_process, source_steps
from compressed_ad.training.flops import training_flops

_PPO_SECONDS = 0.9e-6  # per environment step and epoch
_FLOPS = 21e9  # achieved while training small models
_PLAY_SECONDS = 1.2e-4  # per in-context step of one environment, at width 64, 3 layers, context 200
_REPORT_SECONDS = 10.0


def expected_seconds(config: Config) -> dict[str, float | None]:
    """Seconds of each stage of the main job; None where they cannot be told."""
    made, model, judged = plan(config), config.model, config.evaluation
    parallel = n_process(config)
    steps = source_steps(config)
    collect = None
    if config.algorithm.learner == "ppo" and ":" not in config.env.family:  # others step at their own speed
        epochs = PPOConfig(**config.algorithm.learner_kwargs).n_epochs
        collect = 5 + steps * epochs * _PPO_SECONDS / parallel
    n_run = len(config.comparison.methods) * config.comparison.runs
    rounds = -(-n_run // parallel)
    split = made.split
    size = model.tf_n_embd**2 * model.tf_n_layer / (64**2 * 3) * 0.7 + 0.3
    step = made.family.horizon * _PLAY_SECONDS * size
    validating = len(split.validation) * model.validation_rollouts * model.validation_episodes
    validation = model.validations * validating * step
    evaluation = 2 * len(split.heldout) * judged.rollouts * judged.episodes * step
    return {
        "collect": collect,
        "mark": 1 + steps * 1e-6,
        "train": rounds * (4 + training_flops(model) / _FLOPS + validation),
        "evaluate": rounds * (2 + evaluation),
        "report": _REPORT_SECONDS,
    }
