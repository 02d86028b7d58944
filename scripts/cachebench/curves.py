"""What a cache would serve as it is set looser and looser: the share of right answers against that of wrong ones.

Nothing here does input or output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Judged(NamedTuple):
    """What one method would serve for one question: its score, and whether the answer would be right.

    A score below 0 is never served, at any setting.
    """

    score: float
    is_right: bool


class Point(NamedTuple):
    """All that is served from a score on. `served`: the share of the answers to be had that are given; `wrong`: wrong
    answers, as a share of what could be answered wrongly; `precision`: right ones, as a share of all that are given."""

    score: float
    right_count: int
    wrong_count: int
    served: float
    wrong: float

    @property
    def precision(self) -> float:
        given = self.right_count + self.wrong_count
        return self.right_count / given if given else 1.0


class Curve:
    """The points of one method, from the strictest setting to the loosest.

    `to_be_had` is how many questions have a right answer in the cache, `to_go_wrong` how many could get a wrong one.
    """

    def __init__(self, judged: Iterable[Judged], to_be_had: int, to_go_wrong: int) -> None:
        self._to_be_had = to_be_had
        self._to_go_wrong = to_go_wrong
        self.points: list[Point] = [self._point(2.0, 0, 0)]
        right = wrong = 0
        for score, is_right in sorted(judged, reverse=True):
            if score < 0:
                break
            right += is_right
            wrong += not is_right
            # Equal scores are served together.
            if score == self.points[-1].score:
                self.points.pop()
            self.points.append(self._point(score, right, wrong))

    def at(self, score: float) -> Point:
        """What is served from this score on."""
        return [point for point in self.points if point.score >= score or point.score == 2.0][-1]

    def at_precision(self, least: float) -> Point:
        """The most that is served at this precision or a better one."""
        return self._most([point for point in self.points if point.precision >= least])

    def at_wrong(self, most: float) -> Point:
        """The most that is served while the share of wrong ones is at most this."""
        return self._most([point for point in self.points if point.wrong <= most])

    def _point(self, score: float, right: int, wrong: int) -> Point:
        return Point(score, right, wrong, _share(right, self._to_be_had), _share(wrong, self._to_go_wrong))

    @staticmethod
    def _most(points: Sequence[Point]) -> Point:
        return max(points, key=lambda point: (point.right_count, -point.wrong_count))


def ratio(ours: float, other: float) -> str:
    """How many times the one is the other."""
    return f"{ours / other:.2f}" if other else "-"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0 to 1) of the others lies; of none, 0."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _share(count: int, of: int) -> float:
    return count / of if of else 0.0
