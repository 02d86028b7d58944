"""GET /metrics after real calls: what they took, how long, why some were refused, and how the ledger stands."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Wire,
    answer,
    chunk,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_keys import UP_KEY, bearer
from tests.server.test_admin import metrics
from tests.server.test_auth import ADMIN, KEYS, admin, made_key
from tests.waiting import until

PRICE = """
[[price]]
models = ["up/*"]
input_usd_per_million = "2"
output_usd_per_million = "10"
cached_input_usd_per_million = "0.5"
markup_percent = "50"
"""
DETAILED = chunk(
    choices=[],
    usage={
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
)
HELLO = stream(role(), text("Hello"), finish(), usage())

Samples = dict[tuple[str, ...], float]


@pytest.fixture
async def second() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


async def when(proxy: Proxy, *sample: str, is_now: float) -> Samples:
    """The metrics when one has come to a value. A first price is looked up when the client has its answer already."""
    return await until(lambda: metrics(proxy), lambda said: said.get(sample) == is_now)


def buckets(said: Samples, name: str, *labels: str) -> list[float]:
    """A histogram's buckets, of which the last is checked against its count."""
    found = [value for key, value in said.items() if key[0] == f"{name}_bucket" and key[2:] == labels]
    assert found == sorted(found)
    assert found[-1] == said[(f"{name}_count", *labels)]
    return found


async def test_what_upstreams_took_and_asked_for(upstream: FakeUpstream, second: FakeUpstream, start: Start) -> None:
    proxy = await start(upstream.url, second.url, more=PRICE)
    upstream.plays(stream(role(), text("Hello"), finish(), DETAILED), answer(), refuse(400))
    second.plays(HELLO)
    await proxy.stream(model="up/model-a")
    await proxy.ask(model="up/model-a")
    async with proxy.chat(model="up/model-b") as response:
        assert response.status == 400
    await proxy.stream(model="up2/model-c")

    await when(proxy, "headwater_tokens_total", "prompt", "model-c", "up2", is_now=7)
    said = await when(proxy, "headwater_tokens_total", "prompt", "model-a", "up", is_now=100 + 7)
    assert {
        (name, *labels): value
        for (name, *labels), value in said.items()
        if name.startswith(("headwater_tokens", "headwater_cost", "headwater_price", "headwater_unpriced"))
    } == {
        ("headwater_tokens_total", "prompt", "model-a", "up"): 107,
        ("headwater_tokens_total", "completion", "model-a", "up"): 24,
        ("headwater_tokens_total", "cached", "model-a", "up"): 60,
        ("headwater_tokens_total", "reasoning", "model-a", "up"): 5,
        ("headwater_tokens_total", "prompt", "model-c", "up2"): 7,
        ("headwater_tokens_total", "completion", "model-c", "up2"): 2,
        ("headwater_tokens_total", "cached", "model-c", "up2"): 0,
        ("headwater_tokens_total", "reasoning", "model-c", "up2"): 0,
        # 40 × 2 + 60 × 0.5 + 20 × 10, and 7 × 2 + 4 × 10, in millionths; half as much again is asked of the team.
        ("headwater_cost_usd_total", "model-a", "up"): 0.000364,
        ("headwater_price_usd_total", "model-a", "up"): 0.000546,
        ("headwater_unpriced_calls_total", "model-a", "up"): 0,
        ("headwater_cost_usd_total", "model-c", "up2"): 0,
        ("headwater_price_usd_total", "model-c", "up2"): 0,
        ("headwater_unpriced_calls_total", "model-c", "up2"): 1,
    }


async def test_an_answer_from_the_cache_takes_no_tokens_and_has_a_time(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more=PRICE, cache={"exact": True, "semantic": False})
    upstream.plays(HELLO)
    await proxy.stream()
    await when(proxy, "headwater_cache_answers", is_now=1)
    await proxy.stream()
    said = await when(proxy, "headwater_calls_total", "replay", "ok", is_now=1)
    assert said["headwater_tokens_total", "prompt", "model-a", "up"] == 7
    for mode in ("relay", "replay"):
        assert buckets(said, "headwater_time_to_first_token_seconds", mode)[-1] == 1
        assert buckets(said, "headwater_call_duration_seconds", mode)[-1] == 1
        first_s = said["headwater_time_to_first_token_seconds_sum", mode]
        assert 0 < first_s <= said["headwater_call_duration_seconds_sum", mode]


async def test_the_gaps_between_the_pieces_of_a_stream(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Each piece waits until the client has the one before, so that none are read together."""
    comment = b": still there\n\n"
    # The first begins the answer, the second takes the slow lane, the next two the fast one, and a comment is no piece.
    pieces = [role() + text("a"), text("b"), text("c"), comment, text("d"), finish()]
    may_go_on = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for piece in pieces:
            await wire.chunk(piece)
            if piece is not comment:
                await may_go_on.wait()
                may_go_on.clear()
        await wire.chunk(usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        for last in (b'"a"', b'"b"', b'"c"', b'"d"', b'"stop"'):
            await response.content.readuntil(last)
            may_go_on.set()
        await response.read()
    said = await when(proxy, "headwater_calls_total", "relay", "ok", is_now=1)
    gaps_s = said["headwater_chunk_gap_seconds_sum",]
    whole_s = said["headwater_call_duration_seconds_sum", "relay"]
    rest_s = whole_s - said["headwater_time_to_first_token_seconds_sum", "relay"]
    assert buckets(said, "headwater_chunk_gap_seconds")[-1] == 4
    assert 0 < gaps_s <= rest_s


async def test_why_calls_were_refused(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(auth=KEYS, more=UP_KEY)
    upstream.plays(HELLO)
    assert (await admin(proxy, "POST", "/teams", {"id": "alpha"}))[0] == 201
    key = (await made_key(proxy, team="alpha", requests_per_minute=1, models=["model-a"]))["key"]
    asked: list[tuple[dict[str, str], dict[str, Any], int]] = [
        ({}, {}, 401),
        (bearer("sk-wrong"), {}, 401),
        (bearer(key), {"model": "model-b"}, 403),
        (bearer(key), {"messages": "Hi"}, 400),
        (bearer(key), {}, 200),
        (bearer(key), {}, 429),
        (bearer(key), {}, 429),
    ]
    for headers, members, status in asked:
        async with proxy.chat(headers=headers, **members) as response:
            assert response.status == status, await response.text()
            await response.read()
    said = await metrics(proxy, headers=ADMIN)
    assert {key[1]: count for key, count in said.items() if key[0] == "headwater_refused_total" and count} == {
        "missing_api_key": 1,
        "invalid_api_key": 1,
        "model_not_allowed": 1,
        "other": 1,
        "rate_limit_exceeded": 2,
    }
    assert {key[1]: count for key, count in said.items() if key[0] == "headwater_limit_refusals_total"} == {
        "requests": 2,
        "tokens": 0,
        "parallel_calls": 0,
    }


async def test_a_ledger_that_cannot_be_written(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start()
    upstream.plays(HELLO)
    before = await metrics(proxy)
    assert [before[f"headwater_ledger_{name}",] for name in ("failing", "waiting", "lost_total")] == [0, 0, 0]
    with closing(sqlite3.connect(start.directory / "headwater.db", isolation_level=None)) as other:
        other.execute("ALTER TABLE call RENAME TO hidden")
        async with proxy.post("/chat/completions", b"no JSON") as response:
            assert response.status == 400
        said = await when(proxy, "headwater_ledger_failing", is_now=1)
        assert said["headwater_ledger_waiting",] == 1
        other.execute("ALTER TABLE hidden RENAME TO call")
    await proxy.stream()  # What it waits for on disk takes along what was to be tried again in a second.
    said = await when(proxy, "headwater_ledger_failing", is_now=0)
    assert said["headwater_ledger_lost_total",] == 0


async def test_both_formats_are_read_by_the_librarys_own_parsers(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("Hello"), finish(), DETAILED), answer({**COMPLETION, "usage": None}))
    odd = 'a "model"\\ of\nours'
    await proxy.stream()
    await proxy.ask(model=odd)
    await when(proxy, "headwater_unpriced_calls_total", odd, "up", is_now=1)
    formats = {"text/plain": plain, "application/openmetrics-text; version=1.0.0": openmetrics}
    read = []
    for accept, parse in formats.items():
        async with proxy.get("/metrics", headers={"Accept": accept}) as response:
            families = {family.name: family for family in parse(await response.text())}  # type: ignore[no-untyped-call]
        assert all(family.documentation and family.samples for family in families.values())
        read.append(
            {
                (sample.name, *sample.labels.items()): sample.value
                for name, family in families.items()
                if not name.startswith(("process_", "headwater_ledger_waiting"))  # These move by themselves.
                for sample in family.samples
            }
        )
    assert read[0] == read[1]
    assert len(read[0]) > 100
