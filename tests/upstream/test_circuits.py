"""The circuits of all targets, on a clock that the tests turn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.chat import Target
from proxy.errors import UpstreamError
from proxy.policy.circuits import State
from proxy.upstream.circuits import CircuitRow, Circuits, LastError
from tests.conftest import examples

A, B, C = (Target(name, "m") for name in "abc")
BROKEN = UpstreamError(502, "upstream_broke", "No.")
WRONG = UpstreamError(400, "wrong", "No.")
REFUSED = UpstreamError(403, "refused", "No.")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuits(clock: Clock) -> Circuits:
    """They open after two failures, for ten seconds."""
    return Circuits(2, 10, clock)


def break_(circuits: Circuits, target: Target, times: int = 2) -> None:
    for _ in range(times):
        circuits.begin(target)
        circuits.fail(target, BROKEN)


def state(circuits: Circuits, target: Target) -> State:
    return dict(circuits.all())[target].state


def test_targets_stand_as_they_did_while_none_is_in_trouble(circuits: Circuits) -> None:
    targets = (A, B, C)
    break_(circuits, A, times=1)
    assert circuits.order(targets) is targets
    break_(circuits, A)
    assert circuits.order(targets[1:]) == targets[1:]


def test_those_that_are_open_come_last_and_the_one_to_be_probed_soonest_first(circuits: Circuits, clock: Clock) -> None:
    break_(circuits, B)
    clock.now = 1
    break_(circuits, A)
    assert circuits.order((A, B, C)) == (C, B, A)
    clock.now = 10  # B may be probed, and stands at its place again
    assert circuits.order((A, B, C)) == (B, C, A)
    assert circuits.begin(B)
    assert circuits.order((A, B, C)) == (C, B, A)
    clock.now = 11
    targets = (A, C)
    assert circuits.order(targets) is targets


def test_a_success_between_failures_starts_the_count_again(circuits: Circuits) -> None:
    break_(circuits, A, times=1)
    circuits.succeed(A)
    break_(circuits, A, times=1)
    assert not circuits.is_open(A)
    break_(circuits, A, times=1)
    assert circuits.is_open(A)


@pytest.mark.parametrize(
    ("ends", "after"),
    [
        (lambda circuits: circuits.succeed(A), State.CLOSED),
        (lambda circuits: circuits.fail(A, WRONG), State.CLOSED),  # it lives
        (lambda circuits: circuits.fail(A, BROKEN), State.OPEN),
        (lambda circuits: circuits.fail(A, REFUSED), State.HALF_OPEN),
        (lambda circuits: circuits.let_go(A), State.HALF_OPEN),
    ],
)
def test_a_probe_closes_the_circuit_or_opens_it_or_leaves_its_place(
    circuits: Circuits, clock: Clock, ends: Any, after: State
) -> None:
    break_(circuits, A)
    clock.now = 10
    assert not circuits.is_open(A)
    assert circuits.begin(A)
    assert circuits.is_open(A)
    assert not circuits.begin(A)
    ends(circuits)
    assert state(circuits, A) is after
    assert circuits.is_open(A) is (after is State.OPEN)
    assert circuits.begin(A) is (after is State.HALF_OPEN)


def test_what_speaks_of_the_request_neither_opens_nor_closes_what_is_not_probed(circuits: Circuits) -> None:
    for _ in range(5):
        circuits.begin(A)
        circuits.fail(A, WRONG)
    assert not circuits.is_open(A)
    break_(circuits, A)
    circuits.fail(A, WRONG)
    assert circuits.is_open(A)


def test_an_operator_sees_how_each_target_stands(circuits: Circuits, clock: Clock) -> None:
    circuits.begin(B)
    circuits.fail(B, WRONG)
    clock.now = 5
    break_(circuits, A, times=3)
    clock.now = 7
    assert dict(circuits.all()) == {
        B: CircuitRow(State.CLOSED, 0, None, attempts=1, failures=0, last_error=None),
        A: CircuitRow(State.OPEN, 3, 8, attempts=3, failures=3, last_error=LastError("upstream_broke", 502, 2)),
    }
    clock.now = 15
    assert dict(circuits.all())[A].probe_in_s == 0
    circuits.succeed(A)
    assert dict(circuits.all())[A] == CircuitRow(State.CLOSED, 0, None, 3, 3, LastError("upstream_broke", 502, 10))


def test_memory_is_bounded_when_clients_make_up_names_and_what_is_in_use_is_kept(circuits: Circuits) -> None:
    break_(circuits, A)
    for target in (B, *(Target("c", f"name-{number}") for number in range(5000))):
        for _ in range(4 if target is B else 3):
            circuits.begin(target)
    rows = dict(circuits.all())
    assert len(rows) <= 4096
    assert (rows[A].state, rows[B].attempts) == (State.OPEN, 4)


def test_the_end_of_an_attempt_that_was_forgotten_is_no_matter(circuits: Circuits) -> None:
    circuits.succeed(A)
    circuits.let_go(A)
    circuits.fail(A, BROKEN)
    assert dict(circuits.all())[A].failures == 1


FAILURES, COOLDOWN_S = 3, 10.0


@given(
    st.lists(
        st.sampled_from((0.1, 4.0, COOLDOWN_S))
        | st.sampled_from(("begin", "succeed", "let go", BROKEN, BROKEN, WRONG, REFUSED)),
        max_size=40,
    )
)
@example([BROKEN] * 3 + [4.0, BROKEN] * 3)
@example([BROKEN] * 3 + [COOLDOWN_S, "begin", BROKEN, COOLDOWN_S, "begin", "let go", "begin", WRONG])
@examples(200)
def test_in_any_order_of_events_it_opens_for_a_reason_and_not_for_long(walk: list[float | str | UpstreamError]) -> None:
    clock = Clock()
    circuits = Circuits(FAILURES, COOLDOWN_S, clock)
    circuits.begin(A)
    in_a_row, is_probed, opened_at = 0, False, None
    for happens in walk:
        was = state(circuits, A)
        match happens:
            case float():
                clock.now += happens
            case "begin":
                is_probe = circuits.begin(A)
                assert is_probe is (was is State.HALF_OPEN and not is_probed), "one probe at a time"
                is_probed |= is_probe
            case "succeed":
                circuits.succeed(A)
                in_a_row, is_probed = 0, False
            case "let go" if is_probed:
                circuits.let_go(A)
                is_probed = False
            case UpstreamError():
                circuits.fail(A, happens)
                in_a_row = in_a_row + 1 if happens is BROKEN else 0 if happens is WRONG and is_probed else in_a_row
                is_probed = False
        now = state(circuits, A)
        assert (now is State.CLOSED) is (in_a_row < FAILURES)
        assert circuits.is_open(A) is (now is State.OPEN or is_probed)
        if now is State.OPEN:
            opened_at = clock.now if was is not State.OPEN or opened_at is None else opened_at
            assert clock.now - opened_at < COOLDOWN_S
