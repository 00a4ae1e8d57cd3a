"""Compiled kernels of the learners that keep tables: tabular Q-learning and R-max.

Every kernel walks over slots one by one, and every slot has a random state of its own, so that what a slot
does depends on nothing beside it. All kernels release the GIL and are cached on disk; everything compiled is
in this file, because Numba recompiles only when the file of the called function changes.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

_compile = njit(cache=True, nogil=True, error_model="numpy")


@_compile
def _draw(random, i):
    """The next number in [0, 1) of slot ``i``: splitmix64 (Steele, Lea & Flood 2014)."""
    random[i] += np.uint64(0x9E3779B97F4A7C15)
    z = random[i]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@_compile
def number(elements, first, sizes, out):
    """Numbers (N,) of ``elements`` (N, C) into ``out``; returns the first row outside the space, or -1."""
    for i in range(len(elements)):
        index = 0
        for c in range(len(sizes)):
            digit = elements[i, c] - first[c]
            if digit < 0 or digit >= sizes[c]:
                return i
            index = index * sizes[c] + digit
        out[i] = index
    return -1


# ---------------------------------------------------------------------------------------------------------
# Tabular Q-learning


class Values(NamedTuple):
    """The tables of N learners with S states and K actions; those that are not needed have one entry."""

    q: NDArray[np.float32]  # (N, S, K)
    tried: NDArray[np.uint8]  # (N, S, K) whether the action was tried there
    visits: NDArray[np.int32]  # (N, S) arrivals in the state
    successor: NDArray[np.int32]  # (N, S, K) last outcome of the action, -1: the episode ended
    reward: NDArray[np.float32]  # (N, S, K)
    order: NDArray[np.int32]  # (N, S) states in which something was tried, in order of the first time
    n_order: NDArray[np.int32]  # (N,)


class Rule(NamedTuple):
    """How to learn; ``fade`` 0 and ``sweeps`` 0 do nothing."""

    learning_rate: float
    gamma: float
    initial: float
    fade: float
    sweeps: int


@_compile
def fill_uniform(q, random):
    """Initial values uniform in [0, 1), from the random state of each slot."""
    for i in range(len(q)):
        for state in range(q.shape[1]):
            for action in range(q.shape[2]):
                q[i, state, action] = _draw(random, i)


@_compile
def _best(values):
    """The largest of ``values``, and how many share it."""
    best, ties = values[0], 1
    for a in range(1, len(values)):
        if values[a] > best:
            best, ties = values[a], 1
        elif values[a] == best:
            ties += 1
    return best, ties


@_compile
def act_greedily(q, obs, met, n_obs, epsilon, random, action, probability, entropy):
    """Draw an epsilon-greedy ``action`` (N,) with shared ties; also its probability, and the entropy."""
    n_action = q.shape[2]
    for i in range(len(obs)):
        values = q[i, met[i] * n_obs + obs[i]]
        best, ties = _best(values)
        other = epsilon[i] / n_action
        greedy = (1.0 - epsilon[i]) / ties + other
        u = _draw(random, i)
        if u < epsilon[i]:
            chosen = min(int(u / epsilon[i] * n_action), n_action - 1)
        else:
            left = min(int((u - epsilon[i]) / (1.0 - epsilon[i]) * ties), ties - 1)
            chosen = -1
            while left >= 0:
                chosen += 1
                if values[chosen] == best:
                    left -= 1
        h = -ties * greedy * np.log(greedy) if greedy > 0 else 0.0
        if ties < n_action and other > 0:
            h -= (n_action - ties) * other * np.log(other)
        action[i], entropy[i] = chosen, max(h, 0.0)
        probability[i] = greedy if values[chosen] == best else other


@_compile
def learn_values(
    values,
    rule,
    n_obs,
    memory,
    obs,
    met,
    epsilon,
    action,
    reward,
    following,
    terminated,
    ended,
    log_prob_next,
):
    """One step of Q-learning in every slot, and planning in those whose episode ended; advances ``met``.

    ``log_prob_next`` (N,): log-probability of the action under the policy after it.
    """
    q = values.q
    n_action = q.shape[2]
    for i in range(len(obs)):
        r = np.float64(reward[i])
        a, state = action[i], met[i] * n_obs + obs[i]
        met_next = min(met[i] + (1 if r > 0 else 0), memory)
        next_state = met_next * n_obs + following[i]
        target = r
        if not terminated[i]:
            target += rule.gamma * np.float64(_best(q[i, next_state])[0])
        before = np.float64(q[i, state, a])
        q[i, state, a] = before + rule.learning_rate * (target - before)
        if rule.fade > 0 or rule.sweeps > 0:
            _remember(values, i, state, a, r, -1 if terminated[i] else next_state)
        if rule.fade > 0:
            values.visits[i, next_state] += 1
            if ended[i]:
                _fade(values, rule, i)
        if rule.sweeps > 0 and ended[i]:
            _plan(values, rule, i)
        best, ties = _best(q[i, state])
        chance = epsilon[i] / n_action
        if q[i, state, a] == best:
            chance += (1.0 - epsilon[i]) / ties
        log_prob_next[i] = np.log(max(chance, 1e-38))  # finite, also without exploration
        met[i] = 0 if ended[i] else met_next


@_compile
def _remember(values, i, state, a, reward, successor):
    if not values.tried[i, state].any() and len(values.order) > i:
        values.order[i, values.n_order[i]] = state
        values.n_order[i] += 1
    values.tried[i, state, a] = 1
    if len(values.successor) > i:
        values.successor[i, state, a] = successor
        values.reward[i, state, a] = reward


@_compile
def _fade(values, rule, i):
    """Lower the values of untried actions by the visits of their states."""
    for state in range(values.visits.shape[1]):
        if values.visits[i, state] > 0:
            hope = rule.initial * (1.0 + values.visits[i, state]) ** -rule.fade
            for a in range(values.q.shape[2]):
                if not values.tried[i, state, a]:
                    values.q[i, state, a] = hope


@_compile
def _plan(values, rule, i):
    """Sweep over all tried pairs with their last outcomes, latest states first, until nothing changes."""
    q = values.q
    for _ in range(rule.sweeps):
        change = 0.0
        for k in range(values.n_order[i] - 1, -1, -1):
            state = values.order[i, k]
            for a in range(q.shape[2]):
                if values.tried[i, state, a]:
                    target = np.float64(values.reward[i, state, a])
                    successor = values.successor[i, state, a]
                    if successor >= 0:
                        target += rule.gamma * np.float64(_best(q[i, successor])[0])
                    change = max(change, abs(target - q[i, state, a]))
                    q[i, state, a] = target
        if change < 1e-4:
            break


# ---------------------------------------------------------------------------------------------------------
# R-max

MOVES, PAIRS, GIVEN = 0, 1, 2
SEEN, PAYS, ENDS = 1, 2, 4
SHIFTS, RESTS = 1, 2


class Places(NamedTuple):
    """The observations O as places with C coordinates."""

    coordinates: NDArray[np.int64]  # (O, C)
    sizes: NDArray[np.int64]  # (C,)
    room: NDArray[np.int64]  # (O,) bit 2 c: a step up in coordinate c is possible; bit 2 c + 1: a step down


class Model(NamedTuple):
    """What N learners know. A mode is the number of rewards met in the episode, M of them.

    There is one table of ``outcome`` for each mode (pairs), for each slot (moves) or for each task (given).
    ``flags`` (SEEN, PAYS, ENDS) are those of a pair (pairs), else of the place stepped onto.
    """

    outcome: NDArray[np.int32]  # (N or tasks, M or 1, O, K) where the action leads to; -1: unknown
    flags: NDArray[np.uint8]  # (N, M, O or O * K)
    n_paying: NDArray[np.int32]  # (N, M) how many are flagged PAYS
    known: NDArray[np.uint8]  # (N, K) 0, or what is believed of the action: it SHIFTS the place, or RESTS
    ruled: NDArray[np.int64]  # (N, K) directions, as in ``Places.room``, in which the action did not move
    tried: NDArray[np.uint8]  # (N, K) whether the action was ever tried


@_compile
def _share_out(weights, firsts, n_action):
    """Add one target to ``weights`` (K,), shared equally among the first actions of its shortest paths."""
    count = 0
    for a in range(n_action):
        count += (firsts >> a) & 1
    for a in range(n_action):
        if (firsts >> a) & 1:
            weights[a] += 1.0 / count


@_compile
def act_by_plan(
    model, places, kind, settle, per_table, obs, met, epsilon, random, action, probability, entropy
):
    """Draw an ``action`` (N,): the first of a shortest path to what pays or is unknown, or a random one.

    Breadth first over the known outcomes. What is known to pay goes before the unknown, or, without
    ``settle``, only if it is not farther away. Targets at the same distance are equally likely, and so are
    the first actions of the shortest paths to one. In moves, actions that were never tried go before those
    that were tried and did not move.

    One function, because the arrays of each slot cost as much to hand over as a short search takes.
    """
    n_action = model.outcome.shape[3]
    n_place = model.outcome.shape[2]
    pay, new, stale = np.empty(n_action), np.empty(n_action), np.empty(n_action)
    distance, queue = np.full(n_place, -1, np.int32), np.empty(n_place, np.int32)
    firsts = np.empty(n_place, np.int64)
    for i in range(len(obs)):
        here, mode = obs[i], met[i]
        outcome = model.outcome[i // per_table, min(mode, model.outcome.shape[1] - 1)]
        flags = model.flags[i, mode]
        wait = settle and model.n_paying[i, mode] > 0  # for a place that pays
        pay[:] = 0.0
        new[:] = 0.0
        pays = found = False
        queue[0], distance[here] = here, 0
        low, high, level = 0, 1, 0
        while low < high:
            end = high
            look, some_new, some_stale = not found, False, False
            for j in range(low, end):
                place = queue[j]
                if level > 0 and kind != PAIRS and flags[place] & ENDS:
                    continue
                for a in range(n_action):
                    bits = np.int64(1) << a if level == 0 else firsts[place]
                    to = outcome[place, a]
                    if to < 0:
                        if not look or kind == GIVEN:
                            continue
                        if kind == MOVES and not places.room[place] & ~model.ruled[i, a]:
                            continue  # it would not move
                        if kind == PAIRS or not model.tried[i, a]:
                            some_new = True
                            _share_out(new, bits, n_action)
                        elif not some_new:
                            if not some_stale:
                                stale[:] = 0.0
                            some_stale = True
                            _share_out(stale, bits, n_action)
                        continue
                    if kind == PAIRS:
                        flag = flags[place * n_action + a]
                        if flag & PAYS:
                            pays = True
                            _share_out(pay, bits, n_action)
                        if flag & ENDS:
                            continue
                    elif level == 0 and to == here:
                        if flags[here] & PAYS:
                            pays = True
                            pay[a] += 1.0
                        elif not flags[here] & SEEN:
                            some_new = True
                            new[a] += 1.0
                    if distance[to] < 0:
                        distance[to], firsts[to] = level + 1, bits
                        queue[high] = to
                        high += 1
                    elif distance[to] == level + 1:
                        firsts[to] |= bits
            if kind != PAIRS:
                for j in range(end, high):
                    flag = flags[queue[j]]
                    if flag & PAYS:
                        pays = True
                        _share_out(pay, firsts[queue[j]], n_action)
                    elif look and not flag & SEEN:
                        some_new = True
                        _share_out(new, firsts[queue[j]], n_action)
            if some_stale and not some_new:
                new[:] = stale
            found = found or some_new or some_stale
            if pays or (found and not wait):
                break
            low, level = end, level + 1
        for j in range(high):
            distance[queue[j]] = -1
        weights = pay if pays else new
        if not pays and not found:
            new[:] = 1.0
        total = 0.0
        for a in range(n_action):
            total += weights[a]
        h, sum_before, chosen, u = 0.0, 0.0, -1, _draw(random, i)
        for a in range(n_action):
            weights[a] = (1.0 - epsilon[i]) * weights[a] / total + epsilon[i] / n_action
            if weights[a] > 0:
                h -= weights[a] * np.log(weights[a])
                if chosen < 0 or sum_before <= u:
                    chosen = a
            sum_before += weights[a]
        action[i], probability[i], entropy[i] = chosen, weights[chosen], max(h, 0.0)


@_compile
def learn_model(model, places, kind, memory, obs, met, action, reward, following, terminated, ended):
    """Take in one step of every slot; advances ``met``."""
    n_action = model.outcome.shape[3]
    for i in range(len(obs)):
        place, to, a, mode = obs[i], following[i], action[i], met[i]
        pays = reward[i] > 0
        key = place * n_action + a if kind == PAIRS else to
        before = model.flags[i, mode, key]
        model.flags[i, mode, key] = SEEN | (PAYS if pays else 0) | (ENDS if terminated[i] else 0)
        model.n_paying[i, mode] += (1 if pays else 0) - (1 if before & PAYS else 0)
        model.tried[i, a] = 1
        if kind == PAIRS:
            model.outcome[i, mode, place, a] = to
        elif kind == MOVES:
            model.outcome[i, 0, place, a] = to
            if model.known[i, a] == 0 or (model.known[i, a] == RESTS and to != place):
                _generalise(model, places, i, place, a, to)
        met[i] = 0 if ended[i] else min(mode + (1 if pays else 0), memory)


@_compile
def _generalise(model, places, i, place, a, to):
    """Fill in what action ``a`` does where it was not tried, once one move shows its displacement.

    An action that stood still where every direction had room is believed to rest. If it moves later, inner
    walls had stopped it; then what it does where it stood still is filled in as well.
    """
    rested = model.known[i, a] == RESTS
    if to == place:
        model.ruled[i, a] |= places.room[place]
        if model.ruled[i, a] != (1 << 2 * len(places.sizes)) - 1:
            return
    model.known[i, a] = RESTS if to == place else SHIFTS
    for origin in range(len(places.coordinates)):
        before = model.outcome[i, 0, origin, a]
        if before < 0 or (rested and before == origin):
            target = 0
            for c in range(len(places.sizes)):
                x = places.coordinates[origin, c]
                x += places.coordinates[to, c] - places.coordinates[place, c]
                if x < 0 or x >= places.sizes[c]:
                    target = -1
                    break
                target = target * places.sizes[c] + x
            model.outcome[i, 0, origin, a] = origin if target < 0 else target
