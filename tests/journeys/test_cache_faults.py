"""The disk, the database or the process fails: every call is served, the log says what is wrong, and nothing is lost.

And when it is over, the cache goes on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from proxy.errors import ConfigError
from proxy.settings import Settings
from proxy.store.migrations import MAIN
from tests.conftest import Ledger, Proxy, make_settings, running_proxy
from tests.fakes.caching import (
    ASKED,
    BY_MEANING,
    LIKE,
    UNLIKE,
    asking,
    cache,
    embedded,
    fate,
    has_indexed,
    has_kept,
)
from tests.fakes.upstream import FakeUpstream, echo
from tests.test_command import Command, command
from tests.waiting import until

# Nothing is in memory: each answer that is served is one that was read from the disk.
FROM_DISK = BY_MEANING | {"memory_mb": 0}
ONLY_CACHED = {"Cache-Control": "only-if-cached"}
_LONG = 30


@pytest.fixture
def settings(tmp_path: Path, upstream: FakeUpstream, embedder: FakeUpstream) -> Settings:
    upstream.plays(echo)
    return make_settings(tmp_path, upstream.url, embedder.url, cache=FROM_DISK)


async def keep(settings: Settings, *questions: str) -> None:
    """Have these questions answered and found by meaning, by a proxy that ends."""
    async with running_proxy(settings) as proxy:
        for question in questions:
            await proxy.ask(**asking(question))
        await has_indexed(proxy, len(questions))


def rows(path: Path, query: str, *values: Any) -> list[Any]:
    """What another program gets from the file, or does to it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(query, values).fetchall()


async def is_ready(proxy: Proxy) -> None:
    """Wait until the index has all that it will have."""
    await until(lambda: cache(proxy), lambda found: found["semantic"]["is_ready"])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said aloud; none of it is a bug of ours."""
    assert "failed" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------------- it cannot be used at all


def rubbish(path: Path) -> Path:
    path.write_bytes(b"not a database at all, but somebody's notes\n" * 200)
    return path


def damaged_head(path: Path) -> Path:
    """One whose first page, which says what else there is, was overwritten."""
    rows(path, "CREATE TABLE capability (x)")
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xfe" * 3000)
    return path


def of_a_newer_version(path: Path) -> Path:
    rows(path, "PRAGMA journal_mode=WAL")
    rows(path, "CREATE TABLE of_tomorrow (x)")
    rows(path, f"PRAGMA user_version={len(MAIN) + 1}")
    return path


def a_directory(path: Path) -> Path:
    path.mkdir()
    return path


UNUSABLE: dict[Callable[[Path], Path], str] = {
    rubbish: "cannot be used: file is not a database",
    damaged_head: "cannot be used: database disk image is malformed",
    of_a_newer_version: "was written by a newer version of the proxy",
    a_directory: "cannot be opened: unable to open database file",
}


@pytest.mark.parametrize(("make", "words"), UNUSABLE.items(), ids=[make.__name__ for make in UNUSABLE])
async def test_cached_answers_that_cannot_be_used_are_done_without_and_left_alone(
    settings: Settings,
    upstream: FakeUpstream,
    make: Callable[[Path], Path],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make(settings.store.cache_path)
    before = path.read_bytes() if path.is_file() else b""
    async with running_proxy(settings) as proxy:
        for _ in range(2):
            assert await fate(proxy, **asking(ASKED)) == "miss"
        found = await cache(proxy)
    assert len(upstream.requests) == 2
    assert (found["entries"], found["problem"]) == (0, f"{path} {words}")
    assert warnings(caplog) == [f"no answers are cached until the proxy is started again: {path} {words}"]
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize(("make", "words"), UNUSABLE.items(), ids=[make.__name__ for make in UNUSABLE])
async def test_a_main_database_that_cannot_be_used_is_refused_and_left_alone(
    settings: Settings, make: Callable[[Path], Path], words: str
) -> None:
    """The proxy does not begin: it can tell neither what it would forget, nor what it would overwrite."""
    path = make(settings.store.path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ConfigError) as caught:
        async with running_proxy(settings):
            pass
    assert caught.value.problems == (f"store.path: {path} {words}",)
    assert (path.read_bytes() if path.is_file() else b"") == before


# ---------------------------------------------------------------------- a page is damaged


def overwrite(path: Path, name: str) -> None:
    """Overwrite a page of a table or an index: the first leaf.

    https://www.sqlite.org/fileformat2.html#b_tree_pages
    """
    [(page, size)] = rows(path, "SELECT rootpage, page_size FROM sqlite_master, pragma_page_size WHERE name=?", name)
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        root = file.read(size)
        if root[0] == 5:  # an inner page of a table: its first cell begins with the number of a page
            cell = int.from_bytes(root[12:14])
            page = int.from_bytes(root[cell : cell + 4])
        file.seek((page - 1) * size)
        file.write(b"\xfe" * size)


# What is overwritten; whether an answer that was kept is still found, word for word and by meaning; what the log says first.
PAGES: list[tuple[str, str, str, str]] = [
    ("answer", "miss", "miss", "cached answers could not be read"),
    ("sqlite_autoindex_answer_1", "hit; exact", "hit; semantic", "cached answers could not be stored"),
    ("answer_body", "miss", "miss", "cached answers could not be read"),
    ("answer_question", "miss", "miss", "some cached answers could not be read"),
    ("answer_ids", "hit; exact", "hit; semantic", "cached answers could not be stored"),
    ("capability", "hit; exact", "hit; semantic", "what was learned of upstreams could not be read"),
]


@pytest.mark.parametrize(("name", "exact", "by_meaning", "said"), PAGES, ids=[page[0] for page in PAGES])
async def test_a_damaged_page_is_a_miss_and_when_it_is_mended_all_is_there_again(
    settings: Settings, caplog: pytest.LogCaptureFixture, name: str, exact: str, by_meaning: str, said: str
) -> None:
    await keep(settings, ASKED)
    path = settings.store.path if name == "capability" else settings.store.cache_path
    whole = path.read_bytes()
    overwrite(path, name)
    no_store = {"Cache-Control": "no-store"}
    async with running_proxy(settings) as proxy:
        await is_ready(proxy)
        found = await fate(proxy, no_store, **asking(ASKED)), await fate(proxy, no_store, **asking(LIKE))
        assert found == (exact, by_meaning)
        await proxy.ask(**asking(f"{ASKED} 2"))
    assert any(said in warning for warning in warnings(caplog)), caplog.text
    path.write_bytes(whole)
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, 2 if name == "capability" else 1)  # That page is in the other file.
        assert await fate(proxy, ONLY_CACHED, **asking(ASKED)) == "hit; exact"
        assert await fate(proxy, ONLY_CACHED, **asking(LIKE)) == "hit; semantic"


@pytest.mark.parametrize("name", ["answer", "answer_body", "answer_question"])
async def test_a_damaged_page_takes_no_other_with_it(
    settings: Settings, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    questions = [f"{ASKED} {number} {'?' * 200}" for number in range(50)]
    await keep(settings, *questions)
    overwrite(settings.store.cache_path, name)
    no_store = {"Cache-Control": "no-store"}
    async with running_proxy(settings) as proxy:
        await is_ready(proxy)
        for question, exact, by_meaning in (
            (questions[0], "miss", "miss"),
            (questions[-1], "hit; exact", "hit; semantic"),
        ):
            assert await fate(proxy, no_store, **asking(question)) == exact
            assert await fate(proxy, no_store, **asking(question.upper())) == by_meaning
        found = await cache(proxy)
    assert (10 < found["entries"] < 50) == (name == "answer")
    assert (10 < found["semantic"]["indexed"] < 50) == (name != "answer_body")
    assert warnings(caplog)


# ---------------------------------------------------------------------- a row is damaged

# Of a vector of 64 numbers in two bytes each.
VECTORS: dict[str, bytes | None] = {
    "sound": np.full(64, 0.125, "<f2").tobytes(),
    "none": None,
    "empty": b"",
    "too short": np.ones(10, "<f2").tobytes(),
    "one byte too long": np.full(64, 0.125, "<f2").tobytes() + b"x",
    "zeros": bytes(128),
    "not numbers": np.full(64, np.nan, "<f2").tobytes(),
    "infinite": np.full(64, np.inf, "<f2").tobytes(),
    "noise": random.Random(7).randbytes(128),
    "not of length 1": np.full(64, 5, "<f2").tobytes(),
}


async def test_a_damaged_vector_is_made_anew_and_takes_no_other_with_it(
    settings: Settings, embedder: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(settings, *(f"{ASKED} {number}" for number in range(len(VECTORS))))
    path = settings.store.cache_path
    whole = rows(path, "SELECT vector FROM answer_question ORDER BY id")
    for number, vector in enumerate(VECTORS.values(), 1):
        rows(path, "UPDATE answer_question SET vector=? WHERE id=?", vector, number)
    embedder.requests.clear()
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, len(VECTORS))
        assert embedded(embedder) == [f"{ASKED} {number}" for number in range(1, len(VECTORS))]
        for number in range(1, len(VECTORS)):
            assert await fate(proxy, ONLY_CACHED, **asking(f"{LIKE} {number}")) == "hit; semantic", number
    [told] = warnings(caplog)
    assert (
        told
        == f"{len(VECTORS) - 1} questions of cached answers have no vector of upstream:up2/small yet: they get one now"
    )
    assert rows(path, "SELECT vector FROM answer_question ORDER BY id")[1:] == whole[1:]


# ---------------------------------------------------------------------- nothing can be written


def process(settings: Settings) -> Any:
    """The proxy as a process of its own."""
    directory = settings.store.path.parent
    config = str(directory / "headwater.toml")
    return command(directory, "serve", "--config", config, HEADWATER_SERVER__ACCESS_LOG="false")


@asynccontextmanager
async def client_of(running: Command) -> AsyncIterator[Proxy]:
    async with aiohttp.ClientSession() as client:
        yield Proxy(await running.base(), client, Ledger())


async def says(running: Command, words: str) -> None:
    """Wait until it has said that on standard error."""
    assert running.process.stderr is not None
    async with asyncio.timeout(_LONG):
        while words.encode() not in (line := await running.process.stderr.readline()):
            assert line, "it has ended"


async def ends_well(running: Command) -> str:
    """Stop the process; what it said on standard error."""
    running.process.send_signal(signal.SIGTERM)
    error = await running.stderr()
    assert await running.exit_code() == 0, error
    assert "Traceback" not in error
    return error


async def test_a_full_disk_keeps_nobody_from_an_answer_and_what_was_kept_is_kept(settings: Settings) -> None:
    """Full for this process, as no file of its own may grow: setrlimit(2)."""
    async with process(settings) as running, client_of(running) as proxy:
        await proxy.ask(**asking(ASKED))
        await has_indexed(proxy, 1)
        unlimited = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        for number in range(3):
            assert await fate(proxy, **asking(f"{UNLIKE} {number}")) == "miss"
        await says(running, "WARNING cached answers could not be stored: ")
        for find, found in ((ASKED, "hit; exact"), (LIKE, "hit; semantic")):
            assert await fate(proxy, ONLY_CACHED, **asking(find)) == found
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, unlimited)
        await proxy.ask(**asking(f"{ASKED} 2"))
        await has_kept(proxy, 2)
        await ends_well(running)
    assert rows(settings.store.cache_path, "SELECT question FROM answer_question ORDER BY id") == [
        (ASKED,),
        (f"{ASKED} 2",),
    ]


async def test_a_database_that_another_process_has_locked_keeps_nobody_waiting(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """What is answered meanwhile is written when the lock is gone."""
    settings = replace(settings, cache=replace(settings.cache, memory_mb=64))
    path = settings.store.cache_path
    await keep(settings, ASKED)
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, 1)
        assert await fate(proxy, **asking(ASKED)) == "hit; exact", "and it is in memory from now on"
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert await fate(proxy, **asking(UNLIKE)) == "miss"
            await has_indexed(proxy, 2)
            for question in (ASKED, UNLIKE):
                assert await fate(proxy, ONLY_CACHED, **asking(question)) == "hit; exact"
                assert await fate(proxy, ONLY_CACHED, **asking(question.upper())) == "hit; semantic"
            assert rows(path, "SELECT count(*) FROM answer") == [(1,)]
            other.execute("ROLLBACK")
    assert rows(path, "SELECT question FROM answer_question ORDER BY id") == [(ASKED,), (UNLIKE,)]
    assert warnings(caplog) == []


# ---------------------------------------------------------------------- the process is killed


async def test_after_kill_9_each_answer_is_whole_and_found_by_its_key_and_by_its_meaning(settings: Settings) -> None:
    """At any moment of any round, while eight clients ask; what was on the disk before is there after it."""
    luck = random.Random()
    numbers = count()
    has_asked = asyncio.Semaphore(0)
    kept: set[tuple[int]] = set()

    async def ask(proxy: Proxy) -> None:
        with suppress(aiohttp.ClientError):
            for number in numbers:
                await proxy.ask(**asking(f"{ASKED} {number}"))
                has_asked.release()

    for _ in range(2):
        async with process(settings) as running, client_of(running) as proxy:
            clients = [asyncio.create_task(ask(proxy)) for _ in range(8)]
            for _ in range(luck.randrange(5, 40)):
                await has_asked.acquire()
            kept.update(rows(settings.store.cache_path, "SELECT id FROM answer"))
            running.process.kill()
            await asyncio.gather(*clients)
    assert rows(settings.store.cache_path, "PRAGMA integrity_check") == [("ok",)]
    async with running_proxy(settings) as proxy, proxy.get("/admin/cache/entries?limit=1000") as response:
        listed = (await response.json())["data"]
        assert {(entry["id"],) for entry in listed} >= kept
        await has_indexed(proxy, len(listed))
        for entry in listed:
            question = entry["question"]
            for asked, found in ((question, "hit; exact"), (question.upper(), "hit; semantic")):
                async with proxy.chat(headers=ONLY_CACHED, **asking(asked)) as response:
                    assert (response.status, response.headers["x-cache"]) == (200, found)
                    assert (await response.json())["choices"][0]["message"]["content"] == f"answer to {question}"
