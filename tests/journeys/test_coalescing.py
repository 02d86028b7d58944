"""Identical requests in flight at once share one answer: the upstream is asked once, and no client can tell.

The clients are plain sockets, so that a test knows who has asked before the upstream goes on, and can leave in rude ways.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Proxy, Start, make_settings
from tests.fakes.client import Answer, Client, chat, request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Silence,
    Wire,
    answer,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_shutdown import _stopping as stopping_proxy
from tests.journeys.test_sloppy_streams import read_strictly
from tests.journeys.test_slow_clients import Flood, is_same, slow_client

_LONG = 20
REST = (text(" there"), finish(), usage())
WHOLE = role() + text("Hello") + text(" there") + finish() + DONE
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


class Paused:
    """A stream that stops behind `before` until it is let go on, by `go_on`, to `after` and the end.

    Without `before` it has not even sent a head. `after` may be a play instead, that goes on in its own way.
    """

    def __init__(self, *before: bytes, after: tuple[bytes, ...] | Play = REST) -> None:
        self._before = before
        self._after = after
        self._may_go_on = asyncio.Event()

    async def __call__(self, request: Received, wire: Wire) -> None:
        if self._before:
            await wire.head(content_type="text/event-stream")
        for data in self._before:
            await wire.chunk(data)
        await self._may_go_on.wait()
        if callable(self._after):
            await self._after(request, wire)
            return
        if not self._before:
            await wire.head(content_type="text/event-stream")
        for data in (*self._after, DONE):
            await wire.chunk(data)
        await wire.end()

    def go_on(self) -> None:
        self._may_go_on.set()


def hello(*after: bytes) -> Paused:
    """It has said Hello; REST follows, or what is given."""
    return Paused(role(), text("Hello"), after=after or REST)


@asynccontextmanager
async def clients(proxy: Proxy, count: int) -> AsyncIterator[list[Client]]:
    made = [await Client.to(proxy.port) for _ in range(count)]
    try:
        yield made
    finally:
        for client in made:
            client.close()


async def is_noticed(proxy: Proxy) -> None:
    """Wait until the proxy has noticed whatever clients have done: sent, or gone."""
    for _ in range(3):
        async with proxy.get("/health") as response:
            assert response.status == 200


async def ask_all(proxy: Proxy, asking: list[Client], **members: Any) -> None:
    """Let all ask the same, and wait until their requests have been read."""
    for client in asking:
        client.send(chat(stream=True, **members))
    await is_noticed(proxy)


async def rows(proxy: Proxy, count: int) -> list[dict[str, Any]]:
    return [await proxy.ledger.next() for _ in range(count)]


async def nothing_is_left(proxy: Proxy) -> None:
    async with proxy.get("/ready") as response:
        assert (await response.json())["in_flight"] == 0
    assert proxy.ledger.is_empty()


def modes(of: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["mode"] for row in of)


# ---------------------------------------------------------------------- one answer for all


async def test_those_who_ask_at_once_get_one_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = Paused(after=(role(), text("Hello"), *REST))
    upstream.plays(paused)
    async with clients(proxy, 8) as asking:
        await ask_all(proxy, asking)
        paused.go_on()
        answers = [await client.answer() for client in asking]

    assert {answer.body for answer in answers} == {WHOLE}
    assert {answer.headers["x-headwater-stream"] for answer in answers} == {"chatcmpl-up"}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 8
    assert len(upstream.requests) == 1
    settled = await rows(proxy, 8)
    assert modes(settled) == {"relay": 1, "coalesced": 7}
    assert {row["id"] for row in settled} == {answer.headers["x-request-id"] for answer in answers}
    assert {(row["status"], row["http_status"], row["target"]) for row in settled} == {("ok", 200, "up/model-a")}
    await nothing_is_left(proxy)


async def test_who_comes_late_is_told_what_was_said_and_then_the_rest_as_it_comes(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as (first, late):
        first.send(chat(stream=True))
        await first.heard(b'"Hello"')
        late.send(chat(stream=True))
        assert role() + text("Hello")[:-2] in (await late.heard(b'"Hello"') + await late.heard(b"}]}"))
        paused.go_on()
        assert (await first.heard(DONE)).endswith(DONE)
        assert (await late.heard(DONE)).endswith(DONE)

    one, other = await rows(proxy, 2)
    assert (one["mode"], other["mode"]) == ("relay", "coalesced")
    assert one["ttft_ms"] > 0
    assert other["ttft_ms"] == 0, "for that call it was there at once"
    assert other["duration_ms"] < one["duration_ms"]
    assert len(upstream.requests) == 1


async def test_the_official_client_asks_five_times_at_once(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    have_begun = asyncio.Barrier(6)

    async def ask(client: openai.AsyncOpenAI) -> str:
        said = ""
        chunks = await client.chat.completions.create(
            model="model-a", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        async for chunk in chunks:
            said += chunk.choices[0].delta.content or ""
            if said == "Hello" and chunk.choices[0].delta.content:
                await have_begun.wait()
        return said

    async with asyncio.timeout(_LONG), openai.AsyncOpenAI(base_url=proxy.base, api_key="sk-any") as client:
        asking = [asyncio.create_task(ask(client)) for _ in range(5)]
        await have_begun.wait()
        paused.go_on()
        assert await asyncio.gather(*asking) == ["Hello there"] * 5
    assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- what is the same, and what is not

QUESTION = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 0.5}


def asked(*headers: str, **changes: Any) -> bytes:
    body = {name: value for name, value in (QUESTION | changes).items() if value is not ...}
    return request("POST /v1/chat/completions", *headers, body=json.dumps(body).encode())


SAME = {
    "the very same": asked(),
    "members in another order": request(
        "POST /v1/chat/completions", body=json.dumps(dict(reversed(QUESTION.items())), indent=2).encode()
    ),
    "another user": asked(user="somebody"),
    "other metadata": asked(metadata={"trace": "7"}),
    "a request id": asked("x-request-id: mine"),
    "a trace": asked("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    "another program": asked("User-Agent: other/1.0", "x-stainless-retry-count: 0"),
    "an explicit wish": asked("x-headwater-coalesce: yes"),
    "one body": asked(stream=False),
}
OTHER = {
    "another temperature": asked(temperature=0.6),
    "no temperature": asked(temperature=...),
    "another model": asked(model="model-b"),
    "another message": asked(messages=[{"role": "user", "content": "Hi!"}]),
    "two answers": asked(n=2),
    "a member that nobody knows": asked(surprise=1),
    "a key": asked("Authorization: Bearer sk-somebody"),
    "a key of another kind": asked("api-key: sk-somebody"),
    "a header that nobody knows": asked("x-custom: 1"),
    "a wish to be alone": asked("x-headwater-coalesce: no"),
    "a wish to get all at once": asked("x-headwater-delivery: whole"),
    "running usage": asked(stream_options={"continuous_usage_stats": True}),
}


@pytest.mark.parametrize(("table", "times"), [(SAME, 1), (OTHER, 2)], ids=["the same", "not the same"])
async def test_what_is_shared(upstream: FakeUpstream, proxy: Proxy, table: dict[str, bytes], times: int) -> None:
    for name, second in table.items():
        paused = hello()
        upstream.plays(paused)
        upstream.requests.clear()
        async with clients(proxy, 2) as (one, other):
            one.send(asked())
            await one.heard(b'"Hello"')
            other.send(second)
            await is_noticed(proxy)
            if times == 2:
                await upstream.asked(2)
            paused.go_on()
            assert (await other.answer()).said() == "Hello there", name
            await one.heard(DONE)
        assert len(upstream.requests) == times, name
        assert modes(await rows(proxy, 2))["coalesced"] == 2 - times, name


async def test_callers_share_with_themselves_only(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    keys = ["Authorization: Bearer sk-a", "Authorization: Bearer sk-b", "x-api-key: sk-a"]
    async with clients(proxy, 6) as asking:
        for client, key in zip(asking, keys * 2, strict=True):
            client.send(asked(key))
            await client.heard(b'"Hello"')
        paused.go_on()
        for client in asking:
            await client.heard(DONE)
    assert len(upstream.requests) == 3


SWITCHES: dict[str, dict[str, Any]] = {
    "for all": {"streaming": {"coalesce": False}},
    "for one model": {"more": '[[model]]\nname = "alias"\ntargets = ["up/model-a"]\ncoalesce = false'},
    "above a temperature": {"streaming": {"coalesce_max_temperature": 0.4}},
}


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
async def test_it_can_be_turned_off(upstream: FakeUpstream, start: Start, options: dict[str, Any]) -> None:
    proxy = await start(**options)
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as asking:
        await ask_all(proxy, asking, model="alias" if "more" in options else "model-a", temperature=0.5)
        await upstream.asked(2)
        paused.go_on()
        assert [(await client.answer()).body for client in asking] == [WHOLE, WHOLE]


async def test_it_can_be_for_those_alone_who_want_no_chance(upstream: FakeUpstream, start: Start) -> None:
    """Who names no temperature gets 1."""
    proxy = await start(streaming={"coalesce_max_temperature": 0})
    asking_for: list[tuple[dict[str, Any], int]] = [({"temperature": 0}, 1), ({"temperature": 0.1}, 2), ({}, 2)]
    for members, times in asking_for:
        paused = hello()
        upstream.plays(paused)
        upstream.requests.clear()
        async with clients(proxy, 2) as asking:
            await ask_all(proxy, asking, **members)
            await upstream.asked(times)
            paused.go_on()
            assert [(await client.answer()).body for client in asking] == [WHOLE, WHOLE]
        assert len(upstream.requests) == times


async def test_one_model_can_share_where_others_do_not(upstream: FakeUpstream, start: Start) -> None:
    more = '[[model]]\nname = "alias"\ntargets = ["up/model-a"]\ncoalesce = true'
    proxy = await start(streaming={"coalesce": False}, more=more)
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as asking:
        await ask_all(proxy, asking, model="alias")
        paused.go_on()
        assert [(await client.answer()).body for client in asking] == [WHOLE, WHOLE]
    assert len(upstream.requests) == 1


async def test_an_answer_that_has_ended_is_not_shared(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(*(stream(role(), text(said), finish(), usage()) for said in ("One", "Two")))
    async with clients(proxy, 1) as (client,):
        said = []
        for _ in range(2):
            client.send(chat(stream=True))
            said.append((await client.answer()).said())
    assert said == ["One", "Two"]
    assert modes(await rows(proxy, 2)) == {"relay": 2}


async def test_an_answer_that_has_its_end_and_waits_for_its_usage_is_not_shared(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """It would be given in full at once, and yet look like one in flight."""
    silence = Silence(role(), text("One"), finish(), DONE)
    upstream.plays(silence, stream(role(), text("Two"), finish(), usage()))
    async with clients(proxy, 2) as (one, other):
        one.send(chat(stream=True))
        assert (await one.answer()).said() == "One"
        other.send(chat(stream=True))
        assert (await other.answer()).said() == "Two"


# ---------------------------------------------------------------------- different wishes, one answer


async def test_one_body_beside_a_stream(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as (streaming, waiting):
        streaming.send(chat(stream=True))
        await streaming.heard(b'"Hello"')
        waiting.send(chat())
        await is_noticed(proxy)
        paused.go_on()
        assert b"usage" not in await streaming.heard(DONE)
        body = (await waiting.answer()).json()

    assert (body["object"], body["id"]) == ("chat.completion", "chatcmpl-up")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello there"}
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert len(upstream.requests) == 1
    assert {(row["prompt_tokens"], row["completion_tokens"]) for row in await rows(proxy, 2)} == {(7, 2)}


async def test_a_stream_does_not_wait_for_one_body(upstream: FakeUpstream, proxy: Proxy) -> None:
    """The other one does not mind when it gets its answer; this one does. Who comes next shares with it."""
    whole, paused = Paused(after=answer()), hello()
    upstream.plays(whole, paused)
    async with clients(proxy, 4) as (waiting, streaming, third, fourth):
        waiting.send(chat())
        await upstream.asked(1)
        await streaming_asks(upstream, proxy, streaming)
        third.send(chat(stream=True))
        fourth.send(chat())
        await third.heard(b'"Hello"')
        await is_noticed(proxy)
        paused.go_on()
        assert (await fourth.answer()).said() == "Hello there"
        whole.go_on()
        assert (await waiting.answer()).json() == COMPLETION
    assert [request.json().get("stream", False) for request in upstream.requests] == [False, True]


async def streaming_asks(upstream: FakeUpstream, proxy: Proxy, client: Client) -> None:
    client.send(chat(stream=True))
    await client.heard(b'"Hello"')
    assert len(upstream.requests) == 2


async def test_bodies_share_a_body(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = Paused(after=answer())
    upstream.plays(paused)
    async with clients(proxy, 3) as asking:
        for client in asking:
            client.send(chat())
        await is_noticed(proxy)
        paused.go_on()
        assert [(await client.answer()).json() for client in asking] == [COMPLETION] * 3
    assert modes(await rows(proxy, 3)) == {"whole": 1, "coalesced": 2}
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("sends_usage", [True, False])
@pytest.mark.parametrize("first_wants", [True, False])
async def test_usage_is_told_to_whoever_wants_it(
    upstream: FakeUpstream, proxy: Proxy, first_wants: bool, sends_usage: bool
) -> None:
    paused = hello(text(" there"), finish(), *((usage(),) if sends_usage else ()))
    upstream.plays(paused)
    wishes = {True: USAGE, False: {}}
    async with clients(proxy, 2) as (first, second):
        await ask_all(proxy, [first], **wishes[first_wants])
        await ask_all(proxy, [second], **wishes[not first_wants])
        paused.go_on()
        told = {
            wants: (await client.answer()).body for wants, client in ((first_wants, first), (not first_wants, second))
        }

    assert told[False] == WHOLE
    seen = read_strictly(told[True], wants_usage=True)
    assert seen.text() == "Hello there"
    assert seen.chunks[-1]["usage"]["completion_tokens"] == 2
    assert seen.chunks[-1]["usage"].get("estimated", False) is not sends_usage


async def test_a_made_stream_is_shared_too(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = Paused(after=answer())
    upstream.plays(paused)
    async with clients(proxy, 3) as (one, other, waiting):
        await ask_all(proxy, [one, other])
        waiting.send(chat())
        await is_noticed(proxy)
        paused.go_on()
        streams = [(await client.answer()).body for client in (one, other)]
        assert (await waiting.answer()).json() == COMPLETION
    assert streams[0] == streams[1]
    assert read_strictly(streams[0]).text() == "Hello there, friend."
    assert modes(await rows(proxy, 3)) == {"synthesis": 1, "coalesced": 2}


async def test_an_answer_that_is_held_back_is_shared_too(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as asking:
        for client in asking:
            client.send(chat("Hi", "x-headwater-delivery: whole", stream=True))
        await is_noticed(proxy)
        paused.go_on()
        assert [(await client.answer()).body for client in asking] == [WHOLE, WHOLE]
    assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- heartbeats


async def test_heartbeats_reach_all(upstream: FakeUpstream, start: Start) -> None:
    """Those who joined before the first one, and one who joins an answer that has sent nothing but these."""
    paused = Paused(after=(role(), text("Hello"), *REST))
    upstream.plays(paused)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with clients(proxy, 3) as (one, two, late):
        await ask_all(proxy, [one, two])
        await one.heard(b": ping\n\n")
        await two.heard(b": ping\n\n")
        late.send(chat(stream=True))
        await late.heard(b": ping\n\n")
        paused.go_on()
        for client in (one, two, late):
            body = await client.heard(DONE)
            assert b'"Hello"' in body
    assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- leaving

LEAVING: dict[str, Callable[[Client], None]] = {"closing": Client.close, "resetting": Client.reset}


@pytest.fixture(params=LEAVING)
def leave(request: pytest.FixtureRequest) -> Callable[[Client], None]:
    return LEAVING[request.param]


@pytest.mark.parametrize("leaving", [0, 1], ids=["the first", "one who joined"])
async def test_who_leaves_disturbs_nobody(
    upstream: FakeUpstream, proxy: Proxy, leaving: int, leave: Callable[[Client], None]
) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 3) as asking:
        for client in asking:
            client.send(chat(stream=True))
            await client.heard(b'"Hello"')
        leave(asking.pop(leaving))
        gone = await proxy.ledger.next()
        paused.go_on()
        for client in asking:
            await client.heard(b'" there"')
            await client.heard(DONE)

    assert (gone["status"], gone["http_status"], gone["error"]) == ("cancelled", 499, None)
    assert (gone["completion_tokens"], gone["estimated"]) == (1, True)
    assert gone["ttft_ms"] is not None
    stayed = await rows(proxy, 2)
    assert [row["status"] for row in stayed] == ["ok", "ok"]
    assert modes([gone, *stayed]) == {"relay": 1, "coalesced": 2}
    assert gone["mode"] == "coalesced"  # who stays pays
    assert len(upstream.requests) == 1
    await nothing_is_left(proxy)


async def test_the_first_leaves_before_anything_was_said(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = Paused(after=(role(), text("Hello"), *REST))
    upstream.plays(paused)
    async with clients(proxy, 2) as (first, other):
        await ask_all(proxy, [first, other])
        first.reset()
        gone = await proxy.ledger.next()
        paused.go_on()
        assert (await other.answer()).body == WHOLE
    assert (gone["status"], gone["ttft_ms"], gone["completion_tokens"]) == ("cancelled", None, None)
    assert (await proxy.ledger.next())["status"] == "ok"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("says", [(), (role(), text("Hello"))], ids=["silent", "in mid-answer"])
async def test_when_all_have_left_the_upstream_is_left_at_once(
    upstream: FakeUpstream, proxy: Proxy, says: tuple[bytes, ...]
) -> None:
    silence = Silence(*says, head=bool(says))
    upstream.plays(silence, stream(role(), text("Anew"), finish(), usage()))
    async with clients(proxy, 4) as (one, two, three, later):
        await ask_all(proxy, [one, two, three])
        await silence.is_heard()
        if says:
            for client in (one, two, three):
                await client.heard(b'"Hello"')
        for client in (one, two, three):
            client.reset()
        await silence.is_left()
        settled = await rows(proxy, 3)
        assert {row["status"] for row in settled} == {"cancelled"}
        assert {row["completion_tokens"] for row in settled} == {1 if says else None}
        assert modes(settled)["coalesced"] == 2
        await nothing_is_left(proxy)

        later.send(chat(stream=True))
        assert (await later.answer()).said() == "Anew"


async def test_who_wants_one_body_stays_when_the_stream_leaves(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = hello()
    upstream.plays(paused)
    async with clients(proxy, 2) as (streaming, waiting):
        streaming.send(chat(stream=True))
        await streaming.heard(b'"Hello"')
        waiting.send(chat())
        await is_noticed(proxy)
        streaming.reset()
        assert (await proxy.ledger.next())["status"] == "cancelled"
        paused.go_on()
        assert (await waiting.answer()).said() == "Hello there"
    row = await proxy.ledger.next()
    assert (row["status"], row["mode"]) == ("ok", "whole")


async def test_a_hundred_come_and_go_and_nothing_is_left(upstream: FakeUpstream, proxy: Proxy) -> None:
    luck = random.Random(7)
    said_hello = hello()
    silent = Paused(after=said_hello)
    upstream.plays(silent)
    async with clients(proxy, 100) as asking:
        wants_stream = {client: client is asking[0] or luck.random() < 0.7 for client in asking}
        for number, client in enumerate(asking):
            client.send(chat("Hi", f"x-request-id: c{number}", stream=wants_stream[client]))
        await is_noticed(proxy)
        luck.shuffle(asking)
        for client in asking[:30]:
            luck.choice([Client.reset, Client.close])(client)
        silent.go_on()
        for client in asking[30:]:
            if wants_stream[client]:
                await client.heard(b'"Hello"')
        for client in asking[30:70]:
            luck.choice([Client.reset, Client.close])(client)
        await is_noticed(proxy)
        said_hello.go_on()
        for client in asking[70:]:
            if wants_stream[client]:
                await client.heard(DONE)
            else:
                assert (await client.answer()).said() == "Hello there"

    settled = await rows(proxy, 100)
    await nothing_is_left(proxy)
    assert {row["id"] for row in settled} == {f"c{number}" for number in range(100)}
    assert Counter(row["status"] for row in settled) == {"cancelled": 70, "ok": 30}
    assert [row["id"] for row in settled if row["mode"] != "coalesced"] == ["c0"]
    assert len(upstream.requests) == 1


async def test_who_does_not_read_does_not_stall_the_others(upstream: FakeUpstream, proxy: Proxy) -> None:
    flood = Flood(20)
    upstream.plays(flood)
    async with slow_client(proxy) as slow, clients(proxy, 1) as (brisk,):
        await slow.ask()
        await slow.read(100)
        brisk.send(chat(stream=True))
        assert is_same((await brisk.answer()).body, flood.body)
        assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- failures

FAILING: dict[str, tuple[Play, int]] = {
    "a refusal": (refuse(400, "messages", code="context_length_exceeded"), 400),
    "a limit": (refuse(429, code="rate_limit_exceeded"), 429),
    "an error in the first event": (stream(event({"error": {"message": "No.", "code": "server_error"}})), 502),
    "neither a stream nor JSON": (answer(b"<html>", content_type="text/html"), 502),
}


async def test_before_the_first_byte_all_get_the_same_status(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"max_retries": 0})
    for name, (play, status) in FAILING.items():
        paused = Paused(after=play)
        upstream.plays(paused)
        upstream.requests.clear()
        async with clients(proxy, 4) as asking:
            await ask_all(proxy, asking[:3])
            asking[3].send(chat())
            await is_noticed(proxy)
            paused.go_on()
            answers = [await client.answer() for client in asking]
        assert {answer.status for answer in answers} == {status}, name
        assert len({answer.body for answer in answers}) == 1, name
        settled = await rows(proxy, 4)
        assert {(row["status"], row["http_status"]) for row in settled} == {("upstream_error", status)}, name
        assert len(upstream.requests) == 1, name


async def breaks(request: Received, wire: Wire) -> None:
    await wire.reset()


async def test_in_mid_answer_all_are_told(upstream: FakeUpstream, start: Start) -> None:
    """Who waits for one body has seen no status yet, and gets one that tells."""
    paused = Paused(role(), text("Hello"), after=breaks)
    upstream.plays(paused)
    proxy = await start(streaming={"max_retries": 0})
    async with clients(proxy, 3) as (one, other, waiting):
        await ask_all(proxy, [one, other])
        waiting.send(chat("Hi", "x-request-id: waiting"))
        await is_noticed(proxy)
        paused.go_on()
        streams = [await client.answer() for client in (one, other)]
        body = await waiting.answer()

    for answer_ in streams:
        seen = read_strictly(answer_.body)
        assert seen.text() == "Hello"
        assert seen.error is not None
    assert body.status == 502
    assert body.json()["error"] == seen.error
    for row in await rows(proxy, 3):
        assert row["status"] == "upstream_error"
        assert row["http_status"] == (502 if row["id"] == "waiting" else 200)


async def test_whatbreaks_is_saved_for_all(upstream: FakeUpstream, proxy: Proxy) -> None:
    paused = Paused(role(), text("Hello"), after=breaks)
    again = Paused(role(), text("Hello"), text(" th"), after=(text("ere"), finish(), usage()))
    upstream.plays(paused, again)
    async with clients(proxy, 3) as (one, late, waiting):
        one.send(chat(stream=True))
        await one.heard(b'"Hello"')
        paused.go_on()
        said = await one.heard(b'" th"')
        late.send(chat(stream=True))
        await late.heard(b'" th"')
        waiting.send(chat(**USAGE))
        await is_noticed(proxy)
        again.go_on()
        said += await one.heard(DONE)
        await late.heard(DONE)
        body = (await waiting.answer()).json()
    assert b'"Hello"' not in said
    assert body["choices"][0]["message"]["content"] == "Hello there"
    assert body["usage"]["total_tokens"] == 9
    assert {(row["status"], row["attempts"]) for row in await rows(proxy, 3)} == {("ok", 2)}
    assert len(upstream.requests) == 2


async def test_at_a_stop_all_are_told_and_settled(tmp_path: Path, upstream: FakeUpstream) -> None:
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence)
    async with stopping_proxy(make_settings(tmp_path, upstream.url, server={"drain_s": 0.2})) as stopping:
        proxy = stopping.proxy
        async with clients(proxy, 3) as (one, other, waiting):
            for client in (one, other):
                client.send(chat(stream=True))
                await client.heard(b'"Hello"')
            waiting.send(chat())
            await is_noticed(proxy)
            stopping.stop()
            for client in (one, other):
                assert b"shutting_down" in await client.heard(b"0\r\n\r\n")
            refused: Answer = await waiting.answer()
            assert refused.status == 503
            settled = await rows(proxy, 3)
            await stopping.has_stopped()
        await silence.is_left()
    assert {row["status"] for row in settled} == {"interrupted"}
    assert sorted(row["http_status"] for row in settled) == [200, 200, 503]
