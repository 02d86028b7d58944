"""The load generator: plays one `Job` at a time against one port and reports what it cost and whether it was right.

It is a process of its own, so that its CPU is not the contestant's, and cheap for the same reason as the upstream: a
bare protocol on uvloop. While answers arrive it only counts events and keeps the bytes; whether every answer is whole
is checked after the last figure has been taken.

Run: `python load.py`; reads jobs as JSON lines from standard input, writes reports as JSON lines, ends with its input.
"""

import asyncio
import gc
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import cast

import httptools
import uvloop

import answer
import procfs

_FIRST_TOKEN = re.compile(rb'"content":\s*"[^"]')
_QUIET_S = 0.05
_QUIET_SHARE = 0.02
_QUIET_TRIES = 40


@dataclass(frozen=True, slots=True)
class Job:
    """`connections` x `requests` answers to `plan`; every connection sends its next request when its answer is whole.

    pid: the root of the process tree to account for, None for no account. ramp_s: the connections are opened evenly
    over this time. pause_ms: rest between an answer and the next request. marks: shares (0 to 1) of all events after
    which a snapshot is taken while the rest still streams. timeout_s bounds the whole job.
    """

    port: int
    pid: int | None
    plan: answer.Plan
    connections: int
    requests: int
    ramp_s: float = 0.0
    pause_ms: float = 0.0
    marks: tuple[float, ...] = ()
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The contestant's tree when `events` SSE events of the job had arrived."""

    events: int
    cpu_s: float
    memory: procfs.Memory


@dataclass(frozen=True, slots=True)
class Report:
    """What one job found.

    snapshots: one when all was quiet before, one per mark, one when all was quiet again (so that work a contestant
    does after its answer is counted); empty without a pid. reads: reads from a socket that held at least one whole
    event. ttft_ms: median time from a request to its first token. gap and delay: percentiles 50 and 99 of the time
    between two tokens' arrivals, and from the upstream's write of a token to its arrival (stamped plans only).
    """

    asked: int
    whole: int
    errors: dict[str, int]
    events: int
    reads: int
    body_bytes: int
    wall_s: float
    snapshots: list[Snapshot]
    ttft_ms: float | None
    gap_ms: tuple[float, float] | None
    delay_ms: tuple[float, float] | None

    @classmethod
    def from_json(cls, line: str) -> "Report":
        fields = json.loads(line)
        fields["snapshots"] = [
            Snapshot(each["events"], each["cpu_s"], procfs.Memory(**each["memory"])) for each in fields["snapshots"]
        ]
        return cls(**fields)


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
    """Counts over all connections of a job, and the snapshots."""

    def __init__(self, job: Job) -> None:
        total = job.connections * job.requests * job.plan.events
        self.events = 0
        self.reads = 0
        self.answers: list[Answer] = []
        self.errors: Counter[str] = Counter()
        self.snapshots: list[Snapshot] = []
        self._pid = job.pid
        self._marks = [round(total * mark) for mark in job.marks]

    def count(self, events: int) -> None:
        """Count the events of one read; takes the snapshot when a mark is reached."""
        self.reads += 1
        self.events += events
        while self._marks and self.events >= self._marks[0]:
            del self._marks[0]
            self.snap()

    def snap(self) -> None:
        if self._pid is not None:
            pids = procfs.tree(self._pid)
            self.snapshots.append(Snapshot(self.events, procfs.cpu_s(pids), procfs.memory(pids)))


class Requests:
    """The bytes of one request after the other. No two are alike, in this run or another, so no cache can answer."""

    def __init__(self, job: Job) -> None:
        mark = "#" * 12
        system = "You are a helpful assistant. Answer in plain words, at most a few sentences, and say when unsure."
        body = json.dumps(
            {
                "model": "bench",
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"{os.urandom(8).hex()} {mark}: why does a river bend?"},
                ],
                "temperature": 0.7,
                **answer.to_fields(job.plan),
            }
        )
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{job.port}\r\naccept: */*\r\n"
            "authorization: Bearer sk-bench\r\nuser-agent: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        before, after = (head + body).split(mark)
        self._before, self._after = before.encode(), after.encode()
        self._serial = 0

    def next(self) -> bytes:
        self._serial += 1
        return b"%b%012d%b" % (self._before, self._serial, self._after)


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
        if not self._left:
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
        self._tally.errors[reason] += self._left
        self._finish()

    def _finish(self) -> None:
        self.finished.set()
        self._transport.close()


async def play(job: Job) -> Report:
    """Do the job and report; faults are counted in the report, never raised."""
    tally = Tally(job)
    await _quiet(job.pid)
    tally.snap()
    started = time.perf_counter()
    await _exchange(job, tally)
    wall_s = time.perf_counter() - started
    await _quiet(job.pid)
    tally.snap()
    return _report(job, tally, wall_s)


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
            tally.errors[f"no connection: {error.strerror}"] += job.requests
            return
        await client.finished.wait()

    delays = [job.ramp_s * index / job.connections for index in range(job.connections)]
    try:
        async with asyncio.timeout(job.timeout_s):
            await asyncio.gather(*map(connect, delays))
    except TimeoutError:
        for client in clients:
            client.abort()


async def _quiet(pid: int | None) -> None:
    """Return when the process tree has nearly stopped using CPU, or after about 2 s."""
    if pid is None:
        return
    pids = procfs.tree(pid)
    used_s = procfs.cpu_s(pids)
    for _ in range(_QUIET_TRIES):
        await asyncio.sleep(_QUIET_S)
        before_s, used_s = used_s, procfs.cpu_s(pids)
        if used_s - before_s < _QUIET_S * _QUIET_SHARE:
            return


def _report(job: Job, tally: Tally, wall_s: float) -> Report:
    errors = tally.errors
    whole = []
    for each in tally.answers:
        if each.is_complete:
            fault = f"status {each.status}" if each.status != 200 else answer.fault(b"".join(each.pieces), job.plan)
            if fault is None:
                whole.append(each)
            else:
                errors[fault] += 1
    asked = job.connections * job.requests
    ttft_ms = [(each.first_token_ns - each.sent_ns) / 1e6 for each in whole if job.plan.stream]
    arrivals = [list(_arrivals(each)) for each in whole if job.plan.stamp]
    gaps_ms = [(later[1] - earlier[1]) / 1e6 for tokens in arrivals for earlier, later in pairwise(tokens)]
    delays_ms = [(arrived_ns - written_ns) / 1e6 for tokens in arrivals for written_ns, arrived_ns in tokens]
    return Report(
        asked=asked,
        whole=len(whole),
        errors=dict(errors),
        events=tally.events,
        reads=tally.reads,
        body_bytes=sum(len(piece) for each in tally.answers for piece in each.pieces),
        wall_s=wall_s,
        snapshots=tally.snapshots,
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


def main() -> None:
    # A collection while answers arrive would show as a late chunk; between two jobs it is harmless.
    gc.disable()
    for line in sys.stdin:
        fields = json.loads(line)
        plan = answer.Plan(**fields.pop("plan"))
        report = uvloop.run(play(Job(plan=plan, **fields)))
        print(json.dumps(asdict(report)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
