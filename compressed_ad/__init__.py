"""Compressed Algorithm Distillation: in-context reinforcement learning from marked learning histories.

Everything public is here, and imported when first used: ``import compressed_ad`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressed_ad.evaluation.agents import (
        InContextAgent as InContextAgent,
        OptimalAgent as OptimalAgent,
        RandomAgent as RandomAgent,
    )
    from compressed_ad.evaluation.evaluate import (
        evaluate_in_context as evaluate_in_context,
        evaluate_tasks as evaluate_tasks,
    )
    from compressed_ad.histories.collector import collect as collect
    from compressed_ad.histories.file import HistoryFile as HistoryFile, HistoryWriter as HistoryWriter
    from compressed_ad.learners.base import LEARNER as LEARNER
    from compressed_ad.learners.conformance import check_learner as check_learner
    from compressed_ad.learners.ppo import BatchedPPO as BatchedPPO
    from compressed_ad.learners.sb3.callback import CompressedHistoryCallback as CompressedHistoryCallback
    from compressed_ad.marking.apply import apply_marker as apply_marker
    from compressed_ad.marking.conformance import check_marker as check_marker
    from compressed_ad.marking.markers import MARKER as MARKER, borders as borders
    from compressed_ad.models import MODEL as MODEL
    from compressed_ad.models.ad import AD as AD
    from compressed_ad.models.compressed_ad import CompressedAD as CompressedAD
    from compressed_ad.models.settings import ModelConfig as ModelConfig
    from compressed_ad.tasks.base import TASK_FAMILY as TASK_FAMILY
    from compressed_ad.tasks.conformance import check_family as check_family
    from compressed_ad.tasks.split import split_tasks as split_tasks
    from compressed_ad.training.loop import train as train
    from compressed_ad.training.sequences import from_histories as from_histories
    from compressed_ad.training.transforms import TRANSFORM as TRANSFORM, apply_transforms as apply_transforms
    from compressed_ad.training.windows import (
        CompressedADDataset as CompressedADDataset,
        WindowSampler as WindowSampler,
    )
    from compressed_ad.types import History as History, Split as Split, Step as Step

_NAMES = {
    "evaluation.agents": "InContextAgent OptimalAgent RandomAgent",
    "evaluation.evaluate": "evaluate_in_context evaluate_tasks",
    "histories.collector": "collect",
    "histories.file": "HistoryFile HistoryWriter",
    "learners.base": "LEARNER",
    "learners.conformance": "check_learner",
    "learners.ppo": "BatchedPPO",
    "learners.sb3.callback": "CompressedHistoryCallback",
    "marking.apply": "apply_marker",
    "marking.conformance": "check_marker",
    "marking.markers": "MARKER borders",
    "models": "MODEL",
    "models.ad": "AD",
    "models.compressed_ad": "CompressedAD",
    "tasks.base": "TASK_FAMILY",
    "tasks.conformance": "check_family",
    "tasks.split": "split_tasks",
    "training.loop": "train",
    "training.sequences": "from_histories",
    "models.settings": "ModelConfig",
    "training.transforms": "TRANSFORM apply_transforms",
    "training.windows": "CompressedADDataset WindowSampler",
    "types": "History Split Step",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
