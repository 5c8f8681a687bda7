"""What a sweep is asked to do: a grid of changes to named settings. Imports no torch, so that mistakes are quick."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hopdeq_lwpf import settings
from hopdeq_lwpf._checks import SpecError, choice, did_you_mean, forms, number, option, whole
from hopdeq_lwpf.sweeps.engine.executors import parse_executor
from hopdeq_lwpf.sweeps.engine.search import SearchSpec, value_name
from hopdeq_lwpf.sweeps.engine.storage_url import check_storage
from hopdeq_lwpf.sweeps.study_spec import numbers_of, settings_hash
from hopdeq_lwpf.sweeps.trials.graph_spec import GraphSpec
from hopdeq_lwpf.sweeps.trials.sdm_spec import SdmSpec
from hopdeq_lwpf.training.spec import TrainSpec


@dataclass(frozen=True)
class Task:
    """What the trials of a sweep are: the class of their settings, and the function that runs one in a worker."""

    settings: type
    runner: str  # "module:function", (settings, folder) -> what a record says
    own: tuple[str, ...] = ("seed",)  # settings that the sweep sees to
    mappings: tuple[str, ...] = ()  # settings that are mappings themselves: "model.layers"
    measures: tuple[str, ...] = ()  # what a sweep that asks for nothing shows


POINT = "point"  # the factor whose levels are the points of a search
TASKS = {
    "train": Task(
        TrainSpec,
        "hopdeq_lwpf.sweeps.trials.train_trial:run_trial",
        ("seed", "out", "resume", "threads"),
        ("model", "data", "iterations"),
        ("val/accuracy", "epoch_cpu_seconds"),
    ),
    "sdm": Task(SdmSpec, "hopdeq_lwpf.sweeps.trials.sdm_trial:run_trial", measures=("cosine", "steps")),
    "graph": Task(GraphSpec, "hopdeq_lwpf.sweeps.trials.graph_trial:run_trial", measures=("error", "steps")),
}


@dataclass(frozen=True)
class Level:
    """One value of a factor: its name in tables, and the settings that it changes, by dotted name."""

    name: str
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """One combination of levels: (factor, level name) pairs, in the order of the grid."""

    levels: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """All level names, for progress and folders."""
        return " ".join(level for _, level in self.levels) or "the base"

    def level(self, factor: str) -> str:
        """The name of the level of a factor."""
        return dict(self.levels)[factor]

    def matches(self, where: Mapping[str, Any]) -> bool:
        """Whether every factor of `where` has the level there, or one of those listed."""
        own = dict(self.levels)
        return all(own[factor] in _names(wanted) for factor, wanted in where.items())


@dataclass(frozen=True)
class SweepTrial:
    """One trial of a sweep: a cell, a seed, and the settings that follow (`TrainSpec`, `SdmSpec`)."""

    cell: Cell
    seed: int
    given: Any

    @property
    def name(self) -> str:
        """Of the cell."""
        return self.cell.name

    @property
    def hash(self) -> str:
        """Of all settings but out and resume: equal for trials that give the same numbers."""
        return settings_hash(self.settings())

    @property
    def folder(self) -> str:
        """Name of the folder of its files."""
        plain = "".join(c if c.isalnum() or c in "._" else "-" for c in self.cell.name)
        return f"{plain[:80]}-seed{self.seed}-{self.hash[:8]}"

    def settings(self) -> dict[str, Any]:
        """The settings of the trial, without those that say nothing about its numbers."""
        return numbers_of(self.given)


@dataclass(frozen=True)
class SweepSpec:
    """Settings of `hopdeq-lwpf sweep`; every field is an option and a key of the YAML file.

    Task "train": settings of `hopdeq-lwpf train`, with dotted names (learning_rate, model.layers, data.batch_size).
    What is said later wins: base, set, the grid's factors in their order, the point of a search, rules in their order.
    A search tries points in every cell of the grid, with one seed. A mapping for model or data replaces what is there
    if it names its model or data, and adds to it if it does not. Task "sdm": settings of
    `SdmSpec`; task "graph": of `GraphSpec`.
    Raises SpecError for a value that makes no sense and for a name that is not known, with the nearest.
    """

    task: str = option(
        "train", "what a trial is: train, sdm (Sparse Distributed Memory), or graph (retrieval on graphs)"
    )
    base: str | None = option(None, "settings in models/ that every trial of task train starts from")
    set: dict[str, Any] = option({}, "settings that replace those of the base in every trial")
    grid: dict[str, Any] = option(
        {},
        "factors: the name of a setting and its values, or any name and {LEVEL: {SETTING: VALUE, ...}, ...}",
    )
    rules: list[dict[str, Any]] = option(
        [], "[{where: {FACTOR: LEVEL or [LEVELS]}, set: {SETTING: VALUE}}, ...]: more settings for some cells"
    )
    exclude: list[dict[str, Any]] = option([], "[{FACTOR: LEVEL or [LEVELS]}, ...]: cells that are left out")
    only: list[dict[str, Any]] = option([], "likewise: of the others only these; empty: all")
    search: dict[str, Any] = option(
        {},
        "{space: {SETTING: {low, high, log, step} or [VALUES]}, trials, sampler: tpe or random, pruner: halving or "
        "none, seed}: points that are found instead of given, in every cell",
    )
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "of weights, data order and dropout; one trial each")
    measures: tuple[str, ...] = option(
        (),
        "numbers of a trial in the table; the first is its score; empty: the two that its task usually asks",
    )
    last: int = option(1, "epochs at the end that scores and monitors are averaged over")
    workers: int = option(2, "processes that train, each on one thread")
    executor: str = option(
        "local", "local: processes of this machine; ray or ray:ADDRESS: a cluster of machines"
    )
    storage: str | None = option(
        None, "URL of the database of the study (postgresql://USER@HOST/NAME); null: study.db in out"
    )
    retries: int = option(3, "how often a trial is begun again, from its checkpoint, when its process dies")
    budget: float | None = option(None, "hours after which no trial begins; the same command goes on later")
    confidence: float = option(0.95, "coverage of the intervals over seeds")
    baseline: dict[str, Any] = option(
        {}, "{FACTOR: LEVEL}: what the factor's other levels are compared with; else its first level"
    )
    x: str | None = option(None, "factor whose levels are numbers: the score is drawn against it, too")
    title: str = option("", "of the report; empty: made from the base")
    out: str = option("results/sweep", "folder of the trials and of the results")

    def __post_init__(self) -> None:
        forms(self)
        for name in ("seeds", "measures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "set", _mapping("set", self.set))
        object.__setattr__(self, "grid", _mapping("grid", self.grid))
        choice("task", self.task, tuple(TASKS))
        object.__setattr__(self, "measures", self.measures or TASKS[self.task].measures)
        known = [name for name in settings.names("models") if name.startswith("train_")]
        if self.task == "train" and self.base is None:
            raise SpecError(f"base is missing: the settings that trials start from, one of {known}")
        if self.task == "train" and self.base not in settings.names("models"):
            raise SpecError(f"base {self.base!r} is not one of {known}{did_you_mean(self.base, known)}")
        if self.task != "train" and self.base is not None:
            raise SpecError(f"base is for task 'train'; with task {self.task!r} put the settings under set")
        for name in ("seeds", "measures"):
            value = getattr(self, name)
            if not value:
                raise SpecError(f"{name} is empty: give at least one")
            if len(frozenset(value)) != len(value):
                raise SpecError(f"{name} names a value twice: {list(value)}")
        for seed in self.seeds:
            whole("seeds", seed, least=0)
        for name in ("last", "workers"):
            whole(name, getattr(self, name), least=1)
        number("confidence", self.confidence)
        if not 0 < self.confidence < 1:
            raise SpecError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not self.out:
            raise SpecError("out is empty: name a folder for the results")
        parse_executor(self.executor)
        if self.storage is not None:
            check_storage(self.storage)
        whole("retries", self.retries, least=0)
        if self.budget is not None:
            number("budget", self.budget, above=0)
        self._check_names()
        self._check_search()

    def _check_names(self) -> None:
        for name in self.set:
            check_setting(self.task, "set", name)
        factors = self.factors()
        for factor, instead in (("seed", "use seeds"), *([(POINT, "of a search")] if self.search else [])):
            if factor in factors:
                raise SpecError(f"grid.{factor}: the sweep has a factor of this name itself; {instead}")
        for factor, levels in factors.items():
            for level in levels:
                for name, _ in level.changes:
                    check_setting(self.task, f"grid.{factor}", name)
        names = {factor: [level.name for level in levels] for factor, levels in factors.items()}
        for count, rule in enumerate(self.rules):
            found = _mapping(f"rules[{count}]", rule)
            if sorted(found) != ["set", "where"]:
                raise SpecError(f"rules[{count}] needs the keys 'where' and 'set', got {sorted(found)}")
            _check_where(f"rules[{count}].where", found["where"], names)
            for name in _mapping(f"rules[{count}].set", found["set"]):
                check_setting(self.task, f"rules[{count}].set", name)
        for key in ("exclude", "only"):
            for count, where in enumerate(getattr(self, key)):
                _check_where(f"{key}[{count}]", where, names)
        _check_where("baseline", self.baseline, names)
        for factor, level in self.baseline.items():
            if isinstance(level, (list, tuple)):
                raise SpecError(f"baseline: {factor!r} needs one level, got {level!r}")
        if not self.cells():
            raise SpecError("exclude and only leave no cell of the grid")
        if self.x is not None:
            for name in _levels_of(self.x, names):
                _check_number(self.x, name)

    def _check_search(self) -> None:
        search = self.sought()
        if search is None:
            return
        if len(self.seeds) > 1:
            raise SpecError(
                f"a search tries each point with one seed, got seeds {list(self.seeds)}: give one; run the points that "
                "it finds with more seeds as a grid"
            )
        for name in search.space:
            check_setting(self.task, "search.space", name)
        for cell in self.cells():
            for corner in search.corners():
                self.trial(cell, self.seeds[0], corner)

    def sought(self) -> SearchSpec | None:
        """The search; None for a grid alone."""
        return SearchSpec.parse(_mapping("search", self.search)) if self.search else None

    def factors(self) -> dict[str, tuple[Level, ...]]:
        """The levels of each factor of the grid."""
        return {factor: tuple(_levels(factor, value)) for factor, value in self.grid.items()}

    def cells(self) -> tuple[Cell, ...]:
        """Every combination of levels that is asked for."""
        named = [[(factor, level.name) for level in levels] for factor, levels in self.factors().items()]
        cells = (Cell(combination) for combination in itertools.product(*named))
        asked = [c for c in cells if not self.only or any(c.matches(where) for where in self.only)]
        return tuple(cell for cell in asked if not any(cell.matches(where) for where in self.exclude))

    def trials(self) -> tuple[SweepTrial, ...]:
        """Every trial, seeds outermost: a sweep that is stopped early has whole grids.

        Raises SpecError for settings that make no sense together.
        """
        return tuple(self.trial(cell, seed) for seed in self.seeds for cell in self.cells())

    def trial(self, cell: Cell, seed: int, point: Mapping[str, Any] | None = None) -> SweepTrial:
        """The trial of one cell with one seed; point: settings that a search has found, which name the cell, too."""
        task, found = TASKS[self.task], self._base()
        for name, value in self._changes(cell, point or {}):
            _enter(found, name, copy.deepcopy(value), task.mappings)
        if point is not None:
            cell = Cell((*cell.levels, (POINT, point_name(point))))
        try:
            return SweepTrial(cell, seed, task.settings(**{**found, "seed": seed}))
        except SpecError as error:
            raise SpecError(f"cell {cell.name!r}: {error}") from error

    def _base(self) -> dict[str, Any]:
        if self.base is None:
            return {}
        base = settings.find("models", self.base)
        for key in ("model", "data"):
            base[key] = {key: base[key]} if isinstance(base.get(key), str) else dict(base.get(key) or {})
        return {key: value for key, value in base.items() if key not in TASKS[self.task].own}

    def _changes(self, cell: Cell, point: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        yield from self.set.items()
        for factor, levels in self.factors().items():
            for level in levels:
                if level.name == cell.level(factor):
                    yield from level.changes
        yield from point.items()
        for rule in self.rules:
            if cell.matches(rule["where"]):
                yield from rule["set"].items()

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, lists instead of tuples: what YAML and JSON write."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def point_name(point: Mapping[str, Any]) -> str:
    """'learning_rate=0.00316, layers=[64, 10]': a point of a search in tables."""
    return ", ".join(f"{name.rpartition('.')[2]}={value_name(value)}" for name, value in point.items())


def level_name(value: object) -> str:
    """What a plain value is called in tables."""
    return value if isinstance(value, str) else json.dumps(value)


def _levels(factor: str, value: object) -> Iterator[Level]:
    if isinstance(value, Mapping):
        for name, changes in value.items():
            found = _mapping(f"grid.{factor}.{name}", changes)
            yield Level(str(name), tuple(found.items()))
    elif isinstance(value, (list, tuple)):
        names = [level_name(entry) for entry in value]
        if len(set(names)) != len(names):
            raise SpecError(f"grid.{factor} names a value twice: {list(value)}")
        for name, entry in zip(names, value, strict=True):
            yield Level(name, ((factor, entry),))
    else:
        raise SpecError(
            f"grid.{factor} must be a list of values or a mapping of level names to settings, got {value!r}"
        )
    if not value:
        raise SpecError(f"grid.{factor} is empty: give at least one value")


def check_setting(task: str, place: str, name: str) -> None:
    """SpecError unless a trial has a setting of this dotted name that a sweep may change."""
    kind = TASKS[task]
    first, _, rest = name.partition(".")
    known = [entry.name for entry in fields(kind.settings) if entry.name not in kind.own]
    if first in kind.own:
        instead = {"seed": "seeds", "out": "out"}.get(first)
        raise SpecError(
            f"{place}: {first!r} is seen to by the sweep" + (f"; use {instead}" if instead else "")
        )
    if first not in known:
        raise SpecError(f"{place}: {name!r} is no setting of task {task!r}{did_you_mean(first, known)}")
    if rest and first not in kind.mappings:
        raise SpecError(f"{place}: {first!r} is one value and has no {rest!r}")


def _enter(base: dict[str, Any], name: str, value: Any, mappings: Sequence[str]) -> None:
    first, _, rest = name.partition(".")
    if first in mappings and not (isinstance(value, Mapping) and first in value):
        # A mapping that says its name stands for itself; one that does not adds to what is there.
        value = {**(base.get(first) or {}), **({rest: value} if rest else _mapping(name, value))}
    base[first] = value


def _levels_of(factor: str, names: Mapping[str, Sequence[str]]) -> Sequence[str]:
    if factor not in names:
        raise SpecError(f"x: {factor!r} is no factor of the grid{did_you_mean(factor, names)}")
    return names[factor]


def _check_number(factor: str, level: str) -> None:
    try:
        float(level)
    except ValueError as error:
        raise SpecError(f"x: level {level!r} of {factor!r} is no number") from error


def _check_where(place: str, where: object, names: Mapping[str, Sequence[str]]) -> None:
    for factor, wanted in _mapping(place, where).items():
        if factor not in names:
            raise SpecError(f"{place}: {factor!r} is no factor of the grid{did_you_mean(factor, names)}")
        for level in _names(wanted):
            if level not in names[factor]:
                raise SpecError(
                    f"{place}: {factor!r} has no level {level!r}, but {list(names[factor])}"
                    f"{did_you_mean(level, names[factor])}"
                )


def _names(wanted: object) -> list[str]:
    return [level_name(entry) for entry in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{name} must be a mapping of names to values, got {value!r}")
    return {str(key): entry for key, entry in value.items()}
