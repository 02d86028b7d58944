"""The SQLite file: opened, brought up to date, closed.

One connection, whose thread does all the work, so that the event loop never waits for a disk. WAL mode: a reader
elsewhere (the command line, a backup) does not stop the writer, and a kill -9 loses no committed row.
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import aiosqlite

from proxy.errors import ConfigError
from proxy.store.migrations import STEPS

_PRAGMAS = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000; PRAGMA foreign_keys=ON;"


async def connect(path: Path) -> aiosqlite.Connection:
    """The database at `path`, made if it is missing, at the newest schema. The caller closes it.

    ConfigError when it cannot be opened, is no database, or was written by a newer version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened here, for when opening fails aiosqlite leaves a thread behind that speaks to the loop after its end.
        opened = await asyncio.to_thread(sqlite3.connect, path, isolation_level=None, check_same_thread=False)
        connection = await aiosqlite.Connection(lambda: opened, iter_chunk_size=64)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError([f"store.path: {path} cannot be opened: {error}"]) from None
    try:
        await connection.executescript(_PRAGMAS)
        await _migrate(connection, path)
    except sqlite3.Error as error:
        await connection.close()
        raise ConfigError([f"store.path: {path} cannot be used: {error}"]) from None
    except ConfigError:
        await connection.close()
        raise
    return connection


async def _migrate(connection: aiosqlite.Connection, path: Path) -> None:
    version = await _version(connection)
    if version > len(STEPS):
        raise ConfigError([f"store.path: {path} was written by a newer version of the proxy"])
    for step in range(version, len(STEPS)):
        # Another process may be doing the same: who gets the lock second finds the step done.
        await connection.execute("BEGIN IMMEDIATE")
        if await _version(connection) == step:
            for statement in STEPS[step].split(";"):
                await connection.execute(statement)
            await connection.execute(f"PRAGMA user_version={step + 1}")
        await connection.execute("COMMIT")


async def _version(connection: aiosqlite.Connection) -> int:
    async with connection.execute("PRAGMA user_version") as cursor:
        row = await cursor.fetchone()
    return int(row[0]) if row else 0
