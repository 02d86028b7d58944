"""What an upstream can do is learned from its answers to the clients' own requests: once, and not for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, Start, make_settings, running_proxy
from tests.fakes.upstream import (
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import ASKED, read_strictly, staying_open

NO_STREAM = refuse(400, "stream", "Your organization must be verified to stream this model.")
STREAM = stream(role(), text("Hi"), finish(), usage())


def by_request(*, streaming: Play, whole: Play) -> Play:
    """An upstream that answers by what it is asked for."""

    async def play(request: Received, wire: Wire) -> None:
        await (streaming if "stream" in request.json() else whole)(request, wire)

    return play


def asked_to_stream(upstream: FakeUpstream) -> list[bool]:
    return [request.json().get("stream", False) for request in upstream.requests]


async def facts(proxy: Proxy) -> dict[str, Any]:
    """What is known: {"up/model-a": {"streams": True, …}}."""
    async with proxy.get("/admin/capabilities") as response:
        assert response.status == 200
        listed = (await response.json())["data"]
    return {
        f"{entry['upstream']}/{entry['model']}": {topic: fact["value"] for topic, fact in entry["facts"].items()}
        for entry in listed
    }


async def test_nothing_is_known_and_nothing_is_probed_at_the_start(upstream: FakeUpstream, proxy: Proxy) -> None:
    async with proxy.get("/v1/models"):
        pass
    assert await facts(proxy) == {}
    assert upstream.requests == []


async def test_an_upstream_that_refuses_to_stream_is_asked_to_once(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/RooCodeInc/Roo-Code/issues/6868"""
    upstream.plays(by_request(streaming=NO_STREAM, whole=answer()))

    for attempts in (2, 1, 1):
        assert read_strictly(await proxy.stream()).is_done
        row = await proxy.ledger.next()
        assert (row["mode"], row["attempts"]) == ("synthesis", attempts)

    assert asked_to_stream(upstream) == [True, False, False, False]
    assert await facts(proxy) == {"up/model-a": {"streams": False}}


async def test_an_upstream_that_answers_with_one_body_is_asked_to_stream_once(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(answer())

    for _ in range(3):
        assert read_strictly(await proxy.stream()).is_done

    assert asked_to_stream(upstream) == [True, False, False]


async def test_another_model_of_the_same_upstream_is_another_matter(upstream: FakeUpstream, proxy: Proxy) -> None:
    """An unknown model streams until it shows otherwise (https://github.com/BerriAI/litellm/issues/21090)."""
    upstream.plays(answer(), STREAM)

    await proxy.stream()
    assert read_strictly(await proxy.stream(model="model-b")).text() == "Hi"

    assert await facts(proxy) == {
        "up/model-a": {"streams": False},
        "up/model-b": {"streams": True, "stream_options": True, "sends_usage": True},
    }


async def test_a_request_for_one_body_teaches_nothing(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer(), STREAM)

    await proxy.ask()
    await proxy.ask()

    assert await facts(proxy) == {}


async def test_what_was_learned_survives_a_restart(upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.plays(by_request(streaming=NO_STREAM, whole=answer()))
    settings = make_settings(tmp_path, upstream.url)

    for _ in range(2):
        async with running_proxy(settings) as proxy:
            await proxy.stream()

    assert asked_to_stream(upstream) == [True, False, False]


async def test_what_was_learned_counts_for_one_credential_only(upstream: FakeUpstream, tmp_path: Path) -> None:
    """Providers verify organisations: another key may stream (https://github.com/RooCodeInc/Roo-Code/issues/6868)."""
    upstream.plays(answer(), STREAM)

    async with running_proxy(make_settings(tmp_path, upstream.url)) as proxy:
        await proxy.stream()
    async with running_proxy(make_settings(tmp_path, upstream.url, more='api_key_env = "UP_KEY"')) as proxy:
        assert read_strictly(await proxy.stream()).text() == "Hi"
        async with proxy.get("/admin/capabilities") as response:
            body = await response.text()
            entries = (await response.json())["data"]

    assert asked_to_stream(upstream) == [True, True]
    assert len({entry["credential"] for entry in entries}) == 2
    assert "sk-upstream-secret" not in body


async def test_with_no_time_to_remember_everything_is_tried_again(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"detection_cache_s": 0})
    upstream.plays(answer(), STREAM)

    await proxy.stream()
    assert read_strictly(await proxy.stream()).text() == "Hi"

    assert asked_to_stream(upstream) == [True, True]
    assert (await facts(proxy))["up/model-a"]["streams"] is True


async def test_the_operator_sees_the_evidence_and_can_have_it_forgotten(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(NO_STREAM, answer(), STREAM)
    await proxy.stream()

    async with proxy.get("/admin/capabilities") as response:
        (entry,) = (await response.json())["data"]
    assert (entry["upstream"], entry["model"], entry["credential"]) == ("up", "model-a", "none")
    fact = entry["facts"]["streams"]
    assert fact["value"] is False
    assert fact["is_fresh"] is True
    assert "must be verified to stream" in fact["evidence"]

    async with proxy.delete("/admin/capabilities/up/model-a") as response:
        assert response.status == 200
    assert await facts(proxy) == {}
    assert read_strictly(await proxy.stream()).text() == "Hi"
    assert asked_to_stream(upstream) == [True, False, True]


async def test_what_was_forgotten_stays_forgotten_after_a_restart(upstream: FakeUpstream, tmp_path: Path) -> None:
    upstream.plays(answer())
    settings = make_settings(tmp_path, upstream.url)
    async with running_proxy(settings) as proxy:
        await proxy.stream(model="vendor/model-a")
        async with proxy.delete("/admin/capabilities/up/vendor/model-a") as response:
            assert response.status == 200

    async with running_proxy(settings) as proxy:
        assert await facts(proxy) == {}


async def test_what_is_not_known_cannot_be_forgotten(proxy: Proxy) -> None:
    async with proxy.delete("/admin/capabilities/up/model-a") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"


# ---------------------------------------------------------------------- stream_options


async def test_an_upstream_that_rejects_stream_options_is_asked_without_them(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """https://github.com/QuantumNous/new-api/issues/418"""
    rejects = refuse(400, None, "Unrecognized request argument supplied: stream_options", "unknown")
    upstream.plays(rejects, stream(role(), text("Hi"), finish()))

    for attempts in (2, 1):
        seen = read_strictly(await proxy.stream(**ASKED), wants_usage=True)
        assert seen.chunks[-1]["usage"]["estimated"] is True
        row = await proxy.ledger.next()
        assert (row["mode"], row["status"], row["attempts"]) == ("relay", "ok", attempts)

    assert ["stream_options" in request.json() for request in upstream.requests] == [True, False, False]
    assert asked_to_stream(upstream) == [True, True, True]
    assert await facts(proxy) == {"up/model-a": {"streams": True, "stream_options": False}}


async def test_an_upstream_may_refuse_one_thing_after_the_other(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(refuse(422, None, "extra fields not permitted: stream_options"), NO_STREAM, answer())

    for _ in range(2):
        assert read_strictly(await proxy.stream()).is_done

    assert asked_to_stream(upstream) == [True, True, False, False]
    assert (await proxy.ledger.next())["attempts"] == 3


async def test_an_upstream_that_streams_but_sends_no_usage_is_known_for_it(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(stream(role(), text("Hi"), finish()))
    await proxy.stream()
    assert await facts(proxy) == {"up/model-a": {"streams": True, "stream_options": True, "sends_usage": False}}

    upstream.plays(STREAM)
    await proxy.stream()
    assert (await facts(proxy))["up/model-a"]["sends_usage"] is True


# ---------------------------------------------------------------------- many at once


async def test_of_many_first_calls_only_one_finds_out(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(by_request(streaming=NO_STREAM, whole=answer()))

    bodies = await asyncio.gather(*(proxy.stream(seed=number) for number in range(20)))

    assert all(read_strictly(body).is_done for body in bodies)
    assert sorted(asked_to_stream(upstream)) == [False] * 20 + [True]
    rows = [await proxy.ledger.next() for _ in range(20)]
    assert sorted(row["attempts"] for row in rows) == [1] * 19 + [2]


async def test_of_many_first_calls_none_waits_for_the_whole_answer_of_another(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """The head of the first answer tells; all streams run at the same time."""
    all_there = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hi"))
        if len(upstream.requests) == 10:
            all_there.set()
        await all_there.wait()
        await wire.chunk(finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)

    async with asyncio.timeout(20):
        bodies = await asyncio.gather(*(proxy.stream(seed=number) for number in range(10)))
    assert all(read_strictly(body).text() == "Hi" for body in bodies)


async def test_a_first_call_that_finds_out_nothing_does_not_stop_the_others(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """The first one's client leaves while the upstream still thinks."""
    upstream.plays(staying_silent(), STREAM)
    first = asyncio.create_task(proxy.stream())
    await upstream.asked(1)
    others = [asyncio.create_task(proxy.stream(seed=number)) for number in range(5)]
    first.cancel()

    async with asyncio.timeout(20):
        assert [read_strictly(await other).text() for other in others] == ["Hi"] * 5


def staying_silent() -> Play:
    async def play(request: Received, wire: Wire) -> None:
        await wire.gone()

    return play


# ---------------------------------------------------------------------- what is no evidence

NO_EVIDENCE = {
    "500": answer({"error": {"message": "streaming is not supported"}}, 500),
    "502": answer(b"<html>stream not available</html>", 502, content_type="text/html"),
    "503": refuse(503, "stream", "streaming is not supported right now"),
    "429": refuse(429, "stream", "streaming is not allowed at this rate"),
    "401": refuse(401, None, "Bad key"),
    "another 400": refuse(400, "temperature", "temperature is not supported", "unsupported_value"),
    "silence": staying_silent(),
    "silence behind the head": staying_open(),
    "an error in the stream": stream(b'data: {"error":{"message":"streaming is not supported","code":500}}\n\n'),
    "an error in one body": answer({"error": {"message": "overloaded", "code": 503}}),
}


@pytest.mark.parametrize("bad_day", NO_EVIDENCE.values(), ids=NO_EVIDENCE.keys())
async def test_a_bad_day_is_no_evidence_that_an_upstream_cannot_stream(
    upstream: FakeUpstream, start: Start, bad_day: Play
) -> None:
    proxy = await start(streaming={"first_token_timeout_s": 0.5, "max_retries": 0})
    upstream.plays(bad_day, STREAM)

    async with proxy.chat(stream=True) as response:
        assert response.status >= 400
    assert len(upstream.requests) == 1
    assert (await facts(proxy)).get("up/model-a", {}).get("streams") is not False

    assert read_strictly(await proxy.stream()).text() == "Hi"
    assert asked_to_stream(upstream) == [True, True]


# ---------------------------------------------------------------------- streams that are none


async def test_a_stream_that_comes_in_one_burst_is_found_out(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Something between gathers it: https://github.com/BerriAI/litellm/issues/6458. It is passed on all the same."""
    words = [text(f"word {number} ") for number in range(30)]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        gathered = asyncio.Event()
        asyncio.get_running_loop().call_later(0.25, gathered.set)
        await gathered.wait()
        await wire.chunk(role() + b"".join(words) + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)

    assert await proxy.stream() == role() + b"".join(words) + finish() + DONE

    assert (await facts(proxy))["up/model-a"]["buffers"] is True
    async with proxy.get("/admin/capabilities") as response:
        (entry,) = (await response.json())["data"]
    assert "33 events within" in entry["facts"]["buffers"]["evidence"]


async def test_a_stream_that_flows_is_known_to(upstream: FakeUpstream, proxy: Proxy) -> None:
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("first"))
        await seen.wait()
        await wire.chunk(b"".join(text(f"word {number} ") for number in range(30)) + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with proxy.chat(stream=True) as response:
        received = b""
        while text("first") not in received:
            received += await response.content.readany()
        seen.set()
        await response.read()

    assert (await facts(proxy))["up/model-a"]["buffers"] is False
