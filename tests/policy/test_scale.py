"""Another embedder's similarities on the guard's scale."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.scale import ANCHORS, Scale
from tests.conftest import examples

_OURS = [anchor.similarity for anchor in ANCHORS]
_COSINES = st.floats(-1, 1)


@given(_COSINES)
def test_its_own_similarities_are_the_identity(cosine: float) -> None:
    assert Scale().apply(cosine) == cosine
    assert Scale.fit(_OURS).apply(cosine) == pytest.approx(cosine, abs=1e-9)


def test_a_narrow_band_is_spread() -> None:
    scale = Scale.fit([0.8 + cosine / 10 for cosine in _OURS])
    assert scale.apply(0.8 + 0.9 / 10) == pytest.approx(0.9, abs=0.01)
    assert scale.apply(0.8 + 0.1 / 10) == pytest.approx(0.1, abs=0.01)


@examples(50)
@given(st.lists(_COSINES, min_size=len(ANCHORS), max_size=len(ANCHORS)), _COSINES, _COSINES)
def test_the_order_stays(similarities: list[float], one: float, other: float) -> None:
    if max(similarities) - min(similarities) <= 1e-3:
        return
    scale = Scale.fit(similarities)
    low, high = (scale.apply(cosine) for cosine in sorted((one, other)))
    assert -1 <= low <= high <= 1


def test_what_is_no_number_is_far_away() -> None:
    assert Scale.fit(_OURS).apply(float("nan")) == -1
    assert Scale().apply(float("nan")) == -1


@pytest.mark.parametrize("similarities", [[], _OURS[:-1], [0.5] * len(ANCHORS), [float("nan")] * len(ANCHORS)])
def test_what_tells_nothing_is_refused(similarities: list[float]) -> None:
    with pytest.raises(ValueError, match=r"similarit"):
        Scale.fit(similarities)
