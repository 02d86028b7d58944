"""The file: made, brought up to date, or refused in words."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import aiosqlite
import pytest
import pytest_asyncio

from proxy.store import db
from proxy.store.migrations import CACHE, MAIN

Connect = Callable[..., Awaitable[aiosqlite.Connection]]


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    """`db.connect`, with connections that end with the test."""
    async with AsyncExitStack() as stack:

        async def connect_for_now(path: Path, steps: Sequence[str] = MAIN) -> aiosqlite.Connection:
            connection = await db.connect(path, steps)
            stack.push_async_callback(connection.close)
            return connection

        yield connect_for_now


def look(path: Path, query: str) -> list[tuple[object, ...]]:
    """What another program sees in the file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def make(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


async def test_a_missing_file_is_made_with_its_directory_at_the_newest_schema(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "headwater.db"
    connection = await connect(path)
    await connection.execute("INSERT INTO capability VALUES ('u', 'm', 'c', 'streams', 1, 'seen', 1.5)")
    assert look(path, "PRAGMA user_version") == [(len(MAIN),)]
    assert look(path, "PRAGMA journal_mode") == [("wal",)]
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert look(path, "SELECT * FROM capability") == [("u", "m", "c", "streams", 1, "seen", 1.5)]


async def test_a_file_that_is_up_to_date_keeps_its_rows_and_a_second_connection_is_welcome(
    connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "headwater.db"
    first = await connect(path)
    await first.execute("INSERT INTO capability VALUES ('u', 'm', 'c', 'streams', 1, 'seen', 1.5)")
    second = await connect(path)
    async with second.execute("SELECT count(*) FROM capability") as cursor:
        assert await cursor.fetchone() == (1,)


OLDER = [(steps, version) for steps in (MAIN, CACHE) for version in range(len(steps))]


@pytest.mark.parametrize(("steps", "version"), OLDER)
async def test_a_file_of_each_older_version_is_brought_up_to_date(
    connect: Connect, tmp_path: Path, steps: tuple[str, ...], version: int
) -> None:
    path = tmp_path / "headwater.db"
    older = [statement for step in steps[:version] for statement in step.split(";")]
    make(path, *older, "CREATE TABLE somebody_elses (x)", f"PRAGMA user_version={version}")
    await connect(path, steps)
    assert look(path, "PRAGMA user_version") == [(len(steps),)]
    assert ("capability" if steps is MAIN else "answer",) in look(path, "SELECT name FROM sqlite_master")
    assert ("somebody_elses",) in look(path, "SELECT name FROM sqlite_master")


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "headwater.db"
    make(path, "CREATE TABLE of_tomorrow (x)", f"PRAGMA user_version={len(MAIN) + 1}")
    with pytest.raises(db.UnusableError, match=f"{path} was written by a newer version"):
        await connect(path)
    assert look(path, "SELECT name FROM sqlite_master") == [("of_tomorrow",)]


async def test_what_is_no_database_is_refused_and_left_alone(connect: Connect, tmp_path: Path) -> None:
    garbage = tmp_path / "notes.txt"
    garbage.write_bytes(b"not a database at all, but somebody's notes\n" * 100)
    before = garbage.read_bytes()
    for path in (garbage, tmp_path, garbage / "headwater.db"):
        with pytest.raises(db.UnusableError) as caught:
            await connect(path)
        assert str(caught.value).startswith(f"{path} cannot be ")
    assert garbage.read_bytes() == before


async def test_a_step_that_fails_leaves_the_file_as_it_was(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "headwater.db"
    make(path, "CREATE TABLE capability (of_somebody_else)")
    with pytest.raises(db.UnusableError, match="cannot be used"):
        await connect(path)
    assert look(path, "PRAGMA user_version") == [(0,)]
    assert look(path, "SELECT name FROM sqlite_master") == [("capability",)]


async def test_nothing_is_written_to_a_file_that_nobody_finds_again(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "headwater.db", tmp_path / "elsewhere.db"
    connection = await db.connect(path, MAIN)

    async def write(upstream: str) -> None:
        row = (upstream, "m", "c", "streams", 1, "seen", 1.5)
        await connection.transact(lambda file: file.execute("INSERT INTO capability VALUES (?, ?, ?, ?, ?, ?, ?)", row))

    await write("before")
    path.rename(elsewhere)
    with pytest.raises(sqlite3.OperationalError, match="deleted or replaced"):
        await write("deleted")
    path.touch()
    with pytest.raises(sqlite3.OperationalError, match="deleted or replaced"):
        await write("replaced")
    elsewhere.rename(path)
    await write("back")
    await connection.close()
    assert look(path, "SELECT upstream FROM capability") == [("back",), ("before",)]
