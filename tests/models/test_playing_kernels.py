"""Compiled playing: what PyTorch computes from whole windows, repeatable, and each context for itself."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from compressed_ad import Darkroom, evaluate_tasks
from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.models import MODEL, fused
from compressed_ad.models.ad import AD
from compressed_ad.models.tokens import shift
from compressed_ad.models.transformer import Cache, Transformer
from tests.models.test_models import config, lively, part, transitions
from tests.models.test_training_kernels import moved

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 2)).filter(lambda s: s[0] * s[1] > 5)
"""Heads, their width, layers; the norm of fewer numbers enlarges rounding errors without limit."""


def transformer_of(n_head: int, dim: int, n_layer: int, n_context: int, **changes: Any) -> Transformer:
    made = config(
        tf_n_embd=n_head * dim, tf_n_head=n_head, tf_n_layer=n_layer, n_transit=n_context, **changes
    )
    found = Transformer(made, n_context)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for block in found.blocks:
        torch.nn.init.normal_(block.norm_attention.weight, mean=1)
        torch.nn.init.normal_(block.norm_mlp.weight, mean=1)
    return found.eval()


def played(transformer: Transformer, x: Tensor, lengths: Tensor, n_first: int) -> tuple[Tensor, Cache]:
    """(B, K, D) what K steps give after contexts of ``lengths`` of the first ``n_first`` tokens of x."""
    cache, row = Cache(transformer, len(x)), torch.arange(len(x))
    if n_first:
        transformer.prefill(x[:, :n_first], None, cache, row)
    cache.length = lengths.clone()
    steps = [transformer.step(x[row, lengths + k], cache) for k in range(x.shape[1] - n_first)]
    return torch.stack(steps, dim=1), cache


@given(SHAPES, st.integers(1, 70), st.integers(0, 70), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)  # the first example may compile
def test_refills_and_steps_are_the_causal_pass_of_float64(
    shape: tuple[int, int, int], n_row: int, n_first: int, rotary: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n_head, dim, n_layer = shape
    dim += dim % 2 if rotary else 0
    made = transformer_of(n_head, dim, n_layer, n_first + 3, position="rotary" if rotary else "learned")
    x = torch.randn(n_row, n_first + 3, n_head * dim)
    lengths = torch.randint(0, n_first + 1, (n_row,))
    with torch.no_grad():
        found, cache = played(made, x, lengths, n_first)
        assert cache.weights is not None
        exact = made.double()(x.double())
    at = lengths[:, None] + torch.arange(3)
    expected = exact[torch.arange(n_row)[:, None], at]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_long_contexts_are_as_near_to_float64_as_those_of_pytorch() -> None:
    torch.manual_seed(0)
    made = transformer_of(4, 24, 2, 400)
    x, lengths = torch.randn(5, 400, 96), torch.tensor([380, 200, 390, 17, 333])
    with torch.no_grad():
        own = played(made, x, lengths, 390)[0]
        for block in made.blocks:
            block.kernels = False
        theirs = played(made, x, lengths, 390)[0]
        exact = made.double()(x.double())[torch.arange(5)[:, None], lengths[:, None] + torch.arange(10)]
    assert (own - exact).abs().max() < 2 * (theirs - exact).abs().max() < 1e-4


def given_to_steps(n_row: int, dim: int, room: int, length: int = 1) -> dict[str, Any]:
    """Arguments of ``fused.steps``: two blocks, rows of different lengths, some entries hidden."""
    torch.manual_seed(0)
    made = transformer_of(2, dim, 2, room)
    n = n_row * length
    begin = torch.randint(0, room - length + 1, (n_row,))
    angle = torch.rand(n_row, length, dim // 2)
    place = torch.arange(n).reshape(n_row, length) // length, begin[:, None] + torch.arange(length)
    dead = torch.rand(n_row, room) < 0.3
    dead[place] = False  # a token sees itself
    return {
        "weights": Cache(made, 1).weights,
        "x": torch.randn(n_row, length, 2 * dim),
        "rotation": (angle.cos(), angle.sin()),
        "memory": tuple(torch.randn(2, n_row, 2, room, dim) for _ in range(2)),
        "place": place,
        "dead": dead,
    }


def stepped(given_: dict[str, Any], **changes: Any) -> tuple[Tensor, ...]:
    """What comes of them: the tokens, and keys and values, which are written into copies."""
    given_ = {**given_, **changes}
    memory = (
        tuple(each.clone() for each in given_["memory"]) if "memory" not in changes else changes["memory"]
    )
    return fused.steps(**{**given_, "memory": memory}), *memory


@pytest.mark.parametrize(
    ("n_row", "dim", "room", "length"),
    [(1, 2, 1, 1), (3, 6, 37, 1), (35, 8, 21, 1), (40, 24, 70, 1), (3, 14, 40, 39)],
)
def test_the_same_inputs_give_the_same_bits_wherever_they_lie(
    n_row: int, dim: int, room: int, length: int
) -> None:
    random, found = np.random.default_rng(0), given_to_steps(n_row, dim, room, length)
    first, keep = stepped(found), []
    for _ in range(15):
        keep.append(torch.empty(int(random.integers(1, 5000))))  # so that results lie elsewhere, too
        again = stepped(
            found,
            x=moved(found["x"], random),
            rotation=tuple(moved(each, random) for each in found["rotation"]),
            memory=tuple(moved(each, random) for each in found["memory"]),
            weights=[
                (*(moved(torch.from_numpy(one), random).numpy() for one in each[:-1]), each[-1])
                for each in found["weights"]
            ],
        )
        assert all(map(torch.equal, first, again))


def test_threads_and_other_rows_change_nothing() -> None:
    n_thread = torch.get_num_threads()
    for length in (1, 5):
        found = given_to_steps(600, 6, 40, length)
        try:
            torch.set_num_threads(1)
            one = stepped(found)
            torch.set_num_threads(4)
            assert all(map(torch.equal, one, stepped(found)))
        finally:
            torch.set_num_threads(n_thread)
        few = {
            "x": found["x"][40:43],
            "rotation": tuple(each[40:43] for each in found["rotation"]),
            "place": tuple(each[40:43] for each in found["place"]),
        }
        assert torch.equal(stepped(found, **few)[0], one[0][40:43])


def test_a_nan_stays_in_its_context_and_is_not_hidden_there() -> None:
    found = given_to_steps(5, 6, 20)
    found["dead"][:] = False
    row, entry = found["place"][0][2, 0], found["place"][1][2, 0]
    last = len(found["x"]) - 1
    for which in ("x", "key", "value"):
        bad = {**found, "x": found["x"].clone(), "memory": tuple(each.clone() for each in found["memory"])}
        if which == "x":
            bad["x"][row, 0, 3] = torch.nan
        else:
            bad["memory"]["kv".index(which[0])][0, row, 1, max(entry - 1, 0), 4] = torch.nan
        y = stepped(bad)[0]
        assert y[row].isnan().any() and torch.isfinite(y[torch.arange(5) != row]).all()
    assert entry > 0
    # What lies beyond a context, or is hidden, is not seen, whatever it is.
    clean = stepped(found)[0]
    for each in found["memory"]:
        for context, at in zip(*found["place"], strict=True):
            each[:, context, :, at + 1 :] = torch.nan
    assert torch.equal(stepped(found)[0], clean) and last == 4


def test_scores_far_apart() -> None:
    """Each token sees the one key that is its own, whatever the others are."""
    found = given_to_steps(3, 6, 20)
    weights = [list(each) for each in found["weights"][:1]]
    weights[0][1] = 100 * weights[0][1]
    assert torch.isfinite(stepped(found, weights=[tuple(each) for each in weights])[0]).all()


def tokens_and_model(**changes: Any) -> tuple[AD, Any]:
    torch.manual_seed(0)
    name = changes.get("model", "AD")
    return lively(MODEL[name](config(**{"model": name, **changes}))), shift(**transitions(3, 24))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"one_step": True},
        {"reward_scale": 3.0},
        {"observation_space": {"kind": "multidiscrete", "nvec": [9, 9], "start": [-2, 0]}},
        {"action_space": {"kind": "multidiscrete", "nvec": [5, 2]}},
        {"token_inputs": ["previous_state", "episode_return"]},
        {"model": "CompressedAD"},
    ],
)
def test_embedding_is_that_of_pytorch(changes: dict[str, Any]) -> None:
    model, tokens = tokens_and_model(**changes)
    if "action_space" in changes:
        tokens = type(tokens)(
            **{**vars(tokens), "action": torch.stack([tokens.action, tokens.action % 2], -1)}
        )
    with torch.no_grad():
        found = model.embed(tokens)
        assert model._compiled_embedding(tokens, model.marks(tokens)) is not None
    torch.testing.assert_close(found, model.embed(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["state", "action", "next_state"])
@pytest.mark.parametrize("wrong", [-1, 100])
def test_what_is_not_in_a_space_is_refused(name: str, wrong: int) -> None:
    model, tokens = tokens_and_model()
    with torch.no_grad(), pytest.raises(IndexError):
        model.embed(type(tokens)(**{**vars(tokens), name: torch.full_like(getattr(tokens, name), wrong)}))


def test_a_reward_that_is_nan_shows() -> None:
    model, tokens = tokens_and_model()
    tokens.reward[1, 5] = torch.nan
    with torch.no_grad():
        x = model.embed(tokens)
    assert x[1, 5].isnan().all() and torch.isfinite(x[0]).all() and torch.isfinite(x[1, :5]).all()


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [
        ({}, True),
        ({"model": "GistAD"}, True),
        ({"model": "RecurrentAD", "memory_steps": 5, "memory_tokens": 3}, True),
        ({"kernels": False}, False),
        ({"model": "MarkedAttentionAD"}, False),
    ],
)
def test_what_the_step_cannot_do_is_left_to_pytorch(
    changes: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tokens_and_model(**changes)
    forbid(monkeypatch)
    with torch.no_grad(), pytest.raises(AssertionError) if compiled else nullcontext():
        model(part(tokens, slice(0, 1)), model.new_cache(3))
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            other = model.to(dtype)
            assert (
                Cache(other.transformer, 3).weights is None and other._compiled_embedding(tokens, ()) is None
            )


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(*given: Any, **options: Any) -> Tensor:
        raise AssertionError("a compiled step")

    monkeypatch.setattr(fused, "steps", steps)


def test_gradients_and_dropout_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tokens_and_model(dropout=0.5)
    forbid(monkeypatch)
    one = part(tokens, slice(0, 1))
    assert model(one, model.new_cache(3)).requires_grad
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(one, model.new_cache(3)), model(one, model.new_cache(3)))


def test_a_full_context_takes_no_step() -> None:
    model, tokens = tokens_and_model()
    with torch.no_grad():
        cache = model.new_cache(3)
        cache.length[1] = 24
        with pytest.raises(IndexError):
            model(part(tokens, slice(0, 1)), cache)
    found = given_to_steps(3, 6, 20)
    for which, wrong in ((0, 3), (0, -1), (1, 20), (1, -1)):
        place = [each.clone() for each in found["place"]]
        place[which][1, 0] = wrong
        with pytest.raises(IndexError, match="there is no"):
            stepped(found, place=place)


@pytest.mark.parametrize("changes", [{}, {"position": "learned"}, {"model": "GistAD"}])
def test_seeded_play_is_that_of_pytorch(changes: dict[str, Any]) -> None:
    """Logits differ in their last digits only, and no action that is drawn from them does."""
    family, returns = Darkroom(9, 10), []
    for kernels in (True, False):
        torch.manual_seed(0)
        model = lively(AD(config(**{"model": "AD", **changes, "kernels": kernels})))
        returns.append(evaluate_tasks(model, family, family.tasks()[::20], rollouts=8, episodes=10))
    np.testing.assert_array_equal(*returns)
    assert returns[0].std() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"token_inputs": ["previous_state", "episode_return"]},
        {"position": "learned"},
        {"model": "MarkedAttentionAD"},
        {"model": "GistAD"},
        {"model": "RecurrentAD", "memory_steps": 5, "memory_tokens": 3},
    ],
)
def test_nothing_but_the_actions_is_read_from_a_device(changes: dict[str, Any]) -> None:
    """On the device ``meta``, which has no numbers to read, until contexts are full."""
    name = changes.get("model", "AD")
    model = MODEL[name](config(**{"model": name, **changes})).eval().to("meta")
    agent = InContextAgent(model, marks="self")
    asked = agent._parameters
    agent._parameters = lambda token: torch.zeros_like(asked(token), device="cpu")  # type: ignore[method-assign]
    env = Darkroom(9, 4).make(Darkroom(9, 4).tasks()[:3], np.arange(3))
    agent.reset(3)
    obs = env.reset()
    for k in range(20):
        actions = agent.act(obs)
        step = env.step(actions)
        played_ = np.array([True, k % 5 != 2, True])  # so that lengths differ
        agent.observe(actions, type(step)(**{**vars(step), "played": played_}))
        obs = step.obs
    assert agent.memory["state"].is_meta and agent.cache is not None and agent.cache.key.is_meta
