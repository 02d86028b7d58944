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
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        """How much work there is."""
        return len(self._work)

    def enter(self, task: asyncio.Task[Any], on_stop: Callable[[], None]) -> None:
        """Work begins. `on_stop` is to end it, and is called at most once."""
        self._work[task] = on_stop
        self._is_idle.clear()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It is over, whatever became of it."""
        self._work.pop(task, None)
        self._note_idle()

    def hold(self) -> None:
        """There is a loose end, until `release`."""
        self._loose_ends += 1
        self._is_idle.clear()

    def release(self) -> None:
        self._loose_ends -= 1
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._work and not self._loose_ends:
            self._is_idle.set()

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing is under way, for at most `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    def stop(self) -> None:
        """End all work."""
        for on_stop in list(self._work.values()):
            on_stop()
