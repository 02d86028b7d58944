"""What tests of the cache have in common: an embedder that is an upstream, and ways to wait for what is kept.

The guard lets the same words in another case pass, so `ASKED` and `LIKE` are alike in meaning whatever it has learned.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from zlib import crc32

from proxy.policy.scale import ANCHORS
from tests.fakes.upstream import FakeUpstream, Received, Wire, answer
from tests.waiting import until

if TYPE_CHECKING:
    from tests.conftest import Proxy

ASKED = "How do I reset my password?"
LIKE = "how do I reset MY password"
UNLIKE = "Which rivers flow through Vienna?"

BY_MEANING: dict[str, Any] = {"embedder": "upstream:up2/small", "verify_rate": 0, "lookup_budget_ms": 20_000}
"""The settings of a cache whose embedder is the second upstream, and that leaves the first alone but for what is asked."""

_MEASURES = {text for anchor in ANCHORS for text in (anchor.a, anchor.b)}


async def embeddings(request: Received, wire: Wire, size: int = 64) -> None:
    """Vectors of so many numbers: which trigrams of letters a text has, whatever their case."""
    letters = "".join(letter for letter in request.json()["input"][0].lower() if letter.isalnum() or letter == " ")
    vector = [0.01] * size
    for start in range(len(letters) - 2):
        vector[crc32(letters[start : start + 3].encode()) % size] += 1
    await vector_of(vector)(request, wire)


def embedded(embedder: FakeUpstream) -> list[str]:
    """The texts that it was asked for, but for those by which an embedder is measured."""
    texts = [request.json()["input"][0] for request in embedder.requests]
    return [text for text in texts if text not in _MEASURES]


def vector_of(embedding: Any) -> Any:
    """A play that gives one vector."""
    return answer({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": embedding}]})


def asking(content: str) -> dict[str, Any]:
    """The members of a body that asks that."""
    return {"messages": [{"role": "user", "content": content}]}


async def cache(proxy: Proxy) -> dict[str, Any]:
    """GET /admin/cache."""
    async with proxy.get("/admin/cache") as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


async def has_kept(proxy: Proxy, entries: int) -> None:
    """Wait until there are that many entries."""
    await until(lambda: cache(proxy), lambda found: found["entries"] == entries)


async def has_indexed(proxy: Proxy, questions: int) -> None:
    """Wait until that many questions can be found by their meaning."""

    def holds(found: dict[str, Any]) -> bool:
        semantic = found["semantic"]
        return bool(semantic["indexed"] == questions and semantic["is_ready"])

    await until(lambda: cache(proxy), holds)


async def entries(proxy: Proxy) -> list[dict[str, Any]]:
    async with proxy.get("/admin/cache/entries") as response:
        assert response.status == 200
        found: list[dict[str, Any]] = (await response.json())["data"]
        return found


async def fate(proxy: Proxy, headers: dict[str, str] | None = None, **members: Any) -> str:
    """What `x-cache` says of an answer with status 200, which is read to its end."""
    async with proxy.chat(headers=headers, **members) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return str(response.headers.get("x-cache", "off"))


def events(body: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream from the cache, which must end as such a stream does."""
    assert body.endswith(b"}\n\n: [CACHE_END]\n\ndata: [DONE]\n\n"), body[-200:]
    assert body.count(b"[DONE]") == body.count(b"[CACHE_END]") == 1
    return [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n")[:-3]]
