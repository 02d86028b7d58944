"""What the load generator is asked to do and what it reports back: the words between it and the benchmark.

A `Job` travels to it as a line of JSON, a `Report` travels back the same way.
"""

import json
import math
import os
from dataclasses import dataclass
from enum import StrEnum

import answer
import procfs
from account import Snapshot


class Manner(StrEnum):
    """What a client does with an answer: reads all of it, hangs up in the middle, or stays and reads no more."""

    READ = "read"
    HANG_UP = "hang up"
    STOP_READING = "stop reading"


@dataclass(frozen=True, slots=True)
class Job:
    """`connections` x `requests` answers to `plan`; every connection sends its next request when its answer is whole.

    pid: the root of the process tree to account for, None for no account. for_s: the time after which no next request is
    sent, however many are left, so that a job tells as much of a quick contestant as of a slow one. ramp_s: the
    connections are opened evenly over this time. pause_ms: rest between an answer and the next request. marks: shares
    (0 to 1) of all events after which a snapshot is taken while the rest still streams. timeout_s bounds the whole job.

    key: what is presented as API key. manner: a client that does not read to the end has one connection for each request,
    one after the other; it needs upstream_port, the scripted upstream's own.
    """

    port: int
    pid: int | None
    plan: answer.Plan
    connections: int
    requests: int
    for_s: float = math.inf
    ramp_s: float = 0.0
    pause_ms: float = 0.0
    marks: tuple[float, ...] = ()
    timeout_s: float = 60.0
    manner: Manner = Manner.READ
    upstream_port: int = 0
    key: str = "sk-bench"


@dataclass(frozen=True, slots=True)
class Report:
    """What one job found.

    asked: requests sent; whole: those whose answer was right, as far as it was read. snapshots: one when all was quiet
    before, one per mark, one when all was quiet again (so that work a contestant does after its answer is counted);
    empty without a pid. reads: reads from a socket that held at least one whole event. load_cpu_s and
    upstream_cpu_s: CPU time of load generator (while answers arrived) and upstream (which only the benchmark can see).

    ttft_ms: median time from a request to its first token. gap and delay: percentiles 50 and 99 of the time between two
    tokens' arrivals, and from the upstream's write of a token to its arrival (stamped plans only).

    told_ms: from each hang-up until the upstream was told; infinite when it was not within a second, and then the last.
    sent_bytes: what a contestant had taken from the upstream when a client that had stopped reading had brought it to a
    standstill, which is when the one snapshot between the first and the last was taken.
    """

    asked: int
    whole: int
    errors: dict[str, int]
    events: int
    reads: int
    body_bytes: int
    wall_s: float
    load_cpu_s: float
    snapshots: list[Snapshot]
    ttft_ms: float | None = None
    gap_ms: tuple[float, float] | None = None
    delay_ms: tuple[float, float] | None = None
    told_ms: tuple[float, ...] = ()
    sent_bytes: int = 0
    upstream_cpu_s: float = 0.0

    @property
    def own_busy(self) -> float:
        """How much of the time load generator and upstream had work, 1 being one core's time."""
        return (self.load_cpu_s + self.upstream_cpu_s) / self.wall_s

    @classmethod
    def from_json(cls, line: str) -> "Report":
        fields = json.loads(line)
        fields["snapshots"] = [
            Snapshot(each["events"], each["cpu_s"], procfs.Memory(**each["memory"])) for each in fields["snapshots"]
        ]
        return cls(**fields)


class Requests:
    """The bytes of one request after the other.

    No two are alike, in this run or another: no cache can answer, and none shares the answer to another one in flight. To
    find that out is a part of what a request costs, so it is left switched on.
    """

    def __init__(self, job: Job) -> None:
        mark = "#" * 29
        system = "You are a helpful assistant. Answer in plain words, at most a few sentences, and say when unsure."
        body = json.dumps(
            {
                "model": "bench",
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"{mark}: why does a river bend?"},
                ],
                "temperature": 0.7,
                "bench_call": mark,
                **answer.to_fields(job.plan),
            }
        )
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{job.port}\r\naccept: */*\r\n"
            f"authorization: Bearer {job.key}\r\n"
            "user-agent: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self._parts = [part.encode() for part in (head + body).split(mark)]
        self._run = os.urandom(8).hex()
        self._serial = 0

    @property
    def name(self) -> str:
        """The newest request's `bench_call`."""
        return f"{self._run}-{self._serial:012d}"

    def next(self) -> bytes:
        self._serial += 1
        return self.name.encode().join(self._parts)
