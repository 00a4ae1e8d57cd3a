"""Stable-Baselines3 as a source of learning histories: a callback for your own runs, and ``sb3:PPO``.

Importing this module needs Stable-Baselines3; without it ``MissingExtraError`` says what to install.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import ConfigError, MissingExtraError, SpaceError, UsageError, nearest
from compressed_ad.learners.base import Progress
from compressed_ad.markers import threshold
from compressed_ad.seeding import rng, seed64
from compressed_ad.tasks.base import BatchedEnv, TaskFamily
from compressed_ad.types import AnyArray, History, IntArray

try:
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MissingExtraError("compressed_ad.learners.sb3", "sb3") from error

_ON_POLICY = ("A2C", "PPO")


class CompressedHistoryCallback(BaseCallback):  # type: ignore[misc]
    """Records the complete learning history of one SB3 on-policy run; streams are its environments.

    >>> callback = CompressedHistoryCallback(on_policy_threshold=0.7, compression_window=10)
    >>> PPO("MlpPolicy", env).learn(100_000, callback=callback)
    >>> history = callback.history()

    It records the executed (for Box: clipped) action, its probability under the policy that acted (for Box
    the relative probability (pi(a|s) / max pi) ** (1/d), for MultiDiscrete the geometric mean), the reward of
    the environment before SB3 adds its bootstrap value, and the true terminal observation, which SB3 keeps in
    ``infos``. ``log_prob_next`` is evaluated once the update that consumed the step is done, and stays NaN
    for steps that no update consumed.
    """

    def __init__(
        self, on_policy_threshold: float = 0.7, compression_window: int = 10, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        threshold(
            np.zeros((1, 1)), on_policy_threshold, compression_window
        )  # refuses bad values now, not later
        self.on_policy_threshold = on_policy_threshold
        self.compression_window = compression_window
        self._steps: dict[str, list[AnyArray]] = {}
        self._raw_actions: list[AnyArray] = []  # as the policy sampled them
        self._log_prob: list[AnyArray] = []
        self._update = 0
        self._consumed = 0  # steps whose update is done

    def history(self) -> History:
        """What was recorded so far, S = number of environments, with the guide's ``compression_mask``."""
        if not self._steps:
            raise UsageError("CompressedHistoryCallback: nothing was recorded; pass it to learn() first")
        self._describe()
        arrays = {name: np.stack(steps, axis=1) for name, steps in self._steps.items()}
        mask = threshold(arrays["action_probs"], self.on_policy_threshold, self.compression_window)
        n_stream = len(arrays["rewards"])
        return History(learner=np.zeros(n_stream, np.int32), compression_mask=mask, **arrays)

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise UsageError(
                f"CompressedHistoryCallback records on-policy algorithms ({', '.join(_ON_POLICY)}), "
                f"not {type(self.model).__name__}"
            )
        if self.model.get_vec_normalize_env() is not None:
            raise UsageError(
                "CompressedHistoryCallback: VecNormalize changes what is recorded; train without it"
            )

    def _on_rollout_start(self) -> None:
        self._after_update()

    def _on_step(self) -> bool:
        seen, infos = self.locals, self.locals["infos"]
        next_states = np.array(seen["new_obs"])
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        for i in np.flatnonzero(seen["dones"]):
            next_states[i] = infos[i]["terminal_observation"]
        step = {
            "states": np.array(self.model._last_obs),
            "actions": np.array(seen["clipped_actions"]),
            "rewards": np.array(seen["rewards"], np.float32),  # SB3 changes its own array in place later
            "next_states": next_states,
            "terminated": seen["dones"] & ~cut,
            "truncated": seen["dones"] & cut,
            "update": np.full(len(cut), self._update, np.int32),
        }
        for name, array in step.items():
            self._steps.setdefault(name, []).append(array)
        self._raw_actions.append(np.array(seen["actions"]))
        self._log_prob.append(seen["log_probs"].cpu().numpy().astype(np.float32))
        return True

    def _on_rollout_end(self) -> None:
        self._describe()

    def _on_training_end(self) -> None:
        self._describe()
        self._after_update()

    def _describe(self) -> None:
        """Entropy and probability of the steps that lack them; the policy that took them still stands."""
        start = len(self._steps.get("entropy", ()))
        if start == len(self._log_prob):
            return
        log_prob = np.stack(self._log_prob[start:])
        entropy, top = self._distribution(start)
        space = self.model.action_space
        dimension = 1 if isinstance(space, spaces.Discrete) else int(np.prod(space.shape))
        self._extend("action_probs", np.exp(np.minimum(log_prob - top, 0) / dimension))
        self._extend("entropy", entropy)
        self._extend("log_prob_next", np.full_like(log_prob, np.nan))

    def _after_update(self) -> None:
        """Log-probabilities under the updated policy, if a whole rollout was consumed since the last call."""
        n_steps, stop = self.model.n_steps, len(self._log_prob)
        if stop - self._consumed < n_steps:
            return
        log_prob, _ = self._evaluate(self._consumed)
        self._steps["log_prob_next"][self._consumed : stop] = list(log_prob)
        self._consumed = stop
        self._update += 1

    def _extend(self, name: str, steps: AnyArray) -> None:
        self._steps.setdefault(name, []).extend(steps.astype(np.float32))

    def _tensors(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        obs, _ = self.model.policy.obs_to_tensor(np.concatenate(self._steps["states"][start:]))
        actions = torch.as_tensor(np.concatenate(self._raw_actions[start:]), device=self.model.device)
        return obs, actions

    def _evaluate(self, start: int) -> tuple[AnyArray, AnyArray | None]:
        """Log-probability and entropy (T, S) of the steps from ``start`` under the present policy."""
        shape = (len(self._log_prob) - start, -1)
        with torch.no_grad():
            out = self.model.policy.evaluate_actions(*self._tensors(start))
        log_prob, entropy = (None if x is None else x.cpu().numpy().reshape(shape) for x in out[1:])
        assert log_prob is not None
        return log_prob, entropy

    def _distribution(self, start: int) -> tuple[AnyArray, AnyArray]:
        """Entropy and, for Box actions, the highest log-density (T, S) of the steps from ``start``."""
        log_prob, entropy = self._evaluate(start)
        top = np.zeros_like(log_prob)
        if isinstance(self.model.action_space, spaces.Box):
            with torch.no_grad():
                distribution = self.model.policy.get_distribution(self._tensors(start)[0])
                top = distribution.log_prob(distribution.mode()).cpu().numpy().reshape(log_prob.shape)
        return np.full_like(log_prob, np.nan) if entropy is None else entropy, top


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
        done = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = step.next_obs[i]
            infos[i]["TimeLimit.truncated"] = bool(step.truncated[i] and not step.terminated[i])
        return step.obs, step.reward.copy(), done, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        # SB3 asks for the render mode and warns where there is none.
        value = None if attr_name == "render_mode" else getattr(self._env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise UsageError("slots of a task family have no attributes to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise UsageError("slots of a task family have no methods of their own")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class _Pace(BaseCallback):  # type: ignore[misc]
    """Reports progress, and stops after ``n_timesteps`` although SB3 would fill its rollout."""

    def __init__(self, n_timesteps: int, n_steps: int, progress: Progress) -> None:
        super().__init__()
        self._last = n_timesteps if n_timesteps % n_steps else None
        self._progress = progress

    def _on_step(self) -> bool:
        self._progress(self.training_env.num_envs)
        return bool(self.n_calls != self._last)


class SB3Learner:
    """``SourceLearner`` that runs an on-policy SB3 algorithm (``"PPO"``, ``"A2C"``) with its MlpPolicy.

    Keyword arguments are those of the SB3 class except ``policy``, ``env``, ``seed`` and ``device``, which
    this learner sets itself (CPU, one thread); ``net_arch`` stands for ``policy_kwargs={"net_arch": ...}``.
    ``ConfigError`` names every wrong one.
    """

    def __init__(self, algorithm: str, **config: Any) -> None:
        if algorithm not in _ON_POLICY:
            raise UsageError(f"sb3:{algorithm} is not supported{nearest(algorithm, _ON_POLICY)}; "
                             f"supported: {', '.join('sb3:' + name for name in _ON_POLICY)}")  # fmt: skip
        self.name = algorithm
        self._class = getattr(stable_baselines3, algorithm)
        ours = {"self", "policy", "env", "seed", "device", "_init_setup_model"}
        known = [key for key in inspect.signature(self._class.__init__).parameters if key not in ours]
        unknown = [key for key in config if key not in [*known, "net_arch"]]
        if unknown:
            raise ConfigError(
                [f"sb3:{algorithm}: unknown key {k!r}{nearest(k, [*known, 'net_arch'])}" for k in unknown]
            )
        if "net_arch" in config:
            policy_kwargs = {**config.get("policy_kwargs", {}), "net_arch": list(config.pop("net_arch"))}
            config["policy_kwargs"] = policy_kwargs
        self.config = config

    def learn(
        self,
        family: TaskFamily,
        task_ids: IntArray,
        tasks: AnyArray,
        *,
        n_timesteps: int,
        n_learner: int,
        n_stream: int,
        seed: int,
        progress: Progress = lambda steps: None,
    ) -> list[History]:
        """See ``SourceLearner.learn``. Seeds NumPy's and PyTorch's global generators, as SB3 does."""
        if isinstance(family.action_space, spaces.Discrete) and family.action_space.start != 0:
            raise SpaceError(f"{family.name}: SB3 needs Discrete actions that start at 0")
        n_thread = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [
                _join(
                    [
                        self._learn_one(family, task, n_timesteps, n_stream, progress, seed, int(task_id), k)
                        for k in range(n_learner)
                    ]
                )
                for task_id, task in zip(task_ids, tasks, strict=True)
            ]
        finally:
            torch.set_num_threads(n_thread)

    def _learn_one(
        self,
        family: TaskFamily,
        task: NDArray[Any],
        n_timesteps: int,
        n_stream: int,
        progress: Progress,
        seed: int,
        task_id: int,
        learner: int,
    ) -> History:
        who = (task_id, learner)
        env_seeds = rng(seed, "sb3-env", *who).integers(2**63 - 1, size=n_stream)
        slots = family.make(np.repeat(task[None], n_stream, axis=0), env_seeds)
        env = _SlotsVecEnv(slots, family.observation_space, family.action_space)
        model = self._class(
            "MlpPolicy", env, seed=seed64(seed, "sb3", *who) % 2**31, device="cpu", **self.config
        )
        if n_timesteps < model.n_steps:
            raise ConfigError(
                f"sb3:{self.name}: n_steps {model.n_steps} exceeds the {n_timesteps} steps of a stream; "
                "nothing would be learned"
            )
        callback = CompressedHistoryCallback()
        pace = _Pace(n_timesteps, model.n_steps, progress)
        # An interval beyond the last iteration keeps SB3 from printing.
        model.learn(n_timesteps * n_stream, CallbackList([callback, pace]), log_interval=n_timesteps + 1)
        return replace(callback.history(), compression_mask=None)


def _join(learners: Sequence[History]) -> History:
    """One history whose streams are those of all ``learners``, in order."""
    arrays = {
        name: np.concatenate([getattr(history, name) for history in learners])
        for name, _ in learners[0].per_step()
    }
    return History(
        learner=np.repeat(np.arange(len(learners), dtype=np.int32), learners[0].n_stream), **arrays
    )
