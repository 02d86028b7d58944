"""How often something took how long: plain counts, for the objects of prometheus-client cost a microsecond each time.

`observe` takes a fifth of one. Where even that is too much (`pump.py`), `counts` is counted in directly, by the same bisection.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

# For a list is searched a little faster than a tuple.
BOUNDS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0]
"""From an answer out of the cache to a model that thinks. In seconds, as Prometheus wants all times."""

LONG_BOUNDS_S = [*BOUNDS_S, 120.0, 300.0, 600.0]
"""For whole answers."""


class Histogram:
    """Values by size. `bounds` rise; what equals a bound is counted below it, as Prometheus' `le` wants it.

    `counts` has a place for each bound, and one for what is larger than all; `total` is the sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other.counts, other.total = self.counts.copy(), self.total
        return other

    def cumulated(self) -> Iterator[tuple[float, int]]:
        """Each bound and how many values are not larger, the last bound infinity."""
        return zip((*self.bounds, math.inf), accumulate(self.counts), strict=True)
