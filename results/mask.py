"""Draw what leaves a context, for docs/compression.md: which tokens each query sees, for four kinds of model.

python results/mask.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from compressed_ad.models.segments import in_windows
from compressed_ad.models.settings import Architecture
from compressed_ad.models.tokens import shift
from compressed_ad.models.transformer import visible
from compressed_ad.report.figures.style import FAINT, INK, MARKS, figure_to_png

PATH = Path(__file__).parents[1] / "docs" / "compression_mask.png"
KINDS = {
    "AD: all steps stay": {},
    "recent_steps 6: a window": {"recent_steps": 6},
    "segments episode: only borders stay": {"segments": "episode"},
    "segment_gist false: borders\nthat have not seen their episode": {
        "segments": "episode",
        "segment_gist": False,
    },
}
EPISODES = (6, 4, 7, 5)


def draw() -> Figure:
    length = sum(EPISODES) + 2
    ends = torch.tensor(EPISODES).cumsum(0) - 1
    ended = torch.zeros(1, length, dtype=torch.bool)
    ended[0, ends] = True
    blank = torch.zeros(1, length)
    tokens = shift(blank.long(), blank.long(), blank, blank.long(), ended, blank.bool())
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for ax, (title, settings) in zip(figure.subplots(1, 4), KINDS.items(), strict=True):
        config = Architecture(n_transit=length, **settings)
        shown = torch.ones(length, length).tril()
        if config.forgets:
            shown = visible(in_windows(config, tokens)[1])[0].float()
        shown[:, tokens.ended[0]] *= 2
        ax.imshow(shown, cmap=ListedColormap(["white", "#9ecae1", MARKS]), vmin=0, vmax=2)
        for end in ends + 0.5:
            ax.axhline(end, color=INK, linewidth=0.6)
            ax.axvline(end, color=INK, linewidth=0.6)
        ax.set_xticks(range(length), [])
        ax.set_yticks(range(length), [])
        ax.tick_params(length=0)
        ax.grid(visible=True, color=FAINT, linewidth=0.3)
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("token")
    figure.axes[0].set_ylabel("query, downwards")
    return figure


if __name__ == "__main__":
    PATH.write_bytes(figure_to_png(draw()))
    print(f"wrote {PATH}")
