"""The client's side of HTTP: framing for every kind of client, kept connections, and what is relied on in aiohttp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.http_writer import StreamWriter

from tests.conftest import Proxy
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Wire,
    answer,
    finish,
    pause,
    refuse,
    role,
    stream,
    text,
    usage,
)

_LONG = 15
_EVENTS = [role(), text("Hello"), text(" there"), finish()]
_BODY = b"".join(_EVENTS) + DONE


class Raw:
    """A connection, for requests written by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, version: str = "1.1", *headers: str, method: str = "POST", path: str = "", **members: Any) -> None:
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], **members}
        data = json.dumps(body).encode() if method == "POST" else b""
        lines = [f"{method} {path or '/v1/chat/completions'} HTTP/{version}", "Host: proxy", *headers]
        if data:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + data)

    async def head(self) -> tuple[str, dict[str, str]]:
        """Status line and headers of the next answer, names in lower case."""
        async with asyncio.timeout(_LONG):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        return first, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    async def chunked_body(self) -> bytes:
        parts = []
        async with asyncio.timeout(_LONG):
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                parts.append(await self.reader.readexactly(size))
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        return b"".join(parts)

    async def rest(self) -> bytes:
        """Everything until the proxy closes the connection."""
        async with asyncio.timeout(_LONG):
            return await self.reader.read()


@pytest.fixture
async def raw(proxy: Proxy) -> AsyncIterator[Raw]:
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    connection = Raw(*await asyncio.open_connection("127.0.0.1", port))
    yield connection
    connection.writer.close()


# ---------------------------------------------------------------------- framing


async def test_a_stream_is_chunked_and_the_connection_is_kept(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(stream(*_EVENTS, usage()))
    for _ in range(3):
        raw.ask(stream=True)
        status, headers = await raw.head()
        assert status == "HTTP/1.1 200 OK"
        assert headers["transfer-encoding"] == "chunked"
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache, no-transform"
        assert headers["x-accel-buffering"] == "no"
        assert "content-length" not in headers
        assert "content-encoding" not in headers
        assert await raw.chunked_body() == _BODY


async def test_a_whole_answer_has_its_length(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(answer())
    for _ in range(3):
        raw.ask()
        _, headers = await raw.head()
        assert "transfer-encoding" not in headers
        async with asyncio.timeout(_LONG):
            assert json.loads(await raw.reader.readexactly(int(headers["content-length"]))) == COMPLETION


async def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection(upstream: FakeUpstream, raw: Raw) -> None:
    """It knows nothing of chunks (RFC 9112 §6.1)."""
    may_go_on = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(_EVENTS[0] + _EVENTS[1])
        await may_go_on.wait()
        await wire.chunk(_EVENTS[2])
        await wire.chunk(_EVENTS[3] + usage())
        await wire.chunk(DONE)
        await wire.end()

    upstream.plays(play)
    raw.ask("1.0", stream=True)
    status, headers = await raw.head()
    assert status.endswith(" 200 OK")
    assert "transfer-encoding" not in headers
    async with asyncio.timeout(_LONG):
        begun = await raw.reader.readuntil(_EVENTS[1])
    may_go_on.set()
    assert begun + await raw.rest() == _BODY


async def test_an_http_1_0_client_gets_a_whole_answer(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(answer())
    raw.ask("1.0")
    _, headers = await raw.head()
    assert "transfer-encoding" not in headers
    assert json.loads(await raw.rest()) == COMPLETION


async def test_an_http_1_0_client_that_keeps_its_connection_knows_where_a_stream_ends(
    upstream: FakeUpstream, raw: Raw
) -> None:
    upstream.plays(stream(*_EVENTS, usage()))
    raw.ask("1.0", "Connection: keep-alive", stream=True)
    _, headers = await raw.head()
    assert headers.get("connection") != "keep-alive"
    assert await raw.rest() == _BODY


async def test_a_client_that_asks_for_it_has_its_connection_closed(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(stream(*_EVENTS, usage()))
    raw.ask("1.1", "Connection: close", stream=True)
    _, headers = await raw.head()
    assert headers["connection"] == "close"
    assert await raw.chunked_body() == _BODY
    assert await raw.rest() == b""


async def test_an_error_event_ends_a_body_that_is_framed_to_its_end(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(stream(*_EVENTS[:2], done=False), stream(*_EVENTS, usage()))
    raw.ask(stream=True)
    await raw.head()
    body = await raw.chunked_body()
    assert b'"code":"upstream_broke"' in body
    raw.ask(stream=True)
    await raw.head()
    assert await raw.chunked_body() == _BODY


async def test_a_refused_stream_leaves_the_connection_of_use(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(refuse(429), stream(*_EVENTS, usage()))
    raw.ask(stream=True)
    status, headers = await raw.head()
    assert status.startswith("HTTP/1.1 429 ")
    async with asyncio.timeout(_LONG):
        await raw.reader.readexactly(int(headers["content-length"]))
    raw.ask(stream=True)
    assert (await raw.head())[0] == "HTTP/1.1 200 OK"
    assert await raw.chunked_body() == _BODY


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/v1/models/model-a", "/nowhere"])
async def test_head_is_get_without_the_body(raw: Raw, path: str) -> None:
    raw.ask(method="GET", path=path)
    status, headers = await raw.head()
    size = int(headers["content-length"])
    async with asyncio.timeout(_LONG):
        await raw.reader.readexactly(size)

    raw.ask(method="HEAD", path=path)
    assert (await raw.head())[0] == status
    raw.ask(method="GET", path="/health")  # If there was a body, it would stand where this answer is looked for.
    assert (await raw.head())[0] == "HTTP/1.1 200 OK"


async def test_head_of_a_route_that_is_passed_on_has_no_body(upstream: FakeUpstream, raw: Raw) -> None:
    async def play(request: Received, wire: Wire) -> None:
        assert request.method == "HEAD"
        await wire.head(content_type="application/octet-stream", content_length="1000000")

    upstream.plays(play)
    for _ in range(2):
        raw.ask(method="HEAD", path="/v1/files/file-1/content")
        status, headers = await raw.head()
        assert status == "HTTP/1.1 200 OK"
        assert headers["content-type"] == "application/octet-stream"
    raw.ask(method="GET", path="/health")
    assert (await raw.head())[0] == "HTTP/1.1 200 OK"
    assert upstream.connections <= 2


async def test_requests_that_come_all_at_once_are_answered_in_order(upstream: FakeUpstream, raw: Raw) -> None:
    """Pipelining (RFC 9112 §9.3.2)."""
    upstream.plays(_echo)
    for number in range(5):
        raw.ask(stream=number % 2 == 0, messages=[{"role": "user", "content": f"question {number}"}])
    for number in range(5):
        _, headers = await raw.head()
        if number % 2 == 0:
            said = _content(await raw.chunked_body())
        else:
            async with asyncio.timeout(_LONG):
                body = await raw.reader.readexactly(int(headers["content-length"]))
            said = json.loads(body)["choices"][0]["message"]["content"]
        assert said == f"answer to question {number}"


async def test_a_body_in_chunks_and_a_client_that_waits_for_a_100(upstream: FakeUpstream, raw: Raw) -> None:
    body = json.dumps({"model": "model-a", "messages": [{"role": "user", "content": "Hi"}]}).encode()
    raw.writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (await raw.head())[0] == "HTTP/1.1 100 Continue"
    upstream.plays(answer())
    for part in (body[:10], body[10:]):
        raw.writer.write(b"%x\r\n%b\r\n" % (len(part), part))
    raw.writer.write(b"0\r\n\r\n")
    assert (await raw.head())[0] == "HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "words",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n"],
)
async def test_what_is_no_http_is_a_400_and_nobodys_failure(proxy: Proxy, raw: Raw, words: bytes) -> None:
    raw.writer.write(words)
    assert (await raw.head())[0].startswith(("HTTP/1.0 400 ", "HTTP/1.1 400 "))
    async with proxy.get("/health") as response:
        assert response.status == 200


# ---------------------------------------------------------------------- connections


async def _echo(request: Received, wire: Wire) -> None:
    """Answers every question with its own words, in two events or in one body."""
    body = request.json()
    question = body["messages"][-1]["content"]
    if body.get("stream"):
        await stream(role(), text("answer to "), text(question), finish(), usage())(request, wire)
    else:
        message = {"role": "assistant", "content": f"answer to {question}"}
        await answer({**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})(
            request, wire
        )


def _content(body: bytes) -> str:
    chunks = [json.loads(raw[6:]) for raw in body.removesuffix(DONE).split(b"\n\n") if raw]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def _ask(proxy: Proxy, number: int) -> None:
    question = f"question {number}"
    messages = [{"role": "user", "content": question}]
    async with asyncio.timeout(_LONG):
        if number % 3:
            body = await proxy.stream(messages=messages)
            assert body.endswith(DONE)
            assert _content(body) == f"answer to {question}"
        else:
            completion = await proxy.ask(messages=messages)
            assert completion["choices"][0]["message"]["content"] == f"answer to {question}"


async def test_200_calls_one_after_the_other_use_the_same_connections(upstream: FakeUpstream, proxy: Proxy) -> None:
    """A connection that was not read to its end cannot be used again: stopping at `[DONE]` costs a handshake per call
    (https://github.com/tensorzero/tensorzero/issues/5363)."""
    upstream.plays(_echo)
    for number in range(200):
        await _ask(proxy, number)
    # One for the list of models, which was asked for at the start, and one for the calls.
    assert upstream.connections <= 2
    assert {(await proxy.ledger.next())["status"] for _ in range(200)} == {"ok"}


async def test_the_end_that_comes_behind_done_is_waited_for(upstream: FakeUpstream, proxy: Proxy) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(b"".join(_EVENTS) + usage() + DONE)
        await pause(0.02)
        await wire.end()

    upstream.plays(play)
    for _ in range(5):
        assert await proxy.stream() == _BODY
        await proxy.ledger.next()
    assert upstream.connections <= 2


async def test_100_calls_at_once_are_not_mixed_up(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Nor does one wait for another's connection (https://github.com/BerriAI/litellm/issues/22346)."""
    all_here = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        if len(upstream.requests) >= 100:
            all_here.set()
        await all_here.wait()
        await _echo(request, wire)

    upstream.plays(_echo)
    await _ask(proxy, 1)  # Now it is known that the model streams.
    await proxy.ledger.next()
    upstream.requests.clear()
    upstream.plays(play)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        proxy.client, own = client, proxy.client
        await asyncio.gather(*(_ask(proxy, number) for number in range(100)))
        proxy.client = own
    rows = [await proxy.ledger.next() for _ in range(100)]
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["id"] for row in rows}) == 100

    used = upstream.connections
    for number in range(50):
        await _ask(proxy, number)
    assert upstream.connections == used


# ---------------------------------------------------------------------- what is relied on in aiohttp


class _LateHead(web.StreamResponse):
    _send_headers_immediately = False


async def test_what_is_relied_on_in_aiohttp_is_there() -> None:
    """`StreamResponse.prepare` returns the payload writer, with a transport to write to, a protocol that knows when it
    is full, and `chunked` and `drain`; a response that asks for it sends its head with its first bytes; and a write
    that need not drain is through at once."""
    seen: dict[str, Any] = {}

    def is_full(writer: StreamWriter) -> bool:
        return writer.protocol.writing_paused

    async def handler(request: web.Request) -> web.StreamResponse:
        response = _LateHead()
        writer = await response.prepare(request)
        assert isinstance(writer, StreamWriter)
        seen["chunked"] = writer.chunked
        seen["is_full"] = is_full(writer)
        assert writer.transport is not None
        assert not writer.transport.is_closing()
        seen["before"] = writer.output_size
        with pytest.raises(StopIteration):
            writer.write(b"first", drain=False).send(None)
        seen["after"] = writer.output_size
        writer.transport.write(b"6\r\nsecond\r\n")
        async with asyncio.timeout(_LONG):
            await writer.drain()
            while not is_full(writer):
                writer.transport.write(b"%x\r\n%b\r\n" % (65_536, bytes(65_536)))
            await writer.drain()
        seen["is_full_again"] = is_full(writer)
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{runner.addresses[0][1]}/") as response,
    ):
        body = await response.read()
    await runner.cleanup()

    assert body.startswith(b"firstsecond\0")
    assert seen.pop("after") > seen["before"]
    assert seen == {"chunked": True, "is_full": False, "before": 0, "is_full_again": False}
