"""The log of one answer: what a producer appends, and any number of readers deliver.

A log is an append-only list of *segments*, each the bytes of one or more whole SSE events, and an ending. Or it is one
JSON body (`put_whole`), when the upstream gave one and the client wants one.

Push, not pull: `append` is a plain call, and a reader that is up to date has its sink written to in that very call, so
that bytes go from the upstream's socket to the client's with no task woken between. A reader has a task of its own
(whoever awaits `Reader.deliver`) only to catch up, to wait for a slow client, and to see the end.

Back-pressure: a reader whose sink is full is *stuck*. While all readers are stuck the log's source is paused; one that is
not stuck keeps the source going, so readers never stall each other.

Commit: until `commit`, nothing is visible, and `fail` still becomes an HTTP status. After it, `fail` becomes an error
event, the last of the log. `[DONE]` is appended by the producer, and only behind a whole answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from proxy.errors import ProxyError, UpstreamError
from proxy.wire.encoding import dumps
from proxy.wire.sse import PING, data_event

_CATCH_UP_BYTES = 256 * 1024


class Sink(Protocol):
    """Where a reader's bytes go."""

    def write(self, segment: bytes) -> bool:
        """Take the bytes, at once and without waiting. False asks for `drained` before more is written."""
        ...

    async def drained(self) -> None:
        """Wait until more may be written. Raises what the transport raises when the client has gone."""
        ...


class Source(Protocol):
    """Where a log's segments come from, and what it asks to stop while no reader can take more."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class AnswerLog:
    """One answer. `on_abandoned` is called when the last reader leaves before the end.

    `source`, when set, is paused while all readers are stuck.
    """

    __slots__ = (
        "_closed",
        "_max_bytes",
        "_opened",
        "_readers",
        "_stuck",
        "failure",
        "headers",
        "is_committed",
        "on_abandoned",
        "segments",
        "size",
        "source",
        "whole",
    )

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._opened = asyncio.Event()
        self._closed = asyncio.Event()
        self._stuck = 0
        self.source: Source | None = None
        self._readers: list[Reader] = []
        self.on_abandoned: Callable[[], object] | None = None
        self.segments: list[bytes] = []
        self.size = 0
        self.whole: bytes | None = None
        self.is_committed = False
        self.failure: ProxyError | None = None
        self.headers: dict[str, str] = {}
        """Response headers for whoever reads; complete at the commit."""

    # The producer's side.

    def commit(self) -> None:
        """Spend the status: from now on the log is visible, and a failure is an event."""
        self.is_committed = True
        self._opened.set()

    def append(self, segment: bytes) -> None:
        """Add whole events; up-to-date readers have them when this returns. UpstreamError past `max_bytes`."""
        self.size += len(segment)
        if self.size > self._max_bytes:
            raise UpstreamError(
                502, "answer_too_large", f"The answer is longer than {self._max_bytes} bytes.", may_retry=False
            )
        self._push(segment)

    def rewind(self) -> None:
        """Forget what nobody has seen, before another attempt. Once something was seen, nothing is forgotten."""
        if not self.is_committed:
            self.segments.clear()
            self.size = 0

    @property
    def is_spent(self) -> bool:
        """Whether a client may have seen some of the answer, so that it can only go on from there."""
        return self.is_committed and bool(self.segments)

    def put_whole(self, body: bytes) -> None:
        """The answer as one JSON body, for readers that want one."""
        self.whole = body

    def ping(self) -> None:
        """Tell waiting clients that the call is alive. Commits, for a comment cannot be sent without a status."""
        if not self.is_committed:
            self.commit()
        for reader in self._readers:
            reader.ping()

    def finish(self) -> None:
        """Close the log: nothing follows."""
        if not self.is_committed:
            self.commit()
        self._close()

    def fail(self, error: ProxyError) -> None:
        """Close the log with an error: a status where none was sent yet, else an event."""
        if self._closed.is_set():
            return
        self.failure = error
        if self.is_committed:
            self._push(data_event(dumps(error.envelope())))
        self._close()

    # The readers' side.

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Be a reader from the beginning on; leaving the block is leaving the answer."""
        reader = Reader(self)
        self._readers.append(reader)
        self._balance()
        try:
            yield reader
        finally:
            self._readers.remove(reader)
            self._stuck -= reader.is_stuck
            self._balance()
            if not self._readers and not self._closed.is_set() and self.on_abandoned is not None:
                self.on_abandoned()

    async def wait_opened(self) -> None:
        """Wait for the commit. Raises the failure, if there was one before it."""
        await self._opened.wait()
        if self.failure is not None and not self.is_committed:
            raise self.failure

    async def wait_closed(self) -> None:
        """Wait for the end. Raises the failure, if that is what it was."""
        await self._closed.wait()
        if self.failure is not None:
            raise self.failure

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def _push(self, segment: bytes) -> None:
        self.segments.append(segment)
        for reader in self._readers:
            reader.push(segment)

    def _close(self) -> None:
        self._closed.set()
        self._opened.set()
        for reader in self._readers:
            reader.wake()

    def stick(self) -> None:
        """A reader cannot take more. With all of them stuck, the source is paused."""
        self._stuck += 1
        self._balance()

    def _balance(self) -> None:
        if self.source is None:
            return
        if self._readers and self._stuck == len(self._readers):
            self.source.pause_reading()
        else:
            self.source.resume_reading()

    def unstick(self) -> None:
        """A reader can take more again, or has left."""
        self._stuck -= 1
        self._balance()


class Reader:
    """One reader's place in a log. Made by `AnswerLog.reading`."""

    __slots__ = ("_log", "_position", "_sink", "_wakeup", "is_stuck")

    def __init__(self, log: AnswerLog) -> None:
        self._log = log
        self._position = 0
        self._sink: Sink | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self.is_stuck = False

    async def deliver(self, sink: Sink, send_timeout_s: float) -> None:
        """Write the whole log to `sink` and return when it is closed and all was written.

        TimeoutError when the client takes nothing for `send_timeout_s`.
        """
        if not self._log.segments and not self._log.is_closed:
            # It was a heartbeat that committed the log, before there was a sink to write it to.
            sink.write(PING)
        while True:
            while self._position < len(self._log.segments):
                if not sink.write(self._next_batch()):
                    await self._wait_drained(sink, send_timeout_s)
            if self._log.is_closed:
                return
            self._sink = sink
            self._wakeup = asyncio.get_running_loop().create_future()
            try:
                await self._wakeup
            finally:
                self._sink = self._wakeup = None
            if self.is_stuck:
                await self._wait_drained(sink, send_timeout_s)

    def push(self, segment: bytes) -> None:
        """The log's newest segment: written at once when this reader is up to date, else left for catching up."""
        if self._sink is not None:
            self._position += 1
            if not self._sink.write(segment):
                self._stick()

    def ping(self) -> None:
        if self._sink is not None and not self._sink.write(PING):
            self._stick()

    def _stick(self) -> None:
        if not self.is_stuck:
            self.is_stuck = True
            self._log.stick()
        self.wake()

    def wake(self) -> None:
        self._sink = None
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _next_batch(self) -> bytes:
        segments = self._log.segments
        start = self._position
        size = 0
        while self._position < len(segments) and size < _CATCH_UP_BYTES:
            size += len(segments[self._position])
            self._position += 1
        return b"".join(segments[start : self._position])

    async def _wait_drained(self, sink: Sink, timeout_s: float) -> None:
        self._stick()
        async with asyncio.timeout(timeout_s):
            await sink.drained()
        self.is_stuck = False
        self._log.unstick()
