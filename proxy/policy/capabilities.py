"""What is known of a target's streaming, how it is learned, and what to ask for because of it.

Knowledge is tri-state: yes, no, unknown. It comes from real answers only, carries its evidence and its time, and is
believed for a limited time; a timeout or a 5xx is never evidence. Unknown means: it streams. To learn something new of
upstreams, add a Topic and say in the pipeline what shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from proxy.chat import Ask


class Topic(StrEnum):
    STREAMS = "streams"  # answers `stream: true` with an event stream
    STREAM_OPTIONS = "stream_options"  # takes `stream_options`
    SENDS_USAGE = "sends_usage"  # says how many tokens a streamed answer was
    BUFFERS = "buffers"  # sends the whole stream at once, when it is finished
    PREFILL = "prefill"  # continues an answer whose beginning it is given


class Key(NamedTuple):
    """Whom a fact is about. The credential counts: some providers let only verified organisations stream a model."""

    upstream: str
    model: str
    credential: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One piece of knowledge. `learned_at` is in Unix seconds."""

    value: bool
    evidence: str
    learned_at: float

    def is_fresh(self, now: float, ttl_s: float) -> bool:
        """Whether it is still believed. One from the future (the clock was set back) is not."""
        return 0 <= now - self.learned_at < ttl_s


@dataclass(frozen=True, slots=True)
class Capability:
    """All facts about one key."""

    facts: Mapping[Topic, Fact] = field(default_factory=dict)

    def known(self, topic: Topic, now: float, ttl_s: float) -> bool | None:
        """Yes, no, or None for unknown."""
        fact = self.facts.get(topic)
        return fact.value if fact is not None and fact.is_fresh(now, ttl_s) else None

    def needs(self, topic: Topic, value: bool, now: float, ttl_s: float) -> bool:
        """Whether seeing `value` now says anything that is not known anyway: something new, or half-forgotten."""
        fact = self.facts.get(topic)
        return fact is None or fact.value != value or not fact.is_fresh(now, ttl_s / 2)

    def learned(self, topic: Topic, fact: Fact) -> Capability:
        return Capability({**self.facts, topic: fact})


_WHOLE = Ask(stream=False, usage=False, may_fall_back=False)


def plan(
    capability: Capability,
    *,
    wants_stream: bool,
    setting: Literal["auto", "always", "never"],
    force_non_streaming: bool,
    enable_fallback: bool,
    now: float,
    ttl_s: float,
) -> Ask:
    """How to ask, for a client that wants a stream or not. `setting` is the upstream's `stream`."""
    if not wants_stream or force_non_streaming or setting == "never":
        return _WHOLE
    usage = capability.known(Topic.STREAM_OPTIONS, now, ttl_s) is not False
    if setting == "always":
        return Ask(stream=True, usage=usage, may_fall_back=False)
    streams = capability.known(Topic.STREAMS, now, ttl_s)
    if streams is False and enable_fallback:
        return _WHOLE
    # A fact that has expired as "yes" is still the best guess, so nobody need wait for it to be confirmed.
    was_known_to_stream = Topic.STREAMS in capability.facts and capability.facts[Topic.STREAMS].value
    return Ask(stream=True, usage=usage, may_fall_back=enable_fallback, is_probe=not was_known_to_stream)


def looks_buffered(events: int, first_event_s: float, last_event_s: float) -> bool:
    """Whether a stream arrived as one burst at its end. Times count from the request.

    Twenty events within a hundredth of the time that the first one took, and that not short, are no stream: the
    upstream, or a proxy before it, had gathered them.
    """
    return events >= 20 and first_event_s >= 0.2 and (last_event_s - first_event_s) < first_event_s / 100
