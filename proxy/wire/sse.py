"""The SSE codec: bytes to events and back. The only one in the project.

The grammar is WHATWG HTML §9.2.5–9.2.6 (https://html.spec.whatwg.org/multipage/server-sent-events.html): a line ends
in CRLF, LF or CR; a blank line ends an event; a line that starts with a colon is a comment; one space after a
field's colon is not part of its value; several `data` lines join with a newline; one BOM may stand at the start.
Unlike a browser, the end of the input also ends the last event: upstreams forget the last blank line.

`str.splitlines` and `bytes.splitlines` are not used: the former also cuts at U+2028 and U+0085, which are legal in JSON.
"""

from __future__ import annotations

from typing import NamedTuple

from proxy.wire.encoding import BOM

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class Event(NamedTuple):
    """One event's meaning. `data` is None when the event has no data line (a comment, a lone `retry`)."""

    type: bytes
    data: bytes | None


class EventTooLarge(Exception):
    """An event has grown past the limit and has not ended."""


class EventSplitter:
    """Cuts bytes that arrive in any pieces into whole events.

    Every event comes out as its raw lines, ended by LF only and without the blank line behind it. Memory is bounded
    by `max_event_bytes` of one unfinished event; past it EventTooLarge is raised and the splitter is of no more use.

    `was_exact` says of the last `feed` that its input was precisely the events it returned, each with LF LF behind
    it: then the caller may pass the input on instead of joining the events again. `is_between_events` says that the
    next byte begins an event: nothing is carried over.
    """

    __slots__ = (
        "_at_start",
        "_carry",
        "_carry_bytes",
        "_max_event_bytes",
        "_skip_lf",
        "is_between_events",
        "was_exact",
    )

    def __init__(self, max_event_bytes: int) -> None:
        self._carry: list[bytes] = []
        self._carry_bytes = 0
        self._max_event_bytes = max_event_bytes
        self._skip_lf = False
        self._at_start = True
        self.is_between_events = False
        self.was_exact = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that end within `data`, oldest first; often none."""
        if self.is_between_events and b"\r" not in data and data[-2:] == b"\n\n":
            self.was_exact = True
            return data[:-2].split(b"\n\n")
        self.was_exact = False
        events = self._feed_any(data)
        self.is_between_events = not (self._carry or self._skip_lf or self._at_start)
        return events

    def _feed_any(self, data: bytes) -> list[bytes]:
        if self._skip_lf and data:
            self._skip_lf = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            # A CR at the very end may be half of a CRLF: it ends the line now, and an LF that follows is skipped.
            self._skip_lf = data[-1:] == b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not self._carry:
            # Blank lines between events end nothing.
            data = data.lstrip(b"\n")
        if not data:
            return []
        ends_event = b"\n\n" in data or (data[:1] == b"\n" and bool(self._carry) and self._carry[-1][-1:] == b"\n")
        if not ends_event:
            self._carry.append(data)
            self._carry_bytes += len(data)
            if self._carry_bytes > self._max_event_bytes:
                raise EventTooLarge(f"an event is longer than {self._max_event_bytes} bytes")
            return []
        if self._carry:
            data = b"".join(self._carry) + data
        whole, _, rest = data.rpartition(b"\n\n")
        self._carry = [rest] if rest else []
        self._carry_bytes = len(rest)
        return self._clean(whole.split(b"\n\n"))

    def finish(self) -> list[bytes]:
        """What the end of the input ends: the last event, if its blank line was missing."""
        rest = b"".join(self._carry)
        self._carry = []
        return self._clean([rest])

    def _clean(self, events: list[bytes]) -> list[bytes]:
        # Three line ends in a row leave an LF at the head of the next event.
        events = [stripped for event in events if (stripped := event.strip(b"\n"))]
        if self._at_start and events:
            self._at_start = False
            events[0] = events[0].removeprefix(BOM)
        return events


def parse_event(raw: bytes) -> Event:
    """The type and data of one raw event, as `EventSplitter` returns it."""
    if raw.startswith(b"data: ") and b"\n" not in raw:
        return Event(b"", raw[6:])
    kind = b""
    data: list[bytes] = []
    for line in raw.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"event":
            kind = value.removeprefix(b" ")
    return Event(kind, b"\n".join(data) if data else None)


def data_event(payload: bytes) -> bytes:
    """The bytes of an event that carries one line of data. `payload` must not contain a line end."""
    return b"data: " + payload + b"\n\n"
