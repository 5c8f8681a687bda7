PYTHON ?= python3
BIN := .venv/bin
# One thread a test process: the tensors are small, and two processes share two cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-long cover check lint bench docs clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

demo: .venv/.installed          ## the main job on the digits: table, plots and report in results/compare
	$(BIN)/hopdeq-lwpf compare

test: .venv/.test               ## every test but the long ones
	$(TEST)

test-long: .venv/.test          ## the studies that take minutes
	$(TEST) -m long

# The one test left out sets a limit on the size of files, which the data file of coverage exceeds.
cover: .venv/.test              ## every test but the long ones, with the share of lines and branches that they reach
	$(TEST) --cov=hopdeq_lwpf --cov-report=term:skip-covered \
	  --deselect tests/test_sweep_engine.py::test_a_limit_on_the_size_of_files_is_one_line_and_loses_nothing

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test                ## what CI runs

bench: .venv/.test              ## one table: speed, residual, basins, memory, against torchdeq (under ten minutes)
	$(BIN)/python -m benchmarks

docs: .venv/.docs               ## the site in docs/_build/html; runs the tutorials (some minutes)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis results dist docs/_build
