"""The reader of responses against h11, an independent parser, on responses of every kind: sound, unsound, mutated, cut.

Both are given the same bytes and then the end of the connection. They agree on status and body, or they both refuse; where
they differ on purpose the difference has a name and a section of RFC 9112 below, and is on the safe side: never a byte of
body more than h11 takes, and never a connection kept after anything unsound.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import h11
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.upstream.http1 import Connection, Exchange
from tests.conftest import examples

# ---------------------------------------------------------------------- the two readers


class Transport(asyncio.Transport):
    """A transport that is given its bytes by the test. It closes as asyncio's do: `connection_lost` comes a turn later."""

    def __init__(self) -> None:
        super().__init__()
        self._is_paused = False
        self._is_closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Requests go nowhere."""

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    def abort(self) -> None:
        self._is_closing = True

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False

    def is_reading(self) -> bool:
        return not self._is_paused


@dataclass
class Keeper:
    kept: list[Connection] = field(default_factory=list)

    def put(self, connection: Connection) -> None:
        self.kept.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self.kept:
            self.kept.remove(connection)


@dataclass(frozen=True)
class Reading:
    """What a reader made of some bytes: `status` is None where it refused them, `body` what came before that.

    `is_at_once`: whether that was known before the end of the connection. `is_followed`, by h11 alone: whether bytes stand
    behind the end of the response.
    """

    status: int | None
    body: bytes
    is_kept: bool
    is_at_once: bool
    is_followed: bool = False


Way = Literal["at once", "late", "delivered", "delivered in part"]
_WAYS: tuple[Way, ...] = ("at once", "late", "delivered", "delivered in part")


async def _turns() -> None:
    """As many turns as any waiter needs."""
    for _ in range(4):
        await asyncio.sleep(0)


async def _ours(pieces: Sequence[bytes], *, is_head: bool = False, way: Way = "at once") -> Reading:
    """Our reading of pieces that come one after the other, then the end; of a reader that does it in its `way`."""
    keeper, transport = Keeper(), Transport()
    connection = Connection(keeper)
    connection.connection_made(transport)
    exchange = connection.start(b"POST / HTTP/1.1\r\n\r\n", b"", has_no_body=is_head)
    parts: list[bytes] = []
    reader = None if way == "late" else asyncio.ensure_future(_read(exchange, way, parts))
    await asyncio.sleep(0)
    for piece in pieces:
        while not transport.is_reading():
            assert reader is not None
            await asyncio.sleep(0)
        if transport.is_closing():
            break
        connection.data_received(piece)
        if way != "late":
            await asyncio.sleep(0)
    if reader is None:
        reader = asyncio.ensure_future(_read(exchange, way, parts))
    await _turns()
    is_at_once = reader.done()
    if not is_at_once:
        if not transport.is_closing() and not connection.eof_received():
            transport.close()
        connection.connection_lost(None)
        await _turns()
        assert reader.done(), "it waits for ever"
    exchange.close()
    is_kept = keeper.kept == [connection] and not transport.is_closing()
    if (error := reader.exception()) is None:
        return Reading(exchange.status, b"".join(parts), is_kept, is_at_once)
    assert isinstance(error, UpstreamError), repr(error)
    assert transport.is_closing()
    assert keeper.kept == []
    return Reading(None, b"".join(parts), is_kept, is_at_once)


class _Taker:
    def __init__(self, parts: list[bytes], *, takes_all: bool) -> None:
        self._parts = parts
        self._takes_all = takes_all

    def feed(self, data: bytes) -> bool:
        self._parts.append(data)
        return self._takes_all


async def _read(exchange: Exchange, way: Way, parts: list[bytes]) -> None:
    await exchange.head()
    if way.startswith("delivered"):
        await exchange.deliver(_Taker(parts, takes_all=way == "delivered"))
        if way == "delivered":
            return
    while data := await exchange.read():
        parts.append(data)


def _theirs(data: bytes, *, is_head: bool = False) -> Reading:
    """h11's reading of the same bytes, and the end of the connection behind them."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**20)
    connection.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    status, body, is_at_end = None, b"", not data
    try:
        connection.receive_data(data)
        while True:
            match connection.next_event():
                case h11.Response(status_code=code):
                    status = code
                case h11.Data(data=part):
                    body += bytes(part)
                case h11.EndOfMessage():
                    is_followed = bool(connection.trailing_data[0])
                    is_kept = connection.their_state is h11.DONE and not is_followed and not is_at_end
                    return Reading(status, body, is_kept, not is_at_end, is_followed)
                case h11.InformationalResponse():
                    pass
                case h11.NEED_DATA if not is_at_end:
                    connection.receive_data(b"")
                    is_at_end = True
                case _:
                    return Reading(None, body, False, not is_at_end)
    except h11.RemoteProtocolError:
        return Reading(None, body, False, not is_at_end)


# ---------------------------------------------------------------------- where they differ


@dataclass(frozen=True)
class Difference:
    """`applies` tells, by the bytes alone, whether a response is of this kind."""

    why: str
    applies: Callable[[bytes], object]


def _found(pattern: bytes) -> Callable[[bytes], object]:
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE).search


_LENGTH, _CODING = _found(rb"^content-length:"), _found(rb"^transfer-encoding:")
_OTHER_CODING = _found(rb"^transfer-encoding:(?!\s*chunked *\r)")
_CONTROL = rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"

_STRICTER = [
    Difference("§2.2: a line may be ended by LF alone, which a recipient MAY take", _found(rb"(?<!\r)\n")),
    Difference("§2.2: a CR that ends no line", _found(rb"\r(?!\n)")),
    Difference("§2.3: a version that is neither 1.0 nor 1.1", _found(rb"^HTTP/(?!1\.[01] )")),
    Difference("§5.2: a folded line, which a proxy may refuse", _found(rb"\r\n[ \t]")),
    Difference("§5.5 of RFC 9110: a control character in a value", _found(rb"^[^\r\n]+:.*" + _CONTROL)),
    Difference(
        "§6.3: a length said twice, though the same", _found(rb"^content-length:.*(,|(\n.*)*\ncontent-length:)")
    ),
    Difference("§6.1: chunked with a tab behind it", _found(rb"^transfer-encoding:\s*chunked *\t")),
    Difference("§6.3: a length and chunks, which may be smuggling", lambda data: _LENGTH(data) and _CODING(data)),
    Difference("§6.3: a length beyond 64 bits", _found(rb"^content-length:\s*\d{19}")),
    Difference(
        "§7.1.1: a chunk extension without a name, or spaced, or not ASCII",
        _found(rb"^[0-9a-f]+(\s*;\W|[ \t]|;.*[^ -~\r])"),
    ),
]

_LAXER = [
    Difference("§2.2: empty lines before the status line", _found(rb"(\A|\r\n\r\n)[\r\n]+(H|\Z)")),
    Difference("§2.3: the versions 0.9 and 2.0, written in the form of 1.1", _found(rb"^HTTP/(0\.9|2\.0) ")),
    Difference(
        "§4: control characters in the reason, which nobody reads", _found(rb"^HTTP/... ...[^\r\n]*" + _CONTROL)
    ),
    Difference("§6.3: a coding other than chunked where there is no body", _OTHER_CODING),
]

_MORE_BODY = [
    Difference("§2.2, §2.3, §4: h11 refuses the head", lambda data: any(kind.applies(data) for kind in _LAXER)),
    Difference("§6.3: a coding other than chunked is read to the end, and then refused", _OTHER_CODING),
    Difference(
        "§6.3: h11 refuses a length of more than 20 digits before the body", _found(rb"^content-length:\s*\d{20}")
    ),
]

_KEPT = [
    Difference("§9.3: HTTP/1.0 may be kept when both sides say so; h11 never does", _found(rb"\AHTTP/1\.0 ")),
    Difference("§2.2: empty lines behind the end", _found(rb"[\r\n]\Z")),
]


def _named(differences: list[Difference], data: bytes) -> bool:
    for difference in differences:
        if difference.applies(data):
            event(difference.why)
            return True
    return False


# ---------------------------------------------------------------------- responses


def _mostly(usual: bytes, *others: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([usual] * (8 * len(others)) + list(others))


_VERSIONS = _mostly(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"ICY")
_STATUSES = _mostly(
    b"200 OK", b"204 No", b"304 No", b"404 No", b"500 No", b"200", b"200 ", b"200 \xe9\t!", b"099 x", b"20 x", b"1000 x"
)
_PROVISIONAL = st.sampled_from(
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\r\n",
    ]
)
_FIELDS = st.sampled_from(
    [
        *[b"Content-Type: application/json", b"X-A:", b"X-A: \xe9\xff", b"Connection: close"] * 8,
        *[b"Connection: keep-alive", b"Connection: x, Close", b"Connection: upgrade\r\nUpgrade: h2c"] * 8,
        b"X-A: a\r\n folded",
        b"X-A : b",
        b"X A: b",
        b": b",
        b"no colon",
        b"X-A: a\0b",
        b"X-A: a\rb",
        b"X-A: a\nb",
        b"X-A: \x7f",
    ]
)
_LENGTHS = _mostly(
    b"Content-Length: %d",
    b"content-length:%d \t",
    b"Content-Length: 00%d",
    b"Content-Length: +%d",
    b"Content-Length: -%d",
    b"Content-Length: 0x%d",
    b"Content-Length: %d, %d",
    b"Content-Length: %d\r\nContent-Length: %d",
    b"Content-Length: %d\r\nContent-Length: 3",
    b"Content-Length : %d",
    b"Content-Length: 1%d",
    b"Content-Length: 1844674407370955161%d",
)
_CODINGS = _mostly(
    b"Transfer-Encoding: chunked",
    b"TRANSFER-ENCODING:CHUNKED \t",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding:",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
)
_SIZES = _mostly(b"%x", b"%X", b"000%x", b"%x ", b" %x", b"-%x", b"+%x", b"0x%x", b"1%x", b"fffffffffffffffff%x")
_EXTENSIONS = _mostly(b"", b";a=b", b";a", b';a="b;c"', b";", b" ;a", b";\x80", b";a=\r", b";a=\0", b";a\n")
_TRAILERS = _mostly(b"", b"X-T: 1\r\n", b"Content-Length: 3\r\n", b"no colon\r\n", b"X-T: a\nb\r\n")
_LINE_ENDS = _mostly(b"\r\n", b"\n", b"\r", b"")
_BODIES = st.sampled_from(
    [b"", b"x", b"hello there", b"\r\n\r\n", b"0\r\n\r\n", b"\x00\xff" * 5, b'data: {"a": 1}' * 4]
)
_INSERTS = st.sampled_from(
    [b"\0", b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b",", b";", b"0", b"\x80", b"HTTP/1.1 200\r\n\r\n"]
)


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> bytes:
    cuts = sorted({0, *draw(st.lists(st.integers(0, len(body)), max_size=2)), len(body)})
    framed = b""
    for start, end in pairwise(cuts):
        part = body[start:end]
        framed += draw(_SIZES) % len(part) + draw(_EXTENSIONS) + draw(_LINE_ENDS) + part + draw(_LINE_ENDS)
    return framed + draw(_mostly(b"0", b"0000", b"0;x")) + b"\r\n" + draw(_TRAILERS) + draw(_LINE_ENDS)


@st.composite
def _responses(draw: st.DrawFn) -> bytes:
    body = draw(_BODIES)
    fields = draw(st.lists(_FIELDS, max_size=2))
    framing = draw(st.sampled_from(["length"] * 6 + ["chunks"] * 9 + ["close"] * 3 + ["both"]))
    if framing in ("length", "both"):
        fields.append(draw(_LENGTHS).replace(b"%d", b"%d" % len(body)))
    if framing in ("chunks", "both"):
        fields.append(draw(_CODINGS))
        body = draw(_chunks(body))
    head = b"".join(field + draw(_LINE_ENDS) for field in draw(st.permutations(fields)))
    before = b"".join(draw(st.lists(_PROVISIONAL, max_size=2))) if draw(st.integers(0, 4)) == 0 else b""
    return before + draw(_VERSIONS) + b" " + draw(_STATUSES) + b"\r\n" + head + draw(_LINE_ENDS) + body


@st.composite
def _mutated(draw: st.DrawFn, responses: st.SearchStrategy[bytes]) -> bytes:
    data = draw(responses)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "delete", "insert", "repeat", "replace"])):
            case "cut":
                data = data[:place]
            case "delete":
                data = data[:place] + data[place + draw(st.integers(1, 6)) :]
            case "insert":
                data = data[:place] + draw(_INSERTS) + data[place:]
            case "repeat":
                data = data[:place] + data[place : place + draw(st.integers(1, 40))] + data[place:]
            case "replace":
                data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    return data


_ANYTHING = st.one_of(_responses(), _mutated(_responses()), _mutated(_responses()))


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places) if start < end]


_CUTS = st.lists(st.integers(0, 400), max_size=6)
_ARE_HEADS = st.sampled_from([False] * 5 + [True])


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


# ---------------------------------------------------------------------- the properties


@examples(400)
@given(_ANYTHING, _CUTS, _ARE_HEADS, st.sampled_from(_WAYS))
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [], False, "at once")
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", [], False, "at once")
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n", [], False, "late")
@example(
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n", [40], False, "delivered"
)
@example(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", [], False, "at once")
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", [], True, "at once")
def test_it_reads_what_h11_reads(loop: asyncio.Runner, data: bytes, cuts: list[int], is_head: bool, way: Way) -> None:
    theirs = _theirs(data, is_head=is_head)
    ours = loop.run(_ours(_split(data, cuts), is_head=is_head, way=way))
    match ours.status is None, theirs.status is None:
        case False, False:
            event("both take it")
            assert (ours.status, ours.body) == (theirs.status, theirs.body)
        case True, True:
            event("both refuse it")
            if theirs.is_at_once and not ours.is_at_once:
                assert _named(_MORE_BODY, data), "it waits for more of what is broken already"
        case True, False:
            assert _named(_STRICTER, data), "refused without a reason"
        case False, True:
            assert _named(_LAXER, data), "taken without a reason"
    if not theirs.body.startswith(ours.body):
        assert _named(_MORE_BODY, data), "more than h11 takes for the body"
    if ours.is_kept and not theirs.is_kept:
        assert _named(_KEPT + _LAXER, data), "kept though h11 would not"


@examples(400)
@given(_ANYTHING, _CUTS, _ARE_HEADS, st.sampled_from(_WAYS))
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n", [], False, "delivered in part")
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", [], False, "late")
def test_it_does_not_matter_how_the_bytes_are_split(
    loop: asyncio.Runner, data: bytes, cuts: list[int], is_head: bool, way: Way
) -> None:
    # llhttp skips empty lines behind the end, where they come in the same read: nothing is lost, nothing is taken for more.
    assume(not data.endswith((b"\r", b"\n")) or not _theirs(data, is_head=is_head).is_followed)
    whole = loop.run(_ours([data], is_head=is_head))
    for pieces in (_split(data, cuts), _split(data, list(range(len(data))))):
        assert loop.run(_ours(pieces, is_head=is_head, way=way)) == whole


@given(st.binary(max_size=200), _CUTS, _ARE_HEADS)
def test_no_bytes_at_all_break_it(loop: asyncio.Runner, data: bytes, cuts: list[int], is_head: bool) -> None:
    loop.run(_ours(_split(data, cuts), is_head=is_head))


_HEAD = b"HTTP/1.1 200 OK\r\n"
_TEXT = b"data: {}\n\ndata: [DONE]\n\n"
_SOUND = {
    "a length": _HEAD + b"Content-Length: %d\r\n\r\n" % len(_TEXT) + _TEXT,
    "chunks": _HEAD
    + b"Transfer-Encoding: chunked\r\n\r\na\r\n%b\r\ne;x=y\r\n%b\r\n0\r\nX-T: 1\r\n\r\n" % (_TEXT[:10], _TEXT[10:]),
    "until it closes": b"HTTP/1.0 200 OK\r\n\r\n" + _TEXT,
    "behind a provisional one": b"HTTP/1.1 103 Early Hints\r\n\r\n"
    + _HEAD
    + b"Content-Length: %d\r\n\r\n" % len(_TEXT)
    + _TEXT,
}


@pytest.mark.parametrize("data", _SOUND.values(), ids=_SOUND.keys())
@pytest.mark.parametrize("way", _WAYS)
def test_what_came_before_a_break_is_read_before_the_error(loop: asyncio.Runner, data: bytes, way: Way) -> None:
    """Cut behind every byte in turn: not a byte of the body is lost, and none is taken for the end."""
    for end in range(len(data) + 1):
        ours, theirs = loop.run(_ours([data[:end]], way=way)), _theirs(data[:end])
        assert (ours.status, ours.body) == (theirs.status, theirs.body), end


@examples(40)
@given(
    st.lists(st.binary(min_size=1, max_size=90_000), min_size=3, max_size=12),
    st.sampled_from(["at once", "delivered in part"]),
    st.booleans(),
)
def test_nothing_is_lost_while_the_reader_makes_the_sender_wait(
    loop: asyncio.Runner, parts: list[bytes], way: Way, is_chunked: bool
) -> None:
    """The sender sends only while it may, and one piece more, as TLS does: what was decrypted together comes together."""
    body = b"".join(parts)
    if is_chunked:
        head = b"Transfer-Encoding: chunked\r\n\r\n"
        pieces = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    else:
        head, pieces = b"Content-Length: %d\r\n\r\n" % len(body), parts

    async def conversation() -> bytes:
        keeper, transport = Keeper(), Transport()
        connection = Connection(keeper)
        connection.connection_made(transport)
        exchange = connection.start(b"POST / HTTP/1.1\r\n\r\n", b"", has_no_body=False)
        connection.data_received(_HEAD + head)
        await exchange.head()
        to_send = list(pieces)
        exchange.pause_reading()
        connection.data_received(to_send.pop(0))
        assert not transport.is_reading()
        exchange.resume_reading()
        said = []
        while True:
            while to_send and transport.is_reading():
                connection.data_received(to_send.pop(0))
            if to_send:
                connection.data_received(to_send.pop(0))
            if not (data := await exchange.read()):
                break
            said.append(data)
        exchange.close()
        assert keeper.kept == [connection]
        assert transport.is_reading()
        return b"".join(said)

    assert loop.run(conversation()) == body


async def test_bytes_on_a_connection_that_nobody_uses_close_it() -> None:
    """They would be taken for the answer to the next request."""
    keeper, transport = Keeper(), Transport()
    connection = Connection(keeper)
    connection.connection_made(transport)
    exchange = connection.start(b"POST / HTTP/1.1\r\n\r\n", b"", has_no_body=False)
    connection.data_received(_SOUND["a length"])
    await exchange.head()
    assert await exchange.read() == _TEXT
    exchange.close()
    assert keeper.kept == [connection]
    connection.data_received(_SOUND["a length"])
    assert transport.is_closing()


def test_an_upgrade_that_nobody_asked_for_is_refused(loop: asyncio.Runner) -> None:
    """RFC 9110 §15.2.2: only what the request's Upgrade field named may be switched to."""
    data = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + _SOUND["a length"]
    assert loop.run(_ours([data])).status is None


@pytest.mark.parametrize("status", [b"000", b"099"])
def test_a_status_that_is_none_is_refused(loop: asyncio.Runner, status: bytes) -> None:
    """RFC 9110 §15: from 100 to 599."""
    assert loop.run(_ours([_SOUND["until it closes"].replace(b"200", status)])).status is None


@pytest.mark.parametrize(
    ("body", "behind", "is_head"),
    [
        (b"hi", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", False),
        (b"hi", b"HTTP/1.1 404 No\r\nContent-", False),
        (b"", b"hi", True),
    ],
)
def test_bytes_behind_the_end_change_nothing_and_close_the_connection(
    loop: asyncio.Runner, body: bytes, behind: bytes, is_head: bool
) -> None:
    """RFC 9112 §6.3: they are no response to any request, and must not be forwarded nor kept."""
    data = _HEAD + b"Content-Length: 2\r\n\r\n" + body + behind
    for pieces in ([data], [data[:-1], data[-1:]], [data[: -len(behind)], behind]):
        assert loop.run(_ours(pieces, is_head=is_head)) == Reading(200, body, is_kept=False, is_at_once=True)


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: chunked"]
)
def test_a_transfer_coding_that_we_cannot_undo_is_refused(loop: asyncio.Runner, coding: bytes) -> None:
    """RFC 9112 §6.1: nobody may send it, for we named none in a TE field, and chunked is applied once."""
    data = _HEAD + b"Transfer-Encoding: " + coding + b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    assert loop.run(_ours([data])) == Reading(None, b"", is_kept=False, is_at_once=True)
