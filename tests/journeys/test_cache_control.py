"""Who may say what is looked up and kept: the client with each request, the operator for each model and for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Start
from tests.fakes.caching import (
    ASKED,
    BY_MEANING,
    LIKE,
    asking,
    cache,
    embeddings,
    entries,
    fate,
    has_indexed,
    has_kept,
)
from tests.fakes.upstream import FakeUpstream, answer, echo, finish, role, stream, text, usage
from tests.journeys.test_coalescing import is_noticed
from tests.test_command import ask, command

EXACT: dict[str, Any] = {"exact": True, "semantic": False}
WHOLE = stream(role(), text("Hello"), finish(), usage())


# ---------------------------------------------------------------------- the client

# What Cache-Control says; what becomes of a question that was answered before; and whether a new one's answer is kept.
CONTROLS: list[tuple[str, str, bool]] = [
    ("no-cache", "bypass", True),
    ("no-store", "hit; exact", False),
    ("no-cache, no-store", "bypass", False),
    ("NO-STORE , no-cache=x", "bypass", False),
    ("max-age=1000", "hit; exact", True),
    ("max-age=0", "miss", True),
    ("max-age=soon", "miss", True),
    ("only-if-cached", "hit; exact", False),
    ("only-if-cached, max-age=0", "504", False),
    ("only-if-cached, no-cache", "504", False),
    ("only-if-cached, no-store", "hit; exact", False),
    ("public, immutable, ;;=,", "hit; exact", True),
]


async def test_cache_control(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(WHOLE)
    proxy = await start(cache=EXACT)
    for seed, (control, fate_of_known, keeps) in enumerate(CONTROLS, 1):
        await fate(proxy, seed=0)
        await is_noticed(proxy)
        async with proxy.chat(headers={"Cache-Control": control}, seed=0) as response:
            found = response.headers.get("x-cache", str(response.status))
            assert found == fate_of_known, control
            if response.status == 504:
                assert (await response.json())["error"]["code"] == "not_cached"
        async with proxy.chat(headers={"Cache-Control": control}, seed=seed) as response:
            assert response.status == (504 if "only-if-cached" in control else 200)
        await is_noticed(proxy)
        assert await fate(proxy, seed=seed) == ("hit; exact" if keeps else "miss"), control


async def test_a_refused_lookup_asks_nobody_and_is_the_clients_own_wish(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(cache=EXACT)
    for members in ({}, {"stream": True}):
        async with proxy.chat(headers={"Cache-Control": "only-if-cached"}, **members) as response:
            assert (response.status, response.content_type) == (504, "application/json")
            assert response.headers["x-headwater-error-source"] == "client"
        row = await proxy.ledger.next()
        assert (row["status"], row["http_status"], row["error"]) == ("client_error", 504, "not_cached")
        assert (row["mode"], row["attempts"]) == ("none", 0)
    assert upstream.requests == []


async def test_a_newer_answer_takes_the_place_of_the_older_one(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(stream(role(), text("Old"), finish(), usage()), stream(role(), text("New"), finish(), usage()))
    proxy = await start(cache=EXACT)
    assert await fate(proxy) == "miss"
    await has_kept(proxy, 1)
    assert await fate(proxy, {"Cache-Control": "no-cache"}) == "bypass"
    await is_noticed(proxy)
    assert (await proxy.ask())["choices"][0]["message"]["content"] == "New"
    assert [entry["id"] for entry in await entries(proxy)] == [2]
    found = (await cache(proxy))["since_start"]
    assert (found["lookups"], found["hit_rate"]) == (2, 0.5), "who wants no lookup is not counted as a miss"


async def test_the_client_narrows_what_is_looked_up(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(echo)
    async with FakeUpstream() as embedder:
        embedder.plays(embeddings)
        proxy = await start(upstream.url, embedder.url, cache=BY_MEANING)
        await proxy.ask(**asking(ASKED))
        await has_indexed(proxy, 1)
        found = {}
        for tier in ("off", "exact", "semantic"):
            # Only looked up: what is kept would be found by the next.
            headers = {"x-headwater-cache": tier, "Cache-Control": "no-store"}
            found[tier] = await fate(proxy, headers, **asking(ASKED)), await fate(proxy, headers, **asking(LIKE))
        assert found == {
            "off": ("bypass", "bypass"),
            "exact": ("hit; exact", "miss"),
            "semantic": ("hit; exact", "hit; semantic"),
        }


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-headwater-cache", "sometimes"), ("x-headwater-cache", ""), ("x-headwater-namespace", "n" * 129)],
)
async def test_a_wrong_wish_is_told(upstream: FakeUpstream, start: Start, header: str, value: str) -> None:
    proxy = await start(cache=EXACT)
    async with proxy.chat(headers={header: value}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == header
    assert upstream.requests == []


# ---------------------------------------------------------------------- the operator

MODELS = "".join(
    f'[[model]]\nname = "{name}"\ntargets = ["up/model-a"]\ncache = "{name}"\n' for name in ("off", "exact", "semantic")
)


@pytest.mark.parametrize("is_on", [True, False], ids=["on for others", "off for others"])
async def test_each_model_has_a_tier_of_its_own(start: Start, upstream: FakeUpstream, is_on: bool) -> None:
    """A client may ask for less, and never for more."""
    upstream.plays(echo)
    async with FakeUpstream() as embedder:
        embedder.plays(embeddings)
        options = BY_MEANING | {"exact": is_on, "semantic": is_on}
        proxy = await start(upstream.url, embedder.url, cache=options, more=MODELS)
        for model in ("off", "exact", "semantic"):
            await proxy.ask(model=model, **asking(ASKED))
        await has_indexed(proxy, 1)
        no_store = {"Cache-Control": "no-store", "x-headwater-cache": "semantic"}
        found = {
            model: (
                await fate(proxy, no_store, model=model, **asking(ASKED)),
                await fate(proxy, no_store, model=model, **asking(LIKE)),
            )
            for model in ("off", "exact", "semantic", "model-a")
        }
        assert found == {
            "off": ("off", "off"),
            "exact": ("hit; exact", "miss"),
            "semantic": ("hit; exact", "hit; semantic"),
            "model-a": ("miss", "miss") if is_on else ("off", "off"),
        }


async def test_chance_may_be_kept_out(upstream: FakeUpstream, start: Start) -> None:
    """Who names no temperature gets 1."""
    upstream.plays(WHOLE)
    proxy = await start(cache=EXACT | {"max_temperature": 0.5})
    for members, expected in (
        ({"temperature": 0.5}, "hit; exact"),
        ({"temperature": 0.6}, "bypass"),
        ({}, "bypass"),
        ({"temperature": None}, "bypass"),
    ):
        await fate(proxy, **members)
        await is_noticed(proxy)
        assert await fate(proxy, **members) == expected, members
        async with proxy.chat(headers={"Cache-Control": "only-if-cached"}, **members) as response:
            assert response.status == (200 if expected.startswith("hit") else 504)


async def test_the_command_line_turns_it_off(tmp_path: Path, upstream: FakeUpstream) -> None:
    """It is on by itself."""
    upstream.plays(answer())
    for arguments, times in (([], 1), (["--no-cache"], 3)):
        async with command(
            tmp_path, "serve", "--upstream", upstream.url, "--port", "0", *arguments, HEADWATER_CACHE__SEMANTIC="false"
        ) as running:
            base = await running.base()
            await ask(base)
            await ask(base)
        assert len(upstream.requests) == times
