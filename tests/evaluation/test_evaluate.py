import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from compressed_ad.errors import NumericalError, RunError, SpaceError, UsageError
from compressed_ad.evaluation.agents import InContextAgent, OptimalAgent, RandomAgent
from compressed_ad.evaluation.evaluate import evaluate_imitation, evaluate_in_context, evaluate_tasks
from compressed_ad.evaluation.rollouts import record_rollouts
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD, evaluating
from compressed_ad.models.settings import ModelConfig
from compressed_ad.models.tokens import shift
from compressed_ad.tasks.as_gymnasium import TaskEnv
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.point_mass import PointMass
from compressed_ad.training.sequences import from_histories
from compressed_ad.training.windows import WindowSampler
from compressed_ad.types import AnyArray, Step, to_spec
from tests.probes import VALUE
from tests.tasks.test_as_batched import Native, Script, Scripted
from tests.training.test_transforms import history

SPACES = {
    "observation_space": {"kind": "multidiscrete", "nvec": [9, 9]},
    "action_space": {"kind": "discrete", "n": 5},
}


def model(name: str = "CompressedAD", **values: object) -> AD:
    torch.manual_seed(0)
    small = {"tf_n_embd": 16, "tf_n_head": 2, "tf_n_layer": 2, "n_transit": 24, "model": name, **SPACES}
    made = MODEL[name](ModelConfig.model_validate({**small, **values}))
    torch.nn.init.normal_(made.head.weight)
    return made


class StaggeredEnv:
    """Random observations and rewards; slot i's episodes last 3 + i steps, and one slot's one step."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.num_envs, self.seed = n, seed

    def reset(self) -> AnyArray:
        self.random = np.random.default_rng(self.seed)
        self.age = np.zeros(self.num_envs, int)
        self.horizon = np.array([1, *(3 + i for i in range(self.num_envs - 1))])
        return self.random.integers(0, 9, (self.num_envs, 2))

    def step(self, actions: AnyArray) -> Step:
        self.age += 1
        ended = self.age >= self.horizon
        self.age[ended] = 0
        next_obs = self.random.integers(0, 9, (self.num_envs, 2))
        reset = self.random.integers(0, 9, (self.num_envs, 2))
        reward = (self.random.random(self.num_envs) < 0.3).astype(np.float32)
        obs = np.where(ended[:, None], reset, next_obs)
        return Step(next_obs, reward, ended & (actions % 2 == 0), ended & (actions % 2 == 1), obs)


class Recorded(InContextAgent):
    """Keeps the logits of every step."""

    def _parameters(self, token: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = super()._parameters(token)
        self.seen = [*getattr(self, "seen", []), logits]
        return logits


@pytest.mark.parametrize("context", ["refill", "sliding"])
@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize(
    ("marks", "name", "guidance"),
    [
        ("off", "CompressedAD", 0.0),
        ("self", "CompressedAD", 0.0),
        ("prompt", "CompressedAD", 1.5),
        ("prompt_rewarded", "CompressedAD", 0.0),
        ("prompt_rewarded", "CompressedAD", -1.0),
        ("self", "MarkedAttentionAD", 0.0),
    ],
)
def test_cached_play_equals_the_uncached_reference(
    context: str, position: str, marks: str, name: str, guidance: float
) -> None:
    """Logits within 1e-4 over contexts that fill up several times, with staggered episode ends."""
    player = model(name, position=position).eval()
    for key, value in player.named_parameters():
        if key.endswith("mark_bias"):
            torch.nn.init.normal_(value)
    logits = []
    for cache in (True, False):
        agent = Recorded(
            player,
            cache=cache,
            context=context,
            marks=marks,
            guidance=guidance,
            on_policy_threshold=0.2,
            compression_window=2,
            seed=3,
        )
        evaluate_in_context(agent, StaggeredEnv(6), eval_timesteps=80)
        logits.append(torch.stack(agent.seen))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_refill_keeps_the_newer_half_from_an_episode_start() -> None:
    agent = InContextAgent(model(), seed=0)
    evaluate_in_context(agent, StaggeredEnv(6), eval_timesteps=24)
    before = {name: value.clone() for name, value in agent.memory.items()}
    assert (agent.length == 24).all()
    agent.act(np.zeros((6, 2), int))
    for slot in range(6):
        kept = int(agent.length[slot]) - 1
        first = 24 - kept
        border = before["ended"][slot, 12:]
        assert first == 12 + int(border.long().argmax()) if border.any() else first == 12
        torch.testing.assert_close(agent.memory["state"][slot, :kept], before["state"][slot, first:])
        assert not agent.memory["has_previous"][slot, 0]


def test_context_after_a_refill_is_a_training_window() -> None:
    """What the agent remembers equals the tokens of the same transitions as a window."""
    agent = InContextAgent(model(), seed=0, context="sliding")
    evaluate_in_context(agent, StaggeredEnv(3), eval_timesteps=40)
    memory = agent.memory
    assert not memory["has_previous"][:, 0].any() and memory["has_previous"][:, 1:].all()


class RepeatAgent:
    """Always action 0."""

    def reset(self, n_env: int) -> None:
        self.observed = 0

    def act(self, obs: AnyArray) -> AnyArray:
        return np.zeros(len(obs), int)

    def observe(self, actions: AnyArray, step: Step) -> None:
        self.observed += 1


def test_returns_of_staggered_episodes_against_a_plain_loop() -> None:
    result = evaluate_in_context(RepeatAgent(), StaggeredEnv(4), eval_timesteps=50)
    env = StaggeredEnv(4)
    env.reset()
    expected: list[list[float]] = [[] for _ in range(4)]
    running = [0.0] * 4
    for _ in range(50):
        step = env.step(np.zeros(4, int))
        for i in range(4):
            running[i] += float(step.reward[i])
            if step.terminated[i] or step.truncated[i]:
                expected[i].append(running[i])
                running[i] = 0.0
    assert result.reward_episode.shape == (max(map(len, expected)), 4) == result["reward_episode"].shape
    for i, returns in enumerate(expected):
        np.testing.assert_allclose(result.reward_episode[: len(returns), i], returns)
        assert np.isnan(result.reward_episode[len(returns) :, i]).all()
    exact = evaluate_in_context(RepeatAgent(), StaggeredEnv(4), episodes=5).reward_episode
    np.testing.assert_allclose(exact, result.reward_episode[:5])


def test_random_agent_earns_the_random_return() -> None:
    family = Darkroom()
    tasks = family.tasks()[::8]
    returns = evaluate_tasks(RandomAgent(5), family, tasks, rollouts=50, episodes=20)
    assert returns.shape == (11, 50, 20)
    error = returns.reshape(11, -1).std(axis=1) / np.sqrt(1000)
    # Eleven tasks: 4 standard errors leave a false alarm below 1 in 1000.
    assert (abs(returns.mean(axis=(1, 2)) - family.random_return(tasks)) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("name", ["darkroom", "darkroom_hard", "darkroom_permuted", "key_to_door"])
def test_optimal_agent_earns_the_optimal_return_in_every_episode(name: str) -> None:
    """Also where episodes end at different times, and the key in hand cannot be seen."""
    family = TASK_FAMILY[name]()
    tasks = family.tasks()[:: max(1, len(family.tasks()) // 40)]
    returns = evaluate_tasks(OptimalAgent(family, tasks), family, tasks, rollouts=2, episodes=3)
    best = np.broadcast_to(family.optimal_return(tasks)[:, None, None], returns.shape)
    np.testing.assert_array_equal(returns, best)


def test_optimal_agent_needs_an_optimal_policy_and_the_tasks_of_its_slots() -> None:
    family = Darkroom(3)
    with pytest.raises(UsageError, match="3 slots cannot be shared equally by the 2 tasks"):
        OptimalAgent(family, family.tasks()[:2]).reset(3)
    with pytest.raises(UsageError, match="offers no optimal policy"):
        OptimalAgent(VALUE, VALUE.tasks())


def test_same_seed_same_returns_and_training_mode_is_restored() -> None:
    player = model().train()
    family = Darkroom()
    tasks = family.tasks()[30:46]

    def play(seed: int) -> AnyArray:
        return evaluate_tasks(player, family, tasks, rollouts=2, episodes=3, seed=seed)

    np.testing.assert_array_equal(play(0), play(0))
    assert not np.array_equal(play(0), play(1)) and player.training


def test_every_slot_has_a_seed_of_its_own_that_no_player_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    given, make = list[list[int]](), Darkroom.make
    monkeypatch.setattr(
        Darkroom,
        "make",
        lambda family, tasks, seeds: given.append(seeds.tolist()) or make(family, tasks, seeds),
    )
    family, sizes = Darkroom(3, 2), {"rollouts": 3, "episodes": 1}
    for player, seed in ((RandomAgent(5), 0), (RandomAgent(5, 1), 0), (RandomAgent(5), 1)):
        evaluate_tasks(player, family, family.tasks()[:2], seed=seed, **sizes)
    assert given[0] == given[1] and not set(given[0]) & set(given[2])
    assert len(set(given[0])) == len(given[0]) == 6


@pytest.mark.parametrize("cache", [True, False])
def test_a_slot_that_is_not_played_is_as_if_it_had_not_been_seen(cache: bool) -> None:
    made, draw = model("CompressedAD"), np.random.default_rng(0)
    rule = {"marks": "self", "on_policy_threshold": 0.0, "compression_window": 6}
    steady, idling = (InContextAgent(made, sample=False, cache=cache, **rule) for _ in range(2))
    never, unplayed = np.zeros(1, bool), np.zeros(1, np.float32)
    with evaluating(made):
        steady.reset(1)
        idling.reset(1)
        obs = draw.integers(0, 9, (1, 2))
        for t in range(60):
            actions = steady.act(obs)
            np.testing.assert_array_equal(actions, idling.act(obs))
            last, first = draw.integers(0, 9, (2, 1, 2))
            ended, reward = np.array([t % 4 == 3]), np.array([t % 5 == 0], np.float32)
            obs = first if ended[0] else last
            steady.observe(actions, Step(last, reward, never, ended, obs))
            idling.observe(actions, Step(last, reward, never, ended, last))
            if ended[0]:  # the next call only resets
                idling.observe(idling.act(last), Step(first, unplayed, never, never, first, played=never))
            assert steady.latest is not None and idling.latest is not None
            for name, value in steady.latest.items():
                assert torch.equal(value, idling.latest[name]), (t, name)


def test_a_model_with_nan_weights_does_not_play() -> None:
    player, family = model(), Darkroom()
    with torch.no_grad():
        player.head.weight[0, 0] = np.nan
    with pytest.raises(NumericalError, match=r"^CompressedAD: the weight head.weight holds NaN or infinity"):
        evaluate_tasks(player, family, family.tasks()[:1], rollouts=1, episodes=1)


def test_a_loss_that_is_not_finite_is_no_imitation() -> None:
    player = model()
    windows = WindowSampler(from_histories({0: history(4, 40)}), 24, 2, seed=0)
    assert 0 < evaluate_imitation(player, windows, 2).cross_entropy < 100
    with torch.no_grad():
        player.head.weight.fill_(3e38)
    with pytest.raises(NumericalError, match="of CompressedAD on recorded histories is not finite"):
        evaluate_imitation(player, windows, 2)


def test_greedy_and_temperature() -> None:
    player = model()
    with pytest.raises(UsageError, match="temperature"):
        InContextAgent(player, temperature=0)
    with pytest.raises(UsageError, match="either eval_timesteps or episodes"):
        evaluate_in_context(player, StaggeredEnv(2))
    cold = Recorded(player, temperature=1e-3, seed=0)
    greedy = Recorded(player, sample=False, seed=9)
    a = evaluate_in_context(cold, StaggeredEnv(3), eval_timesteps=30).reward_episode
    b = evaluate_in_context(greedy, StaggeredEnv(3), eval_timesteps=30).reward_episode
    np.testing.assert_array_equal(a, b)


def test_self_marks_are_the_causal_threshold_marks_of_the_own_probabilities() -> None:
    from compressed_ad.marking import markers

    agent = InContextAgent(
        model(n_transit=100), marks="self", on_policy_threshold=0.3, compression_window=3, seed=1
    )
    probabilities = []
    env = StaggeredEnv(4)
    agent.reset(4)
    obs = env.reset()
    for _ in range(60):
        actions = agent.act(obs)
        probabilities.append(agent.probability)
        step = env.step(actions)
        agent.observe(actions, step)
        obs = step.obs
    agent.act(obs)
    mask = markers.threshold(
        np.stack(probabilities, axis=1), on_policy_threshold=0.3, compression_window=3, causal=True
    )
    start, end = markers.borders(mask)
    np.testing.assert_array_equal(agent.memory["start_mark"][:, 1:61].numpy(), start)
    np.testing.assert_array_equal(agent.memory["end_mark"][:, 1:61].numpy(), end)
    assert start.any() and end.any()


@pytest.mark.parametrize("marks", ["self", "prompt", "prompt_rewarded"])
def test_marked_contexts_are_windows_as_training_shows_them(marks: str) -> None:
    """Borders in a context, refilled several times, are those of its mask; nothing is known of before it."""
    agent = InContextAgent(model(), marks=marks, on_policy_threshold=0.3, compression_window=2, seed=1)
    env = StaggeredEnv(5)
    agent.reset(5)
    obs = env.reset()
    for _ in range(90):
        actions = agent.act(obs)
        for slot in range(5):
            seen = slice(1, int(agent.length[slot]))
            mask = agent.memory["marked"][slot, seen].numpy()
            before = np.concatenate([[False], mask[:-1]])
            np.testing.assert_array_equal(agent.memory["start_mark"][slot, seen], mask & ~before)
            np.testing.assert_array_equal(agent.memory["end_mark"][slot, seen], before & ~mask)
            rewarded = agent.memory["reward"][slot, seen].numpy() > 0
            if marks == "prompt":
                assert mask.all()
            elif marks == "prompt_rewarded":
                assert (mask >= (np.cumsum(rewarded) > 0)).all()
        assert not agent.memory["marked"][:, 0].any() and not agent.memory["start_mark"][:, 0].any()
        step = env.step(actions)
        agent.observe(actions, step)
        obs = step.obs


def test_guidance_of_minus_one_plays_as_if_nothing_were_marked() -> None:
    """cond - (cond - unmarked) = unmarked."""
    player = model().eval()
    with torch.no_grad():
        player.embed_compress_start.normal_()
    returns = [
        evaluate_in_context(player, StaggeredEnv(4), eval_timesteps=60, seed=2, **options).reward_episode
        for options in ({"marks": "off"}, {"marks": "prompt", "guidance": -1.0}, {"marks": "prompt"})
    ]
    np.testing.assert_array_equal(returns[0], returns[1])
    logits = []
    for options in ({"marks": "off"}, {"marks": "prompt"}):
        agent = Recorded(player, seed=2, **options)
        evaluate_in_context(agent, StaggeredEnv(4), eval_timesteps=10)
        logits.append(agent.seen[5])
    assert not torch.allclose(*logits)


class Paid(Scripted):
    """Pays its actions, so that returns tell whether the same ones were chosen."""

    def step(self, action):
        obs, _, *others = super().step(action)
        return obs, float(action + 0.1 * self.time), *others


class PaidScript(Script):
    def make(self):
        return Paid(self)


ENDS = [(((0.0,) * n, "truncated"), ((0.0, 0.0), "terminated")) for n in (3, 5, 1)]
PAID = [PaidScript(episodes, None, (2,)) for episodes in ENDS]


@pytest.mark.parametrize("n_transit", [1, 2, 7])
@pytest.mark.parametrize("marks", ["off", "self", "prompt_rewarded"])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("context", ["refill", "sliding"])
def test_a_slot_that_is_only_reset_is_as_if_nothing_had_happened(context, cache, marks, n_transit) -> None:
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    scales = {"observation_mean": (300.0, 300.0), "observation_std": (50.0, 20.0)}
    spaces = {"observation_space": to_spec(space), "action_space": {"kind": "discrete", "n": 3}}
    made = model(n_transit=n_transit, **spaces, **scales)
    options = {"episodes": 6, "sample": False, "context": context, "cache": cache, "marks": marks}
    options |= {"on_policy_threshold": 0.4, "compression_window": 2, "guidance": 0.5 * (marks == "self")}
    together = evaluate_in_context(made, Native(PAID), **options).reward_episode
    alone = [
        evaluate_in_context(made, SyncVectorEnv([script.make]), **options).reward_episode for script in PAID
    ]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-6)
    assert len(np.unique(together)) > 4


@pytest.mark.parametrize("context", ["refill", "sliding"])
def test_a_context_of_one_is_a_policy_of_the_observation(context) -> None:
    """In training, validation and evaluation: what a window of one step shows."""
    family, made = Darkroom(9, 6), model(n_transit=1)
    options = {"rollouts": 2, "episodes": 3, "context": context, "marks": "self"}
    played = [evaluate_tasks(made, family, family.tasks()[:3], cache=c, **options) for c in (False, True)]
    np.testing.assert_array_equal(*played)
    agent = Recorded(made, context=context)
    agent.reset(2)
    env = family.make(family.tasks()[:2], np.arange(2))
    obs = env.reset()
    for _ in range(5):
        tokens = shift(
            *(torch.as_tensor(obs)[:, None], torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1)),
            *(torch.as_tensor(obs)[:, None], *torch.zeros(2, 2, 1, dtype=torch.bool)),
        )
        actions = agent.act(obs)
        with torch.no_grad():
            torch.testing.assert_close(agent.seen[-1], made(tokens)[:, 0])
        agent.observe(actions, step := env.step(actions))
        obs = step.obs


def boxed(low: float, high: float, dtype: type = np.float32) -> dict[str, object]:
    return to_spec(gymnasium.spaces.Box(low, high, (2,), dtype))


class Silent:
    """A batched environment that does not tell its spaces."""

    num_envs = 2

    def __init__(self, obs: AnyArray) -> None:
        self.obs = obs

    def reset(self) -> AnyArray:
        return self.obs

    def step(self, actions: AnyArray) -> Step:
        ended = np.ones(2, bool)
        return Step(self.obs, np.ones(2, np.float32), ended, ~ended, self.obs)


@pytest.mark.parametrize(
    ("spaces", "family"),
    [
        ({}, Darkroom(5, 5)),
        ({"action_space": {"kind": "discrete", "n": 6}}, Darkroom(9, 5)),
        ({"action_space": {"kind": "discrete", "n": 5, "start": 5}}, Darkroom(9, 5)),
        ({"observation_space": boxed(-1, 1), "action_space": boxed(-0.1, 0.1)}, PointMass()),
        ({"observation_space": boxed(-2, 2), "action_space": boxed(-1, 1)}, PointMass()),
    ],
)
def test_a_model_plays_in_its_own_spaces_only(spaces, family) -> None:
    made, tasks = model(**spaces), family.tasks()[:2]
    vector = SyncVectorEnv([lambda task=task: TaskEnv(family, task) for task in tasks])
    for play in (
        lambda: evaluate_tasks(made, family, tasks, rollouts=1, episodes=1),
        lambda: record_rollouts(made, family, tasks, rollouts=1, episodes=1),
        lambda: evaluate_in_context(made, vector, eval_timesteps=3),
        lambda: made.evaluate_in_context(vector, episodes=1),
    ):
        with pytest.raises(SpaceError, match=r"space than the model: expected \{.*\}, got \{.*\}"):
            play()


def test_an_environment_without_spaces_is_held_against_what_it_shows() -> None:
    made = model()
    assert evaluate_in_context(made, Silent(np.zeros((2, 2), int)), episodes=2).steps == 2
    for obs in (np.full((2, 2), 9), np.full((2, 2), 0.5), np.zeros((2, 3), int), np.zeros(2, int)):
        with pytest.raises(SpaceError, match=r"Silent, slots? 0.*step 0: reset\(\)"):
            evaluate_in_context(made, Silent(obs), episodes=2)
    boxes = model(observation_space=boxed(-1, 1), action_space=boxed(-1, 1))
    with pytest.raises(SpaceError, match=r"slot 0, step 0: reset\(\): .* outside"):
        evaluate_in_context(boxes, Silent(np.full((2, 2), 1.5, np.float32)), episodes=2)


def test_episodes_without_end_are_told() -> None:
    script = Script((((1.0, 1.0), "terminated"), ((1.0,) * 99, "terminated")), None, ())
    short = Script((((1.0, 1.0), "terminated"),), None, ())
    env = SyncVectorEnv([short.make, script.make])
    with pytest.raises(RunError, match=r"slot 1: .* after 20 steps; 1 of 3 are complete; .* raise max_steps"):
        evaluate_in_context(RandomAgent(3), env, episodes=3, max_steps=20)
    assert evaluate_in_context(RandomAgent(3), env, episodes=3).reward_episode[1, 1] == 99
    slow = Script((((1.0,) * 19, "terminated"),), None, ())
    many = Script((*((((1.0,), "terminated"),) * 3), ((1.0,) * 99, "terminated")), None, ())
    played = evaluate_in_context(
        RandomAgent(3), SyncVectorEnv([slow.make, many.make]), episodes=3, max_steps=20
    )
    assert played.reward_episode.tolist() == [[19, 1]] * 3  # the second slot had all that were asked for
    assert evaluate_in_context(RandomAgent(3), env, eval_timesteps=50, max_steps=20).steps == 50
