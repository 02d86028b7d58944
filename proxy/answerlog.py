"""The log of one answer: what a producer appends, and any number of readers deliver.

A log is an append-only list of *segments*, each the bytes of one or more whole SSE events, and an ending; for readers
that want one JSON body it holds that as well (`put_whole`), before it ends.

Push, not pull: everything here is a plain call. A reader that is up to date has its sink written to inside `append`, so
that bytes go from the upstream's socket to the client's in one call stack, with no task woken between. A reader that is
behind writes in batches until its sink is full, and goes on when it is told that there is room (`resume`).

Back-pressure: a reader whose sink is full is *stuck*. While all readers are stuck the log's source is paused; one that is
not stuck keeps the source going, so readers never stall each other.

Commit: until `commit`, nothing is visible, and `fail` still becomes an HTTP status. After it, `fail` becomes an error
event, the last of the log. `[DONE]`, and the usage for those who asked for it, are no segments: readers say them behind the
last one, and only where the log did not fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from proxy.errors import ProxyError, Trouble, UpstreamError
from proxy.wire.encoding import dumps
from proxy.wire.sse import DONE, PING, data_event

_CATCH_UP_BYTES = 256 * 1024
_EVENT_END = b"\n\n"


class Sink(Protocol):
    """Where a stream's bytes go. Nothing here waits."""

    def write(self, segment: bytes) -> bool:
        """Take the bytes. False: no more before `StreamReader.resume` is called."""
        ...

    def end(self, last: bytes) -> None:
        """Take the last bytes, maybe none, and the end: nothing follows."""
        ...

    def refuse(self, error: ProxyError) -> None:
        """There is no answer, and nothing was written: the error can still be a status."""
        ...


class Source(Protocol):
    """Where a log's segments come from, and what it asks to stop while no reader can take more."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Reader(Protocol):
    """Somebody who wants the answer, from `AnswerLog.join` to `AnswerLog.leave`; called by the log, and never waits.

    `live` is the sink of a reader that is up to date and can take more, else None.
    """

    live: Sink | None
    is_stuck: bool

    def commit(self) -> None: ...

    def fill(self) -> None:
        """The live sink took the newest segment, and can take no more."""
        ...

    def close(self, unread: int) -> None:
        """The log is closed; its last `unread` segments were not written to the live sink."""
        ...


class AnswerLog:
    """One answer. `source`, when set, is paused while all readers are stuck."""

    __slots__ = (
        "_live",
        "_max_bytes",
        "_readers",
        "_source",
        "_stuck",
        "ending",
        "failure",
        "headers",
        "is_closed",
        "is_committed",
        "segments",
        "size",
        "usage",
        "whole",
    )

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stuck = 0
        self._readers: list[Reader] = []
        self._live: Sink | None = None
        """The live sink of the only reader: to come to it, a chunk need not go by the list and the reader."""
        self._source: Source | None = None
        self.segments: list[bytes] = []
        self.size = 0
        self.ending = DONE
        """What is said behind all events of an answer that is whole."""
        self.usage = b""
        """The event that says the usage, for those who asked for it; there at the end."""
        self.whole: bytes | None = None
        self.is_committed = False
        self.is_closed = False
        self.failure: ProxyError | None = None
        self.headers: dict[str, str] = {}
        """Response headers for whoever reads; complete at the commit."""

    # The producer's side.

    @property
    def source(self) -> Source | None:
        return self._source

    @source.setter
    def source(self, source: Source | None) -> None:
        self._source = source
        if source is not None and self._readers and self._stuck == len(self._readers):
            source.pause_reading()

    def commit(self) -> None:
        """Spend the status: from now on the log is visible, and a failure is an event."""
        if not self.is_committed:
            self.is_committed = True
            for reader in self._readers:
                reader.commit()

    def append(self, segment: bytes) -> None:
        """Add whole events; up-to-date readers have them when this returns. UpstreamError past `max_bytes`."""
        self.size += len(segment)
        if self.size > self._max_bytes:
            raise self._too_large()
        self.segments.append(segment)
        if self._live is None:
            self._push(segment)
        elif not self._live.write(segment):
            self._readers[0].fill()

    def put_whole(self, body: bytes) -> None:
        """The answer as one JSON body, for readers that want one; to be there when the log is closed."""
        self.whole = body

    def ping(self) -> None:
        """Tell waiting clients that the call is alive. Commits, for a comment cannot be sent without a status."""
        self.commit()
        self._push(PING)

    def finish(self, last: bytes = b"", usage: bytes = b"") -> None:
        """Close the log behind its last events, which readers get together with the end. UpstreamError past `max_bytes`."""
        self.usage = usage
        if last:
            self.size += len(last)
            if self.size > self._max_bytes:
                raise self._too_large()
            self.segments.append(last)
        self.is_committed = True
        self._close(unread=1 if last else 0)

    def tail(self, *, wants_usage: bool) -> list[bytes]:
        """What a reader says behind the last segment: nothing, if the log failed."""
        if self.failure is not None:
            return []
        return [self.usage, self.ending] if wants_usage and self.usage else [self.ending]

    def count(self) -> int:
        """How many events the segments hold."""
        # No event holds an empty line, for JSON writes line ends as escapes.
        return sum(segment.count(_EVENT_END) for segment in self.segments)

    def fail(self, error: ProxyError) -> None:
        """Close the log with an error: a status where none was sent yet, else an event."""
        if self.is_closed:
            return
        self.failure = error
        # An error holds the frames it came through, and they all that the making of the answer needed; the log may be kept.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if self.is_committed:
            self.segments.append(data_event(dumps(error.envelope())))
        self._close(unread=1 if self.is_committed else 0)

    def _too_large(self) -> UpstreamError:
        words = f"The answer is longer than {self._max_bytes} bytes."
        return UpstreamError(502, "answer_too_large", words, trouble=Trouble.FINAL)

    def _push(self, segment: bytes) -> None:
        for reader in self._readers:
            if reader.live is not None and not reader.live.write(segment):
                reader.fill()

    def _close(self, unread: int) -> None:
        self.is_closed = True
        # A reader that has had everything leaves.
        for reader in self._readers.copy():
            reader.close(unread)

    # The readers' side.

    def join(self, reader: Reader) -> None:
        self._readers.append(reader)
        self.note_live()
        self._balance()

    def leave(self, reader: Reader) -> None:
        """Leave the answer, at its end or before; not to be called twice."""
        self._readers.remove(reader)
        self._stuck -= reader.is_stuck
        self.note_live()
        self._balance()

    def note_live(self) -> None:
        """To be called whenever a reader's `live` changes."""
        self._live = self._readers[0].live if len(self._readers) == 1 else None

    def stick(self) -> None:
        """A reader cannot take more. With all of them stuck, the source is paused."""
        self._stuck += 1
        self._balance()

    def unstick(self) -> None:
        """A reader can take more again."""
        self._stuck -= 1
        self._balance()

    def _balance(self) -> None:
        if self._source is None:
            return
        if self._readers and self._stuck == len(self._readers):
            self._source.pause_reading()
        else:
            self._source.resume_reading()


class StreamReader:
    """Delivers a log to a sink, from behind its `after`-th event to the end, at which it leaves by itself.

    Joins when made, and may begin to write at once. `on_left` is called if the client leaves before the end.
    """

    __slots__ = ("_after", "_log", "_on_left", "_position", "_rest", "_sink", "_wants_usage", "is_stuck", "live")

    def __init__(
        self, log: AnswerLog, sink: Sink, on_left: Callable[[], object], *, wants_usage: bool = False, after: int = 0
    ) -> None:
        self._log = log
        self._sink = sink
        self._on_left = on_left
        self._wants_usage = wants_usage
        self._position = 0
        """How many segments were written; not kept while `live`, for then it is all."""
        self._rest = b""
        """What is still to be written of the segment before the position."""
        self._after = after
        """How many of the events from here on the client has already."""
        self.live: Sink | None = None
        self.is_stuck = False
        log.join(self)
        if after:
            self._skip()
        self._catch_up()

    def _skip(self) -> None:
        segments = self._log.segments
        while self._after and self._position < len(segments):
            segment = segments[self._position]
            self._position += 1
            events = segment.count(_EVENT_END)
            if events > self._after:
                self._rest = segment.split(_EVENT_END, self._after)[self._after]
            self._after = max(0, self._after - events)

    def resume(self) -> None:
        """The sink has room again."""
        if self.is_stuck:
            self.is_stuck = False
            self._log.unstick()
            self._catch_up()

    def leave(self) -> None:
        """The client has gone."""
        self.live = None
        self._log.leave(self)
        self._on_left()

    # Called by the log.

    def commit(self) -> None:
        self._catch_up()

    def fill(self) -> None:
        self._position = len(self._log.segments)
        self._stick()

    def close(self, unread: int) -> None:
        if self.live is not None:
            self._position = len(self._log.segments) - unread
            self.live = None
        if not self.is_stuck:
            self._catch_up()

    def _stick(self) -> None:
        self.live = None
        self._log.note_live()
        self.is_stuck = True
        self._log.stick()

    def _catch_up(self) -> None:
        """Write what waits, as much as the sink takes; the last of it together with the end."""
        log = self._log
        if not log.is_committed:
            if log.failure is not None:
                log.leave(self)
                self._sink.refuse(log.failure)
            return
        while True:
            batch = self._next_batch()
            if log.is_closed and self._position == len(log.segments):
                log.leave(self)
                self._sink.end(b"".join((batch, *log.tail(wants_usage=self._wants_usage)[self._after :])))
                return
            if not batch:
                self.live = self._sink
                log.note_live()
                return
            if not self._sink.write(batch):
                self._stick()
                return

    def _next_batch(self) -> bytes:
        segments = self._log.segments
        start = self._position
        rest, self._rest = self._rest, b""
        size = len(rest)
        while self._position < len(segments) and size < _CATCH_UP_BYTES:
            size += len(segments[self._position])
            self._position += 1
        return rest + b"".join(segments[start : self._position])


class BodyReader:
    """Waits for the end of a log, to take its one body (`log.whole`) or its failure. `on_closed` is called there, once.

    Joins when made, and leaves by itself before `on_closed`. `on_left` is called instead if the client leaves earlier.
    """

    __slots__ = ("_log", "_on_closed", "_on_left", "is_stuck", "live")

    def __init__(self, log: AnswerLog, on_closed: Callable[[], object], on_left: Callable[[], object]) -> None:
        self._log = log
        self._on_closed = on_closed
        self._on_left = on_left
        self.live: Sink | None = None
        self.is_stuck = False
        log.join(self)
        if log.is_closed:
            self.close(0)

    def leave(self) -> None:
        """The client has gone."""
        self._log.leave(self)
        self._on_left()

    # Called by the log.

    def commit(self) -> None:
        """Only the end counts."""

    def fill(self) -> None:
        """Nothing was written."""

    def close(self, unread: int) -> None:
        self._log.leave(self)
        self._on_closed()


async def read_to_end(log: AnswerLog, on_left: Callable[[], object]) -> None:
    """Be a reader of a log until it is closed. Raises its failure."""
    closed = asyncio.Event()
    reader = BodyReader(log, closed.set, on_left)
    try:
        await closed.wait()
    except asyncio.CancelledError:
        if not log.is_closed:
            reader.leave()
        raise
    if log.failure is not None:
        raise log.failure
