import io

import pytest
from rich.console import Console

from compressed_ad.cli import display
from compressed_ad.cli.display import Display, _Pace


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
    clock[0] += 4
    assert pace.text(30, 110, "steps").endswith("steps, 32 s left")


def test_time_left_forgets_one_stall_right_after_the_first_progress(clock):
    pace = _Pace()
    for done in (0, 1, 2):
        pace.text(done, 100, "steps")
    clock[0] += 60  # kernels are compiled
    assert "left" not in pace.text(4, 100, "steps")
    clock[0] += 4
    assert pace.text(8, 100, "steps").endswith("1 min 32 s left")
    clock[0] += 96  # work is slow now
    assert pace.text(12, 100, "steps").endswith("18 min 20 s left")


def test_lines_off_a_terminal(clock):
    out = io.StringIO()
    shown = Display(Console(file=out, highlight=False))
    with shown.stage_with_table("study") as (report, show_table):
        show_table([["Family"]])
        report(0, 10, "a")
        clock[0] += 6
        report(1, 10, "b")
        report(2, 10, "c")
    assert out.getvalue() == "study      10 % (1 of 10) b\nstudy     done in 6 s\n"


def test_a_terminal_shows_a_bar_below_the_table():
    out = io.StringIO()
    shown = Display(Console(file=out, force_terminal=True, width=90, highlight=False))
    with shown.stage_with_table("study") as (report, show_table):
        report(1, 4, "half way")
        show_table([["Family", "Variant"], ["darkroom", "AD"]])
    text = out.getvalue()
    assert "25 % (1 of 4) half way" in text and "darkroom" in text and "done in 0 s" in text
