"""HTTP/1.1 as upstreams really speak it: taken where it is sound, refused at once where it is not, never a hang."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import COMPLETION, FakeUpstream, Play, Received, Wire

_BODY = json.dumps(COMPLETION).encode()
_JSON = b"Content-Type: application/json\r\n"
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_IN_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)


def says(*pieces: bytes, closes: bool = False) -> Play:
    """These very bytes, each piece in a segment of its own."""

    async def play(request: Received, wire: Wire) -> None:
        for piece in pieces:
            await wire.send(piece)
        if closes:
            await wire.close()

    return play


_SOUND = {
    "a length": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY),
    "chunks": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _CHUNKED + b"\r\n" + _IN_CHUNKS),
    "byte by byte": says(*(bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"\r\n"), _BODY),
    "chunks with trailers": says(
        b"HTTP/1.1 200 OK\r\n" + _JSON + _CHUNKED + b"\r\n" + _IN_CHUNKS[:-2] + b"X-Sum: 1\r\n\r\n"
    ),
    "until the connection closes": says(b"HTTP/1.1 200 OK\r\n" + _JSON + b"\r\n", _BODY, closes=True),
    "HTTP/1.0": says(b"HTTP/1.0 200 OK\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY, closes=True),
    "a provisional answer before": says(
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY
    ),
    "Connection: close": says(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY),
}


@pytest.mark.parametrize("played", _SOUND.values(), ids=_SOUND.keys())
async def test_every_way_to_say_where_a_body_ends_is_understood(
    upstream: FakeUpstream, proxy: Proxy, played: Play
) -> None:
    """RFC 9112 §6.3."""
    upstream.plays(played)

    for _ in range(2):
        assert await proxy.ask() == COMPLETION

    assert (await proxy.ledger.next())["status"] == "ok"


_UNSOUND = {
    "a length and chunks": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + _CHUNKED + b"\r\n" + _IN_CHUNKS),
    "two lengths": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"Content-Length: 3\r\n\r\n" + _BODY),
    "a bad chunk size": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _CHUNKED + b"\r\n5\r\n{}   \r\nzz\r\n"),
    "a body cut short": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY[:-9], closes=True),
    "a chunk cut short": says(b"HTTP/1.1 200 OK\r\n" + _JSON + _CHUNKED + b"\r\n" + _IN_CHUNKS[:50], closes=True),
    "an endless head": says(b"HTTP/1.1 200 OK\r\n", *[b"X-Padding: " + b"x" * 8000 + b"\r\n"] * 40),
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "next to nothing": says(b"H", closes=True),
    "a coding that was not asked for": says(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: compress\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY
    ),
}


@pytest.mark.parametrize("played", _UNSOUND.values(), ids=_UNSOUND.keys())
async def test_what_is_unsound_is_an_error_at_once_and_the_next_call_is_well(
    upstream: FakeUpstream, start: Start, played: Play
) -> None:
    """A parser that stops without a word leaves its reader waiting for ever; two framings at once are how requests are
    smuggled (RFC 9112 §11.2)."""
    proxy = await start(streaming={"max_retries": 0})
    upstream.plays(played, _SOUND["a length"])

    async with asyncio.timeout(10), proxy.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"
    assert await proxy.ask() == COMPLETION

    assert upstream.connections >= 2
    assert (await proxy.ledger.next())["status"] == "upstream_error"


async def test_bytes_behind_the_end_are_nobodys_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Were the connection used again, they would be taken for the answer to the next question."""
    sound = b"HTTP/1.1 200 OK\r\n" + _JSON + _LENGTH + b"\r\n" + _BODY
    upstream.plays(says(sound + sound.replace(b"friend", b"nobody")), says(sound))

    assert await proxy.ask() == COMPLETION
    assert await proxy.ask() == COMPLETION


async def test_a_connection_is_kept_for_the_next_call(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(_SOUND["chunks"])
    async with proxy.get("/v1/models") as response:
        assert response.status == 200
    before = upstream.connections

    for _ in range(5):
        await proxy.ask()

    assert upstream.connections == before
