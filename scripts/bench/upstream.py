"""The scripted upstream: answers any POST with what the `bench_*` fields of its body ask for (see `answer.Plan`).

It must cost much less than any contestant, or it would be what is measured: a bare protocol on uvloop that writes
bytes built beforehand. Every event is its own HTTP chunk and its own write, and the loop turns between two writes, so
a stream is many small packets, as a model's is, and not one large one.

`GET /served` says how many POSTs were answered, so that the benchmark notices an answer that came from a cache.

Run: `python upstream.py`; prints `listening on http://127.0.0.1:PORT` and serves until it is terminated.
"""

import asyncio
import gc
import json
import time
from typing import cast

import httptools
import uvloop

import answer

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Served:
    """How many POSTs have been answered by all connections together."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other, never pipelined."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._frames: tuple[bytes, ...] = ()
        self._stamp: tuple[bytes, bytes] | None = None
        self._position = 0
        self._plan = answer.Plan(0)
        self._is_paused = False
        self._is_held = False
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

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
        self._body = []

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._send_json(b'{"served":%d}' % self._served.count)
            return
        self._served.count += 1
        request = json.loads(b"".join(self._body))
        plan = self._plan = answer.from_fields(request)
        if not plan.stream:
            self._send_json(answer.completion(plan.chunks, plan.size))
            return
        usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self._frames = answer.frames(plan.chunks, plan.size, usage)
        self._stamp = answer.stamp_frame(usage) if plan.stamp else None
        self._position = 0
        self._transport.write(_STREAM_HEAD)
        if plan.first_ms:
            self._timer = self._loop.call_later(plan.first_ms / 1000, self._step)
        else:
            self._timer = self._loop.call_soon(self._step)

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
            self._transport.write(stamp.join(self._stamp))
        else:
            self._transport.write(self._frames[position])
        self._position = position + 1
        if self._position == len(self._frames):
            self._timer = None
        elif plan.gap_ms and is_token and position < plan.chunks and position % plan.burst == 0:
            self._timer = self._loop.call_later(plan.gap_ms / 1000, self._step)
        else:
            self._timer = self._loop.call_soon(self._step)


async def serve() -> None:
    """Serve on a free loopback port until the process is ended."""
    # A collection in the middle of a stream would show as a late chunk; nothing here makes cycles by the chunk.
    gc.disable()
    served = Served()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(served), "127.0.0.1", 0, backlog=4096)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
