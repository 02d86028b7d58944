"""What is under way, so that a stop can wait for it, or end it.

Two kinds of things are counted: *work*, each with a task that a stop cancels, and *loose ends*, which a stop only waits for
(an answer that is still being written, a report that still is to be made).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class InFlight:
    """The work of one server."""

    def __init__(self) -> None:
        self._work: dict[asyncio.Task[Any], Callable[[], None]] = {}
        self._loose_ends = 0
        self._idle: asyncio.Future[None] | None = None
        """Set when nothing is under way any more; there while somebody waits for that."""

    def __len__(self) -> int:
        """How much work there is."""
        return len(self._work)

    def enter(self, task: asyncio.Task[Any], on_stop: Callable[[], None]) -> None:
        """Work begins. `on_stop` is to end it, and is called at most once."""
        self._work[task] = on_stop

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It is over, whatever became of it."""
        self._work.pop(task, None)
        if self._idle is not None:
            self._note_idle(self._idle)

    def hold(self) -> None:
        """There is a loose end, until `release`."""
        self._loose_ends += 1

    def release(self) -> None:
        self._loose_ends -= 1
        if self._idle is not None:
            self._note_idle(self._idle)

    def _note_idle(self, idle: asyncio.Future[None]) -> None:
        if not self._work and not self._loose_ends and not idle.done():
            idle.set_result(None)

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing is under way, for at most `timeout_s`."""
        if not self._work and not self._loose_ends:
            return
        if self._idle is None or self._idle.done():
            self._idle = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._idle), timeout_s)

    def stop(self) -> None:
        """End all work."""
        for on_stop in list(self._work.values()):
            on_stop()
