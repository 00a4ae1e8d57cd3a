"""The options that each command of ``cad`` has for itself; settings are options as well, but not here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

PARTS = ("heldout", "validation", "train")
LISTS = ("families", "learners", "markers", "models", "transforms", "layouts", "extras")
CHECKS = ("family", "marker", "learner")


def out_option(default: str, what: str) -> Callable[[argparse.ArgumentParser], None]:
    """Adds ``--out``: ``what`` it is, and its ``default`` in words."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=Path, metavar="DIR", help=f"{what} (default: {default})")

    return add


def run_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad run``."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder, continued if it is there (default: runs/PRESET)",
    )


def collect_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad collect``."""
    out_option("datasets", "folder of the history file")(parser)
    parser.add_argument("--resume", action="store_true", help="continue an unfinished collection")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def mark_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad mark``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a marked copy (default: mark FILE itself)"
    )


def inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad inspect``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the action probabilities with the marked segments"
    )
    parser.add_argument("--task", type=int, default=0, help="task to draw (default: 0)")
    parser.add_argument("--stream", type=int, default=0, help="stream to draw (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="STEP", help="first step drawn (default: 0)")
    parser.add_argument("--steps", type=int, default=200, help="steps drawn (default: 200)")


def history_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--history``, with its ``default`` in words."""
    parser.add_argument("--history", type=Path, metavar="FILE", help=f"history file (default: {default})")


def train_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad train``."""
    history_option(parser, "datasets/history_..., as cad collect names it")
    out_option("runs", "folder of the run directory")(parser)
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run")


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad evaluate``."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    history_option(parser, "the one that the run was trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation with other settings")


def compare_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad compare``."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="evaluated run directories")


def report_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad report``."""
    compare_options(parser)
    history_option(parser, "the one that the runs were trained on")
    out_option("report", "folder of the report")(parser)


def rollouts_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad rollouts``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="trained run directory")
    history_option(parser, "the one that the run was trained on")
    parser.add_argument("--tasks", metavar="K,K,...", help="tasks to play (default: the held-out ones)")
    for name, what in (("episodes", "in-context episodes"), ("rollouts", "rollouts of each task")):
        parser.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} (default: the run's)")
    out_option("RUN/rollouts", "folder of what is written")(parser)
    parser.add_argument("--seed", metavar="N", help="seed of the playing (default: the run's)")


def attention_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad attention``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="trained run directory")
    history_option(parser, "the one that the run was trained on")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default=PARTS[0],
        help=f"whose tasks' histories are looked at: {', '.join(PARTS)} (default: {PARTS[0]})",
        metavar="PART",
    )
    parser.add_argument(
        "--windows", type=count, default=64, metavar="N", help="contexts drawn from them (default: 64)"
    )
    parser.add_argument(
        "--window", type=int, metavar="K", help="the one drawn as a map (default: marked most nearly by half)"
    )
    out_option("RUN/attention", "folder of what is written")(parser)


def study_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad study``."""
    parser.add_argument("file", type=Path, metavar="STUDY.yaml", help="what is compared, on what, how often")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        metavar="DIR",
        help="output folder; studies in one folder share histories and runs (default: runs/study)",
    )
    parser.add_argument("--runs", type=count, metavar="N", help="so many runs of each variant instead")
    parser.add_argument("--families", metavar="A,B", help="only these families")
    parser.add_argument("--variants", metavar="A,B", help="only these variants, and the baseline")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny histories and models: shows that it works, not what is true",
    )
    parser.add_argument("--process", type=count, metavar="N", help="cells at once (default: all cores)")
    parser.add_argument("--ray", metavar="ADDRESS", help="train on a Ray cluster: its address, or auto")
    parser.add_argument(
        "--tables", type=Path, metavar="CSV", help="only print the tables of results that were kept"
    )
    parser.add_argument("--markdown", action="store_true", help="print those tables as Markdown")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    """``3,5,9`` as an option's value."""
    parts = text.split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected task numbers like 3,5,9, got {text!r}")
    return [int(part) for part in parts]


def task_order(text: str) -> list[int] | str:
    """``3,5,9`` or ``match``."""
    return text if text == "match" else numbers(text)


def import_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad import``."""
    from compressed_ad.histories.exchange.formats import LAYOUT

    parser.add_argument("file", type=Path, metavar="FILE", help="histories of another program")
    layouts = ", ".join(LAYOUT)
    parser.add_argument(
        "--layout",
        default="ancestor",
        metavar="NAME",
        help=f"how they are written: {layouts}, or module:attribute (default: ancestor)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("datasets"),
        metavar="DIR|FILE",
        help="history file, or folder of it (default: datasets)",
    )
    for name, what in (("heldout", "held-out tasks, which judge"), ("validation", "tasks that choose")):
        parser.add_argument(f"--{name}", type=numbers, metavar="K,K,...", help=what)
    parser.add_argument("--split-seed", type=int, metavar="N", help="draw the split with this seed instead")
    parser.add_argument(
        "--task-ids",
        type=task_order,
        metavar="K,K,...|match",
        help="the family's tasks that these are, in order; match: find them by their rewards "
        "(default: those of the same numbers)",
    )
    parser.add_argument(
        "--horizon", type=count, metavar="N", help="steps of every episode, where FILE has no dones"
    )
    parser.add_argument(
        "--n-learner",
        type=count,
        default=1,
        metavar="N",
        help="learners that share the streams (default: 1)",
    )
    parser.add_argument(
        "--steps-per-update", type=count, metavar="N", help="steps that a policy lasts (default: unknown)"
    )
    parser.add_argument(
        "--source", default="imported", metavar="NAME", help="name of the algorithm (default: imported)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def export_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad export``."""
    from compressed_ad.histories.exchange.formats import EXPORT

    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    formats = ", ".join(EXPORT)
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"{formats}, or module:attribute")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR|FILE", help="what is written; minari: a folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def check_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad check``."""
    kinds = ", ".join(CHECKS)
    parser.add_argument("kind", choices=CHECKS, metavar="KIND", help=kinds)
    parser.add_argument("what", metavar="NAME", help="a name (cad list), or module:attribute")
    parser.add_argument("--kwargs", default="{}", metavar="YAML", help="its parameters, e.g. '{size: 5}'")
    parser.add_argument(
        "--family", metavar="NAME", help="family that a learner is tried on (default: a small room)"
    )
    parser.add_argument("--family-kwargs", default="{}", metavar="YAML", help="parameters of that family")
    parser.add_argument(
        "--steps", type=count, default=200, metavar="N", help="steps of a learner's streams (default: 200)"
    )


def list_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``cad list``."""
    parser.add_argument("what", nargs="?", choices=LISTS, metavar="WHAT", help=", ".join(LISTS))
