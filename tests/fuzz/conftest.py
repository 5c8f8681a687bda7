"""`pytest -m long` runs the same tests with ten times as many examples, new ones each time."""

import pytest

from fuzz import profiles


def _long(config: pytest.Config) -> bool:
    return config.getoption("-m") == "long"


def pytest_configure(config: pytest.Config) -> None:
    # Called when this file is loaded, which is before the tests of the folder are made.
    profiles.choose(long=_long(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _long(config):
        for item in items:
            if "fuzz" in item.path.parts:
                item.add_marker(pytest.mark.long)
