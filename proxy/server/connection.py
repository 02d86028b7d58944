"""A client's connection: aiohttp's own, with a door for the requests that have to be cheap.

aiohttp accepts connections, parses and checks requests, keeps connections alive, and answers most routes. For a small
answer its objects (request, match, response, writer) and the two tasks it wakes for each request cost twice what all the
rest of a call does, so requests for the door are taken here, as soon as they are parsed, and answered by plain calls.

Requests of one connection are answered in their order, whoever answers them: what was parsed waits in a queue of ours, and
goes on, one at a time, to the door or to aiohttp's task.

This is the one place that leans on what aiohttp does not promise: `RequestHandler`'s queue of parsed messages and the future
its task waits on while idle, its keep-alive timer and its pausing; `AppRunner._make_server`. setup.cfg pins the
versions it was read for, and a test fails with any other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

# Behind a request for one of these aiohttp's parser takes nothing for a request any more; other offers it ignores.
_SWITCHING = ("websocket", "tcp")


class Answering(Protocol):
    """Whoever answers a request that was taken; ends with `ClientConnection.answered`, unless it is told of a loss."""

    def lost(self) -> None:
        """The client has gone: nothing can be sent any more."""
        ...

    def broken(self) -> None:
        """What came was no part of a request: if the body was still to come, it never will."""
        ...

    def filled(self) -> None:
        """There is no room in the transport any more."""
        ...

    def drained(self) -> None:
        """There is room in the transport again."""
        ...


class Door(Protocol):
    """Takes the requests that it opens to."""

    def is_for(self, message: RawRequestMessage) -> bool: ...

    def take(self, connection: ClientConnection, message: RawRequestMessage, payload: StreamReader) -> None:
        """Answer the request, beginning with `ClientConnection.begin`. Its body is there, or still comes."""
        ...

    def unsound(self) -> web.Response:
        """The answer to what is no request of HTTP."""
        ...


class ClientConnection(RequestHandler):
    """One client's connection. Requests for the door go there and nowhere else."""

    __slots__ = ("_answering", "_door", "_idle", "_queue")

    def __init__(self, manager: web.Server, door: Door, **options: Any) -> None:
        self._idle: asyncio.Future[None] | None = None
        self._queue: deque[Any] | None = None
        self._answering: Answering | None = None
        self._door = door
        super().__init__(manager, **options)

    # For whoever answers.

    def begin(self, answering: Answering) -> None:
        """To be called first."""
        self._answering = answering

    def answered(self, *, keeps_alive: bool) -> None:
        """The answer is sent: the next request may come, or the connection closes."""
        self._answering = None
        if not keeps_alive or self._close:
            self.force_close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._queue:
            self._loop.call_soon(self._next)

    def cut(self) -> None:
        """End the connection in mid-answer: the only way to say, behind the status, that the rest is missing."""
        if self.transport is not None:
            self.transport.abort()

    # Whose turn it is.

    @property
    def _waiter(self) -> asyncio.Future[None] | None:
        """What aiohttp's task waits on while it has nothing to answer."""
        return self._idle

    @_waiter.setter
    def _waiter(self, idle: asyncio.Future[None] | None) -> None:
        self._idle = idle
        if idle is not None and self._queue:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Hand on the request that came first, if all before it are answered."""
        queue, idle = self._queue, self._idle
        if not queue or self._answering is not None or idle is None or idle.done():
            return
        message, payload = queue.popleft()
        if not queue:
            self._queue = None
        if not self._is_for_door(message):
            self._messages.append((message, payload))
            idle.set_result(None)
            return
        if self._parser is not None:
            self._parser.message_consumed()
        self._door.take(self, message, payload)
        # Not before: what this parses may be the next one's turn.
        if self._buffer_paused:
            self._resume_reading_if_drained()

    def _is_for_door(self, message: Any) -> bool:
        if not isinstance(message, RawRequestMessage) or not self._door.is_for(message):
            return False
        return not (message.upgrade and message.headers["Upgrade"].lower() in _SWITCHING)

    # Called by the event loop.

    def data_received(self, data: bytes) -> None:
        # Without the future, aiohttp puts what it parses into its queue and wakes nobody.
        idle, self._idle = self._idle, None
        # What its task was woken for and has not taken yet stays before what comes now.
        handed = self._messages.popleft() if self._messages else None
        super().data_received(data)
        self._idle = idle
        if self._messages:
            if self._answering is not None and not isinstance(self._messages[-1][0], RawRequestMessage):
                # aiohttp's parser forgets the body that it was filling, and who waits for it would wait for ever.
                self._answering.broken()
            if self._queue is None:
                self._queue = deque()
            self._queue.extend(self._messages)
            self._messages.clear()
        if handed is not None:
            self._messages.append(handed)
        if self._queue:
            # The parser holds back what stands behind so many requests, and is not to be given more.
            if len(self._queue) + len(self._messages) >= self._max_msg_queue_size and not self._buffer_paused:
                self._pause_reading_for_buffer()
            self._next()

    def _resume_reading_if_drained(self) -> None:
        # aiohttp's looks at aiohttp's queue, which holds one request at most.
        if self._upgraded:
            super()._resume_reading_if_drained()
        elif not self._queue or len(self._queue) <= self._msg_queue_resume_size:
            self._resume_reading_for_buffer()
            # What the parser has held back until now.
            self.data_received(b"")

    def resume_reading(self, resume_parser: bool = True) -> None:
        # Reading a body calls this whether it was paused or not, and each time the parser would be run for nothing.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        answering, self._answering = self._answering, None
        super().connection_lost(exc)
        if answering is not None:
            answering.lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._answering is not None:
            self._answering.filled()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering is not None:
            self._answering.drained()

    # What aiohttp says where a request is no such thing: in words of its own, and in our log with a trace for each.

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        response = self._door.unsound()
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        # A body that cannot be read is its sender's fault, who was told so.
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)

    def _process_keepalive(self) -> None:
        if self._answering is not None:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()


class _Server(web.Server):
    """aiohttp's server of an application, with our connections."""

    def __init__(self, plain: web.Server, door: Door) -> None:
        super().__init__(
            plain.request_handler,
            request_factory=plain.request_factory,
            handler_cancellation=plain.handler_cancellation,
            loop=plain._loop,
            **plain._kwargs,
        )
        self._door = door

    def __call__(self) -> RequestHandler:
        return ClientConnection(self, self._door, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Runs an application, with a door beside its routes."""

    __slots__ = ("_door",)

    def __init__(self, app: web.Application, door: Door, **options: Any) -> None:
        super().__init__(app, **options)
        self._door = door

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self._door)
