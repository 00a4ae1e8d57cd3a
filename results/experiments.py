"""Keep the results of whole runs of other sources and environments: rows to results/, a table to docs/.

python results/experiments.py [runs]    after cad run --config NAME
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.measures import normalise
from compressed_ad.report.results import load_runs
from compressed_ad.report.source import summarise_source
from compressed_ad.report.tables import markdown

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "experiments.md", ROOT / "results" / "experiments.csv"
EXPERIMENTS = {
    "darkroom_a2c": "Darkroom, A2C",
    "darkroom_dqn": "Darkroom, DQN",
    "cartpole_physics": "CartPole, PPO",
    "point_mass": "Point mass, SAC",
}
METHODS = ("AD", "CompressedAD")


def rows(name: str, out: Path) -> list[dict[str, str]]:
    """One row for every model of the run in ``out``; returns are means over held-out tasks, 1 is optimal."""
    file = HistoryFile(next(out.glob("history_*.hdf5")))
    source = summarise_source(file)
    heldout = np.flatnonzero(np.array(source.kinds) == "heldout")
    learned = normalise(source.returns, source.random, source.optimal)[heldout].mean(axis=0)
    seconds = json.loads((out / "seconds.json").read_text("utf-8"))
    found = []
    for method in METHODS:
        runs = load_runs(sorted(out.glob(f"{method}-*")), name=method)
        for seed, returns, accuracy in zip(runs.seeds, runs.returns, runs.accuracy, strict=True):
            curve = normalise(returns, runs.random, runs.optimal).mean(axis=(0, 1))
            tenth = max(1, len(curve) // 10)
            numbers = {
                "source_first": learned[: max(1, len(learned) // 10)].mean(),
                "source_final": learned[-max(1, len(learned) // 10) :].mean(),
                "marked": source.marking.compression_ratio if source.marking else np.nan,
                "first": curve[0],
                "final": curve[-tenth:].mean(),
                "accuracy": accuracy,
                "minutes": sum(seconds.values()) / 60,
            }
            row = {"experiment": name, "method": method, "seed": str(seed), "tasks": str(len(heldout))}
            found.append(row | {key: f"{value:.6g}" for key, value in numbers.items()})
    return found


def table() -> str:
    """The kept rows as Markdown."""
    with KEPT.open(newline="") as file:
        kept = list(csv.DictReader(file))
    head = ["Experiment", "Source, first → last tenth", "Marked", "Model", "Runs"]
    lines = [[*head, "First episode", "Last tenth", "Accuracy", "Minutes"]]
    for name, title in EXPERIMENTS.items():
        for method in METHODS:
            own = [row for row in kept if row["experiment"] == name and row["method"] == method]
            if not own:
                continue
            number = {key: mean(float(row[key]) for row in own) for key in list(own[0])[4:]}
            shown = [
                title,
                f"{number['source_first']:.2f} → {number['source_final']:.2f}",
                f"{number['marked']:.0%}",
            ]
            shown = shown if method == METHODS[0] else ["", "", ""]
            accuracy = "–" if np.isnan(number["accuracy"]) else f"{number['accuracy']:.3f}"
            minutes = f"{number['minutes']:.0f}" if method == METHODS[0] else ""
            scores = [f"{number[key]:z.3f}".replace("-", "−") for key in ("first", "final")]
            lines.append([*shown, method, str(len(own)), *scores, accuracy, minutes])
    return markdown(lines)


def filled(page: str) -> str:
    """``page`` with the table between its two marks."""
    before, mark, rest = page.partition("<!-- experiments -->\n")
    return f"{before}{mark}{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs"
    done = [
        row
        for name in EXPERIMENTS
        if (folder / name / "report").exists()
        for row in rows(name, folder / name)
    ]
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(done[0]))
        writer.writeheader()
        writer.writerows(done)
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
