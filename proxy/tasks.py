"""Tasks that are named, referenced and awaited: no task of ours is lost, and none fails unseen.

And work that would hold up everybody else, done in a thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

_log = logging.getLogger(__name__)

# Parsing, splitting or assembling so much JSON takes about 2 ms.
LONG_WORK_BYTES = 64 * 1024


async def off_loop(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Do CPU work on so many bytes here when it is short, in a thread when it is long."""
    if size < LONG_WORK_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


class Tasks:
    """The tasks of one server. Use from one event loop only."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` beside the caller. What it raises is logged with its trace: it is a bug of ours."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %s failed", task.get_name(), exc_info=error)

    async def wait(self, timeout_s: float) -> bool:
        """Wait for all tasks to end by themselves; false when some still run after `timeout_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        return not self._running

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running, timeout=1.0)
