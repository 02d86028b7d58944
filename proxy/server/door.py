"""The door: what a request goes through that is taken from its connection, before its face sees it.

It opens to POST requests for one path, and to GET requests for the paths that begin with another.

The same as the middleware does for aiohttp's routes, by the same functions: an id, admission, who asks, one place where an error
becomes a response. And its body, which is mostly there with its head, and else is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import HttpVersion11
from aiohttp.streams import StreamReader

from proxy.errors import ClientError
from proxy.server.connection import ClientConnection
from proxy.server.downstream import Downstream
from proxy.server.middleware import Visit, admit, failure_of, report_refused, visit_of
from proxy.server.state import State

Face = Callable[[State, Visit, RawRequestMessage, bytes, Downstream], None]
"""Starts the answer to a request, whose body is all there."""


class Door:
    """Takes `POST path` to `post`, and `GET prefix…` to `get`."""

    def __init__(self, state: State, path: str, post: Face, prefix: str, get: Face) -> None:
        self._state = state
        self._path = path
        self._post = post
        self._prefix = prefix
        self._get = get
        self._max_body_bytes = int(state.settings.server.max_body_mb * 1024 * 1024)
        self._send_timeout_s = state.settings.streaming.send_timeout_s

    def is_for(self, message: RawRequestMessage) -> bool:
        # The target may be a whole URL too, or be percent-encoded where it need not be (RFC 9112 §3.2).
        if message.method == "POST":
            return message.path == self._path or message.url.path == self._path
        return message.method == "GET" and message.url.path.startswith(self._prefix)

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
            visit.identity = state.auth.identify(headers)
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
                self._answer(visit, message, body, down)
                return
            down.receive(self._receive(down, visit, message, started, payload))
        except Exception as error:
            self._refuse(down, visit, message, error, started)

    def _answer(self, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> None:
        face = self._post if message.method == "POST" else self._get
        face(self._state, visit, message, body, down)

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
            self._answer(visit, message, b"".join(parts), down)
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
