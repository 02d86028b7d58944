"""May a near match be served? One number for how probable it is, and in words whatever speaks against it.

A near match is a cached question whose vector is close to that of the question asked. Vectors say what a question is
about; one changed word, number or direction they hardly see. So each near match is judged here by its words as well:

    objections   hard facts: numbers, units, literals, names, negation, opposites, direction, kind of question, a swapped
                 or an added word. One is enough, and the answer is not served, whatever the score.
    score        0 to 1: how probable it is that the stored answer answers the question asked. A logistic regression over
                 similarity and lexical evidence; the numbers are learned by scripts/guard/train.py.

Served is what has no objection and a score of at least `threshold(max_error_rate)`.

Both look at English. In a text of another language or script the tables see neither a negation nor an opposite, and one
letter can be the whole difference; so there anything objects but the same words in the same order, with case, white space,
Unicode forms and punctuation aside.

Pure and without state; no regular expression that backtracks; linear in the length of the texts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from math import exp, log1p
from typing import NamedTuple

from proxy.policy.guardweights import CALIBRATION, COEFFICIENTS, INTERCEPT
from proxy.policy.kinds import are_apart
from proxy.policy.lexicon import MONTHS_AND_DAYS, OPPOSED, TIME_BOUND, TIME_BOUND_PHRASES, opposite_among, words_of
from proxy.policy.reading import Reading, plain, read


class Verdict(NamedTuple):
    """What `judge` found."""

    score: float
    """0 to 1: how probable it is that the stored answer answers the question asked."""
    objections: tuple[str, ...]
    """What speaks against it, in plain words; empty for nothing."""


def judge(asked: str, stored: str, similarity: float) -> Verdict:
    """Judge a near match: the question asked, the one whose answer is stored, and the cosine of their vectors.

    `similarity` is on the scale of all-MiniLM-L6-v2: see scale.py for other embedders. The order of the two texts does
    not change the score, nor whether there are objections. Never raises. About 0.15 ms for two questions of ten words.
    """
    similarity = min(1.0, max(-1.0, similarity)) if similarity == similarity else -1.0
    if plain(asked) == plain(stored):
        return Verdict(1.0, ())
    one, other = read(asked), read(stored)
    difference = Difference(one, other)
    total = INTERCEPT
    for value, coefficient in zip(features(difference, similarity), COEFFICIENTS, strict=True):
        total += value * coefficient
    score = 1 / (1 + exp(-max(-50.0, min(50.0, total))))
    return Verdict(score, tuple(difference.objections()))


def threshold(max_error_rate: float) -> float:
    """The lowest score that may be served if at most this share (0 to 1) of near matches served may be wrong.

    Read off the calibration table, straight lines between its rows; never below its last row, nor above its first.
    """
    rates = [rate for rate, _ in CALIBRATION]
    place = bisect_left(rates, max_error_rate)
    if place == 0:
        return CALIBRATION[0][1]
    if place == len(rates):
        return CALIBRATION[-1][1]
    (low, high_score), (high, low_score) = CALIBRATION[place - 1 : place + 1]
    return high_score + (low_score - high_score) * (max_error_rate - low) / (high - low)


def is_time_bound(text: str) -> bool:
    """Whether the answer to a question ages by itself: it asks for today, the latest, the weather, a price of shares."""
    words = read(text).words
    if not TIME_BOUND.isdisjoint(words):
        return True
    return any(
        words[start : start + length] in TIME_BOUND_PHRASES for length in (2, 3, 4) for start in range(len(words))
    )


class Difference:
    """What sets two readings apart."""

    def __init__(self, one: Reading, other: Reading) -> None:
        self.one, self.other = one, other
        left, right = set(one.content), set(other.content)
        self.shared = left & right
        self.only_one = left - right
        self.only_other = right - left
        self.heavy_one = self.only_one - one.fillers
        self.heavy_other = self.only_other - other.fillers

    def objections(self) -> list[str]:
        """Whatever speaks against one answer for both."""
        one, other = self.one, self.other
        if not (one.is_english and other.is_english):
            return [] if one.plain == other.plain else ["wording differs, and it is not English"]
        found = []
        if not _same_numbers(one.numbers, other.numbers):
            left, right = sorted(set(one.numbers)), sorted(set(other.numbers))
            found.append("numbers in another order" if left == right else _differ("numbers", left, right))
        if one.units != other.units:
            found.append(_differ("units", sorted(one.units - other.units), sorted(other.units - one.units)))
        if one.literals != other.literals:
            found.append(
                _differ("literals", sorted(one.literals - other.literals), sorted(other.literals - one.literals))
            )
        if one.quotes and other.quotes and one.quotes != other.quotes:
            found.append(_differ("quotes", sorted(one.quotes - other.quotes), sorted(other.quotes - one.quotes)))
        found += self._names()
        if one.negations % 2 != other.negations % 2:
            found.append("negation differs")
        found += self._opposites()
        found += self._words()
        if are_apart(one.kind, other.kind):
            found.append(f"kind of question differs: {one.kind} / {other.kind}")
        found += self._grammar()
        if self._is_reversed():
            found.append("reversed direction")
        return found

    def _names(self) -> list[str]:
        left = self.one.names - set(self.other.content)
        right = self.other.names - set(self.one.content)
        dates = MONTHS_AND_DAYS.intersection(self.one.words) ^ MONTHS_AND_DAYS.intersection(self.other.words)
        if dates:
            return [_differ("dates", sorted(dates & set(self.one.words)), sorted(dates & set(self.other.words)))]
        if not (left or right):
            return []
        return [_differ("names", self._show(left), self._show(right))]

    def _opposites(self) -> list[str]:
        one, other = set(self.one.words), set(self.other.words)
        left, right = one - other, other - one
        for word in sorted(left):
            for opposite in sorted(right & OPPOSED.get(word, frozenset())):
                return [f"opposites: {word} / {opposite}"]
        for base in sorted(self.only_one):
            contrary = opposite_among(base, self.only_other)
            if contrary is not None:
                return [f"opposites: {self.one.shown[base]} / {self.other.shown[contrary]}"]
        return []

    @property
    def is_swap(self) -> bool:
        """Whether one word of weight stands for one other."""
        return len(self.heavy_one) == 1 and len(self.heavy_other) == 1

    @property
    def is_addition(self) -> bool:
        """Whether one of the two only says more."""
        return bool(self.heavy_one) != bool(self.heavy_other)

    def _words(self) -> list[str]:
        """A word swapped in a sentence that is otherwise the same, or that has no more than one other to hold on to."""
        if not self.is_swap:
            return []
        left, right = Counter(self.one.words), Counter(self.other.words)
        is_template = max((left - right).total(), (right - left).total()) <= _SWAP_WORDS
        if not is_template and len(self.shared - self.one.fillers) > 1:
            return []
        return [_differ("words", self._show(self.heavy_one), self._show(self.heavy_other))]

    def _grammar(self) -> list[str]:
        left, right = set(self.one.body), set(self.other.body)
        past_left, past_right = bool(left & _PAST), bool(right & _PAST)
        found = []
        if past_left != past_right and bool(left & _PRESENT) == past_right and bool(right & _PRESENT) == past_left:
            found.append("time differs")
        if self._is_other_person():
            found.append("person differs")
        return found

    def _is_other_person(self) -> bool:
        """Whether "my" stands for "your", or "I call you" for "you call me". "How do I" and "how do you" are one."""
        orders = [
            [person for word in reading.body if (person := _PERSONS.get(word))] for reading in (self.one, self.other)
        ]
        left, right = ({*order} for order in orders)
        if len(left) == len(right) == 2:
            return orders[0][0] != orders[1][0]
        for reading, other in ((self.one, self.other), (self.other, self.one)):
            mine, yours = set(reading.words), set(other.words)
            if mine & _MY and not yours & _MY and yours & _YOUR and not mine & _YOUR:
                return "i" not in mine or "you" not in yours
        return False

    def _is_reversed(self) -> bool:
        """Whether two things have changed places: from A to B, from B to A."""
        left = [(word, place) for place, word in enumerate(self.one.content) if word in self.shared]
        right = [(word, place) for place, word in enumerate(self.other.content) if word in self.shared]
        order, reverse = [word for word, _ in left], [word for word, _ in right]
        if order == reverse or len(order) != len(reverse) or len(set(order)) != len(order):
            return False
        apart = [place for place in range(len(order)) if order[place] != reverse[place]]
        if len(apart) != 2 or order[apart[0]] != reverse[apart[1]]:
            return False
        start, end = apart
        between_left = self._between(self.one, left[start][1], left[end][1])
        between_right = self._between(self.other, right[start][1], right[end][1])
        if end - start > 1:
            return ("by" in between_left) == ("by" in between_right) and not (
                {"and", "or"} & between_left & between_right and end - start == 1
            )
        return bool(between_left & _DIRECTED) and bool(between_right & _DIRECTED)

    @staticmethod
    def _between(reading: Reading, start: int, end: int) -> set[str]:
        return {word for step in reading.steps[start + 1 : end + 1] for word in step}

    def _show(self, words: set[str] | frozenset[str]) -> list[str]:
        shown = self.one.shown | self.other.shown
        return sorted(shown.get(word, word) for word in words)


_SWAP_WORDS = 2  # the word itself, and the preposition or article that goes with it

_PAST = frozenset(("was", "were", "did", "had"))
_PRESENT = frozenset(("is", "are", "am", "do", "does", "will"))
_MY = frozenset(("my", "mine"))
_YOUR = frozenset(("your", "yours"))
_PERSONS = {
    **dict.fromkeys(("i", "me", "my", "mine", "myself"), "first"),
    **dict.fromkeys(("you", "your", "yours"), "second"),
}
_DIRECTED = words_of(
    "to from into onto than before after over in on by for against of with through via until toward towards is are "
    "does do did was were"
)


def _same_numbers(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the numbers are the same, in the same order. "One" is a number or a pronoun: it may be missing."""
    if one == other:
        return True
    as_figures = [[("1" if number == "one" else number) for number in numbers] for numbers in (one, other)]
    if as_figures[0] == as_figures[1]:
        return True
    left, right = ([number for number in numbers if number != "one"] for numbers in (one, other))
    return left == right


def _differ(what: str, left: list[str], right: list[str]) -> str:
    """An objection in words, bounded in length."""
    shown = [" ".join(side)[:60] or "none" for side in (left, right)]
    return f"{what} differ: {shown[0]} / {shown[1]}"


SIMILARITIES = 4
"""So many of the features, the first, are of the similarity."""


def features(difference: Difference, similarity: float) -> tuple[float, ...]:
    """The evidence the score weighs; scripts/guard/train.py learns a coefficient for each. The order of the two is nothing.

    Shared function words and shared letters speak against: what looks alike because the same words stand in it is less
    alike in what it says than other words for the same would be.
    """
    one, other = difference.one, difference.other
    one_words, other_words = Counter(one.words), Counter(other.words)
    common = (one_words & other_words).total()
    every = (one_words | other_words).total()
    one_letters, other_letters = _trigrams(one.plain), _trigrams(other.plain)
    shorter, longer = sorted((len(one.words), len(other.words)))
    positive = max(0.0, similarity)
    return (
        positive,
        positive**2,
        positive**4,
        positive**8,
        common / every if every else 1.0,
        len(one_letters & other_letters) / max(1, len(one_letters | other_letters)),
        log1p(max(len(difference.heavy_one), len(difference.heavy_other))),
        log1p(len(difference.shared)),
        float(difference.is_swap),
        float(difference.is_addition),
        float(one.kind == other.kind),
        float(are_apart(one.kind, other.kind)),
        log1p(shorter),
        log1p(longer) - log1p(shorter),
    )


def _trigrams(pieces: tuple[str, ...]) -> set[str]:
    text = f" {' '.join(pieces)} "
    return {text[start : start + 3] for start in range(len(text) - 2)}
