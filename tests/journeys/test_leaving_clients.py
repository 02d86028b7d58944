"""Clients that leave: the upstream is told at once, the ledger says what was given, and nothing is left behind.

The clients here are plain sockets, because a client library may close its connection politely and late.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Silence,
    Wire,
    answer,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.waiting import until

_LONG = 20


class Client:
    """One connection to the proxy, and three ways of leaving it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def ask(self, path: str = "/v1/chat/completions", **members: Any) -> None:
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], **members}
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def hears(self, wanted: bytes) -> bytes:
        async with asyncio.timeout(_LONG):
            return await self._reader.readuntil(wanted)

    def closes(self) -> None:
        self._writer.close()

    def resets(self) -> None:
        """As the kernel does for a program that was killed with unread data."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Client]:
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def nothing_is_left(proxy: Proxy) -> None:
    """No call is in flight, and the ledger has no further row."""
    async with proxy.get("/ready") as response:
        assert await response.json() == {"status": "ready", "in_flight": 0}
    assert proxy.ledger.is_empty()


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_a_failure(caplog: pytest.LogCaptureFixture) -> Any:
    """A client that leaves is no failure of anybody's."""
    yield
    failures = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not failures, [record.getMessage() for record in failures]


_LEAVING: dict[str, Callable[[Client], None]] = {"closing": Client.closes, "resetting": Client.resets}


@pytest.fixture(params=_LEAVING)
def leave(request: pytest.FixtureRequest) -> Callable[[Client], None]:
    return _LEAVING[request.param]


async def test_leaving_in_mid_answer_ends_the_upstreams_work_at_once(
    upstream: FakeUpstream, proxy: Proxy, leave: Callable[[Client], None]
) -> None:
    """An upstream that is not told goes on generating, and is paid for it
    (https://github.com/maximhq/bifrost/issues/3164); and what was relayed was given
    (https://github.com/BerriAI/litellm/issues/30630)."""
    silence = Silence(role(), text("Hello "), text("there"))
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask(stream=True)
        await client.hears(b"there")
        leave(client)
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["mode"]) == ("cancelled", 499, "relay")
    assert (row["estimated"], row["completion_tokens"], row["error"]) == (True, 2, None)
    assert row["prompt_tokens"] > 0
    assert row["ttft_ms"] is not None
    await nothing_is_left(proxy)


async def test_leaving_before_the_first_byte(
    upstream: FakeUpstream, proxy: Proxy, leave: Callable[[Client], None]
) -> None:
    """While nothing is written to it, a client's leaving shows in nothing but its closed connection
    (https://github.com/aio-libs/aiohttp/issues/5693, https://github.com/maximhq/bifrost/issues/7106)."""
    silence = Silence(head=False)
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask(stream=True)
        await silence.is_heard()
        leave(client)
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["attempts"]) == ("cancelled", 499, 1)
    assert (row["ttft_ms"], row["prompt_tokens"], row["completion_tokens"]) == (None, None, None)
    await nothing_is_left(proxy)


async def test_leaving_while_the_first_events_are_held_back(upstream: FakeUpstream, proxy: Proxy) -> None:
    silence = Silence(role())
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask(stream=True)
        await silence.is_heard()
        client.closes()
        await silence.is_left()

    assert (await proxy.ledger.next())["status"] == "cancelled"
    await nothing_is_left(proxy)


async def test_leaving_between_pings(start: Start, upstream: FakeUpstream) -> None:
    silence = Silence(head=False)
    upstream.plays(silence)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with connected(proxy) as client:
        client.ask(stream=True)
        await client.hears(b": ping\n\n")
        client.closes()
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("cancelled", 499)
    await nothing_is_left(proxy)


async def test_leaving_a_call_for_one_whole_answer(
    upstream: FakeUpstream, proxy: Proxy, leave: Callable[[Client], None]
) -> None:
    """https://github.com/BerriAI/litellm/issues/37140"""
    silence = Silence(head=False)
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask()
        await silence.is_heard()
        leave(client)
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("cancelled", 499)
    await nothing_is_left(proxy)


async def test_leaving_while_half_of_a_whole_answer_has_come(upstream: FakeUpstream, proxy: Proxy) -> None:
    silence = Silence(b'{"id": "chatcmpl-', content_type="application/json")
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask(stream=True)
        await silence.is_heard()
        client.closes()
        await silence.is_left()

    assert (await proxy.ledger.next())["status"] == "cancelled"
    await nothing_is_left(proxy)


@pytest.mark.parametrize("is_head_sent", [False, True])
async def test_leaving_a_route_that_is_passed_on(upstream: FakeUpstream, proxy: Proxy, is_head_sent: bool) -> None:
    silence = Silence(event({"type": "response.created"}), head=is_head_sent) if is_head_sent else Silence(head=False)
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask("/v1/responses", input="Hi", stream=True)
        await silence.is_heard()
        if is_head_sent:
            await client.hears(b"response.created")
        client.closes()
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["http_status"]) == ("passthrough", "cancelled", 499)
    await nothing_is_left(proxy)


async def test_leaving_behind_the_finish_reason(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Everything was said, and yet not that it was everything."""
    silence = Silence(role(), text("Hello"), finish())
    upstream.plays(silence)
    async with connected(proxy) as client:
        client.ask(stream=True)
        await client.hears(finish())
        client.closes()
        await silence.is_left()

    row = await proxy.ledger.next()
    assert row["completion_tokens"] > 0
    await nothing_is_left(proxy)


async def test_leaving_while_the_second_target_is_waited_for(start: Start, upstream: FakeUpstream) -> None:
    """No attempt is made for somebody who has gone (https://github.com/QuantumNous/new-api/issues/4184)."""
    silence = Silence(head=False)
    upstream.plays(refuse(404), silence, stream(role(), text("Third"), finish()))
    alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up/model-b", "up/model-c"]'
    proxy = await start(more=alias)
    async with connected(proxy) as client:
        client.ask(model="alias", stream=True)
        await silence.is_heard()
        client.closes()
        await silence.is_left()

    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"]) == ("cancelled", "up/model-b", 2)
    await nothing_is_left(proxy)
    assert [request.json()["model"] for request in upstream.requests] == ["model-a", "model-b"]


async def test_a_refusal_that_comes_when_the_client_has_gone_leads_to_nothing(
    start: Start, upstream: FakeUpstream
) -> None:
    """The upstream refuses to stream, at the very moment at which nobody wants to know any more."""
    has_left = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await has_left.wait()
        await refuse(400, "stream")(request, wire)

    upstream.plays(play, answer())
    proxy = await start()
    async with connected(proxy) as client:
        client.ask(stream=True)
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        client.resets()
        row = await proxy.ledger.next()
        has_left.set()

    assert (row["status"], row["attempts"]) == ("cancelled", 1)
    await nothing_is_left(proxy)
    assert b"Hello" in await proxy.stream()
    assert len(upstream.requests) == 2
    assert upstream.requests[1].json()["stream"] is True, "nothing was learned from an answer that nobody read"


async def in_flight(proxy: Proxy) -> int:
    async with proxy.get("/ready") as response:
        count: int = (await response.json())["in_flight"]
        return count


async def test_leaving_while_another_call_finds_out_whether_the_target_streams(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    may_answer = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await may_answer.wait()
        await stream(role(), text("Hello"), finish(), usage())(request, wire)

    upstream.plays(play)
    first = asyncio.create_task(proxy.stream())
    async with asyncio.timeout(_LONG):
        await upstream.asked(1)
    async with connected(proxy) as client:
        client.ask(stream=True, seed=1)
        await until(lambda: in_flight(proxy), lambda count: count == 2)
        client.closes()
        row = await proxy.ledger.next()
    may_answer.set()

    assert (row["status"], row["attempts"]) == ("cancelled", 0)
    assert (await first).endswith(DONE)
    assert (await proxy.ledger.next())["status"] == "ok"
    assert len(upstream.requests) == 1


async def test_a_client_that_leaves_takes_nobody_with_it(upstream: FakeUpstream, proxy: Proxy) -> None:
    leaving = Silence(role(), text("Hello"))
    may_end = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Still "))
        await may_end.wait()
        await wire.chunk(text("here") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(leaving, play)
    async with connected(proxy) as one, connected(proxy) as other:
        one.ask(stream=True)
        await one.hears(b"Hello")
        other.ask(stream=True, seed=1)
        await other.hears(b"Still ")
        one.resets()
        await leaving.is_left()
        assert (await proxy.ledger.next())["status"] == "cancelled"
        may_end.set()
        await other.hears(DONE)

    assert (await proxy.ledger.next())["status"] == "ok"


async def test_the_next_call_is_answered_as_ever(upstream: FakeUpstream, proxy: Proxy) -> None:
    for _ in range(5):
        silence = Silence(role(), text("Hello"))
        upstream.plays(silence, answer())
        async with connected(proxy) as client:
            client.ask(stream=True)
            await client.hears(b"Hello")
            client.resets()
            await silence.is_left()
        assert (await proxy.ledger.next())["status"] == "cancelled"
        assert await proxy.ask() == COMPLETION
        assert (await proxy.ledger.next())["status"] == "ok"
    await nothing_is_left(proxy)


async def test_half_a_request_makes_no_call(upstream: FakeUpstream, proxy: Proxy) -> None:
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 500\r\n\r\n" + b'{"model": "mo')
    await writer.drain()
    async with proxy.get("/health") as response:
        assert response.status == 200
    writer.transport.abort()
    await proxy.ask()

    assert (await proxy.ledger.next())["status"] == "ok"
    await nothing_is_left(proxy)
    assert len(upstream.requests) == 1
