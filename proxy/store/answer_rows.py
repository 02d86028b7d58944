"""Cached answers as rows: what runs in the connection's thread. Each function is one short piece of work.

All raise sqlite3.Error.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from proxy.store.entries import Entry, Facts, Note, Question, storable

ID_BLOCK = 10_000
"""How many ids are set aside for this process at a time."""

# Measured on completions of 2 to 300 KB: level 4 makes them 0.44 to 0.29 of their size, where 1 makes 0.46 to 0.34 and 6
# makes 0.44 to 0.28; short ones take the same time at every level, long ones at 4 half of that at 6.
_LEVEL = 4

_FACTS = (
    "id, key, scope, namespace, model, target, size, prompt_tokens, completion_tokens, duration_s, created_at, expires_at,"
    " used_at, hits, rights, wrongs, lowest_right, highest_wrong, partition, question"
)
_NAMES = tuple(_FACTS.replace(",", "").split())
_JOINED = "answer LEFT JOIN answer_question USING (id)"

Known = tuple[int, bytes, int, float, float | None]
"""id, key, size, created_at, expires_at: what memory holds of every entry."""


class CorruptError(Exception):
    """A row holds no answer that can be read."""


class Row(NamedTuple):
    """An entry on its way to the disk. `body` is the compressed answer."""

    entry: Entry
    body: bytes
    vector: bytes | None
    embedder: str | None


class Vector(NamedTuple):
    """A vector for an entry that has been written without it."""

    vector: bytes
    embedder: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction does."""

    gone: Sequence[int]
    puts: Mapping[int, Row]
    vectors: Mapping[int, Vector]
    notes: Mapping[int, Note]
    needs_ids: bool


class Written(NamedTuple):
    """What a transaction found out: the first of the ids it set aside, and what entries count for that got a vector."""

    first_id: int | None
    sizes: dict[int, int]


class Filter(NamedTuple):
    """Which entries are meant: those in which all that is not None is equal."""

    model: str | None = None
    namespace: str | None = None
    scope: str | None = None

    @classmethod
    def of(cls, *wanted: str | None) -> Filter:
        """A filter with its texts in the form in which they are stored."""
        return cls(*(None if text is None else storable(text) for text in wanted))

    def fits(self, facts: Facts) -> bool:
        return all(wanted in (None, getattr(facts, name)) for name, wanted in zip(self._fields, self, strict=True))

    def sql(self) -> tuple[str, list[str]]:
        """A condition that begins with AND, where there is one, and its parameters."""
        wanted = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f" AND {name}=?" for name in wanted), list(wanted.values())


def compress(answer: bytes) -> bytes:
    return zlib.compress(answer, _LEVEL)


# ---------------------------------------------------------------------- writing, within a transaction


def write(batch: Batch, connection: sqlite3.Connection) -> Written:
    """Do all that a batch holds."""
    delete(batch.gone, connection)
    for row in batch.puts.values():
        _insert(row, connection)
    sizes: dict[int, int] = {}
    for entry_id, new in batch.vectors.items():
        query = (
            "UPDATE answer SET size=size+?-coalesce(length(vector), 0) FROM answer_question AS question"
            " WHERE answer.id=? AND question.id=answer.id RETURNING answer.id, size"
        )
        sizes.update(connection.execute(query, (len(new.vector), entry_id)).fetchall())
        connection.execute("UPDATE answer_question SET vector=?, embedder=? WHERE id=?", (*new, entry_id))
    for entry_id, note in batch.notes.items():
        connection.execute(
            "UPDATE answer SET used_at=max(used_at, ?1), hits=hits+?2, rights=rights+?3, wrongs=wrongs+?4,"
            " lowest_right=coalesce(min(lowest_right, ?5), lowest_right, ?5),"
            " highest_wrong=coalesce(max(highest_wrong, ?6), highest_wrong, ?6) WHERE id=?7",
            (note.used_at, note.hits, note.rights, note.wrongs, note.lowest_right, note.highest_wrong, entry_id),
        )
    return Written(reserve_ids(connection) if batch.needs_ids else None, sizes)


def _insert(row: Row, connection: sqlite3.Connection) -> None:
    # Another process may have answered the same meanwhile: the later answer counts.
    connection.execute("DELETE FROM answer WHERE key=?", (row.entry.key,))
    entry = row.entry
    connection.execute(
        "INSERT INTO answer (id, key, scope, namespace, model, target, size, prompt_tokens, completion_tokens,"
        " duration_s, created_at, expires_at, used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        tuple(getattr(entry, name) for name in _NAMES[:13]),
    )
    connection.execute("INSERT INTO answer_body VALUES (?, ?)", (entry.id, row.body))
    if entry.partition is not None:
        connection.execute(
            "INSERT INTO answer_question VALUES (?, ?, ?, ?, ?)",
            (entry.id, entry.partition, entry.question, row.vector, row.embedder),
        )


def delete(ids: Sequence[int], connection: sqlite3.Connection) -> None:
    connection.executemany("DELETE FROM answer WHERE id=?", ((entry_id,) for entry_id in ids))


def reserve_ids(connection: sqlite3.Connection) -> int:
    """The first of ID_BLOCK ids that no entry in this file has had, nor will have from another process."""
    query = "UPDATE answer_ids SET unused=unused+? RETURNING unused"
    [(unused,)] = connection.execute(query, (ID_BLOCK,)).fetchall()
    return int(unused) - ID_BLOCK


# ---------------------------------------------------------------------- reading


def known_after(entry_id: int, limit: int, connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """The next rows behind `id`: each a Known with the time of its last use behind it."""
    query = "SELECT id, key, size, created_at, expires_at, used_at FROM answer WHERE id>? ORDER BY id LIMIT ?"
    return connection.execute(query, (entry_id, limit)).fetchall()


def known(ids: Sequence[int], connection: sqlite3.Connection) -> list[Known]:
    query = f"SELECT id, key, size, created_at, expires_at FROM answer WHERE id IN ({_marks(ids)})"
    return connection.execute(query, ids).fetchall()


def keys_after(key: bytes, limit: int, connection: sqlite3.Connection) -> list[tuple[bytes, int]]:
    """The next keys behind `key` and their ids; the index of keys alone is read."""
    return connection.execute("SELECT key, id FROM answer WHERE key>? ORDER BY key LIMIT ?", (key, limit)).fetchall()


def read(entry_id: int, connection: sqlite3.Connection) -> Entry | None:
    """The entry; None when there is no such row. CorruptError when its answer is not what was written."""
    query = f"SELECT {_FACTS}, answer FROM {_JOINED} JOIN answer_body USING (id) WHERE id=?"
    row = connection.execute(query, (entry_id,)).fetchone()
    if row is None:
        return None
    *facts, body = row
    try:
        answer = zlib.decompress(body)
        orjson.loads(answer)
    except (zlib.error, orjson.JSONDecodeError) as error:
        raise CorruptError(str(error)) from None
    return Entry(**_members(facts), answer=answer)


def listed(first: int, last: int, only: Filter, connection: sqlite3.Connection) -> list[Facts]:
    """Of the entries from id `first` to `last`, those that are meant, without their answers."""
    condition, wanted = only.sql()
    query = f"SELECT {_FACTS} FROM {_JOINED} WHERE id BETWEEN ? AND ?{condition}"
    return [Facts(**_members(row)) for row in connection.execute(query, (first, last, *wanted))]


def matching(first: int, last: int, only: Filter, connection: sqlite3.Connection) -> list[int]:
    """Of the entries from id `first` to `last`, those that are meant."""
    condition, wanted = only.sql()
    rows = connection.execute(f"SELECT id FROM answer WHERE id BETWEEN ? AND ?{condition}", (first, last, *wanted))
    return [entry_id for (entry_id,) in rows]


def questions(first: int, last: int, connection: sqlite3.Connection) -> list[tuple[Question, str | None]]:
    """The questions of all semantic entries from id `first` to `last`, and which embedder made their vectors."""
    query = "SELECT id, partition, question, vector, embedder FROM answer_question WHERE id BETWEEN ? AND ?"
    return [(Question(*row[:4]), row[4]) for row in connection.execute(query, (first, last))]


def _members(row: Sequence[Any]) -> dict[str, Any]:
    members = dict(zip(_NAMES, row, strict=True))
    members["question"] = members["question"] or ""
    return members


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
