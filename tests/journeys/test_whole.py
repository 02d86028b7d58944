"""The client wants one JSON body, and the upstream gives one: nothing is done to it."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import COMPLETION, FakeUpstream, Received, Wire, answer, finish, role, stream, text
from tests.journeys.test_sloppy_streams import staying_open


async def test_one_body_arrives_byte_for_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    body = json.dumps({**COMPLETION, "vendor": {"nested": [1.50, None]}}, indent=3).encode()
    upstream.plays(answer(body, x_ratelimit_remaining_requests="99"))

    async with proxy.chat() as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.read() == body
        assert response.headers["x-headwater-target"] == "up/model-a"
        assert response.headers["x-ratelimit-remaining-requests"] == "99"

    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["http_status"], row["attempts"]) == ("whole", "ok", 200, 1)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 4, False)


@pytest.mark.parametrize("stream_member", [{}, {"stream": False}, {"stream": None}])
async def test_the_request_arrives_byte_for_byte(
    upstream: FakeUpstream, proxy: Proxy, stream_member: dict[str, object]
) -> None:
    body = json.dumps(
        {
            "temperature": 0,
            "messages": [{"content": "Hi ✓", "role": "user", "unknown": [1.0, 2]}],
            "top_p": 1.0,
            **stream_member,
            "model": "model-a",
            "vendor": {"deep": {"er": None}},
        },
        indent=1,
        ensure_ascii=False,
    ).encode()
    upstream.plays(answer())

    async with proxy.post("/chat/completions", body) as response:
        assert response.status == 200

    assert upstream.requests[0].body == body
    assert upstream.requests[0].path == "/v1/chat/completions"
    assert upstream.requests[0].headers["accept"] == "application/json"


async def test_a_streaming_request_that_asks_for_usage_arrives_byte_for_byte(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    body = (
        b'{"model":"model-a" , "messages":[{"role":"user","content":"Hi"}],"stream":true,\n'
        b' "stream_options":{"include_usage":true}}'
    )

    async with proxy.post("/chat/completions", body) as response:
        await response.read()

    assert upstream.requests[0].body == body


async def test_a_streaming_request_is_given_the_wish_for_usage_and_loses_nothing(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    await proxy.stream(temperature=0, seed=None, vendor={"a": [1]}, stream_options={"include_obfuscation": False})

    sent = upstream.requests[0].json()
    assert sent == {
        "model": "model-a",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "temperature": 0,
        "seed": None,
        "vendor": {"a": [1]},
        "stream_options": {"include_obfuscation": False, "include_usage": True},
    }


async def test_usage_that_the_body_lacks_is_estimated_for_the_ledger_only(upstream: FakeUpstream, proxy: Proxy) -> None:
    bare = {name: value for name, value in COMPLETION.items() if name != "usage"}
    upstream.plays(answer(bare))

    assert await proxy.ask() == bare

    row = await proxy.ledger.next()
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (8, 5, True)


async def test_a_body_without_a_finish_reason_is_passed_on_and_noted(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}))

    assert (await proxy.ask())["choices"][0]["message"]["content"] == "Hi"

    assert (await proxy.ledger.next())["status"] == "incomplete"


async def test_a_body_with_half_a_surrogate_pair_passes(upstream: FakeUpstream, proxy: Proxy) -> None:
    body = json.dumps({**COMPLETION, "choices": [{**COMPLETION["choices"][0], "message": {"content": "\ud83d"}}]})
    upstream.plays(answer(body.encode()))

    async with proxy.chat() as response:
        assert await response.read() == body.encode()

    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_body_that_comes_in_pieces_is_put_together(upstream: FakeUpstream, proxy: Proxy) -> None:
    body = json.dumps(COMPLETION).encode()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="application/json")
        for place in range(0, len(body), 10):
            await wire.chunk(body[place : place + 10])
        await wire.end()

    upstream.plays(play)

    assert await proxy.ask() == COMPLETION


async def test_white_space_before_the_body_keeps_the_connection_alive_and_is_no_matter(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """Some upstreams send blank lines while they think."""
    upstream.plays(answer(b"\n\n\n" + json.dumps(COMPLETION).encode()))

    assert (await proxy.ask()) == COMPLETION


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'"Hello"', b"[]", b"null", b'{"choices": null}', b'{"choices": ["Hi"]}', b'{"id": "x"}', b"<html>"],
)
async def test_a_body_that_is_no_completion_is_an_error(upstream: FakeUpstream, proxy: Proxy, body: bytes) -> None:
    upstream.plays(answer(body))

    for wants_stream in (False, True):
        async with proxy.chat(stream=wants_stream) as response:
            assert response.status == 502
            assert response.headers["x-headwater-error-source"] == "upstream"
            assert (await response.json())["error"]["code"] == "bad_upstream_answer"
        row = await proxy.ledger.next()
        assert (row["status"], row["http_status"]) == ("upstream_error", 502)


async def test_a_body_that_breaks_off_is_an_error(upstream: FakeUpstream, proxy: Proxy) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="application/json", content_length="5000")
        await wire.send(b'{"id": "x", "choices": [')
        await wire.close()

    upstream.plays(play)

    async with proxy.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"


async def test_a_client_that_leaves_while_it_waits_ends_the_upstream_call(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/1rgs/claude-code-proxy/issues/114"""
    gone = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.gone()
        gone.set()

    upstream.plays(play)
    asking = asyncio.create_task(proxy.ask())
    await upstream.asked(1)
    asking.cancel()

    await asyncio.wait_for(gone.wait(), 10)
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["http_status"]) == ("none", "cancelled", 499)


async def test_a_stream_nobody_asked_for_that_stays_open_is_folded_in_time(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(staying_open(role(), text("Hello"), finish()))

    async with asyncio.timeout(10):
        assert (await proxy.ask())["choices"][0]["message"]["content"] == "Hello"


async def test_an_incomplete_stream_is_folded_and_says_so(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("Hel")))

    assert (await proxy.ask())["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hel"}, "finish_reason": None}
    ]

    assert (await proxy.ledger.next())["status"] == "incomplete"


async def test_a_body_that_is_too_long_says_so_also_when_it_came_at_once(upstream: FakeUpstream, start: Start) -> None:
    long = {**COMPLETION, "padding": "x" * 2000}
    upstream.plays(answer(json.dumps(long).encode()))
    proxy = await start(streaming={"max_answer_bytes": 1024})

    async with proxy.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "answer_too_large"

    assert (await proxy.ledger.next())["error"] == "answer_too_large"
