"""What was said in a call, stored beside its row: all of it, or a hash; sealed where there are keys for that.

The *prompt* is the body of the request, byte for byte as it came. The *answer* is one JSON body: the very one that came where the
upstream gave one, else the stream as one completion, as a client gets it that wants no stream: compact JSON in UTF-8, its
members in the order in which the stream named them (wire/chunks.py). Of an answer that broke it is what came, without the error;
one that cannot be put together is stored as the events of its stream. Of either no more than 4 MiB are stored (`is_cut`).

Where ledger.content is `hash`, it is BLAKE2b with 32 bytes over all of the text instead: `b2sum -l 256 FILE` gives the same for
the same text. It is not keyed, so that anybody can check a text, who is given the hash; but who has it can also try short
texts. So it is sealed, like all else, where there are keys.

It is written in the transaction that closes the call, and deleted with its row. A call that was interrupted by a kill -9 has
none, nor has one that closed while the disk took nothing: such ends wait in memory.

Keys have versions. Which stand in the file is in `content_key`, with a value by which each is known again, so that a wrong key is
found at the start and not when something is read. `rotate` seals everything anew with the first key.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from proxy.errors import ClientError, ConfigError, ProxyError
from proxy.policy import sealing
from proxy.policy.sealing import DamagedError, Form, Kind
from proxy.settings import ContentKey, Settings
from proxy.store.db import Connection
from proxy.tasks import off_loop
from proxy.wire.chunks import assemble
from proxy.wire.encoding import dumps

_log = logging.getLogger(__name__)

MAX_TEXT_BYTES = 4 * 1024 * 1024
"""So much of a prompt, and of an answer, is stored at most."""

# The bounds of one transaction of a rotation, a few milliseconds; and how long it lets others write before the next one.
_PIECE_ROWS, _PIECE_BYTES = 64, 1024 * 1024
_PAUSE_S = 0.005


class Text(NamedTuple):
    """A text, or its hash; `size` is how many bytes the whole text has."""

    data: bytes
    size: int
    is_cut: bool


class Content(NamedTuple):
    """What is stored of what was said in a call: with the form `full` the texts, with `hash` their hashes (32 bytes).

    `key_version` is that of the key it is sealed with, None for none; `answer` is None where nothing was said.
    """

    form: Form
    key_version: int | None
    prompt: Text
    answer: Text | None


class Packed(NamedTuple):
    """A text as it is stored, but for the sealing; `size` is how many bytes the whole text has."""

    data: bytes
    size: int


class Row(NamedTuple):
    """A row of `call_content`, but for the number of its call."""

    form: Form
    key_version: int | None
    prompt: bytes
    prompt_bytes: int
    answer: bytes | None
    answer_bytes: int | None


class Stored(NamedTuple):
    """A row with the id of its call, which it was sealed for."""

    call_id: str
    row: Row


class Rotated(NamedTuple):
    """How many calls' contents were sealed anew, and how many could not be opened and are as they were."""

    sealed: int
    damaged: int


class PackedExchange(NamedTuple):
    """A prompt and its answer: an Exchange (proxy/chat.py). Sealed when it is written, in the thread that writes."""

    form: Form
    key: ContentKey | None
    prompt: Packed
    answer: Packed | None

    def row(self, call_id: str) -> Row:
        """What is stored of it. Each time sealed with new nonces."""
        answer = self.answer
        row = Row(self.form, None, *self.prompt, *((None, None) if answer is None else answer))
        return row if self.key is None else _sealed(row, self.key, call_id)


class Contents:
    """How contents are stored, and opened again. `form` is None where nothing is stored.

    Of `keys` the first is for writing, and all are for reading; `variable` is where they come from.
    """

    def __init__(self, form: Form | None, keys: Sequence[ContentKey], variable: str) -> None:
        self.form = form
        self._keys = {key.version: key for key in keys}
        self._first = keys[0] if keys else None
        self._variable = variable

    # ------------------------------------------------------------------ writing

    async def packed(self, text: Sequence[bytes] | bytes) -> Packed | None:
        """A text as it is stored, or a stream's events (in normal form) as one; None for an empty one. Long ones in a thread."""
        if not text or self.form is None:
            return None
        size = len(text) if isinstance(text, bytes) else sum(map(len, text))
        packed: Packed = await off_loop(size, _pack, self.form, text)
        return packed

    async def exchange(self, prompt: bytes, answer: Packed | None) -> PackedExchange | None:
        """What is stored of a call; None for one without a prompt."""
        packed = await self.packed(prompt)
        if packed is None or self.form is None:
            return None
        return PackedExchange(self.form, self._first, packed, answer)

    # ------------------------------------------------------------------ reading

    async def opened(self, stored: Stored) -> Content:
        """ClientError 409 `content_key_missing` when its key is not given, ProxyError 500 `content_damaged`."""
        call_id, row = stored
        if row.key_version is not None:
            key = self._keys.get(row.key_version)
            if key is None:
                words = f"It is sealed with version {row.key_version} of the key, which {self._variable} does not hold."
                raise ClientError(409, "content_key_missing", words)
        else:
            key = None
        try:
            content: Content = await off_loop(len(row.prompt) + len(row.answer or b""), _opened, row, key, call_id)
        except DamagedError:
            words = "What is stored of this call is not what was stored: it cannot be opened."
            raise ProxyError(500, "content_damaged", words) from None
        return content

    # ------------------------------------------------------------------ keys

    async def open(self, connection: Connection) -> None:
        """See whether the keys are those of what is stored. ConfigError when one is another, or is missing.

        Where nothing is to be stored any more, a missing one is only told of in the log: what needs it cannot be read.
        """
        if await connection.transact(partial(self._check, must_write=self.form is not None)):
            # What is deleted is to be gone: https://www.sqlite.org/pragma.html#pragma_secure_delete
            await connection.run(_overwrite_deleted)

    def _check(self, connection: sqlite3.Connection, *, must_write: bool) -> bool:
        """Whether there is anything stored, or to be stored."""
        checks = dict(connection.execute("SELECT version, check_value FROM content_key ORDER BY version").fetchall())
        problems = [
            f"environment variable {self._variable}: its version {version} is another key than the one of that version "
            "by which prompts and answers were sealed: put that back, and give the new one a new version, in front"
            for version, check in checks.items()
            if version in self._keys and sealing.check_value(self._keys[version].secret) != check
        ]
        used = _used(connection)
        if missing := ", ".join(str(version) for version in used if version not in self._keys):
            words = (
                f"environment variable {self._variable} lacks version {missing} of the keys, by which prompts and answers "
                "in the database are sealed: put it behind the others, until `headwater content rotate` has sealed all anew"
            )
            if must_write:
                problems.append(words)
            elif self._variable:  # Who was told of none, as a command that adds credits, does not read them either.
                _log.warning("%s", words)
        if problems:
            raise ConfigError(problems)
        if must_write and self._first is not None:
            # Now, for later it would be in the middle of a call.
            sealing.sealed(self._first.secret, os.urandom(sealing.NONCE_BYTES), b"", "hash", "prompt", "")
            check = sealing.check_value(self._first.secret)
            connection.execute("INSERT OR IGNORE INTO content_key VALUES (?, ?)", (self._first.version, check))
        return must_write or bool(used) or _has_plain(connection)

    # ------------------------------------------------------------------ rotating

    async def rotate(self, connection: Connection) -> AsyncIterator[Rotated]:
        """Seal everything anew with the first key, also what is not sealed: piece by piece, told of each.

        It may be stopped at any piece and begun again, while a proxy runs on the same file; that is to have the new key first
        already, or what it stores meanwhile is not done. At the end the other keys are forgotten that nothing is sealed with.
        ConfigError when there is no key, or one that is needed is missing.
        """
        first = self._first
        if first is None:
            raise ConfigError([f"environment variable {self._variable} is not set: there is no key to seal with"])
        await connection.transact(partial(self._check, must_write=True))
        await connection.run(_overwrite_deleted)
        for version in (None, *await connection.run(_used)):
            after = 0 if version != first.version else None
            while after is not None:
                rotated, after = await connection.transact(partial(self._rotate_piece, first, version, after))
                yield rotated
                await asyncio.sleep(_PAUSE_S)
        await connection.transact(partial(_forget_unused, first.version))

    def _rotate_piece(
        self, first: ContentKey, version: int | None, after: int, connection: sqlite3.Connection
    ) -> tuple[Rotated, int | None]:
        """A transaction: the next rows of a version behind a call's number. Also the last of these; None when there was none."""
        sealed = damaged = 0
        last: int | None = None
        for number, call_id, row in _next_rows(connection, version, after):
            last = number
            try:
                plain = row if version is None else _unsealed(row, self._keys[version], call_id)
            except DamagedError:
                damaged += 1
                continue
            new = _sealed(plain, first, call_id)
            statement = "UPDATE call_content SET key_version = ?, prompt = ?, answer = ? WHERE call = ?"
            connection.execute(statement, (new.key_version, new.prompt, new.answer, number))
            sealed += 1
        return Rotated(sealed, damaged), last


NO_CONTENTS = Contents(None, (), "")


def contents_of(settings: Settings) -> Contents:
    """How contents are stored by these settings."""
    ledger = settings.ledger
    form = None if ledger.content == "off" else ledger.content
    return Contents(form, settings.content_keys, ledger.content_keys_env)


# ---------------------------------------------------------------------- texts


def _pack(form: Form, text: Sequence[bytes] | bytes) -> Packed:
    whole = text if isinstance(text, bytes) else _as_one(text)
    return Packed(sealing.digest(whole) if form == "hash" else sealing.packed(whole[:MAX_TEXT_BYTES]), len(whole))


def _as_one(events: Sequence[bytes]) -> bytes:
    """The completion that a stream says, as JSON; or its events, where they are not what a stream's are."""
    try:
        return dumps(assemble(events))
    except (ValueError, LookupError, TypeError, AttributeError):
        return b"".join(events)


def _opened(row: Row, key: ContentKey | None, call_id: str) -> Content:
    plain = row if key is None else _unsealed(row, key, call_id)
    answer = None
    if plain.answer is not None and plain.answer_bytes is not None:
        answer = _text(plain.form, plain.answer, plain.answer_bytes)
    return Content(plain.form, row.key_version, _text(plain.form, plain.prompt, plain.prompt_bytes), answer)


def _text(form: Form, data: bytes, size: int) -> Text:
    if form == "hash":
        return Text(data, size, False)
    text = sealing.unpacked(data, MAX_TEXT_BYTES)
    if len(text) != min(size, MAX_TEXT_BYTES):
        raise DamagedError
    return Text(text, size, len(text) < size)


def _sealed(row: Row, key: ContentKey, call_id: str) -> Row:
    def seal(kind: Kind, data: bytes) -> bytes:
        return sealing.sealed(key.secret, os.urandom(sealing.NONCE_BYTES), data, row.form, kind, call_id)

    answer = None if row.answer is None else seal("answer", row.answer)
    return row._replace(key_version=key.version, prompt=seal("prompt", row.prompt), answer=answer)


def _unsealed(row: Row, key: ContentKey, call_id: str) -> Row:
    def unseal(kind: Kind, data: bytes) -> bytes:
        return sealing.unsealed(key.secret, data, row.form, kind, call_id)

    answer = None if row.answer is None else unseal("answer", row.answer)
    return row._replace(key_version=None, prompt=unseal("prompt", row.prompt), answer=answer)


# ---------------------------------------------------------------------- rows

_SELECT = f"""SELECT call_content.call, call.id, {", ".join(f"call_content.{name}" for name in Row._fields)}
              FROM call_content JOIN call ON call.number = call_content.call"""


def read(connection: sqlite3.Connection, number: int) -> Stored | None:
    """What is stored with the call of that number."""
    found: tuple[Any, ...] | None = connection.execute(f"{_SELECT} WHERE call_content.call = ?", (number,)).fetchone()
    return None if found is None else Stored(found[1], Row(*found[2:]))


def _next_rows(connection: sqlite3.Connection, version: int | None, after: int) -> list[tuple[int, str, Row]]:
    """The rows of a version behind a call's number, as many as make one piece: the number, the call's id, and the row."""
    condition = "call_content.key_version IS ? AND call_content.call > ? ORDER BY call_content.call LIMIT ?"
    rows: list[tuple[int, str, Row]] = []
    size = 0
    for number, call_id, *members in connection.execute(f"{_SELECT} WHERE {condition}", (version, after, _PIECE_ROWS)):
        row = Row(*members)
        rows.append((number, call_id, row))
        size += len(row.prompt) + len(row.answer or b"")
        if size > _PIECE_BYTES:
            break
    return rows


def _used(connection: sqlite3.Connection) -> list[int]:
    """The versions of keys that something is sealed with: one look at the index for each."""
    query = """WITH RECURSIVE used(version) AS (
                   SELECT min(key_version) FROM call_content
                   UNION ALL
                   SELECT (SELECT min(key_version) FROM call_content WHERE key_version > version)
                   FROM used WHERE version IS NOT NULL)
               SELECT version FROM used WHERE version IS NOT NULL"""
    return [version for (version,) in connection.execute(query)]


def _has_plain(connection: sqlite3.Connection) -> bool:
    query = "SELECT EXISTS (SELECT 1 FROM call_content WHERE key_version IS NULL)"
    return bool(connection.execute(query).fetchone()[0])


def _overwrite_deleted(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA secure_delete=ON").fetchone()


def _forget_unused(first: int, connection: sqlite3.Connection) -> None:
    kept = {first, *_used(connection)}
    versions = [version for (version,) in connection.execute("SELECT version FROM content_key").fetchall()]
    connection.executemany(
        "DELETE FROM content_key WHERE version = ?", [(version,) for version in versions if version not in kept]
    )
