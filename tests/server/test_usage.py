"""What administrators are told of calls: sums by what they ask for, as JSON and as CSV, and each call."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.errors import ClientError
from proxy.server import reports
from proxy.server.app import opened_ledger
from proxy.store.usage import UsageRow
from tests.conftest import Proxy, Start, examples, make_settings
from tests.store.ledgers import DAY, done, new, record

DAY_S = 86_400
FIRST, LAST = reports.day_name(DAY), reports.day_name(DAY + 3)
SPAN = f"from={FIRST}&to={LAST}"
NOTHING = reports.total([])
FORMULA = "=cmd|'/C calc'!A0"

CALLS = (  # team, key, user, model, day, tokens, price in micro-dollars, status
    ("red", "sk-hw-r1", "ann", "gpt-4o", 0, 1, 1, "ok"),
    ("red", "sk-hw-r1", FORMULA, "gpt-4o", 0, 2, 100_000, "ok"),
    ("red", "sk-hw-r2", "ann", "claude", 1, 4, None, "cancelled"),
    ("blue", None, "", "gpt-4o", 1, 8, 200_000, "ok"),
    ("blue", None, "", "claude", 3, 16, 1_000_000_000_003, "upstream_error"),
)


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """A proxy whose ledger has some calls."""
    async with opened_ledger(make_settings(start.directory)) as ledger:
        for number, (team, key, user, model, day, tokens, price, status) in enumerate(CALLS):
            call = new(f"call-{number}", team, key=key, user=user, model=model, opened_at=(DAY + day) * DAY_S + 100.0)
            members: dict[str, Any] = {
                "status": status,
                "target": f"up/{model}",
                "attempts": 1,
                "closed_at": call.opened_at,
            }
            members |= {"cost_microusd": price, "price_microusd": price}
            record(ledger, call, done(**members, prompt_tokens=tokens, completion_tokens=tokens))
        await ledger.settled()
    return await start()


async def told(proxy: Proxy, path: str, status: int = 200) -> Any:
    async with proxy.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json()


REPORTS: list[tuple[str, list[dict[str, Any]]]] = [
    ("", [{"day": FIRST, "calls": 2}, {"day": reports.day_name(DAY + 1), "calls": 2}, {"day": LAST, "calls": 1}]),
    ("&group_by=team", [{"team": "blue", "prompt_tokens": 24}, {"team": "red", "prompt_tokens": 7}]),
    ("&group_by=key,%20model&team=blue", [{"key": None, "model": "claude"}, {"key": None, "model": "gpt-4o"}]),
    ("&group_by=user,day&user=ann", [{"user": "ann", "calls": 1}, {"user": "ann", "calls": 1}]),
    ("&group_by=user", [{"user": "", "calls": 2}, {"user": FORMULA, "calls": 1}, {"user": "ann", "calls": 2}]),
    ("&group_by=user&team=red", [{"user": FORMULA, "calls": 1}, {"user": "ann", "calls": 2}]),
    ("&group_by=purpose&user=", [{"purpose": "", "total_tokens": 48}]),
    ("&group_by=target&key=sk-hw-r2", [{"target": "up/claude", "cost_usd": None, "unpriced_calls": 1}]),
    ("&group_by=status&key=sk-hw-r1", [{"status": "ok", "price_usd": 0.100001, "credits": 0}]),
    ("&group_by=team&team=green", []),
]


async def test_usage_is_told_by_group(proxy: Proxy) -> None:
    for query, wanted in REPORTS:
        report = await told(proxy, f"/admin/usage?{SPAN}{query}")
        assert (report["object"], report["from"], report["to"]) == ("usage", FIRST, LAST)
        shown = [{name: row[name] for name in expected} for row, expected in zip(report["data"], wanted, strict=True)]
        assert shown == wanted, query
        for name in ("calls", "failed_calls", "attempts", "total_tokens"):
            assert report["total"][name] == sum(row[name] for row in report["data"])


async def test_money_is_exact_and_what_is_unknown_is_not_told_as_nothing(proxy: Proxy) -> None:
    report = await told(proxy, f"/admin/usage?{SPAN}&group_by=team")
    assert [row["price_usd"] for row in report["data"]] == [1_000_000.200003, 0.100001]
    total = report["total"]
    assert (total["cost_usd"], total["unpriced_calls"], total["failed_calls"]) == (1_000_000.300004, 1, 2)
    nobody = (await told(proxy, f"/admin/usage?{SPAN}&team=green"))["total"]
    assert set(nobody.values()) == {0}


async def test_csv_is_for_programs_and_for_spreadsheets(proxy: Proxy) -> None:
    async with proxy.get(f"/admin/usage?{SPAN}&group_by=user", headers={"Accept": "text/csv"}) as response:
        said = await response.text()
        assert response.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
        assert f'filename="headwater-usage-{FIRST}-{LAST}.csv"' in response.headers["Content-Disposition"]
    async with proxy.get(f"/admin/usage?{SPAN}&group_by=user&format=csv") as response:
        assert await response.text() == said
    assert said.splitlines(keepends=True) == [
        "user,calls,failed_calls,unpriced_calls,attempts,prompt_tokens,completion_tokens,cached_tokens,reasoning_tokens,"
        "total_tokens,cost_usd,price_usd,credits\r\n",
        ",2,1,0,2,24,24,0,0,48,1000000.200003,1000000.200003,0.000000\r\n",
        "'=cmd|'/C calc'!A0,1,0,0,1,2,2,0,0,4,0.100000,0.100000,0.000000\r\n",
        "ann,2,1,1,2,5,5,0,0,10,0.000001,0.000001,0.000000\r\n",
        "TOTAL,5,2,1,5,31,31,0,0,62,1000000.300004,1000000.300004,0.000000\r\n",
    ]
    for accepted in ("application/json", "text/csv, application/json", "*/*"):
        async with proxy.get(f"/admin/usage?{SPAN}", headers={"Accept": accepted}) as response:
            assert response.content_type == "application/json"


WRONG = [
    ("group_by=", "group_by"),
    ("group_by=team,team", "group_by"),
    ("group_by=team;drop", "group_by"),
    ("format=xml", "format"),
    ("from=yesterday", "from"),
    ("from=2026-02-30", "from"),
    ("from=1969-12-31", "from"),
    ("from=-5", "from"),
    ("to=٢٠٢٦-01-01", "to"),
    ("to=0", "to"),
    ("to=999999999999", "to"),
    ("from=2026-02-02&to=2026-02-01", "from"),
    ("from=9999-01-01", "from"),
    ("since=1", "since"),
]


async def test_a_wrong_value_is_named(proxy: Proxy) -> None:
    for query, param in WRONG:
        assert (await told(proxy, f"/admin/usage?{query}", 400))["error"]["param"] == param, query


async def test_calls_are_told_page_by_page_and_one_by_one(proxy: Proxy) -> None:
    first = await told(proxy, "/admin/calls?limit=3")
    second = await told(proxy, f"/admin/calls?limit=3&before={first['next']}")
    assert [row["id"] for row in first["data"] + second["data"]] == [f"call-{number}" for number in (4, 3, 2, 1, 0)]
    assert (first["total"], second["next"], first["object"]) == (5, None, "list")
    assert [row["id"] for row in (await told(proxy, "/admin/calls?key=sk-hw-r1&team=red"))["data"]] == [
        "call-1",
        "call-0",
    ]
    assert (await told(proxy, "/admin/calls?job=none")) == {"object": "list", "data": [], "total": 0, "next": None}
    row = first["data"][0]
    assert await told(proxy, f"/admin/calls/{row['number']}") == {**row, "content": None}
    assert row == {
        "number": 5,
        "id": "call-4",
        "team": "blue",
        "key": None,
        "user": "",
        "job": None,
        "purpose": "",
        "opened_at": (DAY + 3) * DAY_S + 100.0,
        "closed_at": (DAY + 3) * DAY_S + 100.0,
        "model": "claude",
        "target": "up/claude",
        "answered_model": None,
        "mode": "relay",
        "status": "upstream_error",
        "http_status": 200,
        "error": None,
        "finish_reason": None,
        "attempts": 1,
        "ttft_ms": None,
        "duration_ms": 2000.0,
        "prompt_tokens": 16,
        "completion_tokens": 16,
        "cached_tokens": None,
        "reasoning_tokens": None,
        "estimated": False,
        "cost_usd": 1_000_000.000003,
        "price_usd": 1_000_000.000003,
        "credits": 0,
        "overdraft_credits": 0,
        "cache_entry": None,
    }
    assert first["data"][2]["price_usd"] is None


NO_CALLS = [
    ("/6", 404),
    ("/0", 404),
    ("/-1", 404),
    ("/x", 404),
    ("/٣", 404),
    ("/9999999999999999999999", 404),
    ("/1?x=1", 400),
    ("?limit=0", 400),
    ("?before=x", 400),
    ("?user=ann", 400),
    ("/under-way?key=x", 400),
]


async def test_what_is_no_call_is_said(proxy: Proxy) -> None:
    for path, status in NO_CALLS:
        await told(proxy, f"/admin/calls{path}", status)


@pytest.mark.parametrize(
    ("since", "until", "wanted"),
    [
        (None, None, (DAY - 29, DAY)),
        (None, "2027-01-31", (20_820, 20_849)),
        ("2026-11-21", None, (20_778, DAY)),
        ("0", str(DAY_S), (0, 0)),
        (str(DAY_S - 1), str(DAY_S + 1), (0, 1)),
        (None, "1970-01-03", (0, 2)),
        ("1970-01-02", "9999-12-31", (1, 2_932_896)),
    ],
)
def test_days_are_named_or_seconds(since: str | None, until: str | None, wanted: tuple[int, int]) -> None:
    assert reports.days(since, until, DAY * DAY_S + 5.0) == wanted


def test_a_report_that_nobody_could_read_is_refused() -> None:
    row = UsageRow((1,), NOTHING)
    reports.check_size([row] * reports.MAX_ROWS, "group_by")
    with pytest.raises(ClientError, match="fewer groups in 'group_by'"):
        reports.check_size([row] * (reports.MAX_ROWS + 1), "group_by")


@examples(60)
@given(
    st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from("=+-@＝\t\r\n'\", ;\0"), max_size=6), max_size=4)
)
@example([" =1", "\u2003@x", "'", "a;=1;b", ";'", "a\t\t-1"])
def test_whatever_clients_write_a_spreadsheet_sees_text_and_a_program_the_same(users: list[str]) -> None:
    said = reports.as_csv(["user"], [UsageRow((user,), NOTHING) for user in users])
    cells = [row[0] for row in csv.reader(io.StringIO(said, newline=""), strict=True)][1:-1]
    # In many countries a spreadsheet ends a cell at each semicolon.
    pieces = [piece for cell in cells for piece in re.split(r"[;\t\r\n]", cell)]
    assert not any(piece.lstrip().startswith(tuple("=+-@＝＋－＠")) for piece in pieces)
    assert not any(cell[:1] in tuple("\t\r\n\0") for cell in cells)
    assert [re.sub(r"(^|[;\t\r\n])'", r"\1", cell) for cell in cells] == users


@examples(60)
@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=5))
def test_the_total_in_csv_is_the_sum_of_its_rows_to_the_last_decimal(prices: list[int]) -> None:
    rows = [UsageRow((index,), NOTHING._replace(price_microusd=price)) for index, price in enumerate(prices)]
    *told, total = [row[-2] for row in csv.reader(io.StringIO(reports.as_csv(["day"], rows)))][1:]
    micro = [int(amount.replace(".", "")) for amount in told]
    assert (micro, int(total.replace(".", ""))) == (prices, sum(prices))
