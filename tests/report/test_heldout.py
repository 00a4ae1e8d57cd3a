"""From a history file to a figure and a data frame in Python, against what the command line makes."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot

import compressed_ad
from compressed_ad import (
    HistoryFile,
    InContextResult,
    config_and_sampler,
    episode_returns,
    evaluate_heldout,
    evaluate_tasks,
    learning_curves,
    load_runs,
    make_family,
    performance_profile,
    plot_in_context,
    probability_trace,
    progress_line,
    train,
)
from compressed_ad.errors import ConfigError, MissingExtraError, UsageError, install_command
from compressed_ad.runs.directory import stored_config
from tests.conftest import SmokeRun

NAME = "history_darkroom_PPO_alg-seed0_compressed.hdf5"
PNG = b"\x89PNG"


@pytest.fixture
def file(smoke: SmokeRun) -> HistoryFile:
    return HistoryFile(smoke.out / NAME)


# ---------------------------------------------------------------- training and evaluation


def test_settings_and_windows_are_those_of_the_command_line(smoke: SmokeRun, file: HistoryFile) -> None:
    run = smoke.out / "CompressedAD-darkroom-seed0"
    checkpoint = torch.load(run / "last_model.pt")
    config, sampler = config_and_sampler(file.path, **stored_config(run).model.model_dump(exclude_none=True))
    assert config.model_dump(mode="json") == checkpoint["config"]
    assert set(sampler.sequences.task.tolist()) == set(file.split.train.tolist())
    with pytest.warns(UserWarning, match=r"^the longest history has 400 steps .* fewer than n_transit 500"):
        config_and_sampler(file, model="AD", n_transit=500)
    with pytest.raises(
        ConfigError, match=r"^config_and_sampler: unknown key 'tf_nembd' \(did you mean 'tf_n_embd'\?\)$"
    ):
        config_and_sampler(file, tf_nembd=3)


def test_models_play_on_the_held_out_tasks(file: HistoryFile, tmp_path: Path) -> None:
    config, sampler = config_and_sampler(file, model="AD", tf_n_embd=8, tf_n_head=1, n_transit=20, steps=2)
    models = [train(config, sampler, tmp_path / str(seed), seed=seed).model for seed in (0, 1)]
    steps = []
    found = evaluate_heldout(models, file, rollouts=2, episodes=3, progress=lambda *at: steps.append(at))
    assert (found.name, found.seeds, found.returns.shape[1:]) == (
        "AD",
        (0, 1),
        (len(file.split.heldout), 2, 3),
    )
    family = make_family(file.info.family, file.info.family_kwargs)
    for seed, model in enumerate(models):
        alone = evaluate_tasks(model, family, file.tasks[found.task_ids], rollouts=2, episodes=3, seed=seed)
        np.testing.assert_array_equal(found.returns[seed], alone)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1] == (120, 120)  # two models, 3 episodes of 20 steps
    assert found.limit is not None  # it is known to be the default Darkroom
    named = evaluate_heldout(models[0], file, name="mine", family=family, rollouts=1, episodes=1)
    assert named.name == "mine" and named.seeds == (0,)


# ---------------------------------------------------------------- data frames


def test_a_data_frame_has_a_row_for_each_episode(smoke: SmokeRun) -> None:
    runs = load_runs([smoke.out / f"AD-darkroom-seed{seed}" for seed in (0, 1)])
    assert repr(runs) == "<MethodRuns AD: 2 runs, 8 held-out tasks x 2 rollouts x 5 episodes>"
    frame = runs.to_pandas()
    assert list(frame) == ["method", "seed", "task", "rollout", "episode", "return", "normalised"]
    assert len(frame) == runs.returns.size
    where = ["seed", "task", "rollout", "episode"]
    assert not frame.duplicated(where).any()
    found = frame.set_index(where)["return"]
    for r, n, m, e in ((0, 0, 0, 0), (1, 3, 1, 2), tuple(size - 1 for size in runs.returns.shape)):
        assert found[(runs.seeds[r], runs.task_ids[n], m + 1, e + 1)] == runs.returns[r, n, m, e]
    curve = frame.groupby("episode")["normalised"].mean()
    np.testing.assert_allclose(curve, runs.curves.mean(axis=(0, 1)))


def test_returns_in_a_vector_environment_have_a_row_for_each_slot() -> None:
    frame = InContextResult(np.array([[1.0, 2.0], [3.0, np.nan]]), 9).to_pandas()
    expected = pd.DataFrame({"episode": [1, 1, 2, 2], "slot": [0, 1, 0, 1], "return": [1, 2, 3, np.nan]})
    pd.testing.assert_frame_equal(frame, expected)


def test_without_pandas_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError) as caught:
        InContextResult(np.zeros((1, 1)), 1).to_pandas()
    wanted = f"to_pandas() needs an optional dependency: {install_command('pandas')}"
    assert str(caught.value) == wanted


# ---------------------------------------------------------------- figures


def test_the_figure_of_the_report_in_one_call(smoke: SmokeRun, file: HistoryFile) -> None:
    """The same curves as ``in_context_curves`` draws of what ``analyse`` gives."""
    runs = [
        load_runs([smoke.out / f"{name}-darkroom-seed{k}" for k in (0, 1)]) for name in ("AD", "CompressedAD")
    ]
    (axes,) = plot_in_context(*runs, source=file).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    for method in runs:
        np.testing.assert_allclose(drawn[method.name], method.curves.mean(axis=(0, 1)))
    words = {text.get_text() for text in axes.texts}
    assert words >= {"AD", "CompressedAD", "PPO, learning", "random", "optimal", "limit"}
    unknown = replace(runs[0], optimal=np.full_like(runs[0].optimal, np.nan))
    with pytest.raises(UsageError, match="optimal returns are unknown; give source, the history file"):
        plot_in_context(unknown)
    assert plot_in_context(unknown, source=file).axes
    (bare,) = plot_in_context(runs[0]).axes
    assert "PPO, learning" not in {text.get_text() for text in bare.texts}


def test_figures_show_in_a_notebook() -> None:
    figure = performance_profile({"AD": np.ones((3, 2))}, [0, 1])
    assert figure._repr_png_().startswith(PNG)  # type: ignore[attr-defined]  # how IPython displays an object


def test_figures_are_drawn_beside_ones_own(file: HistoryFile, smoke: SmokeRun) -> None:
    history = file.load([0])[0]
    returns = np.stack([episode_returns(one).mean(axis=0) for _, one in file.each()])
    runs = load_runs([smoke.out / "AD-darkroom-seed0"])
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    a, b, c, d = grid.ravel()
    assert learning_curves(returns, name="PPO", ax=a) is figure
    assert probability_trace(history.action_probs[0], history.compression_mask[0], ax=b) is figure
    assert performance_profile({"AD": np.ones((3, 2))}, [0, 1], ax=c) is figure
    assert plot_in_context(runs, ax=d) is figure
    assert all(axes.lines for axes in grid.ravel())
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: compressed_ad.in_context_curves({"AD": np.ones((5, 20))}),
         "bands['AD']: expected numbers of shape (3, E), got shape (5, 20)"),
        (lambda: compressed_ad.in_context_curves({"AD": np.ones((3, 4))}, source=np.ones((2, 4))),
         "source: expected numbers of shape (E,), got shape (2, 4)"),
        (lambda: learning_curves([[1, 2], [1]], name="PPO"),
         "returns: expected numbers of shape (N, E), got rows of different lengths"),
        (lambda: probability_trace([0.5, 0.5], [True]),
         "mask: expected numbers of shape (2,), got shape (1,)"),
        (lambda: compressed_ad.per_task_scatter({"AD": [1.0, 2.0]}, ["a", "b"]),
         "scores['AD']: expected numbers of shape (R, N), got shape (2,)"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_told_by_the_name_of_the_argument(draw, message) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        draw()


# ---------------------------------------------------------------- progress


def test_a_line_of_progress_is_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_line("train", 4, every=0)
    for step in range(1, 5):
        show(step, {"loss": 1 / step})
    written = capsys.readouterr().out
    assert written.endswith("\n") and written.count("\n") == 1
    lines = [line.strip() for line in written.split("\r")[1:]]
    assert lines[:3] == [f"train:  {25 * k} % ({k} of 4) loss {1 / k:.3g}" for k in (1, 2, 3)]
    assert lines[3] == "train: done in 0 s"
    lengths = [len(line) for line in written.rstrip("\n").split("\r")[1:]]
    assert lengths == sorted(lengths)  # nothing of a longer line remains
    show = progress_line("play", every=60)
    for done in (10, 20, 30):
        show(done, 30)
    assert capsys.readouterr().out.count("\r") == 2  # the first and the last
