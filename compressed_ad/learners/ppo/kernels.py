"""Compiled kernels of the batched PPO: evaluate policies, sample actions, take gradient steps of PPO.

Every kernel walks over learners one by one, so that a learner's parameters and optimiser state stay in cache
and its arithmetic does not depend on who trains beside it. Two facts set the speed:

- A discrete observation space repeats itself. The rows of a minibatch that show the same observation have
  the same activations, and their gradients add up before the backward pass, so each *distinct* observation
  goes through the networks once. This is the same gradient, in another order of summation.
- The products are tiny (tens of rows, 64 columns). ``_emit_tile`` gives LLVM vector code that keeps a block
  of 4 rows x 4 vectors in registers, which compilers do not find by themselves in a loop nest.

The digits do not depend on the width of the processor's vectors. Each number of a product is summed in one
order, and a product and its addition are rounded once; other sums are made of ``LANES`` partial sums; square
root and division are exact; and nothing is left to the C library or to an option of the compiler.

Policy and value network have equal widths and are stored side by side: a hidden activation row holds the
policy's units in its first half and the value's in its second. Widths are padded to ``PADDING`` with
units whose weights are and stay zero.

All kernels release the GIL and are cached on disk; everything compiled is in this file and in
``models.vector_code``.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from compressed_ad.models.vector_code import (
    WIDTH,
    compiled,
    constant,
    emit_exp,
    emit_fma,
    emit_products,
    fma,
    load,
    number,
    pointers,
    shuffled,
    store,
)

# ---------------------------------------------------------------------------------------------------------
# Register-blocked product

TILE_ROWS = 4
TILE_VECTORS = 2 if WIDTH == 8 else 4  # AVX2 has 16 registers, AVX-512 and NEON 32
TILE_COLUMNS = WIDTH * TILE_VECTORS
PADDING = 64
"""Layers are padded to a multiple, the same on every processor, because sums depend on it."""
LANES = 16
"""A sum over a row is made of so many partial sums, whatever the vectors of the processor."""
_BLOCK = 256
"""A sum over all parameters is a sum of sums over so many."""

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

    def product(typingctx, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, e, e_at, m, n, k):
        i64 = types.int64
        sig = types.void(c, i64, i64, a, i64, i64, i64, b, i64, i64, e, i64, i64, i64, i64)

        def codegen(context, builder, signature, args):
            _, c_at, c_row, _, a_at, a_row, a_k, _, b_at, b_k, _, e_at, m, n, k = args
            c, a, b, e = pointers(context, builder, signature, args)
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
            return context.get_dummy_value()

        return sig, codegen

    return intrinsic(product)


@intrinsic
def _transpose_block(typingctx, to, to_at, to_row, of, of_at, of_row):
    """to[j, i] = of[i, j] for a block of WIDTH x WIDTH; flat float32 arrays by offset and row stride."""
    i64 = types.int64
    sig = types.void(to, i64, i64, of, i64, i64)

    def codegen(context, builder, signature, args):
        _, to_at, to_row, _, of_at, of_row = args
        to, of = pointers(context, builder, signature, args)

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
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _dot(typingctx, a, a_at, b, b_at, n):
    """sum_i a[a_at + i] b[b_at + i], i < n, a multiple of LANES: by i modulo LANES, then halves to halves."""
    i64 = types.int64
    sig = types.float32(a, i64, b, i64, i64)
    kind = ir.VectorType(ir.FloatType(), LANES)

    def codegen(context, builder, signature, args):
        _, a_at, _, b_at, n = args
        a, b = pointers(context, builder, signature, args)
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

    return sig, codegen


@intrinsic
def _add(typingctx, c, c_at, a, a_at, b, b_at, n):
    """c[c_at + i] = a[a_at + i] + b[b_at + i], i < n, a multiple of ``PADDING``."""
    i64 = types.int64
    sig = types.void(c, i64, a, i64, b, i64, i64)

    def codegen(context, builder, signature, args):
        _, c_at, _, a_at, _, b_at, n = args
        c, a, b = pointers(context, builder, signature, args)
        with cgutils.for_range(builder, builder.sdiv(n, number(PADDING))) as loop:
            for start in range(0, PADDING, WIDTH):
                i = builder.add(builder.mul(loop.index, number(PADDING)), number(start))
                x, y = (load(builder, array(builder.add(at, i))) for array, at in ((a, a_at), (b, b_at)))
                store(builder, builder.fadd(x, y), c(builder.add(c_at, i)))
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _exp_block(typingctx, x, at):
    """x = e^x for WIDTH numbers from ``at`` on, as ``emit_exp``, and e^88 above 88."""
    sig = types.void(x, types.int64)

    def codegen(context, builder, signature, args):
        (x,) = pointers(context, builder, signature, args)
        value, high = load(builder, x(args[1])), constant(88.0)
        value = builder.select(builder.fcmp_unordered("<", value, high), value, high)
        store(builder, emit_exp(builder, value), x(args[1]))
        return context.get_dummy_value()

    return sig, codegen


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

# No option lets the compiler reorder or contract: the digits shall not depend on the processor.
_compile = compiled()
# Functions that make no array count no references to those of their caller, which would take a twentieth.
_compile_part = compiled(_nrt=False)

_F = np.float32


@_compile_part
def tanh_inplace(x, n):
    """Replace the first ``n`` numbers of flat float32 ``x`` by their tanh, absolute error below 5e-7."""
    for i in range(n):
        y = min(max(x[i], _F(-_TANH_RANGE)), _F(_TANH_RANGE))
        s = y * y
        p = fma(fma(fma(_F(_TANH_P[0]), s, _F(_TANH_P[1])), s, _F(_TANH_P[2])), s, _F(_TANH_P[3]))
        q = fma(fma(_F(_TANH_Q[0]), s, _F(_TANH_Q[1])), s, _F(_TANH_Q[2]))
        q = fma(fma(q, s, _F(_TANH_Q[3])), s, _F(_TANH_Q[4]))
        x[i] = y * p / q


@_compile_part
def exp_inplace(x, n):
    """Replace the first ``n`` numbers of ``x``, flat, by e^x; those up to a multiple of WIDTH are lost."""
    for i in range(0, n, WIDTH):
        _exp_block(x, i)


@_compile_part
def _log(x):
    """The natural logarithm of a positive float32 number that is not subnormal, relative error below 2e-7."""
    n, y = _exponent(x)
    if y > _F(1.41421356):
        n, y = n + _F(1), y * _F(0.5)
    s = (y - _F(1)) / (y + _F(1))  # log y = 2 artanh s
    square = s * s
    series = fma(fma(fma(_F(2 / 9), square, _F(2 / 7)), square, _F(2 / 5)), square, _F(2 / 3))
    return fma(n, _F(0.693359375), fma(n, _F(-2.12194440e-4), s * fma(series, square, _F(2))))


@_compile_part
def _product(c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, m, n, k):
    _plain_product(c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, c, 0, m, n, k)


@_compile_part
def _product_tanh(c, c_at, c_row, a, a_at, a_row, b, b_at, b_k, bias_at, m, n, k):
    _tanh_product(c, c_at, c_row, a, a_at, a_row, 1, b, b_at, b_k, b, bias_at, m, n, k)


@_compile_part
def _product_dtanh(c, c_at, c_row, a, a_at, a_row, b, b_at, b_k, h, m, n, k):
    _dtanh_product(c, c_at, c_row, a, a_at, a_row, 1, b, b_at, b_k, h, c_at, m, n, k)


# ---------------------------------------------------------------------------------------------------------
# Networks


class Net(NamedTuple):
    """Where things stand in a learner's flat parameter vector; made by ``training.layout``."""

    widths: NDArray[np.int64]  # (n_layer,) padded width of one network's hidden layers
    weights: NDArray[np.int64]  # (n_layer,) offset: layer 0 (n_input, 2 width), then (2, width before, width)
    biases: NDArray[np.int64]  # (n_layer,) offset of (2 width,)
    head: int  # offset of (n_action + 1, width): logits from the policy half, the value from the other
    head_bias: int  # offset of (n_action + 1,)
    widest: int  # the largest of widths
    n_input: int  # rows of the first weight matrix
    n_action: int
    size: int  # length of the parameter vector


class Features(NamedTuple):
    """R observations as network inputs: ones at ``ones`` (R, C), or ``dense`` (R, n_input) if C is 0."""

    ones: NDArray[np.int32]
    dense: NDArray[np.float32]


class Samples(NamedTuple):
    """What N samples of a rollout tell about the loss, all (N,); see ``update``."""

    action: NDArray[np.int64]
    advantage: NDArray[np.float32]
    target: NDArray[np.float32]
    log_prob: NDArray[np.float32]


class Update(NamedTuple):
    """Hyper-parameters of one PPO update."""

    learning_rate: float
    batch_size: int
    n_epochs: int
    clip_range: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    normalize_advantage: bool


@_compile_part
def _forward(net, p, features, rows, n, x, hidden, stride, out):
    """Logits and value ``out`` (n, n_action + 1) of ``rows``, flat; ``_backward`` needs ``x`` and ``hidden``.

    ``hidden`` (n_layer, capacity, 2 width) is flat, ``stride`` the length of a layer; a row of layer l is
    2 ``widths[l]`` long.
    """
    # Numba counts a reference at each access to an array in a tuple, too slow for a loop.
    ones, dense = features
    width, w_at, b_at = net.widths[0], net.weights[0], net.biases[0]
    if ones.shape[1] > 0:
        for u in range(n):
            row, to = rows[u], u * 2 * width
            _add(hidden, to, p, b_at, p, w_at + ones[row, 0] * 2 * width, 2 * width)
            for c in range(1, ones.shape[1]):
                _add(hidden, to, hidden, to, p, w_at + ones[row, c] * 2 * width, 2 * width)
        tanh_inplace(hidden, n * 2 * width)
    else:
        for u in range(n):
            for j in range(net.n_input):
                x[u * net.n_input + j] = dense[rows[u], j]
        zero = np.int64(0)
        _product_tanh(
            hidden, zero, 2 * width, x, zero, net.n_input, p, w_at, 2 * width, b_at, n, 2 * width, net.n_input
        )
    for layer in range(1, len(net.widths)):
        before, width = net.widths[layer - 1], net.widths[layer]
        for half in range(2):
            _product_tanh(
                hidden, layer * stride + half * width, 2 * width,
                hidden, (layer - 1) * stride + half * before, 2 * before,
                p, net.weights[layer] + half * before * width, width, net.biases[layer] + half * width,
                n, width, before,
            )  # fmt: skip
    last = (len(net.widths) - 1) * stride
    for u in range(n):
        for a in range(net.n_action + 1):
            at = last + u * 2 * width + (width if a == net.n_action else 0)
            logit = _dot(hidden, at, p, net.head + a * width, width) + p[net.head_bias + a]
            out[u * (net.n_action + 1) + a] = logit


@_compile_part
def _log_softmax(out, n, n_action, probs):
    """Log-probabilities in place of the logits in ``out`` (n, n_action + 1); fills ``probs``; both flat."""
    for u in range(n):
        at = u * (n_action + 1)
        top = out[at]
        for a in range(1, n_action):
            top = max(top, out[at + a])
        for a in range(n_action):
            out[at + a] -= top
            probs[u * n_action + a] = out[at + a]
    exp_inplace(probs, n * n_action)
    for u in range(n):
        at, total = u * (n_action + 1), _F(0)
        for a in range(n_action):
            total += probs[u * n_action + a]
        norm, scale = _log(total), _F(1) / total
        for a in range(n_action):
            out[at + a] -= norm
            probs[u * n_action + a] *= scale


@_compile
def evaluate(net, params, features, rows, log_probs, probs, entropy, value):
    """Each learner's policy on its ``rows`` (L, K) of ``features``.

    Fills ``log_probs`` and ``probs`` (L, K, n_action), ``entropy`` (L, K) and ``value`` (L, K).
    """
    n_learner, n_row = rows.shape
    n_action, n_out = net.n_action, net.n_action + 1
    capacity = min(n_row, 128)
    stride = capacity * 2 * net.widest
    hidden = np.zeros(len(net.widths) * stride, np.float32)
    x = np.zeros(capacity * net.n_input if features.ones.shape[1] == 0 else 0, np.float32)
    out, likely = np.empty(capacity * n_out, np.float32), np.zeros(capacity * n_action + LANES, np.float32)
    for i in range(n_learner):
        for start in range(0, n_row, capacity):
            n = min(capacity, n_row - start)
            _forward(net, params[i], features, rows[i, start : start + n], n, x, hidden, stride, out)
            _log_softmax(out, n, n_action, likely)
            for u in range(n):
                h = _F(0)
                for a in range(n_action):
                    log_prob, prob = out[u * n_out + a], likely[u * n_action + a]
                    log_probs[i, start + u, a], probs[i, start + u, a] = log_prob, prob
                    h = fma(-prob, log_prob, h)
                entropy[i, start + u], value[i, start + u] = h, out[u * n_out + n_action]


@_compile
def orthonormalise(a):
    """Make the columns of float64 ``a`` (m, n), m >= n, orthonormal, by modified Gram-Schmidt.

    That is the Q of a QR decomposition whose R has a positive diagonal, which a library for linear algebra
    computes with other digits on another processor.
    """
    n_row, n_column = a.shape
    shares = np.empty(n_column)
    for i in range(n_column):
        squares = 0.0
        for k in range(n_row):
            squares += a[k, i] * a[k, i]
        length = np.sqrt(squares)
        shares[:] = 0.0
        for k in range(n_row):
            a[k, i] /= length
            for j in range(i + 1, n_column):
                shares[j] += a[k, i] * a[k, j]
        for k in range(n_row):
            for j in range(i + 1, n_column):
                a[k, j] -= a[k, i] * shares[j]


# ---------------------------------------------------------------------------------------------------------
# Randomness: one SplitMix64 sequence per learner (Steele et al. 2014)


@_compile_part
def _advance(state):
    return state + np.uint64(0x9E3779B97F4A7C15)


@_compile_part
def _mix(state):
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compile
def sample(random, probs, rows, action):
    """Draw ``action`` (L, S) from ``probs[l, rows[l, s]]``; advances ``random``."""
    n_learner, n_stream = rows.shape
    n_action = probs.shape[2]
    for i in range(n_learner):
        state = random[i]
        for s in range(n_stream):
            state = _advance(state)
            left = _F(_mix(state) >> np.uint64(40)) * _F(2.0**-24)
            chosen = 0
            for a in range(n_action):
                p = probs[i, rows[i, s], a]
                if p > _F(0):
                    chosen = a
                    left -= p
                    if left < _F(0):
                        break
            action[i, s] = chosen
        random[i] = state


@_compile_part
def _shuffle(state, order):
    for i in range(len(order) - 1, 0, -1):
        state = _advance(state)
        j = np.int64(((_mix(state) >> np.uint64(32)) * np.uint64(i + 1)) >> np.uint64(32))
        order[i], order[j] = order[j], order[i]
    return state


# ---------------------------------------------------------------------------------------------------------
# Learning


@_compile_part
def _backward(net, p, features, rows, n, x, hidden, stride, dout, one, delta, transposed, g):
    """Gradient ``g`` of a loss with ``dout`` (n, n_action + 1) = dL/d(logits, value), after ``_forward``."""
    top, n_out = len(net.widths) - 1, net.n_action + 1
    zero, single = np.int64(0), np.int64(1)  # a literal number would compile the products once more
    width = net.widths[top]
    for a in range(n_out):
        total = _F(0)
        for u in range(n):
            total += dout[u * n_out + a]
        g[net.head_bias + a] = total
    for half in range(2):  # the logits, then the value
        a, count = (0, net.n_action) if half == 0 else (net.n_action, 1)
        head, at = net.head + a * width, top * stride + half * width
        _product(g, head, width, dout, a, single, n_out, hidden, at, 2 * width, count, width, n)
        _product_dtanh(delta, at, 2 * width, dout, a, n_out, p, head, width, hidden, n, width, count)

    for layer in range(top, -1, -1):
        width = net.widths[layer]
        b_at, z_at = net.biases[layer], layer * stride
        _product(g, b_at, zero, one, zero, zero, zero, delta, z_at, 2 * width, single, 2 * width, n)
        if layer == 0:
            break
        before = net.widths[layer - 1]
        for half in range(2):
            source = (layer - 1) * stride + half * before
            target = layer * stride + half * width
            w_at = net.weights[layer] + half * before * width
            _product(
                g, w_at, width, hidden, source, single, 2 * before, delta, target, 2 * width, before, width, n
            )
            for i in range(0, before, WIDTH):
                for j in range(0, width, WIDTH):
                    _transpose_block(transposed, j * before + i, before, p, w_at + i * width + j, width)
            _product_dtanh(
                delta, source, 2 * before, delta, target, 2 * width, transposed, zero, before, hidden,
                n, before, width,
            )  # fmt: skip

    ones, _ = features
    width, w_at = net.widths[0], net.weights[0]
    if ones.shape[1] > 0:
        g[w_at : w_at + net.n_input * 2 * width] = _F(0)
        for u in range(n):
            for c in range(ones.shape[1]):
                at = w_at + ones[rows[u], c] * 2 * width
                _add(g, at, g, at, delta, u * 2 * width, 2 * width)
    else:
        _product(
            g, w_at, 2 * width, x, zero, single, net.n_input, delta, zero, 2 * width,
            net.n_input, 2 * width, n,
        )  # fmt: skip


@_compile_part
def _loss_gradient(cfg, n_action, of, n, batch, group, data, out, probs, one, advantage, ratio, dout):
    """dL/d(logits, value) ``dout`` of the ``n`` distinct observations to which ``group`` maps the ``batch``.

    SB3's loss: clipped surrogate, - ent_coef * entropy, + vf_coef * squared value error, all as means.
    ``advantage`` and ``ratio`` are room for the numbers of the batch, ``one`` is as long.
    """
    actions, advantages, targets, log_probs = data
    size, n_out = len(batch), n_action + 1
    padded = (size + LANES - 1) // LANES * LANES
    share = _F(1) / _F(size)
    for b in range(size):
        i, u = batch[b], group[b]
        advantage[b] = advantages[i]
        ratio[b] = out[u * n_out + actions[i]] - log_probs[i]
    advantage[size:padded] = _F(0)
    exp_inplace(ratio, size)
    if cfg.normalize_advantage and size > 1:
        mean = _dot(advantage, 0, one, 0, padded) * share
        for b in range(size):
            advantage[b] -= mean
        squares = _dot(advantage, 0, advantage, 0, padded)
        scale = _F(1) / (np.sqrt(squares / _F(size - 1)) + _F(1e-8))
        for b in range(size):
            advantage[b] *= scale
    low, high = _F(1) - _F(cfg.clip_range), _F(1) + _F(cfg.clip_range)
    for b in range(size):
        adv, r = advantage[b], ratio[b]
        clipped = ((adv > _F(0)) & (r > high)) | ((adv < _F(0)) & (r < low))
        ratio[b] = _F(0) if clipped else adv * r * share
    # Until the end, dout holds the sums of dL/dlog pi(a) of each u, and of[u] how often u occurs.
    dout[: n * n_out] = _F(0)
    of[:n] = 0
    slope = _F(2) * _F(cfg.vf_coef) * share
    for b in range(size):
        i, u = batch[b], group[b]
        of[u] += 1
        dout[u * n_out + actions[i]] -= ratio[b]
        dout[u * n_out + n_action] += slope * (out[u * n_out + n_action] - targets[i])
    for u in range(n):
        at, total, entropy = u * n_out, _F(0), _F(0)
        for a in range(n_action):
            total += dout[at + a]
            entropy = fma(-probs[u * n_action + a], out[at + a], entropy)
        weight = _F(cfg.ent_coef) * share * _F(of[u])
        for a in range(n_action):
            dout[at + a] += probs[u * n_action + a] * (weight * (out[at + a] + entropy) - total)


@_compile_part
def _power(x, n):
    """x^n for a whole n: that of the C library has other digits on other processors."""
    power = 1.0
    while n > 0:
        if n % 2:
            power *= x
        x *= x
        n //= 2
    return power


@_compile_part
def _adam(p, g, m, v, left1, left2, learning_rate, max_grad_norm):
    """One step of Adam (betas .9 and .999, eps 1e-5) after clipping the global norm, as PyTorch does both.

    ``left1`` and ``left2`` are the betas to the power of the number of steps, this one included.
    """
    squares = _F(0)
    for at in range(0, len(g), _BLOCK):  # in blocks, because a single sum would wait for itself
        squares += _dot(g, at, g, at, min(_BLOCK, len(g) - at))
    clip = _F(min(1.0, max_grad_norm / (np.sqrt(squares) + 1e-6)))
    size = _F(learning_rate / (1.0 - left1))
    root = _F(1.0 / np.sqrt(1.0 - left2))
    for j in range(len(p)):
        grad = g[j] * clip
        m[j] = fma(_F(0.9), m[j], _F(0.1) * grad)
        v[j] = fma(_F(0.999), v[j], _F(0.001) * grad * grad)
        p[j] -= size * m[j] / fma(np.sqrt(v[j]), root, _F(1e-5))


@_compile
def update(
    net, cfg, params, moment1, moment2, step, random, features, ids, action, advantage, target, log_prob
):
    """All epochs and minibatches of one PPO update of every learner.

    Changed in place: ``params``, ``moment1``, ``moment2`` (L, net.size), ``step`` (L,), the gradient steps so
    far, and ``random`` (L,). The rollout, all (T, L, S): ``ids``, rows of ``features``; ``action``;
    ``advantage``; ``target``, the return that the value regresses on; ``log_prob`` of the acting policy.
    Returns the last learner's gradient on its last minibatch, before clipping, for tests to look at.
    """
    n_step, n_learner, n_stream = ids.shape
    n_sample, n_action = n_step * n_stream, net.n_action
    batch_size = min(cfg.batch_size, n_sample)
    capacity = (batch_size + LANES - 1) // LANES * LANES
    stride = capacity * 2 * net.widest
    hidden = np.zeros(len(net.widths) * stride, np.float32)
    delta = np.zeros(len(net.widths) * stride, np.float32)
    x = np.zeros(capacity * net.n_input if features.ones.shape[1] == 0 else 0, np.float32)
    transposed = np.empty(net.widest**2, np.float32)
    out, dout = np.empty(capacity * (n_action + 1), _F), np.empty(capacity * (n_action + 1), _F)
    probs = np.zeros(capacity * n_action + LANES, np.float32)
    one, normed, ratio = np.ones(capacity, _F), np.zeros(capacity, _F), np.zeros(capacity, _F)
    g = np.zeros(net.size, np.float32)
    rows, group, of = np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    seen, place = np.zeros(len(features.ones), np.int64), np.zeros(len(features.ones), np.int64)
    order, flat_ids = np.empty(n_sample, np.int64), np.empty(n_sample, np.int64)
    data = Samples(
        np.empty(n_sample, np.int64), np.empty(n_sample, np.float32), np.empty(n_sample, np.float32),
        np.empty(n_sample, np.float32),
    )  # fmt: skip
    stamp = 0
    for i in range(n_learner):
        p, m, v = params[i], moment1[i], moment2[i]
        left1, left2 = _power(0.9, step[i]), _power(0.999, step[i])
        for t in range(n_step):
            for s in range(n_stream):
                k = t * n_stream + s
                flat_ids[k], data.action[k] = ids[t, i, s], action[t, i, s]
                data.advantage[k], data.target[k] = advantage[t, i, s], target[t, i, s]
                data.log_prob[k] = log_prob[t, i, s]
                order[k] = k
        for _ in range(cfg.n_epochs):
            random[i] = _shuffle(random[i], order)
            for start in range(0, n_sample, batch_size):
                batch = order[start : min(start + batch_size, n_sample)]
                stamp += 1
                n = np.int64(0)
                for b in range(len(batch)):
                    row = flat_ids[batch[b]]
                    if seen[row] != stamp:
                        seen[row], place[row], rows[n] = stamp, n, row
                        n += 1
                    group[b] = place[row]
                _forward(net, p, features, rows, n, x, hidden, stride, out)
                _log_softmax(out, n, n_action, probs)
                _loss_gradient(cfg, n_action, of, n, batch, group, data, out, probs, one, normed, ratio, dout)
                _backward(net, p, features, rows, n, x, hidden, stride, dout, one, delta, transposed, g)
                step[i] += 1
                left1, left2 = left1 * 0.9, left2 * 0.999
                _adam(p, g, m, v, left1, left2, cfg.learning_rate, cfg.max_grad_norm)
    return g
