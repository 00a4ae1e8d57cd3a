"""Units of work in processes, here and on a Ray cluster of this machine (skipped where Ray is missing)."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from compressed_ad.errors import RunError, SplitError, UsageError
from compressed_ad.workers import Parts, Pool, RayPool, TimedParts, WorkerPool, open_pool
from tests import jobs

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module", params=["processes", "ray"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if request.param == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    with open_pool("local" if request.param == "ray" else None, 2) as made:
        yield made


def test_results_progress_and_finished_units_come_home(pool: Pool) -> None:
    told: list[tuple[str, int]] = []
    seen: list[tuple[int, int, str]] = []
    units = {f"unit {k}": (k,) for k in range(5)}
    progress = Parts(lambda *words: seen.append(words), dict.fromkeys(units, 1), unit=1)
    results = pool.run(
        jobs.double, units, progress=progress, finished=lambda name, result: told.append((name, result))
    )
    assert results == {f"unit {k}": 2 * k for k in range(5)}
    assert dict(told) == results
    assert (seen[0], seen[-1][:2]) == ((0, 5, ""), (5, 5))
    assert any(text.endswith(" doubled") for _, _, text in seen) or isinstance(pool, RayPool)  # it polls


def test_units_may_save_when_asked_to_stop(pool: Pool, tmp_path: Path) -> None:
    asked = threading.Event()

    def watch() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        asked.set()

    threading.Thread(target=watch, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(jobs.patient, {"a": (str(tmp_path),), "b": (str(tmp_path),)}, should_stop=asked.is_set)
    assert (tmp_path / "saved").exists()


def test_an_error_keeps_its_type_and_place_and_lets_the_others_save(pool: Pool, tmp_path: Path) -> None:
    units = {"a": ("patient", str(tmp_path)), "b": ("wrong",)}
    with pytest.raises(SplitError, match="task 3 is held out") as caught:
        pool.run(jobs.any_of_them, units)
    assert str(caught.value) == "task 3 is held out"
    assert (tmp_path / "saved").exists()
    assert "in wrong\n" in caught.value.__notes__[0]


def test_units_that_have_nothing_to_save_are_not_waited_for(tmp_path: Path) -> None:
    with WorkerPool(2) as pool, pytest.raises(SplitError, match="task 3 is held out"):
        pool.run(jobs.any_of_them, {"a": ("deaf", str(tmp_path)), "b": ("wrong",)}, patience=0.0)
    assert not (tmp_path / "slept").exists()


def test_a_unit_whose_worker_dies_is_tried_again_and_its_progress_is_taken_back(
    pool: Pool, tmp_path: Path
) -> None:
    seen: list[int] = []
    units = {name: (str(tmp_path), name) for name in ("mortal", "other", "third")}
    progress = Parts(lambda done, total, text: seen.append(done), dict.fromkeys(units, 1), unit=10)
    assert pool.run(jobs.die_once, units, progress=progress, retry=True) == {name: name for name in units}
    assert (tmp_path / "mortal died").exists()
    assert (seen[0], seen[-1]) == (0, 30)
    if isinstance(pool, WorkerPool):
        assert any(after < before for before, after in pairwise(seen))


def test_a_unit_that_always_dies_is_named() -> None:
    units = {"a": ("double", 1), "b": ("die",)}
    with WorkerPool(2) as pool, pytest.raises(RunError, match=r"the process of b died \(signal 9, SIGKILL"):
        pool.run(jobs.any_of_them, units)
    results = {}
    with WorkerPool(2) as pool, pytest.raises(RunError, match=r"the process of b died twice \(signal 9"):
        pool.run(
            jobs.any_of_them, units, retry=True, finished=lambda name, value: results.update({name: value})
        )
    assert results == {"a": 2}


def test_shared_data_is_sent_to_each_worker_once(tmp_path: Path) -> None:
    with WorkerPool(2) as pool:
        where = set(pool.run(jobs.Shared(str(tmp_path)).where, {str(k): (k,) for k in range(8)}).values())
    assert os.getpid() not in where
    assert len(list(tmp_path.glob("arrived *"))) == len(where) == 2


def test_a_single_unit_and_a_single_process_need_no_worker(tmp_path: Path) -> None:
    shared = jobs.Shared(str(tmp_path))
    with WorkerPool(2) as pool, WorkerPool(1) as single:
        assert pool.run(shared.where, {"one": (1,)}) == {"one": os.getpid()}
        assert set(single.run(shared.where, {"a": (1,), "b": (2,)}).values()) == {os.getpid()}
        with pytest.raises(KeyboardInterrupt):
            single.run(shared.where, {"a": (1,), "b": (2,)}, should_stop=lambda: True)
        assert not pool.workers and not single.workers


def test_what_cannot_be_sent_is_a_usage_error() -> None:
    with WorkerPool(2) as pool, pytest.raises(UsageError, match="cannot be sent to worker processes"):
        pool.run(lambda x, **rest: x, {"a": (1,), "b": (2,)})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install .*\[ray\]'"):
        open_pool("auto", 2)


def test_no_cluster_is_one_line() -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(UsageError, match=r"--ray 127\.0\.0\.1:1: no such cluster"):
        RayPool("127.0.0.1:1", 1)


def test_parts_add_up() -> None:
    seen: list[tuple[int, int, str]] = []
    parts = Parts(lambda *words: seen.append(words), {"train": 10, "play": 1}, unit=100, before=1)
    parts.advance("train", 1, 2, "half")
    parts.advance("play", 3, 2, "more than said")
    parts.set("train", 0)
    parts.set("train", 1)
    assert [done for done, _, _ in seen] == [100, 600, 700, 200, 1200]
    assert {total for _, total, _ in seen} == {1200}
    assert all(isinstance(count, int) for done, total, _ in seen for count in (done, total))


def test_parts_without_a_common_unit_tell_their_share_and_what_the_last_one_counts() -> None:
    seen: list[tuple[float, float, str]] = []
    outer = TimedParts(lambda *words: seen.append(words), {"run 0": 30, "run 1": 10})
    inner = TimedParts(partial(outer.advance, "run 0"), {"train": 2, "play": 1})
    inner.advance("train", 1_000, 4_000, "steps, loss 0.5")
    inner.set("train", 1)
    outer.advance("run 1", 5, 10, "in-context steps")
    assert [done for done, _, _ in seen] == pytest.approx([0, 0, 1 / 8, 1 / 2, 5 / 8])
    half, last = "now 1,000 of 4,000 steps, loss 0.5", "now 5 of 10 in-context steps"
    assert [text for _, _, text in seen] == ["", "", half, half, last]
    assert {total for _, total, _ in seen} == {1}
    nothing: list[tuple[float, float, str]] = []
    TimedParts(lambda *words: nothing.append(words), {})
    assert nothing == [(1, 1, "")]
    one: list[tuple[float, float, str]] = []
    TimedParts(lambda *words: one.append(words), {"task": 2}).advance("task", 1, 1, "tasks")
    assert one[-1] == (1, 1, "now 1 of 1 tasks")  # a count of one is no share
    alike: list[float] = []
    TimedParts(lambda done, total, text: alike.append(done), {"a": 0, "b": 0}).advance("a", 1, 10, "steps")
    assert alike[-1] == pytest.approx(1 / 20)  # as if both took as long
    outer.advance("run 0", 2, 3, "steps", who="AD")
    assert seen[-1][2] == "AD now 2 of 3 steps"


def test_a_program_that_was_read_from_a_pipe_may_use_workers() -> None:
    program = (
        "from compressed_ad.workers import WorkerPool\nfrom tests import jobs\n"
        "with WorkerPool(2) as pool:\n    found = pool.run(jobs.double, {'a': (1,), 'b': (2,)})\n"
        "    print(sorted(found.values()))\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[2, 4]\n", 0), done.stderr
