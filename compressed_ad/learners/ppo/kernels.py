"""Compiled kernels of the batched PPO: evaluate policies, sample actions, take gradient steps of PPO.

Every kernel walks over learners one by one, so that a learner's parameters and optimiser state stay in cache
and its arithmetic does not depend on who trains beside it. Two facts set the speed:

- A discrete observation space repeats itself. The rows of a minibatch that show the same observation have
  the same activations, and their gradients add up before the backward pass, so each *distinct* observation
  goes through the networks once. This is the same gradient, in another order of summation.
- The products are tiny (tens of rows, 64 columns). ``_tile`` emits LLVM vector code that keeps a block of
  4 rows x 4 vectors in registers, which compilers do not find by themselves in a loop nest.

Policy and value network have equal widths and are stored side by side: a hidden activation row holds the
policy's units in its first half and the value's in its second. Widths are padded to ``TILE_COLUMNS`` with
units whose weights are and stay zero.

All kernels release the GIL and are cached on disk; everything compiled is in this file and in
``models.vector_code``.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from compressed_ad.models.vector_code import (
    WIDTH,
    compiled,
    constant,
    emit_products,
    load,
    number,
    pointers,
    shuffled,
    store,
)

# ---------------------------------------------------------------------------------------------------------
# Register-blocked product

TILE_ROWS = 4
TILE_VECTORS = 4 if WIDTH != 8 else 2  # AVX2 has 16 registers, the others 32
TILE_COLUMNS = WIDTH * TILE_VECTORS

# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 8: minimax fit of the relative error by reweighted least squares,
# 1.5e-7 in exact arithmetic, below 5e-7 in float32; Horner order, highest power first.
_TANH_P = (1.142839856e-05, 2.951021436e-03, 1.292566081e-01, 9.999998545e-01)
_TANH_Q = (2.459203048e-07, 2.386688391e-04, 2.381554458e-02, 4.625887643e-01, 1.0)
_TANH_RANGE = 8.0

# Sums may be reordered and contracted; NaN and infinity keep their meaning, so that they can be noticed.
_FAST = ("contract", "reassoc", "arcp", "nsz", "afn")


def _emit_tanh(builder, x):
    for bound, order in ((_TANH_RANGE, "<"), (-_TANH_RANGE, ">")):
        limit = constant(bound)
        x = builder.select(builder.fcmp_ordered(order, x, limit), x, limit)
    square = builder.fmul(x, x, flags=_FAST)

    def horner(coefficients):
        y = constant(coefficients[0])
        for c in coefficients[1:]:
            y = builder.fadd(builder.fmul(y, square, flags=_FAST), constant(c), flags=_FAST)
        return y

    return builder.fdiv(builder.fmul(x, horner(_TANH_P), flags=_FAST), horner(_TANH_Q), flags=_FAST)


def _make_tile(epilogue: str) -> Any:
    """C[0:TILE_ROWS, 0:TILE_COLUMNS] = f(sum_k A[., k] B[k, .]), k < n, by offsets and row strides.

    All arrays are flat float32; ``a_k`` is the step of A from k to k + 1. ``epilogue``: "none"; "tanh":
    f = tanh(. + E[column]), E the bias; "dtanh": f = . * (1 - E^2), E the activations, laid out as C.
    """

    def tile(typingctx, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, e, e_at, n):
        i64 = types.int64
        sig = types.void(c, i64, i64, a, i64, i64, i64, b, i64, i64, e, i64, i64)

        def codegen(context, builder, signature, args):
            _, c_at, c_row, _, a_at, a_row, a_k, _, b_at, b_k, _, e_at, n = args
            c, a, b, e = pointers(context, builder, signature, args)
            add, mul = builder.add, builder.mul
            begin = {(r, v): constant(0.0) for r in range(TILE_ROWS) for v in range(TILE_VECTORS)}
            sums = emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n, _FAST)
            for (r, v), value in sums.items():
                at = add(mul(c_row, number(r)), number(v * WIDTH))
                if epilogue == "tanh":
                    bias = load(builder, e(add(e_at, number(v * WIDTH))))
                    value = _emit_tanh(builder, builder.fadd(value, bias, flags=_FAST))
                elif epilogue == "dtanh":
                    h = load(builder, e(add(e_at, at)))
                    slope = builder.fsub(constant(1.0), builder.fmul(h, h, flags=_FAST), flags=_FAST)
                    value = builder.fmul(value, slope, flags=_FAST)
                store(builder, value, c(add(c_at, at)))
            return context.get_dummy_value()

        return sig, codegen

    return intrinsic(tile)


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


_tile = _make_tile("none")
_tile_tanh = _make_tile("tanh")
_tile_dtanh = _make_tile("dtanh")

_compile = compiled(fastmath=set(_FAST))

_F = np.float32


@_compile
def tanh_inplace(x):
    """Replace flat float32 ``x`` by its tanh, absolute error below 5e-7."""
    for i in range(len(x)):
        y = min(max(x[i], _F(-_TANH_RANGE)), _F(_TANH_RANGE))
        s = y * y
        p = ((_F(_TANH_P[0]) * s + _F(_TANH_P[1])) * s + _F(_TANH_P[2])) * s + _F(_TANH_P[3])
        q = (_F(_TANH_Q[0]) * s + _F(_TANH_Q[1])) * s + _F(_TANH_Q[2])
        q = (q * s + _F(_TANH_Q[3])) * s + _F(_TANH_Q[4])
        x[i] = y * p / q


# Products C (m, n) of A (m, k) and B (k, n), m and n multiples of the tile; arguments as in ``_make_tile``.


@_compile
def _product(c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, m, n, k):
    for i in range(0, m, TILE_ROWS):
        for j in range(0, n, TILE_COLUMNS):
            _tile(c, c_at + i * c_row + j, c_row, a, a_at + i * a_row, a_row, a_k, b, b_at + j, b_k, c, 0, k)


@_compile
def _product_tanh(c, c_at, c_row, a, a_at, a_row, b, b_at, b_k, bias_at, m, n, k):
    for i in range(0, m, TILE_ROWS):
        for j in range(0, n, TILE_COLUMNS):
            _tile_tanh(
                c, c_at + i * c_row + j, c_row, a, a_at + i * a_row, a_row, 1, b, b_at + j, b_k,
                b, bias_at + j, k,
            )  # fmt: skip


@_compile
def _product_dtanh(c, c_at, c_row, a, a_at, a_row, b, b_k, h, m, n, k):
    for i in range(0, m, TILE_ROWS):
        for j in range(0, n, TILE_COLUMNS):
            at = c_at + i * c_row + j
            _tile_dtanh(c, at, c_row, a, a_at + i * a_row, a_row, 1, b, j, b_k, h, at, k)


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
    n_input: int  # rows of the first weight matrix, a multiple of TILE_ROWS
    n_action: int
    size: int  # length of the parameter vector


class Features(NamedTuple):
    """R observations as network inputs: ones at ``ones`` (R, C), or ``dense`` (R, n_input) if C is 0."""

    ones: NDArray[np.int32]
    dense: NDArray[np.float32]


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


@_compile
def _forward(net, p, features, rows, n, x, hidden, stride, out):
    """Logits and value ``out`` (n, n_action + 1) of ``rows``; ``_backward`` needs ``x`` and ``hidden``.

    ``hidden`` (n_layer, capacity, 2 width) is flat, ``stride`` the length of a layer; a row of layer l is
    2 ``widths[l]`` long.
    """
    n_one = features.ones.shape[1]
    padded = (n + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    width = net.widths[0]
    bias = p[net.biases[0] : net.biases[0] + 2 * width]
    if n_one > 0:
        for u in range(n):
            h = hidden[u * 2 * width : (u + 1) * 2 * width]
            at = net.weights[0] + features.ones[rows[u], 0] * 2 * width
            w = p[at : at + 2 * width]
            for j in range(2 * width):
                h[j] = bias[j] + w[j]
            for c in range(1, n_one):
                at = net.weights[0] + features.ones[rows[u], c] * 2 * width
                w = p[at : at + 2 * width]
                for j in range(2 * width):
                    h[j] += w[j]
        tanh_inplace(hidden[: n * 2 * width])
    else:
        for u in range(n):
            for j in range(net.n_input):
                x[u * net.n_input + j] = features.dense[rows[u], j]
        _product_tanh(
            hidden, 0, 2 * width, x, 0, net.n_input, p, net.weights[0], 2 * width, net.biases[0],
            padded, 2 * width, net.n_input,
        )  # fmt: skip
    for layer in range(1, len(net.widths)):
        before, width = net.widths[layer - 1], net.widths[layer]
        for half in range(2):
            source = (layer - 1) * stride + half * before
            target = layer * stride + half * width
            w_at = net.weights[layer] + half * before * width
            b_at = net.biases[layer] + half * width
            _product_tanh(
                hidden,
                target,
                2 * width,
                hidden,
                source,
                2 * before,
                p,
                w_at,
                width,
                b_at,
                padded,
                width,
                before,
            )
    last = (len(net.widths) - 1) * stride
    for u in range(n):
        for a in range(net.n_action + 1):
            at = last + u * 2 * width + (width if a == net.n_action else 0)
            h = hidden[at : at + width]
            w = p[net.head + a * width : net.head + (a + 1) * width]
            total = _F(0)
            for j in range(width):
                total += h[j] * w[j]
            out[u, a] = total + p[net.head_bias + a]


@_compile
def _log_softmax(logits, n_action, log_probs, probs):
    """Log-probabilities and probabilities of one row; returns the entropy in nats."""
    top = logits[0]
    for a in range(1, n_action):
        top = max(top, logits[a])
    total = _F(0)
    for a in range(n_action):
        log_probs[a] = logits[a] - top
        probs[a] = np.exp(log_probs[a])
        total += probs[a]
    norm, scale = np.log(total), _F(1) / total
    entropy = _F(0)
    for a in range(n_action):
        log_probs[a] -= norm
        probs[a] *= scale
        entropy -= probs[a] * log_probs[a]
    return entropy


@_compile
def evaluate(net, params, features, rows, log_probs, entropy, value):
    """Each learner's policy on its ``rows`` (L, K) of ``features``.

    Fills ``log_probs`` (L, K, n_action), ``entropy`` (L, K) and ``value`` (L, K).
    """
    n_learner, n_row = rows.shape
    capacity = (min(n_row, 128) + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    stride = capacity * 2 * net.widest
    hidden = np.zeros(len(net.widths) * stride, np.float32)
    x = np.zeros(capacity * net.n_input if features.ones.shape[1] == 0 else 0, np.float32)
    out = np.empty((capacity, net.n_action + 1), np.float32)
    probs = np.empty(net.n_action, np.float32)
    for i in range(n_learner):
        for start in range(0, n_row, capacity):
            n = min(capacity, n_row - start)
            _forward(net, params[i], features, rows[i, start : start + n], n, x, hidden, stride, out)
            for u in range(n):
                at = start + u
                entropy[i, at] = _log_softmax(out[u], net.n_action, log_probs[i, at], probs)
                value[i, at] = out[u, net.n_action]


# ---------------------------------------------------------------------------------------------------------
# Randomness: one SplitMix64 sequence per learner (Steele et al. 2014)


@_compile
def _advance(state):
    return state + np.uint64(0x9E3779B97F4A7C15)


@_compile
def _mix(state):
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compile
def sample(random, log_probs, rows, action, log_prob):
    """Draw ``action`` (L, S) and its ``log_prob`` from ``log_probs[l, rows[l, s]]``; advances ``random``."""
    n_learner, n_stream = rows.shape
    n_action = log_probs.shape[2]
    for i in range(n_learner):
        state = random[i]
        for s in range(n_stream):
            state = _advance(state)
            left = _F(_mix(state) >> np.uint64(40)) * _F(2.0**-24)
            chosen = 0
            for a in range(n_action):
                p = np.exp(log_probs[i, rows[i, s], a])
                if p > _F(0):
                    chosen = a
                    left -= p
                    if left < _F(0):
                        break
            action[i, s] = chosen
            log_prob[i, s] = log_probs[i, rows[i, s], chosen]
        random[i] = state


@_compile
def _shuffle(state, order):
    for i in range(len(order) - 1, 0, -1):
        state = _advance(state)
        j = np.int64(((_mix(state) >> np.uint64(32)) * np.uint64(i + 1)) >> np.uint64(32))
        order[i], order[j] = order[j], order[i]
    return state


# ---------------------------------------------------------------------------------------------------------
# Learning


@_compile
def _backward(net, p, features, rows, n, x, hidden, stride, dout, delta, transposed, g):
    """Gradient ``g`` of a loss with ``dout`` (n, n_action + 1) = dL/d(logits, value), after ``_forward``."""
    top = len(net.widths) - 1
    width = net.widths[top]
    head = np.zeros(0, np.float32)
    g[net.head : net.head_bias + net.n_action + 1] = _F(0)
    for u in range(n):
        at = top * stride + u * 2 * width
        delta[at : at + width] = _F(0)
        for a in range(net.n_action + 1):
            d = dout[u, a]
            g[net.head_bias + a] += d
            shift = width if a == net.n_action else 0
            h = hidden[at + shift : at + shift + width]
            dh = delta[at + shift : at + shift + width]
            gw = g[net.head + a * width : net.head + (a + 1) * width]
            head = p[net.head + a * width : net.head + (a + 1) * width]
            if a == net.n_action:
                for j in range(width):
                    gw[j] += d * h[j]
                    dh[j] = d * head[j]
            else:
                for j in range(width):
                    gw[j] += d * h[j]
                    dh[j] += d * head[j]
    z = delta[top * stride : top * stride + n * 2 * width]
    h = hidden[top * stride : top * stride + n * 2 * width]
    for j in range(n * 2 * width):
        z[j] *= _F(1) - h[j] * h[j]

    padded = (n + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    for layer in range(top, -1, -1):
        width = net.widths[layer]
        gb = g[net.biases[layer] : net.biases[layer] + 2 * width]
        gb[:] = _F(0)
        for u in range(n):
            at = layer * stride + u * 2 * width
            z = delta[at : at + 2 * width]
            for j in range(2 * width):
                gb[j] += z[j]
        if layer == 0:
            break
        before = net.widths[layer - 1]
        for half in range(2):
            source = (layer - 1) * stride + half * before
            target = layer * stride + half * width
            w_at = net.weights[layer] + half * before * width
            _product(
                g, w_at, width, hidden, source, 1, 2 * before, delta, target, 2 * width, before, width, n
            )
            for i in range(0, before, WIDTH):
                for j in range(0, width, WIDTH):
                    _transpose_block(transposed, j * before + i, before, p, w_at + i * width + j, width)
            _product_dtanh(
                delta, source, 2 * before, delta, target, 2 * width, transposed, before, hidden,
                padded, before, width,
            )  # fmt: skip

    width = net.widths[0]
    n_one = features.ones.shape[1]
    if n_one > 0:
        g[net.weights[0] : net.weights[0] + net.n_input * 2 * width] = _F(0)
        for u in range(n):
            z = delta[u * 2 * width : (u + 1) * 2 * width]
            for c in range(n_one):
                at = net.weights[0] + features.ones[rows[u], c] * 2 * width
                gw = g[at : at + 2 * width]
                for j in range(2 * width):
                    gw[j] += z[j]
    else:
        _product(
            g, net.weights[0], 2 * width, x, 0, 1, net.n_input, delta, 0, 2 * width, net.n_input, 2 * width, n
        )


@_compile
def _loss_gradient(cfg, n_action, of, n, batch, group, action, advantage, target, log_prob, out, probs, dout):
    """dL/d(logits, value) ``dout`` of the ``n`` distinct observations to which ``group`` maps the ``batch``.

    SB3's loss: clipped surrogate, - ent_coef * entropy, + vf_coef * squared value error, all as means.
    """
    size = len(batch)
    share = _F(1) / _F(size)
    mean, scale = _F(0), _F(1)
    if cfg.normalize_advantage and size > 1:
        total = 0.0
        for i in batch:
            total += advantage[i]
        mean = _F(total / size)
        squares = 0.0
        for i in batch:
            squares += (advantage[i] - mean) ** 2
        scale = _F(1) / (_F(np.sqrt(squares / (size - 1))) + _F(1e-8))
    clip = _F(cfg.clip_range)
    dout[:n] = _F(0)
    # Until the end, dout[u, a] holds sum of dL/dlog pi(a), and of[u] how often u occurs.
    of[:n] = 0
    for b in range(size):
        i, u = batch[b], group[b]
        a = action[i]
        of[u] += 1
        ratio = np.exp(out[u, a] - log_prob[i])
        adv = (advantage[i] - mean) * scale
        if not ((adv > 0 and ratio > _F(1) + clip) or (adv < 0 and ratio < _F(1) - clip)):
            dout[u, a] -= adv * ratio * share
        dout[u, n_action] += _F(2) * _F(cfg.vf_coef) * (out[u, n_action] - target[i]) * share
    for u in range(n):
        total, entropy = _F(0), _F(0)
        for a in range(n_action):
            total += dout[u, a]
            entropy -= probs[u, a] * out[u, a]
        weight = _F(cfg.ent_coef) * share * of[u]
        for a in range(n_action):
            dout[u, a] += probs[u, a] * (weight * (out[u, a] + entropy) - total)


@_compile
def _adam(p, g, m, v, step, learning_rate, max_grad_norm):
    """One step of Adam (betas .9 and .999, eps 1e-5) after clipping the global norm, as PyTorch does both."""
    squares = _F(0)
    for j in range(len(g)):
        squares += g[j] * g[j]
    clip = _F(min(1.0, max_grad_norm / (np.sqrt(squares) + 1e-6)))
    size = _F(learning_rate / (1.0 - 0.9**step))
    root = _F(1.0 / np.sqrt(1.0 - 0.999**step))
    for j in range(len(p)):
        grad = g[j] * clip
        m[j] = _F(0.9) * m[j] + _F(0.1) * grad
        v[j] = _F(0.999) * v[j] + _F(0.001) * grad * grad
        p[j] -= size * m[j] / (np.sqrt(v[j]) * root + _F(1e-5))


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
    capacity = (batch_size + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    stride = capacity * 2 * net.widest
    hidden = np.zeros(len(net.widths) * stride, np.float32)
    delta = np.zeros(len(net.widths) * stride, np.float32)
    x = np.zeros(capacity * net.n_input if features.ones.shape[1] == 0 else 0, np.float32)
    transposed = np.empty(net.widest**2, np.float32)
    out = np.empty((capacity, n_action + 1), np.float32)
    dout = np.empty((capacity, n_action + 1), np.float32)
    probs = np.empty((capacity, n_action), np.float32)
    g = np.zeros(net.size, np.float32)
    rows, group, of = np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    seen, place = np.zeros(len(features.ones), np.int64), np.zeros(len(features.ones), np.int64)
    order = np.empty(n_sample, np.int64)
    flat_ids, flat_action = np.empty(n_sample, np.int64), np.empty(n_sample, np.int64)
    flat_advantage, flat_target = np.empty(n_sample, np.float32), np.empty(n_sample, np.float32)
    flat_log_prob = np.empty(n_sample, np.float32)
    stamp = 0
    for i in range(n_learner):
        p, m, v = params[i], moment1[i], moment2[i]
        for t in range(n_step):
            for s in range(n_stream):
                k = t * n_stream + s
                flat_ids[k], flat_action[k] = ids[t, i, s], action[t, i, s]
                flat_advantage[k], flat_target[k] = advantage[t, i, s], target[t, i, s]
                flat_log_prob[k] = log_prob[t, i, s]
                order[k] = k
        for _ in range(cfg.n_epochs):
            random[i] = _shuffle(random[i], order)
            for start in range(0, n_sample, batch_size):
                batch = order[start : min(start + batch_size, n_sample)]
                stamp += 1
                n = 0
                for b in range(len(batch)):
                    row = flat_ids[batch[b]]
                    if seen[row] != stamp:
                        seen[row], place[row], rows[n] = stamp, n, row
                        n += 1
                    group[b] = place[row]
                _forward(net, p, features, rows, n, x, hidden, stride, out)
                for u in range(n):
                    _log_softmax(out[u], n_action, out[u], probs[u])
                _loss_gradient(
                    cfg, n_action, of, n, batch, group, flat_action, flat_advantage, flat_target,
                    flat_log_prob, out, probs, dout,
                )  # fmt: skip
                _backward(net, p, features, rows, n, x, hidden, stride, dout, delta, transposed, g)
                step[i] += 1
                _adam(p, g, m, v, step[i], cfg.learning_rate, cfg.max_grad_norm)
    return g
