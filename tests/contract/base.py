"""The base of all contracts: variants, declared deviations, and what several of them need."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Termination
from hopdeq_lwpf._types import ConvergenceWarning

F64 = torch.float64
# To rounding, so that finite differences see the equilibrium and not the end of a solve.
TIGHT = Termination(rtol=1e-13, atol=1e-14, max_steps=3000)
# Share of the largest entry by which a result may differ from that in float64 with the same, rounded, numbers. The
# roundings are 6e-8, 4e-3 and 5e-4 each, of which a layer makes some dozens, not all of one sign.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Deviation:
    """A promise that a class does not keep, by design: why, and how that shows in the test of the promise."""

    reason: str
    raises: type[BaseException] = AssertionError
    match: str = ""


class Contract:
    """What all cases have: which classes and presets they stand for, in which variants, and what is declared.

    covers: the public classes that this case tests. presets: the names in models/ or solvers/ that it tests.
    variants: each promise is tested once a variant; the test finds its name in `self.variant`, its options in
        `self.options`.
    deviates: by the name of a test, or "name: variant", a `Deviation`. The test must then fail as it says.
    once: tests that say the same in every variant, and are run in the first.
    narrowed: by the name of a test the variants that it is run in, where all of them would say the same again.
    exempt: likewise, why a promise has no meaning here. The test is then skipped with this reason.
    """

    covers: tuple[type, ...] = ()
    presets: tuple[str, ...] = ()
    variants: Mapping[str, Any] = {"default": {}}
    deviates: Mapping[str, Deviation] = {}
    exempt: Mapping[str, str] = {}
    once: Sequence[str] = (
        "test_what_is_declared_names_tests_and_variants_and_gives_reasons",
        "test_one_thread_and_two_give_the_same",
        "test_an_unknown_option_is_an_error_that_names_it",
        "test_the_signature_shows_each_option",
        "test_compiled_it_gives_the_same",
        "test_the_same_seed_makes_the_same_module_and_output",
        "test_the_state_dict_holds_tensors_alone_and_knows_no_batch",
        "test_eval_and_train_reach_every_part",
        "test_the_order_of_samples_is_kept",
    )
    narrowed: Mapping[str, Sequence[str]] = {}

    variant: str
    options: Any

    @pytest.fixture(autouse=True)
    def _in_this_variant(self, variant: str, request: pytest.FixtureRequest) -> None:
        self.variant, self.options = variant, self.variants[variant]
        reason = declared(self.exempt, request.node.originalname, variant)
        if reason is not None:
            pytest.skip(reason)

    def test_what_is_declared_names_tests_and_variants_and_gives_reasons(self) -> None:
        for key, value in {**self.deviates, **self.exempt}.items():
            test, _, variant = key.partition(": ")
            assert callable(getattr(self, test, None)), f"{key!r} names no test of {type(self).__name__}"
            assert not variant or variant in self.variants, f"{key!r} names no variant"
            reason = value.reason if isinstance(value, Deviation) else value
            assert len(reason.split()) > 2, f"{key!r} gives no reason"
        assert not set(self.deviates) & set(self.exempt)
        for test, variants in self.narrowed.items():
            assert callable(getattr(self, test, None)), f"{test!r} names no test of {type(self).__name__}"
            assert set(variants) & set(self.variants), (
                f"{test!r} is run in no variant of {type(self).__name__}"
            )


def declared(table: Mapping[str, Any], test: str, variant: str) -> Any:
    """What a table of declarations has for this test in this variant."""
    return table.get(f"{test}: {variant}", table.get(test))


@contextmanager
def unconverged_allowed() -> Iterator[None]:
    """Solves that do not converge are no news within this block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(actual: Any, expected: Any) -> None:
    """Equal to the last bit, NaN included, in any pytree."""
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def near(actual: Tensor, expected: Tensor, share: float) -> None:
    """Within so small a share of the largest expected entry."""
    actual, expected = actual.detach().to(expected.dtype), expected.detach()
    size = float(expected.abs().max()) if expected.numel() else 0.0
    assert_close(actual, expected, rtol=0, atol=share * size + 1e-12)


def copied(value: Any) -> Any:
    """The same tree with tensors of its own."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tree."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of a tree."""
    return [leaf for leaf in tensors(value) if leaf.is_floating_point()]


def converted(value: Any, dtype: torch.dtype) -> Any:
    """The same tree with its floating-point tensors in this dtype."""
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
    )


@contextmanager
def untouched(*values: Any) -> Iterator[None]:
    """No tensor in these trees is written to within this block, nor made to require grad."""
    held = [leaf for value in values for leaf in tensors(value)]
    before = [(leaf._version, leaf.requires_grad, leaf.detach().clone()) for leaf in held]
    yield
    for leaf, (version, requires_grad, content) in zip(held, before, strict=True):
        assert leaf._version == version, "a tensor of the caller was written to"
        assert leaf.requires_grad == requires_grad, "a tensor of the caller was made to require grad"
        same(leaf.detach(), content)


def pickled(value: Any) -> Any:
    """What comes back from a pickle."""
    return pickle.loads(pickle.dumps(value))


def gradcheck(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
    """Derivatives against finite differences in float64, along random directions."""
    leaves = tuple(a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments)
    assert any(leaf.requires_grad for leaf in leaves)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-5, rtol=1e-3)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in float32, always the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def misspelt(name: str) -> str:
    """The name with its last letter doubled."""
    return name + name[-1]


def check_repr(value: object) -> None:
    """Short enough to read, and without the numbers of a tensor."""
    text = repr(value)
    assert "tensor(" not in text, text
    assert "object at 0x" not in text, text
    assert len(text) < 2500, f"{len(text)} characters"
    assert max(map(len, text.splitlines())) < 400
