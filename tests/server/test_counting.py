"""What a call that is over adds to the counters: in words of a table, and with more targets than are told apart."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from proxy.chat import Mode, Outcome, Status, Target, Usage
from proxy.server.counting import REASONS, CallCounts, Spending
from proxy.store.calls import End

TARGET = Target("up", "model-a")
USAGE = Usage(100, 20, cached=60, reasoning=5)


def outcome(
    mode: Mode = Mode.RELAY,
    status: Status = Status.OK,
    target: Target | None = TARGET,
    usage: Usage | None = USAGE,
    error: str | None = None,
    ttft_s: float | None = 0.3,
) -> Outcome:
    return Outcome("call-1", "model-a", target, mode, status, 200, 1, ttft_s, 2.5, usage, error)


def end(cost: int | None, price: int | None) -> End:
    return End(Status.OK, Mode.RELAY, 200, 0.0, 2500.0, cost_microusd=cost, price_microusd=price)


# What is added: prompt, completion, cached, reasoning, cost, price, unpriced; None where the target is not even remembered.
SPENT: list[tuple[str, Outcome, End, tuple[int, ...] | None]] = [
    ("relayed", outcome(), end(12, 14), (100, 20, 60, 5, 12, 14, 0)),
    ("broke, and is not paid for", outcome(status=Status.UPSTREAM_ERROR), end(12, 0), (100, 20, 60, 5, 12, 0, 0)),
    ("no price", outcome(), end(None, None), (100, 20, 60, 5, 0, 0, 1)),
    ("paid as it was held", outcome(Mode.PASSTHROUGH, usage=None), end(None, 77), (0, 0, 0, 0, 0, 77, 1)),
    ("passed on", outcome(Mode.PASSTHROUGH, usage=None), end(None, None), (0, 0, 0, 0, 0, 0, 1)),
    ("replayed", outcome(Mode.REPLAY), end(0, 0), None),
    ("shared", outcome(Mode.COALESCED), end(0, 0), None),
    ("refused upstream", outcome(status=Status.UPSTREAM_ERROR, usage=None), end(0, 0), None),
    ("refused here", outcome(Mode.NONE, Status.REJECTED, target=None, usage=None), end(0, 0), None),
]


@pytest.mark.parametrize(("over", "booked", "added"), [row[1:] for row in SPENT], ids=[row[0] for row in SPENT])
def test_what_is_spent(over: Outcome, booked: End, added: tuple[int, ...] | None) -> None:
    spending = Spending()
    for _ in range(2):
        spending.add(over, booked)
    found = [(target, astuple(spent)) for target, spent in spending.copy()]
    assert found == ([] if added is None else [(TARGET, tuple(2 * part for part in added))])


def test_models_that_clients_make_up_are_one_past_a_thousand() -> None:
    spending = Spending()
    for number in range(3000):
        spending.add(outcome(target=Target("up" if number % 3 else "up2", f"model-{number}")), end(1, 2))
    found = dict(spending.copy())
    assert len(found) == 1024 + 2
    assert sum(spent.cost_microusd for spent in found.values()) == 3000
    assert found[Target("up", "other")].prompt + found[Target("up2", "other")].prompt == (3000 - 1024) * 100
    spending.add(outcome(target=Target("up", "model-1")), end(1, 2))
    assert dict(spending.copy())[Target("up", "model-1")].cost_microusd == 2
    assert found[Target("up", "model-1")].cost_microusd == 1, "what was read before stays as it was"


REFUSED: list[tuple[Outcome, str | None]] = [
    (outcome(Mode.NONE, Status.REJECTED, error="rate_limit_exceeded"), "rate_limit_exceeded"),
    (outcome(Mode.NONE, Status.REJECTED, error="insufficient_credits"), "insufficient_credits"),
    (outcome(Mode.NONE, Status.CLIENT_ERROR, error="price_unknown"), "price_unknown"),
    (outcome(Mode.NONE, Status.CLIENT_ERROR, error="whatever a client could make us say"), "other"),
    (outcome(Mode.NONE, Status.CLIENT_ERROR, error=None), "other"),
    (outcome(status=Status.UPSTREAM_ERROR, error="rate_limit_exceeded"), None),
    (outcome(status=Status.CANCELLED), None),
    (outcome(), None),
]


@pytest.mark.parametrize(("over", "reason"), REFUSED)
def test_why_calls_are_refused(over: Outcome, reason: str | None) -> None:
    counts = CallCounts()
    counts.count(over)
    assert {word: count for word, count in counts.copy().refused.items() if count} == ({reason: 1} if reason else {})
    assert tuple(counts.refused) == REASONS


def test_times_are_told_apart_by_mode() -> None:
    counts = CallCounts()
    counts.count(outcome(Mode.RELAY, ttft_s=0.3))
    counts.count(outcome(Mode.REPLAY, ttft_s=0.001))
    before = counts.copy()
    counts.count(outcome(Mode.RELAY, Status.UPSTREAM_ERROR, ttft_s=None))
    assert {mode: found.total for mode, found in counts.first_token.items()} == {Mode.RELAY: 0.3, Mode.REPLAY: 0.001}
    assert {mode: sum(found.counts) for mode, found in counts.duration.items()} == {Mode.RELAY: 2, Mode.REPLAY: 1}
    assert sum(before.duration[Mode.RELAY].counts) == before.ended[Mode.RELAY, Status.OK] == 1
