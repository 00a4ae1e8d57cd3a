"""A pre-norm causal transformer with a key-value cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressed_ad.models import fused
from compressed_ad.models.settings import Architecture
from compressed_ad.models.tokens import sent

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine (L, D / 2) of the angle by which each pair of numbers is turned: see ``rotate``."""


class Cache:
    """Keys and values of the tokens of each context.

    ``length`` (B,) counts the tokens of each row; rows may differ. It is in the memory of the CPU wherever
    keys are, so that a step does not wait for a device to tell it. Entries beyond a row's length are garbage
    and never attended to.
    """

    def __init__(self, transformer: Transformer, n_row: int) -> None:
        n_layer, n_head = len(transformer.blocks), transformer.n_head
        width, device = transformer.head_dim + transformer.mark_bias, transformer.norm.weight.device
        self.key = torch.zeros((n_layer, n_row, n_head, self.capacity(transformer), width), device=device)
        self.value = torch.zeros_like(self.key)
        self.length = torch.zeros(n_row, dtype=torch.long)
        weights = [found for block in transformer.blocks if (found := fused.weights_of(block)) is not None]
        self.weights = weights if len(weights) == n_layer else None
        """Those of the blocks, for compiled steps; None: steps are PyTorch's."""

    def capacity(self, transformer: Transformer) -> int:
        """Tokens of a row for which there is memory at the start."""
        return transformer.n_context

    @property
    def entry(self) -> Tensor:
        """(B,) where the next token goes, on the device of the keys."""
        return sent(self.length, self.key.device)

    def dead(self) -> Tensor | None:
        """(B, T) which entries the next token must not see though they are not beyond it; None: none."""
        return None

    def hidden(self) -> Tensor | None:
        """(B, T) which of the first T entries the next token must not see, itself included; None: none."""
        dead, longest = self.dead(), int(self.length.max()) + 1
        if dead is None and bool((self.length == self.length[0]).all()):
            return None
        hidden = torch.arange(longest, device=self.key.device) > self.entry[:, None]
        return hidden if dead is None else hidden | dead[:, :longest]

    def rotation(self, transformer: Transformer) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, D / 2) that turn the next token of each row."""
        entry = self.entry
        return transformer.cos[entry], transformer.sin[entry]

    def advance(self) -> None:
        """Each row has one more token."""
        self.length = self.length + 1

    def forget(self, rows: Tensor) -> None:
        """Take back the last token of ``rows`` (B,) bool, if they have one."""
        self.length = torch.where(rows, (self.length - 1).clamp(min=0), self.length)


class Attention(nn.Module):
    """Causal self-attention over B contexts of L tokens, with optional rotary positions.

    With ``mark_bias``, each head has a learned bias that is added to its scores of marked tokens.
    """

    def __init__(self, n_embd: int, n_head: int, mark_bias: bool = False) -> None:
        super().__init__()
        self.n_head = n_head
        self.scale = float((n_embd // n_head) ** -0.5)
        self.mark_bias = nn.Parameter(torch.zeros(n_head)) if mark_bias else None
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def heads(
        self, x: Tensor, rotation: Rotation | None, marked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each (B, H, L, D / H), or one component wider with ``marked`` (B, L).

        The bias is an extra component of keys, and a constant one of queries, so that fused kernels and the
        cache work unchanged; values get a component of zeros to fit.
        """
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_head, width // self.n_head).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.mark_bias is not None and marked is not None:
            bias = (self.mark_bias[:, None] * marked[:, None]).to(k.dtype)[..., None]
            q = torch.cat([q, torch.full_like(bias, 1 / self.scale)], dim=-1)
            k, v = torch.cat([k, bias], dim=-1), torch.cat([v, torch.zeros_like(bias)], dim=-1)
        return q, k, v

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, until: Tensor | None = None
    ) -> Tensor:
        """Causal attention (B, L, D) of queries, keys and values as ``heads`` gives them.

        ``until`` (B, L) is the last query that may see each token; None: all later ones.
        """
        mask = None if until is None else visible(until)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=self.scale)
        return self.merge(y)

    def merge(self, y: Tensor) -> Tensor:
        """(B, H, L, D / H or wider) -> (B, L, D) through the output projection."""
        if self.mark_bias is not None:
            y = y[..., : self.out.in_features // self.n_head]
        batch, heads, length, width = y.shape
        return self.out(y.transpose(1, 2).reshape(batch, length, heads * width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Architecture, mark_bias: bool = False) -> None:
        super().__init__()
        n_embd = config.tf_n_embd
        self.norm_attention = nn.LayerNorm(n_embd, bias=False)
        self.attention = Attention(n_embd, config.tf_n_head, mark_bias)
        self.norm_mlp = nn.LayerNorm(n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)
        _, self.attention_dropout, self.dropout = config.dropouts
        self.kernels = config.kernels

    def mlp(self, x: Tensor) -> Tensor:
        """The feed-forward half, residual included."""
        hidden = self.up(self.norm_mlp(x))
        compiled = self.kernels and torch.is_grad_enabled() and fused.usable(hidden)
        hidden = fused.gelu(hidden) if compiled else F.gelu(hidden, approximate="tanh")
        return x + F.dropout(self.down(hidden), self.dropout, self.training)

    def attend(
        self, x: Tensor, rotation: Rotation | None, marked: Tensor | None, until: Tensor | None
    ) -> Tensor:
        """Causal attention (B, L, D) of normalised ``x``; in training, where it can, by a compiled kernel."""
        attention, dropped = self.attention, self.attention_dropout if self.training else 0.0
        if self.kernels and attention.mark_bias is None and not dropped:
            qkv = attention.qkv(x)
            if torch.is_grad_enabled() and fused.usable(qkv):
                y = fused.attention(qkv.unflatten(-1, (3, attention.n_head, -1)), rotation, until)
                return attention.out(y.flatten(2))  # type: ignore[no-any-return]
        return attention.mix(*attention.heads(x, rotation, marked), dropped, until)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        marked: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        y = self.attend(self.norm_attention(x), rotation, marked, until)
        return self.mlp(x + F.dropout(y, self.dropout, self.training))


class Transformer(nn.Module):
    """The blocks of ``config`` and a final norm, for at most ``n_context`` tokens at once.

    Weights are initialised as in GPT-2: residual outputs scaled down by depth (Radford et al. 2019, 2.3).
    """

    cos: Tensor
    sin: Tensor
    frequency: Tensor

    def __init__(self, config: Architecture, n_context: int, mark_bias: bool = False) -> None:
        super().__init__()
        width, n_layer, self.n_head = config.tf_n_embd, config.tf_n_layer, config.tf_n_head
        self.n_context, self.head_dim = n_context, width // self.n_head
        self.dropout, _, _ = config.dropouts
        self.mark_bias = mark_bias
        self.blocks = nn.ModuleList(Block(config, mark_bias) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width, bias=False)
        self.position = None
        if config.position == "learned":
            self.position = nn.Parameter(torch.zeros(self.n_context, width))
            nn.init.normal_(self.position, std=0.02)
        else:
            self.register_buffer("frequency", frequencies(self.head_dim), persistent=False)
            angle = torch.arange(self.n_context)[:, None] * self.frequency
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "position":
                residual = name.endswith(("out.weight", "down.weight"))
                std = 1 / math.sqrt(weight.shape[1]) / (math.sqrt(2 * n_layer) if residual else 1.0)
                nn.init.normal_(weight, std=std)

    def forward(self, x: Tensor, marked: Tensor | None = None, until: Tensor | None = None) -> Tensor:
        """All positions at once, (B, L, D) -> (B, L, D), for L <= n_context; ``marked`` (B, L) bool.

        ``until`` (B, L) is the last query that may see each token; None: all later ones.
        """
        x, rotation = self._placed(x)
        for block in self.blocks:
            x = block(x, rotation, marked, until)
        return self.norm(x)  # type: ignore[no-any-return]

    def prefill(self, x: Tensor, marked: Tensor | None, cache: Cache, rows: Tensor) -> None:
        """Store the keys and values of the tokens x (B, L, D) in ``rows`` (B,) of the ``cache``."""
        (x, rotation), rows = self._placed(x), rows.to(x.device)
        if (weights := self._compiled(x, cache)) is not None:
            shape = x.shape[:2]
            place = rows[:, None].expand(shape), torch.arange(shape[1]).expand(shape)
            if rotation is not None:
                rotation = rotation[0].expand(*shape, -1), rotation[1].expand(*shape, -1)
            fused.steps(weights, x, rotation, (cache.key, cache.value), place, store_only=True)
            return
        for layer, block in enumerate(self.blocks):
            attention: Attention = block.attention  # type: ignore[assignment]
            q, k, v = attention.heads(block.norm_attention(x), rotation, marked)  # type: ignore[operator]
            cache.key[layer, rows, :, : x.shape[1]], cache.value[layer, rows, :, : x.shape[1]] = k, v
            if layer < len(self.blocks) - 1:  # nothing else of the last layer is needed
                x = block.mlp(x + attention.mix(q, k, v))  # type: ignore[operator]

    def _compiled(self, x: Tensor, cache: Cache) -> list[fused.Weights] | None:
        """The weights for compiled steps of the tokens x; None where they are PyTorch's."""
        fits = fused.usable(x) and not torch.is_grad_enabled() and not self.training
        return cache.weights if fits else None

    def _placed(self, x: Tensor) -> tuple[Tensor, Rotation | None]:
        """Tokens x (B, L, D) that know their places, or by how much keys and queries are turned instead."""
        length, rotation = x.shape[1], None
        if self.position is not None:
            x = x + self.position[:length]
        else:
            rotation = self.cos[:length], self.sin[:length]
        return F.dropout(x, self.dropout, self.training), rotation

    def step(self, x: Tensor, cache: Cache, marked: Tensor | None = None) -> Tensor:
        """One more token in every row: x (B, D) -> (B, D), ``marked`` (B,). No row may be full."""
        at, row, rotation = cache.entry, torch.arange(len(x), device=x.device), None
        if self.position is not None:
            x = x + self.position[at]
        else:
            rotation = cache.rotation(self)
        if (weights := self._compiled(x, cache)) is not None:
            memory = cache.key, cache.value
            x = fused.steps(weights, x[:, None], rotation, memory, (row, at), cache.dead())
            cache.advance()
            return self.norm(x[:, 0])  # type: ignore[no-any-return]
        if rotation is not None:
            rotation = rotation[0][:, None, None], rotation[1][:, None, None]
        hidden, longest = cache.hidden(), int(cache.length.max()) + 1
        uniform = bool((cache.length == cache.length[0]).all())
        x, marked = x[:, None], None if marked is None else marked[:, None]
        for layer, block in enumerate(self.blocks):
            q, k, v = block.attention.heads(block.norm_attention(x), rotation, marked)  # type: ignore[union-attr, operator]
            if uniform:
                cache.key[layer, :, :, longest - 1] = k[:, :, 0]
                cache.value[layer, :, :, longest - 1] = v[:, :, 0]
            else:
                cache.key[layer, row, :, at] = k[:, :, 0]
                cache.value[layer, row, :, at] = v[:, :, 0]
            keys, values = cache.key[layer, :, :, :longest], cache.value[layer, :, :, :longest]
            scores = (q * self.head_dim**-0.5) @ keys.transpose(-1, -2)
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, None, None], -math.inf)
            y = scores.softmax(dim=-1) @ values
            x = block.mlp(x + block.attention.merge(y))  # type: ignore[union-attr, operator]
        cache.advance()
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


def visible(until: Tensor) -> Tensor:
    """(B, L, L) bool: which tokens each query (second last axis) sees, by the ``until`` (B, L) of each."""
    place = torch.arange(until.shape[1], device=until.device)
    return (place <= place[:, None]) & (place[:, None] <= until[:, None])


def frequencies(dim: int) -> Tensor:
    """(D / 2,) radians per step by which rotary positions turn each pair of ``dim`` numbers."""
    return 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of x (..., L, D), its halves as pairs; cos, sin (..., L, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
