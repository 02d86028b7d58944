"""Between the upstream's socket and the log: one read after the other, in the call stack that brings it.

Until the first event that means anything, events are held back, for an error among them can still be a status; the
hold is bounded. From there on everything is passed on as it comes, and the watch is told that something was heard.
"""

from __future__ import annotations

from proxy.answerlog import AnswerLog
from proxy.upstream.watch import Watch
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
        "_held_bytes",
        "_idle_timeout_s",
        "_log",
        "_normalizer",
        "_watch",
        "first_event_at",
        "is_over",
        "last_event_at",
    )

    def __init__(
        self, normalizer: Normalizer, log: AnswerLog, watch: Watch, idle_timeout_s: float, *, commits: bool
    ) -> None:
        self._normalizer = normalizer
        self._log = log
        self._watch = watch
        self._idle_timeout_s = idle_timeout_s
        self._commits = commits
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.is_over = False
        self.first_event_at: float | None = None
        self.last_event_at = 0.0

    def feed(self, data: bytes) -> bool:
        """Take one read; false when the stream has said that it is over. UpstreamError when the log is full."""
        normalizer, watch = self._normalizer, self._watch
        segment = normalizer.feed(data)
        if self.first_event_at is None:
            self._hold(segment)
        else:
            watch.touch()
            if segment:
                self.last_event_at = watch.said_at = watch.heard_at
                self._log.append(segment)
        if normalizer.is_done or normalizer.error is not None:
            self.is_over = True
        elif normalizer.is_finished:
            watch.limit(_AFTER_FINISH_S, "no_done", "The stream has its finish reason, and stays open.")
        return not self.is_over

    def end(self) -> None:
        """The body is at its end."""
        segment = self._normalizer.finish()
        if self.first_event_at is None:
            self._hold(segment)
        elif segment:
            self._log.append(segment)

    def _hold(self, segment: bytes) -> None:
        self._held.append(segment)
        self._held_bytes += len(segment)
        normalizer, watch = self._normalizer, self._watch
        is_enough = normalizer.events > _MAX_HELD_EVENTS or self._held_bytes > _MAX_HELD_BYTES
        if not normalizer.is_meaningful and not is_enough:
            return
        limit_s = self._idle_timeout_s
        watch.limit(limit_s, "idle_timeout", f"The upstream fell silent for {limit_s:g} s in mid-answer.")
        self.first_event_at = self.last_event_at = watch.said_at = watch.heard_at
        if self._commits:
            self._log.commit()
        self._log.append(b"".join(self._held))
