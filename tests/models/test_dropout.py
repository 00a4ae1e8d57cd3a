"""What is dropped while training: the embedding, attention weights, residual branches."""

import pytest
import torch

from compressed_ad.models import transformer
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import shift
from tests.models.test_models import config, lively, transitions


def test_one_setting_sets_embedding_and_residual_unless_they_are_given() -> None:
    assert config(dropout=0.1).dropouts == (0.1, 0.0, 0.1)
    assert config(dropout=0.1, residual_dropout=0.0, attention_dropout=0.5).dropouts == (0.1, 0.5, 0.0)
    assert config(embedding_dropout=0.3).dropouts == (0.3, 0.0, 0.0)
    assert config(dropout=0.1, embedding_dropout=0.0).dropouts == (0.0, 0.0, 0.1)
    kept = set(ModelConfig().model_dump(mode="json"))
    assert not {"embedding_dropout", "residual_dropout", "attention_dropout"} & kept


@pytest.mark.parametrize("part", ["embedding_dropout", "residual_dropout", "attention_dropout"])
def test_each_acts_in_training_alone(part: str) -> None:
    torch.manual_seed(0)
    plain = lively(AD(config()))
    torch.manual_seed(0)
    model = lively(AD(config(**{part: 0.2})))
    tokens = shift(**transitions(2, 20))
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=0)
    assert not torch.equal(model.train()(tokens), plain(tokens))
    assert not torch.equal(model(tokens), model(tokens))


def test_the_embedding_and_both_residual_branches_are_dropped_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lively(AD(config(dropout=0.5))).train()
    monkeypatch.setattr(
        transformer.F, "dropout", lambda x, p, training: 0 * x if (p, training) == (0.5, True) else x
    )
    x = torch.randn(2, 10, 16)
    for block in model.transformer.blocks:
        torch.testing.assert_close(block(x, None), x)
    assert not model.transformer(x).any()
    monkeypatch.setattr(transformer.F, "dropout", lambda x, p, training: x)
    torch.testing.assert_close(model.transformer(x), model.eval().transformer(x))


def test_attention_dropout_drops_weights_and_scales_up_the_others() -> None:
    """With one token, attention is its value: none of it, or 1 / (1 - p) of it."""
    p = 0.25
    block = AD(config(attention_dropout=p, tf_n_head=1)).transformer.blocks[0].train()
    x = torch.randn(1, 1, 16).expand(4000, 1, 16)
    value = block.attention.heads(block.norm_attention(x[:1]), None)[2]
    with torch.no_grad():
        found = block(x, None)[:, 0]
        none, scaled = (block.mlp(x[:1] + block.attention.merge(value * k))[0, 0] for k in (0.0, 1 / (1 - p)))
    dropped = torch.isclose(found, none, atol=1e-5).all(dim=-1)
    kept = torch.isclose(found, scaled, atol=1e-5).all(dim=-1)
    assert (dropped ^ kept).all()
    # Four standard errors of a share of 4000 draws.
    assert abs(dropped.float().mean() - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_attention_dropout_stays_causal() -> None:
    torch.manual_seed(0)
    model = lively(AD(config(attention_dropout=0.3))).train()
    before = transitions(1, 20)
    changed = {**before, "states": before["states"].clone()}
    changed["states"][:, 12:] = 8 - changed["states"][:, 12:]
    given = []
    for window in (before, changed):
        torch.manual_seed(1)
        given.append(model(shift(**window)))
    torch.testing.assert_close(given[0][:, :12], given[1][:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(given[0][:, 12:], given[1][:, 12:])
