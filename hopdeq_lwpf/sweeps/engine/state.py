"""The Optuna study behind a sweep: who is waiting, running, complete; written by one driver, by ask and tell.

It mirrors trials.jsonl, which is written first and counts: whatever the two disagree on after a kill is set right in
the study when it is opened again. Readers, such as optuna-dashboard, may look at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopdeq_lwpf.sweeps.engine.database import connect, folder_id, import_optuna, one_line
from hopdeq_lwpf.sweeps.engine.records import StorageError
from hopdeq_lwpf.sweeps.engine.search import MAXIMIZE, Choices, SearchSpec

if TYPE_CHECKING:
    import optuna

SEED = "seed"  # the param that a grid has beside its factors
SEEDS = 2**53  # what every database holds exactly


@dataclass(frozen=True)
class Plan:
    """What an Optuna study is of: the params of its trials, and what its value is.

    factors: of a grid, its level names; every trial then has a seed, too. search: of a search, its settings.
    about: whatever else makes two studies different ones, such as the settings that all trials of a search share.
    """

    score: str
    direction: str
    factors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    search: SearchSpec | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def name(self) -> str:
        """Of the study: 'grid 0123abcd'; the same for the same plan, whatever its seeds or number of trials."""
        space = (
            {} if self.search is None else {name: repr(entry) for name, entry in self.search.space.items()}
        )
        text = json.dumps(
            [self.score, self.direction, {k: list(v) for k, v in self.factors.items()}, space, self.about],
            sort_keys=True,
        )
        kind = "grid" if self.search is None else "search"
        return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


@contextmanager
def open_storage(out: Path, url: str | None) -> Iterator[Storage]:
    """The database of the studies in the folder `out`: study.db there, or the one at `url`; closed at the end.

    Raises SpecError where Optuna or the driver of the database is missing, and for a URL that is none; StorageError
    where the database cannot be read or written, also inside of the block.
    """
    optuna = import_optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with one_line(out, url):
            storage = Storage(connect(out, url), "" if url is None else f"{folder_id(out)} ")
            try:
                yield storage
            finally:
                storage.close()
    finally:
        optuna.logging.set_verbosity(before)


class Storage:
    """An open database. prefix: of the names of its studies."""

    def __init__(self, backend: Any, prefix: str) -> None:
        self._backend, self._prefix = backend, prefix

    def study(self, plan: Plan) -> State:
        """The study of a plan, which begins where there is none."""
        import optuna

        study = optuna.create_study(
            storage=self._backend,
            study_name=self._prefix + plan.name(),
            direction="maximize" if plan.direction == MAXIMIZE else "minimize",
            sampler=optuna.samplers.RandomSampler(seed=0),  # of a grid, which knows its points
            pruner=_pruner(plan.search),
            load_if_exists=True,
        )
        if "score" not in study.user_attrs:
            study.set_user_attr("score", plan.score)
        return State(study, plan)

    def close(self) -> None:
        """Let go of the connections."""
        self._backend.remove_session()
        self._backend.engine.dispose()


@dataclass(frozen=True)
class Ended:
    """What the study is told of a trial that has ended."""

    params: Mapping[str, Any]
    score: float | None
    pruned: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)


class State:
    """One Optuna study and what is done with it. A trial of it is known by the hash of its settings."""

    def __init__(self, study: optuna.Study, plan: Plan) -> None:
        self.study, self.plan = study, plan
        self._space = _distributions(plan)
        self._told: set[str] = set()  # hashes of the trials that have ended
        self._failed: dict[str, int] = {}  # hash (or params) -> number of the trial that did not end

    def reconcile(self, ended: Mapping[str, Callable[[], Ended]]) -> None:
        """Set the study right after whatever happened to the last driver; none of its trials runs or waits then.

        ended: what trials.jsonl holds, by hash; the study is told what it does not know.
        """
        from optuna.trial import TrialState

        told = self._told
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                told.add(str(trial.user_attrs.get("hash")))
        # What the last driver had put down but not begun is begun, so that it can be ended.
        while any(t.state == TrialState.WAITING for t in self.study.get_trials(deepcopy=False)):
            self.study.ask()
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get("hash")
            if trial.state == TrialState.RUNNING:
                if key is not None and key in ended and key not in told:
                    self._tell(trial.number, ended[key]())
                    told.add(key)
                else:
                    self.study.tell(trial.number, state=TrialState.FAIL)
        for key, record in ended.items():
            if key not in told:
                self._add(key, record())
                told.add(key)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL:
                self._failed[self._key(trial)] = trial.number

    def interrupted(self, key: str) -> bool:
        """Whether a trial with this hash did not end."""
        return key in self._failed

    def begin(self, key: str, params: Mapping[str, Any], attrs: Mapping[str, Any]) -> optuna.Trial:
        """Put down a trial with its params and take it up, as a retry of the one that did not end, if there is one."""
        before = self._failed.get(key, self._failed.get(_points_key(params)))
        retry = {} if before is None else {"retry_of": before}
        self.study.enqueue_trial(dict(params), user_attrs={"hash": key, **retry, **attrs})
        trial = self.study.ask(self._space)
        if trial.user_attrs.get("hash") != key:
            raise StorageError(
                f"study {self.study.study_name!r} gave another trial than was asked for: another program writes it; "
                "stop that one and start again"
            )
        return trial

    def suggest(self) -> optuna.Trial:
        """A new point of a search."""
        search = self.plan.search
        assert search is not None
        # A sampler of its own for every trial, so that a search that goes on does not propose again what it began with.
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = _sampler(search, search.seed + 1_000_003 * number)
        return self.study.ask(self._space)

    def describe(self, trial: optuna.Trial, attrs: Mapping[str, Any]) -> None:
        """Note what is known of a suggested trial once its settings are."""
        for name, value in attrs.items():
            trial.set_user_attr(name, value)

    def end(self, trial: optuna.Trial, ended: Ended | None) -> None:
        """Tell what became of it; None: it failed, and the next trial with its hash is a retry."""
        from optuna.trial import TrialState

        key = self._key(trial)
        if ended is None:
            self.study.tell(trial, state=TrialState.FAIL)
            self._failed[key] = trial.number
        elif self.plan.search is None and key in self._told:
            # It has ended before, and its record was lost: the study keeps the first.
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self._tell(trial.number, ended)
            self._told.add(key)

    def report(self, trial: optuna.Trial, epoch: int, value: float) -> bool:
        """Note the value after an epoch; whether the trial should stop there."""
        trial.report(value, epoch)
        return bool(trial.should_prune())

    def asked(self) -> tuple[int, list[dict[str, Any]]]:
        """Of a search: how many different trials it has asked for, and the params of those that did not end."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        ended = {_points_key(t.params) for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
        whole = [t for t in trials if set(t.params) == set(self._space)]
        count = sum("retry_of" not in t.user_attrs for t in whole)
        missing = {_points_key(t.params): dict(t.params) for t in whole if _points_key(t.params) not in ended}
        return count, list(missing.values())

    def _key(self, trial: Any) -> str:
        return str(trial.user_attrs.get("hash") or _points_key(trial.params))

    def _tell(self, number: int, ended: Ended) -> None:
        from optuna.trial import TrialState

        if ended.pruned:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, self._value(ended.score))

    def _add(self, key: str, ended: Ended) -> None:
        """A trial that is known from trials.jsonl only."""
        import optuna

        if set(ended.params) != set(self._space):
            return  # of another space
        state = optuna.trial.TrialState.PRUNED if ended.pruned else optuna.trial.TrialState.COMPLETE
        try:
            trial = optuna.trial.create_trial(
                state=state,
                value=None if ended.pruned else self._value(ended.score),
                params=dict(ended.params),
                distributions=self._space,
                user_attrs={"hash": key, **ended.attrs},
            )
        except ValueError:
            return  # a value that this space does not hold
        self.study.add_trial(trial)

    def _value(self, score: float | None) -> float:
        """What is told of a score; one that is unknown or NaN is the worst there is, since Optuna takes no NaN."""
        if score is None or math.isnan(score):
            return -math.inf if self.plan.direction == MAXIMIZE else math.inf
        return float(score)


def _points_key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _distributions(plan: Plan) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    if plan.search is None:
        found = {name: CategoricalDistribution(tuple(levels)) for name, levels in plan.factors.items()}
        return {**found, SEED: IntDistribution(0, SEEDS)}
    for name, dimension in plan.search.space.items():
        if isinstance(dimension, Choices):
            found[name] = CategoricalDistribution(tuple(key for key, _ in dimension.values))
        elif dimension.whole:
            low, high, step = int(dimension.low), int(dimension.high), int(dimension.step or 1)
            found[name] = IntDistribution(low, high, log=dimension.log, step=step)
        else:
            found[name] = FloatDistribution(
                dimension.low, dimension.high, log=dimension.log, step=dimension.step
            )
    return found


def _sampler(search: SearchSpec, seed: int) -> Any:
    import optuna

    seed %= 2**32
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


def _pruner(search: SearchSpec | None) -> Any:
    import optuna

    if search is None or search.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=search.min_epochs, reduction_factor=search.reduction
    )
