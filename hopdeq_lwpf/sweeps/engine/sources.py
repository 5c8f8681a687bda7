"""Which trial is next: of a grid, the ones that are missing; of a search, what its sampler proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine.records import is_complete, point_of
from hopdeq_lwpf.sweeps.engine.search import SearchSpec
from hopdeq_lwpf.sweeps.engine.state import SEED, Ended, Plan, State, Storage

if TYPE_CHECKING:
    import optuna

Record = dict[str, Any]


class Trial(Protocol):
    """One cell of a study with one seed."""

    @property
    def name(self) -> str:
        """Of the cell, for people."""

    @property
    def seed(self) -> int: ...

    @property
    def hash(self) -> str:
        """Equal for trials that give the same numbers."""

    @property
    def folder(self) -> str:
        """Name of the folder of its files."""

    def settings(self) -> dict[str, Any]:
        """What the worker is told."""


@dataclass
class Claim:
    """A trial that the driver has taken up."""

    trial: Trial
    params: Mapping[str, Any]
    source: Source
    asked: optuna.Trial
    attempt: int = 0  # how often its worker has died

    def again(self) -> Claim:
        """The same trial once more, after the failure has been told."""
        asked = self.source.state.begin(self.trial.hash, self.params, attributes(self.trial))
        return Claim(self.trial, self.params, self.source, asked, self.attempt + 1)


class Source(Protocol):
    """Trials to run, one after the other."""

    state: State

    @property
    def left(self) -> int:
        """How many there still are."""

    @property
    def metric(self) -> str | None:
        """What trials tell after each epoch; None: nothing."""

    def next(self) -> Claim | None:
        """The next trial; None where there is no more. SpecError for one whose settings make no sense."""

    def knows(self, record: Record | None) -> bool:
        """Whether a record ends a trial, which then need not run."""

    def ended(self, params: Mapping[str, Any], record: Record) -> Ended:
        """What the study is told of a record."""


def attributes(trial: Trial) -> dict[str, Any]:
    """What the study notes of a trial beside its params and hash."""
    return {"cell": trial.name, "seed": trial.seed, "folder": trial.folder}


class GridSource:
    """The trials of a grid that are not complete, those first that were interrupted.

    levels: the params of a trial beside its seed. score: the number that a record comes to.
    """

    metric = None

    def __init__(
        self,
        trials: Sequence[Trial],
        records: Mapping[str, Record],
        state: State,
        levels: Callable[[Any], Mapping[str, Any]],
        score: Callable[[Any, Record], float | None],
    ) -> None:
        self.state, self._levels, self._score = state, levels, score
        # Two names of one cell have one hash, and are one trial.
        self._trials = {trial.hash: trial for trial in reversed(trials)}
        order = dict.fromkeys(trial.hash for trial in trials)
        done = [key for key in order if is_complete(records.get(key))]
        state.reconcile({key: self._known(key, records[key]) for key in done})
        missing = [key for key in order if not is_complete(records.get(key))]
        self._waiting = sorted(missing, key=lambda key: not state.interrupted(key))[::-1]

    @property
    def left(self) -> int:
        """How many trials there still are."""
        return len(self._waiting)

    def next(self) -> Claim | None:
        """The next trial."""
        if not self._waiting:
            return None
        trial = self._trials[self._waiting.pop()]
        params = self._params(trial)
        return Claim(trial, params, self, self.state.begin(trial.hash, params, attributes(trial)))

    def knows(self, record: Record | None) -> bool:
        """Whether the trial of a record is complete."""
        return is_complete(record)

    def ended(self, params: Mapping[str, Any], record: Record) -> Ended:
        """What the study is told of a record."""
        trial = self._trials[record["hash"]]
        return Ended(params, self._score(trial, record), attrs=attributes(trial))

    def _params(self, trial: Trial) -> dict[str, Any]:
        return {**self._levels(trial), SEED: trial.seed}

    def _known(self, key: str, record: Record) -> Callable[[], Ended]:
        return lambda: self.ended(self._params(self._trials[key]), record)


class SearchSource:
    """The points of a search of one cell: those that did not end before, then new ones.

    make: the trial with the settings of a point. score: the number that a record comes to.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        records: Mapping[str, Record],
        make: Callable[[Mapping[str, Any]], Trial],
        score: Callable[[Any, Record], float | None],
    ) -> None:
        assert plan.search is not None
        self._search: SearchSpec = plan.search
        self._make, self._score, self._name = make, score, plan.name()
        self.state = storage.study(plan)
        ended = {
            key: self._known(params, record)
            for key, record in records.items()
            if record["failure"] is None and (params := point_of(record, self._name)) is not None
        }
        self.state.reconcile(ended)
        asked, self._waiting = self.state.asked()
        self._new = max(0, self._search.trials - asked)

    @property
    def metric(self) -> str | None:
        """What trials tell after each epoch, where some are to be stopped."""
        return None if self._search.pruner == "none" else self.state.plan.score

    @property
    def left(self) -> int:
        """How many trials there still are."""
        return len(self._waiting) + self._new

    def next(self) -> Claim | None:
        """The next trial; SpecError for a point whose settings make no sense."""
        if self._waiting:
            params = self._waiting.pop(0)
            trial = self._make(self._search.settings(params))
            return Claim(trial, params, self, self.state.begin(trial.hash, params, attributes(trial)))
        if not self._new:
            return None
        self._new -= 1
        asked = self.state.suggest()
        try:
            trial = self._make(self._search.settings(asked.params))
        except SpecError:
            self.state.end(asked, None)
            raise
        self.state.describe(asked, {"hash": trial.hash, **attributes(trial)})
        return Claim(trial, dict(asked.params), self, asked)

    def note(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a record says of the search that it belongs to."""
        return {"study": self._name, "params": dict(params)}

    def adopted(self, params: Mapping[str, Any], record: Record) -> Record:
        """The record, saying that it is a point of this search, too; the same object where it says so."""
        if point_of(record, self._name) is not None:
            return record
        return {**record, "also": {**record.get("also", {}), self._name: dict(params)}}

    def knows(self, record: Record | None) -> bool:
        """Whether the trial of a record is complete, or was pruned by this search."""
        if record is None or record["failure"] is not None:
            return False
        return point_of(record, self._name) is not None or is_complete(record)

    def ended(self, params: Mapping[str, Any], record: Record) -> Ended:
        """What the study is told of a record."""
        attrs = {"cell": record.get("name", ""), "seed": record["seed"], "folder": record["folder"]}
        return Ended(params, self._score(None, record), record.get("pruned") is not None, attrs)

    def _known(self, params: Mapping[str, Any], record: Record) -> Callable[[], Ended]:
        return lambda: self.ended(params, record)
