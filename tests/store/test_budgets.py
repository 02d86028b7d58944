"""Budgets in dollars, holds that grow, and what is told when something is spent. The arithmetic is in test_ledger_model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.chat import Budgets, Status
from proxy.errors import OverloadedError
from proxy.policy.credits import MICRO
from proxy.store.budgets import BudgetExceededError
from proxy.store.calls import OpenCall
from proxy.store.credits import Balance, Cause, CreditsSpentError
from proxy.store.jobs import JobState, NewJob
from proxy.store.ledger import Ledger
from tests.store.ledgers import NOW, Start, check_books, done, look, new, opened, record, starting

ROWS = "SELECT holder, period, reserved, spent FROM spending ORDER BY 1, 2"


@pytest_asyncio.fixture
async def start(path: Path) -> AsyncIterator[Start]:
    async with starting(path) as start:
        yield start
        check_books(path)


@pytest_asyncio.fixture
async def ledger(start: Start) -> Ledger:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    return ledger


async def spend(ledger: Ledger, held: int, price: int, **members: Any) -> None:
    call = await opened(ledger, new(hold_microusd=held, **members))
    ledger.close_call(call, done(price_microusd=price))
    await ledger.settled()


async def test_who_has_no_budget_has_no_rows_and_who_gets_one_has_spent_what_was_spent(
    ledger: Ledger, path: Path
) -> None:
    await spend(ledger, 9, 7, key="red")
    await spend(ledger, 9, 5)
    await spend(ledger, 9, 3, opened_at=NOW - 30 * 86_400, key="red")
    under_way = await opened(ledger, new(hold_microusd=2, key="red"))
    assert look(path, ROWS) == []
    limits = Budgets(day=30, total=40)
    last = await opened(ledger, new(hold_microusd=10), team_budgets=limits)
    assert look(path, ROWS) == [("team red", "day", 12, 12), ("team red", "total", 12, 15)]
    with pytest.raises(BudgetExceededError) as caught:
        await opened(ledger, new(key="red", hold_microusd=1), key_budgets=Budgets(total=12))
    assert (caught.value.status, caught.value.code, caught.value.kind) == (402, "budget_exceeded", "insufficient_quota")
    assert look(path, ROWS)[0] == ("key red", "total", 2, 10)
    for call in (under_way, last):
        ledger.close_call(call, done(price_microusd=None))
    await ledger.settled()
    assert look(path, ROWS) == [("key red", "total", 0, 10), ("team red", "day", 0, 12), ("team red", "total", 0, 15)]


@pytest.mark.parametrize(
    ("limits", "period", "limit", "spent"),
    [
        ((Budgets(day=4 * MICRO), Budgets()), "day", 4.0, 2.5),
        ((Budgets(4 * MICRO, 4 * MICRO), Budgets()), "month", 4.0, 3.0),
        ((Budgets(5 * MICRO, 6 * MICRO, 4 * MICRO), Budgets()), "total", 4.0, 3.5),
        ((Budgets(day=99 * MICRO), Budgets(day=2 * MICRO)), "day", 2.0, 2.5),
    ],
)
async def test_who_is_refused_hears_of_what(
    ledger: Ledger, path: Path, limits: tuple[Budgets, Budgets], period: str, limit: float, spent: float
) -> None:
    await spend(ledger, MICRO, MICRO // 2, opened_at=NOW - 32 * 86_400, key="key-1")
    await spend(ledger, MICRO, MICRO // 2, opened_at=NOW - 86_400, key="key-1")
    await spend(ledger, MICRO, 5 * MICRO // 2, key="key-1")
    await opened(ledger, new(hold_microusd=MICRO, key="key-1"))
    asked = new(hold_microcredits=50, hold_microusd=1_500_000, key="key-1")
    with pytest.raises(BudgetExceededError) as caught:
        await opened(ledger, asked, team_budgets=limits[0], key_budgets=limits[1])
    whose = "team" if limits[1] == Budgets() else "key"
    assert caught.value.extra == {
        "budget": {"of": whose, "period": period, "limit": limit, "spent": spent, "reserved": 1.0, "needed": 1.5}
    }
    for words in (f"of the {whose} is {limit:g} USD", f"{spent:g} USD are spent", "1 USD are reserved"):
        assert words in caught.value.message
    assert await ledger.balance("red") == Balance(100, 100, 0, 0)
    # What is refused for its credits has changed no budget.
    before = look(path, ROWS)
    with pytest.raises(CreditsSpentError):
        await opened(
            ledger, asked._replace(hold_microcredits=101), team_budgets=Budgets(99 * MICRO, 99 * MICRO, 99 * MICRO)
        )
    assert [row[2] for row in look(path, ROWS)][: len(before)] == [MICRO] * len(before)


async def test_the_last_dollar_is_spent_once(start: Start, path: Path) -> None:
    """200 calls at once, by two processes, of a team that may spend 100."""
    ledgers = [(await start()).ledger, (await start()).ledger]
    opening = [
        opened(ledgers[number % 2], new(f"call-{number}", hold_microusd=1), team_budgets=Budgets(month=100))
        for number in range(200)
    ]
    calls = await asyncio.gather(*opening, return_exceptions=True)
    assert sum(isinstance(call, BudgetExceededError) for call in calls) == 100
    for number, call in enumerate(calls):
        if isinstance(call, OpenCall):
            ledgers[number % 2].close_call(call, done(price_microusd=1))
    for ledger in ledgers:
        await ledger.settled()
    assert look(path, ROWS) == [("team red", "month", 0, 100)]


async def test_a_row_that_is_made_knows_the_calls_of_its_own_transaction(ledger: Ledger, path: Path) -> None:
    await asyncio.gather(
        *(opened(ledger, new(hold_microusd=5), team_budgets=budgets) for budgets in (Budgets(), Budgets(day=10)))
    )
    assert look(path, ROWS) == [("team red", "day", 10, 0)]


async def test_a_new_day_begins_at_nothing_and_takes_the_place_of_the_last(ledger: Ledger, path: Path) -> None:
    limits = Budgets(day=10)
    late = await opened(ledger, new(hold_microusd=10), team_budgets=limits)
    await opened(ledger, new(hold_microusd=4, opened_at=NOW + 86_400), team_budgets=limits)
    ledger.close_call(late, done(price_microusd=8))
    await ledger.settled()
    assert look(path, "SELECT start, reserved, spent FROM spending") == [((int(NOW) // 86_400 + 1) * 86_400, 4, 0)]
    # A clock that goes back finds what was spent then.
    with pytest.raises(BudgetExceededError):
        await opened(ledger, new(hold_microusd=3), team_budgets=limits)


async def test_without_the_disk_nobody_with_a_budget_is_let_in(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    process = await start()
    await process.connection.run(lambda connection: connection.execute("PRAGMA query_only=ON"))
    with caplog.at_level(logging.WARNING):
        with pytest.raises(OverloadedError):
            await opened(process.ledger, new(hold_microusd=1), key_budgets=Budgets(day=5))
        free = await opened(process.ledger, new(hold_microusd=1))
        with pytest.raises(OverloadedError):
            await process.ledger.extend_call(free, 0, 1)
    await process.connection.run(lambda connection: connection.execute("PRAGMA query_only=OFF"))


# ---------------------------------------------------------------------- holds that grow


async def test_a_hold_grows_as_far_as_there_is_credit_and_budget(ledger: Ledger, path: Path) -> None:
    call = await opened(ledger, new(hold_microcredits=40, hold_microusd=4), team_budgets=Budgets(day=10))
    await asyncio.gather(
        *(ledger.extend_call(call, *more, team_budgets=Budgets(day=10)) for more in ((10, 1), (20, 2)))
    )
    assert (call.new.hold_microcredits, call.new.hold_microusd) == (70, 7)
    for more, refusal in (((31, 1), CreditsSpentError), ((1, 4), BudgetExceededError)):
        with pytest.raises(refusal):
            await ledger.extend_call(call, *more, team_budgets=Budgets(day=10))
    assert look(path, "SELECT held_microcredits, held_microusd FROM open_call") == [(70, 7)]
    assert look(path, ROWS) == [("team red", "day", 7, 0)]
    assert await ledger.balance("red") == Balance(100, 30, 70, 0)
    ledger.close_call(call, done(60, price_microusd=6))
    await ledger.extend_call(call, 30, 3)
    assert await ledger.balance("red") == Balance(100, 40, 0, 60)
    assert look(path, ROWS) == [("team red", "day", 0, 6)]


async def test_a_hold_that_grew_is_released_when_its_process_dies(start: Start, path: Path) -> None:
    dying, living = await start(), await start()
    await living.ledger.allocate("red", 100, Cause(NOW))
    call = await opened(dying.ledger, new(hold_microcredits=40, hold_microusd=4), team_budgets=Budgets(day=10))
    await dying.ledger.extend_call(call, 30, 3)
    await dying.crash()
    assert await living.ledger.recover(NOW) == 1
    assert await living.ledger.balance("red") == Balance(100, 100, 0, 0)
    assert look(path, ROWS) == [("team red", "day", 0, 0)]


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_hold_that_grows_while_its_call_is_closed_or_handed_over_is_settled(
    ledger: Ledger, path: Path, leaves: bool
) -> None:
    call = await opened(ledger, new(hold_microcredits=10, hold_microusd=1), team_budgets=Budgets(day=10))
    growing = asyncio.create_task(ledger.extend_call(call, 20, 2))
    await asyncio.sleep(0)
    heir = OpenCall(new("heir", key="key-1"))
    ledger.hand_over(call, heir)
    if leaves:
        growing.cancel()
    for closing in (call, heir):
        ledger.close_call(closing, done(25 if closing is heir else 0, price_microusd=0))
    await asyncio.wait((growing,))
    assert await ledger.balance("red") == Balance(100, 75, 0, 25)
    assert (heir.new.hold_microcredits, heir.new.hold_microusd) == ((10, 1) if leaves else (30, 3))
    assert look(path, ROWS) == [("team red", "day", 0, 0)]


async def test_a_call_that_is_over_has_nothing_to_hand_over(ledger: Ledger) -> None:
    call = await opened(ledger, new(hold_microcredits=10))
    ledger.close_call(call, done(5))
    heir = OpenCall(new("heir", hold_microcredits=3, job="no-such-job"))
    ledger.hand_over(call, heir)
    ledger.close_call(heir, done(1))
    assert await ledger.balance("red") == Balance(100, 94, 0, 6)
    assert {(row.id, row.job) for row in (await ledger.calls()).rows} == {("call-1", None), ("heir", None)}


async def test_who_has_spent_the_credits_hears_what_there_is(ledger: Ledger) -> None:
    await ledger.allocate("blue", 2_500_000, Cause(NOW))
    await opened(ledger, new(team="blue", hold_microcredits=MICRO))
    with pytest.raises(CreditsSpentError) as caught:
        await opened(ledger, new(team="blue", hold_microcredits=1_500_001))
    assert caught.value.envelope()["error"] == {
        "credits": {"remaining": 1.5, "reserved": 1.0, "allocated": 2.5, "needed": 1.500001},
        "message": "The team has 1.5 credits left of 2.5, 1 are reserved, and 1.500001 are needed.",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_credits",
    }


# ---------------------------------------------------------------------- calls that end their jobs


@pytest.mark.parametrize("is_opened", [True, False])
@pytest.mark.parametrize(
    ("state", "rounds_up", "charged"),
    [(JobState.COMPLETED, False, 20), (JobState.COMPLETED, True, MICRO), (JobState.FAILED, True, 0)],
)
async def test_a_call_ends_its_job(
    ledger: Ledger, is_opened: bool, state: JobState, rounds_up: bool, charged: int
) -> None:
    await ledger.allocate("red", 3 * MICRO, Cause(NOW))
    await ledger.create_job(NewJob("job-1", "red", NOW))
    asked, end = new(job="job-1", hold_microcredits=50), done(20, error="broke" if state is JobState.FAILED else None)
    if is_opened:
        ledger.close_call(await opened(ledger, asked), end, job_state=state, rounds_up=rounds_up)
    else:
        record(ledger, asked, end, job_state=state, rounds_up=rounds_up)
    job = await ledger.job("red", "job-1")
    assert (job.state, job.charged_microcredits, job.error, job.sums.calls) == (state, charged, end.error, 1)
    assert (job.started_at, job.ended_at) == (NOW, end.closed_at)
    assert (await ledger.balance("red")).charged == charged


async def test_a_call_whose_job_has_ended_meanwhile_leaves_it_so(ledger: Ledger) -> None:
    await ledger.create_job(NewJob("job-1", "red", NOW))
    call = await opened(ledger, new(job="job-1", hold_microcredits=50))
    cancelled = await ledger.end_job("red", "job-1", JobState.CANCELLED, NOW)
    ledger.close_call(call, done(20), job_state=JobState.COMPLETED)
    record(ledger, new(job="no-such-job"), done(status=Status.REJECTED), job_state=JobState.FAILED)
    job = await ledger.job("red", "job-1")
    assert (job.state, job.ended_at, job.sums.calls) == (JobState.CANCELLED, cancelled.ended_at, 1)
    assert await ledger.balance("red") == Balance(100, 100, 0, 0)
