"""Compiled kernels for training models on CPUs: causal attention with rotary positions, and gelu.

Attention follows Dao et al. 2022: scores are never stored as a whole, the backward pass computes them again
from the logarithm of each query's sum. Only the causal half is computed, in blocks of queries; of keys that
no query of a block may see, nothing is computed. Heads are small (16 to 32 numbers) and contexts long, so
arrays are laid out such that the long side is contiguous wherever it can be: a vector holds queries in the
forward pass, keys in the backward pass.

Everything is added up in an order that depends on the shapes alone, never on where arrays lie in memory, so
that the same inputs give the same bits.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from compressed_ad.models.vector_code import (
    COLUMNS,
    INTEGERS,
    ROWS,
    WIDTH,
    compiled,
    constant,
    emit_exp,
    emitted,
    integers,
    load,
    make_gelu,
    make_tile,
    number,
    padded,
    spread,
    store,
)

BLOCK = 32
"""Queries in a block of the backward pass; lengths are padded to a multiple."""

_compile = compiled()
_F = np.float32


# ---------------------------------------------------------------------------------------------------------
# Vector code


_product = make_tile(2, add=False)
_narrow_product = make_tile(1, add=False)
_add_product = make_tile(2, add=True)


@emitted()
def _softmax_columns(builder, x, free, n, first, place, until, log_sums):
    """x (n, COLUMNS) = exp(x - its largest) for each column; the numbers after ``n`` rows are 1 / their sums.

    Column c is query ``first`` + c. It counts the rows r with ``place[r]`` <= ``first`` + c <= ``until[r]``
    only, which the first ``free`` rows are for all columns; the others become 0. Fills ``log_sums``
    (COLUMNS,): the logarithm of the sum before the largest was taken off.
    """
    log = builder.module.declare_intrinsic("llvm.log", [ir.FloatType()])
    begin = spread(builder, builder.trunc(first, ir.IntType(32)), INTEGERS)
    for v in range(COLUMNS // WIDTH):
        lanes = integers([v * WIDTH + i for i in range(WIDTH)])

        def at(row, v=v):
            return x(builder.add(builder.mul(row, number(COLUMNS)), number(v * WIDTH)))

        query = builder.add(begin, lanes)

        def counts(row, query=query):
            from_, to = (spread(builder, builder.load(array(row)), INTEGERS) for array in (place, until))
            seen = builder.icmp_signed(">=", query, from_)
            return builder.and_(seen, builder.icmp_signed("<=", query, to))

        top = cgutils.alloca_once_value(builder, constant(-3e38))
        total = cgutils.alloca_once_value(builder, constant(0.0))
        for start, stop, masked in ((number(0), free, False), (free, n, True)):
            with cgutils.for_range(builder, stop, start=start) as loop:
                value, best = load(builder, at(loop.index)), builder.load(top)
                if masked:
                    value = builder.select(counts(loop.index), value, constant(-3e38))
                builder.store(builder.select(builder.fcmp_ordered(">", value, best), value, best), top)
        shift = builder.load(top)
        for start, stop, masked in ((number(0), free, False), (free, n, True)):
            with cgutils.for_range(builder, stop, start=start) as loop:
                y = emit_exp(builder, builder.fsub(load(builder, at(loop.index)), shift))
                if masked:
                    y = builder.select(counts(loop.index), y, constant(0.0))
                store(builder, y, at(loop.index))
                builder.store(builder.fadd(y, builder.load(total)), total)
        whole = builder.load(total)
        store(builder, builder.fdiv(constant(1.0), whole), at(n))
        for i in range(WIDTH):
            found = builder.call(log, [builder.extract_element(whole, number(i))])
            found = builder.fadd(found, builder.extract_element(shift, number(i)))
            builder.store(found, log_sums(number(v * WIDTH + i)))


@emitted(log_sum=types.float32, mean=types.float32)
def _softmax_backward(builder, x, dx, at, n, query, place, until, log_sum, mean):
    """x = exp(x - log_sum) and dx = x (dx - mean) on [at : at + n], n a multiple of WIDTH.

    Both are 0 for the keys c, from ``at`` on, without ``place[c]`` <= ``query`` <= ``until[c]``.
    """
    log_sum, mean, none = spread(builder, log_sum), spread(builder, mean), constant(0.0)
    query = spread(builder, builder.trunc(query, ir.IntType(32)), INTEGERS)
    with cgutils.for_range(builder, builder.sdiv(n, number(WIDTH))) as loop:
        key = builder.mul(loop.index, number(WIDTH))
        from_, to = (load(builder, array(key), INTEGERS) for array in (place, until))
        seen = builder.icmp_signed(">=", query, from_)
        seen = builder.and_(seen, builder.icmp_signed("<=", query, to))
        to_x = builder.add(at, key)
        y = emit_exp(builder, builder.fsub(load(builder, x(to_x)), log_sum))
        slope = builder.fmul(y, builder.fsub(load(builder, dx(to_x)), mean))
        store(builder, builder.select(seen, y, none), x(to_x))
        store(builder, builder.select(seen, slope, none), dx(to_x))


_gelu, _gelu_backward = make_gelu(backward=False), make_gelu(backward=True)


# ---------------------------------------------------------------------------------------------------------
# Attention


@_compile
def _take(qkv, which, b, h, scale, cos, sin, rows, deep, columns, wide):
    """Queries (0), keys (1) or values (2) of a head, flat: ``rows`` (., deep) and ``columns`` (., wide).

    Queries and keys are rotated (Su et al. 2021) and scaled. The last of an odd number has no other to turn
    with.
    """
    length, dim = qkv.shape[1], qkv.shape[4]
    half = dim // 2
    for i in range(length):
        if which < 2:
            for d in range(half):
                x, y = qkv[b, i, which, h, d], qkv[b, i, which, h, d + half]
                rows[i * deep + d] = (x * cos[i, d] - y * sin[i, d]) * scale
                rows[i * deep + d + half] = (y * cos[i, d] + x * sin[i, d]) * scale
            if dim % 2:
                rows[i * deep + dim - 1] = qkv[b, i, which, h, dim - 1] * scale
        else:
            for d in range(dim):
                rows[i * deep + d] = qkv[b, i, which, h, d]
    for d in range(dim):
        for i in range(length):
            columns[d * wide + i] = rows[i * deep + d]


@_compile
def _give_back(grad, which, b, h, scale, cos, sin, of, row, column):
    """The gradient of ``_take`` from that of its rows, number d of row i at ``of[i * row + d * column]``."""
    length, dim = grad.shape[1], grad.shape[4]
    half = dim // 2
    for i in range(length):
        if which < 2:
            for d in range(half):
                x, y = of[i * row + d * column] * scale, of[i * row + (d + half) * column] * scale
                grad[b, i, which, h, d] = x * cos[i, d] + y * sin[i, d]
                grad[b, i, which, h, d + half] = y * cos[i, d] - x * sin[i, d]
            if dim % 2:
                grad[b, i, which, h, dim - 1] = of[i * row + (dim - 1) * column] * scale
        else:
            for d in range(dim):
                grad[b, i, which, h, d] = of[i * row + d * column]


@_compile
def _dot(a, b):
    total = _F(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@_compile
def _live(until, block, n, keys, place, last):
    """How many of the keys j < ``n`` some query from ``block`` on may see; they come first in ``keys``.

    Fills ``place`` and ``last`` (n,), the first and last query that may see each; keys beyond the context's
    end are seen by queries beyond it only.
    """
    count, length = 0, len(until)
    for j in range(n):
        end = until[j] if j < length else np.int32(2**31 - 1)
        if end >= block:
            keys[count], place[count], last[count] = j, j, end
            count += 1
    return count


@_compile
def _all_stay(until, place, last):
    """Whether no token of the context leaves; then fills ``place`` and ``last`` for all its blocks."""
    for j in range(len(until)):
        if until[j] < len(until) - 1:
            return False
    for j in range(len(place)):
        place[j], last[j] = j, 2**31 - 1
    return True


@_compile
def _hide(place, first, last):
    """No query sees the keys ``first`` <= c < ``last``, which only fill up a tile."""
    place[first:last] = 2**31 - 1


@_compile
def attention(qkv, cos, sin, until, scale, out, log_sums, first, last):
    """Causal attention of the heads ``first`` <= b H + h < ``last`` of ``qkv`` (B, L, 3, H, D).

    ``cos`` and ``sin`` (L, D / 2) rotate queries and keys. Query i sees the keys j <= i with i <= ``until``
    (B, L) int32 of j. Fills ``out`` (B, L, H, D) and ``log_sums`` (B, H, L). All others are float32.
    """
    length, n_head, dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    wide, deep = padded(length, COLUMNS), padded(dim, COLUMNS)
    k, v, rows = np.zeros(wide * deep, _F), np.zeros(wide * deep, _F), np.zeros(wide * deep, _F)
    some_k, some_v = np.zeros(wide * deep, _F), np.zeros(wide * deep, _F)
    q, columns = np.zeros(deep * wide, _F), np.zeros(deep * wide, _F)
    p, o, sums = np.zeros((wide + 1) * COLUMNS, _F), np.zeros(deep * COLUMNS, _F), np.zeros(COLUMNS, _F)
    keys, place, to = np.zeros(wide, np.int32), np.zeros(wide, np.int32), np.zeros(wide, np.int32)
    for unit in range(first, last):
        b, h = unit // n_head, unit % n_head
        _take(qkv, 0, b, h, scale, cos, sin, rows, deep, q, wide)
        _take(qkv, 1, b, h, _F(1), cos, sin, k, deep, columns, wide)
        _take(qkv, 2, b, h, _F(1), cos, sin, v, deep, columns, wide)
        causal = _all_stay(until[b], place, to)
        for i in range(0, length, COLUMNS):  # a column is a query, a row a key
            seen_k, seen_v, n = k, v, i + COLUMNS
            count = n if causal else _live(until[b], i, n, keys, place, to)
            if count < n:
                n = padded(count, ROWS)
                _hide(place, count, n)
                seen_k, seen_v = some_k, some_v
                for c in range(count):
                    at, of = c * deep, keys[c] * deep
                    seen_k[at : at + dim], seen_v[at : at + dim] = k[of : of + dim], v[of : of + dim]
            for j in range(0, n, ROWS):
                _product(p, j * COLUMNS, COLUMNS, seen_k, j * deep, deep, 1, q, i, wide, dim)
            _softmax_columns(p, i if causal else 0, n, i, place, to, sums)
            for d in range(0, padded(dim, ROWS), ROWS):
                _product(o, d * COLUMNS, COLUMNS, seen_v, d, 1, deep, p, 0, COLUMNS, n)
            for c in range(min(COLUMNS, length - i)):
                log_sums[b, h, i + c] = sums[c]
                for d in range(dim):
                    out[b, i + c, h, d] = o[d * COLUMNS + c] * p[n * COLUMNS + c]


@_compile
def attention_backward(qkv, cos, sin, until, scale, out, log_sums, dout, grad, first, last):
    """The gradient ``grad`` (B, L, 3, H, D) with respect to ``qkv`` from that of ``out``, ``dout``."""
    length, n_head, dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    wide, deep = padded(length, BLOCK), padded(dim, COLUMNS)
    narrow = padded(dim, WIDTH)
    q, k, v = np.zeros(wide * deep, _F), np.zeros(wide * deep, _F), np.zeros(wide * deep, _F)
    do, dq, some_k = np.zeros(wide * deep, _F), np.zeros(wide * deep, _F), np.zeros(wide * deep, _F)
    k_columns, v_columns, unused = (
        np.zeros(deep * wide, _F),
        np.zeros(deep * wide, _F),
        np.zeros(deep * wide, _F),
    )
    dk, dv = np.zeros(deep * wide, _F), np.zeros(deep * wide, _F)  # by column
    some_k_columns, some_v_columns = np.zeros(deep * wide, _F), np.zeros(deep * wide, _F)
    some_dk, some_dv = np.zeros(deep * wide, _F), np.zeros(deep * wide, _F)
    p, dp = np.zeros(BLOCK * wide, _F), np.zeros(BLOCK * wide, _F)
    keys, place, to = np.zeros(wide, np.int32), np.zeros(wide, np.int32), np.zeros(wide, np.int32)
    for unit in range(first, last):
        b, h = unit // n_head, unit % n_head
        _take(qkv, 0, b, h, scale, cos, sin, q, deep, unused, wide)
        _take(qkv, 1, b, h, _F(1), cos, sin, k, deep, k_columns, wide)
        _take(qkv, 2, b, h, _F(1), cos, sin, v, deep, v_columns, wide)
        for i in range(length):
            for d in range(dim):
                do[i * deep + d] = dout[b, i, h, d]
        dk[:] = 0
        dv[:] = 0
        causal = _all_stay(until[b], place, to)
        for block in range(0, length, BLOCK):  # a row is a query, a column a key
            n = block + BLOCK
            seen_k, seen_k_columns, seen_v_columns, seen_dk, seen_dv = k, k_columns, v_columns, dk, dv
            count = n if causal else _live(until[b], block, n, keys, place, to)
            all_live = count == n
            if not all_live:
                n = padded(count, COLUMNS)
                _hide(place, count, n)
                seen_k, seen_k_columns, seen_v_columns = some_k, some_k_columns, some_v_columns
                seen_dk, seen_dv = some_dk, some_dv
                for c in range(count):
                    at, of = c * deep, keys[c] * deep
                    seen_k[at : at + dim] = k[of : of + dim]
                for d in range(dim):
                    for c in range(count):
                        seen_k_columns[d * wide + c] = k_columns[d * wide + keys[c]]
                        seen_v_columns[d * wide + c] = v_columns[d * wide + keys[c]]
                for d in range(padded(dim, ROWS)):
                    seen_dk[d * wide : d * wide + n] = 0
                    seen_dv[d * wide : d * wide + n] = 0
            for r in range(0, BLOCK, ROWS):
                for j in range(0, padded(block + r + ROWS, COLUMNS) if all_live else n, COLUMNS):
                    at, of = r * wide + j, (block + r) * deep
                    _product(p, at, wide, q, of, deep, 1, seen_k_columns, j, wide, dim)
                    _product(dp, at, wide, do, of, deep, 1, seen_v_columns, j, wide, dim)
            for r in range(BLOCK):
                row, at, end = block + r, r * wide, 0
                if row < length:
                    mean = _dot(dout[b, row, h], out[b, row, h])
                    end = padded(row + 1, WIDTH) if all_live else n
                    _softmax_backward(p, dp, at, end, row, place, to, log_sums[b, h, row], mean)
                for j in range(at + end, at + n):
                    p[j] = _F(0)
                    dp[j] = _F(0)
            for r in range(0, BLOCK, ROWS):
                at = (block + r) * deep
                for d in range(0, narrow - WIDTH, COLUMNS):
                    _product(dq, at + d, deep, dp, r * wide, wide, 1, seen_k, d, deep, n)
                if narrow % COLUMNS:
                    d = narrow - WIDTH
                    _narrow_product(dq, at + d, deep, dp, r * wide, wide, 1, seen_k, d, deep, n)
            for j in range(0, n, COLUMNS):
                for d in range(0, padded(dim, ROWS), ROWS):
                    at, of = d * wide + j, block * deep + d
                    _add_product(seen_dk, at, wide, q, of, 1, deep, dp, j, wide, BLOCK)
                    _add_product(seen_dv, at, wide, do, of, 1, deep, p, j, wide, BLOCK)
            if not all_live:
                for d in range(dim):
                    for c in range(count):
                        dk[d * wide + keys[c]] += some_dk[d * wide + c]
                        dv[d * wide + keys[c]] += some_dv[d * wide + c]
        _give_back(grad, 0, b, h, scale, cos, sin, dq, deep, 1)
        _give_back(grad, 1, b, h, _F(1), cos, sin, dk, 1, wide)
        _give_back(grad, 2, b, h, _F(1), cos, sin, dv, 1, wide)


# ---------------------------------------------------------------------------------------------------------
# Gelu


@_compile
def gelu(x, y):
    """Gelu, in its form with tanh, of flat float32 ``x`` into ``y``."""
    n = len(x) // WIDTH * WIDTH
    _gelu(x, x, y, n)
    if n < len(x):
        tail = np.zeros(WIDTH, _F)
        tail[: len(x) - n] = x[n:]
        _gelu(tail, tail, tail, WIDTH)
        y[n:] = tail[: len(x) - n]


@_compile
def gelu_backward(x, dy, dx):
    """The gradient ``dx`` of ``gelu`` at ``x`` from that of its result, ``dy``."""
    n = len(x) // WIDTH * WIDTH
    _gelu_backward(x, dy, dx, n)
    if n < len(x):
        tail, slope = np.zeros(WIDTH, _F), np.zeros(WIDTH, _F)
        tail[: len(x) - n], slope[: len(x) - n] = x[n:], dy[n:]
        _gelu_backward(tail, slope, tail, WIDTH)
        dx[n:] = tail[: len(x) - n]
