"""An answer from the cache is as good as the one it was: to every client, in every form, and whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from proxy.wire.chunks import assemble
from tests.conftest import Proxy, Start
from tests.fakes.caching import cache, entries, events, fate, has_kept
from tests.fakes.client import Client, chat
from tests.fakes.upstream import (
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    chunk,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_coalescing import clients, is_noticed, modes, nothing_is_left, rows
from tests.journeys.test_resuming import begin, get
from tests.journeys.test_slow_clients import is_same, slow_client

EXACT: dict[str, Any] = {"exact": True, "semantic": False}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_LONG = 30

# ---------------------------------------------------------------------- every origin, every asker

CALLS: list[dict[str, Any]] = [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}, "x_call": 1},
    {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]
LOGPROBS = {"content": [{"token": "It", "logprob": -0.1, "bytes": [73, 116], "top_logprobs": []}], "refusal": None}
COUNTED = {
    "prompt_tokens": 9,
    "completion_tokens": 8,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 5},
    "x_cost": 0.25,
}
RICH: dict[str, Any] = {
    "id": "chatcmpl-up",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "model-a",
    "system_fingerprint": "fp_1",
    "x_chunk": {"region": "eu"},
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "It is sunny in Rome.",
                "reasoning_content": "They ask of two cities.",
                "refusal": "Not that one.",
                "annotations": [{"type": "url_citation", "url_citation": {"url": "https://a.example"}}],
                "x_message": "é",
                "tool_calls": CALLS,
            },
            "logprobs": LOGPROBS,
            "finish_reason": "tool_calls",
            "x_choice": [1, 2],
        }
    ],
    "usage": COUNTED,
}
_MESSAGE = RICH["choices"][0]["message"]
RICH_EVENTS = [
    chunk({"role": "assistant", "content": ""}, system_fingerprint="fp_1", x_chunk={"region": "eu"}),
    chunk({"reasoning_content": "They ask "}),
    chunk({"reasoning_content": "of two cities."}),
    event(
        {
            **json.loads(text("It is ")[6:]),
            "choices": [{"index": 0, "delta": {"content": "It is "}, "logprobs": LOGPROBS, "finish_reason": None}],
        }
    ),
    text("sunny in Rome."),
    chunk({"refusal": "Not that one."}),
    chunk({"annotations": _MESSAGE["annotations"], "x_message": "é"}),
    chunk({"tool_calls": [{**CALLS[0], "index": 0, "function": {"name": "weather", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":"Rome"}'}}]}),
    chunk({"tool_calls": [{**CALLS[1], "index": 1}]}),
    event(
        {
            **json.loads(finish()[6:]),
            "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls", "x_choice": [1, 2]}],
        }
    ),
    chunk(choices=[], usage=COUNTED),
]


def breaks_behind(count: int, *said: bytes) -> Play:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for data in said[:count]:
            await wire.chunk(data)
        await wire.reset()

    return play


ORIGINS: dict[str, tuple[dict[str, Any], dict[str, str], list[Play]]] = {
    "a relayed stream": ({"stream": True}, {}, [stream(*RICH_EVENTS)]),
    "a stream with usage": (USAGE, {}, [stream(*RICH_EVENTS)]),
    "a stream folded for one who wants a body": ({}, {}, [stream(*RICH_EVENTS)]),
    "one body": ({}, {}, [answer(RICH)]),
    "a body told as a stream": ({"stream": True}, {}, [answer(RICH)]),
    "a stream told when it was whole": ({"stream": True}, {"x-headwater-delivery": "whole"}, [stream(*RICH_EVENTS)]),
    "a stream that was saved": (
        {"stream": True},
        {},
        [breaks_behind(5, *RICH_EVENTS), stream(*RICH_EVENTS), refuse(500)],
    ),
}
ASKERS: dict[str, dict[str, Any]] = {"a stream": {"stream": True}, "a stream with usage": USAGE, "a body": {}}


def but_id_and_time(completion: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in completion.items() if name not in ("id", "created")}


@pytest.mark.parametrize("origin", ORIGINS)
async def test_every_member_of_every_origin_comes_back_to_every_asker(
    upstream: FakeUpstream, start: Start, origin: str
) -> None:
    members, headers, plays = ORIGINS[origin]
    upstream.plays(*plays)
    proxy = await start(cache=EXACT)
    async with proxy.chat(headers=headers, **members) as response:
        assert (response.status, response.headers["x-cache"]) == (200, "miss")
        await response.read()
    await has_kept(proxy, 1)
    times = len(upstream.requests)
    ids = {"chatcmpl-up"}
    for asker, asked in ASKERS.items():
        async with proxy.chat(**asked) as response:
            assert response.headers["x-cache"] == "hit; exact", asker
            body = await response.read()
            told_id = response.headers["x-headwater-stream"]
        if not asked:
            said = json.loads(body)
        else:
            chunks = events(body)
            assert {(part["id"], part["object"], part["model"]) for part in chunks} == {
                (told_id, "chat.completion.chunk", "model-a")
            }
            assert [part["choices"] == [] for part in chunks] == [False] * (len(chunks) - 1) + [asked is USAGE]
            words = [
                part["choices"][0]["delta"]["content"]
                for part in chunks
                if part["choices"] and part["choices"][0]["delta"].get("content")
            ]
            assert words == ["It", " is", " sunny", " in", " Rome."], "in pieces like tokens"
            said = assemble([body.replace(b": [CACHE_END]\n\n", b"")])
        wanted = but_id_and_time(RICH if asked in (USAGE, {}) else {k: v for k, v in RICH.items() if k != "usage"})
        assert but_id_and_time(said) == wanted, asker
        assert said["created"] > 1700000000
        assert said["id"] == told_id
        ids.add(said["id"])
    assert len(ids) == 4, "each is a completion of its own"
    assert len(upstream.requests) == times


async def test_two_choices_come_back(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(role(), role(1), text("b", 1), text("a"), finish("stop", 1), finish(), usage()))
    proxy = await start(cache=EXACT)
    await proxy.stream(n=2)
    await has_kept(proxy, 1)
    for said in (await proxy.ask(n=2), assemble([(await proxy.stream(n=2)).replace(b": [CACHE_END]\n\n", b"")])):
        assert [choice["message"]["content"] for choice in said["choices"]] == ["a", "b"]


# ---------------------------------------------------------------------- how fast it is said

LONG = " ".join(f"word{number}" for number in range(400))


@pytest.mark.parametrize("pace", ["none", 1_000_000, "recorded"])
async def test_a_fast_answer_is_told_in_pieces_that_a_client_can_show_one_by_one(
    upstream: FakeUpstream, start: Start, pace: Any
) -> None:
    upstream.plays(stream(role(), text(LONG), finish(), usage()))
    proxy = await start(cache=EXACT | {"pace": pace})
    await proxy.ask()
    await has_kept(proxy, 1)
    chunks = events(await proxy.stream())
    assert len(chunks) == 402
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in chunks) == LONG


async def hears_first_words(client: Client) -> None:
    await client.heard(b'" word1"')


@pytest.fixture
async def slow(upstream: FakeUpstream, start: Start) -> Proxy:
    """A proxy that says what it has in its cache, a long answer, at some ten words a second: forty seconds."""
    upstream.plays(stream(role(), text(LONG), finish(), usage()))
    proxy = await start(cache=EXACT | {"pace": 10}, streaming={"resume_window_s": 60}, server={"drain_s": 0})
    await proxy.ask()
    await proxy.ledger.next()
    await has_kept(proxy, 1)
    upstream.requests.clear()
    return proxy


async def test_a_slow_answer_begins_long_before_its_end(slow: Proxy, upstream: FakeUpstream) -> None:
    """And who wants one body does not wait for what others read at leisure."""
    async with clients(slow, 2) as (client, whole):
        client.send(chat(stream=True))
        await hears_first_words(client)
        whole.send(chat())
        assert (await whole.answer()).said() == LONG
        assert (await slow.ledger.next())["mode"] == "replay"
        async with slow.get("/ready") as response:
            assert (await response.json())["in_flight"] == 1
    assert upstream.requests == []


async def test_who_leaves_in_mid_replay_ends_it(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(role(), text(LONG), finish(), usage()))
    proxy = await start(cache=EXACT | {"pace": 10})
    await proxy.ask()
    await proxy.ledger.next()
    await has_kept(proxy, 1)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await hears_first_words(client)
        client.reset()
        row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["attempts"], row["target"]) == ("replay", "cancelled", 0, "up/model-a")
    await nothing_is_left(proxy)
    [entry] = await entries(proxy)
    assert entry["hits"] == 1
    assert len(upstream.requests) == 1


async def test_a_replay_is_read_on_where_it_was_cut(slow: Proxy, upstream: FakeUpstream) -> None:
    async with clients(slow, 2) as (client, again):
        client.send(chat(stream=True))
        name, said = await begin(client, 3)
        client.reset()
        await is_noticed(slow)
        after = said.count(b"\n\n")
        again.send(get(name, after))
        rest = await again.heard(b"data: {")
        assert b"\r\n\r\n" in rest
        assert b"id: %d\n" % (after + 1) in rest
    assert upstream.requests == []


async def test_a_replay_that_has_ended_is_read_on_to_its_very_end(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(role(), text("It is so"), finish(), usage()))
    proxy = await start(cache=EXACT, streaming={"resume_window_s": 60})
    await proxy.ask()
    await has_kept(proxy, 1)
    async with clients(proxy, 2) as (client, again):
        client.send(chat(stream=True))
        whole = await client.answer()
        assert len(events(whole.body)) == 5
        again.send(get(whole.headers["x-headwater-stream"], 4))
        rest = await again.answer()
        assert rest.body.startswith(b'id: 5\ndata: {"id":"chatcmpl-')
        assert rest.body.endswith(b"}\n\n: [CACHE_END]\n\nid: 6\ndata: [DONE]\n\n")
        again.send(get(whole.headers["x-headwater-stream"], 6))
        assert (await again.answer(has_body=False)).status == 204


async def test_a_client_that_reads_slowly_gets_all_of_it(upstream: FakeUpstream, start: Start) -> None:
    words = " ".join(f"word{number:07}" for number in range(100_000))
    upstream.plays(stream(role(), text(words), finish(), usage()))
    proxy = await start(cache=EXACT)
    await proxy.ask()
    await proxy.ledger.next()
    await has_kept(proxy, 1)
    async with slow_client(proxy) as client:
        await client.ask()
        body = await client.read_body(2**16)
    said = "".join(part["choices"][0]["delta"].get("content") or "" for part in events(body))
    assert is_same(said, words)
    assert (await proxy.ledger.next())["mode"] == "replay"


# ---------------------------------------------------------------------- many at once


async def test_those_who_ask_at_once_ask_the_upstream_once_and_the_cache_once(
    upstream: FakeUpstream, start: Start
) -> None:
    may_end = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("word0 word1"))
        await may_end.wait()
        await wire.chunk(text(LONG) + finish() + usage() + b"data: [DONE]\n\n")
        await wire.end()

    upstream.plays(play)
    proxy = await start(cache=EXACT | {"pace": 10})
    for mode, lookups in (("relay", 1), ("replay", 2)):
        async with clients(proxy, 5) as asking_:
            for client in asking_:
                client.send(chat(stream=True))
                await client.heard(b" word1")
            assert (await cache(proxy))["since_start"]["lookups"] == lookups
            if mode == "relay":
                may_end.set()
                for client in asking_:
                    await client.heard(b"[DONE]\n\n")
        assert modes(await rows(proxy, 5)) == {mode: 1, "coalesced": 4}
    assert len(upstream.requests) == 1
    await nothing_is_left(proxy)


@pytest.mark.parametrize("way", ["by its id", "by its model", "by a newer answer"])
async def test_what_is_deleted_while_it_is_said_is_shared_with_nobody_more(
    slow: Proxy, upstream: FakeUpstream, way: str
) -> None:
    async with clients(slow, 2) as (client, late):
        client.send(chat(stream=True))
        await hears_first_words(client)
        match way:
            case "by its id":
                async with slow.delete("/admin/cache/entries/1") as response:
                    assert await response.json() == {"deleted": True, "id": 1}
            case "by its model":
                async with slow.delete("/admin/cache?model=model-a") as response:
                    assert await response.json() == {"deleted": 1}
            case _:
                assert await fate(slow, {"Cache-Control": "no-cache"}) == "bypass"
                await is_noticed(slow)
        times = len(upstream.requests)
        late.send(chat(stream=True))
        head = await late.heard(b"\r\n\r\n")
        assert (b"x-cache: hit" in head) == (way == "by a newer answer")
        assert b"x-cache-entry: 1\r" not in head
        assert len(upstream.requests) == times + (way != "by a newer answer")
        # Who has heard a part of it hears the rest.
        await client.heard(b'" word2"')


# ---------------------------------------------------------------------- clients


async def test_http_1_0_reads_to_the_end_of_the_connection(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(role(), text("Hello there"), finish(), usage()))
    proxy = await start(cache=EXACT)
    await proxy.ask()
    await has_kept(proxy, 1)
    async with clients(proxy, 2) as (one, other):
        one.send(chat(stream=True, version="1.0"))
        answered = await one.answer()
        assert "transfer-encoding" not in answered.headers
        assert len(events(answered.body)) == 4
        other.send(chat(version="1.0"))
        assert (await other.answer()).said() == "Hello there"


async def test_the_official_client_reads_hits_like_answers(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(answer(RICH))
    proxy = await start(cache=EXACT)
    messages: Any = [{"role": "user", "content": "Hi"}]
    async with asyncio.timeout(_LONG), openai.AsyncOpenAI(base_url=proxy.base, api_key="sk", max_retries=0) as client:
        await client.chat.completions.create(model="model-a", messages=messages)
        await has_kept(proxy, 1)
        whole = await client.chat.completions.create(model="model-a", messages=messages)
        chunks = [
            part
            async for part in await client.chat.completions.create(
                model="model-a", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        ]
        async with client.chat.completions.stream(model="model-a", messages=messages) as helped:
            await helped.until_done()
            final = await helped.get_final_completion()
        raw = await client.chat.completions.with_raw_response.create(model="model-a", messages=messages)

    def use() -> tuple[Any, str]:
        with openai.OpenAI(base_url=proxy.base, api_key="sk", max_retries=0) as client:
            one = client.chat.completions.create(model="model-a", messages=messages)
            parts = client.chat.completions.create(model="model-a", messages=messages, stream=True)
            return one, "".join(part.choices[0].delta.content or "" for part in parts)

    one, streamed = await asyncio.to_thread(use)
    assert raw.headers["x-cache"] == "hit; exact"
    for completion in (whole, final, one):
        message = completion.choices[0].message
        assert (message.content, message.refusal) == ("It is sunny in Rome.", "Not that one.")
        assert message.tool_calls is not None
        for call, known in zip(message.tool_calls, CALLS, strict=True):
            assert known["function"].items() <= call.to_dict()["function"].items()
        assert completion.choices[0].finish_reason == "tool_calls"
    assert streamed == "It is sunny in Rome."
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    assert len(upstream.requests) == 1
