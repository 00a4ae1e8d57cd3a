"""Attention of a trained model: its maps, and the shares that four kinds of tokens get.

Token j holds state j and the outcome of transition j - 1 (``models.tokens``). Kinds are those of the outcome:
a token is marked, rewarded or of an episode as transition j - 1 is. The first token of a context has no
outcome and is of no kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.intervals import divided
from compressed_ad.models.ad import AD, evaluating
from compressed_ad.models.tokens import Batch, Tokens
from compressed_ad.models.transformer import Block, visible
from compressed_ad.seeding import rng
from compressed_ad.types import AnyArray, BoolArray, FloatArray

KINDS = ("marked", "rewarded", "current episode", "border")
"""Kinds of tokens, by their outcome; a token may be of several.

marked: the transition is inside a marked segment. rewarded: its reward was above 0. current episode: it
belongs to the episode of the query's state. border: the token has ``<compress>`` or ``\\compress>``.
"""


@torch.no_grad()
def attention_maps(model: AD, tokens: Tokens) -> Tensor:
    """Attention probabilities (layers, B, H, L, L) of every query (second last axis) over all tokens.

    Float32 and without dropout. Rows sum to 1, and entries above the diagonal are 0.
    """
    blocks = block_inputs(model, tokens)
    return torch.stack([attention_probabilities(block, *given) for block, given in blocks])


def block_inputs(model: AD, tokens: Tokens) -> list[tuple[Block, tuple[Any, ...]]]:
    """Every block of ``model`` with the arguments of its call in a forward pass without dropout.

    Hooks on the pass, instead of a copy of it, work for every model with such blocks.
    """
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    blocks = model.transformer.blocks
    hooks = [block.register_forward_pre_hook(lambda *call: seen.append(call)) for block in blocks]
    try:
        with evaluating(model):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) > len(blocks):
        raise UsageError(
            f"{type(model).__name__} reads a history in chunks, so it has no one map of attention"
        )
    return seen


def attention_probabilities(
    block: Block,
    x: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    marked: Tensor | None = None,
    until: Tensor | None = None,
) -> Tensor:
    """(B, H, L, L): softmax of the block's scaled scores of visible tokens, for its input ``x`` (B, L, D)."""
    q, k, _ = block.attention.heads(block.norm_attention(x), rotation, marked)
    if until is None:
        until = torch.full(x.shape[:2], x.shape[1], device=x.device)
    scores = block.attention.scale * q @ k.transpose(-1, -2)
    return scores.float().masked_fill(~visible(until)[:, None], -math.inf).softmax(dim=-1)


@dataclass(frozen=True)
class Context:
    """One window of L tokens, whose kinds are those of their outcome, and the attention of every head."""

    window: int  # index of the window
    task: int  # index in the history file
    first_step: int  # step of its sequence at which the window starts
    maps: FloatArray  # (layers, H, L, L) attention of query (second last axis) on token
    marked: BoolArray  # (L,)
    rewarded: BoolArray  # (L,)
    episode_start: BoolArray  # (L,) whether the token's state is the first of an episode


@dataclass(frozen=True)
class Shares:
    """Mean attention on each of K kinds of tokens, over the supervised queries of some windows.

    ``uniform`` is the share under even attention over a query's context, ``matched`` the share under the
    head's preference for lags alone (``lag_hazard``). ``ratio`` is share / matched, with its 95 % interval
    from a bootstrap over windows, which takes the estimated preference for lags as given. NaN where no window
    holds a token of the kind.
    """

    kinds: tuple[str, ...]  # K
    share: FloatArray  # (K, layers, H)
    uniform: FloatArray  # (K,)
    matched: FloatArray  # (K, layers, H)
    ratio: FloatArray  # (K, layers, H)
    low: FloatArray  # (K, layers, H)
    high: FloatArray  # (K, layers, H)
    mean_lag: FloatArray  # (layers, H) steps between the query and what it attends to
    n_window: int
    n_query: int


@torch.no_grad()
def attention_shares(
    model: AD, windows: Batch, *, chunk: int = 8, n_bootstrap: int = 2000, seed: int = 0
) -> Shares:
    """Shares of attention on ``KINDS`` over all supervised queries of B ``windows``, equally weighted.

    At most ``chunk`` windows are computed together. ``UsageError`` if there is no supervised query.
    """
    n_query = int(windows.valid.sum())
    if n_query == 0:
        raise UsageError("no supervised query in these windows")
    parts = [windows.part(slice(first, first + chunk)) for first in range(0, len(windows.valid), chunk)]
    shares, lag_sums = [], []
    for part in parts:
        kinds, valid = kinds_of(part.tokens).float(), part.valid.float()
        blocks = block_inputs(model, part.tokens)
        maps = (attention_probabilities(block, *given) * valid[:, None, :, None] for block, given in blocks)
        layers = [(torch.einsum("bhtj,bktj->bkh", m, kinds), by_lag(m.double().sum(dim=0))) for m in maps]
        shares.append(torch.stack([share for share, _ in layers], dim=2).double())
        lag_sums.append(torch.stack([lags for _, lags in layers]))
    lags = torch.stack(lag_sums).sum(dim=0)  # (layers, H, L, L)
    expected = matched_attention(lag_hazard(lags))  # (layers, H, L, L)
    even = torch.ones_like(expected[0, 0]).tril()
    even /= even.sum(dim=-1, keepdim=True)
    matched, uniform = [], []
    for part in parts:
        kinds = kinds_of(part.tokens).double() * part.valid[:, None, :, None]
        matched.append(torch.einsum("nhtj,bktj->bknh", expected, kinds))
        uniform.append(torch.einsum("tj,bktj->k", even, kinds))
    base = torch.cat(matched).cpu().numpy()
    sums = torch.cat(shares).cpu().numpy()  # (B, K, layers, H)
    ratio, low, high = ratio_interval(sums, base, n=n_bootstrap, seed=seed)
    steps = torch.arange(lags.shape[-1], device=lags.device, dtype=lags.dtype)
    return Shares(
        kinds=KINDS,
        share=sums.sum(axis=0) / n_query,
        uniform=torch.stack(uniform).sum(dim=0).cpu().numpy() / n_query,
        matched=base.sum(axis=0) / n_query,
        ratio=ratio,
        low=low,
        high=high,
        mean_lag=((lags.sum(dim=-2) * steps).sum(dim=-1) / n_query).cpu().numpy(),
        n_window=len(windows.valid),
        n_query=n_query,
    )


def kinds_of(tokens: Tokens) -> Tensor:
    """(B, K, L, L) bool: whether token j (last axis) is of each of ``KINDS`` for query t; only j <= t."""
    length = tokens.ended.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.ended.device).tril()
    # Episode of a token's state; if an episode ended, the token's outcome belongs to the one before.
    episode = tokens.ended.long().cumsum(dim=1)
    current = (episode - tokens.ended.long())[:, None, :] == episode[:, :, None]
    always = torch.stack([tokens.marked, tokens.reward > 0, tokens.start_mark | tokens.end_mark], dim=1)
    marked, rewarded, border = always[:, :, None, :].expand(-1, -1, length, -1).unbind(dim=1)
    kinds = torch.stack([marked, rewarded, current, border], dim=1)
    return kinds & seen & tokens.has_previous[:, None, None, :]


def by_lag(maps: Tensor) -> Tensor:
    """Attention (..., L, L) by query t and lag t - j instead of token j; 0 for lags beyond the context."""
    length = maps.shape[-1]
    step = torch.arange(length, device=maps.device)
    lag = step[:, None] - step
    return maps.gather(-1, lag.clamp(min=0).expand(maps.shape)) * (lag >= 0)


def lag_hazard(lags: Tensor) -> Tensor:
    """(..., L): the fraction of the attention on lags up to m that is on m; from sums (..., L, L) by lag.

    ``lags`` (query t, lag) are sums over contexts. A head whose attention depends on the lag alone gives lag
    m at query t the weight f(m) / (f(0) + ... + f(t)). Since query t has no lags beyond t, averages over t do
    not estimate f; its maximum-likelihood estimate is the product-limit one for right-truncated data
    (Lynden-Bell 1971, section 3), a product of these fractions. It gives each lag the same total attention as
    the head.
    """
    mass = lags.double()
    at = mass.sum(dim=-2)
    below = mass.cumsum(dim=-1).tril().sum(dim=-2)
    # Row t of the cumulative sums holds, at lag m <= t, the attention of query t on lags up to m.
    return torch.where(below > 0, at / below.clamp(min=1e-300), 0.0).clamp(max=1.0)


def matched_attention(hazard: Tensor) -> Tensor:
    """(..., L, L): attention of query t on token j that depends on t - j alone; from ``lag_hazard`` (..., L).

    The weight of lag m at query t is hazard(m) times (1 - hazard) of the lags m + 1 to t.
    """
    length = hazard.shape[-1]
    step = torch.arange(length, device=hazard.device)
    left = torch.log1p(-hazard.clamp(max=1 - 1e-15)).cumsum(dim=-1)
    lag = step[:, None] - step
    m = lag.clamp(min=0)
    weight = hazard[..., m] * torch.exp(left[..., :, None] - left[..., m]) * (lag >= 0)
    return weight / weight.sum(dim=-1, keepdim=True)


def ratio_interval(
    above: AnyArray, below: AnyArray, *, n: int = 2000, seed: int = 0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Ratio of sums over B windows, and its 95 % percentile interval from resampling whole windows.

    ``above`` and ``below`` (B, ...) give (...) each; NaN where the sum below is 0. Windows are assumed to be
    independent, queries of one window are not.
    """
    count = len(above)
    draws = rng(seed, "bootstrap of windows").multinomial(count, np.full(count, 1 / count), size=n)
    shape = above.shape[1:]
    top, bottom = above.reshape(count, -1), below.reshape(count, -1)
    whole = divided(top.sum(axis=0), bottom.sum(axis=0)).reshape(shape)
    each = divided(draws @ top, draws @ bottom)
    ends = np.full((2, each.shape[1]), np.nan)
    known = np.isfinite(each).any(axis=0)
    ends[:, known] = np.nanquantile(each[:, known], [0.025, 0.975], axis=0)
    return whole, ends[0].reshape(shape), ends[1].reshape(shape)
