"""All benchmarks: ``python -m benchmarks`` (a few minutes; ``--quick`` only checks that they run)."""

from __future__ import annotations

import json

from benchmarks import (
    collection,
    compression,
    loop,
    memory,
    model,
    published_histories,
    source_algorithms,
    table_learners,
)
from benchmarks.measuring import RESULTS, quick_from_command_line


def main() -> None:
    quick = quick_from_command_line(__doc__)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "collection.json").write_text(json.dumps(collection.run(quick), indent=2) + "\n")
    model.run(quick)
    compression.run(quick)
    memory.run(quick)
    source_algorithms.run(quick)
    table_learners.run(quick)
    published_histories.run(quick)
    loop.run(quick)


if __name__ == "__main__":
    main()
