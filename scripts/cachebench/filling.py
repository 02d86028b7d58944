"""Many entries for a cache: real questions' vectors, and vectors near to them where there are too few."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

import numpy as np

from proxy.chat import NO_CACHE_WISH, Lookup
from proxy.semcache.embedder import Vector
from proxy.store.answers import AnswerStore
from scripts.cachebench.cached import entry

_NEARNESS = 0.9
_PAUSE_S = 0.005
_TRIES = 2000


async def fill(
    store: AnswerStore,
    partition: bytes,
    scope: str,
    vectors: Mapping[str, Vector],
    count: int,
    seed: int,
) -> None:
    """Put so many entries into one partition. The first have the texts' own vectors; each later one has a vector at a cosine
    of about 0.9 to a text's, and that text with a number."""
    chance = np.random.default_rng(seed)
    texts = list(vectors)
    for number in range(count):
        text = texts[number % len(texts)]
        vector = vectors[text]
        if number >= len(texts):
            text = f"{text} ({number // len(texts)})"
            noise = chance.standard_normal(vector.size).astype(np.float32)
            vector = _NEARNESS * vector + (1 - _NEARNESS**2) ** 0.5 * noise / np.linalg.norm(noise)
            vector /= np.linalg.norm(vector)
        key = hashlib.blake2b(partition + text.encode(), digest_size=16).digest()
        lookup = Lookup(key, scope, NO_CACHE_WISH, text, partition)
        new = entry(lookup, vector.astype("<f2").tobytes())
        for _ in range(_TRIES):
            # The store sets ids aside by the block, and gives none out until the next block is there.
            if await store.put(new) is not None:
                break
            await asyncio.sleep(_PAUSE_S)
        else:
            raise RuntimeError("the database gives no ids out")
