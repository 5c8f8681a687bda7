"""What acts on scores promises: the forgetting units and the separation functions, over the last dimension."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from contract.base import (
    F64,
    ROUNDING,
    Contract,
    check_repr,
    gradcheck,
    misspelt,
    near,
    normal,
    pickled,
    same,
    threads,
    untouched,
)
from hopdeq_lwpf import models
from hopdeq_lwpf.forgetting import make_forgetting
from hopdeq_lwpf.separation import make_separation

ROWS, SCORES = 3, 7


class ScoresContract(Contract):
    """Of a function of scores (*batch, N); `apply` gives one tensor of that shape or a tuple of them."""

    kind: type
    name: str | None = None  # by which settings ask for it
    dial: str | None = None

    def make(self, **options: Any) -> Any:
        """The object in this variant."""
        return self.kind(**{**self.options, **options})

    def apply(self, made: Any, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """What it makes of scores, one row a problem."""
        raise NotImplementedError(f"{type(self).__name__} must override apply(made, scores, mask)")

    def scores(self, dtype: torch.dtype = F64) -> Tensor:
        """No two of a row alike, none at 0, and half of them above the median of theirs."""
        return (1.5 * normal(ROWS, SCORES, seed=4)).to(dtype)

    def test_a_row_alone_gives_what_it_gives_in_a_batch(self) -> None:
        made, scores = self.make(), self.scores()
        together = self.apply(made, scores)
        for i in range(ROWS):
            same([part[i] for part in together], [part[0] for part in self.apply(made, scores[i : i + 1])])

    def test_any_batch_shape_is_rows(self) -> None:
        made, scores = self.make(), self.scores()
        for shape in ((ROWS, 1), (1, ROWS)):
            for part, flat in zip(
                self.apply(made, scores.view(*shape, SCORES)), self.apply(made, scores), strict=True
            ):
                same(part.flatten(), flat.flatten())

    def test_the_order_of_scores_does_not_matter(self) -> None:
        made, scores, order = self.make(), self.scores(), torch.arange(SCORES).roll(3)
        for moved, part in zip(self.apply(made, scores[:, order]), self.apply(made, scores), strict=True):
            near(moved, part[:, order] if part.shape == scores.shape else part, 1e-14)

    def test_masked_scores_are_as_if_they_were_not_there(self) -> None:
        made, scores = self.make(), self.scores()
        longer = torch.cat([scores, 9 * normal(ROWS, 2).double()], 1)
        mask = torch.zeros(ROWS, SCORES + 2, dtype=torch.bool)
        mask[:, SCORES:] = True
        for part, plain in zip(self.apply(made, longer, mask), self.apply(made, scores), strict=True):
            near(part[:, :SCORES] if part.ndim > 1 else part, plain, 1e-14)

    def test_a_row_of_masked_scores_alone_is_finite(self) -> None:
        mask = torch.zeros(ROWS, SCORES, dtype=torch.bool)
        mask[1] = True
        scores = self.scores().requires_grad_()
        parts = self.apply(self.make(), scores, mask)
        assert all(part.isfinite().all() for part in parts)
        if parts[0].requires_grad:
            parts[0].sum().backward()
            assert scores.grad is not None
            assert scores.grad.isfinite().all()

    def test_nan_in_one_row_harms_no_other(self) -> None:
        made, scores = self.make(), self.scores()
        expected = self.apply(made, scores)
        scores[1, 2] = torch.nan
        for part, before in zip(self.apply(made, scores), expected, strict=True):
            same(part[[0, 2]], before[[0, 2]])
        assert self.apply(made, scores)[0][1].isnan().any(), "NaN was hidden"

    @pytest.mark.parametrize("shape", [(0, SCORES), (ROWS, 0), (0, 0)], ids=str)
    def test_empty_scores_give_something_empty(self, shape: tuple[int, ...]) -> None:
        for part in self.apply(self.make(), torch.zeros(shape)):
            assert part.shape == shape[: part.ndim]

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_every_dtype_gives_what_float64_gives(self, dtype: torch.dtype) -> None:
        scores = self.scores(dtype)
        parts = self.apply(self.make(), scores)
        assert parts[0].dtype == dtype
        for part, exact in zip(parts, self.apply(self.make(), scores.double()), strict=True):
            near(part.double(), exact, ROUNDING[dtype])

    def test_autocast_changes_little(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            parts = self.apply(self.make(), self.scores(torch.float32))
        for part, exact in zip(parts, self.apply(self.make(), self.scores()), strict=True):
            near(part.double(), exact, ROUNDING[torch.bfloat16])

    def test_gradients(self) -> None:
        made = self.make()
        learned = tuple(made.parameters()) if isinstance(made, nn.Module) else ()
        names = [name for name, _ in made.named_parameters()] if learned else []

        def function(scores: Tensor, *values: Tensor) -> list[Tensor]:
            if not learned:
                parts = self.apply(made, scores)
            else:
                with torch.nn.utils.stateless._reparametrize_module(
                    made, dict(zip(names, values, strict=True))
                ):
                    parts = self.apply(made, scores)
            return [part for part in parts if part.requires_grad]

        gradcheck(function, (self.scores(), *(p.double() for p in learned)))

    def test_scores_and_mask_are_never_changed(self) -> None:
        scores, mask = self.scores().requires_grad_(), torch.arange(SCORES) > 4
        with untouched(scores, mask):
            parts = self.apply(self.make(), scores, mask)
            if parts[0].requires_grad:
                parts[0].sum().backward()

    def test_one_thread_and_two_give_the_same(self) -> None:
        with threads(1):
            one = self.apply(self.make(), self.scores())
        with threads(2):
            two = self.apply(self.make(), self.scores())
        for a, b in zip(one, two, strict=True):
            near(b, a, 1e-6)

    def test_copies_and_pickles_give_the_same(self) -> None:
        made = self.make()
        for other in (copy.deepcopy(made), pickled(made)):
            assert other is not made
            same(self.apply(other, self.scores()), self.apply(made, self.scores()))
            assert repr(other) == repr(made)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    def test_compiled_it_gives_the_same_in_one_graph(self) -> None:
        torch._dynamo.reset()
        made, scores = self.make(), self.scores()

        def function(scores: Tensor) -> tuple[Tensor, ...]:
            return self.apply(made, scores)

        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert_close(compiled(scores), function(scores), rtol=1e-12, atol=1e-12)
        torch._dynamo.reset()

    def test_its_repr_is_short(self) -> None:
        check_repr(self.make())
        assert self.kind.__name__ in repr(self.make())

    def test_an_unknown_option_is_an_error_that_names_it(self) -> None:
        dial = self.dial or next(iter(inspect.signature(self.kind).parameters), "option")
        with pytest.raises(TypeError, match=f"{misspelt(dial)}|takes no arguments"):
            self.kind(**{misspelt(dial): 1})

    def ask(self, name: str) -> Any:
        """What settings get by a name."""
        raise NotImplementedError(f"{type(self).__name__} must override ask(name)")

    def test_it_is_found_by_its_name_and_a_misspelt_one_names_the_nearest(self) -> None:
        assert self.name is not None
        assert type(self.ask(self.name)) is self.kind
        with pytest.raises(ValueError, match=f"Did you mean '{self.name}'"):
            self.ask(misspelt(self.name))


class UnitContract(ScoresContract):
    """Of a forgetting unit; D' is `constant`-valued where forgotten, or of the threshold."""

    def apply(self, made: Any, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        value, kept = made(scores, mask=mask)
        # -inf marks padding for the softmax, and has no derivative.
        return value.masked_fill(value == -torch.inf, 0.0), kept

    def ask(self, name: str) -> Any:
        return make_forgetting(name)

    def test_what_is_kept_stays_and_the_rest_is_one_number_a_row(self) -> None:
        made, scores = self.make(), self.scores()
        value, kept = made(scores)
        assert set(kept.unique().tolist()) <= {0.0, 1.0}
        same(value[kept == 1], scores[kept == 1])
        for row, keeps in zip(value, kept, strict=True):
            assert len(row[keeps == 0].unique()) <= 1

    def test_drawn_by_hand_it_gives_what_it_draws_itself(self) -> None:
        made, scores = self.make().eval(), self.scores()
        value, kept = made(scores)
        drawn, indicator = made.project(scores, made.draw(scores))
        same(drawn, value)
        same(torch.ones_like(scores) if indicator is None else indicator, kept)

    def test_minus_infinity_marks_padding_as_a_mask_does(self) -> None:
        made, scores, mask = self.make(), self.scores(), torch.arange(SCORES) > 4
        same(made(scores.masked_fill(mask, -torch.inf)), made(scores, mask=mask))

    def test_in_attention_padding_gets_no_weight(self) -> None:
        value, kept = self.make()(self.scores(), mask=torch.arange(SCORES) > 4)
        weights = kept * torch.softmax(value, -1)
        assert not weights[:, 5:].any()
        assert weights.isfinite().all()

    def test_the_indicator_carries_no_gradient(self) -> None:
        value, kept = self.make()(self.scores().requires_grad_())
        assert value.requires_grad
        assert not kept.requires_grad

    def test_its_settings_go_through_a_mapping_that_stays_as_it_is(self) -> None:
        settings = {"model": "retrieval", "forgetting": {"unit": self.name, **self.options}}
        before = copy.deepcopy(settings)
        unit = models.build(settings).forgetting
        assert settings == before
        assert repr(unit) == repr(self.make())
        with pytest.raises(ValueError, match="biass"):
            models.build({"model": "retrieval", "forgetting": {"unit": self.name, "biass": 1}})


class SeparationContract(ScoresContract):
    """Of a separation function: p, and L with the gradient p."""

    def apply(self, made: Any, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return made.weights(scores, mask), made.lagrangian(scores, mask)

    def ask(self, name: str) -> Any:
        return make_separation(name)

    def test_the_weights_are_the_gradient_of_the_lagrangian(self) -> None:
        scores = self.scores().requires_grad_()
        made = self.make()
        (slope,) = torch.autograd.grad(made.lagrangian(scores).sum(), scores)
        near(made.weights(scores), slope, 1e-12)

    def test_no_weight_is_negative_and_a_higher_score_weighs_no_less(self) -> None:
        made = self.make()
        scores, _ = self.scores().sort(-1)
        weights = made.weights(scores)
        assert (weights >= 0).all()
        assert (weights.diff(dim=-1) >= -1e-15).all()

    def test_masked_scores_get_a_weight_of_exactly_zero(self) -> None:
        mask = torch.arange(SCORES) > 4
        assert not self.make().weights(self.scores(), mask)[:, 5:].any()

    def test_both_at_once_are_both_by_themselves(self) -> None:
        made, scores = self.make(), self.scores()
        expected = made.weights(scores), made.lagrangian(scores)
        mask = torch.zeros(SCORES, dtype=torch.bool)
        for given in (None, mask):
            together = made.weights_and_lagrangian(scores, given)
            assert_close(together, expected, rtol=1e-12, atol=1e-13)
            weights, deferred = made.weights_then_lagrangian(scores, given)
            assert_close((weights, deferred()), expected, rtol=1e-12, atol=1e-13)

    def test_the_lagrangian_is_midpoint_convex_where_an_energy_is_promised(self) -> None:
        made, a, b = self.make(), self.scores(), 1.5 * normal(ROWS, SCORES, seed=6).double()
        assert made.has_energy
        # Of LSR it is exp L that is convex, which where L is convex follows from it.
        middle, ends = (
            made.lagrangian((a + b) / 2).exp(),
            (made.lagrangian(a).exp() + made.lagrangian(b).exp()),
        )
        assert (middle <= ends / 2 * (1 + 1e-12)).all()
