"""A SQLite file: opened, brought up to date, closed; and its one writer.

One connection to each file, whose thread does all the work, so that the event loop never waits for a disk. WAL mode: a reader
elsewhere (the command line, a backup) does not stop the writer, and a kill -9 loses no committed row.

Several stores share the connection. A transaction that is a chain of awaits would get another store's statements in
between; so a transaction is one function, which the thread runs in one piece. What runs there is short (a few
milliseconds), for everybody's next read waits behind it: long work is many pieces.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import aiosqlite

from proxy.errors import ConfigError
from proxy.settings import StoreSettings
from proxy.store.migrations import MAIN

_PRAGMAS = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000; PRAGMA foreign_keys=ON;"

NOWHERE = Path(":memory:")
"""The path of a database that leaves nothing behind."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class UnusableError(Exception):
    """A file that cannot be opened, is no database, or was written by a newer version. It is left as it was."""


class Place(NamedTuple):
    """A path, and the device and the number (inode) of the file that was there when it was opened."""

    path: Path
    file: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Place:
        """OSError when there is no file."""
        found = path.stat()
        return cls(path, (found.st_dev, found.st_ino))

    def check(self) -> None:
        """sqlite3.OperationalError when the file is there no more: what SQLite still takes for it, nobody would read again."""
        try:
            is_there = Place.of(self.path) == self
        except OSError:
            is_there = False
        if not is_there:
            raise sqlite3.OperationalError("the file was deleted or replaced while it was open")


class Connection(aiosqlite.Connection):
    """The connection all stores share. What is given to it is done in that order, also when its caller is cancelled."""

    place: Place | None = None
    """Where its file has to be for what is written; None for one in memory."""

    async def run(self, work: Work[T]) -> T:
        """What `work` returns; it runs in the connection's thread, and nothing else in between. For reading."""
        return cast(T, await self._execute(work, self._conn))  # type: ignore[no-untyped-call]

    async def transact(self, work: Work[T], *, durable: bool = False) -> T:
        """What `work` returns, after all it wrote is committed; sqlite3.Error, and nothing of it is written.

        A commit outlives the end of the process; a `durable` one outlives a power cut too (it waits for the disk).
        """
        return await self.run(lambda connection: _transact(connection, work, self.place, durable=durable))

    async def data_version(self) -> int:
        """A number that is another one after other connections have changed the file.

        https://www.sqlite.org/pragma.html#pragma_data_version
        """
        return await self.run(lambda connection: int(connection.execute("PRAGMA data_version").fetchone()[0]))


async def connect(path: Path, steps: Sequence[str]) -> Connection:
    """The database at `path`, with all `steps` of its schema taken. The caller closes it.

    It is made if it is missing, for its owner alone. UnusableError when that cannot be.
    """
    opening = asyncio.ensure_future(_connect(path, steps))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # Its thread would speak to the loop after its end, and keep the process alive.
        with suppress(UnusableError):
            await (await opening).close()
        raise


async def _connect(path: Path, steps: Sequence[str]) -> Connection:
    try:
        # Opened here, for when opening fails aiosqlite leaves a thread behind that speaks to the loop after its end.
        opened = await asyncio.to_thread(_opened, path)
        connection = Connection(lambda: opened, iter_chunk_size=64)
        await connection
    except (OSError, sqlite3.Error) as error:
        raise UnusableError(f"{path} cannot be opened: {error}") from None
    try:
        if path != NOWHERE:
            connection.place = Place.of(path)
        await connection.executescript(_PRAGMAS)
        await _migrate(connection, path, steps)
    except (OSError, sqlite3.Error) as error:
        await connection.close()
        raise UnusableError(f"{path} cannot be used: {error}") from None
    except UnusableError:
        await connection.close()
        raise
    return connection


def reading(path: Path, steps: Sequence[str]) -> sqlite3.Connection:
    """The database at `path`, beside whoever writes it, and to be read only. The caller closes it; it blocks.

    UnusableError when there is none, or one with other steps: who only reads cannot bring it up to date.
    """
    try:
        if not path.is_file():
            raise UnusableError(f"there is no {path}: nothing was ever called here")
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("PRAGMA busy_timeout=5000")
            if _known_version(path, steps, connection) < len(steps):
                words = "was written by an older version of the proxy, and is brought up to date when the proxy starts"
                raise UnusableError(f"{path} {words}")
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise UnusableError(f"{path} cannot be read: {error}") from None
    return connection


async def connect_main(store: StoreSettings) -> Connection:
    """The main database, as `connect` gives it. ConfigError when it cannot be used: nothing goes on without it."""
    try:
        return await connect(store.path, MAIN)
    except UnusableError as error:
        raise ConfigError([f"store.path: {error}"]) from None


def _opened(path: Path) -> sqlite3.Connection:
    if path != NOWHERE and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # What people ask is nobody else's business. SQLite gives the files beside it the same mode.
        path.touch(mode=0o600)
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def _transact(connection: sqlite3.Connection, work: Work[T], place: Place | None, *, durable: bool) -> T:
    if place is not None:
        place.check()
    if durable:
        # https://www.sqlite.org/pragma.html#pragma_synchronous: in WAL mode, FULL syncs the log with each commit.
        connection.execute("PRAGMA synchronous=FULL")
    try:
        connection.execute("BEGIN IMMEDIATE")
        result = work(connection)
        connection.execute("COMMIT")
        return result
    finally:
        # Some errors (a full disk) have ended the transaction by themselves.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if durable:
            connection.execute("PRAGMA synchronous=NORMAL")


async def _migrate(connection: Connection, path: Path, steps: Sequence[str]) -> None:
    version = await connection.run(partial(_known_version, path, steps))
    for step in range(version, len(steps)):
        await connection.transact(partial(_take_step, step, steps[step]))


def _take_step(step: int, statements: str, connection: sqlite3.Connection) -> None:
    # Another process may be doing the same: who gets the lock second finds the step done.
    if _version(connection) == step:
        for statement in statements.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={step + 1}")


def _known_version(path: Path, steps: Sequence[str], connection: sqlite3.Connection) -> int:
    version = _version(connection)
    if version > len(steps):
        raise UnusableError(f"{path} was written by a newer version of the proxy")
    return version


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
