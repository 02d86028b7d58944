"""The manners of HTTP/1.1 toward every kind of client, spoken on plain sockets: what is framed, kept, closed and refused.

A proxy that disagrees with the one before it about where a request ends answers requests that nobody sent (RFC 9112
§11.2): what is unsound is refused, and nothing behind it on that connection is taken for a request.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Client, chat, question, request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Silence,
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

_EVENTS = [role(), text("Hello"), text(" there"), finish()]
_CHAT = "POST /v1/chat/completions"
_CHUNKED = "Transfer-Encoding: chunked"


def _in_chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    client = await Client.to(proxy.port)
    yield client
    client.close()


async def _is_of_use(client: Client) -> None:
    """The connection carries another request, and nothing stands before its answer."""
    client.send(request("GET /health"))
    assert (await client.answer()).json() == {"status": "ok"}


# ---------------------------------------------------------------------- HEAD


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/ready", 200),
        ("/admin/capabilities", 200),
        ("/admin/capabilities/up/model-a", 405),
        ("/v1/models", 200),
        ("/v1/models/model-a", 200),
        ("/v1/models/nobody", 404),
        ("/v1/chat/completions", 405),
        ("/v1/embeddings", 405),
        ("/v1/files/%2e%2e/x", 404),
        ("/nowhere", 404),
    ],
)
async def test_head_has_a_length_and_no_body(upstream: FakeUpstream, client: Client, path: str, status: int) -> None:
    """RFC 9110 §9.3.2: where a body came all the same, it would be read as the next answer."""

    async def is_refused(request: Received, wire: Wire) -> None:
        assert request.method == "HEAD"
        await wire.head(405, content_length="99")

    upstream.plays(is_refused)
    for _ in range(2):
        client.send(request(f"HEAD {path}"))
        head = await client.answer(has_body=False)
        assert head.status == status
        assert int(head.headers["content-length"]) > 0
    await _is_of_use(client)


# ---------------------------------------------------------------------- keeping and closing


async def test_an_http_1_0_client_may_keep_its_connection_for_whole_answers(
    upstream: FakeUpstream, client: Client
) -> None:
    upstream.plays(answer(), refuse(400), answer())
    for status in (200, 400, 200):
        client.send(chat("Hi", "Connection: keep-alive", version="1.0"))
        said = await client.answer()
        assert said.status == status
        assert said.headers["connection"].lower() == "keep-alive"
        assert "transfer-encoding" not in said.headers


@pytest.mark.parametrize("wish", ["Connection: close", "Connection: x-other, Close"])
@pytest.mark.parametrize("kind", ["whole", "stream", "error", "passed on", "no route"])
async def test_a_client_that_wants_the_connection_closed_is_told_so_and_it_is(
    upstream: FakeUpstream, client: Client, wish: str, kind: str
) -> None:
    """RFC 9112 §9.6."""
    asked = {
        "whole": chat("Hi", wish),
        "stream": chat("Hi", wish, stream=True),
        "error": request(_CHAT, wish, body=b"{"),
        "passed on": request("POST /v1/embeddings", wish, body=question()),
        "no route": request("GET /nowhere", wish),
    }
    upstream.plays(echo)
    client.send(asked[kind])
    assert (await client.answer()).headers["connection"] == "close"
    assert await client.rest() == b""


@pytest.mark.parametrize("wants_stream", [True, False])
async def test_an_http_1_0_client_that_says_nothing_has_its_connection_closed(
    upstream: FakeUpstream, client: Client, wants_stream: bool
) -> None:
    upstream.plays(echo)
    client.send(chat("Hi", version="1.0", stream=wants_stream))
    assert (await client.answer()).said() == "answer to Hi"
    assert await client.rest() == b""


# ---------------------------------------------------------------------- one request behind the other


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("first", ["stream", "whole"])
async def test_requests_in_one_write_are_answered_in_order(
    upstream: FakeUpstream, proxy: Proxy, client: Client, count: int, first: str
) -> None:
    """RFC 9112 §9.3.2."""
    upstream.plays(echo)
    streams = [(number % 2 == 0) == (first == "stream") for number in range(count)]
    client.send(b"".join(chat(f"question {number}", stream=wish) for number, wish in enumerate(streams)))
    for number, wish in enumerate(streams):
        said = await client.answer()
        assert said.headers["content-type"].startswith("text/event-stream" if wish else "application/json")
        assert said.said() == f"answer to question {number}"
        assert (await proxy.ledger.next())["status"] == "ok"
    await _is_of_use(client)


async def test_every_kind_of_request_may_follow_every_other(upstream: FakeUpstream, client: Client) -> None:
    upstream.plays(echo)
    client.send(
        chat("1", stream=True)
        + request(_CHAT, body=b"{")
        + request("GET /health")
        + request("POST /v1/other", body=question("4"))
        + request("HEAD /health")
        + request("GET /nowhere")
        + request(_CHAT, _CHUNKED) + _in_chunks(question("7"))
        + chat("8")
    )  # fmt: skip
    assert (await client.answer()).said() == "answer to 1"
    assert (await client.answer()).status == 400
    assert (await client.answer()).json() == {"status": "ok"}
    assert (await client.answer()).said() == "answer to 4"
    assert (await client.answer(has_body=False)).status == 200
    assert (await client.answer()).status == 404
    assert (await client.answer()).said() == "answer to 7"
    assert (await client.answer()).said() == "answer to 8"


async def test_a_request_sent_while_a_stream_runs_is_answered_behind_it(upstream: FakeUpstream, client: Client) -> None:
    may_go_on = asyncio.Event()

    async def slow(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(_EVENTS[0] + _EVENTS[1])
        await may_go_on.wait()
        await wire.chunk(_EVENTS[2] + _EVENTS[3] + usage() + DONE)
        await wire.end()

    upstream.plays(slow, echo)
    client.send(chat(stream=True))
    begun = await client.heard(_EVENTS[1])
    client.send(chat("next"))
    may_go_on.set()
    rest = await client.heard(b"\r\n0\r\n\r\n")
    assert b"next" not in begun + rest
    assert (await client.answer()).said() == "answer to next"


async def test_a_client_that_leaves_leaves_also_what_it_asked_behind(
    upstream: FakeUpstream, proxy: Proxy, client: Client
) -> None:
    silence = Silence(*_EVENTS[:2])
    upstream.plays(silence, answer())
    client.send(chat("first", stream=True) + chat("second"))
    await client.heard(_EVENTS[1])
    client.reset()
    await silence.is_left()

    assert (await proxy.ledger.next())["status"] == "cancelled"
    assert await proxy.ask() == COMPLETION
    assert [asked.json()["messages"][0]["content"] for asked in upstream.requests] == ["first", "Hi"]


# ---------------------------------------------------------------------- how a request arrives


@pytest.mark.parametrize("wants_stream", [True, False])
async def test_a_request_may_come_byte_by_byte(upstream: FakeUpstream, client: Client, wants_stream: bool) -> None:
    upstream.plays(echo)
    await client.send_slowly(chat("slow", stream=wants_stream))
    assert (await client.answer()).said() == "answer to slow"
    await client.send_slowly(
        request(_CHAT, _CHUNKED) + _in_chunks(question("slower")[:20], question("slower")[20:]) + request("GET /health")
    )
    assert (await client.answer()).said() == "answer to slower"
    assert (await client.answer()).status == 200


async def test_a_long_body_in_many_reads_arrives_whole(upstream: FakeUpstream, client: Client) -> None:
    upstream.plays(answer())
    body = question("".join(f"word {number} " for number in range(20_000)))
    client.send(request(_CHAT, f"Content-Length: {len(body)}"))
    for start in range(0, len(body), 1000):
        client.send(body[start : start + 1000])
        await asyncio.sleep(0)
    assert (await client.answer()).status == 200
    assert upstream.requests[0].body == body


@pytest.mark.parametrize(
    "framed",
    [
        _in_chunks(question()),
        _in_chunks(question()[:1], question()[1:]),
        _in_chunks(*(question()[place : place + 1] for place in range(len(question())))),
        _in_chunks(question()).replace(b"\r\n", b";name=value;other=\"quoted; text\"\r\n", 1),
        _in_chunks(question())[:-2] + b"X-Trailer: 1\r\nX-Other: 2\r\n\r\n",
        b"00000" + _in_chunks(question()),
        _in_chunks(question()).replace(b"%x" % len(question()), b"%X" % len(question())),
    ],
    ids=["one", "two", "one each byte", "extensions", "trailers", "zeros", "capitals"],
)  # fmt: skip
async def test_a_body_in_chunks_reaches_the_upstream_with_its_length(
    upstream: FakeUpstream, client: Client, framed: bytes
) -> None:
    """RFC 9112 §7.1."""
    upstream.plays(echo)
    client.send(request(_CHAT, _CHUNKED) + framed)
    assert (await client.answer()).said() == "answer to Hi"
    assert upstream.requests[0].body == question()
    assert upstream.requests[0].headers["content-length"] == str(len(question()))
    assert "transfer-encoding" not in upstream.requests[0].headers
    await _is_of_use(client)


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(upstream: FakeUpstream, client: Client) -> None:
    """RFC 9110 §10.1.1."""
    upstream.plays(echo)
    for path in ("/v1/chat/completions", "/v1/other"):
        client.send(request(f"POST {path}", "Expect: 100-continue", f"Content-Length: {len(question())}"))
        assert (await client.heard(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        client.send(question())
        assert (await client.answer()).said() == "answer to Hi"
    await _is_of_use(client)


async def test_a_client_that_does_not_wait_to_be_told_is_answered_all_the_same(
    upstream: FakeUpstream, client: Client
) -> None:
    upstream.plays(echo)
    client.send(chat("Hi", "Expect: 100-continue"))
    assert (await client.answer()).said() == "answer to Hi"


async def test_an_http_1_0_client_is_never_told_to_go_on(upstream: FakeUpstream, client: Client) -> None:
    upstream.plays(echo)
    client.send(chat("Hi", "Expect: 100-continue", version="1.0"))
    assert (await client.answer()).said() == "answer to Hi"


async def test_an_expectation_that_nobody_knows_is_a_417(upstream: FakeUpstream, client: Client) -> None:
    client.send(chat("Hi", "Expect: 200-maybe"))
    assert (await client.answer()).status == 417
    assert upstream.requests == []


@pytest.mark.parametrize("wants_stream", [True, False])
async def test_a_client_that_closes_its_half_of_the_connection_has_left(
    upstream: FakeUpstream, proxy: Proxy, client: Client, wants_stream: bool
) -> None:
    """The FIN of a program that was ended looks the same as one that only says that no more requests come, and for the
    first the upstream would go on generating: so it is taken for the first, as nginx does (`proxy_ignore_client_abort`,
    https://nginx.org/en/docs/http/ngx_http_proxy_module.html)."""
    silence = Silence(head=False)
    upstream.plays(silence)
    client.send(chat("Hi", stream=wants_stream))
    await silence.is_heard()
    client.send_end()
    assert await client.rest() == b""
    await silence.is_left()
    assert (await proxy.ledger.next())["status"] == "cancelled"


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate"])
async def test_a_packed_body_is_unpacked(upstream: FakeUpstream, client: Client, coding: str) -> None:
    packed = zlib.compress(question()) if coding == "deflate" else gzip.compress(question())
    upstream.plays(echo)
    client.send(request(_CHAT, f"Content-Encoding: {coding}", body=packed))
    assert (await client.answer()).said() == "answer to Hi"
    assert upstream.requests[0].body == question()
    assert "content-encoding" not in upstream.requests[0].headers


async def test_a_body_that_unpacks_to_more_than_is_allowed_is_refused(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"max_body_mb": 0.5})
    client = await Client.to(proxy.port)
    client.send(request(_CHAT, "Content-Encoding: gzip", body=gzip.compress(b"x" * 50_000_000)))
    assert (await client.answer()).status == 413
    assert upstream.requests == []
    client.close()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_a_body_that_cannot_be_unpacked_is_the_clients_fault(
    upstream: FakeUpstream, proxy: Proxy, client: Client, coding: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.send(request(f"POST {path}", f"Content-Encoding: {coding}", body=b"not packed at all"))
    assert (await client.answer()).status in (400, 415)
    await client.rest()
    assert caplog.messages == []
    assert (await proxy.ledger.next())["status"] == "client_error"
    assert upstream.requests == []


# ---------------------------------------------------------------------- what is refused


_HIDDEN = chat("hidden")
_LENGTH = f"Content-Length: {len(question())}"

_UNSOUND = {
    "a length and chunks": request(_CHAT, _LENGTH, _CHUNKED) + _in_chunks(question()),
    "chunks and a length": request(_CHAT, _CHUNKED, _LENGTH) + _in_chunks(question()),
    "a length of nothing, and chunks": request(_CHAT, "Content-Length: 0", _CHUNKED) + _in_chunks(question()),
    "two lengths": request(_CHAT, _LENGTH, "Content-Length: 3") + question(),
    "a list of lengths": request(_CHAT, f"{_LENGTH}, {len(question())}") + question(),
    "a negative length": request(_CHAT, "Content-Length: -1") + question(),
    "a length with a sign": request(_CHAT, f"Content-Length: +{len(question())}") + question(),
    "a length in hexadecimal": request(_CHAT, "Content-Length: 0x10") + question(),
    "a length beyond 64 bits": request(_CHAT, "Content-Length: 99999999999999999999") + question(),
    "no length in the length": request(_CHAT, "Content-Length:") + question(),
    "chunked twice": request(_CHAT, "Transfer-Encoding: chunked, chunked") + _in_chunks(question()),
    "chunked, but not last": request(_CHAT, "Transfer-Encoding: chunked, gzip") + _in_chunks(question()),
    "a coding nobody knows": request(_CHAT, "Transfer-Encoding: xchunked") + _in_chunks(question()),
    "a coding behind a control character": request(_CHAT, "Transfer-Encoding: \x0bchunked") + _in_chunks(question()),
    "a bad chunk size": request(_CHAT, _CHUNKED) + b"zz\r\n" + question(),
    "a negative chunk size": request(_CHAT, _CHUNKED) + b"-5\r\n" + question(),
    "a chunk size beyond 64 bits": request(_CHAT, _CHUNKED) + b"1" + b"0" * 16 + b"\r\n" + question(),
    "a chunk that is longer than it says": request(_CHAT, _CHUNKED) + b"3\r\n" + question(),
    "white space before the colon": request(_CHAT, "X-A : b", _LENGTH) + question(),
    "a folded header": request(_CHAT, "X-A: b\r\n c", _LENGTH) + question(),
    "a header without a name": request(_CHAT, ": b", _LENGTH) + question(),
    "a header without a colon": request(_CHAT, "X-A", _LENGTH) + question(),
    "NUL in a header": request(_CHAT, "X-A: a\0b", _LENGTH) + question(),
    "a bare CR in a header": request(_CHAT, "X-A: a\rb", _LENGTH) + question(),
    "line ends without CR": (request(_CHAT, _LENGTH)).replace(b"\r\n", b"\n") + question(),
    "no host": b"POST /v1/chat/completions HTTP/1.1\r\n%b\r\n\r\n%b" % (_LENGTH.encode(), question()),
    "two hosts": request(_CHAT, "Host: other", _LENGTH) + question(),
    "a version nobody knows": request(f"{_CHAT} HTTP/3.7", _LENGTH) + question(),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "a header of 100 KB": request(_CHAT, "X-A: " + "x" * 100_000, _LENGTH) + question(),
    "a path of 100 KB": request(f"{_CHAT}?{'x' * 100_000}", _LENGTH) + question(),
    "1,000 headers": request(_CHAT, *["X-A: b"] * 1000, _LENGTH) + question(),
    "words": b"Hello, is anybody there?\r\n\r\n",
}


@pytest.mark.parametrize("words", _UNSOUND.values(), ids=_UNSOUND.keys())
@pytest.mark.parametrize("comes", ["first", "behind an answer"])
async def test_what_is_unsound_is_refused_and_nothing_behind_it_is_heard(
    upstream: FakeUpstream,
    proxy: Proxy,
    client: Client,
    words: bytes,
    comes: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RFC 9112 §2.2, §3, §5, §6 and §7; RFC 9110 §5.5."""
    if comes == "behind an answer":
        await _is_of_use(client)
    client.send(words + _HIDDEN)
    rest = await client.rest()
    # Where we close while more still comes in, TCP may take the answer back (RFC 9112 §9.6).
    assert rest == b"" or rest.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
    assert b"answer to" not in rest
    if rest:
        head, _, body = rest.partition(b"\r\n\r\n")
        assert b"\r\nServer: headwater/" in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert caplog.messages == [], "it is no failure of ours"
    async with proxy.get("/health") as response:
        assert response.status == 200
    assert upstream.requests == []


_BAD_CHUNKS = {
    "a bad chunk size": b"zz\r\n",
    "a negative chunk size": b"-5\r\n",
    "a chunk size beyond 64 bits": b"1" + b"0" * 16 + b"\r\n",
    "a chunk that is longer than it says": b"3\r\n" + question(),
    "line ends without CR": _in_chunks(question()).replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("words", _BAD_CHUNKS.values(), ids=_BAD_CHUNKS.keys())
async def test_a_bad_chunk_that_comes_late_is_refused_as_well(
    upstream: FakeUpstream, client: Client, words: bytes
) -> None:
    client.send(request(_CHAT, "Expect: 100-continue", _CHUNKED))
    await client.heard(b"100 Continue\r\n\r\n")
    client.send(words + _HIDDEN)
    rest = await client.rest()
    assert b"answer to" not in rest
    assert upstream.requests == []


_SHORT = {
    "a body": request(_CHAT, "Content-Length: 1000") + question(),
    "a chunk": request(_CHAT, _CHUNKED) + _in_chunks(question())[:30],
    "the last chunk": request(_CHAT, _CHUNKED) + _in_chunks(question())[:-2],
    "a head": chat()[:60],
    "a first line": chat()[:10],
}


@pytest.mark.parametrize("words", _SHORT.values(), ids=_SHORT.keys())
async def test_a_request_that_is_cut_short_is_no_request(
    upstream: FakeUpstream, proxy: Proxy, client: Client, words: bytes
) -> None:
    client.send(words)
    client.send_end()
    rest = await client.rest()
    assert rest == b"" or rest.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
    assert await proxy.stream()
    assert (await proxy.ledger.next())["status"] == "ok"
    assert len(upstream.requests) == 1


async def test_garbage_behind_a_request_takes_nothing_from_its_answer(upstream: FakeUpstream, client: Client) -> None:
    asked = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await asked.wait()
        await stream(*_EVENTS, usage())(request, wire)

    upstream.plays(play)
    client.send(chat(stream=True))
    await upstream.asked(1)
    client.send(b"\x00garbage\r\n\r\n")
    asked.set()
    assert (await client.answer()).said() == "Hello there"
    rest = await client.rest()
    assert rest == b"" or rest.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize("headers", [["X-A: " + "x" * 4000], ["X-A: b"] * 60, ["Cookie: " + "x" * 4000] * 3])
async def test_headers_that_are_merely_long_pass(upstream: FakeUpstream, client: Client, headers: list[str]) -> None:
    upstream.plays(echo)
    client.send(chat("Hi", *headers))
    assert (await client.answer()).said() == "answer to Hi"


_HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "empty lines before": lambda asked: b"\r\n\r\n" + asked,
    "the whole URL": lambda asked: asked.replace(b" /v1", b" http://proxy/v1", 1),
    "names in capitals": lambda asked: asked.replace(b"Content-Length", b"CONTENT-LENGTH"),
    "no space behind the colon": lambda asked: asked.replace(b": ", b":", 2),
    "white space around a value": lambda asked: asked.replace(b"Host: localhost", b"Host: \t localhost \t "),
    "a value beyond ASCII": lambda asked: asked.replace(b"\r\n", b"\r\nX-A: \xe9\xff\r\n", 1),
    "an upgrade that is not served": lambda asked: asked.replace(
        b"\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n", 1
    ),
}


@pytest.mark.parametrize("change", _HARMLESS.values(), ids=_HARMLESS.keys())
async def test_what_is_merely_unusual_is_served(
    upstream: FakeUpstream, client: Client, change: Callable[[bytes], bytes]
) -> None:
    """RFC 9112 §2.2, §3.2.2, §5; RFC 9110 §5.5, §7.8."""
    upstream.plays(echo)
    client.send(change(chat("Hi")))
    assert (await client.answer()).said() == "answer to Hi"
    await _is_of_use(client)
