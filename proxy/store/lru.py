"""The small facts of all cached answers in memory, in order of last use.

A miss is the usual case and must cost no disk, so every entry has a place here, in about 250 bytes: its fields stand in
arrays, at a slot that two dictionaries know; slot 0 is where the ring of neighbours in use begins and ends.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np

_NEVER = math.inf


class Lru:
    """Keys, sizes and times of entries by their ids. Nothing here reads the clock: `now` is passed in."""

    def __init__(self) -> None:
        self._slot_by_key: dict[bytes, int] = {}
        self._slot_by_id: dict[int, int] = {}
        self._keys: list[bytes] = [b""]
        self._ids = array("q", [0])
        self._sizes = array("q", [0])
        self._created = array("d", [math.nan])
        self._expires = array("d", [_NEVER])
        self._newer = array("i", [0])
        self._older = array("i", [0])
        self._free: list[int] = []
        self.bytes = 0
        """The sum of all sizes."""

    def __len__(self) -> int:
        return len(self._slot_by_id)

    def __contains__(self, entry_id: int) -> bool:
        return entry_id in self._slot_by_id

    def find(self, key: bytes) -> int | None:
        """The id of the entry with that key, expired or not."""
        slot = self._slot_by_key.get(key)
        return None if slot is None else self._ids[slot]

    def find_live(self, key: bytes, now: float) -> int | None:
        slot = self._slot_by_key.get(key)
        return None if slot is None or self._expires[slot] <= now else self._ids[slot]

    def is_live(self, entry_id: int, now: float) -> bool:
        """Whether it is there and not expired."""
        slot = self._slot_by_id.get(entry_id)
        return slot is not None and self._expires[slot] > now

    def add(self, entry_id: int, key: bytes, size: int, created_at: float, expires_at: float | None) -> None:
        """Add an entry whose id and key are not there, as the one used last."""
        slot = self._free.pop() if self._free else self._grow()
        self._slot_by_key[key] = self._slot_by_id[entry_id] = slot
        self._keys[slot] = key
        self._ids[slot] = entry_id
        self._sizes[slot] = size
        self._created[slot] = created_at
        self._expires[slot] = _NEVER if expires_at is None else expires_at
        self.bytes += size
        self._link(slot)

    def touch(self, entry_id: int) -> None:
        """Make an entry the one used last."""
        slot = self._slot_by_id[entry_id]
        self._unlink(slot)
        self._link(slot)

    def resize(self, entry_id: int, size: int) -> None:
        slot = self._slot_by_id[entry_id]
        self.bytes += size - self._sizes[slot]
        self._sizes[slot] = size

    def drop(self, entry_id: int) -> bool:
        """Forget an entry; false when it is not there."""
        slot = self._slot_by_id.pop(entry_id, None)
        if slot is None:
            return False
        self._unlink(slot)
        del self._slot_by_key[self._keys[slot]]
        self.bytes -= self._sizes[slot]
        self._keys[slot] = b""
        self._ids[slot] = self._sizes[slot] = 0
        self._created[slot], self._expires[slot] = math.nan, _NEVER
        self._free.append(slot)
        return True

    def least_recent(self) -> int | None:
        """The id of the entry whose last use is longest ago."""
        return self._ids[self._newer[0]] or None

    def expired(self, now: float) -> list[int]:
        """The ids of all that have expired."""
        expired: list[int] = np.frombuffer(self._ids, np.int64)[np.frombuffer(self._expires) <= now].tolist()
        return expired

    def ids(self, below: int | None = None) -> list[int]:
        """All ids, or those below another, ascending."""
        every = np.sort(np.frombuffer(self._ids, np.int64))
        end = None if below is None else np.searchsorted(every, below)
        ids: list[int] = every[np.searchsorted(every, 1) : end].tolist()
        return ids

    def id_set(self) -> set[int]:
        return set(self._slot_by_id)

    def created_range(self) -> tuple[float, float] | None:
        """When the oldest and the newest entry were made; None when there is none."""
        if not self._slot_by_id:
            return None
        created = np.frombuffer(self._created)
        return float(np.nanmin(created)), float(np.nanmax(created))

    # ------------------------------------------------------------------ many at once, at the start

    def load(self, rows: Sequence[tuple[int, bytes, int, float, float | None]]) -> dict[bytes, int]:
        """Put (id, key, size, created_at, expires_at) behind what is there. Complete only after `index` was given what
        this returns, and `link`; adding is not possible before that.

        Two steps, for each makes a dictionary grow, which at 100,000 rows can take 5 ms.
        """
        ids, keys, sizes, created, expires = zip(*rows, strict=True)
        slot_by_key = dict(zip(keys, range(len(self._ids), len(self._ids) + len(rows)), strict=True))
        self._slot_by_id.update(zip(ids, slot_by_key.values(), strict=True))
        self._keys.extend(keys)
        self._ids.extend(ids)
        self._sizes.extend(sizes)
        self._created.extend(created)
        self._expires.extend(_NEVER if time is None else time for time in expires)
        self.bytes += sum(sizes)
        return slot_by_key

    def index(self, slot_by_key: dict[bytes, int]) -> None:
        """Make what was loaded known by its keys."""
        self._slot_by_key.update(slot_by_key)

    def link(self, order: np.ndarray) -> None:
        """Say in which order all that was loaded was used: `order`, int64[n], is a permutation of 0 … n-1, oldest first."""
        ring = np.concatenate(([0], order + 1, [0]))
        newer, older = np.empty(len(self._ids), np.int32), np.empty(len(self._ids), np.int32)
        newer[ring[:-1]] = ring[1:]
        older[ring[1:]] = ring[:-1]
        self._newer, self._older = array("i", newer.tobytes()), array("i", older.tobytes())

    # ------------------------------------------------------------------ slots

    def _grow(self) -> int:
        self._keys.append(b"")
        for numbers in (self._ids, self._sizes, self._newer, self._older):
            numbers.append(0)
        self._created.append(math.nan)
        self._expires.append(_NEVER)
        return len(self._ids) - 1

    def _link(self, slot: int) -> None:
        newest = self._older[0]
        self._older[slot], self._newer[slot] = newest, 0
        self._newer[newest] = self._older[0] = slot

    def _unlink(self, slot: int) -> None:
        older, newer = self._older[slot], self._newer[slot]
        self._newer[older], self._older[newer] = newer, older
