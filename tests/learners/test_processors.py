"""One seed gives the same histories whatever vectors the processor has, bit for bit.

Kernels are compiled for an older processor than this one in a process of its own, in which NumPy, its
linear algebra and the C library do without the newer instructions as well. All learners and two older
processors take a minute: ``python -m tests.learners.test_processors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests import probes
from tests.learners.learning import learn

PPO = {"n_steps": 10, "batch_size": 23, "n_epochs": 2, "learning_rate": 3e-3, "ent_coef": 0.01}
QUICK: list[tuple[str, Any, dict[str, Any]]] = [
    ("ppo", "darkroom", PPO),
    ("noise", "darkroom", {"schedule": "cosine", "final": 0.1}),
    ("homing", "point_mass", {}),
]
ALL = [
    *QUICK,
    ("ppo", probes.OBSERVATION_ACTION, {**PPO, "net_arch": (48, 80)}),
    ("tabular", "darkroom", {"epsilon": 0.1, "initial": 1.0, "fade": 0.5, "sweeps": 5}),
    ("rmax", "darkroom", {"epsilon": 0.1}),
    ("revisit", "darkroom", {}),
    ("thompson", "bernoulli_bandit", {}),
    ("thompson", "gaussian_bandit", {}),
    ("ucb1", "gaussian_bandit", {}),
]
# By the float32 numbers in a vector: what Numba compiles for, and what the C library may not use.
OLDER = {
    8: ("haswell", "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2", "Haswell", []),
    4: ("generic", "", "Nehalem", ["AVX2", "FMA"]),
}


def digests(cases: list[tuple[str, Any, dict[str, Any]]]) -> dict[str, Any]:
    """A digest of every array that the learners record."""
    from compressed_ad import make_family, make_learner

    found: dict[str, Any] = {}
    for name, room, kwargs in cases:
        family = make_family(room, {}) if isinstance(room, str) else room
        for history in learn(make_learner(name, kwargs), family, [0, 1], 40, n_stream=7):
            for key, array in history.per_step():
                digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]
                found.setdefault(f"{name}, {family.name}: {key}", []).append(digest)
    return found


def print_digests(width: int, cases: str) -> None:
    """What ``elsewhere`` runs in the other process."""
    from compressed_ad.models import vector_code

    assert width == vector_code.WIDTH
    # Old processors get this instruction from the C library, exact but slow: only here.
    vector_code.FUSED = True
    print(json.dumps(digests(globals()[cases])))


def elsewhere(width: int, cases: str) -> dict[str, Any]:
    """The digests on a processor whose vectors have ``width`` numbers."""
    name, features, blas, lacking = OLDER[width]
    newer = np.show_config(mode="dicts")["SIMD Extensions"]["found"]  # type: ignore[call-overload]
    newer = [one for one in newer if width == 4 or not one.startswith("X86_V3")]
    lacking = ["AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", *lacking]
    environment = {
        "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "OPENBLAS_CORETYPE": blas,
        "NPY_DISABLE_CPU_FEATURES": " ".join(newer),
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{one}" for one in lacking),
    }  # fmt: skip
    code = f"from tests.learners import test_processors as t; t.print_digests({width}, '{cases}')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors of this kind")
def test_histories_are_the_same_on_a_processor_without_wide_vectors() -> None:
    from compressed_ad.models import vector_code

    if not vector_code.FUSED:
        pytest.skip("this processor rounds a b + c twice")
    assert elsewhere(4, "QUICK") == digests(QUICK)


if __name__ == "__main__":
    here = digests(ALL)
    for older in OLDER:
        other = elsewhere(older, "ALL")
        different = [name for name in here if other[name] != here[name]]
        print(f"vectors of {older} numbers: {len(here)} arrays,", different or "all equal")
