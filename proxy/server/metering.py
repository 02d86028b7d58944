"""A stream that is stopped when its team has nothing left to pay for it.

What an answer may cost is held before it begins, for some tokens; as it grows, more is held piece by piece, ahead of need. What
comes faster than that waits. When there is no more, it goes on until it has used up what is held, and then ends with the error.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from proxy.errors import OverloadedError, ProxyError
from proxy.tasks import Tasks
from proxy.wire.usage import Said, said_in

PIECE_TOKENS = 256
"""For so many tokens of an answer credit is held at a time."""

# When credit runs out, it is held in ever smaller pieces, so that next to nothing of it is left over.
_LEAST_TOKENS = 16

# So many tokens before the end of what is held more is asked for, so that hardly any answer has to wait for that.
_AHEAD_TOKENS = 64

_MAX_WAITING_BYTES = 16 * 1024 * 1024

_EVENT_END = b"\n\n"


class Meter:
    """Lets one answer go on.

    `extend` holds credit for so many tokens of it in all, or raises what `stop` is told when more are said.
    """

    __slots__ = (
        "_all_passed",
        "_held",
        "_is_extending",
        "_is_over",
        "_most",
        "_refusal",
        "_said",
        "_stop",
        "_tasks",
        "_waiting",
        "_waiting_bytes",
        "extend",
    )

    def __init__(
        self, extend: Callable[[int], Awaitable[None]], stop: Callable[[ProxyError], None], tasks: Tasks, held: int
    ) -> None:
        """`held` is for how many tokens credit is held already."""
        self.extend = extend
        self._stop = stop
        self._tasks = tasks
        self._held = held
        self._said = Said()
        self._waiting: deque[tuple[bytes, Callable[[bytes], None]]] = deque()
        self._waiting_bytes = 0
        self._all_passed: asyncio.Future[None] | None = None
        self._most = math.inf
        """For more tokens at a time there is no credit."""
        self._is_extending = self._is_over = False
        self._refusal: ProxyError | None = None

    def pass_on(self, segment: bytes, outlet: Callable[[bytes], None]) -> None:
        """Give some events of the answer to `outlet`, now or when credit is held for them.

        Raises what that raises, and OverloadedError when too much waits for a disk that takes nothing.
        """
        if self._is_over:
            return
        self._waiting.append((segment, outlet))
        self._waiting_bytes += len(segment)
        if len(self._waiting) == 1:
            self._go_on()
        elif self._waiting_bytes > _MAX_WAITING_BYTES:
            raise OverloadedError("ledger_unavailable", "The credit for the answer could not be held in time.")

    async def passed(self) -> None:
        """Wait until all has gone on. Where it may not, that is never, and who is told to stop is to cancel this."""
        if self._waiting or self._is_over:
            self._all_passed = asyncio.get_running_loop().create_future()
            await self._all_passed

    def close(self) -> None:
        """What still waits goes nowhere any more, nor what comes."""
        self._is_over = True
        self._waiting.clear()

    def _go_on(self) -> None:
        while self._waiting:
            segment, outlet = self._waiting[0]
            if not self._may_say(segment):
                break
            self._waiting.popleft()
            self._waiting_bytes -= len(segment)
            outlet(segment)
        if not self._waiting and self._all_passed is not None and not self._all_passed.done():
            self._all_passed.set_result(None)
        if self._refusal is not None:
            if self._waiting:
                self._end(self._refusal)
        elif not self._is_extending and self._wanted + _AHEAD_TOKENS >= self._held:
            self._is_extending = True
            self._tasks.spawn(self._extend(), "hold more for an answer")

    def _may_say(self, segment: bytes) -> bool:
        said = self._said + said_in(segment)
        if said.tokens > self._held:
            return False
        self._said = said
        return True

    @property
    def _wanted(self) -> int:
        """The tokens of all that was given."""
        return sum((said_in(segment) for segment, _ in self._waiting), self._said).tokens

    async def _extend(self) -> None:
        # More may wait than what was held so far.
        more = int(min(PIECE_TOKENS + max(0, self._wanted - self._held), self._most))
        try:
            await self.extend(self._held + more)
            self._held += more
        except ProxyError as refusal:
            if refusal.status == HTTPStatus.PAYMENT_REQUIRED and more > _LEAST_TOKENS:
                self._most = more // 2
            else:
                self._refusal = refusal
        self._is_extending = False
        if self._is_over:
            return
        try:
            self._go_on()
        except ProxyError as error:
            self.close()
            self._stop(error)

    def _end(self, refusal: ProxyError) -> None:
        """Say what is held still pays for, and stop."""
        segment, outlet = self._waiting[0]
        self.close()
        for event in segment.split(_EVENT_END)[:-1]:
            if not self._may_say(event + _EVENT_END):
                break
            outlet(event + _EVENT_END)
        self._stop(refusal)
