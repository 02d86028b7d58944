"""Jobs: what they cost, and that an end is an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.chat import Status
from proxy.errors import ClientError
from proxy.policy.credits import MICRO
from proxy.store.credits import Balance, Cause, CreditsSpentError
from proxy.store.jobs import JobState, NewJob
from proxy.store.ledger import Ledger
from tests.store.ledgers import NOW, check_books, done, new, opened, record, starting

COMPLETED, FAILED, CANCELLED = JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED


@pytest_asyncio.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    path = tmp_path / "headwater.db"
    async with starting(path) as start:
        ledger = (await start()).ledger
        await ledger.allocate("red", 1_000, Cause(NOW))
        yield ledger
        await ledger.settled()
        check_books(path)


async def spend(ledger: Ledger, job: str, held: int, worth: int, status: Status = Status.OK) -> None:
    call = await opened(ledger, new(job=job, hold_microcredits=held))
    ledger.close_call(call, done(worth, status=status, prompt_tokens=5, price_microusd=worth or None))
    await ledger.settled()


async def test_a_job_holds_what_its_calls_were_worth_until_it_completes(ledger: Ledger) -> None:
    created = await ledger.create_job(NewJob("job-1", "red", NOW, "summary", "key-1", "ann", {"a": [1]}, 100))
    assert (created.state, created.metadata, created.key, created.user, created.type) == (
        JobState.PENDING,
        {"a": [1]},
        "key-1",
        "ann",
        "summary",
    )
    await spend(ledger, "job-1", 50, 30)
    await spend(ledger, "job-1", 50, 0, Status.UPSTREAM_ERROR)
    job = await ledger.job("red", "job-1")
    assert (job.state, job.held_microcredits, job.started_at) == (JobState.IN_PROGRESS, 130, NOW)
    assert (job.sums.calls, job.sums.failed_calls, job.sums.unpriced_calls, job.sums.prompt_tokens) == (2, 1, 1, 10)
    assert await ledger.balance("red") == Balance(1_000, 870, 130, 0)
    ended = await ledger.end_job("red", "job-1", COMPLETED, NOW + 5, metadata={"b": 2})
    assert (ended.state, ended.held_microcredits, ended.charged_microcredits, ended.ended_at) == (
        COMPLETED,
        0,
        130,
        NOW + 5,
    )
    assert ended.metadata == {"a": [1], "b": 2}
    assert await ledger.end_job("red", "job-1", COMPLETED, NOW + 9, metadata={"b": 3}, error="no") == ended
    assert await ledger.balance("red") == Balance(1_000, 870, 0, 130)
    assert [row.id for row in (await ledger.calls(team="red", job="job-1")).rows] == ["call-1", "call-1"]
    charge = (await ledger.transactions("red")).rows[0]
    assert (charge.kind, charge.amount, charge.before, charge.after, charge.job) == (
        "charge",
        -130,
        1_000,
        870,
        "job-1",
    )


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
async def test_a_job_that_does_not_complete_costs_nothing_and_is_over(ledger: Ledger, state: JobState) -> None:
    await ledger.create_job(NewJob("job-1", "red", NOW, hold_microcredits=100))
    await spend(ledger, "job-1", 50, 30)
    late = await opened(ledger, new("late", job="job-1", hold_microcredits=50))
    ended = await ledger.end_job("red", "job-1", state, NOW, error="broke")
    assert (ended.state, ended.error, ended.charged_microcredits) == (state, "broke", 0)
    ledger.close_call(late, done(20))
    assert await ledger.balance("red") == Balance(1_000, 1_000, 0, 0)
    for attempt in (
        ledger.end_job("red", "job-1", COMPLETED, NOW),
        opened(ledger, new(job="job-1", hold_microcredits=5)),
    ):
        with pytest.raises(ClientError) as caught:
            await attempt
        assert caught.value.status == 409
    assert await ledger.balance("red") == Balance(1_000, 1_000, 0, 0)


async def test_a_call_that_ends_after_its_completed_job_is_charged_by_itself(ledger: Ledger) -> None:
    await ledger.create_job(NewJob("job-1", "red", NOW))
    late = await opened(ledger, new("late", job="job-1", hold_microcredits=50))
    await ledger.end_job("red", "job-1", COMPLETED, NOW)
    ledger.close_call(late, done(20))
    assert (await ledger.job("red", "job-1")).charged_microcredits == 20
    assert await ledger.balance("red") == Balance(1_000, 980, 0, 20)


@pytest.mark.parametrize(
    ("worth", "rounds_up", "charged", "overdraft"),
    [
        (30, False, 30, 0),
        (30, True, MICRO, 0),
        (MICRO, True, MICRO, 0),
        (MICRO + 1, True, 2 * MICRO, 0),
        (0, True, 0, 0),
        (2 * MICRO + 1, True, 2 * MICRO + 500_000, 500_000),
    ],
)
async def test_what_a_job_costs_is_rounded_once(
    ledger: Ledger, worth: int, rounds_up: bool, charged: int, overdraft: int
) -> None:
    await ledger.adjust("red", 2_500_000 - 1_000, Cause(NOW))
    await ledger.create_job(NewJob("job-1", "red", NOW))
    await spend(ledger, "job-1", worth, worth)
    ended = await ledger.end_job("red", "job-1", COMPLETED, NOW, rounds_up=rounds_up)
    assert (ended.charged_microcredits, ended.overdraft_microcredits) == (charged, overdraft)


async def test_a_job_is_unknown_to_other_teams_and_its_id_is_taken(ledger: Ledger) -> None:
    await ledger.create_job(NewJob("job-1", "red", NOW))
    await ledger.allocate("blue", 10, Cause(NOW))
    for attempt in (
        ledger.job("blue", "job-1"),
        ledger.end_job("blue", "job-1", COMPLETED, NOW),
        ledger.add_job_metadata("blue", "job-1", {"a": 1}),
        opened(ledger, new(team="blue", job="job-1", hold_microcredits=1)),
        ledger.job("red", "job-2"),
        ledger.job("red", "\ud800"),
    ):
        with pytest.raises(ClientError) as caught:
            await attempt
        assert (caught.value.status, caught.value.code) == (404, "job_not_found")
    record(ledger, new(team="blue", job="job-1"), done(status=Status.REJECTED))
    assert (await ledger.job("red", "job-1")).sums.calls == 0
    with pytest.raises(ClientError) as caught:
        await ledger.create_job(NewJob("job-1", "blue", NOW, hold_microcredits=10))
    assert caught.value.status == 409
    with pytest.raises(CreditsSpentError):
        await ledger.create_job(NewJob("job-2", "blue", NOW, hold_microcredits=11))
    assert await ledger.balance("blue") == Balance(10, 10, 0, 0)


async def test_metadata_grows_and_a_list_has_pages_and_a_total(ledger: Ledger) -> None:
    for number in range(5):
        await ledger.create_job(NewJob(f"job-{number}", "red", NOW))
    await ledger.create_job(NewJob("other", "blue", NOW))
    assert (await ledger.add_job_metadata("red", "job-0", {"a": 1, "b": 1})).metadata == {"a": 1, "b": 1}
    assert (await ledger.add_job_metadata("red", "job-0", {"b": "\ud800"})).metadata == {"a": 1, "b": "\ud800"}
    seen, before = [], None
    while rows := (page := await ledger.jobs("red", before, 2)).rows:
        assert page.total == 5
        seen += [row.id for row in rows]
        before = rows[-1].number
    assert seen == ["job-4", "job-3", "job-2", "job-1", "job-0"]


async def test_jobs_that_were_left_are_ended(ledger: Ledger) -> None:
    for job_id, created_at in (("old", NOW - 100), ("busy", NOW - 100), ("new", NOW)):
        await ledger.create_job(NewJob(job_id, "red", created_at, hold_microcredits=10))
    await opened(ledger, new(job="busy"))
    assert await ledger.end_abandoned_jobs(NOW - 50, CANCELLED, NOW) == 1
    states = {job.id: job.state for job in (await ledger.jobs("red")).rows}
    assert states == {"old": CANCELLED, "busy": JobState.IN_PROGRESS, "new": JobState.PENDING}
    assert await ledger.balance("red") == Balance(1_000, 980, 20, 0)


async def test_jobs_are_counted_by_their_states_and_charges_added_up_by_day(ledger: Ledger) -> None:
    for number, created_at in enumerate((NOW - 86_400, NOW, NOW, NOW, NOW)):
        await ledger.create_job(NewJob(f"job-{number}", "red", created_at))
    await ledger.create_job(NewJob("other", "blue", NOW))
    for number in (0, 1, 2):
        await spend(ledger, f"job-{number}", 9, 5)
        await ledger.end_job("red", f"job-{number}", FAILED if number == 2 else COMPLETED, NOW)
    await spend(ledger, "job-3", 9, 5)
    states = {"pending": 1, "in_progress": 1, "completed": 1, "failed": 1, "cancelled": 0}
    assert await ledger.job_counts("red", NOW, NOW + 1) == states
    assert await ledger.job_counts("red", NOW - 86_400, NOW + 1) == {**states, "completed": 2}
    assert await ledger.job_counts("red", NOW + 86_400, NOW + 86_401) == dict.fromkeys(states, 0)
    sums = await ledger.credit_sums("red", 0, NOW + 1)
    assert sums == {"allocation": 1_000, "refill": 0, "adjustment": 0, "charge": -10, "refund": 0}
    assert (await ledger.credit_sums("red", 0, NOW - 86_400))["charge"] == 0


async def test_what_is_nested_too_deep_stops_nothing_else(ledger: Ledger) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"a": deep}
    made = await asyncio.gather(
        ledger.create_job(NewJob("job-1", "red", NOW, metadata=deep)),
        ledger.create_job(NewJob("job-2", "red", NOW)),
        return_exceptions=True,
    )
    assert [isinstance(job, RecursionError) for job in made] == [True, False]
    assert (await ledger.jobs("red")).total == 1
