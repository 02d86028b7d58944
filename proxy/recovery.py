"""A stream that died midway, being saved: the same answer is asked for again, or the rest of it.

What the client has must be the beginning of what it gets. So the new answer is held back while it repeats what was said,
and goes on from there; where it says something else, nothing can be saved, and the first error is told.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.chat import Recovery as Setting
from proxy.errors import UpstreamError
from proxy.wire.splice import Diverged, Said, Splice


class Recovery:
    """The saving of one answer, from its first break. `error` is what the client is told if it fails.

    `deadline`, on the clock `now`, is when the new answer must have caught up with what was said.
    """

    def __init__(self, error: UpstreamError, *, setting: Setting, deadline: float, now: Callable[[], float]) -> None:
        self.error = error
        self._setting = setting
        self._deadline = deadline
        self._now = now
        self._said: Said | None = None
        self._splice: Splice | None = None
        self.is_continuation = False

    @property
    def left_s(self) -> float:
        """What is left of the time for it."""
        return self._deadline - self._now()

    def take(self, said: Said | None) -> bool:
        """Note what was said until now, behind another break; whether an answer like that can be saved."""
        self._said, self._splice = said, None
        return said is not None and self.left_s > 0

    @property
    def partial(self) -> str:
        """What an upstream can be given to continue; empty where it cannot, or is not to be."""
        if self._setting != "continue" or self._said is None:
            return ""
        return self._said.texts.get("content", "").rstrip()

    def begin(self, *, is_continuation: bool) -> None:
        """A new answer begins: `feed` gets its events."""
        assert self._said is not None
        self.is_continuation = is_continuation
        self._splice = Splice(self._said, is_continuation=is_continuation)

    @property
    def is_caught_up(self) -> bool:
        return self._splice is not None and self._splice.is_caught_up

    def feed(self, segment: bytes) -> bytes:
        """What the client is to get of some events of the new answer. Diverged when the two cannot be joined, or not in time."""
        assert self._splice is not None
        if not self._splice.is_caught_up and self.left_s <= 0:
            raise Diverged("the new answer took too long to catch up")
        return self._splice.feed(segment)

    def end(self) -> None:
        """The new answer is at its end. Diverged when that is not behind what was said."""
        if not self.is_caught_up:
            raise Diverged("the new answer ended before it had repeated what was said")
