"""Further inputs of a token: the same in training windows and while playing, and nothing at all when off."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from compressed_ad.errors import ConfigError, UsageError
from compressed_ad.evaluation.agents import InContextAgent
from compressed_ad.evaluation.evaluate import evaluate_in_context
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.token_inputs import TOKEN_INPUT
from compressed_ad.models.tokens import Tokens, shift
from compressed_ad.training.loop import build_model
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from compressed_ad.types import AnyArray, History, Step, to_spec

ALL = tuple(TOKEN_INPUT)
BOX = spaces.Box(-3, 3, (2,), np.float32)
GRID = spaces.MultiDiscrete([4, 5], start=[1, -2])
PICTURE = spaces.Box(0, 255, (5, 4, 3), np.uint8)
N, LENGTH = 5, 12


class Slots:
    """Episodes of at most 1 to 6 steps, and of 30, which no context holds; rewards are tenths."""

    num_envs = N
    horizon = np.array([1, 3, 4, 6, 30])

    def __init__(self, space: spaces.Space) -> None:
        self.space = space

    def draw(self) -> AnyArray:
        return np.stack([self.space.sample() for _ in range(N)])

    def reset(self) -> AnyArray:
        self.space.seed(1)
        self.random, self.age = np.random.default_rng(1), np.zeros(N, int)
        return self.draw()

    def step(self, actions: AnyArray) -> Step:
        self.age += 1
        ended = (self.age >= self.horizon) | ((self.random.random(N) < 0.1) & (self.horizon < 30))
        self.age[ended] = 0
        next_obs, fresh = self.draw(), self.draw()
        obs = np.where(ended.reshape(N, *[1] * (next_obs.ndim - 1)), fresh, next_obs).astype(next_obs.dtype)
        reward = self.random.integers(-5, 9, N).astype(np.float32) / 10
        late = self.random.random(N) < 0.5
        return Step(next_obs, reward, ended & ~late, ended & late, obs)


class Witness(InContextAgent):
    """Keeps everything: transitions, and at each step the tokens of its contexts and what the model gave."""

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        self.steps: list[tuple[AnyArray, AnyArray, Step]] = []
        self.contexts: list[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]] = []

    def _parameters(self, token: dict[str, torch.Tensor]) -> torch.Tensor:
        given = super()._parameters(token)
        memory = {name: value.clone() for name, value in self.memory.items()}
        self.contexts.append((self.length.clone(), memory, given))
        return given

    def act(self, obs: AnyArray) -> AnyArray:
        self.obs, actions = obs, super().act(obs)
        return actions

    def observe(self, actions: AnyArray, step: Step) -> None:
        self.steps.append((self.obs, actions, step))
        super().observe(actions, step)

    def history(self) -> History:
        obs, actions, steps = zip(*self.steps, strict=True)
        names = ("reward", "next_obs", "terminated", "truncated")
        reward, next_obs, terminated, truncated = (
            np.stack([getattr(step, name) for step in steps], axis=1) for name in names
        )
        return History(
            states=np.stack(obs, axis=1),
            actions=np.stack(actions, axis=1),
            rewards=reward,
            next_states=next_obs,
            terminated=terminated,
            truncated=truncated,
            action_probs=np.ones_like(reward),
            update=np.zeros(reward.shape, np.int32),
            learner=np.zeros(N, np.int32),
        )


def config(space: spaces.Space, inputs: tuple[str, ...] = ALL, **values: object) -> ModelConfig:
    small = {"tf_n_embd": 16, "tf_n_head": 2, "tf_n_layer": 1, "n_transit": LENGTH, "model": "CompressedAD"}
    made = {"observation_space": to_spec(space), "action_space": {"kind": "discrete", "n": 3}}
    return ModelConfig.model_validate(
        {**small, **made, "token_inputs": inputs, "reward_scale": 0.4, **values}
    )


def model(space: spaces.Space, inputs: tuple[str, ...] = ALL, **values: object) -> AD:
    made = build_model(config(space, inputs, **values), 0)
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    return made.eval()


def windows(history: History, length: int) -> Tokens:
    """The first ``length`` steps of all streams, as training sees them."""
    sampler = WindowSampler(from_histories({0: history}), length, 200, seed=0, first_window=1.0)
    begin, batch = sampler.starts(0)[0], sampler.batch(0)
    return batch.tokens.part(torch.from_numpy(np.unique(begin, return_index=True)[1]))


@pytest.mark.parametrize(
    ("space", "context", "cache"),
    [
        *((GRID, context, cache) for context in ("refill", "sliding") for cache in (True, False)),
        (BOX, "sliding", True),
        (PICTURE, "refill", True),
    ],
)
def test_a_token_is_the_same_in_a_training_window_and_while_playing(
    space: spaces.Space, context: str, cache: bool
) -> None:
    player = model(space)
    agent = Witness(player, cache=cache, context=context, seed=0)
    evaluate_in_context(agent, Slots(space), eval_timesteps=50)
    history = agent.history()
    whole = windows(history, 50)
    expected = {name: TOKEN_INPUT[name].of_windows(whole) for name in ALL}
    inside = ~whole.ended & whole.has_previous
    time = np.zeros(N, int)  # against a plain loop
    earned = np.zeros(N)
    for t, (_, _, step) in enumerate(agent.steps):
        np.testing.assert_array_equal(expected["episode_time"][:, t], time)
        np.testing.assert_allclose(expected["episode_return"][:, t], earned, atol=1e-6)
        over = step.terminated | step.truncated
        time, earned = np.where(over, 0, time + 1), np.where(over, 0.0, earned + step.reward)
    compared = 0
    for now, (length, memory, given) in enumerate(agent.contexts):
        for slot in range(N):
            first, n = now + 1 - int(length[slot]), int(length[slot])
            kept = {name: value[slot, :n] for name, value in memory.items()}
            for name in ALL:
                shown = inside[slot, first : now + 1] if name == "previous_state" else slice(None)
                torch.testing.assert_close(
                    kept[name][shown], expected[name][slot, first : now + 1][shown].to(kept[name].dtype),
                    rtol=0, atol=1e-6 if name == "episode_return" else 0,
                )  # fmt: skip
            if first == 0 or history.episode_end[slot, first - 1]:  # then the context is a window
                stream = slice(first, now + 1)
                arrays = (
                    history.states,
                    history.actions,
                    history.rewards,
                    history.next_states,
                    history.episode_end,
                )
                window = [torch.as_tensor(a[slot : slot + 1, stream]) for a in arrays]
                tokens = shift(*window, torch.zeros(1, n, dtype=torch.bool))
                with torch.no_grad():
                    torch.testing.assert_close(player(tokens)[0, -1], given[slot], rtol=1e-4, atol=1e-4)
                compared += 1
    assert compared > (50 if context == "sliding" else 150)


def test_windows_within_a_history_start_at_an_episode_and_so_do_their_inputs() -> None:
    agent = Witness(model(GRID), seed=0)
    evaluate_in_context(agent, Slots(GRID), eval_timesteps=60)
    history = agent.history()
    whole = windows(history, 60)
    sampler = WindowSampler(from_histories({0: history}), LENGTH, 64, seed=0, first_window=0.0)
    tokens, (index, valid) = sampler.batch(0).tokens, sampler.indices(0)
    assert valid.all() and (index[:, 0] % 60 > 0).any()
    for name in ("episode_return", "episode_time"):
        expected = TOKEN_INPUT[name].of_windows(whole).flatten()[torch.from_numpy(index)]
        torch.testing.assert_close(TOKEN_INPUT[name].of_windows(tokens), expected, rtol=0, atol=1e-6)


def test_a_slot_that_is_not_played_keeps_its_inputs() -> None:
    """A vector environment's dummy step after an end is as if it had not been."""
    agent = InContextAgent(model(GRID, n_transit=8), seed=0)
    agent.reset(2)
    still = np.array([True, False])
    obs, no = np.array([[1, -2], [2, 0]]), np.zeros(2, bool)
    for k in range(12):
        agent.act(obs + np.array([k % 3, 0]))
        agent.observe(
            np.zeros(2, int),
            Step(obs, np.ones(2, np.float32), no, no, obs, ~still if k in (2, 4, 8) else None),
        )
    agent.act(obs)
    rows = torch.arange(2), agent.length - 1
    assert agent.memory["episode_time"][rows].tolist() == [9, 12]
    assert agent.memory["episode_return"][rows].tolist() == [9.0, 12.0]


def test_the_border_of_an_episode_hides_the_state_before_it() -> None:
    """Nothing of an episode's last state is in the first token of the next one."""
    made = model(GRID, ("previous_state",))
    agent = Witness(made, seed=0)
    evaluate_in_context(agent, Slots(GRID), eval_timesteps=20)
    tokens = windows(agent.history(), LENGTH)
    value = TOKEN_INPUT["previous_state"].of_windows(tokens)
    shown = made.token_inputs["previous_state"](value, tokens, made.stem).abs().sum(dim=-1) > 0
    assert torch.equal(shown, ~tokens.ended & tokens.has_previous) and shown.any()
    assert torch.equal(value[:, 1:], tokens.state[:, :-1])


@pytest.mark.parametrize("space", [GRID, BOX], ids=["grid", "box"])
def test_gradients_reach_every_input(space: spaces.Space) -> None:
    made = model(space)
    agent = Witness(made, seed=0)
    evaluate_in_context(agent, Slots(space), eval_timesteps=20)
    sampler = WindowSampler(from_histories({0: agent.history()}), LENGTH, 8, seed=0)
    made.loss(sampler.batch(0))[0].backward()
    for name, weight in made.token_inputs.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["AD", "CompressedAD"])
def test_a_model_without_them_is_what_it_was(kind: str) -> None:
    plain, rich = build_model(config(GRID, (), model=kind), 3), build_model(config(GRID, model=kind), 3)
    assert not any("token_inputs" in name for name in plain.state_dict())
    assert "token_inputs" not in plain.config.model_dump(mode="json")
    assert config(GRID).model_dump(mode="json")["token_inputs"] == list(ALL)
    if kind == "AD":  # the initial weights that both have are the same
        theirs = rich.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in plain.state_dict().items())
    agent = InContextAgent(plain)
    agent.reset(N)
    agent.act(Slots(GRID).reset())
    assert not set(ALL) & set(agent.memory)


def test_returns_and_times_of_any_size_differ() -> None:
    """No table ends: far-off values give finite vectors of their own."""
    made = model(GRID)
    values = {
        "episode_return": torch.tensor([-1e6, -3, 0, 0.4, 0.8, 30, 1e6], dtype=torch.float64),
        "episode_time": torch.tensor([0, 1, 2, 50, 51, 9_999, 10_000]),
    }
    for name, numbers in values.items():
        with torch.no_grad():
            vectors = made.token_inputs[name](numbers[None], None, None)[0]
        distance = torch.cdist(vectors, vectors) + torch.eye(len(numbers))
        assert vectors.isfinite().all() and distance.min() > 0.01 and vectors.norm(dim=-1).max() < 60


def test_mistakes_are_told() -> None:
    with pytest.raises(
        ConfigError, match="must be one of previous_state, episode_return, episode_time, got 'time'"
    ):
        MODEL["AD"]({**config(GRID, ()).model_dump(), "token_inputs": ["time"]})
    with pytest.raises(ConfigError, match="token_inputs: episode_time is named twice"):
        MODEL["AD"]({**config(GRID, ()).model_dump(), "token_inputs": ["episode_time", "episode_time"]})
    made = model(GRID)
    one = torch.ones(1, 1, dtype=torch.long)
    no = one < 0
    token = shift(torch.ones(1, 1, 2).long(), one, one.float(), torch.ones(1, 1, 2).long(), no, no)
    with pytest.raises(UsageError, match="need their previous_state, episode_return, episode_time"):
        made(replace(token, episode_time=one), made.new_cache(1))
