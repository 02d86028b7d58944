"""When a target that keeps failing is left alone, and when it gets another chance: a circuit breaker.

                 failures in a row                cooldown over               asked again
    CLOSED ───────────────────────────▶ OPEN ───────────────────▶ HALF_OPEN ──────────────▶ the same, and being probed
       ▲                                  ▲                                                           │
       │                                  └────────────────────── it failed ──────────────────────────┤
       └───────────────────────────────────────────────────────── it succeeded ───────────────────────┘

The probe is a real call, and one at a time. A success closes the circuit whoever had it. A failure of an attempt that had
begun before the circuit opened changes nothing: the cooldown runs from the moment it opened.

Times are in seconds of one clock, and passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from proxy.errors import Trouble, UpstreamError


class State(StrEnum):
    CLOSED = "closed"  # asked as ever
    OPEN = "open"  # not to be asked
    HALF_OPEN = "half_open"  # one call may find out


@dataclass(frozen=True, slots=True)
class Circuit:
    """One target's circuit. `probe_at` is None while it is closed, and else the time from which it may be probed."""

    failures: int = 0
    """In a row, and such as count."""
    probe_at: float | None = None
    is_probing: bool = False

    def state(self, now: float) -> State:
        if self.probe_at is None:
            return State.CLOSED
        return State.HALF_OPEN if now >= self.probe_at else State.OPEN

    def may_be_asked(self, now: float) -> bool:
        """Not while it is open, nor while somebody else finds out whether it can be closed."""
        return self.probe_at is None or (now >= self.probe_at and not self.is_probing)


CLOSED = Circuit()
"""The circuit of a target that has not failed, or that has succeeded since."""


def begun(circuit: Circuit, now: float) -> Circuit:
    """The circuit when an attempt begins: it becomes the probe where one is wanted."""
    if circuit.probe_at is None or not circuit.may_be_asked(now):
        return circuit
    return replace(circuit, is_probing=True)


def failed(circuit: Circuit, *, failures: int, cooldown_s: float, now: float) -> Circuit:
    """The circuit when an attempt has failed in a way that counts. It opens at `failures` in a row, or when it is probed."""
    in_a_row = circuit.failures + 1
    opens = circuit.is_probing or (circuit.probe_at is None and in_a_row >= failures)
    return Circuit(in_a_row, now + cooldown_s if opens else circuit.probe_at)


def let_go(circuit: Circuit) -> Circuit:
    """The circuit when a probe has ended without a verdict: the next call is the probe."""
    return replace(circuit, is_probing=False)


_COUNTS = (Trouble.LIMITED, Trouble.OVERLOADED, Trouble.BROKEN, Trouble.SILENT, Trouble.CREDENTIAL)

_LIVES = (Trouble.REQUEST, Trouble.POLICY, Trouble.CONTEXT, Trouble.MISSING)


def counts_against(error: UpstreamError) -> bool:
    """Whether the error says that the target is in trouble, and not the request. A 403 may be about either."""
    return error.trouble in _COUNTS and not (error.trouble is Trouble.CREDENTIAL and error.status == 403)


def shows_life(error: UpstreamError) -> bool:
    """Whether only an upstream that works can have given this error: it read the request, and judged it."""
    return error.trouble in _LIVES
