"""Credits: what administrators pay in, what a team's calls cost and its keys may see, on a real proxy."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, Start, make_settings, running_proxy
from tests.fakes.upstream import FakeUpstream, finish, refuse, role, stream, text, usage
from tests.journeys.test_keys import bearer
from tests.server.test_auth import ADMIN, KEYS, admin, made_key, routes
from tests.waiting import until

HELLO = stream(role(), text("Hello"), finish(), usage(1000, 500))
# Dollars for a million tokens: such a call costs the operator 0.002 dollars, and the team a quarter more.
PRICED = """
[[price]]
models = ["model-*"]
input_usd_per_million = 1
output_usd_per_million = 2
markup_percent = 25
"""
_LONG = 30
_ROOT = Path(__file__).parents[2]


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    proxy = await start(auth=KEYS, cache={"exact": True, "semantic": False}, more=PRICED)
    for team in ("alpha", "beta"):
        assert (await admin(proxy, "POST", "/teams", {"id": team}))[0] == 201
    return proxy


async def pay(proxy: Proxy, what: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    headers = ADMIN if key is None else {**ADMIN, "Idempotency-Key": key}
    url = proxy.base.removesuffix("/v1") + f"/admin/credits/teams/{what}"
    async with proxy.client.post(url, headers=headers, json=body) as response:
        return response.status, await response.json()


async def see(proxy: Proxy, path: str, key: str) -> tuple[int, Any]:
    """What is answered to who has a virtual key."""
    async with proxy.get(f"/api{path}", headers=bearer(key)) as response:
        return response.status, await response.json()


async def ask(proxy: Proxy, key: str, **members: Any) -> int:
    async with proxy.chat(headers=bearer(key), **members) as response:
        await response.read()
        return int(response.status)


def amounts(reply: dict[str, Any]) -> list[float]:
    return [reply[f"credits_{name}"] for name in ("allocated", "used", "remaining", "reserved")]


# ---------------------------------------------------------------------- what administrators pay


async def test_every_payment_is_told_with_before_and_after(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    key = (await made_key(proxy, team="alpha"))["key"]
    assert amounts((await admin(proxy, "GET", "/credits/teams/alpha"))[1]) == [0, 0, 0, 0]

    status, reply = await pay(proxy, "alpha/add", {"amount": 2.000001, "reason": "a start"})
    assert (status, reply["budget_mode"], reply["budget_mode_was_set"]) == (200, "job_based", True)
    assert amounts(reply) == [2.000001, 0, 2.000001, 0]
    status, reply = await pay(proxy, "alpha/add", {"amount": 1})
    assert (status, reply["budget_mode"], reply["budget_mode_was_set"]) == (200, "job_based", False)
    assert await ask(proxy, key) == 200
    assert (await pay(proxy, "alpha/adjust", {"amount": -0.5, "reason": "a mistake"}))[0] == 200
    assert (await pay(proxy, "alpha/refund", {"amount": 0.25, "call_id": "call-1"}))[0] == 200
    assert (await pay(proxy, "alpha/adjust", {"amount": -9, "reason": "too much"}))[1]["error"]["code"] == (
        "insufficient_credits"
    )

    _, told = await admin(proxy, "GET", "/credits/teams/alpha/transactions")
    rows = [
        (row["transaction_type"], row["credits_amount"], row["credits_before"], row["credits_after"], row["reason"])
        for row in told["data"]
    ]
    assert rows == [
        ("refund", 0.25, 1.500001, 1.750001, ""),
        ("adjustment", -0.5, 2.000001, 1.500001, "a mistake"),
        ("charge", -1, 3.000001, 2.000001, ""),
        ("allocation", 1, 2.000001, 3.000001, ""),
        ("allocation", 2.000001, 0, 2.000001, "a start"),
    ]
    assert (told["object"], told["total"], told["data"][0]["call_id"]) == ("list", 5, "call-1")
    assert await see(proxy, "/credits/teams/alpha/transactions", key) == (200, told)
    _, piece = await see(proxy, "/credits/teams/alpha/transactions?limit=2&before=5", key)
    assert (piece["data"], piece["total"]) == (told["data"][1:3], 5), "the total is that of all pages"
    _, own = await see(proxy, "/credits/teams/alpha/balance", key)
    assert amounts(own) == [2.500001, 0.75, 1.750001, 0]
    assert (200, own) == await admin(proxy, "GET", "/credits/teams/alpha")


async def test_a_payment_with_a_key_is_made_once(proxy: Proxy) -> None:
    body = {"amount": 5, "reason": "once"}
    first = await pay(proxy, "alpha/add", body, "k-1")
    again = [await pay(proxy, "alpha/add", body, key) for key in ("k-1", '"k-1"')]
    assert again == [first, first]
    assert first[1]["transaction"]["number"] == 1
    for path, other, key, expected in (
        ("alpha/add", {"amount": 6, "reason": "once"}, "k-1", "422 idempotency_key_reused"),
        ("beta/add", body, "k-1", "422 idempotency_key_reused"),
        ("alpha/adjust", body, "k-1", "422 idempotency_key_reused"),
        ("alpha/add", body, "", "400 invalid_value"),
        ("alpha/add", body, "x" * 256, "400 invalid_value"),
        ("alpha/adjust", {"amount": -9, "reason": "all"}, "k-2", "402 insufficient_credits"),
    ):
        status, reply = await pay(proxy, path, other, key)
        assert f"{status} {reply['error']['code']}" == expected
    # What was refused was not done, so its key is still good.
    both = await asyncio.gather(*[pay(proxy, "alpha/add", body, "k-2") for _ in range(9)])
    assert {reply["transaction"]["number"] for _, reply in both} == {2}
    assert (await pay(proxy, "alpha/refund", {"amount": 1}, "k-3"))[0] == 400
    assert amounts((await admin(proxy, "GET", "/credits/teams/alpha"))[1]) == [10, 0, 10, 0]
    assert amounts((await admin(proxy, "GET", "/credits/teams/beta"))[1]) == [0, 0, 0, 0]


REFUSED: list[tuple[str, str, Any, str]] = [
    ("POST", "/alpha/add", {}, "400 amount"),
    ("POST", "/alpha/add", {"amount": 0}, "400 amount"),
    ("POST", "/alpha/add", {"amount": -1}, "400 amount"),
    ("POST", "/alpha/add", {"amount": 0.0000001}, "400 amount"),
    ("POST", "/alpha/add", {"amount": 1e13}, "400 amount"),
    ("POST", "/alpha/add", {"amount": "1"}, "400 amount"),
    ("POST", "/alpha/add", {"amount": True}, "400 amount"),
    ("POST", "/alpha/add", {"amount": 1, "reason": "a\nb"}, "400 reason"),
    ("POST", "/alpha/add", {"amount": 1, "job_id": "x"}, "400 job_id"),
    ("POST", "/alpha/add", [1], "400 None"),
    ("POST", "/nobody/add", {"amount": 1}, "404 team"),
    ("POST", "/alpha/adjust", {"amount": 1}, "400 reason"),
    ("POST", "/alpha/adjust", {"amount": 0, "reason": "x"}, "400 amount"),
    ("POST", "/alpha/refund", {"amount": 1}, "400 amount"),
    ("POST", "/alpha/refund", {"amount": 1, "job_id": "no-such"}, "404 None"),
    ("PUT", "/alpha/auto-refill", {"amount": 0, "period": "day"}, "400 amount"),
    ("PUT", "/alpha/auto-refill", {"amount": 1, "period": "year"}, "400 period"),
    ("PUT", "/alpha/auto-refill", {"amount": 1, "period": []}, "400 period"),
    ("PUT", "/alpha/auto-refill", {"amount": 1, "period": "day", "starts_at": -1}, "400 starts_at"),
    ("PUT", "/nobody/auto-refill", {"amount": 1, "period": "day"}, "404 team"),
    ("DELETE", "/nobody/auto-refill", None, "404 team"),
    ("GET", "/nobody", None, "404 team"),
    ("GET", "/alpha/transactions?limit=0", None, "400 limit"),
    ("GET", "/alpha/transactions?before=x", None, "400 before"),
    ("GET", "/alpha/transactions?after=1", None, "400 after"),
]


async def test_what_is_wrong_with_a_payment_is_named_and_changes_nothing(proxy: Proxy) -> None:
    for method, path, body, expected in REFUSED:
        status, reply = await admin(proxy, method, f"/credits/teams{path}", body)
        assert f"{status} {reply['error']['param']}" == expected, (method, path, body)
    _, balance = await admin(proxy, "GET", "/credits/teams/alpha")
    assert (amounts(balance), balance["budget_mode"], balance["auto_refill"]) == ([0, 0, 0, 0], None, None)


async def test_a_team_is_refilled_by_the_clock(tmp_path: Path, upstream: FakeUpstream, proxy: Proxy) -> None:
    path, day = "/credits/teams/alpha/auto-refill", 86_400
    start = time.time() - 1.5 * day
    wish = {"amount": 7.5, "period": "day", "starts_at": start}
    status, reply = await admin(proxy, "PUT", path, wish)
    assert (status, reply["budget_mode"], reply["budget_mode_was_set"]) == (200, "job_based", True)
    assert reply["auto_refill"] == {"amount": 7.5, "period": "day", "next_at": start}
    # A second proxy keeps the house as soon as it is there.
    async with running_proxy(make_settings(tmp_path, upstream.url, auth=KEYS)):
        path_of_team = "/credits/teams/alpha"
        _, balance = await until(lambda: admin(proxy, "GET", path_of_team), lambda found: found[1]["credits_remaining"])
        assert balance["credits_remaining"] == 7.5, "what was missed is made up once"
        assert balance["auto_refill"]["next_at"] == start + 2 * day
        # To ask for the same again, or for another amount, pays nothing now.
        for again in (wish, {"amount": 8, "period": "day"}):
            _, reply = await admin(proxy, "PUT", path, again)
            assert reply["auto_refill"] == {
                "amount": again["amount"],
                "period": "day",
                "next_at": start + 2 * day,
            }
    assert (await admin(proxy, "DELETE", path))[1]["auto_refill"] is None
    assert (await admin(proxy, "GET", path))[1] == {"team_id": "alpha", "auto_refill": None}
    _, told = await admin(proxy, "GET", "/credits/teams/alpha/transactions")
    assert [row["transaction_type"] for row in told["data"]] == ["refill"]


async def test_the_shell_pays_while_the_proxy_runs(tmp_path: Path, upstream: FakeUpstream, start: Start) -> None:
    """Also where nobody needs a key: the first credits make the team need some, which the proxy takes over."""
    upstream.plays(HELLO)
    proxy = await start(more=PRICED)
    assert await ask(proxy, "") == 200
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "credits", "add", "local", "1"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(_ROOT), "HEADWATER_STORE__PATH": str(tmp_path / "headwater.db")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await asyncio.wait_for(process.communicate(), _LONG)
    assert out == b"headwater: the team local has 1 credits left\n"
    await until(lambda: ask(proxy, ""), lambda status: status == 402)
    async with proxy.get("/api/credits/teams/local/balance") as response:
        assert amounts(await response.json()) == [1, 1, 0, 0]


# ---------------------------------------------------------------------- what a team sees


async def test_what_calls_cost_is_told_figure_by_figure(upstream: FakeUpstream, proxy: Proxy) -> None:
    await admin(proxy, "PATCH", "/teams/alpha", {"budget_mode": "consumption_usd"})
    await pay(proxy, "alpha/add", {"amount": 50})
    key, other = [(await made_key(proxy, team=team))["key"] for team in ("alpha", "beta")]
    plays: list[tuple[str, str, Any, int]] = [
        (key, "Hi", HELLO, 200),
        (key, "Ho", HELLO, 200),
        (key, "Hi", HELLO, 200),  # from the cache: free
        (key, "Hu", refuse(400), 400),  # refused by the upstream: free
        (other, "Hi", HELLO, 200),
    ]
    for whose, words, play, expected in plays:
        upstream.plays(play)
        model = "model-b" if words == "Ho" else "model-a"
        messages = [{"role": "user", "content": words}]
        assert await ask(proxy, whose, messages=messages, model=model, max_tokens=100) == expected

    today = datetime.now(UTC)
    _, told = await see(proxy, "/teams/alpha/usage", key)
    assert told["period"] == today.strftime("%Y-%m")
    by_model = {row.pop("model"): row for row in told["models"]}
    assert {name: value for name, value in told.items() if name in by_model["model-a"]} == {
        "calls": 4,
        "failed_calls": 1,
        "unpriced_calls": 0,
        "prompt_tokens": 3000,
        "completion_tokens": 1500,
        "total_tokens": 4500,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "price_usd": 0.005,
    }
    assert (by_model["model-b"]["calls"], by_model["model-b"]["price_usd"]) == (1, 0.0025)
    assert (by_model["model-a"]["calls"], by_model["model-a"]["price_usd"]) == (3, 0.0025)
    assert (told["credits_charged"], told["credits_refunded"]) == (0.05, 0)
    assert "cost" not in json.dumps(told), "what the upstream asks for is the operator's business"
    await pay(proxy, "alpha/refund", {"amount": 0.02})
    for period in (today.strftime("%Y"), today.strftime("%Y-%m"), today.strftime("%Y-%m-%d")):
        _, again = await see(proxy, f"/teams/alpha/usage?period={period}", key)
        assert (again["calls"], again["credits_charged"], again["credits_refunded"]) == (4, 0.05, 0.02), period
    _, balance = await see(proxy, "/credits/teams/alpha/balance", key)
    assert amounts(balance) == [50, 0.03, 49.97, 0]
    upstream.plays(HELLO)
    await admin(proxy, "PATCH", "/teams/alpha", {"budget_mode": None})
    assert await ask(proxy, key, model="nobody-knows") == 200
    _, told = await see(proxy, "/teams/alpha/usage", key)
    (unknown,) = [row for row in told["models"] if row["model"] == "nobody-knows"]
    assert (unknown["unpriced_calls"], unknown["price_usd"], told["price_usd"]) == (1, None, 0.005)
    _, nothing = await see(proxy, "/teams/alpha/usage?period=2020-02", key)
    assert (nothing["calls"], nothing["models"], nothing["credits_charged"]) == (0, [], 0)
    assert (nothing["starts_at"], nothing["ends_at"]) == (1580515200, 1583020800)
    assert (await see(proxy, "/teams/beta/usage", other))[1]["calls"] == 1


@pytest.mark.parametrize("period", ["2026-13", "2026-02-30", "2026-1", "today", "0000", "2026-11-21T00", "20261121"])
async def test_a_period_that_is_no_date_is_refused(proxy: Proxy, period: str) -> None:
    status, reply = await see(
        proxy, f"/teams/alpha/usage?period={period}", (await made_key(proxy, team="alpha"))["key"]
    )
    assert (status, reply["error"]["param"]) == (400, "period")


async def test_whether_there_is_so_much(proxy: Proxy) -> None:
    key = (await made_key(proxy, team="alpha"))["key"]
    path = "/credits/teams/alpha/check?amount="
    assert (await see(proxy, f"{path}9", key))[1] == {
        "team_id": "alpha",
        "has_credits": True,
        "needs_credits": False,
        "credits_remaining": 0,
    }
    await pay(proxy, "alpha/add", {"amount": 2.5})
    for amount, expected in (("2.5", True), ("2.500001", False), ("0", True)):
        _, reply = await see(proxy, f"{path}{amount}", key)
        assert (reply["has_credits"], reply["needs_credits"], reply["credits_remaining"]) == (expected, True, 2.5)
    for wrong in ("", "-1", "nan", "a", "1e99", "0.0000001"):
        status, reply = await see(proxy, f"{path}{wrong}", key)
        assert (status, reply["error"]["param"]) == (400, "amount"), wrong
    assert (await see(proxy, "/credits/teams/alpha/check", key))[1]["error"]["code"] == "missing_required_parameter"


async def test_where_no_key_is_needed_everybody_is_the_team_local(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(HELLO)
    proxy = await start(more=PRICED)
    async with proxy.client.post(
        proxy.base.removesuffix("/v1") + "/admin/credits/teams/local/add", json={"amount": 1}
    ) as response:
        assert (await response.json())["budget_mode_was_set"] is True
    assert [await ask(proxy, "") for _ in range(2)] == [200, 402]
    async with proxy.get("/api/credits/teams/local/balance") as response:
        assert amounts(await response.json()) == [1, 1, 0, 0]
    async with proxy.get("/api/credits/teams/alpha/balance") as response:
        assert response.status == 404


# ---------------------------------------------------------------------- what a team does not see

OWN_ROUTES = [(method, path) for method, path in routes() if path.startswith("/api/") and "/teams/id" in path]


@pytest.mark.parametrize(("method", "path"), OWN_ROUTES)
@pytest.mark.parametrize("query", ["", "?limit=x&amount=-1&period=x&unknown=1"])
async def test_another_team_is_as_unknown_as_one_that_never_was(
    proxy: Proxy, method: str, path: str, query: str
) -> None:
    """Status, headers and body are the same, but for the id and what no two replies share."""
    key = (await made_key(proxy, team="alpha"))["key"]
    await made_key(proxy, team="beta")
    await pay(proxy, "beta/add", {"amount": 5})
    seen = []
    for team in ("beta", "none"):
        url = proxy.base.removesuffix("/v1") + path.replace("/teams/id", f"/teams/{team}") + query
        async with proxy.client.request(method, url, headers=bearer(key)) as response:
            headers = {name: value for name, value in response.headers.items() if name not in ("Date", "X-Request-ID")}
            seen.append((response.status, headers, (await response.text()).replace(team, "…")))
    assert seen[0] == seen[1]
    assert seen[0][0] == 404


def test_the_routes_of_teams_are_found() -> None:
    assert len(OWN_ROUTES) >= 8, "each of four, and its HEAD"
