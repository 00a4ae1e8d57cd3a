"""Compressed Algorithm Distillation: AD that sees where near-on-policy segments begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressed_ad.models.ad import AD, Marks
from compressed_ad.models.settings import Architecture
from compressed_ad.models.tokens import Tokens


class CompressedAD(AD):
    """AD plus two learned vectors, added to the tokens with ``<compress>`` and ``\\compress>``.

    The sequence keeps its length. With both vectors zero the model equals AD exactly. They start small and
    are drawn after all other weights, so that with one seed both models share all other initial weights.
    """

    reads_marks = True

    def __init__(self, config: Architecture | Mapping[str, Any]) -> None:
        super().__init__(config)
        width = self.config.tf_n_embd
        self.embed_compress_start = nn.Parameter(0.02 * torch.randn(width))
        self.embed_compress_end = nn.Parameter(0.02 * torch.randn(width))

    def marks(self, tokens: Tokens) -> Marks:
        start, end = self.embed_compress_start, self.embed_compress_end
        return (tokens.start_mark, start), (tokens.end_mark, end)


class GistAD(AD):
    """AD whose context episodes leave when they end, but for the token at their border.

    It is AD with ``segments`` episode, unless they are set otherwise, under a name of its own, so that it can
    be compared with AD: see ``models.segments``.
    """


class MarkedAttentionAD(AD):
    """AD whose attention to marked steps has a learned bias for each layer and head.

    Without marks, and with all biases zero as at the start, it equals AD.
    """

    reads_marks = True
    biased = True

    def attended(self, tokens: Tokens) -> Tensor:
        return tokens.marked
