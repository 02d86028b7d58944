"""Every other route of the API: relayed unread, both ways, to the upstream that serves the model."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests.conftest import Proxy, Start
from tests.fakes.upstream import DONE, FakeUpstream, Received, Wire, answer, refuse
from tests.journeys.test_sloppy_streams import written

EMBEDDINGS = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1e-9]}]}
ALIAS = '[[model]]\nname = "fast"\ntargets = ["up/model-a"]'


async def test_embeddings_pass_byte_for_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    reply = json.dumps(EMBEDDINGS, indent=2).encode()
    body = b'{"model": "model-a",\n "input": ["Hi \\u2713"], "vendor": 1.50}'
    upstream.plays(answer(reply, x_ratelimit_limit_requests="5"))

    async with proxy.post("/embeddings", body) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert response.headers["x-headwater-target"] == "up/model-a"
        assert response.headers["x-ratelimit-limit-requests"] == "5"
        assert await response.read() == reply

    (request,) = upstream.requests
    assert (request.method, request.path, request.body) == ("POST", "/v1/embeddings", body)
    assert request.headers["content-type"] == "application/json"
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["http_status"]) == ("passthrough", "ok", 200)
    assert (row["target"], row["attempts"], row["error"]) == ("up/model-a", 1, None)
    assert row["ttft_ms"] is not None


async def test_a_stream_of_another_route_passes_byte_for_byte_as_it_comes(upstream: FakeUpstream, proxy: Proxy) -> None:
    """The Responses API needs its `event:` lines (https://github.com/BerriAI/litellm/issues/27442). The upstream goes on
    only when the client has what came before."""
    seen = asyncio.Event()
    events = [
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"%d"}\n\n' % number
        for number in range(10)
    ]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream; charset=utf-8", cache_control="max-age=60")
        for data in events:
            await wire.chunk(data)
            await seen.wait()
            seen.clear()
        await wire.chunk(b": the end\r\n\r\nid: 7\r\ndata: done\r\n")
        await wire.end()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.post("/responses", {"model": "model-a", "stream": True}) as response:
        received = b""
        for data in events:
            while not received.endswith(data):
                received += await response.content.readany()
            seen.set()
        received += await response.content.read()
        headers = response.headers

    assert received == b"".join(events) + b": the end\r\n\r\nid: 7\r\ndata: done\r\n"
    assert [value.partition(";")[0] for value in headers.getall("Content-Type")] == ["text/event-stream"]
    assert headers.getall("Cache-Control") == ["no-cache, no-transform"]
    assert headers["X-Accel-Buffering"] == "no"
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_stream_of_completions_is_not_mended(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Old completions have their own chunks."""
    events = b'data: {"choices":[{"text":"Hi"}]}\n\ndata: {"error": null}\n\n' + DONE
    upstream.plays(written(events))

    async with proxy.post("/completions", {"model": "model-a", "prompt": "Hi", "stream": True}) as response:
        assert await response.read() == events


def recording(model: str = "fast") -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", bytes(range(256)) * 40, filename="model.wav", content_type="audio/wav")
    form.add_field("model", model)
    form.add_field("language", "de")
    return form


@pytest.mark.parametrize("path", ["/audio/transcriptions", "/audio/translations", "/images/edits"])
async def test_a_form_reaches_the_model_that_its_alias_means(upstream: FakeUpstream, start: Start, path: str) -> None:
    proxy = await start(more=ALIAS)
    upstream.plays(answer({"text": "Hallo"}))

    async with proxy.post(path, recording()) as response:
        assert response.status == 200
        assert await response.json() == {"text": "Hallo"}
        assert response.headers["x-headwater-target"] == "up/model-a"

    (request,) = upstream.requests
    assert request.path == f"/v1{path}"
    boundary = re.search("boundary=(.+)", request.headers["content-type"])
    assert boundary is not None
    parts = request.body.split(b"--" + boundary.group(1).encode())
    assert parts[1].endswith(b"\r\n\r\n" + bytes(range(256)) * 40 + b"\r\n")
    assert parts[2].endswith(b"\r\n\r\nmodel-a\r\n")
    assert b'name="model"' in parts[2]
    assert parts[3].endswith(b"\r\n\r\nde\r\n")
    assert parts[4] == b"--\r\n"
    assert (await proxy.ledger.next())["model"] in ("fast", "model-a")


async def test_a_form_for_a_model_by_its_own_name_passes_byte_for_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"text": "Hallo"}))
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel-a\r\n--b--\r\n'

    async with proxy.post(
        "/audio/transcriptions", form, headers={"Content-Type": "multipart/form-data; boundary=b"}
    ) as response:
        assert response.status == 200

    assert upstream.requests[0].body == form


async def test_a_file_that_talks_of_models_is_not_taken_for_one(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more=ALIAS)
    upstream.plays(answer({"text": "Hallo"}))
    decoy = b'Content-Disposition: form-data; name="model"\r\n\r\nfast\r\n--b'
    form = aiohttp.FormData()
    form.add_field("file", decoy, filename="a.txt")
    form.add_field("model", "fast")

    async with proxy.post("/files", form) as response:
        assert response.status == 200

    assert decoy in upstream.requests[0].body
    assert upstream.requests[0].body.count(b"model-a") == 1


async def test_an_alias_is_rewritten_and_nothing_else(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more=ALIAS)
    upstream.plays(answer(EMBEDDINGS))
    body = {"input": ["Hi"], "model": "fast", "dimensions": None, "vendor": {"a": [1.5]}}

    for name in ("fast", "up/model-a"):
        async with proxy.post("/embeddings", {**body, "model": name}) as response:
            assert response.status == 200
        assert upstream.requests[-1].json() == {**body, "model": "model-a"}


async def test_the_model_decides_which_upstream_is_asked(upstream: FakeUpstream, start: Start) -> None:
    async with FakeUpstream() as other:
        proxy = await start(upstream.url, other.url, more='models = ["model-z"]')
        upstream.plays(answer({"from": "up"}))
        other.plays(answer({"from": "up2"}))

        async with proxy.post("/embeddings", {"model": "up2/model-z", "input": "Hi"}) as response:
            assert await response.json() == {"from": "up2"}
        async with proxy.post("/moderations", {"input": "Hi"}) as response:
            assert await response.json() == {"from": "up"}
        assert other.requests[0].json()["model"] == "model-z"


async def test_a_get_keeps_its_query_string(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"data": []}))

    url = URL(proxy.base + "/files?limit=2&after=file%2F1%20x&purpose=", encoded=True)
    async with proxy.client.get(url) as response:
        assert response.status == 200

    (request,) = upstream.requests
    assert (request.method, request.path) == ("GET", "/v1/files?limit=2&after=file%2F1%20x&purpose=")
    assert request.body == b""
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["target"]) == ("passthrough", "ok", "up/-")


async def test_a_path_arrives_as_it_was_written(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({}))
    path = "/v1/models-of/org%2Fname/a%20b/~x;y=1,2"

    async with proxy.client.get(URL(proxy.base.removesuffix("/v1") + path, encoded=True)) as response:
        assert response.status == 200

    assert upstream.requests[0].path == path


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "POST"])
async def test_any_method_passes(upstream: FakeUpstream, proxy: Proxy, method: str) -> None:
    upstream.plays(answer({"deleted": True}))

    async with proxy.client.request(method, proxy.base + "/files/file-1") as response:
        assert response.status == 200
        assert await response.json() == {"deleted": True}

    assert (upstream.requests[0].method, upstream.requests[0].path) == (method, "/v1/files/file-1")


async def test_a_question_for_the_head_alone_gets_it(upstream: FakeUpstream, proxy: Proxy) -> None:
    """The answer to HEAD names a length and has no body (RFC 9110 §9.3.2); the connection is good for the next one."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="audio/mpeg", content_length="5000", x_ratelimit_limit="1")

    upstream.plays(play, answer(EMBEDDINGS))

    async with asyncio.timeout(10), proxy.client.head(proxy.base + "/files/file-1/content") as response:
        assert response.status == 200
        assert response.headers["x-ratelimit-limit"] == "1"
    async with proxy.post("/embeddings", {"model": "model-a", "input": "Hi"}) as response:
        assert await response.json() == EMBEDDINGS
    assert [request.method for request in upstream.requests] == ["HEAD", "POST"]


async def test_a_binary_answer_passes(upstream: FakeUpstream, proxy: Proxy) -> None:
    sound = bytes(range(256)) * 1000
    upstream.plays(answer(sound, content_type="audio/mpeg", content_disposition='attachment; filename="a.mp3"'))

    async with proxy.post("/audio/speech", {"model": "model-a", "input": "Hi", "voice": "x"}) as response:
        assert response.content_type == "audio/mpeg"
        assert response.headers["Content-Disposition"] == 'attachment; filename="a.mp3"'
        assert await response.read() == sound


@pytest.mark.parametrize("status", [201, 202, 204])
async def test_another_success_keeps_its_status(upstream: FakeUpstream, proxy: Proxy, status: int) -> None:
    async def play(request: Received, wire: Wire) -> None:
        await wire.head(status, content_length="0")

    upstream.plays(play)

    async with proxy.post("/batches", {}) as response:
        assert response.status == status
        assert await response.read() == b""

    assert (await proxy.ledger.next())["http_status"] == status


@pytest.mark.parametrize("status", [400, 404, 429, 500])
async def test_an_error_is_passed_on_whole(upstream: FakeUpstream, proxy: Proxy, status: int) -> None:
    upstream.plays(refuse(status, "input", "No", "some_code"))

    async with proxy.post("/embeddings", {"model": "model-a", "input": ""}) as response:
        assert response.status == status
        assert response.headers["x-headwater-error-source"] == "upstream"
        assert (await response.json())["error"] == {
            "message": "No",
            "type": "invalid_request_error",
            "param": "input",
            "code": "some_code",
        }

    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["http_status"]) == ("passthrough", "upstream_error", status)


@pytest.mark.parametrize(
    ("played", "status", "code"),
    [
        (answer(b"<html><title>Oops</title>", 502, content_type="text/html"), 502, "upstream_502"),
        (answer(b"", 302, location="http://elsewhere.example"), 502, "bad_upstream_answer"),
    ],
)
async def test_an_error_in_another_shape_gets_the_envelope(
    upstream: FakeUpstream, proxy: Proxy, played: Any, status: int, code: str
) -> None:
    upstream.plays(played)

    async with proxy.get("/v1/files/file-1/content") as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code


@pytest.mark.parametrize("framing", ["chunks", "a length"])
@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_break_in_mid_body_breaks_the_clients_connection(
    upstream: FakeUpstream, proxy: Proxy, framing: str, how: str
) -> None:
    """Behind the status only that can say that the rest is missing; a tidy end would be a lie."""
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        if framing == "chunks":
            await wire.head(content_type="audio/mpeg")
            await wire.chunk(b"the first half")
        else:
            await wire.head(content_type="audio/mpeg", content_length="1000")
            await wire.send(b"the first half")
        await seen.wait()
        await (wire.close() if how == "closed" else wire.reset())

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.post("/audio/speech", {"model": "model-a"}) as response:
        assert response.status == 200
        assert await response.content.readany() == b"the first half"
        seen.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()

    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["error"]) == ("passthrough", "upstream_error", "upstream_broke")


async def test_an_upstream_that_is_not_there_is_a_502(start: Start) -> None:
    proxy = await start("http://127.0.0.1:1/v1")

    async with proxy.post("/embeddings", {"model": "model-a", "input": "Hi"}) as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"


async def test_a_client_that_leaves_ends_the_upstream_call(upstream: FakeUpstream, proxy: Proxy) -> None:
    gone = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="audio/mpeg")
        await wire.chunk(b"the first half")
        await wire.gone()
        gone.set()

    upstream.plays(play)
    async with proxy.post("/audio/speech", {"model": "model-a"}) as response:
        assert await response.content.readany() == b"the first half"
        response.close()

    await asyncio.wait_for(gone.wait(), 10)
    assert (await proxy.ledger.next())["status"] == "cancelled"
