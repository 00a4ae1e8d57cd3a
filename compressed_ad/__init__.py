"""Compressed Algorithm Distillation: in-context reinforcement learning from marked learning histories.

Everything public is imported from here: ``from compressed_ad import HistoryFile, train``. A name is loaded
when it is first used, so ``import compressed_ad`` itself imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# For type checkers and editors. ``_NAMES`` is what the program uses; a test compares the two.
if TYPE_CHECKING:
    from compressed_ad.cli.display import progress_line as progress_line
    from compressed_ad.cli.main import cad as cad
    from compressed_ad.evaluation.agents import (
        InContextAgent as InContextAgent,
        OptimalAgent as OptimalAgent,
        RandomAgent as RandomAgent,
    )
    from compressed_ad.evaluation.evaluate import (
        InContextResult as InContextResult,
        evaluate_in_context as evaluate_in_context,
        evaluate_references as evaluate_references,
        evaluate_tasks as evaluate_tasks,
    )
    from compressed_ad.evaluation.prompted import success_after as success_after
    from compressed_ad.histories.collector import collect as collect
    from compressed_ad.histories.exchange.formats import EXPORT as EXPORT, Recorded as Recorded
    from compressed_ad.histories.exchange.importing import import_histories as import_histories
    from compressed_ad.histories.file import HistoryFile as HistoryFile
    from compressed_ad.histories.header import HistoryInfo as HistoryInfo
    from compressed_ad.histories.saving import save_histories as save_histories
    from compressed_ad.histories.summary import episode_returns as episode_returns
    from compressed_ad.histories.writer import HistoryWriter as HistoryWriter
    from compressed_ad.learners.base import LEARNER as LEARNER
    from compressed_ad.learners.conformance import check_learner as check_learner
    from compressed_ad.learners.ppo import BatchedPPO as BatchedPPO
    from compressed_ad.learners.sb3.callback import CompressedHistoryCallback as CompressedHistoryCallback
    from compressed_ad.learners.scripted import record as record
    from compressed_ad.learners.select import make_learner as make_learner
    from compressed_ad.marking.apply import apply_marker as apply_marker
    from compressed_ad.marking.conformance import check_marker as check_marker
    from compressed_ad.marking.markers import MARKER as MARKER, borders as borders, threshold as threshold
    from compressed_ad.marking.statistics import marking_statistics as marking_statistics
    from compressed_ad.models import MODEL as MODEL, SEGMENTS as SEGMENTS
    from compressed_ad.models.ad import AD as AD
    from compressed_ad.models.compressed_ad import CompressedAD as CompressedAD
    from compressed_ad.models.encoders import SpaceEncoder as SpaceEncoder
    from compressed_ad.models.segments import SegmentEvents as SegmentEvents
    from compressed_ad.models.settings import ModelConfig as ModelConfig
    from compressed_ad.report.figures.histories import (
        learning_curves as learning_curves,
        marked_by_tenth as marked_by_tenth,
        probability_trace as probability_trace,
        training_curves as training_curves,
    )
    from compressed_ad.report.figures.returns import (
        goal_map as goal_map,
        in_context_curves as in_context_curves,
        per_task_scatter as per_task_scatter,
        performance_profile as performance_profile,
    )
    from compressed_ad.report.heldout import (
        evaluate_heldout as evaluate_heldout,
        plot_in_context as plot_in_context,
    )
    from compressed_ad.report.results import MethodRuns as MethodRuns, load_runs as load_runs
    from compressed_ad.seeding import SlotDraws as SlotDraws
    from compressed_ad.tasks.as_gymnasium import TaskEnv as TaskEnv
    from compressed_ad.tasks.bandit import GaussianBandit as GaussianBandit
    from compressed_ad.tasks.base import TASK_FAMILY as TASK_FAMILY
    from compressed_ad.tasks.conformance import (
        check_family as check_family,
        family_problems as family_problems,
    )
    from compressed_ad.tasks.gridworld import Darkroom as Darkroom
    from compressed_ad.tasks.limit_search import find_limit as find_limit
    from compressed_ad.tasks.recall import recall_value as recall_value
    from compressed_ad.tasks.select import make_family as make_family
    from compressed_ad.tasks.split import split_tasks as split_tasks
    from compressed_ad.tasks.switching import switching_value as switching_value
    from compressed_ad.training.from_file import config_and_sampler as config_and_sampler
    from compressed_ad.training.loop import train as train
    from compressed_ad.training.sequences import from_histories as from_histories
    from compressed_ad.training.transforms import TRANSFORM as TRANSFORM, apply_transforms as apply_transforms
    from compressed_ad.training.windows import (
        CompressedADDataset as CompressedADDataset,
        WindowSampler as WindowSampler,
    )
    from compressed_ad.types import History as History, Split as Split, Step as Step, to_spec as to_spec

_NAMES = {
    "cli.display": "progress_line",
    "cli.main": "cad",
    "evaluation.agents": "InContextAgent OptimalAgent RandomAgent",
    "evaluation.evaluate": "InContextResult evaluate_in_context evaluate_references evaluate_tasks",
    "evaluation.prompted": "success_after",
    "histories.collector": "collect",
    "histories.exchange.formats": "EXPORT Recorded",
    "histories.exchange.importing": "import_histories",
    "histories.file": "HistoryFile",
    "histories.header": "HistoryInfo",
    "histories.saving": "save_histories",
    "histories.summary": "episode_returns",
    "histories.writer": "HistoryWriter",
    "learners.base": "LEARNER",
    "learners.conformance": "check_learner",
    "learners.ppo": "BatchedPPO",
    "learners.sb3.callback": "CompressedHistoryCallback",
    "learners.scripted": "record",
    "learners.select": "make_learner",
    "marking.apply": "apply_marker",
    "marking.conformance": "check_marker",
    "marking.markers": "MARKER borders threshold",
    "marking.statistics": "marking_statistics",
    "models": "MODEL SEGMENTS",
    "models.ad": "AD",
    "models.compressed_ad": "CompressedAD",
    "models.encoders": "SpaceEncoder",
    "models.segments": "SegmentEvents",
    "models.settings": "ModelConfig",
    "report.figures.histories": "learning_curves marked_by_tenth probability_trace training_curves",
    "report.figures.returns": "goal_map in_context_curves per_task_scatter performance_profile",
    "report.heldout": "evaluate_heldout plot_in_context",
    "report.results": "MethodRuns load_runs",
    "seeding": "SlotDraws",
    "tasks.as_gymnasium": "TaskEnv",
    "tasks.bandit": "GaussianBandit",
    "tasks.base": "TASK_FAMILY",
    "tasks.conformance": "check_family family_problems",
    "tasks.gridworld": "Darkroom",
    "tasks.limit_search": "find_limit",
    "tasks.recall": "recall_value",
    "tasks.select": "make_family",
    "tasks.split": "split_tasks",
    "tasks.switching": "switching_value",
    "training.from_file": "config_and_sampler",
    "training.loop": "train",
    "training.sequences": "from_histories",
    "training.transforms": "TRANSFORM apply_transforms",
    "training.windows": "CompressedADDataset WindowSampler",
    "types": "History Split Step to_spec",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("compressed-ad")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
