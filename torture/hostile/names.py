"""Foreign and absurd names on the command line."""

from __future__ import annotations

from torture.hostile.case import CASES, UNTRIED, Case
from torture.stages import HISTORY, QUICK

for word in ("os:system", "subprocess:run", "builtins:exec", "json:dumps"):
    given = {
        "--marker": ["mark", HISTORY],
        "--learner": ["collect", "--dry-run"],
        "--family": ["collect", "--dry-run"],
    }
    for option, command in given.items():
        words = [*command, option, word]
        fine = UNTRIED if "--dry-run" in words else ""
        CASES.append(
            Case("names given by hand", f"{option} {word}", bool, commands=lambda d, w=words: [w], fine=fine)
        )
for word in ("../../escape", "x" * 300, "a/b"):
    words = ["collect", *QUICK[:10], "--env.name", word, "--dry-run"]
    CASES.append(
        Case("names given by hand", f"--env.name {word[:20]!r}", bool, commands=lambda d, w=words: [w])
    )
