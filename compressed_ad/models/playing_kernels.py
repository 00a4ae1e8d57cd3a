"""Compiled kernels for playing with models on CPUs: a step of many contexts, and the embedding of its tokens.

A step takes a token of each context through a block, and a refill all tokens of a few contexts:
``block_step``. In its products a vector holds a number of many tokens, so weights are used as they lie.

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
    emit_fma,
    emitted,
    integers,
    load,
    make_gelu,
    make_tile,
    number,
    padded,
    shuffled,
    spread,
    store,
)

_compile = compiled()
_F = np.float32


# ---------------------------------------------------------------------------------------------------------
# Vector code

_product, _narrow_product = make_tile(2, add=False), make_tile(1, add=False)
_one_row, _narrow_row = make_tile(2, add=False, rows=1), make_tile(1, add=False, rows=1)
_gelu = make_gelu(backward=False)


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


@emitted()
def _scores(builder, p, q, key, at, dim, n, soon, soon_at):
    """p[t] = sum_d q[d] key[at + t dim + d], d < ``dim``, t < n; what follows in p is of no use.

    All three are read, or filled, to the next multiple of WIDTH. Meanwhile, as many numbers are fetched from
    ``soon[soon_at]`` on: where contexts are many, memory is too far away to wait for it at each key.
    """
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
                builder.fadd(shuffled(builder, a, b, even), shuffled(builder, a, b, odd)) for a, b in pairs
            ]
        store(builder, vectors[0], p(begin))


@emitted(types.float32, masked=types.boolean)
def _softmax_row(builder, p, n, masked, hidden, hidden_at):
    """p[t] = exp(p[t] - the largest), t < n, and 0 from there to the next multiple of WIDTH; gives their sum.

    If ``masked``, a t with ``hidden[hidden_at + t]`` does not count and becomes 0.
    """
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


@emitted()
def _add_weighted(builder, y, p, value, at, dim, n, soon, soon_at):
    """y[d] += sum_t p[t] value[at + t dim + d], t < n, for d < ``dim``; what follows in y is of no use.

    y is filled, and value read, to the next multiple of WIDTH; for ``soon`` see ``_scores``.
    """
    strands = 4  # sums side by side, so that none waits for the last product
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


# ---------------------------------------------------------------------------------------------------------
# A step


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
    width, wide, deep = x.shape[1], down_weight.shape[1], padded(dim, WIDTH)
    keys, values, unseen = key.reshape(-1), value.reshape(-1), hidden.reshape(-1)
    a, b = np.zeros(width * COLUMNS, _F), np.zeros(width * COLUMNS, _F)
    qkv, h = np.zeros(3 * width * COLUMNS, _F), np.zeros(wide * COLUMNS, _F)
    q, y, p = np.zeros(deep, _F), np.zeros(deep, _F), np.zeros(padded(room, WIDTH), _F)
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
                if begin + padded(n, WIDTH) * dim + WIDTH > len(keys):  # no numbers to fill up with behind
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
