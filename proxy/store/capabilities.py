"""What is known of the targets, in memory and in the database.

Looking up is a dictionary access; learning changes the dictionary at once and the database soon after. A database
that cannot be read or written is a warning, never a failed call: what was learned is then forgotten at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from functools import partial

from proxy.policy.capabilities import Capability, Fact, Key, Topic
from proxy.store.db import Connection
from proxy.tasks import Tasks

_log = logging.getLogger(__name__)
_NOTHING = Capability()


class CapabilityStore:
    """All capabilities. Use `open` to make one; `close` writes what is still unwritten."""

    def __init__(self, connection: Connection, tasks: Tasks) -> None:
        self._connection = connection
        self._tasks = tasks
        self._known: dict[Key, Capability] = {}
        self._unwritten: dict[tuple[Key, Topic], Fact | None] = {}
        self._writing: asyncio.Task[None] | None = None
        self._data_version = -1
        self._changes = 0
        self._cannot_read = False

    @classmethod
    async def open(cls, connection: Connection, tasks: Tasks) -> CapabilityStore:
        store = cls(connection, tasks)
        await store.refresh()
        return store

    def get(self, key: Key) -> Capability:
        """What is known of a target; an empty Capability when that is nothing."""
        return self._known.get(key, _NOTHING)

    def all(self) -> Iterator[tuple[Key, Capability]]:
        return iter(sorted(self._known.items()))

    def learn(self, key: Key, topic: Topic, fact: Fact) -> None:
        self._known[key] = self.get(key).learned(topic, fact)
        self._unwritten[key, topic] = fact
        self._write_soon()

    def forget(self, key: Key) -> bool:
        """Drop all facts about a target; false when there were none."""
        capability = self._known.pop(key, None)
        if capability is None:
            return False
        self._unwritten |= dict.fromkeys((key, topic) for topic in capability.facts)
        self._write_soon()
        return True

    async def refresh(self) -> None:
        """Take over what another process (`headwater probe`) has written since the last look. Cheap when nothing was.

        A database that cannot be read (damaged, or locked) is a warning, and what was known stays.
        """
        changes = self._changes
        try:
            version = await self._connection.data_version()
            if version == self._data_version or self._writing is not None:
                return
            known = await self._connection.run(_read)
        except sqlite3.Error as error:
            if not self._cannot_read:
                _log.warning("what was learned of upstreams could not be read: %s", error)
            self._cannot_read = True
            return
        self._cannot_read = False
        if changes == self._changes:
            self._known, self._data_version = known, version

    async def close(self) -> None:
        """Write what is still unwritten. To be called before the tasks are cancelled, of which the writing is one."""
        while self._writing is not None:
            await asyncio.wait((self._writing,))
        await self._write()

    def _write_soon(self) -> None:
        self._changes += 1
        if self._writing is None:
            self._writing = self._tasks.spawn(self._write(), "write capabilities")

    async def _write(self) -> None:
        try:
            while self._unwritten:
                batch, self._unwritten = self._unwritten, {}
                await self._connection.transact(partial(_write, batch))
        except sqlite3.Error as error:
            _log.warning("what was learned of upstreams could not be stored: %s", error)
        finally:
            self._writing = None


def _read(connection: sqlite3.Connection) -> dict[Key, Capability]:
    known: dict[Key, Capability] = {}
    query = "SELECT upstream, model, credential, topic, value, evidence, learned_at FROM capability"
    for upstream, model, credential, topic, value, evidence, learned_at in connection.execute(query):
        if topic not in Topic.__members__.values():
            continue
        key = Key(upstream, model, credential)
        known[key] = known.get(key, _NOTHING).learned(Topic(topic), Fact(bool(value), evidence, learned_at))
    return known


def _write(batch: dict[tuple[Key, Topic], Fact | None], connection: sqlite3.Connection) -> None:
    for (key, topic), fact in batch.items():
        if fact is None:
            connection.execute(
                "DELETE FROM capability WHERE upstream=? AND model=? AND credential=? AND topic=?",
                (*key, topic.value),
            )
        else:
            connection.execute(
                "INSERT OR REPLACE INTO capability VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, topic.value, int(fact.value), fact.evidence, fact.learned_at),
            )
