"""May a near match be served?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.guard import is_time_bound, judge, threshold
from tests.conftest import examples

_PIECES = "how do I not enable 3 three kg Paris '`x += 1`' https://a.b C++ v1.2 -5 to from ß 東京 Ω"
_TEXTS = st.text(max_size=200) | st.lists(st.sampled_from(_PIECES.split()), max_size=20).map(" ".join)
_COSINES = st.floats(allow_nan=True)
_DEFAULT = 0.02


def served(row: dict[str, Any]) -> bool:
    verdict = judge(row["a"], row["b"], row["similarity"])
    return not verdict.objections and verdict.score >= threshold(_DEFAULT)


@pytest.mark.parametrize(
    ("asked", "stored", "objection"),
    [
        ("Give me 3 names", "Give me 4 names", "numbers differ: 3 / 4"),
        ("Give me two names", "Give me 2 names", None),
        ("Who was the third king?", "Who was the 4th king?", "numbers differ: 3 / 4"),
        ("a trip of 1,000 miles", "a trip of 1000 miles", None),
        ("a trip of 5 km", "a trip of 5 miles", "units differ: kilometre / mile"),
        ("a trip of 5km", "a trip of 5 kilometers", None),
        ("What was World War II?", "What was World War 2?", None),
        ("What is 5 + -3?", "What is 5 + 3?", "numbers differ: -3 5 / 3 5"),
        ("Subtract 7 from 12", "Subtract 12 from 7", "numbers in another order"),
        ("Is Django 4.2 stable?", "Is Django 5.0 stable?", "numbers differ: 4.2 / 5.0"),
        ("What shall I plant in May?", "What shall I plant in June?", "dates differ: may / june"),
        ("Which cheese melts?", "Which cheese doesn't melt?", "negation differs"),
        ("How do I enable logs?", "How do I disable logs?", "opposites: enable / disable"),
        ("How do I mount a disk?", "How do I unmount a disk?", "opposites: mount / unmount"),
        ("Is it hot in Paris?", "Is it hot in Rome?", "names differ: Paris / Rome"),
        ("What does `rm -r` do?", "What does `rm -f` do?", "literals differ: -r / -f"),
        ('What does "rum ham" mean?', 'What does "rum jam" mean?', "quotes differ: rum ham / rum jam"),
        ("Is https://a.org/x up?", "Is https://a.org/y up?", "literals differ: https://a.org/x / https://a.org/y"),
        ("How do I learn C#?", "How do I learn C++?", "literals differ: c# / c++"),
        ("A train from Bonn to Kiel", "A train from Kiel to Bonn", "reversed direction"),
        ("Do cats like dogs?", "Do dogs like cats?", "reversed direction"),
        ("Compare cats and dogs", "Compare dogs and cats", None),
        ("How do I peel a mango?", "How do I peel a melon?", "words differ: mango / melon"),
        ("Why do cows moo?", "When do cows moo?", "kind of question differs: why / when"),
        ("Who is the mayor?", "Who was the mayor?", "time differs"),
        ("What is my name?", "What is your name?", "person differs"),
        ("How do I cook my rice?", "How do you cook your rice?", None),
        ("Wie alt ist Bonn?", "wie alt  ist bonn", None),
        ("Wie alt ist Bonn?", "Wie alt war Bonn?", "wording differs, and it is not English"),
        ("How can I mend a bike?", "What is the best way to repair bikes?", None),
        ("What colour is the sky?", "What color is the sky?", None),
    ],
)  # fmt: skip
def test_what_speaks_against_a_match(asked: str, stored: str, objection: str | None) -> None:
    found = judge(asked, stored, 0.97).objections
    assert found[:1] == (() if objection is None else (objection,))


def test_the_adversarial_set_at_the_default_setting() -> None:
    lines = (Path(__file__).parents[1] / "data" / "adversarial.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    right = [served(row) for row in rows if row["label"]]
    wrong = [served(row) for row in rows if not row["label"]]
    assert len(right) >= 100
    assert len(wrong) >= 200
    assert sum(wrong) / len(wrong) <= 0.02
    assert sum(right) / len(right) >= 0.6


@given(_TEXTS, _TEXTS, _COSINES)
def test_any_texts_are_judged_alike_both_ways(one: str, other: str, cosine: float) -> None:
    verdict = judge(one, other, cosine)
    back = judge(other, one, cosine)
    assert 0 <= verdict.score <= 1
    assert verdict.score == back.score
    assert bool(verdict.objections) == bool(back.objections)
    is_time_bound(one)


@given(_TEXTS, _COSINES, st.sampled_from(("{}", " {}\n", "{}?", "{}...")))
def test_a_text_in_other_dress_is_the_same(text: str, cosine: float, dress: str) -> None:
    assert judge(dress.format(text.upper().lower()), text.upper(), cosine).objections == () or not text.isascii()
    assert judge(dress.format(text), text, cosine) == (1.0, ())


@given(
    st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(("Name {} rivers", "{}", "bin/x-{}", "Wo sind {}?"))
)
def test_another_number_is_always_objected_to(one: int, other: int, text: str) -> None:
    assert bool(judge(text.format(one), text.format(other), 1.0).objections) == (one != other)


@given(st.floats(0, 1), st.floats(0, 1))
def test_nearer_is_never_less_probable(one: float, other: float) -> None:
    scores = [
        judge("How do I bake bread?", "What is the way to bake bread?", near).score for near in sorted((one, other))
    ]
    assert scores == sorted(scores)


@given(st.floats(-1, 2), st.floats(-1, 2))
def test_who_allows_more_errors_is_served_more(one: float, other: float) -> None:
    strict, loose = (threshold(rate) for rate in sorted((one, other)))
    assert 1 >= strict >= loose > 0


@examples(20)
@given(st.text(st.sampled_from("a.-_'\"`/:@1, +(){}é漢"), min_size=1, max_size=8))
def test_long_texts_are_judged_too(piece: str) -> None:
    long = piece * 4000
    assert judge(long, long + " 7", 0.9).score <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What's the weather in Oslo?", True),
        ("who won the game", True),
        ("What is today's menu?", True),
        ("What happened this week?", True),
        ("What is the stock price of Apple?", True),
        ("Who is the current pope?", True),
        ("Who was the first pope?", False),
        ("How do I sort a list?", False),
        ("", False),
    ],
)
def test_questions_whose_answer_ages(text: str, expected: bool) -> None:
    assert is_time_bound(text) is expected
