"""Random generators, each identified by a seed and a purpose.

Different purposes get independent streams, so a new consumer never changes the numbers of another.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def _words(purpose: tuple[str | int, ...]) -> list[int]:
    return [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) & 0xFFFFFFFF for p in purpose]


def rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """The generator for ``(seed, purpose)``, e.g. ``rng(0, "split")`` or ``rng(0, "learner", task, k)``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *_words(purpose)])))


def seed64(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for ``(seed, purpose)``, for libraries and kernels that want an integer."""
    return int(np.random.SeedSequence([seed, *_words(purpose)]).generate_state(1, np.uint64)[0])


class SlotDraws:
    """Random numbers for many slots at once; each slot's come from its own generator alone.

    They are drawn ahead in blocks of ``block`` steps, so that a step needs no Python loop over slots. The
    block size changes no number. ``shape`` is the shape of one slot's draw per step.
    """

    def __init__(
        self,
        generators: Sequence[np.random.Generator],
        kind: Literal["random", "standard_normal"] = "random",
        *,
        shape: tuple[int, ...] = (),
        block: int = 256,
    ) -> None:
        self._generators, self._kind, self._at = generators, kind, block
        self._ahead: NDArray[Any] = np.empty((block, len(generators), *shape))

    def __call__(self) -> NDArray[np.float64]:
        """The numbers (N, ...) of the next step."""
        block, _, *shape = self._ahead.shape
        if self._at == block:
            self._at = 0
            for slot, generator in enumerate(self._generators):
                self._ahead[:, slot] = getattr(generator, self._kind)((block, *shape))
        self._at += 1
        return np.array(self._ahead[self._at - 1])
