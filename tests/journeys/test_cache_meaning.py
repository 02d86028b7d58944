"""Questions that differ in words alone share an answer; where anything else differs, or nobody can tell, none is shared.

And what an answer that was given so is worth, is seen by asking again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, Start, make_settings
from tests.fakes.caching import (
    ASKED,
    BY_MEANING,
    LIKE,
    UNLIKE,
    asking,
    cache,
    embedded,
    embeddings,
    entries,
    fate,
    has_indexed,
    has_kept,
    vector_of,
)
from tests.fakes.upstream import (
    COMPLETION,
    FakeUpstream,
    Play,
    Silence,
    answer,
    echo,
    refuse,
)
from tests.journeys.test_coalescing import is_noticed, nothing_is_left
from tests.journeys.test_shutdown import _stopping as stopping_proxy
from tests.waiting import until

_LONG = 30

Meaning = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def meaning(start: Start, upstream: FakeUpstream, embedder: FakeUpstream) -> Meaning:
    """Starts a proxy that has answered ASKED, as `members` say, and compares what is asked with it."""

    async def begin(members: dict[str, Any] | None = None, **cache: Any) -> Proxy:
        upstream.plays(echo)
        proxy = await start(upstream.url, embedder.url, cache=BY_MEANING | cache, server={"drain_s": 0})
        await proxy.ask(**(members or asking(ASKED)))
        await has_indexed(proxy, 1)
        await proxy.ledger.next()
        upstream.requests.clear()
        return proxy

    return begin


# ---------------------------------------------------------------------- what may be compared


async def test_a_question_in_other_words_is_answered_from_the_cache(start: Start, upstream: FakeUpstream) -> None:
    """By the embedder that is there by itself."""
    upstream.plays(echo)
    proxy = await start(cache={"lookup_budget_ms": 20_000, "verify_rate": 0})
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    for question in ("How can I reset my password?", LIKE):
        async with proxy.chat(headers={"Cache-Control": "no-store"}, **asking(question)) as response:
            assert response.headers["x-cache"] == "hit; semantic"
            assert 0.5 < float(response.headers["x-cache-score"]) <= 1
            assert (await response.json())["choices"][0]["message"]["content"] == f"answer to {ASKED}"
    assert await fate(proxy, **asking(UNLIKE)) == "miss"
    assert len(upstream.requests) == 2
    assert (await cache(proxy))["semantic"]["embedder"] == "all-MiniLM-L6-v2-int8"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
ASKED_LIKE = asking(LIKE)["messages"]
COMPARED: dict[str, tuple[dict[str, Any], bool]] = {
    "in other words": ({}, True),
    "as a stream, for somebody": ({"stream": True, "user": "u", "metadata": {"a": "b"}}, True),
    "of another model": ({"model": "model-b"}, False),
    "with a system prompt": ({"messages": [{"role": "system", "content": "Be kind."}, *ASKED_LIKE]}, False),
    "in a conversation": ({"messages": [*TURN, *ASKED_LIKE]}, False),
    "as somebody by name": ({"messages": [{"role": "user", "name": "ann", "content": LIKE}]}, False),
    "in parts": (asking([{"type": "text", "text": LIKE}]), False),  # type: ignore[arg-type]
    "with an image": (asking([{"type": "text", "text": LIKE}, IMAGE]), False),  # type: ignore[arg-type]
    "with tools": ({"tools": TOOLS}, False),
    "twice": ({"n": 2}, False),
    "of today": (asking(f"{LIKE} today"), False),
    **{
        f"with {name}": ({name: value}, False)
        for name, value in {
            "temperature": 0.5, "top_p": 0.5, "max_tokens": 9, "stop": "a", "seed": 1, "logprobs": True, "surprise": 1,
            "response_format": {"type": "json_object"}, "reasoning_effort": "low", "modalities": ["text"],
        }.items()
    },
}  # fmt: skip


async def test_only_the_last_user_text_may_differ(meaning: Meaning, upstream: FakeUpstream) -> None:
    proxy = await meaning()
    no_store = {"Cache-Control": "no-store"}
    for name, (members, is_same) in COMPARED.items():
        found = await fate(proxy, no_store, **(asking(LIKE) | members))
        assert found == ("hit; semantic" if is_same else "miss"), name


# What was asked before; what is asked now; with which settings; and whether that gets the same answer.
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], bool]] = [
    ("with tools", {"tools": TOOLS, **asking(ASKED)}, {"tools": TOOLS, **asking(LIKE)}, {}, False),
    ("twice", {"n": 2, **asking(ASKED)}, {"n": 2, **asking(LIKE)}, {}, False),
    ("of today", asking(f"{ASKED[:-1]} today?"), asking(f"{LIKE} today"), {}, False),
    ("the latest", asking("What is the latest password?"), asking("what is the LATEST password?"), {}, False),
    ("too long", asking(ASKED), asking(LIKE), {"semantic_max_characters": len(LIKE) - 1}, False),
    ("just short enough", asking(LIKE.lower()), asking(LIKE), {"semantic_max_characters": len(LIKE)}, True),
    ("empty", asking(" "), asking("  "), {}, False),
    ("in a conversation", {"messages": [*TURN, *asking(ASKED)["messages"]]}, {"messages": [*TURN, *ASKED_LIKE]}, {}, False),
    (
        "in a conversation that may be",
        {"messages": [*TURN, *asking(ASKED)["messages"]]},
        {"messages": [*TURN, *ASKED_LIKE]},
        {"semantic_max_turns": 2},
        True,
    ),
    (
        "with the same of all else",
        {"temperature": 0.3, "response_format": {"type": "text"}, **asking(ASKED)},
        {"response_format": {"type": "text"}, "temperature": 0.3, **asking(LIKE)},
        {},
        True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "options", "is_same"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS]
)
async def test_what_may_not_be_compared_is_neither_embedded_nor_found(
    start: Start,
    upstream: FakeUpstream,
    embedder: FakeUpstream,
    before: dict[str, Any],
    now: dict[str, Any],
    options: dict[str, Any],
    is_same: bool,
) -> None:
    upstream.plays(answer())
    proxy = await start(upstream.url, embedder.url, cache=BY_MEANING | options)
    assert await fate(proxy, **before) == "miss"
    await has_kept(proxy, 1)
    if is_same:
        await has_indexed(proxy, 1)
    assert await fate(proxy, **now) == ("hit; semantic" if is_same else "miss")
    await is_noticed(proxy)
    is_too_long = "semantic_max_characters" in options and not is_same
    assert len(embedded(embedder)) == (2 if is_same else 1 if is_too_long and len(ASKED) < len(LIKE) else 0)


# ---------------------------------------------------------------------- the embedder fails

FAILURES: dict[str, Play] = {
    "an error": refuse(500, message="Out of luck"),
    "a refusal": refuse(400, message="Out of luck"),
    "rubbish": answer(b"<html>"),
    "no vector": vector_of([]),
    "a wrong dimension": vector_of([1.0, 2.0]),
    "zeros": vector_of([0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_embedder_that_fails_is_a_miss_and_one_line(
    meaning: Meaning, embedder: FakeUpstream, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And when it works again, so does the cache."""
    proxy = await meaning()
    embedder.plays(FAILURES[failure])
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            assert await fate(proxy, **asking(f"{LIKE} {number}")) == "miss"
    [record] = caplog.records
    assert "questions are not compared by meaning: upstream:up2/small" in record.getMessage()
    found = (await cache(proxy))["since_start"]
    assert (found["misses"], found["of_these_without_a_vector"]) == (6, 5)
    assert await fate(proxy, **asking(ASKED)) == "hit; exact"
    for _ in range(5):
        assert (await proxy.ledger.next())["status"] == "ok"
    if failure != "an error":  # After one of these it is left alone for some seconds.
        embedder.plays(embeddings)
        assert await fate(proxy, **asking(LIKE)) == "hit; semantic"


async def test_an_embedder_that_is_slow_is_a_miss_and_one_line(
    meaning: Meaning, embedder: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await meaning(lookup_budget_ms=1)
    embedder.plays(Silence(head=False))
    with caplog.at_level(logging.WARNING):
        assert [await fate(proxy, **asking(f"{LIKE} {number}")) for number in range(3)] == ["miss"] * 3
    [record] = caplog.records
    assert record.getMessage() == "an answer is not found in the cache within 1 ms"
    assert (await cache(proxy))["since_start"]["of_these_too_late"] == 3


async def test_an_embedder_that_has_too_much_to_do_is_a_miss(meaning: Meaning, embedder: FakeUpstream) -> None:
    """Sixteen are embedded and sixteen wait; who comes later is not kept waiting."""
    proxy = await meaning()
    silence = Silence(head=False)
    embedder.plays(silence)
    waiting = [asyncio.create_task(fate(proxy, **asking(f"{LIKE} {number}"))) for number in range(32)]
    async with asyncio.timeout(_LONG):
        while (await cache(proxy))["since_start"]["of_these_without_a_vector"] == 0:
            assert await fate(proxy, **asking(f"{LIKE} and more")) == "miss"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_model_that_is_not_there_leaves_the_rest(
    start: Start, upstream: FakeUpstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.plays(echo)
    proxy = await start(cache={"embedder": f"onnx:{tmp_path / 'nothing.onnx'}"})
    assert [await fate(proxy, **asking(question)) for question in (ASKED, ASKED, LIKE)] == [
        "miss",
        "hit; exact",
        "miss",
    ]
    [told] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.startswith("questions are not compared by meaning: ")
    assert "nothing.onnx cannot be read" in told
    found = (await cache(proxy))["semantic"]
    assert (found["is_on"], found["embedder"], found["indexed"]) == (False, None, 0)


# ---------------------------------------------------------------------- a near hit is verified


def says(content: str) -> Play:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return answer({**COMPLETION, "choices": [choice]})


@pytest.mark.parametrize("is_right", [True, False])
async def test_a_near_hit_is_asked_again_and_the_verdict_counts(
    meaning: Meaning, upstream: FakeUpstream, is_right: bool
) -> None:
    """In the caller's namespace, whose alone the answer is."""
    proxy = await meaning(verify_rate=1)
    headers = {"x-headwater-namespace": "a"}
    await fate(proxy, headers, **asking(ASKED))
    await has_indexed(proxy, 2)
    await proxy.ledger.next()
    upstream.requests.clear()
    upstream.plays(says(f"answer to {ASKED}" if is_right else "No rivers here"))
    assert await fate(proxy, headers, **asking(LIKE)) == "hit; semantic"
    hit, asked = await proxy.ledger.next(), await proxy.ledger.next()
    assert (hit["mode"], hit["attempts"]) == ("replay", 0)
    assert (asked["mode"], asked["status"], asked["attempts"]) == ("whole", "ok", 1)
    assert (asked["id"], asked["purpose"]) == (f"{hit['id']}-verify", "verify")
    assert "purpose" not in hit
    await has_kept(proxy, 3)

    async def since_start() -> dict[str, Any]:
        told: dict[str, Any] = (await cache(proxy))["since_start"]
        return told

    found = await until(since_start, lambda found: found["verified_right"] + found["verified_wrong"])
    assert (found["verified_right"], found["verified_wrong"]) == (is_right, not is_right)
    assert (found["lookups"], found["semantic_hits"]) == (3, 1), "what the proxy asks for itself is no lookup"
    assert await fate(proxy, headers, **asking(LIKE)) == "hit; exact"
    fresh, given, other = await entries(proxy)
    assert (fresh["question"], fresh["namespace"]) == (LIKE, "a")
    assert (given["verified_right"], given["verified_wrong"]) == (is_right, not is_right)
    assert (other["verified_right"], other["verified_wrong"]) == (0, 0)
    assert len(upstream.requests) == 1
    await nothing_is_left_but(proxy, 1)


async def nothing_is_left_but(proxy: Proxy, lines: int) -> None:
    for _ in range(lines):
        await proxy.ledger.next()
    await nothing_is_left(proxy)


async def test_nothing_is_kept_of_a_verification_where_nothing_may_be(meaning: Meaning, upstream: FakeUpstream) -> None:
    proxy = await meaning(verify_rate=1)
    assert await fate(proxy, {"Cache-Control": "no-store"}, **asking(LIKE)) == "hit; semantic"
    await nothing_is_left_but(proxy, 2)
    async with asyncio.timeout(_LONG):
        while (
            not (await cache(proxy))["since_start"]["verified_right"]
            + (await cache(proxy))["since_start"]["verified_wrong"]
        ):
            pass
    assert (await cache(proxy))["entries"] == 1


async def test_a_verification_that_fails_is_nobodys_failure(
    meaning: Meaning, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await meaning(verify_rate=1)
    upstream.plays(refuse(400))
    assert await fate(proxy, **asking(LIKE)) == "hit; semantic"
    assert (await proxy.ledger.next())["status"] == "ok"
    assert (await proxy.ledger.next())["status"] == "upstream_error"
    found = await cache(proxy)
    assert (found["since_start"]["verified_right"], found["since_start"]["verified_wrong"], found["entries"]) == (
        0,
        0,
        1,
    )
    assert "failed" not in caplog.text


async def test_a_stop_ends_a_verification(
    tmp_path: Path, upstream: FakeUpstream, embedder: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    silence = Silence(head=False)
    upstream.plays(echo, silence)
    options = BY_MEANING | {"verify_rate": 1}
    settings = make_settings(tmp_path, upstream.url, embedder.url, cache=options, server={"drain_s": 0.05})
    async with stopping_proxy(settings) as stopping:
        proxy = stopping.proxy
        await proxy.ask(**asking(ASKED))
        await has_indexed(proxy, 1)
        assert await fate(proxy, **asking(LIKE)) == "hit; semantic", "the client does not wait for it"
        await silence.is_heard()
        stopping.stop()
        await stopping.has_stopped()
        await silence.is_left()
        settled = [await proxy.ledger.next() for _ in range(3)]
    assert [(row["mode"], row["status"]) for row in settled] == [
        ("whole", "ok"),
        ("replay", "ok"),
        ("none", "interrupted"),
    ]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
