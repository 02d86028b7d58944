"""A stream that dies midway: the client gets one whole answer, or what was said and the error of the first break.

The first answer and the one that saves it differ in id and date, so that a seam would be seen.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import accumulate, pairwise
from typing import Any

import openai
import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Client, chat
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Silence,
    Wire,
    answer,
    chunk,
    event,
    finish,
    pause,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import Seen, read_strictly
from tests.journeys.test_slow_clients import slow_client

WORDS = ("The sea ", "is wide, ", "deep, ", "blue ", "and ", "salty.")
ANSWER = "".join(WORDS)
FIRST = [role(), *map(text, WORDS), finish()]
BOTH = '[[model]]\nname = "both"\ntargets = ["up/model-a", "up2/model-b"]'
LONG = "Forty words would do to tell a repetition, but these few are enough, too."


@pytest.fixture
async def second() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


# ---------------------------------------------------------------------- what upstreams play


def again(delta: dict[str, Any], reason: str | None = None, **members: Any) -> bytes:
    """A chunk of the answer that saves the first one."""
    return chunk(delta, finish_reason=reason, **{"id": "chatcmpl-again", "created": 1800000000, **members})


def saying(*words: str, reason: str | None = "stop") -> list[bytes]:
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    return [*map(again, deltas), *([again({}, reason)] if reason else [])]


def broken(*pieces: bytes) -> Play:
    """These bytes of a stream, and then the connection breaks."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for piece in pieces:
            await wire.chunk(piece)
        await wire.close()

    return play


def whole(*words: str) -> Play:
    return stream(*saying(*words), usage(7, 9))


def completion(content: str, reason: str | None = "stop", **members: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    return {**COMPLETION, "id": "chatcmpl-again", "created": 1800000000, "choices": choices, **members}


class Gate:
    """A stream that says `before`, and goes on with `after` when it is opened."""

    def __init__(self, before: list[bytes], after: Play) -> None:
        self._before = before
        self._after = after
        self.opened = asyncio.Event()

    async def __call__(self, request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for data in self._before:
            await wire.chunk(data)
        await self.opened.wait()
        await self._after(request, wire)


def rest(*events: bytes, is_whole: bool = True) -> Play:
    """What follows behind a gate."""

    async def play(request: Received, wire: Wire) -> None:
        for data in (*events, DONE) if is_whole else events:
            await wire.chunk(data)
        await (wire.end() if is_whole else wire.close())

    return play


# ---------------------------------------------------------------------- what clients see


async def read(proxy: Proxy, *, wants_usage: bool = False, **members: Any) -> Seen:
    if wants_usage:
        members["stream_options"] = {"include_usage": True}
    async with asyncio.timeout(20):
        return read_strictly(await proxy.stream(**members), wants_usage=wants_usage)


async def can_count(proxy: Proxy, upstream: FakeUpstream) -> None:
    """Until the tokenizer runs: starting it can take longer than a broken answer waits for its count."""
    upstream.plays(stream(*FIRST))
    await read(proxy, wants_usage=True)
    assert (await proxy.ledger.next())["estimated"] is True
    upstream.requests.clear()


def told_error(seen: Seen) -> str:
    assert seen.error is not None
    code: str = seen.error["code"]
    return code


async def prefill_known(proxy: Proxy, model: str = "model-a") -> bool | None:
    async with proxy.get("/admin/capabilities") as response:
        entries = (await response.json())["data"]
    facts = next(entry["facts"] for entry in entries if entry["model"] == model)
    return facts["prefill"]["value"] if "prefill" in facts else None


# ---------------------------------------------------------------------- the same answer, asked for again


@pytest.mark.parametrize(
    "words", [WORDS, [ANSWER], list(ANSWER), ["The sea is", " wide, de", "ep, blue and salty."]], ids=len
)
async def test_a_stream_that_breaks_anywhere_becomes_whole(
    upstream: FakeUpstream, proxy: Proxy, words: list[str]
) -> None:
    """At the end of every event and in its middle, whatever the pieces of the new answer."""
    ends = [0, *accumulate(map(len, FIRST))]
    cuts = [*ends[1:], *((begin + end) // 2 for begin, end in pairwise(ends))]
    said = b"".join(FIRST)
    for cut in cuts:
        upstream.requests.clear()
        upstream.plays(broken(said[:cut]), whole(*words))

        seen = await read(proxy)

        assert (seen.text(), seen.error, seen.is_done) == (ANSWER, None, True), cut
        is_finished, is_begun = cut >= ends[-1], cut >= ends[2]
        assert len(upstream.requests) == (1 if is_finished else 2), cut
        id_and_date = ("chatcmpl-up", 1700000000) if is_begun else ("chatcmpl-again", 1800000000)
        assert {(part["id"], part["created"]) for part in seen.chunks} == {id_and_date}, cut
        row = await proxy.ledger.next()
        assert (row["status"], row["attempts"], row["mode"]) == ("ok", len(upstream.requests), "relay"), cut
        if not is_finished:
            assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 9, False), cut


OTHER_ANSWERS: dict[str, list[Play]] = {
    "other words": [whole("The lake is small.")],
    "other words at the end of what was said": [whole("The sea ", "is wise, too.")],
    "another case": [whole("The Sea is wide, deep, blue and salty.")],
    "fewer words": [whole("The sea")],
    "fewer words, and no finish reason": [stream(*saying("The sea", reason=None))],
    "a tool call": [
        stream(
            again({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}),
            again({}, "tool_calls"),
        )
    ],
    "two choices": [stream(*saying("The sea "), chunk({"content": "The sea"}, index=1))],
    "other words in one body": [answer(completion("The lake is small."))],
    "fewer words in one body": [answer(completion("The sea"))],
    "fewer words in one body, and no finish reason": [answer(completion("The sea", reason=None))],
    "nothing": [stream(*saying())],
    "a refusal to stream, and then other words": [refuse(400, "stream"), answer(completion("The lake is small."))],
}


async def test_another_answer_is_not_joined_to_the_first(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    """Each is that of a model of its own, of which nothing is known yet."""
    groups = [
        f'[[model]]\nname = "group-{number}"\ntargets = ["up/model-{number}", "up2/model-b"]'
        for number in range(len(OTHER_ANSWERS))
    ]
    proxy = await start(upstream.url, second.url, more="\n".join(groups), streaming={"circuit_failures": 1000})
    for number, (name, played) in enumerate(OTHER_ANSWERS.items()):
        upstream.plays(broken(*FIRST[:3]), *played)
        upstream.requests.clear()

        seen = await read(proxy, model=f"group-{number}")

        assert (seen.text(), told_error(seen), seen.is_done) == ("The sea is wide, ", "upstream_broke", False), name
        assert len(seen.chunks) == 3, name
        assert (len(upstream.requests), second.requests) == (1 + len(played), []), name
        row = await proxy.ledger.next()
        assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "upstream_broke"), name
        assert (row["attempts"], row["estimated"], row["completion_tokens"]) == (1 + len(played), True, 6), name
        assert row["mode"] == "relay", name


async def test_a_target_that_answers_with_one_body_saves_a_stream_too(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(broken(*FIRST[:3]), refuse(500))
    second.plays(answer(completion(ANSWER, model="model-b")))

    seen = await read(proxy, wants_usage=True, model="both")

    assert (seen.text(), seen.error) == (ANSWER, None)
    assert {(part["id"], part["created"]) for part in seen.chunks} == {("chatcmpl-up", 1700000000)}
    assert seen.chunks[-1]["usage"] == COMPLETION["usage"]
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["target"], row["attempts"]) == ("synthesis", "ok", "up2/model-b", 3)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 4)


CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city":'}}


@pytest.mark.parametrize("recovery", ["exact", "continue"])
async def test_what_cannot_be_joined_is_not_asked_for_again(
    upstream: FakeUpstream, start: Start, recovery: str
) -> None:
    proxy = await start(streaming={"recovery": recovery})
    answers: dict[str, tuple[list[bytes], dict[str, Any]]] = {
        "a tool call": ([role(), chunk({"tool_calls": [CALL]})], {}),
        "a tool call behind words": ([role(), text("Let me see."), chunk({"tool_calls": [CALL]})], {}),
        "two choices": ([role(), text("One"), role(1), text("Two", 1)], {"n": 2}),
    }
    for name, (said, members) in answers.items():
        upstream.plays(broken(*said))
        upstream.requests.clear()

        seen = await read(proxy, **members)

        assert told_error(seen) == "upstream_broke", name
        assert (len(seen.chunks), len(upstream.requests)) == (len(said), 1), name


@pytest.mark.parametrize("cut", range(2, 6))
async def test_reasoning_and_content_are_each_taken_up_where_they_were(
    upstream: FakeUpstream, proxy: Proxy, cut: int
) -> None:
    thoughts = [chunk({"reasoning_content": part}) for part in ("Think", "ing ")]
    upstream.plays(
        broken(*[role(), *thoughts, text("Forty-"), text("two")][:cut]),
        stream(again({"role": "assistant", "reasoning_content": "Thinking "}), *saying("Forty", "-two")[1:], usage()),
    )

    seen = await read(proxy)

    assert (seen.text(member="reasoning_content"), seen.text()) == ("Thinking ", "Forty-two")


@pytest.mark.parametrize("breaks_at", [1, 2, 3, 5])
async def test_the_next_target_saves_what_broke_twice(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, breaks_at: int
) -> None:
    """The second break is before, at and behind the place of the first."""
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(broken(*FIRST[:3]), broken(*saying(*WORDS)[:breaks_at]))
    second.plays(whole(ANSWER))

    seen = await read(proxy, model="both")

    assert (seen.text(), seen.error) == (ANSWER, None)
    assert {part["id"] for part in seen.chunks} == {"chatcmpl-up"}
    assert (len(upstream.requests), len(second.requests)) == (2, 1)
    row = await proxy.ledger.next()
    assert (row["target"], row["attempts"], row["status"]) == ("up2/model-b", 3, "ok")


@pytest.mark.parametrize(
    ("second_try", "asked"),
    [
        (refuse(500), 2),
        (refuse(401), 2),
        (refuse(400), 2),
        (broken(*saying("The ", reason=None), usage(1000, 500)), 2),
        (stream(*saying("The ", reason=None), event({"error": {"message": "No", "code": "content_filter"}})), 2),
    ],
    ids=["500", "401", "400", "a break", "a policy"],
)
async def test_when_nothing_helps_the_first_break_is_told(
    upstream: FakeUpstream, proxy: Proxy, second_try: Play, asked: int
) -> None:
    upstream.plays(
        stream(*FIRST[:3], event({"error": {"message": "The first", "code": "server_error"}})),
        second_try,
    )

    seen = await read(proxy)

    assert seen.error is not None
    assert (seen.text(), seen.error["message"]) == ("The sea is wide, ", "The first")
    assert len(upstream.requests) == asked
    row = await proxy.ledger.next()
    assert (row["status"], row["error"], row["http_status"]) == ("upstream_error", "server_error", 200)
    assert (row["completion_tokens"], row["estimated"]) == (6, True)  # What was passed on, whoever told what.


async def test_a_policy_that_stops_a_stream_midway_is_not_routed_around(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(stream(*FIRST[:3], event({"error": {"message": "Not this", "code": "content_filter"}})))

    seen = await read(proxy, model="both")

    assert (told_error(seen), len(upstream.requests), second.requests) == ("content_filter", 1, [])


async def test_recovery_can_be_off(upstream: FakeUpstream, second: FakeUpstream, start: Start) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH + '\nrecovery = "off"')
    upstream.plays(broken(*FIRST[:3]))

    seen = await read(proxy, model="both")

    assert (seen.text(), told_error(seen)) == ("The sea is wide, ", "upstream_broke")
    assert (len(upstream.requests), second.requests) == (1, [])


@pytest.mark.parametrize("said", [[], FIRST[:1], FIRST[:2]], ids=["nothing", "a role", "a part"])
async def test_what_is_not_saved_in_time_is_given_up(upstream: FakeUpstream, start: Start, said: list[bytes]) -> None:
    """Long before the limits of any stream."""
    proxy = await start(streaming={"recovery_timeout_s": 0.3})
    silence = Silence(*said)
    upstream.plays(broken(*FIRST[:3]), silence)

    seen = await read(proxy)

    assert (seen.text(), told_error(seen)) == ("The sea is wide, ", "upstream_broke")
    await silence.is_left()
    assert len(upstream.requests) == 2


async def test_a_new_answer_that_keeps_talking_but_does_not_catch_up_is_given_up(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(streaming={"recovery_timeout_s": 0.3})

    async def dawdle(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for letter in ANSWER[:16]:
            await wire.chunk(again({"content": letter}))
            await pause(0.05)
        await rest(*saying(ANSWER[16:]))(request, wire)

    upstream.plays(broken(*FIRST[:3]), dawdle)

    seen = await read(proxy)

    assert (seen.text(), told_error(seen)) == ("The sea is wide, ", "upstream_broke")


async def test_a_new_answer_that_falls_silent_late_is_not_waited_for_beyond_the_time(
    upstream: FakeUpstream, start: Start
) -> None:
    """What it says does not make the time longer."""
    proxy = await start(streaming={"recovery_timeout_s": 1})
    was_left: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def fall_silent(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(again({"content": "The "}))
        await pause(0.8)
        await wire.chunk(again({"content": "sea "}))
        try:
            async with asyncio.timeout(0.6):
                await wire.gone()
            was_left.set_result(True)
        except TimeoutError:
            was_left.set_result(False)

    upstream.plays(broken(*FIRST[:3]), fall_silent)

    seen = await read(proxy)

    assert (seen.text(), told_error(seen)) == ("The sea is wide, ", "upstream_broke")
    assert await was_left


async def test_the_time_for_recovery_is_no_limit_for_what_has_caught_up(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"recovery_timeout_s": 0.5})

    async def slow(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for data in saying(*WORDS):
            await wire.chunk(data)
            if b"deep" in data:
                await pause(0.7)
        await wire.chunk(DONE)
        await wire.end()

    upstream.plays(broken(*FIRST[:3]), slow)

    assert (await read(proxy)).text() == ANSWER


async def test_clients_hear_heartbeats_while_the_new_answer_is_held_back(upstream: FakeUpstream, start: Start) -> None:
    """However much the upstream says meanwhile."""
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    opened = asyncio.Event()

    async def busy(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(saying("The sea ", reason=None)[1])
        while not opened.is_set():
            await wire.chunk(again({"content": ""}))
            await pause(0.02)
        await rest(*saying(*WORDS)[2:])(request, wire)

    upstream.plays(broken(*FIRST[:3]), busy)
    client = await Client.to(proxy.port)
    client.send(chat(stream=True))

    heard = await client.heard(b"is wide, ")
    heard += await client.heard(b": ping\n\n")
    heard += await client.heard(b": ping\n\n")
    assert heard.count(b"data:") == 3
    opened.set()
    await client.heard(b"[DONE]")

    client.close()
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_slow_client_gets_the_whole_of_a_long_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    line = "and so on and so forth " * 1400
    lines = [f"{number} {line}" for number in range(96)]
    upstream.plays(broken(role(), *map(text, lines[:64])), whole(*lines))

    async with slow_client(proxy) as client:
        await client.ask()
        seen = read_strictly(await client.read_body())

    assert (seen.text() == "".join(lines), seen.error) == (True, None)
    assert len(upstream.requests) == 2


async def test_the_official_client_reads_one_whole_completion(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(broken(*FIRST[:4]), whole(*WORDS))

    async with (
        openai.AsyncOpenAI(base_url=proxy.base, api_key="sk-any", max_retries=0) as client,
        client.chat.completions.stream(model="model-a", messages=[{"role": "user", "content": "Hi"}]) as reading,
    ):
        final = await reading.get_final_completion()

    assert (final.id, final.created) == ("chatcmpl-up", 1700000000)
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (ANSWER, "stop")


async def test_a_client_that_wants_one_body_shares_an_answer_that_was_saved(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    gate = Gate(FIRST[:3], rest(is_whole=False))
    upstream.plays(gate, whole(*WORDS))
    streaming = asyncio.create_task(read(proxy))
    await upstream.asked(1)
    client = await Client.to(proxy.port)
    client.send(chat())
    async with proxy.get("/ready") as response:  # It has come behind the other.
        assert (await response.json())["in_flight"] == 1
    gate.opened.set()

    shared = await client.answer()

    client.close()
    assert (await streaming).text() == shared.said() == ANSWER
    assert shared.json()["id"] == "chatcmpl-up"
    assert shared.json()["choices"][0]["finish_reason"] == "stop"
    assert len(upstream.requests) == 2
    rows = [await proxy.ledger.next() for _ in range(2)]
    assert sorted((row["mode"], row["status"], row["attempts"]) for row in rows) == [
        ("coalesced", "ok", 2),
        ("relay", "ok", 2),
    ]


# ---------------------------------------------------------------------- the rest of the answer, asked for


def partial_of(request: Received) -> str | None:
    """What a request gives to be continued."""
    last = request.json()["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


async def continuing(request: Received, wire: Wire) -> None:
    """An upstream that goes on with what it is given, and counts it as a part of the question."""
    given = partial_of(request)
    assert given is not None
    assert ANSWER.startswith(given)
    await stream(*saying(ANSWER[len(given) :]), usage(20, 5))(request, wire)


async def test_what_was_said_is_continued_by_an_upstream_that_can(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"recovery": "continue"})
    await can_count(proxy, upstream)
    upstream.plays(broken(*FIRST[:3]), continuing)

    seen = await read(proxy, wants_usage=True, max_tokens=100, max_completion_tokens=3)

    assert (seen.text(), seen.error) == (ANSWER, None)
    assert {(part["id"], part["created"]) for part in seen.chunks} == {("chatcmpl-up", 1700000000)}
    sent = upstream.requests[1].json()
    given = 5  # "The sea is wide," has five tokens
    assert sent["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The sea is wide,"}]
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (100 - given - 1, 1)
    assert await prefill_known(proxy) is True
    row = await proxy.ledger.next()
    assert (row["prompt_tokens"] + row["completion_tokens"], row["estimated"]) == (25, True)
    assert row["completion_tokens"] == 5 + given + 1
    told = seen.chunks[-1]["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (row["prompt_tokens"], row["completion_tokens"])


async def test_one_body_can_be_the_rest_as_well(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"recovery": "continue"})
    spent = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
    await can_count(proxy, upstream)
    upstream.plays(broken(*FIRST[:3]), answer(completion(" deep, blue and salty.", usage=spent)))

    seen = await read(proxy, wants_usage=True)

    assert (seen.text(), seen.error) == ("The sea is wide, deep, blue and salty.", None)
    told = seen.chunks[-1]["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"], told["estimated"]) == (14, 11, True)
    row = await proxy.ledger.next()
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (14, 11, True)
    assert await prefill_known(proxy) is True


async def test_an_upstream_that_refuses_a_beginning_is_asked_exactly_and_so_next_time(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(streaming={"recovery": "continue"})
    refusal = refuse(400, "messages", "The conversation must end with a user message.")
    for played, given in (
        ([refusal, whole(*WORDS)], [None, "The sea is wide,", None]),
        ([whole(*WORDS)], [None, None]),
    ):
        upstream.requests.clear()
        upstream.plays(broken(*FIRST[:3]), *played)

        seen = await read(proxy)

        assert (seen.text(), seen.error) == (ANSWER, None)
        assert [partial_of(request) for request in upstream.requests] == given
        assert await prefill_known(proxy) is False
        assert (await proxy.ledger.next())["attempts"] == len(given)


async def test_when_a_beginning_is_refused_and_nothing_else_helps_the_first_break_is_told(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(streaming={"recovery": "continue"})
    upstream.plays(broken(*FIRST[:3]), refuse(400, "messages", "No"))

    seen = await read(proxy)

    assert (seen.text(), told_error(seen)) == ("The sea is wide, ", "upstream_broke")
    assert [partial_of(request) for request in upstream.requests] == [None, "The sea is wide,", None]
    assert await prefill_known(proxy) is None


async def test_an_upstream_that_starts_over_does_not_say_it_twice(upstream: FakeUpstream, start: Start) -> None:
    """Mistral repeats the beginning: https://docs.mistral.ai/guides/prefix"""
    proxy = await start(streaming={"recovery": "continue"})
    upstream.plays(broken(role(), text(LONG[:20]), text(LONG[20:60])), whole(*LONG.partition("words")))

    seen = await read(proxy)

    assert (seen.text(), seen.error) == (LONG, None)


@pytest.mark.parametrize(
    ("prefill", "message", "members"),
    [
        ("auto", {"role": "assistant", "content": "The sea is wide,"}, {}),
        ("prefix", {"role": "assistant", "content": "The sea is wide,", "prefix": True}, {}),
        (
            "continue_final_message",
            {"role": "assistant", "content": "The sea is wide,"},
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
        ("never", {"role": "user", "content": "Hi"}, {}),
    ],
)
async def test_each_upstream_is_given_the_beginning_in_its_own_way(
    upstream: FakeUpstream, start: Start, prefill: str, message: dict[str, Any], members: dict[str, Any]
) -> None:
    proxy = await start(more=f'prefill = "{prefill}"', streaming={"recovery": "continue"})
    upstream.plays(broken(*FIRST[:3]), whole(*WORDS) if prefill == "never" else continuing)

    assert (await read(proxy)).text() == ANSWER

    sent = upstream.requests[1].json()
    assert sent["messages"][-1] == message
    assert {name: sent[name] for name in ("continue_final_message", "add_generation_prompt") if name in sent} == members


async def test_a_continuation_that_breaks_is_continued_by_the_next_target(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH + '\nrecovery = "continue"')
    upstream.plays(broken(*FIRST[:3]), broken(*saying("deep, ", reason=None)))
    second.plays(continuing)

    seen = await read(proxy, model="both")

    assert (seen.text(), seen.error) == (ANSWER, None)
    given = [partial_of(request) for request in (*upstream.requests, *second.requests)]
    assert given == [None, "The sea is wide,", "The sea is wide, deep,"]


async def test_thoughts_that_were_not_finished_are_thought_again(upstream: FakeUpstream, start: Start) -> None:
    """No API takes a part of the reasoning: without a word of the answer it is asked for exactly."""
    proxy = await start(streaming={"recovery": "continue"})
    upstream.plays(
        broken(role(), chunk({"reasoning_content": "Think"})),
        stream(again({"role": "assistant", "reasoning_content": "Thinking"}), *saying("Yes")[1:]),
    )

    seen = await read(proxy)

    assert (seen.text(member="reasoning_content"), seen.text()) == ("Thinking", "Yes")
    assert partial_of(upstream.requests[1]) is None


# ---------------------------------------------------------------------- delivered whole


@pytest.mark.parametrize("by", ["header", "model"])
async def test_an_answer_that_is_delivered_whole_begins_when_it_is_all_there(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, by: str
) -> None:
    more = BOTH + ('\ndelivery = "whole"' if by == "model" else "")
    headers = ["x-headwater-delivery: whole"] if by == "header" else []
    proxy = await start(upstream.url, second.url, more=more, streaming={"heartbeat_interval_s": 0.05})
    gate = Gate(FIRST[:4], rest(is_whole=False))
    upstream.plays(gate, broken(*FIRST[:2]))
    second.plays(whole("Another ", "answer."))
    client = await Client.to(proxy.port)
    client.send(chat("Hi", *headers, model="both", stream=True))

    await upstream.asked(1)
    heard = await client.heard(b": ping\n\n")
    heard += await client.heard(b": ping\n\n")
    assert b"data:" not in heard
    gate.opened.set()
    heard += await client.heard(b"[DONE]\n\n")

    client.close()
    contents = [json.loads(line[6:]) for line in heard.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in contents) == "Another answer."
    assert (len(upstream.requests), len(second.requests)) == (2, 1)
    row = await proxy.ledger.next()
    assert (row["status"], row["target"], row["attempts"]) == ("ok", "up2/model-b", 3)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 9)


@pytest.mark.parametrize("last", [broken(*FIRST[:2]), stream(*FIRST[:2], done=False)], ids=["a break", "no finish"])
async def test_an_answer_that_is_delivered_whole_fails_with_a_status(
    upstream: FakeUpstream, proxy: Proxy, last: Play
) -> None:
    upstream.plays(broken(*FIRST[:4]), last)

    async with proxy.chat(stream=True, headers={"x-headwater-delivery": "whole"}) as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"

    assert len(upstream.requests) == 2
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["attempts"]) == ("upstream_error", 502, 2)


async def test_an_answer_that_is_delivered_whole_fails_behind_a_heartbeat_with_an_event(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(streaming={"heartbeat_interval_s": 0.05})
    gate = Gate(FIRST[:4], rest(is_whole=False))
    upstream.plays(gate, broken(*FIRST[:2]))
    client = await Client.to(proxy.port)
    client.send(chat("Hi", "x-headwater-delivery: whole", "Connection: close", stream=True))

    await client.heard(b": ping\n\n")
    gate.opened.set()
    told = await client.rest()

    client.close()
    assert told.count(b"data:") == 1
    assert b'"code":"upstream_broke"' in told
    assert (await proxy.ledger.next())["http_status"] == 200


# ---------------------------------------------------------------------- clients that leave meanwhile


def limited(**headers: str) -> Play:
    return answer({"error": {"message": "Slow down", "code": "rate_limit_exceeded"}}, 429, **headers)


@pytest.mark.parametrize("wants_stream", [False, True])
@pytest.mark.parametrize(
    ("played", "asked"),
    [([limited(retry_after="20")], 1), ([limited(), limited(retry_after="20")], 2), ([refuse(503)], 1)],
    ids=["it waits until it may come back", "it waits again", "it backs off"],
)
async def test_for_a_client_that_has_gone_nobody_is_asked_again(
    upstream: FakeUpstream, proxy: Proxy, played: list[Play], asked: int, wants_stream: bool
) -> None:
    answered = asyncio.Event()

    async def last(request: Received, wire: Wire) -> None:
        await played[-1](request, wire)
        answered.set()

    upstream.plays(*played[:-1], last)
    client = await Client.to(proxy.port)
    client.send(chat(stream=wants_stream))
    await asyncio.wait_for(answered.wait(), 20)

    client.close()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["attempts"]) == ("cancelled", 499, asked)
    async with proxy.get("/ready") as response:
        assert (await response.json())["in_flight"] == 0
    assert len(upstream.requests) == asked


@pytest.mark.parametrize("recovery", ["exact", "continue"])
async def test_a_client_that_leaves_while_its_answer_is_saved_ends_that(
    upstream: FakeUpstream, start: Start, recovery: str
) -> None:
    proxy = await start(streaming={"recovery": recovery})
    silence = Silence(*saying()[:1])
    upstream.plays(broken(*FIRST[:3]), silence)
    client = await Client.to(proxy.port)
    client.send(chat(stream=True))
    await client.heard(b"is wide, ")
    await silence.is_heard()

    client.close()

    await silence.is_left()
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["attempts"]) == ("cancelled", 499, 2)
    assert (row["estimated"], row["completion_tokens"]) == (True, 6)
    assert len(upstream.requests) == 2
