"""Compiled kernels of the batched PPO: evaluate policies, sample actions, take gradient steps of PPO.

Every kernel walks over learners one by one, so that a learner's parameters and optimiser state stay in cache
and its arithmetic does not depend on who trains beside it. Two facts set the speed:

- A discrete observation space repeats itself. The rows of a minibatch that show the same observation have
  the same activations, and their gradients add up before the backward pass, so each *distinct* observation
  goes through the networks once. This is the same gradient, in another order of summation.
- The products are tiny (tens of rows, 64 columns). ``vector_code`` keeps a block of 4 rows x 4 vectors in
  registers, which compilers do not find by themselves in a loop nest.

The digits do not depend on the width of the processor's vectors (see ``vector_code``). Square root and
division are exact everywhere.

Policy and value network have equal widths and are stored side by side: a hidden activation row holds the
policy's units in its first half and the value's in its second. Widths are padded to ``PADDING`` with
units whose weights are and stay zero.

All kernels release the GIL and are cached on disk.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressed_ad.learners.ppo import vector_code
from compressed_ad.learners.ppo.vector_code import (
    LANES,
    add_vectors,
    dot,
    exp_inplace,
    logarithm,
    product,
    product_dtanh,
    product_tanh,
    tanh_inplace,
    transpose_block,
)
from compressed_ad.models.vector_code import WIDTH, compiled, fma

_BLOCK = 256
"""A sum over all parameters is a sum of sums over so many."""

# No option lets the compiler reorder or contract: the digits shall not depend on the processor.
_compile = compiled(vector_code.__file__)
_compile_part = compiled(vector_code.__file__, _nrt=False)

_F = np.float32


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
            add_vectors(hidden, to, p, b_at, p, w_at + ones[row, 0] * 2 * width, 2 * width)
            for c in range(1, ones.shape[1]):
                add_vectors(hidden, to, hidden, to, p, w_at + ones[row, c] * 2 * width, 2 * width)
        tanh_inplace(hidden, n * 2 * width)
    else:
        for u in range(n):
            for j in range(net.n_input):
                x[u * net.n_input + j] = dense[rows[u], j]
        zero = np.int64(0)
        product_tanh(
            hidden, zero, 2 * width, x, zero, net.n_input, p, w_at, 2 * width, b_at, n, 2 * width, net.n_input
        )
    for layer in range(1, len(net.widths)):
        before, width = net.widths[layer - 1], net.widths[layer]
        for half in range(2):
            product_tanh(
                hidden, layer * stride + half * width, 2 * width,
                hidden, (layer - 1) * stride + half * before, 2 * before,
                p, net.weights[layer] + half * before * width, width, net.biases[layer] + half * width,
                n, width, before,
            )  # fmt: skip
    last = (len(net.widths) - 1) * stride
    for u in range(n):
        for a in range(net.n_action + 1):
            at = last + u * 2 * width + (width if a == net.n_action else 0)
            logit = dot(hidden, at, p, net.head + a * width, width) + p[net.head_bias + a]
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
        norm, scale = logarithm(total), _F(1) / total
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
        product(g, head, width, dout, a, single, n_out, hidden, at, 2 * width, count, width, n)
        product_dtanh(delta, at, 2 * width, dout, a, n_out, p, head, width, hidden, n, width, count)

    for layer in range(top, -1, -1):
        width = net.widths[layer]
        b_at, z_at = net.biases[layer], layer * stride
        product(g, b_at, zero, one, zero, zero, zero, delta, z_at, 2 * width, single, 2 * width, n)
        if layer == 0:
            break
        before = net.widths[layer - 1]
        for half in range(2):
            source = (layer - 1) * stride + half * before
            target = layer * stride + half * width
            w_at = net.weights[layer] + half * before * width
            product(
                g, w_at, width, hidden, source, single, 2 * before, delta, target, 2 * width, before, width, n
            )
            for i in range(0, before, WIDTH):
                for j in range(0, width, WIDTH):
                    transpose_block(transposed, j * before + i, before, p, w_at + i * width + j, width)
            product_dtanh(
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
                add_vectors(g, at, g, at, delta, u * 2 * width, 2 * width)
    else:
        product(
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
        mean = dot(advantage, 0, one, 0, padded) * share
        for b in range(size):
            advantage[b] -= mean
        squares = dot(advantage, 0, advantage, 0, padded)
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
        squares += dot(g, at, g, at, min(_BLOCK, len(g) - at))
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
