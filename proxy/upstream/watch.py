"""What a call waits for, and how long it may: one wheel of deadlines for all calls.

A call waits for a connection, a first token, the next bytes; and while it waits its client must hear something now and
then. A timer for each wait would cost one per chunk, and a timer of the event loop's costs as much as sending a few
chunks. So a call's `Watch` only notes when it is next to be looked at, in a wheel that all watches share; when it comes by,
it sees whether anything is due. A deadline is kept to within a thirtieth of a second.

When a limit is over the watch cancels the task that waits, and `raise_if_expired` tells that it was the watch, and why. The
same protocol as `asyncio.timeout`, with the deadline moved by an assignment.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from heapq import heappop, heappush
from types import TracebackType
from typing import Protocol

from proxy.errors import Trouble, UpstreamError

_TURNS_PER_S = 32


class Wheel:
    """Deadlines in turns of 1/32 s. It has one timer of the loop's, set for the earliest turn at which anybody is due."""

    __slots__ = ("_due", "_handle", "_loop", "_next", "_turns", "now")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: dict[int, set[Watch]] = {}
        self._turns: list[int] = []
        """A heap of the turns in `_due`; at some of them nobody may be due any more."""
        self._handle: asyncio.TimerHandle | None = None
        self._next = 0
        self.now: Callable[[], float] = self._loop.time

    def put(self, watch: Watch, turn: int) -> None:
        """Look at the watch at that turn."""
        due = self._due.get(turn)
        if due is not None:
            due.add(watch)
            return
        self._due[turn] = {watch}
        heappush(self._turns, turn)
        if self._handle is None or turn < self._next:
            self._set_timer()

    def take(self, watch: Watch, turn: int) -> None:
        """Forget it again."""
        due = self._due.get(turn)
        if due is not None:
            due.discard(watch)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _set_timer(self) -> None:
        self.close()
        if self._turns:
            self._next = self._turns[0]
            self._handle = self._loop.call_at(self._next / _TURNS_PER_S, self._turn)

    def _turn(self) -> None:
        self._handle = None
        now = self.now()
        while self._turns and self._turns[0] / _TURNS_PER_S <= now:
            for watch in self._due.pop(heappop(self._turns)):
                # Not in this stack: what goes wrong with one must not keep the others from being looked at.
                self._loop.call_soon(watch.look)
        self._set_timer()


class Heard(Protocol):
    """Where a stream's times are written down, chunk by chunk: the event loop's, in seconds."""

    @property
    def heard_at(self) -> float:
        """When the upstream was heard last."""
        ...

    @property
    def said_at(self) -> float:
        """When the client was last told anything of it."""
        ...


class Watch:
    """Guards the waits of the task that enters it. All times are in seconds; 0 for `heartbeat_s` or `total_s` turns that off.

    `on_silence` is called when the client has heard nothing for `heartbeat_s`.
    """

    __slots__ = (
        "_error",
        "_followed",
        "_heartbeat_s",
        "_limit",
        "_on_silence",
        "_requested",
        "_started",
        "_task",
        "_total_s",
        "_turn",
        "_wheel",
        "heard_at",
        "is_paused",
        "said_at",
    )

    def __init__(self, wheel: Wheel, *, heartbeat_s: float, total_s: float, on_silence: Callable[[], None]) -> None:
        self._wheel = wheel
        self._turn = 0
        self._heartbeat_s = heartbeat_s
        self._total_s = total_s
        self._on_silence = on_silence
        self._task: asyncio.Task[object] | None = None
        self._followed: Heard | None = None
        self._limit: tuple[float, str, str, Trouble] | None = None
        self._error: UpstreamError | None = None
        self._requested = 0
        self._started = self.heard_at = self.said_at = wheel.now()
        self.is_paused = False
        """While true no limit runs: it is the client that is waited for."""

    def __enter__(self) -> Watch:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._requested = self._task.cancelling()
        if self._heartbeat_s:
            self._look_by(self.said_at + self._heartbeat_s)
        if self._total_s:
            self._look_by(self._started + self._total_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._turn:
            self._wheel.take(self, self._turn)
        self._task = None
        # The stream knows the watch too, and what refers to each other waits for the collector of garbage.
        self._followed = None

    def limit(self, limit_s: float, code: str, message: str, trouble: Trouble = Trouble.SILENT) -> None:
        """From now on let nothing be heard for at most `limit_s`, or else fail with 504 `code`."""
        self.heard_at = self._wheel.now()
        self._limit = (limit_s, code, message, trouble)
        self._look_by(self.heard_at + limit_s)

    def lift(self) -> None:
        """Nothing is waited for just now: no limit runs until the next one is set."""
        if self._followed is not None:
            self.said_at = max(self.said_at, self._followed.said_at)
            self._followed = None
        self._limit = None
        self.is_paused = False

    def rest(self) -> None:
        """The upstream has said all it has to say: no limit runs any more, only the heartbeat."""
        self._limit = None
        self._total_s = 0

    def follow(self, stream: Heard) -> None:
        """From now on `stream` notes the times, which spares every chunk a call."""
        self._followed = stream

    def touch(self) -> None:
        """Something was heard."""
        self.heard_at = self._wheel.now()

    def raise_if_expired(self) -> None:
        """To be called when the task was cancelled: raises the limit that was over, unless somebody else cancelled too."""
        if self._error is None or self._task is None:
            return
        error, self._error = self._error, None
        if self._task.uncancel() <= self._requested:
            raise error from None

    def look(self) -> None:
        """See what is due, and come back when the next thing may be. Called by the wheel."""
        self._turn = 0
        if self._task is None:
            return
        now = self._wheel.now()
        if self._followed is not None:
            self.heard_at = max(self.heard_at, self._followed.heard_at)
            self.said_at = max(self.said_at, self._followed.said_at)
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
                _, code, message, trouble = self._limit
                self._expire(UpstreamError(504, code, message, trouble=trouble))
            else:
                wake = min(wake, self.heard_at + self._limit[0])
        if self._total_s and self._error is None:
            if now - self._started >= self._total_s:
                words = "The call took longer than it may in all."
                error = UpstreamError(504, "total_timeout", words, trouble=Trouble.FINAL)
                self._expire(error)
            else:
                wake = min(wake, self._started + self._total_s)
        if wake < math.inf:
            self._look_by(wake)

    def _look_by(self, when: float) -> None:
        """Be looked at by the first turn behind `when` or earlier: then nothing is due, and the next time is noted."""
        turn = int(when * _TURNS_PER_S) + 1
        if self._turn:
            if self._turn <= turn:
                return
            self._wheel.take(self, self._turn)
        self._turn = turn
        self._wheel.put(self, turn)

    def _expire(self, error: UpstreamError) -> None:
        if self._task is not None:
            self._error = error
            # It is over once: the next attempt sets its own.
            self._limit = None
            self._task.cancel()
