"""GET /metrics: what Prometheus reads.

    headwater_in_flight                                        answers being made, and requests being passed on
    headwater_calls_total{mode, status}                        calls that are over, as in the access log
    headwater_attempts_total{upstream, model}                  chat requests sent to a target, repetitions included
    headwater_attempt_failures_total{upstream, model}          those of them that spoke against the target
    headwater_circuit_state{upstream, model, state}            1 for the state it is in (closed, open, half_open), else 0
    headwater_recoveries_total{outcome}                        streams that broke midway: saved, or lost
    headwater_resumable_answers                                answers that are over and can still be read again
    headwater_resumable_bytes                                  the memory that these take
    headwater_upstream_connections{upstream, state}            active or idle
    process_…                                                  CPU, memory, file descriptors of the process

Nothing is counted here but the calls; all else is read where it is known anyway, when somebody asks. Labels are bounded:
`upstream` and `model` name targets that the circuits remember (`upstream/circuits.py`), and when those forget some, their
counters begin anew. Names follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from proxy.chat import Mode, Outcome, Status, Target
from proxy.inflight import InFlight
from proxy.pipeline import Pipeline
from proxy.policy.circuits import State
from proxy.upstream.circuits import CircuitRow, Circuits
from proxy.upstream.session import UpstreamSession


class CallCounts:
    """How many calls ended in which way."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[Mode, Status]] = Counter()

    def count(self, outcome: Outcome) -> None:
        self.ended[outcome.mode, outcome.status] += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """Everything at one moment, as a collector of the library's."""

    in_flight: int
    calls: Mapping[tuple[Mode, Status], int]
    targets: list[tuple[Target, CircuitRow]]
    saved: int
    lost: int
    resumable_answers: int
    resumable_bytes: int
    connections: list[tuple[str, int, int]]
    lookups: Mapping[str, int]
    verified: Mapping[str, int]
    cached_answers: int
    cached_bytes: int
    indexed_questions: int

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "headwater_in_flight", "Answers being made and requests being passed on.", self.in_flight
        )
        calls = CounterMetricFamily("headwater_calls", "Calls that are over.", labels=("mode", "status"))
        for (mode, status), count in self.calls.items():
            calls.add_metric((mode, status), count)
        yield calls
        yield from self._of_targets()
        recoveries = CounterMetricFamily("headwater_recoveries", "Streams that broke midway.", labels=("outcome",))
        recoveries.add_metric(("saved",), self.saved)
        recoveries.add_metric(("lost",), self.lost)
        yield recoveries
        words = "Answers that are over and can still be read again."
        yield GaugeMetricFamily("headwater_resumable_answers", words, self.resumable_answers)
        yield GaugeMetricFamily(
            "headwater_resumable_bytes", "The memory that these answers take.", self.resumable_bytes
        )
        labels = ("upstream", "state")
        connections = GaugeMetricFamily("headwater_upstream_connections", "Connections to upstreams.", labels=labels)
        for upstream, active, idle in self.connections:
            connections.add_metric((upstream, "active"), active)
            connections.add_metric((upstream, "idle"), idle)
        yield connections
        yield from self._of_the_cache()

    def _of_the_cache(self) -> Iterator[Metric]:
        lookups = CounterMetricFamily(
            "headwater_cache_lookups", "Answers looked for in the cache.", labels=("outcome",)
        )
        for outcome, count in self.lookups.items():
            lookups.add_metric((outcome,), count)
        yield lookups
        words = "Answers given for a question alike in meaning, and then compared with one of its own."
        verified = CounterMetricFamily("headwater_cache_verifications", words, labels=("outcome",))
        for outcome, count in self.verified.items():
            verified.add_metric((outcome,), count)
        yield verified
        yield GaugeMetricFamily("headwater_cache_answers", "Answers in the cache.", self.cached_answers)
        yield GaugeMetricFamily("headwater_cache_bytes", "What these answers take on disk.", self.cached_bytes)
        words = "Questions that can be found by their meaning."
        yield GaugeMetricFamily("headwater_cache_indexed_questions", words, self.indexed_questions)

    def _of_targets(self) -> Iterator[Metric]:
        labels = ("upstream", "model")
        attempts = CounterMetricFamily("headwater_attempts", "Chat requests sent to a target.", labels=labels)
        words = "Chat requests whose failure speaks against the target."
        failures = CounterMetricFamily("headwater_attempt_failures", words, labels=labels)
        words = "The state a target's circuit is in."
        circuits = GaugeMetricFamily("headwater_circuit_state", words, labels=(*labels, "state"))
        for target, row in self.targets:
            values = (target.upstream, target.model)
            attempts.add_metric(values, row.attempts)
            failures.add_metric(values, row.failures)
            for state in State:
                circuits.add_metric((*values, state), state is row.state)
        yield attempts
        yield failures
        yield circuits


class Metrics:
    """The metrics of one server. To be read on the event loop, whose objects are read."""

    def __init__(
        self, calls: CallCounts, pipeline: Pipeline, circuits: Circuits, session: UpstreamSession, in_flight: InFlight
    ) -> None:
        self._calls = calls
        self._pipeline = pipeline
        self._circuits = circuits
        self._session = session
        self._in_flight = in_flight
        self._process = ProcessCollector(registry=None)

    def read(self) -> CollectorRegistry:
        """What there is now, for an encoder: that may take its time in a thread, for nothing in it changes any more."""
        pipeline = self._pipeline
        resumable_answers, resumable_bytes = pipeline.answers.kept()
        cache = pipeline.cache
        found = cache.figures
        registry = CollectorRegistry()
        registry.register(
            _Reading(
                in_flight=len(self._in_flight),
                calls=self._calls.ended.copy(),
                targets=list(self._circuits.all()),
                saved=pipeline.saved,
                lost=pipeline.lost,
                resumable_answers=resumable_answers,
                resumable_bytes=resumable_bytes,
                connections=list(self._session.connections()),
                lookups={"exact": found.exact_hits, "semantic": found.semantic_hits, "miss": found.misses},
                verified={"right": found.verified_right, "wrong": found.verified_wrong},
                cached_answers=cache.store.count,
                cached_bytes=cache.store.bytes,
                indexed_questions=cache.meaning.indexed,
            )
        )
        registry.register(self._process)
        return registry


METRICS = web.AppKey("metrics", Metrics)


async def scrape(request: web.Request) -> web.StreamResponse:
    """GET /metrics: Prometheus' text format, or OpenMetrics for those who accept it."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    body = await asyncio.to_thread(encode, request.app[METRICS].read())
    return web.Response(body=body, headers={"Content-Type": content_type})
