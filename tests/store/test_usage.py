"""Reports: sums by what is asked for, and none of them reads a million rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.chat import Status
from proxy.store.ledger import Ledger
from proxy.store.usage import Group
from tests.store.ledgers import DAY, NOW, Process, check_books, done, new, record, starting

DAY_S = 86_400
EVER = (0.0, NOW * 2)


@pytest_asyncio.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    path = tmp_path / "headwater.db"
    async with starting(path) as start:
        yield await start()
    check_books(path)


@pytest.fixture
def ledger(process: Process) -> Ledger:
    for team, key, user, model, day, tokens, status in (
        ("red", "r1", "ann", "gpt-4o", 0, 1, Status.OK),
        ("red", "r1", "bob", "gpt-4o", 0, 2, Status.OK),
        ("red", "r2", "ann", "claude", 1, 4, Status.CANCELLED),
        ("blue", None, "", "gpt-4o", 1, 8, Status.OK),
        ("blue", None, "", "claude", 3, 16, Status.UPSTREAM_ERROR),
    ):
        call = new(team=team, key=key, user=user, model=model, opened_at=(DAY + day) * DAY_S + 100.0)
        end = done(status=status, prompt_tokens=tokens, target=f"up/{model}", price_microusd=None if tokens == 4 else 7)
        record(process.ledger, call, end)
    return process.ledger


@pytest.mark.parametrize(
    ("by", "filters", "wanted"),
    [
        ([], {}, [((), 31)]),
        (["team"], {}, [(("blue",), 24), (("red",), 7)]),
        (["day"], {}, [((DAY,), 3), ((DAY + 1,), 12), ((DAY + 3,), 16)]),
        (["key", "user"], {}, [(("", ""), 24), (("r1", "ann"), 1), (("r1", "bob"), 2), (("r2", "ann"), 4)]),
        (["model"], {"teams": ["red"]}, [(("claude",), 4), (("gpt-4o",), 3)]),
        (["target"], {"teams": ["red", "blue"], "key": "r1"}, [(("up/gpt-4o",), 3)]),
        (["status"], {"user": ""}, [(("ok",), 8), (("upstream_error",), 16)]),
        (["purpose"], {"teams": []}, []),
        ([], {"teams": ["green"]}, [((), 0)]),
    ],
)
async def test_usage_is_grouped(
    ledger: Ledger, by: Sequence[Group], filters: dict[str, Any], wanted: list[Any]
) -> None:
    rows = await ledger.usage(by, *EVER, **filters)
    assert [(row.group, row.sums.prompt_tokens) for row in rows] == wanted


async def test_money_that_is_unknown_is_counted_as_such(ledger: Ledger) -> None:
    (row,) = await ledger.usage([], *EVER)
    assert (row.sums.calls, row.sums.failed_calls, row.sums.unpriced_calls, row.sums.price_microusd) == (5, 2, 1, 28)


@pytest.mark.parametrize(
    ("since", "until", "days"),
    [
        (DAY * DAY_S, (DAY + 1) * DAY_S, [0]),
        ((DAY + 1) * DAY_S - 0.5, (DAY + 1) * DAY_S + 0.5, [0, 1]),
        ((DAY + 2) * DAY_S, (DAY + 9) * DAY_S, [3]),
        ((DAY + 2) * DAY_S, (DAY + 3) * DAY_S, []),
        ((DAY + 3) * DAY_S, DAY * DAY_S, []),
    ],
)
async def test_usage_is_that_of_all_days_two_times_touch(
    ledger: Ledger, since: float, until: float, days: list[int]
) -> None:
    assert [row.group for row in await ledger.usage(["day"], since, until)] == [(DAY + day,) for day in days]


async def test_nothing_was_used_before_the_first_call(process: Process) -> None:
    assert await process.ledger.usage(["day"], *EVER) == []
    assert [row.sums.calls for row in await process.ledger.usage([], *EVER)] == [0]


async def test_calls_are_listed_in_pages_by_team_key_and_job(ledger: Ledger) -> None:
    first = await ledger.calls(limit=2)
    second = await ledger.calls(limit=9, before=first.rows[-1].number)
    assert (first.total, len(first.rows), len(second.rows)) == (5, 2, 3)
    numbers = [row.number for row in (*first.rows, *second.rows)]
    assert numbers == sorted(numbers, reverse=True)
    assert {row.key for row in (await ledger.calls(team="red", key="r1")).rows} == {"r1"}
    assert (await ledger.calls(team="blue", key="r1")).total == 0
    assert (await ledger.calls(job="\ud800")).rows == []
    assert await ledger.usage(["day"], *EVER, user="\ud800") == []


async def test_a_report_reads_no_more_than_it_must(process: Process) -> None:
    """Whatever a report is asked for, SQLite finds its rows by an index."""
    queries = {
        "usage": "SELECT sum(calls) FROM call_day WHERE day = 1 AND team IN (SELECT value FROM json_each('[]'))",
        "calls": "SELECT * FROM call WHERE number < 9 AND team = 'red' ORDER BY number DESC LIMIT 5",
        "keys": "SELECT * FROM call WHERE number < 9 AND key = 'r1' ORDER BY number DESC LIMIT 5",
        "of a job": "SELECT * FROM call WHERE number < 9 AND job = 'j' ORDER BY number DESC LIMIT 5",
        "jobs": "SELECT * FROM job WHERE number < 9 AND team = 'red' ORDER BY number DESC LIMIT 5",
        "transactions": "SELECT * FROM credit_transaction WHERE number < 9 AND team = 'red' ORDER BY number DESC LIMIT 5",
        "refills": "SELECT team FROM credit_account WHERE refill_at <= 1 ORDER BY refill_at LIMIT 5",
    }
    for name, query in queries.items():
        plan = await process.reader.execute_fetchall(f"EXPLAIN QUERY PLAN {query}")
        steps = [step[3] for step in plan]
        assert steps[0].startswith("SEARCH"), (name, steps)
        assert not any("TEMP B-TREE" in step for step in steps), (name, steps)
