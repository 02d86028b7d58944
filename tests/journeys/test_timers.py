"""How long a call waits, for what, and what its client hears meanwhile.

Limits are made small here, and what must not expire is kept well away from them; no test looks at a clock.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from tests.conftest import Proxy, Start
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
    pause,
    refuse,
    role,
    stream,
    text,
    usage,
)

_PING = b": ping\n\n"
_LONG = 20


async def _read_until(response: aiohttp.ClientResponse, wanted: bytes, times: int = 1) -> bytes:
    """What the client has read when it has seen `wanted` that often."""
    body = b""
    async with asyncio.timeout(_LONG):
        while body.count(wanted) < times:
            part = await response.content.readany()
            assert part, f"the answer ended before {wanted!r}: {body!r}"
            body += part
    return body


def _as_told(response: aiohttp.ClientResponse, events: bytes) -> bytes:
    """The upstream's events under the id that the head has told: another one where a ping came before the upstream's."""
    return events.replace(b"chatcmpl-up", response.headers["x-headwater-stream"].encode())


def _under(response: aiohttp.ClientResponse, events: bytes) -> bytes:
    """The upstream's events under an id of our own."""
    assert response.headers["x-headwater-stream"] != "chatcmpl-up"
    return _as_told(response, events)


def _error_event(body: bytes) -> dict[str, Any]:
    """The error in the last event of a stream, which must be one, with no `[DONE]` anywhere."""
    assert b"[DONE]" not in body
    last = body.removesuffix(b"\n\n").rsplit(b"\n\n", 1)[-1]
    error: dict[str, Any] = json.loads(last.removeprefix(b"data: "))["error"]
    return error


@pytest.fixture
async def blackhole() -> AsyncIterator[str]:
    """The URL of a port that neither accepts nor refuses: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}/v1"
        for filler in fillers:
            filler.close()


# ---------------------------------------------------------------------- connecting


async def test_an_upstream_that_accepts_no_connection_is_a_504_in_time(start: Start, blackhole: str) -> None:
    proxy = await start(blackhole, streaming={"connect_timeout_s": 0.2})

    async with proxy.chat(stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "connect_timeout"
        assert response.headers["x-headwater-error-source"] == "upstream"

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 504, "connect_timeout")
    assert (row["attempts"], row["ttft_ms"], row["prompt_tokens"]) == (1, None, None)


async def test_an_upstream_that_accepts_no_connection_is_passed_over(
    start: Start, upstream: FakeUpstream, blackhole: str
) -> None:
    alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up2/model-a"]'
    proxy = await start(blackhole, upstream.url, more=alias, streaming={"connect_timeout_s": 0.2})

    assert (await proxy.stream(model="alias")).endswith(DONE)

    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"]) == ("ok", "up2/model-a", 2)


# ---------------------------------------------------------------------- the first token

_MUTE: dict[str, Callable[[], Silence]] = {
    "no head": lambda: Silence(head=False),
    "a head and no event": Silence,
    "a role, which is no token": lambda: Silence(role()),
    "half an event": lambda: Silence(text("Hello")[:-9]),
}


@pytest.mark.parametrize("said", _MUTE)
async def test_silence_before_the_first_token_is_a_504(start: Start, upstream: FakeUpstream, said: str) -> None:
    """A model server that accepts and never answers must not be waited for without end
    (https://github.com/maximhq/bifrost/issues/7199)."""
    silence = _MUTE[said]()
    upstream.plays(silence)
    proxy = await start(streaming={"first_token_timeout_s": 0.2})

    async with proxy.chat(stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "first_token_timeout"

    await silence.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 504, "first_token_timeout")


async def test_one_body_may_take_as_long_as_a_whole_answer_though_a_stream_was_asked_for(
    start: Start, upstream: FakeUpstream
) -> None:
    """Once the head says JSON, no first token is coming: its limit would keep a slow model from ever being served."""
    silence = Silence(b'{"id": ', content_type="application/json")
    upstream.plays(silence)
    proxy = await start(
        streaming={"first_token_timeout_s": 0.1, "whole_answer_timeout_s": 0.3, "heartbeat_interval_s": 0}
    )

    async with proxy.chat(stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "whole_answer_timeout"

    await silence.is_left()
    assert (await proxy.ledger.next())["error"] == "whole_answer_timeout"


async def test_comments_are_no_first_token(start: Start, upstream: FakeUpstream) -> None:
    """OpenRouter's `: OPENROUTER PROCESSING` says that somebody is there, not that an answer has begun
    (https://github.com/docker/docker-agent/issues/2349)."""
    left = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        try:
            while True:
                await wire.chunk(b": OPENROUTER PROCESSING\n\n")
                await pause(0.02)
        finally:
            left.set()

    upstream.plays(play)
    proxy = await start(streaming={"first_token_timeout_s": 0.4})

    async with proxy.chat(stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "first_token_timeout"
    async with asyncio.timeout(_LONG):
        await left.wait()


async def test_the_next_target_is_asked_when_one_stays_silent(start: Start, upstream: FakeUpstream) -> None:
    silence = Silence()
    upstream.plays(silence, stream(role(), text("Second"), finish(), usage()))
    alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up/model-b"]'
    proxy = await start(more=alias, streaming={"first_token_timeout_s": 0.5})

    assert b"Second" in await proxy.stream(model="alias")

    await silence.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"]) == ("ok", "up/model-b", 2)


async def test_a_limit_that_is_over_does_not_also_end_the_wait_for_the_next_target(
    start: Start, upstream: FakeUpstream
) -> None:
    """The second target is being tried out by another call, so this one waits a moment for what that one finds."""
    half_way = asyncio.Event()

    async def mute(request: Received, wire: Wire) -> None:
        await pause(0.3)
        half_way.set()
        await wire.gone()

    async with FakeUpstream() as second:
        upstream.plays(mute)
        second.plays(Silence(head=False), stream(role(), text("Second"), finish(), usage()))
        alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up2/model-a"]'
        proxy = await start(upstream.url, second.url, more=alias, streaming={"first_token_timeout_s": 0.6})
        waiting = asyncio.create_task(proxy.stream(model="alias"))
        async with asyncio.timeout(_LONG):
            await half_way.wait()
            async with proxy.chat(model="up2/model-a", stream=True) as other:
                assert other.status == 504
            assert b"Second" in await waiting

        rows = [await proxy.ledger.next() for _ in range(2)]
        assert sorted((row["status"], row["attempts"]) for row in rows) == [("ok", 2), ("upstream_error", 1)]


# ---------------------------------------------------------------------- silence in mid-answer


async def test_silence_in_mid_answer_ends_in_an_error_event(start: Start, upstream: FakeUpstream) -> None:
    silence = Silence(role(), text("Hello"), text(" wor"))
    upstream.plays(silence)
    proxy = await start(streaming={"idle_timeout_s": 0.2})

    body = await proxy.stream()

    assert body.startswith(role() + text("Hello") + text(" wor"))
    error = _error_event(body)
    assert (error["code"], error["type"], error["param"]) == ("idle_timeout", "upstream_error", None)
    assert 'finish_reason":"' not in body.decode()
    await silence.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "idle_timeout")
    assert row["estimated"] is True
    assert row["completion_tokens"] > 0


async def test_the_next_call_after_a_stalled_one_is_answered(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(Silence(role(), text("Hel")), stream(role(), text("Hello"), finish(), usage()))
    proxy = await start(streaming={"idle_timeout_s": 0.2, "recovery": "off"})

    assert _error_event(await proxy.stream())["code"] == "idle_timeout"
    assert (await proxy.stream()).endswith(DONE)


async def test_comments_keep_the_idle_timer_quiet(start: Start, upstream: FakeUpstream) -> None:
    """A model that thinks for minutes says so in comments: that is no stall
    (https://github.com/trefeon/freebuff-proxy/issues/59). The pings that the client hears are the clock here."""
    heard = asyncio.Event()
    beats = 12  # of 0.1 s each: far longer than the limit of 0.6 s

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Let me think"))
        for _ in range(beats):
            await heard.wait()
            heard.clear()
            await wire.chunk(b": still thinking\n\n")
        await wire.chunk(text(" … done") + finish() + usage())
        await wire.chunk(DONE)
        await wire.end()

    upstream.plays(play)
    proxy = await start(streaming={"idle_timeout_s": 0.6, "heartbeat_interval_s": 0.1})
    async with proxy.chat(stream=True) as response:
        body = b""
        for _ in range(beats):
            body += await _read_until(response, _PING)
            heard.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    said = role() + text("Let me think") + text(" … done") + finish() + DONE
    assert body.replace(_PING, b"") == _as_told(response, said)
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_counting_tokens_is_no_silence_of_the_upstream(start: Start, upstream: FakeUpstream) -> None:
    """The upstream has said everything; what takes long then is our own work, on a prompt of some megabytes."""
    upstream.plays(stream(role(), text("Hello"), finish() + DONE, done=False))
    proxy = await start(streaming={"idle_timeout_s": 0.05})
    prompt = "Once upon a time, in a land far, far away … " * 40_000

    body = await proxy.stream(messages=[{"role": "user", "content": prompt}], stream_options={"include_usage": True})

    assert body.endswith(DONE)
    row = await proxy.ledger.next()
    assert (row["status"], row["estimated"]) == ("ok", True)
    assert row["prompt_tokens"] > 100_000


# ---------------------------------------------------------------------- one whole answer, and all in all


async def test_a_whole_answer_has_a_limit_of_its_own(start: Start, upstream: FakeUpstream) -> None:
    silence = Silence(head=False)
    upstream.plays(silence)
    proxy = await start(streaming={"whole_answer_timeout_s": 0.2})

    async with proxy.chat() as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "whole_answer_timeout"

    await silence.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 504, "whole_answer_timeout")


def _slow_answer(seconds: float) -> Play:
    whole = answer()

    async def play(request: Received, wire: Wire) -> None:
        await pause(seconds)
        await whole(request, wire)

    return play


async def test_a_whole_answer_may_take_longer_than_a_first_token(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(_slow_answer(0.5))
    proxy = await start(streaming={"first_token_timeout_s": 0.1, "idle_timeout_s": 0.1})

    assert await proxy.ask() == COMPLETION


async def test_so_may_the_answer_of_a_model_that_is_known_not_to_stream(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(refuse(400, "stream"), _slow_answer(0.5))
    proxy = await start(streaming={"first_token_timeout_s": 0.1, "idle_timeout_s": 0.1})

    for _ in range(2):
        assert b"Hello" in await proxy.stream()
        assert (await proxy.ledger.next())["mode"] == "synthesis"


async def test_the_total_limit_ends_an_answer_that_never_pauses(start: Start, upstream: FakeUpstream) -> None:
    left = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        try:
            while True:
                await wire.chunk(text("and "))
                await pause(0.02)
        finally:
            left.set()

    upstream.plays(play)
    proxy = await start(streaming={"total_timeout_s": 0.5})

    async with asyncio.timeout(_LONG):
        body = await proxy.stream()

    assert b"and " in body
    assert _error_event(body)["code"] == "total_timeout"
    async with asyncio.timeout(_LONG):
        await left.wait()
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "total_timeout")


async def test_the_total_limit_leaves_no_time_for_another_target(start: Start, upstream: FakeUpstream) -> None:
    silence = Silence(head=False)
    upstream.plays(silence)
    alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up/model-b"]'
    proxy = await start(more=alias, streaming={"total_timeout_s": 0.3})

    async with asyncio.timeout(_LONG), proxy.chat(model="alias", stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "total_timeout"

    await silence.is_left()
    assert len(upstream.requests) == 1
    assert (await proxy.ledger.next())["attempts"] == 1


async def test_the_total_limit_is_what_the_ledger_names_also_when_the_client_reads_nothing(
    start: Start, upstream: FakeUpstream
) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for _ in range(1000):
            await wire.chunk(text("and so on " * 10_000))

    upstream.plays(play)
    proxy = await start(streaming={"total_timeout_s": 1.0, "send_timeout_s": 30})
    async with proxy.chat(stream=True) as response:
        # The client has the head, and reads no further.
        row = await proxy.ledger.next()
        response.close()
    assert (row["status"], row["error"]) == ("upstream_error", "total_timeout")


# ---------------------------------------------------------------------- heartbeats


async def test_pings_commit_a_200_before_the_first_token_and_repeat(start: Start, upstream: FakeUpstream) -> None:
    """Load balancers close what says nothing for a minute, and reasoning takes longer
    (https://github.com/BerriAI/litellm/issues/34374, https://github.com/maximhq/bifrost/issues/5010)."""
    may_speak = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await may_speak.wait()
        await stream(role(), text("Hello"), finish(), usage())(request, wire)

    upstream.plays(play)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with proxy.chat(stream=True) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        body = await _read_until(response, _PING, 3)
        assert body.replace(_PING, b"") == b""
        may_speak.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    assert body.replace(_PING, b"") == _under(response, role() + text("Hello") + finish() + DONE)
    row = await proxy.ledger.next()
    assert (row["status"], row["prompt_tokens"]) == ("ok", 7)


async def test_the_very_first_ping_reaches_the_client(start: Start, upstream: FakeUpstream) -> None:
    """The limit is over before a second one is due."""
    upstream.plays(Silence(head=False))
    proxy = await start(streaming={"heartbeat_interval_s": 0.6, "first_token_timeout_s": 0.9})

    body = await proxy.stream()

    assert body.startswith(_PING)
    assert body.count(_PING) == 1
    assert _error_event(body)["code"] == "first_token_timeout"


async def test_pings_fill_a_silence_in_mid_answer_but_never_stand_inside_an_event(
    start: Start, upstream: FakeUpstream
) -> None:
    """Half an event has come when the upstream pauses (https://github.com/BerriAI/litellm/issues/37322)."""
    may_go_on = asyncio.Event()
    halves = text("one whole event")[:40], text("one whole event")[40:]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello, "))
        await wire.chunk(halves[0])
        await may_go_on.wait()
        await wire.chunk(halves[1] + finish() + usage())
        await wire.chunk(DONE)
        await wire.end()

    upstream.plays(play)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with proxy.chat(stream=True) as response:
        body = await _read_until(response, _PING, 3)
        assert body.replace(_PING, b"") == _as_told(response, role() + text("Hello, "))
        may_go_on.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    said = role() + text("Hello, ") + text("one whole event") + finish() + DONE
    assert body.replace(_PING, b"") == _as_told(response, said)
    assert body.endswith(DONE)


async def test_a_model_that_does_not_stream_is_pinged_for_while_it_thinks(start: Start, upstream: FakeUpstream) -> None:
    may_answer = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await may_answer.wait()
        await answer()(request, wire)

    upstream.plays(play)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with proxy.chat(stream=True) as response:
        assert response.status == 200
        body = await _read_until(response, _PING, 2)
        may_answer.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    assert b"friend" in body
    assert body.endswith(DONE)
    assert (await proxy.ledger.next())["mode"] == "synthesis"


@pytest.mark.parametrize("status", [401, 429, 500])
async def test_a_refusal_behind_a_ping_is_an_error_event(start: Start, upstream: FakeUpstream, status: int) -> None:
    """The 200 is spent: only the stream itself can still say it
    (https://github.com/BerriAI/litellm-docs/issues/929)."""
    may_refuse = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await may_refuse.wait()
        await refuse(status, message="No luck today", code="no_luck")(request, wire)

    upstream.plays(play)
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    async with proxy.chat(stream=True) as response:
        assert response.status == 200
        body = await _read_until(response, _PING)
        may_refuse.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    error = _error_event(body)
    assert (error["message"], error["code"]) == ("No luck today", "no_luck")
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "no_luck")


async def test_the_next_target_is_asked_also_behind_a_ping(start: Start, upstream: FakeUpstream) -> None:
    """A comment is no part of the answer: nothing of it has been said yet."""
    may_refuse = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await may_refuse.wait()
        await refuse(404)(request, wire)

    upstream.plays(play, stream(role(), text("Second"), finish(), usage()))
    alias = '[[model]]\nname = "alias"\ntargets = ["up/model-a", "up/model-b"]'
    proxy = await start(more=alias, streaming={"heartbeat_interval_s": 0.05})
    async with proxy.chat(model="alias", stream=True) as response:
        body = await _read_until(response, _PING)
        may_refuse.set()
        async with asyncio.timeout(_LONG):
            body += await response.read()

    assert body.replace(_PING, b"") == _under(response, role() + text("Second") + finish() + DONE)
    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"]) == ("up/model-b", 2)


async def test_pings_do_not_hide_a_stall(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(Silence(role(), text("Hello")))
    proxy = await start(streaming={"heartbeat_interval_s": 0.05, "idle_timeout_s": 0.5})

    body = await proxy.stream()

    assert body.count(_PING) >= 2
    assert _error_event(body)["code"] == "idle_timeout"


async def test_an_interval_of_0_means_no_pings(start: Start, upstream: FakeUpstream) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await pause(0.3)
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await pause(0.3)
        await wire.chunk(finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    proxy = await start(streaming={"heartbeat_interval_s": 0})

    assert await proxy.stream() == role() + text("Hello") + finish() + DONE


async def test_a_client_that_wants_one_body_gets_no_pings(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(_slow_answer(0.3))
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})

    assert await proxy.ask() == COMPLETION


# ---------------------------------------------------------------------- connections that die without a word


async def _malformed(wire: Wire) -> None:
    """A chunk whose size is no number. aiohttp's parser stops there, and wakes nobody who reads."""
    await wire.send(b"zzz\r\nwhat is this?\r\n")
    await wire.gone()


async def test_malformed_framing_in_mid_answer_is_an_error_event(upstream: FakeUpstream, proxy: Proxy) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await _malformed(wire)

    upstream.plays(play)
    async with asyncio.timeout(_LONG):
        body = await proxy.stream()

    assert body.startswith(role() + text("Hello"))
    assert _error_event(body)["code"] == "upstream_broke"
    assert (await proxy.ledger.next())["error"] == "upstream_broke"


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
async def test_malformed_framing_before_the_first_token_is_a_502(
    upstream: FakeUpstream, proxy: Proxy, content_type: str
) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type=content_type)
        await wire.chunk(b" ")
        await _malformed(wire)

    upstream.plays(play)
    async with asyncio.timeout(_LONG), proxy.chat(stream=content_type == "text/event-stream") as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"
    assert (await proxy.ledger.next())["http_status"] == 502


async def test_malformed_framing_of_a_route_that_is_passed_on_cuts_the_connection(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="application/json")
        await wire.chunk(b'{"object": ')
        await _malformed(wire)

    upstream.plays(play)
    async with asyncio.timeout(_LONG), proxy.post("/embeddings", {"model": "model-a", "input": "Hi"}) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["error"]) == ("passthrough", "upstream_error", "upstream_broke")


# ---------------------------------------------------------------------- routes that are passed on


async def test_silence_of_a_route_that_is_passed_on_is_a_504_or_a_cut(start: Start, upstream: FakeUpstream) -> None:
    first, second = Silence(head=False), Silence(event({"type": "response.created"}))
    upstream.plays(first, second)
    proxy = await start(streaming={"whole_answer_timeout_s": 0.3, "idle_timeout_s": 0.2})

    async with proxy.post("/responses", {"model": "model-a", "input": "Hi", "stream": True}) as response:
        assert response.status == 504
    await first.is_left()
    assert (await proxy.ledger.next())["error"] == "whole_answer_timeout"

    async with proxy.post("/responses", {"model": "model-a", "input": "Hi", "stream": True}) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    await second.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["error"]) == ("upstream_error", "idle_timeout")


async def test_a_route_that_is_passed_on_may_take_as_long_as_it_says_something(
    start: Start, upstream: FakeUpstream
) -> None:
    parts = [b"part %d, " % number for number in range(16)]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for part in parts:
            await wire.chunk(part)
            await pause(0.1)
        await wire.end()

    upstream.plays(play)
    proxy = await start(streaming={"idle_timeout_s": 0.8})

    async with proxy.post("/responses", {"model": "model-a", "input": "Hi", "stream": True}) as response:
        assert await response.read() == b"".join(parts)
    assert (await proxy.ledger.next())["status"] == "ok"
