"""A question that was answered before is answered again at once, and never wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Proxy, Start, make_settings, running_proxy
from tests.fakes.caching import (
    ASKED,
    BY_MEANING,
    LIKE,
    UNLIKE,
    asking,
    cache,
    embedded,
    entries,
    fate,
    has_indexed,
    has_kept,
)
from tests.fakes.client import chat
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
    echo,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_coalescing import clients, is_noticed

EXACT: dict[str, Any] = {"exact": True, "semantic": False}
WHOLE = stream(role(), text("Hello"), finish(), usage())


@pytest.fixture
async def meaning(start: Start, upstream: FakeUpstream, embedder: FakeUpstream) -> Proxy:
    """A proxy that has answered ASKED, and compares what is asked with it."""
    upstream.plays(echo)
    proxy = await start(upstream.url, embedder.url, cache=BY_MEANING)
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    await proxy.ledger.next()
    upstream.requests.clear()
    embedder.requests.clear()
    return proxy


# ---------------------------------------------------------------------- the very same question

QUESTION: dict[str, Any] = {
    "model": "model-a",
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    "temperature": 0.5,
}
SAME: dict[str, dict[str, Any]] = {
    "the very same": QUESTION,
    "members in another order": dict(reversed(QUESTION.items())),
    "a stream": QUESTION | {"stream": True},
    "a stream with usage": QUESTION | {"stream": True, "stream_options": {"include_usage": True}},
    "another user": QUESTION | {"user": "u-1", "safety_identifier": "u-1"},
    "metadata": QUESTION | {"metadata": {"trace": "7"}, "store": True},
    "a null": QUESTION | {"seed": None, "n": 1},
}
OTHER: dict[str, dict[str, Any]] = {
    "another model": QUESTION | {"model": "model-b"},
    "the same model by another name": QUESTION | {"model": "up/model-a"},
    "another system prompt": QUESTION | {"messages": [{"role": "system", "content": "Be rude."}, *QUESTION["messages"][1:]]},
    "another text": QUESTION | asking("Hi!"),
    "another turn": QUESTION | {"messages": [{"role": "user", "content": "Hey"}, *QUESTION["messages"]]},
    "another role": QUESTION | {"messages": [{"role": "developer", "content": "Be kind."}, *QUESTION["messages"][1:]]},
    "an image": QUESTION
    | asking([{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]),  # type: ignore[arg-type]
    "tools": QUESTION | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    **{
        name: QUESTION | {name: value}
        for name, value in {
            "temperature": 0.6, "top_p": 0.5, "n": 2, "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a"], "seed": 1,
            "logit_bias": {"5": 1}, "logprobs": True, "presence_penalty": 1, "reasoning_effort": "low", "tool_choice": "none",
            "response_format": {"type": "json_object"}, "modalities": ["text"], "verbosity": "low", "surprise": 1,
        }.items()
    },
}  # fmt: skip


async def test_the_same_question_is_asked_once(upstream: FakeUpstream, start: Start) -> None:
    """Whatever can change the answer counts, and nothing else."""
    upstream.plays(WHOLE)
    proxy = await start(cache=EXACT)
    assert await fate(proxy, **QUESTION) == "miss"
    await has_kept(proxy, 1)
    assert [await fate(proxy, **body) for body in SAME.values()] == ["hit; exact"] * len(SAME)
    assert len(upstream.requests) == 1
    found = {name: await fate(proxy, **body) for name, body in OTHER.items()}
    assert set(found.values()) == {"miss"}, found
    assert (await cache(proxy))["since_start"]["hit_rate"] == round(len(SAME) / (1 + len(SAME) + len(OTHER)), 4)


CALLERS: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer sk-a"},
    {"Authorization": "Bearer sk-b"},
    {"api-key": "sk-a"},
    {"x-headwater-namespace": "a"},
    {"Authorization": "Bearer sk-a", "x-headwater-namespace": "a"},
    {"x-headwater-namespace": "A"},
    {"OpenAI-Beta": "assistants=v2"},
]


async def test_nobody_gets_what_another_was_given(start: Start, upstream: FakeUpstream, embedder: FakeUpstream) -> None:
    """Neither the very answer, nor one to a question of the same meaning."""
    upstream.plays(echo)
    proxy = await start(upstream.url, embedder.url, cache=BY_MEANING)
    for count, headers in enumerate(CALLERS, 1):
        assert await fate(proxy, headers, **asking(ASKED)) == "miss", headers
        await has_indexed(proxy, count)
    for count, headers in enumerate(CALLERS, 1):
        assert await fate(proxy, headers, **asking(ASKED)) == "hit; exact", headers
        async with proxy.chat(headers=headers, **asking(LIKE)) as response:
            assert response.headers["x-cache"] == "hit; semantic", headers
            assert response.headers["x-cache-entry"] == str(count)
    assert len(upstream.requests) == len(CALLERS)


async def test_a_hit_asks_nobody_and_the_log_says_so(
    meaning: Proxy, upstream: FakeUpstream, embedder: FakeUpstream
) -> None:
    async with meaning.chat(**asking(ASKED)) as response:
        assert await response.json()
        headers = response.headers
    assert headers["x-cache"] == "hit; exact"
    assert (headers["x-cache-score"], headers["x-cache-age"], headers["x-cache-entry"]) == ("1.0000", "0", "1")
    assert (headers["x-headwater-target"], headers["x-headwater-attempts"]) == ("up/model-a", "0")
    row = await meaning.ledger.next()
    assert (row["mode"], row["status"], row["attempts"], row["target"]) == ("replay", "ok", 0, "up/model-a")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 4, False)
    assert upstream.requests == embedder.requests == []


# ---------------------------------------------------------------------- what is kept

CALLS = [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


async def _breaks_off(request: Received, wire: Wire) -> None:
    await wire.head(content_type="text/event-stream")
    await wire.chunk(role() + text("Hello"))
    await wire.reset()


def ending(reason: str | None) -> Play:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": reason}
    return answer({**COMPLETION, "choices": [choice]})


DEEP = json.dumps(COMPLETION).encode()[:-1] + b', "x":' + b"[" * 300 + b"]" * 300 + b"}"
PLAYS: dict[str, tuple[Play, bool]] = {
    "a stream that stops": (WHOLE, True),
    "a stream of tool calls": (stream(role(), chunk({"tool_calls": CALLS}), finish("tool_calls"), usage()), True),
    "a body": (answer(), True),
    "a body of tool calls": (ending("tool_calls"), True),
    "a stream of two choices": (stream(role(), text("a"), role(1), text("b", 1), finish(), finish("stop", 1), usage()), True),
    "a stream cut short": (stream(role(), text("Hello"), finish("length"), usage()), False),
    "a filtered stream": (stream(role(), text("Hello"), finish("content_filter"), usage()), False),
    "one of two choices cut short": (
        stream(role(), text("a"), role(1), text("b", 1), finish(), finish("length", 1), usage()),
        False,
    ),
    "a stream without a finish reason": (stream(role(), text("Hello"), usage()), False),
    "a stream that breaks off": (_breaks_off, False),
    "an error in mid-stream": (stream(role(), text("Hello"), event({"error": {"message": "Oh"}}), done=False), False),
    "a malformed event": (stream(role(), b"data: {\n\n", text("Hello"), finish(), usage()), False),
    "a body cut short": (ending("length"), False),
    "a filtered body": (ending("content_filter"), False),
    "a body without a finish reason": (ending(None), False),
    "a body without choices": (answer({**COMPLETION, "choices": []}), False),
    "a body too deep to be written": (answer(DEEP), False),
    "an error": (refuse(400), False),
    "an error in a body": (answer({"error": {"message": "Oh"}}), False),
}  # fmt: skip


async def test_whole_answers_are_kept_and_no_others(
    upstream: FakeUpstream, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(cache=EXACT, streaming={"max_retries": 0, "recovery": "off"})
    for seed, (name, (play, is_kept)) in enumerate(PLAYS.items()):
        upstream.plays(play)
        members: dict[str, Any] = {"seed": seed, "stream": "stream" in name, "n": 2 if "choices" in name else 1}
        async with proxy.chat(**members) as response:
            await response.read()
        await is_noticed(proxy)
        async with proxy.chat(headers={"Cache-Control": "only-if-cached"}, **members) as response:
            assert response.status == (200 if is_kept else 504), name
    assert (await cache(proxy))["entries"] == sum(is_kept for _, is_kept in PLAYS.values())
    assert "failed" not in caplog.text


async def test_an_answer_that_its_client_has_left_is_not_kept(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(cache=EXACT)
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence, WHOLE)
    async with clients(proxy, 1) as (client,):
        client.send(chat(stream=True))
        await client.heard(b'"Hello"')
        client.reset()
        await silence.is_left()
    assert (await proxy.ledger.next())["status"] == "cancelled"
    assert await fate(proxy) == "miss"


async def test_the_client_has_its_last_byte_before_anything_is_kept(upstream: FakeUpstream, start: Start) -> None:
    """Also where the tokens are still to be counted, which takes a process half a second to begin with."""
    proxy = await start(cache=EXACT)
    upstream.plays(stream(role(), text("Hello"), finish()))
    assert (await proxy.stream()).endswith(DONE)
    assert (await cache(proxy))["entries"] == 0
    await has_kept(proxy, 1)
    [entry] = await entries(proxy)
    assert entry["completion_tokens"] == 1


# ---------------------------------------------------------------------- how long, how many


async def test_answers_expire(upstream: FakeUpstream, start: Start) -> None:
    """Each model's in its own time."""
    upstream.plays(WHOLE)
    more = '[[model]]\nname = "brief"\ntargets = ["up/model-a"]\ncache_ttl_s = 0.000001\n'
    more += '[[model]]\nname = "long"\ntargets = ["up/model-a"]\ncache_ttl_s = 60\n'
    more += '[[model]]\nname = "for-ever"\ntargets = ["up/model-a"]\ncache_ttl_s = 0\n'
    proxy = await start(cache=EXACT | {"ttl_s": 1000}, more=more)
    for model in ("brief", "long", "for-ever", "model-a"):
        assert await fate(proxy, model=model) == "miss"
        await is_noticed(proxy)
    hits = {model: await fate(proxy, model=model) for model in ("brief", "long", "for-ever", "model-a")}
    assert hits == {"brief": "miss", "long": "hit; exact", "for-ever": "hit; exact", "model-a": "hit; exact"}
    lives = {
        entry["model"]: entry["expires_at"] and round(entry["expires_at"] - entry["created_at"])
        for entry in await entries(proxy)
    }
    assert lives == {"long": 60, "for-ever": None, "model-a": 1000}


async def test_what_was_used_longest_ago_leaves_also_from_the_index(
    start: Start, upstream: FakeUpstream, embedder: FakeUpstream
) -> None:
    upstream.plays(echo)
    proxy = await start(upstream.url, embedder.url, cache=BY_MEANING | {"max_entries": 2})
    texts = [f"{ASKED} {number}" for number in range(4)]
    for number, content in enumerate(texts):
        if number == 2:
            assert await fate(proxy, **asking(texts[0])) == "hit; exact"
        assert await fate(proxy, **asking(content)) == "miss"
        await has_indexed(proxy, min(2, number + 1))
    assert [entry["question"] for entry in await entries(proxy)] == [texts[3], texts[2]]
    assert await fate(proxy, **asking(texts[0].upper())) == "miss"
    assert await fate(proxy, **asking(texts[3].upper())) == "hit; semantic"


async def test_the_bytes_are_bounded(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(cache=EXACT | {"max_mb": 0.01})
    upstream.plays(WHOLE)
    for seed in range(30):
        await proxy.ask(seed=seed)
    await is_noticed(proxy)
    found = await cache(proxy)
    assert 0.005 * 2**20 < found["bytes"] <= 0.01 * 2**20
    assert 5 < found["entries"] < 30
    assert await fate(proxy, seed=29) == "hit; exact"
    assert await fate(proxy, seed=0) == "miss"


# ---------------------------------------------------------------------- after a restart


async def test_all_is_there_after_a_restart(
    start: Start, upstream: FakeUpstream, embedder: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """With another embedder as well, whose vectors are made anew, which is said."""
    upstream.plays(echo)
    settings = make_settings(start.directory, upstream.url, embedder.url, cache=BY_MEANING)
    async with running_proxy(settings) as proxy:
        await proxy.ask(**asking(ASKED))
        await proxy.ask(**asking(UNLIKE))
        await has_indexed(proxy, 2)
    embedder.requests.clear()
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, 2)
        assert embedded(embedder) == []
        assert await fate(proxy, **asking(ASKED)) == "hit; exact"
        assert await fate(proxy, **asking(LIKE)) == "hit; semantic"
    other = BY_MEANING | {"embedder": "upstream:up2/other"}
    settings = make_settings(start.directory, upstream.url, embedder.url, cache=other)
    caplog.clear()
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, 2)
        assert await fate(proxy, **asking(LIKE)) == "hit; semantic"
    assert "2 questions of cached answers have no vector of upstream:up2/other yet" in caplog.text
    assert len(upstream.requests) == 2
