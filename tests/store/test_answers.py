"""Cached answers: found at once, on disk soon, within their bounds, and never again once they have left."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import sys
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import OverloadedError
from proxy.policy.capabilities import Fact, Key, Topic
from proxy.store import db, migrations
from proxy.store.answers import AnswerStore
from proxy.store.capabilities import CapabilityStore
from proxy.store.entries import ROW_BYTES, Entry, Facts, NewEntry, Question
from proxy.tasks import Tasks
from tests.conftest import examples

PARTITION = b"partition-of-16b"
ANSWER = b'{"choices":[{"message":{"content":"%s"}}]}'


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def new(number: int, **members: Any) -> NewEntry:
    plain = NewEntry(
        key=key(number),
        scope="scope",
        namespace="default",
        model="gpt-4o",
        target="up/gpt-4o",
        answer=ANSWER % (b"%d" % number),
        prompt_tokens=10,
        completion_tokens=20,
        duration_s=1.5,
        created_at=1000.0 + number,
    )
    return dataclasses.replace(plain, **members)


def asked(number: int, **members: Any) -> NewEntry:
    """One that may be found by meaning."""
    members = {"partition": PARTITION, "question": f"question {number}", **members}
    return new(number, **members)


class Process:
    """What one process has of the database. Its clock stands still unless it is moved."""

    def __init__(self, connection: db.Connection, tasks: Tasks) -> None:
        self.connection, self.tasks = connection, tasks
        self.time = 5000.0
        self.gone: list[int] = []
        self.store: AnswerStore

    async def open(self, max_entries: int = 1000, max_bytes: int = 10**7, memory_bytes: int = 10**6) -> AnswerStore:
        self.store = await AnswerStore.open(
            self.connection,
            self.tasks,
            max_entries=max_entries,
            max_bytes=max_bytes,
            memory_bytes=memory_bytes,
            now=lambda: self.time,
            on_gone=self.gone.extend,
        )
        return self.store

    async def put(self, entry: NewEntry) -> int:
        id_ = await self.store.put(entry)
        assert id_ is not None
        return id_

    async def written(self) -> None:
        assert await self.tasks.wait(20)

    async def found(self, number: int) -> Entry | None:
        """The entry with that key, found as a call finds it."""
        id_ = self.store.find(key(number))
        return None if id_ is None else await self.store.get(id_)

    async def rows(self, query: str = "SELECT id FROM answer ORDER BY id") -> list[Any]:
        return list(await self.connection.execute_fetchall(query))


@asynccontextmanager
async def process(path: Path, **bounds: int) -> AsyncIterator[Process]:
    connection = await db.connect(path / "cache.db", migrations.CACHE)
    made = Process(connection, Tasks())
    try:
        await made.open(**bounds)
        yield made
    finally:
        await made.store.close()
        await made.tasks.close()
        await connection.close()


Start = Callable[..., Awaitable[Process]]


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts processes on one file; they end with the test. `memory_bytes=0`: each answer is read from the disk."""
    async with AsyncExitStack() as stack:

        async def starter(**bounds: int) -> Process:
            return await stack.enter_async_context(process(tmp_path, **bounds))

        yield starter


# ---------------------------------------------------------------------- finding and keeping


async def test_what_is_put_is_found_at_once_and_all_of_it_by_the_next_process(start: Start) -> None:
    one = await start()
    vector = bytes(range(256)) * 3
    entry = asked(1, expires_at=9000.0, vector=vector, embedder="minilm", question="Wie heißt „das“?\0 \ud800")
    id_ = await one.put(entry)
    assert one.store.find(key(1)) == id_
    assert one.store.find(key(2)) is None
    at_once = one.store.peek(id_)
    assert at_once is not None
    await one.written()
    for reader in (one, await start(), await start(memory_bytes=0)):
        assert await reader.store.get(id_) == at_once
    expected = {**dataclasses.asdict(entry), "question": "Wie heißt „das“?\0 ?"}
    assert {name: value for name, value in dataclasses.asdict(at_once).items() if name in expected} == {
        name: value for name, value in expected.items() if name not in ("vector", "embedder")
    }
    assert (at_once.used_at, at_once.hits, at_once.rights, at_once.lowest_right) == (5000.0, 0, 0, None)
    text = len(at_once.question.encode())
    assert ROW_BYTES + len(vector) + text < at_once.size < ROW_BYTES + len(vector) + text + len(entry.answer) + 20


async def test_an_answer_too_long_to_compress_on_the_way_is_kept_like_any_other(start: Start) -> None:
    one = await start(memory_bytes=100_000)
    long = ANSWER % b" ".join(b"%d" % number for number in range(50_000))
    id_ = await one.put(new(1, answer=long))
    before = await one.store.get(id_)
    await one.written()
    assert one.store.peek(id_) is None
    assert await one.store.get(id_) == before
    assert before is not None
    assert before.answer == long


async def test_a_newer_answer_takes_the_place_of_the_older_one_whose_id_is_gone_for_good(start: Start) -> None:
    one = await start()
    ids = [await one.put(new(1)) for _ in range(3)]
    await one.written()
    ids += [await one.put(new(1)) for _ in range(2)]
    assert one.store.find(key(1)) == ids[-1]
    assert one.gone == ids[:-1]
    assert [await one.store.get(id_) for id_ in ids[:-1]] == [None] * 4
    await one.written()
    assert await one.rows() == [(ids[-1],)]
    await one.store.delete(ids[-1])
    two = await start()
    assert await two.put(new(2)) not in ids


async def test_the_bounds_hold_and_what_was_used_longest_ago_leaves(start: Start) -> None:
    one = await start(max_entries=3)
    ids = [await one.put(new(number)) for number in range(3)]
    one.time += 1
    one.store.touch(ids[0])
    one.time += 1
    ids.append(await one.put(new(3)))
    assert one.gone == [ids[1]]
    size = one.store.bytes // 3
    await one.store.close()
    await one.open(max_bytes=2 * size + 50)
    assert one.store.count == 2
    assert one.store.bytes <= 2 * size + 50
    assert one.store.find(key(2)) is None, "the touch was written, so the other two were used later"
    big = new(9, answer=ANSWER % bytes(range(65, 91)) * 200)
    assert await one.store.put(dataclasses.replace(big, question="ä" * 2000, partition=PARTITION)) is None
    assert one.store.count == 2
    assert await (await start(max_entries=0)).store.put(new(1)) is None


async def test_memory_keeps_the_answers_used_last_within_its_bound(start: Start) -> None:
    one = await start(memory_bytes=20_000)
    ids = [await one.put(new(number)) for number in range(40)]
    await one.written()
    assert 0 < one.store.memory_count < 40
    assert one.store.memory_bytes <= 20_000
    in_memory = [id_ for id_ in ids if one.store.peek(id_) is not None]
    assert in_memory == ids[-len(in_memory) :]
    one.store.touch(in_memory[0])
    assert await one.store.get(ids[0]) is not None
    assert one.store.peek(ids[0]) is not None
    assert one.store.peek(in_memory[0]) is not None
    assert one.store.peek(in_memory[1]) is None


async def test_what_expired_is_not_served_and_swept_away(start: Start) -> None:
    one = await start()
    short, long, always = [
        await one.put(new(number, expires_at=time)) for number, time in enumerate((6000.0, 7000.0, None))
    ]
    one.time = 6000.0
    assert one.store.find(key(0)) is None
    assert one.store.peek(short) is None
    assert await one.store.get(short) is None
    assert await one.store.sweep() == 1
    assert one.gone == [short]
    await one.written()
    assert await one.rows() == [(long,), (always,)]
    one.time = 1e12
    await one.open()
    assert (one.store.count, one.store.find(key(2))) == (1, always)


# ---------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("memory_bytes", [0, 10**6])
async def test_hits_and_verdicts_count_wherever_the_answer_is(start: Start, memory_bytes: int) -> None:
    """Before it is written, while it is, and after, from memory and from the disk."""
    one = await start(memory_bytes=memory_bytes)
    id_ = await one.put(asked(1))
    for hits in range(1, 6):
        one.store.touch(id_)
        one.store.learn(id_, rights=1, lowest_right=0.9 + hits / 100)
        one.store.learn(id_, wrongs=1, highest_wrong=0.8 - hits / 100)
        one.time += 1
        for _ in range(hits):
            await asyncio.sleep(0)
        entry = await one.store.get(id_)
        assert entry is not None
        assert (entry.hits, entry.rights, entry.wrongs) == (hits, hits, hits)
        assert (entry.lowest_right, entry.highest_wrong) == (0.91, 0.79)
        assert entry.used_at == one.time - 1
        if hits == 3:
            await one.written()
    one.store.touch(12345)
    one.store.learn(12345, rights=1)
    await one.store.close()
    assert await (await start()).store.get(id_) == entry


async def test_the_index_gets_all_questions_and_their_vectors(start: Start) -> None:
    one = await start()
    a, b, c = [await one.put(asked(number, vector=b"v%d" % number, embedder="minilm")) for number in range(3)]
    await one.put(new(3))
    d = await one.put(asked(4))
    await one.store.delete(b)

    async def questions(store: AnswerStore, embedder: str, among: list[int] | None = None) -> list[Question]:
        return [question async for batch in store.vectors(embedder, among) for question in batch]

    expected = [
        Question(a, PARTITION, "question 0", b"v0"),
        Question(c, PARTITION, "question 2", b"v2"),
        Question(d, PARTITION, "question 4", None),
    ]
    assert await questions(one.store, "minilm") == expected, "also those that are not written yet"
    await one.written()
    assert await questions(one.store, "minilm") == expected
    assert await questions(one.store, "minilm", [d, b, a]) == [expected[0], expected[2]]
    assert [question.vector for question in await questions(one.store, "other")] == [None] * 3
    before = one.store.bytes
    for id_ in (a, d):
        one.store.set_vector(id_, b"long" * 50, "other")
    await one.written()
    assert one.store.bytes == before + 2 * 200 - 2
    two = await start()
    assert [question.vector for question in await questions(two.store, "other")] == [b"long" * 50, None, b"long" * 50]
    assert two.store.bytes == one.store.bytes
    assert await two.store.get(a) == await one.store.get(a)


# ---------------------------------------------------------------------- dropping


async def test_what_is_deleted_is_off_the_disk_when_that_is_acknowledged(start: Start, tmp_path: Path) -> None:
    one = await start()
    ids = [await one.put(asked(number)) for number in range(4)]
    assert await one.store.delete(ids[0]), "on its way to the disk"
    await one.written()
    assert await one.store.delete(ids[1])
    assert not await one.store.delete(ids[1])
    assert not await one.store.delete(777)
    for table in ("answer", "answer_body", "answer_question"):
        assert await one.rows(f"SELECT id FROM {table}") == [(ids[2],), (ids[3],)]
    assert one.gone == ids[:2]
    assert (one.store.find(key(0)), one.store.peek(ids[1])) == (None, None)


async def test_a_get_that_waits_for_the_disk_does_not_serve_what_is_deleted_meanwhile(start: Start) -> None:
    one = await start(memory_bytes=0)
    id_ = await one.put(new(1))
    await one.written()
    entry, deleted = await asyncio.gather(one.store.get(id_), one.store.delete(id_))
    assert (entry, deleted) == (None, True)


async def test_many_are_deleted_by_model_namespace_and_scope(start: Start) -> None:
    one = await start(memory_bytes=20_000)
    made = [
        await one.put(new(number, model=model, namespace=namespace, scope=scope))
        for number, (model, namespace, scope) in enumerate([("a", "x", "s"), ("a", "y", "s"), ("b", "x", "t")] * 3)
    ]
    await one.written()
    fresh = await one.put(new(100, model="a", namespace="x"))
    assert await one.store.delete_where(model="a", namespace="x") == 4
    assert set(one.gone) == {*made[0::3], fresh}
    assert await one.rows() == [(id_,) for id_ in sorted(made[1::3] + made[2::3])]
    assert await one.store.delete_where(scope="nobody's") == 0
    assert await one.store.delete_where(scope="t") == 3
    assert await one.store.delete_where() == 3
    assert (one.store.count, one.store.bytes, one.store.memory_bytes, await one.rows()) == (0, 0, 0, [])


async def test_a_burst_takes_several_transactions_and_none_gets_ahead_of_another(start: Start) -> None:
    one = await start(memory_bytes=0)
    ids = [await one.put(asked(number)) for number in range(600)]
    one.store.learn(ids[-1], rights=1)
    one.store.set_vector(ids[-1], b"vector", "minilm")
    await one.written()
    entry = await one.store.get(ids[-1])
    assert entry is not None
    assert entry.rights == 1
    assert await one.rows("SELECT id FROM answer_question WHERE vector IS NOT NULL") == [(ids[-1],)]
    for number in range(600):
        await one.put(asked(number))
    assert await one.store.delete_where(model="gpt-4o") == 600
    await one.written()
    assert (one.store.count, await one.rows()) == (0, [])


async def test_what_is_evicted_on_its_way_to_the_disk_does_not_stay_there(start: Start) -> None:
    one = await start(max_entries=1)
    await one.put(new(1))
    await asyncio.sleep(0)
    last = await one.put(new(2))
    await one.written()
    assert await one.rows() == [(last,)]


# ---------------------------------------------------------------------- the administrator's view


async def test_entries_are_listed_newest_first_page_by_page(start: Start) -> None:
    one = await start()
    ids = [await one.put(asked(number, model="ab"[number % 2])) for number in range(10)]
    await one.written()
    ids += [await one.put(asked(number, model="ab"[number % 2])) for number in range(10, 14)]
    await one.store.delete(ids.pop(3))
    one.store.touch(ids[0])

    async def pages(**wanted: Any) -> list[Facts]:
        found: list[Facts] = []
        while page := await one.store.entries(4, found[-1].id if found else None, **wanted):
            found += page
        return found

    listed = await pages()
    assert [facts.id for facts in listed] == ids[::-1]
    assert (listed[-1].hits, listed[-1].question, listed[-1].model) == (1, "question 0", "a")
    assert {facts.model for facts in await pages(model="b", namespace="default", scope="scope")} == {"b"}
    assert len(await pages(model="b")) == 6
    assert await pages(model="c") == []
    assert one.store.created_range == (1000.0, 1013.0)
    assert (one.store.count, one.store.memory_count) == (13, 13)
    await one.store.delete_where()
    assert one.store.created_range is None


# ---------------------------------------------------------------------- a simple model of it all

ops = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 11), st.integers(0, 600)),
        st.tuples(st.just("touch"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("delete"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("pass time"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("sweep"), st.just(0), st.just(0)),
        st.tuples(st.just("write"), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@examples(40)
@given(ops=ops, memory_bytes=st.sampled_from([0, 15_000, 10**6]))
async def test_the_store_is_a_dictionary_with_bounds(ops: list[tuple[str, int, int]], memory_bytes: int) -> None:
    """After each step the same entries are there as in a model, in the same order of last use, and after a restart."""
    bounds = {"max_entries": 6, "max_bytes": 6 * ROW_BYTES, "memory_bytes": memory_bytes}
    # number → id, size, when it expires; in order of last use
    model: OrderedDict[int, tuple[int, int, float]] = OrderedDict()

    def drop_expired(now: float) -> int:
        expired = [number for number, row in model.items() if row[2] <= now]
        return len([model.pop(number) for number in expired])

    with tempfile.TemporaryDirectory() as directory:
        async with process(Path(directory), **bounds) as one:
            for op, number, length in ops:
                one.time += 1
                if op == "put":
                    question = "".join(chr(97 + (number * length + n) % 26) for n in range(length))
                    expires_at = one.time + 100 * (number + 1)
                    id_ = await one.put(asked(number, question=question, expires_at=expires_at))
                    entry = await one.store.get(id_)
                    assert entry is not None
                    model.pop(number, None)
                    model[number] = id_, entry.size, expires_at
                    while len(model) > 6 or sum(row[1] for row in model.values()) > 6 * ROW_BYTES:
                        model.popitem(last=False)
                elif op == "touch" and number in model:
                    one.store.touch(model[number][0])
                    model.move_to_end(number)
                elif op == "delete":
                    id_ = model.pop(number, (0,))[0]
                    assert await one.store.delete(id_) == (id_ != 0)
                elif op == "pass time":
                    one.time += 50 * number
                elif op == "sweep":
                    assert await one.store.sweep() == drop_expired(one.time)
                elif op == "write":
                    await one.written()
                elif op == "reopen":
                    await one.store.close()
                    await one.open(**bounds)
                    drop_expired(one.time)
                live = {number: row[0] for number, row in model.items() if row[2] > one.time}
                assert {n: one.store.find(key(n)) for n in range(12) if one.store.find(key(n))} == live
                assert [n for n in range(12) if await one.found(n)] == sorted(live)
                assert one.store.count == len(model)
                assert one.store.bytes == sum(row[1] for row in model.values()) <= 6 * ROW_BYTES
                assert one.store.memory_bytes <= memory_bytes
                assert not {row[0] for row in model.values()} & set(one.gone)


# ---------------------------------------------------------------------- crashes and faults

VICTIM = """
import asyncio, sys, time
from pathlib import Path
from proxy.store import db, migrations
from proxy.store.answers import AnswerStore
from proxy.tasks import Tasks
from tests.store.test_answers import asked

async def main():
    tasks = Tasks()
    connection = await db.connect(Path(sys.argv[1]), migrations.CACHE)
    store = await AnswerStore.open(
        connection, tasks, max_entries=10**6, max_bytes=10**9, memory_bytes=10**6, now=time.time
    )
    for number in range(10**6):
        first = await store.put(asked(3 * number, vector=b"v" * 768, embedder="e"))
        other = await store.put(asked(3 * number + 1))
        if number % 10 == 0:
            await tasks.wait(20)
            await store.delete(other)
            print(first, other, flush=True)
        await asyncio.sleep(0)

asyncio.run(main())
"""


async def test_after_kill_9_each_row_is_whole_what_was_written_is_there_and_what_was_deleted_is_not(
    start: Start, tmp_path: Path
) -> None:
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, str(tmp_path / "cache.db"), stdout=asyncio.subprocess.PIPE
    )
    assert victim.stdout is not None
    lines = [await victim.stdout.readline() for _ in range(30)]
    victim.send_signal(signal.SIGKILL)
    lines += [line async for line in victim.stdout if line.endswith(b"\n")]
    await victim.wait()
    one = await start(memory_bytes=0)
    for line in lines:
        kept, deleted = map(int, line.split())
        assert await one.store.get(kept) is not None
        assert await one.store.get(deleted) is None
    ids = [id_ for (id_,) in await one.rows()]
    assert len(ids) == one.store.count >= 29 * 19
    for id_ in ids:
        entry = await one.store.get(id_)
        assert entry is not None
        assert entry.answer == ANSWER % (b"%d" % int.from_bytes(entry.key, "big"))
    assert await one.rows("PRAGMA integrity_check") == [("ok",)]
    assert await one.rows("PRAGMA foreign_key_check") == []
    assert await one.put(new(10**9)) > max(ids)


@pytest.mark.parametrize("reason", ["full", "read-only", "locked"])
async def test_a_disk_that_takes_nothing_is_one_warning_and_the_answers_live_in_memory(
    start: Start, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await start(), await start()
    old = await one.put(asked(0))
    await one.written()
    pages = (await one.rows("PRAGMA page_count"))[0][0]
    begin, undo = {
        "full": (f"PRAGMA max_page_count={pages}", "PRAGMA max_page_count=1000000"),
        "read-only": ("PRAGMA query_only=ON", "PRAGMA query_only=OFF"),
        "locked": ("BEGIN IMMEDIATE", "ROLLBACK"),
    }[reason]
    failing = other if reason == "locked" else one
    await one.connection.execute("PRAGMA busy_timeout=0")
    await failing.connection.execute(begin)
    noise = bytes(range(35, 91)) * 100
    with caplog.at_level(logging.WARNING):
        ids = []
        for number in range(1, 40):
            ids.append(await one.put(asked(number, question=(noise[number:] + b"%d" % number).decode())))
            one.store.touch(ids[-1])
            one.store.learn(ids[-1], rights=1)
            await one.written()
        in_memory = [id_ for id_ in ids if (await one.store.get(id_)) is not None]
        assert in_memory == ids
        if reason != "full":
            with pytest.raises(OverloadedError, match="removed from the disk"):
                await one.store.delete(old)
            assert await one.store.get(old) is None
            assert one.gone == [old]
        if reason == "read-only":
            await other.put(new(500))
            await other.written()
            await one.store.refresh()
            assert one.store.find(key(0)) is None, "what could not be deleted is not taken over"
    [record] = caplog.records
    assert "could not be stored" in record.getMessage()
    await failing.connection.execute(undo)
    last = await one.put(new(99))
    await one.written()
    rows = await one.rows()
    assert (last,) in rows
    assert reason == "full" or (old,) not in rows, "the deletion is tried again"


async def test_an_answer_nowhere_to_be_kept_is_gone(start: Start) -> None:
    """It could not be written, and there is no room in memory."""
    one = await start(memory_bytes=0)
    await one.connection.execute("PRAGMA query_only=ON")
    id_ = await one.put(new(1))
    await one.written()
    assert (one.store.find(key(1)), one.gone, one.store.count) == (None, [id_], 0)
    assert not await one.store.delete(id_), "nothing of it is on disk that could not be deleted"
    await one.connection.execute("PRAGMA query_only=OFF")


async def test_a_database_that_cannot_be_written_at_the_start_is_served_and_nothing_is_kept(start: Start) -> None:
    one = await start()
    id_ = await one.put(new(1))
    await one.store.close()
    await one.connection.execute("PRAGMA query_only=ON")
    await one.open()
    assert await one.store.get(id_) is not None
    assert await one.store.put(new(2)) is None
    await one.written()
    await one.connection.execute("PRAGMA query_only=OFF")
    assert await one.store.put(new(2)) is None, "now ids are asked for"
    await one.written()
    assert await one.store.put(new(2)) is not None


@pytest.mark.parametrize("body", [b"not zlib", zlib.compress(b'{"choices": [}'), zlib.compress(b"{}")[:-3], b""])
async def test_a_damaged_row_is_a_miss_and_is_dropped(
    start: Start, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    one = await start(memory_bytes=0)
    id_, sound = await one.put(new(1)), await one.put(new(2))
    await one.written()
    await one.connection.execute("UPDATE answer_body SET answer=? WHERE id=?", (body, id_))
    assert await one.store.get(id_) is None
    assert await one.store.get(sound) is not None
    assert one.store.find(key(1)) is None
    assert f"{id_} is damaged" in caplog.text
    await one.written()
    assert await one.rows() == [(sound,)]


async def test_a_database_that_cannot_be_read_is_a_miss_and_the_administrator_is_told(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one = await start(memory_bytes=0)
    id_ = await one.put(asked(1))
    await one.written()
    await one.connection.execute("ALTER TABLE answer RENAME TO away")
    assert [await one.store.get(id_), await one.store.get(id_)] == [None, None]
    assert len(caplog.records) == 1
    for work in (one.store.entries(5), one.store.delete_where()):
        with pytest.raises(OverloadedError):
            await work
    await one.connection.execute("ALTER TABLE away RENAME TO answer")
    assert await one.store.get(id_) is not None


# ---------------------------------------------------------------------- several on one file


async def test_two_processes_share_their_answers(start: Start) -> None:
    one, two = await start(), await start()
    mine = [await one.put(asked(number)) for number in range(6)]
    theirs = [await two.put(asked(number)) for number in range(10, 13)]
    assert not set(mine) & set(theirs)
    await one.written()
    await two.written()
    assert await one.store.refresh() == theirs
    assert sorted(await two.store.refresh()) == mine
    assert await one.store.refresh() == []
    assert await one.found(11) == await two.found(11)
    replaced = await two.put(asked(0, answer=b'"newer"'))
    await two.store.delete(mine[1])
    await two.written()
    waiting = await one.put(asked(12))
    assert await one.store.refresh() == [replaced]
    assert set(one.gone) == {mine[0], mine[1], theirs[2]}
    entry = await one.found(0)
    assert entry is not None
    assert entry.answer == b'"newer"'
    await one.written()
    await two.store.refresh()
    assert two.store.find(key(12)) == waiting
    assert await two.store.delete_where() == one.store.count
    await one.store.refresh()
    assert (one.store.count, await one.rows()) == (0, [])


async def test_of_two_processes_that_answer_the_same_the_later_answer_counts(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await start(), await start()
    await one.put(new(1))
    await one.written()
    later = await two.put(new(1))
    await two.written()
    assert await one.rows() == [(later,)]
    assert caplog.records == []


@pytest.mark.parametrize("max_entries", [4, 1000])
async def test_own_answers_come_and_go_while_those_of_another_process_are_taken_over(
    start: Start, max_entries: int
) -> None:
    one, two = await start(max_entries=max_entries), await start()
    for round_ in range(12):
        mine = {number: await one.put(new(number)) for number in range(100, 104)}
        await two.put(new(round_))
        await two.written()
        refreshing = asyncio.ensure_future(one.store.refresh())
        for number in (round_, 200, 201, 100):
            for _ in range(round_):
                await asyncio.sleep(0)
            mine[number] = await one.put(new(number))
        await refreshing
        for number in range(300):
            id_ = one.store.find(key(number))
            assert id_ not in one.gone
            if max_entries == 1000 and number in mine:
                assert id_ == mine[number]
        await one.written()
        assert max_entries == 4 or set(mine.values()) <= {id_ for (id_,) in await one.rows()}


@examples(15)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from(["put", "delete", "refresh", "write"]), st.integers(0, 5)))
)
async def test_two_processes_agree_in_the_end(steps: list[tuple[bool, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with process(Path(directory), max_entries=4) as one, process(Path(directory), max_entries=5) as two:
            deleted: set[int] = set()
            for is_first, op, number in steps:
                actor = one if is_first else two
                id_ = actor.store.find(key(number))
                if op == "put":
                    assert await actor.put(new(number)) not in deleted
                elif op == "delete" and id_ is not None:
                    assert await actor.store.delete(id_)
                    deleted.add(id_)
                elif op == "refresh":
                    await actor.store.refresh()
                elif op == "write":
                    await actor.written()
            for actor in (one, two, one, two):
                await actor.written()
                await actor.store.refresh()
            on_disk = {id_ for (id_,) in await one.rows()}
            for actor in (one, two):
                assert {actor.store.find(key(number)) for number in range(6)} - {None} == on_disk
            assert not on_disk & deleted


async def test_stores_on_one_connection_do_not_get_into_each_others_transactions(start: Start) -> None:
    one = await start()
    await one.connection.executescript(migrations.MAIN[0])
    capabilities = await CapabilityStore.open(one.connection, one.tasks)

    def half(connection: Any) -> None:
        connection.execute("DELETE FROM capability")
        connection.execute("INSERT INTO answer_ids VALUES ('no number')")

    failed = []
    for number in range(30):
        await one.put(new(number))
        capabilities.learn(Key("up", f"m{number}", "none"), Topic.STREAMS, Fact(True, "seen", 1.0))
        failed.append(asyncio.ensure_future(one.connection.transact(half)))
        await asyncio.sleep(0)
    results = await asyncio.gather(*failed, return_exceptions=True)
    assert {type(result).__name__ for result in results} == {"IntegrityError"}
    await one.written()
    assert len(await one.rows()) == 30
    assert len(await one.rows("SELECT * FROM capability")) == 30
