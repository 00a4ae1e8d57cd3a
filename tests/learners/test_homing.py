"""Homing: every recorded action beside its rule, the source curve, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box

from compressed_ad import Darkroom, make_family, make_learner
from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners.conformance import check_learner
from compressed_ad.learners.homing import Homing
from tests.learners.learning import learn

FAMILY = make_family("point_mass", {"n_task": 64})


def test_it_keeps_the_promises_of_a_learner() -> None:
    assert check_learner(make_learner("homing", {}), FAMILY) == []


@pytest.mark.parametrize(("width", "floor"), [(0.7, 0.05), (0.3, 0.1), (1.0, 0.4)])
def test_an_action_heads_for_a_place_as_likely_as_recorded_around_the_best_so_far(width, floor) -> None:
    for history in learn(Homing(width, floor), FAMILY, range(4), 200, n_stream=2):
        for stream in range(2):
            rewards, places = history.rewards[stream].astype(float), history.next_states[stream]
            compared = 0
            for t in range(2, 200):
                length = np.linalg.norm(history.actions[stream, t])
                best = int(np.argmax(rewards[:t]))
                assert length <= 1 + 1e-6
                if length > 0.999:  # the place is farther away than one move
                    continue
                target = history.states[stream, t] + FAMILY.speed * history.actions[stream, t]
                normal = (target - places[best]) / (width * max(-rewards[best], floor))
                chance = np.exp(-0.5 * (normal**2).mean())
                assert history.action_probs[stream, t] == pytest.approx(chance, abs=2e-3)
                compared += 1
            assert compared > 5


def test_it_finds_the_goal_in_a_few_episodes_and_goes_on_searching_as_far_as_the_floor_says() -> None:
    tasks = FAMILY.tasks()
    low, high = FAMILY.random_return(tasks), FAMILY.optimal_return(tasks)
    curves = {}
    for floor in (0.0, 0.05):
        histories = learn(Homing(floor=floor), FAMILY, range(64), 200, n_stream=4)
        earned = np.stack([h.rewards.reshape(4, 10, 20).sum(axis=2).mean(axis=0) for h in histories])
        curves[floor] = ((earned - low[:, None]) / (high - low)[:, None]).mean(axis=0)
    # The standard error over 64 tasks is about .02 in the first two episodes and .003 at the end.
    assert curves[0.0][0] < 0.4 and curves[0.0][-1] > 0.99
    assert 0.92 < curves[0.05][-1] < 0.97


@pytest.mark.parametrize(
    ("places", "moves"),
    [
        (Box(-np.inf, np.inf, (2,)), Box(-1, 1, (2,))),
        (Box(0, 1, (2,)), Box(-1, 1, (3,))),
        (Box(0, 255, (2,), np.uint8), Box(-1, 1, (2,))),
    ],
)
def test_other_spaces_are_refused(places: Box, moves: Box) -> None:
    family = SimpleNamespace(name="other", observation_space=places, action_space=moves)
    with pytest.raises(SpaceError, match="homing: other needs a bounded Box of places"):
        Homing().check(family, n_timesteps=1, n_stream=1)  # type: ignore[arg-type]


def test_what_it_cannot_learn_is_refused_in_one_line() -> None:
    with pytest.raises(SpaceError, match="homing: darkroom needs a bounded Box of places"):
        learn(Homing(), Darkroom(3, 5), [0], 10)
    with pytest.raises(
        UsageError, match="homing: point_mass pays more than 0, which is not minus a distance"
    ):
        learn(Homing(), make_family("point_mass", {"reward_kind": "sparse"}), range(16), 60)
