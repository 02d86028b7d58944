"""Clients that read their answers to the end: many connections, one answer after the other on each.

Cheap for the same reason as the upstream: a bare protocol on uvloop. While answers arrive it only counts events and keeps
the bytes; whether every answer is whole is checked after the last figure has been taken.
"""

import asyncio
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import httptools

import answer
from account import Account
from jobs import Job, Report, Requests

_FIRST_TOKEN = re.compile(rb'"content":\s*"[^"]')


@dataclass(slots=True)
class Answer:
    """What arrived for one request; times are CLOCK_MONOTONIC in ns. `reads`: (time, events so far) per read."""

    sent_ns: int
    pieces: list[bytes] = field(default_factory=list)
    status: int = 0
    events: int = 0
    first_token_ns: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)
    is_complete: bool = False


class Tally:
    """Counts over all connections of a job; takes a snapshot at each of its marks."""

    def __init__(self, job: Job, account: Account) -> None:
        total = job.connections * job.requests * job.plan.events
        self.events = 0
        self.reads = 0
        self.answers: list[Answer] = []
        self.errors: Counter[str] = Counter()
        self.last_request_at = time.monotonic() + job.for_s
        self._account = account
        self._marks = [round(total * mark) for mark in job.marks]

    def count(self, events: int) -> None:
        """Count the events of one read."""
        self.reads += 1
        self.events += events
        while self._marks and self.events >= self._marks[0]:
            del self._marks[0]
            self._account.snap(self.events)


class Client(asyncio.Protocol):
    """One connection: `job.requests` answers, one after the other; `finished` is set when it has nothing left to do."""

    def __init__(self, job: Job, tally: Tally, requests: Requests) -> None:
        self._job = job
        self._tally = tally
        self._requests = requests
        self._left = job.requests
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer(0)
        self._tail = b""
        self._read_ns = 0
        self.finished = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.is_set():
            self._fail("connection closed early")

    def abort(self) -> None:
        """Give up what is still open, as a fault."""
        if not self.finished.is_set():
            self._fail("timed out")
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._read_ns = time.monotonic_ns()
        before = self._answer.events
        current = self._answer
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"bad HTTP: {error}")
            self._transport.abort()
        if current.events > before:
            if self._job.plan.stamp:
                current.reads.append((self._read_ns, current.events))
            self._tally.count(current.events - before)

    def on_body(self, piece: bytes) -> None:
        current = self._answer
        current.pieces.append(piece)
        # An event's end may be split over two pieces; the tail is the one byte that may be the first half.
        current.events += piece.count(b"\n\n") + (self._tail == b"\n" == piece[:1])
        self._tail = b"" if piece.endswith(b"\n\n") else piece[-1:]
        if not current.first_token_ns and _FIRST_TOKEN.search(b"".join(current.pieces)):
            current.first_token_ns = self._read_ns

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._answer.is_complete = True
        self._left -= 1
        if not self._left or time.monotonic() >= self._tally.last_request_at:
            self._finish()
        elif self._job.pause_ms:
            asyncio.get_running_loop().call_later(self._job.pause_ms / 1000, self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        if self.finished.is_set():
            return
        self._tail = b""
        self._answer = Answer(time.monotonic_ns())
        self._tally.answers.append(self._answer)
        self._transport.write(self._requests.next())

    def _fail(self, reason: str) -> None:
        self._tally.errors[reason] += 1
        self._finish()

    def _finish(self) -> None:
        self.finished.set()
        self._transport.close()


async def play(job: Job) -> Report:
    """Do the job and report; faults are counted in the report, never raised."""
    account = Account(job.pid)
    tally = Tally(job, account)
    await account.snap_when_quiet(0)
    started, load_cpu_s = time.perf_counter(), -time.process_time()
    await _exchange(job, tally)
    wall_s = time.perf_counter() - started
    load_cpu_s += time.process_time()
    await account.snap_when_quiet(tally.events)
    return _report(job, tally, account, wall_s, load_cpu_s)


async def _exchange(job: Job, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    requests = Requests(job)
    clients: list[Client] = []

    async def connect(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        client = Client(job, tally, requests)
        clients.append(client)
        try:
            await loop.create_connection(lambda: client, "127.0.0.1", job.port)
        except OSError as error:
            tally.errors[f"no connection: {error.strerror}"] += 1
            return
        await client.finished.wait()

    delays = [job.ramp_s * index / job.connections for index in range(job.connections)]
    try:
        async with asyncio.timeout(job.timeout_s):
            await asyncio.gather(*map(connect, delays))
    except TimeoutError:
        for client in clients:
            client.abort()


def _report(job: Job, tally: Tally, account: Account, wall_s: float, load_cpu_s: float) -> Report:
    errors = tally.errors
    whole = []
    for each in tally.answers:
        if each.is_complete:
            fault = f"status {each.status}" if each.status != 200 else answer.fault(b"".join(each.pieces), job.plan)
            if fault is None:
                whole.append(each)
            else:
                errors[fault] += 1
    ttft_ms = [(each.first_token_ns - each.sent_ns) / 1e6 for each in whole if job.plan.stream]
    arrivals = [list(_arrivals(each)) for each in whole if job.plan.stamp]
    gaps_ms = [(later[1] - earlier[1]) / 1e6 for tokens in arrivals for earlier, later in pairwise(tokens)]
    delays_ms = [(arrived_ns - written_ns) / 1e6 for tokens in arrivals for written_ns, arrived_ns in tokens]
    return Report(
        asked=max(len(tally.answers), job.connections),
        whole=len(whole),
        errors=dict(errors),
        events=tally.events,
        reads=tally.reads,
        body_bytes=sum(len(piece) for each in tally.answers for piece in each.pieces),
        wall_s=wall_s,
        load_cpu_s=load_cpu_s,
        snapshots=account.snapshots,
        ttft_ms=statistics.median(ttft_ms) if ttft_ms else None,
        gap_ms=_p50_p99(gaps_ms),
        delay_ms=_p50_p99(delays_ms),
    )


def _arrivals(each: Answer) -> Iterator[tuple[int, int]]:
    """(written, arrived) of every token of a stamped answer, in ns."""
    reads = iter(each.reads)
    arrived_ns, seen = next(reads)
    # The role event is the first of the answer, so the first token is event 2.
    for number, stamp in enumerate(answer.contents(b"".join(each.pieces)), start=2):
        while seen < number:
            arrived_ns, seen = next(reads)
        yield int(stamp), arrived_ns


def _p50_p99(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
