"""Answers on their way to the client: heads, framing, errors as bodies, and the end of each.

A stream's bytes are framed and written to the client's transport inside the call that brings them, head and first
events in one write, last events and the end in one write. Heads are put together from parts that are prepared once.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from http.client import responses
from typing import Any

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import HttpVersion11
from aiohttp.streams import StreamReader

from proxy import __version__
from proxy.answerlog import AnswerLog, BodyReader, Sink
from proxy.answerlog import StreamReader as LogReader
from proxy.answers import Seat
from proxy.errors import ProxyError
from proxy.server.connection import ClientConnection
from proxy.tasks import LONG_WORK_BYTES, Tasks
from proxy.wire.encoding import dumps
from proxy.wire.headers import STREAM_HEADERS, header_lines

SERVER = f"headwater/{__version__}"

# What a refused client still sends is read for so long, so that it gets to read our answer before a reset.
_LINGER_S = 10.0


def _first_part(status: int, headers: Mapping[str, str]) -> bytes:
    # An upstream's status may be one that nobody has registered.
    phrase = responses.get(status, "")
    return f"HTTP/1.1 {status} {phrase}\r\nServer: {SERVER}\r\n".encode() + header_lines(headers)


_STREAM_HEAD = _first_part(200, STREAM_HEADERS)
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_LENGTH = b"Content-Length: %d\r\n"
_JSON = {"Content-Type": "application/json"}
_JSON_HEAD = _first_part(200, _JSON)
_CLOSE = b"Connection: close\r\n"
_KEEP_ALIVE = b"Connection: keep-alive\r\n"

# How most chunks begin (RFC 9112 §7.1): formatting the size takes longer than all else that is done to a chunk here.
_SIZE_LINES = tuple(b"%x\r\n" % size for size in range(4096))

_date = (0, b"")


def _date_line() -> bytes:
    """The `Date` header (RFC 9110 §6.6.1), made anew once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(now)).encode())
    return _date[1]


# What is said of the operator's account at an upstream: what is left of it, and whose it is. And of the cache, the number of
# the entry: they are counted over all teams.
_OF_ALL_TEAMS = re.compile(r"rate-?limit|^(openai-(organization|project)|anthropic-organization|x-cache-entry)")


def for_team(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Of an answer's headers those that tell a team nothing of the others."""
    hidden = _of_all_teams(tuple(headers))
    return {name: value for name, value in headers.items() if name not in hidden} if hidden else headers


@lru_cache(maxsize=256)
def _of_all_teams(names: tuple[str, ...]) -> frozenset[str]:
    # An upstream's answers nearly always have the same.
    return frozenset(name for name in names if _OF_ALL_TEAMS.search(name.lower()))


class Downstream:
    """The answer to one request that was taken from a connection: a log's stream, its one body, or an error.

    `headers` go out with it, whatever it is; of the log's own, what is for a team where `is_for_team` is set. `on_over` is
    called once, when it is written or cannot be written any more.
    A client that takes nothing for `send_timeout_s` is cut off.
    """

    __slots__ = (
        "_connection",
        "_is_chunked",
        "_is_ended",
        "_is_full",
        "_is_http11",
        "_keeps_alive",
        "_log",
        "_needs_head",
        "_on_over",
        "_opening",
        "_payload",
        "_reader",
        "_send_timeout_s",
        "_shape",
        "_task",
        "_tasks",
        "_timer",
        "_transport",
        "headers",
        "is_for_team",
    )

    def __init__(
        self,
        connection: ClientConnection,
        message: RawRequestMessage,
        payload: StreamReader,
        tasks: Tasks,
        send_timeout_s: float,
        on_over: Callable[[], None],
    ) -> None:
        self._connection = connection
        transport = connection.transport
        assert transport is not None
        self._transport = transport
        self._is_chunked = self._is_http11 = message.version >= HttpVersion11
        self._keeps_alive = not message.should_close
        self._payload = None if payload.is_eof() else payload
        self._tasks = tasks
        self._send_timeout_s = send_timeout_s
        self._on_over = on_over
        self._log: AnswerLog | None = None
        self._reader: LogReader | BodyReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._needs_head = True
        self._is_ended = False
        self._is_full = False
        self._opening = b""
        self._shape: Callable[[bytes], bytes] | None = None
        self.headers: dict[str, str] = {}
        self.is_for_team = False
        connection.begin(self)

    # What is to be answered: one of these.

    def receive(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work`, which waits for the rest of the request, before the answer; it ends when the client leaves."""
        self._task = self._tasks.spawn(work, "receive")
        return self._task

    def send_continue(self) -> None:
        """Tell the client to send its body (RFC 9110 §10.1.1)."""
        self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def stream(self, seat: Seat, *, wants_usage: bool, opening: bytes = b"") -> None:
        """Deliver the answer as an event stream, as it grows, behind a comment that opens it."""
        self._log = seat.log
        self._opening = opening
        self._read_by(LogReader(seat.log, self, seat.leave, wants_usage=wants_usage))

    def whole(self, seat: Seat, shape: Callable[[bytes], bytes] | None = None) -> None:
        """Deliver the answer as one body, when it is whole; or what `shape` makes of it, here or in another thread."""
        self._log = seat.log
        self._shape = shape
        self._read_by(BodyReader(seat.log, self._send_whole, seat.leave))

    def rest(self, log: AnswerLog, on_left: Callable[[], object], *, wants_usage: bool, after: int) -> None:
        """Deliver what follows the log's `after`-th event, as an event stream in which each has its number for an id."""
        self._log = log
        sink = _Numbering(self, after)
        self._read_by(LogReader(log, sink, on_left, wants_usage=wants_usage, after=after))

    def nothing(self) -> None:
        """Answer that there is nothing, in no words."""
        self._send(_first_part(204, {}), b"")

    def _read_by(self, reader: LogReader | BodyReader) -> None:
        # The log may have been at its end, and the answer sent while the reader was made.
        if not self._is_ended:
            self._reader = reader

    def refuse(self, error: ProxyError) -> None:
        """Answer with an error."""
        status, headers, body = error_parts(error)
        self._send(_first_part(status, headers) + _LENGTH % len(body), body)

    def _told(self, log: AnswerLog) -> bytes:
        return header_lines(for_team(log.headers) if self.is_for_team else log.headers)

    # As the log's sink.

    def write(self, segment: bytes) -> bool:
        transport = self._transport
        if self._needs_head:
            self._needs_head = False
            transport.write(self._stream_head() + self._frame(self._opening + segment))
        elif self._is_chunked and len(segment) < len(_SIZE_LINES):
            transport.write(_SIZE_LINES[len(segment)] + segment + b"\r\n")
        else:
            transport.write(self._frame(segment))
        return not self._is_full

    def end(self, last: bytes) -> None:
        if self._needs_head:
            last = self._opening + last
        tail = self._frame(last) if last else b""
        if self._is_chunked:
            tail += b"0\r\n\r\n"
        if self._needs_head:
            self._needs_head = False
            tail = self._stream_head() + tail
        if tail:
            self._transport.write(tail)
        self._finish()

    def _frame(self, segment: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(segment), segment) if self._is_chunked else segment

    def _stream_head(self) -> bytes:
        assert self._log is not None
        if self._is_chunked:
            framing = _CHUNKED if self._keeps_alive else _CHUNKED + _CLOSE
        else:
            # No chunks there: only the end of the connection says where the stream ends.
            self._keeps_alive = False
            framing = _CLOSE
        lines = header_lines(self.headers) + self._told(self._log)
        return b"%b%b%b%b\r\n" % (_STREAM_HEAD, framing, _date_line(), lines)

    # One body.

    def _send_whole(self) -> None:
        log = self._log
        assert log is not None
        if log.failure is not None:
            self.refuse(log.failure)
            return
        assert log.whole is not None
        if self._shape is None:
            self._send_body(log, log.whole)
        elif len(log.whole) < LONG_WORK_BYTES:
            self._send_body(log, self._shape(log.whole))
        else:
            # The reader is at its end already.
            self._is_ended = True
            self._task = self._tasks.spawn(self._send_shaped(log, log.whole, self._shape), "shape an answer")

    async def _send_shaped(self, log: AnswerLog, whole: bytes, shape: Callable[[bytes], bytes]) -> None:
        self._send_body(log, await asyncio.to_thread(shape, whole))

    def _send_body(self, log: AnswerLog, body: bytes) -> None:
        self._send(_JSON_HEAD + _LENGTH % len(body) + self._told(log), body)

    def _send(self, first_part: bytes, body: bytes) -> None:
        connection = b""
        if not self._keeps_alive:
            connection = _CLOSE
        elif not self._is_http11:
            connection = _KEEP_ALIVE
        lines = header_lines(self.headers)
        self._transport.write(b"%b%b%b%b\r\n%b" % (first_part, connection, _date_line(), lines, body))
        self._finish()

    # The end, and what comes between.

    def broken(self) -> None:
        """The rest of the request's body will never come."""
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(web.RequestPayloadError("The body is malformed."))

    def filled(self) -> None:
        """There is no room in the transport any more. A client that leaves it so for too long is cut off."""
        self._is_full = True
        self._timer = asyncio.get_running_loop().call_later(self._send_timeout_s, self._connection.cut)

    def drained(self) -> None:
        """There is room in the transport again."""
        self._is_full = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_ended:
            self._hand_back()
        elif isinstance(self._reader, LogReader):
            self._reader.resume()

    def lost(self) -> None:
        """The client has gone."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if not self._is_ended and self._reader is not None:
            self._reader.leave()
        self._on_over()

    def _finish(self) -> None:
        """Everything is written; see it go out, and the rest of the request come in, before the next one is answered."""
        self._is_ended = True
        self._reader = None
        if not self._is_full:
            self._hand_back()

    def _hand_back(self) -> None:
        if self._payload is not None and not self._payload.is_eof():
            self._task = self._tasks.spawn(self._linger(self._payload), "linger")
            return
        self._on_over()
        self._connection.answered(keeps_alive=self._keeps_alive)

    async def _linger(self, payload: StreamReader) -> None:
        """Read and forget what a refused client still sends, for a while: a reset would take our answer from it."""
        try:
            async with asyncio.timeout(_LINGER_S):
                while await payload.readany():
                    continue
        except (TimeoutError, web.RequestPayloadError):
            self._keeps_alive = False
        self._payload = None
        self._hand_back()


class _Numbering:
    """Gives each event on its way to a sink its number in the whole answer, as a browser's EventSource remembers it
    (WHATWG HTML §9.2.6)."""

    __slots__ = ("_number", "_sink")

    def __init__(self, sink: Sink, after: int) -> None:
        self._sink = sink
        self._number = after

    def write(self, segment: bytes) -> bool:
        return self._sink.write(self._numbered(segment))

    def end(self, last: bytes) -> None:
        self._sink.end(self._numbered(last))

    def refuse(self, error: ProxyError) -> None:
        self._sink.refuse(error)

    def _numbered(self, segment: bytes) -> bytes:
        out: list[bytes] = []
        for event in segment.split(b"\n\n")[:-1]:
            if not event.startswith(b":"):
                self._number += 1
                out.append(b"id: %d\n" % self._number)
            out += (event, b"\n\n")
        return b"".join(out)


def error_parts(error: ProxyError) -> tuple[int, dict[str, str], bytes]:
    """An error as status, headers and body: OpenAI's envelope, and in a header whose fault it is."""
    headers = {**_JSON, "x-headwater-error-source": error.source}
    if error.retry_after is not None:
        headers["Retry-After"] = error.retry_after
    return error.status, headers, dumps(error.envelope())


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=dumps(value), status=status, content_type="application/json")


def error_response(error: ProxyError) -> web.Response:
    status, headers, body = error_parts(error)
    return web.Response(body=body, status=status, headers=headers)


def cut(request: web.Request) -> None:
    """End the connection in mid-answer: the only way to say, behind the status, that the rest is missing."""
    if request.transport is not None:
        request.transport.abort()
