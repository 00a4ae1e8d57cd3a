"""Which tokens of a context stay visible: segments close, and their inside leaves.

Everything is one whole number for each token: ``until[j]``, the last query that may see token j. Token j is
visible to query i if j <= i <= until[j]. A *rule* says at which tokens segments close, from what these tokens
tell, so all of it is causal; nothing else knows of segments. The nearest of kin are gist tokens (Mu et al.
2023) and activation beacons (Zhang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressed_ad.errors import UsageError
from compressed_ad.models import SEGMENTS
from compressed_ad.models.settings import Architecture
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Tokens

Values = Mapping[str, Tensor]
"""What rules may read of tokens (B, L) or (N,): ``ended``, ``marked``, ``start_mark``, ``end_mark`` and
``reward`` as in ``Tokens``; ``episode_time``, steps of the episode before this one; ``episode_return``, the
rewards of the episode of transition t - 1 up to this transition; ``place``, steps of the context so far."""

NEVER = 2**31 - 1
"""``until`` of a token that no known event hides."""


@dataclass(frozen=True)
class SegmentEvents:
    """What happens at tokens (B, L) or (N,), all bool.

    At a token that ``closes``, the inside of the segment leaves: all tokens since the last one that opens or
    closes a segment, but for those that it ``keeps``. At a token that ``opens`` without closing, the segment
    ends and stays as a whole.
    """

    opens: Tensor
    closes: Tensor
    keeps: Tensor


def episode(token: Values, every: int) -> SegmentEvents:
    """Each episode closes. The token after its last step stays, and every ``every``-th within, if not 0."""
    ended = token["ended"]
    inside = token["episode_time"] % every == 0 if every else torch.zeros_like(ended)
    return SegmentEvents(ended, ended, ended | inside & (token["episode_time"] > 0))


def fruitless(token: Values, every: int) -> SegmentEvents:
    """Episodes without a return above 0 close; the others stay as they are."""
    ended = token["ended"]
    return SegmentEvents(ended, ended & (token["episode_return"] <= 0), ended)


def marks(token: Values, every: int) -> SegmentEvents:
    r"""Marked segments close at ``\compress>``; unmarked steps stay."""
    return SegmentEvents(token["end_mark"], token["end_mark"], ~token["marked"])


def thin(token: Values, every: int) -> SegmentEvents:
    """Each episode closes; of all steps, every ``every``-th stays, whatever it tells. A control."""
    place = token["place"]
    return SegmentEvents(token["ended"], token["ended"], (place > 0) & (place % every == 0))


def random(token: Values, every: int) -> SegmentEvents:
    """Segments close at random places, after ``every`` steps on average. A control.

    The places are the same in all contexts, but for where their episodes begin: a hash of the place decides.
    """
    place = token["place"]
    mixed = (place * 2654435761 + 0x9E37) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    closes = (((mixed ^ (mixed >> 13)) % every) == 0) & (place > 0)
    return SegmentEvents(closes, closes, closes)


def events(config: Architecture, token: Values) -> SegmentEvents | None:
    """What happens at each token by the rule of ``config``; None without one.

    ``UsageError`` if a rule of the user's own gives anything else.
    """
    if config.segmentation == "none":
        return None
    found, shape = SEGMENTS[config.segmentation](token, config.segment_every), token["ended"].shape
    right = isinstance(found, SegmentEvents) and all(
        isinstance(part, Tensor) and part.shape == shape and part.dtype == torch.bool
        for part in vars(found).values()
    )
    if not right:
        raise UsageError(
            f"segmentation {config.segments!r} must give SegmentEvents of {tuple(shape)} truth values"
        )
    return found


def in_windows(config: Architecture, tokens: Tokens) -> tuple[SegmentEvents | None, Tensor]:
    """``events`` of whole windows ``tokens`` (B, L), and ``until`` (B, L), the last query that sees each."""
    values = _of_windows(tokens)
    found = events(config, values)
    return found, visible_until(config, found, values["place"])


def _of_windows(tokens: Tokens) -> dict[str, Tensor]:
    """What rules may read of the tokens (B, L) of whole windows."""
    shown = {name: getattr(tokens, name) for name in ("ended", "marked", "start_mark", "end_mark", "reward")}
    total = TOKEN_INPUT["episode_return"].of_windows(tokens)
    before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], dim=1)
    place = torch.arange(tokens.ended.shape[1], device=total.device).expand(tokens.ended.shape)
    time = TOKEN_INPUT["episode_time"].of_windows(tokens)
    return shown | {"episode_return": before + tokens.reward, "episode_time": time, "place": place}


def visible_until(config: Architecture, found: SegmentEvents | None, place: Tensor) -> Tensor:
    """``until`` (B, L) int64 of windows from their ``events``; ``place`` (B, L) counts their tokens.

    Of finished segments at most ``kept_tokens`` tokens stay: each goes when so many newer ones stay. What
    the rule keeps stays from the start; the rest of a segment that ends without closing, from its end.
    Everything goes after ``n_transit`` steps, because training shows nothing older. The last
    ``recent_steps`` steps are visible in any case.
    """
    recent = place + config.recent_steps - 1
    if found is None:
        return recent
    length = place.shape[1]
    never = torch.full_like(place, NEVER)
    ending = torch.where(found.opens | found.closes, place, never)
    later = torch.cat([ending[:, 1:], never[:, :1]], dim=1)
    end = later.flip(1).cummin(dim=1).values.flip(1)  # of the segment, or NEVER
    closed = (end < NEVER) & found.closes.gather(1, end.clamp(max=length - 1))
    leaves = torch.where(closed, end - (0 if config.segment_gist else 1), never)
    stays = found.keeps | ((end < NEVER) & ~closed)
    since = torch.where(found.keeps, place, end)
    staying = torch.zeros_like(place).scatter_add_(1, since.clamp(max=length - 1), stays.long()).cumsum(dim=1)

    def reached(count: Tensor) -> Tensor:
        """The first query at which so many tokens (B, L) stay, or NEVER."""
        first = torch.searchsorted(staying, count)
        return torch.where(first < length, first, never)

    # Older tokens of its own segment stay from the segment's end on; until then they are not counted.
    early = reached(staying + config.kept_tokens)
    late = reached(stays.long().cumsum(dim=1) + config.kept_tokens).maximum(since)
    dropped = torch.where(found.keeps & (early < end), early, late)
    return torch.where(stays, dropped, leaves).minimum(place + config.n_transit - 1).maximum(recent)
