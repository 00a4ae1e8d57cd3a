"""All torture, or some parts: ``python -m torture [--long] [PART ...]``; exit code 1 if anything is wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from compressed_ad.cli.main import COMMANDS, load_command
from compressed_ad.runs.directory import revision
from torture import damage, hostile, kills, leaks, limits, races, soak, table, users
from torture.stages import Base
from torture.trials import Verdict, run

ROOT = Path(__file__).parents[1]
PARTS = {
    "hostile": hostile.trials,
    "users": users.trials,
    "leaks": leaks.trials,
    "damage": damage.trials,
    "limits": limits.trials,
    "races": races.trials,
    "kills": kills.trials,
    "soak": soak.trials,
}
LAZY = "report.comparison report.run_report report.study_report runs.stages runs.study_run runs.look_inside"
LAZY += " training.loop evaluation.evaluate learners.ppo.training histories.exchange.importing"
LAZY += " tasks.conformance tasks.gridworld models.ad models.compressed_ad marking.conformance"


def warm() -> None:
    """Import all that commands import when they run, so that forked children do not."""
    torch.set_num_threads(1)
    for command in COMMANDS:
        load_command(command)
    for module in (*(f"compressed_ad.{room}" for room in LAZY.split()), "matplotlib.pyplot", "scipy.stats"):
        importlib.import_module(module)


class Ledger:
    """Verdicts by trial, kept in a file, so that a run that was stopped goes on."""

    def __init__(self, path: Path, about: dict[str, object]) -> None:
        self.path, self.known = path, dict[str, list[Verdict]]()
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == about:
            for line in lines[1:]:
                name, verdicts = json.loads(line)
                self.known[name] = [Verdict(*verdict) for verdict in verdicts]
        else:
            path.write_text(json.dumps(about) + "\n")

    def add(self, name: str, verdicts: list[Verdict]) -> None:
        self.known[name] = verdicts
        with self.path.open("a") as file:
            file.write(json.dumps([name, [[v.kind, v.detail] for v in verdicts]]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named"
    )
    parser.add_argument("--long", action="store_true", help="everything, not a sample (25 minutes)")
    parser.add_argument("--seed", type=int, default=0, help="draws moments, places and calls")
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time")
    parser.add_argument("--only", default="", help="only trials whose name has this text")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work here, keep it, and go on with what is there"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}; one of {', '.join(PARTS)}")
    began, folder = time.monotonic(), (options.keep or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[threads] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    warm()
    about = {"revision": revision(), "long": options.long, "seed": options.seed}
    base, ledger, rows = (
        Base(folder / "base"),
        Ledger(folder / "verdicts.jsonl", about),
        dict[str, table.Row](),
    )
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part in options.parts or PARTS:
            started, todo = time.monotonic(), list[object]()
            trials = [t for t in PARTS[part](base, options.long, options.seed) if options.only in t.name]
            for trial in trials:
                row = rows.setdefault(trial.row, table.Row(trial.row))
                known = ledger.known.get(trial.name, [Verdict("not tried")])
                if all(verdict.good for verdict in known):
                    row.add(trial.name, known)
                else:
                    todo.append(trial)
            for trial, verdicts in run(todo, folder / part, options.at_once):
                rows[trial.row].add(trial.name, verdicts)
                ledger.add(trial.name, verdicts)
                for verdict in (v for v in verdicts if not v.good):
                    print(
                        f"{part}: {trial.name}: {verdict.kind}: {verdict.detail[:200]}",
                        file=sys.stderr,
                        flush=True,
                    )
            print(
                f"{part}: {len(trials)} trials, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:
        stopped = True
        print("stopped; what is known so far:", file=sys.stderr)
    found = list(rows.values())
    print(table.plain(found))
    if options.markdown:
        words = [word for word in sys.argv[1:] if not word.startswith(("--markdown", "--keep"))]
        facts = f"revision {about['revision']}, {(time.monotonic() - began) / 60:.0f} minutes"
        options.markdown.write_text(
            table.markdown(found, f"python -m torture {' '.join(words)}".strip(), facts)
        )
    wrong = table.total(found).wrong
    if wrong or options.keep:
        print(f"folders of the trials that met a fault: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return 130 if stopped else int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
