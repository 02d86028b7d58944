"""What is known, for how long, and how it is asked because of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from proxy.chat import Ask
from proxy.policy.capabilities import Capability, Fact, Topic, looks_buffered, plan

NOW = 1_000_000.0
TTL = 300.0
WITHOUT = Ask(stream=False, usage=False, may_fall_back=False)


def knowing(age_s: float = 10, **facts: bool) -> Capability:
    return Capability({Topic(name): Fact(value, "seen", NOW - age_s) for name, value in facts.items()})


def planned(capability: Capability, **members: Any) -> Ask:
    options: dict[str, Any] = {
        "wants_stream": True,
        "setting": "auto",
        "force_non_streaming": False,
        "enable_fallback": True,
    }
    return plan(capability, **{**options, "now": NOW, "ttl_s": TTL, **members})


NATIVE = Ask(stream=True, usage=True, may_fall_back=True)
PROBE = Ask(stream=True, usage=True, may_fall_back=True, is_probe=True)


@pytest.mark.parametrize(
    ("capability", "members", "expected"),
    [
        # Unknown means: it streams (https://github.com/BerriAI/litellm/issues/21090), and this very request shows it.
        (Capability(), {}, PROBE),
        (knowing(streams=True), {}, NATIVE),
        (knowing(streams=False), {}, WITHOUT),
        (knowing(streams=False, age_s=TTL), {}, PROBE),  # believed for a limited time
        (knowing(streams=False, age_s=TTL - 1), {}, WITHOUT),
        (knowing(streams=False, age_s=-1), {}, PROBE),  # from the future: the clock was set back
        (knowing(streams=True, age_s=TTL * 9), {}, NATIVE),  # still the best guess
        (knowing(streams=True), {"ttl_s": 0}, NATIVE),
        (knowing(streams=False), {"ttl_s": 0}, PROBE),  # a TTL of 0 believes nothing
        (knowing(streams=True, stream_options=False), {}, Ask(stream=True, usage=False, may_fall_back=True)),
        (knowing(streams=True, stream_options=False, age_s=TTL), {}, NATIVE),
        (knowing(streams=True, stream_options=True), {}, NATIVE),
        (knowing(sends_usage=False, buffers=True), {}, PROBE),
        (knowing(streams=False), {"setting": "always"}, Ask(stream=True, usage=True, may_fall_back=False)),
        (
            knowing(streams=False, stream_options=False),
            {"setting": "always"},
            Ask(stream=True, usage=False, may_fall_back=False),
        ),
        # Without the fallback nothing is asked otherwise than the client asked.
        (
            knowing(streams=False),
            {"enable_fallback": False},
            Ask(stream=True, usage=True, may_fall_back=False, is_probe=True),
        ),
        (Capability(), {"enable_fallback": False}, Ask(stream=True, usage=True, may_fall_back=False, is_probe=True)),
    ],
)
def test_the_plan_follows_from_what_is_known_and_set(
    capability: Capability, members: dict[str, Any], expected: Ask
) -> None:
    assert planned(capability, **members) == expected


def test_what_is_not_to_be_streamed_is_never_asked_to_stream() -> None:
    for streams, setting, enable_fallback in product((True, False), ("auto", "always", "never"), (True, False)):
        options = {"setting": setting, "enable_fallback": enable_fallback}
        assert planned(knowing(streams=streams), wants_stream=False, **options) == WITHOUT
        assert planned(knowing(streams=streams), force_non_streaming=True, **options) == WITHOUT
        assert planned(knowing(streams=streams), **{**options, "setting": "never"}) == WITHOUT


@pytest.mark.parametrize(
    ("age_s", "value", "needs"),
    [(0, True, False), (149, True, False), (150, True, True), (-1, True, True), (0, False, True), (149, False, True)],
)
def test_seeing_a_thing_again_is_news_when_it_differs_or_is_half_forgotten(
    age_s: float, value: bool, needs: bool
) -> None:
    assert knowing(age_s, streams=True).needs(Topic.STREAMS, value, NOW, TTL) is needs
    assert knowing(age_s, streams=True).needs(Topic.BUFFERS, value, NOW, TTL) is True


def test_learning_leaves_the_old_capability_as_it_was() -> None:
    before = knowing(streams=True)
    after = before.learned(Topic.STREAMS, Fact(False, "refused", NOW)).learned(Topic.BUFFERS, Fact(True, "burst", NOW))
    assert before == knowing(streams=True)
    assert after.known(Topic.STREAMS, NOW, TTL) is False
    assert after.known(Topic.BUFFERS, NOW, TTL) is True
    assert after.known(Topic.STREAM_OPTIONS, NOW, TTL) is None


@pytest.mark.parametrize(
    ("events", "first_s", "last_s", "is_buffered"),
    [
        (100, 4.0, 4.005, True),  # https://github.com/BerriAI/litellm/issues/37800
        (20, 0.2, 0.2, True),
        (19, 4.0, 4.0, False),  # too few to tell
        (100, 0.19, 0.19, False),  # a short answer of a quick model
        (100, 4.0, 4.04, False),
        (100, 0.5, 8.0, False),
    ],
)
def test_a_stream_that_comes_in_one_burst_at_its_end_is_none(
    events: int, first_s: float, last_s: float, is_buffered: bool
) -> None:
    assert looks_buffered(events, first_s, last_s) is is_buffered


def test_an_ask_can_be_put_more_modestly() -> None:
    assert PROBE.without_usage() == Ask(stream=True, usage=False, may_fall_back=True)
    assert PROBE.without_stream() == WITHOUT
