"""HTTP/1.1 toward the upstreams: connections, their pool, and one exchange of request and answer at a time.

Bytes are pushed: what `data_received` brings is parsed by httptools (llhttp, the parser of Node) and handed to the
exchange's consumer in the same call, one call per read, with no task woken. An exchange that nobody consumes yet keeps
what has come, up to a mark, and then stops reading.

Strict where strictness is safety: a head over the limits, both a length and chunks, a bad chunk size, a body cut short
end in an UpstreamError at once. What had arrived before is delivered first, and the connection is never used again.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, cast

import aiohappyeyeballs
import httptools
from multidict import CIMultiDict

from proxy.errors import UpstreamError

_MAX_HEAD_BYTES = 128 * 1024
_HIGH_WATER_BYTES = 256 * 1024
_UNPACKED_PIECE_BYTES = 1024 * 1024

# A connection that was idle longer than this may just be being closed by the other side, and is not used again.
_MAX_IDLE_S = 30.0
_HAPPY_EYEBALLS_S = 0.25  # RFC 8305 §5

_CODINGS = ("gzip", "x-gzip", "deflate")


class Origin(NamedTuple):
    """Where a connection leads."""

    host: str
    port: int
    is_tls: bool


Consume = Callable[[bytes], bool]


class Exchange:
    """One request and its answer, on a connection that it has to itself.

    The head is awaited first (`head`), then the body is taken: piece by piece (`read`), or all of it by a consumer
    (`deliver`). `close` gives the connection back, or cuts it when the answer was not read to its end.
    """

    __slots__ = (
        "_connection",
        "_consume",
        "_error",
        "_held",
        "_held_bytes",
        "_is_complete",
        "_unpacker",
        "_waiter",
        "headers",
        "is_untouched",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._consume: Consume | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._unpacker: _Unpacker | None = None
        self._error: UpstreamError | None = None
        self._is_complete = False
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.is_untouched = True
        """Whether nothing at all was received."""

    async def head(self) -> None:
        """Wait for status and headers."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """The next bytes of the body, whatever has come; empty at its end."""
        while True:
            if self._held:
                data = self._held.popleft()
                self._held_bytes -= len(data)
                if not self._held:
                    self._connection.resume_reading()
                return data
            if self._is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()

    async def deliver(self, consume: Consume) -> None:
        """Hand every read to `consume`, as it comes, until the body ends or `consume` returns False.

        What `consume` raises is raised here.
        """
        while self._held:
            if not consume(self._held.popleft()):
                return
        self._held_bytes = 0
        self._connection.resume_reading()
        if self._is_complete:
            return
        if self._error is not None:
            raise self._error
        self._consume = consume
        try:
            await self._wait()
        finally:
            self._consume = None
        # What _wait has been woken for: the end, an error, or the consumer's wish to stop.
        if self._error is not None:
            raise self._error

    def pause_reading(self) -> None:
        """Take nothing more from the socket until `resume_reading`: the sender then has to stop as well."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        self._connection.resume_reading()

    def close(self) -> None:
        self._connection.leave(self, is_reusable=self._is_complete and not self._held)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Called by the connection.

    def on_head(self, status: int, headers: CIMultiDict[str]) -> None:
        self.status = status
        self.headers = headers
        coding = headers.get("Content-Encoding", "identity").strip().lower()
        if coding in _CODINGS:
            # We ask for identity; who packs all the same is unpacked, and says so no longer.
            self._unpacker = _Unpacker()
            del headers["Content-Encoding"]
        elif coding not in ("", "identity"):
            self.on_error(f"Its answer is packed as '{coding[:20]}', which was not asked for.")
        self._wake()

    def on_body(self, data: bytes) -> None:
        if self._unpacker is None:
            self._give(data)
            return
        try:
            for piece in self._unpacker.unpack(data):
                self._give(piece)
        except zlib.error:
            self.on_error("Its answer is packed, and cannot be unpacked.")

    def on_end(self) -> None:
        if self._error is None:
            self._is_complete = True
        self._wake()

    def on_error(self, words: str) -> None:
        if self._error is None and not self._is_complete:
            self._error = UpstreamError(502, "upstream_broke", words)
        self._wake()

    def _give(self, data: bytes) -> None:
        if self._consume is None:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > _HIGH_WATER_BYTES:
                self._connection.pause_reading()
            self._wake()
            return
        try:
            wants_more = self._consume(data)
        except Exception as error:  # It is raised again, in the task that waits in `deliver`.
            self._consume = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
            return
        if not wants_more:
            self._consume = None
            self._wake()


class _Unpacker:
    """gzip and deflate, unpacked as they come, in pieces of bounded size."""

    __slots__ = ("_inflate",)

    def __init__(self) -> None:
        # 32: take the zlib or the gzip wrapper, whichever is there.
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def unpack(self, data: bytes) -> list[bytes]:
        pieces = []
        while data:
            if piece := self._inflate.decompress(data, _UNPACKED_PIECE_BYTES):
                pieces.append(piece)
            data = self._inflate.unconsumed_tail
            if self._inflate.eof:
                # Another member may follow (RFC 1952 §2.2).
                data = self._inflate.unused_data
                self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return pieces


class Connection(asyncio.Protocol):
    """One connection to an origin, for one exchange after the other."""

    __slots__ = (
        "_bodies",
        "_exchange",
        "_has_no_body",
        "_head_bytes",
        "_headers",
        "_idle_since",
        "_is_complete",
        "_is_paused",
        "_keeps_alive",
        "_loop",
        "_parser",
        "_pool",
        "_status",
        "_transport",
        "_until_close",
        "is_fresh",
        "origin",
    )

    def __init__(self, pool: Pool, origin: Origin) -> None:
        self._pool = pool
        self.origin = origin
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._is_paused = False
        self._idle_since = 0.0
        self.is_fresh = True
        """Whether it has not carried an exchange yet."""
        self._begin()

    def start(self, head: bytes, body: bytes, *, has_no_body: bool) -> Exchange:
        """Send a request. `has_no_body`: the answer has none whatever its head says, as to HEAD."""
        assert self._transport is not None
        assert self._exchange is None
        self._begin()
        self._has_no_body = has_no_body
        self._parser = httptools.HttpResponseParser(self)
        exchange = self._exchange = Exchange(self)
        self._transport.write(head + body if len(body) < _HIGH_WATER_BYTES else head)
        if len(body) >= _HIGH_WATER_BYTES:
            self._transport.write(body)
        return exchange

    def leave(self, exchange: Exchange, *, is_reusable: bool) -> None:
        """The exchange is over: wait for the next one, or close."""
        if self._exchange is not exchange or self._transport is None:
            return
        self._exchange = None
        self.is_fresh = False
        is_sent = self._transport.get_write_buffer_size() == 0
        if is_reusable and self._keeps_alive and is_sent and not self._transport.is_closing():
            self.resume_reading()
            self._idle_since = self._loop.time()
            self._pool.put(self)
        else:
            self.abort()

    def is_usable(self) -> bool:
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._loop.time() - self._idle_since < _MAX_IDLE_S
        )

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        if not self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def _has_ended(self) -> bool:
        return self._is_complete

    def _begin(self) -> None:
        self._bodies: list[bytes] = []
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._head_bytes = 0
        self._status = 0
        self._is_complete = False
        self._keeps_alive = False
        self._until_close = False
        self._has_no_body = False

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None or self._parser is None or self._has_ended():
            # Nobody asked for anything: whatever this is, it must not become the next answer.
            self.abort()
            return
        exchange.is_untouched = False
        problem = ""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            problem = f"Its answer is malformed HTTP ({type(error).__name__})."
        if not self._status:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                problem = "The head of its answer is too long."
        if self._bodies:
            bodies, self._bodies = self._bodies, []
            exchange.on_body(bodies[0] if len(bodies) == 1 else b"".join(bodies))
        if self._is_complete:
            # Bytes behind the end are no part of this answer, and must not become the next one's.
            self._keeps_alive = self._keeps_alive and not problem
            exchange.on_end()
        elif problem:
            exchange.on_error(problem)

    def eof_received(self) -> bool:
        if self._exchange is not None and self._until_close and not self._is_complete:
            self._is_complete = True
            self._exchange.on_end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        if self._exchange is not None and not self._is_complete:
            broke = "It closed the connection without an answer."
            self._exchange.on_error(broke if not self._status else "Its answer broke off.")

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._headers = CIMultiDict()
            return
        self._status = status
        headers = self._headers
        if not self._has_no_body and status not in (204, 304):
            self._until_close = "Content-Length" not in headers and "Transfer-Encoding" not in headers
        if self._exchange is not None:
            self._exchange.on_head(status, headers)
        if self._has_no_body:
            # The parser does not know it, and would take the next answer for this one's body.
            self._is_complete = True

    def on_body(self, body: bytes) -> None:
        if not self._is_complete:
            self._bodies.append(body)

    def on_message_complete(self) -> None:
        if self._status:
            assert self._parser is not None
            self._is_complete = True
            self._keeps_alive = self._parser.should_keep_alive() and not self._until_close


class Pool:
    """Connections that wait for their next exchange, by origin; the one used last is used first. No limit on their number.

    `connect_timeout_s` bounds name, TCP and TLS together.
    """

    def __init__(self, connect_timeout_s: float, tls: ssl.SSLContext) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._idle: dict[Origin, list[Connection]] = {}
        self._all: set[Connection] = set()

    async def get(self, origin: Origin, *, is_fresh: bool) -> Connection:
        """A connection: one that was kept alive, unless it has to be a fresh one.

        Raises OSError, ssl.SSLError or TimeoutError when none can be made.
        """
        idle = self._idle.get(origin)
        while idle and not is_fresh:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return await self._connect(origin)

    def put(self, connection: Connection) -> None:
        idle = self._idle.setdefault(connection.origin, [])
        idle.append(connection)
        # The oldest stands first: what has waited too long is let go one by one, as newer ones come back.
        if not idle[0].is_usable():
            idle.pop(0).abort()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self, origin)
        async with asyncio.timeout(self._connect_timeout_s):
            addresses = await loop.getaddrinfo(origin.host, origin.port, type=1)
            socket = await aiohappyeyeballs.start_connection(
                addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_S, loop=loop
            )
            await loop.create_connection(
                lambda: connection,
                sock=socket,
                ssl=self._tls if origin.is_tls else None,
                server_hostname=origin.host if origin.is_tls else None,
            )
        self._all.add(connection)
        return connection
