"""What a cached entry learns from verified near hits, and whether two answers say the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.trust import CLOSED, Trust, same_answer

_SCORES = st.floats(0, 1)
_HISTORIES = st.lists(st.tuples(_SCORES, st.booleans()), max_size=60)
_BASE = 0.95


def told(*history: tuple[float, bool]) -> Trust:
    trust = Trust()
    for score, was_right in history:
        trust = trust.seen(score, was_right)
    return trust


def test_an_entry_begins_at_the_guards_threshold() -> None:
    assert Trust().threshold(_BASE) == _BASE


def test_right_answers_lower_it_within_bounds() -> None:
    assert told(*[(0.9, True)] * 4).threshold(_BASE) == _BASE
    assert told(*[(0.9, True)] * 10).threshold(_BASE) == 0.9
    assert told(*[(0.1, True)] * 1000).threshold(_BASE) > 0.85


def test_a_wrong_answer_raises_it() -> None:
    assert told(*[(0.9, True)] * 10, (0.97, False)).threshold(_BASE) > 0.97


def test_an_answer_wrong_at_the_highest_score_closes_the_entry() -> None:
    assert told((1.0, False)).threshold(_BASE) == CLOSED


def test_many_wrong_answers_close_it_and_many_more_right_ones_open_it() -> None:
    trust = told(*[(0.96, False)] * 3)
    assert trust.threshold(_BASE) == CLOSED
    assert told(*[(0.96, False)] * 3, *[(0.99, True)] * 60).threshold(_BASE) < 1


@given(_HISTORIES, _SCORES, _SCORES)
def test_experience_only_moves_it_the_way_it_points(
    history: list[tuple[float, bool]], score: float, base: float
) -> None:
    trust = told(*history)
    now = trust.threshold(base)
    assert now >= base * 0.9
    assert trust.seen(score, True).threshold(base) <= now
    assert trust.seen(score, False).threshold(base) >= now
    assert trust.seen(score, False).threshold(base) > score
    assert trust.wrongs or now <= base


@pytest.mark.parametrize(
    ("one", "other", "similarity", "expected"),
    [
        ("Paris.", "paris", 0.0, True),
        ("Paris.", "Rome.", 0.85, False),
        ("The capital is Paris.", "Paris is the capital.", 0.97, True),
        ("It has 3 parts.", "It has three parts.", 0.95, True),
        ("It has 3 parts.", "It has 4 parts.", 0.99, False),
        ("Yes, you can do that at any time.", "No, you can do that at no time.", 0.95, False),
        ("Yes, you can do that at any time.", "You can do that whenever you like, at any time.", 0.95, False),
        ("You can not do that.", "You can do that.", 0.97, False),
        ("Run `ls -l` in it.", "Run `ls -l` in it now.", 0.95, True),
        ("See https://a.org/1 for it.", "See https://a.org/2 for it.", 0.99, False),
        ("Bake it slowly until it is brown on all sides.", "Leave it in the oven until all sides are brown.", 0.9, True),
        ("Bake it slowly until it is brown on all sides.", "Leave it in the oven until all sides are brown.", 0.5, False),
        ("Sie wohnt in der Stadt.", "Sie wohnt auf dem Land.", 0.85, False),
    ],
)  # fmt: skip
def test_whether_two_answers_say_the_same(one: str, other: str, similarity: float, expected: bool) -> None:
    assert same_answer(one, other, similarity) is expected


@given(st.text(max_size=60), st.text(max_size=60), st.floats(allow_nan=True))
def test_any_answers_are_compared_alike_both_ways(one: str, other: str, similarity: float) -> None:
    assert same_answer(one, other, similarity) is same_answer(other, one, similarity)
    assert same_answer(one, f" {one} ", similarity)
