"""The suite behind the one table: `python -m benchmarks`. One module a group of rows, run by pytest-benchmark."""
