"""A callback that records the learning history of a Stable-Baselines3 run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressed_ad.errors import MissingExtraError, SpaceError, UsageError
from compressed_ad.learners.sb3.probability import ActionDistribution, OnPolicy, find_distribution
from compressed_ad.marking.markers import threshold
from compressed_ad.registry import checked
from compressed_ad.settings import Count, Fraction
from compressed_ad.tasks.as_batched import refuse_moving_scales
from compressed_ad.types import AnyArray, History, cast, to_spec

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecTransposeImage
except ImportError as error:
    raise MissingExtraError("compressed_ad.learners.sb3.callback", "sb3") from error


@checked
class CompressedHistoryCallback(BaseCallback):  # type: ignore[misc]
    """Records the complete learning history of one run of SB3 or sb3-contrib; streams are its environments.

    >>> callback = CompressedHistoryCallback(on_policy_threshold=0.7, compression_window=10)
    >>> SAC("MlpPolicy", env).learn(100_000, callback=callback)
    >>> history = callback.history()

    It records the executed action (clipped, or in the units of the action space), the reward of the
    environment before SB3 changes it, the true terminal observation, which SB3 keeps in ``infos``, and time
    limits apart from terminations. ``update`` counts how often the policy was trained before the step.
    ``action_probs`` is the probability of the action under the policy that acted, exploration included: for
    discrete actions itself (MultiDiscrete: geometric mean), for Box the relative probability of the draw
    behind it (see ``probability.relative_probability``); uniform warm-up steps in a Box count as 0, and
    NaN stands for unknown. On-policy algorithms also have ``log_prob_next``, evaluated once the update that
    consumed the step is done; it stays NaN for steps that no update consumed.
    """

    def __init__(
        self, on_policy_threshold: Fraction = 0.7, compression_window: Count = 10, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.on_policy_threshold, self.compression_window = on_policy_threshold, compression_window
        self._steps = _Columns()
        self._ends: list[tuple[int, int, AnyArray]] = []  # step, environment, terminal observation
        self._after: AnyArray = np.empty(0)  # observations after the last step, and after resets
        self._last: Any = None  # SB3's own array of the observations after the last step
        self._recorded: Any = None  # the model
        self._update = 0  # version of the policy
        self._trained = 0  # SB3's count of updates when it was last looked at
        self._rollout = 0  # first step of the current rollout
        self._n_evaluated = 0  # steps whose probability is known

    def history(self) -> History:
        """The history so far; its S streams are the environments.

        It has the ``compression_mask`` of the threshold rule, unless a probability is unknown.
        """
        if not len(self._steps):
            raise UsageError("CompressedHistoryCallback: nothing was recorded; pass it to learn() first")
        self._on_rollout_end()
        states = self._steps["states"]
        next_states = np.concatenate([states[1:], self._after[None]])
        for step, i, obs in self._ends:
            next_states[step, i] = obs
        arrays = {name: self._steps[name] for name in self._steps.arrays} | {"next_states": next_states}
        if isinstance(self.training_env, VecTransposeImage) and not self.training_env.skip:
            for name in ("states", "next_states"):
                arrays[name] = np.moveaxis(arrays[name], 2, -1)  # channels last, as in the environment
        arrays = {name: np.ascontiguousarray(np.swapaxes(array, 0, 1)) for name, array in arrays.items()}
        history = History(learner=np.zeros(len(arrays["rewards"]), np.int32), **arrays)
        if np.isnan(history.action_probs).any():
            return history
        mask = threshold(history.action_probs, self.on_policy_threshold, self.compression_window)
        return history.with_mask(mask)

    def _init_callback(self) -> None:
        model = self.model
        if self._recorded not in (None, model):
            raise UsageError("CompressedHistoryCallback records one run; make another one for another model")
        if self._recorded is None:
            self._distribution: ActionDistribution = find_distribution(model)
        for kind, space in (("observations", model.observation_space), ("actions", model.action_space)):
            try:
                to_spec(space)
            except SpaceError as error:
                what = f"{kind} in a {type(space).__name__} space cannot be recorded"
                raise SpaceError(f"CompressedHistoryCallback: {what}: {error}") from None
        refuse_moving_scales(model.get_env())
        if len(self._steps):
            self._on_rollout_end()  # an exception may have ended the run before
            # SB3 keeps the last observations of a ``learn`` that the next one goes on from.
            if model.num_timesteps == 0 or model._last_obs is not self._last:
                # A new ``learn`` has reset the environments, which truncates the unfinished episodes.
                step, truncated = len(self._steps) - 1, self._steps["truncated"]
                for i in np.flatnonzero(~(truncated[step] | self._steps["terminated"][step])):
                    truncated[step, i] = True
                    self._ends.append((step, int(i), self._after[i]))
        self._recorded, self._trained, self._rollout = model, model._n_updates, len(self._steps)

    def _on_rollout_start(self) -> None:
        self._notice_update()
        self._rollout = len(self._steps)
        self._distribution.start()

    def _on_step(self) -> bool:
        seen, infos, model = self.locals, self.locals["infos"], self.model
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        done = self._row("dones", seen["dones"], np.dtype(bool))
        for i in np.flatnonzero(done):
            if "terminal_observation" not in infos[i]:
                what = "an episode ended without infos['terminal_observation'], which every VecEnv must give"
                raise UsageError(f"CompressedHistoryCallback: {what}")
            last = np.asarray(infos[i]["terminal_observation"])[None]
            self._ends.append((len(self._steps), int(i), self._elements("terminal observation", last)[0]))
        row = {
            "states": self._elements("observations", model._last_obs),
            "actions": self._row(
                "actions", seen.get("clipped_actions", seen["actions"]), *_kind(model.action_space)
            ),
            "rewards": self._row("rewards", seen["rewards"], np.dtype(np.float32)),
            "terminated": done & ~cut,
            "truncated": done & cut,
            "update": np.full(len(cut), self._update, np.int32),
        }
        self._last, self._after = seen["new_obs"], self._elements("observations", seen["new_obs"]).copy()
        later = ["action_probs", *["entropy"] * self._distribution.has_entropy]
        later += ["log_prob_next"] * isinstance(self._distribution, OnPolicy)
        self._steps.append(row | dict.fromkeys(later, np.full(len(cut), np.nan, np.float32)))
        self._distribution.note(seen)
        return True

    def _elements(self, what: str, array: Any) -> AnyArray:
        return self._row(what, array, *_kind(self.model.observation_space))

    def _row(self, what: str, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...] = ()) -> AnyArray:
        """``array`` (N, *shape) in ``dtype``, that of its space; ``SpaceError`` if it would be changed."""
        given = np.asarray(array)
        fitting = cast(given, dtype) if given.shape[1:] == shape else None
        if fitting is None:
            said = f"{what} are {given.dtype} {given.shape[1:]}, their space has {dtype} {shape}"
            raise SpaceError(f"CompressedHistoryCallback, step {len(self._steps)}: {said}")
        return fitting

    def _on_training_end(self) -> None:
        self._on_rollout_end()
        self._notice_update()

    def _on_rollout_end(self) -> None:
        """Fill in probability and entropy of the rollout, before the policy that acted is trained again."""
        if self._n_evaluated == len(self._steps):
            return
        part = slice(self._rollout, None)
        probability, entropy = self._distribution.evaluate(self._steps["states"][part])
        self._steps["action_probs"][part] = probability
        if self._distribution.has_entropy:
            self._steps["entropy"][part] = entropy
        self._n_evaluated = len(self._steps)

    def _notice_update(self) -> None:
        """Count an update of the policy, and fill in ``log_prob_next`` of the rollout that it used."""
        if self.model._n_updates == self._trained:
            return
        self._trained = self.model._n_updates
        self._update += 1
        if isinstance(self._distribution, OnPolicy) and self._rollout < len(self._steps):
            part = slice(self._rollout, None)
            self._steps["log_prob_next"][part] = self._distribution.log_prob(self._steps["states"][part])


def _kind(space: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    return space.dtype, space.shape


class _Columns:
    """Named arrays (T, ...) that grow by rows, without a Python object for each step."""

    def __init__(self) -> None:
        self.arrays: dict[str, AnyArray] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> AnyArray:
        return self.arrays[name][: self._length]

    def append(self, row: Mapping[str, AnyArray]) -> None:
        for name, value in row.items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((64, *value.shape), value.dtype)
            array = self.arrays[name]
            if len(array) == self._length:
                self.arrays[name] = array = np.concatenate([array, np.empty_like(array)])
            array[self._length] = value
        self._length += 1
