"""Compiled kernels of models on CPUs: causal attention with rotary positions, gelu, and a step of playing.

Attention in training follows Dao et al. 2022: scores are never stored as a whole, the backward pass computes
them again from the logarithm of each query's sum. Only the causal half is computed, in blocks of queries; of
keys that no query of a block may see, nothing is computed. Heads are small (16 to 32 numbers) and contexts
long, so arrays are laid out such that the long side is contiguous wherever it can be: a vector holds queries
in the forward pass, keys in the backward pass.

A step of playing takes a token of each context through a block, and a refill all tokens of a few contexts:
``block_step``. In its products a vector holds a number of many tokens, so weights are used as they lie.

Everything is added up in an order that depends on the shapes alone, never on where arrays lie in memory, so
that the same inputs give the same bits.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from compressed_ad.models.vector_code import (
    INTEGERS,
    WIDTH,
    compiled,
    constant,
    emit_exp,
    emit_fma,
    emit_products,
    integers,
    load,
    number,
    pointers,
    shuffled,
    spread,
    store,
)

ROWS = 8 if WIDTH == 16 else 4
COLUMNS = 2 * WIDTH
"""A product is computed in tiles of ``ROWS`` x ``COLUMNS``."""
BLOCK = 32
"""Queries in a block of the backward pass; lengths are padded to a multiple."""

_compile = compiled()
_F = np.float32


# ---------------------------------------------------------------------------------------------------------
# Vector code


def _make_tile(vectors: int, add: bool, rows: int = ROWS) -> Any:
    """C[0:rows, 0:vectors WIDTH] = sum_k A[., k] B[k, .], k < n, or C += it; by offsets and strides."""

    def tile(typingctx, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, n):
        i64 = types.int64
        sig = types.void(c, i64, i64, a, i64, i64, i64, b, i64, i64, i64)

        def codegen(context, builder, signature, args):
            _, c_at, c_row, _, a_at, a_row, a_k, _, b_at, b_k, n = args
            c, a, b = pointers(context, builder, signature, args)
            plus, times = builder.add, builder.mul
            to = {
                (r, v): c(plus(c_at, plus(times(c_row, number(r)), number(v * WIDTH))))
                for r in range(rows)
                for v in range(vectors)
            }
            begin = {place: load(builder, at) if add else constant(0.0) for place, at in to.items()}
            sums = emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n)
            for place, value in sums.items():
                store(builder, value, to[place])
            return context.get_dummy_value()

        return sig, codegen

    return intrinsic(tile)


_product = _make_tile(2, add=False)
_narrow_product = _make_tile(1, add=False)
_add_product = _make_tile(2, add=True)
_one_row, _narrow_row = _make_tile(2, add=False, rows=1), _make_tile(1, add=False, rows=1)


@intrinsic
def _softmax_columns(typingctx, x, free, n, first, place, until, log_sums):
    """x (n, COLUMNS) = exp(x - its largest) for each column; the numbers after ``n`` rows are 1 / their sums.

    Column c is query ``first`` + c. It counts the rows r with ``place[r]`` <= ``first`` + c <= ``until[r]``
    only, which the first ``free`` rows are for all columns; the others become 0. Fills ``log_sums``
    (COLUMNS,): the logarithm of the sum before the largest was taken off.
    """
    i64 = types.int64
    sig = types.void(x, i64, i64, i64, place, until, log_sums)

    def codegen(context, builder, signature, args):
        _, free, n, first, _, _, _ = args
        x, place_of, until_of, log_sums = pointers(context, builder, signature, args)
        log = builder.module.declare_intrinsic("llvm.log", [ir.FloatType()])
        begin = spread(builder, builder.trunc(first, ir.IntType(32)), INTEGERS)
        for v in range(COLUMNS // WIDTH):
            lanes = integers([v * WIDTH + i for i in range(WIDTH)])

            def place(row, v=v):
                return x(builder.add(builder.mul(row, number(COLUMNS)), number(v * WIDTH)))

            query = builder.add(begin, lanes)

            def counts(row, query=query):
                from_, to = (
                    spread(builder, builder.load(array(row)), INTEGERS) for array in (place_of, until_of)
                )
                seen = builder.icmp_signed(">=", query, from_)
                return builder.and_(seen, builder.icmp_signed("<=", query, to))

            top = cgutils.alloca_once_value(builder, constant(-3e38))
            total = cgutils.alloca_once_value(builder, constant(0.0))
            for start, stop, masked in ((number(0), free, False), (free, n, True)):
                with cgutils.for_range(builder, stop, start=start) as loop:
                    value, best = load(builder, place(loop.index)), builder.load(top)
                    if masked:
                        value = builder.select(counts(loop.index), value, constant(-3e38))
                    builder.store(builder.select(builder.fcmp_ordered(">", value, best), value, best), top)
            shift = builder.load(top)
            for start, stop, masked in ((number(0), free, False), (free, n, True)):
                with cgutils.for_range(builder, stop, start=start) as loop:
                    y = emit_exp(builder, builder.fsub(load(builder, place(loop.index)), shift))
                    if masked:
                        y = builder.select(counts(loop.index), y, constant(0.0))
                    store(builder, y, place(loop.index))
                    builder.store(builder.fadd(y, builder.load(total)), total)
            whole = builder.load(total)
            store(builder, builder.fdiv(constant(1.0), whole), place(n))
            for i in range(WIDTH):
                found = builder.call(log, [builder.extract_element(whole, number(i))])
                found = builder.fadd(found, builder.extract_element(shift, number(i)))
                builder.store(found, log_sums(number(v * WIDTH + i)))
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _softmax_backward(typingctx, x, dx, at, n, query, place, until, log_sum, mean):
    """x = exp(x - log_sum) and dx = x (dx - mean) on [at : at + n], n a multiple of WIDTH.

    Both are 0 for the keys c, from ``at`` on, without ``place[c]`` <= ``query`` <= ``until[c]``.
    """
    i64, f32 = types.int64, types.float32
    sig = types.void(x, dx, i64, i64, i64, place, until, f32, f32)

    def codegen(context, builder, signature, args):
        _, _, at, n, query, _, _, log_sum, mean = args
        x, dx, place_of, until_of = pointers(context, builder, signature, args)
        log_sum, mean, none = spread(builder, log_sum), spread(builder, mean), constant(0.0)
        query = spread(builder, builder.trunc(query, ir.IntType(32)), INTEGERS)
        with cgutils.for_range(builder, builder.sdiv(n, number(WIDTH))) as loop:
            key = builder.mul(loop.index, number(WIDTH))
            from_, to = (load(builder, array(key), INTEGERS) for array in (place_of, until_of))
            seen = builder.icmp_signed(">=", query, from_)
            seen = builder.and_(seen, builder.icmp_signed("<=", query, to))
            to_x = builder.add(at, key)
            y = emit_exp(builder, builder.fsub(load(builder, x(to_x)), log_sum))
            slope = builder.fmul(y, builder.fsub(load(builder, dx(to_x)), mean))
            store(builder, builder.select(seen, y, none), x(to_x))
            store(builder, builder.select(seen, slope, none), dx(to_x))
        return context.get_dummy_value()

    return sig, codegen


def _make_gelu(backward: bool) -> Any:
    """y = gelu(x) on [0 : n], or y = gelu'(x) dy; n a multiple of WIDTH.

    gelu(x) = x s, s = 1 / (1 + e), e = exp(-u), u = 2 sqrt(2 / pi) (x + .044715 x^3): the form with tanh of
    Hendrycks & Gimpel 2016. Its derivative is s + x u' e s^2.
    """

    def gelu(typingctx, x, dy, y, n):
        sig = types.void(x, dy, y, types.int64)

        def codegen(context, builder, signature, args):
            x, dy, y = pointers(context, builder, signature, args)
            slope, cube, high = 2 * math.sqrt(2 / math.pi), 0.044715, constant(88.0)
            with cgutils.for_range(builder, builder.sdiv(args[3], number(WIDTH))) as loop:
                at = builder.mul(loop.index, number(WIDTH))
                value = load(builder, x(at))
                square = builder.fmul(value, value)
                inner = emit_fma(builder, square, constant(-slope * cube), constant(-slope))
                power = builder.fmul(value, inner)
                power = builder.select(builder.fcmp_unordered("<", power, high), power, high)
                e = emit_exp(builder, power)
                s = builder.fdiv(constant(1.0), builder.fadd(e, constant(1.0)))
                if backward:
                    du = emit_fma(builder, square, constant(3 * slope * cube), constant(slope))
                    rest = builder.fmul(builder.fmul(value, du), builder.fmul(builder.fmul(e, s), s))
                    result = builder.fmul(load(builder, dy(at)), builder.fadd(s, rest))
                else:
                    result = builder.fmul(value, s)
                store(builder, result, y(at))
            return context.get_dummy_value()

        return sig, codegen

    return intrinsic(gelu)


_gelu, _gelu_backward = _make_gelu(backward=False), _make_gelu(backward=True)


def _emit_across(builder, combine, vector):
    """What ``combine`` makes of all numbers of a vector, in each of its places."""
    step = WIDTH // 2
    while step:
        vector = combine(vector, shuffled(builder, vector, vector, [i ^ step for i in range(WIDTH)]))
        step //= 2
    return vector


def _emit_groups(builder, n):
    """How many vectors hold ``n`` numbers."""
    return builder.sdiv(builder.add(n, number(WIDTH - 1)), number(WIDTH))


def _emit_prefetch(builder, pointer):
    """Begin to read what is at ``pointer``, once and not to be kept; it need not be in an array."""
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, once, data = i32(0), i32(0), i32(1)
    builder.call(fetch, [builder.bitcast(pointer, byte), read, once, data])


def _emit_below(builder, at, n):
    """Which numbers of the vector at ``at`` are among the first ``n``."""
    left = spread(builder, builder.trunc(builder.sub(n, at), ir.IntType(32)), INTEGERS)
    return builder.icmp_signed("<", integers(list(range(WIDTH))), left)


@intrinsic
def _scores(typingctx, p, q, key, at, dim, n, soon, soon_at):
    """p[t] = sum_d q[d] key[at + t dim + d], d < ``dim``, t < n; what follows in p is of no use.

    All three are read, or filled, to the next multiple of WIDTH. Meanwhile, as many numbers are fetched from
    ``soon[soon_at]`` on: where contexts are many, memory is too far away to wait for it at each key.
    """
    i64 = types.int64
    sig = types.void(p, q, key, i64, i64, i64, soon, i64)

    def codegen(context, builder, signature, args):
        _, _, _, at, dim, n, _, soon_at = args
        p, q, key, soon = pointers(context, builder, signature, args)
        add, mul = builder.add, builder.mul
        even, odd = ([2 * i + start for i in range(WIDTH)] for start in (0, 1))
        with cgutils.for_range(builder, _emit_groups(builder, n)) as group:
            begin = mul(group.index, number(WIDTH))
            sums = [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(WIDTH)]
            of, later = add(at, mul(begin, dim)), add(soon_at, mul(begin, dim))
            with cgutils.for_range(builder, _emit_groups(builder, dim)) as part:
                d = mul(part.index, number(WIDTH))
                query, own = load(builder, q(d)), _emit_below(builder, d, dim)
                for t, one in enumerate(sums):
                    _emit_prefetch(builder, soon(add(add(later, d), mul(dim, number(t)))))
                    found = load(builder, key(add(add(of, d), mul(dim, number(t)))))
                    found = builder.select(own, found, constant(0.0))  # not the next key's numbers
                    builder.store(emit_fma(builder, query, found, builder.load(one)), one)
            vectors = [builder.load(one) for one in sums]
            while len(vectors) > 1:  # sums of neighbours, until vector t has become number t
                pairs = zip(vectors[::2], vectors[1::2], strict=True)
                vectors = [
                    builder.fadd(shuffled(builder, a, b, even), shuffled(builder, a, b, odd))
                    for a, b in pairs
                ]
            store(builder, vectors[0], p(begin))
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _softmax_row(typingctx, p, n, masked, hidden, hidden_at):
    """p[t] = exp(p[t] - the largest), t < n, and 0 from there to the next multiple of WIDTH; gives their sum.

    If ``masked``, a t with ``hidden[hidden_at + t]`` does not count and becomes 0.
    """
    sig = types.float32(p, types.int64, types.boolean, hidden, types.int64)

    def codegen(context, builder, signature, args):
        _, n, masked, _, hidden_at = args
        p, hidden = pointers(context, builder, signature, args)
        low, none = constant(-3e38), constant(0.0)
        top, total = (cgutils.alloca_once_value(builder, value) for value in (low, none))
        with builder.if_then(masked), cgutils.for_range(builder, n) as loop:
            there = builder.load(hidden(builder.add(hidden_at, loop.index)))
            with builder.if_then(builder.icmp_signed("!=", there, there.type(0))):
                builder.store(ir.Constant(ir.FloatType(), -3e38), p(loop.index))
        groups = _emit_groups(builder, n)
        with cgutils.for_range(builder, groups) as loop:
            t = builder.mul(loop.index, number(WIDTH))
            value, best = load(builder, p(t)), builder.load(top)
            value = builder.select(_emit_below(builder, t, n), value, low)
            store(builder, value, p(t))
            builder.store(builder.select(builder.fcmp_ordered(">", value, best), value, best), top)

        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        shift = _emit_across(builder, larger, builder.load(top))
        with cgutils.for_range(builder, groups) as loop:
            t = builder.mul(loop.index, number(WIDTH))
            value = load(builder, p(t))
            y = emit_exp(builder, builder.fsub(value, shift))
            y = builder.select(builder.fcmp_unordered(">", value, low), y, none)
            store(builder, y, p(t))
            builder.store(builder.fadd(y, builder.load(total)), total)
        return builder.extract_element(_emit_across(builder, builder.fadd, builder.load(total)), number(0))

    return sig, codegen


@intrinsic
def _add_weighted(typingctx, y, p, value, at, dim, n, soon, soon_at):
    """y[d] += sum_t p[t] value[at + t dim + d], t < n, for d < ``dim``; what follows in y is of no use.

    y is filled, and value read, to the next multiple of WIDTH; for ``soon`` see ``_scores``.
    """
    i64, strands = types.int64, 4  # sums side by side, so that none waits for the last product
    sig = types.void(y, p, value, i64, i64, i64, soon, i64)

    def codegen(context, builder, signature, args):
        _, _, _, at, dim, n, _, soon_at = args
        y, p, value, soon = pointers(context, builder, signature, args)
        add, mul = builder.add, builder.mul
        with cgutils.for_range(builder, _emit_groups(builder, dim)) as part:
            d = mul(part.index, number(WIDTH))
            sums = [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(strands)]

            def take(t, one, d=d):
                _emit_prefetch(builder, soon(add(add(soon_at, d), mul(t, dim))))
                weight = spread(builder, builder.load(p(t)))
                found = load(builder, value(add(add(at, d), mul(t, dim))))
                builder.store(emit_fma(builder, weight, found, builder.load(one)), one)

            whole = builder.sdiv(n, number(strands))
            with cgutils.for_range(builder, whole) as loop:
                for s, one in enumerate(sums):
                    take(add(mul(loop.index, number(strands)), number(s)), one)
            with cgutils.for_range(builder, n, start=mul(whole, number(strands))) as loop:
                take(loop.index, sums[0])
            total = load(builder, y(d))
            for one in sums:
                total = builder.fadd(total, builder.load(one))
            store(builder, total, y(d))
        return context.get_dummy_value()

    return sig, codegen


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
def _padded(n, multiple):
    return (n + multiple - 1) // multiple * multiple


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
    wide, deep = _padded(length, COLUMNS), _padded(dim, COLUMNS)
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
                n = _padded(count, ROWS)
                _hide(place, count, n)
                seen_k, seen_v = some_k, some_v
                for c in range(count):
                    at, of = c * deep, keys[c] * deep
                    seen_k[at : at + dim], seen_v[at : at + dim] = k[of : of + dim], v[of : of + dim]
            for j in range(0, n, ROWS):
                _product(p, j * COLUMNS, COLUMNS, seen_k, j * deep, deep, 1, q, i, wide, dim)
            _softmax_columns(p, i if causal else 0, n, i, place, to, sums)
            for d in range(0, _padded(dim, ROWS), ROWS):
                _product(o, d * COLUMNS, COLUMNS, seen_v, d, 1, deep, p, 0, COLUMNS, n)
            for c in range(min(COLUMNS, length - i)):
                log_sums[b, h, i + c] = sums[c]
                for d in range(dim):
                    out[b, i + c, h, d] = o[d * COLUMNS + c] * p[n * COLUMNS + c]


@_compile
def attention_backward(qkv, cos, sin, until, scale, out, log_sums, dout, grad, first, last):
    """The gradient ``grad`` (B, L, 3, H, D) with respect to ``qkv`` from that of ``out``, ``dout``."""
    length, n_head, dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    wide, deep = _padded(length, BLOCK), _padded(dim, COLUMNS)
    narrow = _padded(dim, WIDTH)
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
                n = _padded(count, COLUMNS)
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
                for d in range(_padded(dim, ROWS)):
                    seen_dk[d * wide : d * wide + n] = 0
                    seen_dv[d * wide : d * wide + n] = 0
            for r in range(0, BLOCK, ROWS):
                for j in range(0, _padded(block + r + ROWS, COLUMNS) if all_live else n, COLUMNS):
                    at, of = r * wide + j, (block + r) * deep
                    _product(p, at, wide, q, of, deep, 1, seen_k_columns, j, wide, dim)
                    _product(dp, at, wide, do, of, deep, 1, seen_v_columns, j, wide, dim)
            for r in range(BLOCK):
                row, at, end = block + r, r * wide, 0
                if row < length:
                    mean = _dot(dout[b, row, h], out[b, row, h])
                    end = _padded(row + 1, WIDTH) if all_live else n
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
                for d in range(0, _padded(dim, ROWS), ROWS):
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


# ---------------------------------------------------------------------------------------------------------
# A step of playing


@_compile
def _add_row(x, row, scale):
    for d in range(len(x)):
        x[d] += scale * row[d]


@_compile
def _add_rows(x, table, codes, scale):
    for code in codes:
        _add_row(x, table[code], scale)


@_compile
def _all_below(codes, end):
    return codes.min() >= 0 and codes.max() < end


@_compile
def embed(
    state, action, next_state, reward, ended, known, marks, last_shown,
    state_table, action_table, rewarded_table, final_table, vectors, x,
):  # fmt: skip
    """Embedded tokens x (N, D) of ``ad.AD``, of codes (N, C) that are rows of tables (K, D).

    ``reward`` (N,) is in units of the model's scale; ``ended``, ``known`` (N,) and ``marks`` (N, M) are bool.
    ``last_shown``: an episode's last action is shown. ``vectors`` (3 + M, D): for the reward, the end, the
    first token, and each mark. States have tables of one size. Gives False, and x is of no use, if a code is
    not in its table.
    """
    x[:] = 0
    for n in range(len(x)):
        there = _all_below(state[n], len(state_table)) and _all_below(next_state[n], len(rewarded_table))
        if not (there and _all_below(action[n], len(action_table))):
            return False
        _add_rows(x[n], state_table, state[n], _F(1))
        for m in range(marks.shape[1]):
            if marks[n, m]:
                _add_row(x[n], vectors[3 + m], _F(1))
        if not known[n]:
            _add_row(x[n], vectors[2], _F(1))
            continue
        if last_shown or not ended[n]:
            _add_rows(x[n], action_table, action[n], _F(1))
        if reward[n] != 0:
            _add_row(x[n], vectors[0], reward[n])
            _add_rows(x[n], rewarded_table, next_state[n], reward[n])
        if ended[n]:
            _add_row(x[n], vectors[1], _F(1))
            _add_rows(x[n], final_table, next_state[n], _F(1))
    return True


@_compile
def _linear(weight, x, y, columns):
    """y = weight x: columns of x (I, COLUMNS), of which the first ``columns`` count, to those of y."""
    n_out, n_in = weight.shape
    whole, few = n_out // ROWS * ROWS, columns <= WIDTH
    for o in range(0, whole, ROWS):
        if few:
            _narrow_product(y, o * COLUMNS, COLUMNS, weight, o * n_in, n_in, 1, x, 0, COLUMNS, n_in)
        else:
            _product(y, o * COLUMNS, COLUMNS, weight, o * n_in, n_in, 1, x, 0, COLUMNS, n_in)
    for o in range(whole, n_out):
        if few:
            _narrow_row(y, o * COLUMNS, COLUMNS, weight, o * n_in, n_in, 1, x, 0, COLUMNS, n_in)
        else:
            _one_row(y, o * COLUMNS, COLUMNS, weight, o * n_in, n_in, 1, x, 0, COLUMNS, n_in)


@_compile
def _layer_norm(x, weight, eps, y):
    """Layer norm of each column of x (D, COLUMNS)."""
    n, mean, spread_ = len(weight), np.zeros(COLUMNS, _F), np.zeros(COLUMNS, _F)
    for d in range(n):
        for c in range(COLUMNS):
            mean[c] += x[d * COLUMNS + c]
    for c in range(COLUMNS):
        mean[c] /= _F(n)
    for d in range(n):
        for c in range(COLUMNS):
            z = x[d * COLUMNS + c] - mean[c]
            spread_[c] += z * z
    for c in range(COLUMNS):
        spread_[c] = _F(1) / np.sqrt(spread_[c] / _F(n) + eps)
    for d in range(n):
        for c in range(COLUMNS):
            y[d * COLUMNS + c] = (x[d * COLUMNS + c] - mean[c]) * spread_[c] * weight[d]


@_compile
def _turn(qkv, at, cos, sin, token, tokens):
    """Rotate a head's queries or keys, from ``qkv[at]`` on, by the angles of ``tokens`` from ``token`` on."""
    half = cos.shape[1]
    for d in range(half):
        i, j = at + d * COLUMNS, at + (d + half) * COLUMNS
        for c in range(tokens):
            x, y, along, across = qkv[i + c], qkv[j + c], cos[token + c, d], sin[token + c, d]
            qkv[i + c], qkv[j + c] = x * along - y * across, y * along + x * across


@_compile
def block_step(
    x, norm_attention, qkv_weight, out_weight, norm_mlp, up_weight, down_weight, eps,
    cos, sin, key, value, row, entry, hidden, store_only, first, last,
):  # fmt: skip
    """Tokens of contexts through a block, x (N, D) in place, in groups of COLUMNS: first <= n < last.

    Weights are those of ``transformer.Block``, (out, in). Queries and keys are turned by ``cos`` and ``sin``
    (N, D / H / 2), or (N, 0): not at all. Key and value of token n become ``entry[n]`` of the context
    ``row[n]`` in ``key`` and ``value`` (B, H, T, D / H). It sees the entries up to there, but not those that
    are ``hidden`` (B, T) or (B, 0); so tokens of a context come one after the other, in the same call.
    With ``store_only``, x stays as it is.
    """
    n_head, room, dim = key.shape[1:]
    width, wide, deep = x.shape[1], down_weight.shape[1], _padded(dim, WIDTH)
    keys, values, unseen = key.reshape(-1), value.reshape(-1), hidden.reshape(-1)
    a, b = np.zeros(width * COLUMNS, _F), np.zeros(width * COLUMNS, _F)
    qkv, h = np.zeros(3 * width * COLUMNS, _F), np.zeros(wide * COLUMNS, _F)
    q, y, p = np.zeros(deep, _F), np.zeros(deep, _F), np.zeros(_padded(room, WIDTH), _F)
    spare_k, spare_v = np.zeros(len(p) * dim + WIDTH, _F), np.zeros(len(p) * dim + WIDTH, _F)
    scale = _F(1 / np.sqrt(dim))
    for token in range(first, last, COLUMNS):
        tokens = min(COLUMNS, last - token)
        for c in range(tokens):
            for d in range(width):
                a[d * COLUMNS + c] = x[token + c, d]
        _layer_norm(a, norm_attention, eps, b)
        _linear(qkv_weight, b, qkv, tokens)
        for part in range(2 * n_head):
            _turn(qkv, part * dim * COLUMNS, cos, sin, token, tokens)
        for c in range(tokens):
            context, n = row[token + c], entry[token + c] + 1
            for head in range(n_head):
                begin, of = (context * n_head + head) * room * dim, head * dim * COLUMNS + c
                for d in range(dim):
                    i, j = begin + (n - 1) * dim + d, of + d * COLUMNS
                    q[d] = qkv[j] * scale
                    keys[i], values[i] = qkv[j + width * COLUMNS], qkv[j + 2 * width * COLUMNS]
                if store_only:
                    continue
                seen_k, seen_v, at = keys, values, begin
                if begin + _padded(n, WIDTH) * dim + WIDTH > len(keys):  # no numbers to fill up with behind
                    seen_k, seen_v, at = spare_k, spare_v, 0
                    for i in range(n * dim):
                        seen_k[i], seen_v[i] = keys[begin + i], values[begin + i]
                _scores(p, q, seen_k, at, dim, n, keys, begin + room * dim)
                total = _softmax_row(p, n, hidden.shape[1] > 0, unseen, context * hidden.shape[1])
                y[:] = 0
                _add_weighted(y, p, seen_v, at, dim, n, values, begin + room * dim)
                for d in range(dim):
                    b[of + d * COLUMNS] = y[d] / total
        if store_only:
            continue
        _linear(out_weight, b, qkv, tokens)
        for i in range(width * COLUMNS):
            a[i] += qkv[i]
        _layer_norm(a, norm_mlp, eps, b)
        _linear(up_weight, b, h, tokens)
        _gelu(h, h, h, wide * COLUMNS)
        _linear(down_weight, h, qkv, tokens)
        for c in range(tokens):
            for d in range(width):
                x[token + c, d] = a[d * COLUMNS + c] + qkv[d * COLUMNS + c]
