"""What leaves a context: ``until`` against a plain simulation, play with a compact cache against windows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from compressed_ad.errors import ConfigError, UnknownNameError, UsageError
from compressed_ad.models import MODEL, SEGMENTS
from compressed_ad.models.ad import AD
from compressed_ad.models.compact_cache import CompactCache
from compressed_ad.models.segments import NEVER, SegmentEvents, events, in_windows
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Tokens, shift
from compressed_ad.models.transformer import frequencies
from tests.models.test_models import config, lively, transitions


def anything(token: Any, every: int) -> SegmentEvents:
    """A rule whose events have nothing to do with each other: bits of a hash of the place."""
    mixed = ((token["place"] * 2654435761 + every * 40503) % 2**32) ^ token["ended"].long()
    bits = [(mixed >> shift_) % n == 0 for shift_, n in ((7, 9), (12, 9), (17, 3))]
    return SegmentEvents(*bits)


RULES = st.sampled_from(
    [
        {"segments": "episode"},
        {"segments": "episode", "segment_every": 3},
        {"segments": "fruitless"},
        {"segments": "marks"},
        {"segments": "thin", "segment_every": 4},
        {"segments": "random", "segment_every": 5},
        {"segments": "none", "recent_steps": 6},
        {"segments": f"{__name__}:anything", "segment_every": 2},
        {"segments": f"{__name__}:anything", "segment_every": 9},
    ]
)
OPTIONS = st.fixed_dictionaries(
    {
        "segment_gist": st.booleans(),
        "kept_tokens": st.integers(1, 7),
        "recent_steps": st.sampled_from([0, 0, 4]),
        "n_transit": st.sampled_from([7, 12, 60]),
    }
)


def tokens_of(n_row: int, length: int, seed: int) -> Tokens:
    return shift(**transitions(n_row, length, seed))


def found_in(made: ModelConfig, tokens: Tokens) -> tuple[SegmentEvents | None, Tensor]:
    return in_windows(made, tokens)


def simulated(made: ModelConfig, row: dict[str, list[bool]], length: int) -> list[set[int]]:
    """What each query sees, one token after the other: lists, and no ``until``."""
    seen, open_, kept = [], list[int](), list[int]()
    for i in range(length):
        recent = range(max(0, i - made.recent_steps + 1), i + 1)
        if made.segments == "none":
            seen.append(set(recent))
            continue
        closes, opens, keeps = row["closes"][i], row["opens"][i], row["keeps"][i]
        leaving = open_ if closes and made.segment_gist else []
        if opens and not closes:
            kept = sorted(kept + open_)
        if opens or closes:
            open_ = []
        (kept if keeps else open_).append(i)
        seen.append({*leaving, *open_, *kept, *recent, i})
        # After n_transit steps, everything goes.
        kept = [j for j in kept[-made.kept_tokens :] if j > i + 1 - made.n_transit]
        open_ = [j for j in open_ if j > i + 1 - made.n_transit]
    return seen


@given(RULES, OPTIONS, st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_until_is_what_a_plain_simulation_shows(
    rule: dict[str, Any], options: dict[str, Any], seed: int
) -> None:
    made = config(**{**options, **rule})
    tokens = tokens_of(2, 40, seed)
    found, until = found_in(made, tokens)
    for b in range(2):
        row = {} if found is None else {k: v[b].tolist() for k, v in vars(found).items()}
        expected = simulated(made, row, 40)
        shown = [{j for j in range(i + 1) if until[b, j] >= i} for i in range(40)]
        assert shown == expected


@given(RULES, OPTIONS, st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_that_leaves_depends_on_what_comes_later(
    rule: dict[str, Any], options: dict[str, Any], seed: int, cut: bool
) -> None:
    made, tokens = config(**{**options, **rule}), tokens_of(1, 40, seed)
    whole = found_in(made, tokens)[1]
    part = found_in(made, tokens.each(lambda x: x[:, :25]))[1]
    query = torch.arange(25)[:, None]
    assert torch.equal(whole[:, None, :25] >= query, part[:, None] >= query)


def played(model: AD, tokens: Tokens, idle: Tensor | None = None) -> Tensor:
    """Logits (B, L, K) of one token at a time; where ``idle``, the token is taken back and given again."""
    n_row, length = tokens.ended.shape
    cache = model.new_cache(n_row)
    at = torch.zeros(n_row, dtype=torch.long)
    logits = torch.zeros(n_row, length, 5)
    while bool((at < length).any()):
        row = torch.arange(n_row)
        now = at.clamp(max=length - 1)
        given_ = model(tokens.each(lambda x, now=now, row=row: x[row, now][:, None]), cache)[:, 0]
        back = (at >= length) if idle is None else (at >= length) | idle[row, now]
        if idle is not None:
            idle[row, now] = False
        logits[row[~back], now[~back]] = given_[~back]
        cache.forget(back)
        at = at + (~back).long()
    return logits


@given(
    RULES,
    OPTIONS,
    st.sampled_from(["AD", "CompressedAD", "MarkedAttentionAD"]),
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_play_with_a_compact_cache_is_that_of_whole_windows(
    rule: dict[str, Any], options: dict[str, Any], name: str, ragged: bool, seed: int
) -> None:
    made, tokens = config(**{**options, **rule, "model": name}), tokens_of(3, 50, seed)
    torch.manual_seed(seed)
    model = lively(MODEL[name](made))
    if made.segments != "none":
        torch.nn.init.normal_(model.embed_gist)
    for block in model.transformer.blocks:
        if block.attention.mark_bias is not None:
            torch.nn.init.normal_(block.attention.mark_bias)
    idle = torch.rand((3, 50), generator=torch.Generator().manual_seed(seed)) < 0.2 if ragged else None
    with torch.no_grad():
        x = model.embed(tokens)
        found, until = found_in(made, tokens)
        if found is not None:
            x = x + found.closes[..., None] * model.embed_gist
        angle = torch.arange(50)[:, None] * frequencies(model.transformer.head_dim)
        model.transformer.cos, model.transformer.sin = angle.cos(), angle.sin()
        whole = model.head(model.transformer(x, model.attended(tokens), until))
        step_by_step = played(model, tokens, idle)
    # Sums in another order, and angles of double precision: 2e-5 of logits of size 10.
    torch.testing.assert_close(step_by_step, whole, rtol=0, atol=2e-4)


def test_without_segments_nothing_changes_bit_for_bit() -> None:
    tokens = tokens_of(2, 24, 1)
    torch.manual_seed(0)
    plain = lively(AD(config(model="AD")))
    # Episodes never end here, so no segment closes.
    tokens = tokens.without("ended")
    gist = AD(config(model="AD", segments="episode")).eval()
    gist.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(gist(tokens), plain(tokens))
    assert {name for name, _ in gist.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "embed_gist"
    }


def test_gist_ad_is_ad_with_episodes_as_segments() -> None:
    tokens = tokens_of(2, 24, 1)
    named = lively(MODEL["GistAD"](config(model="GistAD")))
    plain = AD(config(model="AD", segments="episode")).eval()
    plain.load_state_dict(named.state_dict())
    assert torch.equal(named(tokens), plain(tokens))
    assert isinstance(named.new_cache(1), CompactCache)
    other = MODEL["GistAD"](config(model="GistAD", segments="random", segment_every=5))
    assert other.config.segmentation == "random"


def test_a_border_collects_its_segment_only_if_it_may() -> None:
    """A later step changes with the inside of a closed episode through the gist, and through nothing else."""
    for gist in (True, False):
        torch.manual_seed(0)
        model = lively(AD(config(model="AD", segments="episode", segment_gist=gist)))
        values = transitions(1, 20)
        values["ended"][:] = False
        values["ended"][:, 9] = True
        before = model(shift(**values))
        values["states"][:, 4] = (values["states"][:, 4] + 1) % 9
        change = (model(shift(**values)) - before).abs().amax(dim=-1)[0]
        assert bool((change[4:10] > 0).all())
        assert bool((change[10:] > 0).any()) == gist


def test_a_step_costs_the_same_at_any_history() -> None:
    model = lively(AD(config(model="AD", segments="episode", kept_tokens=8, n_transit=50)))
    tokens = tokens_of(4, 2000, 3)
    cache = model.new_cache(4)
    sizes = []
    with torch.no_grad():
        for t in range(2000):
            model(tokens.each(lambda x, t=t: x[:, t : t + 1]), cache)
            sizes.append(cache.key.shape[3])
    assert isinstance(cache, CompactCache)
    assert sizes[-1] == sizes[1000] <= 2 * (8 + 50)
    assert cache.place.tolist() == [2000] * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": "random"}, "segments random needs segment_every"),
        (
            {"segments": "fruitless", "segment_every": 3},
            "segment_every has no effect with segments fruitless",
        ),
        ({"segments": "episode", "position": "learned"}, "need rotary positions"),
        ({"recent_steps": 3, "position": "learned"}, "need rotary positions"),
        ({"model": "GistAD", "position": "learned"}, "need rotary positions"),
        ({"segments": "episode", "kept_tokens": 0}, "kept_tokens"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


def every_other(token: Any, every: int) -> SegmentEvents:
    closes = (token["place"] % 2 == 1) & ~token["ended"]
    return SegmentEvents(closes, closes, closes)


def wrong_shape(token: Any, every: int) -> SegmentEvents:
    return SegmentEvents(token["ended"][:0], token["ended"], token["ended"])


def no_events(token: Any, every: int) -> Tensor:
    return token["ended"]


def test_own_rules() -> None:
    here = "tests.models.test_segments"
    made = config(segments=f"{here}:every_other", kept_tokens=3)
    tokens = tokens_of(1, 10, 0)
    _, until = found_in(made, tokens)
    assert until[0, 0] == 1 or bool(tokens.ended[0, 1])
    with pytest.raises(UnknownNameError, match="episode"):
        events(config(segments="episod"), {})
    for wrong in ("wrong_shape", "no_events"):
        with pytest.raises(UsageError, match=wrong):
            found_in(config(segments=f"{here}:{wrong}"), tokens)
    assert np.all([name in SEGMENTS for name in ("episode", "fruitless", "marks", "thin", "random")])
    assert NEVER == 2**31 - 1
