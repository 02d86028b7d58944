"""The cache by itself: real SQLite, a real index, and an embedder that is a scripted upstream."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.chat import CacheWish, Lookup
from proxy.semcache.cache import AnswerCache, opened
from proxy.store import db, migrations
from proxy.store.entries import NewEntry
from proxy.tasks import Tasks
from proxy.upstream.session import UpstreamSession
from tests.conftest import make_settings
from tests.fakes.caching import ASKED, LIKE, embeddings
from tests.fakes.upstream import FakeUpstream, Received, Wire, refuse

PARTITION = b"partition-of-16b"
_LONG = 20


@dataclass
class Opened:
    """A cache, and the connection of its database."""

    cache: AnswerCache
    connection: db.Connection

    async def keep(self, question: str, key: bytes = b"k" * 16, scope: str = "s") -> None:
        new = NewEntry(
            key=key,
            scope=scope,
            namespace="",
            model="m",
            target="up/m",
            answer=b"{}",
            prompt_tokens=3,
            completion_tokens=5,
            duration_s=0,
            created_at=time.time(),
            partition=PARTITION,
            question=question,
        )
        await self.cache.keep(Lookup(key, scope, CacheWish()), new)

    async def find(self, question: str, key: bytes = b"?" * 16, scope: str = "s", **wish: Any) -> str | None:
        hit = await self.cache.find(Lookup(key, scope, CacheWish(**wish), question, PARTITION))
        return None if hit is None else hit.kind

    async def has_indexed(self, count: int) -> None:
        async with asyncio.timeout(_LONG):
            while self.cache.meaning.indexed != count or not self.cache.meaning.is_ready:
                await self.connection.data_version()

    async def is_refreshed(self, count: int) -> None:
        """Refresh, as a server does all the time, until that many questions can be found."""
        async with asyncio.timeout(_LONG):
            while self.cache.meaning.indexed != count or not self.cache.meaning.is_ready:
                await self.cache.refresh()


@asynccontextmanager
async def cache(directory: Path, url: str, **options: Any) -> AsyncIterator[Opened]:
    defaults = {"embedder": "upstream:up/small", "lookup_budget_ms": 20_000}
    settings = make_settings(directory, url, cache=defaults | options)
    tasks, connection, session = (
        Tasks(),
        await db.connect(settings.store.cache_path, migrations.CACHE),
        UpstreamSession(settings),
    )
    try:
        async with opened(settings, connection, session, tasks) as made:
            yield Opened(made, connection)
    finally:
        await tasks.close()
        await session.close()
        await connection.close()


Start = Callable[..., Awaitable[Opened]]


@pytest.fixture
async def start(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Opened:
            opened = await stack.enter_async_context(cache(tmp_path, upstream.url, **options))
            await opened.has_indexed(0)
            upstream.requests.clear()
            return opened

        upstream.plays(embeddings)
        yield start


async def test_what_is_kept_is_found_by_its_key_and_by_its_meaning(start: Start, upstream: FakeUpstream) -> None:
    one = await start()
    assert await one.find(ASKED) is None
    await one.keep(ASKED)
    assert await one.find(ASKED, key=b"k" * 16) == "exact"
    await one.has_indexed(1)
    assert await one.find(LIKE) == "semantic"
    assert await one.find(LIKE, scope="other") is None, "whatever else is equal"
    assert await one.find(ASKED, key=b"k" * 16, scope="other") is None
    assert await one.find(LIKE, max_age_s=0) is None
    assert await one.find(LIKE, looks_up=False) is None
    figures = one.cache.figures
    assert (figures.exact_hits, figures.semantic_hits, figures.misses) == (1, 1, 4)
    assert figures.saved == {"up/m": (6, 10)}


async def test_an_embedder_that_fails_is_asked_again_for_what_it_owes(
    start: Start, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that was kept meanwhile stays unfound, and the log is not flooded."""
    one = await start()
    await one.cache.refresh()
    upstream.plays(refuse(400))
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            await one.keep(f"{ASKED} {number}", key=b"%016d" % number)
        await upstream.asked(3)
        for _ in range(3):
            await one.cache.refresh()
        assert one.cache.meaning.indexed == 0
    assert len(caplog.records) == 1
    upstream.plays(embeddings)
    await one.is_refreshed(3)
    assert await one.find(f"{LIKE} 2") == "semantic"


async def test_an_embedder_that_fails_at_the_start_is_asked_again(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with cache(tmp_path, upstream.url, embedder="upstream:up/old") as one:
        upstream.plays(embeddings)
        await one.keep(ASKED)
        await one.has_indexed(1)
    upstream.plays(refuse(400))
    async with cache(tmp_path, upstream.url) as two:
        await two.keep("Another question", key=b"l" * 16)
        assert await two.find(LIKE) is None
        upstream.plays(embeddings)
        await two.is_refreshed(2)
        assert await two.find(LIKE) == "semantic"


async def test_questions_that_cannot_be_read_at_the_start_are_read_again(
    tmp_path: Path, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.plays(embeddings)
    async with cache(tmp_path, upstream.url) as one:
        await one.keep(ASKED)
        await one.has_indexed(1)
        await one.cache.refresh()
        await one.connection.execute("ALTER TABLE answer_question RENAME TO away")
    async with cache(tmp_path, upstream.url) as two:
        async with asyncio.timeout(_LONG):
            while not caplog.records:
                await two.connection.data_version()
        assert (two.cache.meaning.indexed, two.cache.meaning.is_ready) == (0, False)
        await two.connection.execute("ALTER TABLE away RENAME TO answer_question")
        await two.is_refreshed(1)
        assert await two.find(LIKE) == "semantic"
    [record] = caplog.records
    assert "not all questions are compared by meaning" in record.getMessage()


async def test_another_model_under_the_same_name_is_noticed_and_all_is_embedded_anew(
    tmp_path: Path, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    async with cache(tmp_path, upstream.url) as one:
        upstream.plays(partial(embeddings, size=48))
        await one.keep(ASKED)
        await one.has_indexed(1)
    upstream.plays(embeddings)
    async with cache(tmp_path, upstream.url) as two, asyncio.timeout(_LONG):
        while await two.find(LIKE) is None:
            await two.cache.refresh()
    assert "no vector of upstream:up/small yet: they get one now" in caplog.text


@pytest.mark.parametrize("when", ["it is embedded", "it is looked for"])
async def test_what_is_deleted_meanwhile_is_not_found(start: Start, upstream: FakeUpstream, when: str) -> None:
    may_answer = asyncio.Event()

    async def late(request: Received, wire: Wire) -> None:
        await may_answer.wait()
        await embeddings(request, wire)

    one = await start()
    upstream.plays(late)
    await one.keep(ASKED)
    await upstream.asked(1)
    if when == "it is embedded":
        assert await one.cache.store.delete(1)
        may_answer.set()
    else:
        may_answer.set()
        await one.has_indexed(1)
        may_answer.clear()
        finding = asyncio.create_task(one.find(LIKE))
        await upstream.asked(2)
        assert await one.cache.store.delete(1)
        may_answer.set()
        assert await finding is None
    await one.keep("Another question", key=b"l" * 16)
    await one.has_indexed(1)
    assert await one.find(LIKE) is None


async def test_a_disk_that_does_not_answer_is_a_miss(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    one = await start(lookup_budget_ms=5, memory_mb=0)
    await one.keep(ASKED)
    async with asyncio.timeout(_LONG):
        while one.cache.store.peek(1) is not None:  # until it is on disk
            await one.connection.data_version()
    is_held, may_go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold(_: object) -> None:
        loop.call_soon_threadsafe(is_held.set)
        may_go_on.wait(_LONG)

    holding = asyncio.create_task(one.connection.run(hold))
    await is_held.wait()
    try:
        assert await one.find(ASKED, key=b"k" * 16) is None
    finally:
        may_go_on.set()
        await holding
    assert "within 5 ms" in caplog.text
