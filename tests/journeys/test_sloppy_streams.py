"""Upstreams stream in many ways. Whatever they play, the client reads one form.

`read_strictly` is the client: it takes normal form and nothing else, so every test here asserts that form too.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    chunk,
    event,
    finish,
    role,
    stream,
    text,
    usage,
)

PING = ": ping"
_ENVELOPE = ("id", "object", "created", "model")


@dataclass
class Seen:
    """What a strict client has read: the chunks, and how the stream ended."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    is_done: bool = False
    pings: int = 0

    def text(self, index: int = 0, member: str = "content") -> str:
        deltas = [choice["delta"] for part in self.chunks for choice in part["choices"] if choice["index"] == index]
        return "".join(delta.get(member) or "" for delta in deltas)


def read_strictly(body: bytes, *, wants_usage: bool = False) -> Seen:
    """Read a streamed answer as the pickiest of clients would: anything that is not normal form fails the test."""
    assert body.endswith(b"\n\n")
    assert b"\r" not in body
    seen = Seen()
    roles: set[int] = set()
    finished: set[int] = set()
    calls: set[tuple[int, int]] = set()
    for raw in body[:-2].decode().split("\n\n"):
        assert not seen.is_done, f"behind [DONE]: {raw!r}"
        assert seen.error is None, f"behind the error: {raw!r}"
        if raw == PING:
            seen.pings += 1
            continue
        assert raw.startswith("data: "), raw
        assert "\n" not in raw, raw
        if raw == "data: [DONE]":
            seen.is_done = True
            continue
        value = json.loads(raw.removeprefix("data: "))
        if "error" in value:
            assert value["error"].keys() >= {"message", "type", "param", "code"}
            seen.error = value["error"]
            continue
        assert all(value[name] for name in ("id", "model"))
        assert value["object"] == "chat.completion.chunk"
        assert isinstance(value["created"], int)
        assert not seen.chunks or not seen.chunks[-1].get("usage"), "usage is last"
        for choice in value["choices"]:
            _check_choice(choice, roles, finished, calls)
        if value.get("usage") is not None:
            assert wants_usage
            assert value["choices"] == []
        seen.chunks.append(value)
    assert seen.is_done == (seen.error is None)
    return seen


def _check_choice(choice: dict[str, Any], roles: set[int], finished: set[int], calls: set[tuple[int, int]]) -> None:
    index, delta = choice["index"], choice["delta"]
    assert ("role" in delta) == (index not in roles), "the role stands in the first delta, and there only"
    roles.add(index)
    for call in delta.get("tool_calls", ()):
        place = (index, call["index"])
        assert ("id" in call) == (place not in calls), "a call's id is said once"
        assert ("name" in call["function"]) == (place not in calls), "a call's name is said once"
        calls.add(place)
    if choice["finish_reason"] is not None:
        assert choice["finish_reason"]
        assert index not in finished
        finished.add(index)


def values(*events: bytes) -> list[dict[str, Any]]:
    return [json.loads(raw.removeprefix(b"data: ")) for raw in events]


def written(*pieces: bytes, content_type: str = "text/event-stream", coding: str = "identity") -> Play:
    """Bytes as they are, each piece in a write of its own, then the end of the body."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type=content_type, content_encoding=coding)
        for piece in pieces:
            await wire.chunk(piece)
        await wire.end()

    return play


# ---------------------------------------------------------------------- framing

ANSWER = (role(), text("Hel"), text("lo ✓ \u2028\u0085"), text("!"), finish())
NORMAL = b"".join(ANSWER) + DONE

# What upstreams play: they tell their usage as well, which the client has not asked for.
PLAYED = (*ANSWER, usage())
SENT = b"".join(PLAYED) + DONE


def singly(data: bytes) -> list[bytes]:
    return [data[place : place + 1] for place in range(len(data))]


def in_several_lines(raw: bytes) -> bytes:
    return raw.replace(b',"', b',\ndata: "')


def between(separator: bytes) -> bytes:
    return separator + separator.join([*PLAYED, DONE]) + separator


FRAMINGS = {
    # https://github.com/ax-llm/ax/issues/622
    "lines that end in CRLF": [SENT.replace(b"\n", b"\r\n")],
    "lines that end in CR": [SENT.replace(b"\n", b"\r")],
    "a CRLF cut in two": SENT.replace(b"\n", b"\r\n").replace(b"\r", b"\r\x00").split(b"\x00"),
    "another line end for each event": [
        role().replace(b"\n", b"\r\n"),
        text("Hel").replace(b"\n", b"\r"),
        *PLAYED[2:4],
        finish().replace(b"\n\n", b"\n\r\n"),
        usage().replace(b"\n\n", b"\r\r\n"),
        DONE.replace(b"\n\n", b"\r\n\n"),
    ],
    # https://github.com/xberg-io/liter-llm/issues/152, https://github.com/fastrepl/anarlog/issues/6872
    "one byte after the other": singly(SENT),
    "CRLF, one byte after the other": singly(SENT.replace(b"\n", b"\r\n")),
    # https://github.com/gatling/gatling/issues/3134
    "everything in one write": [SENT],
    "two events in a write": [b"".join(PLAYED[:2]), b"".join(PLAYED[2:4]), b"".join(PLAYED[4:]), DONE],
    "writes that end in the middle of the next event": [SENT[:200], SENT[200:500], SENT[500:]],
    # https://github.com/numman-ali/opencode-openai-codex-auth/issues/96
    "no space behind the colon": [SENT.replace(b"data: ", b"data:")],
    "an event in several data lines": [in_several_lines(raw) for raw in PLAYED] + [DONE],
    # https://github.com/deepnoodle-ai/dive/issues/206
    "comments before, between and behind": [between(b": keep-alive\n\n")],
    "comments inside of events": [SENT.replace(b"data: ", b":\n: hold on\ndata: ")],
    # https://github.com/mnfst/llm-gateway/issues/2053: sent on as data, it kills the official Node SDK
    "OpenRouter's comments while it waits": [b": OPENROUTER PROCESSING\n\n"] * 3 + [*PLAYED, DONE],
    "blank lines in plenty": [between(b"\n\n\n")],
    "a byte order mark": [b"\xef\xbb\xbf" + SENT],
    "a byte order mark cut in two": [b"\xef", b"\xbb\xbf" + SENT],
    # https://github.com/inference-gateway/inference-gateway/issues/578
    "no blank line behind [DONE]": [SENT[:-2]],
    "no blank line behind the finish, and no [DONE]": [b"".join(ANSWER)[:-2]],
    "no [DONE]": [b"".join(ANSWER)],
    "[DONE] twice": [SENT + DONE],
    "events behind [DONE]": [SENT, text("ghost"), event({"error": {"message": "late"}})],
    "events behind [DONE], in the same write": [SENT + text("ghost") + b"data: more\n\n"],
    # https://github.com/tmc/langchaingo/issues/1366
    "id, event and retry lines": [SENT.replace(b"data: ", b"id: 7\nevent: message\nretry: 10\ndata: ")],
    "an event line without a name": [SENT.replace(b"data: ", b"event:\ndata: ")],
    "fields that nobody knows": [SENT.replace(b"data: ", b"colour: blue\nnothing\ndata: ")],
    "events without data": [between(b"event: ping\n\n"), b"id: 9\n\n"],
    "data lines with nothing in them": [between(b"data:\n\n")],
    # Other gateways end the stream here, though the text around it is good.
    "malformed JSON in the middle": [*PLAYED[:3], b'data: {"choices": [{"delta"\n\n', *PLAYED[3:], DONE],
    "JSON that is no object in the middle": [*PLAYED[:3], b"data: 17\n\ndata: null\n\n", *PLAYED[3:], DONE],
    "raw text in the middle": [*PLAYED[:3], b"data: working on it\n\n", *PLAYED[3:], DONE],
    "white space around [DONE]": [*PLAYED, b"data:  [DONE] \n\n"],
}


@pytest.mark.parametrize("pieces", FRAMINGS.values(), ids=FRAMINGS.keys())
async def test_however_the_stream_is_framed_the_client_gets_the_same_bytes(
    upstream: FakeUpstream, proxy: Proxy, pieces: list[bytes]
) -> None:
    """WHATWG HTML §9.2.6 allows all of these (https://html.spec.whatwg.org/multipage/server-sent-events.html), or
    upstreams send them all the same; most clients read only one."""
    upstream.plays(written(*pieces))

    body = await proxy.stream()

    assert body == NORMAL
    assert read_strictly(body).text() == "Hello ✓ \u2028\u0085!"
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["error"]) == ("relay", "ok", None)
    tells_usage = b'"usage"' in b"".join(pieces)
    assert row["estimated"] is not tells_usage
    assert not tells_usage or (row["prompt_tokens"], row["completion_tokens"]) == (7, 2)


async def test_a_line_of_a_megabyte_passes_whole(upstream: FakeUpstream, proxy: Proxy) -> None:
    """aiohttp's iteration over lines fails at 128 KiB with "Chunk too big"
    (https://github.com/aio-libs/aiohttp/issues/4453); images in base64 are longer than that."""
    long = text("0123456789abcdef" * 65536)
    upstream.plays(stream(role(), text("x"), long, text("y"), finish(), usage()))

    assert await proxy.stream() == role() + text("x") + long + text("y") + finish() + DONE

    assert (await proxy.ledger.next())["status"] == "ok"


async def test_an_event_that_never_ends_is_given_up(upstream: FakeUpstream, start: Start) -> None:
    """A stream without line ends must not fill the memory (https://github.com/NousResearch/hermes-agent/issues/58471)."""
    proxy = await start(streaming={"max_answer_bytes": 65536})

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hi"))
        await wire.chunk(b"data: ")
        while True:
            await wire.chunk(b"x" * 4096)

    upstream.plays(play)

    seen = read_strictly(await proxy.stream())

    assert seen.text() == "Hi"
    assert seen.error is not None
    assert seen.error["code"] == "answer_too_large"
    row = await proxy.ledger.next()
    assert (row["status"], row["error"]) == ("upstream_error", "answer_too_large")


@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", "application/octet-stream", "text/EVENT-stream"])
async def test_a_stream_is_known_by_its_bytes_where_its_content_type_does_not_say(
    upstream: FakeUpstream, proxy: Proxy, content_type: str
) -> None:
    """https://github.com/vllm-project/vllm-ascend/issues/6985"""
    upstream.plays(written(*PLAYED, DONE, content_type=content_type))

    assert await proxy.stream() == NORMAL

    assert (await proxy.ledger.next())["mode"] == "relay"


@pytest.mark.parametrize("first", [b": OPENROUTER PROCESSING\n\n", b"\n\n", b"\xef\xbb\xbf", b"event: x\n"])
async def test_an_unlabelled_stream_is_known_whatever_its_first_line_is(
    upstream: FakeUpstream, proxy: Proxy, first: bytes
) -> None:
    upstream.plays(written(first + SENT, content_type="text/plain"))

    assert await proxy.stream() == NORMAL


@pytest.mark.parametrize("first", [b"d", b"dat", b"\n", b"\xef\xbb", b"\r\n\r\n: "])
async def test_an_unlabelled_stream_is_known_when_its_first_line_comes_in_pieces(
    upstream: FakeUpstream, proxy: Proxy, first: bytes
) -> None:
    rest = {b"d": SENT[1:], b"dat": SENT[3:], b"\xef\xbb": b"\xbf" + SENT}.get(first, b"\n\n" + SENT)

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/plain")
        await wire.chunk(first)
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, later.set)
        await later.wait()
        await wire.chunk(rest)
        await wire.end()

    upstream.plays(play)

    assert await proxy.stream() == NORMAL


async def test_a_compressed_stream_is_unpacked_although_none_was_asked_for(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """https://github.com/rossoctl/cortex/issues/864"""
    packed = gzip.compress(SENT)
    upstream.plays(written(packed[:50], packed[50:], coding="gzip"))

    async with proxy.chat(stream=True) as response:
        assert "Content-Encoding" not in response.headers
        assert await response.read() == NORMAL
    assert upstream.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(SENT[:300]) + gzip.compress(SENT[300:])),
        ("x-gzip", gzip.compress(SENT)),
        ("deflate", zlib.compress(SENT)),
    ],
    ids=["gzip in two members", "x-gzip", "deflate"],
)
async def test_other_ways_to_compress_are_unpacked_too(
    upstream: FakeUpstream, proxy: Proxy, coding: str, packed: bytes
) -> None:
    """A gzip file may have several members (RFC 1952 §2.2)."""
    upstream.plays(written(*singly(packed), coding=coding))

    assert await proxy.stream() == NORMAL


@pytest.mark.parametrize(("coding", "packed"), [("br", b"whatever"), ("gzip", b"this is no gzip"), ("zstd", b"x")])
async def test_what_cannot_be_unpacked_is_an_error(
    upstream: FakeUpstream, proxy: Proxy, coding: str, packed: bytes
) -> None:
    upstream.plays(written(packed, coding=coding))

    async with asyncio.timeout(10), proxy.chat(stream=True) as response:
        assert response.status == 502
    assert (await proxy.ledger.next())["status"] == "upstream_error"


# ---------------------------------------------------------------------- the HTTP below

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def in_chunks(data: bytes, size: int, extension: bytes = b"") -> bytes:
    parts = [data[place : place + size] for place in range(0, len(data), size)]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)


def in_the_raw(*pieces: bytes, closes: bool) -> Play:
    """Bytes on the connection, without any framing but their own."""

    async def play(request: Received, wire: Wire) -> None:
        for piece in pieces:
            await wire.send(piece)
        if closes:
            await wire.close()

    return play


HTTP: dict[str, Play] = {
    "a body that ends with the connection": in_the_raw(HEAD + b"\r\n", SENT, closes=True),
    "HTTP/1.0": in_the_raw(HEAD.replace(b"1.1", b"1.0") + b"\r\n" + SENT, closes=True),
    "a length": in_the_raw(HEAD + b"content-length: %d\r\n\r\n" % len(SENT), SENT, closes=False),
    "a length, one byte after the other": in_the_raw(
        *singly(HEAD + b"content-length: %d\r\n\r\n" % len(SENT) + SENT), closes=False
    ),
    "chunks that end anywhere": in_the_raw(CHUNKED, in_chunks(SENT, 7), b"0\r\n\r\n", closes=False),
    "chunks, one byte after the other": in_the_raw(
        *singly(CHUNKED + in_chunks(SENT, 100) + b"0\r\n\r\n"), closes=False
    ),
    "chunks with extensions": in_the_raw(CHUNKED, in_chunks(SENT, 99, b";a=b"), b"0\r\n\r\n", closes=False),
    "chunks with trailers": in_the_raw(CHUNKED, in_chunks(SENT, 99), b"0\r\nx-t: 1\r\n\r\n", closes=False),
    "all in one write": in_the_raw(CHUNKED + in_chunks(SENT, 99) + b"0\r\n\r\n", closes=False),
    "early hints": in_the_raw(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n",
        CHUNKED + in_chunks(SENT, 99) + b"0\r\n\r\n",
        closes=False,
    ),
    "no more requests": in_the_raw(
        CHUNKED.replace(b"chunked", b"chunked\r\nconnection: close"),
        in_chunks(SENT, 99) + b"0\r\n\r\n",
        closes=True,
    ),
}


@pytest.mark.parametrize("play", HTTP.values(), ids=HTTP.keys())
async def test_however_the_body_is_framed_the_client_gets_the_same_bytes(
    upstream: FakeUpstream, proxy: Proxy, play: Play
) -> None:
    """RFC 9112 §6 and §7."""
    upstream.plays(play)

    for _ in range(2):
        assert await proxy.stream() == NORMAL
        assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_body_that_ends_with_the_connection_in_mid_answer_is_a_break(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """No length tells that something is missing; the missing finish reason does."""
    upstream.plays(in_the_raw(HEAD + b"\r\n", role() + text("Hi"), closes=True))

    seen = read_strictly(await proxy.stream())

    assert seen.text() == "Hi"
    assert seen.error is not None


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 10\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 10\r\ncontent-length: 20\r\n",
        b"content-length: -1\r\n",
        b"x: " + b"y" * 300_000 + b"\r\n",
    ],
    ids=["a length and chunks", "two lengths", "a negative length", "a head without end"],
)
async def test_framing_that_can_be_read_in_two_ways_is_refused(
    upstream: FakeUpstream, proxy: Proxy, head: bytes
) -> None:
    """RFC 9112 §6.3: what follows might be taken for another answer."""
    upstream.plays(in_the_raw(HEAD + head + b"\r\n" + in_chunks(SENT, 99) + b"0\r\n\r\n", closes=True))

    async with asyncio.timeout(10), proxy.chat(stream=True) as response:
        assert response.status == 502


async def test_bytes_behind_an_answer_are_not_the_next_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    smuggled = in_the_raw(
        CHUNKED + in_chunks(SENT, 99) + b"0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nghost", closes=False
    )
    upstream.plays(smuggled, stream(*PLAYED))

    assert await proxy.stream() == NORMAL
    await proxy.ledger.next()
    assert await proxy.stream() == NORMAL
    assert (await proxy.ledger.next())["status"] == "ok"


# ---------------------------------------------------------------------- characters


async def test_bytes_that_are_no_utf_8_are_mended_in_the_text(upstream: FakeUpstream, proxy: Proxy) -> None:
    """A token that holds half a character; the official Python SDK decodes strictly and raises
    (https://github.com/openai/openai-python/blob/main/src/openai/_streaming.py)."""
    broken = text("caf@").replace(b"@", b"\xc3")
    upstream.plays(stream(role(), broken, text(" au lait"), finish()))

    seen = read_strictly(await proxy.stream())

    assert seen.text() == "caf\ufffd au lait"
    row = await proxy.ledger.next()
    assert (row["status"], row["estimated"]) == ("ok", True)


async def test_half_a_surrogate_pair_passes(upstream: FakeUpstream, proxy: Proxy) -> None:
    """An emoji cut in two by the upstream's tokens: both halves arrive, and join at the client."""
    halves = [text("@").replace(b"@", half) for half in (b"\\ud83d", b"\\ude00")]
    upstream.plays(stream(role(), *halves, finish()))

    assert await proxy.stream() == role() + b"".join(halves) + finish() + DONE

    row = await proxy.ledger.next()
    assert (row["status"], row["estimated"]) == ("ok", True)


# ---------------------------------------------------------------------- chunks


@dataclass(frozen=True)
class Case:
    """What the upstream plays and what the client then sees, in both cases before `[DONE]`."""

    played: tuple[bytes, ...]
    seen: tuple[bytes, ...]
    asked: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


def call(*, index: int | None = 0, arguments: Any = None, name: str | None = None, **members: Any) -> bytes:
    """An event with one delta of a tool call; what is None is not in it."""
    function = {"name": name, "arguments": arguments}
    value = {"index": index, **members, "function": {key: part for key, part in function.items() if part is not None}}
    return chunk({"tool_calls": [{key: part for key, part in value.items() if part is not None}]})


def head(index: int, call_id: str, name: str, arguments: str = "") -> bytes:
    return call(index=index, arguments=arguments, name=name, id=call_id, type="function")


def more(index: int, arguments: str) -> bytes:
    return call(index=index, arguments=arguments)


USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
LESS = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
ASKED = {"stream_options": {"include_usage": True}}
CHOICE: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": None}
WEATHER = (role(), head(0, "c1", "weather"), more(0, '{"city":'), more(0, '"Rome"}'), finish("tool_calls"))
TWO_CALLS = (
    role(),
    head(0, "c1", "weather"),
    more(0, '{"a":1}'),
    head(1, "c2", "time"),
    more(1, '{"b":'),
    more(1, "2}"),
    finish("tool_calls"),
)
FILTER = {"hate": {"filtered": False, "severity": "safe"}}

CASES = {
    # https://github.com/langfuse/langfuse/issues/2833
    "Azure's first event, with an empty id": Case(
        (chunk(id="", created=0, model="", object="", choices=[], prompt_filter_results=[FILTER]), *ANSWER),
        (chunk(created=0, choices=[], prompt_filter_results=[FILTER]), *ANSWER),
    ),
    # https://github.com/langchain-ai/langchain/issues/18977
    "Azure's late event, a choice without a delta": Case(
        (
            *ANSWER[:3],
            chunk(choices=[{"index": 0, "finish_reason": None, "content_filter_offsets": {"end": 4}}]),
            *ANSWER[3:],
        ),
        (
            *ANSWER[:3],
            chunk(choices=[{"index": 0, "finish_reason": None, "content_filter_offsets": {"end": 4}, "delta": {}}]),
            *ANSWER[3:],
        ),
    ),
    # https://github.com/ollama/ollama/issues/7626
    "Ollama's role in every delta": Case(
        (
            chunk({"role": "assistant", "content": "Hel"}),
            chunk({"role": "assistant", "content": "lo"}),
            chunk({"role": "assistant", "content": ""}, finish_reason="stop"),
        ),
        (chunk({"role": "assistant", "content": "Hel"}), text("lo"), chunk({"content": ""}, finish_reason="stop")),
    ),
    # https://github.com/MiniMax-AI/MiniMax-M2.5/issues/2
    "a role that is empty": Case(
        (chunk({"role": "", "content": "Hel"}), chunk({"role": "", "content": "lo"}), finish()),
        (chunk({"role": "assistant", "content": "Hel"}), text("lo"), finish()),
    ),
    "no role at all": Case((text("Hi"), finish()), (chunk({"content": "Hi", "role": "assistant"}), finish())),
    # https://github.com/BerriAI/litellm/issues/37781
    "choices that are null": Case((role(), chunk(choices=None), text("Hi"), finish()), ()),
    "a choice without an index": Case(
        (role(), chunk(choices=[{"delta": {"content": "Hi"}, "finish_reason": None}]), finish()),
        (role(), chunk(choices=[{"delta": {"content": "Hi"}, "finish_reason": None, "index": 0}]), finish()),
    ),
    "a delta that is null": Case(
        (role(), text("Hi"), chunk(choices=[{**CHOICE, "delta": None}]), finish()),
        (role(), text("Hi"), chunk(), finish()),
    ),
    "the whole message once more at the end": Case(
        (*ANSWER[:4], chunk(choices=[{"index": 0, "message": {"content": "Hello!"}, "finish_reason": "stop"}])),
        (*ANSWER[:4], chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])),
    ),
    "a whole message and nothing else": Case(
        (chunk(choices=[{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]),),
        (chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]),),
    ),
    # https://github.com/theopenco/llmgateway/issues/3545
    "text and finish in one chunk": Case(
        (chunk({"role": "assistant", "content": "Hi"}, finish_reason="stop"),),
        (chunk({"role": "assistant", "content": "Hi"}, finish_reason="stop"),),
    ),
    "a finish reason that is empty until the end": Case(
        (chunk({"role": "assistant", "content": "Hi"}, finish_reason=""), text("!"), finish()),
        (chunk({"role": "assistant", "content": "Hi"}), text("!"), finish()),
    ),
    "the finish reason twice": Case((role(), text("Hi"), finish(), finish()), (role(), text("Hi"), finish(), chunk())),
    "a vendor's event without choices": Case(
        (role(), text("Hi"), chunk(choices=[], vendor="x"), finish()),
        (role(), text("Hi"), chunk(choices=[], vendor="x"), finish()),
    ),
    "two choices, interleaved": Case(
        (
            role(0),
            role(1),
            text("a", 0),
            text("b", 1),
            text("c", 1),
            finish("stop", 1),
            text("d", 0),
            finish("length", 0),
        ),
        (
            role(0),
            role(1),
            text("a", 0),
            text("b", 1),
            text("c", 1),
            finish("stop", 1),
            text("d", 0),
            finish("length", 0),
        ),
        asked={"n": 2},
    ),
    "two choices in one event, one of them without its role": Case(
        (
            chunk(choices=[{**CHOICE, "delta": {"role": "assistant", "content": "a"}}, {**CHOICE, "index": 1}]),
            text("b", 1),
            finish(index=0),
            finish(index=1),
        ),
        (
            chunk(
                choices=[
                    {**CHOICE, "delta": {"role": "assistant", "content": "a"}},
                    {**CHOICE, "index": 1, "delta": {"role": "assistant"}},
                ]
            ),
            text("b", 1),
            finish(index=0),
            finish(index=1),
        ),
        asked={"n": 2},
    ),
    "one choice where two were asked": Case(ANSWER, ANSWER, asked={"n": 2}),
    "a tool call, as it should be": Case(WEATHER, WEATHER),
    "two tool calls, as they should be": Case(TWO_CALLS, TWO_CALLS),
    # https://github.com/ai-dynamo/dynamo/issues/4723
    "tool calls without an index": Case(
        (
            role(),
            call(index=None, id="c1", type="function", name="weather", arguments=""),
            call(index=None, arguments='{"a":1}'),
            call(index=None, id="c2", type="function", name="time", arguments=""),
            call(index=None, arguments='{"b":'),
            call(index=None, arguments="2}"),
            finish("tool_calls"),
        ),
        TWO_CALLS,
    ),
    # https://github.com/router-for-me/CLIProxyAPI/issues/5058
    "tool calls that are all on index 0": Case(
        (
            role(),
            head(0, "c1", "weather"),
            more(0, '{"a":1}'),
            head(0, "c2", "time"),
            more(0, '{"b":'),
            more(0, "2}"),
            finish("tool_calls"),
        ),
        TWO_CALLS,
    ),
    # https://github.com/jin-bo/agentao/issues/117
    "a tool call's id and name in every delta": Case(
        (
            role(),
            head(0, "c1", "weather"),
            head(0, "c1", "weather", '{"city":'),
            head(0, "c1", "weather", '"Rome"}'),
            finish("tool_calls"),
        ),
        (
            role(),
            head(0, "c1", "weather"),
            call(index=0, arguments='{"city":', type="function"),
            call(index=0, arguments='"Rome"}', type="function"),
            finish("tool_calls"),
        ),
    ),
    # https://github.com/earendil-works/pi/issues/8861
    "arguments on another index than their call": Case(
        (role(), head(0, "c1", "weather"), more(1, '{"city":'), more(1, '"Rome"}'), finish("tool_calls")), WEATHER
    ),
    "arguments that are an object": Case(
        (
            role(),
            call(index=0, id="c1", type="function", name="weather", arguments={"city": "Rome"}),
            finish("tool_calls"),
        ),
        (role(), head(0, "c1", "weather", '{"city":"Rome"}'), finish("tool_calls")),
    ),
    "a tool call without a type": Case(
        (role(), call(index=0, id="c1", name="weather", arguments="{}"), finish("tool_calls")),
        (role(), head(0, "c1", "weather", "{}"), finish("tool_calls")),
    ),
    # https://github.com/vercel/ai/issues/20537
    "an empty list of tool calls": Case(
        (role(), chunk({"reasoning": "Hm", "tool_calls": []}), chunk({"content": "Hi", "tool_calls": None}), finish()),
        (role(), chunk({"reasoning": "Hm"}), text("Hi"), finish()),
    ),
    # https://github.com/tensorzero/tensorzero/issues/5481: the figures add up already, and must not be added
    "usage on every chunk, not asked for": Case(
        (chunk({"role": "assistant", "content": "Hel"}, usage=LESS), chunk({"content": "lo"}, usage=USAGE), finish()),
        (chunk({"role": "assistant", "content": "Hel"}), text("lo"), finish()),
        row={"prompt_tokens": 7, "completion_tokens": 2, "estimated": False},
    ),
    "usage on every chunk, asked for": Case(
        (
            chunk({"role": "assistant", "content": "Hel"}, usage=LESS),
            chunk({"content": "lo"}, usage=USAGE),
            chunk({}, finish_reason="stop", usage=USAGE),
        ),
        (chunk({"role": "assistant", "content": "Hel"}), text("lo"), finish(), usage(7, 2)),
        asked=ASKED,
        row={"prompt_tokens": 7, "completion_tokens": 2, "estimated": False},
    ),
    # https://github.com/BerriAI/litellm/issues/35290
    "usage as OpenAI sends it, not asked for": Case(
        (*ANSWER, usage(7, 2)), ANSWER, row={"prompt_tokens": 7, "completion_tokens": 2, "estimated": False}
    ),
    "usage as OpenAI sends it, asked for": Case(
        (*ANSWER, usage(7, 2)), (*ANSWER, usage(7, 2)), asked=ASKED, row={"completion_tokens": 2, "estimated": False}
    ),
    "usage before the finish reason": Case(
        (role(), text("Hi"), usage(7, 2), finish()), (role(), text("Hi"), finish(), usage(7, 2)), asked=ASKED
    ),
    "a null until the usage comes": Case(
        (*tuple(raw.replace(b"}\n\n", b',"usage":null}\n\n') for raw in ANSWER), usage(7, 2)),
        (*tuple(raw.replace(b"}\n\n", b',"usage":null}\n\n') for raw in ANSWER), usage(7, 2)),
        asked=ASKED,
    ),
    # https://github.com/InsForge/InsForge/issues/2016
    "usage of zero tokens, which is a figure": Case(
        (*ANSWER, usage(7, 0)), (*ANSWER, usage(7, 0)), asked=ASKED, row={"completion_tokens": 0, "estimated": False}
    ),
    # https://github.com/langchain-ai/langchain-litellm/issues/56
    "Groq's usage": Case(
        (role(), text("Hi"), chunk({}, finish_reason="stop", x_groq={"id": "req", "usage": USAGE})),
        (role(), text("Hi"), chunk({}, finish_reason="stop", x_groq={"id": "req", "usage": USAGE}), usage(7, 2)),
        asked=ASKED,
        row={"prompt_tokens": 7, "completion_tokens": 2, "estimated": False},
    ),
    "usage with details, which stay": Case(
        (*ANSWER, chunk(choices=[], usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 1}})),
        (*ANSWER, chunk(choices=[], usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 1}})),
        asked=ASKED,
    ),
    "no usage, and none asked for": Case(ANSWER, ANSWER, row={"estimated": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_whatever_the_chunks_are_like_the_client_gets_them_in_normal_form(
    upstream: FakeUpstream, proxy: Proxy, case: Case
) -> None:
    says_of_usage = "estimated" in case.row or b'"usage"' in b"".join(case.played)
    upstream.plays(stream(*case.played, *(() if says_of_usage else (usage(),))))

    seen = read_strictly(await proxy.stream(**case.asked), wants_usage="stream_options" in case.asked)

    assert seen.is_done
    if case.seen:
        assert seen.chunks == values(*case.seen)
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("ok", 200)
    assert {name: row[name] for name in case.row} == case.row


UNREAD = {
    "reasoning_content, as DeepSeek has it": {"reasoning_content": "Hm"},
    "reasoning, as OpenRouter has it": {
        "reasoning": "Hm",
        "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}],
    },
    "a refusal": {"refusal": "I cannot"},
    "audio": {"audio": {"id": "a1", "data": "UklGRg==", "transcript": "Hi"}},
    "annotations": {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://example.org"}}]},
    "members that nobody knows": {"colour": {"of": ["the", None, 1.50, "sky"]}},
    "a function call of the old kind": {"function_call": {"name": "f", "arguments": "{}"}},
}


@pytest.mark.parametrize("delta", UNREAD.values(), ids=UNREAD.keys())
async def test_members_that_are_not_ours_pass_byte_for_byte(
    upstream: FakeUpstream, proxy: Proxy, delta: dict[str, Any]
) -> None:
    events = [role(), chunk(delta, service_tier="default", vendor=[1]), chunk(delta), text("Hi"), finish()]
    upstream.plays(stream(*events, usage()))

    assert await proxy.stream() == b"".join(events) + DONE


async def test_log_probabilities_pass_byte_for_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    probabilities = {"content": [{"token": "Hi", "logprob": -0.25, "bytes": [72, 105], "top_logprobs": []}]}
    events = [role(), chunk(choices=[{**CHOICE, "delta": {"content": "Hi"}, "logprobs": probabilities}]), finish()]
    upstream.plays(stream(*events, usage()))

    assert await proxy.stream(logprobs=True) == b"".join(events) + DONE


async def test_an_envelope_that_is_missing_is_filled_in_the_same_for_all_chunks(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    def bare(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return chunk(delta, finish_reason=finish_reason, id=None, object=None, created=None, model=None)

    upstream.plays(stream(bare({"role": "assistant"}), bare({"content": "Hi"}), bare({}, "stop")))

    seen = read_strictly(await proxy.stream())

    envelopes = {tuple(part[name] for name in _ENVELOPE) for part in seen.chunks}
    assert len(envelopes) == 1
    row = await proxy.ledger.next()
    assert envelopes.pop()[0] == f"chatcmpl-{row['id']}"
    assert seen.chunks[0]["model"] == "model-a"


async def test_usage_that_nobody_told_is_estimated_for_a_client_that_asked(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """https://github.com/tashfeenahmed/freellmapi/issues/686; the list of choices must be empty, not missing:
    https://github.com/BerriAI/litellm/issues/28735"""
    upstream.plays(stream(role(), text("Hello"), text(" there"), finish()))

    seen = read_strictly(await proxy.stream(**ASKED), wants_usage=True)

    last = seen.chunks[-1]
    assert last["choices"] == []
    assert last["id"] == "chatcmpl-up"
    assert last["usage"] == {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10, "estimated": True}
    row = await proxy.ledger.next()
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (8, 2, True)


@pytest.mark.parametrize(
    "played",
    [(*ANSWER, chunk(choices=[], usage={})), (*ANSWER[:4], chunk({}, finish_reason="stop", usage={}))],
    ids=["beside no choices", "on a chunk"],
)
async def test_an_empty_usage_says_nothing(upstream: FakeUpstream, proxy: Proxy, played: tuple[bytes, ...]) -> None:
    upstream.plays(stream(*played))

    plain = read_strictly(await proxy.stream())
    assert not any("usage" in part for part in plain.chunks)
    assert (await proxy.ledger.next())["estimated"] is True

    seen = read_strictly(await proxy.stream(**ASKED), wants_usage=True)
    assert seen.chunks[-1]["usage"]["estimated"] is True


# ---------------------------------------------------------------------- endings


def staying_open(*events: bytes) -> Play:
    """Events, and then silence on an open connection."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        if events:
            await wire.chunk(b"".join(events))
        await wire.gone()

    return play


async def test_a_stream_that_stays_open_behind_its_finish_reason_is_ended_for_the_client(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """Long before any idle timeout: the answer is whole."""
    upstream.plays(staying_open(*ANSWER))

    async with asyncio.timeout(10):
        assert await proxy.stream() == NORMAL

    assert (await proxy.ledger.next())["status"] == "ok"


@pytest.mark.parametrize(
    "streaming", [{}, {"heartbeat_interval_s": 0.01}, {"total_timeout_s": 0.3}], ids=["plain", "heartbeat", "total"]
)
async def test_a_stream_that_stays_open_leaves_time_to_estimate_its_usage(
    upstream: FakeUpstream, start: Start, streaming: dict[str, Any]
) -> None:
    """The time limit that ends the wait for more must not end what is done with what there is."""
    proxy = await start(streaming=streaming)
    upstream.plays(staying_open(*ANSWER))

    async with asyncio.timeout(10):
        seen = read_strictly(await proxy.stream(**ASKED), wants_usage=True)

    assert seen.error is None
    assert seen.chunks[-1]["usage"]["estimated"] is True
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_long_stream_that_stays_open_is_folded_for_a_client_that_wants_one_body(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(staying_open(role(), *[text("0123456789abcdef" * 4096)] * 4, finish(), usage()))

    async with asyncio.timeout(10):
        completion = await proxy.ask()

    assert len(completion["choices"][0]["message"]["content"]) == 4 * 65536
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_stream_that_stays_open_behind_done_does_not_hold_up_the_client(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(staying_open(*PLAYED, DONE))

    async with asyncio.timeout(10):
        assert await proxy.stream() == NORMAL

    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_connection_is_used_again_after_a_whole_stream(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/tensorzero/tensorzero/issues/5363"""
    async with proxy.get("/v1/models"):
        pass
    before = upstream.connections
    for _ in range(3):
        assert read_strictly(await proxy.stream()).text() == "Hello"
        await proxy.ledger.next()

    assert upstream.connections <= before + 1


async def test_done_without_a_finish_reason_is_an_answer_but_not_a_whole_one(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """https://github.com/gonka-ai/gonka/issues/1722; no finish reason is made up for it."""
    upstream.plays(stream(role(), text("Hi")))

    assert await proxy.stream() == role() + text("Hi") + DONE

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("incomplete", 200, None)


async def test_done_and_nothing_else_is_no_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role()))

    async with proxy.chat(stream=True) as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"

    assert (await proxy.ledger.next())["status"] == "upstream_error"


async def test_an_empty_stream_is_no_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/preloop/preloop/issues/121: otherwise a 200 with no bytes in it."""
    upstream.plays(written())

    async with proxy.chat(stream=True) as response:
        assert response.status == 502


def cut(how: str) -> Play:
    """Some tokens, and in the middle of the answer the connection breaks."""

    async def play(request: Received, wire: Wire) -> None:
        sent = role() + text("Hel") + text("lo")
        if how == "short of its content length":
            await wire.head(content_type="text/event-stream", content_length="5000")
            await wire.send(sent)
            await wire.close()
            return
        await wire.head(content_type="text/event-stream")
        await wire.chunk(sent)
        match how:
            case "a tidy end":
                await wire.end()
            case "a tidy end in the middle of an event":
                await wire.chunk(b'data: {"id":"chatcmpl-up","choices":[{"index"')
                await wire.end()
            case "a closed connection":
                await wire.close()
            case "a reset":
                await wire.reset()

    return play


@pytest.mark.parametrize(
    "how",
    [
        "a tidy end",
        "a tidy end in the middle of an event",
        "a closed connection",
        "a reset",
        "short of its content length",
    ],
)
async def test_a_break_in_mid_answer_is_an_error_behind_the_tokens_that_came(
    upstream: FakeUpstream, proxy: Proxy, how: str
) -> None:
    """Never a tidy end: https://github.com/Portkey-AI/gateway/issues/1797; to clients that is a whole answer, or a
    reason to ask for ever (https://github.com/anomalyco/opencode/issues/43379)."""
    upstream.plays(cut(how))

    async with asyncio.timeout(20):
        seen = read_strictly(await proxy.stream())

    assert seen.text() == "Hello"
    assert seen.error is not None
    assert (seen.error["code"], seen.error["type"]) == ("upstream_broke", "upstream_error")
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "upstream_broke")
    assert (row["completion_tokens"], row["estimated"]) == (1, True)


async def test_malformed_chunks_in_mid_answer_are_a_break_too(upstream: FakeUpstream, proxy: Proxy) -> None:
    """The HTTP parser stops at them and tells nobody: the call must end all the same, and long before its time limits."""
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await seen.wait()
        await wire.send(b"no-size\r\nwhatever\r\n")
        await wire.gone()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        body = await response.content.readany()
        seen.set()
        body += await response.content.read()

    answer = read_strictly(body)
    assert answer.text() == "Hello"
    assert answer.error is not None
    assert answer.error["code"] == "upstream_broke"
    row = await proxy.ledger.next()
    assert (row["status"], row["error"], row["estimated"]) == ("upstream_error", "upstream_broke", True)


@pytest.mark.parametrize("how", ["a tidy end", "a closed connection", "a reset", "short of its content length"])
async def test_a_break_is_a_status_for_a_client_that_wants_one_body(
    upstream: FakeUpstream, proxy: Proxy, how: str
) -> None:
    upstream.plays(cut(how))

    async with proxy.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_broke"

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("upstream_error", 502)


async def test_a_break_behind_the_finish_reason_takes_nothing_from_the_answer(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(b"".join(ANSWER))
        await seen.wait()
        await wire.reset()

    upstream.plays(play)
    async with proxy.chat(stream=True) as response:
        received = b""
        while finish() not in received:
            received += await response.content.readany()
        seen.set()
        received += await response.content.read()
    assert received == NORMAL
    assert (await proxy.ledger.next())["status"] == "ok"


# ---------------------------------------------------------------------- errors in the stream

RATE_LIMIT = {"message": "Slow down", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
PRELUDES = {
    "an error as the first event": ((event({"error": RATE_LIMIT}),), 429, "rate_limit_exceeded"),
    "an error behind a role": ((role(), event({"error": RATE_LIMIT})), 429, "rate_limit_exceeded"),
    "an error behind comments": ((b": PROCESSING\n\n", event({"error": RATE_LIMIT})), 429, "rate_limit_exceeded"),
    "an error behind empty deltas": (
        (role(), chunk(), text(""), event({"error": RATE_LIMIT})),
        429,
        "rate_limit_exceeded",
    ),
    "OpenRouter's number as code": ((event({"error": {"message": "Bad", "code": 401}}),), 401, 401),
    "an error beside choices": ((chunk(error={"message": "No", "code": 503}, choices=[]),), 503, 503),
    "an error that is a text": ((event({"error": "out of luck"}),), 502, None),
    "vLLM's error": (
        (event({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}),),
        400,
        400,
    ),
    "an error named by its event": ((b'event: error\ndata: {"message":"overloaded"}\n\n',), 502, None),
    "an error of unknown meaning": ((event({"error": {"message": "?", "type": "whatever"}}),), 502, None),
}


@pytest.mark.parametrize(("played", "status", "code"), PRELUDES.values(), ids=PRELUDES.keys())
async def test_an_error_before_the_first_token_is_a_status(
    upstream: FakeUpstream, proxy: Proxy, played: tuple[bytes, ...], status: int, code: Any
) -> None:
    """https://github.com/preloop/preloop/issues/121, https://github.com/Oaklight/llm-rosetta/issues/454"""
    upstream.plays(stream(*played))

    async with proxy.chat(stream=True) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        assert response.headers["x-headwater-error-source"] == "upstream"
        error = (await response.json())["error"]
    assert error["code"] == code
    assert error["message"]

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["ttft_ms"]) == ("upstream_error", status, None)
    assert row["error"] != "None", "a code that is null is not a code of that name"


async def test_an_error_in_mid_stream_is_the_last_event_and_no_done_follows(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """The official SDKs raise on an event with an `error` member
    (https://github.com/openai/openai-python/blob/main/src/openai/_streaming.py); `[DONE]` says that an answer is whole."""
    upstream.plays(
        stream(role(), text("Hi"), event({"error": {**RATE_LIMIT, "metadata": {"raw": "x"}}}), text("ghost"))
    )

    seen = read_strictly(await proxy.stream())

    assert seen.text() == "Hi"
    assert seen.error == {**RATE_LIMIT, "metadata": {"raw": "x"}}
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 200, "rate_limit_exceeded")


async def test_an_error_in_the_write_that_brings_the_first_token_comes_behind_it(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(written(role() + text("Hi") + event({"error": RATE_LIMIT}) + DONE))

    seen = read_strictly(await proxy.stream())

    assert (seen.text(), seen.error) == ("Hi", RATE_LIMIT)


@pytest.mark.parametrize("member", ["reasoning", "reasoning_content", "content", "refusal"])
async def test_whatever_can_be_read_is_sent_at_once(upstream: FakeUpstream, proxy: Proxy, member: str) -> None:
    """Reasoning ends the wait for the first token too (https://github.com/diegosouzapw/OmniRoute/issues/13806): the
    upstream goes on only when the client has it."""
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role())
        await wire.chunk(chunk({member: "Hm"}))
        await seen.wait()
        await wire.chunk(text("Hi") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        received = b""
        while b'"Hm"' not in received:
            received += await response.content.readany()
        seen.set()
        received += await response.content.read()
    assert received == role() + chunk({member: "Hm"}) + text("Hi") + finish() + DONE


async def test_events_without_meaning_are_not_held_back_for_ever(upstream: FakeUpstream, proxy: Proxy) -> None:
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + chunk() * 100)
        await seen.wait()
        await wire.chunk(text("Hi") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        first = await response.content.readany()
        seen.set()
        body = first + await response.content.read()
    assert read_strictly(body).text() == "Hi"


# ---------------------------------------------------------------------- one body of a stream


async def test_a_stream_that_nobody_asked_for_is_folded_into_one_body(upstream: FakeUpstream, proxy: Proxy) -> None:
    """https://github.com/headroomlabs-ai/headroom/issues/2622; asking again would be billed again."""
    upstream.plays(stream(role(), chunk({"reasoning": "Hm"}), text("Hel"), text("lo"), finish(), usage(7, 2)))

    async with proxy.chat() as response:
        assert response.content_type == "application/json"
        completion = await response.json()
    assert completion == {
        "id": "chatcmpl-up",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "model-a",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "reasoning": "Hm"},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    assert len(upstream.requests) == 1
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["completion_tokens"]) == ("whole", "ok", 2)


async def test_a_folded_stream_keeps_every_choice_and_tool_call(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(*TWO_CALLS, role(1), text("b", 1), finish("length", 1)))

    completion = await proxy.ask(n=2)

    first, second = completion["choices"]
    assert first["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}},
        {"id": "c2", "type": "function", "function": {"name": "time", "arguments": '{"b":2}'}},
    ]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "length")
    assert second["message"]["content"] == "b"
    assert completion["usage"]["estimated"] is True


async def test_a_folded_stream_with_bytes_that_are_no_utf_8_is_a_body(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("caf@").replace(b"@", b"\xc3"), finish(), usage()))

    assert (await proxy.ask())["choices"][0]["message"]["content"] == "caf\ufffd"


async def test_an_error_in_a_stream_is_a_status_for_a_client_that_wants_one_body(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(stream(role(), text("Hi"), event({"error": RATE_LIMIT})))

    async with proxy.chat() as response:
        assert response.status == 429
        assert (await response.json())["error"] == RATE_LIMIT
