"""Play after a prompt, counted by hand."""

import numpy as np
import pytest
import torch

from compressed_ad import Darkroom
from compressed_ad.errors import UsageError
from compressed_ad.evaluation.prompted import success_after
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from tests.models.test_models import config, lively

ROOM = Darkroom(size=3, horizon=4)
STAY, UP = 4, 0


def player() -> AD:
    torch.manual_seed(0)
    space = {"kind": "multidiscrete", "nvec": [3, 3]}
    return lively(MODEL["AD"](config(model="AD", observation_space=space, n_transit=40)))


def test_given_actions_are_played_first_and_counted_by_hand() -> None:
    tasks = ROOM.tasks()
    # All rooms start in the middle: who stays there is paid if the goal is there, and nobody else is.
    stay = np.full((len(tasks), 2, 8), STAY, np.uint8)  # as files keep them
    found = success_after(player(), ROOM, tasks, stay, first=8, steps=9, rollouts=2, seed=1)
    middle = [tuple(task) == (1, 1) for task in np.asarray(tasks).tolist()]
    assert found.knew == pytest.approx(np.mean(middle))
    # Steps 8 to 16 hold two complete episodes; the first one that begins after the prompt is the second.
    assert found.episodes == 2 * sum(middle)


def test_without_a_prompt_the_model_plays_itself() -> None:
    tasks = ROOM.tasks()
    own = success_after(player(), ROOM, tasks, None, first=8, steps=12, rollouts=2, seed=1)
    again = success_after(player(), ROOM, tasks, None, first=8, steps=12, rollouts=2, seed=1)
    assert own == again
    assert 0 < own.knew <= 1
    assert 0 <= own.success <= 1


def test_actions_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"actions: expected \(9, 1, at least 8\), got \(9, 8\)"):
        success_after(player(), ROOM, ROOM.tasks(), np.zeros((9, 8), np.int64), first=8, steps=4)
