"""The client's connection: answers written as they come, in one transport write per read of the upstream.

`StreamResponse.write` is a coroutine and can only be awaited; the log pushes by plain calls. So the body is framed here
and written to the transport that `StreamResponse.prepare` hands out. What this leans on in aiohttp is public but
unpromised: `prepare` returns the payload writer, with `transport`, `protocol.writing_paused`, `chunked`, `drain`, and a
`write` that does not wait when told not to drain; a test holds it to that, and to the one private name, `_LateHead`'s.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

from aiohttp import web
from aiohttp.http_writer import HttpVersion11, StreamWriter

from proxy.answerlog import AnswerLog, Reader
from proxy.errors import ProxyError
from proxy.wire.encoding import dumps
from proxy.wire.headers import STREAM_HEADERS


class _LateHead(web.StreamResponse):
    """A response whose head waits for its first bytes, so that both leave in one write, as aiohttp does for `Response`."""

    _send_headers_immediately = False


class StreamSink:
    """A client that reads a stream. Bytes to a connection that is closing go nowhere, without a word."""

    __slots__ = ("_has_head", "_is_chunked", "_protocol", "_transport", "_writer")

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._protocol = writer.protocol
        self._transport = writer.transport
        self._is_chunked = writer.chunked
        self._has_head = False

    def write(self, segment: bytes) -> bool:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if self._has_head:
                transport.write(b"%x\r\n%b\r\n" % (len(segment), segment) if self._is_chunked else segment)
            else:
                self._has_head = True
                # A coroutine that has nothing to wait for: it joins the head to these bytes, and is through at once.
                with suppress(StopIteration):
                    self._writer.write(segment, drain=False).send(None)
        return not self._protocol.writing_paused

    async def drained(self) -> None:
        await self._writer.drain()


async def send_stream(
    request: web.Request, log: AnswerLog, reader: Reader, send_timeout_s: float
) -> web.StreamResponse:
    """Send a log as an event stream, from its first event to its end. Raises its failure while there is no status yet.

    A client that takes nothing for `send_timeout_s` is cut off.
    """
    await log.wait_opened()
    response = _LateHead(headers={**STREAM_HEADERS, **log.headers})
    if request.version < HttpVersion11:
        # No chunks there: only the end of the connection says where the stream ends.
        response.force_close()
    writer = cast(StreamWriter, await response.prepare(request))
    try:
        await reader.deliver(StreamSink(writer), send_timeout_s)
    except TimeoutError:
        cut(request)
        raise asyncio.CancelledError from None
    await response.write_eof()
    return response


async def send_whole(log: AnswerLog) -> web.Response:
    """A log as one JSON body, when it is closed. Raises its failure."""
    await log.wait_closed()
    return web.Response(body=log.whole, content_type="application/json", headers=log.headers)


def cut(request: web.Request) -> None:
    """End the connection in mid-answer: the only way to say, behind the status, that the rest is missing."""
    if request.transport is not None:
        request.transport.abort()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=dumps(value), status=status, content_type="application/json", headers=headers)


def error_response(error: ProxyError) -> web.Response:
    """An error as OpenAI's envelope, with whose fault it is in a header."""
    headers = {"x-headwater-error-source": error.source}
    if error.retry_after is not None:
        headers["Retry-After"] = error.retry_after
    return json_response(error.envelope(), error.status, headers)
