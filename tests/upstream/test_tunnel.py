"""Outgoing proxies: a tunnel to every upstream, and plain words about which of the two failed."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.config import with_upstreams
from proxy.errors import UpstreamError
from proxy.settings import UpstreamSettings
from proxy.upstream.endpoint import Endpoint
from proxy.upstream.pool import Origin, Pool
from proxy.upstream.tunnel import OutgoingProxy
from tests.conftest import Proxy, Start, make_settings, running_proxy
from tests.fakes.connect import FakeConnectProxy, Play, opens, says
from tests.fakes.upstream import COMPLETION, FakeUpstream, answer, refuse
from tests.upstream.conftest import Authority, InStep, error_of

USER, PASSWORD = "me", "p@ss:word"
TOKEN = b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture
async def tunnels() -> AsyncIterator[FakeConnectProxy]:
    async with FakeConnectProxy() as fake:
        yield fake


@pytest.fixture
async def behind(start: Start, tunnels: FakeConnectProxy) -> Proxy:
    """A proxy that reaches its upstream through `tunnels`."""
    return await start(more=f'proxy = "http://{tunnels.address}"')


async def test_a_plain_upstream_is_reached_through_a_tunnel_that_is_kept(
    upstream: FakeUpstream, tunnels: FakeConnectProxy, behind: Proxy
) -> None:
    async with behind.get("/v1/models") as response:
        assert response.status == 200

    for _ in range(3):
        upstream.plays(played := InStep())
        await played.is_heard_by(behind)
        assert (await behind.ledger.next())["status"] == "ok"

    [asked] = tunnels.asked
    assert (asked.method, asked.authority) == ("CONNECT", f"127.0.0.1:{upstream.port}")
    assert asked.headers["host"] == asked.authority
    assert "proxy-authorization" not in asked.headers
    assert upstream.requests[0].path == "/v1/chat/completions"
    assert "proxy-authorization" not in upstream.requests[0].headers


async def test_tls_is_spoken_with_the_upstream_and_not_with_the_proxy_that_the_environment_names(
    tmp_path: Path, tunnels: FakeConnectProxy, authority: Authority
) -> None:
    up = UpstreamSettings("up", "https://up.example/v1", ca_file=authority.file)
    settings = with_upstreams(make_settings(tmp_path), (up,), {"HTTPS_PROXY": tunnels.address})
    async with FakeUpstream(tls=authority.server("up.example")) as upstream, running_proxy(settings) as proxy:
        tunnels.plays(opens(upstream.port))
        upstream.plays(played := InStep())

        await played.is_heard_by(proxy)

        assert {asked.authority for asked in tunnels.asked} == {"up.example:443"}


async def test_the_upstreams_certificate_is_checked_through_the_tunnel(
    start: Start, tunnels: FakeConnectProxy, authority: Authority
) -> None:
    async with FakeUpstream(tls=authority.server("other.example")) as upstream:
        tunnels.plays(opens(upstream.port))
        proxy = await start(
            "https://up.example/v1", more=f'ca_file = "{authority.file}"\nproxy = "http://{tunnels.address}"'
        )

        error = await error_of(proxy)

    assert error["code"] == "upstream_tls_error"
    assert error["message"] == "The upstream 'up' gave no trusted connection: its certificate is for another host name."


async def test_the_proxy_gets_its_credentials_and_nobody_else_hears_of_them(
    upstream: FakeUpstream, start: Start, tunnels: FakeConnectProxy
) -> None:
    """RFC 7617 §2. An upstream that quotes them all the same is scrubbed, as it is of its own key."""
    proxy = await start(more=f'proxy = "http://{USER}:p%40ss%3Aword@{tunnels.address}"')
    upstream.plays(refuse(400, message=f"What is {PASSWORD}, or {TOKEN}?"))

    async with proxy.chat() as response:
        assert (await response.json())["error"]["message"] == "What is [redacted], or [redacted]?"

    assert tunnels.asked[0].headers["proxy-authorization"] == f"Basic {TOKEN}"
    assert TOKEN not in str(upstream.requests)


_BAD_ANSWERS = {
    "407": (says(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 3\r\n\r\nwho"), "answered 407"),
    "403": (says(b"HTTP/1.1 403 Forbidden\r\n\r\n", closes=True), "answered 403"),
    "a redirect": (says(b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\n\r\n"), "answered 302"),
    "garbage": (says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "malformed"),
    "a bare line feed": (says(b"HTTP/1.1 200 OK\n\r\n\r\n"), "malformed"),
    "a header that is none": (says(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"), "malformed"),
    "words before their time": (says(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n"), "malformed"),
    "an endless head": (says(b"HTTP/1.1 200 OK\r\n" + b"X-Padding: x\r\n" * 10_000), "too long"),
    "a close": (says(b"", closes=True), "closed the connection without an answer"),
    "half an answer": (says(b"HTTP/1.1 200 OK\r\nVia:", closes=True), "malformed"),
    "a tunnel closed at once": (says(b"HTTP/1.1 200 OK\r\n\r\n", closes=True), "closed"),
}


@pytest.mark.parametrize(("played", "words"), _BAD_ANSWERS.values(), ids=_BAD_ANSWERS.keys())
async def test_a_proxy_that_opens_no_tunnel_is_told_from_an_upstream_that_broke(
    upstream: FakeUpstream, tunnels: FakeConnectProxy, behind: Proxy, played: Play, words: str
) -> None:
    tunnels.plays(played)

    error = await error_of(behind)

    refused = words.startswith("answered")
    assert error["code"] == "proxy_refused" if refused else error["code"] in ("proxy_broke", "upstream_broke")
    assert words in error["message"]
    assert tunnels.address not in error["message"]
    assert upstream.connections == 0
    assert (await behind.ledger.next())["status"] == "upstream_error"
    await tunnels.is_left()
    tunnels.plays(opens())
    upstream.plays(answer())
    assert await behind.ask() == COMPLETION


async def test_a_silent_proxy_costs_no_more_than_the_connect_timeout(start: Start, tunnels: FakeConnectProxy) -> None:
    tunnels.plays(says(b"HTTP/1.1 200 "))
    proxy = await start(more=f'proxy = "http://{tunnels.address}"', streaming={"connect_timeout_s": 0.1})

    async with asyncio.timeout(10), proxy.chat() as response:
        assert response.status == 504
        error = (await response.json())["error"]

    await tunnels.is_left()
    assert error["code"] == "proxy_timeout"
    assert error["message"] == "The outgoing proxy before the upstream 'up' did not accept a connection in time."


async def test_a_handshake_that_never_ends_gives_the_tunnel_up(
    upstream: FakeUpstream, start: Start, tunnels: FakeConnectProxy
) -> None:
    """The upstream waits for a request to end, and never says a word of TLS."""
    proxy = await start(
        f"https://127.0.0.1:{upstream.port}/v1",
        more=f'proxy = "http://{tunnels.address}"',
        streaming={"connect_timeout_s": 0.1},
    )

    async with asyncio.timeout(10), proxy.chat() as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "connect_timeout"

    await tunnels.is_left()


async def test_a_proxy_that_is_not_there_is_told_from_an_upstream_that_is_not(
    start: Start, tunnels: FakeConnectProxy
) -> None:
    without_proxy = await start(more='proxy = "http://127.0.0.1:1"')
    without_upstream = await start("http://127.0.0.1:1/v1", more=f'proxy = "http://{tunnels.address}"')
    tunnels.plays(says(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"))

    errors = await error_of(without_proxy), await error_of(without_upstream)

    assert [error["code"] for error in errors] == ["proxy_unreachable", "proxy_refused"]
    assert errors[0]["message"] == "The outgoing proxy before the upstream 'up' cannot be reached."
    assert errors[1]["message"] == "The outgoing proxy before the upstream 'up' answered 502 and opened no tunnel."


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_proxy_may_speak_tls_itself(upstream: FakeUpstream, authority: Authority, is_tls: bool) -> None:
    """The upstream's TLS then runs inside the proxy's."""
    async with (
        FakeConnectProxy(tls=authority.server("127.0.0.1")) as tunnels,
        FakeUpstream(tls=authority.server("127.0.0.1") if is_tls else None) as behind,
    ):
        host, port = tunnels.address.split(":")
        trusted = authority.trusting()
        origin = Origin(
            "up",
            Endpoint("127.0.0.1", behind.port, trusted if is_tls else None),
            OutgoingProxy(Endpoint(host, int(port), trusted)),
        )
        behind.plays(answer())
        pool = Pool(origin, 10)

        for _ in range(2):
            connection = pool.take() or await pool.connect()
            exchange = connection.start(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n", b"", has_no_body=False)
            await exchange.head()
            read = b""
            while part := await exchange.read():
                read += part
            exchange.close()
            assert b"Hello there, friend." in read

        pool.close()
        assert len(tunnels.asked) == behind.connections == 1


async def test_a_proxy_that_cannot_be_trusted_is_asked_for_nothing(authority: Authority) -> None:
    async with FakeConnectProxy(tls=authority.server("other.example")) as tunnels:
        host, port = tunnels.address.split(":")
        proxy = OutgoingProxy(Endpoint(host, int(port), authority.trusting()), f"Basic {TOKEN}")
        pool = Pool(Origin("up", Endpoint("127.0.0.1", 1), proxy), 10)

        with pytest.raises(UpstreamError, match="its certificate is for another address") as caught:
            await pool.connect()

        assert caught.value.code == "proxy_tls_error"
        assert not tunnels.asked
