"""The answers used last, as they are, so that a hit on one of them costs no disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace

from proxy.store.entries import Entry, Note, noted

_OBJECT_BYTES = 1200  # what an Entry takes in memory besides its answer and question: measured


class AnswerMemory:
    """Whole entries by id, the least recently used of which leave when all take more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self.bytes = 0
        """What all take."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry_id: int) -> bool:
        return entry_id in self._entries

    def get(self, entry_id: int) -> Entry | None:
        return self._entries.get(entry_id)

    def all(self) -> Collection[Entry]:
        return self._entries.values()

    def keep(self, entry: Entry) -> None:
        """Keep an entry that is not there as the one used last, unless it would push many others out."""
        size = _size(entry)
        if size * 8 <= self._max_bytes:
            self._entries[entry.id] = entry
            self.bytes += size
            while self.bytes > self._max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= _size(oldest)

    def touch(self, entry_id: int) -> None:
        if entry_id in self._entries:
            self._entries.move_to_end(entry_id)

    def note(self, entry_id: int, note: Note) -> None:
        if entry_id in self._entries:
            self._entries[entry_id] = noted(self._entries[entry_id], note)

    def resize(self, entry_id: int, size: int) -> None:
        """Change what the entry says of its size on disk."""
        if entry_id in self._entries:
            self._entries[entry_id] = replace(self._entries[entry_id], size=size)

    def drop(self, entry_id: int) -> None:
        if entry_id in self._entries:
            self.bytes -= _size(self._entries.pop(entry_id))


def _size(entry: Entry) -> int:
    return len(entry.answer) + len(entry.question) + _OBJECT_BYTES
