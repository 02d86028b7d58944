"""Texts to vectors with the default embedder, remembered in a file between runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proxy.semcache.onnx import OnnxEmbedder

Vectors = dict[str, npt.NDArray[np.float32]]


def embed_all(texts: Iterable[str], remembered: Path | None = None) -> Vectors:
    """A vector of length 1 for each text. About 150 new ones a second; `remembered` is an .npz file, made if missing."""
    vectors: Vectors = {}
    if remembered is not None and remembered.exists():
        with np.load(remembered, allow_pickle=True) as kept:
            vectors = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))
    missing = [text for text in dict.fromkeys(texts) if text not in vectors]
    if missing:
        vectors.update(zip(missing, asyncio.run(_embed(missing)), strict=True))
        if remembered is not None:
            keys = np.array(list(vectors), dtype=object)
            np.savez(remembered, texts=keys, vectors=np.stack(list(vectors.values())))
    return vectors


async def _embed(texts: list[str]) -> list[npt.NDArray[np.float32]]:
    with ThreadPoolExecutor(1) as worker:
        embedder = OnnxEmbedder.minilm(worker)
        return [await embedder.embed(text) for text in texts]
