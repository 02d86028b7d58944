"""The client's side of HTTP: framing for every kind of client, kept connections, and what goes out in one write."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy import __version__
from proxy.chat import Outcome
from proxy.server import jobs
from proxy.server.app import make_app, opened_ledger, parts, state_of
from proxy.server.connection import ClientConnection, Runner
from proxy.server.door import Door
from proxy.server.openai import WAY
from proxy.settings import Settings
from tests.conftest import Proxy, Start, make_settings
from tests.fakes.client import Client, chat, question, request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Wire,
    answer,
    echo,
    event,
    finish,
    pause,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_slow_clients import slow_client

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
    wrong = event({"error": {"message": "No.", "code": "invalid_request"}})
    upstream.plays(stream(*_EVENTS[:2], wrong), stream(*_EVENTS, usage()))
    raw.ask(stream=True)
    await raw.head()
    body = await raw.chunked_body()
    assert b'"code":"invalid_request"' in body
    raw.ask(stream=True)
    await raw.head()
    assert await raw.chunked_body() == _BODY


async def test_a_refused_stream_leaves_the_connection_of_use(upstream: FakeUpstream, raw: Raw) -> None:
    upstream.plays(refuse(400), stream(*_EVENTS, usage()))
    raw.ask(stream=True)
    status, headers = await raw.head()
    assert status.startswith("HTTP/1.1 400 ")
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
    upstream.plays(echo)
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
    upstream.plays(echo)
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
        await echo(request, wire)

    upstream.plays(echo)
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


# ---------------------------------------------------------------------- heads, writes, and what is not taken


@pytest.mark.parametrize("status", [200, 429, 529])
@pytest.mark.parametrize("wants_stream", [False, True])
async def test_every_answer_says_when_and_by_whom(
    upstream: FakeUpstream, raw: Raw, status: int, wants_stream: bool
) -> None:
    """RFC 9110 §6.6.1. Of 529, which Anthropic has made up (https://docs.anthropic.com/en/api/errors), no phrase is known;
    there may be none (RFC 9112 §4)."""
    upstream.plays(echo if status == 200 else refuse(status))
    before = int(time.time())
    raw.ask(stream=wants_stream)
    line, headers = await raw.head()
    phrase = {200: "OK", 429: "Too Many Requests", 529: ""}[status]
    assert line == f"HTTP/1.1 {status} {phrase}"
    assert headers["server"] == f"headwater/{__version__}"
    assert before <= parsedate_to_datetime(headers["date"]).timestamp() <= time.time()
    assert headers["date"].endswith(" GMT")


class Recorder(asyncio.Transport):
    """A transport that keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_begun = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        self.is_begun.set()

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def abort(self) -> None: ...


@asynccontextmanager
async def recorded(settings: Settings) -> AsyncIterator[tuple[ClientConnection, Recorder, asyncio.Queue[Outcome]]]:
    """A connection to a proxy whose other end is a recorder, and the calls that were settled."""
    outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
    async with opened_ledger(settings) as ledger, parts(settings, outcomes.put_nowait) as made:
        state = state_of(settings, made, ledger, outcomes.put_nowait)
        door = Door(state, WAY, *jobs.ways())
        runner = Runner(make_app(state), door, access_log=None)
        await runner.setup()
        connection = runner.server()  # type: ignore[misc]
        assert isinstance(connection, ClientConnection)
        recorder = Recorder()
        connection.connection_made(recorder)
        yield connection, recorder, outcomes
        connection.connection_lost(None)
        await runner.cleanup()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("comes", ["at once", "in two parts"])
async def test_the_first_events_leave_with_the_head_and_the_last_with_the_end(
    tmp_path: Path, upstream: FakeUpstream, comes: str
) -> None:
    """Each write is a system call, and for most answers a packet."""
    first, last = role() + text("Hello"), finish() + usage() + DONE
    may_go_on = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        if comes == "at once":
            await wire.send(_chunk(first + last) + b"0\r\n\r\n")
        else:
            await wire.chunk(first)
            await may_go_on.wait()
            await wire.send(_chunk(last) + b"0\r\n\r\n")

    upstream.plays(play)
    async with recorded(make_settings(tmp_path, upstream.url)) as (connection, recorder, outcomes):
        connection.data_received(chat(stream=True))
        async with asyncio.timeout(_LONG):
            await recorder.is_begun.wait()
            may_go_on.set()
            await outcomes.get()
    head, _, body = recorder.writes[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    if comes == "at once":
        assert [body] == [_chunk(role() + text("Hello") + finish() + DONE) + b"0\r\n\r\n"]
        assert len(recorder.writes) == 1
    else:
        assert body == _chunk(first)
        assert recorder.writes[1:] == [_chunk(finish() + DONE) + b"0\r\n\r\n"]


async def test_a_whole_answer_and_an_error_are_one_write_each(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(answer(), refuse(400))
    async with recorded(make_settings(tmp_path, upstream.url)) as (connection, recorder, outcomes):
        for number in range(1, 3):
            connection.data_received(chat())
            async with asyncio.timeout(_LONG):
                await outcomes.get()
            assert len(recorder.writes) == number
    assert recorder.writes[0].startswith(b"HTTP/1.1 200 ")
    assert recorder.writes[1].startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_a_client_that_does_not_take_the_last_bytes_is_cut_off_too(
    start: Start, upstream: FakeUpstream, wants_stream: bool
) -> None:
    """The upstream has done its part, and the answer waits in our memory."""
    words = "and so on and so forth " * (70_000 if wants_stream else 700_000)  # About 16 MB on the wire.
    choice = {"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": "stop"}

    async def slow_answer(request: Received, wire: Wire) -> None:
        await pause(1.2)
        await answer()(request, wire)

    upstream.plays(answer({**COMPLETION, "choices": [choice]}), slow_answer)
    proxy = await start(streaming={"send_timeout_s": 0.4})
    async with slow_client(proxy) as client:
        await client.ask(stream=wants_stream)
        assert (await proxy.ledger.next())["status"] == "ok"
        await proxy.ask()  # Meanwhile the time is over.
        read = bytearray()
        while part := await client.read(2**20):
            read += part
    assert read.startswith(b"HTTP/1.1 200 ")
    assert not read.endswith((b"}", b"\r\n0\r\n\r\n")), "a client must be able to tell that its answer was cut"


_TOO_LONG = 2**20


@pytest.fixture
async def small(start: Start) -> AsyncIterator[Client]:
    """A client of a proxy that takes half a megabyte."""
    proxy = await start(server={"max_body_mb": 0.5, "drain_s": 60})
    client = await Client.to(proxy.port)
    yield client
    client.close()


async def test_a_connection_is_of_use_behind_a_refused_body_that_was_sent_all_the_same(
    upstream: FakeUpstream, small: Client
) -> None:
    """A client that is still sending when the connection closes may lose the answer (RFC 9112 §9.6)."""
    upstream.plays(echo)
    small.send(request("POST /v1/chat/completions", f"Content-Length: {_TOO_LONG}"))
    assert (await small.answer()).status == 413
    for _ in range(16):
        small.send(bytes(_TOO_LONG // 16))
    small.send(chat("next"))
    assert (await small.answer()).said() == "answer to next"


@pytest.mark.parametrize("framing", [f"Content-Length: {_TOO_LONG}", "Transfer-Encoding: chunked"])
async def test_a_client_that_breaks_off_a_refused_body_leaves_nothing_behind(
    upstream: FakeUpstream, small: Client, framing: str
) -> None:
    """Else the proxy would wait for it when it stops."""
    small.send(request("POST /v1/chat/completions", framing))
    small.send(_chunk(bytes(_TOO_LONG - 1000)) if "chunked" in framing else b"half of it")
    assert (await small.answer()).status == 413
    small.reset()


async def test_a_client_that_never_sends_the_rest_of_a_refused_body_is_left(small: Client) -> None:
    """After ten seconds, and it is not heard before."""
    small.send(request("POST /v1/chat/completions", f"Content-Length: {_TOO_LONG}"))
    assert (await small.answer()).status == 413
    small.send(request("GET /health"))
    assert await small.rest() == b""


async def test_a_body_in_chunks_that_comes_at_once_is_measured_too(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"max_body_mb": 0.01})
    client = await Client.to(proxy.port)
    body = question("x" * 20_000)
    client.send(request("POST /v1/chat/completions", "Transfer-Encoding: chunked") + _chunk(body) + b"0\r\n\r\n")
    assert (await client.answer()).status == 413
    assert upstream.requests == []
    client.close()


async def test_an_http_1_0_client_is_never_told_to_go_on(upstream: FakeUpstream, proxy: Proxy) -> None:
    """RFC 9110 §10.1.1: what it expects is not heard, also when its body comes late."""
    upstream.plays(echo)
    client = await Client.to(proxy.port)
    body = question()
    head = request("POST /v1/chat/completions HTTP/1.0", "Expect: 100-continue", f"Content-Length: {len(body)}")
    client.send(head)
    async with proxy.get("/health"):
        pass  # Meanwhile the head was read.
    client.send(body)
    assert (await client.heard(b"\r\n")).endswith(b" 200 OK\r\n")
    client.close()
