"""When a circuit opens, when it is probed, and what counts."""

from __future__ import annotations

import pytest

from proxy.errors import Trouble, UpstreamError
from proxy.policy.circuits import CLOSED, Circuit, State, begun, counts_against, failed, let_go, shows_life


def fail(circuit: Circuit, now: float) -> Circuit:
    return failed(circuit, failures=3, cooldown_s=30, now=now)


ONCE = fail(CLOSED, 1)
TWICE = fail(ONCE, 2)
OPEN = fail(TWICE, 3)
PROBED = begun(OPEN, 33)


def test_it_opens_after_so_many_failures_in_a_row_and_is_half_open_after_the_cooldown() -> None:
    assert [circuit.state(3) for circuit in (CLOSED, ONCE, TWICE, OPEN)] == ["closed", "closed", "closed", "open"]
    assert Circuit(failures=3, probe_at=33) == OPEN
    assert [OPEN.state(now) for now in (32.9, 33, 99)] == [State.OPEN, State.HALF_OPEN, State.HALF_OPEN]


def test_it_may_be_asked_unless_it_is_open_or_being_probed() -> None:
    assert TWICE.may_be_asked(3)
    assert [OPEN.may_be_asked(now) for now in (3, 32.9, 33)] == [False, False, True]
    assert not PROBED.may_be_asked(99)
    assert PROBED.state(99) == "half_open"


def test_an_attempt_is_the_probe_only_where_one_is_wanted() -> None:
    assert begun(TWICE, 3) is TWICE
    assert begun(OPEN, 32.9) is OPEN  # nothing else was left to ask
    assert PROBED.is_probing
    assert begun(PROBED, 34) is PROBED


def test_a_probe_that_fails_opens_it_again_and_one_without_a_verdict_leaves_it_to_the_next() -> None:
    assert fail(PROBED, 40) == Circuit(failures=4, probe_at=70)
    assert let_go(PROBED) == OPEN


def test_a_failure_of_an_older_attempt_does_not_put_the_probe_off() -> None:
    for now in (4, 32, 50):
        assert fail(OPEN, now) == Circuit(failures=4, probe_at=33)


@pytest.mark.parametrize(
    ("trouble", "status", "counts", "lives"),
    [
        (Trouble.REQUEST, 400, False, True),
        (Trouble.POLICY, 400, False, True),
        (Trouble.CONTEXT, 400, False, True),
        (Trouble.MISSING, 404, False, True),
        (Trouble.CREDENTIAL, 401, True, False),
        (Trouble.CREDENTIAL, 402, True, False),
        (Trouble.CREDENTIAL, 429, True, False),
        (Trouble.CREDENTIAL, 403, False, False),  # may be about this model, or this region, only
        (Trouble.LIMITED, 429, True, False),
        (Trouble.OVERLOADED, 503, True, False),
        (Trouble.BROKEN, 502, True, False),
        (Trouble.SILENT, 504, True, False),
        (Trouble.FINAL, 504, False, False),
    ],
)
def test_what_speaks_of_the_request_does_not_count(trouble: Trouble, status: int, counts: bool, lives: bool) -> None:
    error = UpstreamError(status, None, "No.", trouble=trouble)
    assert counts_against(error) is counts
    assert shows_life(error) is lives
