"""Batches of windows, drawn from sequences.

The sampler has no state, so an exact resume needs only the step, and gathers by index, without Python loops.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import HistoryError, UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.markers import segments
from compressed_ad.models.tokens import Batch, sent, shift
from compressed_ad.seeding import rng
from compressed_ad.tasks.select import stored_family
from compressed_ad.training.sequences import Sequences
from compressed_ad.training.shared_arrays import shared_sequences
from compressed_ad.training.transforms import apply_transforms
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray


def training_sequences(
    file: HistoryFile,
    transforms: Sequence[tuple[str, Mapping[str, Any]]],
    seed: int,
    trust: str | Collection[str],
) -> Sequences:
    """The histories of the training tasks of ``file``, transformed as by ``apply_transforms``."""
    ids, info = tuple(file.split.train.tolist()), file.info
    sequences = shared_sequences(file.path, f"{file.digest()} {ids} None", lambda: file.each(ids))
    if not transforms:
        return sequences
    family = stored_family(file.path, info.family, info.family_kwargs, trust)
    return apply_transforms(sequences, transforms, seed=seed, family=family, tasks=file.tasks)


SHOWN = ("states", "actions", "rewards", "next_states", "ended", "mask")
"""Columns of sequences that windows show."""


class WindowSampler:
    """Draws batches of windows from sequences.

    A share ``first_window`` of the windows starts at the first step of a sequence, as every evaluation does;
    the others start at an episode start, drawn uniformly from those that leave a full window. Windows never
    cross sequences. ``batch(step)`` is a pure function of (seed, step).

    ``weight_marked`` is the weight of marked steps in the loss. ``weight_unproven``, if not None, is that of
    marked steps before the first reward of their sequence: streams share one policy, so these are
    exploitation steps that nothing in the context explains.

    Actions that the source took with a probability below ``min_probability`` are shown but are no targets.
    ``HistoryError`` if these settings leave no target at all.
    """

    def __init__(
        self,
        sequences: Sequences,
        n_transit: int,
        batch_size: int,
        *,
        seed: int,
        first_window: float = 0.5,
        marker_dropout: float = 0.0,
        weight_marked: float = 1.0,
        weight_unproven: float | None = None,
        min_probability: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(sequences) == 0:
            raise HistoryError("no sequences to draw windows from")
        self.sequences, self.seed = sequences, seed
        self.n_transit, self.batch_size = n_transit, batch_size
        self.first_window, self.marker_dropout = first_window, marker_dropout
        self.begin, self.end = sequences.offsets[:-1], sequences.offsets[1:]
        inner = sequences.full_windows(n_transit)
        inner[sequences.episodes.first[:-1]] = False  # those are drawn as first windows
        self.inner = sequences.episodes.start[inner]
        self.weights = (weight_marked, weight_marked if weight_unproven is None else weight_unproven)
        self.min_probability = min_probability if "action_probs" in sequences.store else 0.0
        self.weighted = self.weights != (1.0, 1.0) or self.min_probability > 0
        if self.weighted and not any(self._weight(steps).any() for steps in _blocks(sequences.offsets[-1])):
            raise HistoryError(
                "no action is left to learn: the weights of marked steps and loss_min_probability"
                f" {min_probability} leave out every step; raise loss_weight_marked or lower"
                " loss_min_probability"
            )
        self.device = torch.device(device)
        self.store = {name: _tensor(sequences.store[name]).to(self.device) for name in SHOWN}

    def starts(self, step: int) -> tuple[IntArray, IntArray]:
        """First transition of each window, and the end of its sequence: both (B,)."""
        random = rng(self.seed, "windows", 0, step)  # the 0 keeps the numbers of earlier versions
        at_begin = random.random(self.batch_size) < self.first_window
        outer = random.integers(len(self.begin), size=self.batch_size)
        if len(self.inner) == 0:
            return self.begin[outer], self.end[outer]
        inner = self.inner[random.integers(len(self.inner), size=self.batch_size)]
        start = np.where(at_begin, self.begin[outer], inner)
        return start, self.end[self.sequences.sequence_of(start)]

    def indices(self, step: int) -> tuple[IntArray, BoolArray]:
        """Transition at each position of the windows, and whether it is valid: both (B, L)."""
        start, end = self.starts(step)
        index = start[:, None] + np.arange(self.n_transit)
        return np.minimum(index, end[:, None] - 1), index < end[:, None]

    def batch(self, step: int) -> Batch:
        """The windows of gradient step ``step``."""
        index, valid = self.indices(step)
        at = self._sent(self.sequences.rows(index))
        window = {name: array[at] for name, array in self.store.items()}
        window["rewards"] = window["rewards"].float()
        for name in ("states", "actions", "next_states"):
            # Images stay in bytes; the model's stem converts them.
            if not window[name].is_floating_point() and window[name].dim() <= 3:
                window[name] = window[name].long()
        if self.marker_dropout > 0:
            draws = rng(self.seed, "marker_dropout", 0, step).random(self.batch_size)
            window["mask"] &= self._sent(draws >= self.marker_dropout)[:, None]
        weight = self._sent(self._weight(index)) if self.weighted else None
        return Batch(shift(**window), window["actions"], self._sent(valid), weight)

    def _sent(self, array: AnyArray) -> Tensor:
        return sent(torch.from_numpy(array), self.device)

    def _weight(self, steps: IntArray) -> FloatArray:
        """Weight in the loss of each of the transitions ``steps``, float32."""
        sequences, (proven, unproven) = self.sequences, self.weights
        weight = np.ones(steps.shape, np.float32)
        if self.weights != (1.0, 1.0):
            rewarded = steps > sequences.first_reward[sequences.sequence_of(steps)]
            marked = np.where(rewarded, proven, unproven)
            weight = np.where(sequences.gather("mask", steps), marked, 1.0).astype(np.float32)
        if self.min_probability > 0:
            improbable = sequences.gather("action_probs", steps) < self.min_probability  # not where unknown
            weight[improbable] = 0
        return weight


def _blocks(n: int) -> Iterator[IntArray]:
    """0, ..., n - 1, a million at a time."""
    return (np.arange(k, min(k + 2**20, n)) for k in range(0, n, 2**20))


def _tensor(array: AnyArray) -> Tensor:
    wide = array.dtype.kind == "u" and array.dtype.itemsize > 1  # torch lacks most operations on these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes to it
        return torch.from_numpy(array.astype(np.int64) if wide else array)


class CompressedADDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows as a PyTorch dataset, for inspection and custom training loops.

    Item i is the window of ``n_transit`` transitions at the i-th episode start that leaves a full window:
    tensors by name, ``compression_mask`` (L,), and ``segments`` (K, 2), (start, end) pairs inside the window.
    The first ``n_segments`` pairs are segments; empty pairs (L, L) fill up the rest, K being the most
    segments that a window can have, so that a ``DataLoader`` can batch items.
    """

    def __init__(self, sequences: Sequences, n_transit: int) -> None:
        if not isinstance(sequences, Sequences):
            raise UsageError(
                f"CompressedADDataset takes sequences, not a {type(sequences).__name__}; a history file's are"
                " CompressedADDataset.from_file(path, n_transit)"
            )
        self.sequences, self.n_transit = sequences, n_transit
        self.start = sequences.episodes.start[sequences.full_windows(n_transit)]
        if len(self.start) == 0:
            raise HistoryError(f"every history is shorter than n_transit {n_transit}")

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        n_transit: int,
        transforms: Iterable[tuple[str, Mapping[str, Any]]] = (),
        *,
        seed: int = 0,
        trust: str | Collection[str] = (),
    ) -> CompressedADDataset:
        """The windows of the training tasks of a history file; other tasks are not read.

        ``transforms`` are (name, parameters) pairs for ``apply_transforms``, which also gets ``seed``.
        ``trust`` names code from outside this library (``module:attribute``) that the file may name.
        """
        return cls(training_sequences(HistoryFile(path), list(transforms), seed, trust), n_transit)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        steps = np.arange(self.start[i], self.start[i] + self.n_transit)
        window = {name: self.sequences.gather(name, steps) for name in (*SHOWN, "update")}
        mask = window.pop("mask")
        _, start, stop = segments(mask)
        pairs = np.full(((self.n_transit + 1) // 2, 2), self.n_transit, np.int64)
        pairs[: len(start)] = np.stack([start, stop], axis=1)
        return {
            **{name: _tensor(array) for name, array in window.items()},
            "compression_mask": torch.from_numpy(mask),
            "segments": torch.from_numpy(pairs),
            "n_segments": torch.tensor(len(start)),
        }
