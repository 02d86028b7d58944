"""Calls in the ledger: on disk before they are sent, one row each, and closed once whatever happens."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.chat import Mode, Status
from proxy.errors import ClientError, OverloadedError
from proxy.store import db, migrations
from proxy.store.backup import backup
from proxy.store.calls import OpenCall
from proxy.store.credits import NOTHING, Balance, Cause, CreditsSpentError
from proxy.store.jobs import JobState, NewJob
from proxy.store.ledger import Ledger
from proxy.store.processes import Presence
from proxy.tasks import Tasks
from tests.store.ledgers import NOW, Start, check_books, done, look, new, noted, opened, record, starting
from tests.waiting import until


@pytest_asyncio.fixture
async def start(path: Path) -> AsyncIterator[Start]:
    async with starting(path) as start:
        yield start


async def test_a_call_is_on_disk_before_it_is_sent_and_finished_once(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 1_000, Cause(NOW))
    asked = new(key="key-1", user="ann", purpose="verify", hold_microcredits=300)
    call = await opened(ledger, asked)
    assert look(path, "SELECT id, held_microcredits FROM open_call") == [("call-1", 300)]
    assert await ledger.balance("red") == Balance(1_000, 700, 300, 0)
    assert await ledger.calls_under_way() == await ledger.calls_under_way("red") == [asked]
    assert await ledger.calls_under_way("blue") == []

    end = done(
        120,
        target="openai/gpt-4o",
        answered_model="gpt-4o-2024",
        attempts=2,
        prompt_tokens=10,
        completion_tokens=20,
        cached_tokens=3,
        reasoning_tokens=4,
        is_estimated=True,
        cost_microusd=100,
        price_microusd=120,
        ttft_ms=12.5,
        cache_entry=7,
        finish_reason="stop",
    )
    ledger.close_call(call, end)
    ledger.close_call(call, end._replace(status=Status.CANCELLED, charge_microcredits=9))
    (row,) = (await ledger.calls()).rows
    members = row._asdict()
    for word, given in {**asked._asdict(), **end._asdict()}.items():
        assert members.get(word, given) == given, word
    assert (row.settled_microcredits, row.overdraft_microcredits) == (120, 0)
    assert await ledger.balance("red") == Balance(1_000, 880, 0, 120)
    assert await ledger.calls_under_way() == []
    check_books(path)


async def test_what_is_closed_comes_to_disk_by_itself(start: Start, path: Path) -> None:
    process = await start()
    process.ledger.close_call(await opened(process.ledger, new()), done())
    while not await process.reader.execute_fetchall("SELECT id FROM call"):
        pass
    assert look(path, "SELECT id FROM call") == [("call-1",)]


async def test_a_call_that_is_refused_has_a_row_and_costs_nothing(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 1_000, Cause(NOW))
    with pytest.raises(CreditsSpentError) as caught:
        await opened(ledger, new(hold_microcredits=1_001))
    assert (caught.value.status, caught.value.balance.remaining) == (402, 1_000)
    with pytest.raises(CreditsSpentError) as caught:
        await opened(ledger, new(team="blue", hold_microcredits=1))
    assert caught.value.balance == NOTHING
    assert look(path, "SELECT team FROM credit_account") == [("red",)]
    with pytest.raises(ClientError) as unknown:
        await opened(ledger, new(job="no-such-job"))
    assert unknown.value.status == 404
    rejected = done(status=Status.REJECTED, mode=Mode.NONE, http_status=402)
    record(ledger, new(hold_microcredits=1_001, job="no-such-job"), rejected)
    (row,) = (await ledger.calls()).rows
    assert (row.status, row.job, row.settled_microcredits) == (Status.REJECTED, None, 0)
    assert await ledger.balance("red") == Balance(1_000, 1_000, 0, 0)
    check_books(path)


async def test_the_last_credit_is_spent_once(start: Start, path: Path) -> None:
    """200 calls at once, by two processes, with credit for 100."""
    ledgers = [(await start()).ledger, (await start()).ledger]
    await ledgers[0].allocate("red", 100, Cause(NOW))
    opening = [opened(ledgers[number % 2], new(f"call-{number}", hold_microcredits=1)) for number in range(200)]
    calls = await asyncio.gather(*opening, return_exceptions=True)
    assert sum(isinstance(call, CreditsSpentError) for call in calls) == 100
    for number, call in enumerate(calls):
        if not isinstance(call, BaseException):
            ledgers[number % 2].close_call(call, done(1))
    for ledger in ledgers:
        await ledger.settled()
    assert await ledgers[1].balance("red") == Balance(100, 0, 0, 100)
    check_books(path)


async def test_what_a_call_is_worth_beyond_what_it_holds_is_taken_as_far_as_it_is_there(
    start: Start, path: Path
) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    for held, worth in ((30, 50), (30, 60)):
        ledger.close_call(await opened(ledger, new(hold_microcredits=held)), done(worth))
    rows = (await ledger.calls()).rows
    assert [(row.settled_microcredits, row.overdraft_microcredits) for row in rows] == [(50, 10), (50, 0)]
    assert await ledger.balance("red") == Balance(100, 0, 0, 100)
    check_books(path)


async def test_a_call_whose_client_leaves_while_it_is_opened_is_closed_once(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    leaving = [OpenCall(new(f"call-{number}", hold_microcredits=held)) for number, held in enumerate((5, 5, 500))]
    # Before it is written, between the commit and hearing of it (both are told in one turn, and this test first), or refused.
    for call in leaving:
        opening = asyncio.create_task(ledger.open_call(call))
        await (asyncio.sleep(0) if call is leaving[0] else ledger.settled())
        opening.cancel()
        with pytest.raises((asyncio.CancelledError, CreditsSpentError)):
            await opening
        ledger.close_call(call, done(status=Status.CANCELLED))
        ledger.close_call(call, done(status=Status.OK))
    await ledger.settled()
    rows = (await ledger.calls()).rows
    assert [(row.id, row.status) for row in reversed(rows)] == [
        (f"call-{number}", Status.CANCELLED) for number in range(3)
    ]
    assert await ledger.balance("red") == Balance(100, 100, 0, 0)
    check_books(path)


async def test_calls_of_a_dead_process_are_interrupted_and_those_of_a_living_one_left_alone(
    start: Start, path: Path
) -> None:
    dying, living = await start(), await start()
    await living.ledger.allocate("red", 100, Cause(NOW))
    await living.ledger.create_job(NewJob("job-1", "red", NOW))
    await opened(dying.ledger, new("lost", hold_microcredits=10))
    await opened(dying.ledger, new("lost, of a job", hold_microcredits=20, job="job-1"))
    kept = await opened(living.ledger, new("kept", hold_microcredits=30))
    assert await living.ledger.recover(NOW + 9) == 0
    await dying.crash()
    third = await start()
    lost = (await third.ledger.calls()).rows
    assert {(row.id, row.status, row.duration_ms) for row in lost} == {
        ("lost", Status.INTERRUPTED, 0),
        ("lost, of a job", Status.INTERRUPTED, 0),
    }
    assert await third.ledger.balance("red") == Balance(100, 70, 30, 0)
    living.ledger.close_call(kept, done(25))
    assert await living.ledger.balance("red") == Balance(100, 75, 0, 25)
    assert await third.ledger.recover(NOW + 9) == 0
    assert len(look(path, "SELECT number FROM process")) == 2
    check_books(path)


async def test_jobs_for_one_call_of_a_dead_process_fail_and_others_stay_open(start: Start, path: Path) -> None:
    dying, living = await start(), await start()
    await living.ledger.allocate("red", 100, Cause(NOW))
    for name in ("asked", "not asked yet"):
        await dying.ledger.create_job(NewJob(name, "red", NOW, hold_microcredits=10), is_for_one_call=True)
    await opened(dying.ledger, new("lost", hold_microcredits=20, job="asked"))
    await living.ledger.create_job(NewJob("of the living", "red", NOW, hold_microcredits=10), is_for_one_call=True)
    await dying.ledger.create_job(NewJob("for more", "red", NOW, hold_microcredits=10))
    await dying.crash()
    assert await living.ledger.recover(NOW + 9) == 1
    fates = {job.id: (job.state, job.error) for job in (await living.ledger.jobs("red")).rows}
    failed, is_open = (JobState.FAILED, "interrupted"), (JobState.PENDING, None)
    assert fates == {"asked": failed, "not asked yet": failed, "of the living": is_open, "for more": is_open}
    assert await living.ledger.balance("red") == Balance(100, 80, 20, 0)
    check_books(path)


async def test_a_call_that_was_closed_for_its_process_is_not_settled_twice(
    start: Start, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has deleted the file by which the others see that it lives."""
    seemingly_dead, other = await start(), await start()
    await other.ledger.allocate("red", 100, Cause(NOW))
    call = await opened(seemingly_dead.ledger, new("taken", hold_microcredits=10))
    next_call = await opened(seemingly_dead.ledger, new("next"))
    seemingly_dead.presence.leave()
    assert await other.ledger.recover(NOW) == 2
    later = await opened(seemingly_dead.ledger, new("later", hold_microcredits=10))
    for late in (call, later, next_call):
        seemingly_dead.ledger.close_call(late, done(5))
    await seemingly_dead.ledger.settled()
    statuses = {row.id: row.status for row in (await other.ledger.calls()).rows}
    assert statuses == {"taken": Status.INTERRUPTED, "next": Status.INTERRUPTED, "later": Status.OK}
    assert await other.ledger.balance("red") == Balance(100, 95, 0, 5)
    assert caplog.messages == ["a change of the ledger is lost: a call was closed by another process"] * 2
    assert (seemingly_dead.ledger.waiting, seemingly_dead.ledger.lost) == (0, 2)
    check_books(path)


async def test_a_database_that_takes_nothing_stops_only_calls_that_must_be_paid_for(
    start: Start, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start()
    ledger = process.ledger
    await ledger.allocate("red", 100, Cause(NOW))
    before = await opened(ledger, new("before", hold_microcredits=10))
    await process.connection.run(lambda connection: connection.execute("PRAGMA busy_timeout=0"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with caplog.at_level(logging.WARNING):
            with pytest.raises(OverloadedError) as caught:
                await opened(ledger, new("paid", hold_microcredits=10))
            free = await opened(ledger, new("free"))
            ledger.close_call(free, done(attempts=1))
            ledger.close_call(before, done(7))
            await ledger.settled()
            with pytest.raises(OverloadedError):
                await ledger.allocate("red", 1, Cause(NOW))
        assert caught.value.status == 503
        was_failing = ledger.is_failing
        assert (ledger.waiting, ledger.lost) == (2, 0)
        assert len(caplog.messages) == 1
        assert (await ledger.calls()).rows == []
        # Nor does one of those wait for the lock again: it is noted, or goes on without.
        await process.connection.run(lambda connection: connection.execute("PRAGMA busy_timeout=60000"))
        async with asyncio.timeout(10):
            ledger.close_call(noted(ledger, new("noted")), done())
            ledger.close_call(await opened(ledger, new("unnoted")), done())
        other.execute("ROLLBACK")
    await ledger.settled()
    assert {row.id for row in (await ledger.calls()).rows} == {"before", "free", "noted", "unnoted"}
    assert (was_failing, ledger.is_failing) == (True, False)
    assert await ledger.balance("red") == Balance(100, 93, 0, 7)
    check_books(path)


async def test_what_cannot_be_written_for_what_it_says_stops_nothing_else(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    too_long = 2**70
    results = await asyncio.gather(
        opened(ledger, new("one", hold_microcredits=1)),
        opened(ledger, new("bad", opened_at=None)),
        opened(ledger, new("two", hold_microcredits=2)),
        return_exceptions=True,
    )
    assert [isinstance(result, BaseException) for result in results] == [False, False, False]
    record(
        ledger, new("odd \ud800", user="\udfff"), done(error="\ud800", prompt_tokens=too_long, price_microusd=too_long)
    )
    record(ledger, new("odder"), done(prompt_tokens=-5))
    rows = {row.id: row for row in (await ledger.calls()).rows}
    assert (rows["odd ?"].error, rows["odd ?"].prompt_tokens, rows["odder"].prompt_tokens) == ("?", 2**40, 0)
    assert await ledger.balance("red") == Balance(100, 97, 3, 0)
    check_books(path)


_VICTIM = """
import asyncio, sys
from pathlib import Path
from proxy.store.credits import Cause
from tests.store.ledgers import NOW, done, new, opened, starting
from tests.waiting import until

async def call(ledger, number):
    while True:
        call = await opened(ledger, new(f"call-{number}", hold_microcredits=3, key=f"key-{number % 3}"))
        ledger.close_call(call, done(number % 5, prompt_tokens=number))
        await ledger.settled()
        print(number, flush=True)

async def main():
    async with starting(Path(sys.argv[1])) as start:
        ledger = (await start()).ledger
        await asyncio.gather(*(call(ledger, number) for number in range(10)))

asyncio.run(main())
"""


async def test_a_kill_loses_nothing_that_was_settled(start: Start, path: Path) -> None:
    living = await start()
    await living.ledger.allocate("red", 10**9, Cause(NOW))
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _VICTIM, str(path), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert victim.stdout is not None
    told = [await victim.stdout.readline() for _ in range(200)]
    os.kill(victim.pid, signal.SIGKILL)
    told += (await victim.stdout.read()).splitlines()
    await victim.wait()
    interrupted = await living.ledger.recover(NOW + 9)
    rows = look(path, "SELECT status, count(*) FROM call GROUP BY status")
    counts = dict(rows)
    assert counts.pop("interrupted", 0) == interrupted <= 10
    assert counts["ok"] >= len([line for line in told if line.strip()])
    assert look(path, "SELECT * FROM open_call") == []
    assert (await living.ledger.balance("red")).reserved == 0
    check_books(path)


def size(path: Path) -> int:
    return path.stat().st_size


async def test_the_log_is_taken_into_the_file_now_and_then(start: Start, path: Path) -> None:
    """By another connection than the one that commits, for it waits for the disk."""
    process = await start()
    before = size(path)
    for number in range(400):
        await opened(process.ledger, new(f"call-{number}"))
    assert await process.tasks.wait(20)
    assert size(path) > before


async def test_a_ledger_in_memory_leaves_nothing_behind(path: Path) -> None:
    connection, tasks = await db.connect(db.NOWHERE, migrations.MAIN), Tasks()
    ledger = await Ledger.open(connection, connection, Presence(db.NOWHERE), tasks, NOW)
    ledger.close_call(await opened(ledger, new()), done())
    assert [row.id for row in (await ledger.calls()).rows] == ["call-1"]
    await ledger.close()
    await connection.close()
    assert list(path.parent.iterdir()) == []


async def test_a_backup_that_is_no_longer_wanted_leaves_nothing(tmp_path: Path) -> None:
    source, copy = tmp_path / "headwater.db", tmp_path / "copy.db"

    def parts() -> list[Path]:
        return list(tmp_path.glob("*.part"))

    async def has_begun() -> bool:
        return bool(parts())

    with closing(sqlite3.connect(source, isolation_level=None)) as other:
        other.executescript("CREATE TABLE kept (x); BEGIN EXCLUSIVE")
        copying = asyncio.ensure_future(backup(source, copy))
        await until(has_begun, bool)
        copying.cancel()
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
        with pytest.raises(asyncio.CancelledError):
            await copying
    assert parts() == []
    assert not copy.exists()


async def test_a_backup_is_whole_while_others_write(start: Start, path: Path, tmp_path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    call = await opened(ledger, new(hold_microcredits=5))
    copy = tmp_path / "copy.db"
    copy.write_bytes(b"an older backup")
    await backup(path, copy)
    ledger.close_call(call, done(5))
    await ledger.settled()
    assert look(copy, "SELECT remaining, reserved FROM credit_account") == [(95, 5)]
    async with starting(copy) as start_there:
        there = (await start_there()).ledger
        assert await there.balance("red") == Balance(100, 100, 0, 0)
    with pytest.raises(sqlite3.Error):
        await backup(tmp_path / "missing.db", copy)
    assert look(copy, "SELECT remaining FROM credit_account") == [(100,)]


async def test_who_is_refused_has_nothing_to_hand_over(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.allocate("red", 100, Cause(NOW))
    giver, heir = OpenCall(new("giver", hold_microcredits=200)), OpenCall(new("heir"))
    opening = asyncio.ensure_future(ledger.open_call(giver))
    await asyncio.sleep(0)
    ledger.hand_over(giver, heir)
    with pytest.raises(CreditsSpentError):
        await opening
    for call in (giver, heir):
        ledger.close_call(call, done(status=Status.REJECTED))
    assert await ids(ledger) == [("giver", Status.REJECTED), ("heir", Status.REJECTED)]
    assert (ledger.lost, await ledger.balance("red")) == (0, Balance(100, 100, 0, 0))
    check_books(path)


# ---------------------------------------------------------------------- calls that hold nothing


def files(path: Path) -> list[Path]:
    """Those of processes."""
    return sorted(path.parent.glob(f"{path.name}-process-*"))


def descriptor_of(path: Path) -> int:
    [number] = [int(link.name) for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)]
    return number


async def ids(ledger: Ledger) -> list[tuple[str, Status]]:
    return sorted((row.id, row.status) for row in (await ledger.calls()).rows)


async def test_a_noted_call_that_a_kill_leaves_is_interrupted(start: Start, path: Path) -> None:
    """It is seen by others meanwhile, and needs no transaction."""
    one, two = await start(), await start()
    asked = [new(call_id, opened_at=NOW + place) for place, call_id in enumerate(("over", "left", "late"))]
    over, *_ = [noted(one.ledger, call) for call in asked]
    assert look(path, "SELECT count(*) FROM open_call") == [(0,)]
    assert await two.ledger.calls_under_way("red") == asked
    assert await two.ledger.calls_under_way("blue") == []
    one.ledger.close_call(over, done())
    await one.ledger.settled()
    assert await two.ledger.calls_under_way() == asked[1:]
    assert await two.ledger.recover(NOW + 5) == 0
    await one.crash()
    assert await two.ledger.recover(NOW + 5) == 2
    interrupted = [("late", Status.INTERRUPTED), ("left", Status.INTERRUPTED)]
    assert await ids(two.ledger) == [*interrupted, ("over", Status.OK)]
    assert await two.ledger.calls_under_way() == []
    assert await two.ledger.recover(NOW + 6) == 0
    assert len(files(path)) == 1
    await two.stop()
    assert files(path) == []
    check_books(path)


async def test_one_that_came_by_a_link_is_seen_to_live(start: Start, path: Path, tmp_path: Path) -> None:
    """SQLite follows it too: https://www.sqlite.org/howtocorrupt.html, "Multiple links to the same file"."""
    one, link = await start(), tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    await opened(one.ledger, new("opened"))
    noted(one.ledger, new("noted"))
    async with starting(link) as start_there:
        under_way = await (await start_there()).ledger.calls_under_way()
        assert sorted(call.id for call in under_way) == ["noted", "opened"]


async def test_a_kill_before_the_row_of_a_noted_call_leaves_its_note(start: Start) -> None:
    one = await start()
    one.ledger.close_call(noted(one.ledger, new()), done())
    await one.crash()
    assert await ids((await start()).ledger) == [("call-1", Status.INTERRUPTED)]


async def test_a_kill_between_a_row_and_its_note_leaves_one_row(start: Start, path: Path) -> None:
    one, two = await start(), await start()
    calls = [noted(one.ledger, new(call_id)) for call_id in ("first", "second", "third")]
    [its] = [file for file in files(path) if b"first" in file.read_bytes()]
    one.ledger.close_call(calls[0], done())
    await one.ledger.settled()
    before = its.read_bytes()
    one.ledger.close_call(calls[1], done())
    await one.ledger.settled()
    await one.crash()
    its.write_bytes(before)
    assert [call.id for call in await two.ledger.calls_under_way()] == ["third"]
    assert await two.ledger.recover(NOW + 5) == 1
    assert await ids(two.ledger) == [("first", Status.OK), ("second", Status.OK), ("third", Status.INTERRUPTED)]


async def test_a_kill_of_who_looks_after_the_dead_makes_no_second_row(start: Start, path: Path) -> None:
    """After their calls were closed, and before their file was taken away."""
    one, two = await start(), await start()
    over, _ = noted(one.ledger, new("over")), noted(one.ledger, new("left"))
    [its] = [file for file in files(path) if file.stat().st_size]
    before = its.read_bytes()
    one.ledger.close_call(over, done())
    await one.ledger.settled()
    await one.crash()
    its.write_bytes(before)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE kept AS SELECT * FROM process WHERE FALSE")
        row = "old.number, old.token, old.started_at, old.closed"
        other.execute(f"CREATE TRIGGER keep BEFORE DELETE ON process BEGIN INSERT INTO kept VALUES ({row}); END")
        assert await two.ledger.recover(NOW) == 1
        other.execute("INSERT INTO process SELECT * FROM kept")
    its.write_bytes(before)
    assert await two.ledger.recover(NOW) == 0
    assert await ids(two.ledger) == [("left", Status.INTERRUPTED), ("over", Status.OK)]


async def test_a_note_that_cannot_be_cleared_makes_no_second_row(
    start: Start, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = await start()
    stuck, other = noted(one.ledger, new("stuck")), noted(one.ledger, new("other"))
    [its] = files(path)
    number = descriptor_of(its)
    writing, reading = os.dup(number), os.open(its, os.O_RDONLY)
    os.dup2(reading, number)
    one.ledger.close_call(stuck, done())
    await one.ledger.settled()
    assert "notes of calls under way cannot be cleared" in caplog.text
    os.dup2(writing, number)
    one.ledger.close_call(other, done())
    await one.ledger.settled()
    os.close(reading)
    os.close(writing)
    await one.crash()
    two = await start()
    assert await ids(two.ledger) == [("other", Status.OK), ("stuck", Status.OK)]
    assert len(files(path)) == 1


async def test_the_heir_of_a_noted_call_is_open_too(start: Start, path: Path) -> None:
    """In a job, by a row."""
    one = await start()
    await one.ledger.create_job(NewJob("job-1", "red", NOW))
    call, heir, last, late = noted(one.ledger, new("call")), *(OpenCall(new(call_id)) for call_id in ("a", "b", "c"))
    in_job = OpenCall(new("d", job="job-1"))
    for giver, taker in ((call, heir), (heir, last), (last, in_job)):
        one.ledger.hand_over(giver, taker)
    one.ledger.close_call(call, done())
    one.ledger.hand_over(call, late)
    await one.ledger.settled()
    assert sorted(new.id for new in await one.ledger.calls_under_way()) == ["a", "b", "d"]
    assert look(path, "SELECT id FROM open_call") == [("d",)]
    await one.crash()
    two = await start()
    interrupted = [(call_id, Status.INTERRUPTED) for call_id in "abd"]
    assert await ids(two.ledger) == sorted([*interrupted, ("call", Status.OK)])


async def test_a_file_that_cannot_be_read_keeps_its_calls_open(
    start: Start, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be another user's, or its disk may be at fault for a while."""
    one, two = await start(), await start()
    noted(one.ledger, new())
    [its] = [file for file in files(path) if file.stat().st_size]
    await one.crash()
    aside = its.rename(path.with_name("aside"))
    its.mkdir()
    assert await two.ledger.recover(NOW) == 0
    assert await two.ledger.calls_under_way() == []
    assert f"{its} cannot be read: " in caplog.text
    its.rmdir()
    aside.rename(its)
    assert await two.ledger.recover(NOW) == 1


async def test_a_backup_put_in_place_beside_a_note_makes_no_second_row(
    start: Start, path: Path, tmp_path: Path
) -> None:
    one = await start()
    noted(one.ledger, new())
    copy = tmp_path / "copy"
    await backup(path, copy)
    await one.crash()
    for file in path.parent.glob(f"{path.name}-[sw]*"):
        file.unlink()
    copy.replace(path)
    assert await ids((await start()).ledger) == [("call-1", Status.INTERRUPTED)]


async def test_what_a_backup_has_of_noted_calls_is_one_row_each(start: Start, path: Path, tmp_path: Path) -> None:
    """While they begin and end all the time."""
    ledger, is_over = (await start()).ledger, False

    async def call_all_the_time(caller: str) -> None:
        for number in count():
            call = noted(ledger, new(f"{caller}-{number}"))
            await ledger.settled()
            if is_over:
                return
            ledger.close_call(call, done())

    calling = [asyncio.create_task(call_all_the_time(caller)) for caller in "abc"]
    for place in range(10):
        await backup(path, tmp_path / f"copy-{place}")
    is_over = True
    await asyncio.gather(*calling)
    for place in range(10):
        copy = tmp_path / f"copy-{place}"
        found = look(copy, "SELECT id FROM call UNION ALL SELECT id FROM open_call")
        assert len(found) == len(set(found))
    async with starting(copy) as start_there:
        assert (await (await start_there()).ledger.calls()).total == len(found)


async def test_old_calls_are_deleted_and_their_sums_stay(start: Start, path: Path) -> None:
    ledger = (await start()).ledger
    await ledger.create_job(NewJob("job-1", "red", NOW))
    for number in range(1_200):
        record(ledger, new(f"call-{number}"), done(closed_at=NOW + number))
    await opened(ledger, new("open"))
    before = await ledger.usage(["day", "team"], 0, NOW * 2)
    await ledger.compact(NOW + 1_100)
    page = await ledger.calls(limit=3)
    assert ([row.id for row in page.rows], page.total) == (["call-1199", "call-1198", "call-1197"], 100)
    assert await ledger.usage(["day", "team"], 0, NOW * 2) == before
    assert [call.id for call in await ledger.calls_under_way()] == ["open"]
    ended = await ledger.end_job("red", "job-1", JobState.COMPLETED, NOW)
    assert ended.sums.calls == 0


async def test_calls_that_ended_while_the_clock_was_ahead_do_not_keep_older_ones(start: Start) -> None:
    ledger = (await start()).ledger
    for number in range(1_100):
        record(ledger, new(f"call-{number}"), done(closed_at=NOW + (10**8 if number < 600 else 0)))
    for _ in range(2):
        await ledger.compact(NOW + 1)
    page = await ledger.calls(limit=1)
    assert ([row.id for row in page.rows], page.total) == (["call-599"], 600)
