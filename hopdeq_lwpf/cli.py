"""The command line: `hopdeq-lwpf COMMAND`. Reads options and shows results; the work is done elsewhere.

Nothing heavy is imported before a command runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from hopdeq_lwpf import settings
from hopdeq_lwpf.arguments import together
from hopdeq_lwpf.sweeps.spec import CompareSpec, RetrieveSpec, SpecError
from hopdeq_lwpf.sweeps.study_arguments import with_tasks
from hopdeq_lwpf.sweeps.study_spec import RETRIEVAL, TASKS, StudySpec
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec
from hopdeq_lwpf.training.spec import TrainSpec

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from hopdeq_lwpf.sweeps.summary import Grid

PROGRAM = "hopdeq-lwpf"
MARK = "grid"  # the key that settings of a sweep have and those of a comparison have not
USAGE_ERROR, INTERRUPTED = 2, 130  # what shells and other tools use for these
LINES = 48  # of a table of a sweep that are shown
LOG_WIDTH = 200  # columns where there is no terminal that would say


class _UsageError(Exception):
    """What the parser objects to."""


class _Parser(ArgumentParser):
    """Raises instead of printing the usage: one line says what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise _UsageError(message) from ex


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings class, what it does, and the work."""

    settings: type
    help: str
    work: Callable[[Any], None]
    presets: tuple[str, str] | None = None  # (kind, prefix): the files KIND/PREFIX*.yaml may be named first
    marked: bool | None = None  # of those, only the ones with (without) the key that marks a sweep
    tasks: bool = False  # --task chooses between this and a study


def _compare(spec: CompareSpec) -> None:
    from hopdeq_lwpf.sweeps.compare import run
    from hopdeq_lwpf.sweeps.summary import findings, summaries

    comparison, paths = run(spec, _console(stderr=True))
    _show_all(summaries(comparison), findings(comparison), paths)


def _study(spec: StudySpec) -> None:
    from hopdeq_lwpf.sweeps.study import run
    from hopdeq_lwpf.sweeps.study_results import findings, summaries

    study, paths = run(spec, _console(stderr=True))
    _show_all(summaries(study), findings(study), paths)


def _sweep(spec: SweepSpec) -> None:
    from hopdeq_lwpf.sweeps.sweep import run
    from hopdeq_lwpf.sweeps.sweep_results import findings, summaries

    sweep, paths = run(spec, _console(stderr=True))
    _show_all(summaries(sweep, LINES), findings(sweep), paths)


def _retrieve(spec: RetrieveSpec) -> None:
    from hopdeq_lwpf.sweeps.recall_files import recall_files

    recalled = recall_files(spec, _console(stderr=True))
    console = _console()
    _show(recalled.grid(), console)
    if recalled.failure is not None:
        console.print(f"warning: {recalled.failure}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {spec.out}", markup=False, highlight=False, soft_wrap=True)


def _train(spec: TrainSpec) -> None:
    from hopdeq_lwpf.training.run import is_first_process, train

    trained = train(spec, console=_console(stderr=True))
    if not is_first_process():
        return
    console = _console()
    console.print("written:", highlight=False)
    for path in trained.files.values():
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


COMMANDS = {
    "compare": Command(
        CompareSpec,
        "one-step against converged retrieval, with and without forgetting: table, pictures, report",
        _compare,
        presets=("sweeps", ""),
        marked=False,
        tasks=True,
    ),
    "retrieve": Command(RetrieveSpec, "recall stored patterns for the queries of a file", _retrieve),
    "train": Command(
        TrainSpec,
        "train a network with equilibrium layers; a killed run goes on exactly with --resume true",
        _train,
        presets=("models", "train_"),
    ),
    "sweep": Command(
        SweepSpec,
        "a grid of trainings over seeds: table, pairs, pictures, report; started again, it goes on with what is "
        "missing",
        _sweep,
        presets=("sweeps", ""),
        marked=True,
    ),
}
# What `compare` does with a task that is trained.
STUDY = Command(
    StudySpec,
    "one step against equilibrium in training, with and without forgetting: a grid of trainings over seeds; "
    "started again, it goes on with what is missing",
    _study,
    presets=("sweeps", ""),
    marked=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C.

    A mistake is one line on stderr. Anything else that goes wrong is a defect and shows its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: Mapping[str, Command] = COMMANDS
    try:
        given = _with_preset(given)
        if given and given[0] in COMMANDS and COMMANDS[given[0]].tasks:
            tasks, given = with_tasks(given)
            commands = {**COMMANDS, given[0]: STUDY} if tasks else COMMANDS
        given = together(given)
        chosen = _parser(commands).parse_args(given)
        command = commands[chosen.command]
        # as_dict, since a setting called "values" would meet the method of the same name.
        values = chosen[chosen.command].as_dict()
        del values["config"]
        command.work(command.settings(**values))
    except _UsageError as error:
        return _complain(_explain(str(error), given, commands))
    except UnicodeDecodeError as error:
        return _complain(f"a settings file is not UTF-8 text ({error.reason})")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output went away, as `| head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        if not _is_mistake(error):
            raise
        return _complain(str(error))
    return 0


def _with_preset(given: list[str]) -> list[str]:
    """The name or file of settings that may follow the command, as --config with that file."""
    command = COMMANDS.get(given[0]) if given else None
    if command is None or command.presets is None or len(given) < 2 or given[1].startswith("-"):
        return given
    name, (kind, prefix) = given[1], command.presets
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return [given[0], "--config", name, *given[2:]]
    known = _named(command)
    for candidate in (name, f"{prefix}{name}"):
        if candidate in known:
            # --config takes the text of a YAML file as well as its name.
            return [
                given[0],
                "--config",
                yaml.safe_dump(settings.find(kind, candidate), sort_keys=False),
                *given[2:],
            ]
    short = [entry.removeprefix(prefix) for entry in known]
    near = _nearest(name.removeprefix(prefix), short)
    raise _UsageError(
        f"settings {name!r} are not one of {', '.join(short)}"
        + (f"; did you mean {near!r}?" if near else ", nor the name of a .yaml file")
    )


def _named(command: Command) -> list[str]:
    """The files that may follow a command by name."""
    assert command.presets is not None
    kind, prefix = command.presets
    found = [entry for entry in settings.names(kind) if entry.startswith(prefix)]
    if command.marked is None:
        return found
    return [entry for entry in found if (MARK in settings.find(kind, entry)) == command.marked]


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, (SpecError, OSError)):
        return True
    # Imported here, not at the top: files are read with torch, which a wrong option does without.
    from hopdeq_lwpf.data import DataError

    return isinstance(error, DataError)


def _complain(message: str) -> int:
    sys.stderr.write(f"{PROGRAM}: error: {' '.join(message.split())}\n")
    return USAGE_ERROR


def _parser(available: Mapping[str, Command]) -> ArgumentParser:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("hopdeq-lwpf")
    except PackageNotFoundError:  # run from a checkout that is not installed
        installed = "unknown"
    parser = _Parser(
        prog=PROGRAM,
        version=installed,
        allow_abbrev=False,
        description="Modern Hopfield networks with partial forgetting as fixed-point functions.",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in available.items():
        commands.add_subcommand(name, _subparser(command), help=command.help)
    return parser


def _subparser(command: Command) -> ArgumentParser:
    parser = _Parser(allow_abbrev=False, description=_description(command))
    parser.add_argument("--config", action="config", help="YAML file of settings; later options win over it")
    types = get_type_hints(command.settings)
    for entry in fields(command.settings):
        kind, default = types[entry.name], entry.default
        if default is MISSING:
            assert entry.default_factory is not MISSING
            default = entry.default_factory()
        several = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
        parser.add_argument(
            f"--{entry.name}",
            type=get_args(kind)[0] if several else kind,
            default=list(default) if isinstance(default, tuple) else default,
            help=entry.metadata["help"],
            nargs="*" if several else None,
        )
    if command.tasks:
        trained = ", ".join(TASKS)
        parser.add_argument(
            "--task",
            type=str,
            default=argparse.SUPPRESS,
            help=f"{RETRIEVAL} (default), or what is trained: {trained}, which has other options: see "
            f"{PROGRAM} compare --task {next(iter(TASKS))} --help",
        )
    return parser


def _description(command: Command) -> str:
    if command.presets is None:
        return command.help
    short = ", ".join(entry.removeprefix(command.presets[1]) for entry in _named(command))
    return f"{command.help}. First, if you like, the name of settings ({short}) or their YAML file."


def _explain(message: str, given: Sequence[str], commands: Mapping[str, Command]) -> str:
    """The parser's objection in one line, with the nearest name that would have been right."""
    name = next((word for word in given if word in commands), None)
    command = commands[name] if name else None
    options = [entry.name for entry in fields(command.settings)] + ["config"] if command else []
    options += ["task"] if command and command.tasks else []
    others = _others(command)
    found = re.search(r"unrecognized arguments: (.*)", message)
    if found:
        wrong = found[1].split()[0]
        plain = wrong.lstrip("-").split("=")[0].split(".")[0].replace("-", "_")
        near = _nearest(plain, [*options, "print_config", "help"])
        if plain in others:
            return f"{wrong!r} {others[plain]}" + (f"; or did you mean '--{near}'?" if near else "")
        return f"unknown option {wrong!r}" + (
            f"; did you mean '--{near}'?" if near else f"; see {PROGRAM} --help"
        )
    found = re.search(r"does not accept option '([^']*)'", message)
    if found:
        if found[1] in others:
            return f"{found[1]!r} {others[found[1]]}"
        near = _nearest(found[1], options)
        return f"unknown key {found[1]!r} in the settings" + (f"; did you mean {near!r}?" if near else "")
    found = re.search(r"invalid choice: '([^']*)'", message)
    if found or 'expected "command"' in message:
        near = _nearest(found[1], COMMANDS) if found else None
        hint = f"; did you mean {near!r}?" if near else f"; it must be one of {', '.join(COMMANDS)}"
        return (f"unknown command {found[1]!r}" if found else "a command is missing") + hint
    if "does not support item assignment" in message:
        return "a setting that takes several values got one in the settings file: write it as a list, [VALUE]"
    message = message.replace("Parser key ", "").replace("Problems parsing config: ", "settings file: ")
    return re.sub(r"<class '(\w+)'>", r"\1", message)


def _others(command: Command | None) -> dict[str, str]:
    """The options that only the other kind of a comparison has, with what to say about them."""
    if command is None or not (command.tasks or command is STUDY):
        return {}
    own = {entry.name for entry in fields(command.settings)}
    if command is STUDY:
        said = f"is an option of --task {RETRIEVAL}; a task that is trained has others: see compare --task bit-pattern"
        names = {entry.name for entry in fields(CompareSpec)}
    else:
        said = (
            f"needs a task that is trained: --task, one of {', '.join(TASKS)}; see compare --task bit-pattern"
        )
        names = {entry.name for entry in fields(StudySpec)} - {"task"}
    return {name: f"{said} --help" for name in names - own}


def _nearest(name: str, allowed: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return near[0] if near else None


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=LOG_WIDTH)


def _show_all(grids: Iterable[Grid], sentences: Iterable[str], paths: Iterable[Path]) -> None:
    console = _console()
    for grid in grids:
        _show(grid, console)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print("\nwritten:", highlight=False)
    for path in paths:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


def _show(grid: Grid, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=grid.title, title_justify="left", box=box.SIMPLE, show_header=any(grid.header))
    for number, name in enumerate(grid.header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for line in grid.lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
