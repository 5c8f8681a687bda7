"""What a comparison says of its fixed points is what the diagnostics say of each cell."""

from dataclasses import replace

import numpy as np
import pytest

from hopdeq_lwpf import Termination, retrieve
from hopdeq_lwpf.diagnostics import FixedPoint, diagnose
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.sweeps.compare import compare
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec

SMALL = CompareSpec(
    stored=120,
    samples=24,
    forgetting=("none", "pfu"),
    beta=(8.0, 40.0),
    mask=(0.3,),
    noise=(0.1, 0.3),
    flip=(),
    resamples=50,
    max_steps=500,
)


def test_fixed_points_are_what_the_diagnostics_say():
    comparison = compare(SMALL)
    spec, task = comparison.spec, comparison.task
    stop = Termination(rtol=spec.rtol, atol=spec.atol, max_steps=spec.max_steps, check_every=1)
    for row, outcome in zip(comparison.rows, comparison.outcomes, strict=True):
        if row["steps"] != CONVERGED:
            assert outcome.points is None
            assert np.isnan(row["single"])
            continue
        unit = None if row["forgetting"] == "none" else row["forgetting"]
        query = next(s.queries for s in task.sets if (s.kind, s.level) == (row["corruption"], row["level"]))
        f = Retrieval(row["beta"], forgetting=unit)
        x = f.prepare(query, task.patterns)
        recall = retrieve(query, task.patterns, beta=row["beta"], forgetting=unit, stop=stop)
        found = diagnose(recall, f, x)
        for name, kind in (("single", 1), ("metastable", 2), ("global", 3), ("forgotten", 0)):
            assert row[name] == found.kinds.share(FixedPoint(kind)), name
        assert row["metastable_size"] == pytest.approx(found.kinds.median_size(), nan_ok=True)
        # 24 queries are fewer than the sample, so that these are the same equilibria.
        radius = found.spectrum.radius.double()
        assert row["radius_median"] == pytest.approx(float(radius.quantile(0.5)), rel=1e-3)
        assert row["radius_p95"] == pytest.approx(float(radius.quantile(0.95)), rel=1e-3)
        assert row["dead"] == len(found.usage.dead)
        assert row["basin_changes"] == pytest.approx(float(found.basins.mean()))
        if unit is None:
            assert row["stored"] == int(found.storage.stored.sum())
        else:
            assert np.isnan(row["stored"])  # the theorem does not cover forgetting
    sharp, soft = (
        [r for r in comparison.rows if r["beta"] == beta and r["steps"] == CONVERGED] for beta in (40, 8)
    )
    assert min(r["single"] for r in sharp) > max(r["single"] for r in soft)


def test_the_sample_of_the_spectrum_is_as_large_as_asked():
    rows = {}
    for count in (0, 5):
        spec = replace(SMALL, spectrum=count, forgetting=("none",), beta=(8.0,), mask=(), noise=(0.3,))
        comparison = compare(spec)
        (outcome,) = [o for o in comparison.outcomes if o.points is not None]
        assert int((~np.isnan(outcome.points.radius)).sum()) == count
        rows[count] = next(row for row in comparison.rows if row["steps"] == CONVERGED)
    assert np.isnan(rows[0]["radius_median"])
    assert 0 < rows[5]["radius_median"] < 1
