"""A copy of a database that others may be writing, as it is at one moment."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from tempfile import mkstemp

from proxy.store.calls import NewCall
from proxy.store.inserting import insert
from proxy.store.processes import known

LOGS = ("-wal", "-journal")
"""What SQLite adds to the name of a database for the file of what is not in it yet: https://www.sqlite.org/tempfiles.html."""

# Some milliseconds: 4 MiB.
_PIECE_PAGES = 1024

Noted = dict[tuple[int, int], NewCall]
"""Calls under way that have no row, by their processes and numbers."""


async def backup(source: Path, target: Path) -> int:
    """Copy a database; how many bytes the copy has. Calls that are only noted by their processes are open calls in it.

    `target` is there when it is whole and was found to be sound, for its owner alone. It needs no other file beside it.
    OSError or sqlite3.Error when it cannot be made. Cancelled, it stops soon, and leaves nothing behind.
    https://www.sqlite.org/backup.html
    """
    is_unwanted = threading.Event()
    copying = asyncio.ensure_future(asyncio.to_thread(_backup, source, target, is_unwanted))
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        is_unwanted.set()
        await asyncio.wait((copying,))
        # What it ended with is of no interest, and must not be complained of as never looked at.
        copying.exception()
        raise


class _UnwantedError(Exception):
    """Nobody waits for the copy any more."""


def _backup(source: Path, target: Path, is_unwanted: threading.Event) -> int:
    def go_on(*_: int) -> None:
        if is_unwanted.is_set():
            raise _UnwantedError

    # A file that mkstemp makes is for its owner alone.
    number, name = mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    os.close(number)
    part = Path(name)
    try:
        reading = f"{source.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(reading, uri=True)) as original, closing(sqlite3.connect(part)) as copy:
            # An older version had no calls.
            has_calls = original.execute("SELECT 1 FROM sqlite_schema WHERE name = 'call'").fetchone() is not None
            last, noted = _noted(source.resolve(), original) if has_calls else (0, {})
            # Many steps are of one moment only within a transaction, which begins with what it reads first.
            original.execute("BEGIN")
            original.execute("SELECT 1 FROM sqlite_schema").fetchone()
            original.backup(copy, pages=_PIECE_PAGES, progress=go_on)
            if noted:
                with copy:
                    _open(copy, noted, last)
            # In WAL mode, which is copied too, it could not be read from where nothing can be written.
            copy.execute("PRAGMA journal_mode=DELETE")
            (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(f"it is damaged: {found}")
        go_on()
        size = part.stat().st_size
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return size


def _noted(source: Path, original: sqlite3.Connection) -> tuple[int, Noted]:
    """What is noted, after the number of the last row was read, which comes first."""
    (last,) = original.execute("SELECT coalesce(max(number), 0) FROM call").fetchone()
    found = {}
    for process in known(original, source):
        for number, new in (process.noted() or {}).items():
            found[process.number, number] = new
    return last, found


def _open(copy: sqlite3.Connection, noted: Noted, last: int) -> None:
    """Write rows of calls that were noted, but for those that have ended since the row with the number `last`."""
    ended = set(copy.execute("SELECT id, opened_at FROM call WHERE number > ?", (last,)))
    rows = [(*place, *new) for place, new in noted.items() if (new.id, new.opened_at) not in ended]
    insert(copy, "INSERT INTO open_call VALUES", rows)
