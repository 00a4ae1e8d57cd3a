"""A recurrent memory: play against whole windows, what it carries, and what is left when it is taken away."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from compressed_ad.errors import ConfigError, UsageError
from compressed_ad.evaluation.agents import InContextAgent, RandomAgent
from compressed_ad.evaluation.attention import attention_maps
from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.evaluation.memory import Intervened, change_memory, shuffled, transplanted, zeroed
from compressed_ad.models.ad import AD
from compressed_ad.models.recurrent import RecurrentAD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Batch, Tokens, shift
from compressed_ad.tasks.gridworld import Darkroom
from tests.models.test_models import config, lively, transitions
from tests.models.test_segments import played, tokens_of


def recurrent(k: int = 3, c: int = 5, seed: int = 0, **values: Any) -> RecurrentAD:
    torch.manual_seed(seed)
    model = RecurrentAD(config(model="RecurrentAD", memory_tokens=k, memory_steps=c, **values))
    return lively(model)  # type: ignore[return-value]


def steps_of(tokens: Tokens, first: int, last: int) -> Tokens:
    return tokens.each(lambda value: value[:, first:last])


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([1, 12, 45, 60]),
    st.sampled_from(["rotary", "learned"]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_play_is_that_of_whole_windows(
    k: int, c: int, length: int, position: str, idle: float, seed: int
) -> None:
    """Far beyond n_transit, across borders of chunks; slots that idle take their last token back."""
    model, tokens = recurrent(k, c, seed, position=position, n_transit=10), tokens_of(3, length, seed)
    back = torch.rand((3, length), generator=torch.Generator().manual_seed(seed)) < idle
    with torch.no_grad():
        # Sums in another order: 2e-5 of logits of size 10.
        torch.testing.assert_close(played(model, tokens, back), model(tokens), rtol=0, atol=2e-4)


def test_a_window_in_training_is_the_same_up_to_rounding() -> None:
    model, tokens = recurrent(), tokens_of(2, 23, 1)
    with torch.no_grad():
        plain = model(tokens)
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=2e-4)


def test_the_memory_carries_what_has_left_and_nothing_else_does() -> None:
    model, values = recurrent(), transitions(1, 40)
    before = model(shift(**values))
    with torch.no_grad():
        model.memory_gate.bias.fill_(1e4)  # the memory stays as it is: zeros
    forgetful = model(shift(**values))
    values["states"][:, 4] = (values["states"][:, 4] + 1) % 9
    again = model(shift(**values))
    assert torch.equal(again[:, :4], forgetful[:, :4]) and not torch.equal(again[:, 4], forgetful[:, 4])
    torch.testing.assert_close(again[:, 5:], forgetful[:, 5:], rtol=0, atol=0)
    with torch.no_grad():
        model.memory_gate.bias.fill_(1.0)
    carried = (model(shift(**values)) - before).abs().amax(dim=-1)[0]
    assert bool((carried[:4] == 0).all()) and bool((carried[4:] > 0).all())


def test_gradients_go_through_all_chunks_to_every_weight() -> None:
    model, values = recurrent().train(), transitions(2, 40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    model.loss(Batch(shift(**values), values["actions"], valid), at="query")[0].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    x = model.embed(shift(**values)).detach().requires_grad_()
    model.over_windows(x, shift(**values))[:, -1, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and bool((x.grad[:, 0].abs() > 0).all())


def test_it_shares_its_other_weights_with_ad() -> None:
    torch.manual_seed(0)
    plain = AD(config(model="AD"))
    torch.manual_seed(0)
    model = RecurrentAD(config(model="RecurrentAD", memory_steps=5))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_a_step_costs_the_same_at_any_history() -> None:
    model, tokens = recurrent(), tokens_of(4, 500, 3)
    cache = model.new_cache(4)
    with torch.no_grad():
        for t in range(500):
            model(steps_of(tokens, t, t + 1), cache)
            assert cache.key.shape[3] == 8 and int(cache.length.max()) <= 8
    assert float(cache.memory.abs().max()) < 10  # bounded, too


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": "episode"}, "leave segments and recent_steps alone"),
        ({"recent_steps": 4}, "leave segments and recent_steps alone"),
        ({"memory_steps": 24}, "with n_transit 24 no window is that long"),
        ({"memory_tokens": 0}, "memory_tokens"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"model": "RecurrentAD", "memory_steps": 5, "n_transit": 24, **values})
    if "memory_tokens" not in values:  # other models have no such memory
        ModelConfig(**{"model": "AD", "n_transit": 24, **values})


def test_what_it_refuses() -> None:
    model, tokens = recurrent(), tokens_of(1, 12, 0)
    with pytest.raises(UsageError, match="new_cache"):
        model(steps_of(tokens, 0, 1), AD(config()).new_cache(1))
    with pytest.raises(UsageError, match="never full"):
        model.prefill(tokens, torch.tensor([12]), model.new_cache(1), torch.arange(1))
    with pytest.raises(UsageError, match="in chunks"):
        attention_maps(model, tokens)


def test_agents_play_it_as_whole_windows() -> None:
    """Until n_transit, beyond which a context that is computed anew has lost its start."""
    model, family = recurrent(n_transit=24), Darkroom(9, 8)
    options: dict[str, Any] = {"rollouts": 2, "episodes": 3, "seed": 1, "temperature": 0.3}
    tasks = family.tasks()[:3]
    cached = evaluate_tasks(model, family, tasks, **options)
    np.testing.assert_array_equal(cached, evaluate_tasks(model, family, tasks, cache=False, **options))


def test_changes_do_what_they_say() -> None:
    memory = torch.randn(6, 2, 4)
    assert torch.equal(zeroed(memory), torch.zeros(6, 2, 4))
    for seed in range(5):
        moved = shuffled(memory, 3, seed)
        came_from = [next(i for i in range(6) if torch.equal(memory[i], row)) for row in moved]
        assert sorted(came_from) == list(range(6))
        assert all(a // 2 != b // 2 for a, b in enumerate(came_from))  # of another task
    given_ = transplanted(memory, torch.tensor([0, 0]), torch.tensor([2, 5]))
    assert torch.equal(given_, memory[[0, 1, 0, 3, 4, 0]])
    for n_task in (1, 4):
        with pytest.raises(UsageError, match=f"6 contexts between {n_task} tasks"):
            shuffled(memory, n_task)


@pytest.mark.parametrize("at", [10, 13])
def test_a_changed_memory_is_as_if_it_had_always_been_so(at: int) -> None:
    """A transplant is the donor's history followed by the own chunk; at a border and within a chunk."""
    model, tokens = recurrent(), tokens_of(2, 21, 0)
    both = tokens.each(lambda value: value[[0, 1]])
    mixed = tokens.each(lambda value: torch.cat([value[:1, :10], value[1:, 10:]], dim=1))
    expected = {
        "transplanted": model(mixed)[0],
        "zeroed": model.head(model.over_windows(model.embed(tokens)[1:, 10:], tokens))[0],
    }
    for name, change in {
        "transplanted": lambda m: transplanted(m, torch.tensor([0]), torch.tensor([1])),
        "zeroed": zeroed,
    }.items():
        cache = model.new_cache(2)
        with torch.no_grad():
            for t in range(at):
                model(steps_of(both, t, t + 1), cache)
            change_memory(model, cache, change)
            later = [model(steps_of(both, t, t + 1), cache)[1, 0] for t in range(at, 21)]
        torch.testing.assert_close(torch.stack(later), expected[name][-len(later) :], rtol=0, atol=2e-4)


def test_an_agent_plays_with_a_changed_memory() -> None:
    model, family = recurrent(), Darkroom(9, 8)
    seen = []

    def change(memory: torch.Tensor) -> torch.Tensor:
        seen.append(memory.clone())
        return zeroed(memory)

    evaluate_tasks(
        model,
        family,
        family.tasks()[:2],
        rollouts=1,
        episodes=3,
        watch=lambda agent: Intervened(agent, change, range(5, 1000, 5)),
    )
    assert len(seen) == 4 and all(bool((memory != 0).any()) for memory in seen)
    for wrong in (RandomAgent(5), InContextAgent(AD(config())), InContextAgent(model, cache=False)):
        with pytest.raises(UsageError, match="plays RecurrentAD with a cache"):
            Intervened(wrong, zeroed, range(5))


def test_a_query_sees_the_memory_and_its_chunk() -> None:
    model = RecurrentAD(config(model="RecurrentAD", memory_tokens=3, memory_steps=4))
    seen = model.visible_tokens(shift(**transitions(2, 10)))
    assert seen.tolist() == [[4, 5, 6, 7, 4, 5, 6, 7, 4, 5]] * 2
