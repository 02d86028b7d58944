"""The upstream fails, in its own way: the client gets the error in OpenAI's envelope, with the status it deserves."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import test_utils, web

from proxy.chat import Outcome
from proxy.server.app import make_app, opened_ledger, parts, state_of
from tests.conftest import Proxy, Start, make_settings
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import read_strictly

SECRET = "sk-upstream-secret"
ENVELOPE = {"message", "type", "param", "code"}


@pytest.fixture
async def once(start: Start) -> Proxy:
    """A proxy that asks once, whatever comes of it."""
    return await start(streaming={"max_retries": 0})


@pytest.mark.parametrize("wants_stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529])
async def test_an_error_in_the_envelope_is_passed_on_whole(
    upstream: FakeUpstream, once: Proxy, status: int, wants_stream: bool
) -> None:
    """The status too, and no 200 with an event stream (https://github.com/shuv1337/oc-web/issues/143)."""
    error = {
        "message": "As the upstream said it ✓",
        "type": "some_type",
        "param": "messages[0]",
        "code": "some_code",
        "metadata": {"provider": "x", "raw": [1, None]},
    }
    upstream.plays(answer({"error": error}, status, retry_after="17", x_ratelimit_remaining_requests="0"))

    async with once.chat(stream=wants_stream) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        assert response.headers["Retry-After"] == "17"
        assert response.headers["x-headwater-error-source"] == "upstream"
        assert (await response.json()) == {"error": error}

    assert len(upstream.requests) == 1
    row = await once.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", status, "some_code")
    assert (row["mode"], row["ttft_ms"], row["attempts"]) == ("none", None, 1)


SHAPES: dict[str, tuple[Play, int, dict[str, Any]]] = {
    "Gemini's, in a list": (
        answer([{"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}}], 429),
        429,
        {"message": "Quota", "code": 429},
    ),
    "vLLM's": (
        answer({"object": "error", "message": "Too long", "type": "BadRequestError", "param": None, "code": 400}, 400),
        400,
        {"message": "Too long", "type": "BadRequestError", "code": 400},
    ),
    "Ollama's text": (answer({"error": "model 'x' not found"}, 404), 404, {"message": "model 'x' not found"}),
    "FastAPI's detail": (answer({"detail": "Not Found"}, 404), 404, {"message": "Not Found"}),
    "FastAPI's details": (
        answer({"detail": [{"loc": ["body", "messages", 0], "msg": "field required", "type": "x"}]}, 422),
        422,
        {"message": "messages.0: field required"},
    ),
    "a bare message": (answer({"message": "No"}, 403), 403, {"message": "No"}),
    "an envelope with little in it": (
        answer({"error": {"message": "No"}}, 400),
        400,
        {"message": "No", "param": None, "code": None},
    ),
    "a JSON text": (answer("No", 400), 400, {"code": "upstream_400"}),
    "JSON labelled as text": (
        answer({"error": {"message": "No"}}, 400, content_type="text/plain"),
        400,
        {"message": "No"},
    ),
    "plain text": (
        answer(b"upstream connect error\n\n or disconnect", 503, content_type="text/plain"),
        503,
        {"message": "The upstream answered 503: upstream connect error or disconnect", "code": "upstream_503"},
    ),
    "an HTML page": (
        answer(
            b"<html><head><title>502 Bad\n Gateway</title></head><body>x</body></html>", 502, content_type="text/html"
        ),
        502,
        {"message": "The upstream answered 502: an HTML page, “502 Bad Gateway”", "code": "upstream_502"},
    ),
    "nothing": (
        answer(b"", 500),
        500,
        {"message": "The upstream answered 500.", "code": "upstream_500", "type": "upstream_error"},
    ),
    "bytes": (answer(b"\xff\xfe\x00", 500, content_type="application/octet-stream"), 500, {"code": "upstream_500"}),
    "a redirect": (
        answer(b"", 302, location="http://127.0.0.1:1/elsewhere"),
        502,
        {"code": "bad_upstream_answer", "message": "The upstream answered with the unexpected status 302."},
    ),
    "a status of its own": (answer(b"", 799), 502, {"code": "bad_upstream_answer"}),
    "a login page with status 200": (
        answer(b"<!doctype html><title>Log in</title>", content_type="text/html"),
        502,
        {"code": "bad_upstream_answer"},
    ),
}


@pytest.mark.parametrize(("played", "status", "members"), SHAPES.values(), ids=SHAPES.keys())
async def test_an_error_in_any_shape_gets_the_envelope(
    upstream: FakeUpstream, once: Proxy, played: Play, status: int, members: dict[str, Any]
) -> None:
    """https://github.com/inference-gateway/inference-gateway/issues/578"""
    upstream.plays(played)

    for wants_stream in (False, True):
        async with once.chat(stream=wants_stream) as response:
            assert response.status == status
            assert response.content_type == "application/json"
            assert response.headers["x-headwater-error-source"] == "upstream"
            error = (await response.json())["error"]
        assert error.keys() >= ENVELOPE
        assert {name: error[name] for name in members} == members
        assert isinstance(error["message"], str)
        row = await once.ledger.next()
        assert (row["status"], row["http_status"]) == ("upstream_error", status)


async def test_a_redirect_is_not_followed(upstream: FakeUpstream, once: Proxy) -> None:
    """It would carry the credentials to wherever it points."""
    upstream.plays(answer(b"", 307, location="/v1/elsewhere"), answer())

    async with once.chat() as response:
        assert response.status == 502

    assert len(upstream.requests) == 1


IN_SUCCESS: dict[str, tuple[Any, int]] = {
    "a number as code": ({"error": {"message": "Bad key", "code": 401}}, 401),
    "a number in a text": ({"error": {"message": "Bad key", "code": "403"}}, 403),
    "a word as code": ({"error": {"message": "Slow", "code": "rate_limit_exceeded"}}, 429),
    "a word as type": ({"error": {"message": "Busy", "type": "overloaded_error"}}, 503),
    "a status": ({"error": {"message": "Busy", "status": 503}}, 503),
    "no hint": ({"error": {"message": "Whatever"}}, 502),
    "a text": ({"error": "Whatever"}, 502),
    "vLLM's": ({"object": "error", "message": "Too long", "type": "BadRequestError", "code": 400}, 400),
    "beside empty choices": ({"choices": [], "error": {"message": "Bad", "code": 400}}, 400),
}


@pytest.mark.parametrize(("body", "status"), IN_SUCCESS.values(), ids=IN_SUCCESS.keys())
async def test_an_error_with_status_200_gets_the_status_it_names(
    upstream: FakeUpstream, once: Proxy, body: Any, status: int
) -> None:
    """https://github.com/Oaklight/llm-rosetta/issues/454"""
    upstream.plays(answer(body))

    for wants_stream in (False, True):
        async with once.chat(stream=wants_stream) as response:
            assert response.status == status
            error = (await response.json())["error"]
        assert error.keys() >= ENVELOPE
        assert error["message"]
        assert (await once.ledger.next())["http_status"] == status


async def test_a_completion_with_an_error_that_is_null_is_a_completion(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({**COMPLETION, "error": None}))

    assert (await proxy.ask())["choices"]


# ---------------------------------------------------------------------- secrets

LEAKS: dict[str, Play] = {
    "in the message": refuse(401, None, f"Incorrect API key provided: {SECRET}."),
    "in another member": answer({"error": {"message": "No", "metadata": {"headers": [f"Bearer {SECRET}"]}}}, 401),
    "in the code": answer({"error": {"message": "No", "code": SECRET, "type": SECRET, "param": SECRET}}, 401),
    "in a text": answer(f"bad key {SECRET}".encode(), 401, content_type="text/plain"),
    "in a page": answer(f"<html><title>{SECRET}</title></html>".encode(), 403, content_type="text/html"),
    "in an error with status 200": answer({"error": {"message": f"bad key {SECRET}", "code": 401}}),
    "in the first event": stream(event({"error": {"message": f"bad key {SECRET}", "code": 401}})),
    "in a later event": stream(role(), text("Hi"), event({"error": {"message": f"bad key {SECRET}"}})),
    "in a name": answer({"error": {"message": "No", "metadata": {SECRET: 1}}}, 401),
}


@pytest.mark.parametrize("played", LEAKS.values(), ids=LEAKS.keys())
async def test_our_key_is_never_told_to_the_client(upstream: FakeUpstream, start: Start, played: Play) -> None:
    proxy = await start(more='api_key_env = "UP_KEY"')
    upstream.plays(played)

    async with proxy.chat(stream=True) as response:
        body = await response.text()
        headers = str(response.headers)

    assert upstream.requests[0].headers["authorization"] == f"Bearer {SECRET}"
    assert "error" in body
    assert SECRET not in body
    assert SECRET not in headers
    row = await proxy.ledger.next()
    assert row["status"] == "upstream_error"
    assert SECRET not in json.dumps(row)


async def test_a_password_in_the_url_is_never_told_to_the_client(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(upstream.url.replace("http://", "http://me:hunter22@"))
    upstream.plays(refuse(401, None, "hunter22 is not right"))

    async with proxy.chat() as response:
        assert "hunter22" not in await response.text()
    assert upstream.requests[0].headers["authorization"].startswith("Basic ")


# ---------------------------------------------------------------------- connections


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_an_upstream_that_is_not_there_is_a_502(start: Start, wants_stream: bool) -> None:
    port = free_port()
    proxy = await start(f"http://127.0.0.1:{port}/v1")

    async with proxy.chat(stream=wants_stream) as response:
        assert response.status == 502
        body = await response.text()
        error = json.loads(body)["error"]
    assert error["code"] == "upstream_unreachable"
    assert str(port) not in body

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 502, "upstream_unreachable")


async def test_an_upstream_whose_name_nobody_knows_is_a_502(start: Start) -> None:
    proxy = await start("http://does-not-exist.invalid/v1")

    async with proxy.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"


def hanging_up(*said: bytes) -> Play:
    """The upstream closes the connection, having said at most a part of a head."""

    async def play(request: Received, wire: Wire) -> None:
        for data in said:
            await wire.send(data)
        await wire.close()

    return play


async def test_a_connection_that_had_been_closed_is_replaced_without_a_word(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """A kept-alive connection dies the moment it is used again (https://github.com/us/crw/issues/419); nothing was
    received, so the request is sent once more."""
    upstream.plays(answer(), hanging_up(), answer())

    await proxy.ask()
    await proxy.ledger.next()
    assert await proxy.ask() == COMPLETION

    assert len(upstream.requests) == 3
    assert upstream.requests[1].body == upstream.requests[2].body
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_connection_that_was_reset_is_replaced_without_a_word(upstream: FakeUpstream, proxy: Proxy) -> None:
    async def reset(request: Received, wire: Wire) -> None:
        await wire.reset()

    upstream.plays(answer(), reset, answer())

    await proxy.ask()
    assert await proxy.ask() == COMPLETION


async def test_a_request_is_sent_once_more_and_not_for_ever(upstream: FakeUpstream, once: Proxy) -> None:
    upstream.plays(answer(), hanging_up())

    await once.ask()
    await once.ledger.next()
    async with once.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"

    assert len(upstream.requests) == 3
    assert (await once.ledger.next())["status"] == "upstream_error"


async def test_a_request_on_a_new_connection_is_not_sent_again(upstream: FakeUpstream, start: Start) -> None:
    """The upstream has seen it, and may have done what it asks: to ask again counts as a retry."""
    proxy = await start(streaming={"max_retries": 0, "coalesce": False})
    async with proxy.get("/v1/models"):
        pass
    # That connection is busy now, so that the next request needs a new one.
    asked = asyncio.Event()

    async def wait(request: Received, wire: Wire) -> None:
        await asked.wait()
        await answer()(request, wire)

    upstream.plays(wait, hanging_up())
    busy = asyncio.create_task(proxy.ask())
    await upstream.asked(1)

    async with proxy.chat() as response:
        assert response.status == 502
    assert len(upstream.requests) == 2
    asked.set()
    await busy


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nContent-Ty", b"HTTP", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_request_is_not_sent_again_once_anything_was_received(
    upstream: FakeUpstream, once: Proxy, said: bytes
) -> None:
    """https://github.com/aio-libs/aiohttp/issues/3609"""
    upstream.plays(answer(), hanging_up(said), answer())

    await once.ask()
    async with once.chat() as response:
        assert response.status == 502

    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    "said",
    [
        b"whatever\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: minus\r\n\r\n",
    ],
)
async def test_malformed_http_is_a_502(upstream: FakeUpstream, once: Proxy, said: bytes) -> None:
    upstream.plays(hanging_up(said))

    async with once.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] in ("bad_upstream_answer", "upstream_broke")

    assert len(upstream.requests) == 1


# ---------------------------------------------------------------------- our own bugs


async def test_an_error_of_our_own_is_told_without_detail(
    tmp_path: Path, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Outcome] = []

    async def boom(request: web.Request) -> web.Response:
        raise RuntimeError("the password is swordfish")

    settings = make_settings(tmp_path, upstream.url)
    async with opened_ledger(settings) as ledger, parts(settings, rows.append) as made:
        state = state_of(settings, made, ledger, rows.append)
        app = make_app(state)
        app.router.add_get("/boom", boom)
        server = test_utils.TestServer(app)
        with caplog.at_level(logging.ERROR):
            async with test_utils.TestClient(server) as client, client.get("/boom") as response:
                assert response.status == 500
                body = await response.text()

    assert json.loads(body) == {
        "error": {"message": "The proxy failed.", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert response.headers["x-headwater-error-source"] == "proxy"
    assert response.headers["x-request-id"] in caplog.text
    assert "swordfish" in caplog.text


# ---------------------------------------------------------------------- request ids


async def test_a_request_id_goes_all_the_way_and_comes_back(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer(x_request_id="of-the-upstream"))

    async with proxy.chat(headers={"x-request-id": "my-id:1.2_3"}) as response:
        assert response.headers["x-request-id"] == "my-id:1.2_3"

    assert upstream.requests[0].headers["x-request-id"] == "my-id:1.2_3"
    assert (await proxy.ledger.next())["id"] == "my-id:1.2_3"


@pytest.mark.parametrize("forged", ["", "two words", "x" * 129, "a=b status=ok", "caf\u00e9", '"}{', "<b>"])
async def test_a_request_id_that_could_forge_a_line_is_replaced(
    upstream: FakeUpstream, proxy: Proxy, forged: str
) -> None:
    upstream.plays(answer())

    async with proxy.chat(headers={"x-request-id": forged}) as response:
        given = response.headers["x-request-id"]

    assert given != forged
    assert given.replace("-", "").isalnum()
    assert upstream.requests[0].headers["x-request-id"] == given
    assert (await proxy.ledger.next())["id"] == given


async def test_every_answer_has_its_own_request_id(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer(), stream(role(), text("Hi"), finish(), usage()), refuse(400), answer())
    ids = []
    for wants_stream in (False, True, False):
        async with proxy.chat(stream=wants_stream) as response:
            ids.append(response.headers["x-request-id"])
    async with proxy.get("/health") as response:
        ids.append(response.headers["x-request-id"])
    async with proxy.get("/nowhere") as response:
        ids.append(response.headers["x-request-id"])

    assert len(set(ids)) == 5


# ---------------------------------------------------------------------- life goes on


@pytest.mark.parametrize("trouble", [hanging_up(), refuse(500), stream(role(), text("Hel"), done=False)])
async def test_the_next_call_is_served_as_if_nothing_had_been(
    upstream: FakeUpstream, once: Proxy, trouble: Play
) -> None:
    well = stream(role(), text("Hello"), finish(), usage())

    async def play(request: Received, wire: Wire) -> None:
        # The same call may come twice, on an old connection and on a new one.
        await (trouble if request.headers["x-request-id"] == "first" else well)(request, wire)

    upstream.plays(play)
    async with once.chat(headers={"x-request-id": "first"}, stream=True) as response:
        await response.read()
    assert (await once.ledger.next())["status"] == "upstream_error"

    body = await once.stream()
    assert body.endswith(DONE)
    assert read_strictly(body).text() == "Hello"
    assert (await once.ledger.next())["status"] == "ok"
