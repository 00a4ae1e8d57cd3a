"""Training and playing on a GPU, held against the CPU; skipped where there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.runs.data import FEW_WEIGHTS, where_it_plays_faster
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.training.loop import Interrupted, build_model, gradient, train
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from tests.conftest import cad
from tests.models.test_models import lively
from tests.training.test_loop import config, validate, weights
from tests.training.test_transforms import history

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
KINDS: list[dict[str, Any]] = [
    {"model": "AD"},
    {"model": "CompressedAD"},
    {"model": "MarkedAttentionAD"},
    {"model": "AD", "token_inputs": ["previous_state", "episode_return", "episode_time"]},
    {"model": "AD", "position": "learned"},
    {"model": "AD", "segments": "episode", "kept_tokens": 4, "n_transit": 30},
    {"model": "CompressedAD", "segments": "marks", "kept_tokens": 6, "n_transit": 30},
    {"model": "AD", "recent_steps": 9, "n_transit": 30},
    {"model": "RecurrentAD", "memory_tokens": 3, "memory_steps": 8, "n_transit": 30},
]
NAMES = ["-".join(str(value) for value in kind.values()) for kind in KINDS]


def on(device: str, c: ModelConfig) -> WindowSampler:
    sequences = from_histories({0: history(6, 60)})
    return WindowSampler(sequences, c.n_transit, c.batch_size, seed=0, device=device)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_gradient_is_that_of_the_cpu(kind: dict[str, Any]) -> None:
    c = config(dropout=0.0, **kind)
    here, there = (lively(build_model(c, 0, device)).train() for device in ("cpu", "cuda"))
    there.load_state_dict(here.state_dict())
    here_found, found = (
        gradient(model, model.loss, on(device, c).batch(0), c)
        for model, device in ((here, "cpu"), (there, "cuda"))
    )
    torch.testing.assert_close(found.cpu(), here_found, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:  # tf32 is off, so both round as float32 does
            torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("values", [{}, {"segments": "episode", "kept_tokens": 4}], ids=["full", "segments"])
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    c = config(**values)
    train(c, on("cuda", c), tmp_path / "whole", validate=validate, device="cuda")
    seen: list[int] = []
    with pytest.raises(Interrupted):
        train(
            c,
            on("cuda", c),
            tmp_path / "stopped",
            validate=validate,
            device="cuda",
            progress=lambda step, metrics: seen.append(step),
            should_stop=lambda: len(seen) == 7,
        )
    train(c, on("cuda", c), tmp_path / "stopped", validate=validate, device="cuda")
    once, twice = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_play_is_that_of_the_cpu_and_the_cache_that_of_whole_contexts(kind: dict[str, Any]) -> None:
    def played(model: AD, cache: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        tasks = Darkroom().tasks()[:6]
        env = Darkroom().make(tasks, np.arange(6))
        agent = InContextAgent(model, seed=0, cache=cache, marks="self" if "Compressed" in name else "off")
        agent.reset(6)
        obs, actions, probability = env.reset(), [], []
        for _ in range(70):  # of 24 or 30 in a context, so it is filled again and again
            action = agent.act(obs)
            actions.append(action)
            probability.append(agent.probability.copy())
            step = env.step(action)
            agent.observe(action, step)
            obs = step.obs
        return actions, probability

    c = config(**{"dropout": 0.0, "n_transit": 24, **kind})
    name = c.model
    here = lively(build_model(c, 0))
    there = MODEL[name](c).to("cuda").eval()
    there.load_state_dict(here.state_dict())
    expected = played(here, True)
    for cache in (True, False) if name != "RecurrentAD" and c.segmentation == "none" else (True,):
        found = played(there, cache)
        assert np.array_equal(expected[0], found[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # while it compiles
@pytest.mark.parametrize("values", [{"precision": "bfloat16"}, {"compile": True}, {"accumulate": 2}])
def test_losses_fall_with_every_way_of_computing(tmp_path: Path, values: dict[str, Any]) -> None:
    c = config(dropout=0.0, steps=150, **values)
    train(c, on("cuda", c), tmp_path, device="cuda")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_gradient_step_never_waits(tmp_path: Path) -> None:
    from benchmarks.gpu import stepper, waits
    from benchmarks.model import default_model, synthetic

    changes: list[dict[str, Any]] = [{}, {"segments": "episode"}, {"model": "CompressedAD"}]
    for values in changes:
        step = stepper(default_model(**values), synthetic(20, 400), "cuda", compiled=False)
        assert waits(step) == "never", values


def test_a_few_contexts_play_on_the_cpu_and_the_model_stays_where_it_is() -> None:
    model = build_model(config(), 0, "cuda")
    n_weight = sum(weight.numel() for weight in model.parameters())
    few = int(FEW_WEIGHTS / n_weight)
    assert where_it_plays_faster(model, few + 1) is model
    moved = where_it_plays_faster(model, few)
    assert moved.head.weight.device.type == "cpu"
    assert model.head.weight.device.type == "cuda"


def test_a_run_on_a_gpu_from_nothing_to_the_report_and_played_again_on_the_cpu(tmp_path: Path) -> None:
    done = cad("run", "--preset", "smoke", "--device", "cuda", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "index.html").exists()
    (run,) = tmp_path.glob("CompressedAD-*seed0")
    done = cad("evaluate", run, "--device", "cpu")
    assert done.returncode == 0, done.stderr
