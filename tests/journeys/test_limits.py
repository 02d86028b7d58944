"""What a key and its team may ask for in a minute and at once, as clients meet it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import FakeUpstream, Silence, answer, echo, refuse, stream, text, usage
from tests.journeys.test_keys import HELLO, UP_KEY, bearer, program, says
from tests.server.test_auth import KEYS, admin, made_key
from tests.waiting import until

_LONG = 30
_TOLD = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    proxy = await start(auth=KEYS, streaming={"coalesce": False}, more=UP_KEY)
    assert (await admin(proxy, "POST", "/teams", {"id": "alpha"}))[0] == 201
    return proxy


async def key_of(proxy: Proxy, **limits: int) -> dict[str, str]:
    """The header of a key with these limits."""
    return bearer((await made_key(proxy, team="alpha", **limits))["key"])


async def ask(proxy: Proxy, headers: dict[str, str], **members: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
    async with proxy.chat(headers=headers, **members) as response:
        return response.status, dict(response.headers), await response.json()


async def test_requests_per_minute(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(echo)
    headers = await key_of(proxy, requests_per_minute=2)
    for left in ("1", "0"):
        status, told, _ = await ask(proxy, headers)
        assert (status, *(told[name] for name in _TOLD)) == (200, "2", left)
    status, told, body = await ask(proxy, headers)
    assert (status, told["x-ratelimit-remaining-requests"]) == (429, "0")
    assert 1 <= int(told["Retry-After"]) <= 30
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert "2 requests per minute for this key" in body["error"]["message"]
    assert len(upstream.requests) == 2
    rows = [await proxy.ledger.next() for _ in range(3)]
    assert [row["status"] for row in rows] == ["ok", "ok", "rejected"]
    assert (await ask(proxy, await key_of(proxy)))[0] == 200, "another key of the team has none of this"


async def test_the_official_client_knows_the_refusal(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    key = (await made_key(proxy, team="alpha", requests_per_minute=1))["key"]
    async with program(proxy, key) as client:
        assert [await says(client) for _ in range(2)] == [
            "Hello",
            f"{openai.RateLimitError.__name__} rate_limit_exceeded",
        ]


async def test_a_teams_limit_is_for_all_its_keys_and_holds_when_it_is_changed(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(echo)
    keys = [await key_of(proxy) for _ in range(2)]
    assert (await admin(proxy, "PATCH", "/teams/alpha", {"requests_per_minute": 1}))[0] == 200
    assert [(await ask(proxy, key))[0] for key in keys] == [200, 429]
    assert "team 'alpha'" in (await ask(proxy, keys[1]))[2]["error"]["message"]
    assert (await admin(proxy, "PATCH", "/teams/alpha", {"requests_per_minute": None}))[0] == 200
    assert [(await ask(proxy, key))[0] for key in keys] == [200, 200]


# How a call that holds the only slot comes to its end.
ENDS: dict[str, Any] = {
    "it answers": echo,
    "it fails": refuse(400),
    "its stream breaks": stream(text("a"), done=False),
    "its client leaves": None,
}


async def until_let_in(proxy: Proxy, headers: dict[str, str], **members: Any) -> tuple[int, dict[str, str]]:
    """Ask until there is a slot, and read the answer."""
    async with asyncio.timeout(_LONG):
        while True:
            async with proxy.chat(headers=headers, **members) as response:
                await response.read()
                if response.status != 429:
                    return response.status, dict(response.headers)


@pytest.mark.parametrize("end", ENDS)
async def test_a_slot_is_free_again_however_its_call_ends(upstream: FakeUpstream, proxy: Proxy, end: str) -> None:
    headers = await key_of(proxy, parallel_calls=1, requests_per_minute=100)
    silence = Silence(head=False)
    upstream.plays(silence)
    first = asyncio.create_task(ask(proxy, headers))
    await silence.is_heard()
    for _ in range(3):
        status, told, body = await ask(proxy, headers)
        assert (status, told["Retry-After"]) == (429, "1")
        assert "1 calls at a time" in body["error"]["message"]
    first.cancel()
    await silence.is_left()
    if end == "its client leaves":
        again = Silence(head=False)
        upstream.plays(again)
        second = asyncio.create_task(until_let_in(proxy, headers))
        await again.is_heard()
        second.cancel()
        await again.is_left()
    else:
        upstream.plays(ENDS[end])
        await until_let_in(proxy, headers, stream=True)
    upstream.plays(echo)
    status, told = await until_let_in(proxy, headers)
    assert status == 200
    # No refusal has taken a request.
    assert int(told["x-ratelimit-remaining-requests"]) >= 97


async def test_tokens_are_held_and_then_counted(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(text("Hello"), usage(500, 400)))
    headers = await key_of(proxy, tokens_per_minute=1000)
    status, told, body = await ask(proxy, headers, max_tokens=2000)
    assert (status, told["x-should-retry"], "Retry-After" in told) == (429, "false", False)
    assert "refused at any time" in body["error"]["message"]
    assert (await ask(proxy, headers, max_tokens=100))[0] == 200
    status, told, _ = await ask(proxy, headers, max_tokens=300)
    assert status == 429
    assert int(told["x-ratelimit-remaining-tokens"]) in range(95, 140), "what was really taken"


async def test_an_answer_from_the_cache_takes_a_request_and_no_tokens(start: Start, upstream: FakeUpstream) -> None:
    proxy = await start(auth=KEYS, cache={"exact": True, "semantic": False}, more=UP_KEY)
    assert (await admin(proxy, "POST", "/teams", {"id": "alpha"}))[0] == 201
    upstream.plays(echo)
    headers = await key_of(proxy, tokens_per_minute=100_000, requests_per_minute=100)
    await ask(proxy, headers)
    answered = await until(lambda: ask(proxy, headers), lambda found: found[1]["x-cache"] == "hit; exact")
    before = int(answered[1]["x-ratelimit-remaining-tokens"])
    _, told, _ = await ask(proxy, headers)
    assert int(told["x-ratelimit-remaining-tokens"]) >= before


async def test_what_is_passed_on_is_limited_too(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"object": "list", "data": []}))
    headers = await key_of(proxy, requests_per_minute=1)
    for expected in (200, 429):
        async with proxy.post("/v1/embeddings", b'{"model": "model-a", "input": "Hi"}', headers=headers) as response:
            assert response.status == expected
            assert response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_what_tells_no_usage_takes_what_it_was_let_in_for(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"choices": [{"text": "word " * 2000}]}))
    headers = await key_of(proxy, tokens_per_minute=1500)
    for expected in (200, 429):
        async with proxy.post("/completions", b'{"model": "model-a", "prompt": "Hi"}', headers=headers) as response:
            assert response.status == expected


async def test_what_is_refused_before_it_is_passed_on_takes_no_tokens(proxy: Proxy) -> None:
    assert (await admin(proxy, "PATCH", "/teams/alpha", {"budget_mode": "consumption_tokens"}))[0] == 200
    headers = await key_of(proxy, tokens_per_minute=2000)
    body = {"model": "model-a", "input": "x" * 6000}
    for _ in range(2):
        async with proxy.post("/embeddings", body, headers=headers) as response:
            assert response.status == 402


async def test_nobody_is_told_of_limits_where_there_are_none(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(echo)
    status, told, _ = await ask(proxy, await key_of(proxy))
    assert status == 200
    assert not [name for name in told if name.startswith("x-ratelimit")]
