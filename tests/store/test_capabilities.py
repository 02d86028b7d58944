"""What was learned: known at once, stored soon, shared between processes, and never a reason to fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiosqlite
import pytest
import pytest_asyncio

from proxy.policy.capabilities import Capability, Fact, Key, Topic
from proxy.store import db, migrations
from proxy.store.capabilities import CapabilityStore
from proxy.tasks import Tasks

KEY = Key("up", "gpt-4o", "abcd1234")
OTHER = Key("up", "gpt-4o", "none")
YES = Fact(True, "answered with an event stream", 1000.5)
NO = Fact(False, "said: “not supported” \u2028", 2000.25)


class Process:
    """What one process has of the database."""

    def __init__(self, connection: aiosqlite.Connection, tasks: Tasks, store: CapabilityStore) -> None:
        self.connection, self.tasks, self.store = connection, tasks, store

    async def written(self) -> None:
        assert await self.tasks.wait(20)


Start = Callable[[], Awaitable[Process]]


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts processes on one file; they end with the test."""
    async with AsyncExitStack() as stack:

        async def starter() -> Process:
            connection = await db.connect(tmp_path / "headwater.db", migrations.MAIN)
            stack.push_async_callback(connection.close)
            tasks = Tasks()
            stack.push_async_callback(tasks.close)
            return Process(connection, tasks, await CapabilityStore.open(connection, tasks))

        yield starter


async def test_what_is_learned_is_known_at_once_and_to_the_next_process(start: Start) -> None:
    one = await start()
    assert one.store.get(KEY) == Capability()
    one.store.learn(KEY, Topic.STREAMS, YES)
    one.store.learn(KEY, Topic.BUFFERS, NO)
    one.store.learn(OTHER, Topic.STREAMS, NO)
    assert one.store.get(KEY).facts == {Topic.STREAMS: YES, Topic.BUFFERS: NO}
    await one.written()
    two = await start()
    assert dict(two.store.all()) == dict(one.store.all())
    assert [key for key, _ in two.store.all()] == sorted([KEY, OTHER])


async def test_a_newer_fact_takes_the_place_of_the_older_one(start: Start) -> None:
    one = await start()
    for fact in (YES, NO, YES, NO):
        one.store.learn(KEY, Topic.STREAMS, fact)
    await one.written()
    assert (await start()).store.get(KEY).facts == {Topic.STREAMS: NO}


async def test_two_processes_see_each_others_facts(start: Start) -> None:
    """`headwater probe` beside a running proxy."""
    server, probe = await start(), await start()
    probe.store.learn(KEY, Topic.STREAMS, NO)
    await probe.written()
    assert server.store.get(KEY) == Capability()
    await server.store.refresh()
    assert server.store.get(KEY).facts == {Topic.STREAMS: NO}
    server.store.learn(OTHER, Topic.STREAMS, YES)
    await server.written()
    await probe.store.refresh()
    assert probe.store.get(OTHER).facts == {Topic.STREAMS: YES}
    probe.store.forget(KEY)
    await probe.written()
    await server.store.refresh()
    assert dict(server.store.all()) == {OTHER: Capability({Topic.STREAMS: YES})}


async def test_a_refresh_without_news_changes_nothing(start: Start) -> None:
    one = await start()
    one.store.learn(KEY, Topic.STREAMS, YES)
    await one.store.refresh()
    await one.written()
    await one.store.refresh()
    assert one.store.get(KEY).facts == {Topic.STREAMS: YES}


async def test_what_is_forgotten_stays_forgotten(start: Start) -> None:
    one = await start()
    one.store.learn(KEY, Topic.STREAMS, YES)
    one.store.learn(KEY, Topic.BUFFERS, NO)
    one.store.learn(OTHER, Topic.STREAMS, YES)
    await one.written()
    assert one.store.forget(KEY)
    assert not one.store.forget(KEY)
    assert one.store.get(KEY) == Capability()
    await one.written()
    assert [key for key, _ in (await start()).store.all()] == [OTHER]


async def test_what_is_learned_after_it_was_forgotten_counts(start: Start) -> None:
    one = await start()
    one.store.learn(KEY, Topic.BUFFERS, YES)
    one.store.learn(KEY, Topic.STREAMS, YES)
    one.store.forget(KEY)
    one.store.learn(KEY, Topic.STREAMS, NO)
    await one.written()
    assert (await start()).store.get(KEY).facts == {Topic.STREAMS: NO}


async def test_closing_writes_what_is_still_unwritten_also_while_a_write_is_going_on(start: Start) -> None:
    one = await start()
    one.store.learn(KEY, Topic.STREAMS, YES)
    async with one.connection.execute("SELECT 1"):
        pass  # by now the first write has begun
    one.store.learn(OTHER, Topic.STREAMS, NO)
    await one.store.close()
    assert {key for key, _ in (await start()).store.all()} == {KEY, OTHER}


@pytest.mark.parametrize("learned_before", [0, 1, 30])
@pytest.mark.parametrize("learned_after", [None, *range(8)])
async def test_own_facts_and_those_of_another_process_are_both_kept_whenever_they_are_learned(
    start: Start, learned_before: int, learned_after: int | None
) -> None:
    """Facts are written and learned while those of another process are read: before, and after each step of the reading."""
    one, two = await start(), await start()
    two.store.learn(KEY, Topic.STREAMS, NO)
    await two.written()
    mine = [Key("up", f"model-{number}", "none") for number in range(learned_before)]
    for key in mine:
        one.store.learn(key, Topic.STREAMS, YES)

    async def learn_one_more() -> None:
        if learned_after is not None:
            for _ in range(learned_after):
                async with one.connection.execute("SELECT 1"):
                    pass
            mine.append(OTHER)
            one.store.learn(OTHER, Topic.STREAMS, YES)

    await asyncio.gather(one.store.refresh(), learn_one_more())
    assert {key for key, _ in one.store.all()} >= set(mine)
    await one.written()
    await one.store.refresh()
    assert {key for key, _ in one.store.all()} == {KEY, *mine}


@pytest.mark.parametrize("reason", ["read-only", "locked", "no table"])
async def test_a_database_that_cannot_be_written_is_a_warning_and_the_next_write_goes_well(
    start: Start, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await start(), await start()
    undo = {
        "read-only": "PRAGMA query_only=OFF",
        "locked": "ROLLBACK",
        "no table": "ALTER TABLE away RENAME TO capability",
    }
    await one.connection.execute("PRAGMA busy_timeout=0")
    if reason == "read-only":
        await one.connection.execute("PRAGMA query_only=ON")
    elif reason == "locked":
        await other.connection.execute("BEGIN IMMEDIATE")
    else:
        await other.connection.execute("ALTER TABLE capability RENAME TO away")
    with caplog.at_level(logging.WARNING):
        one.store.learn(KEY, Topic.STREAMS, YES)
        await one.written()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "could not be stored" in record.getMessage()
    assert one.store.get(KEY).facts == {Topic.STREAMS: YES}
    await (one if reason == "read-only" else other).connection.execute(undo[reason])
    one.store.learn(OTHER, Topic.STREAMS, NO)
    await one.written()
    await other.store.refresh()
    assert other.store.get(OTHER).facts == {Topic.STREAMS: NO}


async def test_a_topic_of_another_version_is_passed_over(start: Start) -> None:
    one = await start()
    await one.connection.execute("INSERT INTO capability VALUES ('up', 'm', 'none', 'sings', 1, 'heard', 1.0)")
    one.store.learn(KEY, Topic.STREAMS, YES)
    await one.written()
    assert dict((await start()).store.all()) == {KEY: Capability({Topic.STREAMS: YES})}


async def test_a_database_that_cannot_be_read_is_one_warning_and_what_was_known_stays(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await start(), await start()
    one.store.learn(KEY, Topic.STREAMS, YES)
    await one.written()
    await other.connection.execute("ALTER TABLE capability RENAME TO away")
    for _ in range(3):
        await one.store.refresh()
    assert one.store.get(KEY).facts == {Topic.STREAMS: YES}
    [record] = caplog.records
    assert "could not be read" in record.getMessage()
    await other.connection.execute("ALTER TABLE away RENAME TO capability")
    other.store.learn(OTHER, Topic.STREAMS, NO)
    await other.written()
    await one.store.refresh()
    assert one.store.get(OTHER).facts == {Topic.STREAMS: NO}
