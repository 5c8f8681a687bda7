"""The database of a study: where it is, what is needed for it, and what is said when it cannot be used."""

from __future__ import annotations

import importlib.util
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.data import replacing
from hopdeq_lwpf.sweeps.engine.records import StorageError
from hopdeq_lwpf.sweeps.engine.storage_url import DATABASE, check_storage, hidden

FOLDER_ID = (
    ".study-id"  # the folder's own part of the names of its studies, in a database that others use too
)
INSTALL = "pip install 'hopdeq-lwpf[sweeps]'"
# The Python packages that speak to a database; the first that there is.
DRIVERS = {"postgresql": ("psycopg2", "psycopg"), "mysql": ("MySQLdb", "pymysql")}
PACKAGES = {"postgresql": "'hopdeq-lwpf[postgresql]'", "mysql": "pymysql"}
# With a write-ahead log a commit needs no flush of the disk and readers hold up nobody; a power cut may take the last
# commits, which stand in trials.jsonl, but leaves no broken file.
PRAGMAS = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL")
PATIENCE = 60  # seconds to wait for a reader that holds an SQLite file; its own default is 5


def import_optuna() -> ModuleType:
    """Optuna; SpecError that says how to install it."""
    try:
        import optuna
    except ImportError as error:
        raise SpecError(
            f"studies and sweeps keep their state with Optuna, which is not installed: {INSTALL}"
        ) from error
    return optuna


def connect(out: Path, url: str | None) -> Any:
    """Optuna's RDBStorage for study.db in `out`, or for `url`."""
    import optuna
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    if url is None:
        where = URL.create("sqlite", database=str(out.resolve() / DATABASE))
    else:
        check_storage(url)
        try:
            where = make_url(url)
        except (ArgumentError, ValueError) as error:
            raise SpecError(f"storage {hidden(url)!r} is no URL of a database: {error}") from error
        where = _with_driver(where)
    options: dict[str, Any] = {}
    if where.get_backend_name() == "sqlite":
        options["creator"] = partial(_open_sqlite, where.database or ":memory:")
    return optuna.storages.RDBStorage(where.render_as_string(hide_password=False), engine_kwargs=options)


def folder_id(out: Path) -> str:
    """'sweep-0123abcd': kept in the folder, so that it finds its studies again also when it was moved."""
    path = out / FOLDER_ID
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(f"{out.resolve().name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def one_line(out: Path, url: str | None) -> Iterator[None]:
    """What the database refuses in the block, as a StorageError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        shown = str(out / DATABASE) if url is None else hidden(url)
        reason = _reason(error)
        advice = (
            "nothing is lost, all that has ended stands in trials.jsonl; start again when it can be written"
        )
        if "not a database" in reason or "malformed" in reason:
            advice = "move the file away and start again: it is made anew from trials.jsonl"
        raise StorageError(f"{shown}: {reason}; {advice}") from error


def _open_sqlite(path: str) -> sqlite3.Connection:
    """A connection that does not wait for the disk at every commit; see `PRAGMAS`."""
    connection = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            connection.execute(pragma)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _reason(error: BaseException) -> str:
    """The first line of what the database itself said."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return text.splitlines()[0]


def _with_driver(where: Any) -> Any:
    """With a driver that is installed, where the URL leaves it open."""
    name = where.get_backend_name()
    if "+" in where.drivername or name not in DRIVERS:
        return where
    for driver in DRIVERS[name]:
        if importlib.util.find_spec(driver) is not None:
            return where.set(drivername=f"{name}+{driver.lower()}")
    raise SpecError(f"storage: {name} needs a package that is missing: pip install {PACKAGES[name]}")
