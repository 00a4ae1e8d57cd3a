"""Vector code of the batched PPO's kernels: products, sums, tanh, exponential and logarithm.

The digits do not depend on the width of the processor's vectors. Each number of a product is summed in one
order, and a product and its addition are rounded once; other sums are made of ``LANES`` partial sums; and
nothing is left to the C library or to an option of the compiler.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from compressed_ad.models.vector_code import (
    WIDTH,
    compiled,
    constant,
    emit_exp,
    emit_fma,
    emit_products,
    emitted,
    fma,
    load,
    number,
    shuffled,
    store,
)

TILE_ROWS = 4
TILE_VECTORS = 2 if WIDTH == 8 else 4  # AVX2 has 16 registers, AVX-512 and NEON 32
TILE_COLUMNS = WIDTH * TILE_VECTORS
PADDING = 64
"""Layers are padded to a multiple, the same on every processor, because sums depend on it."""
LANES = 16
"""A sum over a row is made of so many partial sums, whatever the vectors of the processor."""
# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 8: minimax fit of the relative error by reweighted least squares,
# 1.5e-7 in exact arithmetic, below 5e-7 in float32; Horner order, highest power first.
_TANH_P = (1.142839856e-05, 2.951021436e-03, 1.292566081e-01, 9.999998545e-01)
_TANH_Q = (2.459203048e-07, 2.386688391e-04, 2.381554458e-02, 4.625887643e-01, 1.0)
_TANH_RANGE = 8.0


def _emit_tanh(builder, x):
    for bound, order in ((_TANH_RANGE, "<"), (-_TANH_RANGE, ">")):
        limit = constant(bound)
        x = builder.select(builder.fcmp_unordered(order, x, limit), x, limit)
    square = builder.fmul(x, x)

    def horner(coefficients):
        y = constant(coefficients[0])
        for c in coefficients[1:]:
            y = emit_fma(builder, y, square, constant(c))
        return y

    return builder.fdiv(builder.fmul(x, horner(_TANH_P)), horner(_TANH_Q))


def _emit_tile(builder, rows, epilogue, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, e, e_at, n):
    """One tile of ``_make_product``: C[0:rows, 0:TILE_COLUMNS] = f(sum_k A[., k] B[k, .]), k < n."""
    add, mul = builder.add, builder.mul
    begin = {(r, v): constant(0.0) for r in range(rows) for v in range(TILE_VECTORS)}
    for (r, v), value in emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n).items():
        at = add(mul(c_row, number(r)), number(v * WIDTH))
        if epilogue == "tanh":
            value = _emit_tanh(builder, builder.fadd(value, load(builder, e(add(e_at, number(v * WIDTH))))))
        elif epilogue == "dtanh":
            h = load(builder, e(add(e_at, at)))
            value = builder.fmul(value, emit_fma(builder, builder.fneg(h), h, constant(1.0)))
        store(builder, value, c(add(c_at, at)))


def _make_product(epilogue: str) -> Any:
    """C (m, n) = f(A (m, k) B (k, n)) by offsets and row strides, n a multiple of ``TILE_COLUMNS``.

    All arrays are flat float32; ``a_k`` is the step of A from k to k + 1. ``epilogue``: "none"; "tanh":
    f = tanh(. + E[column]), E the bias; "dtanh": f = . * (1 - E^2), E the activations, laid out as C.
    Every number is summed in the order of k.
    """

    @emitted()
    def product(builder, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, e, e_at, m, n, k):
        add, mul = builder.add, builder.mul
        whole, rest = builder.sdiv(m, number(TILE_ROWS)), builder.srem(m, number(TILE_ROWS))
        # A tile of one row or two waits for its own sums, so the last whole tile takes them along.
        few = builder.icmp_unsigned("<", builder.sub(rest, number(1)), number(2))
        few = builder.and_(few, builder.icmp_signed(">", whole, number(0)))
        whole = builder.select(few, builder.sub(whole, number(1)), whole)
        rest = builder.select(few, add(rest, number(TILE_ROWS)), rest)

        def tile(rows, i, j):
            to = add(mul(i, c_row), j)
            of_e = add(e_at, to if epilogue == "dtanh" else j)
            _emit_tile(
                builder, rows, epilogue, c, add(c_at, to), c_row, a, add(a_at, mul(i, a_row)), a_row, a_k,
                b, add(b_at, j), b_k, e, of_e, k,
            )  # fmt: skip

        with cgutils.for_range(builder, builder.sdiv(n, number(TILE_COLUMNS))) as columns:
            j = mul(columns.index, number(TILE_COLUMNS))
            with cgutils.for_range(builder, whole) as tiles:
                tile(TILE_ROWS, mul(tiles.index, number(TILE_ROWS)), j)
            for rows in (1, 2, 3, TILE_ROWS + 1, TILE_ROWS + 2):
                with builder.if_then(builder.icmp_signed("==", rest, number(rows))):
                    tile(rows, mul(whole, number(TILE_ROWS)), j)

    return product


@emitted()
def transpose_block(builder, to, to_at, to_row, of, of_at, of_row):
    """to[j, i] = of[i, j] for a block of WIDTH x WIDTH; flat float32 arrays by offset and row stride."""

    def line(at, stride, row):
        return builder.add(at, builder.mul(stride, number(row)))

    lines = [load(builder, of(line(of_at, of_row, row))) for row in range(WIDTH)]
    step = WIDTH // 2
    while step:  # swap the off-diagonal quarters of every 2 step x 2 step block
        upper = [c + WIDTH - step if c & step else c for c in range(WIDTH)]
        lower = [c + WIDTH if c & step else c + step for c in range(WIDTH)]
        for r in range(WIDTH):
            if not r & step:
                a, b = lines[r], lines[r + step]
                lines[r] = shuffled(builder, a, b, upper)
                lines[r + step] = shuffled(builder, a, b, lower)
        step //= 2
    for row in range(WIDTH):
        store(builder, lines[row], to(line(to_at, to_row, row)))


@emitted(types.float32)
def dot(builder, a, a_at, b, b_at, n):
    """sum_i a[a_at + i] b[b_at + i], i < n, a multiple of LANES: by i modulo LANES, then halves to halves."""
    kind = ir.VectorType(ir.FloatType(), LANES)
    total = cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * LANES))
    with cgutils.for_range(builder, builder.sdiv(n, number(LANES))) as loop:
        i = builder.mul(loop.index, number(LANES))
        x, y = (load(builder, array(builder.add(at, i)), kind) for array, at in ((a, a_at), (b, b_at)))
        builder.store(emit_fma(builder, x, y, builder.load(total)), total)
    sums = builder.load(total)
    half = LANES // 2
    while half:
        order = ir.VectorType(ir.IntType(32), half)
        low, high = (
            builder.shuffle_vector(sums, sums, ir.Constant(order, list(range(first, first + half))))
            for first in (0, half)
        )
        sums = builder.fadd(low, high)
        half //= 2
    return builder.extract_element(sums, number(0))


@emitted()
def add_vectors(builder, c, c_at, a, a_at, b, b_at, n):
    """c[c_at + i] = a[a_at + i] + b[b_at + i], i < n, a multiple of ``PADDING``."""
    with cgutils.for_range(builder, builder.sdiv(n, number(PADDING))) as loop:
        for start in range(0, PADDING, WIDTH):
            i = builder.add(builder.mul(loop.index, number(PADDING)), number(start))
            x, y = (load(builder, array(builder.add(at, i))) for array, at in ((a, a_at), (b, b_at)))
            store(builder, builder.fadd(x, y), c(builder.add(c_at, i)))


@emitted()
def _exp_block(builder, x, at):
    """x = e^x for WIDTH numbers from ``at`` on, as ``emit_exp``, and e^88 above 88."""
    value, high = load(builder, x(at)), constant(88.0)
    value = builder.select(builder.fcmp_unordered("<", value, high), value, high)
    store(builder, emit_exp(builder, value), x(at))


@intrinsic
def _exponent(typingctx, x):
    """The whole number n of a positive x = 2^n y with 1 <= y < 2, and y."""
    sig = types.UniTuple(types.float32, 2)(types.float32)

    def codegen(context, builder, signature, args):
        integer, real = ir.IntType(32), ir.FloatType()
        bits = builder.bitcast(args[0], integer)
        n = builder.sub(builder.lshr(bits, ir.Constant(integer, 23)), ir.Constant(integer, 127))
        bits = builder.or_(
            builder.and_(bits, ir.Constant(integer, 0x7FFFFF)), ir.Constant(integer, 0x3F800000)
        )
        parts = builder.sitofp(n, real), builder.bitcast(bits, real)
        return context.make_tuple(builder, signature.return_type, parts)

    return sig, codegen


_plain_product = _make_product("none")
_tanh_product = _make_product("tanh")
_dtanh_product = _make_product("dtanh")

# Functions that make no array count no references to those of their caller, which would take a twentieth.
_compile = compiled(_nrt=False)
_F = np.float32


@_compile
def tanh_inplace(x, n):
    """Replace the first ``n`` numbers of flat float32 ``x`` by their tanh, absolute error below 5e-7."""
    for i in range(n):
        y = min(max(x[i], _F(-_TANH_RANGE)), _F(_TANH_RANGE))
        s = y * y
        p = fma(fma(fma(_F(_TANH_P[0]), s, _F(_TANH_P[1])), s, _F(_TANH_P[2])), s, _F(_TANH_P[3]))
        q = fma(fma(_F(_TANH_Q[0]), s, _F(_TANH_Q[1])), s, _F(_TANH_Q[2]))
        q = fma(fma(q, s, _F(_TANH_Q[3])), s, _F(_TANH_Q[4]))
        x[i] = y * p / q


@_compile
def exp_inplace(x, n):
    """Replace the first ``n`` numbers of ``x``, flat, by e^x; those up to a multiple of WIDTH are lost."""
    for i in range(0, n, WIDTH):
        _exp_block(x, i)


@_compile
def logarithm(x):
    """The natural logarithm of a positive float32 number that is not subnormal, relative error below 2e-7."""
    n, y = _exponent(x)
    if y > _F(1.41421356):
        n, y = n + _F(1), y * _F(0.5)
    s = (y - _F(1)) / (y + _F(1))  # log y = 2 artanh s
    square = s * s
    series = fma(fma(fma(_F(2 / 9), square, _F(2 / 7)), square, _F(2 / 5)), square, _F(2 / 3))
    return fma(n, _F(0.693359375), fma(n, _F(-2.12194440e-4), s * fma(series, square, _F(2))))


@_compile
def product(c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, m, n, k):
    _plain_product(c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, c, 0, m, n, k)


@_compile
def product_tanh(c, c_at, c_row, a, a_at, a_row, b, b_at, b_k, bias_at, m, n, k):
    _tanh_product(c, c_at, c_row, a, a_at, a_row, 1, b, b_at, b_k, b, bias_at, m, n, k)


@_compile
def product_dtanh(c, c_at, c_row, a, a_at, a_row, b, b_at, b_k, h, m, n, k):
    _dtanh_product(c, c_at, c_row, a, a_at, a_row, 1, b, b_at, b_k, h, c_at, m, n, k)
