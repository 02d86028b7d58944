"""Cached answers: the small facts of all in memory, all of all in the database, the answers used last in both.

Memory decides. An entry is found, replaced, evicted and given its id there at once, and never by waiting for the disk; the
database follows (`answer_writer.py`). So a miss costs a dictionary access, and an entry that left memory is never served
again, whatever the disk still holds. A database that cannot be written is a warning, never a failed call: entries then live
in memory only, as long as there is room.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from proxy.errors import OverloadedError
from proxy.store import answer_rows as rows
from proxy.store.answer_memory import AnswerMemory
from proxy.store.answer_rows import Filter, Row
from proxy.store.answer_writer import AnswerWriter
from proxy.store.db import Connection, Work
from proxy.store.entries import Entry, Facts, NewEntry, Note, Question, made
from proxy.store.lru import Lru
from proxy.tasks import Tasks

_log = logging.getLogger(__name__)

_IN_THREAD_FROM_BYTES = 32 * 1024  # compressing less takes under 1 ms
_PIECE = 1000  # rows that are read, or entries that leave, at a time
_VECTORS_PIECE = 500
_LAST_ID = 2**63 - 1

T = TypeVar("T")


class AnswerStore:
    """All cached answers. Use `open` to make one; `close` writes what is still unwritten. For one event loop."""

    def __init__(
        self, connection: Connection, tasks: Tasks, limits: tuple[int, int, int], now: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._max_entries, self._max_bytes, memory_bytes = limits
        self._now = now
        self._on_gone: Callable[[Sequence[int]], None] | None = None
        self._lru = Lru()
        self._memory = AnswerMemory(memory_bytes)
        self._writer = AnswerWriter(connection, tasks, self._written, self._lost)
        self._unreadable: set[str] = set()
        self._data_version = -1

    @classmethod
    async def open(
        cls,
        connection: Connection,
        tasks: Tasks,
        *,
        max_entries: int,
        max_bytes: int,
        memory_bytes: int,
        now: Callable[[], float],
        on_gone: Callable[[Sequence[int]], None] | None = None,
    ) -> AnswerStore:
        """The store with all that the database holds and the bounds allow; empty where the database cannot be read.

        `max_bytes` bounds the sum of all sizes, `memory_bytes` the answers kept in memory. `now` gives Unix seconds.
        `on_gone` is told the ids of all entries that leave from then on (evicted, deleted, replaced, expired), at once.
        """
        store = cls(connection, tasks, (max_entries, max_bytes, memory_bytes), now)
        if not await store._load():
            # The rows that cannot be read stand in the way of those behind them. The keys lead to each by itself.
            await store.refresh()
        await store._writer.open()
        await store._keep_bounds()
        await store.sweep()
        store._on_gone = on_gone
        return store

    async def close(self) -> None:
        """Write what is still unwritten. To be called before the tasks are cancelled, of which the writing is one."""
        await self._writer.close()

    # ------------------------------------------------------------------ looking up

    def find(self, key: bytes) -> int | None:
        """The id of the live entry with that key."""
        return self._lru.find_live(key, self._now())

    def is_live(self, entry_id: int) -> bool:
        """Whether the entry is there and not expired."""
        return self._lru.is_live(entry_id, self._now())

    def peek(self, entry_id: int) -> Entry | None:
        """The live entry, if it is in memory."""
        if not self.is_live(entry_id):
            return None
        entry = self._memory.get(entry_id)
        if entry is None and (row := self._writer.unwritten(entry_id)):
            entry = self._writer.overlaid(row.entry)
        return entry

    async def get(self, entry_id: int) -> Entry | None:
        """The live entry, from memory or by one reading of the disk; None when it is gone or cannot be read."""
        entry = self.peek(entry_id)
        if entry is not None or not self.is_live(entry_id):
            return entry
        try:
            entry = await self._connection.run(partial(rows.read, entry_id))
        except rows.CorruptError as error:
            _log.warning("cached answer %d is damaged and was dropped: %s", entry_id, error)
        except sqlite3.Error as error:
            self._warn_once("cached answers", error)
            return None
        else:
            self._unreadable.discard("cached answers")
        if entry is None:
            self._forget([entry_id])
        # It may have left, or become known better, while the disk was read.
        if entry is None or not self.is_live(entry_id):
            return None
        if (known := self._memory.get(entry_id)) is not None:
            return known
        entry = self._writer.overlaid(entry)
        self._memory.keep(entry)
        return entry

    def touch(self, entry_id: int) -> None:
        """Count a hit: the entry is now the one used last. Written some seconds later."""
        if entry_id in self._lru:
            self._lru.touch(entry_id)
            self._memory.touch(entry_id)
            self._note(entry_id, Note(used_at=self._now(), hits=1))

    # ------------------------------------------------------------------ keeping

    async def put(self, new: NewEntry) -> int | None:
        """Keep an answer, in place of the one with the same key, which leaves; its id.

        It can be found when this returns, and is on disk soon after. Waits for nothing, unless the answer is so long
        that a thread compresses it. None when it alone exceeds the bounds, and when the database cannot be written and
        no ids are left.
        """
        if len(new.answer) < _IN_THREAD_FROM_BYTES:
            body = rows.compress(new.answer)
        else:
            body = await asyncio.to_thread(rows.compress, new.answer)
        replaced = self._lru.find(new.key)
        if replaced is not None:
            self._forget([replaced])
        entry_id = self._writer.take_id()
        if entry_id is None:
            return None
        entry = made(new, entry_id, len(body), self._now())
        if entry.size > self._max_bytes or self._max_entries == 0:
            return None
        self._lru.add(entry_id, entry.key, entry.size, entry.created_at, entry.expires_at)
        self._memory.keep(entry)
        self._writer.put(Row(entry, body, new.vector, new.embedder if new.vector is not None else None))
        self._evict()
        return entry_id

    def learn(
        self,
        entry_id: int,
        *,
        rights: int = 0,
        wrongs: int = 0,
        lowest_right: float | None = None,
        highest_wrong: float | None = None,
    ) -> None:
        """Add verdicts on near matches with an entry: how many more were right and wrong, and the scores of these.

        The store keeps the lowest and the highest of all scores it was told.
        """
        if entry_id in self._lru:
            self._note(entry_id, Note(0.0, 0, rights, wrongs, lowest_right, highest_wrong), is_urgent=True)

    def set_vector(self, entry_id: int, vector: bytes, embedder: str) -> None:
        """Keep the vector that `embedder` made of the entry's question. Nothing happens to an entry that has none."""
        if entry_id in self._lru:
            self._writer.set_vector(entry_id, vector, embedder)

    # ------------------------------------------------------------------ dropping

    async def delete(self, entry_id: int) -> bool:
        """Drop an entry for good; false when it is not there. It is off the disk when this returns.

        OverloadedError when it could not be deleted from the disk: it is gone from memory all the same.
        """
        if not self._forget([entry_id]) and not self._writer.owes(entry_id):
            return False
        await self._writer.erase([entry_id])
        return True

    async def delete_where(
        self, *, model: str | None = None, namespace: str | None = None, scope: str | None = None
    ) -> int:
        """Drop all entries in which all that is given is equal, as `delete` does; how many they were."""
        await self.refresh()
        only = Filter.of(model, namespace, scope)
        known = [*self._memory.all(), *(row.entry for row in self._writer.unwritten_rows())]
        found = self._forget([entry.id for entry in known if only.fits(entry)])
        count, first = len(found), 0
        for piece in _pieces([*self._lru.ids(), _LAST_ID], _PIECE):
            matching = await self._read(partial(rows.matching, first, piece[-1], only))
            count += len(self._forget(matching))
            found += matching
            first = piece[-1] + 1
        await self._writer.erase(found)
        return count

    async def sweep(self) -> int:
        """Drop all that has expired; how many they were."""
        expired = self._lru.expired(self._now())
        for piece in _pieces(expired, _PIECE):
            self._forget(piece)
            await asyncio.sleep(0)
        return len(expired)

    # ------------------------------------------------------------------ for the semantic index

    async def vectors(self, embedder: str, among: Sequence[int] | None = None) -> AsyncIterator[list[Question]]:
        """All entries with a question, or those `among` the given ids, some hundred at a time, the newest last.

        What was put after this began is not among them; of what left meanwhile, `on_gone` has been told. An entry
        without a vector of `embedder` is to be embedded anew, and the vector handed to `set_vector`. What is damaged is
        left out, with a warning. OverloadedError when the database cannot be read now.
        """
        for piece in _pieces(self._lru.ids() if among is None else sorted(among), _VECTORS_PIECE):
            waiting = {entry_id: row for entry_id in piece if (row := self._writer.unwritten(entry_id))}
            try:
                read = await self._undamaged(lambda ids: partial(rows.questions, ids[0], ids[-1]), piece)
            except sqlite3.Error as error:
                raise _unavailable(error) from None
            known = {question.id: (question, made_by) for question, made_by in read}
            for entry_id, row in waiting.items():
                if row.entry.partition is not None:
                    question = Question(entry_id, row.entry.partition, row.entry.question, row.vector)
                    known[entry_id] = question, row.embedder
            batch = [known[entry_id] for entry_id in piece if entry_id in known and entry_id in self._lru]
            yield [one if made_by == embedder else one._replace(vector=None) for one, made_by in batch]

    # ------------------------------------------------------------------ for the administrator

    @property
    def count(self) -> int:
        return len(self._lru)

    @property
    def bytes(self) -> int:
        """The sum of all sizes."""
        return self._lru.bytes

    @property
    def memory_count(self) -> int:
        """How many answers are kept in memory."""
        return len(self._memory)

    @property
    def memory_bytes(self) -> int:
        """What the answers kept in memory take."""
        return self._memory.bytes

    @property
    def created_range(self) -> tuple[float, float] | None:
        """When the oldest and the newest entry were made; None when there is none."""
        return self._lru.created_range()

    async def entries(
        self,
        limit: int,
        before_id: int | None = None,
        *,
        model: str | None = None,
        namespace: str | None = None,
        scope: str | None = None,
    ) -> list[Facts]:
        """The newest live entries, or those with ids below `before_id`, in which all that is given is equal.

        Fewer than `limit` are the last ones. OverloadedError when the database cannot be read.
        """
        only = Filter.of(model, namespace, scope)
        ids = self._lru.ids(before_id)[::-1]
        found: list[Facts] = []
        for piece in _pieces(ids, limit if only == Filter() else _PIECE):
            waiting = [row.entry for entry_id in piece if (row := self._writer.unwritten(entry_id))]
            read = await self._read(partial(rows.listed, piece[-1], piece[0], only))
            known: dict[int, Facts] = {facts.id: self._writer.overlaid(facts) for facts in read}
            known |= {entry.id: self._writer.overlaid(entry) for entry in waiting if only.fits(entry)}
            now = self._now()
            found += [known[entry_id] for entry_id in piece if entry_id in known and self._lru.is_live(entry_id, now)]
            if len(found) >= limit:
                break
        return found[:limit]

    # ------------------------------------------------------------------ other processes

    async def refresh(self) -> list[int]:
        """Take over what other processes wrote, replaced and dropped since the last look; the ids that came.

        Cheap when they did nothing. Otherwise all keys are read, in pieces, from their index.
        """
        came: list[int] = []
        try:
            version = await self._connection.data_version()
            if version == self._data_version:
                return came
            absent = self._lru.id_set()
            absent.difference_update([row.entry.id for row in self._writer.unwritten_rows()])
            last = b""
            while piece := await self._connection.run(partial(rows.keys_after, last, _PIECE)):
                last = piece[-1][0]
                ids = [entry_id for _, entry_id in piece]
                absent.difference_update(ids)
                new = [entry_id for entry_id in ids if entry_id not in self._lru and not self._writer.owes(entry_id)]
                if new:
                    came += self._take_over(await self._undamaged(lambda ids: partial(rows.known, ids), new))
        except sqlite3.Error as error:
            self._warn_once("the keys of cached answers", error)
            return came
        self._unreadable.discard("the keys of cached answers")
        for left in _pieces(list(absent), _PIECE):
            self._forget(left)
            await asyncio.sleep(0)
        await self._keep_bounds()
        self._data_version = version
        return [entry_id for entry_id in came if entry_id in self._lru]

    def _take_over(self, known: Sequence[rows.Known]) -> list[int]:
        came = []
        for entry_id, key, size, created_at, expires_at in known:
            mine = self._lru.find(key)
            # An answer of ours that is on its way to the disk will replace the other one there.
            if entry_id in self._lru or (mine is not None and self._writer.unwritten(mine)):
                continue
            if mine is not None:
                self._forget([mine])
            self._lru.add(entry_id, key, size, created_at, expires_at)
            came.append(entry_id)
        return came

    # ------------------------------------------------------------------ within

    async def _load(self) -> bool:
        """Read what the database holds; whether all of it could be read."""
        used = array("d")
        last = 0
        is_whole = True
        try:
            self._data_version = await self._connection.data_version()
            while piece := await self._connection.run(partial(rows.known_after, last, _PIECE)):
                last = piece[-1][0]
                loaded = self._lru.load([row[:5] for row in piece])
                used.extend(row[5] for row in piece)
                await asyncio.sleep(0)
                self._lru.index(loaded)
        except sqlite3.Error as error:
            self._warn_once("cached answers", error)
            self._data_version, is_whole = -1, False
        self._lru.link(await asyncio.to_thread(np.argsort, np.array(used), kind="stable"))
        return is_whole

    def _note(self, entry_id: int, note: Note, *, is_urgent: bool = False) -> None:
        self._memory.note(entry_id, note)
        self._writer.note(entry_id, note, is_urgent=is_urgent)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await self._connection.run(work)
        except sqlite3.Error as error:
            raise _unavailable(error) from None

    async def _undamaged(self, reading: Callable[[Sequence[int]], Work[list[T]]], ids: Sequence[int]) -> list[T]:
        """What is read of these entries, but for those whose pages are damaged: by halves, down to these. sqlite3.Error."""
        try:
            return await self._connection.run(reading(ids))
        except sqlite3.DatabaseError as error:
            # https://www.sqlite.org/rescode.html#corrupt: extended codes have it in their lowest byte
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            if len(ids) == 1:
                self._warn_once("some cached answers", error)
                return []
        half = len(ids) // 2
        return await self._undamaged(reading, ids[:half]) + await self._undamaged(reading, ids[half:])

    def _warn_once(self, what: str, error: sqlite3.Error) -> None:
        """Say what cannot be read, unless that was said and it could not be read since."""
        if what not in self._unreadable:
            _log.warning("%s could not be read: %s", what, error)
        self._unreadable.add(what)

    def _forget(self, ids: Sequence[int]) -> list[int]:
        """Drop entries from memory at once and from the disk soon; those that were there."""
        return self._left([entry_id for entry_id in ids if self._lru.drop(entry_id)])

    def _left(self, ids: list[int]) -> list[int]:
        for entry_id in ids:
            self._memory.drop(entry_id)
        if ids:
            self._writer.drop(ids)
            if self._on_gone is not None:
                self._on_gone(ids)
        return ids

    def _evict(self, at_most: int = _LAST_ID) -> bool:
        """Drop what was used longest ago until the bounds hold; whether there is more to drop."""
        leaving: list[int] = []
        while is_over := len(self._lru) > self._max_entries or self._lru.bytes > self._max_bytes:
            oldest = self._lru.least_recent()
            if oldest is None or len(leaving) == at_most:
                break
            self._lru.drop(oldest)
            leaving.append(oldest)
        self._left(leaving)
        return is_over

    async def _keep_bounds(self) -> None:
        while self._evict(_PIECE):  # noqa: ASYNC110
            await asyncio.sleep(0)

    def _written(self, sizes: Mapping[int, int]) -> None:
        """Entries count for other sizes since they have vectors."""
        for entry_id, size in sizes.items():
            if entry_id in self._lru:
                self._lru.resize(entry_id, size)
                self._memory.resize(entry_id, size)
        self._evict()

    def _lost(self, ids: Sequence[int]) -> None:
        """Entries could not be written: those that are not in memory are nowhere."""
        self._forget([entry_id for entry_id in ids if entry_id not in self._memory])


def _unavailable(error: sqlite3.Error) -> OverloadedError:
    return OverloadedError("cache_unavailable", f"The cached answers could not be read: {error}")


def _pieces(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
