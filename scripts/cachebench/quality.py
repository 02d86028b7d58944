"""How well the guard tells near matches that deserve one answer from those that do not, against plain cosine.

    python -m scripts.cachebench.quality [--pairs FILE] [--sample N] [--vectors FILE.npz] [--intents]

`--pairs` is JSON lines (.jsonl or .jsonl.gz) with `a`, `b`, `label` (1: one answer does for both); without it, the
project's own adversarial set. `--sample` takes as many pairs, half of each label, by a fixed seed. `--vectors` remembers
the vectors between runs. `--intents` asks questions of Banking77 and CLINC150 of a cache that holds others of them: a hit on
another intent is wrong, and a question out of every scope must miss.

Printed, for plain cosine and for the guard: the share of right pairs served at the loosest setting that keeps a precision,
and the share of wrong pairs served there; then both at settings a user has.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from proxy.policy.guard import judge, threshold
from scripts.guard.pairs import Asked, intents
from scripts.guard.vectors import Vectors, embed_all

_OWN = Path(__file__).parents[2] / "tests" / "data" / "adversarial.jsonl"
_PRECISIONS = (0.80, 0.85, 0.90, 0.95)
_SEED = 11

Floats = npt.NDArray[np.float64]


class Labelled(NamedTuple):
    """Two questions, and whether one answer will do for both."""

    a: str
    b: str
    label: int


class Row(NamedTuple):
    """One setting of one method: shares (0 to 1) of the right and of the wrong pairs that it serves."""

    method: str
    setting: str
    right: float
    wrong: float

    def __str__(self) -> str:
        return f"{self.method:14} {self.setting:26} right served {self.right:6.1%}   wrong served {self.wrong:6.2%}"


def measure(pairs: Sequence[Labelled], embed: Callable[[Iterable[str]], Vectors]) -> list[Row]:
    """The table for these pairs: both labels must occur."""
    vectors = embed(text for pair in pairs for text in (pair.a, pair.b))
    cosines = np.array([float(vectors[pair.a] @ vectors[pair.b]) for pair in pairs])
    verdicts = [judge(pair.a, pair.b, cosine) for pair, cosine in zip(pairs, cosines, strict=True)]
    scores = np.array([-1.0 if verdict.objections else verdict.score for verdict in verdicts])
    is_right = np.array([pair.label == 1 for pair in pairs])
    table = []
    for method, values in (("cosine", cosines), ("guard", scores)):
        for precision in _PRECISIONS:
            bound = _bound(values, is_right, precision)
            table.append(_row(method, f"precision {precision:.2f} (at {bound:.4f})", values >= bound, is_right))
    table += [_row("cosine", f"at {bound:.2f}", cosines >= bound, is_right) for bound in (0.8, 0.85, 0.9, 0.95)]
    for rate in (0.01, 0.02, 0.05, 0.1, 0.2):
        table.append(_row("guard", f"max_error_rate {rate}", scores >= threshold(rate), is_right))
    return table


def _bound(values: Floats, is_right: npt.NDArray[np.bool_], precision: float) -> float:
    """The lowest value at which this share of what is served is right; more than any if there is none."""
    order = np.argsort(-values, kind="stable")
    kept = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    # Equal values are served together, and what has an objection never is.
    ends = np.append(np.diff(values[order]) != 0, True) & (values[order] >= 0)
    places = np.flatnonzero((kept >= precision) & ends)
    return float(values[order[places[-1]]]) if len(places) else 2.0


def _row(method: str, setting: str, served: npt.NDArray[np.bool_], is_right: npt.NDArray[np.bool_]) -> Row:
    return Row(method, setting, float(served[is_right].mean()), float(served[~is_right].mean()))


def measure_intents(embed: Callable[[Iterable[str]], Vectors]) -> list[str]:
    """Lines of a report: the training questions are cached, the test questions asked, each by its nearest neighbour."""
    everything = intents()
    vectors = embed(one.text for one in everything)
    lines = []
    for source in ("banking", "clinc"):
        cached = [one for one in everything if one.source == source and one.part == "train" and one.intent != "oos"]
        asked = [one for one in everything if one.source == source and one.part == "test"]
        matrix = np.stack([vectors[one.text] for one in cached])
        cosines = np.stack([vectors[one.text] for one in asked]) @ matrix.T
        nearest = [cached[place] for place in cosines.argmax(axis=1)]
        best = cosines.max(axis=1).tolist()
        for name, is_served in (
            ("cosine at 0.80", lambda one, other, cosine: cosine >= 0.8),
            ("cosine at 0.90", lambda one, other, cosine: cosine >= 0.9),
            ("guard at 0.02", lambda one, other, cosine: _serves(one, other, cosine, 0.02)),
            ("guard at 0.05", lambda one, other, cosine: _serves(one, other, cosine, 0.05)),
        ):
            hits = [(a, b) for a, b, cosine in zip(asked, nearest, best, strict=True) if is_served(a, b, cosine)]
            inside = [pair for pair in hits if pair[0].intent != "oos"]
            others = sum(a.intent != b.intent for a, b in inside)
            total = sum(one.intent != "oos" for one in asked)
            line = f"{source:8} {name:15} hits {len(inside) / total:6.1%}   of them on another intent {others:4} of {len(inside)}"
            if total < len(asked):
                line += f"   out of scope and served {len(hits) - len(inside):3} of {len(asked) - total}"
            lines.append(line)
    return lines


def _serves(one: Asked, other: Asked, cosine: float, rate: float) -> bool:
    verdict = judge(one.text, other.text, cosine)
    return not verdict.objections and verdict.score >= threshold(rate)


def read_pairs(path: Path, sample: int | None) -> list[Labelled]:
    """The pairs of a file, or a balanced sample of them."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    pairs = [Labelled(row["a"], row["b"], int(row["label"])) for row in rows]
    if sample is None:
        return pairs
    chance = random.Random(_SEED)
    return [
        pair for label in (1, 0) for pair in chance.sample([pair for pair in pairs if pair.label == label], sample // 2)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The guard against plain cosine.")
    parser.add_argument("--pairs", type=Path, default=_OWN, help="JSON lines with a, b, label")
    parser.add_argument("--sample", type=int, help="so many pairs, half of each label")
    parser.add_argument("--vectors", type=Path, help="an .npz file that remembers the vectors")
    parser.add_argument("--intents", action="store_true", help="also Banking77 and CLINC150 as caches")
    options = parser.parse_args()

    def embed(texts: Iterable[str]) -> Vectors:
        return embed_all(texts, options.vectors)

    print(*measure(read_pairs(options.pairs, options.sample), embed), sep="\n")
    if options.intents:
        print(*measure_intents(embed), sep="\n")


if __name__ == "__main__":
    main()
