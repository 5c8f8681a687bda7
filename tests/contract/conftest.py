"""Runs each promise once a variant, and tests declared deviations as such."""

import re

import pytest

from contract.base import Contract, declared


def pytest_generate_tests(metafunc):
    """One test a variant of the case."""
    if metafunc.cls is not None and issubclass(metafunc.cls, Contract):
        case, test = metafunc.cls, metafunc.function.__name__
        every = list(case.variants)
        among = case.narrowed.get(test, every[:1] if test in case.once else every)
        metafunc.parametrize("variant", [name for name in every if name in among])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of a promise that a case does not keep must fail, and as the case says."""
    case = pyfuncitem.cls
    if case is None or not issubclass(case, Contract):
        return (yield)
    variant = pyfuncitem.callspec.params["variant"]
    deviation = declared(case.deviates, pyfuncitem.originalname, variant)
    if deviation is None:
        return (yield)
    try:
        yield
    except deviation.raises as error:
        if re.search(deviation.match, str(error)) is None:
            raise
        return True
    pytest.fail(f"the deviation is gone, so is its declaration to be: {deviation.reason}")
