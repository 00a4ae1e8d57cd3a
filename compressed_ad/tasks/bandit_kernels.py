"""Compiled kernels of Thompson sampling: the chance of each arm of N bandits to be the best one.

P(a is best) is the integral of prod_{b != a} F_b dF_a over the posteriors, here by the trapezoid rule on a
grid of G points. Slots are computed one by one, so that a slot's result does not depend on the others.
Everything compiled is in this file, because Numba recompiles only when the file of the called function
changes.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np
from numba import njit

_compile = njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")


@_compile
def _best(cdf, below, above, chance):
    """Chances (K,) from ``cdf`` (K, G); ``below`` (G,) and ``above`` (K, G) are room to work in."""
    n_arm, n_point = cdf.shape
    above[n_arm - 1] = 1.0
    for a in range(n_arm - 2, -1, -1):
        for g in range(n_point):
            above[a, g] = above[a + 1, g] * cdf[a + 1, g]
    below[:] = 1.0
    for a in range(n_arm):
        total = 0.0
        for g in range(n_point - 1):
            # The others stay below this point: mean of both ends, times the arm's own mass between them.
            others = below[g] * above[a, g] + below[g + 1] * above[a, g + 1]
            total += others * (cdf[a, g + 1] - cdf[a, g])
        chance[a] = total
        for g in range(n_point):
            below[g] *= cdf[a, g]
    chance /= chance.sum()


@_compile
def best_arm(cdf):
    """(N, K) chances from posterior distribution functions (N, K, G) on a grid."""
    n_slot, n_arm, n_point = cdf.shape
    chance = np.empty((n_slot, n_arm))
    below, above = np.empty(n_point), np.empty((n_arm, n_point))
    for i in range(n_slot):
        _best(cdf[i], below, above, chance[i])
    return chance


@_compile
def best_normal(mean, spread, z):
    """(N, K) chances from normal posteriors of ``mean`` and ``spread`` (N, K).

    The grid joins points of every posterior, ``z`` (J,) standard deviations from its mean: each arm is
    resolved where it has mass, however narrow.
    """
    n_slot, n_arm = mean.shape
    n_point = n_arm * len(z)
    chance = np.empty((n_slot, n_arm))
    points, cdf = np.empty(n_point), np.empty((n_arm, n_point))
    below, above = np.empty(n_point), np.empty((n_arm, n_point))
    for i in range(n_slot):
        for a in range(n_arm):
            points[a * len(z) : (a + 1) * len(z)] = mean[i, a] + spread[i, a] * z
        points.sort()
        for a in range(n_arm):
            for g in range(n_point):
                x = (points[g] - mean[i, a]) / spread[i, a]
                if abs(x) < 6.0:
                    cdf[a, g] = 0.5 * math.erfc(-x * math.sqrt(0.5))
                else:  # 1e-9 from the limit; most points are that far from most arms
                    cdf[a, g] = x > 0
        _best(cdf, below, above, chance[i])
    return chance
