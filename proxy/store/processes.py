"""Which processes have a database open, and which of them died: a living one keeps a file locked.

The kernel gives a lock back when its owner ends, however that was, and knows nothing of process numbers that are used again,
or mean something else in another container. https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from proxy.store.db import NOWHERE, UnusableError


class Presence:
    """This process as others see it: `number` stands in the rows that it has open. To be left at the end, whatever happened."""

    def __init__(self, database: Path) -> None:
        """`database` is the file, or NOWHERE. UnusableError when no file can be made beside it."""
        self._database = database
        self._token = uuid4().hex
        self._lock: int | None = None
        self.number = 0
        if database != NOWHERE:
            try:
                self._lock = _locked(_lock_path(database, self._token))
            except OSError as error:
                raise UnusableError(f"{database} cannot be shared: {error}") from None

    def enter(self, connection: sqlite3.Connection, now: float) -> None:
        """A step of a transaction: write the row of this process."""
        statement = "INSERT INTO process (token, started_at) VALUES (?, ?)"
        number = connection.execute(statement, (self._token, now)).lastrowid
        assert number is not None
        self.number = number

    def dead(self, connection: sqlite3.Connection) -> list[int]:
        """The numbers of processes that ended without leaving."""
        others = connection.execute("SELECT number, token FROM process WHERE number <> ?", (self.number,)).fetchall()
        return [number for number, token in others if not _is_locked(self._database, token)]

    def leave(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _lock_path(self._database, self._token).unlink(missing_ok=True)


def forget(connection: sqlite3.Connection, number: int) -> None:
    """A step of a transaction: delete the row of a process, which has no calls open."""
    connection.execute("DELETE FROM process WHERE number = ?", (number,))


def _lock_path(database: Path, token: str) -> Path:
    return database.with_name(f"{database.name}-process-{token}")


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _is_locked(database: Path, token: str) -> bool:
    """Whether somebody holds that lock. The file of a process that is dead is taken away."""
    path = _lock_path(database, token)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    with suppress(FileNotFoundError):
        path.unlink()
    return False
