"""Many small changes in few transactions: group commit.

What is to be changed is queued. The connection's thread takes all that waits into one transaction, and what comes meanwhile is
the next one; so the more there is to do, the less each change costs. A change that is refused (ProxyError) has written nothing
and stops no other. One that SQLite refuses for what it says takes the whole transaction back, and all of it is done again, each
alone.

A change is *awaited* by somebody, who hears when the disk takes nothing; or *owed*: it is kept and tried again until the disk
takes it, in the order in which things happened.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

from proxy.errors import ProxyError
from proxy.store.books import Books
from proxy.store.db import Connection
from proxy.tasks import Tasks

_log = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[Books], T]

# What is owed waits so long for company. A call that is over is to be on disk within 50 ms.
_LINGER_S = 0.015
_RETRY_AFTER_S = 1.0
# The bounds of one transaction, and of what may be owed: about 1 kB each.
_MAX_GROUP = 256
_MAX_OWED = 100_000

# The log (WAL) is taken into the file after so many transactions, each of some ten pages of 4 kB.
_CHECKPOINT_EVERY = 400
_MAX_LOG_PAGES = 16_384

# What is said of a change, and not of the disk. It must not stop the others, whatever it is.
_OWN_FAULT = (
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    ArithmeticError,
    AssertionError,
    LookupError,
    OSError,
    RecursionError,  # of json, for what is nested deep
    TypeError,
    ValueError,
)


class Change(Generic[T]):
    """One change that waits for its transaction. `done` is None for one that is owed."""

    __slots__ = ("done", "on_done", "step")

    def __init__(self, step: Step[T], done: asyncio.Future[T] | None, on_done: Callable[[T], object] | None) -> None:
        self.step = step
        self.done = done
        self.on_done = on_done


class GroupWriter:
    """Writes for one ledger. Use from one event loop only.

    `reader` is another connection to the same file, or the same one. It takes the log into the file, for that waits for the
    disk (fsync), and no call is to wait with it.
    """

    def __init__(self, connection: Connection, reader: Connection, tasks: Tasks) -> None:
        self._connection = connection
        self._reader = reader
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Change[Any]] = deque()
        self._taken: list[Change[Any]] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transactions = 0
        self.is_failing = False
        """Whether the disk took nothing when it was last tried."""
        self.lost = 0
        """Changes that were owed and never written: there were too many, or what they said could not be."""

    @property
    def waiting(self) -> int:
        """How many changes are not written yet."""
        return len(self._taken) + len(self._waiting)

    async def open(self) -> None:
        if self._reader is not self._connection:
            # https://www.sqlite.org/wal.html#automatic_checkpoint: otherwise a commit does it, now and then.
            await self._connection.run(lambda connection: connection.execute("PRAGMA wal_autocheckpoint=0"))

    async def close(self) -> None:
        """Write what is still unwritten."""
        await self.settled()
        while self._writing is not None:
            await asyncio.wait((self._writing,))
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting:
            _log.error("%d changes of the ledger are lost: the disk took nothing to the end", len(self._waiting))

    # ------------------------------------------------------------------ what is to be written

    def ask(self, step: Step[T], on_done: Callable[[T], object] | None = None) -> asyncio.Future[T]:
        """What `step` returns, after it is committed; sqlite3.Error or ProxyError, and nothing of it is written.

        It is done also when nobody waits for it any more (the future was cancelled). `on_done` is called with what it
        returned, when that is committed, before any later step is done.
        """
        done: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(Change(step, done, on_done))
        self._write_soon()
        return done

    def owe(self, step: Step[T], on_done: Callable[[T], object] | None = None) -> None:
        """Do `step` soon, or when the disk takes it. `on_done` is as in `ask`."""
        if len(self._waiting) >= _MAX_OWED:
            self._lose("there are too many")
            return
        self._waiting.append(Change(step, None, on_done))
        self._write_in(_LINGER_S)

    async def settled(self) -> None:
        """Wait until all that came before is written, or was found to be impossible for now."""
        if self._writing is not None or self._waiting:
            with suppress(sqlite3.Error):
                await self.ask(_nothing)

    # ------------------------------------------------------------------ writing

    def _write_in(self, delay_s: float) -> None:
        if self._writing is None and self._timer is None:
            self._timer = self._loop.call_later(delay_s, self._write_now)

    def _write_now(self) -> None:
        self._timer = None
        self._write_soon()

    def _write_soon(self) -> None:
        if self._writing is None and self._waiting:
            self._writing = self._tasks.spawn(self._write(), "write the ledger")

    async def _write(self) -> None:
        try:
            is_urgent = True
            while is_urgent:
                try:
                    results = await self._connection.transact(self._do_all)
                except _OWN_FAULT:
                    await self._do_each()
                else:
                    for change, result in zip(self._taken, results, strict=True):
                        self._tell(change, result)
                self._taken = []
                self.is_failing = False
                self._count_transaction()
                # What is owed waits for company, but not when somebody waits behind it.
                is_urgent = len(self._waiting) > _MAX_GROUP or any(change.done is not None for change in self._waiting)
        except sqlite3.Error as error:
            self._failed(error)
        finally:
            self._writing = None
            for change in (*self._taken, *self._waiting):
                if change.done is not None:
                    change.done.cancel()
            if self._waiting:
                self._write_in(_LINGER_S)

    def _do_all(self, connection: sqlite3.Connection) -> list[Any]:
        """A transaction, in the connection's thread."""
        while self._waiting and len(self._taken) < _MAX_GROUP:
            self._taken.append(self._waiting.popleft())
        books = Books(connection)
        results = [_do(change, books) for change in self._taken]
        books.write()
        return results

    async def _do_each(self) -> None:
        """Do what was taken again, each in a transaction of its own, for one of them cannot be done."""
        while self._taken:
            change = self._taken[0]
            try:
                result = await self._connection.transact(partial(_do_alone, change))
            except _OWN_FAULT as error:
                if change.done is None:
                    self._lose(error)
                elif not change.done.done():
                    change.done.set_exception(error)
            else:
                self._tell(change, result)
            del self._taken[0]

    def _tell(self, change: Change[Any], result: Any) -> None:
        if change.on_done is not None and not isinstance(result, ProxyError):
            change.on_done(result)
        done = change.done
        if done is None or done.done():
            return
        if isinstance(result, ProxyError):
            done.set_exception(result)
        else:
            done.set_result(result)

    def _failed(self, error: sqlite3.Error) -> None:
        """The disk takes nothing now. Who waits hears of it; what is owed is tried again."""
        if not self.is_failing:
            _log.warning("the ledger cannot be written, and is tried again every %g s: %s", _RETRY_AFTER_S, error)
        self.is_failing = True
        changes = [*self._taken, *self._waiting]
        self._taken = []
        self._waiting = deque(change for change in changes if change.done is None)
        for change in changes:
            if change.done is not None and not change.done.done():
                change.done.set_exception(error)
        if self._waiting:
            self._timer = self._timer or self._loop.call_later(_RETRY_AFTER_S, self._write_now)

    def _lose(self, why: object) -> None:
        self.lost += 1
        _log.error("a change of the ledger is lost: %s", why)

    # ------------------------------------------------------------------ the log

    def _count_transaction(self) -> None:
        self._transactions += 1
        if self._transactions % _CHECKPOINT_EVERY == 0 and self._reader is not self._connection:
            self._tasks.spawn(self._checkpoint(), "take the log of the ledger into its file")

    async def _checkpoint(self) -> None:
        try:
            pages = await self._reader.run(_checkpoint)
            if pages > _MAX_LOG_PAGES:
                # The log begins anew only when all of it was taken, which the writer alone can do when there is no pause.
                await self._connection.run(_checkpoint)
        except sqlite3.Error as error:
            _log.warning("the log of the ledger could not be taken into its file: %s", error)


def _do(change: Change[Any], books: Books) -> Any:
    try:
        return change.step(books)
    except ProxyError as refusal:
        return refusal


def _do_alone(change: Change[Any], connection: sqlite3.Connection) -> Any:
    books = Books(connection)
    result = _do(change, books)
    books.write()
    return result


def _nothing(books: Books) -> None:
    pass


def _checkpoint(connection: sqlite3.Connection) -> int:
    """How many pages the log has."""
    pages: int = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
    return pages
