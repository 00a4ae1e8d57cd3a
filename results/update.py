"""Keep the results of finished studies: rows to results/, figures and tables to docs/ and the README.

python results/update.py [runs/study]    after the studies that are to be kept
"""

from __future__ import annotations

import csv
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressed_ad.evaluation.intervals import number
from compressed_ad.report.comparison import convergence, differences, means
from compressed_ad.report.pages import markdown
from compressed_ad.report.rows import Row, read_rows
from compressed_ad.report.study_report import text
from compressed_ad.runs.study import load_study

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
PAIR = ("AD", "CompressedAD")
FIGURES = {
    "guide": ("differences", "convergence"),
    "controls": ("differences",),
    "sweep": ("marked",),
    "frontier": ("differences",),
    "thinning": ("differences",),
    "context": ("costs",),
    "shorter": ("differences",),
    "condition": ("differences",),
}


def keep(out: Path) -> None:
    """Copy the rows and figures of the studies that are in ``out``."""
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        name, kept = path.stem, out / path.stem
        if (kept / "table.csv").exists():
            shutil.copy(kept / "table.csv", ROOT / "results" / f"{name}.csv")
            shutil.copy(kept / "curves.csv", ROOT / "results" / f"{name}_curves.csv")
            for figure in FIGURES.get(name, ()):
                shutil.copy(kept / "figures" / f"{figure}.png", ROOT / "docs" / f"study_{name}_{figure}.png")


def rows_of(name: str) -> list[Row]:
    """The kept rows of a study, or its validations (``<study>_curves``)."""
    return read_rows(ROOT / "results" / f"{name}.csv")


def study_blocks() -> dict[str, str]:
    """The tables of every study whose rows were kept as Markdown, by its name."""
    return {
        path.stem: text(
            load_study(path), rows_of(path.stem), rows_of(f"{path.stem}_curves"), as_markdown=True
        )
        for path in sorted((ROOT / "studies").glob("*.yaml"))
        if (ROOT / "results" / f"{path.stem}.csv").exists()
    }


def pages_blocks() -> dict[str, str]:
    """Everything that docs/results.md is filled with."""
    return {**study_blocks(), "marked": marked(), "inside": inside(), "exploration": exploration()}


def _lines(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _mean(lines: Sequence[Mapping[str, str]], key: str) -> float:
    return statistics.mean(float(line[key]) for line in lines)


def marked() -> str:
    """Share of marked steps by threshold and window."""
    lines = _lines("marked")
    windows = sorted({int(line["window"]) for line in lines})
    table = [["P at least", *(f"{window} steps" for window in windows)]]
    for threshold in sorted({line["threshold"] for line in lines}):
        own = [line for line in lines if line["threshold"] == threshold]
        shares = [_mean([x for x in own if int(x["window"]) == w], "marked") for w in windows]
        table.append([threshold, *(f"{share:.0%}" for share in shares)])
    return markdown(table)


def inside() -> str:
    """What the marks do in trained models."""
    lines = _lines("inside")
    table = [
        [
            "Model",
            "Runs",
            "size of start",
            "of end",
            "KL without",
            "loss",
            "KL transplanted",
            "loss",
            "attention",
        ]
    ]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        sizes = [f"{_mean(own, key):.3f}" for key in ("start_size", "end_size")]
        keys = ("kl_no_marks", "loss_no_marks", "kl_transplant", "loss_transplant")
        nats = [f"{_mean(own, key):z.5f}".replace("-", "−") for key in keys]
        table.append([variant, str(len(own)), *sizes, *nats, f"{_mean(own, 'attention_ratio'):.2f}"])
    return markdown(table)


def exploration() -> str:
    """When the reward is met, and what was seen while searching, by episode."""
    lines = _lines("exploration")
    head = ["By episode", "AD", "prolong", "random walk", "seen: AD", "prolong", "random walk"]
    table = [head]
    for episode in sorted({int(line["episode"]) for line in lines}):
        own = [line for line in lines if int(line["episode"]) == episode]
        cells = []
        for key, walk in (("met", "met_random_walk"), ("seen_searching", "seen_random_walk")):
            cells += [f"{_mean([x for x in own if x['variant'] == v], key):.3f}" for v in ("AD", "prolong")]
            cells.append(f"{_mean(own, walk):.3f}")
        table.append([str(episode), *cells])
    return markdown(table)


def promises() -> str:
    """The guide's comparison table beside what was measured on Darkroom, as Markdown."""
    rows = [row for row in rows_of("guide") if row.family == "darkroom"]
    fewer = rows_of("sample_efficiency")
    points = [point for point in rows_of("guide_curves") if point.family == "darkroom"]
    table = [["", "the guide promises", "AD", "CompressedAD", "difference, 95 % interval", "runs"]]
    table.append(["Accuracy on held-out histories", "75 % → 78 %", *_line(rows, PAIR, "accuracy")])
    for c in ("validation_accuracy", "validation_return"):
        reached = {r.method: r for r in convergence(points, "AD", [c])}
        what = c.removeprefix("validation_")
        own, other = reached["AD"], reached["CompressedAD"]
        table.append(
            [
                f"Gradient steps to AD's last validation {what}, median",
                "20 % fewer",
                own.when,
                f"{other.when}, reached in {other.reached} of {other.runs} runs",
                "",
                str(own.runs),
            ]
        )
    for label, suffix in (("a quarter of the tasks", "quarter_tasks"),):
        pair = tuple(f"{name}_{suffix}" for name in PAIR)
        table.append([f"Final return with {label}", "1.3x fewer samples", *_line(fewer, pair, "final")])
    table.append(["Held-out minus training return", "better", *_line(rows, PAIR, "generalisation")])
    table.append(["Final return on held-out tasks", "–", *_line(rows, PAIR, "final")])
    return markdown(table)


def _line(rows: Sequence[Row], pair: Sequence[str], measure: str) -> list[str]:
    one, other = (means(rows, measure)["darkroom", name].value for name in pair)
    (found,) = differences(rows, [(pair[0], pair[1])], measure)
    e = found.estimate
    return [number(one), number(other), f"{number(e.value, '+')} ({e.span('+')})", str(e.n)]


def fill(page: str, blocks: dict[str, str]) -> str:
    """``page`` with each block between its two marks."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, rf"\g<1>{block}\n\g<2>", page, flags=re.DOTALL)
        assert count == 1, f"{count} places for {name}"
    return page


if __name__ == "__main__":
    keep(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "study")
    PAGE.write_text(fill(PAGE.read_text("utf-8"), pages_blocks()), "utf-8")
    README.write_text(fill(README.read_text("utf-8"), {"promises": promises()}), "utf-8")
