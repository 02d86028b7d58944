"""The pairs by which other embedders are measured have the similarities that are written beside them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy.policy.scale import ANCHORS
from proxy.semcache.onnx import OnnxEmbedder


async def test_the_anchors_similarities_are_those_of_the_default_embedder() -> None:
    with ThreadPoolExecutor(max_workers=1) as worker:
        embedder = OnnxEmbedder.minilm(worker)
        found = [float(await embedder.embed(anchor.a) @ await embedder.embed(anchor.b)) for anchor in ANCHORS]
    assert found == pytest.approx([anchor.similarity for anchor in ANCHORS], abs=0.03)
