"""What CompressedAD made of its border embeddings: their geometry, and what they do to its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.evaluation.attention import ratio_interval
from compressed_ad.models.ad import AD
from compressed_ad.models.compressed_ad import CompressedAD
from compressed_ad.models.tokens import Batch, Tokens
from compressed_ad.seeding import rng
from compressed_ad.types import FloatArray

CHANGES = ("no <compress>", "no \\compress>", "no marks", "another window's marks")
PLACES = ("inside", "outside", "all")
"""Where a query stands: inside if its own token tells of a marked transition, that is if the last border that
the model has seen is a ``<compress>``."""

CHUNK = 32


def needs_border_tokens(model: AD) -> CompressedAD:
    """``model`` itself; ``UsageError`` if it has no border embeddings."""
    if not isinstance(model, CompressedAD):
        raise UsageError(f"{type(model).__name__} has no border embeddings; only CompressedAD has")
    return model


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """The border embeddings of one set of weights, beside the other embeddings."""

    step: int  # gradient steps of training
    norm_start: float
    norm_end: float
    norm_token: float  # median norm of a token's embedding without border marks
    cosine: float  # of the two with each other
    cosine_start: Mapping[str, float]  # with each other embedding, by its name
    cosine_end: Mapping[str, float]


@torch.no_grad()
def geometry(model: AD, windows: Batch, step: int) -> Geometry:
    """Norms and cosines of the border embeddings, for weights of gradient step ``step``.

    The typical norm and the mean state embedding are those of the supervised tokens of ``windows``.
    """
    model = needs_border_tokens(model)
    tokens, valid = windows.tokens, windows.valid
    plain = model.embed(_without(tokens, start=True, end=True))[valid]
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
    """NaN where a vector is zero: it has no direction."""
    a, b = a.double(), b.double()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else float("nan")


# ---------------------------------------------------------------- effect on predictions


@dataclass(frozen=True)
class Effects:
    """How predictions change with the border marks: means over queries, 95 % intervals over windows.

    Axes: C ``changes``, P ``places`` of the query, and (value, low, high). Only windows that hold a border
    count, and of these only queries with a border in their context: before it, nothing changes.
    """

    changes: tuple[str, ...]  # C
    places: tuple[str, ...]  # P
    divergence: FloatArray  # (C, P, 3) nats, KL(as marked || changed) of the action distribution
    cross_entropy: FloatArray  # (C, P, 3) nats that the change adds on the actions taken; above 0: marks help
    n_window: int
    n_query: tuple[int, ...]  # (P,)


@torch.no_grad()
def mark_effects(model: AD, windows: Batch, *, n_bootstrap: int = 2000, seed: int = 0) -> Effects:
    """Take ``<compress>``, ``\\compress>`` or both away, or put another window's marks in their place.

    Divergences of continuous action distributions are averages over draws (``MixtureHead.divergence``).
    Transplanted marks stand at the positions where the other window had them; who gives to whom is a random
    cyclic order of the marked windows, so with fewer than two of them there is no such result (NaN).
    """
    model = needs_border_tokens(model)
    bordered = ((windows.tokens.start_mark | windows.tokens.end_mark) & windows.valid).any(dim=1)
    chosen = _rows(windows, bordered.nonzero()[:, 0])
    count = len(chosen.valid)
    if count == 0:
        nothing = np.full((len(CHANGES), len(PLACES), 3), np.nan)
        return Effects(CHANGES, PLACES, nothing, nothing, 0, (0,) * len(PLACES))
    tokens = chosen.tokens
    order = rng(seed, "transplanted marks").permutation(count)
    giver = np.empty(count, np.int64)
    giver[order] = np.roll(order, 1)
    given = torch.from_numpy(giver).to(chosen.valid.device)
    changed = [
        _without(tokens, start=True),
        _without(tokens, end=True),
        _without(tokens, start=True, end=True),
        replace(tokens, start_mark=tokens.start_mark[given], end_mark=tokens.end_mark[given]),
    ]
    seen = (tokens.start_mark | tokens.end_mark).cumsum(dim=1) > 0
    asked = chosen.valid & seen
    places = torch.stack([asked & tokens.marked, asked & ~tokens.marked, asked], dim=1).double()  # (B, P, L)
    reference = _parameters(model, tokens)
    log_prob = model.head.log_prob(reference, chosen.target)
    n_query = places.sum(dim=-1).cpu().numpy()  # (B, P)

    def mean(values: Tensor) -> FloatArray:
        sums = torch.einsum("bpt,bt->bp", places, values).cpu().numpy()
        return np.stack(ratio_interval(sums, n_query, n=n_bootstrap, seed=seed), axis=-1)

    divergence, cross_entropy = [], []
    for other in changed:
        given = _parameters(model, other)
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


def _without(tokens: Tokens, *, start: bool = False, end: bool = False) -> Tokens:
    """The same tokens without the border marks that are named."""
    gone = torch.zeros_like(tokens.start_mark)
    return replace(
        tokens,
        start_mark=gone if start else tokens.start_mark,
        end_mark=gone if end else tokens.end_mark,
    )


def _parameters(model: AD, tokens: Tokens) -> Tensor:
    """(B, L, P) of the action distributions in float64, some windows at a time, without dropout."""
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(tokens.reward), CHUNK):
        rows = slice(start, start + CHUNK)
        part = Tokens(**{name: tensor[rows] for name, tensor in vars(tokens).items()})
        parts.append(model(part).double())
    model.train(was_training)
    return torch.cat(parts)


def _rows(windows: Batch, rows: Tensor) -> Batch:
    tokens = Tokens(**{name: tensor[rows] for name, tensor in vars(windows.tokens).items()})
    return Batch(tokens, windows.target[rows], windows.valid[rows])
