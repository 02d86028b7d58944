"""How each target is to be asked, as far as that is known; and knowing it, from what its answers show.

What an upstream can do is learned from the answers to the clients' own requests, and nowhere else. Of several calls that
know nothing of their common target, one goes ahead to find out.
"""

from __future__ import annotations

import asyncio
import time

from proxy.chat import Ask
from proxy.policy.capabilities import Fact, Key, Topic, looks_buffered, plan
from proxy.settings import StreamingSettings
from proxy.store.capabilities import CapabilityStore
from proxy.upstream.session import Upstream

# How long a call waits for another one to find out whether their common, unknown target streams.
_VERDICT_S = 1.0


class Learning:
    """What calls know of targets, and learn. One for each server."""

    def __init__(self, streaming: StreamingSettings, capabilities: CapabilityStore) -> None:
        self._streaming = streaming
        self._capabilities = capabilities
        self._verdicts: dict[Key, asyncio.Future[None]] = {}

    async def plan(self, upstream: Upstream, key: Key, *, wants_stream: bool) -> Ask:
        """How to ask. A probe is to be told of by `announce`, whatever became of it; others wait for that a moment."""
        ask = self._plan_now(upstream, key, wants_stream=wants_stream)
        if not ask.is_probe:
            return ask
        if (verdict := self._verdicts.get(key)) is not None:
            await asyncio.wait((verdict,), timeout=_VERDICT_S)
            ask = self._plan_now(upstream, key, wants_stream=wants_stream)
        if ask.is_probe and key not in self._verdicts:
            self._verdicts[key] = asyncio.get_running_loop().create_future()
        return ask

    def _plan_now(self, upstream: Upstream, key: Key, *, wants_stream: bool) -> Ask:
        return plan(
            self._capabilities.get(key),
            wants_stream=wants_stream,
            setting=upstream.stream,
            force_non_streaming=self._streaming.force_non_streaming,
            enable_fallback=self._streaming.enable_fallback,
            now=time.time(),
            ttl_s=self._streaming.detection_cache_s,
        )

    def announce(self, key: Key) -> None:
        """Whoever waits to learn whether a target streams need not wait longer."""
        if (verdict := self._verdicts.pop(key, None)) is not None:
            verdict.set_result(None)

    def knows(self, key: Key, topic: Topic) -> bool | None:
        """Yes, no, or None for unknown."""
        return self._capabilities.get(key).known(topic, time.time(), self._streaming.detection_cache_s)

    def learn(self, key: Key, topic: Topic, value: bool, evidence: str) -> None:
        """An answer has shown something."""
        if topic is Topic.STREAMS:
            self.announce(key)
        now = time.time()
        if self._capabilities.get(key).needs(topic, value, now, self._streaming.detection_cache_s):
            self._capabilities.learn(key, topic, Fact(value, evidence[:200], now))

    def learn_usage(self, key: Key, *, has_usage: bool) -> None:
        """A stream that was asked for its usage has come to its end."""
        self.learn(key, Topic.STREAM_OPTIONS, True, "took stream_options")
        self.learn(key, Topic.SENDS_USAGE, has_usage, "sent usage" if has_usage else "sent no usage when asked")

    def learn_times(self, key: Key, events: int, first_s: float, last_s: float) -> None:
        """A stream of so many events has come to its end; the times of its first and last count from the request."""
        if events >= 20:
            buffers = looks_buffered(events, first_s, last_s)
            spread_ms = (last_s - first_s) * 1000
            evidence = f"{events} events within {spread_ms:.0f} ms, {first_s:.1f} s after the request"
            self.learn(key, Topic.BUFFERS, buffers, evidence)
