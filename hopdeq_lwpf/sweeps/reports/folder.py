"""The report of a folder of trials, of whatever is there: the same code that writes it after a run. Runs nothing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps import study, sweep
from hopdeq_lwpf.sweeps.engine.records import TRIALS, read_records
from hopdeq_lwpf.sweeps.engine.storage_url import DATABASE
from hopdeq_lwpf.sweeps.reports import study_report, study_results, sweep_report, sweep_results
from hopdeq_lwpf.sweeps.reports.settings_file import read_settings
from hopdeq_lwpf.sweeps.reports.spec import ReportSpec
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.reports.tables import parquet_note
from hopdeq_lwpf.sweeps.study_spec import StudySpec

LINES = 48  # of a table that are shown; the files have all


def report(spec: ReportSpec) -> tuple[list[Grid], list[str], list[Path]]:
    """Write the report of the folder `spec.study` into `spec.out`; returns tables, findings and paths.

    Raises SpecError for a folder without settings, DataError for trials that cannot be read.
    """
    assert spec.study is not None
    asked = read_settings(spec.study, spec.settings)
    if isinstance(asked, StudySpec):
        if spec.baseline:
            raise SpecError("baseline is for sweeps: a study compares with one step and with no forgetting")
        found = study.load(asked)
        paths = study_report.write_results(found, spec.out)
        return (
            study_results.summaries(found),
            [*study_results.findings(found), *notes(found.records, asked.out)],
            paths,
        )
    if spec.baseline:
        asked = replace(asked, baseline={**asked.baseline, **spec.levels()})
    done = sweep.load(asked)
    paths = sweep_report.write_results(done, spec.out)
    said = [*sweep_results.findings(done), *notes(done.records, asked.out, done.stopped)]
    return sweep_results.summaries(done, LINES), said, paths


def notes(records: Sequence[Mapping[str, Any] | None], folder: str, stopped: int = 0) -> list[str]:
    """What a reader should know of the files: trials of other settings, a format that is not there.

    stopped: how many of the trials that were stopped early the findings name.
    """
    own = {record["hash"] for record in records if record is not None}
    rest = [record for key, record in read_records(Path(folder) / TRIALS).items() if key not in own]
    pruned = sum(record.get("pruned") is not None for record in rest)
    others, pruned = len(rest) - pruned, pruned - stopped
    said = [f"The folder holds {others} trials of other settings, which count nowhere here."] * bool(others)
    said += [f"A search stopped {pruned} trials early; they count nowhere here."] * bool(pruned)
    return [*said, *([parquet_note()] if parquet_note() else [])]


def serve(spec: ReportSpec) -> None:
    """Serve optuna-dashboard to this machine alone, 127.0.0.1, until it is interrupted.

    Raises SpecError where the extra is not installed or the folder has no study, OSError where the port is taken.
    """
    assert spec.study is not None
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise SpecError("live needs optuna-dashboard: pip install 'hopdeq-lwpf[dashboard]'")
    asked = read_settings(spec.study, spec.settings)
    storage = getattr(asked, "storage", None)
    if not storage:
        path = (Path(spec.study) / DATABASE).resolve()
        if not path.exists():
            raise SpecError(f"live: {path} is not there; a run of `hopdeq-lwpf sweep` makes it")
        storage = f"sqlite:///{path}"
    # By name, since the type checker need not have it.
    importlib.import_module("optuna_dashboard").run_server(storage, host="127.0.0.1", port=spec.port)
