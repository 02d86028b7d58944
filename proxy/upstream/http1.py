"""HTTP/1.1 toward the upstreams: a connection, and one exchange of request and answer after the other on it.

Bytes are pushed: what `data_received` brings is parsed by httptools (llhttp, the parser of Node) and handed to the
exchange's consumer in the same call, one call per read, with no task woken. An exchange that nobody consumes yet keeps
what has come, up to a mark, and then stops reading.

Strict where strictness is safety: a head over the limits, both a length and chunks, a bad chunk size, a body cut short
end in an UpstreamError at once. What had arrived before is delivered first, and the connection is never used again.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

import httptools
from multidict import CIMultiDict

from proxy.errors import UpstreamError
from proxy.upstream.coding import CodingError, Unpacker
from proxy.upstream.tls import reason

_MAX_HEAD_BYTES = 128 * 1024
_HIGH_WATER_BYTES = 256 * 1024

_CHUNKED = ["chunked"]


class Consumer(Protocol):
    """Takes a body as it comes."""

    def feed(self, data: bytes) -> bool:
        """Take what one read brought; false: no more. What is raised is raised again by `Exchange.deliver`."""
        ...


class _Unsound(Exception):
    """Raised inside the parser's callbacks, to refuse what llhttp would take."""


class Exchange:
    """One request and its answer, on a connection that it has to itself.

    The head is awaited first (`head`), then the body is taken: piece by piece (`read`), or all of it by a consumer
    (`deliver`). `close` gives the connection back, or cuts it when the answer was not read to its end.
    """

    __slots__ = (
        "_connection",
        "_error",
        "_held",
        "_held_bytes",
        "_unpacker",
        "_waiter",
        "headers",
        "is_complete",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiter: asyncio.Future[None] | None = None
        self._held: list[bytes] = []  # A deque would take 700 bytes, of every stream.
        self._held_bytes = 0
        self._unpacker: Unpacker | None = None
        self._error: UpstreamError | None = None
        self.is_complete = False
        """Whether all of the body has come, and nothing was wrong with it."""
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()

    @property
    def is_untouched(self) -> bool:
        """Whether nothing at all was received."""
        return not self._connection.head_bytes

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
                data = self._held.pop(0)
                self._held_bytes -= len(data)
                if not self._held:
                    self._connection.resume_reading()
                return data
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()

    def whole_body(self) -> bytes | None:
        """The rest of the body, if all of it has come."""
        if not self.is_complete:
            return None
        body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        return body

    async def deliver(self, consumer: Consumer) -> None:
        """Feed every read to `consumer`, as it comes, until the body ends or `feed` returns False."""
        while self._held:
            if not consumer.feed(self._held.pop(0)):
                return
        self._held_bytes = 0
        self._connection.resume_reading()
        if self.is_complete:
            return
        if self._error is not None:
            raise self._error
        self._connection.consumer = consumer if self._unpacker is None else _Unpacking(self, self._unpacker, consumer)
        try:
            await self._wait()
        finally:
            self._connection.consumer = None
        # What _wait has been woken for: the end, an error, or the consumer's wish to stop.
        if self._error is not None:
            raise self._error

    def pause_reading(self) -> None:
        """Take nothing more from the socket until `resume_reading`: the sender then has to stop as well."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        self._connection.resume_reading()

    def close(self) -> None:
        self._connection.leave(self, is_reusable=self.is_complete and not self._held)

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
        if "Content-Encoding" in headers:
            # We ask for identity; who packs all the same is unpacked, and says so no longer.
            try:
                self._unpacker = Unpacker(",".join(headers.popall("Content-Encoding")))
            except CodingError as error:
                self.on_error(str(error))
        self._wake()

    def on_body(self, data: bytes) -> None:
        """Keep what nobody consumes yet."""
        if self._error is not None:
            return
        if self._unpacker is None:
            self.keep(data)
        else:
            _Unpacking(self, self._unpacker, None).feed(data)

    def on_end(self) -> None:
        if self._unpacker is not None and self._error is None:
            try:
                self._unpacker.end()
            except CodingError as error:
                self.on_error(str(error))
        if self._error is None:
            self.is_complete = True
        self._wake()

    def on_error(self, words: str) -> None:
        if self._error is None and not self.is_complete:
            self._error = UpstreamError(502, "upstream_broke", words)
        self._wake()

    def on_stop(self, error: Exception | None) -> None:
        """The consumer wants no more or, with an error, could not go on: that is raised where `deliver` waits."""
        self._connection.consumer = None
        if error is None:
            self._wake()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def keep(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _HIGH_WATER_BYTES:
            self._connection.pause_reading()
        self._wake()


class _Unpacking:
    """Between a packed body and its consumer; what nobody consumes, or not any more, the exchange keeps."""

    __slots__ = ("_consumer", "_exchange", "_unpacker")

    def __init__(self, exchange: Exchange, unpacker: Unpacker, consumer: Consumer | None) -> None:
        self._exchange = exchange
        self._unpacker = unpacker
        self._consumer = consumer

    def feed(self, data: bytes) -> bool:
        try:
            for piece in self._unpacker.unpack(data):
                if self._consumer is None:
                    self._exchange.keep(piece)
                elif not self._consumer.feed(piece):
                    self._consumer = None
        except CodingError as error:
            self._exchange.on_error(str(error))
            return False
        return self._consumer is not None


class Keeper(Protocol):
    """Who keeps a connection between two exchanges."""

    def put(self, connection: Connection) -> None:
        """The connection is ready for another exchange."""

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""


class Connection(asyncio.Protocol):
    """One connection, for one exchange after the other; between them it is its keeper's."""

    __slots__ = (
        "_body",
        "_ended",
        "_exchange",
        "_has_no_body",
        "_headers",
        "_is_paused",
        "_keeper",
        "_keeps_alive",
        "_more",
        "_parser",
        "_status",
        "_transport",
        "_until_close",
        "consumer",
        "head_bytes",
        "is_fresh",
    )

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._is_paused = False
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
            self._keeper.put(self)
        else:
            self.abort()

    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

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

    def _begin(self) -> None:
        self.consumer: Consumer | None = None
        """Who takes the body as it comes; while there is nobody, the exchange keeps it."""
        self.head_bytes = 0
        self._body: bytes | None = None
        self._more: list[bytes] = []
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._status = 0
        self._ended = 0
        """1 when the answer is whole. No bool: mypy would not see that the parser's callbacks change it."""
        self._keeps_alive = False
        self._until_close = False
        self._has_no_body = False

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None or self._parser is None or self._ended > 0:
            # Nobody asked for anything: whatever this is, it must not become the next answer.
            self.abort()
            return
        problem = ""
        if not self._status:
            self.head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            problem = f"Its answer is malformed HTTP ({type(error).__name__})."
        if not self._status and self.head_bytes > _MAX_HEAD_BYTES:
            problem = "The head of its answer is too long."
        if (body := self._body) is not None:
            self._body = None
            if self._more:
                body = b"".join((body, *self._more))
                self._more.clear()
            if self.consumer is None:
                exchange.on_body(body)
            else:
                try:
                    if not self.consumer.feed(body):
                        exchange.on_stop(None)
                except Exception as error:  # It is raised again, in the task that waits in `deliver`.
                    exchange.on_stop(error)
        if self._ended:
            # Bytes behind the end are no part of this answer, and must not become the next one's.
            self._keeps_alive = self._keeps_alive and not problem
            exchange.on_end()
        elif problem:
            exchange.on_error(problem)

    def eof_received(self) -> bool:
        if self._exchange is not None and self._until_close and not self._ended:
            self._ended = 1
            self._exchange.on_end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._keeper.forget(self)
        if self._exchange is not None and not self._ended:
            broke = "It closed the connection without an answer."
            if isinstance(error, ssl.SSLError):
                # With TLS 1.3 a server looks at our certificate after the handshake (RFC 8446 §2).
                broke = f"It broke off the TLS connection ({reason(error)})."
            self._exchange.on_error(broke if not self._status else "Its answer broke off.")

    # Called by the parser. What these raise stops it, and comes out of `feed_data` as an HttpParserError.

    def on_message_begin(self) -> None:
        if self._ended:
            raise _Unsound

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 100 or status == 101:  # RFC 9110 §15: there is none below; and nobody asked for another protocol.
            raise _Unsound
        if status < 200:
            self._headers = CIMultiDict()
            return
        headers = self._headers
        codings = headers.getall("Transfer-Encoding", _CHUNKED)
        if codings != _CHUNKED and [coding.strip(" ").lower() for coding in codings] != _CHUNKED:
            # llhttp takes any list that ends in chunked, and hands on what is still packed (RFC 9112 §6.1).
            raise _Unsound
        self._status = status
        if not self._has_no_body and status not in (204, 304):
            self._until_close = "Content-Length" not in headers and "Transfer-Encoding" not in headers
        if self._exchange is not None:
            self._exchange.on_head(status, headers)
        if self._has_no_body:
            # The parser does not know it, and would take the next answer for this one's body.
            self._ended = 1

    def on_body(self, body: bytes) -> None:
        if self._ended:
            raise _Unsound
        if self._body is None:
            self._body = body
        else:
            self._more.append(body)

    def on_message_complete(self) -> None:
        if self._status:
            assert self._parser is not None
            self._ended = 1
            self._keeps_alive = self._parser.should_keep_alive() and not self._until_close
