"""The scripted upstream: answers any POST with what the `bench_*` fields of its body ask for (see `answer.Plan`).

It must cost much less than any contestant, or it would be what is measured: a bare protocol on uvloop that writes
bytes built beforehand. Every event is its own HTTP chunk and its own write, and the loop turns between two writes, so
a stream is many small packets, as a model's is, and not one large one.

`GET /served` says how many POSTs were answered, so that the benchmark notices an answer that came from a cache. Of an
answer whose plan is `watched` more can be asked, by its request's `bench_call`: `GET /begun/CALL` is answered when its
request has come, `GET /sent/CALL` with the bytes that have been taken from here so far, and `GET /ended/CALL` when it is
over, with the time at which the connection was found to be closed or reset. The send buffer of a watched answer is small
(it would swallow megabytes on loopback), so that what has left it has been taken by the other side.

Run: `python upstream.py`; prints `listening on http://127.0.0.1:PORT` and serves until it is terminated.
"""

import asyncio
import fcntl
import gc
import json
import socket
import struct
import termios
import time
from collections import defaultdict
from typing import cast

import httptools
import uvloop

import answer

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

# Smaller still, and a kernel that delays its acknowledgements by 40 ms would take it in sips, without a standstill.
_WATCHED_SEND_BUFFER = 65_536


class Watched:
    """What is known of one watched answer. `left_ns`: CLOCK_MONOTONIC when the other side was found to have left; 0 when
    the answer went out to its end."""

    __slots__ = ("begun", "ended", "left_ns", "transport", "written")

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.left_ns = 0
        self.written = 0
        self.transport: asyncio.Transport | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WATCHED_SEND_BUFFER)
        self.transport = transport
        self.begun.set()

    def end(self, left_ns: int) -> None:
        if not self.ended.is_set():
            self.left_ns = left_ns
            self.ended.set()

    def sent(self) -> int:
        """Bytes that the other side's kernel has acknowledged; everything, once the connection is gone."""
        if self.transport is None or self.transport.is_closing():
            return self.written
        connection = self.transport.get_extra_info("socket")
        # What waits in the kernel, sent or not, and was not acknowledged (tcp(7), SIOCOUTQ, which is TIOCOUTQ).
        (in_kernel,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
        return self.written - self.transport.get_write_buffer_size() - int(in_kernel)


class Calls:
    """What all connections together know: how many POSTs were answered, and the watched answers by their call."""

    __slots__ = ("served", "watched")

    def __init__(self) -> None:
        self.served = 0
        self.watched: defaultdict[str, Watched] = defaultdict(Watched)


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other, never pipelined."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._watched: Watched | None = None
        self._question: asyncio.Task[None] | None = None
        self._frames: tuple[bytes, ...] = ()
        self._stamp: tuple[bytes, bytes] | None = None
        self._position = 0
        self._plan = answer.Plan(0)
        self._is_paused = False
        self._is_held = False
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def eof_received(self) -> None:
        self._note_left()

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_left()
        if self._timer is not None:
            self._timer.cancel()
        if self._question is not None:
            self._question.cancel()

    def _note_left(self) -> None:
        if self._watched is not None:
            self._watched.end(time.monotonic_ns())

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._is_held:
            self._is_held = False
            self._step()

    def on_message_begin(self) -> None:
        self._url = b""
        self._body = []

    def on_url(self, piece: bytes) -> None:
        self._url += piece

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._question = self._loop.create_task(self._tell(self._url.decode()))
            return
        self._calls.served += 1
        request = json.loads(b"".join(self._body))
        plan = self._plan = answer.from_fields(request)
        if not plan.stream:
            self._send_json(answer.completion(plan.chunks, plan.size))
            return
        self._watched = self._calls.watched[request["bench_call"]] if plan.watched else None
        if self._watched is not None:
            self._watched.begin(self._transport)
        usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self._frames = answer.frames(plan.chunks, plan.size, usage)
        self._stamp = answer.stamp_frame(usage) if plan.stamp else None
        self._position = 0
        self._transport.write(_STREAM_HEAD)
        if plan.first_ms:
            self._timer = self._loop.call_later(plan.first_ms / 1000, self._step)
        else:
            self._timer = self._loop.call_soon(self._step)

    async def _tell(self, path: str) -> None:
        """Answer a GET, when there is an answer to it."""
        _, topic, *call = path.split("/")
        if topic == "served":
            self._send_json(b'{"served":%d}' % self._calls.served)
            return
        watched = self._calls.watched[call[0]]
        if topic == "begun":
            await watched.begun.wait()
        elif topic == "ended":
            await watched.ended.wait()
        self._send_json(b'{"sent":%d,"left_ns":%d}' % (watched.sent(), watched.left_ns))

    def _send_json(self, body: bytes) -> None:
        self._transport.write(_JSON_HEAD % len(body) + body)

    def _step(self) -> None:
        """Write the next event and see to it that the one after it follows."""
        if self._is_paused:
            self._is_held = True
            return
        position = self._position
        plan = self._plan
        is_token = 1 <= position <= plan.chunks
        if self._stamp is not None and is_token:
            stamp = str(time.monotonic_ns()).rjust(answer.STAMP_DIGITS, "0").encode()
            frame = stamp.join(self._stamp)
        else:
            frame = self._frames[position]
        self._transport.write(frame)
        if self._watched is not None:
            self._watched.written += len(frame)
        self._position = position + 1
        if self._position == len(self._frames):
            self._timer = None
            if self._watched is not None:
                self._watched.end(0)
                self._watched = None
        elif plan.gap_ms and is_token and position < plan.chunks and position % plan.burst == 0:
            self._timer = self._loop.call_later(plan.gap_ms / 1000, self._step)
        else:
            self._timer = self._loop.call_soon(self._step)


async def serve() -> None:
    """Serve on a free loopback port until the process is ended."""
    # A collection in the middle of a stream would show as a late chunk; nothing here makes cycles by the chunk.
    gc.disable()
    calls = Calls()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(calls), "127.0.0.1", 0, backlog=4096)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
