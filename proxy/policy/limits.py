"""How much a key and its team may ask for in a minute, and at once: token buckets, and whether one more call fits.

A bucket holds what may be taken in a minute, and fills evenly: 60 requests a minute are 60 at once, then one a second. What is
kept of it is how much was *taken* and has not flowed back.

A call is admitted by all *holders* of its chain (its key, its team) or by none. Its tokens are not known before it ends. So
what it is thought to take is *held* while it runs, and at its settlement what it did take goes into the bucket instead, be it
less or more; a bucket that more was taken of than it holds is in debt, and pays that back before anybody else is admitted.
Nothing is ever given back to a bucket that had filled up meanwhile, so no burst is larger than the bucket. A call holds its
tokens for a minute at most: that is when they would have flowed back had it taken them at once, and long answers are not to
keep a minute's tokens from all others.

Times are seconds of one clock, passed in. It may jump: back is as if no time had passed; forward fills the buckets, no further.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from proxy.chat import MOST_TOKENS, Holder, Limits
from proxy.errors import ClientError

WINDOW_S = 60.0

# Far less than one token or request, and far more than what arithmetic with floats gets wrong.
_SLACK = 1e-6

# How many holders are looked at, whether they can be forgotten, for each that is remembered.
_SWEPT = 2

_SLOT_RETRY_S = 1

# A clock that was centuries ahead for a moment is not to leave a time too large to add a second to.
_MAX_STEP_S = 86_400.0

_UNLIMITED: tuple[float, int | None] = (math.inf, None)


class Kind(StrEnum):
    """What a limit counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    PARALLEL = "parallel_calls"


_IN_WORDS = {
    Kind.REQUESTS: "requests per minute",
    Kind.TOKENS: "tokens per minute",
    Kind.PARALLEL: "calls at a time",
}


class Refusal(NamedTuple):
    """Why a call is not admitted: the limit that has to be waited for longest.

    `retry_after_s` is whole seconds, 1 or more. When they are over the call fits, unless others came first; who waits for a
    slot may have to wait again, for nobody knows when a call ends. None: it asks for more tokens than the limit ever allows.
    """

    holder: Holder
    kind: Kind
    limit: int
    retry_after_s: int | None

    def error(self) -> ClientError:
        """429 `rate_limit_exceeded`, its type the kind: https://platform.openai.com/docs/guides/rate-limits."""
        limit = f"the limit of {self.limit} {_IN_WORDS[self.kind]} for {self.holder.name}"
        if self.retry_after_s is None:
            words, retry_after = f"The request asks for more than {limit}. It would be refused at any time.", None
        else:
            words = f"It would be over {limit}. Try again in {self.retry_after_s} s."
            retry_after = str(self.retry_after_s)  # RFC 9110 §10.2.3: whole seconds
        return ClientError(429, "rate_limit_exceeded", words, kind=self.kind, retry_after=retry_after)


class _State:
    """What a holder has taken and has not got back, as of the time `at`, and what its running calls hold.

    What was taken is kept as the seconds in which it flows back: those are the same whatever becomes of the limits.
    """

    __slots__ = ("at", "held", "holding", "limits", "requests_s", "running", "tokens_s")

    def __init__(self, limits: Limits, at: float) -> None:
        self.limits = limits
        self.at = at
        self.requests_s = 0.0
        self.tokens_s = 0.0
        self.running = 0
        self.held = 0
        self.holding: dict[Admission, int] = {}
        """The running calls whose tokens are held, and how many; the first to be admitted first."""

    def move(self, limits: Limits, time: float) -> None:
        """Let flow back what has since `at`, and hold no longer what was held for a minute."""
        self.limits = limits
        passed = time - self.at
        if passed > 0:
            self.at = time
            self.requests_s = self.requests_s - passed if self.requests_s > passed else 0.0
            self.tokens_s = self.tokens_s - passed if self.tokens_s > passed else 0.0
            while self.holding:
                oldest = next(iter(self.holding))
                if time - oldest.time < WINDOW_S - _SLACK:
                    break
                self.held -= self.holding.pop(oldest)

    def left(self) -> tuple[float, float, float]:
        """How many requests, tokens and slots are left, infinitely many where nobody limits them; below 0, what is owed."""
        requests, tokens, calls = self.limits
        return (
            math.inf if requests is None else requests - self.requests_s * requests / WINDOW_S,
            math.inf if tokens is None else tokens - self.tokens_s * tokens / WINDOW_S - self.held,
            math.inf if calls is None else calls - self.running,
        )

    def seconds_to(self, tokens: int, limit: int, time: float) -> float:
        """How long until so many tokens fit, when no running call ends before: some flow back, some are held no longer."""
        held, waits = self.held, 0.0
        for call, its_tokens in self.holding.items():
            flows = self.tokens_s + (held + tokens - limit) * WINDOW_S / limit
            lapses = call.time + WINDOW_S - time
            # Time alone makes room only beside what is held, and that is asked in whole tokens: no rounding is to decide it.
            if held + tokens <= limit and flows <= lapses:
                return max(flows, waits)
            held -= its_tokens
            waits = lapses
        return max(self.tokens_s + (tokens - limit) * WINDOW_S / limit, waits)

    def is_idle(self, time: float) -> bool:
        """Whether it is as good as one that nothing is known of."""
        return not self.running and max(self.requests_s, self.tokens_s) <= time - self.at


class Admission:
    """A call that was admitted, to be settled. `time` is the limiter's own when it began."""

    __slots__ = ("is_settled", "states", "time")

    def __init__(self, states: list[_State], time: float) -> None:
        self.states = states
        self.time = time
        self.is_settled = False


class Limiter:
    """All holders that have taken something and not got it back. Those that have are forgotten as others come.

    An admission by a key and its team, with its settlement, takes 4 µs; their headers take 4 µs more.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        # Time that never runs back: a clock that does stands still here.
        self._time = 0.0
        self._states: OrderedDict[str, _State] = OrderedDict()

    def __len__(self) -> int:
        """How many holders are remembered."""
        return len(self._states)

    def admit(self, chain: Sequence[Holder], tokens: int, now: float) -> Admission | Refusal:
        """Take a request, a slot and `tokens` of every holder in the chain; of none when one of them refuses.

        `tokens` is what the call is thought to take, its prompt and its answer. The holders of a chain differ. Whoever gets
        an Admission settles it, however the call ends.
        """
        time = self._tick(now)
        states: list[_State] = []
        fits, is_first = True, False
        for holder in chain:
            state = self._states.get(holder.id)
            if state is None:
                state = self._states[holder.id] = _State(holder.limits, time)
                is_first = True
            state.move(holder.limits, time)
            states.append(state)
            requests_left, tokens_left, slots_left = state.left()
            if requests_left < 1 - _SLACK or tokens_left < tokens - _SLACK or slots_left < 1:
                fits = False
        decision: Admission | Refusal
        if fits:
            decision = Admission(states, time)
            for state in states:
                most_requests, most_tokens, _ = state.limits
                state.running += 1
                if most_requests is not None:
                    state.requests_s += WINDOW_S / most_requests
                if most_tokens is not None:
                    state.held += tokens
                    state.holding[decision] = tokens
        else:
            decision = self._refusal(chain, states, tokens, time)
        if is_first:
            self._forget(_SWEPT * len(states), time)
        return decision

    def settle(self, admission: Admission, tokens: int, now: float) -> None:
        """The call has ended, and took so many tokens: its slots are free. Nothing at all when it was settled before."""
        if admission.is_settled:
            return
        admission.is_settled = True
        time = self._tick(now)
        for state in admission.states:
            state.move(state.limits, time)
            state.running -= 1
            state.held -= state.holding.pop(admission, 0)
            if (most := state.limits.tokens_per_minute) is not None:
                state.tokens_s += tokens * WINDOW_S / most

    def headers(self, chain: Sequence[Holder], now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers (https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers).

        Of several holders the one with least left is told. `reset` is the time until its bucket is full, as if what running
        calls hold had been taken. There are none for what nobody limits.
        """
        time = self._tick(now)
        requests = tokens = _UNLIMITED
        for holder in chain:
            state = self._states.get(holder.id) or _State(holder.limits, time)
            state.move(holder.limits, time)
            requests_left, tokens_left, _ = state.left()
            if requests_left < requests[0]:
                requests = requests_left, holder.limits.requests_per_minute
            if tokens_left < tokens[0]:
                tokens = tokens_left, holder.limits.tokens_per_minute
        headers: dict[str, str] = {}
        left, limit = requests
        if limit is not None:
            headers["x-ratelimit-limit-requests"] = str(limit)
            headers["x-ratelimit-remaining-requests"] = str(max(0, int(left + _SLACK)))
            headers["x-ratelimit-reset-requests"] = duration((limit - left) * WINDOW_S / limit)
        left, limit = tokens
        if limit is not None:
            headers["x-ratelimit-limit-tokens"] = str(limit)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(left + _SLACK)))
            headers["x-ratelimit-reset-tokens"] = duration((limit - left) * WINDOW_S / limit)
        return headers

    def _tick(self, now: float) -> float:
        passed = now - self._now
        self._now = now
        if passed > 0:
            self._time += min(passed, _MAX_STEP_S)
        return self._time

    def _forget(self, count: int, time: float) -> None:
        """Look at so many holders, in turn, and forget those that nothing needs to be known of."""
        states = self._states
        for _ in range(min(count, len(states))):
            name, state = states.popitem(last=False)
            if not state.is_idle(time):
                states[name] = state

    def _refusal(self, chain: Sequence[Holder], states: list[_State], tokens: int, time: float) -> Refusal:
        """The refusal to wait for longest."""
        found: list[tuple[float, Holder, Kind, int]] = []
        for holder, state in zip(chain, states, strict=True):
            limits = holder.limits
            requests_left, tokens_left, slots_left = state.left()
            if (most := limits.requests_per_minute) is not None and requests_left < 1 - _SLACK:
                found.append(((1 - requests_left) * WINDOW_S / most, holder, Kind.REQUESTS, most))
            if (most := limits.tokens_per_minute) is not None and tokens_left < tokens - _SLACK:
                wait_s = math.inf if tokens > most else state.seconds_to(tokens, most, time)
                found.append((wait_s, holder, Kind.TOKENS, most))
            if (most := limits.parallel_calls) is not None and slots_left < 1:
                found.append((_SLOT_RETRY_S, holder, Kind.PARALLEL, most))
        wait_s, holder, kind, limit = max(found, key=lambda one: one[0])
        return Refusal(holder, kind, limit, None if math.isinf(wait_s) else max(1, math.ceil(wait_s - _SLACK)))


def most_completion_tokens(body: Mapping[str, Any]) -> int | None:
    """The most tokens an answer to a chat request may have, for all its choices, up to MOST_TOKENS; None where that is not said.

    `max_completion_tokens` goes before the older `max_tokens` (https://platform.openai.com/docs/api-reference/chat/create). One
    that is no number above 0 is for the upstream to refuse.
    """
    most = None
    for name in ("max_tokens", "max_completion_tokens"):
        if type(limit := body.get(name)) is int and limit > 0:
            most = limit
    if most is None:
        return None
    choices = body.get("n")
    return int(min(most * max(1, choices if type(choices) is int else 1), MOST_TOKENS))


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `12ms`, `8.64s`, `6m0s`, `1h0m0s`; rounded up to a millisecond."""
    milliseconds = math.ceil(seconds * 1000 - _SLACK)
    if milliseconds < 60_000:
        return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds / 1000:g}s"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    told = f"{minutes}m{milliseconds / 1000:g}s"
    return f"{hours}h{told}" if hours else told
