"""Which processes have a database open, and which of them died: a living one keeps a file locked, and its notes in it.

The kernel gives a lock back when its owner ends, however that was, and knows nothing of process numbers that are used again,
or mean something else in another container. https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from proxy.store.calls import NewCall
from proxy.store.db import NOWHERE, UnusableError
from proxy.store.notes import Notes, read_notes

_log = logging.getLogger(__name__)


class Known(NamedTuple):
    """A process that has the database open, or had it when it died. `closed` are the calls it noted that were closed last."""

    number: int
    path: Path
    closed: frozenset[int]

    def noted(self) -> dict[int, NewCall] | None:
        """The calls that it has noted and that have no row, by their numbers. None while its file cannot be read."""
        try:
            found = read_notes(self.path)
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.path, error)
            return None
        return {number: new for number, new in found.items() if number not in self.closed}


class Presence:
    """This process as others see it: `number` stands in the rows that it has open. To be left at the end, whatever happened."""

    def __init__(self, database: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`database` is the file, or NOWHERE; `clock` is for its notes. UnusableError when no file can be made beside it."""
        # Who opens it by a link is to find the same files beside it, as SQLite does.
        self.database = database = database if database == NOWHERE else database.resolve()
        self._token = uuid4().hex
        self._lock: int | None = None
        self.number = 0
        if database != NOWHERE:
            try:
                self._lock = _locked(_lock_path(database, self._token))
            except OSError as error:
                raise UnusableError(f"{database} cannot be shared: {error}") from None
        self.notes = Notes(self._lock, clock)

    def enter(self, connection: sqlite3.Connection, now: float) -> None:
        """A step of a transaction: write the row of this process."""
        statement = "INSERT INTO process (token, started_at) VALUES (?, ?)"
        number = connection.execute(statement, (self._token, now)).lastrowid
        assert number is not None
        self.number = number

    def dead(self, connection: sqlite3.Connection) -> list[Known]:
        """Those that have ended."""
        return [
            one for one in known(connection, self.database) if one.number != self.number and not _is_locked(one.path)
        ]

    def leave(self) -> None:
        """Give the lock back. Notes that are left are for those who look after the dead."""
        if self._lock is not None:
            if self.notes.is_empty:
                _lock_path(self.database, self._token).unlink(missing_ok=True)
            self.notes.close()
            os.close(self._lock)
            self._lock = None


def known(connection: sqlite3.Connection, database: Path) -> list[Known]:
    """All processes that the database knows of."""
    return [
        Known(number, _lock_path(database, token), frozenset(json.loads(closed)))
        for number, token, closed in connection.execute("SELECT number, token, closed FROM process")
    ]


def forget(connection: sqlite3.Connection, dead: Sequence[Known]) -> None:
    """A step of a transaction: delete rows and files of processes whose calls are all closed.

    That has to be committed before. The files go first: a row without a file is asked for again, a file without a row never.
    """
    for process in dead:
        process.path.unlink(missing_ok=True)
        connection.execute("DELETE FROM process WHERE number = ?", (process.number,))


def _lock_path(database: Path, token: str) -> Path:
    return database.with_name(f"{database.name}-process-{token}")


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _is_locked(path: Path) -> bool:
    """Whether somebody holds that lock, or may hold it: what another user of the machine has locked cannot be asked for."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
