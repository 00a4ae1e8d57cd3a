"""Where a model plays: small ones on the CPU, whatever they were trained on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressed_ad.models.ad import AD
from compressed_ad.runs.data import FEW_WEIGHTS, where_it_plays_faster
from tests.models.test_models import config

MODEL = AD(config(model="AD"))
N_WEIGHT = sum(weight.numel() for weight in MODEL.parameters())


class Elsewhere:
    """As much of a model as the rule looks at, with its weights on another device. It cannot be copied."""

    def __init__(self, device: str) -> None:
        self.config, self.parameters, self.state_dict = MODEL.config, MODEL.parameters, MODEL.state_dict
        self.head = SimpleNamespace(weight=SimpleNamespace(device=SimpleNamespace(type=device)))

    def __deepcopy__(self, known: Any) -> Any:
        raise TypeError("it holds an open file")


@pytest.mark.parametrize(
    ("device", "n_slot", "moves"),
    [
        ("cuda", int(FEW_WEIGHTS / N_WEIGHT), True),
        ("cuda", int(FEW_WEIGHTS / N_WEIGHT) + 1, False),
        ("cpu", 1, False),
        ("cpu", 10**6, False),
    ],
)
def test_few_weights_play_on_the_cpu(device: str, n_slot: int, moves: bool) -> None:
    model: Any = Elsewhere(device)
    plays = where_it_plays_faster(model, n_slot)
    assert (plays is not model) == moves
    if moves:
        assert plays.head.weight.device.type == "cpu"
        weights = plays.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in MODEL.state_dict().items())
