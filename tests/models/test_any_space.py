"""Models on all kinds of spaces: from histories made by hand to play, with what holds for gridworlds too."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from compressed_ad.cli.models import _score
from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.evaluation.border_embeddings import geometry, mark_effects
from compressed_ad.evaluation.evaluate import evaluate_in_context, evaluate_tasks
from compressed_ad.evaluation.rollouts import random_rollouts
from compressed_ad.histories.file import HistoryFile, HistoryInfo
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.compressed_ad import CompressedAD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import Batch
from compressed_ad.report.comparison import analyse
from compressed_ad.report.measures import MEASURES
from compressed_ad.report.results import load_runs
from compressed_ad.report.run_report import Experiment, build_report
from compressed_ad.runs import job as runs
from compressed_ad.runs.judge import evaluate_run, make_player
from compressed_ad.runs.look_inside import examine_model
from compressed_ad.runs.settings import Config
from compressed_ad.runs.trainer import train_run
from compressed_ad.training.checkpoints import digest, load
from compressed_ad.training.loop import Interrupted, train
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from compressed_ad.types import AnyArray, History, Split, Step, to_spec
from tests.probes import Aim

VECTOR = spaces.Box(np.array([-1.0, -50.0, -np.inf]), np.array([1.0, 50.0, np.inf]), dtype=np.float64)
IMAGE = spaces.Box(0, 255, (5, 4, 3), np.uint8)
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
PAIRS = {
    "vector, box": (VECTOR, BOX),
    "image, discrete": (IMAGE, spaces.Discrete(3)),
    "image, box": (IMAGE, BOX),
    "numbers, many": (spaces.MultiDiscrete([4, 3], start=[1, -2]), spaces.MultiDiscrete([3, 2])),
    "from 2, from 1": (spaces.Discrete(4, start=2), spaces.Discrete(3, start=1)),
    "vector, unbounded": (VECTOR, spaces.Box(-np.inf, np.inf, (2,), np.float64)),
}
Pair = tuple[spaces.Space, spaces.Space]


def model(name: str, pair: Pair, **values: object) -> AD:
    """A small model whose head is not zero, so that differences show."""
    spec = {"observation_space": to_spec(pair[0]), "action_space": to_spec(pair[1])}
    if pair[0] is VECTOR:
        spec |= {"observation_mean": [0.0, 3.0, 1.0], "observation_std": [0.6, 30.0, 2.0]}
    small = {
        "tf_n_embd": 16,
        "tf_n_head": 2,
        "tf_n_layer": 1,
        "n_transit": 12,
        "model": name,
        "reward_scale": 4.0,
    }
    torch.manual_seed(0)
    made = MODEL[name](ModelConfig.model_validate({**small, **spec, **values}))
    torch.nn.init.normal_(made.head.weight)
    return made.eval()


def elements(space: spaces.Space, *shape: int, seed: int = 0) -> AnyArray:
    space.seed(seed)
    drawn = np.stack([space.sample() for _ in range(int(np.prod(shape)))])
    return drawn.reshape(*shape, *drawn.shape[1:])


def history(pair: Pair, n_stream: int = 4, n_step: int = 30, seed: int = 0) -> History:
    random, shape = np.random.default_rng(seed), (n_stream, n_step)
    return History(
        states=elements(pair[0], *shape, seed=seed),
        actions=elements(pair[1], *shape, seed=seed + 1),
        rewards=random.normal(0, 4, shape).astype(np.float32),
        next_states=elements(pair[0], *shape, seed=seed + 2),
        terminated=np.zeros(shape, bool),
        truncated=random.random(shape) < 0.25,
        action_probs=random.random(shape).astype(np.float32),
        update=np.zeros(shape, np.int32),
        learner=np.zeros(n_stream, np.int32),
        compression_mask=random.random(shape) < 0.5,
    )


def batch(pair: Pair, size: int = 4, **options: object) -> Batch:
    return WindowSampler(from_histories({0: history(pair)}), 12, size, seed=0, **options).batch(0)


class Slots:
    """Slots that show random elements of a space and end their episodes at different times."""

    def __init__(self, space: spaces.Space, n: int) -> None:
        self.space, self.num_envs = space, n

    def _draw(self) -> AnyArray:
        return np.stack([self.space.sample() for _ in range(self.num_envs)])

    def reset(self) -> AnyArray:
        self.space.seed(0)
        self.random = np.random.default_rng(0)
        return self._draw()

    def step(self, actions: AnyArray) -> Step:
        next_obs, fresh = self._draw(), self._draw()
        ended = self.random.random(self.num_envs) < 0.3
        reward = self.random.normal(0, 4, self.num_envs).astype(np.float32)
        mixed = np.where(ended.reshape(-1, *[1] * (next_obs.ndim - 1)), fresh, next_obs)
        return Step(next_obs, reward, ended, np.zeros_like(ended), mixed.astype(next_obs.dtype))


class Recorded(InContextAgent):
    """Keeps the parameters and actions of every step."""

    def _parameters(self, token: dict[str, torch.Tensor]) -> torch.Tensor:
        given = super()._parameters(token)
        self.seen = [*getattr(self, "seen", []), given]
        return given

    def act(self, obs: AnyArray) -> AnyArray:
        actions = super().act(obs)
        self.actions = [*getattr(self, "actions", []), actions]
        assert ((self.probability >= 0) & (self.probability <= 1)).all()
        return actions


@pytest.mark.parametrize(("marks", "guidance"), [("self", 0.0), ("prompt", 1.5)])
@pytest.mark.parametrize("name", PAIRS)
def test_cached_play_equals_the_uncached_reference(name: str, marks: str, guidance: float) -> None:
    """Parameters within 1e-4 over contexts that fill up several times; actions are of the space."""
    observation, action = PAIRS[name]
    player = model("CompressedAD", PAIRS[name])
    seen = []
    for cache in (True, False):
        options = {"on_policy_threshold": 0.3, "compression_window": 2, "marks": marks, "guidance": guidance}
        agent = Recorded(player, cache=cache, seed=3, **options)
        evaluate_in_context(agent, Slots(observation, 4), eval_timesteps=30)
        assert all(action.contains(one) for step in agent.actions for one in step)
        seen.append(torch.stack(agent.seen))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_what_ad_and_its_descendants_share(name: str) -> None:
    """Equal without marks' vectors; marks matter with them; nothing is seen before its time."""
    tokens = batch(PAIRS[name]).tokens
    plain, marked = model("AD", PAIRS[name]), model("CompressedAD", PAIRS[name])
    assert isinstance(marked, CompressedAD)
    marked.head.load_state_dict(plain.head.state_dict())  # drawn after the vectors of the marks
    assert not torch.equal(marked(tokens), plain(tokens))
    with torch.no_grad():
        marked.embed_compress_start.zero_()
        marked.embed_compress_end.zero_()
    torch.testing.assert_close(marked(tokens), plain(tokens), rtol=0, atol=0)
    later = batch(PAIRS[name]).tokens
    for key in ("action", "next_state", "reward"):
        getattr(later, key)[:, 7] = getattr(later, key)[:, 3]
    torch.testing.assert_close(plain(later)[:, :7], plain(tokens)[:, :7], rtol=0, atol=0)
    assert not torch.equal(plain(later)[:, 7:], plain(tokens)[:, 7:])


def test_images_stay_in_bytes_until_the_model_looks_at_them() -> None:
    tokens = batch(PAIRS["image, box"]).tokens
    assert tokens.state.dtype == tokens.next_state.dtype == torch.uint8
    agent = InContextAgent(model("AD", PAIRS["image, box"]))
    evaluate_in_context(agent, Slots(IMAGE, 2), eval_timesteps=5)
    assert agent.memory["state"].dtype == torch.uint8


@pytest.mark.parametrize("name", PAIRS)
def test_rewards_count_in_units_of_their_scale(name: str) -> None:
    pair = PAIRS[name]
    tokens = batch(pair).tokens
    fourfold = batch(pair).tokens
    fourfold.reward.mul_(4)
    scaled, plain = model("AD", pair, reward_scale=4.0), model("AD", pair, reward_scale=1.0)
    torch.testing.assert_close(scaled(fourfold), plain(tokens), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_looking_inside_works_for_every_head(name: str) -> None:
    player, windows = model("CompressedAD", PAIRS[name]), batch(PAIRS[name], size=6)
    effects = mark_effects(player, windows, n_bootstrap=20)
    assert np.isfinite(effects.divergence).all() and np.isfinite(effects.cross_entropy).all()
    assert (effects.divergence[:, :, 0] > 0).any()
    found = geometry(player, windows, 0)
    assert sum(key.startswith("action") for key in found.cosine_start) == len(player.action.vectors())
    given = player(windows.tokens).double()
    base = player.head.log_prob(given, windows.target)[windows.valid]
    loss, _ = player.loss(windows)
    assert float(loss) == pytest.approx(-float(base.mean()), rel=1e-4)


def test_an_interrupted_run_on_continuous_actions_ends_with_the_same_weights(tmp_path: Path) -> None:
    pair = PAIRS["vector, box"]
    config = ModelConfig.model_validate(
        {
            **model("CompressedAD", pair).config.model_dump(),
            "steps": 12,
            "batch_size": 4,
            "checkpoint_every": 4,
            "dropout": 0.1,
            "validations": 0,
        }
    )
    sampler = WindowSampler(from_histories({0: history(pair)}), 12, 4, seed=0)
    train(config, sampler, tmp_path / "whole")
    seen: list[int] = []
    with pytest.raises(Interrupted):
        train(
            config,
            sampler,
            tmp_path / "cut",
            progress=lambda step, _: seen.append(step),
            should_stop=lambda: seen[-1] >= 7,
        )
    train(config, sampler, tmp_path / "cut")
    ends = [digest(load(tmp_path / name / "last_model.pt")) for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert all("accuracy" not in line for line in lines) and "loss" in lines[-1]


# ---------------------------------------------------------------- from a history to a report

FAMILY = f"{Aim.__module__}:Aim"


def cloned(path: Path) -> HistoryFile:
    """Histories of Aim: actions at random at first, then the best ones, with a little noise."""
    family = Aim()
    info = HistoryInfo(
        FAMILY,
        {},
        {"observation": to_spec(family.observation_space), "action": to_spec(family.action_space)},
        family.horizon,
        "hand",
        {},
        0,
    )
    split = Split(np.arange(4), np.array([4]), np.array([5]))
    writer = HistoryWriter(path, info, split, family.tasks(), None, family.random_return(family.tasks()))
    n_stream, n_step = 8, 60
    for task in range(6):
        env, random = family.make(None, np.arange(n_stream) + 10 * task), np.random.default_rng(task)
        obs, record = env.reset(), []
        for step in range(n_step):
            noise = random.normal(0, 0.05, (n_stream, 1))
            chance = random.uniform(-2, 2, (n_stream, 1))
            actions = np.clip(chance if step < 20 else family.best(obs) + noise, -2, 2).astype(np.float32)
            result = env.step(actions)
            record.append((obs, actions, result))
            obs = result.obs
        confident = np.tile(np.arange(n_step) >= 20, (n_stream, 1))
        writer.append(
            task,
            History(
                states=np.stack([o for o, _, _ in record], axis=1),
                actions=np.stack([a for _, a, _ in record], axis=1),
                rewards=np.stack([r.reward for _, _, r in record], axis=1),
                next_states=np.stack([r.next_obs for _, _, r in record], axis=1),
                terminated=np.stack([r.terminated for _, _, r in record], axis=1),
                truncated=np.stack([r.truncated for _, _, r in record], axis=1),
                action_probs=np.where(confident, 0.9, 0.0).astype(np.float32),
                update=confident.astype(np.int32),
                learner=np.zeros(n_stream, np.int32),
                entropy=np.where(confident, -1.6, 1.4).astype(np.float32),
                compression_mask=confident,
            ),
        )
    writer.finish()
    return HistoryFile(path)


OWN = frozenset(["tests.probes:Aim"])
"""The code that these runs trust."""


def settings(model: str, **values: object) -> Config:
    return Config.model_validate(
        {
            "env": {"family": FAMILY},
            "model": {
                "model": model,
                "tf_n_embd": 32,
                "tf_n_head": 2,
                "tf_n_layer": 1,
                "n_transit": 20,
                "steps": 250,
                "batch_size": 16,
                "lr": 0.01,
                "first_window": 0.2,
                "validations": 1,
                "validation_episodes": 2,
                "validation_rollouts": 1,
                **values,
            },
            "evaluation": {"episodes": 6, "rollouts": 8, "imitation_windows": 32},
            "device": "cpu",
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Job]:
    out = tmp_path_factory.mktemp("aim")
    history = cloned(out / "h.hdf5").path
    done = {}
    for name in ("AD", "CompressedAD"):
        config = settings(name, steps=250 if name == "AD" else 20)
        done[name] = runs.training_job(config, name, 0, history, out, OWN)
        train_run(done[name])
        evaluate_run(done[name])
    return done


def test_cloning_a_continuous_policy_gets_far_below_chance(trained: dict[str, runs.Job]) -> None:
    """The squared error of a uniform action is 25 / 12 on average; less than a tenth of it is asked for."""
    family, player = Aim(), make_player(trained["AD"])
    tasks = family.tasks()[5:]
    returns = evaluate_tasks(player.model, family, tasks, rollouts=20, episodes=6, sample=False)
    error = -returns[0, :, 2:].mean() / 10 / family.horizon
    assert error < 0.1 * 25 / 12
    assert player.model.config.reward_scale > 1 and player.model.config.observation_std[0] > 100


def test_continuous_runs_are_judged_reported_and_looked_into(
    trained: dict[str, runs.Job], tmp_path: Path
) -> None:
    """Accuracy and the source's entropy are not defined: no line, no number, nothing that is no JSON."""
    methods = [load_runs([job.path]) for job in trained.values()]
    assert all(np.isnan(m.accuracy).all() and np.isnan(m.behaviour_entropy).all() for m in methods)
    assert all(np.isfinite(m.cross_entropy).all() and np.isfinite(m.returns).all() for m in methods)
    assert np.isnan(analyse(methods).methods["AD"]["accuracy"].value)
    experiment = Experiment("aim", {"train": [0]}, (), {})
    built = build_report(tmp_path / "report", methods, experiment=experiment)
    page = built.index.read_text()
    label = MEASURES["accuracy"].label
    assert "Final return" in page and f">{label}<" not in page and ">nan<" not in page.lower()
    assert built.summary["methods"]["AD"]["accuracy"]["mean"] is None
    assert "accuracy" not in _score(trained["AD"]) and "cross-entropy" in _score(trained["AD"])
    found = examine_model(trained["CompressedAD"], windows=8)
    assert found.effects is not None and np.isfinite(found.effects.divergence[2, 2]).all()
    record = random_rollouts(Aim(), Aim().tasks()[:2], rollouts=3, episodes=2)
    assert record is not None and record.actions.shape == (2, 3, 10, 1)


def test_smoothing_is_refused_before_anything_is_trained(
    trained: dict[str, runs.Job], tmp_path: Path
) -> None:
    history = trained["AD"].history
    job = runs.training_job(settings("AD", label_smoothing=0.1), "AD", 0, history, tmp_path, OWN)
    with pytest.raises(Exception, match="label_smoothing is for discrete actions"):
        train_run(job)
    assert not job.path.exists()
