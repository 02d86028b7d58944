"""An upstream's answer that breaks off, behind every byte in turn.

The client gets an error status, or the events that had arrived whole and one error event behind them: never a hang, and
never an end that the upstream has not written.
"""

from __future__ import annotations

import asyncio
import json
from itertools import accumulate
from typing import Any

import h11
import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Answer, Client, chat
from tests.fakes.upstream import COMPLETION, DONE, FakeUpstream, Received, Wire, finish, role, text, usage

_AT_ONCE = 32

_EVENTS = [role(), text("The sea – das Meer – "), text("海."), finish()]
_BODY = b"".join(_EVENTS) + usage() + DONE
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nServer: x\r\n"


def _in_chunks(body: bytes, size: int) -> bytes:
    """Chunks that care as little for the ends of events as TCP does, one with an extension, and a trailer."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    framed = b"".join(b"%x;n=%d\r\n%b\r\n" % (len(piece), number, piece) for number, piece in enumerate(pieces))
    return framed + b"0\r\nX-Sum: 1\r\n\r\n"


_STREAMS = {
    "chunks": _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + _in_chunks(_BODY, 97),
    "until it closes": _HEAD + b"\r\n" + _BODY,
}
_JSON = json.dumps(COMPLETION).encode()
_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_JSON), _JSON)


def _breaking(answer: bytes, how: str) -> Any:
    """A play that says as much of `answer` as the question asks for, and breaks."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.send(answer[: int(request.json()["messages"][0]["content"])])
        await (wire.reset() if how == "RST" else wire.close())

    return play


def _arrived(data: bytes) -> bytes:
    """The body of a response that breaks off, as h11 understands it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data or b"H")  # no bytes would be the end
    body = b""
    while isinstance(event := connection.next_event(), h11.Response | h11.Data):
        body += bytes(event.data) if isinstance(event, h11.Data) else b""
    return body


async def _ask_for_every_length(proxy: Proxy, length: int, **members: Any) -> tuple[list[Answer], list[dict[str, Any]]]:
    """What the client got and what the ledger says, for each number of bytes up to `length`."""
    answers: dict[int, Answer] = {}
    waiting = iter(range(length + 1))

    async def worker() -> None:
        client = await Client.to(proxy.port)
        for position in waiting:
            client.send(chat(str(position), f"x-request-id: {position}", **members))
            answers[position] = await client.answer()
        client.close()

    await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    rows = [await proxy.ledger.next() for _ in range(length + 1)]
    assert proxy.ledger.is_empty()
    return [answers[position] for position in range(length + 1)], sorted(rows, key=lambda row: int(row["id"]))


async def _is_well(proxy: Proxy, upstream: FakeUpstream, answer: bytes) -> None:
    """A whole answer passes, and no call is in flight."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.send(answer)
        await wire.close()

    upstream.plays(play)
    assert await proxy.stream() == b"".join(_EVENTS) + DONE
    await proxy.ledger.next()
    async with proxy.get("/ready") as response:
        assert (await response.json())["in_flight"] == 0


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    return await start(ledger={"calls": "paid"})


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("framing", _STREAMS)
async def test_a_stream_that_breaks_off_anywhere_is_told_as_far_as_it_came(
    upstream: FakeUpstream, proxy: Proxy, framing: str, how: str
) -> None:
    answer = _STREAMS[framing]
    await _is_well(proxy, upstream, answer)
    upstream.plays(_breaking(answer, how))

    answers, rows = await _ask_for_every_length(proxy, len(answer), stream=True)

    ends = list(accumulate(map(len, _EVENTS)))
    if (framing, how) == ("until it closes", "FIN"):
        ends = [end - len("\n\n") for end in ends]  # To HTTP this is an end, and upstreams forget the last blank line.
    for position, (said, row) in enumerate(zip(answers, rows, strict=True)):
        arrived = len(_arrived(answer[:position]))
        whole = sum(end <= arrived for end in ends)
        seen = (said.status, said.body, row["status"], row["http_status"])
        if whole == len(_EVENTS):  # What may still have been missing behind the finish reason is no part of the answer.
            assert seen == (200, b"".join(_EVENTS) + DONE, "ok", 200), position
        elif whole < 2:  # A role says nothing yet.
            assert seen == (502, said.body, "upstream_error", 502), position
            assert said.json()["error"]["code"] == "upstream_broke", position
        else:
            events = said.body.split(b"\n\n")
            assert b"\n\n".join(events[:-2]) + b"\n\n" == b"".join(_EVENTS[:whole]), position
            assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "upstream_broke", position
            assert seen == (200, said.body, "upstream_error", 200), position
    await _is_well(proxy, upstream, answer)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("wants_stream", [False, True])
async def test_a_whole_answer_that_breaks_off_anywhere_is_an_error(
    upstream: FakeUpstream, proxy: Proxy, wants_stream: bool, how: str
) -> None:
    await _is_well(proxy, upstream, _STREAMS["chunks"])
    upstream.plays(_breaking(_WHOLE, how))

    answers, rows = await _ask_for_every_length(proxy, len(_WHOLE), stream=wants_stream)

    last, row = answers.pop(), rows.pop()
    assert (last.status, last.said(), row["status"]) == (200, "Hello there, friend.", "ok")
    assert {(said.status, said.json()["error"]["code"]) for said in answers} == {(502, "upstream_broke")}
    assert {(row["status"], row["http_status"]) for row in rows} == {("upstream_error", 502)}
    await _is_well(proxy, upstream, _STREAMS["chunks"])
