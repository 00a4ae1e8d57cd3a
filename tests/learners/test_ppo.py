from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from compressed_ad.errors import ConfigError, NumericalError, SpaceError
from compressed_ad.learners.ppo import BatchedPPO, PPOConfig, kernels, training, vector_code
from compressed_ad.seeding import rng
from compressed_ad.tasks.gridworld import Darkroom, DarkroomLarge
from tests import probes

SPACES = [
    (spaces.MultiDiscrete([9, 9]), (64, 64)),  # numbered: repeated observations are grouped
    (spaces.MultiDiscrete([300, 300]), (64, 64)),  # one-hot, but too many to number
    (spaces.Box(-1, 1, (3,)), (64, 64)),  # dense
    (spaces.Box(-1, 1, (2, 2)), (48, 80, 32)),  # widths that are padded
    (spaces.Discrete(7, start=2), (32,)),
    (spaces.Discrete(70_000), (16,)),
]


def learn(family, learner, *, tasks=(0,), n_timesteps=40, n_learner=1, n_stream=4, seed=0):
    ids = np.array(tasks)
    return learner.learn(
        family, ids, family.tasks()[ids],
        n_timesteps=n_timesteps, n_learner=n_learner, n_stream=n_stream, seed=seed,
    )  # fmt: skip


@pytest.fixture
def learners(monkeypatch):
    """The ``Learners`` that a call of ``learn`` made, for a look at networks after training."""
    made = []

    class Kept(training.Learners):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Learners", Kept)
    return made


def outputs(learners, space, obs):
    """(log-probabilities, entropy, value) of the first learner, computed in float64 from its parameters."""
    encoder = training.Encoder(space)
    features, rows = encoder.encode(np.asarray(obs, space.dtype))
    x = np.zeros((len(rows), encoder.n_input))
    if features.ones.shape[1]:
        np.put_along_axis(x, features.ones[rows], 1.0, axis=1)
    else:
        x[:] = features.dense
    p = training.views(learners.net, learners.params[0].astype(np.float64), (64, 64))
    hidden = {}
    for kind in ("policy", "value"):
        h = x
        for i in (0, 2):
            name = f"mlp_extractor.{kind}_net.{i}"
            h = np.tanh(h @ p[f"{name}.weight"] + p[f"{name}.bias"])
        hidden[kind] = h
    logits = hidden["policy"] @ p["action_net.weight"] + p["action_net.bias"]
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    value = (hidden["value"] @ p["value_net.weight"] + p["value_net.bias"])[:, 0]
    return log_probs, -(np.exp(log_probs) * log_probs).sum(1), value


# ---------------------------------------------------------------- together and alone


@pytest.mark.parametrize("n_learner, n_stream", [(1, 10), (3, 1), (2, 7)])
@pytest.mark.parametrize(
    "family, config",
    [
        (Darkroom(), {"n_steps": 20, "batch_size": 32}),
        (Darkroom(), {"n_steps": 7, "batch_size": 16, "count_bonus": 0.1}),
        (probes.OBSERVATION_ACTION, {"n_steps": 12, "batch_size": 8}),
    ],
)
def test_tasks_learned_together_equal_each_alone_bit_for_bit(family, config, n_learner, n_stream):
    learner = BatchedPPO(n_epochs=3, **config)
    kwargs = {"n_learner": n_learner, "n_stream": n_stream, "seed": 5}
    together = learn(family, learner, tasks=(0, 3, 2), **kwargs)
    for task, history in zip((0, 3, 2), together, strict=True):
        (alone,) = learn(family, learner, tasks=(task,), **kwargs)
        for (name, a), (_, b) in zip(history.per_step(), alone.per_step(), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name, strict=True)
    assert not np.array_equal(together[0].actions, together[1].actions)


def test_more_learners_leave_the_first_as_it_was():
    learner = BatchedPPO(n_steps=20, batch_size=16, n_epochs=2)
    (one,), (two,) = (learn(Darkroom(), learner, n_learner=n) for n in (1, 2))
    np.testing.assert_array_equal(two.learner, [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(one.action_probs, two.action_probs[:4])
    assert not np.array_equal(two.actions[:4], two.actions[4:])


# ---------------------------------------------------------------- the update against PyTorch


def _case(space, arch, cfg, seed=0):
    """Learners, a rollout of random numbers, and SB3 policies with the same parameters."""
    generator = np.random.default_rng(seed)
    encoder = training.Encoder(space)
    learners = training.Learners(cfg, encoder, 5, [(3, 0), (4, 1)], seed)
    n_step, n_stream = 20, 7
    space.seed(seed)
    obs = np.stack([space.sample() for _ in range(n_step * 2 * n_stream)])
    obs = obs.reshape(n_step, 2 * n_stream, *space.shape)
    rollout = training.Rollout(n_step, (2, n_stream), obs[0])
    rollout.states[:] = obs
    rollout.actions[:] = generator.integers(0, 5, rollout.actions.shape)
    rollout.log_prob[:] = np.log(
        generator.uniform(0.1, 0.4, rollout.actions.shape)
    )  # some ratios are clipped
    advantage, target = generator.standard_normal((2, *rollout.actions.shape)).astype(np.float32)
    policies = []
    for params in learners.params:
        policy = ActorCriticPolicy(space, spaces.Discrete(5), lambda _: 3e-4, net_arch=list(arch))
        state = training.views(learners.net, params, arch)
        policy.load_state_dict({k: torch.tensor(np.ascontiguousarray(v.T)) for k, v in state.items()})
        policies.append(policy)
    return encoder, learners, rollout, advantage, target, policies


def _loss(policy, cfg, obs, actions, old_log_prob, advantage, target):
    """SB3's PPO loss, written down from its definition."""
    if cfg.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    value, log_prob, entropy = policy.evaluate_actions(obs, actions)
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = torch.clamp(ratio, 1 - cfg.clip_range, 1 + cfg.clip_range)
    surrogate = torch.min(advantage * ratio, advantage * clipped).mean()
    return -surrogate - cfg.ent_coef * entropy.mean() + cfg.vf_coef * ((value[:, 0] - target) ** 2).mean()


def _samples(space, rollout, advantage, target, learner):
    n = advantage[:, 0].size
    obs = rollout.states.reshape(len(advantage), *advantage.shape[1:], *space.shape)[:, learner]
    arrays = [obs.reshape(n, *space.shape)]
    arrays += [a[:, learner].reshape(n) for a in (rollout.actions, rollout.log_prob, advantage, target)]
    # SB3 maps a Discrete space with an offset to 0, 1, ... only by its start-free one-hot.
    if isinstance(space, spaces.Discrete):
        arrays[0] = arrays[0] - space.start
    return [torch.tensor(a) for a in arrays]


@pytest.mark.parametrize("space, arch", SPACES)
@pytest.mark.parametrize("ent_coef, normalize", [(0.0, True), (0.02, False)])
def test_the_gradient_equals_autograd(space, arch, ent_coef, normalize):
    cfg = PPOConfig(
        batch_size=140,
        n_epochs=1,
        ent_coef=ent_coef,
        net_arch=arch,
        normalize_advantage=normalize,
        n_steps=20,
    )
    encoder, learners, rollout, advantage, target, policies = _case(space, arch, cfg)
    policy = policies[1]  # the gradient handed back is the last learner's
    _loss(policy, cfg, *_samples(space, rollout, advantage, target, 1)).backward()
    gradient = learners.update(encoder, rollout, advantage, target)
    ours = training.views(learners.net, gradient, arch)
    scale = max(float(p.grad.abs().max()) for p in policy.parameters())
    for name, p in policy.named_parameters():
        np.testing.assert_allclose(ours[name].T, p.grad, atol=2e-6 * scale, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("space, arch", SPACES)
def test_a_whole_update_equals_pytorch(space, arch):
    cfg = PPOConfig(batch_size=33, n_epochs=3, ent_coef=0.01, net_arch=arch, learning_rate=3e-3, n_steps=20)
    encoder, learners, rollout, advantage, target, policies = _case(space, arch, cfg)
    for i, policy in enumerate(policies):
        samples = _samples(space, rollout, advantage, target, i)
        optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.learning_rate, eps=1e-5)
        order, state = np.arange(len(samples[0])), learners.random[i]
        for _ in range(cfg.n_epochs):
            state = np.uint64(kernels._shuffle(state, order))
            for batch in np.split(order, range(cfg.batch_size, len(order), cfg.batch_size)):
                optimizer.zero_grad()
                _loss(policy, cfg, *(x[batch] for x in samples)).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                optimizer.step()
    before = learners.params.copy()
    learners.update(encoder, rollout, advantage, target)
    # 15 gradient steps of 3e-3 move parameters by up to 4e-2; the two may differ by rounding only.
    assert np.abs(learners.params - before).max() > 1e-2
    for params, policy in zip(learners.params, policies, strict=True):
        ours = training.views(learners.net, params, arch)
        for name, p in policy.named_parameters():
            np.testing.assert_allclose(ours[name].T, p.detach(), atol=2e-5, err_msg=name)


def test_padding_stays_zero():
    cfg = PPOConfig(batch_size=16, n_epochs=2, net_arch=(48, 80, 32), n_steps=20)
    space = spaces.Box(-1, 1, (2, 2))
    encoder, learners, rollout, advantage, target, _ = _case(space, (48, 80, 32), cfg)
    learners.update(encoder, rollout, advantage, target)
    for params in learners.params:
        real = training.views(learners.net, params, (48, 80, 32))
        assert np.count_nonzero(params) == sum(np.count_nonzero(a) for a in real.values())


def test_initial_weights_are_orthogonal_with_the_gains_of_sb3():
    cfg = PPOConfig()
    learners = training.Learners(cfg, training.Encoder(spaces.MultiDiscrete([9, 9])), 5, [(0, 0)], 0)
    for name, w in training.views(learners.net, learners.params[0], (64, 64)).items():
        if name.endswith("bias"):
            assert not w.any()
            continue
        gain = {"action_net.weight": 0.01, "value_net.weight": 1.0}.get(name, np.sqrt(2))
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5)


def test_tanh_error():
    x = np.concatenate([np.linspace(-12, 12, 400_001), [-1e30, 1e30, 0.0]]).astype(np.float32)
    y = x.copy()
    vector_code.tanh_inplace(y, len(y))
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 5e-7
    assert np.abs(y).max() <= 1


# ---------------------------------------------------------------- advantages


def test_gae_against_hand_arithmetic():
    reward = np.array([[1.0], [0.0], [2.0]], np.float32)
    value = np.array([[0.5], [1.0], [-1.0]], np.float32)
    last = np.array([4.0], np.float32)
    # gamma .5, lambda .5: delta = (1 + .5 - .5, 0 - .5 - 1, 2 + 2 + 1) = (1, -1.5, 5)
    advantage, target = training.generalized_advantage(reward, value, np.zeros((3, 1), bool), last, 0.5, 0.5)
    np.testing.assert_allclose(advantage[:, 0], [1 - 0.25 * 0.25, -1.5 + 0.25 * 5, 5])
    np.testing.assert_allclose(target, advantage + value)
    # The episode ends with the second step: delta = (1, 0 - 1, 5), and nothing flows across.
    done = np.array([[False], [True], [False]])
    advantage, _ = training.generalized_advantage(reward, value, done, last, 0.5, 0.5)
    np.testing.assert_allclose(advantage[:, 0], [1 - 0.25, -1, 5])


# ---------------------------------------------------------------- probes

QUICK = {"n_steps": 16, "batch_size": 32, "n_epochs": 10, "learning_rate": 3e-3, "gamma": 0.9}


@pytest.mark.parametrize(
    "probe, obs, value",
    [
        (probes.VALUE, [[1.0]], [1.0]),
        (probes.OBSERVATION_VALUE, [[-1.0], [1.0]], [-1.0, 1.0]),
        (probes.DISCOUNT, [[0.0], [1.0]], [0.9, 1.0]),
        (probes.TIME_LIMIT, [[1.0]], [10.0]),  # cut off, not ended: sum of 0.9 ** t
    ],
)
def test_probes_of_the_value(learners, probe, obs, value):
    n_timesteps = (
        3200 if probe is probes.TIME_LIMIT else 800
    )  # a bootstrapped value climbs to 10 step by step
    learn(probe, BatchedPPO(**QUICK), n_timesteps=n_timesteps, n_stream=8)
    _, _, learned = outputs(learners[0], probe.observation_space, obs)
    np.testing.assert_allclose(learned, value, rtol=0.05)


@pytest.mark.parametrize("probe", [probes.ACTION, probes.OBSERVATION_ACTION, probes.DISCRETE])
def test_probes_of_the_policy(probe):
    (history,) = learn(probe, BatchedPPO(**QUICK), n_timesteps=1600, n_stream=8)
    assert abs(history.rewards[:, :16].mean()) < 0.5
    assert history.rewards[:, -160:].mean() > 0.95
    assert history.action_probs[:, -160:].mean() > 0.95


# ---------------------------------------------------------------- what is recorded


def test_the_record_describes_the_policy_that_acted(learners):
    family, task = Darkroom(), 40
    learner = BatchedPPO(n_steps=16, batch_size=16, n_epochs=4, learning_rate=3e-3)
    (history,) = learn(family, learner, tasks=(task,), n_timesteps=40)
    np.testing.assert_array_equal(history.update[0], np.repeat([0, 1, 2], [16, 16, 8]))
    np.testing.assert_array_equal(np.isnan(history.log_prob_next), history.update == 2)

    def check(part, networks, log_prob, entropy):
        obs = history.states[:, part].reshape(-1, 2)
        log_probs, expected_entropy, _ = outputs(networks, family.observation_space, obs)
        chosen = np.take_along_axis(log_probs, history.actions[:, part].reshape(-1, 1), 1)
        np.testing.assert_allclose(log_prob[:, part].ravel(), chosen[:, 0], atol=1e-5)
        if entropy is not None:
            np.testing.assert_allclose(entropy[:, part].ravel(), expected_entropy, atol=1e-5)

    fresh = training.Learners(learner.config, training.Encoder(family.observation_space), 5, [(task, 0)], 0)
    log_prob = np.log(history.action_probs)
    check(slice(0, 16), fresh, log_prob, history.entropy)
    check(slice(16, 32), learners[0], history.log_prob_next, None)  # two updates are all there were
    check(slice(32, 40), learners[0], log_prob, history.entropy)
    assert np.abs(history.log_prob_next[:, :32] - log_prob[:, :32]).max() > 0.01


def test_the_record_obeys_the_environment():
    family = Darkroom(horizon=6)
    (history,) = learn(family, BatchedPPO(n_steps=8, batch_size=8), tasks=(40,), n_timesteps=20)
    moves = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])
    np.testing.assert_array_equal(history.next_states, np.clip(history.states + moves[history.actions], 0, 8))
    np.testing.assert_array_equal(history.rewards, (history.next_states == (4, 4)).all(-1))
    np.testing.assert_array_equal(history.truncated, np.broadcast_to(np.arange(20) % 6 == 5, (4, 20)))
    assert not history.terminated.any()
    goes_on = ~history.episode_end[:, :-1]
    np.testing.assert_array_equal(history.states[:, 1:][goes_on], history.next_states[:, :-1][goes_on])
    assert (history.states[:, 1:][~goes_on] == (4, 4)).all()


def test_sampled_actions_follow_the_probabilities():
    probs = np.array([0.05, 0.5, 0.0, 0.45], np.float32)
    n = 40_000
    action = np.empty((1, n), np.int64)
    kernels.sample(np.array([7], np.uint64), probs[None, None], np.zeros((1, n), np.int64), action)
    # Five standard errors of a frequency out of 40 000 are at most .0125.
    np.testing.assert_allclose(np.bincount(action[0], minlength=4) / n, probs, atol=0.0125)
    assert not (action == 2).any()


def test_shuffles_are_uniform_permutations():
    state, counts = np.uint64(3), np.zeros((5, 5))
    for _ in range(20_000):
        order = np.arange(5)
        state = np.uint64(kernels._shuffle(state, order))
        assert sorted(order) == [0, 1, 2, 3, 4]
        counts[np.arange(5), order] += 1
    np.testing.assert_allclose(counts / 20_000, 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 20_000))


# ---------------------------------------------------------------- exploration bonus


def test_the_count_bonus_explores_with_direction_and_leaves_rewards_alone():
    # The goal in the far corner of 15x15 cells is not met by a random walk of 50 steps; without reward PPO
    # has nothing to learn, so the cells that a learner ever visits stay those of a random walk. Learners are
    # independent samples, and 4 standard errors of the difference of two means are no chance (p < 1e-4).
    family = DarkroomLarge()
    config = {"n_steps": 50, "batch_size": 50, "n_epochs": 10, "learning_rate": 1e-3}
    visited = {}
    for bonus in (0.0, 1.0):
        (history,) = learn(
            family,
            BatchedPPO(**config, count_bonus=bonus),
            tasks=(224,),
            n_timesteps=2000,
            n_learner=30,
            n_stream=1,
        )
        goal = (history.next_states == (14, 14)).all(-1)
        np.testing.assert_array_equal(history.rewards, goal)
        cells = history.next_states @ [15, 1]
        visited[bonus] = np.array([len(np.unique(c)) for c in cells])
    difference = visited[1.0].mean() - visited[0.0].mean()
    error = np.sqrt((visited[1.0].var(ddof=1) + visited[0.0].var(ddof=1)) / 30)
    assert difference > 4 * error, (visited, difference, error)


# ---------------------------------------------------------------- errors

SHORT = BatchedPPO(n_steps=8, batch_size=8)


def test_every_wrong_key_is_reported_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        BatchedPPO(n_step=20, learning_rate="fast", clip_range=-1.0, gamma=float("nan"))
    text = str(caught.value)
    assert "'n_step' (did you mean 'n_steps'?)" in text
    assert len(caught.value.problems) == 4
    for key in ("learning_rate", "clip_range", "gamma"):
        assert key in text


def test_spaces_that_do_not_fit():
    with pytest.raises(SpaceError, match="Discrete actions"):
        learn(replace(probes.ACTION, action_space=spaces.Box(-1, 1, (2,))), SHORT)
    with pytest.raises(SpaceError, match="count_bonus needs a discrete"):
        learn(probes.ACTION, BatchedPPO(count_bonus=0.1, n_steps=8))
    with pytest.raises(SpaceError, match="observation space of action: Tuple"):
        learn(replace(probes.ACTION, observation_space=spaces.Tuple([])), SHORT)
    with pytest.raises(SpaceError, match=r"task 0, step 0: .* outside Discrete"):
        learn(replace(probes.DISCRETE, draw=lambda g, t: 3), SHORT)
    with pytest.raises(SpaceError, match="-1 lies outside Discrete"):
        unnumbered = spaces.Discrete(70_000)
        learn(replace(probes.DISCRETE, observation_space=unnumbered, draw=lambda g, t: -1), SHORT)


def test_what_is_not_finite_stops_the_run():
    with pytest.raises(NumericalError, match=r"task 0, step 1: .*reward is not finite"):
        learn(replace(probes.ACTION, pay=lambda o, a, t: np.nan), BatchedPPO(n_steps=4, batch_size=8))
    with pytest.raises(NumericalError, match=r"reset\(\) is not finite"):
        learn(replace(probes.ACTION, draw=lambda g, t: [np.inf]), SHORT)
    with pytest.raises(NumericalError, match="discount, task 0: returns from step 0 are not finite"):
        huge = replace(probes.DISCOUNT, pay=lambda o, a, t: 3e38)
        learn(huge, BatchedPPO(n_steps=4, batch_size=8), n_timesteps=16)


def test_a_run_too_short_for_an_update_is_refused():
    with pytest.raises(ConfigError, match="n_steps 2048 exceeds the 40 steps"):
        learn(Darkroom(), BatchedPPO(), n_timesteps=40)


def test_actions_of_a_space_that_does_not_start_at_zero():
    seen = []
    probe = replace(
        probes.ACTION, action_space=spaces.Discrete(2, start=3), pay=lambda o, a, t: seen.append(a) or 0.0
    )
    (history,) = learn(probe, BatchedPPO(n_steps=8, batch_size=8), n_timesteps=16)
    assert set(seen) == {3, 4}
    np.testing.assert_array_equal(history.actions.T.ravel(), seen)


def test_progress_counts_every_environment_step():
    done = []
    BatchedPPO(n_steps=8, batch_size=8).learn(
        Darkroom(), np.arange(2), Darkroom().tasks()[:2],
        n_timesteps=20, n_learner=2, n_stream=3, seed=0, progress=done.append,
    )  # fmt: skip
    assert sum(done) == 20 * 2 * 2 * 3


def test_initial_weights_depend_on_seed_task_and_learner():
    cfg, encoder = PPOConfig(), training.Encoder(spaces.Discrete(4))
    who = [(0, 0), (0, 1), (1, 0)]
    params = [training.Learners(cfg, encoder, 2, who, seed).params for seed in (0, 1)]
    assert len({p.tobytes() for p in np.concatenate(params)}) == 6
    assert rng(0, "ppo", 0, 0).bytes(8) != rng(0, "ppo-env", 0, 0).bytes(8)
