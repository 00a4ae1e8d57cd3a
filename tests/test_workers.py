"""Jobs on a Ray cluster of this machine; skipped where Ray is not installed."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressed_ad.errors import SplitError, UsageError
from compressed_ad.workers import RayPool
from tests import jobs

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    with RayPool("local", 2) as made:
        yield made


def test_results_progress_and_finished_jobs_come_home(pool: RayPool) -> None:
    told: list[tuple[str, int]] = []
    seen: dict[str, tuple[int, int, str]] = {}
    results = pool.run(
        {f"job {k}": (jobs.double, (k,)) for k in range(5)},
        lambda name, *rest: seen.update({name: rest}),
        lambda: False,
        lambda name, result: told.append((name, result)),
    )
    assert results == {f"job {k}": 2 * k for k in range(5)}
    assert dict(told) == results and all(value == (1, 1, "doubled") for value in seen.values())


def test_an_error_keeps_its_type(pool: RayPool) -> None:
    with pytest.raises(SplitError, match="task 3 is held out"):
        pool.run({"wrong": (jobs.wrong, ())}, lambda *rest: None, lambda: False)


def test_jobs_may_save_when_asked_to_stop(pool: RayPool, tmp_path: Path) -> None:
    asked = threading.Event()

    def watch() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        asked.set()

    threading.Thread(target=watch, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run({"patient": (jobs.patient, (str(tmp_path),))}, lambda *rest: None, asked.is_set)
    assert (tmp_path / "saved").exists()


def test_no_cluster_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"--ray 127\.0\.0\.1:1: no such cluster"):
        RayPool("127.0.0.1:1", 1)
