"""A client whose connection broke reads on where it was, at GET /v1/streams/{id}: one answer, asked for once.

`read_on` is that client. It checks that every data event has its number, and gives the body without these.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Proxy, Start, make_settings
from tests.fakes.client import Answer, Client, chat, request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Silence,
    answer,
    chunk,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_coalescing import (
    USAGE,
    WHOLE,
    Paused,
    breaks,
    clients,
    hello,
    is_noticed,
    nothing_is_left,
    rows,
)
from tests.journeys.test_shutdown import _stopping as stopping_proxy
from tests.journeys.test_sloppy_streams import read_strictly
from tests.journeys.test_slow_clients import Flood, is_same, slow_client
from tests.waiting import until

_LONG = 30
ID = "chatcmpl-up"
KEPT: dict[str, Any] = {"resume_window_s": 60}
EVENTS = [role(), text("Hello"), text(" there"), finish(), DONE]
PLAYED = [*EVENTS[:-1], usage()]
FAR = 10**8


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_a_failure(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    failures = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not failures, [record.getMessage() for record in failures]


def get(name: str = ID, after: int | str | None = None, *headers: str) -> bytes:
    return request(f"GET /v1/streams/{name}" + ("" if after is None else f"?after={after}"), *headers)


async def read_on(proxy: Proxy, name: str = ID, after: int | str | None = None, *headers: str) -> Answer:
    """Come back, and read to the end."""
    async with clients(proxy, 1) as (client,):
        client.send(get(name, after, *headers))
        return await client.answer()


async def is_at_the_end(proxy: Proxy, after: int, *headers: str, name: str = ID) -> bool:
    """Whether there is nothing more, which is an answer without even a length."""
    async with clients(proxy, 1) as (client,):
        client.send(get(name, after, *headers) + request("GET /health"))
        nothing = await client.answer(has_body=False)
        assert (await client.answer()).json() == {"status": "ok"}
        return nothing.status == 204 and not {"content-length", "transfer-encoding"} & nothing.headers.keys()


async def refusal(proxy: Proxy, name: str = ID, after: int | str | None = None, *headers: str) -> tuple[int, str]:
    answer = await read_on(proxy, name, after, *headers)
    return answer.status, answer.json()["error"]["code"]


async def is_forgotten(proxy: Proxy, name: str = ID) -> None:
    """Wait until the answer cannot be read any more."""
    await until(lambda: read_on(proxy, name), lambda answer: answer.status == 404)


def unnumbered(body: bytes, after: int = 0) -> bytes:
    """A resumed stream without its ids, which must count on from `after`; a comment has none."""
    number = after
    events = []
    for event in body.removesuffix(b"\n\n").split(b"\n\n"):
        if not event.startswith(b": "):
            number += 1
            first, _, event = event.partition(b"\n")
            assert first == b"id: %d" % number
        events.append(event + b"\n\n")
    return b"".join(events)


async def begin(client: Client, count: int) -> tuple[str, bytes]:
    """The id of the answer that a client gets, and its first `count` events or more."""
    head = await client.heard(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    found = re.search(rb"(?m)^x-headwater-stream: (.+)\r$", head)
    assert found is not None
    body = b""
    while body.count(b"\n\n") < count:
        size = int(await client.heard(b"\r\n"), 16)
        body += (await client.reader.readexactly(size + 2))[:-2]
    return found[1].decode(), body


def ids_in(body: bytes) -> set[str]:
    return {json.loads(event[6:])["id"] for event in body.split(b"\n\n")[:-2]}


# ---------------------------------------------------------------------- the two halves


@pytest.mark.parametrize("k", [2, 3, 4])
async def test_cut_in_mid_answer_and_read_on_while_it_runs(upstream: FakeUpstream, start: Start, k: int) -> None:
    paused = Paused(*EVENTS[:k], after=tuple(PLAYED[k:]))
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        name, said = await begin(client, k)
        client.reset()
        await is_noticed(proxy)
        again.send(get(name, k))
        await is_noticed(proxy)
        paused.go_on()
        rest = await again.answer()

    assert name == rest.headers["x-headwater-stream"] == ID
    assert rest.headers["content-type"].startswith("text/event-stream")
    assert rest.headers["x-headwater-target"] == "up/model-a"
    assert said + unnumbered(rest.body, k) == WHOLE
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["mode"]) == ("ok", 200, "relay")
    await nothing_is_left(proxy)
    assert len(upstream.requests) == 1


async def test_the_answer_goes_on_while_nobody_reads(upstream: FakeUpstream, start: Start) -> None:
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        client.reset()
        await is_noticed(proxy)
    paused.go_on()
    assert (await proxy.ledger.next())["status"] == "ok"
    assert unnumbered((await read_on(proxy)).body) == WHOLE
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("wishes", [{}, USAGE], ids=["no usage", "usage"])
@pytest.mark.parametrize("writes", [1, 2, 6], ids="{} events a write".format)
async def test_it_can_be_read_on_from_anywhere_once_it_has_ended(
    upstream: FakeUpstream, start: Start, writes: int, wishes: dict[str, Any]
) -> None:
    events = [*PLAYED, DONE]
    pieces = [b"".join(events[place : place + writes]) for place in range(0, len(events), writes)]
    upstream.plays(stream(*pieces, done=False))
    proxy = await start(streaming=KEPT)
    whole = await proxy.stream(**wishes)
    assert read_strictly(whole, wants_usage=True).text() == "Hello there"
    told = whole.split(b"\n\n")[:-1]
    assert len(told) == (6 if wishes else 5)
    for k in range(len(told)):
        rest = await read_on(proxy, ID, k)
        assert b"".join(event + b"\n\n" for event in told[:k]) + unnumbered(rest.body, k) == whole
    for k in (len(told), FAR):
        assert await is_at_the_end(proxy, k)
    assert len(upstream.requests) == 1
    assert (await proxy.ledger.next())["status"] == "ok"
    await nothing_is_left(proxy)


async def test_a_browser_says_in_a_header_where_it_is(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming=KEPT)
    upstream.plays(stream(*PLAYED))
    await proxy.stream()
    for after in (None, 0, 1, 4, FAR):
        rest = await read_on(proxy, ID, after, "Last-Event-ID: 2")
        assert unnumbered(rest.body, 2) == b"".join(EVENTS[2:])
    assert await is_at_the_end(proxy, 0, "Last-Event-ID: 5")


async def test_several_read_on_at_once(upstream: FakeUpstream, start: Start) -> None:
    """The client that comes back, one that looks on while it reads, and one that looks on for a while only."""
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 4) as (client, again, looking, leaving):
        client.send(chat(stream=True))
        name, said = await begin(client, 2)
        leaving.send(get(name))
        await leaving.heard(b'"Hello"')
        client.reset()
        again.send(get(name, 2))
        looking.send(get(name, 1))
        await looking.heard(b'"Hello"')
        leaving.reset()
        await is_noticed(proxy)
        paused.go_on()
        assert said + unnumbered((await again.answer()).body, 2) == WHOLE
        await looking.heard(DONE)
    assert (await proxy.ledger.next())["status"] == "ok"
    await nothing_is_left(proxy)
    assert len(upstream.requests) == 1


async def test_who_looks_on_keeps_an_answer_going(upstream: FakeUpstream, start: Start) -> None:
    """The client stays away for longer than the window."""
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming={"resume_window_s": 0.05, "heartbeat_interval_s": 0.05})
    async with clients(proxy, 2) as (client, looking):
        client.send(chat(stream=True))
        name, _ = await begin(client, 2)
        looking.send(get(name))
        await looking.heard(b'"Hello"')
        client.reset()
        for _ in range(4):
            await looking.heard(b": ping\n\n")
        paused.go_on()
        await looking.heard(DONE)
    assert (await proxy.ledger.next())["status"] == "ok"
    await nothing_is_left(proxy)


async def test_those_who_share_an_answer_may_both_come_back(upstream: FakeUpstream, start: Start) -> None:
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 4) as (one, other, again, too):
        for client in (one, other):
            client.send(chat(stream=True))
            await client.heard(b'"Hello"')
            client.reset()
            await is_noticed(proxy)
        for client in (again, too):
            client.send(get(ID, 2))
        await is_noticed(proxy)
        paused.go_on()
        for client in (again, too):
            assert unnumbered((await client.answer()).body, 2) == b"".join(EVENTS[2:])
    assert [(row["status"], row["mode"]) for row in await rows(proxy, 2)] == [("ok", "relay"), ("ok", "coalesced")]
    assert len(upstream.requests) == 1


async def test_who_reads_on_slowly_has_it_all_in_the_end(upstream: FakeUpstream, start: Start) -> None:
    flood = Flood(16)
    upstream.plays(flood)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 1) as (slow,):
        assert is_same(await proxy.stream(), flood.body)
        slow.send(get())
        assert is_same(unnumbered((await read_on(proxy, ID, 1)).body, 1), flood.body[len(role()) :])
        assert is_same(unnumbered((await slow.answer()).body), flood.body)


async def test_the_upstream_does_not_wait_for_a_client_that_was_slow_and_is_gone(
    upstream: FakeUpstream, start: Start
) -> None:
    flood = Flood(20)
    upstream.plays(flood)
    proxy = await start(streaming=KEPT)
    async with slow_client(proxy) as slow:
        await slow.ask()
        await slow.read()
        sent = -1
        while sent != flood.sent:
            sent = flood.sent
            await is_noticed(proxy)
        assert sent < len(flood.body), "the upstream waits"
    assert (await proxy.ledger.next())["status"] == "ok"
    assert is_same(unnumbered((await read_on(proxy)).body), flood.body)


async def test_heartbeats_have_no_number(upstream: FakeUpstream, start: Start) -> None:
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT | {"heartbeat_interval_s": 0.05})
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        client.reset()
        again.send(get(ID, 2))
        _, said = await begin(again, 2)
        assert said == b": ping\n\n" * 2
        paused.go_on()
        rest = await again.heard(DONE)
    assert [int(number) for number in re.findall(rb"id: (\d+)", rest)] == [3, 4, 5]


# ---------------------------------------------------------------------- what can be read again


async def test_one_body_can_be_read_as_a_stream(upstream: FakeUpstream, start: Start) -> None:
    paused = Paused(after=answer())
    upstream.plays(paused, stream(*PLAYED))
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 2) as (waiting, reading):
        waiting.send(chat("Hi", "x-request-id: mine"))
        await upstream.asked(1)
        reading.send(get("chatcmpl-mine"))
        await is_noticed(proxy)
        paused.go_on()
        body = await waiting.answer()
        at_once = unnumbered((await reading.answer()).body)
    assert body.json() == COMPLETION
    assert body.headers["x-headwater-stream"] == ID
    assert read_strictly(at_once).text() == "Hello there, friend."
    assert unnumbered((await read_on(proxy)).body) == at_once


async def test_an_error_event_can_be_read_again(upstream: FakeUpstream, start: Start) -> None:
    paused = Paused(role(), text("Hello"), after=breaks)
    upstream.plays(paused)
    proxy = await start(streaming=KEPT | {"max_retries": 0})
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        name, said = await begin(client, 2)
        client.reset()
        again.send(get(name, 2))
        await is_noticed(proxy)
        paused.go_on()
        rest = (await again.answer()).body
    seen = read_strictly(said + unnumbered(rest, 2))
    assert seen.error is not None
    assert (await read_on(proxy, name, 2)).body == rest
    assert await is_at_the_end(proxy, 3)
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("upstream_error", 200)


async def test_what_failed_before_the_first_byte_is_a_status_again(upstream: FakeUpstream, start: Start) -> None:
    paused = Paused(after=refuse(400, "messages", code="context_length_exceeded"))
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 2) as (client, looking):
        client.send(chat("Hi", "x-request-id: mine", stream=True))
        await upstream.asked(1)
        looking.send(get("chatcmpl-mine"))
        await is_noticed(proxy)
        paused.go_on()
        answers = [await client.answer(), await looking.answer(), await read_on(proxy, "chatcmpl-mine", 5)]
    assert {answer.status for answer in answers} == {400}
    assert len({answer.body for answer in answers}) == 1
    await proxy.ledger.next()
    await nothing_is_left(proxy)


async def test_a_saved_answer_is_one_answer(upstream: FakeUpstream, start: Start) -> None:
    paused = Paused(role(), text("Hello"), after=breaks)
    upstream.plays(paused, stream(*PLAYED))
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        client.reset()
        await is_noticed(proxy)
    paused.go_on()
    row = await proxy.ledger.next()
    assert (row["status"], row["attempts"]) == ("ok", 2)
    assert read_strictly(unnumbered((await read_on(proxy)).body)).text() == "Hello there"


# ---------------------------------------------------------------------- what cannot


async def test_a_stranger_does_not_find_it(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(*PLAYED))
    proxy = await start(streaming=KEPT)
    key = "Authorization: Bearer sk-mine"
    async with clients(proxy, 1) as (client,):
        client.send(chat("Hi", key, stream=True))
        await client.answer()
    not_found = (404, "stream_not_found")
    assert (await read_on(proxy, ID, None, key)).status == 200
    for header in ("Authorization: Bearer sk-other", "x-api-key: sk-mine", "Cookie: sk-mine"):
        assert await refusal(proxy, ID, None, header) == not_found
    for name in ("", "chatcmpl-other", f"{ID}/", "..", "%2e%2e/health"):
        assert await refusal(proxy, name, None, key) == not_found


async def test_without_a_window_nothing_is_kept(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        name, _ = await begin(client, 2)
        assert await refusal(proxy, name) == (404, "stream_not_found")
        paused.go_on()
        await client.heard(DONE)
    assert await refusal(proxy, name) == (404, "stream_not_found")


async def test_where_no_event_can_be(upstream: FakeUpstream, start: Start) -> None:
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        for after in ("x", "-1", "+1", "1.5", "1e3", "%D9%A1", "9999999999", "3"):
            assert await refusal(proxy, ID, after) == (400, "invalid_value"), after
        assert await refusal(proxy, ID, 1, "Last-Event-ID: x") == (400, "invalid_value")
        paused.go_on()
        await client.heard(DONE)


async def test_the_address_may_be_percent_encoded_and_is_for_reading_only(upstream: FakeUpstream, start: Start) -> None:
    odd = "résumé/7 of 9"
    upstream.plays(stream(*(chunk({"content": "Hello"}, id=odd, finish_reason=why) for why in (None, "stop"))))
    proxy = await start(streaming=KEPT)
    async with proxy.chat(stream=True) as response:
        whole = await response.read()
        name = response.headers["x-headwater-stream"]
    assert ids_in(whole) == {odd}
    for address in (name.replace(" ", "%20"), quote(odd, safe=""), quote(odd)):
        assert unnumbered((await read_on(proxy, address)).body) == whole
    async with clients(proxy, 1) as (client,):
        client.send(request("GET /v1/stre%61ms/" + quote(odd)))
        assert (await client.answer()).status == 200
        for method in ("HEAD", "POST", "DELETE"):
            client.send(request(f"{method} /v1/streams/{quote(odd)}", body=b"{}" if method == "POST" else None))
            refused = await client.answer(has_body=method != "HEAD")
            assert (refused.status, refused.headers["allow"]) == (405, "GET")
    assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- ids

NAMELESS = stream(*(chunk({"content": "Hello"}, id=None, finish_reason=why) for why in (None, "stop")))


@pytest.mark.parametrize("play", [stream(*PLAYED), NAMELESS, answer()], ids=["stream", "no id", "one body"])
@pytest.mark.parametrize("streaming", [KEPT, {}], ids=["kept", "not kept"])
async def test_the_id_in_the_header_is_the_answers_own(
    upstream: FakeUpstream, start: Start, play: Play, streaming: dict[str, Any]
) -> None:
    upstream.plays(play)
    proxy = await start(streaming=streaming)
    async with proxy.chat(stream=True) as response:
        assert ids_in(await response.read()) == {response.headers["x-headwater-stream"]}
    async with proxy.chat() as response:
        assert (await response.json())["id"] == response.headers["x-headwater-stream"]


@pytest.mark.parametrize("streams", [True, False])
async def test_answers_to_which_the_upstream_gives_one_id_get_their_own(
    upstream: FakeUpstream, start: Start, streams: bool
) -> None:
    whole = answer() if not streams else stream(*PLAYED)
    upstream.plays(whole)
    proxy = await start(streaming=KEPT)
    names = []
    for wishes in ({}, {"stream": True}, {"stream": True, **USAGE}, {"stream": True}):
        async with proxy.chat(**wishes) as response:
            body = await response.read()
            names.append(response.headers["x-headwater-stream"])
        assert (ids_in(body) if wishes else {json.loads(body)["id"]}) == {names[-1]}
        assert ids_in(unnumbered((await read_on(proxy, names[-1])).body)) == {names[-1]}
    assert len(set(names)) == 4
    assert names[0] == ID


async def test_a_client_that_gives_all_its_requests_one_id_finds_each_answer(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(streaming=KEPT)
    names = []
    async with clients(proxy, 1) as (client,):
        for number in range(3):
            upstream.plays(stream(role(), text(str(number)), finish(), usage()))
            client.send(chat("Hi", "x-request-id: mine", stream=True))
            answer_ = await client.answer()
            names.append(answer_.headers["x-headwater-stream"])
            assert ids_in(answer_.body) == {names[-1]}
    for number, name in enumerate(names):
        assert read_strictly(unnumbered((await read_on(proxy, name)).body)).text() == str(number)


async def test_an_id_that_was_told_with_a_heartbeat_stays(upstream: FakeUpstream, start: Start) -> None:
    paused = Paused(after=tuple(PLAYED))
    upstream.plays(paused)
    proxy = await start(streaming=KEPT | {"heartbeat_interval_s": 0.05})
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        name, _ = await begin(client, 1)
        client.reset()
        again.send(get(name))
        await again.heard(b": ping\n\n")
        paused.go_on()
        await again.heard(DONE)
    whole = unnumbered((await read_on(proxy, name)).body)
    assert ids_in(whole) == {name} != {ID}
    assert read_strictly(whole).text() == "Hello there"


# ---------------------------------------------------------------------- for how long


@pytest.mark.parametrize("play", [stream(*PLAYED), NAMELESS], ids=["named", "nameless"])
async def test_after_the_window_it_is_forgotten(upstream: FakeUpstream, start: Start, play: Play) -> None:
    upstream.plays(play)
    proxy = await start(streaming={"resume_window_s": 0.3})
    async with proxy.chat(stream=True) as response:
        await response.read()
        name = response.headers["x-headwater-stream"]
    await is_forgotten(proxy, name)
    async with proxy.chat(stream=True) as response:
        await response.read()
        assert (response.headers["x-headwater-stream"] == ID) == (name == ID), "the name is free again"


async def test_an_answer_that_took_two_attempts_is_forgotten_as_well(upstream: FakeUpstream, start: Start) -> None:
    """Both gave their id, and it was the same."""
    broken = Paused(role(), text("Hello"), after=breaks)
    broken.go_on()
    upstream.plays(broken, stream(*PLAYED))
    proxy = await start(streaming={"resume_window_s": 0.2})
    assert (await proxy.ask())["id"] == ID
    await is_forgotten(proxy)


async def test_a_client_that_never_comes_back_is_given_up(upstream: FakeUpstream, start: Start) -> None:
    silence = Silence(role(), text("Hello"), text(" there"))
    upstream.plays(silence)
    proxy = await start(streaming={"resume_window_s": 0.2})
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await client.heard(b"there")
        client.reset()
        await silence.is_left()
        row = await proxy.ledger.next()
        assert (row["status"], row["http_status"], row["mode"]) == ("cancelled", 499, "relay")
        assert (row["completion_tokens"], row["estimated"]) == (2, True)
        assert row["duration_ms"] >= 200
        await nothing_is_left(proxy)
        assert await refusal(proxy) == (404, "stream_not_found")


async def test_who_comes_back_in_time_may_stay_for_longer(upstream: FakeUpstream, start: Start) -> None:
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming={"resume_window_s": 0.4, "heartbeat_interval_s": 0.05})
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        client.reset()
        await is_noticed(proxy)
        again.send(get())
        for _ in range(10):
            await again.heard(b": ping\n\n")
        paused.go_on()
        await again.heard(DONE)
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_the_oldest_goes_when_there_is_no_room(upstream: FakeUpstream, start: Start) -> None:
    """An answer here has some 480 bytes: there is room for one, and none for a long one."""
    proxy = await start(streaming=KEPT | {"resume_max_mb": 0.0006})
    for number, words in enumerate(["Hello", "Hello", "Hello", "Hello " * 1000]):
        events = (chunk({"content": part}, id=f"up-{number}") for part in (words, " there"))
        upstream.plays(stream(*events, chunk({}, id=f"up-{number}", finish_reason="stop")))
        await proxy.stream()
        if number == 2:
            assert [(await read_on(proxy, f"up-{old}")).status for old in range(3)] == [404, 404, 200]
    assert [(await read_on(proxy, f"up-{old}")).status for old in range(4)] == [404] * 4


async def test_a_client_may_come_back_while_the_proxy_stops(tmp_path: Path, upstream: FakeUpstream) -> None:
    """Its answer is a running one, and may finish; new ones are not begun."""
    paused = hello()
    upstream.plays(paused)
    async with stopping_proxy(
        make_settings(tmp_path, upstream.url, server={"drain_s": 25}, streaming=KEPT)
    ) as stopping:
        proxy = stopping.proxy
        async with clients(proxy, 2) as (client, again):
            client.send(chat(stream=True))
            await client.heard(b'"Hello"')
            client.reset()
            await stopping.begins_to_stop()
            again.send(get(ID, 2))
            await is_noticed(proxy)
            paused.go_on()
            assert unnumbered((await again.answer()).body, 2) == b"".join(EVENTS[2:])
            assert (await proxy.ledger.next())["status"] == "ok"
            await stopping.has_stopped()


async def test_a_stop_does_not_wait_for_what_nobody_reads_for_ever(tmp_path: Path, upstream: FakeUpstream) -> None:
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence)
    async with stopping_proxy(
        make_settings(tmp_path, upstream.url, server={"drain_s": 0.1}, streaming=KEPT)
    ) as stopping:
        async with clients(stopping.proxy, 1) as (client,):
            client.send(chat(stream=True))
            await client.heard(b'"Hello"')
            client.reset()
            await is_noticed(stopping.proxy)
        stopping.stop()
        await silence.is_left()
        assert (await stopping.proxy.ledger.next())["status"] == "interrupted"
        await stopping.has_stopped()


# ---------------------------------------------------------------------- a browser's EventSource

FLAGS = ("--no-warnings", "--experimental-eventsource", "-e")
LISTENING = """
const source = new EventSource(process.argv[1]);
source.onmessage = (event) => console.log(JSON.stringify({id: event.lastEventId, data: event.data}));
setInterval(() => {}, 60_000); // Its timers do not keep node running.
source.onerror = () => console.log(JSON.stringify({closed: source.readyState === EventSource.CLOSED}));
"""

# WHATWG HTML §9.2.6: EventSource waits for some seconds before it reconnects, unless it is told otherwise.
AT_ONCE = b"retry: 10\n\n"


@asynccontextmanager
async def cutting(proxy: Proxy, *lengths: int) -> AsyncIterator[int]:
    """A gateway to the proxy, on the port given, that cuts each of its first connections behind so many bytes of answer.

    It speaks HTTP/1.0 to the proxy, so that an answer ends with its connection: Node gives up on chunks that break off,
    where a browser reconnects.
    """
    left = list(lengths)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        room = left.pop(0) if left else FAR
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        asking = await reader.readuntil(b"\r\n\r\n")
        up_writer.write(asking.replace(b" HTTP/1.1", b" HTTP/1.0").replace(b"keep-alive", b"close"))
        head = await up_reader.readuntil(b"\r\n\r\n")
        writer.write(head + AT_ONCE if b" 200 " in head else head)
        while room and (data := await up_reader.read(room)):
            writer.write(data)
            room -= len(data)
        up_writer.close()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_an_event_source_reads_every_event_once_and_stops(upstream: FakeUpstream, start: Start) -> None:
    """Node's EventSource, written after the same standard as browsers' are (WHATWG HTML §9.2).

    It is cut within its second event, and further on once more; when it has all it is told so by the 204.
    """
    node = shutil.which("node")
    if node is None or await (await asyncio.create_subprocess_exec(node, *FLAGS, "", stderr=DEVNULL)).wait():
        pytest.skip("a node with an EventSource is needed, 20.18 or later")
    paused = hello()
    upstream.plays(paused)
    proxy = await start(streaming=KEPT)
    asking = asyncio.create_task(proxy.stream())
    await upstream.asked(1)
    one = len(unnumbered(b"id: 1\n" + role()))
    async with cutting(proxy, one + 100, 2 * one) as port:
        script = await asyncio.create_subprocess_exec(
            *(node, *FLAGS, LISTENING),
            f"http://127.0.0.1:{port}/v1/streams/{ID}",
            stdout=PIPE,
        )
        assert script.stdout is not None
        seen: list[dict[str, str]] = []
        async with asyncio.timeout(_LONG):
            while (line := await script.stdout.readline()) and not (said := json.loads(line)).get("closed"):
                if "id" not in said:
                    paused.go_on()
                else:
                    seen.append(said)
        script.kill()
        await script.wait()
    assert [event["id"] for event in seen] == ["1", "2", "3", "4", "5"]
    assert b"".join(b"data: %b\n\n" % event["data"].encode() for event in seen) == WHOLE == await asking
    assert len(upstream.requests) == 1
