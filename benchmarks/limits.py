"""The limits of the room families: finds them again, writes them into the package, prints the table of docs.

    python -m benchmarks.limits            # 40 CPU seconds
    python -m benchmarks.limits --quick    # only the fastest family, compared with what is kept

What a limit is: docs/environments.md. The search is seeded, so equal versions of NumPy find equal limits.
"""

from __future__ import annotations

import json
import time
from typing import Any

from benchmarks.measuring import quick_from_command_line
from compressed_ad.registry import call_text
from compressed_ad.tasks.limit_search import find_limit
from compressed_ad.tasks.limits import FILE, Limit, shipped_limit
from compressed_ad.tasks.select import make_family

PARAMETERS = {
    "darkroom": ("size", "horizon"),
    "darkroom_large": ("size", "horizon"),
    "darkroom_hard": ("size", "horizon"),
    "darkroom_permuted": ("size", "horizon"),
    "key_to_door": ("size", "horizon", "start", "ends"),
}
EPISODES = (1, 2, 3, 5, 10, 20, 50)
AREAS = (50, 100)


def found(name: str) -> dict[str, Any]:
    """The entry of ``limits.json`` for the family ``name`` with its default parameters."""
    family, started = make_family(name, {}), time.process_time()
    limit = find_limit(family)
    print(f"{name}: {time.process_time() - started:.1f} CPU seconds", flush=True)
    parts = {part: [round(x, 6) for x in values] for part, values in vars(limit).items()}
    return {"parameters": {key: getattr(family, key) for key in PARAMETERS[name]}, **parts}


def lines(name: str, limit: Limit) -> list[str]:
    """Two lines of Markdown: what was reached, and the bound."""
    reached, bound = limit.curve(max(EPISODES)), limit.bound_curve(max(EPISODES))
    table = []
    for label, curve, area in ((name, reached, limit.area), ("", bound, limit.bound_area)):
        cells = [f"{curve[k - 1]:.3f}" for k in EPISODES] + [f"{area(n):.4f}" for n in AREAS]
        table.append(" | ".join(["", label, "reached" if label else "bound", *cells, ""]).strip())
    return table


def main() -> None:
    if quick_from_command_line(__doc__):
        name = "darkroom_permuted"
        new, kept = found(name), json.loads(FILE.read_text())[name]
        print("as kept" if new == kept else f"kept: {kept}\nfound: {new}")
        return
    entries = [f'"{name}": {json.dumps(found(name))}' for name in PARAMETERS]
    FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    for name in PARAMETERS:
        limit = shipped_limit(call_text(name, {}))
        assert limit is not None
        print(*lines(name, limit), sep="\n")


if __name__ == "__main__":
    main()
