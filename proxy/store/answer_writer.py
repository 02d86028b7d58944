"""What the database does not know yet of cached answers, and the task that tells it.

All that happens while one transaction runs becomes the next one. Hits are less urgent and wait some seconds for company.
What fails is said once, until something goes well again. Only deletions are tried again: what is lost otherwise is a cached
answer or a count, and no reason to fill the memory.

Ids are set aside in the database by the block before they are given out, so none ever stands for two entries, neither after
a crash nor with two processes on one file.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from proxy.errors import OverloadedError
from proxy.store import answer_rows as rows
from proxy.store.answer_rows import Batch, Row, Vector
from proxy.store.db import Connection
from proxy.store.entries import Facts, Note, noted
from proxy.tasks import Tasks

_log = logging.getLogger(__name__)

_NOTES_EVERY_S = 3.0
_RETRY_AFTER_S = 5.0
# The bounds of one transaction, so that it takes some milliseconds.
_MAX_PUTS, _MAX_BODY_BYTES = 256, 2 * 1024 * 1024
_MAX_NOTES, _MAX_GONE = 500, 500

F = TypeVar("F", bound=Facts)
K = TypeVar("K")
V = TypeVar("V")


class AnswerWriter:
    """Writes for one AnswerStore. `written` hears of sizes that changed, `lost` of entries that could not be written."""

    def __init__(
        self,
        connection: Connection,
        tasks: Tasks,
        written: Callable[[Mapping[int, int]], None],
        lost: Callable[[Sequence[int]], None],
    ) -> None:
        self._connection = connection
        self._tasks = tasks
        self._report_written = written
        self._report_lost = lost
        self._next_id = self._end_of_ids = 0
        self._rows: dict[int, Row] = {}
        self._vectors: dict[int, Vector] = {}
        self._notes: dict[int, Note] = {}
        self._gone: set[int] = set()
        self._unstored: set[int] = set()  # entries that are in memory only, because writing them failed
        self._in_flight: Batch | None = None
        self._writing: asyncio.Task[None] | None = None
        self._notes_are_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_failing = False

    async def open(self) -> None:
        """Set ids aside."""
        self._write_soon()
        await self._ended()

    async def close(self) -> None:
        """Write what is still unwritten."""
        await self._ended()
        self._notes_are_due = True
        self._write_soon()
        await self._ended()
        if self._timer is not None:
            self._timer.cancel()

    async def _ended(self) -> None:
        while self._writing is not None:
            await asyncio.wait((self._writing,))

    # ------------------------------------------------------------------ what is unwritten

    def unwritten(self, entry_id: int) -> Row | None:
        """The row of an entry that is not on disk yet."""
        return self._rows.get(entry_id)

    def unwritten_rows(self) -> Collection[Row]:
        return self._rows.values()

    def owes(self, entry_id: int) -> bool:
        """Whether an entry that was dropped may still be on disk."""
        return entry_id in self._gone

    def overlaid(self, facts: F) -> F:
        """What was just read, with what the database did not know then.

        It does things in order, so a transaction that is still under way was begun after the reading.
        """
        note = self._notes.get(facts.id)
        if self._in_flight is not None and (earlier := self._in_flight.notes.get(facts.id)) is not None:
            note = earlier if note is None else earlier + note
        return facts if note is None else noted(facts, note)

    # ------------------------------------------------------------------ what happens

    def take_id(self) -> int | None:
        """An id that never was; None when the database gave out no more."""
        if self._next_id == self._end_of_ids:
            self._write_soon()
            return None
        self._next_id += 1
        return self._next_id - 1

    def put(self, row: Row) -> None:
        self._rows[row.entry.id] = row
        self._write_soon()

    def set_vector(self, entry_id: int, vector: bytes, embedder: str) -> None:
        self._vectors[entry_id] = Vector(vector, embedder)
        self._write_soon()

    def note(self, entry_id: int, note: Note, *, is_urgent: bool) -> None:
        earlier = self._notes.get(entry_id)
        self._notes[entry_id] = note if earlier is None else earlier + note
        if is_urgent:
            self._notes_are_due = True
            self._write_soon()
        else:
            self._write_later(_NOTES_EVERY_S)

    def drop(self, ids: Sequence[int]) -> None:
        """Delete entries soon, if they are on disk or on their way there."""
        for entry_id in ids:
            self._vectors.pop(entry_id, None)
            self._notes.pop(entry_id, None)
            is_waiting = self._rows.pop(entry_id, None) is not None
            is_on_its_way = self._in_flight is not None and entry_id in self._in_flight.puts
            if entry_id in self._unstored:
                self._unstored.discard(entry_id)
            elif is_on_its_way or not is_waiting:
                self._gone.add(entry_id)
        self._write_soon()

    async def erase(self, ids: Sequence[int]) -> None:
        """Delete entries that were dropped; they are off the disk when this returns. OverloadedError when they are not."""
        self._gone.update(ids)
        for start in range(0, len(ids), _MAX_GONE):
            piece = ids[start : start + _MAX_GONE]
            is_last = start + _MAX_GONE >= len(ids)
            try:
                await self._connection.transact(partial(rows.delete, piece), durable=is_last)
            except sqlite3.Error as error:
                self._failed(error)
                words = f"What was deleted is no longer served, but could not be removed from the disk: {error}"
                raise OverloadedError("cache_unavailable", words) from None
            self._gone.difference_update(piece)

    # ------------------------------------------------------------------ writing

    def _write_soon(self) -> None:
        if self._writing is None:
            self._writing = self._tasks.spawn(self._write(), "write cached answers")

    def _write_later(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._write_all)

    def _write_all(self) -> None:
        self._timer = None
        self._notes_are_due = True
        self._write_soon()

    async def _write(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._in_flight = batch
                try:
                    written = await self._connection.transact(partial(rows.write, batch))
                except (sqlite3.Error, OverflowError) as error:
                    self._failed(error)
                    self._lose(batch)
                    break
                self._in_flight = None
                self._is_failing = False
                for entry_id in batch.puts:
                    self._rows.pop(entry_id, None)
                self._gone.difference_update(batch.gone)
                if written.first_id is not None:
                    self._next_id, self._end_of_ids = written.first_id, written.first_id + rows.ID_BLOCK
                self._report_written(written.sizes)
        finally:
            self._in_flight = self._writing = None

    def _lose(self, batch: Batch) -> None:
        self._in_flight = None
        lost = [entry_id for entry_id in batch.puts if self._rows.pop(entry_id, None) is not None]
        self._unstored.update(lost)
        self._report_lost(lost)

    def _take(self) -> Batch | None:
        """What the next transaction does; None when there is nothing to do."""
        puts: dict[int, Row] = {}
        size = 0
        for entry_id, row in self._rows.items():
            puts[entry_id] = row
            size += len(row.body)
            if len(puts) == _MAX_PUTS or size > _MAX_BODY_BYTES:
                break
        # What changes a row comes after the row.
        is_last = len(puts) == len(self._rows)
        vectors = _taken(self._vectors, _MAX_PUTS) if is_last else {}
        notes = _taken(self._notes, _MAX_NOTES) if is_last and self._notes_are_due else {}
        self._notes_are_due = self._notes_are_due and bool(self._notes)
        gone = list(islice(self._gone, _MAX_GONE))
        needs_ids = self._end_of_ids - self._next_id < rows.ID_BLOCK // 2
        if not (puts or vectors or notes or gone or needs_ids):
            return None
        return Batch(gone, puts, vectors, notes, needs_ids)

    def _failed(self, error: Exception) -> None:
        if not self._is_failing:
            _log.warning("cached answers could not be stored: %s", error)
        self._is_failing = True
        self._write_later(_RETRY_AFTER_S)


def _taken(waiting: dict[K, V], limit: int) -> dict[K, V]:
    """The first of `waiting`, which are taken out of it."""
    taken = dict(islice(waiting.items(), limit))
    for key in taken:
        del waiting[key]
    return taken
