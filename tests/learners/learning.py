"""What the tests of several learners share."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressed_ad.types import History


def learn(
    learner: Any, family: Any, ids: Any, n_timesteps: int, n_stream: int = 1, seed: int = 0
) -> list[History]:
    ids = np.asarray(ids)
    return learner.learn(
        family, ids, family.tasks()[ids], n_timesteps=n_timesteps, n_learner=1, n_stream=n_stream, seed=seed
    )
