"""The command line: `hopdeq-lwpf COMMAND`. Reads options and shows results; the work is done elsewhere.

Nothing heavy is imported before a command runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from hopdeq_lwpf import settings
from hopdeq_lwpf.arguments import assigned, assigned_keys, documents_of, flagged, together
from hopdeq_lwpf.complaints import explained, located, nearest
from hopdeq_lwpf.documents import Document
from hopdeq_lwpf.imports import FLAG, allow
from hopdeq_lwpf.sweeps.listing import ListSpec, listing
from hopdeq_lwpf.sweeps.reports.spec import ReportSpec
from hopdeq_lwpf.sweeps.spec import CompareSpec, RetrieveSpec, SpecError
from hopdeq_lwpf.sweeps.study_arguments import with_tasks
from hopdeq_lwpf.sweeps.study_spec import RETRIEVAL, TASKS, StudySpec
from hopdeq_lwpf.sweeps.sweep_spec import Cell, SweepSpec
from hopdeq_lwpf.training.spec import TrainSpec

PROGRAM = "hopdeq-lwpf"
MARK = "grid"  # the key that settings of a sweep have and those of a comparison have not
USAGE_ERROR, INTERRUPTED = 2, 130  # what shells and other tools use for these
LINES = 48  # of a table of a sweep that are shown
DRY_RUN, LIVE = "dry-run", "live"
IMPORT = {FLAG: "settings may name classes of your own, package.module:Class, and so are code; else refused"}


class _UsageError(Exception):
    """What the parser objects to."""


class _Parser(ArgumentParser):
    """Raises instead of printing the usage: one line says what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise _UsageError(message) from ex


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings class, what it does, and the work.

    work: takes the settings and the names of the flags that were given.
    """

    settings: type
    help: str
    work: Callable[[Any, frozenset[str]], None]
    presets: tuple[str, str] | None = None  # (kind, prefix): the files KIND/PREFIX*.yaml may be named first
    marked: bool | None = None  # of those, only the ones with (without) the key that marks a sweep
    tasks: bool = False  # --task chooses between this and a study
    first: str | None = None  # the setting that a first word without dashes is
    flags: Mapping[str, str] = field(default_factory=dict)  # --NAME and its help: no settings, and in no file


def _compare(spec: CompareSpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import console, show_all
    from hopdeq_lwpf.sweeps.compare import run
    from hopdeq_lwpf.sweeps.reports.summary import findings, summaries

    comparison, paths = run(spec, console(stderr=True))
    show_all(summaries(comparison), findings(comparison), paths)


def _study(spec: StudySpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import console, show_all
    from hopdeq_lwpf.sweeps.reports.study_results import findings, summaries
    from hopdeq_lwpf.sweeps.study import run

    study, paths = run(spec, console(stderr=True))
    show_all(summaries(study), findings(study), paths)


def _sweep(spec: SweepSpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import console, show_all

    if DRY_RUN in flags:
        from hopdeq_lwpf.sweeps.estimate import plan

        show_all(*plan(spec, LINES))
        return
    from hopdeq_lwpf.sweeps.reports.sweep_results import findings, summaries
    from hopdeq_lwpf.sweeps.sweep import run

    sweep, paths = run(spec, console(stderr=True))
    show_all(summaries(sweep, LINES), findings(sweep), paths)


def _report(spec: ReportSpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import show_all
    from hopdeq_lwpf.sweeps.reports.folder import report, serve

    if LIVE in flags:
        serve(spec)
        return
    grids, sentences, paths = report(spec)
    show_all(grids, sentences, paths)


def _list(spec: ListSpec, flags: frozenset[str]) -> None:
    parts = []
    for title, entries in listing(spec.kind).items():
        width = max(len(name) for name, _ in entries)
        parts.append("\n".join([title, *(f"  {name:{width}}  {line}".rstrip() for name, line in entries)]))
    sys.stdout.write("\n\n".join(parts) + "\n")


def _retrieve(spec: RetrieveSpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import console, say, show
    from hopdeq_lwpf.sweeps.recall_files import recall_files

    recalled = recall_files(spec, console(stderr=True))
    show(recalled.grid())
    if recalled.failure is not None:
        say(f"warning: {recalled.failure}")
    say(f"written: {spec.out}")


def _train(spec: TrainSpec, flags: frozenset[str]) -> None:
    from hopdeq_lwpf.console import console, show_all
    from hopdeq_lwpf.training.run import is_first_process, train

    trained = train(spec, console=console(stderr=True))
    if is_first_process():
        show_all((), (), trained.files.values())


COMMANDS = {
    "compare": Command(
        CompareSpec,
        "one-step against converged retrieval, with and without forgetting: table, pictures, report",
        _compare,
        presets=("sweeps", ""),
        marked=False,
        tasks=True,
        flags=IMPORT,
    ),
    "retrieve": Command(RetrieveSpec, "recall stored patterns for the queries of a file", _retrieve),
    "train": Command(
        TrainSpec,
        "train a network with equilibrium layers; a killed run goes on exactly with --resume true",
        _train,
        presets=("models", "train_"),
        flags=IMPORT,
    ),
    "sweep": Command(
        SweepSpec,
        "a grid of trainings over seeds: table, pairs, pictures, report; started again, it goes on with what is "
        "missing",
        _sweep,
        presets=("sweeps", ""),
        marked=True,
        flags={**IMPORT, DRY_RUN: "only say what would be run, what is finished and how long it may take"},
    ),
    "report": Command(
        ReportSpec,
        "the report of a sweep or study from the trials that its folder holds, finished or not; runs nothing",
        _report,
        first="study",
        flags={LIVE: "serve optuna-dashboard instead, to this machine alone (extra dashboard)"},
    ),
    "list": Command(
        ListSpec, "the names that settings may use: models, solvers, sweeps, tasks, ...", _list, first="kind"
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
    flags=IMPORT,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C.

    A mistake is one line on stderr. Anything else that goes wrong is a defect and shows its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: Mapping[str, Command] = COMMANDS
    documents: list[Document] = []
    try:
        given = _with_first(given)
        documents = documents_of(given)
        if given and given[0] in COMMANDS and COMMANDS[given[0]].tasks:
            tasks, given = with_tasks(given)
            commands = {**COMMANDS, given[0]: STUDY} if tasks else COMMANDS
        keys: list[str] = []
        if given and given[0] == "sweep":
            keys, given = assigned_keys(given), assigned(given)
        given, flags = flagged(given, commands[given[0]].flags if given and given[0] in commands else ())
        if FLAG in flags:
            allow()
        given = together(given)
        chosen = _parser(commands).parse_args(given)
        command = commands[chosen.command]
        # as_dict, since a setting called "values" would meet the method of the same name.
        values = chosen[chosen.command].as_dict()
        del values["config"]
        spec = command.settings(**values)
        if isinstance(spec, SweepSpec):
            _check_assigned(spec, keys)
        command.work(spec, flags)
    except _UsageError as error:
        return _complain(_explain(str(error), given, commands), documents, given)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output went away, as `| head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        if not _is_mistake(error):
            raise
        return _complain(str(error), documents if isinstance(error, SpecError) else (), given)
    return 0


def _check_assigned(spec: SweepSpec, keys: Sequence[str]) -> None:
    """SpecError for a --set that no cell of the sweep takes, since grid and rules are said later, and win."""
    for key in keys:
        free = [cell for cell in spec.cells() if key not in _own_settings(spec, cell)]
        if not free:
            raise SpecError(
                f"--set {key}: every cell sets {key!r} itself, so that this would change nothing; choose levels with "
                "--only, or change the grid or the space of the search"
            )


def _own_settings(spec: SweepSpec, cell: Cell) -> set[str]:
    """The settings that the grid, the search and the rules change in a cell."""
    own = {
        name
        for f, levels in spec.factors().items()
        for x in levels
        if x.name == cell.level(f)
        for name, _ in x.changes
    }
    search = spec.sought()
    own |= set() if search is None else set(search.space)
    return own | {name for rule in spec.rules if cell.matches(rule["where"]) for name in rule["set"]}


def _with_first(given: list[str]) -> list[str]:
    """What may follow the command without an option: the name or file of settings as --config, else its setting."""
    command = COMMANDS.get(given[0]) if given else None
    if command is None or len(given) < 2 or given[1].startswith("-"):
        return given
    if command.first is not None:
        return [given[0], f"--{command.first}", *given[1:]]
    if command.presets is None:
        return given
    name, (kind, prefix) = given[1], command.presets
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return [given[0], "--config", name, *given[2:]]
    known = _named(command)
    for candidate in (name, f"{prefix}{name}"):
        if candidate in known:
            return [given[0], "--config", str(settings.path_of(kind, candidate)), *given[2:]]
    short = [entry.removeprefix(prefix) for entry in known]
    near = nearest(name.removeprefix(prefix), short)
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


def _complain(message: str, documents: Sequence[Document], given: Sequence[str]) -> int:
    line = " ".join(located(message, documents, given).split())
    sys.stderr.write(f"{PROGRAM}: error: {line}\n")
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
    for name, text in command.flags.items():
        parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
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
    if command.first is not None:
        return f"{command.help}. --{command.first} may be left out before its value if that comes first."
    if command.presets is None:
        return command.help
    short = ", ".join(entry.removeprefix(command.presets[1]) for entry in _named(command))
    return f"{command.help}. First, if you like, the name of settings ({short}) or their YAML file."


def _explain(message: str, given: Sequence[str], commands: Mapping[str, Command]) -> str:
    name = next((word for word in given if word in commands), None)
    command = commands[name] if name else None
    options = [entry.name for entry in fields(command.settings)] + ["config"] if command else []
    options += [*command.flags, *(["task"] if command.tasks else [])] if command else []
    return explained(message, COMMANDS, options, _others(command))


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


if __name__ == "__main__":
    sys.exit(main())
