"""The table of what was injected and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torture.trials import Verdict

HEAD = ("What", "Injected", "Survived or named", "Recovered", "Lost or wrong", "Examples")


@dataclass
class Row:
    what: str
    survived: int = 0
    recovered: int = 0
    wrong: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, trial: str, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self.recovered += verdict.kind == "recovered"
            self.survived += verdict.good and verdict.kind != "recovered"
            self.wrong += not verdict.good
            if not verdict.good:
                self.examples.append(f"{trial}: {verdict.kind}: {' '.join(verdict.detail.split())}")

    def cells(self) -> tuple[str, ...]:
        numbers = (self.survived + self.recovered + self.wrong, self.survived, self.recovered, self.wrong)
        return (self.what, *(str(number) for number in numbers), "; ".join(self.examples[:2])[:300])


def total(rows: Iterable[Row]) -> Row:
    found = Row("all")
    for row in rows:
        found.survived += row.survived
        found.recovered += row.recovered
        found.wrong += row.wrong
    return found


def plain(rows: list[Row]) -> str:
    lines = [f"{HEAD[0]:46}{HEAD[1]:>9}{HEAD[2]:>19}{HEAD[3]:>11}{HEAD[4]:>15}"]
    for row in [*rows, total(rows)]:
        what, injected, survived, recovered, wrong, _ = row.cells()
        lines.append(f"{what:46}{injected:>9}{survived:>19}{recovered:>11}{wrong:>15}")
        lines += [f"    {example[:400]}" for example in row.examples]
    return "\n".join(lines)


def markdown(rows: list[Row], command: str, facts: str) -> str:
    lines = [f"`{command}`, {facts}", "", f"| {' | '.join(HEAD)} |", "|---|---:|---:|---:|---:|---|"]
    for row in [*rows, total(rows)]:
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row.cells())} |")
    return "\n".join(lines) + "\n"
