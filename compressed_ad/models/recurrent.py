"""A recurrent memory: a history is read in chunks, and a few vectors carry on what was in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressed_ad.errors import UsageError
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import Architecture
from compressed_ad.models.tokens import Tokens
from compressed_ad.models.transformer import Cache, Transformer


class RecurrentAD(AD):
    """AD that sees its last steps, and of all before them only a memory that it writes itself.

    A history is cut into chunks of ``memory_steps``. One causal pass takes the k = ``memory_tokens`` vectors
    of memory, the steps of the chunk, and k tokens that see all of these and write: the old memory with a
    learned vector added (recurrent memory transformer: Bulatov et al. 2022). What they find, h, changes the
    memory m to g m + (1 - g) W h, with a gate g of m and h (Hutchins et al. 2022). A history starts with
    zeros. Gradients go through all chunks of a window. Other weights are drawn as AD's are, and before these.
    """

    def __init__(self, config: Architecture | Mapping[str, Any]) -> None:
        super().__init__(config)
        width, k = self.config.tf_n_embd, self.config.memory_tokens
        self.memory_read = nn.Parameter(torch.randn(k, width))
        self.memory_write = nn.Parameter(torch.randn(k, width))
        self.memory_gate = nn.Linear(2 * width, width)
        self.memory_update = nn.Linear(width, width, bias=False)
        nn.init.ones_(self.memory_gate.bias)  # it rather keeps than forgets, at first
        nn.init.normal_(self.memory_update.weight, std=width**-0.5)

    @property
    def n_token(self) -> int:
        return 2 * self.config.memory_tokens + self.config.memory_steps

    @property
    def forgets(self) -> bool:
        return True

    def visible_tokens(self, tokens: Tokens) -> Tensor:
        place = torch.arange(tokens.ended.shape[1], device=tokens.ended.device).expand(tokens.ended.shape)
        return self.config.memory_tokens + place % self.config.memory_steps + 1

    def read(self, memory: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """One whole chunk: memory (B, k, D) and its steps (B, c, D), seen (B, c, D) and the next memory."""
        x = torch.cat([memory + self.memory_read, steps, memory + self.memory_write], dim=1)
        k = memory.shape[1]
        y = self.transformer(x)
        seen, found = y[:, k:-k], y[:, -k:]
        gate = self.memory_gate(torch.cat([memory, found], dim=-1)).sigmoid()
        return seen, gate * memory + (1 - gate) * self.memory_update(found)

    def over_windows(self, x: Tensor, tokens: Tokens) -> Tensor:
        k, width = self.memory_read.shape
        memory, parts = x.new_zeros((len(x), k, width)), []
        *whole, last = torch.split(x, self.config.memory_steps, dim=1)
        for steps in whole:
            seen, memory = self.read(memory, steps)
            parts.append(seen)
        # Nothing will read what the last chunk would write, and it may be shorter.
        seen = self.transformer(torch.cat([memory + self.memory_read, last], dim=1))[:, k:]
        return torch.cat([*parts, seen], dim=1)

    def new_cache(self, n_row: int) -> RecurrentCache:
        cache = RecurrentCache(self.transformer, n_row, self.config)
        self.remember(cache, cache.memory)
        return cache

    def next_step(self, x: Tensor, tokens: Tokens, cache: Cache) -> Tensor:
        if not isinstance(cache, RecurrentCache):
            raise UsageError("RecurrentAD plays with the cache that its new_cache makes")
        self.turn(cache)
        row = torch.arange(len(x), device=x.device)
        cache.steps[row, cache.entry - self.config.memory_tokens] = x[:, 0].detach()
        return self.transformer.step(x[:, 0], cache)[:, None]

    @torch.no_grad()
    def turn(self, cache: RecurrentCache) -> None:
        """Write the memory of the rows whose chunk is full, and begin their next chunk."""
        k, c = self.config.memory_tokens, self.config.memory_steps
        full = cache.length == k + c
        if bool(full.any()):
            rows = torch.nonzero(full)[:, 0]
            on_device = rows.to(cache.key.device)
            memory = self.read(cache.memory[on_device], cache.steps[on_device])[1]
            cache.length = torch.where(full, k, cache.length)
            self.remember(cache, memory, rows)

    @torch.no_grad()
    def remember(self, cache: RecurrentCache, memory: Tensor, rows: Tensor | None = None) -> None:
        """Replace the memory of ``rows`` (A,), or of all, by ``memory`` (A, k, D).

        The steps of their chunks so far are as if they had followed this memory.
        """
        rows = torch.arange(len(cache.length)) if rows is None else rows
        most = int(cache.length[rows].max()) - memory.shape[1]
        rows = rows.to(cache.key.device)
        cache.memory[rows] = memory.to(cache.memory.dtype, copy=True)
        x = torch.cat([memory + self.memory_read, cache.steps[rows, :most]], dim=1)
        self.transformer.prefill(x, None, cache, rows)


class RecurrentCache(Cache):
    """The memory of each context, and keys and values of it and of the steps of the present chunk.

    ``length`` counts both. A chunk is written into memory when the step after it comes, so that its last step
    can be taken back until then; afterwards, the one step of the new chunk can.
    """

    def __init__(self, transformer: Transformer, n_row: int, config: Architecture) -> None:
        self.config = config
        super().__init__(transformer, n_row)
        width, device = config.tf_n_embd, self.key.device
        self.memory = torch.zeros((n_row, config.memory_tokens, width), device=device)
        """(B, k, D) as it was at the start of the present chunk."""
        self.steps = torch.zeros((n_row, config.memory_steps, width), device=device)
        """(B, c, D) embedded steps of the present chunk; garbage beyond ``length``."""
        self.length = self.length + config.memory_tokens

    def capacity(self, transformer: Transformer) -> int:
        return self.config.memory_tokens + self.config.memory_steps

    def forget(self, rows: Tensor) -> None:
        shorter = (self.length - 1).clamp(min=self.config.memory_tokens)
        self.length = torch.where(rows, shorter, self.length)
