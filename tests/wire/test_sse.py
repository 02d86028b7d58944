"""The codec against the grammar: whatever the reads, whatever the line ends, the same events."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.wire.sse import DONE, PING, Event, EventSplitter, EventTooLarge, data_event, parse_event
from tests.conftest import examples

BOM = b"\xef\xbb\xbf"
LIMIT = 1 << 22


def read(pieces: Iterable[bytes], max_event_bytes: int = LIMIT) -> list[Event]:
    """What the splitter makes of these reads; checks at every read that it tells the truth about them."""
    splitter = EventSplitter(max_event_bytes)
    raw: list[bytes] = []
    for piece in pieces:
        events = splitter.feed(piece)
        if splitter.was_exact:
            assert b"".join(event + b"\n\n" for event in events) == piece
        assert not any(b"\r" in event or b"\n\n" in event for event in events)
        raw += events
    raw += splitter.finish()
    assert splitter.finish() == []
    return [parse_event(event) for event in raw if event.strip(b"\n")]


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


def reference(stream: bytes) -> list[Event]:
    """WHATWG HTML §9.2.5–9.2.6, one byte after the other. The end of the input ends the last event too."""
    lines, rest, position = [], b"", 3 if stream.startswith(BOM) else 0
    while position < len(stream):
        byte = stream[position : position + 1]
        position += 1
        if byte == b"\r" and stream[position : position + 1] == b"\n":
            position += 1
        if byte in (b"\r", b"\n"):
            lines.append(rest)
            rest = b""
        else:
            rest += byte
    events = []
    kind, data, has_lines = b"", None, False
    for line in [*lines, rest, b""]:
        if not line:
            if has_lines:
                events.append(Event(kind, data))
            kind, data, has_lines = b"", None, False
            continue
        has_lines = True
        if line[:1] == b":":
            continue
        colon = line.find(b":")
        field, value = (line, b"") if colon < 0 else (line[:colon], line[colon + 1 :])
        if value[:1] == b" ":
            value = value[1:]
        if field == b"event":
            kind = value
        elif field == b"data":
            data = value if data is None else data + b"\n" + value
    return events


def data(*texts: str) -> list[Event]:
    return [Event(b"", text.encode()) for text in texts]


STREAMS = {
    "LF": (b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n', data('{"a":1}', '{"b":2}', "[DONE]")),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", data("a", "b")),
    "CR": (b"data: a\r\rdata: b\r\r", data("a", "b")),
    "all three": (b"data: a\r\n\ndata: b\n\r\ndata: c\r\rdata: d\n\n", data("a", "b", "c", "d")),
    "no last blank line": (b"data: a\n\ndata: b\n", data("a", "b")),
    "no last line end": (b"data: a\r\n\r\ndata: b", data("a", "b")),
    "BOM": (BOM + b"data: a\n\ndata: b\n\n", data("a", "b")),
    "BOM and CRLF": (BOM + b"data: a\r\n\r\n", data("a")),
    "comment": (b": OPENROUTER PROCESSING\n\ndata: a\n\n", [Event(b"", None), *data("a")]),
    "comment inside": (b"data: a\n: ping\ndata: b\n\n", data("a\nb")),
    "several data lines": (b'data: {"a":\ndata: 1}\n\n', data('{"a":\n1}')),
    "no space": (b'data:{"a":1}\n\ndata:  two\n\n', data('{"a":1}', " two")),
    "empty data": (b"data\n\ndata:\n\ndata: \n\n", data("", "", "")),
    "fields": (b"event: ping\nid: 7\nretry: 10\ndata: a\n\nretry: 3\n\n", [Event(b"ping", b"a"), Event(b"", None)]),
    "not quite fields": (b"datax: a\n data: b\nDATA: c\ndata: d\n\n", data("d")),
    "many blank lines": (b"\n\n\r\n\ndata: a\n\n\n\n\r\n\ndata: b\n\n\n", data("a", "b")),
    "line separators": (
        'data: {"a":"x\u2028\u2029\u0085\x0b\x0cy"}\n\n'.encode(),
        data('{"a":"x\u2028\u2029\u0085\x0b\x0cy"}'),
    ),
    "characters of 2 to 4 bytes": ("data: é✓😀é\r\n\r\n".encode(), data("é✓😀é")),
    "nothing": (b"", []),
    "blank lines only": (b"\r\n\r\n\n", []),
}


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS.keys())
def test_a_stream_means_the_same_however_its_bytes_arrive(stream: bytes, expected: list[Event]) -> None:
    """Reads end anywhere: inside a character, a field, a line end.

    https://github.com/xberg-io/liter-llm/issues/152 and https://github.com/katanemo/plano/issues/980 (characters),
    https://github.com/fastrepl/anarlog/issues/6872 (lines, and no last blank line),
    https://github.com/ax-llm/ax/issues/622 (line ends, a CRLF cut in two, several data lines),
    https://github.com/numman-ali/opencode-openai-codex-auth/issues/96 (no space, several data lines),
    https://github.com/deepnoodle-ai/dive/issues/206 (comments are no data).
    """
    assert reference(stream) == expected
    assert read([stream]) == expected
    assert read(bytewise(stream)) == expected
    for cut in range(len(stream) + 1):
        assert read([stream[:cut], stream[cut:]]) == expected, cut
    for cut in range(len(stream)):
        assert read([stream[:cut], stream[cut : cut + 1], stream[cut + 1 :]]) == expected, cut


FRAGMENTS = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"data",
        b"event: e",
        b"event",
        b"id: 1",
        b"retry: 5",
        b":",
        b": c",
        b" ",
        b"a",
        b"{}",
        b"\xff",
    ]
    + [b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\r"]
    + [text.encode() for text in ("é", "😀", "\u2028", "\u0085")]
)


@st.composite
def streams_in_reads(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    stream = draw(st.sampled_from([b"", BOM + b"data"])) + b"".join(draw(st.lists(FRAGMENTS, max_size=30)))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    return stream, [stream[start:end] for start, end in pairwise(edges)]


@given(streams_in_reads())
@examples(600)
@example((b"data: a\r\n\r\ndata: b\n\n", [b"data: a\r", b"\n\r", b"\n", b"data: b\n\n"]))
@example((b"data: a\n\n\ndata: b\n\n", [b"data: a\n\n", b"\n", b"data: b\n\n"]))
def test_any_bytes_in_any_reads_are_what_the_grammar_says(made: tuple[bytes, list[bytes]]) -> None:
    stream, reads = made
    assert read(reads) == reference(stream)


def test_what_was_exact_may_be_passed_on_as_it_came_and_is_recognised_where_it_can_be() -> None:
    splitter = EventSplitter(LIMIT)
    splitter.feed(b": the first read may hold a BOM\n\n")
    for reads, is_exact in [
        ([b"data: a\n\n"], True),
        ([b"data: a\n\ndata: b\n\n"], True),
        ([b"data: a\r\n\r\n"], False),
        ([b"data: a\n\nda", b"ta: b\n\n"], False),
        ([b"data: a\r\n\r", b"\n", b"data: b\n\n"], True),
        ([b"data: a\r\r", b"data: b\n\n"], False),  # an LF might have belonged to that CR
        ([b"data: b\n\n"], True),
    ]:
        for piece in reads:
            splitter.feed(piece)
        assert splitter.was_exact is is_exact, reads


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 1 << 17, 1 << 19, (1 << 20) + 7, 3 << 20])
def test_lines_may_be_as_long_as_a_picture(size: int) -> None:
    """aiohttp's own line iteration raises `Chunk too big` at 128 KiB: https://github.com/aio-libs/aiohttp/issues/4453;
    other stacks stop at 64 KiB: https://github.com/openai/openai-go/issues/368."""
    payload = b"x" * size
    stream = data_event(payload) + DONE
    reads = [stream[i : i + 65_536] for i in range(0, len(stream), 65_536)]
    assert read(reads) == [Event(b"", payload), Event(b"", b"[DONE]")]


@pytest.mark.parametrize(
    "pieces", [[b"data: " + b"x" * 100], [b"data: ", b"x" * 50, b"\nid: ", b"x" * 50], [b": c\n"] * 30]
)
def test_an_event_that_never_ends_is_bounded(pieces: list[bytes]) -> None:
    """An upstream that sends no line end, or no blank line, must not fill the memory:
    https://github.com/NousResearch/hermes-agent/issues/58471."""
    with pytest.raises(EventTooLarge, match="longer than 100 bytes"):
        read(pieces, max_event_bytes=100)


def test_the_bound_is_on_one_unfinished_event_and_not_on_the_stream() -> None:
    event = b"data: " + b"x" * 50 + b"\n\n"
    assert len(read([event * 20, *bytewise(event * 20)], max_event_bytes=60)) == 40
    assert read([b"\n"] * 1000, max_event_bytes=10) == []


def test_the_constants_and_the_encoder_are_in_the_form_that_the_splitter_reads() -> None:
    stream = PING + data_event(b'{"a":1}') + DONE
    assert read([stream]) == [Event(b"", None), Event(b"", b'{"a":1}'), Event(b"", b"[DONE]")]
