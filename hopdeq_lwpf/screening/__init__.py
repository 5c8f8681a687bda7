"""Certified screening: iterate on the few patterns that matter to a query, and prove that the others do not.

Near an equilibrium nearly all weight lies on few of many patterns. One pass over all of them finds these, its
candidates, for each query. The candidates are kept as they are; what the others carry is merged: the kept ones into one
pattern, their weighted mean, and the forgotten ones, which act on the denominator alone, into their number. That small
problem equals the whole one at the reference, where the pass was made, and is solved by any solver.

How far it may be trusted follows from |change of a score| <= beta R |dz|, R the length of the longest pattern, dz the
way from the reference: with delta = beta R |dz|, what is left out, of mass C at the reference, has a mass within
exp(+-delta) C. A solve ends where that could move f by more than a given share, and begins anew from a further pass.
Nothing counts as converged before a pass over all patterns has measured its residual.
"""

from hopdeq_lwpf.screening.screened import SCREEN_FROM as SCREEN_FROM
from hopdeq_lwpf.screening.screened import SCREEN_UP_TO as SCREEN_UP_TO
from hopdeq_lwpf.screening.screened import Screened as Screened
from hopdeq_lwpf.screening.screened import screens as screens
