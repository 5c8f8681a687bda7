"""What every module promises: copies, files, moves, a short repr, errors for unknown options."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.base import (
    Contract,
    check_repr,
    copied,
    misspelt,
    pickled,
    same,
    unconverged_allowed,
    untouched,
)

# What holds the last call, and may keep its tensors where they were.
OF_THE_LAST_CALL = ("last_solution", "last_association", "_columns")


class ModuleContract(Contract):
    """Of a module that is called with tensors: `kind(**settings, **options of the variant)` on `inputs()`."""

    kind: type[nn.Module]
    settings: dict[str, Any] = {}
    # An option that is misspelt on purpose, and whether the error names it as the nearest.
    dial: str | None = None
    helps = False

    def make(self, **options: Any) -> nn.Module:
        """The module with first weights of its own."""
        return self.kind(**{**self.settings, **self.options, **options})

    def inputs(self, batch: int = 3) -> tuple[Any, ...]:
        """What it is called with: float32, always the same numbers."""
        raise NotImplementedError(f"{type(self).__name__} must override inputs(batch)")

    def call(self, module: nn.Module, inputs: tuple[Any, ...], **options: Any) -> Any:
        """What the module returns."""
        with unconverged_allowed():
            return module(*inputs, **options)

    def made(self, *, seed: int = 3, **options: Any) -> nn.Module:
        """The module with the same first weights each time."""
        torch.manual_seed(seed)
        return self.make(**options)

    def used(self) -> nn.Module:
        """A module that has been called and, where it has parameters, trained for a step's gradient."""
        module = self.made()
        out = self.call(module, self.inputs())
        if _graph(out):
            torch.utils._pytree.tree_leaves(out)[0].float().sum().backward()
        return module

    def test_the_same_seed_makes_the_same_module_and_output(self) -> None:
        torch.manual_seed(5)
        first = self.call(self.make(), self.inputs())
        torch.manual_seed(5)
        same(copied(self.call(self.make(), self.inputs())), copied(first))

    def test_a_call_leaves_no_trace_in_the_next_one(self) -> None:
        module = self.made()
        first = copied(self.call(module, self.inputs()))
        self.call(module, self.inputs(2))
        same(copied(self.call(module, self.inputs())), first)

    def test_what_the_caller_gives_is_never_changed(self) -> None:
        inputs = self.inputs()
        with untouched(inputs):
            out = self.call(self.made(), inputs)
            if _graph(out):
                torch.utils._pytree.tree_leaves(out)[0].float().sum().backward()

    def test_a_deepcopy_computes_the_same_with_parameters_of_its_own(self) -> None:
        module = self.used()
        other = copy.deepcopy(module)
        expected = copied(self.call(module, self.inputs()))
        same(copied(self.call(other, self.inputs())), expected)
        owned = [*module.parameters(), *module.buffers()]
        theirs = {tensor.data_ptr() for tensor in [*other.parameters(), *other.buffers()] if tensor.numel()}
        assert not theirs & {tensor.data_ptr() for tensor in owned}
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.zero_()
        same(copied(self.call(module, self.inputs())), expected)

    def test_a_pickle_computes_the_same(self) -> None:
        module = self.used()
        same(copied(self.call(pickled(module), self.inputs())), copied(self.call(module, self.inputs())))

    def test_a_state_dict_makes_another_module_the_same(self) -> None:
        module = self.used()
        other = self.made(seed=11)
        found = other.load_state_dict(module.state_dict(), strict=True)
        assert not found.missing_keys
        assert not found.unexpected_keys
        same(copied(self.call(other, self.inputs())), copied(self.call(module, self.inputs())))

    def test_the_state_dict_holds_tensors_alone_and_knows_no_batch(self) -> None:
        module = self.made()
        before = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for batch in (1, 4):
            self.call(module, self.inputs(batch))
        assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == before

    def test_all_of_it_moves_to_another_device_and_back(self) -> None:
        module = self.used()
        expected, weights = self.call(module, self.inputs()), copy.deepcopy(module.state_dict())
        moved = copy.deepcopy(module).to("meta")
        for name, tensor in [*moved.named_parameters(), *moved.named_buffers()]:
            assert tensor.is_meta, f"{name} stayed behind"
        for name, part in moved.named_modules():
            for key, value in vars(part).items():
                hidden = isinstance(value, Tensor) and not value.is_meta
                assert not hidden or key in OF_THE_LAST_CALL, f"{name}.{key} is a tensor that stays behind"
        check_repr(moved)
        back = moved.to_empty(device="cpu")
        back.load_state_dict(weights, strict=True)
        same(copied(self.call(back, self.inputs())), copied(expected))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_it_computes_nearly_the_same_on_a_gpu(self) -> None:
        expected = self.call(self.made(), self.inputs())
        to = torch.utils._pytree.tree_map_only
        out = self.call(self.made().to("cuda"), to(Tensor, lambda t: t.to("cuda"), self.inputs()))
        assert out.device.type == "cuda"
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)

    def test_eval_and_train_reach_every_part(self) -> None:
        module = self.made()
        for mode in (False, True):
            module.train(mode)
            assert all(part.training is mode for part in module.modules())
        module.eval()
        same(copied(self.call(module, self.inputs())), copied(self.call(module, self.inputs())))

    def test_an_unknown_option_is_an_error_that_names_it(self) -> None:
        names = inspect.signature(self.kind).parameters
        dial = self.dial or next(iter(names))
        assert dial in names, f"{dial} is no option of {self.kind.__name__}"
        wrong = misspelt(dial)
        with pytest.raises(
            (TypeError, ValueError), match=f"{wrong}.*Did you mean '{dial}'" if self.helps else wrong
        ):
            self.make(**{wrong: 1})

    def test_the_signature_shows_each_option(self) -> None:
        parameters = inspect.signature(self.kind).parameters.values()
        assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)

    def test_its_repr_is_short(self) -> None:
        check_repr(self.made())
        check_repr(self.used())


def _graph(out: Any) -> bool:
    leaf = torch.utils._pytree.tree_leaves(out)[0]
    return isinstance(leaf, Tensor) and leaf.requires_grad
