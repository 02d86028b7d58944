"""Who may ask for how much in a minute and at once, against a model that remembers every call and calculates in fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from proxy.chat import Holder, Limits
from proxy.policy.limits import Admission, Kind, Limiter, Refusal, duration, most_completion_tokens
from tests.conftest import examples


def holder(
    requests: int | None = None, tokens: int | None = None, parallel: int | None = None, name: str = "key"
) -> Holder:
    return Holder(f"{name}:1", f"{name} 'a'", Limits(requests, tokens, parallel))


def admitted(found: Admission | Refusal) -> Admission:
    assert isinstance(found, Admission), found
    return found


def refused(found: Admission | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


def told(limiter: Limiter, chain: Sequence[Holder], now: float) -> dict[str, str]:
    return {name.removeprefix("x-ratelimit-"): value for name, value in limiter.headers(chain, now).items()}


# ----------------------------------------------------------------------------------------------------- one after another


def test_requests_are_a_minutes_at_once_and_then_one_by_one() -> None:
    limiter, chain = Limiter(0), [holder(requests=3)]
    for _ in range(3):
        limiter.settle(admitted(limiter.admit(chain, 0, 0)), 0, 0)
    assert refused(limiter.admit(chain, 0, 0)) == Refusal(chain[0], Kind.REQUESTS, 3, 20)
    assert refused(limiter.admit(chain, 0, 19.5)).retry_after_s == 1
    admitted(limiter.admit(chain, 0, 20))
    refused(limiter.admit(chain, 0, 20))


def test_tokens_are_held_while_a_call_runs_and_what_it_took_flows_back_from_its_end() -> None:
    limiter, chain = Limiter(0), [holder(tokens=600)]
    call = admitted(limiter.admit(chain, 500, 0))
    assert told(limiter, chain, 10)["remaining-tokens"] == "100"
    refused(limiter.admit(chain, 101, 10))
    limiter.settle(call, 200, 10)
    assert told(limiter, chain, 10)["remaining-tokens"] == "400"
    assert told(limiter, chain, 15) == {"limit-tokens": "600", "remaining-tokens": "450", "reset-tokens": "15s"}
    admitted(limiter.admit(chain, 450, 15))


def test_what_was_taken_beyond_the_bucket_is_paid_back_first() -> None:
    limiter, chain = Limiter(0), [holder(tokens=600)]
    limiter.settle(admitted(limiter.admit(chain, 100, 0)), 1800, 0)
    assert told(limiter, chain, 0) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "3m0s"}
    assert refused(limiter.admit(chain, 100, 0)).retry_after_s == 130
    refused(limiter.admit(chain, 100, 129))
    admitted(limiter.admit(chain, 100, 130))


def test_a_long_call_holds_its_tokens_for_a_minute_and_pays_at_its_end() -> None:
    limiter, chain = Limiter(0), [holder(tokens=600)]
    first, second = (admitted(limiter.admit(chain, 300, now)) for now in (0, 20))
    assert [refused(limiter.admit(chain, tokens, 30)).retry_after_s for tokens in (300, 301)] == [30, 50]
    third = admitted(limiter.admit(chain, 300, 60))
    for call in (first, second, third):
        limiter.settle(call, 300, 70)
    assert refused(limiter.admit(chain, 1, 70)).retry_after_s == 31  # 300 of debt


def test_what_fits_beside_all_that_is_held_waits_for_no_call_to_end() -> None:
    limits = range(2, 200)
    waits = []
    for limit in limits:
        limiter, chain = Limiter(0), [holder(tokens=limit)]
        limiter.settle(admitted(limiter.admit(chain, 0, 0)), 1, 0)
        admitted(limiter.admit(chain, 1, 0))
        waits.append(refused(limiter.admit(chain, limit - 1, 0)).retry_after_s)
    assert waits == [math.ceil(60 / limit) for limit in limits]


def test_nothing_is_given_back_to_a_bucket_that_had_filled_up_meanwhile() -> None:
    limiter, chain = Limiter(0), [holder(tokens=600)]
    early = [admitted(limiter.admit(chain, 200, 0)) for _ in range(3)]
    limiter.settle(admitted(limiter.admit(chain, 600, 120)), 600, 120)
    for call in early:
        limiter.settle(call, 0, 120)
    assert refused(limiter.admit(chain, 1, 120)).kind is Kind.TOKENS


def test_a_slot_is_freed_once_however_often_its_call_is_settled() -> None:
    limiter, chain = Limiter(0), [holder(parallel=2, tokens=1000)]
    first, _ = (admitted(limiter.admit(chain, 10, 0)) for _ in range(2))
    assert refused(limiter.admit(chain, 10, 0)) == Refusal(chain[0], Kind.PARALLEL, 2, 1)
    for _ in range(3):
        limiter.settle(first, 10, 0)
    admitted(limiter.admit(chain, 10, 0))
    refused(limiter.admit(chain, 10, 0))
    assert told(limiter, chain, 0)["remaining-tokens"] == "970"


@pytest.mark.parametrize(
    "tight", [holder(requests=1, name="team"), holder(tokens=5, name="team"), holder(parallel=1, name="team")]
)
@pytest.mark.parametrize("is_last", [True, False])
def test_a_call_that_one_holder_refuses_takes_nothing_of_the_others(tight: Holder, is_last: bool) -> None:
    limiter, wide = Limiter(0), holder(9, 90, 2)
    chain = [wide, tight] if is_last else [tight, wide]
    admitted(limiter.admit(chain, 5, 0))
    before = told(limiter, [wide], 0)
    for _ in range(5):
        assert refused(limiter.admit(chain, 5, 0)).holder == tight
    assert told(limiter, [wide], 0) == before
    admitted(limiter.admit([wide], 5, 0))  # its second slot is free


def test_of_several_refusals_the_longest_to_wait_for_is_told() -> None:
    key, team = holder(requests=2, tokens=100, parallel=1), holder(requests=1, tokens=50, name="team")
    limiter = Limiter(0)
    call = admitted(limiter.admit([key, team], 50, 0))
    assert refused(limiter.admit([key, team], 1, 0))[:3] == (team, Kind.REQUESTS, 1)
    limiter.settle(call, 500, 0)
    assert refused(limiter.admit([key, team], 1, 0))[:3] == (team, Kind.TOKENS, 50)
    assert refused(limiter.admit([key, team], 60, 0)) == Refusal(team, Kind.TOKENS, 50, None)


@pytest.mark.parametrize(
    ("refusal", "retry_after", "words"),
    [
        (
            Refusal(holder(name="team"), Kind.REQUESTS, 60, 7),
            "7",
            "It would be over the limit of 60 requests per minute for team 'a'. Try again in 7 s.",
        ),
        (
            Refusal(holder(), Kind.TOKENS, 10, None),
            None,
            "The request asks for more than the limit of 10 tokens per minute for key 'a'. It would be refused at any time.",
        ),
    ],
)
def test_a_refusal_is_told_in_openais_words(refusal: Refusal, retry_after: str | None, words: str) -> None:
    error = refusal.error()
    assert (error.status, error.code, error.kind) == (429, "rate_limit_exceeded", refusal.kind)
    assert (error.retry_after, error.message) == (retry_after, words)


def test_headers_tell_of_the_holder_with_least_left() -> None:
    key, team = holder(requests=60, tokens=1000), holder(requests=600, tokens=500, name="team")
    limiter = Limiter(0)
    admitted(limiter.admit([key, team], 100, 0))
    assert limiter.headers([key, team], 0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "500",
        "x-ratelimit-remaining-tokens": "400",
        "x-ratelimit-reset-tokens": "12s",
    }
    assert limiter.headers([holder(parallel=1), holder(name="other")], 0) == {}


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (62.5, "1m2.5s"),
        (3600, "1h0m0s"),
        (90061.5, "25h1m1.5s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_limits_that_change_keep_nobody_waiting_for_longer() -> None:
    limiter, wide, narrow = Limiter(0), holder(requests=1000, tokens=1000), holder(requests=10, tokens=10)
    for _ in range(1000):
        limiter.settle(admitted(limiter.admit([wide], 1, 0)), 1, 0)
    assert refused(limiter.admit([narrow], 1, 0)).retry_after_s == 6
    admitted(limiter.admit([narrow], 1, 6))
    assert told(limiter, [holder()], 6) == {}


def test_who_has_everything_back_is_forgotten() -> None:
    limiter = Limiter(0)

    def call(number: int, now: float) -> Admission:
        key = Holder(f"key:{number}", "key", Limits(60, 6000, 5))
        return admitted(limiter.admit([key, holder(tokens=10**9, name="team")], 10, now))

    for number in range(10_000):
        limiter.settle(call(number, number / 10), 10, number / 10)
    assert len(limiter) < 50  # a request is back after a second, and there are ten a second
    running = [call(number, 2000) for number in range(100)]
    for number in range(100, 1000):
        limiter.settle(call(number, 3000 + number), 10, 3000 + number)
    assert 100 < len(limiter) < 150
    for one in running:
        limiter.settle(one, 10, 5000)
    for number in range(1000, 1100):
        limiter.settle(call(number, 6000 + number), 10, 6000 + number)
    assert len(limiter) < 10


# ------------------------------------------------------------------------------------------------------- the clock jumps


def test_a_clock_that_runs_back_locks_nobody_out_and_one_that_runs_ahead_gives_a_bucket_and_no_more() -> None:
    limiter, chain = Limiter(1_000_000), [holder(requests=60, parallel=1000)]

    def burst(now: float) -> int:
        count = 0
        while isinstance(limiter.admit(chain, 0, now), Admission):
            count += 1
        return count

    assert burst(1_000_000) == 60
    assert burst(5) == 0  # back by eleven days
    assert burst(15) == 10
    assert burst(1e12) == 60
    assert burst(1e12 - 1e6) == 0
    assert burst(1e12 - 1e6 + 1) == 1
    assert burst(1e300) == 60
    assert burst(5) == 0
    assert burst(6) == 1


# ------------------------------------------------------------------------------------------- against the plain model


@dataclass
class Plain:
    """One holder's calls, remembered for ever. Times are those of a clock that never runs back."""

    limits: Limits
    began: list[Fraction] = field(default_factory=list)
    took: list[tuple[Fraction, int]] = field(default_factory=list)
    running: dict[int, tuple[Fraction, int]] = field(default_factory=dict)

    def level(self, arrivals: list[tuple[Fraction, int]], limit: int, time: Fraction) -> Fraction:
        """What was taken and has not flowed back: the most that came in since any moment, less what flowed since."""
        level = at = Fraction(0)
        for when, amount in arrivals:
            level = max(Fraction(0), level - (when - at) * limit / 60) + amount
            at = when
        return max(Fraction(0), level - (time - at) * limit / 60)

    def requests(self, time: Fraction) -> Fraction:
        assert self.limits.requests_per_minute is not None
        return self.level([(when, 1) for when in self.began], self.limits.requests_per_minute, time)

    def tokens(self, time: Fraction) -> Fraction:
        assert self.limits.tokens_per_minute is not None
        held = sum(tokens for when, tokens in self.running.values() if time - when < 60)
        return self.level(self.took, self.limits.tokens_per_minute, time) + held

    def refusals(self, tokens: int, time: Fraction) -> set[Kind]:
        limits = self.limits
        found = set()
        if limits.requests_per_minute is not None and self.requests(time) + 1 > limits.requests_per_minute:
            found.add(Kind.REQUESTS)
        if limits.tokens_per_minute is not None and self.tokens(time) + tokens > limits.tokens_per_minute:
            found.add(Kind.TOKENS)
        if limits.parallel_calls is not None and len(self.running) >= limits.parallel_calls:
            found.add(Kind.PARALLEL)
        return found


_LIMITS = st.builds(
    Limits,
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 3),
)
# In sixteenths, which floats hold exactly.
_STEPS = st.integers(-200 * 16, 0) | st.integers(0, 90 * 16) | st.sampled_from((0, 16, 60 * 16, 10**6))
_AMOUNTS = st.integers(0, 70)


_Running = tuple[int, Admission, list[Plain]]


class Interleavings(RuleBasedStateMachine):
    """Two keys of one team: calls begin and end in any order, while the clock jumps."""

    calls: Bundle[_Running] = Bundle("calls")

    @initialize(limits=st.tuples(_LIMITS, _LIMITS, _LIMITS), start=st.integers(-(10**6), 2**33))
    def begin(self, limits: tuple[Limits, ...], start: int) -> None:
        self.clock, self.time = start * 16, 0
        self.limiter = Limiter(self.now)
        names = ("team", "key:1", "key:2")
        self.holders = [Holder(name, name, each) for name, each in zip(names, limits, strict=True)]
        self.plain = [Plain(each) for each in limits]
        self.count = 0

    @property
    def now(self) -> float:
        return self.clock / 16

    @property
    def exact(self) -> Fraction:
        return Fraction(self.time, 16)

    @rule(sixteenths=_STEPS)
    def wait(self, sixteenths: int) -> None:
        self.clock += sixteenths
        self.time += max(0, sixteenths)
        # What the limiter is not asked in between it cannot know of.
        self.limiter.headers((), self.now)

    @rule(target=calls, key=st.sampled_from((1, 2)), tokens=_AMOUNTS)
    def admit(self, key: int, tokens: int) -> _Running | MultipleResults[_Running]:
        chain, plain = [self.holders[key], self.holders[0]], [self.plain[key], self.plain[0]]
        expected = [one.refusals(tokens, self.exact) for one in plain]
        found = self.limiter.admit(chain, tokens, self.now)
        if isinstance(found, Refusal):
            assert found.kind in expected[chain.index(found.holder)]
            self._comes_back(found, plain, tokens)
            return multiple()
        assert not any(expected)
        self.count += 1
        for one in plain:
            one.began.append(self.exact)
            one.running[self.count] = self.exact, tokens
        return self.count, found, plain

    def _comes_back(self, refusal: Refusal, plain: list[Plain], tokens: int) -> None:
        """When the time that was told is over, and not a second before, the call fits but for what waits for a slot."""
        if refusal.retry_after_s is None:
            assert tokens > refusal.limit
            return
        after = [one.refusals(tokens, self.exact + refusal.retry_after_s) for one in plain]
        assert set().union(*after) <= {Kind.PARALLEL}
        if refusal.retry_after_s > 1:
            before = [one.refusals(tokens, self.exact + refusal.retry_after_s - 1) for one in plain]
            assert set().union(*before) - {Kind.PARALLEL}

    @rule(call=consumes(calls), tokens=_AMOUNTS, times=st.integers(1, 3))
    def settle(self, call: _Running, tokens: int, times: int) -> None:
        number, admission, plain = call
        for _ in range(times):
            self.limiter.settle(admission, tokens, self.now)
        for one in plain:
            del one.running[number]
            one.took.append((self.exact, tokens))

    @invariant()
    def what_is_left_is_told(self) -> None:
        for one, plain in zip(self.holders, self.plain, strict=True):
            found = told(self.limiter, [one], self.now)
            for kind, limit, count in (
                ("requests", one.limits.requests_per_minute, plain.requests),
                ("tokens", one.limits.tokens_per_minute, plain.tokens),
            ):
                if limit is None:
                    assert f"remaining-{kind}" not in found
                    continue
                taken = count(self.exact)
                assert int(found[f"remaining-{kind}"]) == max(0, math.floor(limit - taken))
                assert (found[f"reset-{kind}"] == "0s") is (taken == 0)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = examples(30)


@examples(50)
@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 320), st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_in_no_time_more_is_taken_than_the_bucket_and_what_flows_in(
    limit: int, calls: list[tuple[int, int, float]]
) -> None:
    """Calls that end where they begin, each with as much as was thought or less: whatever stretch of time is looked at."""
    limiter, chain = Limiter(0), [holder(tokens=limit)]
    took: list[tuple[Fraction, int]] = []
    clock = 0
    for sixteenths, tokens, share in calls:
        clock += sixteenths
        found = limiter.admit(chain, tokens, clock / 16)
        if isinstance(found, Admission):
            took.append((Fraction(clock, 16), int(tokens * share)))
            limiter.settle(found, took[-1][1], clock / 16)
    for first in range(len(took)):
        for last in range(first, len(took)):
            stretch = took[last][0] - took[first][0]
            assert sum(amount for _, amount in took[first : last + 1]) <= limit + stretch * limit / 60


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, None),
        ({"max_tokens": 20}, 20),
        ({"max_tokens": 20, "max_completion_tokens": 30}, 30),
        ({"max_tokens": 20, "n": 3}, 60),
        ({"max_tokens": 20, "n": 0}, 20),
        ({"max_tokens": 20, "n": True}, 20),
        ({"max_tokens": 0, "max_completion_tokens": True}, None),
        ({"max_tokens": "20"}, None),
        ({"max_tokens": 1e3}, None),
        ({"max_tokens": 10**30, "n": 128}, 10**7),
    ],
)
def test_how_long_an_answer_may_be(body: dict[str, Any], tokens: int | None) -> None:
    assert most_completion_tokens(body) == tokens
