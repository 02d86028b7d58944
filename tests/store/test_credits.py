"""Accounts of credits: every change has a row, none can be made that is not covered, and refills come when they are due."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ClientError
from proxy.store.credits import NOTHING, Balance, Cause, CreditsSpentError, Refill, RefillPeriod, next_refill
from proxy.store.ledger import Ledger
from proxy.store.paging import MAX_INTEGER
from tests.conftest import examples
from tests.store.ledgers import NOW, check_books, done, new, opened, starting

DAY, WEEK, MONTH = RefillPeriod


@pytest_asyncio.fixture
async def ledger(path: Path) -> AsyncIterator[Ledger]:
    async with starting(path) as start:
        yield (await start()).ledger
    check_books(path)


async def test_every_change_has_a_row_with_before_and_after(ledger: Ledger) -> None:
    assert await ledger.balance("red") == NOTHING
    assert await ledger.allocate("red", 1_000, Cause(NOW, "the first")) == Balance(1_000, 1_000, 0, 0)
    ledger.close_call(await opened(ledger, new(hold_microcredits=500)), done(400))
    assert await ledger.refund("red", 150, Cause(NOW, "the answer was bad", call="call-1")) == Balance(
        1_000, 750, 0, 250
    )
    assert await ledger.adjust("red", -50, Cause(NOW, "a mistake")) == Balance(950, 700, 0, 250)
    assert await ledger.adjust("red", 50, Cause(NOW, "\ud800")) == Balance(1_000, 750, 0, 250)
    page = await ledger.transactions("red")
    assert page.total == 5
    assert [(row.number, row.kind, row.amount, row.before, row.after, row.call, row.reason) for row in page.rows] == [
        (5, "adjustment", 50, 700, 750, None, "?"),
        (4, "adjustment", -50, 750, 700, None, "a mistake"),
        (3, "refund", 150, 600, 750, "call-1", "the answer was bad"),
        (2, "charge", -400, 1_000, 600, "call-1", ""),
        (1, "allocation", 1_000, 0, 1_000, None, "the first"),
    ]
    assert [row.number for row in (await ledger.transactions("red", before=4, limit=2)).rows] == [3, 2]


async def test_a_call_of_a_thousand_dollars_is_charged_in_full_at_a_million_credits_a_dollar(ledger: Ledger) -> None:
    worth = 1_000 * 10**6 * 10**6
    await ledger.allocate("red", 2 * worth, Cause(NOW))
    ledger.close_call(await opened(ledger, new(hold_microcredits=worth)), done(worth))
    assert await ledger.balance("red") == Balance(2 * worth, worth, 0, worth)


async def test_what_is_not_there_cannot_be_taken(ledger: Ledger) -> None:
    await ledger.allocate("red", 100, Cause(NOW))
    await opened(ledger, new(hold_microcredits=60))
    with pytest.raises(CreditsSpentError):
        await ledger.adjust("red", -41, Cause(NOW))
    for attempt in (
        ledger.allocate("red", 0, Cause(NOW)),
        ledger.allocate("red", MAX_INTEGER, Cause(NOW)),
        ledger.adjust("red", 0, Cause(NOW)),
        ledger.refund("red", 1, Cause(NOW)),
        ledger.refund("red", -1, Cause(NOW)),
        ledger.set_refill("red", Refill(0, DAY, NOW)),
    ):
        with pytest.raises(ClientError) as caught:
            await attempt
        assert caught.value.status == 400
    assert await ledger.balance("red") == Balance(100, 40, 60, 0)
    assert (await ledger.transactions("red")).total == 1


@pytest.mark.parametrize("change", ["remaining = remaining - 1", "reserved = -1, remaining = 101", "charged = 1"])
async def test_the_file_itself_refuses_accounts_that_do_not_add_up(ledger: Ledger, path: Path, change: str) -> None:
    await ledger.allocate("red", 100, Cause(NOW))
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(f"UPDATE credit_account SET {change}")


async def test_accounts_are_refilled_once_when_they_are_due(ledger: Ledger) -> None:
    await ledger.set_refill("red", Refill(100, DAY, NOW))
    await ledger.set_refill("blue", Refill(100, WEEK, NOW + 1))
    await ledger.allocate("green", 1, Cause(NOW))
    assert await ledger.refill("green") is None
    assert await ledger.refill_due(NOW - 1) == 0
    assert await ledger.refill_due(NOW) == 1
    assert await ledger.refill_due(NOW) == 0
    assert (await ledger.balance("red"), await ledger.balance("blue")) == (Balance(100, 100, 0, 0), NOTHING)
    assert await ledger.refill("red") == Refill(100, DAY, NOW + 86_400)
    # After three days of rest what was missed is made up once.
    assert await ledger.refill_due(NOW + 3.5 * 86_400) == 2
    assert await ledger.refill("red") == Refill(100, DAY, NOW + 4 * 86_400)
    assert [row.kind for row in (await ledger.transactions("red")).rows] == ["refill", "refill"]
    await ledger.set_refill("red", None)
    assert await ledger.refill_due(NOW + 6 * 86_400) == 0
    assert (await ledger.balance("red")).remaining == 200


@pytest.mark.parametrize(("period", "later"), [(DAY, 3), (WEEK, 7), (MONTH, 31)])
async def test_a_clock_that_was_ahead_puts_no_refill_off(ledger: Ledger, period: RefillPeriod, later: int) -> None:
    first, now = at(2026, 1, 1), at(2026, 1, 3, 12)
    await ledger.set_refill("red", Refill(100, period, first))
    await ledger.set_refill("blue", Refill(100, period, at(2029, 1, 1)))
    assert await ledger.refill_due(at(2028, 1, 1)) == 1
    assert [await ledger.refill_due(now) for _ in "12"] == [1, 0]
    assert await ledger.refill("red") == Refill(100, period, first + later * 86_400)
    assert await ledger.refill("blue") == Refill(100, period, at(2029, 1, 1)), "which is to begin then"
    assert (await ledger.balance("red")).allocated == 100


def at(*date: int) -> float:
    return datetime(*date, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("period", "first", "now", "later"),
    [
        (DAY, at(2026, 1, 1, 6), at(2026, 1, 1, 6), at(2026, 1, 2, 6)),
        (WEEK, at(2026, 1, 1), at(2026, 1, 20), at(2026, 1, 22)),
        # Floats are coarser after 2038; one that is due now again would be paid for ever.
        (WEEK, 1903058948.6714566, 2532050948.6714563, 2532655748.6714563),
        (MONTH, at(2026, 1, 31, 6), at(2026, 1, 31, 7), at(2026, 2, 28, 6)),
        (MONTH, at(2028, 1, 31), at(2028, 2, 1), at(2028, 2, 29)),
        (MONTH, at(2026, 12, 15), at(2026, 12, 15), at(2027, 1, 15)),
        (MONTH, at(2020, 3, 10), at(2026, 3, 9), at(2026, 3, 10)),
    ],
)
def test_when_the_next_refill_is_due(period: RefillPeriod, first: float, now: float, later: float) -> None:
    assert next_refill(period, first, now) == later


@given(st.sampled_from(RefillPeriod), st.integers(0, 4 * 10**9), st.integers(0, 10**9))
@examples(100)
def test_the_next_refill_is_less_than_a_period_away(period: RefillPeriod, first: int, wait: int) -> None:
    later = next_refill(period, first, first + wait)
    longest = {DAY: 1, WEEK: 7, MONTH: 34}[period] * 86_400
    assert first + wait < later <= first + wait + longest
