"""A scripted outgoing proxy on a real socket: it opens tunnels, or plays what a test writes instead.

async with FakeConnectProxy() as tunnels:
    tunnels.plays(says(b"HTTP/1.1 407 Proxy Authentication Required\\r\\n\\r\\n"))
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType


@dataclass
class Asked:
    """A request for a tunnel, and the connection it came on."""

    method: str
    authority: str
    headers: dict[str, str]
    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)


Play = Callable[[Asked], Awaitable[None]]


@dataclass
class FakeConnectProxy:
    """A proxy on a free port of the loopback. `address` is host and port; `asked` what it was asked for."""

    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)

    async def __aenter__(self) -> FakeConnectProxy:
        self._play: Play = opens()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self.tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def plays(self, play: Play) -> None:
        self._play = play

    async def is_left(self) -> None:
        """Wait until every connection there is has been closed by the other side."""
        async with asyncio.timeout(20):
            await asyncio.gather(*self._tasks)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")[:-2]
            method, authority, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            asked = Asked(method, authority, headers, reader, writer)
            self.asked.append(asked)
            await self._play(asked)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


def opens(port: int | None = None) -> Play:
    """A tunnel to where was asked for, or to `port` of the loopback whatever was asked for."""

    async def play(asked: Asked) -> None:
        host, _, asked_port = asked.authority.rpartition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1" if port else host, port or int(asked_port))
        try:
            asked.writer.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 fake\r\n\r\n")
            await asyncio.gather(_relay(asked.reader, writer), _relay(reader, asked.writer))
        finally:
            writer.close()

    return play


def says(answer: bytes, *, closes: bool = False) -> Play:
    """These very bytes and no tunnel; then the connection is closed, or held until the other side closes it."""

    async def play(asked: Asked) -> None:
        asked.writer.write(answer)
        await asked.writer.drain()
        while not closes and await asked.reader.read(65_536):
            pass

    return play


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()
