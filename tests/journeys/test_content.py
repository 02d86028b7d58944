"""What was said is stored beside the row of its call: whole calls of every kind, and what is then in the database."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import sqlite3
import zlib
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import ConfigError
from proxy.settings import ContentKey, Settings
from proxy.store import db
from proxy.store.content import Content, contents_of, read
from tests.conftest import Proxy, make_settings, running_proxy
from tests.fakes.caching import has_kept
from tests.fakes.upstream import (
    DONE,
    FakeUpstream,
    Received,
    Silence,
    Wire,
    answer,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.store.ledgers import look
from tests.store.test_content import bytes_of
from tests.test_command import command, run

_LONG = 30
KEY = ContentKey(1, bytes(range(32)))
BODY = b'{ "model": "model-a",\t"messages":[{"role":"user","content":"Who is Rosebud?"}] }'
STREAMED = BODY.replace(b"{ ", b'{ "stream": true, ')
HELLO = stream(role(), text("Hel"), text("lo"), finish(), usage())


def settings(
    directory: Path, upstream: FakeUpstream, content: str, *keys: ContentKey, **sections: dict[str, Any]
) -> Settings:
    made = make_settings(directory, upstream.url, more="", ledger={"content": content}, **sections)
    return dataclasses.replace(made, content_keys=keys)


async def ask(proxy: Proxy, body: bytes, call_id: str) -> tuple[int, bytes]:
    async with proxy.post("/chat/completions", body, headers={"x-request-id": call_id}) as response:
        return response.status, await response.read()


async def stored(told: Settings) -> dict[str, Content | None]:
    """What is in the database of each call, by its id."""
    connection = await db.connect_main(told.store)
    try:
        contents = contents_of(told)
        await contents.open(connection)
        found: dict[str, Content | None] = {}
        for number, call_id in await connection.execute_fetchall("SELECT number, id FROM call"):
            row = await connection.run(lambda raw, number=number: read(raw, number))  # type: ignore[misc]
            found[call_id] = None if row is None else await contents.opened(row)
        return found
    finally:
        await connection.close()


async def has(proxy: Proxy, told: Settings, query: str) -> None:
    """Wait until the database has such a row, while the proxy serves."""
    async with asyncio.timeout(_LONG):
        while not look(told.store.path, query):
            async with proxy.get("/health") as response:
                assert response.status == 200


def said(content: Content | None) -> Any:
    """The words of a stored answer; None where there are none."""
    if content is None or content.answer is None:
        return None
    return json.loads(content.answer.data)["choices"][0]["message"]["content"]


def hashed(text: bytes) -> bytes:
    return blake2b(text, digest_size=32).digest()


@pytest.mark.parametrize(
    ("form", "keys", "version"), [("full", (), None), ("full", (KEY,), 1), ("hash", (), None), ("hash", (KEY,), 1)]
)
async def test_a_request_and_its_answer_are_stored_as_they_went_over_the_wire(
    tmp_path: Path, upstream: FakeUpstream, form: str, keys: tuple[ContentKey, ...], version: int | None
) -> None:
    upstream.plays(answer(), HELLO, HELLO)
    told = settings(tmp_path, upstream, form, *keys)
    async with running_proxy(told) as proxy:
        bodies = {name: (await ask(proxy, BODY, name))[1] for name in ("one-body", "folded")}
        assert (await ask(proxy, STREAMED, "streamed"))[0] == 200
    found = await stored(told)
    assert set(found) == {"one-body", "folded", "streamed"}
    for name, content in found.items():
        assert content is not None
        assert content.answer is not None
        assert (content.form, content.key_version) == (form, version)
        prompt = STREAMED if name == "streamed" else BODY
        assert content.prompt == (prompt if form == "full" else hashed(prompt), len(prompt), False)
        if name in bodies:
            assert content.answer.data == (bodies[name] if form == "full" else hashed(bodies[name]))
            assert content.answer.size == len(bodies[name])
    if form == "full":
        assert said(found["streamed"]) == "Hello"


async def test_nothing_is_stored_where_that_is_off(tmp_path: Path, upstream: FakeUpstream) -> None:
    told = settings(tmp_path, upstream, "off", KEY)
    async with running_proxy(told) as proxy:
        assert (await ask(proxy, STREAMED, "streamed"))[0] == 200
    assert await stored(told) == {"streamed": None}
    assert look(told.store.path, "SELECT count(*) FROM content_key") == [(0,)]


async def test_each_call_of_a_shared_answer_has_its_own_request_and_that_answer(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    """Coalesced, given again as a stream and as one body, and one that leaves early."""
    go_on = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hel"))
        await go_on.wait()
        await wire.chunk(text("lo") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    told = settings(tmp_path, upstream, "full", KEY, cache={"exact": True, "semantic": False})
    other = STREAMED.replace(b"\t", b" ")
    async with running_proxy(told) as proxy:
        first = asyncio.create_task(ask(proxy, STREAMED, "first"))
        await upstream.asked(1)
        async with proxy.post("/chat/completions", STREAMED, headers={"x-request-id": "left"}) as response:
            await response.content.readuntil(b"Hel")
        assert (await proxy.ledger.next())["id"] == "left"
        second = asyncio.create_task(ask(proxy, other, "second"))
        async with proxy.post("/chat/completions", STREAMED, headers={"x-request-id": "third"}) as response:
            await response.content.readuntil(b"Hel")
            go_on.set()
            await response.read()
        assert (await first)[0] == (await second)[0] == 200
        await has_kept(proxy, 1)
        assert (await ask(proxy, STREAMED, "replayed"))[0] == 200
        whole = await ask(proxy, BODY, "replayed-whole")
    found = await stored(told)
    expected = {"first": "Hello", "second": "Hello", "third": "Hello", "left": "Hel", "replayed": "Hello"}
    assert {name: said(content) for name, content in found.items()} == expected | {"replayed-whole": "Hello"}
    modes = dict(look(told.store.path, "SELECT id, mode FROM call"))
    assert (modes["first"], modes["third"], modes["replayed"]) == ("relay", "coalesced", "replay")
    prompts = {name: content.prompt.data for name, content in found.items() if content is not None}
    assert (prompts["first"], prompts["second"], prompts["replayed-whole"]) == (STREAMED, other, BODY)
    assert (content := found["replayed-whole"]) is not None
    assert content.answer is not None
    assert content.answer.data == whole[1]


async def test_of_an_answer_that_broke_is_stored_what_came(tmp_path: Path, upstream: FakeUpstream) -> None:
    silent = Silence(role(), text("Hel"))
    upstream.plays(
        stream(role(), text("Hel"), done=False), stream(role(), text("Hel"), done=False), refuse(500), silent
    )
    told = settings(tmp_path, upstream, "full", streaming={"max_retries": 0, "recovery": "off"})
    async with running_proxy(told) as proxy:
        assert b"upstream_broke" in (await ask(proxy, STREAMED, "broken"))[1]
        assert (await ask(proxy, BODY, "broken-whole"))[0] == 502
        assert (await ask(proxy, BODY, "failed"))[0] == 500
        async with proxy.post("/chat/completions", STREAMED, headers={"x-request-id": "cancelled"}) as response:
            await response.content.readuntil(b"Hel")
        await silent.is_left()
        assert (await ask(proxy, b"{", "refused"))[0] == 400
    found = await stored(told)
    assert {name: said(content) for name, content in found.items()} == {
        "broken": "Hel",
        "broken-whole": "Hel",
        "failed": None,
        "cancelled": "Hel",
        "refused": None,
    }
    assert "error" not in json.loads(found["broken"].answer.data)  # type: ignore[union-attr]
    assert found["failed"] is not None
    assert found["failed"].prompt.data == BODY
    assert found["refused"] is None


@pytest.mark.parametrize("keys", [(), (KEY,)])
async def test_who_reads_the_file_reads_nothing_that_is_sealed(
    tmp_path: Path, upstream: FakeUpstream, keys: tuple[ContentKey, ...]
) -> None:
    told = settings(tmp_path, upstream, "full", *keys)
    async with running_proxy(told) as proxy:
        await ask(proxy, BODY, "call-1")
        await has(proxy, told, "SELECT 1 FROM call_content")
        running = bytes_of(told.store.path)
    for seen in (running, bytes_of(told.store.path)):
        assert b"call-1" in seen
        assert BODY not in seen
        assert b"Rosebud" not in seen
        assert (zlib.compress(BODY) in seen) == (not keys)
        assert KEY.secret not in seen


async def test_a_rotation_that_is_killed_goes_on_while_the_proxy_runs(tmp_path: Path, upstream: FakeUpstream) -> None:
    new = ContentKey(2, bytes(32))
    told = settings(tmp_path, upstream, "full", KEY)
    async with running_proxy(told) as proxy:
        await ask(proxy, BODY, "call-1")
    # Some thousands alike, so that there is something to stop in the middle of.
    with sqlite3.connect(told.store.path) as connection:
        numbers = "WITH RECURSIVE n(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM n WHERE n < 3000) INSERT INTO"
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(call)")]
        others = ", ".join(columns[1:])
        connection.execute(f"{numbers} call SELECT n.n, {others} FROM n JOIN call WHERE number = 1")
        connection.execute(
            f"{numbers} call_content SELECT n.n, form, key_version, prompt, prompt_bytes, answer, answer_bytes "
            "FROM n JOIN call_content WHERE call = 1"
        )
    connection.close()
    environ = {
        "HEADWATER_CONTENT_KEYS": ",".join(f"{k.version}:{base64.b64encode(k.secret).decode()}" for k in (new, KEY))
    }
    old = "SELECT count(*) FROM call_content WHERE key_version = 1"
    told = dataclasses.replace(told, content_keys=(new, KEY))
    async with running_proxy(told) as proxy:
        async with command(tmp_path, "content", "rotate", **environ) as rotating:
            async with asyncio.timeout(_LONG):
                while not look(told.store.path, "SELECT 1 FROM call_content WHERE key_version = 2"):
                    # Looking takes the processor from the process that is looked at.
                    with suppress(TimeoutError):
                        await asyncio.wait_for(rotating.process.wait(), 0.02)
            rotating.process.kill()
        assert 0 < look(told.store.path, old)[0][0] < 3000
        assert (await ask(proxy, BODY, "between"))[0] == 200
        code, out, error = await run(tmp_path, "content", "rotate", **environ)
        assert (code, error) == (0, "")
        assert "calls said is sealed anew, with version 2 of the key" in out
        assert (await ask(proxy, BODY, "after"))[0] == 200
    told = dataclasses.replace(told, content_keys=(new,))
    assert look(told.store.path, "SELECT key_version, count(*) FROM call_content GROUP BY 1") == [(2, 3002)]
    found = await stored(told)
    assert set(found) == {"call-1", "between", "after"}
    assert {content.prompt.data for content in found.values() if content is not None} == {BODY}


async def test_with_a_wrong_key_the_proxy_does_not_start(tmp_path: Path, upstream: FakeUpstream) -> None:
    told = settings(tmp_path, upstream, "full", KEY)
    async with running_proxy(told) as proxy:
        await ask(proxy, BODY, "call-1")
    code, out, error = await run(tmp_path, "credits", "balance", "local")
    assert (code, out.split()[-1], error) == (0, "-", ""), "a command that reads no contents wants no keys"
    told = dataclasses.replace(told, content_keys=(ContentKey(1, bytes(32)),))
    with pytest.raises(
        ConfigError, match=r"^environment variable HEADWATER_CONTENT_KEYS: its version 1 is another key"
    ):
        async with running_proxy(told):
            pass
