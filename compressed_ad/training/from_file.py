"""What the training of a model takes from a history file."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import HistoryInfo, Scales
from compressed_ad.models import MODEL
from compressed_ad.models.settings import ModelConfig
from compressed_ad.settings import validated
from compressed_ad.training.sequences import Sequences
from compressed_ad.training.windows import WindowSampler, training_sequences


def settings_of_file(info: HistoryInfo, scales: Scales) -> dict[str, Any]:
    """The settings of a model that its histories decide: spaces, scales, whether an episode is one step."""
    found: dict[str, Any] = {f"{kind}_space": spec for kind, spec in info.spaces.items()}
    found |= {"reward_scale": scales.reward, "one_step": info.horizon == 1}
    for name, values in (("mean", scales.observation_mean), ("std", scales.observation_std)):
        found[f"observation_{name}"] = None if values is None else values.tolist()
    return found


def sampling(config: ModelConfig) -> dict[str, Any]:
    """The options of ``WindowSampler`` for training with ``config``."""
    unproven = config.loss_weight_unproven
    return {
        "marker_dropout": config.marker_dropout,
        "weight_marked": config.loss_weight_marked,
        "weight_unproven": config.loss_weight_marked if unproven is None else unproven,
        "min_probability": config.loss_min_probability,
    }


def without_effect(config: ModelConfig, sequences: Sequences) -> list[str]:
    """Settings of ``config`` that these training histories leave without effect, one sentence each."""
    notes = []
    reads = getattr(MODEL[config.model], "reads_marks", False) or config.segments == "marks"
    if reads and not any(mask.any() for _, mask in sequences.parts("mask")):
        notes.append(
            f"no step of its histories is marked, so {config.model} learns what AD does;"
            " choose a marker, such as threshold"
        )
    probs = sequences.parts("action_probs") if "action_probs" in sequences.store else ()
    if config.loss_min_probability > 0 and all(np.isnan(part).all() for _, part in probs):
        notes.append(
            "the histories do not tell how probable their actions were, so"
            " loss_min_probability leaves none out"
        )
    longest = int(sequences.lengths.max())
    if longest < config.n_transit:
        notes.append(
            f"the longest history has {longest} steps after its transforms, fewer than"
            f" n_transit {config.n_transit}: the model never sees a full context during training"
        )
    return notes


def config_and_sampler(
    file: HistoryFile | str | Path, *, seed: int = 0, trust: str | Collection[str] = (), **settings: Any
) -> tuple[ModelConfig, WindowSampler]:
    """What ``train`` needs to train a model on the training tasks of ``file``: settings and windows.

    ``settings`` are those of ``ModelConfig`` (``model="AD"``, ``steps=300``, ...); spaces and scales come
    from the file. ``seed`` draws the windows. ``trust`` names code of yours that the file names, which some
    transforms need. ``ConfigError`` lists settings that do not exist or have wrong values; a ``UserWarning``
    tells of those that have no effect on these histories.
    """
    file = file if isinstance(file, HistoryFile) else HistoryFile(file)
    given = settings_of_file(file.info, file.training_scales())
    config = validated(ModelConfig, {**settings, **given}, "config_and_sampler")
    pairs = [(spec.name, spec.params) for spec in config.transforms]
    sequences = training_sequences(file, pairs, seed, trust)
    for note in without_effect(config, sequences):
        warnings.warn(note, stacklevel=2)
    sampler = WindowSampler(
        sequences, config.n_transit, config.batch_size,
        seed=seed, first_window=config.first_window, **sampling(config),
    )  # fmt: skip
    return config, sampler
