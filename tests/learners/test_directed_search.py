"""Directed search as a reference: as R-max that is told the moves, and only where it can play."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from compressed_ad import evaluate_references, family_problems, make_learner
from compressed_ad.cli.main import main
from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.histories.summary import episode_returns
from compressed_ad.learners import finite_players
from compressed_ad.learners.rmax import directed_search
from compressed_ad.seeding import seed64
from compressed_ad.tasks.base import DIRECTED_SEARCH
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard, DarkroomPermuted, KeyToDoor
from compressed_ad.tasks.point_mass import PointMass
from compressed_ad.tasks.switching import DarkroomSwitching, KeyToDoorSwitching
from tests.learners.learning import learn


def returns(family: Any, n_task: int, rollouts: int, episodes: int) -> Any:
    """(E,) normalised, and the tasks."""
    ids = np.random.default_rng(0).permutation(len(family.tasks()))[:n_task]
    tasks = family.tasks()[ids]
    ((name, found),) = evaluate_references(
        family, tasks, rollouts=rollouts, episodes=episodes, seed=3
    ).items()
    assert name == DIRECTED_SEARCH and found.shape == (n_task, rollouts, episodes)
    random, optimal = (
        values[:, None] for values in (family.random_return(tasks), family.optimal_return(tasks))
    )
    return ((found.mean(1) - random) / (optimal - random)).mean(0)


@pytest.mark.parametrize("family", [DarkroomSwitching(), KeyToDoorSwitching()], ids=repr)
def test_where_rewards_move_it_finds_them_again(family: Any) -> None:
    """Three cells, six episodes each: in the first cycle they have to be found."""
    first, second, third = returns(family, 30, 1, 54).reshape(3, 18).mean(1)
    assert first < second - 0.1 and second > 0.85 and third > 0.85


@pytest.mark.parametrize(
    ("family", "episodes", "area", "tolerance"),
    [
        (Darkroom(), 10, 0.957, 0.006),  # as the learner's own curve in ``test_rmax``
        (DarkroomHard(), 40, 0.83, 0.04),
        (DarkroomPermuted(), 8, 0.98, 0.01),
        (KeyToDoor(), 10, 0.979, 0.01),
        (KeyToDoor(ends=False), 10, 0.98, 0.015),
        (KeyToDoor(start="random"), 15, 0.975, 0.02),
    ],
)
def test_finds_what_pays_and_goes_back(family: Any, episodes: int, area: float, tolerance: float) -> None:
    found = returns(family, 81, 2, episodes)
    assert found[-1] > 0.99
    assert (found.sum() + (50 - episodes) * found[-1]) / 50 == pytest.approx(area, abs=tolerance)


@pytest.mark.parametrize("family", [DarkroomHard(5, 9), KeyToDoor(4, 12), DarkroomPermuted(3, 9)])
def test_plays_as_the_learner_does(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, episodes = np.array([3, 20]), 12
    who = [(task, stream) for task in ids.tolist() for stream in range(3)]
    own = [seed64(0, "RMax", *each) for each in who]

    def drawn(seed: int, name: str, *parts: int) -> int:
        return own[parts[0]] if name == "table agent" else seed64(seed, name, *parts)

    monkeypatch.setattr(finite_players, "seed64", drawn)
    ours = evaluate_references(family, family.tasks()[ids], rollouts=3, episodes=episodes)[DIRECTED_SEARCH]
    memory = 1 if isinstance(family, KeyToDoor) else 0
    learner = make_learner("rmax", {"dynamics": "given", "epsilon": 0.0, "memory": memory})
    histories = learn(learner, family, ids, episodes * family.horizon, 3)
    theirs = [episode_returns(history)[:, :episodes] for history in histories]
    np.testing.assert_array_equal(ours, np.stack(theirs))


class Many(Darkroom):
    """Too many actions to plan with."""

    action_space = spaces.Discrete(63)  # type: ignore[assignment]


class Wrong(Darkroom):
    def successor_table(self, tasks: Any) -> Any:
        return super().successor_table(tasks) + 1


def test_is_left_out_where_it_cannot_play() -> None:
    for family in (PointMass(), Many(3, 5)):
        assert evaluate_references(family, family.tasks()[:2], rollouts=1, episodes=2) == {}
    with pytest.raises(SpaceError, match=r"successor_table must give whole numbers .* from -1 to 8"):
        evaluate_references(Wrong(3, 5), Darkroom(3, 5).tasks()[:2], rollouts=1, episodes=2)
    with pytest.raises(UsageError, match="5 slots cannot be shared equally by 2 tasks"):
        directed_search(Darkroom(3, 5), Darkroom(3, 5).tasks()[:2], 0).reset(5)


def test_a_wrong_table_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--env.family", f"{__name__}:Wrong", "--env.kwargs.size", "6"]) == 2
    assert not any(tmp_path.iterdir())
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "successor_table" in line)
    assert "env: darkroom: successor_table must give whole numbers (1, 36, 5) from -1 to 35" in line


class Turned(Darkroom):
    def successor_table(self, tasks: Any) -> Any:
        return super().successor_table(tasks)[..., [1, 0, 2, 3, 4]]


def test_a_table_that_does_not_lead_where_actions_lead_is_a_broken_promise() -> None:
    (problem,) = family_problems(Turned(3, 5))
    assert problem.endswith("successor_table() of task 0 does not lead where its actions led")
    assert not any(map(family_problems, (Darkroom(3, 5), KeyToDoor(3, 9), DarkroomPermuted(3, 9))))
