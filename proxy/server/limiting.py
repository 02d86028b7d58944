"""The limits of keys and teams, applied to calls. What is taken is counted in this process alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from proxy.chat import NO_LIMITS, Identity, Mode, Outcome, Ticket
from proxy.policy.limits import Admission, Holder, Limiter, Refusal

# Of text that nobody has counted, a token for so many bytes.
_BYTES_PER_TOKEN = 4

# An answer whose length nobody has bounded is thought to have so many.
_UNSAID_TOKENS = 1000

# What has taken nothing of an upstream.
_FREE = (Mode.REPLAY, Mode.COALESCED)


class Limiting:
    """Lets calls in as far as their key and their team allow. One for each server; `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._limiter = Limiter(now())

    @contextmanager
    def admitted(
        self, identity: Identity, told: dict[str, str], body_bytes: int, completion_tokens: int | None = 0
    ) -> Iterator[Ticket | None]:
        """A ticket for a call that is to be made within the block; None where nothing is limited.

        What is left is put into `told`, the headers of the response. `completion_tokens` are the most that the answer may
        have, None where that was not said. ClientError 429.
        """
        chain = _chain(identity)
        if not chain:
            yield None
            return
        tokens = body_bytes // _BYTES_PER_TOKEN
        if completion_tokens is None:
            # A small limit is not to refuse every call that does not say it.
            most = min(holder.limits.tokens_per_minute or math.inf for holder in chain)
            tokens = max(tokens, int(min(tokens + _UNSAID_TOKENS, most)))
        else:
            tokens += completion_tokens
        found = self._limiter.admit(chain, tokens, self._now())
        told.update(self._limiter.headers(chain, self._now()))
        if isinstance(found, Refusal):
            if found.retry_after_s is None:
                # What OpenAI's programs look at before they try again.
                told["x-should-retry"] = "false"
            raise found.error()
        ticket = _Ticket(self._limiter, found, body_bytes // _BYTES_PER_TOKEN, self._now)
        try:
            yield ticket
        except BaseException:
            ticket.give_back(None)
            raise


class _Ticket:
    """What a limited call has taken. One that is given back frees its slots, and counts the tokens that it really took."""

    __slots__ = ("_admission", "_body_tokens", "_limiter", "_now")

    def __init__(self, limiter: Limiter, admission: Admission, body_tokens: int, now: Callable[[], float]) -> None:
        self._limiter = limiter
        self._admission = admission
        self._body_tokens = body_tokens
        self._now = now

    def give_back(self, outcome: Outcome | None) -> None:
        self._limiter.settle(self._admission, self._taken(outcome), self._now())

    def _taken(self, outcome: Outcome | None) -> int:
        if outcome is None or outcome.mode in _FREE:
            return 0
        if outcome.usage is not None:
            return outcome.usage.prompt + outcome.usage.completion
        # Nobody reads the answers to requests that are passed on.
        return self._body_tokens if outcome.mode is Mode.PASSTHROUGH else 0


def _chain(identity: Identity) -> list[Holder]:
    """Who limits such calls. An id tells a key from a team of that name."""
    chain = []
    if identity.key_limits != NO_LIMITS:
        chain.append(Holder(f"key {identity.key}", "this key", identity.key_limits))
    if identity.team_limits != NO_LIMITS:
        chain.append(Holder(f"team {identity.team}", f"team '{identity.team}'", identity.team_limits))
    return chain
