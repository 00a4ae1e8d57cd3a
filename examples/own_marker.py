"""A marker of your own: the steps after a reward. Shows how much of a file it and ``threshold`` mark.

python examples/own_marker.py FILE
"""

import sys

import numpy as np

from compressed_ad import HistoryFile, apply_marker, check_marker, marking_statistics


def after_reward(rewards, window: int = 20):
    """Mark the ``window`` steps that follow each reward; (S, T) -> (S, T)."""
    n_step = rewards.shape[-1]
    # before[:, t + window] counts the rewards before step t, before[:, t] those before step t - window.
    before = np.pad(np.cumsum(rewards > 0, axis=-1), ((0, 0), (window + 1, 0)))
    return before[:, window : window + n_step] > before[:, :n_step]


if __name__ == "__main__":
    assert check_marker(after_reward) == []
    histories = HistoryFile(sys.argv[1]).load().values()
    for marker in (after_reward, "threshold"):
        masks = [apply_marker(marker, history) for history in histories]
        print(
            f"{getattr(marker, '__name__', marker)}: {marking_statistics(masks).compression_ratio:.1%} marked"
        )
