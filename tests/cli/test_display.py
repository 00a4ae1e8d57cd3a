import io
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from rich.console import Console

from compressed_ad.cli import display
from compressed_ad.cli.display import Display, _Pace, complain, lenient_streams, print_lines, print_table
from compressed_ad.errors import RunError


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_time_left_counts_from_the_first_progress(clock):
    pace = _Pace()
    assert pace.text(10, 110, "steps") == "  9 % (10 of 110) steps"  # done before
    clock[0] += 60  # starting up
    assert "left" not in pace.text(20, 110, "steps")
    for done in (25, 30):
        clock[0] += 3
        told = pace.text(done, 110, "steps")
    assert told == " 27 % (30 of 110) 48 s left: steps"


def test_time_left_forgets_one_stall_right_after_the_first_progress(clock):
    pace = _Pace()
    for done in (0, 1, 2):
        pace.text(done, 100, "steps")
    clock[0] += 60  # kernels are compiled
    assert "left" not in pace.text(4, 100, "steps")
    clock[0] += 6
    assert pace.text(8, 100, "steps").endswith(" 2 min 18 s left: steps")
    clock[0] += 94  # work is slow now
    assert pace.text(12, 100, "steps").endswith(" 18 min 20 s left: steps")


def test_no_time_left_is_told_before_it_can_be_known(clock):
    """The second process has compiled its kernels two seconds after the first one."""
    pace = _Pace()
    pace.text(0, 8_100_000, "steps")
    pace.text(7_700, 8_100_000, "steps")
    clock[0] += 2
    assert "left" not in pace.text(15_400, 8_100_000, "steps")
    clock[0] += 4
    assert pace.text(2_000_000, 8_100_000, "steps").endswith(" 18 s left: steps")


def test_lines_off_a_terminal(clock):
    out = io.StringIO()
    shown = Display(Console(file=out, highlight=False))
    with shown.stage_with_table("study") as (report, show_table):
        show_table([["Family"]])
        report(0, 10, "a")
        clock[0] += 6
        report(1, 10, "b")
        report(2, 10, "c")
        clock[0] += 6
        report(0.25, 1, "now 5 of 20 steps")
        clock[0] += 6
        report(0, 1, "tasks")  # a count of one
    shown_lines = (
        "study      10 % (1 of 10) b",
        "study      25 % now 5 of 20 steps",
        "study       0 % (0 of 1) tasks",
        "study     done in 18 s",
    )
    assert out.getvalue().splitlines() == list(shown_lines)


def test_a_terminal_of_its_own_shows_progress_and_what_libraries_print(tmp_path):
    """While the bar is shown, ``sys.stderr`` is rich's, which must not be what the bar is written to."""
    program = (
        "import sys, time\nfrom compressed_ad.cli.display import Display, complain\n"
        "with Display().stage('collect') as report:\n"
        "    report(1, 4, 'steps')\n    time.sleep(0.5)\n"
        "    print('from a library', file=sys.stderr)\n    complain('from us')\n"
    )
    shown = on_terminal("-c", program)
    assert "25 % (1 of 4) steps" in shown
    bars = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).splitlines() if "━" in line]
    assert {line.count("━") + line.count("╸") + line.count("╺") for line in bars} == {30}
    slow = program.replace(
        "import sys, time\n", "import sys, time\ntime.monotonic = iter(range(0, 600, 6)).__next__\n"
    )
    assert "collect    25 % (1 of 4) steps" in on_terminal("-c", slow, TERM="dumb")  # as off a terminal
    assert all(shown.count(text) == 1 for text in ("from a library", "from us", "collect   done in"))
    small = ("--preset", "smoke", "--algorithm.n_timesteps", "200", "--out", str(tmp_path))
    assert "collect   done in" in on_terminal("-m", "compressed_ad", "collect", *small)


def on_terminal(*words, **variables):
    """What Python, started with ``words``, writes to a terminal; it must end without an error in a minute."""
    leader, follower = os.openpty()
    process = subprocess.Popen([sys.executable, *words], stdin=follower, stdout=follower, stderr=follower,
                               env=os.environ | {"TERM": "xterm", "COLUMNS": "80"} | variables)  # fmt: skip
    os.close(follower)
    clock = threading.Timer(60, process.kill)
    clock.start()
    shown = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(leader, 65536):
            shown += part
    clock.cancel()
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_narrow_terminal_shows_how_far_it_is():
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=40, highlight=False)).stage("study") as report:
        report(3, 10, "steps")
    assert "30 % (3 of 10)" in out.getvalue()


def test_a_terminal_shows_a_bar_below_the_table():
    out = io.StringIO()
    shown = Display(Console(file=out, force_terminal=True, width=90, highlight=False))
    with shown.stage_with_table("study") as (report, show_table):
        show_table([["Family", "Variant"]])
        report(1, 4, "half way")
        show_table([["Family", "Variant", *"abc"], ["darkroom", "AD", *("x" * 30 for _ in range(3))]])
    text = out.getvalue()
    assert "25 % (1 of 4) half way" in text and "darkroom" in text and "done in 0 s" in text
    assert "x" * 30 in text and "…" not in text  # whole columns, as many as fit


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"a ? b\n"), ("latin-1", b"a ? b\n"), ("utf-8", b"a \xe2\x88\x92 b\n")]
)
def test_what_an_encoding_lacks_is_replaced(monkeypatch, encoding, shown):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with lenient_streams():
        print_lines("a \u2212 b")
    assert (content.getvalue(), stream.errors) == (shown, "strict")


class Broken(io.TextIOBase):
    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "stream",
    [None, Broken(OSError(28, "No space left on device")), Broken(BrokenPipeError()), Broken(ValueError())],
)
def test_no_work_ends_because_progress_cannot_be_written(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    display = Display()
    display.note("a note")
    with display.stage("train") as report:
        report(1, 2, "half")
    complain("cad: error: this")


def test_results_that_cannot_be_written_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    for write in (print_lines, print_table):
        with pytest.raises(RunError, match=r"standard output cannot be written \(No space left"):
            write("words")


def test_a_table_is_100_columns_wide_off_a_terminal(capsys):
    print_table("x" * 150)
    assert capsys.readouterr().out == "x" * 100 + "\n" + "x" * 50 + "\n"


def test_a_failing_thread_is_one_line(capsys):
    with lenient_streams():
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert capsys.readouterr().err.startswith(
        "note: a thread failed: division by zero (ZeroDivisionError in test_"
    )
