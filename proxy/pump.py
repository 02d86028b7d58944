"""Between the upstream's socket and the log: one read after the other, in the call stack that brings it.

Until the first event that means anything, events are held back, for an error among them can still be a status; the
hold is bounded. From there on everything goes to the outlet as it comes.
What came together with `[DONE]` is left to whoever ends the log (`rest`), so that it leaves in one write with the end.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable

from proxy.histogram import BOUNDS_S
from proxy.upstream.watch import Watch
from proxy.wire.lane import Lane
from proxy.wire.normal import Normalizer

_MAX_HELD_EVENTS = 64
_MAX_HELD_BYTES = 256 * 1024

# How long usage or [DONE] may follow the last finish reason before the answer is taken as whole without them.
_AFTER_FINISH_S = 1.0


Outlet = Callable[[bytes], None]
"""Where a stream's events go, segment by segment."""


def _nowhere(segment: bytes) -> None:
    raise AssertionError("There are no events before the first.")


class Pump:
    """Carries one stream. `begin` gets the pump at the first event that means something; what it gives is the outlet.

    Times are the event loop's, in seconds. In `gap_counts`, a Histogram's with the bounds BOUNDS_S, it counts the pauses between
    reads that brought something of the answer: from `first_event_at` to `said_at` in all.
    """

    __slots__ = (
        "_begin",
        "_gap_counts",
        "_held",
        "_lane",
        "_normalizer",
        "_now",
        "_pass_on",
        "_watch",
        "first_event_at",
        "heard_at",
        "is_over",
        "rest",
        "said_at",
    )

    def __init__(
        self, normalizer: Normalizer, watch: Watch, begin: Callable[[Pump], Outlet], gap_counts: list[int]
    ) -> None:
        self._normalizer = normalizer
        self._watch = watch
        self._begin = begin
        self._gap_counts = gap_counts
        self._pass_on: Outlet = _nowhere
        self._now = asyncio.get_running_loop().time
        self._lane: Lane | None = None
        self._held = b""
        self.is_over = False
        self.first_event_at: float | None = None
        self.heard_at = self.said_at = 0.0
        self.rest = b""
        """Events that have not gone to the outlet."""

    def feed(self, data: bytes) -> bool:
        """Take one read; false when the stream has said that it is over. Raises what the outlet raises."""
        if self._lane is not None and self._lane.passes(data):
            # All but a few chunks of a stream end here, and their price is how many objects they touch on their way.
            now = self._now()
            self._gap_counts[bisect_left(BOUNDS_S, now - self.said_at)] += 1
            self.heard_at = self.said_at = now
            self._pass_on(data)
            return True
        normalizer = self._normalizer
        segment = normalizer.feed(data)
        self.heard_at = self._now()
        if self.first_event_at is None:
            segment = self._hold(segment)
        elif segment:
            self._gap_counts[bisect_left(BOUNDS_S, self.heard_at - self.said_at)] += 1
            self.said_at = self.heard_at
        if self.first_event_at is not None:
            self._lane = normalizer.lane
        if normalizer.is_ending:
            return self._go_on(segment)
        if segment:
            self._pass_on(segment)
        return True

    def _go_on(self, segment: bytes) -> bool:
        """Whether to, now that something has ended: the answer, the stream, or the upstream's ability to go on."""
        normalizer = self._normalizer
        if normalizer.is_done:
            self.rest = segment
        elif segment:
            self._pass_on(segment)
        self.is_over = normalizer.is_done or normalizer.error is not None
        if not self.is_over and normalizer.is_finished:
            self._watch.limit(_AFTER_FINISH_S, "no_done", "The stream has its finish reason, and stays open.")
        return not self.is_over

    def end(self) -> None:
        """The body is at its end."""
        segment = self._normalizer.finish()
        self.rest = self._hold(segment) if self.first_event_at is None else segment

    def _hold(self, segment: bytes) -> bytes:
        """What may go on: nothing, until there is something that means anything, or more than should be held."""
        self._held += segment
        normalizer = self._normalizer
        is_enough = normalizer.events > _MAX_HELD_EVENTS or len(self._held) > _MAX_HELD_BYTES
        if not normalizer.is_meaningful and not is_enough:
            return b""
        self.first_event_at = self.said_at = self.heard_at
        self._pass_on = self._begin(self)
        held, self._held = self._held, b""
        return held


class Unsaid:
    """The times of a stream that is heard, while the client is told nothing of it."""

    said_at = 0.0

    def __init__(self, pump: Pump) -> None:
        self._pump = pump

    @property
    def heard_at(self) -> float:
        return self._pump.heard_at
