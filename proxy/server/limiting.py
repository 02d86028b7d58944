"""The limits of keys and teams, applied to calls. What is taken is counted in this process alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from proxy.chat import Identity, Mode, Outcome
from proxy.policy.limits import Admission, Kind, Limiter, Refusal

BYTES_PER_TOKEN = 4
"""Of text that nobody has counted, a token for so many bytes."""

UNSAID_TOKENS = 1000
"""An answer whose length nobody has bounded is thought to have so many."""

FREE = (Mode.REPLAY, Mode.COALESCED)
"""What has taken nothing of an upstream."""


class Limiting:
    """Lets calls in as far as their key and their team allow. One for each server; `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._limiter = Limiter(now())
        self.refused: Counter[Kind] = Counter()
        """How many calls were refused by a limit of which kind."""

    def admit(
        self, identity: Identity, told: dict[str, str], body_bytes: int, completion_tokens: int | None = 0
    ) -> Taken | None:
        """Let a call in: what it takes, to be settled once; None where nothing is limited. ClientError 429.

        What is left is put into `told`, the headers of the response. `completion_tokens` are the most that the answer may
        have, None where that was not said.
        """
        chain = identity.holders
        if not chain:
            return None
        body_tokens = body_bytes // BYTES_PER_TOKEN
        if completion_tokens is None:
            completion_tokens = UNSAID_TOKENS
            for holder in chain:
                # A small limit is not to refuse every call that does not say it.
                if (most := holder.limits.tokens_per_minute) is not None and most < body_tokens + completion_tokens:
                    completion_tokens = max(0, most - body_tokens)
        now = self._now()
        found = self._limiter.admit(chain, body_tokens + completion_tokens, now)
        told.update(self._limiter.headers(chain, now))
        if isinstance(found, Refusal):
            self.refused[found.kind] += 1
            if found.retry_after_s is None:
                # What OpenAI's programs look at before they try again.
                told["x-should-retry"] = "false"
            raise found.error()
        return Taken(self._limiter, found, body_tokens + completion_tokens, self._now)


class Taken:
    """What a limited call has taken. Settling it frees its slots, and counts the tokens it really took; again does nothing."""

    __slots__ = ("_admission", "_held", "_limiter", "_now")

    def __init__(self, limiter: Limiter, admission: Admission, held: int, now: Callable[[], float]) -> None:
        """`held` are the tokens it was let in for."""
        self._limiter = limiter
        self._admission = admission
        self._held = held
        self._now = now

    def settle(self, outcome: Outcome) -> None:
        self._limiter.settle(self._admission, self._tokens(outcome), self._now())

    def _tokens(self, outcome: Outcome) -> int:
        if outcome.mode in FREE:
            return 0
        if outcome.usage is not None:
            return outcome.usage.prompt + outcome.usage.completion
        # What nobody knows the tokens of took those it was let in for, as soon as an answer began.
        return 0 if outcome.ttft_s is None else self._held
