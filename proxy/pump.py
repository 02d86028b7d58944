"""Between the upstream's socket and the log: one read after the other, in the call stack that brings it.

Until the first event that means anything, events are held back, for an error among them can still be a status; the
hold is bounded. From there on everything is passed on as it comes, and the watch is told that something was heard. What
came together with `[DONE]` is left to whoever ends the log (`rest`), so that it leaves in one write with the end.
"""

from __future__ import annotations

import asyncio

from proxy.answerlog import AnswerLog
from proxy.upstream.watch import Watch
from proxy.wire.lane import Lane
from proxy.wire.normal import Normalizer

_MAX_HELD_EVENTS = 64
_MAX_HELD_BYTES = 256 * 1024

# How long usage or [DONE] may follow the last finish reason before the answer is taken as whole without them.
_AFTER_FINISH_S = 1.0


class Pump:
    """Carries one stream. With `commits` the first event that means something commits the log: a client reads along.

    Times are the event loop's, in seconds.
    """

    __slots__ = (
        "_commits",
        "_held",
        "_idle_timeout_s",
        "_lane",
        "_log",
        "_normalizer",
        "_now",
        "_watch",
        "first_event_at",
        "heard_at",
        "is_over",
        "rest",
        "said_at",
    )

    def __init__(
        self, normalizer: Normalizer, log: AnswerLog, watch: Watch, idle_timeout_s: float, *, commits: bool
    ) -> None:
        self._normalizer = normalizer
        self._log = log
        self._watch = watch
        self._idle_timeout_s = idle_timeout_s
        self._commits = commits
        self._now = asyncio.get_running_loop().time
        self._lane: Lane | None = None
        self._held = b""
        self.is_over = False
        self.first_event_at: float | None = None
        self.heard_at = self.said_at = 0.0
        self.rest = b""
        """Events that are not in the log yet."""

    def feed(self, data: bytes) -> bool:
        """Take one read; false when the stream has said that it is over. UpstreamError when the log is full."""
        if self._lane is not None and self._lane.passes(data):
            # All but a few chunks of a stream end here, and their price is how many objects they touch on their way.
            self.heard_at = self.said_at = self._now()
            self._log.append(data)
            return True
        normalizer = self._normalizer
        segment = normalizer.feed(data)
        self.heard_at = self._now()
        if self.first_event_at is None:
            segment = self._hold(segment)
        elif segment:
            self.said_at = self.heard_at
        if self.first_event_at is not None:
            self._lane = normalizer.lane
        if normalizer.is_ending:
            return self._go_on(segment)
        if segment:
            self._log.append(segment)
        return True

    def _go_on(self, segment: bytes) -> bool:
        """Whether to, now that something has ended: the answer, the stream, or the upstream's ability to go on."""
        normalizer = self._normalizer
        if normalizer.is_done:
            self.rest = segment
        elif segment:
            self._log.append(segment)
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
        limit_s = self._idle_timeout_s
        self._watch.limit(limit_s, "idle_timeout", f"The upstream fell silent for {limit_s:g} s in mid-answer.")
        self.first_event_at = self.said_at = self.heard_at
        self._watch.follow(self)
        if self._commits:
            self._log.commit()
        held, self._held = self._held, b""
        return held
