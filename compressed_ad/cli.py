"""The command line ``cad COMMAND``: parses, reports mistakes, stops politely; ``commands`` do the work."""

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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from compressed_ad import (
    about,
    attention_command,
    check_command,
    commands,
    exchange_command,
    rollouts_command,
    study_command,
)
from compressed_ad.config import PRESETS, SECTIONS, Request, describe, suggest
from compressed_ad.errors import CompressedADError, ConfigError, UsageError, nearest
from compressed_ad.inside import PARTS
from compressed_ad.layouts import EXPORT, LAYOUT
from compressed_ad.progress import Display

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command: what it does, the sections of the configuration that it reads, its own options."""

    run: Callable[[commands.Call], None]
    help: str
    sections: tuple[str, ...] = ()
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    text: str = ""
    common: tuple[str, ...] = field(default=("seed", "device", "dry-run"))
    overrides: bool = False  # takes --section.key without having sections of its own


def _out(default: str, what: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=Path, metavar="DIR", help=f"{what} (default: {default})")

    return add


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder, continued if it is there (default: runs/PRESET)",
    )


def _collect_options(parser: argparse.ArgumentParser) -> None:
    _out("datasets", "folder of the history file")(parser)
    parser.add_argument("--resume", action="store_true", help="continue an unfinished collection")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _mark_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a marked copy (default: mark FILE itself)"
    )


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the action probabilities with the marked segments"
    )
    parser.add_argument("--task", type=int, default=0, help="task to draw (default: 0)")
    parser.add_argument("--stream", type=int, default=0, help="stream to draw (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="STEP", help="first step drawn (default: 0)")
    parser.add_argument("--steps", type=int, default=200, help="steps drawn (default: 200)")


def _history_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--history", type=Path, metavar="FILE", help=f"history file (default: {default})")


def _train_options(parser: argparse.ArgumentParser) -> None:
    _history_option(parser, "datasets/history_..., as cad collect names it")
    _out("runs", "folder of the run directory")(parser)
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    _history_option(parser, "the one that the run was trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation with other settings")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="evaluated run directories")


def _report_options(parser: argparse.ArgumentParser) -> None:
    _compare_options(parser)
    _history_option(parser, "the one that the runs were trained on")
    _out("report", "folder of the report")(parser)


def _rollouts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="trained run directory")
    _history_option(parser, "the one that the run was trained on")
    parser.add_argument("--tasks", metavar="K,K,...", help="tasks to play (default: the held-out ones)")
    for name, what in (("episodes", "in-context episodes"), ("rollouts", "rollouts of each task")):
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=f"{what} (default: the run's)")
    _out("RUN/rollouts", "folder of what is written")(parser)
    parser.add_argument("--seed", metavar="N", help="seed of the playing (default: the run's)")


def _attention_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="trained run directory")
    _history_option(parser, "the one that the run was trained on")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default=PARTS[0],
        help=f"whose tasks' histories are looked at: {', '.join(PARTS)} (default: {PARTS[0]})",
        metavar="PART",
    )
    parser.add_argument(
        "--windows", type=_count, default=64, metavar="N", help="contexts drawn from them (default: 64)"
    )
    parser.add_argument(
        "--window", type=int, metavar="K", help="the one drawn as a map (default: marked most nearly by half)"
    )
    _out("RUN/attention", "folder of what is written")(parser)


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="STUDY.yaml", help="what is compared, on what, how often")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        metavar="DIR",
        help="output folder; studies in one folder share histories and runs (default: runs/study)",
    )
    parser.add_argument("--runs", type=_count, metavar="N", help="so many runs of each variant instead")
    parser.add_argument("--families", metavar="A,B", help="only these families")
    parser.add_argument("--variants", metavar="A,B", help="only these variants, and the baseline")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny histories and models: shows that it works, not what is true",
    )
    parser.add_argument("--process", type=_count, metavar="N", help="cells at once (default: all cores)")
    parser.add_argument("--ray", metavar="ADDRESS", help="train on a Ray cluster: its address, or auto")
    parser.add_argument(
        "--tables", type=Path, metavar="CSV", help="only print the tables of results that were kept"
    )
    parser.add_argument("--markdown", action="store_true", help="print those tables as Markdown")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="histories of another program")
    layouts = ", ".join(LAYOUT)
    parser.add_argument(
        "--layout",
        default="ancestor",
        metavar="NAME",
        help=f"how they are written: {layouts}, or module:attribute (default: ancestor)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("datasets"),
        metavar="DIR|FILE",
        help="history file, or folder of it (default: datasets)",
    )
    for name, what in (("heldout", "held-out tasks, which judge"), ("validation", "tasks that choose")):
        parser.add_argument(f"--{name}", type=exchange_command.numbers, metavar="K,K,...", help=what)
    parser.add_argument("--split-seed", type=int, metavar="N", help="draw the split with this seed instead")
    parser.add_argument(
        "--task-ids",
        type=exchange_command.task_order,
        metavar="K,K,...|match",
        help="the family's tasks that these are, in order; match: find them by their rewards "
        "(default: those of the same numbers)",
    )
    parser.add_argument(
        "--horizon", type=_count, metavar="N", help="steps of every episode, where FILE has no dones"
    )
    parser.add_argument(
        "--n-learner",
        type=_count,
        default=1,
        metavar="N",
        help="learners that share the streams (default: 1)",
    )
    parser.add_argument(
        "--steps-per-update", type=_count, metavar="N", help="steps that a policy lasts (default: unknown)"
    )
    parser.add_argument(
        "--source", default="imported", metavar="NAME", help="name of the algorithm (default: imported)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="history file")
    formats = ", ".join(EXPORT)
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"{formats}, or module:attribute")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR|FILE", help="what is written; minari: a folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _check_options(parser: argparse.ArgumentParser) -> None:
    kinds = ", ".join(check_command.CHECKS)
    parser.add_argument("kind", choices=list(check_command.CHECKS), metavar="KIND", help=kinds)
    parser.add_argument("what", metavar="NAME", help="a name (cad list), or module:attribute")
    parser.add_argument("--kwargs", default="{}", metavar="YAML", help="its parameters, e.g. '{size: 5}'")
    parser.add_argument(
        "--family", metavar="NAME", help="family that a learner is tried on (default: a small room)"
    )
    parser.add_argument("--family-kwargs", default="{}", metavar="YAML", help="parameters of that family")
    parser.add_argument(
        "--steps", type=_count, default=200, metavar="N", help="steps of a learner's streams (default: 200)"
    )


def _list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=list(about.LISTS), metavar="WHAT", help=", ".join(about.LISTS)
    )


COMMANDS = {
    "run": Command(
        commands.run,
        "the main job: collect, mark, train, evaluate, compare, report",
        tuple(SECTIONS),
        _run_options,
        "Does every stage of a preset and continues where it was interrupted. The output folder holds the\n"
        "history file, one directory per training run, and report/index.html, table.csv, summary.json.",
    ),
    "collect": Command(
        commands.collect,
        "record the learning histories of source learners",
        ("env", "algorithm", "marker"),
        _collect_options,
    ),
    "mark": Command(
        commands.mark,
        "mark a history file anew, without collecting again",
        ("marker",),
        _mark_options,
        common=("seed", "dry-run"),
    ),
    "inspect": Command(commands.inspect, "what is in a history file", (), _inspect_options, common=()),
    "train": Command(
        commands.train,
        "train one model with one seed",
        ("env", "model", "evaluation"),
        _train_options,
        "The task family and the split are those of the history file. Of the section evaluation only how\n"
        "models play matters here, since the best checkpoint is chosen by in-context return.",
    ),
    "evaluate": Command(
        commands.evaluate,
        "judge trained runs on their held-out tasks",
        ("evaluation",),
        _evaluate_options,
        "Settings that are not given are those of the run.",
        common=("device", "dry-run"),
    ),
    "compare": Command(
        commands.compare, "compare evaluated runs, in the terminal", (), _compare_options, common=()
    ),
    "report": Command(
        commands.report, "compare evaluated runs, as an HTML page", (), _report_options, common=("dry-run",)
    ),
    "rollouts": Command(
        rollouts_command.run,
        "what a trained run does in its in-context episodes",
        ("evaluation",),
        _rollouts_options,
        "Plays as cad evaluate does and tells what is explored, when the reward is first met and how far it\n"
        "was, beside the uniform random walk: a table, rollouts.json, and figures. Settings that are not\n"
        "given are those of the run.",
        common=("device", "dry-run"),
    ),
    "attention": Command(
        attention_command.run,
        "where a trained run looks, and what it made of the border marks",
        (),
        _attention_options,
        "Writes attention.json (all numbers), attention.png (attention on marked, rewarded and other tokens\n"
        "by head, beside what even attention and the head's preference for lags alone give),\n"
        "attention_map.png (one context) and, for CompressedAD, tokens.png (its border embeddings and what\n"
        "they change).",
        common=("dry-run",),
    ),
    "study": Command(
        study_command.run,
        "a grid of variants, runs and task families, compared",
        (),
        _study_options,
        "Every cell goes through the same stages as the single commands and is kept: the same command again\n"
        "continues. Any setting of all cells may be given as --section.key VALUE.",
        common=("dry-run",),
        overrides=True,
    ),
    "import": Command(
        exchange_command.run_import,
        "make a history file of what another program recorded",
        ("env",),
        _import_options,
        "Needs the task family, and which tasks are held out: a history file says both. Actions are\n"
        "replayed in the family to find where episodes end and what their last steps led to; what\n"
        "cannot be repaired is kept, and said.",
        common=("seed", "dry-run"),
    ),
    "export": Command(
        exchange_command.run_export,
        "write a history file's episodes for other programs",
        (),
        _export_options,
        common=("dry-run",),
    ),
    "check": Command(
        check_command.run,
        "what is wrong with an own family, marker or learner, in sentences",
        (),
        _check_options,
        "Tries it on something small. Exit code 0 if it keeps its promises, else 1.",
        common=(),
    ),
    "list": Command(
        about.listing,
        "names to choose from",
        (),
        _list_options,
        "With a line about each and its parameters. All but extras may also be module:attribute, from the\n"
        "present folder or an installed package.",
        common=(),
    ),
    "doctor": Command(about.doctor, "check this installation", common=()),
}


_CHOICES: dict[str, tuple[str, Iterable[str]]] = {
    "COMMAND": ("command", COMMANDS),
    "WHAT": ("list", about.LISTS),
    "KIND": ("kind", check_command.CHECKS),
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
            COMMANDS[job.name].run(job)
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


class Stop:
    """Ctrl-C and SIGTERM: usually an exception at once; inside ``politely`` a wish that work looks for."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._polite = False

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside; only possible in the main thread."""
        try:
            before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def politely(self) -> Iterator[None]:
        """Work inside looks whether it should stop; a second signal does not wait for it."""
        self._polite = True
        try:
            yield
        finally:
            self._polite = False
        if self.signum is not None:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: Any) -> None:
        first, self.signum = self.signum is None, number
        if not (self._polite and first):
            raise KeyboardInterrupt
        print("cad: saving (once more to stop at once)", file=sys.stderr)


# ---------------------------------------------------------------- parsing


def parse(words: Sequence[str], stop: Stop) -> commands.Call:
    """The job that ``words`` ask for; ``UsageError`` lists every option that is wrong."""
    rest, overrides = _split_overrides(words)
    parser = build_parser()
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
        return commands.Call(options.command, options, asked, Display(), stop, tuple(words))
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
    return commands.Call(options.command, options, request, Display(), stop, tuple(words))


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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; settings are not among its options but in its help texts."""
    parser = _Parser(
        prog="cad",
        description="Compressed Algorithm Distillation: from learning histories to in-context learners.",
        epilog="cad COMMAND --help shows its options and every setting that it reads. Start with: cad run",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cad {metadata.version('compressed-ad')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.\n\n{command.text}".rstrip(),
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
                "--tasks", type=_count, metavar="N", help="tasks that are drawn (--env.kwargs.n_task)"
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


if __name__ == "__main__":
    sys.exit(main())
