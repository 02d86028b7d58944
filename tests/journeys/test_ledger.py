"""Each call has one row, however it ends, and what it costs is paid once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Container
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Client, chat
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    answer,
    echo,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
)
from tests.journeys.test_coalescing import Paused, hello
from tests.journeys.test_keys import HELLO, bearer
from tests.journeys.test_recovery import broken
from tests.server.test_auth import KEYS, admin, made_key
from tests.waiting import until

PRICE = """
[[price]]
models = ["up/model-*", "up2/*"]
input_usd_per_million = 1000
output_usd_per_million = 2000
cached_input_usd_per_million = 100
markup_percent = 10
"""
TOKENS = {"budget_mode": "consumption_tokens", "tokens_per_credit": 1}
DOLLARS = {"budget_mode": "consumption_usd", "credits_per_dollar": 1000}


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """One with a team. A prompt token costs 1,000 micro-dollars, another one 2,000; and the team pays 10 % more."""
    return await with_team(await start(auth=KEYS, streaming={"coalesce": False}, more=PRICE))


async def with_team(proxy: Proxy) -> Proxy:
    assert (await admin(proxy, "POST", "/teams", {"id": "alpha"}))[0] == 201
    return proxy


async def calls(proxy: Proxy, count: int) -> list[dict[str, Any]]:
    """The rows of so many calls, which are all there are, the first one first: when they are there."""
    _, page = await until(lambda: admin(proxy, "GET", "/calls?limit=1000"), lambda found: found[1]["total"] >= count)
    assert page["total"] == count, page
    return list(reversed(page["data"]))


async def key_of(proxy: Proxy, **fields: Any) -> dict[str, str]:
    return bearer((await made_key(proxy, team="alpha", **fields))["key"])


async def credits_of(proxy: Proxy) -> tuple[float, float, float]:
    """What is left of the team's credits, what is reserved, and what was charged."""
    status, told = await admin(proxy, "GET", "/credits/teams/alpha")
    assert status == 200, told
    left, reserved, used = (told[f"credits_{part}"] for part in ("remaining", "reserved", "used"))
    assert told["credits_allocated"] == pytest.approx(left + reserved + used)
    return left, reserved, used


async def give(proxy: Proxy, amount: float, **terms: Any) -> None:
    """Credits for the team, which it spends as `terms` say."""
    status, told = await admin(proxy, "PATCH", "/teams/alpha", terms)
    assert status == 200, told
    status, told = await admin(proxy, "POST", "/credits/teams/alpha/add", {"amount": amount})
    assert status in (200, 201), told


async def ask(proxy: Proxy, headers: dict[str, str], **members: Any) -> tuple[int, Any]:
    async with proxy.chat(headers=headers, **members) as response:
        return response.status, await response.json()


# ------------------------------------------------------------------ its row


async def test_what_a_row_says(upstream: FakeUpstream, proxy: Proxy) -> None:
    told = {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    upstream.plays(stream(role(), text("Hello"), finish("length"), event({"choices": [], "usage": told})))
    headers = await key_of(proxy) | {"x-request-id": "mine", "x-headwater-purpose": "greeting"}
    async with proxy.chat(headers=headers, stream=True, user="anna") as response:
        assert (await response.read()).endswith(DONE)
    (row,) = await calls(proxy, 1)
    expected = {
        "id": "mine",
        "team": "alpha",
        "user": "anna",
        "purpose": "greeting",
        "job": None,
        "model": "model-a",
        "target": "up/model-a",
        "attempts": 1,
        "cache_entry": None,
        "mode": "relay",
        "status": "ok",
        "http_status": 200,
        "error": None,
        "finish_reason": "length",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "cached_tokens": 5,
        "reasoning_tokens": 1,
        "estimated": False,
        # 2 tokens at 1,000 micro-dollars, 5 at 100, 2 at 2,000; and 10 % more.
        "cost_usd": 0.0065,
        "price_usd": 0.00715,
    }
    assert {name: row[name] for name in expected} == expected
    assert 0 <= row["ttft_ms"] <= row["duration_ms"]


async def test_what_is_passed_on_is_paid_by_what_its_end_says(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"data": [{"embedding": [0.5] * 2000}], "usage": {"prompt_tokens": 8, "total_tokens": 8}}))
    await give(proxy, 100, **TOKENS)
    body = {"model": "model-e", "input": "Hi", "user": "anna"}
    async with proxy.post("/embeddings", body, headers=await key_of(proxy)) as response:
        assert response.status == 200
        await response.read()
    (row,) = await calls(proxy, 1)
    assert (row["mode"], row["user"], row["prompt_tokens"], row["cost_usd"]) == ("passthrough", "anna", 8, 0.008)
    assert await credits_of(proxy) == (92, 0, 8)


ENDS = [
    # What the upstream plays, what the client sends, how the row ends, and what the call costs in tokens.
    ("a stream", HELLO, {"stream": True}, ("relay", "ok", 200), 7 + 2),
    ("one body", answer(COMPLETION), {}, ("whole", "ok", 200), 7 + 4),
    ("one body, streamed", answer(COMPLETION), {"stream": True}, ("synthesis", "ok", 200), 7 + 4),
    ("no such thing", refuse(400, "tools"), {}, ("none", "upstream_error", 400), 0),
    ("not this model", HELLO, {"model": "other"}, ("none", "client_error", 403), 0),
    ("no model", HELLO, {"model": 7}, ("none", "client_error", 400), 0),
    ("more than there is", HELLO, {"max_tokens": 10**6}, ("none", "rejected", 402), 0),
]


@pytest.mark.parametrize(
    ("play", "members", "end", "cost"), [case[1:] for case in ENDS], ids=[case[0] for case in ENDS]
)
async def test_each_end_has_its_row_and_its_price(
    upstream: FakeUpstream, proxy: Proxy, play: Any, members: dict[str, Any], end: tuple[str, str, int], cost: int
) -> None:
    upstream.plays(play)
    await give(proxy, 2000, **TOKENS)
    async with proxy.chat(headers=await key_of(proxy, models=["model-*"]), **members) as response:
        await response.read()
    (row,) = await calls(proxy, 1)
    assert (row["mode"], row["status"], row["http_status"]) == end
    assert row["credits"] == cost
    assert await credits_of(proxy) == (2000 - cost, 0, cost)
    assert row["price_usd"] == (pytest.approx((7 * 0.001 + (cost - 7) * 0.002) * 1.1) if cost else 0)


async def test_an_answer_from_the_cache_costs_nothing(upstream: FakeUpstream, start: Start) -> None:
    proxy = await with_team(await start(auth=KEYS, cache={"exact": True, "semantic": False}, more=PRICE))
    upstream.plays(HELLO)
    await give(proxy, 100, budget_mode="job_based")
    headers = await key_of(proxy)
    for _ in range(2):
        await proxy.stream(headers=headers)
        async with proxy.get("/ready") as response:
            assert response.status == 200
    first, again = await calls(proxy, 2)
    assert (first["mode"], first["credits"], again["mode"], again["credits"]) == ("relay", 1, "replay", 0)
    assert (again["prompt_tokens"], again["completion_tokens"], again["cost_usd"], again["price_usd"]) == (7, 2, 0, 0)
    assert again["cache_entry"] is not None
    assert await credits_of(proxy) == (99, 0, 1)


async def test_a_failed_attempt_costs_nothing(upstream: FakeUpstream, start: Start) -> None:
    async with FakeUpstream() as second:
        more = f'{PRICE}\n[[model]]\nname = "chat"\ntargets = ["up/model-a", "up2/model-b"]'
        proxy = await with_team(await start(upstream.url, second.url, auth=KEYS, more=more))
        upstream.plays(refuse(500, "down"))
        second.plays(HELLO)
        await give(proxy, 100_000, **TOKENS)
        assert (await ask(proxy, await key_of(proxy), model="chat"))[0] == 200
    (row,) = await calls(proxy, 1)
    assert (row["model"], row["target"], row["attempts"] > 1, row["credits"]) == ("chat", "up2/model-b", True, 9)


@pytest.mark.parametrize("is_alone", [True, False])
async def test_who_leaves_pays_for_what_was_generated_unless_others_stay(
    upstream: FakeUpstream, start: Start, is_alone: bool
) -> None:
    proxy = await with_team(await start(auth=KEYS, more=PRICE))
    paused = hello()
    upstream.plays(paused)
    await give(proxy, 2000, **TOKENS)
    key = await key_of(proxy)
    header = f"Authorization: {key['Authorization']}"
    clients = [await Client.to(proxy.port) for _ in range(1 if is_alone else 3)]
    for client in clients:
        client.send(chat("Hi", header, stream=True))
        await client.heard(b'"Hello"')
    assert (await credits_of(proxy))[1] > 1000, "as much is held as it may cost"
    clients[0].reset()
    assert (await proxy.ledger.next())["status"] == "cancelled"
    paused.go_on()
    for client in clients[1:]:
        await client.heard(DONE)
        client.close()
        await proxy.ledger.next()
    rows = await calls(proxy, len(clients))
    paid = Counter({row["mode"]: row["credits"] for row in rows})
    if is_alone:
        (row,) = rows
        assert (row["mode"], row["completion_tokens"], row["estimated"]) == ("relay", 1, True)
        assert row["credits"] == row["prompt_tokens"] + 1
    else:
        assert [row["mode"] for row in rows].count("coalesced") == 2
        assert rows[0]["status"] == "cancelled"
        (payer,) = [row for row in rows if row["mode"] == "relay"]
        assert paid == {"relay": payer["prompt_tokens"] + payer["completion_tokens"], "coalesced": 0}
    assert await credits_of(proxy) == (2000 - paid["relay"], 0, paid["relay"])


# ------------------------------------------------------------------ credits


async def test_two_hundred_calls_at_once_with_credit_for_a_hundred(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    await give(proxy, 100)
    headers = await key_of(proxy)

    async def one(number: int) -> int:
        async with proxy.chat(headers=headers, stream=number % 2 == 0, seed=number) as response:
            await response.read()
            return int(response.status)

    assert Counter(await asyncio.gather(*map(one, range(200)))) == {200: 100, 402: 100}
    assert await credits_of(proxy) == (0, 0, 100)
    assert len(upstream.requests) == 100
    assert Counter(row["status"] for row in await calls(proxy, 200)) == {"ok": 100, "rejected": 100}


async def test_a_refusal_tells_the_balance(upstream: FakeUpstream, proxy: Proxy) -> None:
    await give(proxy, 0.5)
    status, body = await ask(proxy, await key_of(proxy))
    assert (status, body["error"]["code"], body["error"]["type"]) == (402, "insufficient_credits", "insufficient_quota")
    assert "0.5" in body["error"]["message"]
    assert not upstream.requests


async def test_dollars_become_credits_to_the_last_micro_credit(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    await give(proxy, 5000, **DOLLARS)
    headers = await key_of(proxy)
    for _ in range(3):
        assert (await ask(proxy, headers))[0] == 200
    assert await credits_of(proxy) == (5000 - 3 * 12.1, 0, 3 * 12.1)


async def test_an_upstream_that_counts_below_zero_is_not_believed(upstream: FakeUpstream, proxy: Proxy) -> None:
    told = {"prompt_tokens": 7, "completion_tokens": -1000, "prompt_tokens_details": {"cached_tokens": -50}}
    upstream.plays(stream(role(), text("Hello"), finish(), event({"choices": [], "usage": told})))
    await give(proxy, 5000, **DOLLARS)
    async with proxy.chat(headers=await key_of(proxy), stream=True) as response:
        assert (await response.read()).endswith(DONE)
    (row,) = await calls(proxy, 1)
    assert (row["estimated"], row["completion_tokens"]) == (True, 1)
    assert await credits_of(proxy) == (5000 - row["credits"], 0, row["credits"])
    assert row["credits"] > 0


async def test_who_leaves_an_answer_that_nobody_counts_pays_what_was_held(upstream: FakeUpstream, proxy: Proxy) -> None:
    """A client that hangs up before the usage is told, which is at the end, would have had the rest for nothing."""
    paused = Paused(event({"type": "response.output_text.delta", "delta": "Hello"}))
    upstream.plays(paused)
    await give(proxy, 5000, **TOKENS)
    body = {"model": "model-a", "input": "Hi", "stream": True}
    async with proxy.post("/responses", body, headers=await key_of(proxy)) as response:
        assert await response.content.readany()
        response.close()
    (row,) = await calls(proxy, 1)
    assert (row["mode"], row["status"], row["prompt_tokens"], row["price_usd"]) == (
        "passthrough",
        "cancelled",
        None,
        None,
    )
    _, reserved, used = await credits_of(proxy)
    assert (reserved, used) == (0, row["credits"])
    assert used > 1000


async def test_what_has_no_price_is_not_sold_for_dollars(upstream: FakeUpstream, proxy: Proxy) -> None:
    await give(proxy, 5000, **DOLLARS)
    status, body = await ask(proxy, await key_of(proxy), model="nobody-knows")
    assert (status, body["error"]["code"]) == (403, "price_unknown")
    await give(proxy, 5000, **TOKENS)
    upstream.plays(HELLO)
    assert (await ask(proxy, await key_of(proxy), model="nobody-knows"))[0] == 200
    assert (await calls(proxy, 2))[1]["cost_usd"] is None, "unknown is not nothing"


async def test_a_stream_ends_where_the_credit_does(upstream: FakeUpstream, proxy: Proxy) -> None:
    """And not long before: a word and its space are one token, or a little more."""
    upstream.plays(Paused(role(), *[text("word ")] * 500))
    await give(proxy, 600, **TOKENS, hard_stop=True)
    async with proxy.chat(headers=await key_of(proxy), stream=True, seed=1) as response:
        assert response.status == 200
        said = await response.read()
    assert b"insufficient_credits" in said
    assert 440 < said.count(b'"word "') <= 480
    assert not said.endswith(DONE)
    row = await proxy.ledger.next()
    assert (row["status"], row["error"]) == ("rejected", "insufficient_credits")
    left, reserved, used = await credits_of(proxy)
    assert reserved == 0
    assert used >= 400
    assert left + used == 600


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_delivered_as_a_whole_is_held_as_a_whole(
    upstream: FakeUpstream, proxy: Proxy, stream: bool
) -> None:
    """Else one body would be given for what is left, however long it is; and who was stopped would pay for nothing."""
    upstream.plays(answer({**COMPLETION, "usage": {"prompt_tokens": 7, "completion_tokens": 900}}))
    await give(proxy, 300, **TOKENS, hard_stop=True)
    headers = await key_of(proxy) | {"x-headwater-delivery": "whole"}
    status, body = await ask(proxy, headers, max_tokens=900, stream=stream)
    assert (status, body["error"]["code"]) == (402, "insufficient_credits")
    assert not upstream.requests


async def test_an_answer_longer_than_it_may_be_is_stopped_at_what_was_held(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """The upstream does not keep to `max_tokens`, and the team has no more."""
    upstream.plays(Paused(role(), *[text("word ")] * 150))
    await give(proxy, 130, **TOKENS, hard_stop=True)
    async with proxy.chat(headers=await key_of(proxy), stream=True, max_tokens=50) as response:
        said = await response.read()
    assert b"insufficient_credits" in said
    assert (await proxy.ledger.next())["status"] == "rejected"
    _, reserved, used = await credits_of(proxy)
    assert reserved == 0
    assert used <= 130


WORDS = role() + text("word ") * 3000
LONG = "word " * 3000
MESSAGE = {"index": 0, "message": {"role": "assistant", "content": LONG}, "finish_reason": "stop"}
IN_ONE_PIECE = stream(WORDS + finish() + DONE, done=False)


@pytest.mark.parametrize(
    ("play", "words"),
    [
        (IN_ONE_PIECE, range(280, 321)),
        (stream(role() + text(LONG) + finish(), done=False), [0]),
        (broken(WORDS), range(280, 321)),
        (answer({**COMPLETION, "choices": [MESSAGE]}), [0]),
    ],
    ids=["in one piece", "in one event", "and breaks", "in one body"],
)
async def test_what_comes_at_once_ends_where_the_credit_does(
    upstream: FakeUpstream, proxy: Proxy, play: Play, words: Container[int]
) -> None:
    """However fast it comes: what is not paid for yet waits. A part of an event cannot be given."""
    upstream.plays(play)
    await give(proxy, 400, **TOKENS, hard_stop=True)
    async with proxy.chat(headers=await key_of(proxy), stream=True) as response:
        said = await response.read()
    assert b"insufficient_credits" in said
    assert said.count(b"word ") in words
    row = await proxy.ledger.next()
    assert (row["status"], row["error"]) == ("rejected", "insufficient_credits")
    left, reserved, used = await credits_of(proxy)
    assert (reserved, left + used) == (0, 400)


async def test_what_comes_at_once_and_can_be_paid_for_is_given_whole(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(IN_ONE_PIECE)
    await give(proxy, 4000, **TOKENS, hard_stop=True)
    async with proxy.chat(headers=await key_of(proxy), stream=True) as response:
        said = await response.read()
    assert said.count(b"word ") == 3000
    assert said.endswith(finish() + DONE)
    assert (await calls(proxy, 1))[0]["status"] == "ok"
    assert (await credits_of(proxy))[1] == 0


async def test_what_nobody_counts_is_taken_from_a_budget_as_it_was_held(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Else it would go past every budget."""
    upstream.plays(answer({"output": "Hello"}))
    assert (await admin(proxy, "PATCH", "/teams/alpha", {"budget_day_usd": 5}))[0] == 200
    headers, statuses = await key_of(proxy), []
    for _ in range(3):
        async with proxy.post("/responses", {"model": "model-a", "input": "Hi"}, headers=headers) as response:
            statuses.append(response.status)
    assert statuses == [200, 200, 402]
    row, *_ = await calls(proxy, 3)
    assert (row["prompt_tokens"], row["cost_usd"]) == (None, None)
    assert 2 < row["price_usd"] < 2.5


@pytest.mark.parametrize("holder", ["key", "team"])
@pytest.mark.parametrize("period", ["day", "month", "total"])
async def test_a_budget_is_kept(upstream: FakeUpstream, proxy: Proxy, holder: str, period: str) -> None:
    upstream.plays(HELLO)
    # Each call costs 0.0121 dollars; one that may cost more than is left is refused.
    budget = {f"budget_{period}_usd": 0.05}
    if holder == "team":
        assert (await admin(proxy, "PATCH", "/teams/alpha", budget))[0] == 200
    headers = await key_of(proxy, **(budget if holder == "key" else {}))
    answers = [await ask(proxy, headers, max_tokens=1) for _ in range(4)]
    statuses = [status for status, _ in answers]
    assert statuses[0] == 200
    assert statuses[-1] == 402
    assert answers[-1][1]["error"]["code"] == "budget_exceeded"
    other = await key_of(proxy)
    assert (await ask(proxy, other, max_tokens=1))[0] == (402 if holder == "team" else 200)


async def test_budgets_hold_when_all_ask_at_once(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(echo)
    headers = await key_of(proxy, budget_total_usd=1)
    statuses = Counter(
        status for status, _ in await asyncio.gather(*(ask(proxy, headers, max_tokens=9) for _ in range(60)))
    )
    assert set(statuses) == {200, 402}
    assert sum(row["price_usd"] for row in await calls(proxy, 60)) <= 1


async def test_nothing_is_written_of_what_nobody_pays_for_where_that_is_set(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await with_team(await start(auth=KEYS, ledger={"calls": "paid"}, more=PRICE))
    upstream.plays(HELLO)
    headers = await key_of(proxy)
    assert (await ask(proxy, headers))[0] == 200
    await calls(proxy, 0)
    await give(proxy, 100)
    assert (await ask(proxy, headers))[0] == 200
    await calls(proxy, 1)
