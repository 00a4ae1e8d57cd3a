from dataclasses import replace

import numpy as np
import pytest
import torch

from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError
from compressed_ad.marking import markers
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.compressed_ad import CompressedAD, MarkedAttentionAD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Batch, Tokens, shift

SPACES = {
    "observation_space": {"kind": "multidiscrete", "nvec": [9, 9]},
    "action_space": {"kind": "discrete", "n": 5},
}
SMALL = {**SPACES, "tf_n_embd": 16, "tf_n_head": 2, "tf_n_layer": 2, "n_transit": 24}


def config(**values: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **values})


def transitions(n_row: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randint(0, 9, (n_row, length, 2), generator=r),
        "actions": torch.randint(0, 5, (n_row, length), generator=r),
        "rewards": (torch.rand(n_row, length, generator=r) < 0.3).float(),
        "next_states": torch.randint(0, 9, (n_row, length, 2), generator=r),
        "ended": torch.rand(n_row, length, generator=r) < 0.2,
        "mask": torch.rand(n_row, length, generator=r) < 0.5,
    }


def lively(model: AD) -> AD:
    """Heads start at zero; random ones let differences show."""
    with torch.no_grad():
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("inputs", [[], ["previous_state", "episode_return", "episode_time"]])
@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("name", ["AD", "CompressedAD"])
def test_nothing_about_a_transition_is_visible_when_its_action_is_predicted(
    name: str, position: str, inputs: list[str]
) -> None:
    torch.manual_seed(0)
    model = lively(MODEL[name](config(model=name, position=position, token_inputs=inputs)))
    before = transitions(1, 20)
    reference = model(shift(**before))
    for key in before:
        changed = {k: v.clone() for k, v in before.items()}
        changed[key][:, 10] = transitions(1, 20, seed=5)[key][:, 10]
        if changed[key].dtype == torch.bool:
            changed[key][:, 10] = ~before[key][:, 10]
        else:
            changed[key][:, 10] = (before[key][:, 10] + 1) % 5
        logits = model(shift(**changed))
        first = 10 if key == "states" else 11
        torch.testing.assert_close(logits[:, :first], reference[:, :first], rtol=0, atol=0)
        if key != "mask" or name == "CompressedAD":
            # The true next state is redundant inside an episode; it counts where a reward or an end makes it.
            visible = key != "next_states" or bool(before["rewards"][0, 10] or before["ended"][0, 10])
            assert (not torch.equal(logits[:, first:], reference[:, first:])) == visible
        else:
            torch.testing.assert_close(logits, reference, rtol=0, atol=0)


@pytest.mark.parametrize("one_step", [False, True])
def test_an_episode_s_last_action_is_shown_where_episodes_are_one_step(one_step: bool) -> None:
    """In a room it is left out; in a contextual bandit nothing else tells what was done."""
    model = lively(AD(config(one_step=one_step)))
    before = transitions(1, 20)
    before["ended"][:] = True
    other = {**before, "actions": (before["actions"] + 1) % 5}
    seen = not torch.equal(model(shift(**other)), model(shift(**before)))
    assert seen == one_step


def test_marks_in_tokens_are_the_markers_borders_one_step_later() -> None:
    window = transitions(4, 24)
    tokens = shift(**window)
    start, end = markers.borders(window["mask"].numpy())
    np.testing.assert_array_equal(tokens.start_mark[:, 1:].numpy(), start[:, :-1])
    np.testing.assert_array_equal(tokens.end_mark[:, 1:].numpy(), end[:, :-1])
    assert not tokens.start_mark[:, 0].any() and not tokens.has_previous[:, 0].any()


def test_compressed_ad_with_zero_vectors_equals_ad_exactly() -> None:
    ad, compressed = AD(config()), CompressedAD(config())
    missing = compressed.load_state_dict(ad.state_dict(), strict=False).missing_keys
    assert missing == ["embed_compress_start", "embed_compress_end"]
    lively(ad)
    lively(compressed).load_state_dict(ad.state_dict(), strict=False)
    tokens = shift(**transitions(3, 24))
    assert not torch.equal(compressed(tokens), ad(tokens))
    with torch.no_grad():
        compressed.embed_compress_start.zero_()
        compressed.embed_compress_end.zero_()
    torch.testing.assert_close(compressed(tokens), ad(tokens), rtol=0, atol=0)


def test_the_guides_names() -> None:
    assert MODEL["CompressedADv2"] is MODEL["CompressedAD"] is CompressedAD
    model = MODEL["CompressedADv2"]({**SMALL, "batch_size": 512, "lr": "3e-4"})
    assert model.embed_compress_start.shape == model.embed_compress_end.shape == (16,)
    with pytest.raises(UnknownNameError, match="did you mean 'CompressedAD'"):
        MODEL["CompresedAD"]


def test_mistakes_in_a_models_config_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        AD({**SMALL, "tf_n_embed": 32, "tf_n_layer": 0})
    assert len(error.value.problems) == 2 and "did you mean 'tf_n_embd'" in str(error.value)
    with pytest.raises(ConfigError, match="multiple of tf_n_head"):
        AD({**SMALL, "tf_n_head": 3})
    with pytest.raises(ConfigError, match=r"to_spec\(env.observation_space\)"):
        AD({"tf_n_embd": 16})
    with pytest.raises(SpaceError, match="must be of floats"):
        AD(
            {
                **SMALL,
                "action_space": {"kind": "box", "shape": [1], "dtype": "int8", "low": None, "high": None},
            }
        )


@pytest.mark.parametrize(
    ("space", "sample"),
    [
        ({"kind": "discrete", "n": 7}, torch.randint(0, 7, (2, 5))),
        ({"kind": "multidiscrete", "nvec": [3, 4]}, torch.randint(0, 3, (2, 5, 2))),
        ({"kind": "box", "shape": [3], "dtype": "float32", "low": None, "high": None}, torch.randn(2, 5, 3)),
    ],
)
def test_observation_spaces(space: dict[str, object], sample: torch.Tensor) -> None:
    model = lively(AD(config(observation_space=space)))
    flags = torch.zeros(2, 5, dtype=torch.bool)
    tokens = Tokens(
        sample, torch.zeros(2, 5).long(), torch.zeros(2, 5), sample, flags, flags, flags, flags, flags
    )
    logits = model(tokens)
    assert logits.shape == (2, 5, 5) and not torch.equal(logits[0], logits[1])


def batch(n_row: int, length: int) -> Batch:
    window = transitions(n_row, length)
    valid = torch.arange(length) < torch.tensor([length, length - 4, 3, 1])[:n_row, None]
    return Batch(shift(**window), window["actions"], valid)


def test_loss_against_arithmetic() -> None:
    model, b = lively(AD(config())), batch(4, 12)
    logp = torch.log_softmax(model(b.tokens), dim=-1)
    picked = logp.gather(-1, b.target[..., None])[..., 0]
    loss, accuracy = model.loss(b)
    torch.testing.assert_close(loss, -picked[b.valid].mean())
    torch.testing.assert_close(accuracy, (logp.argmax(-1) == b.target)[b.valid].float().mean())
    query, _ = model.loss(b, at="query")
    last = b.valid.sum(dim=1) - 1
    torch.testing.assert_close(query, -picked[torch.arange(4), last].mean())


def test_what_lies_beyond_a_sequence_does_not_count() -> None:
    model, b = lively(AD(config())), batch(4, 12)
    other = Batch(b.tokens, torch.where(b.valid, b.target, 4 - b.target), b.valid)
    torch.testing.assert_close(model.loss(b)[0], model.loss(other)[0], rtol=0, atol=0)


def test_weighted_loss_against_arithmetic() -> None:
    model, b = lively(AD(config())), batch(4, 12)
    weight = torch.rand(4, 12, generator=torch.Generator().manual_seed(2))
    logp = torch.log_softmax(model(b.tokens), dim=-1)
    picked = logp.gather(-1, b.target[..., None])[..., 0]
    loss, _ = model.loss(replace(b, weight=weight))
    share = weight * b.valid
    torch.testing.assert_close(loss, -(picked * share).sum() / share.sum())
    even, _ = model.loss(replace(b, weight=torch.full((4, 12), 0.5)))
    torch.testing.assert_close(even, model.loss(b)[0])


def test_marked_attention_adds_its_bias_to_the_scores_of_marked_tokens() -> None:
    """Against attention written out, and equal to AD while the biases are zero."""
    torch.manual_seed(0)
    plain = lively(AD(config()))
    torch.manual_seed(0)
    model = lively(MarkedAttentionAD(config(model="MarkedAttentionAD")))
    tokens = shift(**transitions(3, 20))
    torch.testing.assert_close(model(tokens), plain(tokens))
    attention = model.transformer.blocks[0].attention
    with torch.no_grad():
        attention.mark_bias.copy_(torch.tensor([1.5, -0.7]))
    assert not torch.allclose(model(tokens), plain(tokens))
    x = torch.randn(3, 20, 16)
    rotation = model.transformer.cos[:20], model.transformer.sin[:20]
    q, k, v = attention.heads(x, rotation)
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
    scores = (
        q @ k.transpose(-1, -2) * 8**-0.5 + attention.mark_bias[:, None, None] * tokens.marked[:, None, None]
    )
    expected = attention.out(
        (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(3, 20, 16)
    )
    wide = attention.heads(x, rotation, tokens.marked)
    fused = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=attention.scale)
    torch.testing.assert_close(attention.merge(fused), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_cached_logits_equal_the_full_forward_pass(position: str) -> None:
    """Rows of different lengths, prefilled in part: float32 sums in another order differ by about 1e-6."""
    torch.manual_seed(1)
    model = lively(CompressedAD(config(position=position)))
    tokens = shift(**transitions(3, 24))
    reference = model(tokens)
    cache = model.new_cache(3)
    lengths = torch.tensor([10, 4, 7])
    model.prefill(part(tokens, slice(0, 10)), lengths, cache, torch.arange(3))
    for k in range(14):
        at = lengths + k
        row = torch.arange(3)
        token = tokens.each(lambda value, row=row, at=at: value[row, at][:, None])
        logits = model(token, cache)[:, 0]
        torch.testing.assert_close(logits, reference[row, at], rtol=1e-5, atol=1e-5)
    assert cache.length.tolist() == [24, 18, 21]


def part(tokens: Tokens, steps: slice) -> Tokens:
    return tokens.each(lambda value: value[:, steps])
