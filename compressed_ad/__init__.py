"""Compressed Algorithm Distillation: in-context reinforcement learning from marked learning histories.

Everything public is here, and imported when first used: ``import compressed_ad`` imports no torch.
``collect`` and ``train`` have the names of their modules, so take them from there:
``from compressed_ad.collect import collect``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressed_ad.agents import InContextAgent, OptimalAgent, RandomAgent
    from compressed_ad.collect import split_tasks
    from compressed_ad.evaluate import evaluate_in_context, evaluate_tasks
    from compressed_ad.histories import HistoryFile, HistoryWriter
    from compressed_ad.learners.base import LEARNER
    from compressed_ad.learners.conformance import check_learner
    from compressed_ad.learners.ppo import BatchedPPO
    from compressed_ad.learners.sb3_callback import CompressedHistoryCallback
    from compressed_ad.markers import MARKER, borders
    from compressed_ad.marking import apply_marker, check_marker
    from compressed_ad.models import AD, MODEL, CompressedAD
    from compressed_ad.sequences import from_histories
    from compressed_ad.settings import ModelConfig
    from compressed_ad.tasks.base import TASK_FAMILY
    from compressed_ad.tasks.conformance import check_family
    from compressed_ad.transforms import TRANSFORM, apply_transforms
    from compressed_ad.types import History, Split, Step
    from compressed_ad.windows import CompressedADDataset, WindowSampler

_HOME = {
    "AD": "models",
    "BatchedPPO": "learners.ppo",
    "CompressedAD": "models",
    "CompressedADDataset": "windows",
    "CompressedHistoryCallback": "learners.sb3_callback",
    "History": "types",
    "HistoryFile": "histories",
    "HistoryWriter": "histories",
    "InContextAgent": "agents",
    "LEARNER": "learners.base",
    "MARKER": "markers",
    "MODEL": "models",
    "ModelConfig": "settings",
    "OptimalAgent": "agents",
    "RandomAgent": "agents",
    "Split": "types",
    "Step": "types",
    "TASK_FAMILY": "tasks.base",
    "TRANSFORM": "transforms",
    "WindowSampler": "windows",
    "apply_marker": "marking",
    "apply_transforms": "transforms",
    "borders": "markers",
    "check_family": "tasks.conformance",
    "check_learner": "learners.conformance",
    "check_marker": "marking",
    "evaluate_in_context": "evaluate",
    "evaluate_tasks": "evaluate",
    "from_histories": "sequences",
    "split_tasks": "collect",
}

__all__ = [
    "AD",
    "LEARNER",
    "MARKER",
    "MODEL",
    "TASK_FAMILY",
    "TRANSFORM",
    "BatchedPPO",
    "CompressedAD",
    "CompressedADDataset",
    "CompressedHistoryCallback",
    "History",
    "HistoryFile",
    "HistoryWriter",
    "InContextAgent",
    "ModelConfig",
    "OptimalAgent",
    "RandomAgent",
    "Split",
    "Step",
    "WindowSampler",
    "apply_marker",
    "apply_transforms",
    "borders",
    "check_family",
    "check_learner",
    "check_marker",
    "evaluate_in_context",
    "evaluate_tasks",
    "from_histories",
    "split_tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
