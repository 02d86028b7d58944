"""Learn the guard's numbers and write proxy/policy/guardweights.py.

    python -m scripts.guard.train [--vectors FILE.npz]

From the repository's root, with the project installed; nothing else is needed. Everything it learns from is in
scripts/guard/data. The first run embeds some 40,000 texts (some five minutes on one core); with `--vectors` they are remembered
for the next. The same inputs give the same numbers.

Two steps:

1. The coefficients: the sum of two logistic regressions over the `features` of all pairs (see pairs.py), each source with its
   own weight: one over all features, and one over the similarity alone. Same intent is weak evidence, so those pairs weigh
   little. What the first learned of words is that of these sources; questions from elsewhere are near to each other in other
   ways, and there the similarity is the better judge of which near match is the nearest.
2. The calibration: each pair is scored by a regression that has not seen its group (five parts). Of those without
   objection, the share of wrong ones at or above a score is the error rate there. The pairs are weighted as if three of four
   near matches in a cache deserved another answer, and a wrong one is added to each count, so that the end of the table,
   where there is little left to count, is not rosier than it can be known to be.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proxy.policy import guardweights
from proxy.policy.guard import SIMILARITIES, Difference, features
from proxy.policy.reading import read
from scripts.guard.pairs import Pair, intents, neighbours, own_pairs
from scripts.guard.vectors import embed_all

_SEED = 1
_PARTS = 5
_RIDGE = 1e-3
_RATES = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
_SHARE_WRONG = 0.75

_LEARNING = {("intents", 1): 0.03, ("intents", 0): 0.3, ("blocks", 1): 2.0, ("blocks", 0): 2.0, ("scope", 0): 0.5}
"""How much a pair counts for the coefficients, by source and label; else 1."""

_CALIBRATING = {
    1: {"blocks": 0.5, "opening": 0.2, "polite": 0.05, "trifle": 0.05, "intents": 0.2},
    0: {"blocks": 0.3, "opening": 0.1, "scope": 0.3, "intents": 0.3},
}
"""The share of each source among right and wrong near matches, for the calibration."""

Floats = npt.NDArray[np.float64]


def regression(evidence: Floats, labels: Floats, weights: Floats) -> tuple[Floats, float]:
    """The coefficients and the intercept of a logistic regression (Newton's method, a small ridge)."""
    mean, spread = evidence.mean(axis=0), evidence.std(axis=0) + 1e-9
    design = np.column_stack([np.ones(len(evidence)), (evidence - mean) / spread])
    ridge = np.full(design.shape[1], _RIDGE)
    ridge[0] = 0
    found = np.zeros(design.shape[1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ found, -50, 50)))
        slope = design.T @ (weights * (chance - labels)) / weights.sum() + ridge * found
        curvature = (design * (weights * chance * (1 - chance))[:, None]).T @ design / weights.sum()
        step = np.linalg.solve(curvature + np.diag(ridge + 1e-9), slope)
        found -= step
        if np.abs(step).max() < 1e-9:
            break
    coefficients = found[1:] / spread
    return coefficients, float(found[0] - (coefficients * mean).sum())


def opinions(evidence: Floats, labels: Floats, weights: Floats) -> tuple[Floats, float]:
    """The sum of what all features say and what the similarity alone says: coefficients and intercept."""
    coefficients, intercept = regression(evidence, labels, weights)
    by_similarity, alone = regression(evidence[:, :SIMILARITIES], labels, weights)
    coefficients[:SIMILARITIES] += by_similarity
    return coefficients, intercept + alone


def calibration(scores: Floats, labels: Floats, weights: Floats) -> list[tuple[float, float]]:
    """The lowest score that keeps each error rate, rates rising and so scores falling."""
    order = np.argsort(-scores, kind="stable")
    # One more wrong pair than was seen, of the weight that a wrong pair has.
    wrong = np.cumsum(weights[order] * (1 - labels[order])) + np.median(weights[labels == 0])
    rate = wrong / np.cumsum(weights[order])
    # The rate at a score is never less than at any higher: what is looser errs no less.
    table = []
    last = 1.0
    for bound in _RATES:
        places = np.flatnonzero(rate <= bound)
        last = min(last, float(scores[order[places[-1]]])) if len(places) else last
        table.append((bound, round(last, 4)))
    return table


def main() -> None:
    """Learn, say what came out, and write the module."""
    parser = argparse.ArgumentParser(description="Learn the guard's numbers.")
    parser.add_argument("--vectors", type=Path, help="an .npz file that remembers the vectors")
    options = parser.parse_args()

    pairs = own_pairs(_SEED)
    texts = [text for pair in pairs for text in (pair.a, pair.b)] + [asked.text for asked in intents()]
    vectors = embed_all(texts, options.vectors)
    pairs += neighbours(vectors, _SEED)
    differences = [Difference(read(pair.a), read(pair.b)) for pair in pairs]
    evidence = np.array(
        [
            features(difference, float(vectors[pair.a] @ vectors[pair.b]))
            for difference, pair in zip(differences, pairs, strict=True)
        ]
    )
    labels = np.array([float(pair.label) for pair in pairs])
    counts = np.array([_LEARNING.get((pair.source, pair.label), 1.0) for pair in pairs])
    coefficients, intercept = opinions(evidence, labels, counts)

    scores = np.zeros(len(pairs))
    parts = np.array([hashlib.sha256(pair.group.encode()).digest()[0] % _PARTS for pair in pairs])
    for part in range(_PARTS):
        inside = parts == part
        learned, base = opinions(evidence[~inside], labels[~inside], counts[~inside])
        scores[inside] = 1 / (1 + np.exp(-(evidence[inside] @ learned + base)))
    is_free = np.array([not difference.objections() for difference in differences])
    table = calibration(scores[is_free], labels[is_free], _mixed(pairs)[is_free])
    for rate, score in table:
        served = is_free & (scores >= score)
        right, wrong = served[labels == 1].mean(), served[labels == 0].mean()
        print(
            f"error rate {rate:5.3f}: score {score:.4f}, serves {right:.3f} of the right pairs, {wrong:.4f} of the wrong"
        )
    _write(intercept, coefficients, table)


def _mixed(pairs: list[Pair]) -> Floats:
    """What each pair counts for the calibration: see `_CALIBRATING` and `_SHARE_WRONG`."""
    sizes = Counter((pair.source, pair.label) for pair in pairs)
    share = {0: _SHARE_WRONG, 1: 1 - _SHARE_WRONG}
    return np.array(
        [
            share[pair.label] * _CALIBRATING[pair.label].get(pair.source, 0.0) / sizes[pair.source, pair.label]
            for pair in pairs
        ]
    )


def _write(intercept: float, coefficients: Floats, table: list[tuple[float, float]]) -> None:
    rows = "".join(f"    ({rate}, {score}),\n" for rate, score in table)
    numbers = "".join(f"    {coefficient:.4f},\n" for coefficient in coefficients)
    Path(guardweights.__file__).write_text(_MODULE.format(rows=rows, intercept=intercept, numbers=numbers))


_MODULE = '''"""The guard's learned numbers. Made by scripts/guard/train.py: change that, not this.

Learned from Banking77 (CC BY 4.0, PolyAI) and CLINC150 (CC BY 3.0, Larson et al.), and from pairs of the project's own;
see scripts/guard/data/README.md.
"""

from __future__ import annotations

CALIBRATION = (
{rows})
"""Error rate, and the lowest score that keeps it. Rates rise, scores fall."""

INTERCEPT = {intercept:.4f}

COEFFICIENTS = (
{numbers})
"""In the order of `guard.features`."""
'''

if __name__ == "__main__":
    main()
