"""The list of models: what all upstreams have, and the operator's own names for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import FakeUpstream, Play, Received, Wire, answer, models, refuse


class ListingUpstream(FakeUpstream):
    """An upstream whose list of models is a play too, `listing`. Every connection is for one request."""

    listing: Play = staticmethod(models("model-a", "model-b"))

    async def __aenter__(self) -> ListingUpstream:
        await super().__aenter__()
        self.listed: list[bytes] = []
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"GET /v1/models "):
            # The rest is the fake upstream's business; it reads the head again.
            again = asyncio.StreamReader()
            again.feed_data(head + await _body_of(head, reader))
            again.feed_eof()
            await super()._serve(again, writer)
            return
        self.listed.append(head)
        try:
            await self.listing(Received("GET", "/v1/models", {}, b""), Wire(reader, writer))
        finally:
            writer.close()


async def _body_of(head: bytes, reader: asyncio.StreamReader) -> bytes:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return await reader.readexactly(int(value))
    return b""


def listing(*entries: Any) -> Play:
    return answer({"object": "list", "data": list(entries)}, connection="close")


async def listed(proxy: Proxy) -> list[dict[str, Any]]:
    async with proxy.get("/v1/models") as response:
        assert response.status == 200
        value = await response.json()
    assert value["object"] == "list"
    for model in value["data"]:
        assert model.keys() >= {"id", "object", "created", "owned_by"}
        assert model["object"] == "model"
    names = [model["id"] for model in value["data"]]
    assert len(set(names)) == len(names)
    data: list[dict[str, Any]] = value["data"]
    return data


async def names(proxy: Proxy) -> list[str]:
    return [model["id"] for model in await listed(proxy)]


async def test_the_upstreams_models_are_listed_as_it_lists_them(start: Start) -> None:
    entry = {"id": "gpt-x", "object": "model", "created": 17, "owned_by": "them", "context_window": 8192}
    async with ListingUpstream() as upstream:
        upstream.listing = listing(entry, {"id": "bare"})
        proxy = await start(upstream.url)

        first, second = await listed(proxy)

    assert first == entry
    assert (second["id"], second["owned_by"]) == ("bare", "up")


async def test_the_lists_of_all_upstreams_are_one_list(start: Start) -> None:
    async with ListingUpstream() as one, ListingUpstream() as other:
        one.listing = listing({"id": "model-a"}, {"id": "both"})
        other.listing = listing({"id": "both", "owned_by": "other"}, {"id": "model-z"})
        proxy = await start(one.url, other.url)

        assert await names(proxy) == ["model-a", "both", "model-z"]
        assert next(model for model in await listed(proxy) if model["id"] == "both")["owned_by"] == "up"


async def test_only_models_that_the_config_lets_through_are_listed(start: Start) -> None:
    async with ListingUpstream() as upstream:
        upstream.listing = listing({"id": "gpt-1"}, {"id": "whisper"}, {"id": "gpt-2"})
        proxy = await start(upstream.url, more='models = ["gpt-*", "named-only"]')

        assert await names(proxy) == ["gpt-1", "gpt-2", "named-only"]


async def test_aliases_stand_first_and_say_what_they_mean(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more='[[model]]\nname = "fast"\ntargets = ["up/model-a", "up/model-b"]')

    first, *rest = await listed(proxy)

    assert (first["id"], first["targets"]) == ("fast", ["up/model-a", "up/model-b"])
    assert [model["id"] for model in rest] == ["model-a", "model-b"]


TROUBLE: dict[str, Play] = {
    "an error": refuse(500),
    "no JSON": answer(b"<html>", connection="close"),
    "no list": answer({"data": "none"}, connection="close"),
    "entries that are none": listing("model-x", {"name": "y"}, {"id": 7}, None),
    "a text": answer("Hi", connection="close"),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE.keys())
async def test_an_upstream_that_does_not_list_takes_nothing_from_the_others(
    upstream: FakeUpstream, start: Start, trouble: Play
) -> None:
    async with ListingUpstream() as sick:
        sick.listing = trouble
        proxy = await start(sick.url, upstream.url)

        assert await names(proxy) == ["model-a", "model-b"]


async def test_an_upstream_that_is_down_is_represented_by_the_config(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(upstream.url, "http://127.0.0.1:1/v1", more='models = ["model-z", "pattern-*"]')

    assert await names(proxy) == ["model-a", "model-b", "model-z"]


async def test_a_bare_list_is_a_list_too(start: Start) -> None:
    """Together's: an array with no envelope (https://docs.together.ai/reference/models-1)."""
    async with ListingUpstream() as upstream:
        upstream.listing = answer([{"id": "model-t", "type": "chat"}], connection="close")
        proxy = await start(upstream.url)

        assert await names(proxy) == ["model-t"]


async def test_upstreams_are_asked_for_their_lists_seldom(start: Start) -> None:
    async with ListingUpstream() as upstream:
        upstream.listing = listing({"id": "model-a"})
        proxy = await start(upstream.url)

        await asyncio.gather(*(names(proxy) for _ in range(10)))

        assert len(upstream.listed) == 1


async def test_the_list_is_asked_for_with_our_credentials(start: Start) -> None:
    async with ListingUpstream() as upstream:
        upstream.listing = listing({"id": "model-a"})
        proxy = await start(upstream.url, more='api_key_env = "UP_KEY"')

        async with proxy.get("/v1/models", headers={"Authorization": "Bearer of-the-client"}) as response:
            assert "sk-upstream-secret" not in await response.text()

        (head,) = upstream.listed
        assert b"uthorization: Bearer sk-upstream-secret\r\n" in head


# ---------------------------------------------------------------------- one model


@pytest.mark.parametrize("name", ["model-a", "fast", "vendor/with-slash"])
async def test_one_model_can_be_asked_for(start: Start, name: str) -> None:
    async with ListingUpstream() as upstream:
        upstream.listing = listing({"id": "model-a"}, {"id": "vendor/with-slash"})
        proxy = await start(upstream.url, more='[[model]]\nname = "fast"\ntargets = ["up/model-a"]')

        async with proxy.get(f"/v1/models/{name}") as response:
            assert response.status == 200
            assert (await response.json())["id"] == name


async def test_a_model_that_nobody_has_is_a_404(proxy: Proxy) -> None:
    async with proxy.get("/v1/models/nothing-like-it") as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


# ---------------------------------------------------------------------- what a name means


async def test_a_model_is_asked_of_the_upstream_that_lists_it(start: Start) -> None:
    """Where several upstreams take any name, their lists tell who has it."""
    async with ListingUpstream() as one, ListingUpstream() as other:
        one.listing = listing({"id": "model-a"})
        other.listing = listing({"id": "model-z"})
        proxy = await start(one.url, other.url)
        await listed(proxy)

        for name, target in {
            "model-z": "up2/model-z",
            "model-a": "up/model-a",
            "unlisted": "up/unlisted",
            "up2/model-a": "up2/model-a",
            "up2/vendor/x": "up2/vendor/x",
            "vendor/x": "up/vendor/x",
        }.items():
            async with proxy.chat(model=name, stream=True) as response:
                assert response.headers["x-headwater-target"] == target
                await response.read()
        assert [request.json()["model"] for request in other.requests] == ["model-z", "model-a", "vendor/x"]


async def test_the_model_in_the_answer_is_the_one_that_answered(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more='[[model]]\nname = "fast"\ntargets = ["up/model-a"]')

    async with proxy.chat(model="fast", stream=True) as response:
        body = await response.text()

    assert '"model":"model-a"' in body
    assert upstream.requests[0].json()["model"] == "model-a"
    row = await proxy.ledger.next()
    assert (row["model"], row["target"]) == ("fast", "up/model-a")
