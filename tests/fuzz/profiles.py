"""How many examples a test makes, how long each may take, and what counts as an answer."""

from __future__ import annotations

import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from hopdeq_lwpf._types import ConvergenceWarning

# Of the processor, so that a machine with other work to do fails no test. Examples take milliseconds.
SECONDS = 2.0
TIMES = 10  # examples of `pytest -m long`, for one of `pytest`

_COMMON = settings(
    deadline=None,  # see `within`, which also ends what would never end
    print_blob=True,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # traces every line, which takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors],
)
settings.register_profile("fuzz", _COMMON, derandomize=True, database=None)
# What fails is tried again first in the next run.
_FOUND = DirectoryBasedExampleDatabase(".hypothesis/examples")
settings.register_profile("fuzz-long", _COMMON, derandomize=False, database=_FOUND)
_chosen = {"profile": "fuzz", "times": 1}


def choose(*, long: bool) -> None:
    """Which profile `examples` takes from now on."""
    _chosen.update(profile="fuzz-long" if long else "fuzz", times=TIMES if long else 1)


def examples(count: int, **more: Any) -> settings:
    """The settings of a test with so many examples, or TIMES as many; more: other settings."""
    profile = settings.get_profile(str(_chosen["profile"]))
    return settings(profile, max_examples=count * int(_chosen["times"]), **more)


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """AssertionError where the block takes more processor time, even if it would never end."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
    # Once more, since what is raised inside may be caught there.
    assert time.process_time() - began <= seconds


@contextmanager
def only_convergence_warnings() -> Iterator[None]:
    """Every other warning is an error, as in all tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def answer(
    call: Callable[[], Any], *names: str, errors: tuple[type[Exception], ...] = (ValueError, TypeError)
) -> Any:
    """What the call returns; None where it refuses by one of the errors, whose message must name one of `names`.

    All else that is raised goes on, and so do warnings. The time is limited.
    """
    try:
        with within(), only_convergence_warnings():
            return call()
    except errors as error:
        helps(error, *names)
    return None


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """MemoryError, or torch's RuntimeError, where the block allocates more than so many bytes at a time."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def helps(error: Exception, *names: str) -> None:
    """Assert that the message says what is wrong: names one of `names` as a word, and is neither long nor empty."""
    message = str(error.args[0]) if error.args else ""
    assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names), (
        f"{type(error).__name__}: {message!r} names none of {names}"
    )
    assert len(message) < 2000
