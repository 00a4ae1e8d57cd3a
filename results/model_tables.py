"""Tables of what marks and borders do in models, from files of this folder that are no study's rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from evidence import FAMILIES, lines_of

from compressed_ad.evaluation.intervals import number
from compressed_ad.report.tables import markdown


def short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:z.2f}".replace("-", "−")


def mean_of(lines: Sequence[Mapping[str, str]], key: str) -> float:
    return statistics.mean(float(line[key]) for line in lines)


def marked() -> str:
    """Share of marked steps by threshold and window."""
    lines = lines_of("marked")
    windows = sorted({int(line["window"]) for line in lines})
    table = [["P at least", *(f"{window} steps" for window in windows)]]
    for threshold in sorted({line["threshold"] for line in lines}):
        own = [line for line in lines if line["threshold"] == threshold]
        shares = [mean_of([x for x in own if int(x["window"]) == w], "marked") for w in windows]
        table.append([threshold, *(f"{share:.0%}" for share in shares)])
    return markdown(table)


def inside() -> str:
    """What the marks do in trained models."""
    lines = lines_of("inside")
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
        sizes = [f"{mean_of(own, key):.3f}" for key in ("start_size", "end_size")]
        keys = ("kl_no_marks", "loss_no_marks", "kl_transplant", "loss_transplant")
        nats = [f"{mean_of(own, key):z.5f}".replace("-", "−") for key in keys]
        table.append([variant, str(len(own)), *sizes, *nats, f"{mean_of(own, 'attention_ratio'):.2f}"])
    return markdown(table)


def exploration() -> str:
    """When the reward is met, and what was seen while searching, by episode."""
    lines = lines_of("exploration")
    head = ["By episode", "AD", "prolong", "random walk", "seen: AD", "prolong", "random walk"]
    table = [head]
    for episode in sorted({int(line["episode"]) for line in lines}):
        own = [line for line in lines if int(line["episode"]) == episode]
        cells = []
        for key, walk in (("met", "met_random_walk"), ("seen_searching", "seen_random_walk")):
            cells += [f"{mean_of([x for x in own if x['variant'] == v], key):.3f}" for v in ("AD", "prolong")]
            cells.append(f"{mean_of(own, walk):.3f}")
        table.append([str(episode), *cells])
    return markdown(table)


def forgetting() -> str:
    """What models do on Darkroom-Hard without their borders' sight, over 500 episodes, and after a prompt."""
    lines, table = lines_of("forgetting"), [["Model", "", "Runs", "Area or success", "Final or knew"]]
    for variant, what in dict.fromkeys((line["variant"], line["what"]) for line in lines):
        own = [line for line in lines if (line["variant"], line["what"]) == (variant, what)]
        cells = [number(mean_of(own, key)) for key in ("area", "final")]
        table.append([variant, what, str(len(own)), *cells])
    return markdown(table)


def prompted() -> str:
    """Success on Darkroom-Hard after the first steps of the model and of its source, tabular Q-learning."""
    lines = lines_of("prompted")
    whose = list(dict.fromkeys(line["what"] for line in lines))
    heads = [f"{what} {said}" for what in ("success", "knew the goal") for said in whose]
    table = [["Model", "Runs", *heads]]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = {what: [x for x in lines if (x["variant"], x["what"]) == (variant, what)] for what in whose}
        cells = [number(mean_of(own[what], key)) for key in ("success", "knew") for what in whose]
        table.append([variant, str(len(own[whose[0]])), *cells])
    return markdown(table)


def switches() -> str:
    """Return by cycle of goals that move and come back: mean over runs (least to most)."""
    lines = lines_of("switches")
    most = max(int(line["cycle"]) for line in lines)
    spans = [(1, 1), *((2**k + 1, 2 ** (k + 1)) for k in range(most.bit_length() - 1))]
    table = [["Model", "Runs", *(f"cycle {a}" if a == b else f"{a} to {b}" for a, b in spans)]]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        seeds = list(dict.fromkeys(line["seed"] for line in own))
        cells = []
        for a, b in spans:
            each = [[x for x in own if x["seed"] == seed and a <= int(x["cycle"]) <= b] for seed in seeds]
            values = [mean_of(some, "return") for some in each]
            cells.append(f"{short(statistics.mean(values))} ({short(min(values))} to {short(max(values))})")
        table.append([variant, str(len(seeds)), *cells])
    return markdown(table)


def probes() -> str:
    """What a linear probe reads from borders: explained variance, mean over runs (least to most)."""
    lines, table = lines_of("probes"), [["Family", "Borders", "Runs"]]
    places = list(dict.fromkeys(line["place"] for line in lines))
    table[0] += [f"{place} steps before" if place.isdigit() else place for place in places]
    for family, variant in dict.fromkeys((line["family"], line["variant"]) for line in lines):
        own = [line for line in lines if (line["family"], line["variant"]) == (family, variant)]
        cells = []
        for place in places:
            values = [float(line["explained"]) for line in own if line["place"] == place]
            spans = (statistics.mean(values), min(values), max(values)) if values else ()
            cells.append("{} ({} to {})".format(*map(short, spans)) if spans else "–")
        table.append([FAMILIES[family], variant, str(len({line["seed"] for line in own})), *cells])
    return markdown(table)
