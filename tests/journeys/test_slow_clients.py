"""Clients that read slowly, or not at all: the upstream waits with them, and nobody else does.

The slow client is a plain socket with a small receive buffer. What the kernel holds on the way (some megabytes) is
the only thing between it and the upstream, besides the proxy's own buffers, which this is about.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    DONE,
    FakeUpstream,
    Received,
    Silence,
    Wire,
    answer,
    finish,
    pause,
    role,
    stream,
    text,
    usage,
)

_LONG = 40
_MB = 2**20
_MOST_IN_BUFFERS = 16 * _MB
_WORDS = "and so on and so forth " * 2800  # 64 KB


class SlowClient:
    """A connection on which an answer was asked for, and which reads only when told to."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._buffer = b""

    async def ask(self, path: str = "/v1/chat/completions", **members: Any) -> None:
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **members}
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
        await self._loop.sock_sendall(self._connection, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def read(self, size: int = 16_384) -> bytes:
        """The next bytes of the answer with its framing; empty when the proxy has closed the connection."""
        async with asyncio.timeout(_LONG):
            try:
                return await self._loop.sock_recv(self._connection, size)
            except ConnectionError:
                return b""

    async def read_body(self, size: int = 16_384) -> bytes:
        """The whole body, without its framing, read in pieces of at most `size` bytes."""
        raw = bytearray()
        while not raw.endswith(b"\r\n0\r\n\r\n"):
            part = await self.read(size)
            assert part, "the answer was cut short"
            raw += part
        _, _, rest = bytes(raw).partition(b"\r\n\r\n")
        body = []
        position = 0
        while size_of_chunk := int(rest[position : (end := rest.index(b"\r\n", position))], 16):
            body.append(rest[end + 2 : end + 2 + size_of_chunk])
            position = end + 2 + size_of_chunk + 2
        return b"".join(body)


@asynccontextmanager
async def slow_client(proxy: Proxy) -> AsyncIterator[SlowClient]:
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        yield SlowClient(connection)


def is_same(one: bytes | str, other: bytes | str) -> bool:
    """Whether they are equal; pytest would take minutes to show where megabytes differ."""
    return one == other


class Flood:
    """A stream of that many megabytes, as fast as it is taken. `sent` counts the bytes that were.

    It tells its tokens, when it comes to that: counting those of megabytes takes longer than sending them.
    """

    def __init__(self, megabytes: int) -> None:
        self._events = [text(f"{number:06} {_WORDS}") for number in range(megabytes * 16)]
        self.body = role() + b"".join(self._events) + finish() + DONE
        self.sent = 0

    async def __call__(self, request: Received, wire: Wire) -> None:
        connection = wire.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        await wire.head(content_type="text/event-stream")
        for data in [role(), *self._events, finish(), usage(), DONE]:
            await wire.chunk(data)
            self.sent += len(data)
        await wire.end()


async def test_a_client_that_reads_nothing_stops_the_upstream_and_is_dropped_in_the_end(
    start: Start, upstream: FakeUpstream
) -> None:
    """Memory stays flat whoever does not read (https://github.com/IBM/mcp-context-forge/issues/1682,
    https://github.com/OpenCTI-Platform/opencti/issues/13908)."""
    flood = Flood(60)
    upstream.plays(flood)
    proxy = await start(streaming={"send_timeout_s": 1.5})
    async with slow_client(proxy) as client:
        await client.ask()
        row = await proxy.ledger.next()
        assert 0 < flood.sent < _MOST_IN_BUFFERS

        read = b""
        while part := await client.read(2**20):
            read += part
    assert not read.endswith(b"0\r\n\r\n"), "a client must be able to tell that its answer was cut"
    assert b"[DONE]" not in read[-100:]
    assert (row["status"], row["http_status"], row["estimated"]) == ("cancelled", 499, True)
    async with proxy.get("/ready") as response:
        assert (await response.json())["in_flight"] == 0


async def test_other_clients_are_served_while_one_reads_nothing(upstream: FakeUpstream, proxy: Proxy) -> None:
    flood = Flood(60)
    upstream.plays(flood, stream(role(), text("Hello"), finish(), usage()))
    async with slow_client(proxy) as client:
        await client.ask()
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        for _ in range(40):
            assert await proxy.stream(seed=1) == role() + text("Hello") + finish() + DONE
            assert (await proxy.ledger.next())["status"] == "ok"
        assert 0 < flood.sent < _MOST_IN_BUFFERS


async def test_no_limit_of_the_upstream_runs_while_the_client_is_waited_for(
    start: Start, upstream: FakeUpstream
) -> None:
    """The client reads nothing for several times the idle timeout, and then everything."""
    flood = Flood(20)

    async def slow_answer(request: Received, wire: Wire) -> None:
        await pause(1.5)
        await answer()(request, wire)

    upstream.plays(flood, slow_answer)
    proxy = await start(streaming={"idle_timeout_s": 0.4})
    async with slow_client(proxy) as client:
        await client.ask()
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        await proxy.ask(seed=1)  # Meanwhile another call takes its 1.5 seconds.
        assert (await proxy.ledger.next())["mode"] == "whole"
        assert flood.sent < _MOST_IN_BUFFERS
        assert is_same(await client.read_body(2**20), flood.body)
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_behind_a_slow_client_the_idle_timer_starts_anew(start: Start, upstream: FakeUpstream) -> None:
    """What the client could not take yet is no silence; what the upstream does not say afterwards is."""
    events = [text(f"{number:06} {_WORDS}") for number in range(20 * 16)]
    silence = Silence(role(), *events)
    upstream.plays(silence)
    proxy = await start(streaming={"idle_timeout_s": 0.4})
    async with slow_client(proxy) as client:
        await client.ask()
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        body = await client.read_body(2**20)
    said = role() + b"".join(events)
    assert is_same(body[: len(said)], said)
    assert json.loads(body[len(said) + 6 :])["error"]["code"] == "idle_timeout"
    assert (await proxy.ledger.next())["error"] == "idle_timeout"


async def test_a_client_that_reads_a_little_at_a_time_gets_every_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    flood = Flood(12)
    upstream.plays(flood)
    async with slow_client(proxy) as client:
        await client.ask()
        assert is_same(await client.read_body(4096), flood.body)
    row = await proxy.ledger.next()
    assert (row["status"], row["mode"]) == ("ok", "relay")


async def test_a_slow_client_gets_every_byte_of_a_stream_made_of_one_body(upstream: FakeUpstream, proxy: Proxy) -> None:
    words = " ".join(f"word{number}" for number in range(50_000))
    whole = {
        "id": "chatcmpl-up",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "model-a",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": "stop"}],
    }
    upstream.plays(answer(whole))
    async with slow_client(proxy) as client:
        await client.ask()
        row = await proxy.ledger.next()
        assert (row["status"], row["mode"]) == ("ok", "synthesis"), "the upstream has done its part"
        body = await client.read_body(65_536)
    chunks = [json.loads(raw[6:]) for raw in body.removesuffix(DONE).split(b"\n\n") if raw]
    assert is_same("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks), words)


async def test_pings_do_not_pile_up_for_a_client_that_reads_nothing(start: Start, upstream: FakeUpstream) -> None:
    flood = Flood(30)
    upstream.plays(flood)
    proxy = await start(streaming={"heartbeat_interval_s": 0.001, "send_timeout_s": 1.0})
    async with slow_client(proxy) as client:
        await client.ask()
        assert (await proxy.ledger.next())["status"] == "cancelled"
        read = b""
        while part := await client.read(2**20):
            read += part
    assert flood.sent < _MOST_IN_BUFFERS
    events = read.split(b"\r\n\r\n", 1)[1]
    assert events.count(b": ping\n\n") < 100


# ---------------------------------------------------------------------- routes that are passed on


class _Download:
    """A body of that many megabytes that is no chat. `sent` counts the bytes that were taken."""

    def __init__(self, megabytes: int) -> None:
        self._parts = [b"%06d " % number + _WORDS.encode() for number in range(megabytes * 16)]
        self.body = b"".join(self._parts)
        self.sent = 0

    async def __call__(self, request: Received, wire: Wire) -> None:
        connection = wire.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        await wire.head(content_type="application/octet-stream")
        for part in self._parts:
            await wire.chunk(part)
            self.sent += len(part)
        await wire.end()


async def test_a_slow_client_of_a_route_that_is_passed_on_gets_every_byte(start: Start, upstream: FakeUpstream) -> None:
    download = _Download(30)

    async def slow_answer(request: Received, wire: Wire) -> None:
        await pause(1.5)
        await answer()(request, wire)

    upstream.plays(download, slow_answer)
    proxy = await start(streaming={"idle_timeout_s": 0.4})
    async with slow_client(proxy) as client:
        await client.ask("/v1/audio/speech")
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        await proxy.ask()
        assert (await proxy.ledger.next())["mode"] == "whole"
        assert 0 < download.sent < _MOST_IN_BUFFERS
        assert is_same(await client.read_body(2**20), download.body)
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"]) == ("passthrough", "ok")


async def test_a_client_that_reads_nothing_of_a_route_that_is_passed_on_is_dropped_too(
    start: Start, upstream: FakeUpstream
) -> None:
    download = _Download(60)
    upstream.plays(download)
    proxy = await start(streaming={"send_timeout_s": 1.0})
    async with slow_client(proxy) as client:
        await client.ask("/v1/audio/speech")
        row = await proxy.ledger.next()
        assert download.sent < _MOST_IN_BUFFERS
        while await client.read(2**20):
            pass
    assert (row["mode"], row["status"], row["http_status"]) == ("passthrough", "cancelled", 499)
