"""How costs grow over two decades each, with fitted exponents and a plot; one thread, about two minutes.

    python -m benchmarks.growth        # also draws benchmarks/growth.png

CPU seconds of collecting against tasks and streams, of a gradient step against context length and width, of
in-context evaluation against environments and episodes; and memory that comes on top of what the process
already has: that of loaded histories against transitions, that of playing against environments.

The exponent of a cost is the slope of its logarithm: over the whole range, where a fixed share lowers it, and
over the last decade, where that has faded. 1 is in proportion.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.measuring import cpu_seconds, quick_from_command_line, write
from benchmarks.model import FAMILY, default_model, synthetic
from compressed_ad import (
    BatchedPPO,
    CompressedADDataset,
    Darkroom,
    WindowSampler,
    collect,
    evaluate_tasks,
    make_learner,
)
from compressed_ad.report.figures import style
from compressed_ad.training.loop import build_model, gradient

PLOT = Path(__file__).with_name("growth.png")
SMALL = {"tf_n_embd": 16, "tf_n_head": 2, "tf_n_layer": 1}


@dataclass
class Growth:
    """What one cost is at each size."""

    cost: str  # what is measured
    size: str  # against what
    unit: str
    points: dict[int, float] = field(default_factory=dict)

    def exponent(self, decades: float = 9.0) -> float:
        """Slope of the logarithm over the last ``decades`` of sizes."""
        size, cost = np.array(list(self.points.items()), np.float64).T
        last = size >= size[-1] / 10**decades * 0.999
        return float(np.polyfit(np.log(size[last]), np.log(cost[last]), 1)[0])


def sizes(first: int, quick: bool) -> list[int]:
    """Five sizes over two decades."""
    return [first, 2 * first] if quick else [round(first * 10 ** (k / 2)) for k in range(5)]


def repeated(call: Callable[[], Any], least: float = 0.4) -> float:
    """CPU seconds of one call: the fewest of several that take ``least`` seconds together."""
    found = [cpu_seconds(call)]
    while sum(found) < least and len(found) < 50:
        found.append(cpu_seconds(call))
    return min(found)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Resident bytes at the peak of what is inside, beyond those at its start; Linux only, else NaN."""

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(name))) * 1024

    found, known = [float("nan")], Path("/proc/self/clear_refs").exists()
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again and not be seen
    if known:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS:") if known else 0.0
    yield found
    if known:
        found[0] = max(status("VmHWM:") - before, 4096)


def collecting(quick: bool) -> Iterator[Growth]:
    learner = BatchedPPO(n_steps=20, batch_size=50, n_epochs=20, learning_rate=3e-4)
    family = Darkroom(15, 20)  # more than 200 tasks

    def learn(n_task: int, n_stream: int) -> Callable[[], Any]:
        ids = np.arange(n_task)
        size = {"n_timesteps": 100, "n_learner": 1, "n_stream": n_stream, "seed": 0}
        return lambda: learner.learn(family, ids, family.tasks()[ids], **size)

    learn(1, 5)()  # compiles
    tasks, streams = (
        Growth("collection", what, "s") for what in ("tasks of 10 streams", "streams of 2 tasks")
    )
    for n in sizes(2, quick):
        tasks.points[n], streams.points[10 * n] = repeated(learn(n, 10)), repeated(learn(2, 10 * n))
    yield tasks
    yield streams


def training(quick: bool) -> Iterator[Growth]:
    length = Growth("gradient step, one window", "context length", "s")
    width = Growth("gradient step, 2 x 100 tokens", "width", "s")

    def step(**changes: Any) -> float:
        config = default_model(**changes)
        model = build_model(config, 0)
        batch = WindowSampler(synthetic(20, 4000), config.n_transit, config.batch_size, seed=0).batch(0)
        gradient(model, model.loss, batch, config)
        return repeated(lambda: gradient(model, model.loss, batch, config))

    for n in sizes(40, quick):
        length.points[n] = step(n_transit=n, batch_size=1)
    for n, heads in {8: 1, 24: 1, 80: 2, 256: 8, 800: 25}.items():
        if not quick or n < 80:
            width.points[n] = step(tf_n_embd=n, tf_n_head=heads, n_transit=100, batch_size=2)
    yield length
    yield width


def evaluating(quick: bool) -> Iterator[Growth]:
    tasks = FAMILY.tasks()[:8]

    def play(rollouts: int, episodes: int, **changes: Any) -> Callable[[], Any]:
        model = build_model(default_model(**changes), 0).eval()
        return lambda: evaluate_tasks(model, FAMILY, tasks, rollouts=rollouts, episodes=episodes)

    play(1, 1)()
    environments = Growth("60 in-context steps", "environments", "s")
    memory = Growth("memory of playing", "environments", "B")
    episodes = Growth("evaluation, 8 environments", "episodes", "s")
    for rollouts in sizes(1, quick):
        call = play(rollouts, 3)
        with peak_memory() as most:
            environments.points[8 * rollouts] = cpu_seconds(call)
        memory.points[8 * rollouts] = most[0]
    for n in sizes(3, quick):
        episodes.points[n] = repeated(play(1, n, **SMALL))
    yield environments
    yield episodes
    yield memory


def loading(quick: bool) -> Iterator[Growth]:
    memory = Growth("memory of loaded histories", "transitions", "B")
    seconds = Growth("loading histories", "transitions", "s")
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes(1000, quick):
            path = collect(
                FAMILY,
                make_learner("rmax", {}),
                Path(folder) / f"{n}.hdf5",
                family_name="darkroom",
                n_timesteps=n,
                n_stream=5,
                n_task=12,
                heldout=1,
                validation=1,
                marker=None,
            )
            with peak_memory() as most:
                start = time.process_time()
                data = CompressedADDataset.from_file(path, 200, [("subsample", {"every": 3})])
                seconds.points[50 * n] = time.process_time() - start
            memory.points[50 * n] = most[0]
            del data
            path.unlink()
    yield seconds
    yield memory


@style.styled
def drawn(found: list[Growth]) -> style.Figure:
    """Every cost on logarithmic axes beside a line in proportion."""
    figure, grid = style.panels(10, 8, 3, 3)
    for growth, axes in zip(found, grid.ravel(), strict=True):
        size, cost = np.array(list(growth.points.items()), np.float64).T
        axes.plot(size, cost, marker="o", color=style.INK)
        axes.plot(size, cost[-1] * size / size[-1], color=style.RANDOM, linestyle=style.DASHED, linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlabel=growth.size)
        for axis, unit in ((axes.xaxis, ""), (axes.yaxis, growth.unit)):
            axis.set_major_formatter(EngFormatter(unit))
            axis.set_minor_locator(NullLocator())
        said = f"exponent {growth.exponent():.2f}, last decade {growth.exponent(1):.2f}"
        axes.set_title(f"{growth.cost}\n{said}", fontsize=9)
    return figure


def run(quick: bool = False, plot: Path | None = None) -> list[Growth]:
    """Measure all; ``quick`` does two small sizes each, and only shows that it works."""
    torch.set_num_threads(1)
    found = [growth for part in (collecting, training, evaluating, loading) for growth in part(quick)]
    rows: dict[str, Any] = {}
    for growth in found:
        name = f"{growth.cost} by {growth.size}"
        points = ", ".join(f"{n:,}: {value:.3g}" for n, value in growth.points.items())
        rows[name] = f"{growth.exponent():.2f}, last decade {growth.exponent(1):.2f} ({points} {growth.unit})"
    write("growth", rows)
    if plot is not None:
        plot.write_bytes(style.figure_to_png(drawn(found), dpi=70))
    return found


if __name__ == "__main__":
    quick = quick_from_command_line(__doc__)
    run(quick, None if quick else PLOT)
