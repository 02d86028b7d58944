"""A model has several targets: the next one is asked when one fails, as long as the client has not seen a token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Start
from tests.fakes.upstream import (
    COMPLETION,
    FakeUpstream,
    Play,
    Received,
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
from tests.journeys.test_sloppy_streams import cut, read_strictly, written

BOTH = '[[model]]\nname = "fast"\ntargets = ["up/model-a", "up2/model-b"]'
HELLO = stream(role(), text("Hello"), finish(), usage())


@pytest.fixture
async def second() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


def hanging_up() -> Play:
    async def play(request: Received, wire: Wire) -> None:
        await wire.close()

    return play


def staying_silent() -> Play:
    async def play(request: Received, wire: Wire) -> None:
        await wire.gone()

    return play


ANOTHER_MIGHT_DO_BETTER: dict[str, tuple[Play, int]] = {
    "500": (refuse(500), 2),
    "502 with a page": (answer(b"<html>", 502, content_type="text/html"), 2),
    "503": (refuse(503), 1),
    "529": (refuse(529), 1),
    "429": (refuse(429, None, "Slow down", "rate_limit_exceeded"), 1),
    "401, our key is bad": (refuse(401), 1),
    "403": (refuse(403), 1),
    "404": (refuse(404), 1),
    "408": (refuse(408), 2),
    "a redirect": (answer(b"", 302, location="/"), 2),
    "a login page": (answer(b"<html>", content_type="text/html"), 2),
    "no completion": (answer({"id": "x"}), 2),
    "an error with status 200": (answer({"error": {"message": "overloaded", "code": 503}}), 1),
    "an error as the first event": (stream(event({"error": {"message": "overloaded", "code": 503}})), 1),
    "an error behind a role": (stream(role(), event({"error": {"message": "overloaded", "code": 503}})), 1),
    "a stream without an answer": (stream(role()), 2),
    "an empty stream": (written(), 2),
    "a closed connection": (hanging_up(), 2),
    "silence": (staying_silent(), 1),
}
"""And how often that target is asked: what is broken once more; what is overloaded not again, for there is no time to wait."""


@pytest.mark.parametrize(("trouble", "times"), ANOTHER_MIGHT_DO_BETTER.values(), ids=ANOTHER_MIGHT_DO_BETTER.keys())
async def test_a_failure_before_the_first_token_is_the_next_targets_chance(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, trouble: Play, times: int
) -> None:
    """https://github.com/maximhq/bifrost/issues/7199"""
    proxy = await start(upstream.url, second.url, more=BOTH, streaming={"first_token_timeout_s": 0.2})
    upstream.plays(trouble)
    second.plays(HELLO)

    async with proxy.chat(model="fast", stream=True) as response:
        assert response.status == 200
        assert response.headers["x-headwater-target"] == "up2/model-b"
        assert response.headers["x-headwater-attempts"] == str(times + 1)
        assert read_strictly(await response.read()).text() == "Hello"

    assert second.requests[0].json()["model"] == "model-b"
    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"], row["error"]) == ("ok", "up2/model-b", times + 1, None)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 2)


async def test_an_upstream_that_is_down_is_the_next_targets_chance(second: FakeUpstream, start: Start) -> None:
    proxy = await start("http://127.0.0.1:1/v1", second.url, more=BOTH)
    second.plays(answer())

    assert await proxy.ask(model="fast") == COMPLETION

    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"]) == ("up2/model-b", 3)


@pytest.mark.parametrize("trouble", ["500", "429", "an error with status 200", "a closed connection"])
async def test_a_client_that_wants_one_body_is_served_by_the_next_target_too(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, trouble: str
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(ANOTHER_MIGHT_DO_BETTER[trouble][0])
    second.plays(answer())

    async with proxy.chat(model="fast") as response:
        assert response.status == 200
        assert response.headers["x-headwater-target"] == "up2/model-b"


async def test_a_body_that_breaks_off_is_the_next_targets_chance_when_nobody_has_seen_it(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(cut("a tidy end"))
    second.plays(answer())

    assert await proxy.ask(model="fast") == COMPLETION


THE_REQUEST_IS_WRONG: dict[str, tuple[Play, int]] = {
    "400": (refuse(400, "temperature", "Too hot"), 400),
    "413": (refuse(413), 413),
    "422": (refuse(422), 422),
    "a context that is too long": (refuse(400, "messages", "Too long", "context_length_exceeded"), 400),
    "a policy": (refuse(400, None, "No", "content_filter"), 400),
    "400 with status 200": (answer({"error": {"message": "Too hot", "code": 400}}), 400),
    "400 in the first event": (stream(event({"error": {"message": "Too hot", "code": 400}})), 400),
}


@pytest.mark.parametrize(("played", "status"), THE_REQUEST_IS_WRONG.values(), ids=THE_REQUEST_IS_WRONG.keys())
async def test_a_request_that_is_wrong_is_not_tried_elsewhere(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, played: Play, status: int
) -> None:
    """A policy's refusal must not be routed around, and a wrong request is wrong everywhere."""
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(played)

    async with proxy.chat(model="fast", stream=True) as response:
        assert response.status == status

    assert second.requests == []
    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"], row["http_status"]) == ("up/model-a", 1, status)


async def test_when_all_fail_the_last_ones_error_is_told(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(refuse(500, None, "The first"))
    second.plays(answer({"error": {"message": "The second", "code": "slow"}}, 429, retry_after="99"))

    async with proxy.chat(model="fast", stream=True) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "99"
        assert (await response.json())["error"]["message"] == "The second"

    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"]) == ("upstream_error", "up2/model-b", 3)


@pytest.mark.parametrize(
    ("targets", "max_retries", "asked"),
    [
        ("abcd", 0, "a"),
        ("abcd", 1, "ab"),
        ("abcd", 3, "abcd"),
        ("ab", 2, "aab"),
        ("ab", 20, "aabb"),
        ("a", 20, "aa"),
    ],
)
async def test_each_target_is_asked_twice_as_far_as_the_operators_retries_reach(
    upstream: FakeUpstream, start: Start, targets: str, max_retries: int, asked: str
) -> None:
    """All targets are asked before any is asked again, where there is not enough for both."""
    names = ", ".join(f'"up/model-{letter}"' for letter in targets)
    proxy = await start(more=f'[[model]]\nname = "fast"\ntargets = [{names}]', streaming={"max_retries": max_retries})
    upstream.plays(refuse(500))

    async with proxy.chat(model="fast", stream=True) as response:
        assert response.status == 500

    assert [request.json()["model"] for request in upstream.requests] == [f"model-{letter}" for letter in asked]
    assert (await proxy.ledger.next())["attempts"] == len(asked)


@pytest.mark.parametrize("how", ["a tidy end", "a reset", "an error"])
async def test_behind_the_first_token_no_other_target_is_asked_without_recovery(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, how: str
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH, streaming={"recovery": "off"})
    upstream.plays(
        stream(role(), text("Hello"), event({"error": {"message": "No"}})) if how == "an error" else cut(how)
    )

    seen = read_strictly(await proxy.stream(model="fast"))

    assert seen.text() == "Hello"
    assert seen.error is not None
    assert (len(upstream.requests), second.requests) == (1, [])


async def test_a_ping_does_not_spend_the_chance_of_the_next_target(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    """A comment is no part of the answer."""
    proxy = await start(upstream.url, second.url, more=BOTH, streaming={"heartbeat_interval_s": 0.05})
    heard = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await heard.wait()
        await refuse(500)(request, wire)

    upstream.plays(play)
    second.plays(HELLO)

    async with asyncio.timeout(20), proxy.chat(model="fast", stream=True) as response:
        body = await response.content.readany()
        heard.set()
        body += await response.content.read()

    seen = read_strictly(body)
    assert (seen.text(), seen.error) == ("Hello", None)
    assert seen.pings >= 1
    assert (await proxy.ledger.next())["target"] == "up2/model-b"


async def test_each_target_is_asked_in_the_way_that_suits_it(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    """The first refuses to stream and then fails, so that nothing is proven of it; the second streams."""
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(refuse(400, "stream"), refuse(500))
    second.plays(HELLO)

    for attempts in (4, 3):
        assert read_strictly(await proxy.stream(model="fast")).text() == "Hello"
        assert (await proxy.ledger.next())["attempts"] == attempts

    assert ["stream" in request.json() for request in upstream.requests] == [True, False, False, True, True]
    assert ["stream" in request.json() for request in second.requests] == [True, True]


async def test_targets_in_turn_learn_nothing_from_each_other(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(refuse(500))
    second.plays(answer())
    await proxy.stream(model="fast")

    async with proxy.get("/admin/capabilities") as response:
        known: list[dict[str, Any]] = (await response.json())["data"]
    assert [(entry["upstream"], entry["model"]) for entry in known] == [("up2", "model-b")]


async def test_many_calls_at_once_all_find_the_next_target(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH, streaming={"first_token_timeout_s": 2})
    upstream.plays(refuse(503))
    second.plays(HELLO)

    bodies = await asyncio.gather(*(proxy.stream(model="fast", seed=number) for number in range(20)))

    assert [read_strictly(body).text() for body in bodies] == ["Hello"] * 20
