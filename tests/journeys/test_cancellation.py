"""A call that is given up at any moment whatever: it is settled once, and nothing of it is left.

A moment is a turn of the event loop. The same call is made again and again, and is given up one turn later each time,
until it comes to its end before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.answerlog import BodyReader, StreamReader
from proxy.answers import Seat
from proxy.chat import ChatRequest, Outcome, Status, Wishes
from proxy.errors import ProxyError
from proxy.server.app import Parts, parts
from proxy.wire.requests import parse_chat_request
from tests.conftest import Proxy, Start, make_settings
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.waiting import until

_LONG = 20
_MOST_TURNS = 400


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_a_failure(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    failures = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not failures, [record.getMessage() for record in failures]


class Books:
    """The reports of the calls, by call id."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[Outcome]] = {}
        self._reported = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def report(self, outcome: Outcome) -> None:
        self.outcomes.setdefault(outcome.call_id, []).append(outcome)
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._reported:
            self._reported.notify_all()

    async def of(self, call_id: str) -> Outcome:
        """The one report of a call."""
        async with asyncio.timeout(_LONG), self._reported:
            await self._reported.wait_for(lambda: call_id in self.outcomes)
        (outcome,) = self.outcomes[call_id]
        return outcome


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
async def made(tmp_path: Path, upstream: FakeUpstream, books: Books) -> AsyncIterator[Parts]:
    """What calls need, without a server around it."""
    alias = '[[model]]\nname = "two-targets"\ntargets = ["up/model-a", "up/model-b"]'
    settings = make_settings(tmp_path, upstream.url, more=alias, streaming={"heartbeat_interval_s": 0.002})
    async with parts(settings, books.report) as made:
        yield made
        assert len(made.in_flight) == 0
    assert all(len(outcomes) == 1 for outcomes in books.outcomes.values())


class Client:
    """The reader of a call: of its stream, or of its one body."""

    def __init__(self, seat: Seat, *, is_stream: bool) -> None:
        self.is_over = asyncio.Event()
        self._reader = (
            StreamReader(seat.log, self, seat.leave) if is_stream else BodyReader(seat.log, self._end, seat.leave)
        )

    def leave(self) -> None:
        if not self.is_over.is_set():
            self._reader.leave()

    def write(self, segment: bytes) -> bool:
        assert not self.is_over.is_set()
        return True

    def end(self, last: bytes) -> None:
        self._end()

    def refuse(self, error: ProxyError) -> None:
        self._end()

    def _end(self) -> None:
        assert not self.is_over.is_set(), "there is one end"
        self.is_over.set()


def _request(model: str, *, is_stream: bool) -> ChatRequest:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": is_stream}
    return parse_chat_request(json.dumps(body).encode())


async def _refuses_to_stream(request: Received, wire: Wire) -> None:
    await (refuse(400, "stream") if request.json().get("stream") else answer())(request, wire)


async def _overloaded_or_not(request: Received, wire: Wire) -> None:
    fails = request.json()["model"] == "model-a"
    await (refuse(503) if fails else stream(role(), text("Hello"), finish()))(request, wire)


_CALLS: dict[str, tuple[Play, str | None, bool]] = {
    "a stream that is relayed": (stream(role(), text("Hello"), text(" there"), finish(), usage()), None, True),
    "a stream without usage": (stream(role(), text("Hello"), finish()), None, True),
    "a stream made of one body": (answer(), None, True),
    "a stream that was refused first": (_refuses_to_stream, None, True),
    "one whole answer": (answer(), None, False),
    "a second target": (_overloaded_or_not, "two-targets", True),
    "an error": (refuse(400, "messages"), None, True),
}


async def _give_up(made: Parts, books: Books, call: str, give_up: Callable[[], None] | None) -> list[Outcome]:
    """Make the call again and again; `give_up`, or else the only reader's leaving, comes one turn later each time."""
    _, model, is_stream = _CALLS[call]
    outcomes = []
    for turns in range(_MOST_TURNS):
        call_id = f"call-{turns}"
        # A model of its own each time, so that nothing is known of it.
        seat = made.pipeline.start(call_id, _request(model or f"model-{turns}", is_stream=is_stream))
        client = Client(seat, is_stream=is_stream)
        for _ in range(turns):
            await asyncio.sleep(0)
        is_over = client.is_over.is_set()
        if give_up is None:
            client.leave()
        else:
            give_up()
            async with asyncio.timeout(_LONG):
                await client.is_over.wait()
        outcomes.append(await books.of(call_id))
        assert seat.log.is_closed
        if is_over:
            return outcomes
    raise AssertionError("the call never came to its end")


@pytest.mark.parametrize("call", _CALLS)
async def test_a_call_whose_client_leaves_at_any_moment_is_settled_once(
    upstream: FakeUpstream, made: Parts, books: Books, call: str
) -> None:
    """A place that is not given back, or given back twice, shuts callers out for ever
    (https://github.com/BerriAI/litellm/issues/27955, https://github.com/BerriAI/litellm/issues/20256)."""
    upstream.plays(_CALLS[call][0])
    outcomes = await _give_up(made, books, call, None)

    statuses = Counter(outcome.status for outcome in outcomes)
    assert statuses[Status.CANCELLED] > 3
    assert statuses.keys() <= {Status.CANCELLED, Status.OK, Status.UPSTREAM_ERROR}
    assert outcomes[0].status is Status.CANCELLED
    assert all(outcome.http_status == 499 for outcome in outcomes if outcome.status is Status.CANCELLED)
    assert len(made.in_flight) == 0


@pytest.mark.parametrize("call", _CALLS)
async def test_a_call_that_is_stopped_at_any_moment_is_settled_once_and_its_client_is_told(
    upstream: FakeUpstream, made: Parts, books: Books, call: str
) -> None:
    upstream.plays(_CALLS[call][0])
    outcomes = await _give_up(made, books, call, made.in_flight.stop)

    statuses = Counter(outcome.status for outcome in outcomes)
    assert statuses[Status.INTERRUPTED] > 3
    assert statuses.keys() <= {Status.INTERRUPTED, Status.OK, Status.UPSTREAM_ERROR}
    assert all(outcome.error == "shutting_down" for outcome in outcomes if outcome.status is Status.INTERRUPTED)
    assert len(made.in_flight) == 0


@pytest.mark.parametrize("shares", [False, True])
async def test_a_call_that_waits_for_another_one_is_not_left_waiting_when_that_is_given_up(
    upstream: FakeUpstream, made: Parts, books: Books, shares: bool
) -> None:
    """The second call stands behind the first one, for what that finds out or for its very answer; the first one's client
    leaves at any moment."""
    upstream.plays(stream(role(), text("Hello"), finish(), usage()))
    for turns in range(40):
        model = f"model-{turns}"
        wishes = Wishes(coalesces=shares)
        first = made.pipeline.start(f"first-{turns}", _request(model, is_stream=True), wishes=wishes)
        second = made.pipeline.start(f"second-{turns}", _request(model, is_stream=True), wishes=wishes)
        leaving, staying = Client(first, is_stream=True), Client(second, is_stream=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        leaving.leave()
        async with asyncio.timeout(_LONG):
            await staying.is_over.wait()
        assert (await books.of(f"second-{turns}")).status is Status.OK
        assert (await books.of(f"first-{turns}")).status in (Status.CANCELLED, Status.OK)
    assert len(upstream.requests) == 40 if shares else 40 < len(upstream.requests) <= 80


# ---------------------------------------------------------------------- through sockets


async def _ask_and_reset(proxy: Proxy, path: str, call_id: str, turns: int, **members: Any) -> None:
    """Send a request, let the event loop turn that often, and break the connection."""
    body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], **members}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nx-request-id: {call_id}\r\nContent-Type: application/json\r\n"
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    for _ in range(turns):
        await asyncio.sleep(0)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


_REQUESTS: dict[str, tuple[Play, str, dict[str, Any]]] = {
    "a stream": (
        stream(role(), text("Hello"), text(" there"), finish(), usage()),
        "/v1/chat/completions",
        {"stream": True},
    ),
    "a stream made of one body": (answer(), "/v1/chat/completions", {"stream": True}),
    "one whole answer": (answer(), "/v1/chat/completions", {}),
    "a route that is passed on": (answer({"data": []}), "/v1/embeddings", {}),
    "a route that is passed on, and refused": (refuse(400), "/v1/embeddings", {}),
}


@pytest.mark.parametrize("what", _REQUESTS)
async def test_a_connection_that_breaks_at_any_moment_leaves_one_row_and_nothing_in_flight(
    upstream: FakeUpstream, proxy: Proxy, what: str
) -> None:
    play, path, members = _REQUESTS[what]
    upstream.plays(play)
    for turns in range(60):
        await _ask_and_reset(proxy, path, f"call-{turns}", turns, **members)

    # A call is one once the proxy has its request, which a broken connection may take away before.
    upstream.plays(answer())
    assert await proxy.ask() == COMPLETION
    async with asyncio.timeout(_LONG):
        in_flight = -1
        while in_flight != 0:
            async with proxy.get("/ready") as response:
                in_flight = (await response.json())["in_flight"]
    rows = Counter[str]()
    statuses = Counter[str]()
    sent = {request.headers["x-request-id"] for request in upstream.requests}
    while sent - rows.keys():
        row = await proxy.ledger.next()
        rows[row["id"]] += 1
        statuses[row["status"]] += 1
    assert set(rows.values()) == {1}
    assert proxy.ledger.is_empty()
    assert statuses["ok"] >= 1
    assert statuses["cancelled"] >= 1
    assert statuses.keys() <= {"ok", "cancelled", "upstream_error"}


async def test_a_connection_that_breaks_while_the_proxy_waits_to_write_to_it(
    start: Start, upstream: FakeUpstream
) -> None:
    """The client has read nothing of some megabytes, and so the upstream waits as well."""
    sent = 0
    gone = asyncio.Event()

    async def flood(request: Received, wire: Wire) -> None:
        nonlocal sent
        connection = wire.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        await wire.head(content_type="text/event-stream")
        try:
            while True:
                await wire.chunk(text("and so on " * 6_000))
                sent += 1
        finally:
            gone.set()

    upstream.plays(flood, stream(role(), text("Hello"), finish()))
    proxy = await start()
    port = int(proxy.base.removesuffix("/v1").rpartition(":")[2])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", port))
        data = b'{"model": "model-a", "messages": [{"role": "user", "content": "On?"}], "stream": true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: %d\r\n\r\n" % len(data)
        await loop.sock_sendall(connection, head + data)

        async def is_stuck() -> bool:
            before = sent
            for _ in range(5):
                assert (await proxy.stream()).endswith(DONE)
                assert (await proxy.ledger.next())["status"] == "ok"
            return 0 < before == sent

        await until(is_stuck, bool)
    async with asyncio.timeout(_LONG):
        await gone.wait()

    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["estimated"]) == ("cancelled", 499, True)
    async with proxy.get("/ready") as response:
        assert (await response.json())["in_flight"] == 0
