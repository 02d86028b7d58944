"""What is counted when a call is over, for GET /metrics: a few additions, some 2 µs for each call.

Everything has bounds that no client can move: modes, statuses and reasons are few, and of the targets, whose models clients
can name as they like where an upstream takes any, the first thousand that gave an answer have counters of their own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from proxy.chat import Mode, Outcome, Status, Target
from proxy.histogram import BOUNDS_S, LONG_BOUNDS_S, Histogram
from proxy.server.limiting import FREE
from proxy.store.calls import End

OTHER = "other"

REASONS = (
    "rate_limit_exceeded",
    "insufficient_credits",
    "budget_exceeded",
    "price_unknown",
    "prices_unavailable",
    "missing_api_key",
    "invalid_api_key",
    "key_expired",
    "key_suspended",
    "team_suspended",
    "model_not_allowed",
    "model_not_found",
    "job_not_found",
    "job_ended",
    "not_cached",
    "request_too_large",
    "ledger_unavailable",
    "shutting_down",
    OTHER,
)
"""Why calls are refused, as the codes of the errors say it: whatever else there is, is the last."""

_REFUSED = (Status.REJECTED, Status.CLIENT_ERROR)

_MAX_TARGETS = 1024


class CallCounts:
    """How many calls ended in which way, how long they took, and why some were refused."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[Mode, Status]] = Counter()
        self.first_token: dict[Mode, Histogram] = {}
        self.duration: dict[Mode, Histogram] = {}
        self.refused: dict[str, int] = dict.fromkeys(REASONS, 0)

    def count(self, outcome: Outcome) -> None:
        """A call is over."""
        mode, status = outcome.mode, outcome.status
        self.ended[mode, status] += 1
        if (duration := self.duration.get(mode)) is None:
            duration = self.duration[mode] = Histogram(LONG_BOUNDS_S)
        duration.observe(outcome.duration_s)
        if outcome.ttft_s is not None:
            if (first_token := self.first_token.get(mode)) is None:
                first_token = self.first_token[mode] = Histogram(BOUNDS_S)
            first_token.observe(outcome.ttft_s)
        if status in _REFUSED:
            self.refused[outcome.error if outcome.error in self.refused else OTHER] += 1

    def copy(self) -> CallCounts:
        """As they are now."""
        other = CallCounts()
        other.ended = self.ended.copy()
        other.first_token = {mode: found.copy() for mode, found in self.first_token.items()}
        other.duration = {mode: found.copy() for mode, found in self.duration.items()}
        other.refused = self.refused.copy()
        return other


@dataclass(slots=True)
class Spent:
    """What the calls of one target took, in tokens and in micro-dollars.

    `cached` are among those of `prompt`, `reasoning` among those of `completion`. `cost_microusd` is what the upstream asks
    for, `price_microusd` what teams are asked for; `unpriced` are calls whose cost nobody knows.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    cost_microusd: int = 0
    price_microusd: int = 0
    unpriced: int = 0


class Spending:
    """What was taken of which target. Behind the first thousand, an upstream's further models are one, named `other`."""

    def __init__(self) -> None:
        self._targets: dict[Target, Spent] = {}

    def add(self, outcome: Outcome, end: End) -> None:
        """A call was booked. One that was answered without an upstream took nothing, and one that failed has nothing to tell."""
        target, usage, cost = outcome.target, outcome.usage, end.cost_microusd
        if target is None or outcome.mode in FREE or (usage is None and cost is not None):
            return
        spent = self._targets.get(target) or self._new(target)
        if usage is not None:
            spent.prompt += usage.prompt
            spent.completion += usage.completion
            spent.cached += usage.cached
            spent.reasoning += usage.reasoning
        if cost is None:
            spent.unpriced += 1
        else:
            spent.cost_microusd += cost
        # What nobody knows the cost of may have a price all the same: what was held for it.
        spent.price_microusd += end.price_microusd or 0

    def copy(self) -> list[tuple[Target, Spent]]:
        """As it is now."""
        return [(target, replace(spent)) for target, spent in self._targets.items()]

    def _new(self, target: Target) -> Spent:
        if len(self._targets) >= _MAX_TARGETS:
            target = Target(target.upstream, OTHER)
        return self._targets.setdefault(target, Spent())
