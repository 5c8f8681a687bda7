"""Which kind of comparison the arguments of `compare` ask for. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import yaml

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.arguments import settings_of
from hopdeq_lwpf.sweeps.study_spec import RETRIEVAL, task_name


def with_tasks(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tasks that are trained, none for a comparison of retrieval; and the arguments as that parser wants them.

    arguments: the command and what follows. The tasks stand behind --task, or under "task" in a file of --config;
    the command line wins over files. Raises SpecError for a task that is not known or does not go with another.
    """
    tasks, rest = _given(arguments)
    from_file, rest = _configured(rest)
    tasks = from_file if tasks is None else tasks
    if tasks is None:
        return [], rest
    names = [task_name(name, (RETRIEVAL,)) for name in tasks]
    if RETRIEVAL in names and len(names) > 1:
        raise SpecError(f"task {RETRIEVAL!r} trains nothing and stands alone, got {names}")
    if names == [RETRIEVAL]:
        return [], rest
    if not names:
        raise SpecError("task is empty: give at least one")
    return names, [*rest, "--task", *names]


def _given(arguments: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """The words behind the last --task, and all other arguments."""
    tasks: list[str] | None = None
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, equal, value = word.partition("=")
        if option != "--task":
            rest.append(word)
            continue
        tasks = [value] if equal else [*itertools.takewhile(lambda entry: not entry.startswith("-"), words)]
        del words[: 0 if equal else len(tasks)]
    return tasks, rest


def _configured(arguments: Sequence[str]) -> tuple[list[Any] | None, list[str]]:
    """The tasks that the last --config with any names, and the arguments without them."""
    tasks: list[Any] | None = None
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, equal, value = word.partition("=")
        if option != "--config" or not (equal or words):
            rest.append(word)
            continue
        config = value if equal else words.pop(0)
        content = settings_of(config)
        if content is not None and "task" in content:
            named = content.pop("task")
            tasks = named if isinstance(named, list) else [named]
            # The parser takes the text of a file as well as its name.
            config = yaml.safe_dump(content, sort_keys=False)
        rest += ["--config", config]
    return tasks, rest
