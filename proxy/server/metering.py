"""A stream that is stopped when its team has nothing left to pay for it.

What an answer may cost is held before it begins, for some tokens; as it grows, more is held piece by piece. When there is no
more, it goes on until it has used up what is held, and then ends with the error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.errors import ProxyError
from proxy.tasks import Tasks
from proxy.wire.usage import Said, said_in

PIECE_TOKENS = 256
"""For so many tokens of an answer credit is held at a time."""

# So many tokens before the end of what is held more is asked for, so that no answer has to wait for that.
_AHEAD_TOKENS = 64


class Meter:
    """Counts one answer. `extend` holds credit for so many more tokens, or raises what `stop` is told when they are said."""

    __slots__ = ("_held", "_is_extending", "_refusal", "_said", "_stop", "_tasks", "extend")

    def __init__(
        self, extend: Callable[[int], Awaitable[None]], stop: Callable[[ProxyError], None], tasks: Tasks, held: int
    ) -> None:
        """`held` is for how many tokens credit is held already."""
        self.extend = extend
        self._stop = stop
        self._tasks = tasks
        self._held = held
        self._said = Said()
        self._is_extending = False
        self._refusal: ProxyError | None = None

    def hear(self, segment: bytes) -> None:
        """Some events of the answer, on their way to its clients."""
        self._said += said_in(segment)
        tokens = self._said.tokens
        if self._refusal is not None:
            if tokens >= self._held:
                self._stop(self._refusal)
        elif tokens + _AHEAD_TOKENS >= self._held and not self._is_extending:
            self._is_extending = True
            self._tasks.spawn(self._extend(), "hold more for an answer")

    async def _extend(self) -> None:
        # A piece may come that is longer than what was held so far.
        more = max(PIECE_TOKENS, self._said.tokens - self._held + PIECE_TOKENS)
        try:
            await self.extend(more)
            self._held += more
        except ProxyError as refusal:
            self._refusal = refusal
        self._is_extending = False
        self.hear(b"")
