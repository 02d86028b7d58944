"""What was said, beside the row of its call: one row for one call, deleted with it; and keys that are wrong, missing, new."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.errors import ConfigError, ProxyError
from proxy.settings import ContentKey
from proxy.store import db, migrations
from proxy.store.content import MAX_TEXT_BYTES, Contents, Rotated
from proxy.store.ledger import Ledger
from proxy.store.processes import Presence
from proxy.tasks import Tasks
from tests.store.ledgers import NOW, check_books, done, look, new, opened, record

ONE, TWO, OTHER = ContentKey(1, b"1" * 32), ContentKey(2, b"2" * 32), ContentKey(1, b"x" * 32)
VARIABLE = "THE_KEYS"


def full(*keys: ContentKey) -> Contents:
    return Contents("full", keys, VARIABLE)


@asynccontextmanager
async def open_with(path: Path, contents: Contents) -> AsyncIterator[Ledger]:
    """A ledger of a process that ends with the block."""
    connection, reader = await db.connect(path, migrations.MAIN), await db.connect(path, migrations.MAIN)
    presence, tasks = Presence(path), Tasks()
    try:
        ledger = await Ledger.open(connection, reader, presence, tasks, NOW, contents)
        yield ledger
        await ledger.close()
    finally:
        presence.leave()
        await tasks.close()
        await connection.close()
        await reader.close()


async def say(ledger: Ledger, contents: Contents, *calls: str) -> None:
    """Calls with these ids, each of which asked and was answered by its id."""
    for call_id in calls:
        answer = await contents.packed(f"{call_id}!".encode())
        content = await contents.exchange(f"{call_id}?".encode(), answer)
        ledger.close_call(await opened(ledger, new(call_id)), done(content=content))
    await ledger.settled()


async def said(ledger: Ledger) -> list[str]:
    """What the stored calls asked, the latest first; "-" for one of which nothing is stored."""
    found = []
    for row in (await ledger.calls(limit=1000)).rows:
        content = await ledger.content(row.number)
        if content is not None:
            assert content.answer is not None
            assert content.prompt.data == f"{row.id}?".encode()
            assert content.answer.data == f"{row.id}!".encode()
        found.append("-" if content is None else content.prompt.data.decode())
    return found


async def rotated(path: Path, contents: Contents, pieces: int | None = None) -> Rotated:
    """What a rotation does that is stopped after so many pieces."""
    connection = await db.connect(path, migrations.MAIN)
    total = Rotated(0, 0)
    try:
        async for piece in contents.rotate(connection):
            total = Rotated(total.sealed + piece.sealed, total.damaged + piece.damaged)
            if pieces is not None and (pieces := pieces - 1) == 0:
                break
    finally:
        await connection.close()
    return total


def bytes_of(path: Path) -> bytes:
    """All that is on disk: the file, and its log where there is one."""
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*") if not file.is_dir())


async def change(path: Path, statement: str) -> None:
    connection = await db.connect(path, migrations.MAIN)
    await connection.transact(lambda raw: raw.execute(statement) and None)
    await connection.close()


@pytest.mark.parametrize("keys", [(), (ONE,)])
async def test_each_call_has_its_own_and_loses_it_with_its_row(path: Path, keys: tuple[ContentKey, ...]) -> None:
    contents = full(*keys)
    async with open_with(path, contents) as ledger:
        await say(ledger, contents, "old")
        # Many in one transaction, of which some said nothing.
        for number in range(200):
            content = await contents.exchange(b"call-%d?" % number, await contents.packed(b"call-%d!" % number))
            end = done(content=content if number % 3 else None, closed_at=NOW + 10)
            record(ledger, new(f"call-{number}"), end)
        expected = [f"call-{number}?" if number % 3 else "-" for number in reversed(range(200))]
        assert await said(ledger) == [*expected, "old?"]
        await ledger.compact(NOW + 5)
        assert await said(ledger) == expected
        assert look(path, "SELECT count(*) FROM call_content") == [(133,)]
        await ledger.compact(NOW + 50)
        assert look(path, "SELECT count(*) FROM call_content") == [(0,)]
        # Numbers of rows that are gone may come again.
        await say(ledger, contents, "new")
        assert await said(ledger) == ["new?"]
        assert await ledger.content(999) is None


async def test_of_a_long_text_the_beginning_is_stored_and_the_hash_is_of_all(path: Path) -> None:
    text = b"0123456789abcdef" * (MAX_TEXT_BYTES // 16) + b"the end"
    for contents in (full(ONE), Contents("hash", (ONE,), VARIABLE)):
        async with open_with(path, contents) as ledger:
            content = await contents.exchange(text, await contents.packed(text[: -len(b"the end")]))
            record(ledger, new(), done(content=content))
            number = (await ledger.calls()).rows[0].number
            stored = await ledger.content(number)
        assert stored is not None
        assert stored.answer is not None
        assert (stored.prompt.size, stored.answer.size) == (len(text), MAX_TEXT_BYTES)
        if stored.form == "full":
            assert stored.prompt == (text[:MAX_TEXT_BYTES], len(text), True)
            assert stored.answer == (text[:MAX_TEXT_BYTES], MAX_TEXT_BYTES, False)
        else:
            assert len({stored.prompt.data, stored.answer.data}) == 2
            assert not stored.prompt.is_cut


async def test_events_that_cannot_be_put_together_are_stored_as_they_came(path: Path) -> None:
    contents = full()
    events = [b'data: {"choices": [{}]}\n\n', b"data: {broken}\n\n"]
    async with open_with(path, contents) as ledger:
        record(ledger, new(), done(content=await contents.exchange(b"?", await contents.packed(events))))
        content = await ledger.content((await ledger.calls()).rows[0].number)
    assert content is not None
    assert content.answer is not None
    assert content.answer.data == b"".join(events)


async def test_without_content_there_is_nothing_to_store() -> None:
    off = Contents(None, (), VARIABLE)
    assert await off.packed(b"Hello") is None
    assert await off.exchange(b"Hello", None) is None
    assert await full().exchange(b"", None) is None


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ((OTHER,), "environment variable THE_KEYS: its version 1 is another key "),
        ((TWO, OTHER), "environment variable THE_KEYS: its version 1 is another key "),
        ((TWO,), "environment variable THE_KEYS lacks version 1 "),
        ((), "environment variable THE_KEYS lacks version 1 "),
    ],
)
async def test_a_wrong_key_is_found_at_the_start(path: Path, keys: tuple[ContentKey, ...], words: str) -> None:
    async with open_with(path, full(ONE)) as ledger:
        await say(ledger, full(ONE), "one")
    before = look(path, "SELECT * FROM content_key")
    with pytest.raises(ConfigError) as caught:
        async with open_with(path, full(*keys)):
            pass
    (problem,) = caught.value.problems
    assert problem.startswith(words)
    assert all(str(key.secret) not in problem and key.secret.decode() not in problem for key in keys)
    assert look(path, "SELECT * FROM content_key") == before
    async with open_with(path, full(TWO, ONE)) as ledger:
        assert await said(ledger) == ["one?"]


async def test_a_key_that_nothing_needs_may_be_missing(path: Path) -> None:
    async with open_with(path, full(ONE)) as ledger:
        await say(ledger, full(ONE), "one")
        await ledger.compact(NOW + 50)
    async with open_with(path, full(TWO)) as ledger:
        await say(ledger, full(TWO), "two")
        assert await said(ledger) == ["two?"]


async def test_where_nothing_is_stored_any_more_what_needs_a_missing_key_cannot_be_read(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_with(path, full(ONE)) as ledger:
        await say(ledger, full(ONE), "one")
    with caplog.at_level(logging.WARNING):
        async with open_with(path, Contents(None, (), VARIABLE)) as ledger:
            with pytest.raises(ProxyError) as caught:
                await said(ledger)
    assert (caught.value.status, caught.value.code) == (409, "content_key_missing")
    assert "THE_KEYS lacks version 1 " in caplog.text
    async with open_with(path, Contents(None, (ONE,), VARIABLE)) as ledger:
        assert await said(ledger) == ["one?"]


@pytest.mark.parametrize("keys", [(), (ONE,)])
async def test_what_was_changed_in_the_file_is_told(path: Path, keys: tuple[ContentKey, ...]) -> None:
    async with open_with(path, full(*keys)) as ledger:
        await say(ledger, full(*keys), "one", "two")
        await change(path, "UPDATE call_content SET prompt = zeroblob(50) WHERE call = 1")
        await change(path, "UPDATE call_content SET answer = x'00' WHERE call = 2")
        for number in (1, 2):
            with pytest.raises(ProxyError) as caught:
                assert (await ledger.content(number)) is None
            assert (caught.value.status, caught.value.code) == (500, "content_damaged")


# ---------------------------------------------------------------------- rotating


async def test_a_rotation_that_was_stopped_goes_on_and_loses_nothing(path: Path) -> None:
    """From no key, to one, to another, while calls come."""
    plain, one, two = full(), full(ONE), full(TWO, ONE)
    names = [f"call-{number}" for number in range(150)]
    everything = [f"{name}?" for name in reversed(names)]
    async with open_with(path, plain) as ledger:
        await say(ledger, plain, *names[:100])
    async with open_with(path, one) as ledger:
        assert (await rotated(path, one, pieces=1)).sealed == 64
        await say(ledger, one, *names[100:])
        assert await said(ledger) == everything
        assert await rotated(path, one) == Rotated(36, 0)
        assert await said(ledger) == everything
        versions = "SELECT key_version, count(*) FROM call_content GROUP BY 1"
        assert look(path, versions) == [(1, 150)]
    async with open_with(path, two) as ledger:
        assert (await rotated(path, two, pieces=3)).sealed == 128
        assert await said(ledger) == everything
        with pytest.raises(ConfigError):
            await rotated(path, full(TWO))
        assert (await rotated(path, two)).sealed == 22
        assert await rotated(path, two) == Rotated(0, 0)
        assert look(path, versions) == [(2, 150)]
    assert look(path, "SELECT version FROM content_key") == [(2,)]
    # The old one can be left out, and its version has a meaning no more.
    async with open_with(path, full(TWO, OTHER)) as ledger:
        assert await said(ledger) == everything
    check_books(path)


async def test_what_cannot_be_opened_is_left_as_it_is(path: Path) -> None:
    async with open_with(path, full(ONE)) as ledger:
        await say(ledger, full(ONE), "one", "two", "three")
    await change(path, "UPDATE call_content SET prompt = answer WHERE call = 2")
    assert await rotated(path, full(TWO, ONE)) == Rotated(2, 1)
    assert look(path, "SELECT call, key_version FROM call_content ORDER BY call") == [(1, 2), (2, 1), (3, 2)]
    assert look(path, "SELECT version FROM content_key") == [(1,), (2,)]


async def test_without_a_key_nothing_is_rotated(path: Path) -> None:
    with pytest.raises(ConfigError, match="THE_KEYS is not set"):
        await rotated(path, full())


async def test_after_a_rotation_nothing_unsealed_is_left_in_the_file(path: Path) -> None:
    contents = full()
    async with open_with(path, contents) as ledger:
        content = await contents.exchange(random.Random(1).randbytes(20_000), None)
        assert content is not None
        record(ledger, new(), done(content=content))
    # As they stand in pages of 4 kB.
    pieces = [content.prompt.data[start : start + 40] for start in range(0, 20_000, 40)]
    before = bytes_of(path)
    assert sum(piece in before for piece in pieces) > 450
    assert await rotated(path, full(ONE)) == Rotated(1, 0)
    after = bytes_of(path)
    assert not [piece for piece in pieces if piece in after]
