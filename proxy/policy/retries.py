"""What to do when an attempt has failed: ask the same target again, the next one, or give up.

`next_step` is asked after every failed attempt of a call, with all of them, and remembers nothing itself. Time is passed in,
and randomness too. The rules, by the trouble that the last attempt ended in:

    REQUEST POLICY FINAL   give up: another target must not be asked, or would say the same
    BROKEN                 the same target once more, nearly at once; then the next
    LIMITED OVERLOADED     the same target up to twice more, after what Retry-After says where that fits, or ever later;
                           then the next
    SILENT                 the next at once: who was silent for the whole limit is not waited for again
    MISSING                the next
    CREDENTIAL             the next that has another credential, for the rest of the call
    CONTEXT                the next that is known to take more, with another model, for the rest of the call

An answer that broke off midway (BROKEN, LIMITED, OVERLOADED or SILENT) is asked for once more at the same target, then at
the next. No target is asked again after it was left. Breadth comes first: a target is asked again only while the attempts
that are left are more than the targets that were not asked yet. Whatever the trouble, no upstream is asked more than 4 times
in any 3 s by one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.chat import Target
from proxy.errors import Trouble

NO_CREDENTIAL = "none"
"""The credential of an upstream that is asked without a key. Two that have none have nothing in common."""

# What is sent 3 s apart may arrive somewhat closer.
_MAX_ATTEMPTS = 4
_WINDOW_S = 3.25

_JITTER_S = 0.1
_FIRST_BACK_OFF_S = 0.25

_REPEATS = {Trouble.BROKEN: 1, Trouble.LIMITED: 2, Trouble.OVERLOADED: 2}

_FATAL = (Trouble.REQUEST, Trouble.POLICY, Trouble.FINAL)


@dataclass(frozen=True, slots=True)
class Choice:
    """A target that may be asked. `credential` tells keys apart; `context_tokens` is what its model takes, if that is known."""

    target: Target
    credential: str
    context_tokens: int | None = None
    is_open: bool = False
    """Its circuit is open: it is asked only where nothing else is left."""


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt that failed. `started` is in seconds of the clock that `next_step` gets its `now` from."""

    target: Target
    started: float
    trouble: Trouble
    retry_after_s: float | None = None
    is_midway: bool = False
    """Part of its answer had gone to the client."""


@dataclass(frozen=True, slots=True)
class Step:
    """Ask `target`, `delay_s` seconds from now."""

    target: Target
    delay_s: float


def next_step(
    tried: Sequence[Tried],
    choices: Sequence[Choice],
    *,
    now: float,
    budget_s: float,
    max_retries: int,
    luck: float,
) -> Step | None:
    """What to do after the attempts in `tried`, first to last; None: give up.

    `choices` stand in the order of preference. `budget_s` is what is left of the time for a first token: no delay is longer,
    and a step without delay always fits. `max_retries` bounds the attempts after the first. `luck` in [0, 1) is the jitter.
    """
    retries_left = max_retries + 1 - len(tried)
    if retries_left <= 0 or (tried and tried[-1].trouble in _FATAL):
        return None
    asked = {attempt.target for attempt in tried}
    usable = _usable(tried, choices)
    fresh = sorted((choice for choice in usable if choice.target not in asked), key=lambda choice: choice.is_open)
    steps = [Step(choice.target, 0.0) for choice in fresh]
    if tried:
        again = next((choice for choice in usable if choice.target == tried[-1].target), None)
        is_wide_enough = retries_left > len({choice.target for choice in fresh})
        if again is not None and is_wide_enough and not (again.is_open and fresh):
            attempts = [attempt for attempt in tried if attempt.target == tried[-1].target]
            if (delay_s := _repeat_delay_s(attempts, luck)) is not None:
                steps.insert(0, Step(tried[-1].target, delay_s))
    for step in steps:
        delay_s = max(step.delay_s, _wait_s(step.target.upstream, tried, now))
        if delay_s == 0 or delay_s <= budget_s:
            return Step(step.target, delay_s)
    return None


def _usable(tried: Sequence[Tried], choices: Sequence[Choice]) -> list[Choice]:
    """The choices that nothing that was tried speaks against."""
    choice_of = {choice.target: choice for choice in choices}
    refused: set[tuple[str, str]] = set()
    too_small: set[str] = set()
    context_tokens = 0
    for attempt in tried:
        choice = choice_of.get(attempt.target)
        if choice is None:
            continue
        if attempt.trouble is Trouble.CREDENTIAL:
            refused.add(_credential(choice))
        elif attempt.trouble is Trouble.CONTEXT:
            too_small.add(attempt.target.model)
            context_tokens = max(context_tokens, choice.context_tokens or 0)
    usable = [choice for choice in choices if _credential(choice) not in refused]
    if too_small:
        usable = [
            choice
            for choice in usable
            if (choice.context_tokens or 0) > context_tokens and choice.target.model not in too_small
        ]
    return usable


def _credential(choice: Choice) -> tuple[str, str]:
    """The choice's credential: the same key is the same at every upstream, but no key is not."""
    return (choice.target.upstream if choice.credential == NO_CREDENTIAL else "", choice.credential)


def _repeat_delay_s(attempts: Sequence[Tried], luck: float) -> float | None:
    """How long to wait before a target is asked again after these attempts at it; None when it is not to be."""
    last = attempts[-1]
    repeats = 1 if last.is_midway and last.trouble is Trouble.SILENT else _REPEATS.get(last.trouble, 0)
    if any(attempt.is_midway for attempt in attempts):
        repeats = min(repeats, 1)
    if len(attempts) > repeats:
        return None
    if last.trouble in (Trouble.BROKEN, Trouble.SILENT):
        return _JITTER_S * luck
    if last.retry_after_s is not None:
        return last.retry_after_s
    return _FIRST_BACK_OFF_S * 2.0 ** (len(attempts) - 1) * (1 + luck)


def _wait_s(upstream: str, tried: Sequence[Tried], now: float) -> float:
    """How long the upstream must not be asked, lest it is asked too often."""
    starts = sorted(attempt.started for attempt in tried if attempt.target.upstream == upstream)
    return max(0.0, starts[-_MAX_ATTEMPTS] + _WINDOW_S - now) if len(starts) >= _MAX_ATTEMPTS else 0.0
