"""Border embeddings of CompressedAD: their geometry, and their effect on predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.attention import ratio_interval
from compressed_ad.models.ad import AD, evaluating
from compressed_ad.models.compressed_ad import CompressedAD
from compressed_ad.models.tokens import Batch, Tokens
from compressed_ad.seeding import rng
from compressed_ad.types import FloatArray

CHANGES = ("no <compress>", "no \\compress>", "no marks", "another window's marks")
PLACES = ("inside", "outside", "all")
"""Place of a query: inside if its token has the outcome of a marked transition, that is if the last border in
its context is a ``<compress>``."""


def _with_border_embeddings(model: AD) -> CompressedAD:
    if not isinstance(model, CompressedAD):
        raise UsageError(f"{type(model).__name__} has no border embeddings; only CompressedAD has")
    return model


@dataclass(frozen=True)
class Geometry:
    """The border embeddings of one set of weights, compared with the other embeddings."""

    step: int  # gradient steps of training
    norm_start: float
    norm_end: float
    norm_token: float  # median norm of a token's embedding without border marks
    cosine: float  # of the two
    cosine_start: Mapping[str, float]  # with each of the other embeddings, by name
    cosine_end: Mapping[str, float]


@torch.no_grad()
def geometry(model: AD, windows: Batch, step: int) -> Geometry:
    """Norms and cosines of the border embeddings, for the weights of gradient step ``step``.

    ``norm_token`` and the mean state embedding are those of the supervised tokens of ``windows``.
    """
    model = _with_border_embeddings(model)
    tokens, valid = windows.tokens, windows.valid
    plain = model.embed(tokens.without("start_mark", "end_mark"))[valid]
    others = {
        **{f"action {name}": vector for name, vector in model.action.vectors().items()},
        "reward": model.reward,
        "ended": model.ended,
        "first": model.first,
        "mean state": model.state(model.stem(tokens.state))[valid].mean(dim=0),
    }
    start, end = model.embed_compress_start, model.embed_compress_end
    return Geometry(
        step=step,
        norm_start=float(start.norm()),
        norm_end=float(end.norm()),
        norm_token=float(plain.norm(dim=-1).median()),
        cosine=_cosine(start, end),
        cosine_start={name: _cosine(start, other) for name, other in others.items()},
        cosine_end={name: _cosine(end, other) for name, other in others.items()},
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    """NaN if a vector is zero."""
    a, b = a.double(), b.double()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else float("nan")


@dataclass(frozen=True)
class Effects:
    """How predictions depend on the border marks: means over queries, 95 % intervals over windows.

    Axes: C ``changes``, P ``places`` of the query, and (value, low, high). Only queries with a border in
    their context count: before it, nothing changes.
    """

    changes: tuple[str, ...]  # C
    places: tuple[str, ...]  # P
    divergence: FloatArray  # (C, P, 3) nats, KL(as marked || changed) of the action distribution
    cross_entropy: FloatArray  # (C, P, 3) increase in nats by the change; above 0: marks help
    n_window: int
    n_query: tuple[int, ...]  # (P,)


@torch.no_grad()
def mark_effects(model: AD, windows: Batch, *, n_bootstrap: int = 2000, seed: int = 0) -> Effects:
    """Remove ``<compress>``, ``\\compress>`` or both, or replace them by another window's marks.

    Divergences of continuous action distributions are averages over draws (``MixtureHead.divergence``).
    Marks keep their positions in the other window. Windows exchange marks in a random cyclic order; with
    fewer than two of them this result is NaN.
    """
    model = _with_border_embeddings(model)
    bordered = ((windows.tokens.start_mark | windows.tokens.end_mark) & windows.valid).any(dim=1)
    chosen = windows.part(bordered.nonzero()[:, 0])
    count = len(chosen.valid)
    if count == 0:
        nothing = np.full((len(CHANGES), len(PLACES), 3), np.nan)
        return Effects(CHANGES, PLACES, nothing, nothing, 0, (0,) * len(PLACES))
    tokens = chosen.tokens
    order = rng(seed, "transplanted marks").permutation(count)
    source = np.empty(count, np.int64)
    source[order] = np.roll(order, 1)
    other = torch.from_numpy(source).to(chosen.valid.device)
    changed = [
        tokens.without("start_mark"),
        tokens.without("end_mark"),
        tokens.without("start_mark", "end_mark"),
        replace(tokens, start_mark=tokens.start_mark[other], end_mark=tokens.end_mark[other]),
    ]
    query = chosen.valid & ((tokens.start_mark | tokens.end_mark).cumsum(dim=1) > 0)
    places = torch.stack([query & tokens.marked, query & ~tokens.marked, query], dim=1).double()  # (B, P, L)
    reference = _parameters(model, tokens)
    log_prob = model.head.log_prob(reference, chosen.target)
    n_query = places.sum(dim=-1).cpu().numpy()  # (B, P)

    def mean(values: Tensor) -> FloatArray:
        sums = torch.einsum("bpt,bt->bp", places, values).cpu().numpy()
        return np.stack(ratio_interval(sums, n_query, n=n_bootstrap, seed=seed), axis=-1)

    divergence, cross_entropy = [], []
    for variant in changed:
        given = _parameters(model, variant)
        divergence.append(mean(model.head.divergence(reference, given)))
        cross_entropy.append(mean(log_prob - model.head.log_prob(given, chosen.target)))
    if count < 2:
        divergence[-1][:] = cross_entropy[-1][:] = np.nan
    return Effects(
        changes=CHANGES,
        places=PLACES,
        divergence=np.stack(divergence),
        cross_entropy=np.stack(cross_entropy),
        n_window=count,
        n_query=tuple(int(k) for k in n_query.sum(axis=0)),
    )


def _parameters(model: AD, tokens: Tokens) -> Tensor:
    """(B, L, P) of the action distributions in float64, without dropout."""
    with evaluating(model):
        firsts = range(0, len(tokens.reward), 32)
        return torch.cat([model(tokens.part(slice(first, first + 32))).double() for first in firsts])
