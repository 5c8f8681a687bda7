"""What every public class promises, as test cases that a new class inherits.

A new model, unit, separation function, solver, adjoint or graph subclasses the contract of its kind, says how it is
made and what it gets, and has every promise tested. `test_complete.py` fails for a public class or a named setting
without a case. What deviates by design is declared with its reason, and the deviation itself is then tested.
"""

import pytest

for _name in ("base", "functions", "graphs", "layers", "modules", "scores", "settings", "solving"):
    pytest.register_assert_rewrite(f"contract.{_name}")
