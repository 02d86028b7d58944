"""The sums of closed calls, by day: kept in the transaction that closes the calls, so they are always those of the rows.

A report over a million calls reads some thousands of sums. They stay when the calls themselves are deleted. A day is one of
UTC, counted from 1970-01-01, and a call is one of the day on which it was opened.

Clients name their users as they like, so there may be as many of these as calls: sums by user are apart from those without, which
all other reports are read from.
"""

from __future__ import annotations

import json
import math
import operator
import sqlite3
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from proxy.store.entries import storable

DAY_S = 86_400

Group = Literal["day", "team", "key", "model", "target", "user", "purpose", "status"]


class Sums(NamedTuple):
    """What some calls add up to. Money of calls whose price is unknown is not in it: `unpriced_calls` says how many.

    `cost_microusd` is what upstreams ask for, `price_microusd` what teams are asked for, and `settled_microcredits` what was
    charged, or left with a job to be charged.
    """

    calls: int
    failed_calls: int
    unpriced_calls: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost_microusd: int
    price_microusd: int
    settled_microcredits: int


class UsageRow(NamedTuple):
    """`group` has a value for each thing that was grouped by: an int for a day, else a text ("" where there is none)."""

    group: tuple[str | int, ...]
    sums: Sums


def _adding(table: str, groups: int) -> str:
    return f"""INSERT INTO {table} VALUES ({", ".join("?" * (groups + len(Sums._fields)))}) ON CONFLICT DO UPDATE
               SET {", ".join(f"{field} = {field} + excluded.{field}" for field in Sums._fields)}"""


_ADD, _ADD_TO_USER = _adding("call_day", 7), _adding("user_day", 8)

Grouped = tuple[int, str, str, str, str, str, str, str]
"""What calls whose sums are one row have in common: day, team, key, model, target, user, purpose, status ("" where is none)."""

_USER = 5


class Totals:
    """What the calls that one transaction closes add to the sums. To be written at its end."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, ...], list[Sums]] = {}
        self._of_users: dict[tuple[Any, ...], list[Sums]] = {}

    def add(self, group: Grouped, sums: Sums) -> None:
        self._sums.setdefault(group[:_USER] + group[_USER + 1 :], []).append(sums)
        if group[_USER]:
            self._of_users.setdefault(group, []).append(sums)

    def write(self, connection: sqlite3.Connection) -> None:
        for statement, added in ((_ADD, self._sums), (_ADD_TO_USER, self._of_users)):
            if added:
                rows = [(*group, *map(sum, zip(*sums, strict=True))) for group, sums in added.items()]
                connection.executemany(statement, rows)
                added.clear()


class TeamDays:
    """What one transaction adds to what is counted for teams by day beside their calls. To be written at its end.

    That are jobs, by their state and the day of their creation, and the changes of balances, by their kind and day.
    """

    def __init__(self) -> None:
        self._amounts: dict[tuple[str, int, str], int] = {}

    def add(self, team: str, at: float, counted: str, amount: int) -> None:
        group = (team, int(at // DAY_S), counted)
        self._amounts[group] = self._amounts.get(group, 0) + amount

    def write(self, connection: sqlite3.Connection) -> None:
        if self._amounts:
            statement = (
                "INSERT INTO team_day VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET amount = amount + excluded.amount"
            )
            connection.executemany(statement, [(*group, amount) for group, amount in self._amounts.items()])


def of_team(connection: sqlite3.Connection, team: str, since: float, until: float) -> dict[str, int]:
    """What was counted for a team on all days that two times touch, the second exclusive."""
    query = "SELECT counted, sum(amount) FROM team_day WHERE team = ? AND day >= ? AND day < ? GROUP BY counted"
    values = (storable(team), math.floor(since / DAY_S), math.ceil(until / DAY_S))
    return dict(connection.execute(query, values).fetchall())


def read(
    connection: sqlite3.Connection,
    by: Sequence[Group],
    since: float,
    until: float,
    teams: Sequence[str] | None,
    key: str | None,
    user: str | None,
    limit: int | None = None,
) -> list[UsageRow]:
    """The sums of calls of all days that two times touch, the second exclusive; in the order of the groups.

    Only those of some teams, a key or a user, and only the first `limit` rows, where these are given. Without groups it is one
    row.
    """
    if "user" not in by and user is None:
        return _read(connection, "call_day", by, since, until, teams, key, None, limit)
    named = _read(connection, "user_day", by, since, until, teams, key, user, limit) if user != "" else []
    if user:
        return named
    # Calls that name no user are all but those that name one.
    others = [group for group in by if group != "user"]
    theirs = dict(_read(connection, "user_day", others, since, until, teams, key, None, None))
    nameless = []
    for group, sums in _read(connection, "call_day", others, since, until, teams, key, None, None):
        left = Sums._make(map(operator.sub, sums, theirs[group])) if group in theirs else sums
        if left.calls or not by:
            values = dict(zip(others, group, strict=True)) | {"user": ""}
            nameless.append(UsageRow(tuple(values[group] for group in by), left))
    return sorted([*named, *nameless], key=lambda row: row.group)[:limit]


def _read(
    connection: sqlite3.Connection,
    table: str,
    by: Sequence[Group],
    since: float,
    until: float,
    teams: Sequence[str] | None,
    key: str | None,
    user: str | None,
    limit: int | None,
) -> list[UsageRow]:
    first, last = connection.execute(f"SELECT min(day), max(day) FROM {table}").fetchone()
    start = max(math.floor(since / DAY_S), first or 0)
    end = min(math.ceil(until / DAY_S), (last or 0) + 1)
    values: list[str | int] = [start, end]
    source, wanted = table, "day >= ? AND day < ?"
    if teams is not None:
        # A list of days is what lets SQLite look up (day, team) for each, where a range of days would be read whole.
        source = f"""(WITH RECURSIVE wanted_day(wanted) AS
                          (SELECT ? AS wanted WHERE wanted < ? UNION ALL SELECT wanted + 1 FROM wanted_day WHERE wanted + 1 < ?)
                      SELECT wanted FROM wanted_day) CROSS JOIN {table}"""
        wanted = "day = wanted AND team IN (SELECT value FROM json_each(?))"
        values += [end, json.dumps(teams)]
    for column, value in (("key", key), ("user", user)):
        if value is not None:
            wanted += f" AND {column} = ?"
            values.append(storable(value))
    groups = ", ".join(by)
    named = f"{groups}, " if by else ""
    query = f"SELECT {named}{', '.join(f'coalesce(sum({field}), 0)' for field in Sums._fields)} FROM {source} WHERE {wanted}"
    if by:
        query += f" GROUP BY {groups} ORDER BY {groups} LIMIT ?"
        # https://www.sqlite.org/lang_select.html#the_limit_clause: below 0 is no limit.
        values.append(-1 if limit is None else limit)
    return [UsageRow(row[: len(by)], Sums(*row[len(by) :])) for row in connection.execute(query, values)]
