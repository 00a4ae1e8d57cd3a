"""What compiled kernels do for models on CPUs: attention and gelu in training, embedding and steps in play.

They replace some dozen passes over memory of PyTorch's, and are the same functions up to rounding. Attention
and gelu have gradients, what plays has none. Whatever they cannot do stays PyTorch's: see ``usable``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def usable(x: Tensor) -> bool:
    """Whether compiled kernels can take ``x``: float32 on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def attention(qkv: Tensor, rotation: tuple[Tensor, Tensor] | None, until: Tensor | None = None) -> Tensor:
    """Causal attention (B, L, H, D) of ``qkv`` (B, L, 3, H, D), all float32.

    Queries and keys are turned by ``rotation``, cosine and sine (L, D / 2), as by ``transformer.rotate``.
    ``until`` (B, L) is the last query that may see each token; None: all later ones.
    """
    if rotation is None:
        cos = qkv.new_ones((qkv.shape[1], qkv.shape[-1] // 2))
        rotation = cos, torch.zeros_like(cos)
    if until is None:
        until = qkv.new_full(qkv.shape[:2], qkv.shape[1], dtype=torch.int32)
    return _Attention.apply(qkv, *rotation, until.int())  # type: ignore[no-untyped-call, no-any-return]


def gelu(x: Tensor) -> Tensor:
    """``torch.nn.functional.gelu(x, approximate="tanh")`` of float32 ``x``."""
    return _Gelu.apply(x)  # type: ignore[no-untyped-call, no-any-return]


Weights = tuple[Any, ...]
"""The weights of a block, in the order in which ``playing_kernels.block_step`` takes them."""


def weights_of(block: Any) -> Weights | None:
    """Those of a ``transformer.Block``, in the memory of its parameters; None if its steps are PyTorch's."""
    attention = block.attention
    found = (
        *(block.norm_attention.weight, attention.qkv.weight, attention.out.weight),
        *(block.norm_mlp.weight, block.up.weight, block.down.weight),
    )
    fit = all(usable(one) and one.is_contiguous() for one in found)
    if not (block.kernels and fit) or attention.mark_bias is not None:
        return None
    return *_arrays(*found), np.float32(block.norm_mlp.eps)


def steps(
    weights: Sequence[Weights],
    x: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    memory: tuple[Tensor, Tensor],
    place: tuple[Tensor, Tensor],
    dead: Tensor | None = None,
    *,
    store_only: bool = False,
) -> Tensor:
    """What blocks make of x (A, L, D), the next L tokens of each of A contexts, without gradients.

    ``memory`` has the keys and values (layer, B, H, T, D / H) of contexts; those of x become the entries
    (A, L) of the contexts (A, L) that ``place`` names. ``rotation``, cosine and sine (A, L, D / H / 2), turns
    keys and queries. ``dead`` (B, T) entries are not seen. With ``store_only``, the last block only stores.
    ``IndexError`` if there is no such entry.
    """
    from compressed_ad.models import playing_kernels as kernels
    from compressed_ad.models.vector_code import COLUMNS

    (_, length, width), n = x.shape, x[..., 0].numel()
    y = np.array(x.detach().numpy().reshape(n, width))
    none = np.empty((n, 0), np.float32)
    turned = (none, none) if rotation is None else [r.numpy().reshape(n, -1) for r in rotation]
    hidden = none.astype(bool) if dead is None else dead.numpy()
    given = [np.ascontiguousarray(a) for a in (*turned, *(p.numpy().reshape(n) for p in place), hidden)]
    cos, sin, row, entry, hidden = given
    _, n_row, _, room, _ = memory[0].shape
    for name, index, size in (("context", row, n_row), ("entry", entry, room)):
        if n and not 0 <= index.min() <= index.max() < size:
            raise IndexError(f"of {size}, there is no {name} {index.min()} or {index.max()} in the cache")
    # The tokens of a context belong together; fewer than eight groups of others are not worth a thread.
    each = length if length > 1 else 8 * COLUMNS
    for layer, weight in enumerate(weights):
        key, value = (one[layer].numpy() for one in memory)
        stops = store_only and layer == len(weights) - 1

        def work(
            first: int, last: int, of: Weights = (*weight, cos, sin, key, value), stops: bool = stops
        ) -> None:
            kernels.block_step(y, *of, row, entry, hidden, stops, first * each, min(last * each, n))

        _of_heads(-(-n // each), work)
    return torch.from_numpy(y).view_as(x)


def embed(
    codes: Sequence[Tensor],
    flags: Sequence[Tensor],
    marks: Sequence[Tensor],
    last_shown: bool,
    tables: Sequence[Tensor],
    vectors: Tensor,
) -> Tensor | None:
    """Embedded tokens (B, L, D), without gradients; None if a code is not in its table.

    ``codes`` (B, L, C) of state, action and next state; ``flags`` (B, L): scaled reward, end, and whether
    there is a step before; ``marks`` (B, L) say where each stands. For the others, see
    ``playing_kernels.embed``.
    """
    from compressed_ad.models import playing_kernels as kernels

    x = vectors.new_empty((*codes[0].shape[:2], vectors.shape[1]))
    n = x[..., 0].numel()
    rows = [np.ascontiguousarray(code.numpy().reshape(n, -1)) for code in codes]
    each = [np.ascontiguousarray(flag.numpy().reshape(n)) for flag in flags]
    stand = torch.stack([*marks], dim=-1).numpy().reshape(n, -1) if marks else np.empty((n, 0), bool)
    known = kernels.embed(*rows, *each, stand, last_shown, *_arrays(*tables, vectors, x.view(n, -1)))
    return x if known else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, until: Tensor) -> Tensor:
        from compressed_ad.models import training_kernels as kernels

        batch, length, _, n_head, width = qkv.shape
        qkv, cos, sin, until = (x.contiguous() for x in (qkv, cos, sin, until))
        out = qkv.new_empty((batch, length, n_head, width))
        log_sums = qkv.new_empty((batch, n_head, length))
        ctx.save_for_backward(qkv, cos, sin, until, out, log_sums)
        given = (*_arrays(qkv, cos, sin, until), np.float32(width**-0.5), *_arrays(out, log_sums))
        _of_heads(batch * n_head, lambda first, last: kernels.attention(*given, first, last))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None, None]:
        from compressed_ad.models import training_kernels as kernels

        qkv, cos, sin, until, out, log_sums = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        rest = _arrays(out, log_sums, given[0].contiguous(), grad)
        known = (*_arrays(qkv, cos, sin, until), np.float32(qkv.shape[-1] ** -0.5), *rest)
        _of_heads(
            log_sums[..., 0].numel(), lambda first, last: kernels.attention_backward(*known, first, last)
        )
        return grad, None, None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from compressed_ad.models import training_kernels as kernels

        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        kernels.gelu(*_arrays(x.view(-1), y.view(-1)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> Tensor:
        from compressed_ad.models import training_kernels as kernels

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        kernels.gelu_backward(*_arrays(x.view(-1), given[0].contiguous().view(-1), dx.view(-1)))
        return dx


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


def _of_heads(n: int, work: Callable[[int, int], None]) -> None:
    """``work(first, last)`` on shares of ``n`` heads, in as many threads as PyTorch uses."""
    n_thread = min(torch.get_num_threads(), n)
    if n_thread <= 1:
        return work(0, n)
    cuts = [n * k // n_thread for k in range(n_thread + 1)]
    with ThreadPoolExecutor(n_thread) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))
    return None
