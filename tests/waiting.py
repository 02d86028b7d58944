"""Waiting for what a proxy does after it has answered: for rows, entries, prices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_LONG_S = 60
_PAUSE_S = 0.02

T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T]], holds: Callable[[T], object]) -> T:
    """Ask again and again, until what is found holds. It is what is found then; TimeoutError when it never holds."""
    async with asyncio.timeout(_LONG_S):
        while not holds(found := await ask()):  # noqa: ASYNC110 - it is another program that knows
            # Without a pause, the process that is waited for, to count tokens, say, hardly gets the processor.
            await asyncio.sleep(_PAUSE_S)
    return found
