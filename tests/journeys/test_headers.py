"""Which headers pass, and in which direction."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import COMPLETION, FakeUpstream, Received, Wire, answer, finish, role, stream, text, usage

CREDENTIALS = {
    "Authorization": "Bearer client-secret",
    "api-key": "client-secret",
    "x-api-key": "client-secret",
    "x-goog-api-key": "client-secret",
    "Cookie": "session=client-secret",
    "Proxy-Authorization": "Basic client-secret",
}


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_the_clients_credentials_never_reach_the_upstream(
    upstream: FakeUpstream, proxy: Proxy, path: str
) -> None:
    upstream.plays(answer())
    body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}

    async with proxy.post(path, body, headers=CREDENTIALS) as response:
        assert response.status == 200

    assert "client-secret" not in str(upstream.requests[0].headers)
    assert "authorization" not in upstream.requests[0].headers


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_the_upstream_gets_the_credentials_of_the_config(upstream: FakeUpstream, start: Start, path: str) -> None:
    proxy = await start(more='api_key_env = "UP_KEY"')
    upstream.plays(answer())
    body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}

    async with proxy.post(path, body, headers=CREDENTIALS) as response:
        assert response.status == 200

    assert upstream.requests[0].headers["authorization"] == "Bearer sk-upstream-secret"


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_custom_headers_reach_the_upstream_and_those_of_the_hop_do_not(
    upstream: FakeUpstream, proxy: Proxy, path: str
) -> None:
    """RFC 9110 §7.6.1: what `Connection` names belongs to this hop."""
    upstream.plays(answer())
    passing = {"OpenAI-Beta": "assistants=v2", "Idempotency-Key": "k-1", "X-Title": "mine", "OpenAI-Organization": "o"}
    staying = {
        "TE": "trailers",
        "Connection": "keep-alive, X-Private",
        "X-Private": "secret",
        "X-Forwarded-For": "10.0.0.1",
        "Forwarded": "for=10.0.0.1",
        "Via": "1.1 me",
        "Referer": "http://x",
        "Accept-Language": "de",
        "Sec-Fetch-Mode": "cors",
        "If-None-Match": "*",
        "X-Headwater-Anything": "x",
    }
    body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}

    async with proxy.post(path, body, headers={**passing, **staying}) as response:
        assert response.status == 200

    sent = upstream.requests[0].headers
    assert {name: sent.get(name.lower()) for name in passing} == passing
    assert not {name.lower() for name in staying if name != "Connection"} & sent.keys()
    assert "x-private" not in sent.get("connection", "").lower()
    assert sent["host"] == f"127.0.0.1:{upstream.port}"
    assert sent["user-agent"].startswith("headwater/")
    assert sent["accept-encoding"] == "identity"
    assert int(sent["content-length"]) == len(upstream.requests[0].body)


async def test_a_stream_says_that_nobody_may_hold_it_up(upstream: FakeUpstream, proxy: Proxy) -> None:
    """nginx obeys X-Accel-Buffering, others no-transform (https://github.com/BerriAI/litellm/issues/29557)."""
    async with proxy.chat(stream=True, headers={"Accept-Encoding": "gzip, br"}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache, no-transform"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert "Content-Encoding" not in response.headers
        assert "Content-Length" not in response.headers
        assert response.headers["x-headwater-target"] == "up/model-a"
        await response.read()


async def test_a_made_stream_says_the_same(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer())

    async with proxy.chat(stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache, no-transform"
        assert response.headers["X-Accel-Buffering"] == "no"
        await response.read()


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_what_the_upstream_says_of_limits_reaches_the_client_and_its_own_affairs_do_not(
    upstream: FakeUpstream, proxy: Proxy, wants_stream: bool
) -> None:
    """https://github.com/vllm-project/production-stack/blob/main/src/vllm_router/services/request_service/request.py"""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(
            content_type="text/event-stream",
            x_ratelimit_remaining_tokens="1000",
            openai_processing_ms="17",
            set_cookie="session=upstream",
            server="upstream/1.0",
            x_request_id="of-the-upstream",
            access_control_allow_origin="*",
            connection="keep-alive",
            keep_alive="timeout=5",
            alt_svc="h3",
        )
        await wire.chunk(role() + text("Hi") + finish() + usage() + b"data: [DONE]\n\n")
        await wire.end()

    upstream.plays(play)

    async with proxy.chat(stream=wants_stream) as response:
        assert response.status == 200
        headers = response.headers
        assert headers["x-ratelimit-remaining-tokens"] == "1000"
        assert headers["openai-processing-ms"] == "17"
        assert headers["x-request-id"] != "of-the-upstream"
        assert "upstream" not in headers.get("Server", "")
        for name in ("Set-Cookie", "Access-Control-Allow-Origin", "Keep-Alive", "Alt-Svc"):
            assert name not in headers
        await response.read()


async def test_a_stream_needs_no_chunks_for_a_client_of_http_1_0(upstream: FakeUpstream, proxy: Proxy) -> None:
    """An old client, or nginx without `proxy_http_version 1.1`: the stream ends with the connection."""
    upstream.plays(stream(role(), text("Hi"), finish(), usage()))
    body = b'{"model":"model-a","messages":[{"role":"user","content":"Hi"}],"stream":true}'
    port = int(proxy.base.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    async with asyncio.timeout(20):
        answered = await reader.read()
    writer.close()
    await writer.wait_closed()

    head, _, rest = answered.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert rest == role() + text("Hi") + finish() + b"data: [DONE]\n\n"


async def test_two_calls_on_one_connection_do_not_mix(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("Hi"), finish(), usage()), answer())

    assert (await proxy.stream()).endswith(b"data: [DONE]\n\n")
    assert await proxy.ask() == COMPLETION
