"""A scripted upstream on a real socket: it plays bytes, pauses, resets and statuses exactly as a test writes them.

A *play* is an async function that gets the request and the wire to answer on. `FakeUpstream.plays` sets what the next
requests meet, one play each; the last one is played again for all that follow.

    async with FakeUpstream() as upstream:
        upstream.plays(refuse(400, "stream"), stream(role(), text("Hi"), finish()))
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class Received:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """The connection a request came on, to answer on as one likes. `asked` is how many came on it until now."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_open: bool = True
    asked: int = 0

    async def send(self, data: bytes) -> None:
        """These very bytes, in a segment of their own."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, **headers: str) -> None:
        """A status line and headers; `content_type="…"` is written `content-type: …`. The body is chunked unless said."""
        if "content_length" not in headers and headers.pop("framing", "chunked") == "chunked":
            headers["transfer_encoding"] = "chunked"
        lines = [
            f"HTTP/1.1 {status} Whatever",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        """A chunk of a chunked body, sent at once."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """The end of a chunked body."""
        await self.send(b"0\r\n\r\n")

    async def close(self) -> None:
        self.is_open = False
        self.writer.close()

    async def reset(self) -> None:
        """Break the connection with a TCP reset."""
        self.is_open = False
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the other side has closed the connection."""
        self.is_open = False
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Play = Callable[[Received, Wire], Awaitable[None]]


@dataclass
class FakeUpstream:
    """A server on a free port of the loopback, or on a Unix socket. `url` is its base URL; `requests` what it was asked."""

    tls: ssl.SSLContext | None = None
    unix_socket: Path | None = None
    requests: list[Received] = field(default_factory=list)
    connections: int = 0

    async def __aenter__(self) -> FakeUpstream:
        self._plays: list[Play] = [stream(role(), text("Hello"), finish(), usage())]
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = asyncio.Condition()
        self.port = 0
        if self.unix_socket is not None:
            self._server = await asyncio.start_unix_server(self._connected, self.unix_socket, ssl=self.tls, limit=2**26)
        else:
            self._server = await asyncio.start_server(
                self._connected, "127.0.0.1", 0, ssl=self.tls, limit=2**26, backlog=2048
            )
            self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def plays(self, *plays: Play) -> None:
        self._plays = list(plays)

    async def asked(self, times: int) -> None:
        """Wait until that many chat requests (and others, but not the list of models) have arrived in all."""
        async with asyncio.timeout(20), self._asked:
            await self._asked.wait_for(lambda: len(self.requests) >= times)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            while wire.is_open and (request := await _read_request(reader)) is not None:
                if request.path.endswith("/models"):
                    await models("model-a", "model-b")(request, wire)
                    continue
                wire.asked += 1
                self.requests.append(request)
                async with self._asked:
                    self._asked.notify_all()
                play = self._plays.pop(0) if len(self._plays) > 1 else self._plays[0]
                await play(request, wire)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, path, headers, body)


# ---------------------------------------------------------------------- what upstreams say


def chunk(
    delta: dict[str, Any] | None = None, *, finish_reason: str | None = None, index: int = 0, **more: Any
) -> bytes:
    """An event in OpenAI's exact form. `more` adds members to the chunk, or with None takes them away."""
    value: dict[str, Any] = {
        "id": "chatcmpl-up",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "model-a",
        "choices": [{"index": index, "delta": delta if delta is not None else {}, "finish_reason": finish_reason}],
    }
    value |= more
    return event({name: part for name, part in value.items() if part is not None})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def role(index: int = 0) -> bytes:
    return chunk({"role": "assistant", "content": ""}, index=index)


def text(content: str, index: int = 0) -> bytes:
    return chunk({"content": content}, index=index)


def finish(reason: str = "stop", index: int = 0) -> bytes:
    return chunk({}, finish_reason=reason, index=index)


def usage(prompt: int = 7, completion: int = 2) -> bytes:
    return chunk(
        choices=[],
        usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    )


DONE = b"data: [DONE]\n\n"

COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-up",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "model-a",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hello there, friend."}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11},
}


# ---------------------------------------------------------------------- plays


def stream(*events: bytes, done: bool = True, content_type: str = "text/event-stream") -> Play:
    """A whole stream: each of `events` in a chunk of its own, then `[DONE]`, then the end of the body."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type=content_type)
        for data in events:
            await wire.chunk(data)
        if done:
            await wire.chunk(DONE)
        await wire.end()

    return play


def answer(value: Any = COMPLETION, status: int = 200, content_type: str = "application/json", **headers: str) -> Play:
    """One body: JSON of `value`, or `value` itself when it is bytes."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(status, content_type=content_type, content_length=str(len(body)), **headers)
        await wire.send(body)

    return play


def refuse(
    status: int, param: str | None = None, message: str = "Unsupported value", code: str = "unsupported_value"
) -> Play:
    """An error in OpenAI's envelope."""
    return answer(
        {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}, status
    )


def models(*names: str) -> Play:
    return answer({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "fake"} for name in names]})


async def echo(request: Received, wire: Wire) -> None:
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


class Silence:
    """A stream that says `events` and then nothing, until the other side closes; with `head=False` not even its head.

    `begun` is set when all was said, `left` when the other side has closed the connection.
    """

    def __init__(self, *events: bytes, head: bool = True, content_type: str = "text/event-stream") -> None:
        self._events = events
        self._head = head
        self._content_type = content_type
        self.begun = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, request: Received, wire: Wire) -> None:
        if self._head:
            await wire.head(content_type=self._content_type)
        for data in self._events:
            await wire.chunk(data)
        self.begun.set()
        await wire.gone()
        self.left.set()

    async def is_heard(self) -> None:
        """Wait until all was said."""
        async with asyncio.timeout(20):
            await self.begun.wait()

    async def is_left(self) -> None:
        """Wait until the other side has closed the connection."""
        async with asyncio.timeout(20):
            await self.left.wait()


async def pause(seconds: float) -> None:
    """A silence of that length: a part of what an upstream plays, never a way to wait for something."""
    await asyncio.sleep(seconds)
