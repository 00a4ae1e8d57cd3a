"""The scales by which models standardise what they see: measured on training tasks, kept in history files.

    /scales/{observation_mean,observation_std}  (D,) of a vector, (C,) of an image      /scales/reward  ()

Nothing of a validation or held-out task goes into them, and a model keeps its own wherever it plays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressed_ad.histories.hdf5 import Group, child, read
from compressed_ad.types import AnyArray, SpaceSpec, features

GROUP = "scales"

_ROWS = 1 << 14  # looked at together, so that images need not be in memory as floats


@dataclass(frozen=True)
class Scales:
    """Mean and standard deviation of observations, and the unit of rewards.

    ``reward`` is the root mean square of the rewards that are not 0, or 1 if all are: exactly 1 where rewards
    are 0 or 1, however rare they are, and the size of a typical one elsewhere.
    """

    observation_mean: NDArray[np.float64] | None  # (D,) by component, (C,) by channel; None: not a Box
    observation_std: NDArray[np.float64] | None
    reward: float


def measure(tasks: Iterable[Group], observation: SpaceSpec) -> Scales:
    """The scales of the histories in the groups ``tasks``, of which one is in memory at a time."""
    box = observation["kind"] == "box"
    count, mean, spread = 0, np.zeros(1), np.zeros(1)
    paid, squares = 0, 0.0
    for group in tasks:
        rewards = read(group, "rewards", "f").astype(np.float64)
        paid, squares = paid + int(np.count_nonzero(rewards)), squares + float((rewards**2).sum())
        if box:
            for part in _parts(features(observation, read(group, "states", "iuf"))):
                # Chan, Golub & LeVeque 1983: exact updates of mean and sum of squared deviations.
                n, own = len(part), part.mean(axis=0)
                step, total = own - mean, count + n
                spread = spread + ((part - own) ** 2).sum(axis=0) + step**2 * (count * n / total)
                count, mean = total, mean + step * (n / total)
    reward = math.sqrt(squares / paid) if paid else 1.0
    return Scales(mean, np.sqrt(spread / max(count, 1)), reward) if box else Scales(None, None, reward)


def _parts(rows: AnyArray) -> Iterable[NDArray[np.float64]]:
    return (rows[k : k + _ROWS].astype(np.float64) for k in range(0, len(rows), _ROWS))


def write(file: Group, scales: Scales) -> None:
    """Store ``scales`` in ``file``."""
    for name, value in vars(scales).items():
        if value is not None:
            file[f"{GROUP}/{name}"] = value


def stored(file: Group) -> Scales | None:
    """The scales in ``file``, or None if it holds none, as those of before did."""
    if GROUP not in file:
        return None
    group = child(file, GROUP, Group)
    names = ("observation_mean", "observation_std")
    mean, std = (read(group, name, "f") if name in group else None for name in names)
    return Scales(mean, std, float(read(group, "reward", "f")))
