"""Keep the results of finished studies: rows to results/, figures and tables to docs/ and the README.

python results/update.py [runs/study]    after the studies that are to be kept
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from evidence import FAMILIES, lines_of
from model_tables import exploration, forgetting, inside, marked, probes, prompted, short, switches

from compressed_ad.evaluation.intervals import number
from compressed_ad.report.comparison import POOLED, Difference, convergence, differences, means
from compressed_ad.report.figures.comparison import forest
from compressed_ad.report.figures.style import figure_to_png
from compressed_ad.report.rows import Row, read_rows
from compressed_ad.report.study_report import text
from compressed_ad.report.tables import markdown
from compressed_ad.runs.study import Study, load_study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FIGURE = re.compile(r"\((?:results/)?(\w+)-(\w+)\.png\)")
"""How a page shows ``figures/FIGURE.png`` of a study: as ``STUDY-FIGURE.png`` of docs/results/."""
PAIR = ("AD", "CompressedAD")
ANSWER = {
    "the guide's marks": ("guide", "CompressedAD"),
    "as many marks at random": ("controls", "random"),
    "longer searches (prolong)": ("frontier", "prolong"),
    "half the context": ("shorter", "AD_100"),
}
"""What docs/results.md compares with plain AD, in words: a study and its variant."""
AT_STRENGTH = {
    "the guide's marks, from `rmax`": ("strength", "CompressedAD"),
    "the guide's marks, from `tabular`": ("headroom", "CompressedAD"),
    "as many marks at random, from `tabular`": ("headroom", "random"),
    "another stream's marks": ("headroom", "shuffled"),
    "marks at segments of equal reward": ("headroom", "reward_matched"),
    "everything marked": ("headroom", "all"),
    "the guide's marks, also while playing": ("headroom", "own_marks"),
    "marks that begin with the evidence (causal)": ("headroom", "causal"),
    "the same, also while playing": ("headroom", "causal_own_marks"),
    "marks missing in half of the windows (dropout)": ("headroom", "dropout"),
    "marks missing in half of the windows, own marks while playing": ("headroom", "dropout_own_marks"),
}
"""The same for models whose histories come from other learners than PPO."""
COMPRESSED = {
    "tabular": {
        "compression_tabular": {
            "hard": ("AD", "gist"),
            "large": ("AD", "ends"),
            "permuted": ("AD", "gist"),
            "key_to_door": ("AD_shorter", "gist_recent"),
        }
    },
    "rmax": {
        "compression_full": {
            "key_to_door": ("AD", "gist"),
            "hard": ("AD", "gist"),
            "recall": ("AD", "gist"),
        }
    },
    "revisit": {"compression_full": {"switching": ("AD", "gist")}},
    "ppo": {"compression_ppo": {"darkroom": ("AD", "gist")}},
}
"""What docs/compression.md compares: by learner, study and family, plain AD with the context that is best for
it, and the best of what leaves the context."""
STAYS = {
    "gist": "borders that saw their episode",
    "ends": "borders that did not",
    "gist_recent": "borders and the last 50 steps",
}
PUBLISHED = {"tasks_250_1": 0.67, "tasks_250_5": 1.50, "tasks_500_5": 1.89, "tasks_1000_5": 1.98}
"""Return of AD in the hundredth episode (Tarasov et al. 2025), by family of the study ``ladder``."""
WALK = 0.246
"""Return of the random policy there."""
EPISODES = (1, 5, 10, 20, 50, 100)
EPISODE_HEADS = ("episode 1", *map(str, EPISODES[1:]))  # as narrow as the numbers below them


def keep(out: Path) -> None:
    """Copy the rows of the studies that are in ``out``, and those of their figures that pages show."""
    shown = [found for page in PAGES for found in FIGURE.findall(page.read_text("utf-8"))]
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        name, kept = path.stem, out / path.stem
        if (kept / "table.csv").exists():
            shutil.copy(kept / "table.csv", ROOT / "results" / f"{name}.csv")
            shutil.copy(kept / "curves.csv", ROOT / "results" / f"{name}_curves.csv")
            for figure in [figure for study, figure in shown if study == name]:
                shutil.copy(kept / "figures" / f"{figure}.png", DOCS / "results" / f"{name}-{figure}.png")


def rows_of(name: str) -> list[Row]:
    """The kept rows of a study, or its validations (``<study>_curves``)."""
    return read_rows(ROOT / "results" / f"{name}.csv")


def kept_studies() -> dict[str, Study]:
    """The studies whose rows were kept, by name."""
    paths = sorted((ROOT / "studies").glob("*.yaml"))
    return {p.stem: load_study(p) for p in paths if (ROOT / "results" / f"{p.stem}.csv").exists()}


def study_blocks() -> dict[str, str]:
    """The tables of every study whose rows were kept as Markdown, by its name."""
    return {
        name: text(study, rows_of(name), rows_of(f"{name}_curves"), "markdown")
        for name, study in kept_studies().items()
    }


def blocks() -> dict[str, str]:
    """Everything that pages are filled with, by the name of its place."""
    own = (
        answer,
        at_strength,
        compressed,
        benchmark,
        benchmark_more,
        families,
        promises,
        processors,
        compute,
        marked,
        inside,
        exploration,
        forgetting,
        ladder,
        prompted,
        probes,
        switches,
    )
    return {**study_blocks(), **{block.__name__: block() for block in own}}


def answer() -> str:
    """What was compared with plain AD, one line for each family."""
    return _compared({words: (rows_of(study), variant) for words, (study, variant) in ANSWER.items()})


def at_strength() -> str:
    """The same on stronger models."""
    variants = {words: (rows_of(study), variant) for words, (study, variant) in AT_STRENGTH.items()}
    gaps = [d for given in variants.values() for pair in _gaps(*given) for d in pair]
    n = sum(d.decided for d in gaps)
    said = (
        f"{n or 'None'} of the {len(gaps)} intervals below exclude{'s' * (n <= 1)} 0, before any adjustment:"
    )
    return f"{said}\n\n{_compared(variants)}"


def compressed() -> str:
    """Plain AD at its best context, and what is left when episodes leave theirs."""
    head = ["Source", "Family", "What stays", "Runs", "Tokens, AD", "Tokens", "Area, AD", "Area"]
    table = [[*head, "Difference", "p, adjusted"]]
    for learner, studies in COMPRESSED.items():
        for name, pairs in studies.items():
            study, rows = load_study(ROOT / "studies" / f"{name}.yaml"), rows_of(name)
            gaps = {(d.family, d.one, d.other): d for d in differences(rows, study.comparisons, "auc")}
            context = {(cell.family, cell.variant): cell.trained.model.n_transit for cell in study.cells}
            areas, seen = means(rows, "auc"), means(rows, "visible")
            for family, (one, other) in pairs.items():
                d, tokens = gaps[family, one, other], (context[family, one] / 2, seen[family, other].value)
                cells = [f"`{learner}`", FAMILIES[family], STAYS[other], str(d.estimate.n)]
                cells += [
                    *(f"{n:.0f}" for n in tokens),
                    *(number(areas[family, v].value) for v in (one, other)),
                ]
                table.append([*cells, _span(d), number(d.p_holm)])
    return markdown(table)


def _compared(variants: Mapping[str, tuple[Sequence[Row], str]]) -> str:
    head = ["Compared with plain AD", "Family", "Runs", "AD ends at", "Final return"]
    table = [[*head, "Seen with 80 % power", "Area under the curve"]]
    for words, (rows, variant) in variants.items():
        for final, area in _gaps(rows, variant):
            family, e = FAMILIES.get(final.family, final.family), final.estimate
            ends = means(rows, "final")[final.family, "AD"].value
            cells = [_span(final), number(final.detectable), _span(area)]
            table.append([words, family, str(e.n), number(ends), *cells])
    return markdown(table)


def _gaps(rows: Sequence[Row], variant: str) -> Iterator[tuple[Difference, Difference]]:
    """The variant minus plain AD in each family: in final return, and in area under the curve."""
    final, area = (differences(rows, [("AD", variant)], measure) for measure in ("final", "auc"))
    return ((a, b) for a, b in zip(final, area, strict=True) if a.family != POOLED)


def _span(d: Difference) -> str:
    return f"{number(d.estimate.value, '+')} ({d.estimate.span('+')})"


def draw_answer(path: Path) -> None:
    """The differences of the table as a figure."""
    panels: dict[str, list[tuple[str, Difference]]] = {"final return": [], "area under the curve": []}
    for words, (study, variant) in ANSWER.items():
        for pair in _gaps(rows_of(study), variant):
            for panel, d in zip(panels.values(), pair, strict=True):
                panel.append((f"{words}, {FAMILIES[d.family]}", d))
    path.write_bytes(figure_to_png(forest(panels, "difference from plain AD")))


def _benchmark(study: str = "benchmark") -> tuple[list[Row], dict[str, float]]:
    """Its kept rows, and the CPU minutes of a run by family, in the order of the pages."""
    lines = lines_of(f"{study}_cost")
    minutes = {x["family"]: float(x["cpu_seconds"]) / float(x["runs"]) / 60 for x in lines}
    return rows_of(study), {family: minutes[family] for family in FAMILIES if family in minutes}


def benchmark() -> str:
    """The table of docs/benchmark.md: AD on each family, over runs, beside the limit."""
    rows, minutes = _benchmark()
    head = ["family", "runs", *EPISODE_HEADS, "final", "area", "limit", "share"]
    table = [[*head, "area over 50", "CPU minutes"]]
    for family in minutes:
        found = {m: means(rows, m)[family, "AD"] for m in ("final", "auc", "auc_50", "share_of_limit")}
        curve = [_mean_of(rows, family, f"episode_{k}") for k in EPISODES]
        area, share = found["auc"], found["share_of_limit"]
        # No policy exceeds the optimum, whatever Student's t says.
        spans = (replace(i, high=min(i.high, 1.0)) for i in (found["final"], area))
        cells = [f"{number(i.value)} ({i.span()})" for i in spans]
        cells += [number(area.value / share.value), number(share.value), number(found["auc_50"].value)]
        table.append([FAMILIES[family], str(area.n), *map(short, curve), *cells, f"{minutes[family]:.1f}"])
    return markdown(table)


def benchmark_more() -> str:
    """The second table of docs/benchmark.md: AD on bandits, beside Thompson sampling, and a point mass."""
    rows, minutes = _benchmark("benchmark_more")
    head = ["family", "runs", *EPISODE_HEADS, "final", "area", "regret", "Thompson's"]
    table = [[*head, "ratio", "CPU minutes"]]
    for family in minutes:
        final, area, regret, ratio = (
            means(rows, m)[family, "AD"] for m in ("final", "auc", "regret", "regret_ratio")
        )
        curve = [_mean_of(rows, family, f"episode_{k}") for k in EPISODES]
        cells = [f"{number(i.value)} ({i.span()})" for i in (final, area)]
        if math.isnan(regret.value):
            cells += ["–"] * 3
        else:
            known = statistics.mean(r["regret"] / r["regret_ratio"] for r in rows if r.family == family)
            cells += [f"{regret.value:.1f} ({regret.low:.1f} to {regret.high:.1f})", f"{known:.1f}"]
            cells.append(f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
        table.append([FAMILIES[family], str(final.n), *map(short, curve), *cells, f"{minutes[family]:.1f}"])
    return markdown(table)


def families() -> str:
    """The benchmark in short, with a column for each family."""
    rows, minutes = _benchmark()
    table = [["normalised return", *(FAMILIES[family] for family in minutes)]]
    for words, measure in (
        ("first episode", "episode_1"),
        ("last tenth of the episodes", "final"),
        ("mean of all episodes", "auc"),
        ("share of the limit", "share_of_limit"),
    ):
        table.append([words, *(number(_mean_of(rows, family, measure)) for family in minutes)])
    table.append(["CPU minutes, all stages", *(f"{m:.1f}" for m in minutes.values())])
    return markdown(table)


def _mean_of(rows: Sequence[Row], family: str, measure: str) -> float:
    return statistics.mean(row[measure] for row in rows if row.family == family)


def ladder() -> str:
    """AD's return on Key-to-Door by training tasks and histories of each, beside the published one."""
    table = [["Training tasks", "Histories of each", "Ours, sampled", "Ours, argmax", "Published"]]
    of = {(row.family, row.variant): row["episode_100"] for row in rows_of("ladder")}
    for family, published in PUBLISHED.items():
        tasks, histories = family.split("_")[1:]
        ours = [f"{(WALK + of[family, variant] * (2 - WALK)):.2f}" for variant in ("AD", "argmax")]
        table.append([tasks, histories, *ours, f"{published:.2f}"])
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
    return [number(one), number(other), _span(found), str(found.estimate.n)]


def processors() -> str:
    """The same seeds and settings on two processors: that of the study ``guide`` and that of ``why``."""
    table = [["Model", "Runs", "one processor", "another", "apart, mean", "largest"]]
    for variant in PAIR:
        ends = [
            {r.run: r["final"] for r in rows_of(study) if (r.family, r.variant) == ("darkroom", variant)}
            for study in ("guide", "why")
        ]
        pairs = [(ends[0][run], end) for run, end in ends[1].items()]
        apart = [abs(one - other) for one, other in pairs]
        shown = [*map(statistics.mean, zip(*pairs, strict=True)), statistics.mean(apart), max(apart)]
        table.append([variant, str(len(pairs)), *map(number, shown)])
    return markdown(table)


def compute() -> str:
    """What training the models of all studies took, by the learner of their histories.

    A model that was trained more than once, or for several studies, counts with its shortest time.
    """
    seconds: dict[str, dict[str, float]] = {}
    for name, study in kept_studies().items():
        rows = {(row.family, row.variant, row.run): row for row in rows_of(name)}
        for cell in study.cells:
            taken = rows[cell.family, cell.variant, cell.run]["seconds"]  # as many rows as cells: a test
            if not math.isnan(taken):
                models = seconds.setdefault(cell.data.algorithm.learner, {})
                models[cell.training_key] = min(taken, models.get(cell.training_key, taken))
    table = [["Histories of", "Models", "Hours", "Seconds of one model, 5th to 95th percentile"]]
    for learner, models in sorted(seconds.items(), key=lambda item: -len(item[1])):
        low, high = np.quantile([*models.values()], (0.05, 0.95))
        hours = f"{sum(models.values()) / 3600:.1f}"
        table.append([f"`{learner}`", str(len(models)), hours, f"{low:.0f} to {high:.0f}"])
    return markdown(table)


def filled() -> dict[Path, str]:
    """Every page with its blocks, each between its two marks, as the kept rows say today."""
    pages = {path: path.read_text("utf-8") for path in PAGES}
    for name, block in blocks().items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        having = [path for path, page in pages.items() for _ in place.findall(page)]
        assert len(having) == 1, f"{len(having)} places for {name}: {having}"
        pages[having[0]] = place.sub(rf"\g<1>{block}\n\g<2>" if block else r"\g<1>\g<2>", pages[having[0]])
    return pages


if __name__ == "__main__":
    keep(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "study")
    draw_answer(DOCS / "results" / "answer.png")
    for path, page in filled().items():
        path.write_text(page, "utf-8")
