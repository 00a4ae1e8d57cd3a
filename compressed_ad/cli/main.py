"""The command line ``cad COMMAND``: parses and reports mistakes; ``commands`` do the work."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from compressed_ad.cli import options as own
from compressed_ad.cli.call import Call
from compressed_ad.cli.display import Display
from compressed_ad.cli.stopping import Stop
from compressed_ad.errors import CompressedADError, ConfigError, UsageError, nearest
from compressed_ad.registry import import_attribute
from compressed_ad.runs.config_text import describe, suggest
from compressed_ad.runs.layers import PRESETS, SECTIONS, Request

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command: where it is done, its help, its own options, the sections of the configuration it reads."""

    run: str  # file:function in this folder, imported when the command runs
    help: str
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    text: str = ""
    sections: tuple[str, ...] = ()
    common: tuple[str, ...] = ("seed", "device", "dry-run")
    overrides: bool = False  # takes --section.key without having sections of its own


COMMANDS = {
    "run": Command(
        "run:run",
        "the main job: collect, mark, train, evaluate, compare, report",
        own.run_options,
        text=(
            "Does every stage of a preset and continues where it was interrupted. The output folder holds "
            "the history file, one directory per training run, and report/index.html, table.csv, "
            "summary.json."
        ),
        sections=tuple(SECTIONS),
    ),
    "collect": Command(
        "histories:collect",
        "record the learning histories of source learners",
        own.collect_options,
        sections=("env", "algorithm", "marker"),
    ),
    "mark": Command(
        "histories:mark",
        "mark a history file anew, without collecting again",
        own.mark_options,
        sections=("marker",),
        common=("seed", "dry-run"),
    ),
    "inspect": Command(
        "histories:inspect",
        "what is in a history file",
        own.inspect_options,
        common=(),
    ),
    "train": Command(
        "models:train",
        "train one model with one seed",
        own.train_options,
        text=(
            "The task family and the split are those of the history file. Of the section evaluation only "
            "how models play matters here, since the best checkpoint is chosen by in-context return."
        ),
        sections=("env", "model", "evaluation"),
    ),
    "evaluate": Command(
        "models:evaluate",
        "judge trained runs on their held-out tasks",
        own.evaluate_options,
        text="Settings that are not given are those of the run.",
        sections=("evaluation",),
        common=("device", "dry-run"),
    ),
    "compare": Command(
        "models:compare",
        "compare evaluated runs, in the terminal",
        own.compare_options,
        common=(),
    ),
    "report": Command(
        "models:report",
        "compare evaluated runs, as an HTML page",
        own.report_options,
        common=("dry-run",),
    ),
    "rollouts": Command(
        "explore:run",
        "what a trained run does in its in-context episodes",
        own.rollouts_options,
        text=(
            "Plays as cad evaluate does and tells what is explored, when the reward is first met and how "
            "far it was, beside the uniform random walk: a table, rollouts.json, and figures. Settings "
            "that are not given are those of the run."
        ),
        sections=("evaluation",),
        common=("device", "dry-run"),
    ),
    "attention": Command(
        "attention:run",
        "where a trained run looks, and what it made of the border marks",
        own.attention_options,
        text=(
            "Writes attention.json (all numbers), attention.png (attention on marked, rewarded and other "
            "tokens by head, beside what even attention and the head's preference for lags alone give), "
            "attention_map.png (one context) and, for CompressedAD, tokens.png (its border embeddings and "
            "what they change)."
        ),
        common=("dry-run",),
    ),
    "study": Command(
        "study:run",
        "a grid of variants, runs and task families, compared",
        own.study_options,
        text=(
            "Every cell goes through the same stages as the single commands and is kept: the same command "
            "again continues. Any setting of all cells may be given as --section.key VALUE."
        ),
        common=("dry-run",),
        overrides=True,
    ),
    "import": Command(
        "histories:run_import",
        "make a history file of what another program recorded",
        own.import_options,
        text=(
            "Needs the task family, and which tasks are held out: a history file says both. Actions are "
            "replayed in the family to find where episodes end and what their last steps led to; what "
            "cannot be repaired is kept, and said."
        ),
        sections=("env",),
        common=("seed", "dry-run"),
    ),
    "export": Command(
        "histories:run_export",
        "write a history file's episodes for other programs",
        own.export_options,
        common=("dry-run",),
    ),
    "check": Command(
        "check:run",
        "what is wrong with an own family, marker or learner, in sentences",
        own.check_options,
        text="Tries it on something small. Exit code 0 if it keeps its promises, else 1.",
        common=(),
    ),
    "list": Command(
        "listing:listing",
        "names to choose from",
        own.list_options,
        text=(
            "With a line about each and its parameters. All but extras may also be module:attribute, from "
            "the present folder or an installed package."
        ),
        common=(),
    ),
    "doctor": Command(
        "doctor:doctor",
        "check this installation",
        common=(),
    ),
}

_CHOICES: dict[str, tuple[str, Iterable[str]]] = {
    "COMMAND": ("command", COMMANDS),
    "WHAT": ("list", own.LISTS),
    "KIND": ("kind", own.CHECKS),
}
"""What an option with choices is called in messages, by its metavar."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument (\w+): invalid choice: '([^']*)'", message)
        if wrong:
            kind, known = _CHOICES[wrong[1]]
            message = f"unknown {kind} {wrong[2]!r}{nearest(wrong[2], known)}; one of {', '.join(known)}"
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``cad`` and return its exit code: 0, 1 run-time error, 2 usage, 130 Ctrl-C, 143 SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    stop = Stop()
    try:
        with stop.listening(), _own_modules():
            job = parse(words, stop)
            import_attribute("command", f"compressed_ad.cli.{COMMANDS[job.name].run}")(job)
    except CompressedADError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"cad: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("cad: stopped; what was finished is kept", file=sys.stderr)
        return 128 + (stop.signum or signal.SIGINT)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:  # argparse, after --help
        return int(error.code or 0)
    except Exception as error:  # memory, or a bug: say so, without burying the user
        if debug:
            traceback.print_exc()
        print(f"cad: error: {_unexpected(error)} (--debug shows more)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _own_modules() -> Iterator[None]:
    """Let ``module:attribute`` find the user's files in the present folder, after everything installed."""
    if "" in sys.path:
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _unexpected(error: Exception) -> str:
    what = str(error).partition("\n")[0]
    # PyTorch raises errors of its own: RuntimeError on the CPU, OutOfMemoryError on a GPU.
    if isinstance(error, MemoryError) or re.search(r"allocate memory|out of memory", what):
        return f"not enough memory, choose something smaller: {what}"
    return f"internal error: {type(error).__name__}: {what}"


# ---------------------------------------------------------------- parsing


def parse(words: Sequence[str], stop: Stop) -> Call:
    """The job that ``words`` ask for; ``UsageError`` lists every option that is wrong."""
    rest, overrides = _split_overrides(words)
    parser = build_parser(rest[0] if rest else None)
    if not rest:
        parser.print_help()
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(rest)
    command = COMMANDS[options.command]
    problems = [
        _unknown_option(options.command, word.partition("=")[0]) for word in unknown if word.startswith("--")
    ]
    if not problems and unknown:
        problems = [f"unexpected argument {word!r}" for word in unknown]
    allowed = [*command.sections, *(name for name in ("seed", "device") if name in command.common)]
    for key, _ in overrides:
        section = key.partition(".")[0]
        if not command.overrides and section not in allowed and (section in SECTIONS or not command.sections):
            used = ", ".join(command.sections) or "no settings"
            problems.append(
                f"--{key}: cad {options.command} does not use the section {section} (it uses {used})"
            )
    if problems:
        raise ConfigError(problems)
    given = vars(options)
    if not command.sections:
        asked = Request(overrides=overrides) if command.overrides else None
        return Call(options.command, options, asked, Display(), stop, tuple(words))
    overrides = [*_shorthands(options), *overrides]
    for name in ("seed", "device"):
        if given.get(name) is not None:
            overrides.append((name, given[name]))
    request = Request(
        preset=options.preset,
        files=tuple(options.config),
        sections={name: given[name] for name in SECTIONS if given.get(name) is not None},
        overrides=overrides,
    )
    return Call(options.command, options, request, Display(), stop, tuple(words))


def _shorthands(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The settings that ``--task-param``, ``--tasks`` and ``--learner-kwargs`` stand for."""
    given = vars(options)
    settings: list[tuple[str, str]] = []
    for text in given.get("task_param") or ():
        key, equals, values = text.partition("=")
        if not (key.isidentifier() and equals and values):
            raise UsageError(f"--task-param takes KEY=LOW:HIGH or KEY=A,B,C, not {text!r}")
        settings.append((f"env.kwargs.params.{key}", json.dumps(values)))
    if given.get("tasks") is not None and "task_param" in given:
        settings.append(("env.kwargs.n_task", str(given["tasks"])))
    for text in given.get("learner_kwargs") or ():
        key, equals, value = text.partition("=")
        if key.isidentifier() and equals:
            settings.append((f"algorithm.learner_kwargs.{key}", value))
        else:
            settings.append(("algorithm.learner_kwargs", text))
    return settings


def _unknown_option(command: str, word: str) -> str:
    hint = suggest(word[2:])
    return f"cad {command} does not take {word}" if f" {word}?" in hint else f"unknown option {word}{hint}"


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    rest, overrides = [], list[tuple[str, str]]()
    queue = list(words)
    while queue:
        word = queue.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
        elif match[2] is not None:
            overrides.append((match[1], match[2]))
        elif queue and not queue[0].startswith("--"):
            overrides.append((match[1], queue.pop(0)))
        else:
            raise UsageError(f"{word} needs a value")
    return rest, overrides


def build_parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of the command ``asked`` for; settings are in its help text only."""
    parser = _Parser(
        prog="cad",
        description="Compressed Algorithm Distillation: from learning histories to in-context learners.",
        epilog="cad COMMAND --help shows its options and every setting that it reads. Start with: cad run",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cad {metadata.version('compressed-ad')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name != asked:  # its options would cost time
            subparsers.add_parser(name, help=command.help)
            continue
        what = f"{command.help[0].upper()}{command.help[1:]}."
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description="\n\n".join(filter(None, (what, textwrap.fill(command.text, 100)))),
            epilog=_settings_help(command) if command.sections else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.options(sub)
        _common_options(sub, command)
    return parser


def _common_options(parser: argparse.ArgumentParser, command: Command) -> None:
    if command.sections:
        group = parser.add_argument_group("configuration (later ones go over earlier ones)")
        group.add_argument(
            "--preset", default="default", metavar="NAME", help=f"{', '.join(PRESETS)} (default: default)"
        )
        group.add_argument(
            "--config",
            action="append",
            default=[],
            type=Path,
            metavar="FILE",
            help="YAML file; may be repeated",
        )
        for section in ("env", "algorithm", "marker", "model"):
            if section in command.sections:
                main = SECTIONS[section][0]
                group.add_argument(
                    *dict.fromkeys((f"--{section}", f"--{main}")),
                    dest=section,
                    metavar="NAME",
                    help=f"a file for the section, a shipped one by name, or a {main}",
                )
        if "env" in command.sections:
            group.add_argument(
                "--task-param",
                action="append",
                metavar="KEY=VALUES",
                help="what tasks differ in: a range LOW:HIGH or values A,B,C (--env.kwargs.params.KEY)",
            )
            group.add_argument(
                "--tasks",
                type=own.count,
                metavar="N",
                help="tasks that are drawn (--env.kwargs.n_task)",
            )
        if "algorithm" in command.sections:
            group.add_argument(
                "--learner-kwargs",
                nargs="+",
                metavar="KEY=VALUE",
                help="hyper-parameters of the learner, or a YAML mapping (--algorithm.learner_kwargs)",
            )
        group.add_argument("--print-config", action="store_true", help="print every setting as YAML and stop")
    if "seed" in command.common:
        parser.add_argument("--seed", metavar="N", help="seed of everything random (default: 0)")
    if "device" in command.common:
        parser.add_argument("--device", metavar="WHERE", help="auto, cpu or cuda (default: auto)")
    if "dry-run" in command.common:
        parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _settings_help(command: Command) -> str:
    lines = [
        "settings, given as --section.key VALUE (YAML) or in a configuration file;",
        "defaults in brackets are those of the library, the preset's are shown by --print-config:",
    ]
    for section in command.sections:
        lines.append("")
        for key, default, words in describe(section):
            head = f"  --{key} [{default}]"
            body = textwrap.wrap(words, 74)
            lines += [head, *(f"        {line}" for line in body)]
    return "\n".join(lines)
