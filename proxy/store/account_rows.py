"""The rows of organisations, teams and virtual keys, as values; and the statements that read and write them.

What takes a connection runs in its thread, inside a transaction where it writes. To add a field: add it to its NamedTuple,
in the order of its table's columns, and to the table by a new step in `migrations.py`.
"""

from __future__ import annotations

import json
import sqlite3
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from proxy.chat import NO_LIMITS, Limits
from proxy.errors import ClientError
from proxy.policy.keys import is_expired


class Organisation(NamedTuple):
    """Times are Unix seconds, here and below."""

    id: str
    name: str
    created_at: float


class Team(NamedTuple):
    """Its keys may ask for models that fit one of `models`: `*` is any text, `?` any character, case counts."""

    id: str
    organisation: str
    name: str
    models: tuple[str, ...]
    created_at: float
    limits: Limits = NO_LIMITS
    is_suspended: bool = False


class VirtualKey(NamedTuple):
    """A key as it is kept. `id` is the part of it that is shown; `hash` is of all of it, by the secret with that fingerprint."""

    id: str
    team: str
    name: str
    hash: bytes
    secret: str
    models: tuple[str, ...]
    created_at: float
    limits: Limits = NO_LIMITS
    is_suspended: bool = False
    expires_at: float | None = None
    revoked_at: float | None = None

    def status(self, now: float) -> str:
        """`active`, or what it is for good or first of all: `revoked`, `expired`, `suspended`."""
        if self.revoked_at is not None:
            return "revoked"
        if is_expired(self.expires_at, now):
            return "expired"
        return "suspended" if self.is_suspended else "active"


R = TypeVar("R", Organisation, Team, VirtualKey)

WORDS: dict[type[Any], str] = {Organisation: "organisation", Team: "team", VirtualKey: "key"}
_TABLES: dict[type[Any], str] = {Organisation: "organisation", Team: "team", VirtualKey: "virtual_key"}


def _columns_of(kind: type[Any]) -> tuple[str, ...]:
    names = tuple(name for name in kind._fields if name != "limits")
    return names if names == kind._fields else names + Limits._fields


_COLUMNS = {kind: _columns_of(kind) for kind in _TABLES}


class News(NamedTuple):
    """What was changed up to a version."""

    version: int
    organisations: list[Organisation]
    teams: list[Team]
    keys: list[VirtualKey]


def read_since(version: int, connection: sqlite3.Connection) -> News:
    """All rows that were changed after that version.

    What refers to others is read before them, so that those are there; what is changed meanwhile is read again the next time.
    """
    now = int(connection.execute("SELECT version FROM accounts_version").fetchone()[0])
    if now == version:
        return News(now, [], [], [])
    keys = _changed(VirtualKey, version, connection)
    teams = _changed(Team, version, connection)
    return News(now, _changed(Organisation, version, connection), teams, keys)


def find(kind: type[R], row_id: str, connection: sqlite3.Connection) -> R | None:
    """The row with that id; None when there is none."""
    found = connection.execute(f"SELECT {_selected(kind)} WHERE id = ?", (row_id,)).fetchone()
    return None if found is None else _row(kind, found)


def get(kind: type[R], row_id: str, connection: sqlite3.Connection) -> R:
    """The row with that id. ClientError 404 when there is none."""
    if (row := find(kind, row_id, connection)) is None:
        raise missing(kind, row_id)
    return row


def missing(kind: type[Any], row_id: str) -> ClientError:
    word = WORDS[kind]
    return ClientError(404, f"{word}_not_found", f"There is no {word} '{row_id}'.", param=word)


def insert(row: R, connection: sqlite3.Connection) -> R:
    """Write a new row. ClientError 409 when its id is taken."""
    kind: type[Any] = type(row)
    if find(kind, row.id, connection) is not None:
        word = WORDS[kind]
        raise ClientError(409, f"{word}_exists", f"Another {word} has the id '{row.id}'.", param="id")
    values = (*_values(row), _next_version(connection))
    names = ", ".join((*_COLUMNS[kind], "version"))
    connection.execute(f"INSERT INTO {_TABLES[kind]} ({names}) VALUES ({', '.join('?' * len(values))})", values)
    return row


def update(row: R, connection: sqlite3.Connection) -> R:
    """Write new values of a row that is there."""
    kind: type[Any] = type(row)
    setting = ", ".join(f"{name} = ?" for name in (*_COLUMNS[kind], "version"))
    values = (*_values(row), _next_version(connection), row.id)
    connection.execute(f"UPDATE {_TABLES[kind]} SET {setting} WHERE id = ?", values)
    return row


def _changed(kind: type[R], version: int, connection: sqlite3.Connection) -> list[R]:
    return [
        _row(kind, found) for found in connection.execute(f"SELECT {_selected(kind)} WHERE version > ?", (version,))
    ]


def _next_version(connection: sqlite3.Connection) -> int:
    query = "UPDATE accounts_version SET version = version + 1 RETURNING version"
    return int(connection.execute(query).fetchone()[0])


def _selected(kind: type[Any]) -> str:
    return f"{', '.join(_COLUMNS[kind])} FROM {_TABLES[kind]}"


@lru_cache(maxsize=256)
def _patterns(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _row(kind: type[R], found: tuple[Any, ...]) -> R:
    values = dict(zip(_COLUMNS[kind], found, strict=True))
    if "models" in values:
        values["models"] = _patterns(values["models"])
        values["is_suspended"] = bool(values["is_suspended"])
        values["limits"] = Limits(*[values.pop(name) for name in Limits._fields])
    return kind(**values)


def _values(row: Organisation | Team | VirtualKey) -> tuple[Any, ...]:
    values = row._asdict()
    if "models" in values:
        values["models"] = json.dumps(values["models"])
        values |= values.pop("limits")._asdict()
    return tuple(values[name] for name in _COLUMNS[type(row)])
