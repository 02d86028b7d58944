"""Many rows in few statements.

A statement costs as much as a row, and each gives Python's lock away, which a busy event loop gives back after up to 5 ms:
https://docs.python.org/3/library/sys.html#sys.setswitchinterval
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

_MAX_ROWS = 64


def insert(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of one length; `statement` is all that comes before their values."""
    start, size = 0, _MAX_ROWS
    while left := len(rows) - start:
        # Few sizes, so that each statement is prepared once.
        while size > left:
            size //= 2
        piece = rows[start : start + size]
        connection.execute(_values(statement, len(piece[0]), size), tuple(chain.from_iterable(piece)))
        start += size


@cache
def _values(statement: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{statement} {', '.join([row] * rows)}"
