"""Model groups: whole calls by names that administrators make, change and take away while the proxy runs."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.caching import has_kept
from tests.fakes.upstream import FakeUpstream, answer, finish, refuse, role, stream, text, usage
from tests.journeys.test_sloppy_streams import read_strictly
from tests.server.test_auth import KEYS, admin, made_key
from tests.waiting import until

HELLO = stream(role(), text("Hello"), finish(), usage())
BOTH = ["up/model-a", "up2/model-b"]
GROUPS = "/model-groups"


@pytest.fixture
async def second() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


async def make(proxy: Proxy, name: str, *models: Any, **fields: Any) -> None:
    status, said = await admin(proxy, "POST", GROUPS, {"name": name, "models": models, **fields})
    assert status == 201, said


async def fate(proxy: Proxy, model: str, key: str = "") -> str:
    """What becomes of a call: the target that answers it, or the cache, or the error's code."""
    async with proxy.chat(model=model, headers={"Authorization": f"Bearer {key}"} if key else {}) as response:
        said = await response.json()
        if response.status != 200:
            return f"{response.status} {said['error']['code']}"
        is_cached = response.headers.get("x-cache", "").startswith("hit")
        return "cache" if is_cached else str(response.headers["x-headwater-target"])


async def test_the_fallback_is_asked_when_the_primary_fails_and_the_row_says_so(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, tmp_path: Path
) -> None:
    """A group whose fallbacks are only resolved is of no use."""
    proxy = await start(upstream.url, second.url, auth=KEYS)
    await make(proxy, "chat-fast", *BOTH)
    key = (await made_key(proxy))["key"]
    upstream.plays(refuse(500))
    second.plays(HELLO)

    async with proxy.chat(model="chat-fast", stream=True, headers={"Authorization": f"Bearer {key}"}) as response:
        assert response.headers["x-headwater-target"] == "up2/model-b"
        assert read_strictly(await response.read()).text() == "Hello"

    assert [request.json()["model"] for request in upstream.requests] == ["model-a"] * 2
    assert [request.json()["model"] for request in second.requests] == ["model-b"]
    await start.stack.aclose()
    with sqlite3.connect(tmp_path / "headwater.db") as database:
        rows = database.execute("SELECT status, model, target, attempts FROM call").fetchall()
    database.close()
    assert rows == [("ok", "chat-fast", "up2/model-b", 3)]


async def test_a_group_is_asked_as_a_model_of_the_config_is(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    """Its circuits, its targets' contexts, and routes that are passed on."""
    proxy = await start(upstream.url, second.url, streaming={"circuit_failures": 1})
    await make(proxy, "fast", *BOTH)
    sizes = {"up/small": 20, "up2/tiny": 10, "up/large": 30}
    await make(proxy, "sized", *({"model": model, "context_tokens": tokens} for model, tokens in sizes.items()))
    upstream.plays(refuse(500))
    second.plays(answer())
    assert await fate(proxy, "fast") == "up2/model-b"
    asked = len(upstream.requests)
    assert await fate(proxy, "fast") == "up2/model-b", "the circuit of the first is open"
    assert len(upstream.requests) == asked
    upstream.plays(refuse(400, "messages", "Too long", "context_length_exceeded"), answer())
    assert await fate(proxy, "sized") == "up/large", "what is too long for one is not sent to a smaller one"
    async with proxy.post("/embeddings", {"model": "sized", "input": "x"}) as response:
        assert response.headers["x-headwater-target"] == "up/small"


async def test_what_a_group_leads_to_changes_at_once_and_its_old_answers_are_not_given_again(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, cache={"exact": True, "semantic": False})
    upstream.plays(answer())
    second.plays(answer())
    await make(proxy, "fast", "up/model-a")
    # A name that nobody made is what the first upstream takes for it; a group may take that over.
    assert await fate(proxy, "model-b") == "up/model-b"
    await make(proxy, "model-b", "up2/model-b")
    assert await fate(proxy, "model-b") == "up2/model-b"

    assert await fate(proxy, "fast") == "up/model-a"
    await has_kept(proxy, 3)
    assert await fate(proxy, "fast") == "cache"
    await admin(proxy, "PATCH", f"{GROUPS}/fast", {"models": ["up2/model-b"]})
    assert await fate(proxy, "fast") == "up2/model-b"
    await admin(proxy, "PATCH", f"{GROUPS}/fast", {"models": ["up/model-a"]})
    assert await fate(proxy, "fast") == "cache"

    asked = len(upstream.requests)
    await admin(proxy, "POST", f"{GROUPS}/fast/deactivate")
    assert await fate(proxy, "fast") == "404 model_not_found"
    assert len(upstream.requests) == asked, "its name is nobody's, though the upstream takes any"
    await admin(proxy, "POST", f"{GROUPS}/fast/activate")
    assert await fate(proxy, "fast") == "cache"


async def test_a_group_for_some_teams_is_refused_to_others_like_any_model_they_may_not_ask_for(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(auth=KEYS)
    upstream.plays(answer())
    for team in ("alpha", "beta"):
        await admin(proxy, "POST", "/teams", {"id": team})
    alpha, beta = [(await made_key(proxy, team=team))["key"] for team in ("alpha", "beta")]
    narrow = (await made_key(proxy, team="alpha", models=["model-*"]))["key"]
    await make(proxy, "fast", "up/model-a", team_ids=["alpha"])

    refused = "403 model_not_allowed"
    assert [await fate(proxy, "fast", key) for key in (alpha, beta, narrow)] == ["up/model-a", refused, refused]
    async with proxy.post("/embeddings", {"model": "fast"}, headers={"Authorization": f"Bearer {beta}"}) as response:
        assert response.status == 403
    # Readers differ in which of two names they take, so the one that was looked at is the only one that goes on.
    body = b'{"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "model": "model-b"}'
    async with proxy.post("/chat/completions", body, headers={"Authorization": f"Bearer {beta}"}) as response:
        assert response.status == 200
    assert b"fast" not in upstream.requests[-1].body

    await admin(proxy, "PATCH", f"{GROUPS}/fast", {"team_ids": ["alpha", "beta"]})
    assert await fate(proxy, "fast", beta) == "up/model-a"
    await admin(proxy, "PATCH", f"{GROUPS}/fast", {"team_ids": None})
    assert [await fate(proxy, "fast", key) for key in (beta, narrow)] == ["up/model-a", refused]


async def test_another_process_takes_over_what_is_made_and_changed_here(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(answer())
    here, there = [await start(more='[[model]]\nname = "x"\ntargets = ["up/x"]') for _ in range(2)]

    async def there_is(expected: str) -> None:
        await until(lambda: fate(there, "fast"), lambda found: found == expected)

    await there_is("up/fast")
    await make(here, "fast", "up/model-a")
    await there_is("up/model-a")
    await admin(here, "PATCH", f"{GROUPS}/fast", {"models": ["up/model-b"]})
    await there_is("up/model-b")
    await admin(here, "POST", f"{GROUPS}/fast/deactivate")
    await there_is("404 model_not_found")
    await admin(there, "POST", f"{GROUPS}/fast/activate")
    assert await fate(there, "fast") == "up/model-b", "its own changes hold at once"


async def test_the_config_goes_first_and_what_it_took_away_is_left_out_with_a_warning(
    upstream: FakeUpstream, second: FakeUpstream, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first = await start(upstream.url, second.url, auth=KEYS)
    await admin(first, "POST", "/teams", {"id": "alpha"})
    await make(first, "fast", *BOTH)
    await make(first, "fallen", "up2/model-b")
    await make(first, "ours", "up/model-b", team_ids=["alpha"])
    await start.stack.aclose()
    upstream.plays(answer())

    proxy = await start(auth=KEYS, more='[[model]]\nname = "ours"\ntargets = ["up/model-a"]')
    key = (await made_key(proxy))["key"]
    for _ in range(2):
        assert await fate(proxy, "fast", key) == "up/model-a"
        assert await fate(proxy, "ours", key) == "up/model-a", "it is for all"
        assert await fate(proxy, "fallen", key) == "404 model_not_found"
        await admin(proxy, "PATCH", f"{GROUPS}/ours", {"cache": "off"})

    words = {
        "fallen": "'up2/model-b': no upstream has that name",
        "fast": "'up2/model-b': no upstream has that name",
        "ours": "a [[model]] of the config has the same name, and goes first",
    }
    said = [record.getMessage() for record in caplog.records if "model group" in record.getMessage()]
    assert said == [f"the model group '{name}': {problem}" for name, problem in words.items()]
    _, listed = await admin(proxy, "GET", GROUPS)
    assert {row["name"]: row["problems"] for row in listed["data"]} == {name: [words[name]] for name in words}
