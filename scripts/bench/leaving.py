"""Clients that do not read to the end: one hangs up in the middle of its answer, one stays and reads no more.

What matters then happens at the upstream, which is asked for it (see `upstream.py`), on connections past the contestant.
Times of the two processes are compared as CLOCK_MONOTONIC, which all processes of a machine share (clock_gettime(2)).
"""

import asyncio
import json
import math
import socket
import time
from collections import Counter
from contextlib import closing
from typing import Any

import answer
from account import Account
from jobs import Job, Report, Requests

_TOLD_S = 1.0
"""An upstream that was not told of a hang-up by then counts as never told."""

_LOOK_S = 0.01
"""How long a client reads what an upstream has to say that is silent; and how long nothing is asked after a hang-up, so
that the question does not delay what it asks for."""

_TOKENS_BEFORE_HANG_UP = 5

_RECEIVE_BUFFER = 8192
_POLL_S = 0.05
_STANDSTILL_S = 0.75


class _Call:
    """One request on a connection of its own, and what the upstream says of it. Closing it is hanging up."""

    def __init__(self, job: Job, requests: Requests) -> None:
        self._job = job
        self._request = requests.next()
        self._name = requests.name
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self.received = bytearray()

    async def ask(self, receive_buffer: int | None = None) -> None:
        """Connect, send the request, and wait until the upstream has it."""
        if receive_buffer is not None:
            # Before the connection is made, because the window that it may offer is settled then (tcp(7)).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", self._job.port))
        await loop.sock_sendall(self._socket, self._request)
        await self._learn("begun")

    async def read_until(self, text: bytes) -> None:
        """Read until `text` has come. ConnectionError when the answer ends before."""
        loop = asyncio.get_running_loop()
        while text not in self.received:
            data = await loop.sock_recv(self._socket, 4096)
            if not data:
                raise ConnectionError("connection closed early")
            self.received += data

    def close(self) -> None:
        self._socket.close()

    async def sent_bytes(self) -> int:
        return int((await self._learn("sent"))["sent"])

    async def left_ns(self) -> int | None:
        """When the upstream found the other side gone, 0 if its answer went out before; None if neither within `_TOLD_S`."""
        try:
            async with asyncio.timeout(_TOLD_S):
                return int((await self._learn("ended"))["left_ns"])
        except TimeoutError:
            return None

    async def _learn(self, topic: str) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._job.upstream_port)
        with closing(writer):
            writer.write(f"GET /{topic}/{self._name} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            return json.loads(await reader.readuntil(b"}"))


async def hang_up(job: Job) -> Report:
    """`job.requests` clients, one after the other, hang up: at once when they have their fifth token, or, when the first
    token is late, while the upstream is silent. Ends with the first hang-up that the upstream is not told of."""
    account = Account(job.pid)
    requests = Requests(job)
    errors: Counter[str] = Counter()
    told_ms: list[float] = []
    await account.snap_when_quiet(0)
    started, load_cpu_s = time.perf_counter(), -time.process_time()
    for _ in range(job.requests):
        try:
            async with asyncio.timeout(job.timeout_s):
                told_ms.append(await _time_to_tell(_Call(job, requests), job.plan))
        except (ConnectionError, TimeoutError) as error:
            errors[str(error) or "timed out"] += 1
            break
        if math.isinf(told_ms[-1]):
            break
    wall_s = time.perf_counter() - started
    load_cpu_s += time.process_time()
    await account.snap_when_quiet(0)
    return Report(
        asked=len(told_ms) + errors.total(),
        whole=len(told_ms),
        errors=dict(errors),
        events=0,
        reads=0,
        body_bytes=0,
        wall_s=wall_s,
        load_cpu_s=load_cpu_s,
        snapshots=account.snapshots,
        told_ms=tuple(told_ms),
    )


async def _time_to_tell(call: _Call, plan: answer.Plan) -> float:
    with closing(call):
        await call.ask()
        await _read_some(call, plan)
        hung_up_ns = time.monotonic_ns()
    await asyncio.sleep(_LOOK_S)
    left_ns = await call.left_ns()
    if left_ns == 0:
        raise ConnectionError("the answer was over before the client hung up")
    return math.inf if left_ns is None else (left_ns - hung_up_ns) / 1e6


async def _read_some(call: _Call, plan: answer.Plan) -> None:
    """Read up to the token after which to hang up, or what comes before a silence: at most a head."""
    last = answer.token(_TOKENS_BEFORE_HANG_UP - 1, plan.size).encode()
    if not plan.first_ms:
        await call.read_until(last)
        return
    try:
        async with asyncio.timeout(_LOOK_S):
            await call.read_until(last)
    except TimeoutError:
        return


async def stop_reading(job: Job) -> Report:
    """One client reads its first token and nothing more, until the upstream has been at a standstill for a while.

    Its receive buffer is small, and what still waits in the upstream's send buffer does not count as sent (`upstream.py`):
    on loopback each would grow to megabytes, and what is asked for is the contestant's own appetite.
    """
    account = Account(job.pid)
    call = _Call(job, Requests(job))
    errors: Counter[str] = Counter()
    sent_bytes = 0
    await account.snap_when_quiet(0)
    started, load_cpu_s = time.perf_counter(), -time.process_time()
    try:
        with closing(call):
            async with asyncio.timeout(job.timeout_s):
                await call.ask(_RECEIVE_BUFFER)
                await call.read_until(answer.token(0, job.plan.size).encode())
                sent_bytes = await _standstill(call)
            account.snap(1)
        # So that nothing of this answer goes on during the next measure.
        await call.left_ns()
    except (ConnectionError, TimeoutError) as error:
        errors[str(error) or "no standstill"] += 1
    wall_s = time.perf_counter() - started
    load_cpu_s += time.process_time()
    await account.snap_when_quiet(1)
    return Report(
        asked=1,
        whole=1 - errors.total(),
        errors=dict(errors),
        events=1,
        reads=1,
        body_bytes=len(call.received),
        wall_s=wall_s,
        load_cpu_s=load_cpu_s,
        snapshots=account.snapshots,
        sent_bytes=sent_bytes,
    )


async def _standstill(call: _Call) -> int:
    """Wait until nothing more is taken from the upstream; how many bytes were."""
    sent_bytes = await call.sent_bytes()
    stands_since = time.monotonic()
    while time.monotonic() - stands_since < _STANDSTILL_S:
        await asyncio.sleep(_POLL_S)
        before, sent_bytes = sent_bytes, await call.sent_bytes()
        if sent_bytes != before:
            stands_since = time.monotonic()
    return sent_bytes
