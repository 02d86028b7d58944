"""Clients' connections: requests for the door and for aiohttp's routes on the same one, each answered in its turn.

And what connection.py relies on in aiohttp, which promises none of it.
"""

from __future__ import annotations

import ast
import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from inspect import getsource
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from proxy.server import connection as connection_module
from proxy.server.connection import ClientConnection, Runner
from tests.conftest import Proxy, make_settings, running_proxy
from tests.fakes.client import Client, chat, question, request
from tests.fakes.upstream import FakeUpstream, Received, Wire, echo

_LONG = 30


# ---------------------------------------------------------------------- a door that tests hold open


class Taken:
    """A request that the door took, to be answered when the test says so."""

    def __init__(self, connection: ClientConnection, message: RawRequestMessage, payload: StreamReader) -> None:
        self.connection = connection
        self.name = message.headers.get("x-name", "")
        self.payload = payload
        self.is_lost = asyncio.Event()
        assert connection.transport is not None
        self.transport = connection.transport
        connection.begin(self)

    def answer(self, body: bytes = b"", *, keeps_alive: bool = True) -> None:
        body = body or self.name.encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        self.connection.answered(keeps_alive=keeps_alive)

    def lost(self) -> None:
        self.is_lost.set()

    def broken(self) -> None: ...

    def filled(self) -> None: ...

    def drained(self) -> None: ...


class Gate:
    """A door for POST /door. What it took waits in `taken`, unless it answers at once."""

    def __init__(self) -> None:
        self.taken: asyncio.Queue[Taken] = asyncio.Queue()
        self.names: list[str] = []
        self.answers_at_once = False

    def is_for(self, message: RawRequestMessage) -> bool:
        return message.method == "POST" and message.url.path == "/door"

    def take(self, connection: ClientConnection, message: RawRequestMessage, payload: StreamReader) -> None:
        taken = Taken(connection, message, payload)
        self.names.append(taken.name)
        if self.answers_at_once:
            taken.answer()
        else:
            self.taken.put_nowait(taken)

    def unsound(self) -> web.Response:
        return web.Response(status=400)

    async def next(self) -> Taken:
        async with asyncio.timeout(_LONG):
            return await self.taken.get()


class World:
    """A server with a door, and one route of aiohttp's that says how many bytes it got, when it may."""

    def __init__(self, gate: Gate, runner: Runner, stack: AsyncExitStack) -> None:
        self.gate = gate
        self.runner = runner
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.plain_begun = asyncio.Event()
        self._stack = stack

    async def route(self, request: web.Request) -> web.Response:
        self.plain_begun.set()
        body = await request.read()
        await self.may_answer.wait()
        return web.Response(text=f"{request.headers.get('x-name', '')} {len(body)}")

    @property
    def port(self) -> int:
        return int(self.runner.addresses[0][1])

    async def client(self) -> Client:
        client = await Client.to(self.port)
        self._stack.callback(client.close)
        return client

    async def connection(self) -> tuple[ClientConnection, Client]:
        """A connection of the server's on a socket of which the test has the other end, idle, and never read by itself:
        the test says what `data_received` brings, and when."""
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        connection = self.runner.server()  # type: ignore[misc]
        assert isinstance(connection, ClientConnection)
        transport, _ = await loop.connect_accepted_socket(lambda: connection, ours)
        transport.pause_reading()
        self._stack.callback(transport.abort)
        client = Client(*await asyncio.open_connection(sock=theirs))
        self._stack.callback(client.close)
        return connection, client


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        app = web.Application(client_max_size=2**24)
        gate = Gate()
        runner = Runner(app, gate, handler_cancellation=True, access_log=None, shutdown_timeout=1.0, **options)
        world = World(gate, runner, stack)
        app.router.add_route("*", "/plain", world.route)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield world


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with serving() as world:
        yield world


def door(name: str) -> bytes:
    return request("POST /door", f"x-name: {name}", body=b"")


def plain(name: str, body: bytes | None = None) -> bytes:
    return request("POST /plain" if body is not None else "GET /plain", f"x-name: {name}", body=body)


async def said(client: Client) -> str:
    return (await client.answer()).body.decode()


async def turns(count: int = 20) -> None:
    """Let every task that can run do so, until it waits again."""
    for _ in range(count):
        await asyncio.sleep(0)


# ---------------------------------------------------------------------- what is relied on in aiohttp


def test_aiohttp_is_the_one_that_connection_py_was_read_for() -> None:
    version = tuple(int(part) for part in aiohttp.__version__.split(".")[:2])
    assert version == (3, 14), (
        f"aiohttp is {aiohttp.__version__}, and proxy/server/connection.py was read beside 3.14. Read it again beside "
        "web_protocol.py, base_protocol.py, web_server.py and web_runner.py: that `start` waits on `_waiter` whenever "
        "`_messages` is empty and pops one message behind it, and says `message_consumed`; that `data_received` fills "
        "`_messages` and wakes `_waiter`; who pauses and resumes reading, and when; when `_process_keepalive` closes; "
        "what `close`, `force_close`, `shutdown` and `connection_lost` touch. Then raise this version and the one in setup.cfg."
    )


def test_every_private_name_that_connection_py_uses_is_aiohttps() -> None:
    tree = ast.parse(getsource(connection_module))
    (ours,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ClientConnection")
    defined = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)} | set(ClientConnection.__slots__)
    used = {
        node.attr
        for node in ast.walk(ours)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert {"_messages", "_parser", "_keepalive_timeout", "_buffer_paused"} < used
    assert {name for name in used - defined if not hasattr(RequestHandler, name)} == set()
    # These are overridden: they must be there to be called by aiohttp.
    overridden = {"_waiter", "_process_keepalive", "data_received", "resume_reading", "connection_lost"}
    assert overridden <= defined
    assert {name for name in overridden if not hasattr(RequestHandler, name)} == set()


async def test_a_new_connection_is_as_connection_py_expects_it(world: World) -> None:
    connection, _ = await world.connection()
    await turns()
    assert connection._waiter is not None
    assert not connection._waiter.done()
    assert not connection._messages
    assert connection._parser is not None
    assert callable(connection._parser.message_consumed)
    assert 0 < connection._msg_queue_resume_size < connection._max_msg_queue_size <= 100
    assert connection._buffer_paused is connection._reading_paused is connection._close is False
    assert connection._keepalive_timeout > 0


async def test_what_is_parsed_is_as_the_door_expects_it() -> None:
    messages: list[RawRequestMessage] = []

    class Seeing(Gate):
        def take(self, connection: ClientConnection, message: RawRequestMessage, payload: StreamReader) -> None:
            messages.append(message)
            super().take(connection, message, payload)

    gate = Seeing()
    runner = Runner(web.Application(), gate)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = await Client.to(runner.addresses[0][1])
    client.send(request("POST /door?a=b", "X-Name: 1", "X-A: 1", "x-a: 2", body=b"body"))
    taken = await gate.next()
    assert taken.payload.is_eof()
    assert taken.payload.read_nowait(-1) == b"body"
    (message,) = messages
    assert (message.method, message.path, message.version) == ("POST", "/door?a=b", (1, 1))
    assert (message.should_close, message.upgrade) == (False, False)
    assert message.headers.getall("x-A") == ["1", "2"]
    client.close()
    await runner.cleanup()


# ---------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize(
    "order",
    [
        "dp",
        "pd",
        "ddpp",
        "ppdd",
        "dpdpdpdpdp",
        "ppdpddpdpp",
        "d" * 200,
        "p" * 200,
        "dp" * 100,
        "dddp" * 50,
        "dppp" * 50,
    ],
)
@pytest.mark.parametrize("comes", ["at once", "in small pieces"])
async def test_requests_are_answered_in_the_order_in_which_they_came(world: World, order: str, comes: str) -> None:
    """RFC 9112 §9.3.2; also when there are more than aiohttp's parser lets into its queue."""
    client = await world.client()
    world.gate.answers_at_once = True
    data = b"".join(door(str(number)) if kind == "d" else plain(str(number)) for number, kind in enumerate(order))
    if comes == "at once":
        client.send(data)
    else:
        for start in range(0, len(data), 500):
            client.send(data[start : start + 500])
            await asyncio.sleep(0)
    for number, kind in enumerate(order):
        assert await said(client) == (str(number) if kind == "d" else f"{number} 0")


async def test_requests_for_the_door_wait_for_the_answer_before(world: World) -> None:
    client = await world.client()
    client.send(b"".join(door(str(number)) for number in range(100)))
    for number in range(100):
        taken = await world.gate.next()
        assert taken.name == str(number)
        await turns()
        assert world.gate.taken.empty()
        taken.answer()
        assert await said(client) == str(number)


async def test_the_door_waits_for_a_slow_route(world: World) -> None:
    client = await world.client()
    world.may_answer.clear()
    client.send(plain("1") + door("2"))
    await world.plain_begun.wait()
    await turns()
    assert world.gate.names == []
    world.may_answer.set()
    (await world.gate.next()).answer()
    assert [await said(client), await said(client)] == ["1 0", "2"]


async def test_a_route_waits_for_a_slow_answer_of_the_door(world: World) -> None:
    client = await world.client()
    client.send(door("1") + plain("2") + door("3"))
    taken = await world.gate.next()
    await turns()
    assert not world.plain_begun.is_set()
    taken.answer()
    (await world.gate.next()).answer()
    assert [await said(client), await said(client), await said(client)] == ["1", "2 0", "3"]


async def test_a_request_that_comes_before_aiohttps_task_has_begun(world: World) -> None:
    class Early(asyncio.Protocol):
        """Some event loops have data with the connection."""

        def __init__(self, connection: RequestHandler) -> None:
            self._connection = connection

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self._connection.connection_made(transport)
            transport.set_protocol(self._connection)
            self._connection.data_received(door("1") + plain("2"))
            self._connection.data_received(door("3"))

    ours, theirs = socket.socketpair()
    connection = world.runner.server()  # type: ignore[misc]
    world.gate.answers_at_once = True
    await asyncio.get_running_loop().connect_accepted_socket(lambda: Early(connection), ours)
    client = Client(*await asyncio.open_connection(sock=theirs))
    assert [await said(client), await said(client), await said(client)] == ["1", "2 0", "3"]
    client.close()


async def test_what_comes_while_aiohttps_task_is_being_woken_stays_behind(world: World) -> None:
    """uvloop reads a socket several times before it runs any task, when there is that much to read."""
    connection, client = await world.connection()
    world.gate.answers_at_once = True
    await turns()
    connection.data_received(plain("1", b"x" * 10)[:-5])
    connection.data_received(b"x" * 5 + door("2"))
    connection.data_received(plain("3") + door("4"))
    assert [await said(client) for _ in range(4)] == ["1 10", "2", "3 0", "4"]


async def test_requests_beyond_the_limit_that_come_while_aiohttps_task_is_being_woken(world: World) -> None:
    connection, client = await world.connection()
    world.gate.answers_at_once = True
    await turns()
    connection.data_received(plain("0"))
    connection.data_received(b"".join(door(str(number)) for number in range(1, 60)))
    assert [await said(client) for _ in range(60)] == ["0 0", *(str(number) for number in range(1, 60))]


def test_it_is_the_same_on_uvloop() -> None:
    async def converse() -> list[str]:
        async with serving() as world:
            client = await world.client()
            world.gate.answers_at_once = True
            client.send((door("x") * 3 + plain("y", bytes(2**20))) * 50)
            return [await said(client) for _ in range(200)]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(converse()) == ["x", "x", "x", f"y {2**20}"] * 50


async def test_a_client_that_asks_on_and_on_behind_a_slow_route_is_read_no_further(world: World) -> None:
    """Else its requests would fill the memory."""
    world.may_answer.clear()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", world.port))
    batch = plain("x") * 1000
    sent = refused = 0
    while refused < 200 and sent < 16 * 2**20:
        try:
            sent += connection.send(batch)
            refused = 0
        except BlockingIOError:
            refused += 1
            await asyncio.sleep(0)
    assert sent < 8 * 2**20
    connection.close()
    world.may_answer.set()


# ---------------------------------------------------------------------- leaving, keeping, closing


@pytest.mark.parametrize("before", ["door", "plain"])
async def test_a_request_whose_client_leaves_while_it_waits_is_never_begun(world: World, before: str) -> None:
    client = await world.client()
    world.may_answer.clear()
    client.send((door("1") if before == "door" else plain("1")) + door("2") + plain("3") + door("4"))
    if before == "door":
        taken = await world.gate.next()
        client.reset()
        async with asyncio.timeout(_LONG):
            await taken.is_lost.wait()
    else:
        await world.plain_begun.wait()
        client.reset()
    other = await world.client()
    other.send(door("other"))
    (await world.gate.next()).answer()
    assert await said(other) == "other"
    assert world.gate.names == ["1", "other"][before != "door" :]
    world.may_answer.set()


async def test_who_answers_is_told_of_a_full_transport_and_of_room_and_of_nothing_behind_its_answer(
    world: World,
) -> None:
    client = await world.client()
    heard: list[str] = []
    client.send(door("1") + door("2"))
    first = await world.gate.next()
    first.filled = lambda: heard.append("filled")  # type: ignore[method-assign]
    first.drained = lambda: heard.append("drained")  # type: ignore[method-assign]
    first.lost = lambda: heard.append("lost")  # type: ignore[method-assign]
    first.answer(b"x" * 2**24)
    second = await world.gate.next()
    assert heard == ["filled"], "the first is told as long as it answers, and its answer is over"
    second.answer()
    assert [len(await said(client)), await said(client)] == [2**24, "2"]
    client.close()


async def test_an_idle_connection_is_closed_and_one_that_is_answered_on_is_not() -> None:
    async with serving(keepalive_timeout=0.05) as world:
        held = await world.client()
        held.send(door("1"))
        taken = await world.gate.next()
        for _ in range(3):  # For these three the time was over, one after the other.
            idle = await world.client()
            assert await idle.rest() == b""
        assert not taken.is_lost.is_set()
        taken.answer()
        assert await said(held) == "1"
        held.send(door("2") + plain("3"))
        (await world.gate.next()).answer()
        assert [await said(held), await said(held)] == ["2", "3 0"]
        assert await held.rest() == b""


async def test_an_answer_that_closes_leaves_what_waits_behind_it(world: World) -> None:
    client = await world.client()
    client.send(door("1") + door("2") + plain("3"))
    (await world.gate.next()).answer(keeps_alive=False)
    assert await said(client) == "1"
    assert await client.rest() == b""
    assert world.gate.names == ["1"]
    assert not world.plain_begun.is_set()


async def test_a_connection_that_is_to_close_does_so_behind_its_answer(world: World) -> None:
    """So aiohttp says it before it shuts down."""
    client = await world.client()
    client.send(door("1") + door("2"))
    taken = await world.gate.next()
    taken.connection.close()
    taken.answer()
    assert await said(client) == "1"
    assert await client.rest() == b""


async def test_a_cut_answer_is_a_connection_that_breaks(world: World) -> None:
    client = await world.client()
    client.send(door("1"))
    taken = await world.gate.next()
    taken.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal")
    taken.connection.cut()
    async with asyncio.timeout(_LONG):
        await taken.is_lost.wait()
    assert not (await client.rest()).endswith(b"half")


async def test_a_server_that_stops_closes_what_is_idle_and_what_is_still_answered(world: World) -> None:
    idle, used, held = [await world.client() for _ in range(3)]
    for client in (used, held):
        client.send(door("1"))
        (await world.gate.next()).answer()
        assert await said(client) == "1"
    held.send(door("2") + door("3"))
    taken = await world.gate.next()

    async with asyncio.timeout(_LONG):
        await world.runner.cleanup()
        assert [await client.rest() for client in (idle, used, held)] == [b"", b"", b""]
        await taken.is_lost.wait()
    assert world.gate.names == ["1", "1", "2"]


# ---------------------------------------------------------------------- the real door


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    client = await Client.to(proxy.port)
    yield client
    client.close()


@pytest.mark.parametrize(
    "target",
    [
        "/v1/chat/completions?a=b",
        "http://proxy/v1/chat/completions",
        "http://other.example:81/v1/chat/completions?a",
        "/v1/chat/completion%73",
        "/v1/%63hat/completions",
        "/v1/chat/completions/",
        "//v1//chat/completions",
    ],
)
async def test_the_door_is_found_however_its_path_is_written(
    upstream: FakeUpstream, proxy: Proxy, client: Client, target: str
) -> None:
    """RFC 9112 §3.2.2, RFC 3986 §6.2.2.2."""
    upstream.plays(echo)
    client.send(request(f"POST {target}", body=question()))
    assert (await client.answer()).said() == "answer to Hi"
    assert (await proxy.ledger.next())["mode"] == "whole"


async def test_a_protocol_that_is_merely_offered_is_no_matter(upstream: FakeUpstream, client: Client) -> None:
    """RFC 9110 §7.8. Java's HttpClient offers h2c with every request
    (https://docs.oracle.com/en/java/javase/21/docs/api/java.net.http/java/net/http/HttpClient.Version.html)."""
    upstream.plays(echo)
    offers = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"]
    for wants_stream in (False, True):
        client.send(chat("Hi", *offers, stream=wants_stream))
        assert (await client.answer()).said() == "answer to Hi"
        client.send(request("GET /health", *offers))
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (chat("Hi", "Connection: Upgrade", "Upgrade: websocket"), 400),
        (chat("Hi", "Connection: keep-alive, upgrade", "Upgrade: WebSocket", stream=True), 400),
        (request("GET /health", "Connection: Upgrade", "Upgrade: websocket"), 200),
    ],
)
async def test_a_connection_on_which_a_websocket_was_asked_for_in_vain_is_closed(
    upstream: FakeUpstream, client: Client, asked: bytes, status: int
) -> None:
    """aiohttp parses no request behind such a one: whatever came would wait for ever."""
    client.send(asked + chat("hidden"))
    answered = await client.answer()
    assert answered.status == status
    assert answered.headers["connection"] == "close"
    assert await client.rest() == b""
    assert upstream.requests == []


async def test_what_is_no_request_is_refused_behind_the_answer_before(upstream: FakeUpstream, client: Client) -> None:
    may_answer = asyncio.Event()

    async def play(received: Received, wire: Wire) -> None:
        await may_answer.wait()
        await echo(received, wire)

    upstream.plays(play)
    client.send(chat("1", stream=True) + request("GET /health"))
    await upstream.asked(1)
    client.send(b"\x00 garbage\r\n\r\n" + chat("hidden"))
    may_answer.set()
    assert (await client.answer()).said() == "answer to 1"
    assert (await client.answer()).status == 200
    assert (await client.answer()).status == 400
    assert await client.rest() == b""
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("mixed", [False, True])
async def test_200_requests_in_one_write(upstream: FakeUpstream, client: Client, mixed: bool) -> None:
    upstream.plays(echo)
    asked = [chat(f"question {number}", stream=number % 3 == 0) for number in range(200)]
    if mixed:
        asked[::2] = [request("GET /health")] * 100
    client.send(b"".join(asked))
    for number in range(200):
        answered = await client.answer()
        if mixed and number % 2 == 0:
            assert answered.json() == {"status": "ok"}
        else:
            assert answered.said() == f"answer to question {number}"


async def test_a_proxy_with_idle_connections_stops_at_once(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running_proxy(make_settings(tmp_path, upstream.url, server={"drain_s": 60})) as proxy:
        clients = [await Client.to(proxy.port) for _ in range(5)]
        for client in clients[1:]:
            client.send(chat() + request("GET /health"))
            assert (await client.answer()).status == (await client.answer()).status == 200
    for client in clients:
        assert await client.rest() == b""
        client.close()
