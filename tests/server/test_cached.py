"""The operator's face of the cache: what it holds and saves, why a question finds what it finds, and how to forget."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Proxy, Start, examples, make_settings, running_proxy
from tests.fakes.caching import (
    ASKED,
    BY_MEANING,
    LIKE,
    UNLIKE,
    asking,
    cache,
    embeddings,
    entries,
    fate,
    has_indexed,
    has_kept,
    vector_of,
)
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Wire,
    answer,
    echo,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.server.test_admin import metrics
from tests.upstream.conftest import Authority
from tests.waiting import until

_LONG = 30

MODELS = """
[[model]]
name = "off"
targets = ["up/model-a"]
cache = "off"
[[model]]
name = "exact"
targets = ["up/model-a"]
cache = "exact"
"""


@pytest.fixture
async def proxy(start: Start, upstream: FakeUpstream, embedder: FakeUpstream) -> Proxy:
    """One that echoes, and compares by meaning."""
    upstream.plays(echo)
    return await start(upstream.url, embedder.url, cache=BY_MEANING, more=MODELS)


async def said(response: Any, status: int = 200) -> Any:
    """The JSON of a response, which must have that status."""
    async with response as answered:
        assert answered.status == status, await answered.text()
        return await answered.json()


async def refused(response: Any, status: int, code: str) -> str | None:
    """The parameter that an error names."""
    error = (await said(response, status))["error"]
    assert error["code"] == code
    param: str | None = error["param"]
    return param


# ---------------------------------------------------------------------- the figures


async def test_an_empty_cache_has_figures(proxy: Proxy) -> None:
    found = await until(lambda: cache(proxy), lambda found: found["semantic"]["is_ready"])
    assert found == {
        "entries": 0,
        "bytes": 0,
        "in_memory": {"entries": 0, "bytes": 0},
        "oldest_at": None,
        "newest_at": None,
        "problem": None,
        "semantic": {
            "is_on": True,
            "embedder": "upstream:up2/small",
            "is_ready": True,
            "indexed": 0,
            "bytes": 0,
            "threshold": found["semantic"]["threshold"],
        },
        "since_start": {
            "lookups": 0,
            "exact_hits": 0,
            "semantic_hits": 0,
            "misses": 0,
            "of_these_too_late": 0,
            "of_these_without_a_vector": 0,
            "hit_rate": None,
            "verified_right": 0,
            "verified_wrong": 0,
            "saved": {"prompt_tokens": 0, "completion_tokens": 0, "microusd": 0, "is_priced_in_full": True},
        },
    }


async def test_the_figures_count_what_is_kept_found_and_saved(
    tmp_path: Path, start: Start, upstream: FakeUpstream, embedder: FakeUpstream
) -> None:
    """Each answer takes 7 tokens and 4; a million of gpt-4o-mini's cost 0.15 and 0.60 dollars at its provider."""
    upstream.plays(echo)
    authority, path = Authority(tmp_path), tmp_path / "openai.sock"
    async with FakeUpstream(unix_socket=path, tls=authority.server("api.openai.com")) as openai:
        openai.plays(echo)
        files = f'unix_socket = "{path}"\nca_file = "{authority.file}"'
        proxy = await start(upstream.url, embedder.url, "https://api.openai.com/v1", more=files, cache=BY_MEANING)
        priced: dict[str, Any] = {"model": "up3/gpt-4o-mini"}
        assert await fate(proxy, **priced, **asking(ASKED)) == "miss"
        await has_indexed(proxy, 1)
        assert await fate(proxy, **priced, **asking(ASKED)) == "hit; exact"
        assert await fate(proxy, **priced, **asking(LIKE)) == "hit; semantic"
        found = await cache(proxy)
        assert (found["entries"], found["in_memory"]["entries"], found["semantic"]["indexed"]) == (1, 1, 1)
        assert min(found["bytes"], found["in_memory"]["bytes"], found["semantic"]["bytes"]) > 0
        assert found["oldest_at"] == found["newest_at"] > 1e9
        since = found["since_start"]
        assert (since["lookups"], since["exact_hits"], since["semantic_hits"], since["misses"]) == (3, 1, 1, 1)
        assert since["hit_rate"] == 0.6667
        assert since["saved"] == {
            "prompt_tokens": 14,
            "completion_tokens": 8,
            "microusd": round(14 * 0.15 + 8 * 0.60),
            "is_priced_in_full": True,
        }
        # Now one whose price nobody knows, and one without a vector.
        await proxy.ask(**asking("Hello"))
        await has_indexed(proxy, 2)
        assert await fate(proxy, **asking("Hello")) == "hit; exact"
        embedder.plays(vector_of([]))
        assert await fate(proxy, **asking("hello there")) == "miss"
        since = (await cache(proxy))["since_start"]
        assert (since["lookups"], since["misses"], since["of_these_without_a_vector"]) == (6, 3, 1)
        assert since["saved"]["prompt_tokens"] == 21
        assert (since["saved"]["microusd"], since["saved"]["is_priced_in_full"]) == (7, False)


async def test_what_an_earlier_server_kept_has_its_price_too(tmp_path: Path) -> None:
    authority, path = Authority(tmp_path), tmp_path / "openai.sock"
    more = f'unix_socket = "{path}"\nca_file = "{authority.file}"'
    settings = make_settings(tmp_path, "https://api.openai.com/v1", more=more, cache={"exact": True, "semantic": False})
    async with FakeUpstream(unix_socket=path, tls=authority.server("api.openai.com")) as openai:
        openai.plays(echo)
        for expected in ("miss", "hit; exact"):
            async with running_proxy(settings) as proxy:
                assert await fate(proxy, model="gpt-4o-mini", **asking(ASKED)) == expected
                await has_kept(proxy, 1)
                saved = (await cache(proxy))["since_start"]["saved"]
    assert (saved["microusd"], saved["is_priced_in_full"]) == (round(7 * 0.15 + 4 * 0.60), True)


async def test_prometheus_gets_the_figures_too(proxy: Proxy) -> None:
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    for question in (ASKED, ASKED, LIKE, UNLIKE):
        await fate(proxy, {"Cache-Control": "no-store"}, **asking(question))
    assert (await metrics(proxy)).items() >= {
        ("headwater_cache_lookups_total", "exact"): 2,
        ("headwater_cache_lookups_total", "semantic"): 1,
        ("headwater_cache_lookups_total", "miss"): 2,
        ("headwater_cache_verifications_total", "right"): 0,
        ("headwater_cache_verifications_total", "wrong"): 0,
        ("headwater_cache_answers",): 1,
        ("headwater_cache_bytes",): (await cache(proxy))["bytes"],
        ("headwater_cache_indexed_questions",): 1,
    }.items()


# ---------------------------------------------------------------------- single entries


@pytest.fixture
async def stocked(proxy: Proxy) -> Proxy:
    """One with eight entries, 1 to 8: by turns of model-a and model-b, and every third in a namespace."""
    for number in range(1, 9):
        headers = {"x-headwater-namespace": "blue"} if number % 3 == 0 else {}
        await fate(proxy, headers, model="ab"[number % 2 - 1], **asking(f"{ASKED} {number}"))
        await has_indexed(proxy, number)
    return proxy


# What is asked for, and the ids that are listed, or which parameter is wrong.
LISTS: list[tuple[str, list[int] | str]] = [
    ("", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("limit=3", [8, 7, 6]),
    ("limit=3&before=6", [5, 4, 3]),
    ("limit=3&before=3", [2, 1]),
    ("before=1", []),
    ("limit=999999999", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("model=a", [7, 5, 3, 1]),
    ("model=a&limit=2&before=7", [5, 3]),
    ("namespace=blue", [6, 3]),
    ("namespace=blue&model=a", [3]),
    ("namespace=", [8, 7, 5, 4, 2, 1]),
    ("model=c", []),
    ("namespace=BLUE", []),
    ("limit=0", "limit"),
    ("limit=-1", "limit"),
    ("limit=1.5", "limit"),
    ("limit=", "limit"),
    ("before=0", "before"),
    ("before=x", "before"),
    ("before=9999999999999999", "before"),
]


async def test_entries_are_listed_by_the_page(stocked: Proxy) -> None:
    for query, expected in LISTS:
        if isinstance(expected, str):
            assert await refused(stocked.get(f"/admin/cache/entries?{query}"), 400, "invalid_value") == expected, query
        else:
            listed = await said(stocked.get(f"/admin/cache/entries?{query}"))
            assert listed["object"] == "list"
            assert [entry["id"] for entry in listed["data"]] == expected, query


async def test_an_entry_is_shown_with_its_answer(stocked: Proxy) -> None:
    assert await fate(stocked, model="a", **asking(f"{ASKED} 1")) == "hit; exact"
    entry = await said(stocked.get("/admin/cache/entries/1"))
    assert entry.pop("answer")["choices"][0]["message"]["content"] == f"answer to {ASKED} 1"
    assert entry.pop("bytes") > 500
    assert entry.pop("used_at") >= entry["created_at"]
    assert entry.pop("expires_at") == entry.pop("created_at") + 86_400
    assert 0 <= entry.pop("age_s") < _LONG
    assert len(entry.pop("scope")) == 32
    assert entry == {
        "id": 1,
        "model": "a",
        "target": "up/a",
        "namespace": "",
        "question": f"{ASKED} 1",
        "is_found_by_meaning": True,
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "hits": 1,
        "verified_right": 0,
        "verified_wrong": 0,
    }


async def test_one_that_is_found_word_for_word_only_has_no_question(proxy: Proxy) -> None:
    await proxy.ask(**asking(ASKED), n=2)
    await has_kept(proxy, 1)
    [entry] = await entries(proxy)
    assert (entry["question"], entry["is_found_by_meaning"]) == (None, False)


@pytest.mark.parametrize("id_", ["x", "-1", "1.5", "%D9%A1", "9999999999999999", "1%20", "0", "999", "1"])
async def test_an_id_that_is_none_or_nobodys(proxy: Proxy, id_: str) -> None:
    for method in (proxy.get, proxy.delete):
        asked = method(f"/admin/cache/entries/{id_}")
        if id_ in ("0", "999", "1"):
            assert await refused(asked, 404, "not_found") is None
        else:
            assert await refused(asked, 400, "invalid_value") == "id"


DELETIONS: dict[str, set[int]] = {
    "model=a": {1, 3, 5, 7},
    "namespace=blue": {3, 6},
    "namespace=": {1, 2, 4, 5, 7, 8},
    "model=b&namespace=blue": {6},
    "all=true": {1, 2, 3, 4, 5, 6, 7, 8},
    "all=true&model=a": {1, 3, 5, 7},
    "model=c": set(),
}


@pytest.mark.parametrize("query", DELETIONS)
async def test_many_are_deleted_at_once(stocked: Proxy, query: str) -> None:
    deleted = DELETIONS[query]
    assert await said(stocked.delete(f"/admin/cache?{query}")) == {"deleted": len(deleted)}
    assert {entry["id"] for entry in await entries(stocked)} == {*range(1, 9)} - deleted
    await has_indexed(stocked, 8 - len(deleted))


async def test_nothing_is_deleted_by_a_mistake(stocked: Proxy) -> None:
    for query, code, param in (
        ("", "missing_required_parameter", "model"),
        ("all=false", "missing_required_parameter", "model"),
        ("all=TRUE", "missing_required_parameter", "model"),
        ("scope=x", "invalid_value", "scope"),
        ("all=true&Model=a", "invalid_value", "Model"),
        ("model=a&namespaces=blue", "invalid_value", "namespaces"),
    ):
        assert await refused(stocked.delete(f"/admin/cache?{query}"), 400, code) == param
    assert (await cache(stocked))["entries"] == (await cache(stocked))["semantic"]["indexed"] == 8


# ---------------------------------------------------------------------- why a question finds what it finds


async def explained(proxy: Proxy, headers: dict[str, str] | None = None, **members: Any) -> dict[str, Any]:
    body = {"model": "model-a", **asking(ASKED), **members}
    found: dict[str, Any] = await said(
        proxy.client.post(proxy.base.removesuffix("/v1") + "/admin/cache/explain", json=body, headers=headers or {})
    )
    return found


# What is stored, what is asked, and what the guard has against it; None where it is served.
EXPLAINED: list[tuple[str, str, str | None]] = [
    (ASKED, "How can I reset my password?", None),
    ("Give me 3 names for a cat", "Give me 4 names for a cat", "numbers differ: 4 / 3"),
    ("Which cheese melts in the sun?", "Which cheese doesn't melt in the sun?", "negation differs"),
    ("How do I enable the firewall?", "How do I disable the firewall?", "opposites: disable / enable"),
    ("How hot is it in Paris?", "How hot is it in Rome?", "names differ: Rome / Paris"),
    (
        "When does the train from Bonn to Kiel leave?",
        "When does the train from Kiel to Bonn leave?",
        "reversed direction",
    ),
]


async def test_a_question_is_explained_by_what_is_near_to_it(start: Start, upstream: FakeUpstream) -> None:
    """By the embedder that is there by itself; and what is explained is what is done."""
    upstream.plays(echo)
    proxy = await start(cache={"verify_rate": 0, "lookup_budget_ms": 20_000})
    for number, (stored, _, _) in enumerate(EXPLAINED, 1):
        await proxy.ask(**asking(stored))
        await has_indexed(proxy, number)
    before = (await cache(proxy))["since_start"]
    least = (await cache(proxy))["semantic"]["threshold"]
    for number, (stored, asked, objection) in enumerate(EXPLAINED, 1):
        found = await explained(proxy, **asking(asked))
        [near] = [one for one in found["nearest"] if one["id"] == number]
        assert near["question"] == stored
        assert near["threshold"] == found["threshold"] == least
        assert near["similarity"] > 0.5
        assert found["question"] == asked
        assert found["exact_entry"] is None
        if objection is None:
            assert (found["verdict"], near["objections"], near["would_be_served"]) == ("semantic", [], True)
            assert near["score"] >= near["threshold"]
            assert "same meaning" in found["why"]
        else:
            assert (found["verdict"], near["would_be_served"]) == ("miss", False), asked
            assert objection in near["objections"]
            assert "speaks against" in found["why"]
    assert (await cache(proxy))["since_start"] == before, "to explain is not to look up"
    for _, asked, objection in EXPLAINED:
        expected = "hit; semantic" if objection is None else "miss"
        assert await fate(proxy, {"Cache-Control": "no-store"}, **asking(asked)) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
# Headers and members, the verdict, whether its question is compared, and what is said of it.
CASES: dict[str, tuple[dict[str, str], dict[str, Any], str, bool, str]] = {
    "the very question": ({}, {}, "exact", True, "This very request was answered before."),
    "as a stream": ({}, {"stream": True}, "exact", True, "This very request was answered before."),
    "word for word, by header": ({"x-headwater-cache": "exact"}, {}, "exact", False, "This very request"),
    "the same meaning": ({}, asking(LIKE), "semantic", True, "A question of the same meaning was answered before."),
    "nothing is near": ({}, asking(UNLIKE), "miss", True, "No question that was answered with all else equal"),
    "too old": ({"Cache-Control": "max-age=0"}, asking(LIKE), "miss", True, "their answers too old"),
    "another namespace": ({"x-headwater-namespace": "blue"}, {}, "miss", True, "No question that was answered"),
    "another caller": ({"Authorization": "Bearer x"}, {}, "miss", True, "No question that was answered"),
    "another temperature": ({}, {"temperature": 0.2}, "miss", True, "No question that was answered"),
    "only if cached": ({"Cache-Control": "only-if-cached"}, asking(UNLIKE), "miss", True, "No question"),
    "of today": ({}, asking(f"{ASKED[:-1]} today?"), "miss", False, "or about a time that passes"),
    "with tools": ({}, {"tools": TOOLS}, "miss", False, "not a plain request for one text"),
    "too long": ({}, asking(ASKED * 50), "miss", False, "too long"),
    "a model word for word": ({}, {"model": "exact"}, "miss", False, "word for word only"),
    "a model that is not cached": ({}, {"model": "off"}, "off", False, "Nothing is looked up"),
    "not wished": ({"Cache-Control": "no-cache"}, {}, "off", False, "Nothing is looked up"),
    "not wished at all": ({"x-headwater-cache": "off"}, {}, "off", False, "Nothing is looked up"),
}  # fmt: skip


async def test_a_request_is_explained_with_its_headers(proxy: Proxy, upstream: FakeUpstream) -> None:
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    for name, (headers, members, verdict, is_compared, words) in CASES.items():
        found = await explained(proxy, headers, **members)
        assert (found["verdict"], found.get("question") is not None) == (verdict, is_compared), name
        assert words in found["why"], name
        assert found.get("exact_entry") == (1 if verdict == "exact" else None), name
    assert len(upstream.requests) == 1, "nobody is asked"


async def test_what_cannot_be_explained(proxy: Proxy, embedder: FakeUpstream) -> None:
    wrong: list[tuple[Any, dict[str, str], str | None]] = [
        (b"", {}, None),
        (b"{", {}, None),
        ([], {}, None),
        ({"messages": []}, {}, "model"),
        ({"model": "m"}, {}, "messages"),
        ({"model": "m", **asking(ASKED), "stream": "yes"}, {}, "stream"),
        ({"model": "m", **asking(ASKED)}, {"x-headwater-cache": "often"}, "x-headwater-cache"),
        (
            {"model": "nobodys/m", **asking(ASKED)},
            {"Cache-Control": "only-if-cached", "x-headwater-cache": "off"},
            None,
        ),
    ]
    url = proxy.base.removesuffix("/v1") + "/admin/cache/explain"
    for body, headers, param in wrong[:-1]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with proxy.client.post(url, data=data, headers=headers) as response:
            assert response.status == 400, body
            assert (await response.json())["error"]["param"] == param, body
    body, headers, _ = wrong[-1]
    assert await refused(proxy.client.post(url, json=body, headers=headers), 504, "not_cached") is None
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    embedder.plays(refuse(400))
    await refused(proxy.client.post(url, json={"model": "model-a", **asking(LIKE)}), 503, "no_vector")


async def test_without_an_embedder_that_is_said(start: Start) -> None:
    proxy = await start(cache={"semantic": False})
    found = await explained(proxy)
    assert (found["verdict"], found["nearest"]) == ("miss", [])
    assert "see cache.semantic" in found["why"]


# ---------------------------------------------------------------------- what is deleted is never given again

DELETING: dict[str, str] = {
    "by id": "/entries/1",
    "by model": "?model=model-a",
    "by namespace": "?namespace=",
    "all": "?all=true",
}


@pytest.mark.parametrize("memory_mb", [64, 0], ids=["in memory", "on the disk"])
@pytest.mark.parametrize("way", DELETING)
async def test_what_is_deleted_is_never_given_again(
    tmp_path: Path, upstream: FakeUpstream, embedder: FakeUpstream, way: str, memory_mb: int
) -> None:
    """Neither word for word nor by its meaning, neither now nor after a restart; others are."""
    upstream.plays(echo)
    options = BY_MEANING | {"memory_mb": memory_mb}
    settings = make_settings(tmp_path, upstream.url, embedder.url, cache=options)
    only_cached = {"Cache-Control": "only-if-cached"}

    async def found(proxy: Proxy, question: str, **headers: str) -> str:
        async with proxy.chat(headers=only_cached | headers, **asking(question)) as response:
            return str(response.headers.get("x-cache", response.status))

    async with running_proxy(settings) as proxy:
        await proxy.ask(**asking(ASKED))
        await has_indexed(proxy, 1)
        await fate(proxy, {"x-headwater-namespace": "blue"}, model="model-b", **asking(ASKED))
        await has_indexed(proxy, 2)
        assert [await found(proxy, question) for question in (ASKED, LIKE)] == ["hit; exact", "hit; semantic"]
        await said(proxy.delete(f"/admin/cache{DELETING[way]}"))
        with closing(sqlite3.connect(settings.store.cache_path)) as disk:
            on_disk = disk.execute("SELECT model FROM answer JOIN answer_body USING (id)").fetchall()
        assert on_disk == ([] if way == "all" else [("model-b",)])
        assert [await found(proxy, question) for question in (ASKED, LIKE)] == ["504", "504"]
        await has_indexed(proxy, 0 if way == "all" else 1)
    async with running_proxy(settings) as proxy:
        await has_indexed(proxy, 0 if way == "all" else 1)
        assert [await found(proxy, question) for question in (ASKED, LIKE)] == ["504", "504"]
        left = await fate(proxy, {"x-headwater-namespace": "blue"}, model="model-b", **asking(LIKE))
        assert left == ("miss" if way == "all" else "hit; semantic")


@pytest.mark.parametrize("way", DELETING)
async def test_what_is_deleted_while_it_is_given_is_given_to_no_other(
    start: Start, upstream: FakeUpstream, way: str
) -> None:
    """Who has begun to read it reads it to its end; who asks then gets a new one."""
    upstream.plays(stream(role(), *(text(f"old {number} ") for number in range(4)), finish(), usage()))
    proxy = await start(cache={"semantic": False, "pace": 20})
    await proxy.stream()
    await has_kept(proxy, 1)
    upstream.plays(stream(role(), text("new"), finish(), usage()))
    async with proxy.chat(stream=True) as replayed:
        assert replayed.headers["x-cache"] == "hit; exact"
        assert b'"content":"old' in await replayed.content.readuntil(b"old")
        await said(proxy.delete(f"/admin/cache{DELETING[way]}"))
        for is_stream in (True, False):
            async with proxy.chat(stream=is_stream) as response:
                assert b"old" not in await response.read()
        assert (await replayed.read()).endswith(b": [CACHE_END]\n\n" + DONE)
    await has_kept(proxy, 1)


@pytest.mark.parametrize("is_same", [True, False], ids=["word for word", "by meaning"])
@pytest.mark.parametrize("way", DELETING)
async def test_what_is_deleted_while_the_same_is_asked_again_is_not_what_is_given(
    proxy: Proxy, upstream: FakeUpstream, way: str, is_same: bool
) -> None:
    """An answer that is on its way belongs to those who ask for it: it is new, and it is kept."""
    await proxy.ask(**asking(ASKED))
    await has_indexed(proxy, 1)
    may_end = asyncio.Event()

    async def held(request: Received, wire: Wire) -> None:
        await may_end.wait()
        await stream(role(), text("new"), finish(), usage())(request, wire)

    upstream.plays(held)
    question = ASKED if is_same else LIKE
    again = asyncio.create_task(fate(proxy, {"Cache-Control": "no-cache"}, **asking(question), stream=True))
    await upstream.asked(2)
    await said(proxy.delete(f"/admin/cache{DELETING[way]}"))
    assert (await cache(proxy))["entries"] == 0
    may_end.set()
    assert await again == "bypass"
    await has_indexed(proxy, 1)
    async with proxy.chat(headers={"Cache-Control": "only-if-cached"}, **asking(question)) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "new"
    assert [entry["id"] for entry in await entries(proxy)] == [2]


# ---------------------------------------------------------------------- nobody gets what is another's

CALLERS: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer a"},
    {"Authorization": "Bearer b"},
    {"api-key": "a"},
    {"x-headwater-namespace": "blue"},
    {"Authorization": "Bearer a", "x-headwater-namespace": "blue"},
]
_CALLER = st.integers(0, len(CALLERS) - 1)
# Two questions, each in two forms that mean the same.
_QUESTION = st.sampled_from([f"{form} {number}" for form, number in product((ASKED, LIKE), (1, 2))])
_STEPS = st.lists(
    st.tuples(st.just("ask"), _CALLER, _QUESTION)
    | st.tuples(st.just("ask"), _CALLER, _QUESTION)
    | st.tuples(st.just("ask anew"), _CALLER, _QUESTION)
    | st.tuples(st.just("delete one"), st.integers(1, 8), st.just(""))
    | st.tuples(st.just("delete namespace"), st.just(0), st.sampled_from(["", "blue"])),
    min_size=8,
    max_size=25,
)


@examples(10)
@given(steps=_STEPS, memory_mb=st.sampled_from([0, 64]))
async def test_each_caller_has_a_cache_of_its_own(steps: list[tuple[str, int, str]], memory_mb: int) -> None:
    """Whatever is asked and deleted in whatever order, the proxy is a dictionary for each caller."""
    # Whose it is and what was asked → the entry's id and its answer, of which there are no two alike.
    kept: dict[tuple[int, str], tuple[int, str]] = {}
    asked = 0

    async def unlike(request: Received, wire: Wire) -> None:
        message = {"role": "assistant", "content": f"answer {asked}"}
        await answer({**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})(
            request, wire
        )

    with TemporaryDirectory() as directory:
        async with FakeUpstream() as upstream, FakeUpstream() as embedder:
            upstream.plays(unlike)
            embedder.plays(embeddings)
            options = BY_MEANING | {"memory_mb": memory_mb}
            settings = make_settings(Path(directory), upstream.url, embedder.url, cache=options)
            async with running_proxy(settings) as proxy:
                for step, number, text in steps:
                    if step.startswith("ask"):
                        alike = {
                            given: "semantic"
                            for (who, what), given in kept.items()
                            if who == number and what[-1] == text[-1]
                        }
                        if (number, text) in kept:
                            alike = {kept[number, text]: "exact"}
                        wish = {} if step == "ask" else {"Cache-Control": "no-cache"}
                        async with proxy.chat(headers=CALLERS[number] | wish, **asking(text)) as response:
                            said = (await response.json())["choices"][0]["message"]["content"]
                            found = response.headers["x-cache"]
                            entry = int(response.headers.get("x-cache-entry", 0))
                        if step == "ask" and alike:
                            assert found == f"hit; {alike[entry, said]}"
                        else:
                            assert found == ("miss" if step == "ask" else "bypass")
                            asked += 1
                            assert said == f"answer {asked - 1}"
                            kept[number, text] = asked, said
                    elif step == "delete one":
                        known = [key for key, given in kept.items() if given[0] == number]
                        async with proxy.delete(f"/admin/cache/entries/{number}") as response:
                            assert response.status == (200 if known else 404)
                        kept = {key: given for key, given in kept.items() if key not in known}
                    else:
                        known = [key for key in kept if CALLERS[key[0]].get("x-headwater-namespace", "") == text]
                        async with proxy.delete(f"/admin/cache?namespace={text}") as response:
                            assert await response.json() == {"deleted": len(known)}
                        kept = {key: given for key, given in kept.items() if key not in known}
                    await has_indexed(proxy, len(kept))
                    assert {entry["id"] for entry in await entries(proxy)} == {given[0] for given in kept.values()}
