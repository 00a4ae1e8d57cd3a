"""Keep the results of finished studies: rows to results/, figures and tables to docs/.

python results/update.py [runs/study]    after the studies that are to be kept
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from compressed_ad.study_command import text
from compressed_ad.study_file import load_study
from compressed_ad.study_rows import read_points, read_rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
FIGURES = {
    "guide": ("differences", "convergence"),
    "controls": ("differences",),
    "why": ("differences",),
    "sweep": ("marked", "runs"),
    "frontier": ("differences", "runs"),
    "condition": ("differences",),
}


def main(out: Path) -> None:
    """Copy what ``cad study`` left in ``out`` and fill the tables of docs/results.md."""
    page = PAGE.read_text("utf-8")
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        name, kept = path.stem, out / path.stem
        if (kept / "table.csv").exists():
            shutil.copy(kept / "table.csv", ROOT / "results" / f"{name}.csv")
            shutil.copy(kept / "curves.csv", ROOT / "results" / f"{name}_curves.csv")
            for figure in FIGURES.get(name, ()):
                shutil.copy(kept / "figures" / f"{figure}.png", ROOT / "docs" / f"study_{name}_{figure}.png")
        rows = read_rows(ROOT / "results" / f"{name}.csv")
        points = read_points(ROOT / "results" / f"{name}_curves.csv")
        tables = text(load_study(path), rows, points, markdown=True)
        block = f"<!-- {name} -->\n{tables}\n<!-- end -->"
        page, count = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->", block.replace("\\", r"\\"), page, flags=re.DOTALL
        )
        assert count == 1, f"{PAGE} has {count} places for {name}"
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "study")
