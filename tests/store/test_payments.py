"""What administrators pay: once for each key, whichever process is asked; and what the first payment makes of a team."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.errors import ClientError
from proxy.policy.credits import BudgetMode
from proxy.store.credits import Balance, Cause, Refill, RefillPeriod, TransactionKind
from proxy.store.ledger import Ledger
from proxy.store.payments import Paid, Payment
from tests.store.ledgers import DAY, NOW, Start, check_books, done, look, new, opened, starting

ALLOCATION, REFILL, ADJUSTMENT, CHARGE, REFUND = TransactionKind
GIFT = Payment("local", ALLOCATION, 100, Cause(NOW, "a gift"))
MODE = "SELECT budget_mode, version FROM team WHERE id = 'local'"


@pytest_asyncio.fixture
async def start(path: Path) -> AsyncIterator[Start]:
    async with starting(path) as starter:
        yield starter
    check_books(path)


@pytest_asyncio.fixture
async def ledger(start: Start) -> Ledger:
    return (await start()).ledger


async def test_processes_that_are_asked_for_the_same_at_once_pay_once(start: Start) -> None:
    ledgers = [(await start()).ledger for _ in range(2)]
    gift = GIFT._replace(key="k")
    said = await asyncio.gather(*[ledgers[number % 2].pay(gift) for number in range(40)])
    # The time at which somebody asks is no part of what is asked.
    said.append(await ledgers[0].pay(gift._replace(cause=Cause(NOW + 60, "a gift"))))
    assert set(said) == {said[0]}
    assert said[0].balance == Balance(100, 100, 0, 0)
    await ledgers[0].pay(GIFT)
    assert await ledgers[1].balance("local") == Balance(200, 200, 0, 0), "without a key each is one of its own"


async def test_a_key_is_for_one_payment(ledger: Ledger) -> None:
    gift = GIFT._replace(key="k")
    await ledger.pay(gift)
    for other in (
        gift._replace(amount=101),
        gift._replace(kind=ADJUSTMENT),
        gift._replace(team="blue"),
        gift._replace(cause=Cause(NOW, "another")),
        gift._replace(cause=Cause(NOW, "a gift", call="c")),
    ):
        with pytest.raises(ClientError) as caught:
            await ledger.pay(other)
        assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")


async def test_what_is_refused_leaves_nothing(ledger: Ledger, path: Path) -> None:
    for payment, expected in (
        (GIFT._replace(team="nobody"), 404),
        (GIFT._replace(amount=0), 400),
        (GIFT._replace(kind=REFUND), 400),
        (GIFT._replace(kind=ADJUSTMENT, amount=-1), 402),
        (GIFT._replace(kind=REFUND, cause=Cause(NOW, job="no-such")), 404),
    ):
        with pytest.raises(ClientError) as caught:
            await ledger.pay(payment._replace(key="k"))
        assert caught.value.status == expected, payment
    for team, amount, expected in (("nobody", 1, 404), ("local", 0, 400)):
        with pytest.raises(ClientError) as caught:
            await ledger.start_refill(team, amount, RefillPeriod.DAY, None, NOW)
        assert caught.value.status == expected
    assert look(path, "SELECT count(*) FROM credit_account") == look(path, "SELECT count(*) FROM payment") == [(0,)]
    assert look(path, MODE) == [(None, 1)]


async def test_a_team_is_job_based_from_its_first_credits_on(ledger: Ledger, path: Path) -> None:
    assert (await ledger.pay(GIFT))[2:] == (BudgetMode.JOB_BASED, True)
    ((mode, version),) = look(path, MODE)
    assert mode == "job_based"
    assert look(path, "SELECT version FROM accounts_version") == [(version,)], "other processes learn of it"
    assert (await ledger.pay(GIFT))[2:] == (BudgetMode.JOB_BASED, False)


async def test_a_mode_that_somebody_chose_stays(start: Start, path: Path) -> None:
    process = await start()
    for chosen in ("'consumption_usd'", "NULL"):
        await process.connection.execute(f"UPDATE team SET budget_mode = {chosen}")
        assert (await process.ledger.pay(GIFT)).has_set_mode is False
    await process.ledger.start_refill("local", 1, RefillPeriod.DAY, NOW + 1, NOW)
    assert look(path, "SELECT budget_mode FROM team") == [(None,)]


async def test_a_refill_that_is_set_up_counts_as_the_first_credits(ledger: Ledger) -> None:
    made = await ledger.start_refill("local", 50, RefillPeriod.WEEK, None, NOW)
    assert made == (Refill(50, RefillPeriod.WEEK, NOW), BudgetMode.JOB_BASED, True)
    assert (await ledger.pay(GIFT)).has_set_mode is False


SECOND: list[tuple[RefillPeriod, float | None, float]] = [
    # of the second request: period and start, and when the refill is due then
    (RefillPeriod.DAY, None, NOW + 86_400),
    (RefillPeriod.DAY, NOW - 5, NOW + 86_400),
    (RefillPeriod.DAY, NOW + 50, NOW + 50),
    (RefillPeriod.WEEK, None, NOW + 10),
    (RefillPeriod.WEEK, NOW - 5, NOW - 5),
]


@pytest.mark.parametrize(("period", "at", "expected"), SECOND)
async def test_to_set_up_the_same_refill_again_pays_nothing_again(
    ledger: Ledger, period: RefillPeriod, at: float | None, expected: float
) -> None:
    await ledger.start_refill("local", 50, RefillPeriod.DAY, NOW, NOW)
    assert await ledger.refill_due(NOW) == 1
    assert (await ledger.start_refill("local", 60, period, at, NOW + 10)).refill == Refill(60, period, expected)


async def test_a_refill_of_the_last_day_of_a_month_stays_one(ledger: Ledger) -> None:
    """Also when its amount is changed meanwhile."""
    due = []
    for amount, month, day in ((1, 1, 31), (2, 2, 28), (2, 3, 31), (2, 4, 30)):
        now = datetime(2026, month, day, 6, tzinfo=UTC).timestamp()
        if month <= 2:
            await ledger.start_refill("local", amount, RefillPeriod.MONTH, None, now)
        due.append(await ledger.refill("local") == Refill(amount, RefillPeriod.MONTH, now))
        assert await ledger.refill_due(now) == 1
    assert due == [True] * 4
    assert (await ledger.balance("local")).allocated == 1 + 3 * 2


async def test_what_moved_is_summed_by_kind_and_day(ledger: Ledger) -> None:
    day_s = 86_400
    await ledger.pay(GIFT._replace(amount=1000))
    for later in (0, 0, 1):
        call = await opened(ledger, new(team="local", hold_microcredits=100))
        ledger.close_call(call, done(90, closed_at=NOW + later * day_s))
    await ledger.pay(GIFT._replace(kind=REFUND, amount=7))
    await ledger.pay(GIFT._replace(kind=ADJUSTMENT, amount=-3))
    await ledger.pay(GIFT._replace(kind=ADJUSTMENT, amount=4))
    today, end = DAY * day_s, (DAY + 1) * day_s
    nothing: dict[str, int] = dict.fromkeys(TransactionKind, 0)
    expected = nothing | {ALLOCATION: 1000, CHARGE: -180, REFUND: 7, ADJUSTMENT: 1}
    assert await ledger.credit_sums("local", today, end) == expected
    assert await ledger.credit_sums("local", end, end + 1) == nothing | {CHARGE: -90}
    assert await ledger.credit_sums("local", 0, 2 * NOW) == expected | {CHARGE: -270}
    assert await ledger.credit_sums("blue", 0, 2 * NOW) == await ledger.credit_sums("local", 0, today) == nothing


async def test_a_payment_says_what_it_did(ledger: Ledger) -> None:
    paid = await ledger.pay(GIFT)
    (row,) = (await ledger.transactions("local")).rows
    assert paid == Paid(row, Balance(100, 100, 0, 0), BudgetMode.JOB_BASED, True)
    assert (row.kind, row.before, row.after, row.reason) == (ALLOCATION, 0, 100, "a gift")
