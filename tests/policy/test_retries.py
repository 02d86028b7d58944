"""What is done after a failed attempt: a table of the rules, and whole calls of random troubles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from proxy.chat import Target
from proxy.errors import Trouble
from proxy.policy.retries import NO_CREDENTIAL, Choice, Tried, next_step
from tests.conftest import examples

BROKEN, LIMITED, OVERLOADED, SILENT = Trouble.BROKEN, Trouble.LIMITED, Trouble.OVERLOADED, Trouble.SILENT


def choice(name: str, credential: str | None = None, tokens: int | None = None, *, is_open: bool = False) -> Choice:
    """`up/model`, with a credential of its upstream's unless another is named."""
    upstream, model = name.split("/")
    return Choice(Target(upstream, model), upstream if credential is None else credential, tokens, is_open)


def tried(
    name: str, trouble: Trouble, *, at: float = 0, retry_after_s: float | None = None, midway: bool = False
) -> Tried:
    return Tried(choice(name).target, at, trouble, retry_after_s, midway)


A, A2, C, D = choice("a/m"), choice("a/n"), choice("c/m"), choice("d/n")


def step(attempts: Sequence[Tried], choices: Sequence[Choice], **options: Any) -> tuple[str, float] | None:
    """Where the next attempt goes and when; after the attempts, at second 10, with half of the luck."""
    found = next_step(attempts, choices, **{"now": 10.0, "budget_s": 20.0, "max_retries": 3, "luck": 0.5} | options)
    return None if found is None else (str(found.target), round(found.delay_s, 6))


AT_ONCE = 0.0
JITTER = 0.05

RULES: dict[str, tuple[list[Tried], list[Choice], dict[str, Any], tuple[str, float] | None]] = {
    "the first is asked first": ([], [A, C], {}, ("a/m", AT_ONCE)),
    "but not while its circuit is open": ([], [replace(A, is_open=True), C], {}, ("c/m", AT_ONCE)),
    "unless nothing else is left": ([], [replace(A, is_open=True)], {}, ("a/m", AT_ONCE)),
    "nobody is asked where there is nobody": ([], [], {}, None),
    # What must not, or need not, be asked again.
    "a wrong request": ([tried("a/m", Trouble.REQUEST)], [A, C], {}, None),
    "a policy": ([tried("a/m", Trouble.POLICY)], [A, C], {}, None),
    "a limit of ours": ([tried("a/m", Trouble.FINAL)], [A, C], {}, None),
    "no retries are allowed": ([tried("a/m", BROKEN)], [A, C], {"max_retries": 0}, None),
    # Broken: once more, then the next.
    "broken": ([tried("a/m", BROKEN)], [A, C], {}, ("a/m", JITTER)),
    "broken twice": ([tried("a/m", BROKEN)] * 2, [A, C], {}, ("c/m", AT_ONCE)),
    "broken twice, and alone": ([tried("a/m", BROKEN)] * 2, [A], {}, None),
    "broken, and no time for a delay": ([tried("a/m", BROKEN)], [A, C], {"budget_s": 0.01}, ("c/m", AT_ONCE)),
    "broken, and as many fallbacks as retries": ([tried("a/m", BROKEN)], [A, C, D, A2], {}, ("c/m", AT_ONCE)),
    "broken, and its circuit has opened": ([tried("a/m", BROKEN)], [replace(A, is_open=True), C], {}, ("c/m", AT_ONCE)),
    "broken, its circuit open, and alone": ([tried("a/m", BROKEN)], [replace(A, is_open=True)], {}, ("a/m", JITTER)),
    "who was left is not asked again": ([tried("a/m", BROKEN), tried("c/m", SILENT)], [A, C], {}, None),
    # Limited, overloaded: what Retry-After says, or ever later.
    "limited": ([tried("a/m", LIMITED)], [A, C], {}, ("a/m", 0.375)),
    "overloaded": ([tried("a/m", OVERLOADED)], [A, C], {}, ("a/m", 0.375)),
    "limited twice": ([tried("a/m", LIMITED)] * 2, [A, C], {}, ("a/m", 0.75)),
    "limited three times": ([tried("a/m", LIMITED)] * 3, [A, C], {}, ("c/m", AT_ONCE)),
    "limited, then broken": ([tried("a/m", LIMITED), tried("a/m", BROKEN)], [A, C], {}, ("c/m", AT_ONCE)),
    "Retry-After": ([tried("a/m", LIMITED, retry_after_s=20)], [A, C], {}, ("a/m", 20)),
    "a Retry-After that is too late": ([tried("a/m", LIMITED, retry_after_s=21)], [A, C], {}, ("c/m", AT_ONCE)),
    "a Retry-After that is too late, and alone": ([tried("a/m", LIMITED, retry_after_s=21)], [A], {}, None),
    "limited, and a fallback at the same upstream": ([tried("a/m", LIMITED, retry_after_s=99)], [A, A2], {}, ("a/n", 0)),
    # Silent: never twice.
    "silent": ([tried("a/m", SILENT)], [A, C], {}, ("c/m", AT_ONCE)),
    "silent, and the time for a first token is over": ([tried("a/m", SILENT)], [A, C], {"budget_s": -1}, ("c/m", AT_ONCE)),
    "silent, and alone": ([tried("a/m", SILENT)], [A], {}, None),
    "the open circuit comes last": ([tried("a/m", SILENT)], [A, replace(C, is_open=True), D], {}, ("d/n", AT_ONCE)),
    # An answer that broke off midway: once more at the same, whatever it was.
    "midway broken": ([tried("a/m", BROKEN, midway=True)], [A, C], {}, ("a/m", JITTER)),
    "midway silent": ([tried("a/m", SILENT, midway=True)], [A, C], {}, ("a/m", JITTER)),
    "midway limited": ([tried("a/m", LIMITED, midway=True)], [A, C], {}, ("a/m", 0.375)),
    "midway twice": ([tried("a/m", LIMITED, midway=True)] * 2, [A, C], {}, ("c/m", AT_ONCE)),
    "midway, then limited": ([tried("a/m", BROKEN, midway=True), tried("a/m", LIMITED)], [A, C], {}, ("c/m", AT_ONCE)),
    "midway, then silent": ([tried("a/m", BROKEN, midway=True), tried("a/m", SILENT)], [A, C], {}, ("c/m", AT_ONCE)),
    "midway refused": ([tried("a/m", Trouble.POLICY, midway=True)], [A, C], {}, None),
    # A credential that is refused is out, wherever it would be used.
    "a bad key": ([tried("a/m", Trouble.CREDENTIAL)], [A, A2, C], {}, ("c/m", AT_ONCE)),
    "a bad key, used elsewhere too": ([tried("a/m", Trouble.CREDENTIAL)], [A, choice("c/m", "a"), D], {}, ("d/n", 0)),
    "a bad key, and still out later": ([tried("a/m", Trouble.CREDENTIAL), tried("c/m", SILENT)], [A, C, A2], {}, None),
    "no key, where one is needed": (
        [tried("a/m", Trouble.CREDENTIAL)],
        [choice("a/m", NO_CREDENTIAL), choice("a/n", NO_CREDENTIAL), choice("c/m", NO_CREDENTIAL)],
        {},
        ("c/m", AT_ONCE),
    ),
    "no such model": ([tried("a/m", Trouble.MISSING)], [A, A2], {}, ("a/n", AT_ONCE)),
    # Too long: only where more is known to fit.
    "too long": ([tried("a/m", Trouble.CONTEXT)], [choice("a/m", None, 8), C, choice("d/n", None, 9)], {}, ("d/n", 0)),
    "too long, and no more fits elsewhere": (
        [tried("a/m", Trouble.CONTEXT)],
        [choice("a/m", None, 8), choice("d/n", None, 8)],
        {},
        None,
    ),
    "too long, and nobody knows for what": ([tried("a/m", Trouble.CONTEXT)], [A, C, choice("d/n", None, 1)], {}, ("d/n", 0)),
    "too long, and the same model": ([tried("a/m", Trouble.CONTEXT)], [A, choice("c/m", None, 9)], {}, None),
    "too long, and still so later": (
        [tried("a/m", Trouble.CONTEXT), tried("d/n", SILENT)],
        [choice("a/m", None, 8), choice("d/n", None, 9), choice("c/x", None, 8), choice("c/y", None, 10)],
        {},
        ("c/y", AT_ONCE),
    ),
    "too long, then broken": (
        [tried("a/m", Trouble.CONTEXT), tried("d/n", BROKEN)],
        [choice("a/m", None, 8), choice("d/n", None, 9)],
        {},
        ("d/n", JITTER),
    ),
    # Four attempts in any 3 s are enough for one upstream.
    "a fifth attempt waits": (
        [tried("a/m", LIMITED, at=8), tried("a/n", LIMITED, at=9), tried("a/o", SILENT, at=9), tried("a/p", SILENT, at=9)],
        [choice(f"a/{model}") for model in "mnopq"],
        {"max_retries": 9},
        ("a/q", 1.25),
    ),
    "or goes elsewhere, if that is too long": (
        [tried("a/m", SILENT, at=8), tried("a/n", SILENT, at=9), tried("a/o", SILENT, at=9), tried("a/p", SILENT, at=9)],
        [*(choice(f"a/{model}") for model in "mnopq"), C],
        {"max_retries": 9, "budget_s": 0.5},
        ("c/m", AT_ONCE),
    ),
    "or is given up": (
        [tried("a/m", SILENT, at=8), tried("a/n", SILENT, at=9), tried("a/o", SILENT, at=9), tried("a/p", SILENT, at=9)],
        [choice(f"a/{model}") for model in "mnopq"],
        {"max_retries": 9, "budget_s": 0.5},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attempts", "choices", "options", "expected"), RULES.values(), ids=RULES.keys())
def test_the_next_step_follows_from_what_was_tried(
    attempts: list[Tried], choices: list[Choice], options: dict[str, Any], expected: tuple[str, float] | None
) -> None:
    assert step(attempts, choices, **options) == expected


@pytest.mark.parametrize(("trouble", "low", "high"), [(BROKEN, 0, 0.1), (LIMITED, 0.25, 0.5), (OVERLOADED, 0.25, 0.5)])
def test_luck_spreads_the_delays(trouble: Trouble, low: float, high: float) -> None:
    steps = [step([tried("a/m", trouble)], [A], luck=luck) for luck in (0.0, 0.5, 0.999)]
    delays = [found[1] for found in steps if found is not None]
    assert low == delays[0] < delays[1] < delays[2] < high


# ---------------------------------------------------------------------------------------------- whole calls

PASSING = (BROKEN, LIMITED, OVERLOADED, SILENT)

GOES_ON = st.sampled_from((*PASSING, Trouble.MISSING, Trouble.CREDENTIAL, Trouble.CONTEXT))
ANY = st.one_of(GOES_ON, GOES_ON, GOES_ON, st.sampled_from(Trouble))

CHOICES = st.lists(
    st.builds(
        Choice,
        st.builds(Target, st.sampled_from("abc"), st.sampled_from("mnop")),
        st.sampled_from(("x", "y", NO_CREDENTIAL)),
        st.sampled_from((None, 8, 16, 32)),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda choice: choice.target,
)


@dataclass
class Failure:
    """How an attempt fails, and how long that takes."""

    trouble: Trouble
    retry_after_s: float | None
    is_midway: bool
    takes_s: float


def failures(troubles: st.SearchStrategy[Trouble]) -> st.SearchStrategy[Failure]:
    times = st.sampled_from((0.0, 0.001, 0.2, 2.0, 10.0))
    return st.builds(Failure, troubles, st.none() | st.floats(0, 40), st.booleans(), times)


@dataclass
class Played:
    tried: list[Tried]
    delays: list[tuple[float, float]]
    """Each step's delay, and the budget at that time."""


def play(choices: Sequence[Choice], fails: Sequence[Failure], max_retries: int, budget_s: float, luck: float) -> Played:
    """A call in which every attempt fails, the last of `fails` again and again, until it is given up."""
    now, ends = 1000.0, 1000.0 + budget_s
    played = Played([], [])
    while True:
        options = {"now": now, "budget_s": ends - now, "max_retries": max_retries, "luck": luck}
        found = next_step(played.tried, choices, **options)  # type: ignore[arg-type]
        assert found == next_step(list(played.tried), tuple(choices), **options)  # type: ignore[arg-type]
        if found is None:
            return played
        played.delays.append((found.delay_s, ends - now))
        now += found.delay_s
        failure = fails[min(len(played.tried), len(fails) - 1)]
        played.tried.append(Tried(found.target, now, failure.trouble, failure.retry_after_s, failure.is_midway))
        assert len(played.tried) <= max_retries + 1
        now += failure.takes_s


@given(
    CHOICES,
    st.lists(failures(ANY), min_size=1, max_size=12),
    st.integers(0, 20),
    st.sampled_from((0.0, 0.3, 3.0, 30.0, 1000.0)),
    st.floats(0, 1, exclude_max=True),
)
@examples(200)
def test_a_call_is_tried_where_it_may_succeed_and_nobody_is_hammered(
    choices: list[Choice], fails: list[Failure], max_retries: int, budget_s: float, luck: float
) -> None:
    played = play(choices, fails, max_retries, budget_s, luck)
    attempts = played.tried
    of = {choice.target: choice for choice in choices}
    order = [attempt.target for attempt in attempts]
    event(f"attempts: {len(attempts)}")

    assert order[0] == min(choices, key=lambda choice: choice.is_open).target
    assert all(delay_s == 0 or 0 < delay_s <= left_s for delay_s, left_s in played.delays)

    # Nobody is hammered.
    for upstream in "abc":
        starts = [attempt.started for attempt in attempts if attempt.target.upstream == upstream]
        assert all(fifth - first >= 3 - 1e-9 for first, fifth in zip(starts, starts[4:], strict=False))
    for target in set(order):
        mine = [position for position, asked in enumerate(order) if asked == target]
        assert mine == list(range(mine[0], mine[0] + len(mine))), "asked again after it was left"
        assert len(mine) <= 3
        for before in (attempts[position] for position in mine[:-1]):
            assert before.trouble in (BROKEN, LIMITED, OVERLOADED) or (before.trouble is SILENT and before.is_midway)
        assert len(mine) <= 2 or not any(attempts[position].is_midway for position in mine[:-1])

    # Nothing is asked that cannot help.
    for position, attempt in enumerate(attempts):
        later = [of[target] for target in order[position + 1 :]]
        match attempt.trouble:
            case Trouble.REQUEST | Trouble.POLICY | Trouble.FINAL:
                assert not later
            case Trouble.CREDENTIAL if of[attempt.target].credential != NO_CREDENTIAL:
                assert all(one.credential != of[attempt.target].credential for one in later)
            case Trouble.CONTEXT:
                needed = of[attempt.target].context_tokens or 0
                assert all((one.context_tokens or 0) > needed for one in later)
                assert all(one.target.model != attempt.target.model for one in later)


@given(
    CHOICES,
    st.lists(failures(st.sampled_from((*PASSING, Trouble.MISSING))), min_size=1, max_size=12),
    st.integers(0, 5),
    st.floats(0, 1, exclude_max=True),
)
@examples(100)
def test_every_target_is_asked_before_the_call_is_given_up(
    choices: list[Choice], fails: list[Failure], more: int, luck: float
) -> None:
    played = play(choices, fails, len(choices) - 1 + more, 1000.0, luck)
    assert {attempt.target for attempt in played.tried} == {choice.target for choice in choices}


@given(CHOICES, st.floats(0, 1, exclude_max=True), st.integers(0, 20), GOES_ON, st.booleans())
@examples(150)
def test_an_open_circuit_is_asked_last_and_not_twice_while_another_is_left(
    choices: list[Choice], luck: float, max_retries: int, trouble: Trouble, is_midway: bool
) -> None:
    order = [a.target for a in play(choices, [Failure(trouble, None, is_midway, 5.0)], max_retries, 1000.0, luck).tried]
    is_open = [next(choice.is_open for choice in choices if choice.target == target) for target in order]
    assert is_open == sorted(is_open)
    assert not any(
        was_open and now == later != order[-1] for was_open, (now, later) in zip(is_open, pairwise(order), strict=False)
    )
