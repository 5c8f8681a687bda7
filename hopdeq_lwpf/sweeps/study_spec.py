"""What a study of trainings is asked to do. Imports no torch, so that the command line answers at once.

A study trains one network under many conditions and seeds; each trial is one run of `hopdeq-lwpf train`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from hopdeq_lwpf import settings
from hopdeq_lwpf._checks import SpecError, choice, did_you_mean, forms, number, option, whole
from hopdeq_lwpf.sweeps.spec import CONVERGED, FORGETTING, Steps
from hopdeq_lwpf.training.spec import TrainSpec

RETRIEVAL = "retrieval"  # the task of `compare` that trains nothing; its settings are a CompareSpec
ADJOINTS = ("implicit", "onestep", "phantom", "neumann", "unrolled")
INJECT = ("start", "input")
# A single-query pooling layer whose ReLU forgets everything gives zeros and gets no gradient: it stays dead.
UNITS: dict[str, Any] = {"relu": {"unit": "relu", "min_keep": 1}}
GRID = ("forgetting", "steps", "adjoint", "inject")  # options of the model that the conditions set


@dataclass(frozen=True)
class StudyTask:
    """The settings in models/ that a trial starts from, and the validation metric that is its score.

    last: how many epochs at the end are averaged. epochs: where a study trains for less long than the settings.
    """

    preset: str
    score: str
    last: int = 10  # as published for bit patterns: single epochs scatter more than conditions differ
    epochs: int | None = None


TASKS = {
    # The published 250 epochs would take 90 trials to two hours; by 100 the slowest unit, ReLU, has learned the task.
    "bit-pattern": StudyTask("train_bit_pattern", "val/accuracy", epochs=100),
    "image-bags": StudyTask("train_image_bags", "val/accuracy"),
    # Its learning rate falls to 0: earlier epochs are on the way to the last.
    "repertoires": StudyTask("train_repertoires", "val/auc", last=1),
}
EPOCHS = ", ".join(f"{t.epochs or 'those of its settings'} for {name}" for name, t in TASKS.items())
LAST = ", ".join(f"{task.last} of {name}" for name, task in TASKS.items())


@dataclass(frozen=True)
class Condition:
    """One cell of the grid; adjoint is None for a number of steps, which ordinary autograd differentiates."""

    task: str
    forgetting: str
    steps: Steps
    adjoint: str | None
    inject: str

    @property
    def dynamics(self) -> str:
        """'1 step', '4 steps', 'converged implicit input': all but the task and the unit."""
        if self.steps == CONVERGED:
            return f"{CONVERGED} {self.adjoint} {self.inject}"
        return f"{self.steps} step" + "s" * (self.steps != 1)

    @property
    def name(self) -> str:
        """Everything, for progress and folders."""
        return f"{self.task} {self.forgetting} {self.dynamics}"


@dataclass(frozen=True)
class Trial:
    """One training: a condition, a seed, and the settings that follow (with `out` and `resume` as defaults)."""

    condition: Condition
    seed: int
    train: TrainSpec

    @property
    def name(self) -> str:
        """Of the condition, for progress."""
        return self.condition.name

    @property
    def hash(self) -> str:
        """Of all settings but out and resume: equal for trials that give the same numbers."""
        return settings_hash(self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings of the training, without the two that say nothing about its numbers."""
        return numbers_of(self.train)

    @property
    def folder(self) -> str:
        """Name of the folder of its files."""
        return f"{self.condition.name.replace(' ', '-')}-seed{self.seed}-{self.hash[:8]}"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Of all settings; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def numbers_of(train: TrainSpec) -> dict[str, Any]:
    """The settings of a training that its numbers depend on."""
    return {key: value for key, value in train.as_dict().items() if key not in ("out", "resume")}


@dataclass(frozen=True)
class StudySpec:
    """Settings of `hopdeq-lwpf compare --task bit-pattern`; every field is an option and a key of the YAML file.

    The reasons for the defaults stand beside them in `sweeps/one_step_vs_converged.yaml`, which has two tasks.
    Raises SpecError for a value that makes no sense.
    """

    task: tuple[str, ...] = option(("bit-pattern",), f"what is learned, any of {', '.join(TASKS)}")
    forgetting: tuple[str, ...] = option(
        ("none", "relu", "pfu"), f"units: any of {', '.join(FORGETTING)}, and the names in 'units'"
    )
    units: dict[str, Any] = option(
        UNITS, "what a name in 'forgetting' stands for: {unit: NAME, and its options} (--units.NAME VALUE)"
    )
    steps: tuple[Steps, ...] = option((1, 4, CONVERGED), "numbers of softmaxes, or 'converged'")
    adjoint: tuple[str, ...] = option(
        ("implicit", "onestep"), f"gradients of converged runs, any of {', '.join(ADJOINTS)}"
    )
    inject: tuple[str, ...] = option(
        INJECT, "where the query enters converged runs, any of start, input; k steps: start"
    )
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "of weights, data order and dropout; one trial each")
    epochs: int | None = option(None, f"passes through the data; null: {EPOCHS}")
    model: dict[str, Any] = option(
        {}, "options that replace those of the task's network (--model.NAME VALUE)"
    )
    data: dict[str, Any] = option({}, "options that replace those of the task's data (--data.NAME VALUE)")
    train: dict[str, Any] = option({}, "other settings of hopdeq-lwpf train that replace the task's")
    last: int | None = option(None, f"epochs at the end whose scores are averaged; null: {LAST}")
    workers: int = option(2, "processes that train, each on one thread")
    confidence: float = option(0.95, "coverage of the intervals over seeds")
    out: str = option("results/one_step_vs_converged", "folder of the trials and of the results")

    def __post_init__(self) -> None:
        forms(self, free=("task",))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                object.__setattr__(self, entry.name, tuple(value))
        task = self.task if isinstance(self.task, tuple) else (self.task,)
        object.__setattr__(self, "task", tuple(task_name(name) for name in task))
        # A name that is given anew leaves the others as they are.
        units = {**UNITS, **_mapping("units", self.units)}
        object.__setattr__(self, "units", {name: _unit(name, unit) for name, unit in units.items()})
        self._check_grid()
        self._check_overrides()
        whole("workers", self.workers, least=1)
        for name in ("last", "epochs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=1)
        number("confidence", self.confidence)
        if not 0 < self.confidence < 1:
            raise SpecError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not self.out:
            raise SpecError("out is empty: name a folder for the results")

    def _check_grid(self) -> None:
        for unit in self.forgetting:
            choice("forgetting", unit, tuple(dict.fromkeys((*FORGETTING, *self.units))))
        for step in self.steps:
            if step != CONVERGED and (not isinstance(step, int) or isinstance(step, bool) or step < 1):
                raise SpecError(f"steps must be whole numbers of at least 1 or {CONVERGED!r}, got {step!r}")
        for name, allowed in (("adjoint", ADJOINTS), ("inject", INJECT)):
            for value in getattr(self, name):
                choice(name, value, allowed)
        for seed in self.seeds:
            whole("seeds", seed, least=0)
        for name in ("task", "forgetting", "steps", "adjoint", "inject", "seeds"):
            value = getattr(self, name)
            if not value:
                raise SpecError(f"{name} is empty: give at least one")
            if len(set(value)) != len(value):
                raise SpecError(f"{name} names a value twice: {list(value)}")
        if "none" in self.units:
            raise SpecError("units.none: 'none' is no forgetting; give the unit another name")
        for name, unit in self.units.items():
            choice(f"units: the unit of {name!r}", unit["unit"], ("keep", *FORGETTING[1:]))

    def _check_overrides(self) -> None:
        for name in ("model", "data", "train"):
            object.__setattr__(self, name, _mapping(name, getattr(self, name)))
        for name in GRID:
            if name in self.model:
                raise SpecError(f"model.{name} is set by the conditions of the study: use {name} instead")
        if self.data.get("workers"):
            raise SpecError(
                "data.workers must be 0 in a study, whose trials run in processes of their own; for more of them at a "
                "time use workers"
            )
        known = [entry.name for entry in fields(TrainSpec)]
        own = {"model": "model", "data": "data", "epochs": "epochs", "seed": "seeds", "out": "out"}
        for name in self.train:
            if name in own:
                raise SpecError(f"train.{name} is a setting of the study: use {own[name]} instead")
            if name == "resume" or name not in known:
                allowed = sorted(set(known) - {*own, "resume"})
                raise SpecError(f"train.{name} is not one of {allowed}{did_you_mean(name, allowed)}")

    def conditions(self) -> tuple[Condition, ...]:
        """Every cell of the grid, by task, unit and steps."""
        return tuple(
            Condition(task, unit, steps, adjoint, inject)
            for task in self.task
            for unit in self.forgetting
            for steps in self.steps
            for adjoint, inject in self._solves(steps)
        )

    def _solves(self, steps: Steps) -> list[tuple[str | None, str]]:
        if steps != CONVERGED:
            return [(None, "start")]
        return [(adjoint, inject) for adjoint in self.adjoint for inject in self.inject]

    def trials(self) -> tuple[Trial, ...]:
        """Every training, seeds outermost: a study that is stopped early has whole grids.

        Raises SpecError where the settings of a task do not exist or make no sense.
        """
        return tuple(self.trial(condition, seed) for seed in self.seeds for condition in self.conditions())

    def trial(self, condition: Condition, seed: int) -> Trial:
        """The training of one condition with one seed."""
        base = preset(condition.task)
        chosen = {
            "forgetting": self.unit(condition.forgetting),
            "steps": None if condition.steps == CONVERGED else condition.steps,
            "inject": condition.inject,
            **({} if condition.adjoint is None else {"adjoint": condition.adjoint}),
        }
        base["model"] = {**base["model"], **self.model, **chosen}
        base["data"] = {**base["data"], **self.data}
        base.update(self.train, seed=seed, out=TrainSpec().out)
        base["epochs"] = self.epochs_of(condition.task)
        return Trial(condition, seed, TrainSpec(**base))

    def epochs_of(self, task: str) -> int:
        """How long a task is trained."""
        own = TASKS[task].epochs if self.epochs is None else self.epochs
        return preset(task).get("epochs", TrainSpec().epochs) if own is None else own

    def last_of(self, task: str) -> int:
        """How many epochs at the end are averaged for a task."""
        return TASKS[task].last if self.last is None else self.last

    def unit(self, name: str) -> Any:
        """What `model.forgetting` is for a name in `forgetting`."""
        return None if name == "none" else self.units.get(name, name)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, lists instead of tuples: what YAML and JSON write."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def task_name(name: object, more: Iterable[str] = ()) -> str:
    """The name of a task as the study writes it; 'bit_pattern' means 'bit-pattern'. SpecError for others.

    more: names that are allowed beside those of the study.
    """
    allowed = (*TASKS, *more)
    plain = name.replace("_", "-") if isinstance(name, str) else name
    if plain not in allowed:
        raise SpecError(f"task {name!r} is not one of {list(allowed)}{did_you_mean(plain, allowed)}")
    return str(plain)


def preset(task: str) -> dict[str, Any]:
    """The settings in models/ that the trials of a task start from, as a new dict."""
    name = TASKS[task].preset
    if name not in settings.names("models"):
        raise SpecError(f"task {task!r} needs the settings models/{name}.yaml, which are not there")
    found = settings.find("models", name)
    for key in ("model", "data"):
        found[key] = {key: found[key]} if isinstance(found[key], str) else dict(found[key])
    return found


def _unit(name: str, value: object) -> dict[str, Any]:
    """{"unit": name, **options}; options that come as text, as from the command line, as the values they are."""
    given = {"unit": value} if isinstance(value, str) else _mapping(f"units.{name}", value)
    options = {
        key: yaml.safe_load(entry) if isinstance(entry, str) and entry else entry
        for key, entry in given.items()
    }
    return {"unit": name, **options}


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{name} must be a mapping of names to values, got {value!r}")
    return {str(key): entry for key, entry in value.items()}
