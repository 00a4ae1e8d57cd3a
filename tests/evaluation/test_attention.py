"""Attention taken from the weights, and what the border marks do, against other ways of computing them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compressed_ad.cli.main import main
from compressed_ad.errors import UsageError
from compressed_ad.evaluation.attention import (
    attention_maps,
    attention_probabilities,
    attention_shares,
    block_inputs,
    by_lag,
    kinds_of,
    lag_hazard,
    matched_attention,
    ratio_interval,
)
from compressed_ad.evaluation.border_embeddings import geometry, mark_effects
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.tokens import Batch, shift
from compressed_ad.models.transformer import visible
from tests.conftest import SmokeRun
from tests.models.test_models import batch, config, lively, transitions

NAMES = ["AD", "CompressedAD", "MarkedAttentionAD"]


def model(name: str, **values: object) -> AD:
    torch.manual_seed(3)
    made = lively(MODEL[name](config(model=name, **values)))
    for key, value in made.named_parameters():
        if key.endswith("mark_bias"):
            torch.nn.init.normal_(value)
    return made


@pytest.mark.parametrize(
    "changes", [{"position": "rotary"}, {"position": "learned"}, {"segments": "episode"}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_the_fused_kernel(name: str, changes: dict[str, str]) -> None:
    """Values mixed by the maps give the fused output, to float32 sums in another order."""
    player, tokens = model(name, **changes), shift(**transitions(3, 20))
    maps = attention_maps(player, tokens)
    assert maps.shape == (2, 3, 2, 20, 20)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 2, 20))
    assert (maps.triu(1) == 0).all()
    with torch.no_grad():
        for (block, given), own in zip(block_inputs(player, tokens), maps, strict=True):
            x, rotation, marked, until = given
            q, k, v = block.attention.heads(block.norm_attention(x), rotation, marked)
            mask = None if until is None else visible(until)[:, None]
            assert ("segments" in changes) == (mask is not None)
            scale = block.attention.scale
            fused = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
            torch.testing.assert_close(own @ v, fused, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(attention_probabilities(block, *given), own)


def test_a_head_without_queries_attends_evenly() -> None:
    """Zero query weights: every share is the uniform one, in closed form."""
    player, windows = model("CompressedAD"), batch(4, 12)
    with torch.no_grad():
        for block in player.transformer.blocks:
            block.attention.qkv.weight[:16] = 0  # the queries of width 16
    shares = attention_shares(player, windows, n_bootstrap=50)
    kinds = kinds_of(windows.tokens).double()
    valid = windows.valid.double()
    even = (kinds / torch.arange(1, 13)[:, None]).sum(dim=-1)  # (B, K, t)
    expected = (even * valid[:, None]).sum(dim=(0, 2)) / valid.sum()
    np.testing.assert_allclose(shares.uniform, expected, rtol=1e-6)
    np.testing.assert_allclose(shares.share, np.broadcast_to(expected[:, None, None], (4, 2, 2)), rtol=1e-5)
    np.testing.assert_allclose(shares.ratio, 1.0, rtol=1e-5)


def test_a_head_that_looks_at_lags_alone_is_matched_exactly() -> None:
    weight = torch.tensor([0.1, 2.0, 0.5, 0.0, 1.0, 0.3, 0.2, 0.7], dtype=torch.float64)
    step = torch.arange(8)
    lag = step[:, None] - step
    maps = weight[lag.clamp(min=0)] * (lag >= 0)
    maps = maps / maps.sum(dim=-1, keepdim=True)
    np.testing.assert_allclose(matched_attention(lag_hazard(by_lag(maps))), maps, atol=1e-12)


def test_kinds_against_a_loop() -> None:
    tokens = shift(**transitions(2, 15, seed=4))
    kinds = kinds_of(tokens)
    ended = tokens.ended.numpy()
    for b in range(2):
        for t in range(15):
            for j in range(15):
                told = j <= t and j > 0
                # Token j tells of transition j - 1, whose episode is that of state t if none ended between.
                same = told and not ended[b, j : t + 1].any()
                expected = [
                    told and bool(tokens.marked[b, j]),
                    told and bool(tokens.reward[b, j] > 0),
                    same,
                    told and bool(tokens.start_mark[b, j] | tokens.end_mark[b, j]),
                ]
                assert kinds[b, :, t, j].tolist() == expected


def test_marks_change_nothing_where_their_vectors_are_zero() -> None:
    player, windows = model("CompressedAD"), batch(4, 12)
    real = mark_effects(player, windows, n_bootstrap=50)
    assert (real.divergence[:, -1, 0] > 0).all()
    with torch.no_grad():
        player.embed_compress_start.zero_()
        player.embed_compress_end.zero_()
    nothing = mark_effects(player, windows, n_bootstrap=50)
    assert not nothing.divergence.any() and not nothing.cross_entropy.any()


def test_taking_all_marks_away_is_the_unmarked_window() -> None:
    player, windows = model("CompressedAD"), batch(4, 12)
    found = mark_effects(player, windows, n_bootstrap=50)
    window = transitions(4, 12)
    unmarked = shift(**{**window, "mask": torch.zeros_like(window["mask"])})
    bordered = windows.tokens.start_mark | windows.tokens.end_mark
    asked = windows.valid & (bordered.cumsum(dim=1) > 0)
    rows = (bordered & windows.valid).any(dim=1)
    with torch.no_grad():
        a, b = (torch.log_softmax(player(t).double(), dim=-1) for t in (windows.tokens, unmarked))
    kl = (a.exp() * (a - b)).sum(dim=-1)[rows][asked[rows]].mean()
    place = found.changes.index("no marks")
    np.testing.assert_allclose(found.divergence[place, -1, 0], kl, rtol=1e-4)


def test_geometry_is_that_of_the_vectors() -> None:
    player, windows = model("CompressedAD"), batch(4, 12)
    found = geometry(player, windows, 7)
    start, end = player.embed_compress_start.detach(), player.embed_compress_end.detach()
    assert found.norm_start == pytest.approx(float(start.norm()))
    assert found.cosine == pytest.approx(float(F.cosine_similarity(start, end, dim=0)), rel=1e-5)
    with pytest.raises(UsageError, match="AD has no border embeddings"):
        geometry(model("AD"), windows, 7)


def test_ratio_intervals_cover_the_truth_and_collapse_without_spread() -> None:
    same = np.ones((30, 2))
    middle, low, high = ratio_interval(2 * same, same)
    np.testing.assert_array_equal([middle, low, high], 2.0)
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        below = random.uniform(1, 3, (40, 1))
        above = below * random.normal(1.5, 0.4, (40, 1))
        _, low, high = ratio_interval(above, below, n=400, seed=seed)
        hits += int(low[0] <= 1.5 <= high[0])
    # 95 % nominal; a percentile bootstrap of 40 windows loses a little. 5 standard errors of 100 trials.
    assert hits >= 84


def test_no_query_is_told() -> None:
    windows = batch(2, 6)
    with pytest.raises(UsageError, match="no supervised query"):
        attention_shares(model("AD"), Batch(windows.tokens, windows.target, windows.valid & False))


@pytest.mark.parametrize("name", ["AD", "CompressedAD"])
def test_the_command_writes_what_it_says(
    name: str, smoke: SmokeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(smoke.out, folder)
    run = folder / f"{name}-darkroom-seed0"
    assert main(["attention", str(run), "--windows", "8"]) == 0
    said = capsys.readouterr().out
    assert "marked" in said.lower() and str(run / "attention") in said
    found = json.loads((run / "attention" / "attention.json").read_text())
    assert np.shape(found["shares"]["share"])[0] == 4
    assert (found["effects"] is None) == (name == "AD")
    if name != "AD":  # of the weights that everything else is of
        (shown,) = [g for g in found["geometry"] if g["step"] == found["step"]]
        assert f"Norms at gradient step {found['step']}: <compress> " in said
        assert f"{shown['norm_start'] / shown['norm_token']:.1%}" in said
    figures = {p.name for p in (run / "attention").glob("*.png")}
    assert figures == {"attention.png", "attention_map.png"} | ({"tokens.png"} if name != "AD" else set())
    assert main(["attention", str(run), "--windows", "8", "--part", "validation"]) == 0


def test_mistakes_are_one_line(smoke: SmokeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = smoke.out / "AD-darkroom-seed0"
    for words in (["--windows", "8", "--window", "9"], ["--part", "some"], ["--out", str(smoke.out)]):
        capsys.readouterr()
        assert main(["attention", str(run), *words]) in (1, 2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cad: error")]
        assert len(lines) == 1
    assert main(["attention", str(tmp_path)]) in (1, 2)
