"""Processes on one ledger, and what they write there."""

from __future__ import annotations

import sqlite3
from calendar import monthrange
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from proxy.chat import Budgets, Mode, Status
from proxy.store import db, migrations
from proxy.store.calls import End, NewCall, OpenCall
from proxy.store.ledger import Ledger
from proxy.store.processes import Presence
from proxy.tasks import Tasks

NOW = 1_800_000_000.0
DAY = int(NOW // 86_400)


class Process:
    """What one process has of the ledger. `crash` ends it as a kill -9 does: what is not written is lost."""

    def __init__(
        self, ledger: Ledger, connection: db.Connection, reader: db.Connection, presence: Presence, tasks: Tasks
    ) -> None:
        self.ledger, self.presence = ledger, presence
        self.connection, self.reader, self.tasks = connection, reader, tasks

    async def crash(self) -> None:
        self.presence.leave()
        await self.tasks.close()
        await self.connection.close()
        await self.reader.close()

    async def stop(self) -> None:
        await self.ledger.close()
        await self.crash()


Start = Callable[[], Awaitable[Process]]


@asynccontextmanager
async def starting(path: Path) -> AsyncIterator[Start]:
    """A function that starts processes on one file; they end with the block."""
    async with AsyncExitStack() as stack:

        async def start() -> Process:
            connection = await db.connect(path, migrations.MAIN)
            reader = await db.connect(path, migrations.MAIN)
            presence, tasks = Presence(path, clock=lambda: NOW), Tasks()
            process = Process(
                await Ledger.open(connection, reader, presence, tasks, NOW), connection, reader, presence, tasks
            )
            stack.push_async_callback(process.crash)
            return process

        yield start


def new(call_id: str = "call-1", team: str = "red", **members: Any) -> NewCall:
    return NewCall(call_id, team, "gpt-4o", NOW)._replace(**members)


async def opened(ledger: Ledger, call: NewCall, **budgets: Budgets) -> OpenCall:
    """A call that was opened."""
    handle = OpenCall(call)
    await ledger.open_call(handle, **budgets)
    return handle


def noted(ledger: Ledger, call: NewCall) -> OpenCall:
    """A call that holds nothing, and was noted."""
    handle = OpenCall(call)
    assert ledger.note_call(handle)
    return handle


def record(ledger: Ledger, call: NewCall, end: End, **members: Any) -> None:
    """Close a call that was never opened."""
    ledger.close_call(OpenCall(call), end, **members)


def done(charge_microcredits: int = 0, **members: Any) -> End:
    """The end of a call that went well."""
    end = End(Status.OK, Mode.RELAY, 200, NOW + 2, 2000.0, charge_microcredits=charge_microcredits)
    return end._replace(**members)


def look(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What another program sees in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def check_books(path: Path) -> None:
    """What must be true of the file at every moment, whoever wrote it last."""
    held = """SELECT team, sum(held) FROM (SELECT team, held_microcredits held FROM open_call
              UNION ALL SELECT team, held_microcredits FROM job) GROUP BY team HAVING sum(held) > 0 ORDER BY team"""
    assert look(path, held) == look(path, "SELECT team, reserved FROM credit_account WHERE reserved > 0 ORDER BY team")
    # The transactions are a chain that ends in the balance.
    for team, balance, charged, transactions in look(
        path, "SELECT team, remaining + reserved, charged, transactions FROM credit_account"
    ):
        chain = look(
            path, f"SELECT number, before, after FROM credit_transaction WHERE team = '{team}' ORDER BY number"
        )
        assert [number for number, _, _ in chain] == list(range(1, transactions + 1))
        assert [after for _, _, after in chain][:-1] == [before for _, before, _ in chain][1:]
        assert (chain[-1][2] if chain else 0) == balance
        spent = "SELECT coalesce(-sum(amount), 0) FROM credit_transaction WHERE kind IN ('charge', 'refund')"
        assert look(path, f"{spent} AND team = '{team}'") == [(charged,)]
    for table, user, some in (("call_day", "", "TRUE"), ("user_day", "user, ", "user <> ''")):
        group = f"CAST(opened_at / 86400 AS INTEGER), team, coalesce(key, ''), model, {user}status"
        sums = "count(*), sum(status <> 'ok'), sum(coalesce(prompt_tokens, 0)), sum(settled_microcredits)"
        rows = look(path, f"SELECT {group}, {sums} FROM call WHERE {some} GROUP BY {group} ORDER BY {group}")
        group = f"day, team, key, model, {user}status"
        sums = "sum(calls), sum(failed_calls), sum(prompt_tokens), sum(settled_microcredits)"
        assert rows == look(path, f"SELECT {group}, {sums} FROM {table} GROUP BY {group} ORDER BY {group}")
    states = "SELECT team, CAST(created_at / 86400 AS INTEGER) day, state counted, count(*) FROM job GROUP BY 1, 2, 3"
    kinds = """SELECT team, CAST(at / 86400 AS INTEGER), kind, sum(amount) FROM credit_transaction GROUP BY 1, 2, 3
               HAVING sum(amount) <> 0"""
    kept = "SELECT team, day, counted, amount FROM team_day WHERE amount <> 0 ORDER BY 1, 2, 3"
    assert look(path, kept) == look(path, f"{states} UNION ALL {kinds} ORDER BY 1, 2, 3")
    check_spending(path)


def check_spending(path: Path) -> None:
    """What holders with budgets have reserved and spent is what their calls of those spans hold and cost."""
    with closing(sqlite3.connect(path)) as connection:
        for holder, period, start, reserved, spent in connection.execute("SELECT * FROM spending"):
            kind, _, name = holder.partition(" ")
            first = datetime.fromtimestamp(start, UTC)
            day, month = timedelta(days=1), timedelta(days=monthrange(first.year, first.month)[1])
            end = first + {"day": day, "month": month, "total": timedelta(days=10**6)}[period]
            span = f"{kind} = '{name}' AND opened_at >= {start} AND opened_at < {end.timestamp()}"
            sums = f"""SELECT (SELECT coalesce(sum(held_microusd), 0) FROM open_call WHERE {span}),
                              (SELECT coalesce(sum(price_microusd), 0) FROM call WHERE {span})"""
            assert connection.execute(sums).fetchone() == (reserved, spent), (holder, period, start)
