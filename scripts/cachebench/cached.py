"""The proxy's own answer cache, in this process, over vectors that are known beforehand.

It is the cache of `proxy.semcache.cache` with a real database, a real index and the real guard; only the model is not run
again for texts whose vector is known. It waits for a lookup as long as it takes: how long that is, is another table's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from proxy.chat import NO_CACHE_WISH, Lookup
from proxy.semcache.cache import AnswerCache, opened_with
from proxy.semcache.embedder import Embedder, EmbeddingError, Vector
from proxy.semcache.vectors import Vectors
from proxy.settings import CacheSettings
from proxy.store.db import connect
from proxy.store.entries import NewEntry
from proxy.store.migrations import CACHE
from proxy.tasks import Tasks

MINILM = "all-MiniLM-L6-v2-int8"
"""The default embedder's name, under which vectors are stored."""

SETTINGS = CacheSettings(lookup_budget_ms=60_000)

_LOOK_S = 0.01
_LOOKS = 9000

_ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22},
    }
).encode()


class KnownVectors:
    """The default embedder's vectors of some texts."""

    name = MINILM
    dimension = 384
    at_once = 1

    def __init__(self, vectors: Mapping[str, Vector]) -> None:
        self._vectors = vectors

    async def embed(self, text: str) -> Vector:
        vector = self._vectors.get(text)
        if vector is None:
            raise EmbeddingError("a text whose vector is not known")
        return vector

    async def close(self) -> None:
        """Nothing is open."""


class Served(NamedTuple):
    """What the cache makes of a question. `score` is the best one found, -1 where the guard objects to all that is near;
    `best` is the question it belongs to; `given` is the question whose answer is served at the settings, None on a miss."""

    score: float
    best: str | None
    given: str | None


class Cached:
    """An answer cache to put questions into, and to ask."""

    def __init__(self, cache: AnswerCache) -> None:
        self.cache = cache

    async def filled(self) -> None:
        """Wait until all that is kept can be found. TimeoutError after a minute and a half."""
        for _ in range(_LOOKS):
            if self.cache.meaning.is_ready and self.cache.meaning.indexed >= self.cache.store.count:
                return
            await asyncio.sleep(_LOOK_S)
        raise TimeoutError("the index is not full")

    async def keep(self, partition: str, question: str) -> None:
        """Keep an answer to a question: as if one of an upstream had come to its end. TimeoutError after a minute and a half."""
        lookup = _lookup(partition, question)
        for _ in range(_LOOKS):
            await self.cache.keep(lookup, entry(lookup))
            if self.cache.store.find(lookup.key) is not None:
                return
            # The store sets ids aside by the block, and gives none out until the next block is there.
            await asyncio.sleep(_LOOK_S)
        raise TimeoutError("the database gives no ids out")

    async def serve(self, partition: str, question: str) -> str | None:
        """The question whose answer is served for this one; None on a miss."""
        hit = await self.cache.find(_lookup(partition, question))
        return hit.entry.question if hit is not None else None

    async def ask(self, partition: str, question: str) -> Served:
        """What is found for a question, and what is served."""
        lookup = _lookup(partition, question)
        assert lookup.partition is not None
        candidates = await self.cache.meaning.candidates(lookup.partition, question)
        hit = await self.cache.find(lookup)
        given = hit.entry.question if hit is not None else None
        best = candidates[0] if candidates and not candidates[0].objections else None
        if hit is not None and hit.kind == "exact":
            return Served(1.0, given, given)
        return Served(best.score, best.question, given) if best is not None else Served(-1.0, None, given)


def entry(lookup: Lookup, vector: bytes | None = None) -> NewEntry:
    """An answer to what was looked for; `vector` in float16, when it is known."""
    return NewEntry(
        key=lookup.key,
        scope=lookup.scope,
        namespace="",
        model="bench",
        target="bench/bench",
        answer=_ANSWER,
        prompt_tokens=20,
        completion_tokens=2,
        duration_s=1.0,
        created_at=time.time(),
        partition=lookup.partition,
        question=lookup.question,
        vector=vector,
        embedder=MINILM if vector is not None else None,
    )


@asynccontextmanager
async def opened(path: Path, embedder: Embedder, settings: CacheSettings = SETTINGS) -> AsyncIterator[Cached]:
    """A cache on the database at `path`, which is made if it is missing; the embedder is closed with it."""
    connection = await connect(path, CACHE)
    tasks = Tasks()
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="semcache") as worker:
            async with opened_with(settings, connection, Vectors(embedder), worker, tasks) as cache:
                yield Cached(cache)
    finally:
        await tasks.close()
        await connection.close()


def _lookup(partition: str, question: str) -> Lookup:
    part = _digest(partition)
    return Lookup(_digest(f"{partition}\n{question}"), "bench", NO_CACHE_WISH, question, part)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
