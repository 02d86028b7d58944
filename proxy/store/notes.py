"""Calls under way that hold nothing, noted in a file of their process, where a kill -9 leaves them.

A call that holds credits, has a budget or belongs to a job is opened by a transaction, for other processes are to see what it
holds. One that does neither needs only a mark that outlives its process. It is a slot in the process's own file; when the call
is over its row is committed, and then the slot is cleared. A kill between the two leaves both; therefore the process's row
says which notes its last transaction has made rows of (`closed` in the table `process`).

Notes are written by the event loop itself. To put some 300 bytes into the page cache takes 2 µs; to hand them to a thread and
hear of it costs 30 to 200. When a write had to wait, for the disk is busy, nothing is noted for a minute, and these calls are
opened by transactions as well.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import orjson

from proxy.store.calls import NewCall

_log = logging.getLogger(__name__)

# Four to a page, which no note crosses: a kill leaves all of it or nothing. What is longer is not noted.
_SLOT_BYTES = 1024
_MAX_SLOTS = 16_384

# How much of the text that follows is the note, and its checksum. Zeros: there is none.
_HEAD = struct.Struct("<II")
_NOTHING = bytes(_HEAD.size)

# More than a busy processor makes a thread wait.
_SLOW_S = 0.1
_REST_S = 60.0


class Notes:
    """Those of this process, in an open file that nobody else writes; without one (None) nothing can be noted.

    `clock` tells seconds.
    """

    def __init__(self, file: int | None, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._rests_until = 0.0
        self._slots = 0
        self._free: list[int] = []
        self.stuck: dict[int, int] = {}
        """The numbers of calls whose rows are written, and whose notes could not be cleared; and the slots of these."""

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self._slots

    def close(self) -> None:
        """The file is no longer to be written."""
        self._file = None

    def take(self, number: int, new: NewCall) -> int | None:
        """Note a call, by its number: the slot, to be cleared. None when it cannot be noted now."""
        if self._file is None:
            return None
        text = orjson.dumps((number, *new))
        now = self._clock()
        if len(text) > _SLOT_BYTES - _HEAD.size or now < self._rests_until:
            return None
        try:
            if not self._free:
                self._grow(self._file)
            slot = self._free.pop()
        except (OSError, IndexError):
            return None
        try:
            os.pwrite(self._file, _HEAD.pack(len(text), crc32(text)) + text, slot * _SLOT_BYTES)
        except OSError:
            self.clear(number, slot)
            return None
        if (ended := self._clock()) - now > _SLOW_S:
            self._rests_until = ended + _REST_S
        return slot

    def clear(self, number: int, slot: int) -> None:
        """Empty a slot, after the call's row was committed."""
        if self._file is None:
            return
        try:
            os.pwrite(self._file, _NOTHING, slot * _SLOT_BYTES)
        except OSError as error:
            if not self.stuck:
                _log.warning("notes of calls under way cannot be cleared: %s", error)
            self.stuck[number] = slot
        else:
            self._free.append(slot)

    def _grow(self, file: int) -> None:
        """Twice as many slots. OSError when the disk has no room for them, IndexError above the most."""
        more = self._slots or 16
        if self._slots + more > _MAX_SLOTS:
            raise IndexError
        # So that no later write finds the disk full.
        os.posix_fallocate(file, self._slots * _SLOT_BYTES, more * _SLOT_BYTES)
        self._free.extend(range(self._slots + more - 1, self._slots - 1, -1))
        self._slots += more


def read_notes(path: Path) -> dict[int, NewCall]:
    """The calls noted in a process's file, by their numbers, also while it writes there. None without a file. OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    noted = {}
    for start in range(0, len(content) - _HEAD.size + 1, _SLOT_BYTES):
        size, checksum = _HEAD.unpack_from(content, start)
        text = content[start + _HEAD.size : start + _HEAD.size + min(size, _SLOT_BYTES)]
        # One that is being written, or came to the disk in part before the power was cut, is none.
        if size and crc32(text) == checksum:
            number, *members = orjson.loads(text)
            noted[number] = NewCall(*members)
    return noted
