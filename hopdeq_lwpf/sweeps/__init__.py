"""Studies over many settings: what is asked (spec), the runs, their statistics and the report."""
