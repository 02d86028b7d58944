"""What is measured: every `Measure` is one load job and how its report becomes figures.

To add one: add a `Measure` to `measures` and its figures to `FIGURES`; nothing else knows them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from answer import Plan
from load import Job, Report, Snapshot

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table. over_direct: the value only means something minus the one of no proxy at all."""

    label: str
    decimals: int
    over_direct: bool = False


FIGURES: dict[str, Figure] = {
    "chunk_cpu_us": Figure("back to back: CPU per chunk, us", 2),
    "chunk_per_read": Figure("back to back: chunks per client read", 1),
    "request_cpu_us": Figure("small JSON request: CPU, us", 1),
    "short_cpu_us": Figure("stream of 3 chunks: CPU, us", 1),
    "slow_cpu_us": Figure("slow streams: CPU per chunk, us", 1),
    "slow_rss_kib": Figure("slow streams: RSS per stream, KiB", 1),
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
    "long_memory": Figure("long stream: RSS growth / answer's bytes", 2),
}


@dataclass(frozen=True, slots=True)
class Measure:
    """One load job (its port and pid are filled in for each contestant) and what it tells.

    is_fresh: wants a contestant that was only warmed up, because memory that an earlier measure left to the allocator
    would hide its growth. is_cost: only about a contestant's process, so pointless without a proxy.
    """

    name: str
    job: Job
    read: Callable[[Report], Figures]
    is_fresh: bool = False
    is_cost: bool = True


def measures(is_quick: bool) -> tuple[Measure, ...]:
    """All measures, those that want a fresh contestant last."""
    share = 3 if is_quick else 1
    gap_ms = 250.0 if is_quick else 400.0
    return (
        Measure("back to back", _job(Plan(2000 // share), 8, 3), _back_to_back),
        Measure("small requests", _job(Plan(3, stream=False), 16, 500 // share), _requests),
        Measure("short streams", _job(Plan(3), 16, 400 // share), _short_streams),
        Measure("time to first token", _job(Plan(3), 1, 300 // share, pause_ms=2.0), _first_token, is_cost=False),
        Measure("5 ms gaps", _job(Plan(300 // share, gap_ms=5.0, stamp=True), 1), _gaps, is_cost=False),
        Measure(
            "slow streams",
            # A quarter of the events arrive after all streams have begun and before any ends.
            _job(Plan(12, gap_ms=gap_ms, first_ms=gap_ms), 1000, ramp_s=1.0, marks=(0.3, 0.7)),
            _slow_streams,
            is_fresh=True,
        ),
        Measure(
            "long stream",
            _job(Plan(20_000, gap_ms=1.0, burst=10 * share), 1, marks=(0.1, 0.9, 1.0)),
            _long_stream,
            is_fresh=True,
        ),
    )


WARM_UP: tuple[Job, ...] = (
    Job(0, None, Plan(3, stream=False), 16, 10, timeout_s=20.0),
    Job(0, None, Plan(20), 16, 10, timeout_s=20.0),
)
"""What a contestant answers before any figure is taken: lazy imports, connection pools, first ledger writes."""


def _job(
    plan: Plan,
    connections: int,
    requests: int = 1,
    ramp_s: float = 0.0,
    pause_ms: float = 0.0,
    marks: tuple[float, ...] = (),
) -> Job:
    return Job(0, None, plan, connections, requests, ramp_s, pause_ms, marks)


def _back_to_back(report: Report) -> Figures:
    return {"chunk_cpu_us": _cpu_us(report) / report.events, "chunk_per_read": report.events / report.reads}


def _requests(report: Report) -> Figures:
    return {"request_cpu_us": _cpu_us(report) / report.asked}


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


def _slow_streams(report: Report) -> Figures:
    idle, early, late, _ = report.snapshots
    return {
        "slow_cpu_us": _between_us(early, late),
        "slow_rss_kib": (late.memory.rss_kib - idle.memory.rss_kib) / report.asked,
        "slow_uss_kib": (late.memory.uss_kib - idle.memory.uss_kib) / report.asked,
        "idle_rss_mib": idle.memory.rss_kib / 1024,
        "idle_pss_mib": idle.memory.pss_kib / 1024,
    }


def _long_stream(report: Report) -> Figures:
    start, tenth, ninth, end, _ = report.snapshots
    return {
        "long_first_us": _between_us(start, tenth),
        "long_last_us": _between_us(ninth, end),
        "long_memory": (end.memory.rss_kib - start.memory.rss_kib) * 1024 / report.body_bytes,
    }


def _cpu_us(report: Report) -> float:
    return (report.snapshots[-1].cpu_s - report.snapshots[0].cpu_s) * 1e6


def _between_us(earlier: Snapshot, later: Snapshot) -> float:
    return (later.cpu_s - earlier.cpu_s) * 1e6 / (later.events - earlier.events)
