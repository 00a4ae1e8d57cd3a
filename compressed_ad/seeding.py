"""One place where randomness comes from: a generator is named by a seed and its purpose.

Two purposes never share a stream, and adding a new consumer never shifts the numbers of another.
"""

from __future__ import annotations

import zlib

import numpy as np


def _words(purpose: tuple[str | int, ...]) -> list[int]:
    return [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) & 0xFFFFFFFF for p in purpose]


def rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """The generator of ``(seed, purpose)``, e.g. ``rng(0, "split")`` or ``rng(0, "learner", task, k)``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *_words(purpose)])))


def seed64(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for ``(seed, purpose)``, for libraries and kernels that want an integer."""
    return int(np.random.SeedSequence([seed, *_words(purpose)]).generate_state(1, np.uint64)[0])
