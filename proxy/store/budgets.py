"""Budgets: what a team and a key may spend in each day, each month (UTC) and in all, in US dollars.

Who has a budget, a team or a key, has a row for each of its spans:

    reserved = what its open calls hold that were opened in that span
    spent    = what its closed calls cost that were opened in it

A row is made when a budget first asks for it, from the calls themselves, and kept by the transactions that open and close calls
from then on, whether there still is a budget or not. So it may be deleted at any time; a new span's row takes the place of the
last one's. Who never had a budget has no rows. Amounts are millionths of a dollar.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from proxy.chat import NO_BUDGETS, Budgets
from proxy.errors import ClientError
from proxy.policy.credits import MICRO, Budget, Period, Span, exceeded, show_credits, span_of
from proxy.store import usage
from proxy.store.usage import DAY_S

# In the order of the members of Budgets.
_PERIODS = (Period.DAY, Period.MONTH, Period.TOTAL)

_WORDS = {Period.DAY: "a day", Period.MONTH: "a month", Period.TOTAL: "in all"}

_END_OF_TIME = 2**40


class BudgetExceededError(ClientError):
    """402: a budget does not allow for what a call may cost. `extra` has its figures, in dollars."""

    def __init__(self, whose: str, budget: Budget, spent: int, reserved: int, needed: int) -> None:
        words = (
            f"The budget of the {whose} is {show_credits(budget.limit)} USD {_WORDS[budget.period]}: "
            f"{show_credits(spent)} USD are spent, {show_credits(reserved)} USD are reserved, "
            f"and up to {show_credits(needed)} USD are needed."
        )
        figures = {
            "of": whose,
            "period": str(budget.period),
            "limit": budget.limit / MICRO,
            "spent": spent / MICRO,
            "reserved": reserved / MICRO,
            "needed": needed / MICRO,
        }
        super().__init__(402, "budget_exceeded", words, kind="insufficient_quota", extra={"budget": figures})


class _Row:
    __slots__ = ("reserved", "spent")

    def __init__(self, reserved: int, spent: int) -> None:
        self.reserved = reserved
        self.spent = spent


class _Place(NamedTuple):
    """Where a row stands among those of its holder. No Period in it: to hash one takes longer than all the rest."""

    period: str
    start: int


class Spending:
    """The rows that one transaction changes: a holder's are read once, and written once at the end.

    `write_calls` writes what the transaction has not yet written of calls, for a row that is made is made from them.
    """

    def __init__(self, connection: sqlite3.Connection, write_calls: Callable[[], None]) -> None:
        self._connection = connection
        self._write_calls = write_calls
        self._rows: dict[str, dict[_Place, _Row]] = {}
        self._changed: set[str] = set()

    def write(self) -> None:
        if self._changed:
            statement = "UPDATE spending SET reserved = ?, spent = ? WHERE holder = ? AND period = ? AND start = ?"
            rows = [
                (row.reserved, row.spent, holder, *place)
                for holder in self._changed
                for place, row in self._rows[holder].items()
            ]
            self._connection.executemany(statement, rows)

    def check(
        self, team: str, key: str | None, opened_at: float, team_budgets: Budgets, key_budgets: Budgets, wanted: int
    ) -> None:
        """BudgetExceededError when a call's team or key may not spend so much more. Before the step has changed any call."""
        if team_budgets == key_budgets == NO_BUDGETS:
            return
        holders = self._holders(team, key)
        self._check("team", holders[0], team, None, opened_at, team_budgets, wanted)
        if key is not None:
            self._check("key", holders[1], team, key, opened_at, key_budgets, wanted)

    def add(self, team: str, key: str | None, opened_at: float, reserved: int, spent: int) -> None:
        """So much more, or less, is reserved and spent for a call that was opened then."""
        if not reserved and not spent:
            return
        for holder in self._holders(team, key):
            rows = self._rows[holder]
            if not rows:
                continue
            for place, _, _ in _spans(int(opened_at // DAY_S)):
                row = rows.get(place)
                if row is not None:
                    row.reserved += reserved
                    row.spent += spent
                    self._changed.add(holder)

    def _holders(self, team: str, key: str | None) -> tuple[str, ...]:
        """The team and the key, whose rows are there from then on."""
        holders = (f"team {team}",) if key is None else (f"team {team}", f"key {key}")
        for holder in holders:
            if holder not in self._rows:
                query = "SELECT period, start, reserved, spent FROM spending WHERE holder = ?"
                found = self._connection.execute(query, (holder,))
                self._rows[holder] = {_Place(period, start): _Row(*amounts) for period, start, *amounts in found}
        return holders

    def _check(
        self, whose: str, holder: str, team: str, key: str | None, opened_at: float, limits: Budgets, wanted: int
    ) -> None:
        budgets, used = [], {}
        for (place, period, span), limit in zip(_spans(int(opened_at // DAY_S)), limits, strict=True):
            if limit is not None:
                budgets.append(Budget(period, limit))
                used[period] = self._rows[holder].get(place) or self._make(holder, team, key, place, span)
        short = exceeded(budgets, {period: row.reserved + row.spent for period, row in used.items()}, wanted)
        if short is not None:
            row = used[short.period]
            raise BudgetExceededError(whose, short, row.spent, row.reserved, wanted)

    def _make(self, holder: str, team: str, key: str | None, place: _Place, span: Span) -> _Row:
        self._write_calls()
        end = _END_OF_TIME if span.end is None else span.end
        (total,) = usage.read(self._connection, (), span.start, end, (team,), key, None)
        query = """SELECT coalesce(sum(held_microusd), 0) FROM open_call
                   WHERE team = ?1 AND (?2 IS NULL OR key = ?2) AND opened_at >= ?3 AND opened_at < ?4"""
        (reserved,) = self._connection.execute(query, (team, key, span.start, end)).fetchone()
        self._connection.execute("DELETE FROM spending WHERE holder = ? AND period = ? AND start < ?", (holder, *place))
        spent = total.sums.price_microusd
        self._connection.execute("INSERT INTO spending VALUES (?, ?, ?, ?, ?)", (holder, *place, reserved, spent))
        row = self._rows[holder][place] = _Row(reserved, spent)
        return row


@lru_cache(maxsize=8)
def _spans(day: int) -> tuple[tuple[_Place, Period, Span], ...]:
    """The spans that a day belongs to."""
    spans = [(period, span_of(period, day * DAY_S)) for period in _PERIODS]
    return tuple((_Place(period.value, span.start), period, span) for period, span in spans)
