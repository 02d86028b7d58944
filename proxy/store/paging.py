"""Long lists in pieces: the newest rows first, and the next piece from behind the last row of this one.

A row's `number` is the cursor, so a page costs the same however far back it is, and rows that come meanwhile move nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from proxy.store.entries import storable

MAX_INTEGER = 2**62
"""What is larger is not counted: SQLite's integers have 64 bits, and two of these can still be added."""

MAX_TOTAL = 100_000
"""Rows are counted no further: to count a million takes 50 ms, and nobody reads that many pages."""

T = TypeVar("T")


class Page(NamedTuple, Generic[T]):
    """`total` is how many rows there are on all pages; MAX_TOTAL when there are as many, or more."""

    rows: list[T]
    total: int


def page(
    connection: sqlite3.Connection,
    table: str,
    columns: str,
    wanted: Sequence[tuple[str, str | None]],
    before: int | None,
    limit: int,
) -> tuple[list[tuple[Any, ...]], int]:
    """The newest `limit` rows of a table with numbers below `before`, and how many there are on all pages, up to MAX_TOTAL.

    `wanted` are columns and what is in them; None is not looked at.
    """
    given = [(column, value) for column, value in wanted if value is not None]
    where = "".join(f" AND {column} = ?" for column, _ in given)
    values = [storable(value) for _, value in given]
    count = f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE TRUE{where} LIMIT {MAX_TOTAL})"
    (total,) = connection.execute(count, values).fetchone()
    query = f"SELECT {columns} FROM {table} WHERE number < ?{where} ORDER BY number DESC LIMIT ?"
    end = MAX_INTEGER if before is None else min(max(before, 0), MAX_INTEGER)
    return connection.execute(query, [end, *values, limit]).fetchall(), total
