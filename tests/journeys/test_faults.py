"""What goes wrong upstream, fault by fault, before a model that has a fallback: the client gets the whole answer.

Each fault is played to clients that stream, to one that wants one body, and to the official Python client.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import openai
import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    chunk,
    event,
    refuse,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import read_strictly

WORDS = ("The sea ", "is wide, ", "deep, ", "blue ", "and ", "salty.")
ANSWER = "".join(WORDS)
MODEL = """
[[model]]
name = "chat"
targets = ["up/model-a", "up2/model-b"]
"""
CONTEXTS = """
[[model]]
name = "chat"
targets = [{{ target = "up/model-a", context_tokens = 8000 }}, {{ target = "up2/model-b", context_tokens = {} }}]
"""
POLICY = "Your request was rejected as a result of our safety system."


@pytest.fixture
async def fallback() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


# ---------------------------------------------------------------------- what upstreams play


def events(request: Received, words: Sequence[str] = WORDS) -> list[bytes]:
    """The answer of a sound upstream, in which every chunk names the model that was asked."""
    model = request.json()["model"]
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    return [*(chunk(delta, model=model) for delta in deltas), chunk({}, finish_reason="stop", model=model)]


def body(request: Received) -> dict[str, Any]:
    message = {"role": "assistant", "content": ANSWER}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {**COMPLETION, "model": request.json()["model"], "choices": choices}


async def sound(request: Received, wire: Wire) -> None:
    if request.json().get("stream"):
        await stream(*events(request), usage(7, 4))(request, wire)
    else:
        await answer(body(request))(request, wire)


async def cut(request: Received, wire: Wire) -> None:
    """Two thirds of the answer, and a reset."""
    if request.json().get("stream"):
        await wire.head(content_type="text/event-stream")
        await wire.chunk(b"".join(events(request)[:5]))
    else:
        await wire.head(content_type="application/json", content_length="600")
        await wire.send(b'{"id": "chatcmpl-up", "choices": [{"index": 0, "message": {"content": "The sea')
    await wire.reset()


async def stalls(request: Received, wire: Wire) -> None:
    await wire.head(content_type="text/event-stream")
    await wire.chunk(b"".join(events(request)[:5]))
    await wire.gone()


async def begins_and_says_nothing(request: Received, wire: Wire) -> None:
    """A head, a role and comments are no first token."""
    await wire.head(content_type="text/event-stream")
    await wire.chunk(events(request)[0] + b": please wait\n\n")
    await wire.gone()


async def never_answers(request: Received, wire: Wire) -> None:
    await wire.gone()


async def resets(request: Received, wire: Wire) -> None:
    """In the middle of the head: one before it, on a connection that was used before, is no failure of the upstream."""
    await wire.send(b"HTTP/1.1 ")
    await wire.reset()


async def with_a_malformed_chunk(request: Received, wire: Wire) -> None:
    said = events(request)
    await stream(*said[:3], b'data: {"choices": [{"delta": {"con\n\n', *said[3:], usage(7, 4))(request, wire)


async def without_done(request: Received, wire: Wire) -> None:
    """The usage is there, `[DONE]` never comes, and the connection stays open."""
    await wire.head(content_type="text/event-stream")
    await wire.chunk(b"".join(events(request)) + usage(7, 4))
    await wire.gone()


async def refuses_prefixes(request: Received, wire: Wire) -> None:
    if request.json()["messages"][-1]["role"] == "assistant":
        await refuse(400, "messages", "The conversation must end with a user message.", "invalid_value")(request, wire)
    else:
        await sound(request, wire)


def limited(**headers: str) -> Play:
    return answer({"error": {"message": "Slow down", "code": "rate_limit_exceeded"}}, 429, **headers)


def error_first(code: int, message: str = "No") -> Play:
    """An error as the first event of a stream, or as the body with status 200."""

    async def play(request: Received, wire: Wire) -> None:
        error = {"error": {"message": message, "code": code}}
        await (stream(event(error)) if request.json().get("stream") else answer(error))(request, wire)

    return play


# ---------------------------------------------------------------------- what clients see


@dataclass
class Seen:
    """What a client has of an answer; of an error the status, and the message as the text."""

    status: int
    text: str
    models: set[str]
    headers: Any


async def streams(proxy: Proxy) -> Seen:
    async with proxy.chat(model="chat", stream=True) as response:
        if response.status != 200:
            return Seen(response.status, (await response.json())["error"]["message"], set(), response.headers)
        seen = read_strictly(await response.read())
    assert seen.error is None
    return Seen(200, seen.text(), {part["model"] for part in seen.chunks}, response.headers)


async def wants_one_body(proxy: Proxy) -> Seen:
    async with proxy.chat(model="chat") as response:
        value = await response.json()
    if response.status != 200:
        return Seen(response.status, value["error"]["message"], set(), response.headers)
    return Seen(200, value["choices"][0]["message"]["content"], {value["model"]}, response.headers)


async def streams_by_the_sdk(proxy: Proxy) -> Seen:
    """https://github.com/openai/openai-python"""
    said, models = "", set()
    async with openai.AsyncOpenAI(base_url=proxy.base, api_key="sk-any", max_retries=0) as client:
        try:
            response = await client.chat.completions.with_raw_response.create(
                model="chat", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        except openai.APIStatusError as error:
            message = error.response.json()["error"]["message"]
            return Seen(error.status_code, message, set(), error.response.headers)
        async for part in response.parse():
            said += part.choices[0].delta.content or ""
            models.add(part.model)
    return Seen(200, said, models, response.headers)


Client = Callable[[Proxy], Awaitable[Seen]]
STREAMING = (streams, streams_by_the_sdk)
ALL = (*STREAMING, wants_one_body)


@dataclass(frozen=True)
class Fault:
    """One fault: what the primary plays (the last for ever), how often it and the fallback are asked, who answers.

    `begins` is who said the first words, where that is another one. `attempts` are all that were made then.
    """

    primary: Sequence[Play]
    asked: tuple[int, int]
    by: str
    begins: tuple[str, int] | None = None
    clients: Sequence[Client] = ALL
    fallback: Play = sound
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = MODEL
    tokens: tuple[int, int] = (7, 4)


A, B = "up/model-a", "up2/model-b"

FAULTS = {
    "nothing goes wrong": Fault([sound], (1, 0), A),
    # RFC 9110 §10.2.3
    "429, come back in a second": Fault([limited(retry_after="1"), sound], (2, 0), A, clients=[streams]),
    "429, come back in an hour": Fault([limited(retry_after="3600")], (1, 1), B),
    "429 for ever": Fault([limited()], (3, 1), B),
    "500 once": Fault([refuse(500), sound], (2, 0), A),
    "500 for ever": Fault([refuse(500)], (2, 1), B),
    "502 with a page": Fault([answer(b"<html>", 502, "text/html")], (2, 1), B),
    "503 for ever": Fault([refuse(503)], (3, 1), B),
    "504 for ever": Fault([refuse(504)], (2, 1), B),
    "500 in the first event": Fault([error_first(500)], (2, 1), B),
    "our key is refused": Fault([refuse(401)], (1, 1), B),
    "the model is not there": Fault([refuse(404, None, "No such model", "model_not_found")], (1, 1), B),
    "a reset in the head": Fault([resets], (2, 1), B),
    # A call that gets nothing must count as one that failed: https://dev.to/claire_nguyen/fault-injecting-our-llm-provider-to-trust-bifrost-fallbacks-233e
    "no answer at all": Fault([never_answers], (1, 1), B, clients=STREAMING, settings={"first_token_timeout_s": 0.5}),
    "no body at all": Fault(
        [never_answers], (1, 1), B, clients=[wants_one_body], settings={"whole_answer_timeout_s": 0.5}
    ),
    "no first token in time": Fault(
        [begins_and_says_nothing], (1, 1), B, clients=STREAMING, settings={"first_token_timeout_s": 0.5}
    ),
    "cut at two thirds": Fault([cut], (2, 1), B, begins=(A, 1), clients=STREAMING),
    "cut at two thirds, once": Fault([cut, sound], (2, 0), A, begins=(A, 1), clients=STREAMING),
    "a body cut at two thirds": Fault([cut], (2, 1), B, clients=[wants_one_body]),
    "a stall": Fault([stalls], (2, 1), B, begins=(A, 1), clients=STREAMING, settings={"idle_timeout_s": 0.3}),
    "a malformed chunk": Fault([with_a_malformed_chunk], (1, 0), A, clients=STREAMING),
    "no [DONE]": Fault([without_done], (1, 0), A, clients=[streams], settings={"idle_timeout_s": 600}),
    "too long, and the fallback takes more": Fault(
        [refuse(400, "messages", "Too long", "context_length_exceeded")], (1, 1), B, model=CONTEXTS.format(128000)
    ),
    "cut, and the fallback refuses prefixes": Fault(
        [cut, resets],
        (2, 2),
        B,
        begins=(A, 1),
        clients=STREAMING,
        fallback=refuses_prefixes,
        settings={"recovery": "continue"},
    ),
}


@pytest.mark.parametrize(
    ("fault", "client"),
    [
        pytest.param(fault, client, id=f"{name}: {client.__name__}")
        for name, fault in FAULTS.items()
        for client in fault.clients
    ],
)
async def test_the_client_gets_the_whole_answer(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, fault: Fault, client: Client
) -> None:
    proxy = await start(upstream.url, fallback.url, more=fault.model, streaming=fault.settings)
    upstream.plays(*fault.primary)
    fallback.plays(fault.fallback)

    async with asyncio.timeout(20):
        seen = await client(proxy)

    assert (seen.status, seen.text) == (200, ANSWER)
    assert (len(upstream.requests), len(fallback.requests)) == fault.asked
    begins, attempts = fault.begins or (fault.by, sum(fault.asked))
    assert (seen.headers["x-headwater-target"], seen.headers["x-headwater-attempts"]) == (begins, str(attempts))
    assert seen.models == {target.partition("/")[2] for target in (begins, fault.by)}

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("ok", 200, None)
    assert (row["target"], row["attempts"], row["model"]) == (fault.by, sum(fault.asked), "chat")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (*fault.tokens, False)
    assert proxy.ledger.is_empty()


# Name: what the primary plays, the model, the status and the words that the client gets. The fallback is never asked.
REFUSALS = {
    "a policy": (refuse(400, None, POLICY, "content_policy_violation"), MODEL, 400, POLICY),
    # https://learn.microsoft.com/azure/ai-services/openai/concepts/content-filter
    "Azure's content filter": (refuse(400, "prompt", POLICY, "content_filter"), MODEL, 400, POLICY),
    "a policy with status 403": (refuse(403, None, POLICY, "content_policy_violation"), MODEL, 403, POLICY),
    "a policy with status 500": (refuse(500, None, POLICY, "content_filter"), MODEL, 500, POLICY),
    "the request is wrong": (refuse(400, "temperature", "Too hot"), MODEL, 400, "Too hot"),
    "too long, and the fallback takes no more": (
        refuse(400, "messages", "Too long", "context_length_exceeded"),
        CONTEXTS.format(8000),
        400,
        "Too long",
    ),
    "too long, and nobody knows what the fallback takes": (
        refuse(400, "messages", "Too long", "context_length_exceeded"),
        MODEL,
        400,
        "Too long",
    ),
}


@pytest.mark.parametrize("client", ALL)
@pytest.mark.parametrize(("played", "model", "status", "words"), REFUSALS.values(), ids=REFUSALS)
async def test_what_another_must_not_answer_or_would_refuse_too_is_told_as_it_came(
    upstream: FakeUpstream,
    fallback: FakeUpstream,
    start: Start,
    played: Play,
    model: str,
    status: int,
    words: str,
    client: Client,
) -> None:
    proxy = await start(upstream.url, fallback.url, more=model)
    upstream.plays(played)

    seen = await client(proxy)

    assert (seen.status, seen.text) == (status, words)
    assert seen.headers["x-headwater-error-source"] == "upstream"
    assert (len(upstream.requests), fallback.requests) == (1, [])
    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"], row["http_status"]) == ("upstream_error", A, 1, status)


async def test_a_filter_that_stops_an_answer_midway_is_a_finish_reason_and_no_failure(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL)
    upstream.plays(stream(text("The sea "), chunk({}, finish_reason="content_filter")))

    seen = read_strictly(await proxy.stream(model="chat"))

    assert (seen.text(), seen.chunks[-1]["choices"][0]["finish_reason"]) == ("The sea ", "content_filter")
    assert (len(upstream.requests), fallback.requests) == (1, [])


# ---------------------------------------------------------------------- when the primary is asked again


class Clock:
    """Notes when each request came: `times` of the event loop, `dates` in Unix seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.dates: list[float] = []

    def of(self, play: Play) -> Play:
        async def noted(request: Received, wire: Wire) -> None:
            self.times.append(asyncio.get_running_loop().time())
            self.dates.append(time.time())
            await play(request, wire)

        return noted


@pytest.mark.parametrize("client", [streams, wants_one_body])
async def test_a_primary_that_says_when_to_come_back_is_not_asked_before(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, client: Client
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL)
    clock = Clock()
    upstream.plays(clock.of(limited(retry_after="0.3")), clock.of(sound))

    assert (await client(proxy)).text == ANSWER

    assert clock.times[1] - clock.times[0] >= 0.3
    assert fallback.requests == []


async def test_a_primary_that_names_a_date_is_not_asked_before(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL)
    clock = Clock()
    date = math.ceil(time.time()) + 1
    upstream.plays(clock.of(limited(retry_after=formatdate(date, usegmt=True))), clock.of(sound))

    assert (await streams(proxy)).text == ANSWER

    assert clock.dates[1] >= date
    assert fallback.requests == []


async def test_a_wait_that_does_not_fit_what_is_left_for_the_first_token_is_not_begun(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start
) -> None:
    """The first wait is a part of what is left for the second."""
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming={"first_token_timeout_s": 1})
    upstream.plays(limited(retry_after="0.6"))
    fallback.plays(sound)

    seen = await streams(proxy)

    assert (seen.text, seen.headers["x-headwater-target"]) == (ANSWER, B)
    assert (len(upstream.requests), len(fallback.requests)) == (2, 1)


async def test_an_upstream_that_limits_is_asked_at_most_four_times_in_three_seconds(
    upstream: FakeUpstream, start: Start
) -> None:
    """However many of its models a name stands for."""
    targets = ", ".join(f'"up/model-{letter}"' for letter in "abcde")
    more = f'[[model]]\nname = "chat"\ntargets = [{targets}]'
    proxy = await start(more=more, streaming={"max_retries": 5})
    clock = Clock()
    upstream.plays(clock.of(limited()))

    seen = await streams(proxy)

    assert (seen.status, seen.text) == (429, "Slow down")
    assert len(clock.times) == 6
    # Three seconds, less what a request takes on its way.
    assert all(later - earlier >= 2.5 for earlier, later in zip(clock.times, clock.times[4:], strict=False))
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["attempts"]) == ("upstream_error", 429, 6)


@pytest.mark.parametrize("client", ALL)
async def test_when_all_are_limited_the_client_is_told_to_come_back(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, client: Client
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL)
    upstream.plays(limited(retry_after="100"))
    fallback.plays(limited(retry_after="60"))

    seen = await client(proxy)

    assert (seen.status, seen.text, seen.headers["retry-after"]) == (429, "Slow down", "60")
    assert (len(upstream.requests), len(fallback.requests)) == (1, 1)


@pytest.mark.parametrize(("max_retries", "asked"), [(0, (1, 0)), (1, (1, 1)), (2, (2, 1)), (3, (2, 2))])
async def test_max_retries_bounds_all_attempts_behind_the_first(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, max_retries: int, asked: tuple[int, int]
) -> None:
    """With one retry left the fallback is asked, and not the primary again."""
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming={"max_retries": max_retries})
    upstream.plays(refuse(500))
    fallback.plays(refuse(502))

    seen = await streams(proxy)

    assert seen.status == (502 if asked[1] else 500)
    assert (len(upstream.requests), len(fallback.requests)) == asked
    assert (await proxy.ledger.next())["attempts"] == sum(asked)


# ---------------------------------------------------------------------- a primary that comes and goes


async def test_a_flapping_primary_is_left_alone_and_comes_back(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start
) -> None:
    """Calls are served throughout: by the fallback while the primary is down, by the primary soon after it is up."""
    cooldown_s = 0.3
    settings = {"circuit_failures": 2, "circuit_cooldown_s": cooldown_s}
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming=settings)
    fallback.plays(sound)
    for _ in range(2):
        clock = Clock()
        upstream.plays(clock.of(resets))
        for _ in range(5):
            seen = await streams(proxy)
            assert (seen.text, seen.headers["x-headwater-target"]) == (ANSWER, B)

        upstream.plays(clock.of(sound))
        async with asyncio.timeout(20):
            while (seen := await streams(proxy)).headers["x-headwater-target"] == B:
                assert seen.text == ANSWER
        assert seen.text == ANSWER
        # From the second failure on, which was one too many.
        assert all(later - earlier >= cooldown_s for earlier, later in pairwise(clock.times[1:]))


# ---------------------------------------------------------------------- the account of a failover


@pytest.mark.parametrize(
    "primary",
    [
        stream(usage(1000, 500), event({"error": {"message": "No", "code": 503}})),
        stream(chunk({"role": "assistant"}), usage(1000, 500), done=False),
        answer({**COMPLETION, "error": {"message": "No", "code": 500}, "usage": {"prompt_tokens": 1000}}),
    ],
)
async def test_the_ledger_has_one_row_with_the_usage_of_the_target_that_answered(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, primary: Play
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming={"max_retries": 1})
    upstream.plays(primary)
    fallback.plays(sound)

    body = await proxy.stream(model="chat", stream_options={"include_usage": True})

    seen = read_strictly(body, wants_usage=True)
    assert (seen.text(), seen.chunks[-1]["usage"]["total_tokens"]) == (ANSWER, 11)
    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"], row["status"], row["mode"]) == (B, 2, "ok", "relay")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 4, False)
    assert proxy.ledger.is_empty()


@pytest.mark.parametrize(
    ("primary", "headers"),
    [
        (stream(usage(1000, 500), event({"error": {"message": "No", "code": 503}})), {}),
        (stream(text("The sea"), done=False), {"x-headwater-delivery": "whole"}),
    ],
    ids=["usage", "words that were held back"],
)
async def test_what_a_failed_target_said_is_not_booked_on_the_next_one(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start, primary: Play, headers: dict[str, str]
) -> None:
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming={"max_retries": 1})
    upstream.plays(primary)
    fallback.plays(refuse(500))

    async with proxy.chat(model="chat", stream=True, headers=headers) as response:
        assert response.status == 500

    row = await proxy.ledger.next()
    assert (row["target"], row["mode"], row["ttft_ms"]) == (B, "none", None)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (None, None)


async def test_a_stream_that_another_target_ended_has_the_usage_of_that_one(
    upstream: FakeUpstream, fallback: FakeUpstream, start: Start
) -> None:
    """It has said the whole answer; what the broken one has used, nobody told."""
    proxy = await start(upstream.url, fallback.url, more=MODEL, streaming={"max_retries": 1})
    upstream.plays(cut)
    fallback.plays(sound)

    body = await proxy.stream(model="chat", stream_options={"include_usage": True})

    seen = read_strictly(body, wants_usage=True)
    assert seen.text() == ANSWER
    assert seen.chunks[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    assert {part["id"] for part in seen.chunks} == {"chatcmpl-up"}
    assert body.endswith(DONE)
    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"], row["completion_tokens"]) == (B, 2, 4)
    assert proxy.ledger.is_empty()
