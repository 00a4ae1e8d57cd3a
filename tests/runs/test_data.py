"""Where a model plays: small ones on the CPU, whatever they were trained on."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressed_ad.runs.data import FEW_WEIGHTS, where_it_plays_faster


class Elsewhere:
    """As much of a model on a GPU as the rule looks at."""

    def __init__(self, n_weight: int, device: str) -> None:
        self.weights, self.device = [torch.zeros(n_weight)], device

    @property
    def head(self) -> Any:
        return SimpleNamespace(weight=SimpleNamespace(device=SimpleNamespace(type=self.device)))

    def parameters(self) -> list[torch.Tensor]:
        return self.weights

    def to(self, device: str) -> "Elsewhere":
        self.device = device
        return self


@pytest.mark.parametrize(
    ("device", "n_slot", "expected"),
    [
        ("cuda", int(FEW_WEIGHTS / 1000), "cpu"),
        ("cuda", int(FEW_WEIGHTS / 1000) + 1, "cuda"),
        ("cpu", 1, "cpu"),
        ("cpu", 10**6, "cpu"),
    ],
)
def test_few_weights_play_on_the_cpu_and_the_model_stays_where_it_is(
    device: str, n_slot: int, expected: str
) -> None:
    model: Any = Elsewhere(1000, device)
    before = copy.copy(model)
    plays: Any = where_it_plays_faster(model, n_slot)
    assert plays.device == expected
    assert model.device == before.device
    assert (plays is model) == (device == expected)
