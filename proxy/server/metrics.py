"""GET /metrics: what Prometheus reads.

    headwater_in_flight                                        answers being made, and requests being passed on
    headwater_calls_total{mode, status}                        calls that are over, as in the access log
    headwater_refused_total{reason}                            those of them that the proxy itself would not take
    headwater_limit_refusals_total{limit}                      those that were over a limit, of which kind
    headwater_time_to_first_token_seconds{mode}                histogram: from a call's start to the first piece of its answer
    headwater_call_duration_seconds{mode}                      histogram: from a call's start to its end
    headwater_chunk_gap_seconds                                histogram: between the pieces of an upstream's stream
    headwater_tokens_total{kind, upstream, model}              prompt, completion; and what of them was cached, was reasoning
    headwater_cost_usd_total{upstream, model}                  what upstreams ask for
    headwater_price_usd_total{upstream, model}                 what teams are asked for
    headwater_unpriced_calls_total{upstream, model}            calls whose cost nobody knows
    headwater_attempts_total{upstream, model}                  chat requests sent to a target, repetitions included
    headwater_attempt_failures_total{upstream, model}          those of them that spoke against the target
    headwater_circuit_state{upstream, model, state}            1 for the state it is in (closed, open, half_open), else 0
    headwater_recoveries_total{outcome}                        streams that broke midway: saved, or lost
    headwater_resumable_answers                                answers that are over and can still be read again
    headwater_resumable_bytes                                  the memory that these take
    headwater_upstream_connections{upstream, state}            active or idle
    headwater_cache_…                                          lookups, verifications; answers, bytes and questions that are kept
    headwater_ledger_failing                                   1 while the disk takes nothing
    headwater_ledger_waiting                                   changes that are not on disk yet
    headwater_ledger_lost_total                                changes that never will be
    process_…                                                  CPU, memory, file descriptors of the process

What is counted for this alone is in `counting.py`; all else is read where it is known anyway, when somebody asks. Labels are
bounded: those of attempts and circuits by the targets that the circuits remember (`upstream/circuits.py`), and when those forget
some, their counters begin anew. No label names a team or a key, of which there may be any number: the ledger has them apart.
Names follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from proxy.chat import Target
from proxy.histogram import Histogram
from proxy.policy.circuits import State as CircuitState
from proxy.policy.credits import MICRO
from proxy.policy.limits import Kind
from proxy.server.counting import CallCounts, Spent
from proxy.server.state import State
from proxy.upstream.circuits import CircuitRow
from proxy.upstream.session import UpstreamSession


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """Everything at one moment, as a collector of the library's."""

    in_flight: int
    calls: CallCounts
    limits: Mapping[Kind, int]
    gaps: Histogram
    spending: list[tuple[Target, Spent]]
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
    ledger_is_failing: bool
    ledger_waiting: int
    ledger_lost: int

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "headwater_in_flight", "Answers being made and requests being passed on.", self.in_flight
        )
        yield from self._of_calls()
        yield from self._of_times()
        yield from self._of_spending()
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
        yield from self._of_the_ledger()

    def _of_calls(self) -> Iterator[Metric]:
        calls = CounterMetricFamily("headwater_calls", "Calls that are over.", labels=("mode", "status"))
        for (mode, status), count in self.calls.ended.items():
            calls.add_metric((mode, status), count)
        yield calls
        words = "Calls that the proxy itself would not take."
        refused = CounterMetricFamily("headwater_refused", words, labels=("reason",))
        for reason, count in self.calls.refused.items():
            refused.add_metric((reason,), count)
        yield refused
        words = "Calls that were over a limit of their key or their team."
        limits = CounterMetricFamily("headwater_limit_refusals", words, labels=("limit",))
        for kind in Kind:
            limits.add_metric((kind,), self.limits[kind])
        yield limits

    def _of_times(self) -> Iterator[Metric]:
        words = "From a call's start to the first piece of its answer."
        first_token = HistogramMetricFamily("headwater_time_to_first_token_seconds", words, labels=("mode",))
        for mode, found in self.calls.first_token.items():
            first_token.add_metric((mode,), _buckets(found), found.total)
        yield first_token
        words = "From a call's start to its end."
        duration = HistogramMetricFamily("headwater_call_duration_seconds", words, labels=("mode",))
        for mode, found in self.calls.duration.items():
            duration.add_metric((mode,), _buckets(found), found.total)
        yield duration
        words = "Between the pieces of an upstream's stream."
        yield HistogramMetricFamily("headwater_chunk_gap_seconds", words, _buckets(self.gaps), self.gaps.total)

    def _of_spending(self) -> Iterator[Metric]:
        labels = ("upstream", "model")
        words = "Tokens that upstreams took and gave; the cached are prompt's too, and those of reasoning completion's."
        tokens = CounterMetricFamily("headwater_tokens", words, labels=("kind", *labels))
        cost = CounterMetricFamily("headwater_cost_usd", "What upstreams ask for, in US dollars.", labels=labels)
        price = CounterMetricFamily("headwater_price_usd", "What teams are asked for, in US dollars.", labels=labels)
        unpriced = CounterMetricFamily("headwater_unpriced_calls", "Calls whose cost nobody knows.", labels=labels)
        for target, spent in self.spending:
            tokens.add_metric(("prompt", *target), spent.prompt)
            tokens.add_metric(("completion", *target), spent.completion)
            tokens.add_metric(("cached", *target), spent.cached)
            tokens.add_metric(("reasoning", *target), spent.reasoning)
            cost.add_metric(target, spent.cost_microusd / MICRO)
            price.add_metric(target, spent.price_microusd / MICRO)
            unpriced.add_metric(target, spent.unpriced)
        yield from (tokens, cost, price, unpriced)

    def _of_the_ledger(self) -> Iterator[Metric]:
        words = "Whether the disk takes nothing of the ledger."
        yield GaugeMetricFamily("headwater_ledger_failing", words, self.ledger_is_failing)
        words = "Changes of the ledger that are not on disk yet."
        yield GaugeMetricFamily("headwater_ledger_waiting", words, self.ledger_waiting)
        words = "Changes of the ledger that never will be on disk."
        yield CounterMetricFamily("headwater_ledger_lost", words, self.ledger_lost)

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
            for state in CircuitState:
                circuits.add_metric((*values, state), state is row.state)
        yield attempts
        yield failures
        yield circuits


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return [("+Inf" if bound == math.inf else str(bound), count) for bound, count in histogram.cumulated()]


class Metrics:
    """The metrics of one server. To be read on the event loop, whose objects are read."""

    def __init__(self, calls: CallCounts, state: State, session: UpstreamSession) -> None:
        self._calls = calls
        self._state = state
        self._session = session
        self._process = ProcessCollector(registry=None)

    def read(self) -> CollectorRegistry:
        """What there is now, for an encoder: that may take its time in a thread, for nothing in it changes any more."""
        state = self._state
        pipeline, accounting, ledger = state.pipeline, state.accounting, state.ledger
        resumable_answers, resumable_bytes = pipeline.answers.kept()
        cache = pipeline.cache
        found = cache.figures
        registry = CollectorRegistry()
        registry.register(
            _Reading(
                in_flight=len(state.in_flight),
                calls=self._calls.copy(),
                limits=accounting.limiting.refused.copy(),
                gaps=pipeline.gaps.copy(),
                spending=accounting.spending.copy(),
                targets=list(state.circuits.all()),
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
                ledger_is_failing=ledger.is_failing,
                ledger_waiting=ledger.waiting,
                ledger_lost=ledger.lost,
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
