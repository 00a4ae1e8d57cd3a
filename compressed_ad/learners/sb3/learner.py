"""Stable-Baselines3 as a source of learning histories: ``sb3:PPO``, ``sb3:SAC`` and so on.

Importing this module needs Stable-Baselines3; without it ``MissingExtraError`` says what to install.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import ConfigError, MissingExtraError, SpaceError, UsageError, nearest
from compressed_ad.learners.base import Progress, histories_of_tasks
from compressed_ad.learners.sb3.algorithms import ALGORITHM, find_algorithm
from compressed_ad.learners.sb3.callback import CompressedHistoryCallback
from compressed_ad.registry import Parameters
from compressed_ad.seeding import rng, seed64
from compressed_ad.tasks.base import BatchedEnv, TaskFamily, family_specs
from compressed_ad.tasks.checked_env import checked_slots
from compressed_ad.types import AnyArray, History, IntArray

try:
    import torch
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList
    from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MissingExtraError("compressed_ad.learners.sb3.learner", "sb3") from error

_NOISE = {"normal": NormalActionNoise, "ornstein_uhlenbeck": OrnsteinUhlenbeckActionNoise}


class SB3Learner:
    """``SourceLearner`` that runs an algorithm of SB3 or sb3-contrib (``"PPO"``, ``"SAC"``, ``"TQC"``, ...).

    Keyword arguments are those of the algorithm's class except ``env``, ``seed`` and ``device``, which this
    learner sets itself (CPU, one thread). By default the observation space decides ``policy``. ``net_arch``
    is short for ``policy_kwargs={"net_arch": ...}``. ``action_noise`` may be a number, the standard deviation
    of Gaussian noise in the actor's units [-1, 1], or a mapping such as ``{"kind": "ornstein_uhlenbeck",
    "sigma": 0.2}``. Replay buffers are no larger than the run can fill. ``ConfigError`` names every wrong
    argument.
    """

    def __init__(self, algorithm: str, **config: Any) -> None:
        library = find_algorithm(algorithm).library
        try:
            self._class = getattr(importlib.import_module(library), algorithm)
        except ImportError as error:
            raise MissingExtraError(f"sb3:{algorithm}", "sb3") from error
        self.name, self._on_policy = algorithm, issubclass(self._class, OnPolicyAlgorithm)
        ours = {"self", "env", "seed", "device", "_init_setup_model"}
        parameters = inspect.signature(self._class.__init__).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items() if key not in ours}
        known = [*defaults, "net_arch"]
        problems = [f"unknown key {key!r}{nearest(key, known)}" for key in config if key not in known]
        self.config = {key: value for key, value in config.items() if key != "net_arch"}
        if "net_arch" in config:
            arch = config["net_arch"]
            arch = dict(arch) if isinstance(arch, Mapping) else list(arch)
            self.config["policy_kwargs"] = {**config.get("policy_kwargs", {}), "net_arch": arch}
        self._settings = {**defaults, **self.config}
        policies = list(self._class.policy_aliases)
        policy = config.get("policy", policies[0])
        if isinstance(policy, str) and policy not in policies:
            hint = nearest(policy, policies)
            problems.append(f"unknown policy {policy!r}{hint}; it has {', '.join(policies)}")
        problems += _noise_problems(config.get("action_noise"))
        problems += [
            f"{key}: {module.__name__} has no {name!r}{nearest(name, vars(module))}"
            for key, name, module in self._named_classes()
            if not hasattr(module, name)
        ]
        if problems:
            raise ConfigError([f"sb3:{algorithm}: {problem}" for problem in problems])

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        space = family.action_space
        kind, able = type(space).__name__, ALGORITHM[self.name].actions
        if kind not in able:
            others = [f"sb3:{name}" for name, entry in ALGORITHM.items() if kind in entry.actions]
            raise SpaceError(
                f"{family.name}: sb3:{self.name} learns {' or '.join(able)} actions, not {kind}"
                + (f"; {', '.join(others)} do" if others else "")
            )
        for what, values in (("observations", family.observation_space), ("actions", space)):
            if np.any(getattr(values, "start", 0)):
                raise SpaceError(f"{family.name}: SB3 needs Discrete {what} that start at 0, not {values}")
        if isinstance(space, spaces.Box) and space.dtype.kind != "f":
            raise SpaceError(f"{family.name}: SB3 gives Box actions as floats, which {space} does not hold")
        if isinstance(space, spaces.Box) and not space.is_bounded():
            raise SpaceError(f"{family.name}: SB3 needs Box actions with finite bounds")
        family_specs(family)
        if self.name == "MaskablePPO":
            tasks = family.tasks()[:1]
            if not hasattr(family.make(tasks, np.zeros(len(tasks), np.int64)), "action_masks"):
                raise UsageError(
                    f"{family.name}: sb3:MaskablePPO needs environments with a method action_masks() -> "
                    "(N, number of actions); without masks it is sb3:PPO"
                )
        if self._on_policy and n_timesteps < (n_steps := self._settings["n_steps"]):
            raise ConfigError(
                f"sb3:{self.name}: n_steps {n_steps} exceeds the {n_timesteps} steps of a stream; "
                "nothing would be learned"
            )
        if not self._on_policy and n_timesteps * n_stream <= (warm_up := self._settings["learning_starts"]):
            raise ConfigError(
                f"sb3:{self.name}: learning_starts {warm_up} exceeds the {n_timesteps * n_stream} steps of "
                "all streams of a learner; nothing would be learned"
            )
        frequency = self._settings.get("train_freq")
        if n_stream > 1 and isinstance(frequency, list | tuple) and frequency[-1] == "episode":
            needs = "train_freq in episodes needs n_stream 1; n_learner may be larger instead"
            raise ConfigError(f"sb3:{self.name}: {needs}")

    def learn(
        self, family: TaskFamily, task_ids: IntArray, tasks: AnyArray, *, n_timesteps: int, n_learner: int,
        n_stream: int, seed: int, progress: Progress = lambda steps: None,
    ) -> list[History]:  # fmt: skip
        """As ``SourceLearner.learn``. Seeds the global generators of NumPy and PyTorch, as SB3 does."""
        self.check(family, n_timesteps=n_timesteps, n_stream=n_stream)
        n_thread = torch.get_num_threads()
        torch.set_num_threads(1)

        def learn_one(task_id: int, task: AnyArray, learner: int) -> History:
            env_seeds = rng(seed, "sb3-env", task_id, learner).integers(2**63 - 1, size=n_stream)
            slots = checked_slots(
                family, np.repeat(task[None], n_stream, axis=0), env_seeds, [task_id] * n_stream
            )
            env = _SlotsVecEnv(slots, family.observation_space, family.action_space)
            model = self._model(env, n_timesteps, seed64(seed, "sb3", task_id, learner) % 2**31)
            callback = CompressedHistoryCallback()
            # An on-policy run whose last rollout is complete must not be stopped before its last update.
            whole = self._on_policy and n_timesteps % model.n_steps == 0
            pace = _Pace(None if whole else n_timesteps, progress)
            model.learn(n_timesteps * n_stream, CallbackList([callback, pace]), log_interval=None)
            return replace(callback.history(), compression_mask=None)

        try:
            pairs = zip(map(int, task_ids), tasks, strict=True)
            runs = [learn_one(task_id, task, k) for task_id, task in pairs for k in range(n_learner)]
        finally:
            torch.set_num_threads(n_thread)
        arrays = {
            name: np.concatenate([getattr(run, name) for run in runs]) for name, _ in runs[0].per_step()
        }
        return histories_of_tasks(arrays, np.repeat(np.arange(n_learner, dtype=np.int32), n_stream))

    def _model(self, env: VecEnv, n_timesteps: int, seed: int) -> Any:
        """The algorithm as configured, for ``env``."""
        arguments = dict(self.config)
        given = arguments.get("policy_kwargs") or {}
        given = given | {key: getattr(module, name) for key, name, module in self._named_classes()}
        arguments["policy"], arguments["policy_kwargs"] = choose_policy(
            self._class, env.observation_space, arguments.get("policy"), given
        )
        if arguments.get("action_noise") is not None:
            arguments["action_noise"] = _make_noise(arguments["action_noise"], env.action_space)
        if "buffer_size" in self._settings:
            # A buffer that is never full gives the same history as any larger one.
            fill = (n_timesteps + 1) * env.num_envs
            arguments["buffer_size"] = min(self._settings["buffer_size"], fill)
        if isinstance(arguments.get("train_freq"), list):
            arguments["train_freq"] = tuple(arguments["train_freq"])
        try:
            return self._class(env=env, seed=seed, device="cpu", **arguments)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"sb3:{self.name}: {' '.join(str(error).split())}") from error

    def _named_classes(self) -> Iterator[tuple[str, str, Any]]:
        """Key, name and module of activations and optimisers given by name (``Tanh``, ``Adam``)."""
        policy_kwargs = self.config.get("policy_kwargs") or {}
        for key, module in (("activation_fn", torch.nn), ("optimizer_class", torch.optim)):
            if isinstance(policy_kwargs.get(key), str):
                yield key, policy_kwargs[key], module


def _noise_problems(noise: Any) -> Sequence[str]:
    if noise is None or isinstance(noise, ActionNoise):
        return []
    if not isinstance(noise, Mapping):
        wrong = isinstance(noise, bool) or not isinstance(noise, int | float) or noise < 0
        said = f"action_noise must be a number >= 0 or a mapping with kind and sigma, got {noise!r}"
        return [said] if wrong else []
    kind = noise.get("kind", "normal")
    if kind not in _NOISE:
        hint = nearest(str(kind), _NOISE)
        return [f"action_noise: unknown kind {kind!r}{hint}; known: {', '.join(_NOISE)}"]
    options = {"mean": 0.0, **{key: value for key, value in noise.items() if key != "kind"}}
    _, problems = Parameters(_NOISE[kind], handed=["dtype"]).complete(options)
    return [problem.within("action_noise") for problem in problems]


def _make_noise(noise: Any, space: spaces.Box) -> ActionNoise:
    """Noise of the shape of ``space``, by default with mean 0."""
    if isinstance(noise, ActionNoise):
        return noise
    options = dict(noise) if isinstance(noise, Mapping) else {"sigma": noise}
    kind = _NOISE[options.pop("kind", "normal")]
    arrays = {
        key: np.broadcast_to(np.asarray(options.pop(key, 0.0), np.float64), space.shape).copy()
        for key in ("mean", "sigma", "initial_noise")
        if key in options or key == "mean"
    }
    return kind(**arrays, **options)


class _SlotsVecEnv(VecEnv):  # type: ignore[misc]
    """A ``BatchedEnv`` as SB3's VecEnv, with the true terminal observation and time limits in the infos."""

    def __init__(self, env: BatchedEnv, observation_space: Any, action_space: Any) -> None:
        super().__init__(env.num_envs, observation_space, action_space)
        self._env = env
        self._actions: AnyArray = np.empty(0)

    def reset(self) -> AnyArray:
        return self._env.reset()

    def step_async(self, actions: AnyArray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[AnyArray, AnyArray, AnyArray, list[dict[str, Any]]]:
        step = self._env.step(self._actions)
        done = step.ended
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = step.next_obs[i]
            infos[i]["TimeLimit.truncated"] = bool(step.truncated[i] and not step.terminated[i])
        return step.obs, step.reward.copy(), done, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        # SB3 asks for the render mode, and warns if there is none.
        value = None if attr_name == "render_mode" else getattr(self._env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise UsageError("slots of a task family have no attributes to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """The rows that a method of the slots, ``action_masks``, returns for all of them."""
        rows = getattr(self._env, method_name)(*args, **kwargs)
        return [rows[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class _Pace(BaseCallback):  # type: ignore[misc]
    """Reports progress, and stops after ``last`` steps; SB3 alone would finish its rollout."""

    def __init__(self, last: int | None, progress: Progress) -> None:
        super().__init__()
        self._last, self._progress = last, progress

    def _on_step(self) -> bool:
        self._progress(self.training_env.num_envs)
        return bool(self.n_calls != self._last)


class SmallImages(BaseFeaturesExtractor):  # type: ignore[misc]
    """Two 3 x 3 convolutions and a linear layer, for images of any size, channels first or last.

    The first convolution is normalised over the image, so that it does not matter whether pixels range up to
    255 or number ten kinds of objects.
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        shape = observation_space.shape
        # As in SB3: there are fewer channels than rows or columns.
        self._channels_last = int(np.argmin(shape)) != 0
        channels, height, width = (shape[2], *shape[:2]) if self._channels_last else shape
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            torch.nn.GroupNorm(1, 32),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * -(-height // 2) * -(-width // 2), features_dim),
            torch.nn.ReLU(),
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        images = observations.movedim(-1, 1) if self._channels_last else observations
        features: torch.Tensor = self.body(images)
        return features


class _Flat(FlattenExtractor):  # type: ignore[misc]
    """SB3's default with its size as a Python integer, which an LSTM needs, instead of a NumPy one."""

    def __init__(self, observation_space: spaces.MultiDiscrete) -> None:
        super().__init__(observation_space)
        self._features_dim = int(observation_space.nvec.sum())


def choose_policy(
    kind: type[Any], space: gymnasium.Space[Any], policy: str | None, policy_kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the policy of ``kind``, an SB3 class, for observations in ``space``.

    Images get convolutions (NatureCNN from 36 x 36 on, else ``SmallImages``), everything else ``MlpPolicy``.
    A ``policy`` or ``features_extractor_class`` that the user chose is kept.
    """
    names = list(kind.policy_aliases)
    mlp = next(name for name in names if name.startswith("Mlp"))
    cnn = next((name for name in names if name.startswith("Cnn")), None)
    shape = space.shape or ()
    if "features_extractor_class" in policy_kwargs:
        return policy or mlp, policy_kwargs
    if isinstance(space, spaces.Box) and len(shape) == 3 and policy in (None, cnn):
        if cnn is not None and is_image_space(space) and sorted(shape)[1] >= 36:  # the least for NatureCNN
            return cnn, policy_kwargs
        return policy or mlp, {**policy_kwargs, "features_extractor_class": SmallImages}
    if isinstance(space, spaces.MultiDiscrete) and "Lstm" in mlp:
        policy_kwargs = {**policy_kwargs, "features_extractor_class": _Flat}
    return policy or mlp, policy_kwargs
