"""What is measured: every `Measure` is one load job and how its report becomes figures.

To add one: add a `Measure` to `measures` and its figures to `FIGURES`. Whoever knows one by its name says so at its head:
`targets` (figures that have a bound) and `budget` (loads that are profiled).
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from account import Snapshot
from answer import Plan
from jobs import Job, Manner, Report

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table. over_direct: the value only means something minus the one of no proxy at all. is_of_bench: it
    tells of the benchmark's own processes, so that no contestant's can be better than another's."""

    label: str
    decimals: int
    over_direct: bool = False
    is_of_bench: bool = False


FIGURES: dict[str, Figure] = {
    "chunk_cpu_us": Figure("back to back: CPU per chunk, us", 2),
    "chunk_per_read": Figure("back to back: chunks per client read", 1),
    "chunk_busy": Figure("back to back: load and upstream busy, %", 0, is_of_bench=True),
    "burst_cpu_us": Figure("bursts of 10: CPU per chunk, us", 2),
    "burst_per_read": Figure("bursts of 10: chunks per client read", 1),
    "request_cpu_us": Figure("small JSON request: CPU, us", 1),
    "request_busy": Figure("small JSON request: load and upstream busy, %", 0, is_of_bench=True),
    "short_cpu_us": Figure("stream of 3 chunks: CPU, us", 1),
    "slow_cpu_us": Figure("slow streams: CPU per chunk, us", 1),
    "slow_busy": Figure("slow streams: load and upstream busy, %", 0, is_of_bench=True),
    "slow_rss_kib": Figure("slow streams: RSS per stream, KiB", 1),
    "slow_above_kib": Figure("slow streams: all RSS above 60 MB, per stream, KiB", 1),
    "slow_uss_kib": Figure("slow streams: USS per stream, KiB", 1),
    "idle_rss_mib": Figure("idle after warm-up: RSS, MiB", 1),
    "idle_pss_mib": Figure("idle after warm-up: PSS, MiB", 1),
    "ttft_ms": Figure("idle: added time to first token, ms", 3, over_direct=True),
    "delay_p50_ms": Figure("5 ms gaps: added delay of a token, p50, ms", 3, over_direct=True),
    "delay_p99_ms": Figure("5 ms gaps: added delay of a token, p99, ms", 3, over_direct=True),
    "gap_p50_ms": Figure("5 ms gaps: added gap, p50, ms", 3, over_direct=True),
    "gap_p99_ms": Figure("5 ms gaps: added gap, p99, ms", 3, over_direct=True),
    "long_first_us": Figure("long stream: CPU per chunk, first tenth, us", 2),
    "long_last_us": Figure("long stream: CPU per chunk, last tenth, us", 2),
    "long_step": Figure("long stream: last tenth / first tenth", 3),
    "long_memory": Figure("long stream: RSS growth / answer's bytes", 2),
    "stall_rss_mib": Figure("client stops reading 50 MB: RSS growth, MiB", 2),
    "stall_sent_mib": Figure("client stops reading 50 MB: taken from upstream, MiB", 2),
    "stall_left_mib": Figure("and then hangs up: RSS growth, MiB", 2),
    "flow_told_ms": Figure("hang-up in mid-stream: upstream told, median, ms", 2),
    "flow_worst_ms": Figure("hang-up in mid-stream: upstream told, worst, ms", 2),
    "silent_told_ms": Figure("hang-up before first token: upstream told, median, ms", 2),
    "silent_worst_ms": Figure("hang-up before first token: upstream told, worst, ms", 2),
}


@dataclass(frozen=True, slots=True)
class Measure:
    """One load job (its port and pid are filled in for each contestant) and what it tells.

    takes: how often it is taken in a round; several short ones see more of a machine's good and bad spells than a long
    one. is_fresh: wants a contestant that was only warmed up, because memory that an earlier measure left to the
    allocator would hide its growth. is_cost: only about a contestant's process, so pointless without a proxy.
    """

    name: str
    job: Job
    read: Callable[[Report], Figures]
    takes: int = 1
    is_fresh: bool = False
    is_cost: bool = True


def measures(is_quick: bool) -> tuple[Measure, ...]:
    """All measures, those that want a fresh contestant last."""
    share = 3 if is_quick else 1
    takes = 1 if is_quick else 2
    for_s = 0.3 if is_quick else 0.5
    hang_ups = 17 if is_quick else 26
    gap_ms = 200.0 if is_quick else 400.0
    return (
        Measure("back-to-back", _job(Plan(2000 // share), 8, for_s=for_s), _back_to_back, takes),
        Measure("bursts", _job(Plan(1000 // share, gap_ms=1.0, burst=10), 4, for_s=for_s), _bursts, takes),
        Measure("small-requests", _job(Plan(3, stream=False), 16, for_s=for_s), _requests, takes + 1),
        Measure("short-streams", _job(Plan(3), 16, for_s=for_s), _short_streams, takes),
        Measure("first-token", _job(Plan(3), 1, 200 // share, pause_ms=2.0), _first_token, is_cost=False),
        Measure("gaps", _job(Plan(200 // share, gap_ms=5.0, stamp=True), 1, 1), _gaps, is_cost=False),
        Measure(
            "hang-up",
            _job(Plan(2000, gap_ms=5.0, watched=True), 1, hang_ups, manner=Manner.HANG_UP),
            _told("flow"),
        ),
        Measure(
            "hang-up-silent",
            _job(Plan(3, first_ms=30_000.0, watched=True), 1, hang_ups, manner=Manner.HANG_UP),
            _told("silent"),
        ),
        Measure(
            "slow-streams",
            # Most events arrive after all streams have begun and before any ends.
            _job(Plan(12, gap_ms=gap_ms, first_ms=gap_ms), 1000, 1, ramp_s=1.0, marks=(0.3, 0.7)),
            _slow_streams,
            is_fresh=True,
        ),
        Measure(
            "long-stream",
            _job(Plan(100_000 // share, gap_ms=1.0, burst=50), 1, 1, marks=(0.1, 0.9, 1.0)),
            _long_stream,
            is_fresh=True,
        ),
        Measure(
            "stop-reading",
            _job(Plan(50_000, size=750, watched=True), 1, 1, manner=Manner.STOP_READING),
            _stop_reading,
            is_fresh=True,
        ),
    )


WARM_UP: tuple[Job, ...] = (
    Job(0, None, Plan(3, stream=False), 16, 10, timeout_s=20.0),
    Job(0, None, Plan(20), 16, 10, timeout_s=20.0),
)
"""What a contestant answers before any figure is taken: lazy imports, connection pools, first ledger writes."""


_AS_MANY_AS_FIT = 1_000_000


def _job(
    plan: Plan,
    connections: int,
    requests: int = _AS_MANY_AS_FIT,
    *,
    for_s: float = math.inf,
    ramp_s: float = 0.0,
    pause_ms: float = 0.0,
    marks: tuple[float, ...] = (),
    manner: Manner = Manner.READ,
) -> Job:
    return Job(0, None, plan, connections, requests, for_s, ramp_s, pause_ms, marks, manner=manner)


def _back_to_back(report: Report) -> Figures:
    return {
        "chunk_cpu_us": _cpu_us(report) / report.events,
        "chunk_per_read": report.events / report.reads,
        "chunk_busy": 100 * report.own_busy,
    }


def _bursts(report: Report) -> Figures:
    return {"burst_cpu_us": _cpu_us(report) / report.events, "burst_per_read": report.events / report.reads}


def _requests(report: Report) -> Figures:
    return {"request_cpu_us": _cpu_us(report) / report.asked, "request_busy": 100 * report.own_busy}


def _short_streams(report: Report) -> Figures:
    return {"short_cpu_us": _cpu_us(report) / report.asked}


def _first_token(report: Report) -> Figures:
    return {} if report.ttft_ms is None else {"ttft_ms": report.ttft_ms}


def _gaps(report: Report) -> Figures:
    if report.gap_ms is None or report.delay_ms is None:
        return {}
    return {
        "gap_p50_ms": report.gap_ms[0],
        "gap_p99_ms": report.gap_ms[1],
        "delay_p50_ms": report.delay_ms[0],
        "delay_p99_ms": report.delay_ms[1],
    }


# What a proxy may take before it has anything to do.
_FLOOR_KIB = 60e6 / 1024


def _slow_streams(report: Report) -> Figures:
    idle, early, late, _ = report.snapshots
    return {
        "slow_cpu_us": _between_us(early, late),
        "slow_busy": 100 * report.own_busy,
        "slow_rss_kib": (late.memory.rss_kib - idle.memory.rss_kib) / report.asked,
        "slow_above_kib": (late.memory.rss_kib - _FLOOR_KIB) / report.asked,
        "slow_uss_kib": (late.memory.uss_kib - idle.memory.uss_kib) / report.asked,
        "idle_rss_mib": idle.memory.rss_kib / 1024,
        "idle_pss_mib": idle.memory.pss_kib / 1024,
    }


def _long_stream(report: Report) -> Figures:
    start, tenth, ninth, end, _ = report.snapshots
    first_us, last_us = _between_us(start, tenth), _between_us(ninth, end)
    return {
        "long_first_us": first_us,
        "long_last_us": last_us,
        "long_step": last_us / first_us,
        "long_memory": (end.memory.rss_kib - start.memory.rss_kib) * 1024 / report.body_bytes,
    }


def _stop_reading(report: Report) -> Figures:
    start, standstill, end = report.snapshots
    return {
        "stall_rss_mib": (standstill.memory.rss_kib - start.memory.rss_kib) / 1024,
        "stall_left_mib": (end.memory.rss_kib - start.memory.rss_kib) / 1024,
        "stall_sent_mib": report.sent_bytes / 2**20,
    }


def _told(when: str) -> Callable[[Report], Figures]:
    def read(report: Report) -> Figures:
        return {f"{when}_told_ms": statistics.median(report.told_ms), f"{when}_worst_ms": max(report.told_ms)}

    return read


def _cpu_us(report: Report) -> float:
    return (report.snapshots[-1].cpu_s - report.snapshots[0].cpu_s) * 1e6


def _between_us(earlier: Snapshot, later: Snapshot) -> float:
    return (later.cpu_s - earlier.cpu_s) * 1e6 / (later.events - earlier.events)
