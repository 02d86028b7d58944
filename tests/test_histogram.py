"""Counting by size: any values, against a plain count of those that are not larger than a bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.histogram import BOUNDS_S, LONG_BOUNDS_S, Histogram
from tests.conftest import examples

VALUES = st.lists(st.floats(0, 1000) | st.sampled_from(LONG_BOUNDS_S), max_size=30)


@examples(50)
@given(st.sampled_from([BOUNDS_S, LONG_BOUNDS_S]), VALUES)
def test_each_bound_tells_how_many_values_are_not_larger(bounds: list[float], values: list[float]) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    before = histogram.copy()
    histogram.observe(0.0)
    assert dict(before.cumulated()) == {bound: sum(value <= bound for value in values) for bound in (*bounds, math.inf)}
    assert before.total == histogram.total == pytest.approx(sum(values))
    assert dict(histogram.cumulated())[math.inf] == len(values) + 1
