"""What settings promise: frozen dataclasses, equal where their values are, that name what is wrong with a value."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from contract.base import Contract, misspelt, pickled
from hopdeq_lwpf import Termination


class SettingsContract(Contract):
    """Of a frozen dataclass of options, such as a solver."""

    kind: type
    # An option and a value that it cannot have.
    wrong: tuple[str, Any] | None = None

    def make(self, **options: Any) -> Any:
        """The settings in this variant."""
        return self.kind(**{**self.options, **options})

    def test_settings_are_frozen_and_equal_where_their_values_are(self) -> None:
        made = self.make()
        assert made == self.make()
        assert hash(made) == hash(self.make())
        for field in dataclasses.fields(made):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, field.name, None)

    def test_copies_and_pickles_are_equal(self) -> None:
        made = self.make()
        assert copy.deepcopy(made) == pickled(made) == dataclasses.replace(made) == made

    def test_its_repr_makes_it_again(self) -> None:
        made = self.make()
        assert repr(made).startswith(f"{self.kind.__name__}(")
        assert eval(repr(made), {self.kind.__name__: self.kind, "Termination": Termination}) == made

    def test_an_unknown_option_is_an_error_that_names_it(self) -> None:
        fields = dataclasses.fields(self.make())
        name = misspelt(fields[0].name if fields else "option")
        with pytest.raises(TypeError, match=name):
            self.kind(**{**self.options, name: 1})

    def test_a_value_that_cannot_be_is_an_error_that_names_the_option(self) -> None:
        assert self.wrong is not None, "the case names no wrong value"
        name, value = self.wrong
        with pytest.raises((TypeError, ValueError), match=name):
            self.make(**{name: value})
