"""Connections that wait: used again while they are young, and closed by themselves when nobody comes for them."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.errors import OverloadedError
from proxy.upstream.endpoint import Endpoint
from proxy.upstream.http1 import Exchange
from proxy.upstream.pool import Origin, Pool

_LONG = 20.0
_FAR = 3600.0
_SOON = 0.05


class Server:
    """Answers every request with its connection's number, counted from 1, and tells which connections have gone."""

    def __init__(self) -> None:
        self._gone: asyncio.Queue[int] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._serve(len(self._tasks) + 1, reader, writer)))

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._gone.put_nowait(number)
        finally:
            writer.close()

    async def is_left(self) -> int:
        """Wait until a connection has gone; its number."""
        return await asyncio.wait_for(self._gone.get(), _LONG)

    async def is_left_by_all(self) -> None:
        await asyncio.wait_for(asyncio.gather(*self._tasks), _LONG)


@asynccontextmanager
async def pooled(*, max_idle_s: float = _FAR, max_age_s: float = _FAR) -> AsyncIterator[tuple[Server, Pool]]:
    server = Server()
    async with await asyncio.start_server(server.connected, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        pool = Pool(Origin("up", Endpoint("127.0.0.1", port)), _LONG, max_idle_s=max_idle_s, max_age_s=max_age_s)
        yield server, pool
        pool.close()
        await server.is_left_by_all()


async def ask(pool: Pool) -> tuple[Exchange, int]:
    """An exchange that is over but still holds its connection, and that connection's number."""
    connection = pool.take() or await pool.connect()
    exchange = connection.start(b"GET / HTTP/1.1\r\n\r\n", b"", has_no_body=False)
    await exchange.head()
    number = int(await exchange.read())
    assert await exchange.read() == b""
    return exchange, number


async def a_while() -> None:
    """Wait until a connection that was made now would be half as old as it may become."""
    async with pooled(max_idle_s=_SOON) as (server, pool):
        (await ask(pool))[0].close()
        await server.is_left()


async def test_the_connection_used_last_is_used_first() -> None:
    async with pooled() as (_, pool):
        (first, _), (second, _), (third, _) = await ask(pool), await ask(pool), await ask(pool)
        for exchange in (second, first, third):
            exchange.close()

        assert [(await ask(pool))[1] for _ in range(4)] == [3, 1, 2, 4]


async def test_a_connection_that_nobody_comes_for_is_closed_and_one_in_use_is_not() -> None:
    async with pooled(max_idle_s=_SOON) as (server, pool):
        used, _ = await ask(pool)
        for number in (2, 3):
            idle, _ = await ask(pool)
            idle.close()
            assert await server.is_left() == number

        used.close()
        assert (await ask(pool))[1] == 1


async def test_a_connection_that_waited_too_long_is_not_used_although_the_timer_is_late() -> None:
    async with pooled(max_idle_s=_SOON) as (_, pool):
        (await ask(pool))[0].close()
        # uvloop's clock counts whole milliseconds, and stands still within a turn.
        time.sleep(2 * _SOON)  # noqa: ASYNC251 - the event loop is held, and its timers with it
        await asyncio.sleep(0)

        assert (await ask(pool))[1] == 2


async def test_an_old_connection_is_closed_when_it_comes_back_and_while_it_waits() -> None:
    async with pooled(max_age_s=_SOON) as (server, pool):
        used, _ = await ask(pool)
        waiting, _ = await ask(pool)
        waiting.close()
        assert await server.is_left() == 2

        # The first is older still, and was left in peace; now it is let go.
        used.close()
        assert await server.is_left() == 1
        assert (await ask(pool))[1] == 3


async def test_the_one_that_is_due_first_is_closed_first_whoever_came_back_first() -> None:
    async with pooled(max_age_s=2 * _SOON) as (server, pool):
        old, _ = await ask(pool)
        await a_while()
        young, _ = await ask(pool)
        young.close()
        old.close()

        assert [await server.is_left(), await server.is_left()] == [1, 2]


async def test_a_process_that_may_open_no_more_blames_no_upstream() -> None:
    async with pooled() as (_, pool):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(OverloadedError, match="as the system allows") as caught:
                await pool.connect()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (caught.value.status, caught.value.retry_after) == (503, "1")
