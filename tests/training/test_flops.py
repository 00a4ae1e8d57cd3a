"""The formulas of cost against operations counted while the product trains and plays."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Batch, Tokens
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.training.flops import action_flops, cache_bytes, training_flops
from compressed_ad.training.loop import build_model, gradient
from compressed_ad.types import to_spec

FAMILY = Darkroom(size=5, horizon=20)


def config(
    width: int, layers: int, context: int, inputs: tuple[str, ...] = (), model: str = "AD"
) -> ModelConfig:
    return ModelConfig(
        model=model,
        kernels=False,  # PyTorch counts its own operations only
        tf_n_embd=width,
        tf_n_layer=layers,
        n_transit=context,
        token_inputs=inputs,
        memory_tokens=6,
        memory_steps=15,
        batch_size=4,
        steps=1,
        observation_space=to_spec(FAMILY.observation_space),
        action_space=to_spec(FAMILY.action_space),
    )


def full_attention(c: ModelConfig, length: float) -> float:
    """Of one token over ``length`` tokens: scores and values, two operations per multiply-add."""
    return 2 * 2 * c.tf_n_layer * c.tf_n_embd * length


def windows(c: ModelConfig) -> Batch:
    shape = (c.batch_size, c.n_transit)
    cell = torch.zeros(*shape, 2, dtype=torch.int64)
    action = torch.zeros(*shape, dtype=torch.int64)
    no = torch.zeros(*shape, dtype=torch.bool)
    tokens = Tokens(cell, action, torch.zeros(*shape), cell, no, no, no, no, no)
    return Batch(tokens, action, ~no)


def counted_per_step(c: ModelConfig) -> float:
    """Mean of the steps from 60 to 180 of one rollout."""
    model = build_model(c, 0)
    assert isinstance(model, AD)

    def counted(episodes: int) -> int:
        agent = InContextAgent(model, seed=0)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            evaluate_tasks(agent, FAMILY, FAMILY.tasks()[:1], rollouts=1, episodes=episodes)
        return int(counter.get_total_flops())

    return (counted(9) - counted(3)) / 120


@pytest.mark.parametrize(
    ("width", "layers", "context", "inputs"),
    [(64, 2, 50, ()), (64, 2, 200, ()), (96, 3, 100, ()), (64, 2, 200, tuple(TOKEN_INPUT))],
)
def test_training_costs_what_is_counted(
    width: int, layers: int, context: int, inputs: tuple[str, ...]
) -> None:
    c = config(width, layers, context, inputs)
    model = build_model(c, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gradient(model, model.loss, windows(c), c)
    # The counted kernel computes what causality masks as well: the other half of attention.
    masked = 3 * full_attention(c, context / 2) * c.batch_size * context
    # Further inputs of the tokens are left out: few, and no others.
    within = 0.05 if inputs else 0.02
    assert counter.get_total_flops() == pytest.approx(training_flops(c) + masked, rel=within)


@pytest.mark.parametrize(("context", "last"), [(90, 15), (91, 1), (104, 14)])
def test_training_with_a_recurrent_memory_costs_what_is_counted(context: int, last: int) -> None:
    """Chunks of 15 steps are read and written, with 6 tokens of memory on each side; the last is read."""
    c = config(64, 2, context, model="RecurrentAD")
    model = build_model(c, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gradient(model, model.loss, windows(c), c)
    whole = (context - last) // 15
    masked = whole * 27 * full_attention(c, 27 / 2) + (6 + last) * full_attention(c, (6 + last) / 2)
    expected = training_flops(c) + 3 * c.batch_size * masked
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(("width", "layers"), [(64, 2), (64, 1), (16, 3)])
def test_a_step_with_a_recurrent_memory_costs_what_is_counted(width: int, layers: int) -> None:
    """The heads, which are left out, are the more of it the narrower and the shallower a model is."""
    c = config(width, layers, 60, model="RecurrentAD")
    written = 27 * full_attention(c, 27 / 2) + 6 * full_attention(c, 6 / 2) * (layers - 1) / layers
    assert counted_per_step(c) == pytest.approx(action_flops(c) + written / 15, rel=0.02)


def test_a_recurrent_memory_keeps_its_tokens_and_one_chunk() -> None:
    c = config(64, 2, 60, model="RecurrentAD")
    model = build_model(c, 0)
    assert isinstance(model, AD)
    cache = model.new_cache(5)
    size = sum(x.numel() * x.element_size() for x in (cache.key, cache.value))
    assert size == 5 * cache_bytes(c)


def test_a_step_in_context_costs_what_is_counted() -> None:
    """Once a context was full: between 60 and 180 steps lie six recomputations of half a context of 40.

    So narrow a model spends a third of it on attention.
    """
    c = config(16, 3, 40)
    masked = full_attention(c, 40 / 4) * 2 / 3  # of two layers of three
    assert counted_per_step(c) == pytest.approx(action_flops(c) + masked, rel=0.02)
