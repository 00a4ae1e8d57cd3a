"""The pages in a real browser: no error, every image there, nothing fetched, nothing cut off."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compressed_ad.report.rows import read_rows
from compressed_ad.report.study_report import write_study
from compressed_ad.runs.directory import environment
from compressed_ad.runs.study import load_study
from compressed_ad.runs.yaml_file import dump
from tests.conftest import SmokeRun

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
]

LISTEN = """<script>
window.problems = [];
addEventListener("error", e => problems.push(e.message || "failed: " + e.target.src), true);
const say = console.error; console.error = (...words) => { problems.push(words.join(" ")); say(...words); };
</script>"""

TELL = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(i => i.complete && i.naturalWidth);
  const asked = performance.getEntriesByType("resource").map(r => r.name)
    .filter(n => !n.startsWith("data:"));
  const facts = { problems, images, asked, width: document.documentElement.scrollWidth, window: innerWidth,
                  text: document.body.innerText.length };
  const out = document.createElement("pre");
  out.id = "facts"; out.textContent = JSON.stringify(facts);
  document.body.append(out);
});
</script>"""


def look(page: Path, folder: Path, width: int) -> dict[str, object]:
    """What a browser ``width`` pixels wide makes of a copy of ``page`` that tells what it sees."""
    assert CHROMIUM is not None
    text = page.read_text("utf-8")
    copy = folder / f"page_{width}.html"
    copy.write_text(text.replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{TELL}</body>", 1))
    profile = folder / f"profile_{width}"
    done = subprocess.run(
        [
            CHROMIUM,
            *OPTIONS,
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def check(page: Path, folder: Path, n_image: int) -> None:
    for width in (1280, 700):
        facts = look(page, folder, width)
        assert facts["problems"] == [] and facts["asked"] == []
        assert len(facts["images"]) >= n_image and all(facts["images"])
        assert facts["width"] <= facts["window"], f"{page} is wider than {width} pixels"
        assert facts["text"] > 1000


def test_the_report_opens_offline_and_whole(smoke: SmokeRun, tmp_path: Path) -> None:
    check(smoke.out / "report" / "index.html", tmp_path, 12)


def test_a_study_page_opens_offline_and_whole(tmp_path: Path) -> None:
    loaded = load_study(ROOT / "studies" / "why.yaml")
    rows = read_rows(ROOT / "results" / "why.csv")
    points = read_rows(ROOT / "results" / "why_curves.csv")
    check(
        write_study(
            tmp_path,
            loaded,
            rows,
            points,
            command="cad study why.yaml",
            config=dump(loaded.cells[0].trained),
            facts=environment(),
        ),
        tmp_path,
        4,
    )


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    """The check itself can fail: an image that is not there, a script that throws, a table too wide."""
    body = '<img src="none.png"><script>throw new Error("broken")</script><div style="width:3000px">x</div>'
    page = tmp_path / "broken.html"
    page.write_text(f"<html><head></head><body>{body}</body></html>")
    facts = look(page, tmp_path, 1024)
    assert any("broken" in str(p) for p in facts["problems"]) and not all(facts["images"])
    assert facts["width"] > facts["window"]
