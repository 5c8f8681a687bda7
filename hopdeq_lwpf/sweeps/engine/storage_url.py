"""Where the database of a study is, by its URL. Imports nothing that opens one."""

from __future__ import annotations

from pathlib import Path

from hopdeq_lwpf._checks import SpecError, did_you_mean

DATABASE = "study.db"
SCHEMES = ("sqlite", "postgresql", "mysql")


def check_storage(url: str) -> None:
    """SpecError unless this looks like the URL of a database that is supported; connects to nothing."""
    scheme, colon, _ = url.partition("://")
    name = scheme.partition("+")[0]
    if not colon or name not in SCHEMES:
        raise SpecError(
            f"storage {hidden(url)!r} is not the URL of a database: write postgresql://USER:PASSWORD@HOST/NAME or "
            f"sqlite:///FILE, or leave it out for {DATABASE} in the folder of the results{did_you_mean(name, SCHEMES)}"
        )


def sqlite_file(url: str | None) -> Path | None:
    """The file of an SQLite URL; None for other databases."""
    if url is None or not url.startswith("sqlite"):
        return None
    name = url.partition("://")[2].removeprefix("/").partition("?")[0]
    return Path(name) if name and name != ":memory:" else None


def without_password(url: str) -> str:
    """The URL as a file may hold it: the password stands up to the last @ before the host."""
    scheme, colon, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{colon}{user.partition(':')[0]}{at}{host}"


def hidden(url: str) -> str:
    """The URL without its password, for messages."""
    scheme, colon, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{colon}{user.partition(':')[0]}:***@{host}" if at and ":" in user else url
