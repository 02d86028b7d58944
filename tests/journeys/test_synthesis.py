"""The upstream cannot stream, or is told not to: the client that wants a stream gets one all the same."""

from __future__ import annotations

import asyncio
import json
from typing import Any

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
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import ASKED, read_strictly

TEXT = COMPLETION["choices"][0]["message"]["content"]


def completion(*messages: dict[str, Any], finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A completion with a choice for each of `messages`."""
    choices = [
        {"index": index, "message": message, "finish_reason": finish_reason} for index, message in enumerate(messages)
    ]
    return {**COMPLETION, "choices": choices, **more}


def thinking(until: asyncio.Event, *plays: Play) -> Play:
    """Nothing is heard of this upstream `until` something has happened; then it goes on as `plays` says."""

    async def play(request: Received, wire: Wire) -> None:
        await until.wait()
        await plays[0](request, wire)

    return play


async def test_one_body_becomes_a_stream_without_asking_twice(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/inference-gateway/inference-gateway/issues/578"""
    upstream.plays(answer())

    async with proxy.chat(stream=True) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        seen = read_strictly(await response.read())

    assert seen.text() == TEXT
    assert len(seen.chunks) > 3, "not one giant chunk"
    assert {(part["id"], part["created"], part["model"]) for part in seen.chunks} == {
        ("chatcmpl-up", 1700000000, "model-a")
    }
    assert [part["choices"][0]["finish_reason"] for part in seen.chunks] == [None] * (len(seen.chunks) - 1) + ["stop"]
    assert len(upstream.requests) == 1
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["attempts"]) == ("synthesis", "ok", 1)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 4, False)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/problem+json", "text/plain"])
async def test_one_body_is_known_whatever_its_label(upstream: FakeUpstream, proxy: Proxy, content_type: str) -> None:
    upstream.plays(answer(content_type=content_type))

    assert read_strictly(await proxy.stream()).text() == TEXT

    assert (await proxy.ledger.next())["mode"] == "synthesis"


REFUSALS = {
    # https://github.com/RooCodeInc/Roo-Code/issues/6868
    "OpenAI's, for unverified organisations": refuse(
        400, "stream", "Your organization must be verified to stream this model.", "unsupported_value"
    ),
    "by its member": refuse(400, "stream", "Only false will do", "invalid_value"),
    # https://github.com/BeehiveInnovations/pal-mcp-server/issues/134
    "OpenRouter's, with another error inside": answer(
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {
                    "raw": '{"error": {"message": "must be verified to stream this model", "param": "stream"}}'
                },
            }
        },
        400,
    ),
    "by its words": refuse(400, None, "Streaming is not supported for this model.", "bad_request"),
    "by other words": refuse(422, None, "This model does not support streaming yet", "bad_request"),
    "as a FastAPI detail": answer({"detail": [{"loc": ["body", "stream"], "msg": "stream must be false"}]}, 422),
    "as plain text": answer(b"streaming disabled", 501, content_type="text/plain"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
async def test_a_refusal_to_stream_is_asked_once_more_without(
    upstream: FakeUpstream, proxy: Proxy, refusal: Play
) -> None:
    upstream.plays(refusal, answer())

    assert read_strictly(await proxy.stream(temperature=0)).text() == TEXT

    first, second = (request.json() for request in upstream.requests)
    assert first["stream"] is True
    assert "stream" not in second
    assert "stream_options" not in second
    assert second["temperature"] == 0
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["attempts"]) == ("synthesis", "ok", 2)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Upstream requests must not mention the word dream."),
        (400, "This model does not support tools."),
        (404, "The model does not exist"),
        (429, "Too many streams: slow down"),
        (500, "streaming is not supported"),
    ],
)
async def test_another_refusal_is_told_and_not_asked_otherwise(
    upstream: FakeUpstream, start: Start, status: int, message: str
) -> None:
    proxy = await start(streaming={"max_retries": 0})
    upstream.plays(refuse(status, None, message, "nope"))

    async with proxy.chat(stream=True) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"] == message

    assert len(upstream.requests) == 1
    assert (await proxy.ledger.next())["attempts"] == 1


async def test_a_refusal_of_the_second_request_is_told(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(refuse(400, "stream"), refuse(400, "stream", "Unsupported value, again"))

    async with proxy.chat(stream=True) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "Unsupported value, again"

    assert len(upstream.requests) == 2


async def test_every_member_of_the_body_is_in_the_stream_exactly_once(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/diegosouzapw/OmniRoute/issues/3112"""
    marks = {
        name: f"mark-{name}"
        for name in ("reasoning_content", "reasoning", "content", "refusal", "audio", "annotations", "unknown")
    }
    call = {"id": "c1", "type": "function", "function": {"name": "mark-name", "arguments": '{"of":"mark-arguments"}'}}
    whole = completion(
        {"role": "assistant", **marks, "audio": {"id": "mark-audio"}, "tool_calls": [call]},
        system_fingerprint="mark-fingerprint",
        service_tier="mark-tier",
    )
    whole["choices"][0] |= {"logprobs": {"content": [{"token": "mark-token"}]}, "stop_reason": "mark-stop"}
    upstream.plays(answer(whole))

    body = await proxy.stream()

    seen = read_strictly(body)
    for mark in ("audio", "annotations", "unknown", "name", "fingerprint", "tier", "token", "stop"):
        assert body.count(f"mark-{mark}".encode()) == 1, mark
    for member in ("reasoning_content", "reasoning", "content", "refusal"):
        assert seen.text(member=member) == f"mark-{member}"
    first, *_, last = seen.chunks
    assert first["system_fingerprint"] == "mark-fingerprint"
    assert last["choices"][0]["logprobs"] == {"content": [{"token": "mark-token"}]}
    members = [name for part in seen.chunks for name in part["choices"][0]["delta"]]
    order = ("reasoning_content", "reasoning", "content", "refusal", "tool_calls")
    assert sorted((name for name in members if name in order), key=order.index) == [
        name for name in members if name in order
    ]


async def test_tool_calls_become_deltas_a_client_can_put_together(upstream: FakeUpstream, proxy: Proxy) -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
        {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}},
    ]
    upstream.plays(
        answer(completion({"role": "assistant", "content": None, "tool_calls": calls}, finish_reason="tool_calls"))
    )

    seen = read_strictly(await proxy.stream())

    deltas = [call for part in seen.chunks for call in part["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas == [
        {**calls[0], "index": 0, "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city":"Rome"}'}},
        {**calls[1], "index": 1, "function": {"name": "time", "arguments": ""}},
    ]
    assert seen.chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_every_choice_is_streamed(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer(completion({"content": "The first."}, {"role": "assistant", "content": "The second."})))

    seen = read_strictly(await proxy.stream(n=2))

    assert (seen.text(0), seen.text(1)) == ("The first.", "The second.")
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_text_is_cut_between_graphemes_only(upstream: FakeUpstream, proxy: Proxy) -> None:
    words = "Straße 👩‍👩‍👧‍👦🇮🇹 e\u0301te\u0301 漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字 \u2028 \n\n  end"
    upstream.plays(answer(completion({"role": "assistant", "content": words})))

    seen = read_strictly(await proxy.stream())

    assert seen.text() == words
    pieces = [part["choices"][0]["delta"].get("content") or "" for part in seen.chunks]
    assert len([piece for piece in pieces if piece]) > 5
    assert any("👩‍👩‍👧‍👦" in piece for piece in pieces)
    assert not any(piece.startswith(("\u0301", "\u200d")) for piece in pieces)


async def test_an_empty_answer_is_a_stream_too(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer(completion({"role": "assistant", "content": ""}, finish_reason="length")))

    seen = read_strictly(await proxy.stream())

    assert seen.text() == ""
    assert seen.chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_body_without_a_finish_reason_is_not_given_one(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"choices": [{"message": {"content": "Hi"}}]}))

    seen = read_strictly(await proxy.stream())

    assert seen.text() == "Hi"
    assert not any(choice["finish_reason"] for part in seen.chunks for choice in part["choices"])
    assert (await proxy.ledger.next())["status"] == "incomplete"


async def test_usage_is_said_only_to_a_client_that_asked(upstream: FakeUpstream, proxy: Proxy) -> None:
    details = {**COMPLETION["usage"], "prompt_tokens_details": {"cached_tokens": 3}}
    upstream.plays(answer({**COMPLETION, "usage": details}))

    plain = read_strictly(await proxy.stream())
    assert all("usage" not in part for part in plain.chunks)

    asked = read_strictly(await proxy.stream(**ASKED), wants_usage=True)
    assert asked.chunks[-1]["choices"] == []
    assert asked.chunks[-1]["usage"] == details
    assert [part.get("usage") for part in asked.chunks[:-1]] == [None] * (len(asked.chunks) - 1)


async def test_usage_that_the_body_lacks_is_estimated(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({name: value for name, value in COMPLETION.items() if name != "usage"}))

    seen = read_strictly(await proxy.stream(**ASKED), wants_usage=True)

    assert seen.chunks[-1]["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 5,
        "total_tokens": 13,
        "estimated": True,
    }
    row = await proxy.ledger.next()
    assert (row["completion_tokens"], row["estimated"]) == (5, True)


async def test_a_long_body_is_streamed_whole(upstream: FakeUpstream, proxy: Proxy) -> None:
    long = "All work and no play. " * 4000
    upstream.plays(answer(completion({"role": "assistant", "content": long})))

    assert read_strictly(await proxy.stream()).text() == long


# ---------------------------------------------------------------------- while the upstream thinks


async def test_a_client_hears_pings_while_a_body_is_being_made(upstream: FakeUpstream, start: Start) -> None:
    """A balancer cuts connections that are silent for a minute (https://github.com/BerriAI/litellm/issues/34374)."""
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    heard = asyncio.Event()
    upstream.plays(thinking(heard, answer()))

    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        body = b""
        while body.count(b": ping\n\n") < 3:
            body += await response.content.readany()
        heard.set()
        body += await response.content.read()

    seen = read_strictly(body)
    assert seen.text() == TEXT
    assert seen.pings >= 3
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_pings_come_between_the_events_of_a_stream_that_pauses(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    heard = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hel") + text("lo")[:30])
        await heard.wait()
        await wire.chunk(text("lo")[30:] + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        body = b""
        while b": ping\n\n" not in body:
            body += await response.content.readany()
        heard.set()
        body += await response.content.read()

    assert body.replace(b": ping\n\n", b"") == role() + text("Hel") + text("lo") + finish() + DONE
    assert read_strictly(body).pings >= 1


async def test_an_error_after_a_ping_is_an_event(upstream: FakeUpstream, start: Start) -> None:
    """The ping has spent the status (https://github.com/BerriAI/litellm-docs/issues/929)."""
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    heard = asyncio.Event()
    upstream.plays(thinking(heard, refuse(429, None, "Slow down", "rate_limit_exceeded")))

    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        assert response.status == 200
        body = await response.content.readany()
        heard.set()
        body += await response.content.read()

    seen = read_strictly(body)
    assert seen.chunks == []
    assert seen.error is not None
    assert (seen.error["message"], seen.error["code"]) == ("Slow down", "rate_limit_exceeded")
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "rate_limit_exceeded")


async def test_a_client_that_wants_one_body_hears_no_pings(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"heartbeat_interval_s": 0.01})
    asked = asyncio.Event()
    upstream.plays(thinking(asked, answer()))

    async def let_it_answer() -> None:
        await upstream.asked(1)
        # Many heartbeats would have been due by now.
        asyncio.get_running_loop().call_later(0.1, asked.set)

    helper = asyncio.create_task(let_it_answer())
    async with proxy.chat() as response:
        assert json.loads(await response.read()) == COMPLETION
    await helper


async def test_without_a_heartbeat_nothing_is_sent_before_the_answer(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"heartbeat_interval_s": 0})
    asked = asyncio.Event()
    upstream.plays(thinking(asked, refuse(429, None, "Slow down", "rate_limit_exceeded")))
    asyncio.get_running_loop().call_later(0.1, asked.set)

    async with proxy.chat(stream=True) as response:
        assert response.status == 429


# ---------------------------------------------------------------------- settings


async def test_force_non_streaming_never_asks_for_a_stream(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"force_non_streaming": True})
    upstream.plays(answer())

    assert read_strictly(await proxy.stream(**ASKED), wants_usage=True).text() == TEXT

    assert upstream.requests[0].json().keys() == {"model", "messages"}
    assert upstream.requests[0].headers["accept"] == "application/json"
    assert (await proxy.ledger.next())["mode"] == "synthesis"


async def test_an_upstream_that_never_streams_is_never_asked_to(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more='stream = "never"')
    upstream.plays(answer())

    assert read_strictly(await proxy.stream()).text() == TEXT

    assert "stream" not in upstream.requests[0].json()


async def test_an_upstream_that_always_streams_is_asked_to_whatever_was_learned(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(more='stream = "always"')
    upstream.plays(answer(), stream(role(), text("Hi"), finish(), usage()))

    assert read_strictly(await proxy.stream()).text() == TEXT
    assert read_strictly(await proxy.stream()).text() == "Hi"

    assert [request.json()["stream"] for request in upstream.requests] == [True, True]


async def test_an_upstream_that_always_streams_is_not_asked_otherwise(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more='stream = "always"')
    upstream.plays(refuse(400, "stream"))

    async with proxy.chat(stream=True) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "stream"

    assert len(upstream.requests) == 1


async def test_without_fallback_one_body_is_an_error(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"enable_fallback": False})
    upstream.plays(answer())

    for _ in range(2):
        async with proxy.chat(stream=True) as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "upstream_does_not_stream"
        assert (await proxy.ledger.next())["status"] == "upstream_error"

    assert [request.json()["stream"] for request in upstream.requests] == [True, True]


async def test_without_fallback_a_refusal_to_stream_is_told(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"enable_fallback": False})
    upstream.plays(refuse(400, "stream"))

    async with proxy.chat(stream=True) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "unsupported_value"

    assert len(upstream.requests) == 1


async def test_without_fallback_a_client_that_wants_one_body_gets_it(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"enable_fallback": False})
    upstream.plays(answer())

    assert await proxy.ask() == COMPLETION
