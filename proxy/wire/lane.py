"""The fast lane: a stream's events recognised by their bytes, without being parsed.

Nothing here knows what an event means. Whoever makes a `Lane` has seen an event whose every likeness may pass.
"""

from __future__ import annotations

import re

# The rest of a JSON string, from behind its opening quote to its closing one (RFC 8259 §7).
string_rest = re.compile(
    rb'[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})[^"\\\x00-\x1f]*+)*+"',
).match
_VOLATILE = re.compile(rb'"obfuscation": ?"')


class Lane:
    """What events that differ in one string (and OpenAI's `obfuscation` padding) have in common. `events` were found so."""

    __slots__ = ("_between", "_end", "_end_bytes", "_head", "_head_bytes", "_middle", "_tail", "events")

    def __init__(self, head: bytes, tail: bytes) -> None:
        self.events = 0
        self._head = head
        self._head_bytes = len(head)
        self._end = b'"' + tail + b"\n\n"
        self._end_bytes = len(self._end)
        self._between = self._end + head
        volatile = _VOLATILE.search(tail) if b"obfuscation" in tail else None
        rest = string_rest(tail, volatile.end()) if volatile else None
        if volatile and rest:
            self._middle = tail[: volatile.end()]
            self._tail = tail[rest.end() :]
        else:
            self._middle = b""
            self._tail = tail

    def passes(self, block: bytes) -> bool:
        """Whether a block is one or more events, all of this shape and each with its blank line, and nothing else.

        The same test as `fits`, for many events at once: what stands between one head and the next end must be the
        insides of JSON strings, and joined by spaces they are exactly when each of them is.
        """
        if not block.startswith(self._head):
            return False
        text = string_rest(block, self._head_bytes)
        if text is None:
            return False
        count = 1
        if block[text.end() - 1 :] != self._end:
            # One quote cannot both open and close a string.
            if not block.endswith(self._end) or len(block) < self._head_bytes + self._end_bytes:
                return False
            texts = block[self._head_bytes : -self._end_bytes].split(self._between)
            joined = b" ".join(texts) + b'"'
            rest = string_rest(joined)
            if rest is None or rest.end() != len(joined):
                return False
            count = len(texts)
        if not (block.isascii() or is_utf8(block)):
            return False
        self.events += count
        return True

    def fits(self, event: bytes) -> bool:
        """Whether an event without its blank line has this shape."""
        if not event.startswith(self._head):
            return False
        text = string_rest(event, self._head_bytes)
        if text is None:
            return False
        end = text.end()
        if self._middle:
            if not event.startswith(self._middle, end):
                return False
            text = string_rest(event, end + len(self._middle))
            if text is None:
                return False
            end = text.end()
        if event[end:] != self._tail or not (event.isascii() or is_utf8(event)):
            return False
        self.events += 1
        return True


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
