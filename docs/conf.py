"""The site (``make docs``): the pages as they are, and what the code says of itself.

The pages are plain Markdown that a code host shows as well. ``GROUPS`` is the table of contents; a page
that it names may be missing, and a page that it does not name comes last. Five pages get a part that is made
here: the table of contents, the help of each command, the notebook, the list of markers, and the reference of
everything public.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["COLUMNS"] = "102"  # argparse leaves two free; paragraphs of the help are 100 wide

import compressed_ad  # noqa: E402
from compressed_ad.cli.listing import LISTS  # noqa: E402
from compressed_ad.cli.main import COMMANDS, main  # noqa: E402
from compressed_ad.registry import Registry  # noqa: E402

GROUPS = {
    "Start": "first_five_minutes from_the_guide guide python notebook commands",
    "Use it": (
        "environments own_environment optional_environments source_algorithms bandits markers extending"
        " exchange compression scaling files troubleshooting"
    ),
    "Understand it": "concepts method recipe",
    "Results": "benchmark results experiments studies",
    "Reference": "api",
}

project, author = "compressed_ad", "The compressed-ad authors"
release = version = re.search(
    r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE
)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("docs/**.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("benchmarks/README.md", "torture/README.md"),
]
exclude_patterns = [".*", "build", "datasets", "runs", "tests", "results"]
html_theme, html_title = "furo", f"compressed_ad {version}"
html_show_copyright = False
html_copy_source = False
toc_object_entries_show_parents = "hide"
html_static_path, html_css_files = ["site"], ["site.css"]
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["misc.highlighting_failure"]  # code with "..." in it stays readable
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_type_aliases = {
    name: name
    for name in (
        *("AnyArray", "FloatArray", "IntArray", "BoolArray", "Floats", "SpaceSpec", "Marker", "Progress"),
        *("Count", "Fraction", "Seed", "Whole", "Positive", "NonNegative", "BelowOne"),
    )
}
"""What signatures call by its name instead of spelling it out."""
python_maximum_signature_line_length = 88


def setup(app: Any) -> None:
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", escape)
    app.connect("autodoc-process-signature", shorten)
    app.connect("build-finished", enter)
    # MathML is drawn by the browser itself: no script from another server, no LaTeX.
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.config.html_math_renderer = "mathml"


def complete(app: Any, name: str, source: list[str]) -> None:
    """Add to a page what the code says of itself, and to the first one the table of contents."""
    parts = {
        "docs/index": contents,
        "docs/commands": commands,
        "docs/notebook": notebook,
        "docs/markers": markers,
        "docs/api": reference,
    }
    if name in parts:
        source[0] += parts[name]()


def contents() -> str:
    pages = {path.stem: f"/docs/{path.stem}" for path in sorted((ROOT / "docs").glob("*.md"))}
    del pages["index"]
    groups = {
        caption: [pages.pop(name) for name in names.split() if name in pages]
        for caption, names in GROUPS.items()
    }
    groups["Results"] += [
        f"/docs/results/{path.stem}" for path in sorted((ROOT / "docs/results").glob("*.md"))
    ]
    groups["Project"] = ["/README", "/CHANGELOG", "/CONTRIBUTING", "/benchmarks/README", "/torture/README"]
    groups["Further pages"] = list(pages.values())
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{chr(10).join(entries)}\n```\n"
        for caption, entries in groups.items()
        if entries
    )


def commands() -> str:
    return "".join(f"\n## cad {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS)


def help_of(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([command, "--help"])
    return printed.getvalue().strip()


def notebook() -> str:
    text = ""
    for cell in json.loads((ROOT / "examples" / "quickstart.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text += "\n" + re.sub(r"^# .*\n", "", source) + "\n"
            continue
        text += f"\n```python\n{source}\n```\n"
        for output in cell["outputs"]:
            shown = output.get("data", {"text/plain": output.get("text", "")})
            if image := "".join(shown.get("image/png", "")).strip():
                text += f'\n<img alt="The figure that this draws" src="data:image/png;base64,{image}">\n'
            else:
                text += f"\n```text\n{''.join(shown['text/plain']).rstrip()}\n```\n"
    return text


def markers() -> str:
    rows = [
        f"| `{name}` | {words} | {f'`{given}`' if given else ''} |"
        for name, words, given in LISTS["markers"]()
    ]
    return "\n".join(["", "| marker | marks | parameters |", "|---|---|---|", *rows, ""])


def reference() -> str:
    rooms: dict[str, list[str]] = {}
    for home, names in compressed_ad._NAMES.items():
        rooms.setdefault(home.split(".")[0], []).extend(names.split())
    order = ["tasks", "learners", "histories", "marking", "training", "models", "evaluation", "report"]
    text = ""
    for room in sorted(rooms, key=lambda room: order.index(room) if room in order else len(order)):
        text += f"\n## {room.capitalize()}\n\n```{{eval-rst}}\n{''.join(map(described, rooms[room]))}```\n"
    return text


def described(name: str) -> str:
    found, full = getattr(compressed_ad, name), f"compressed_ad.{name}"
    if isinstance(found, Registry):
        names = ", ".join(f"``{key}``" for key in found)
        return f".. py:data:: {full}\n\n   By name: {names}.\n\n"
    if inspect.isclass(found) and not issubclass(found, compressed_ad.ModelConfig):
        return f".. autoclass:: {full}\n   :members:\n\n"
    return f".. {'autoclass' if inspect.isclass(found) else 'autofunction'}:: {full}\n\n"


def escape(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: outside of ``literals`` and directives a star or a bar is one."""
    for k, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[k] = "".join(p if p.startswith("``") else re.sub(r"[*|]", r"\\\g<0>", p) for p in parts)


def shorten(app: Any, what: str, name: str, found: Any, options: Any, given: Any, returned: Any) -> Any:
    """Signatures without what only a type checker reads."""
    plain = [
        (r"TypeAliasForwardRef\('(\w+)'\)", r"\1"),
        (r"Annotated\[(\w+)(?:, \w+\([^()]*\))+\]", r"\1"),
        (r"ndarray\[tuple\[Any, \.\.\.\], dtype\[\w+(?:\[Any\])?\]\]", "ndarray"),
    ]
    texts = [given or "", returned or ""]
    for pattern, short in plain:
        texts = [re.sub(pattern, short, text) for text in texts]
    return texts[0] or None, texts[1] or None


def math(self: Any, node: Any) -> None:
    """Write the LaTeX of ``node`` as MathML."""
    from docutils import nodes

    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def enter(app: Any, exception: Exception | None) -> None:
    """The folder of the site opens at its first page."""
    to_first = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
    text = f"<!doctype html>{to_first}<title>{project}</title>\n"
    Path(app.outdir, "index.html").write_text(text, "utf-8")
