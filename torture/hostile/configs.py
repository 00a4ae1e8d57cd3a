"""YAML files with foreign or absurd content."""

from __future__ import annotations

from pathlib import Path

from torture.hostile.case import CASES, UNTRIED, Case
from torture.stages import Words


def yaml(name: str, text: str | bytes, *more: str, fine: str = "", **files: str) -> None:
    def make(d: Path) -> None:
        for other, content in {"evil.yaml": text, **{f"{k}.yaml": v for k, v in files.items()}}.items():
            (d / other).write_bytes(content.encode() if isinstance(content, str) else content)

    words: list[Words] = [
        ["collect", "--config", "evil.yaml", option] for option in more or ("--print-config",)
    ]
    CASES.append(Case("YAML", name, make, commands=lambda d: words, fine=fine))


NOTHING = ("--print-config", "--dry-run")
yaml("a python tag", "seed: !!python/object/apply:os.system ['touch PWNED']\n", *NOTHING)
for name, text in {
    "marker os:system": "marker: {marker: 'os:system', params: {command: 'touch PWNED'}}\n",
    "marker builtins:print": "marker: {marker: 'builtins:print'}\n",
    "family subprocess:run": "env: {family: 'subprocess:run', kwargs: {args: [touch, PWNED]}}\n",
    "family os:system": "env: {family: 'os:system', kwargs: {command: touch PWNED}}\n",
    "learner os:system": "algorithm: {learner: 'os:system', learner_kwargs: {command: touch PWNED}}\n",
}.items():
    yaml(f"{name}, shown", text, *NOTHING, fine=UNTRIED)
    yaml(f"{name}, run", text, "--out=out")
yaml("anchors", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n")
yaml("3,000 mappings deep", "env: {kwargs: " + "{a: " * 3000 + "1" + "}" * 3001 + "\n")
yaml("30,000 lists deep", "env: {kwargs: {a: " + "[" * 30000 + "]" * 30000 + "}}\n")
yaml("60,000 keys in a list", "env: {kwargs: {a: [{" + ", ".join(f"k{i}: 1" for i in range(60000)) + "}]}}\n")
yaml("20,000 keys", "env:\n  kwargs:\n" + "".join(f"    k{i}: 1\n" for i in range(20000)))
yaml("20,000 sections", "".join(f"k{i}: 1\n" for i in range(20000)))
yaml("an integer of 299 digits", "seed: " + "9" * 299 + "\n")
yaml("control characters", 'seed: "\\0"\nenv: {name: "a\\u001bb"}\n')
yaml("includes itself", "include: evil.yaml\n")
yaml("two include each other", "include: other.yaml\n", other="include: evil.yaml\n")
yaml("includes /etc/passwd", "include: ../../../../../../../../etc/passwd\n")
yaml("a section of /etc/shadow", "include: {env: /etc/shadow}\n")
DOUBLE = {f"i{k}": f"include: [i{k + 1}.yaml, i{k + 1}.yaml]\n" for k in range(21)}
yaml("2^22 includes", "include: [i0.yaml, i0.yaml]\n", **DOUBLE, i21="seed: 1\n")
CHAIN = {f"i{k}": f"include: i{k + 1}.yaml\n" for k in range(1500)}
yaml("1,500 includes in a row", "include: i0.yaml\n", **CHAIN, i1500="seed: 1\n")
yaml("UTF-16", "seed: 1\n".encode("utf-16"))
yaml("not UTF-8", b"seed: \xff\xfe\n")
yaml("no mapping", "- 1\n")
yaml("a key twice", "seed: 1\nseed: 2\n")
yaml(
    "a horizon of 10**12",
    "env: {kwargs: {size: 9, horizon: 1000000000000}}\n",
    "--dry-run",
    fine="only checked",
)
yaml("a name that leaves the folder", "env: {name: '../../escape'}\n", "--dry-run")
