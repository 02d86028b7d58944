"""What a cached entry has shown of itself: how near a question must come to be served its answer.

The guard's threshold is one for all entries. Some deserve another: a question with many near neighbours that want
other answers errs above it, a plain one is right well below it. So each entry keeps what its verified near hits showed, where
somebody asked the upstream all the same and compared, and its own threshold follows. The idea, a boundary learned for each
cached prompt under a bound on the error, is vCache's (https://arxiv.org/abs/2502.03771); the rule here is ours:

- it starts at the guard's threshold;
- a wrong answer raises it above the score that failed, and it stays above;
- as many wrong answers as `_CLOSES_AFTER`, unless right ones outnumber them well, close the entry for near matches;
- right answers without any wrong one lower it, slowly, towards the lowest score seen right, and never by more than `_SLACK`
  of the way from the threshold to zero. Below what has been seen right nothing is served that was not before.

Pure: `Trust` is four numbers, to be kept in a row beside the entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from proxy.policy.lexicon import words_of
from proxy.policy.reading import Reading, plain, read

CLOSED = 2.0
"""A threshold that no score reaches."""

_MARGIN = 0.25  # of the way from the score that failed to 1
_CLOSES_AFTER = 3
_RIGHTS_FOR_A_WRONG = 20  # about what an error rate of 0.05 for one entry allows
_RELAXES_AFTER = 5
_SLACK = 0.1

_SAME_SIMILARITY = 0.8
_SURE_SIMILARITY = 0.9
_SHORT_WORDS = 6


@dataclass(frozen=True, slots=True)
class Trust:
    """What verified near hits of one entry showed. Scores are the guard's, 0 to 1."""

    rights: int = 0
    wrongs: int = 0
    lowest_right: float = 1.0
    """The lowest score at which its answer was right; 1 where none was seen."""
    highest_wrong: float = 0.0
    """The highest score at which its answer was wrong; 0 where none was seen."""

    def seen(self, score: float, was_right: bool) -> Trust:
        """What is known after one more verified near hit."""
        if was_right:
            return replace(self, rights=self.rights + 1, lowest_right=min(self.lowest_right, score))
        return replace(self, wrongs=self.wrongs + 1, highest_wrong=max(self.highest_wrong, score))

    def threshold(self, base: float) -> float:
        """The lowest score that may be served this entry's answer; `CLOSED` (no score reaches it) for none.

        `base` is the guard's threshold, 0 to 1. One more right answer never raises what comes out, one more wrong one never
        lowers it.
        """
        if self.wrongs >= _CLOSES_AFTER and self.rights < self.wrongs * _RIGHTS_FOR_A_WRONG:
            return CLOSED
        if self.wrongs:
            raised = self.highest_wrong + (1 - self.highest_wrong) * _MARGIN
            return max(base, raised) if raised > self.highest_wrong else CLOSED
        if self.rights < _RELAXES_AFTER:
            return base
        # The share of the slack that is given rises with what was seen: 5 of 10, 20 of 25, 95 of 100.
        given = self.rights / (self.rights + _RELAXES_AFTER)
        return min(base, max(self.lowest_right, base * (1 - _SLACK * given)))


def lowest_threshold(base: float) -> float:
    """Below this no entry's threshold ever is."""
    return base * (1 - _SLACK)


def same_answer(one: str, other: str, similarity: float) -> bool:
    """Whether two answers to the same question, or to near ones, say the same.

    `similarity` is the cosine of the answers' vectors on MiniLM's scale. Numbers and literals (code, addresses, paths)
    must be the same ones, however often; neither may say yes where the other says no. Short answers (up to six words) must
    not differ in names, nor in words at all unless their vectors all but agree. Long ones are worded anew each time,
    so there names count only where neither answer has the other's.
    """
    if plain(one) == plain(other):
        return True
    if not similarity >= _SAME_SIMILARITY:
        return False
    left, right = read(one), read(other)
    if _figures(left) != _figures(right) or left.literals != right.literals:
        return False
    if _stance(left) != _stance(right):
        return False
    if not (left.is_english and right.is_english):
        return similarity >= _SURE_SIMILARITY
    names_left, names_right = left.names - set(right.content), right.names - set(left.content)
    if min(len(left.plain), len(right.plain)) <= _SHORT_WORDS:
        is_same = set(left.content) - left.fillers == set(right.content) - right.fillers
        return not names_left and not names_right and (is_same or similarity >= _SURE_SIMILARITY)
    return not (names_left and names_right)


_YES = words_of("yes yeah yep yup sure certainly absolutely definitely correct true right indeed")
_NO = words_of("no nope not never false incorrect wrong unfortunately cannot")
_STANCE_WORDS = 8


def _figures(reading: Reading) -> frozenset[str]:
    return frozenset(number for number in reading.numbers if number != "one")


def _stance(reading: Reading) -> int:
    """1 for an answer that begins with a yes, -1 for one that begins with a no or a negation, 0 for neither."""
    for word in reading.words[:1]:
        if word in _YES:
            return 1
    return -1 if not _NO.isdisjoint(reading.words[:_STANCE_WORDS]) else 0
