"""One timer for all that a call waits for.

A call waits for a connection, a first token, the next bytes; and while it waits its client must hear something now and
then. Setting a timer for each wait would cost one per chunk. Instead a call has one, that comes by at the next time
anything could be due, and looks.

When a limit is over the watch cancels the task that waits, and `raise_if_expired` tells that it was the watch, and why. The
same protocol as `asyncio.timeout`, with the deadline moved by an assignment.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType

from proxy.errors import UpstreamError


class Watch:
    """Guards one task's waits. All times are in seconds; 0 for `heartbeat_s` or `total_s` turns that off.

    `on_silence` is called when the client has heard nothing for `heartbeat_s`.
    """

    __slots__ = (
        "_error",
        "_handle",
        "_heartbeat_s",
        "_limit",
        "_loop",
        "_on_silence",
        "_requested",
        "_started",
        "_task",
        "_total_s",
        "heard_at",
        "is_paused",
        "said_at",
    )

    def __init__(self, *, heartbeat_s: float, total_s: float, on_silence: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._heartbeat_s = heartbeat_s
        self._total_s = total_s
        self._on_silence = on_silence
        self._task: asyncio.Task[object] | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._limit: tuple[float, str, str] | None = None
        self._error: UpstreamError | None = None
        self._requested = 0
        self._started = self.heard_at = self.said_at = self._loop.time()
        self.is_paused = False
        """While true no limit runs: it is the client that is waited for."""

    def __enter__(self) -> Watch:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._requested = self._task.cancelling()
        if self._heartbeat_s:
            self._wake_by(self.said_at + self._heartbeat_s)
        if self._total_s:
            self._wake_by(self._started + self._total_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._task = None

    def limit(self, limit_s: float, code: str, message: str) -> None:
        """From now on let nothing be heard for at most `limit_s`, or else fail with 504 `code`."""
        self.heard_at = self._loop.time()
        self._limit = (limit_s, code, message)
        self._wake_by(self.heard_at + limit_s)

    def rest(self) -> None:
        """The upstream has said all it has to say: no limit runs any more, only the heartbeat."""
        self._limit = None
        self._total_s = 0

    def touch(self) -> None:
        """Something was heard."""
        self.heard_at = self._loop.time()

    def raise_if_expired(self) -> None:
        """To be called when the task was cancelled: raises the limit that was over, unless somebody else cancelled too."""
        if self._error is None or self._task is None:
            return
        error, self._error = self._error, None
        if self._task.uncancel() <= self._requested:
            raise error from None

    def _look(self) -> None:
        """See what is due, and come back when the next thing may be."""
        self._handle = None
        if self._task is None:
            return
        now = self._loop.time()
        wake = math.inf
        if self._heartbeat_s:
            if now - self.said_at >= self._heartbeat_s:
                self.said_at = now
                self._on_silence()
            wake = self.said_at + self._heartbeat_s
        if self._limit is not None and self._error is None:
            if self.is_paused:
                wake = min(wake, now + self._limit[0])
            elif now - self.heard_at >= self._limit[0]:
                self._expire(UpstreamError(504, self._limit[1], self._limit[2]))
            else:
                wake = min(wake, self.heard_at + self._limit[0])
        if self._total_s and self._error is None:
            if now - self._started >= self._total_s:
                error = UpstreamError(504, "total_timeout", "The call took longer than it may in all.", may_retry=False)
                self._expire(error)
            else:
                wake = min(wake, self._started + self._total_s)
        self._wake_by(wake)

    def _wake_by(self, when: float) -> None:
        """Have the timer come at `when` or earlier; an earlier one finds nothing due and goes on to the next."""
        if self._handle is not None:
            if self._handle.when() <= when:
                return
            self._handle.cancel()
        self._handle = self._loop.call_at(when, self._look) if when < math.inf else None

    def _expire(self, error: UpstreamError) -> None:
        if self._task is not None:
            self._error = error
            # It is over once: the next attempt sets its own.
            self._limit = None
            self._task.cancel()
