"""The command line ``cad COMMAND``: parses it, calls the command, and reports errors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from compressed_ad.cli import call as cli, torchrun
from compressed_ad.cli.display import Display, complain, drop, lenient_streams, print_lines
from compressed_ad.errors import (
    CompressedADError,
    ConfigError,
    UsageError,
    did_you_mean,
    one_line,
    raised,
    users_line,
)
from compressed_ad.registry import import_attribute, own_names, search_current_folder
from compressed_ad.runs.layers import PRESETS, SECTIONS, Request, describe, shipped_configs, suggest

COMMANDS = {
    "run": ("run:RUN", "the main job: collect, mark, train, evaluate, compare, report"),
    "collect": ("histories:COLLECT", "record the learning histories of source learners"),
    "mark": ("histories:MARK", "mark a history file again, without collecting again"),
    "inspect": ("histories:INSPECT", "show what is in a history file"),
    "train": ("models:TRAIN", "train one model with one seed"),
    "evaluate": ("models:EVALUATE", "evaluate trained runs on their held-out tasks"),
    "compare": ("models:COMPARE", "compare evaluated runs, in the terminal"),
    "report": ("models:REPORT", "compare evaluated runs, as an HTML page"),
    "rollouts": ("look:ROLLOUTS", "what a trained run does in its in-context episodes"),
    "attention": ("look:ATTENTION", "where a trained run looks, and what its border embeddings do"),
    "study": ("study:STUDY", "compare a grid of variants, runs and task families"),
    "import": ("histories:IMPORT", "make a history file from what another program recorded"),
    "export": ("histories:EXPORT_COMMAND", "write a history file's episodes for other programs"),
    "check": ("listing:CHECK", "test your own family, marker or learner and list what is wrong"),
    "list": ("listing:LISTING", "names to choose from"),
    "doctor": ("listing:DOCTOR", "check this installation"),
}
"""For each command its ``file:name`` in this folder, imported when the command is asked for, and its help."""

_OWN_CODE = ("trust", "layout", "to", "what", "kwargs", "family", "family_kwargs")
"""Options that may name code of the user's own, besides the configuration."""

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``cad`` and return its exit code: 0, 1 run-time error, 2 usage, 130 Ctrl-C, 143 SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    stop, command = cli.Stop(), None
    with lenient_streams():
        try:
            with stop.listening(), _search_path(), torchrun.one_voice():
                call = parse(words, stop)
                command = load_command(call.name)
                if not command.torchrun and torchrun.started() > 1:
                    raise UsageError(
                        f"cad {call.name} starts its own processes: give it without torchrun, which is for"
                        " cad train alone"
                    )
                command.run(call)
        except BrokenPipeError:  # the reader of our output has closed it
            drop(sys.stdout)
            return 1
        except BaseException as error:
            if isinstance(error, SystemExit) and not users_line(error):  # argparse, after --help
                return int(error.code or 0)
            say = complain if torchrun.first_to_fail() else lambda text: None
            if "--debug" in words:
                say(traceback.format_exc())
            if isinstance(error, KeyboardInterrupt):
                how = f", and {command.continued}" if command and command.continued else ""
                say(f"cad: stopped; what was finished is kept{how}")
                return 128 + (stop.signum or signal.SIGINT)
            for line in _explanation(error).splitlines():
                say(f"cad: error: {line}")
            return getattr(error, "exit_code", 1)
    return 0


def cad(*words: object) -> int:
    """Run ``cad WORDS`` from Python and return its exit code: ``cad("train", "--model.lr", 1e-3)``.

    A script calls this under ``if __name__ == "__main__":``, because worker processes import the script.
    """
    return main([str(word) for word in words])


_ADVICE = {
    errno.EMFILE: "; raise the limit of open files (ulimit -n)",
    errno.EEXIST: "; choose another path",
    errno.ENOTDIR: "; choose another path",
    errno.ENAMETOOLONG: "; choose shorter names",
    errno.EROFS: "; choose a folder that can be written",
    errno.EACCES: "; choose a folder that can be written",
    errno.ENOSPC: "; make room and give the same command again",
}


def _explanation(error: BaseException) -> str:
    what = one_line(error)
    if isinstance(error, CompressedADError):
        return str(error)
    # PyTorch raises its own errors: RuntimeError on the CPU, OutOfMemoryError on a GPU.
    if isinstance(error, MemoryError) or re.search(r"allocate memory|out of memory", what):
        return f"not enough memory, choose something smaller: {what} (--debug shows more)"
    if users_line(error):
        return f"{raised(error)}; --debug shows more"
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}{_ADVICE.get(error.errno, '')} (--debug shows more)"
    return f"internal error: {type(error).__name__}: {what} (--debug shows more)"


@contextlib.contextmanager
def _search_path() -> Iterator[None]:
    """Undo at the end what ``search_current_folder`` does inside."""
    before = list(sys.path)
    try:
        yield
    finally:
        if "" not in before and "" in sys.path:
            sys.path.remove("")


# ---------------------------------------------------------------- parsing


def load_command(name: str) -> cli.Command:
    """The command of that name, from its file."""
    command: cli.Command = import_attribute("command", f"compressed_ad.cli.{COMMANDS[name][0]}")
    return command


def parse(words: Sequence[str], stop: cli.Stop) -> cli.Call:
    """The call that ``words`` ask for; ``UsageError`` lists every option that is wrong."""
    rest, overrides = _split_overrides(words)
    asked = rest[0] if rest and not rest[0].startswith("-") else None
    if asked is None and rest and rest[0] not in ("-h", "--help", "--version"):
        raise UsageError(f"the command comes first: cad COMMAND {rest[0]} (see cad --help)")
    if asked in ("help", "version"):
        raise UsageError(f"unknown command {asked!r}{did_you_mean(f'--{asked}')}")
    command = None if asked is None else load_command(cli.one_of("command", COMMANDS)(asked))
    parser = _parser(asked, command)
    if not rest:
        parser.print_help()
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(rest)
    assert command is not None  # otherwise the parser has stopped
    name, problems = options.command, []
    settings = tuple(SECTIONS) if command.overrides else command.sections
    for given in (word.partition("=")[0] for word in unknown if word.startswith("--")):
        if given[2:] in {*cli.Command.common, *SECTIONS}.difference(settings):  # others take it
            problems.append(f"cad {name} does not take {given}")
        else:
            hint = did_you_mean(suggest(given[2:], parser.own, settings))
            problems.append(f"unknown option {given}{hint}")
    if unknown and not problems:
        problems = [f"unexpected argument {word!r}{_meant(word, parser.own)}" for word in unknown]
    for key, _ in () if command.overrides else overrides:
        section, used = key.partition(".")[0], ", ".join(command.sections) or "no settings"
        # Misspelled sections are found later.
        known = section in SECTIONS or not command.sections
        if known and section not in (*command.sections, *command.common):
            problems.append(f"--{key}: cad {name} does not use the section {section} (it uses {used})")
    if problems:
        raise ConfigError(problems)
    request = Request(overrides=[*getattr(options, "settings", []), *overrides])
    if command.sections:
        sections = {
            key: value for key, value in vars(options).items() if key in SECTIONS and value is not None
        }
        request = Request(options.preset, tuple(options.config), sections, [*options.settings, *overrides])
    search_current_folder(own_names([getattr(options, key, "") for key in _OWN_CODE]))
    return cli.Call(name, options, request, Display(), stop, " ".join(["cad", *words]), command.sections)


def _meant(word: str, own: Sequence[str]) -> str:
    """A hint at the option of the command that a ``word`` without one probably belongs to, or nothing."""
    if word[-1:] in ("]", "}"):
        return "; a value with spaces needs quotes"
    option = "--preset" if word in PRESETS else "--history" if word.endswith(".hdf5") else "--config"
    known = option != "--config" or word in shipped_configs()
    return did_you_mean(f"{option} {word}" if known and option in own else "")


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words without ``--section.key VALUE``, and these as (key, value)."""
    rest, overrides, left = list[str](), list[tuple[str, str]](), iter(words)
    for word in left:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        value = next(left, "--") if match[2] is None else match[2]
        if match[2] is None and value.startswith("--"):
            raise UsageError(f"{word} needs a value")
        overrides.append((match[1], value))
    return rest, overrides


# ---------------------------------------------------------------- options and help


class _Parser(argparse.ArgumentParser):
    own: Sequence[str] = ()  # the options of the command

    def _print_message(self, message: str, file: object = None) -> None:
        print_lines(message)  # argparse itself drops what cannot be written

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser(asked: str | None, command: cli.Command | None) -> _Parser:
    """The parser, with options only for the command that is ``asked`` for; its help also lists settings."""
    parser = _Parser(
        prog="cad",
        usage="cad [-h] [--version] COMMAND ...",
        description="Compressed Algorithm Distillation: from learning histories to in-context learners.",
        epilog="cad COMMAND --help shows its options and every setting that it reads. Start with: cad run",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cad {metadata.version('compressed-ad')}")
    # The longer metavar leaves enough room for the names of the commands below it.
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND ...", prog="cad")
    for name, (_, words) in COMMANDS.items():
        if name != asked or command is None:
            subparsers.add_parser(name, help=words)
            continue
        what = f"{words[0].upper()}{words[1:]}."
        sub = subparsers.add_parser(
            name,
            help=words,
            description="\n\n".join(filter(None, (what, textwrap.fill(command.text, 100)))),
            epilog=_settings_help(command) if command.sections else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for add in command.options:
            add(sub)
        if command.sections:
            _configuration_options(sub, command)
        if "seed" in command.common:
            what = "seed of everything random (default: 0)"
            cli.setting_option("--seed", "seed", "N", what)(sub)
        if "device" in command.common:
            where = "auto, cpu or cuda (default: auto)"
            cli.setting_option("--device", "device", "WHERE", where)(sub)
        if "dry-run" in command.common:
            cli.flag("--dry-run", "say what would be done and stop")(sub)
            trusted = "module:attribute of code that files may name; may be repeated"
            cli.option("--trust", "NAME", trusted, action="append", default=[])(sub)
        cli.flag("--debug", "show tracebacks")(sub)
        parser.own = [word for action in sub._actions for word in action.option_strings]
    return parser


def _configuration_options(parser: argparse.ArgumentParser, command: cli.Command) -> None:
    group = parser.add_argument_group("configuration (later ones go over earlier ones)")
    cli.option("--preset", "NAME", ", ".join(PRESETS), default="default")(group)
    files = "YAML file, or a shipped one by name (cad list configs); may be repeated"
    group.add_argument("--config", action="append", default=[], type=Path, metavar="FILE|NAME", help=files)
    for section in command.sections:
        if main := SECTIONS[section][0]:
            names = dict.fromkeys((f"--{section}", f"--{main}"))
            what = f"a file for the section, a shipped one by name, or a {main}"
            group.add_argument(*names, dest=section, metavar="NAME", help=what)
    if "env" in command.sections:
        differ = "what tasks differ in: a range LOW:HIGH or values A,B,C (--env.kwargs.params.KEY)"
        cli.settings_option("--task-param", _task_param, "KEY=VALUES", differ)(group)
        drawn = "tasks that are drawn (--env.kwargs.n_task)"
        cli.setting_option("--tasks", "env.kwargs.n_task", "N", drawn, cli.count)(group)
    if "algorithm" in command.sections:
        about = "hyper-parameters of the learner, or a YAML mapping (--algorithm.learner_kwargs)"
        several = {"nargs": "+", "action": "extend"}
        cli.settings_option("--learner-kwargs", _learner_kwarg, "KEY=VALUE", about, **several)(group)
    cli.flag("--print-config", "print every setting as YAML and stop")(group)


def _task_param(text: str) -> tuple[str, str]:
    key, _, values = text.partition("=")
    if not (key.isidentifier() and values):
        raise UsageError(f"--task-param takes KEY=LOW:HIGH or KEY=A,B,C, not {text!r}")
    return f"env.kwargs.params.{key}", json.dumps(values)


def _learner_kwarg(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if key.isidentifier() and equals:
        return f"algorithm.learner_kwargs.{key}", value
    return "algorithm.learner_kwargs", text


def _settings_help(command: cli.Command) -> str:
    lines = [
        "settings, given as --section.key VALUE (YAML) or in a configuration file;",
        "defaults in brackets are those of the library, the preset's are shown by --print-config:",
    ]
    for section in command.sections:
        lines.append("")
        for key, default, words in describe(section):
            lines += [f"  --{key} [{default}]", textwrap.indent(textwrap.fill(words, 74), " " * 8)]
    return "\n".join(lines)
