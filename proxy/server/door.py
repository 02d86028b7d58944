"""The door: what a request goes through that is taken from its connection, before its face sees it.

Each kind of requests that it opens to is a `Way`; all others are aiohttp's.

The same as the middleware does for aiohttp's routes, by the same functions: an id, admission, who asks, one place where an error
becomes a response. And its body, which is mostly there with its head, and else is waited for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import HttpVersion11
from aiohttp.streams import StreamReader

from proxy.errors import ClientError
from proxy.server.connection import ClientConnection
from proxy.server.downstream import SERVER, Downstream, error_response
from proxy.server.middleware import Visit, admit, failure_of, identify, report_left, report_refused, visit_of
from proxy.server.state import State

_SLASHES = re.compile("/+")

Later = Callable[[], Coroutine[Any, Any, None]]

Face = Callable[[State, Visit, RawRequestMessage, bytes, Downstream], Later | None]
"""Starts the answer to a request, whose body is all there: at once, or when what it returns was called and awaited."""


class Way(NamedTuple):
    """Requests that the door opens to: those by a method for a path, or for all paths that fit a pattern.

    A pattern is matched against the whole path, in which of the percent-encoded characters only `/` and `%` still are.
    """

    method: str
    path: str | re.Pattern[str]
    face: Face


class Door:
    """Takes requests to the faces of its ways."""

    def __init__(self, state: State, *ways: Way) -> None:
        self._state = state
        self._faces = {(way.method, way.path): way.face for way in ways if isinstance(way.path, str)}
        self._patterns = [(way.method, way.path, way.face) for way in ways if not isinstance(way.path, str)]
        self._max_body_bytes = int(state.settings.server.max_body_mb * 1024 * 1024)
        self._send_timeout_s = state.settings.streaming.send_timeout_s

    def is_for(self, message: RawRequestMessage) -> bool:
        return self._face_of(message) is not None

    def _face_of(self, message: RawRequestMessage) -> Face | None:
        method = message.method
        if (face := self._faces.get((method, message.path))) is not None:
            return face
        # The target may be a whole URL too, or be percent-encoded where it need not be (RFC 9112 §3.2). And a slash too many
        # is a common slip, as of a base URL that ends with one.
        if (face := self._faces.get((method, _SLASHES.sub("/", message.url.path).rstrip("/")))) is not None:
            return face
        path = message.url.path_safe
        return next((face for by, fits, face in self._patterns if by == method and fits.fullmatch(path)), None)

    def take(self, connection: ClientConnection, message: RawRequestMessage, payload: StreamReader) -> None:
        """Answer one request."""
        state, headers = self._state, message.headers
        started = state.now()
        visit = visit_of(headers)
        state.in_flight.hold()
        down = Downstream(connection, message, payload, state.tasks, self._send_timeout_s, state.in_flight.release)
        down.headers = visit.headers
        try:
            admit(state, visit, message.path, headers)
            identify(state, visit, headers)
            down.is_for_team = visit.identity.has_key
            self._check(int(headers.get("Content-Length", 0)))
            # A client of HTTP/1.0 cannot expect anything (RFC 9110 §10.1.1).
            if "Expect" in headers and message.version >= HttpVersion11:
                if headers["Expect"].lower() != "100-continue":
                    raise ClientError(417, "expectation_failed", "Of all expectations only 100-continue can be met.")
                if not payload.is_eof():
                    down.send_continue()
            if payload.is_eof():
                body = payload.read_nowait(-1)
                self._check(len(body))
                later = self._answer(visit, message, body, down)
                if later is None:
                    return
                work = self._wait(down, visit, message, started, later)
            else:
                work = self._receive(down, visit, message, started, payload)
            # It may be cancelled before its first turn, and then nothing in it is done.
            down.receive(work).add_done_callback(partial(self._received, visit, started))
        except Exception as error:
            self._refuse(down, visit, message, error, started)

    def unsound(self) -> web.Response:
        """The answer to what is no request of HTTP, or has too long a head: nobody knows for whom it is."""
        words = "This is no HTTP request that can be understood, or its address or a header is too long."
        response = error_response(ClientError(400, "invalid_request", words))
        response.headers["Server"] = SERVER
        return response

    def _received(self, visit: Visit, started: float, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            report_left(self._state, visit, started)

    def _answer(self, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> Later | None:
        face = self._face_of(message)
        assert face is not None
        return face(self._state, visit, message, body, down)

    async def _wait(
        self, down: Downstream, visit: Visit, message: RawRequestMessage, started: float, later: Later
    ) -> None:
        """See a face to its end that has to wait for something before its answer can start."""
        try:
            await later()
        except Exception as error:
            self._refuse(down, visit, message, error, started)

    async def _receive(
        self, down: Downstream, visit: Visit, message: RawRequestMessage, started: float, payload: StreamReader
    ) -> None:
        """Read a body that comes in pieces."""
        parts: list[bytes] = []
        size = 0
        try:
            while part := await self._next_part(payload):
                parts.append(part)
                size += len(part)
                self._check(size)
            if (later := self._answer(visit, message, b"".join(parts), down)) is not None:
                await later()
        except Exception as error:
            self._refuse(down, visit, message, error, started)

    async def _next_part(self, payload: StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                return await payload.readany()
        except TimeoutError:
            words = f"Nothing of the body came for {self._send_timeout_s:g} s."
            raise ClientError(408, "request_timeout", words) from None

    def _check(self, body_bytes: int) -> None:
        if body_bytes > self._max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_body_bytes, body_bytes)

    def _refuse(
        self, down: Downstream, visit: Visit, message: RawRequestMessage, error: Exception, started: float
    ) -> None:
        failure = failure_of(error, self._state, visit, f"{message.method} {message.url.path}")
        report_refused(self._state, visit, failure, started)
        down.refuse(failure)
