"""Labelled pairs, put to the cache in two ways, against plain cosine of the same vectors.

Pair by pair: each pair has a partition of its own, which holds its `a`; its `b` is asked. Served is right where the label is
1, else wrong. To be had are all pairs labelled 1, to go wrong all labelled 0.

As a cache: one partition holds every `a`; every `b` is asked once. Served is right when the entry is an `a` that some pair
of this `b` labels 1, or is the very same text. Anything else counts as wrong, also what nobody has labelled, though some of
it would have been right (`unlabelled` says how many); so it is a strict reading. To be had are the questions `b` for which
there is a right entry; every question can go wrong.

Plain cosine serves the nearest entry. The guard serves what the proxy would: the best of the nearest eight.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxy.policy.guard import threshold
from proxy.semcache.embedder import Vector
from scripts.cachebench.cached import SETTINGS, KnownVectors, Served, opened
from scripts.cachebench.curves import Curve, Judged, Point, ratio
from scripts.cachebench.quality import Labelled
from scripts.cachebench.tables import Row, aim, percent, table

PRECISIONS = (0.80, 0.85, 0.90, 0.95)
_WRONG_SHARES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_COSINES = (0.95, 0.90, 0.85, 0.80)

_MAX_WRONG = 0.02
_MIN_SERVED = 0.4


class Reading(NamedTuple):
    """What came out of one way of putting pairs to the cache."""

    name: str
    cosine: Curve
    guard: Curve
    at_default: Point
    """What `AnswerCache.find` really served."""
    labelled: tuple[Curve, Curve] | None = None
    """Both again, cosine first, where what nobody has labelled is left out."""
    unlabelled: int = 0
    """Of the wrong ones at the default setting: how many nobody has labelled."""


def sample(pairs: Sequence[Labelled], most: int, seed: int) -> list[Labelled]:
    """At most so many of the pairs, half of each label; all where they are no more."""
    if len(pairs) <= most:
        return list(pairs)
    chance = random.Random(seed)
    by_label = [[pair for pair in pairs if pair.label == label] for label in (1, 0)]
    return [pair for of in by_label for pair in chance.sample(of, min(len(of), most // 2))]


async def one_by_one(
    pairs: Sequence[Labelled], vectors: Mapping[str, Vector], folder: Path
) -> tuple[Reading, list[Served]]:
    """The pairs, each judged for itself; and what was served for each."""
    served = []
    async with opened(folder / "pairs.db", KnownVectors(vectors)) as cached:
        for number, pair in enumerate(pairs):
            await cached.keep(f"pair {number}", pair.a)
        await cached.filled()
        for number, pair in enumerate(pairs):
            served.append(await cached.ask(f"pair {number}", pair.b))
    right = sum(pair.label for pair in pairs)
    both = list(zip(pairs, served, strict=True))

    def curve(scores: Sequence[float]) -> Curve:
        judged = [Judged(score, pair.label == 1) for score, pair in zip(scores, pairs, strict=True)]
        return Curve(judged, right, len(pairs) - right)

    given = [Judged(1.0, pair.label == 1) for pair, found in both if found.given is not None]
    cosine = curve([float(vectors[pair.a] @ vectors[pair.b]) for pair in pairs])
    at_default = Curve(given, right, len(pairs) - right).points[-1]
    reading = Reading("pair by pair", cosine, curve([found.score for found in served]), at_default)
    return reading, served


async def as_cache(pairs: Sequence[Labelled], vectors: Mapping[str, Vector], folder: Path) -> Reading:
    """All `a` in one partition, all `b` asked."""
    stored = list(dict.fromkeys(pair.a for pair in pairs))
    asked = list(dict.fromkeys(pair.b for pair in pairs))
    labels: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for pair in pairs:
        labels[pair.b][pair.a] = max(pair.label, labels[pair.b].get(pair.a, 0))
    known = set(stored)

    def is_right(question: str, found: str | None) -> bool:
        return found is not None and (found == question or labels[question].get(found) == 1)

    def is_unlabelled(question: str, found: str | None) -> bool:
        return found is not None and found != question and found not in labels[question]

    async with opened(folder / "cache.db", KnownVectors(vectors)) as cached:
        for question in stored:
            await cached.keep("all", question)
        await cached.filled()
        served = [await cached.ask("all", question) for question in asked]
    to_be_had = sum(question in known or 1 in labels[question].values() for question in asked)
    nearest = nearest_of(asked, stored, vectors)
    both = list(zip(asked, served, strict=True))
    ways: list[list[tuple[str, str | None, float]]] = [
        [(question, found, value) for question, (found, value) in nearest.items()],
        [(question, found.best, found.score) for question, found in both],
    ]
    curves = [
        Curve(
            [Judged(score, is_right(q, found)) for q, found, score in way if is_all or not is_unlabelled(q, found)],
            to_be_had,
            len(asked),
        )
        for is_all in (True, False)
        for way in ways
    ]
    given = [Judged(1.0, is_right(q, found.given)) for q, found in both if found.given is not None]
    at_default = Curve(given, to_be_had, len(asked)).points[-1]
    unlabelled = sum(is_unlabelled(question, found.given) for question, found in both)
    return Reading("as a cache", curves[0], curves[1], at_default, (curves[2], curves[3]), unlabelled)


def nearest_of(
    asked: Sequence[str], stored: Sequence[str], vectors: Mapping[str, Vector]
) -> dict[str, tuple[str, float]]:
    """The stored text nearest to each, and its cosine."""
    matrix = np.stack([vectors[text] for text in stored])
    found = {}
    for start in range(0, len(asked), 1000):
        part = asked[start : start + 1000]
        cosines = np.stack([vectors[text] for text in part]) @ matrix.T
        places = cosines.argmax(axis=1)
        for row, (text, place) in enumerate(zip(part, places, strict=True)):
            found[text] = (stored[place], float(cosines[row, place]))
    return found


def report(reading: Reading) -> str:
    """The tables of one reading."""
    cosine, guard = reading.cosine, reading.guard
    curve: list[Row] = [("wrong share at most", "cosine", "guard", "ratio")]
    for most in _WRONG_SHARES:
        ours, other = guard.at_wrong(most).served, cosine.at_wrong(most).served
        curve.append((percent(most), percent(other), percent(ours), ratio(ours, other)))
    points = [(f"cosine at {bound:.2f}", cosine.at(bound)) for bound in _COSINES]
    points.append(("cosine at the guard's precision", cosine.at_precision(reading.at_default.precision)))
    points.append((f"guard at {threshold(0.01):.3f} (error rate 0.01)", guard.at(threshold(0.01))))
    points.append((f"the proxy at its default ({SETTINGS.max_error_rate})", reading.at_default))
    points += [(f"guard at {threshold(r):.3f} (error rate {r})", guard.at(threshold(r))) for r in (0.05, 0.1, 0.2)]
    name = reading.name
    lines = [
        table(f"{name}: true duplicates served, by the share of wrong ones", curve),
        table(f"{name}: true duplicates served, by precision", _by_precision(cosine, guard)),
    ]
    if reading.labelled is not None:
        title = f"{name}: the same, leaving out answers that nobody has labelled"
        lines.append(table(title, _by_precision(*reading.labelled)))
    lines.append(table(f"{name}: at settings a user has", _settings_rows(points)))
    if reading.labelled is not None:
        lines.append(f"of the wrong ones at the default nobody has labelled {reading.unlabelled}")
    return "\n".join(lines)


def _by_precision(cosine: Curve, guard: Curve) -> list[Row]:
    rows: list[Row] = [("precision at least", "cosine", "its threshold", "guard", "its threshold", "ratio")]
    for least in PRECISIONS:
        ours, other = guard.at_precision(least), cosine.at_precision(least)
        places = (percent(other.served), _threshold(other), percent(ours.served), _threshold(ours))
        rows.append((f"{least:.2f}", *places, ratio(ours.served, other.served)))
    return rows


def _threshold(point: Point) -> str:
    return f"{point.score:.3f}" if point.right_count + point.wrong_count else "none"


def _settings_rows(points: Sequence[tuple[str, Point]]) -> list[Row]:
    rows: list[Row] = [("", "right", "wrong", "duplicates served", "wrong share", "precision")]
    for name, point in points:
        counts = (str(point.right_count), str(point.wrong_count))
        rows.append((name, *counts, percent(point.served), percent(point.wrong, 2), percent(point.precision)))
    return rows


def report_adversarial(
    reading: Reading, pairs: Sequence[Labelled], kinds: Sequence[str], served: Sequence[Served]
) -> str:
    """The adversarial set kind by kind, and whether the aims are met."""
    counts: defaultdict[tuple[int, str], Counter[bool]] = defaultdict(Counter)
    for pair, kind, found in zip(pairs, kinds, served, strict=True):
        counts[pair.label, kind][found.given is not None] += 1
    rows: list[Row] = [("kind", "pairs", "served", "")]
    for (label, kind), of in sorted(counts.items()):
        rows.append((kind, str(of.total()), str(of[True]), "right" if label else "wrong" if of[True] else ""))
    point = reading.at_default
    return "\n".join(
        [
            table("adversarial pairs at the default setting, by kind", rows),
            aim(
                f"at most {percent(_MAX_WRONG)} of the different pairs served: {percent(point.wrong, 2)}",
                is_met=point.wrong <= _MAX_WRONG,
            ),
            aim(
                f"at least {percent(_MIN_SERVED)} of the paraphrases served: {percent(point.served)}",
                is_met=point.served >= _MIN_SERVED,
            ),
        ]
    )
