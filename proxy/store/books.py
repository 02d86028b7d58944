"""What one transaction of the ledger has open: the file, accounts and budgets, the calls it opens and closes, their sums.

Its steps share it. What they change in memory is written at the end, many rows in one statement.
"""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

from proxy.store.budgets import Spending
from proxy.store.credits import Accounts
from proxy.store.inserting import insert
from proxy.store.usage import TeamDays, Totals

if TYPE_CHECKING:
    from proxy.store.calls import OpenCall


class Books:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.days = TeamDays()
        self.accounts = Accounts(connection, self.days)
        self.spending = Spending(connection, self.write_calls)
        self.totals = Totals()
        self.opened: list[tuple[Any, ...]] = []
        """Rows of `open_call`."""
        self.opening: set[OpenCall] = set()
        """The calls that it opens."""
        self.holding: dict[tuple[int, int], tuple[int, int]] = {}
        """What open calls hold from now on, in micro-credits and micro-dollars, by their processes and numbers."""
        self.closed: list[tuple[Any, ...]] = []
        """Rows of `call`, but for their numbers."""
        self.contents: list[tuple[int, tuple[Any, ...]]] = []
        """Rows of `call_content`, but for the numbers of their calls; and where those stand in `closed`."""
        self.no_longer_open: dict[int, list[int]] = {}
        """The numbers of calls that close, by the process that has them open."""
        self.no_longer_noted: dict[int, list[int]] = {}
        """The same of calls that were noted, and have no row before."""

    def has_row(self, call: OpenCall) -> bool:
        """Whether it was opened by a transaction, which may be this one."""
        return call.is_open or call in self.opening

    def write(self) -> None:
        """To be called at the end of the transaction. IntegrityError as from `write_calls`."""
        self.write_calls()
        for process, numbers in self.no_longer_noted.items():
            statement = "UPDATE process SET closed = ? WHERE number = ?"
            self.connection.execute(statement, (json.dumps(numbers), process))
        self.days.write(self.connection)
        self.spending.write()
        self.accounts.write()

    def write_calls(self) -> None:
        """Write what is known of calls so far. IntegrityError when one that closes, or holds more or less, is not open."""
        insert(self.connection, "INSERT INTO open_call VALUES", self.opened)
        if self.holding:
            statement = "UPDATE open_call SET held_microcredits = ?, held_microusd = ? WHERE process = ? AND number = ?"
            rows = [(*held, *call) for call, held in self.holding.items()]
            _check_open(self.connection.executemany(statement, rows), len(rows))
        for process, numbers in self.no_longer_open.items():
            statement = "DELETE FROM open_call WHERE process = ? AND number IN (SELECT value FROM json_each(?))"
            _check_open(self.connection.execute(statement, (process, json.dumps(numbers))), len(numbers))
        if self.contents:
            # A row without a number gets the one behind the largest: https://www.sqlite.org/autoinc.html
            (last,) = self.connection.execute("SELECT coalesce(max(number), 0) FROM call").fetchone()
            contents = [(last + 1 + position, *row) for position, row in self.contents]
        insert(self.connection, "INSERT INTO call VALUES", self.closed)
        if self.contents:
            insert(self.connection, "INSERT INTO call_content VALUES", contents)
        self.totals.write(self.connection)
        for written in (self.opened, self.holding, self.no_longer_open, self.closed, self.contents):
            written.clear()


def _check_open(cursor: sqlite3.Cursor, count: int) -> None:
    if cursor.rowcount != count:
        raise sqlite3.IntegrityError("a call was closed by another process")
