"""Banking77 and CLINC150 as caches: their training questions are cached in one partition, their test questions asked.

A hit on another intent is wrong; a hit on the same intent is counted as right, though two questions of one intent need not
deserve one answer. A question out of every scope (CLINC150) must miss.

Without files of their own the questions are those in scripts/guard/data, which holds both sets and their licences. Files
are read as their makers publish them: Banking77's train.csv and test.csv (https://github.com/PolyAI-LDN/task-specific-datasets),
CLINC150's data_full.json (https://github.com/clinc/oos-eval).
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from proxy.semcache.embedder import Vector
from scripts.cachebench.cached import KnownVectors, opened
from scripts.cachebench.pairs import nearest_of
from scripts.cachebench.tables import Row, percent, table
from scripts.guard.pairs import Asked
from scripts.guard.pairs import intents as shipped

OUT_OF_SCOPE = "oos"
_COSINES = (0.80, 0.90, 0.95)


def questions(banking: Path | None, clinc: Path | None) -> list[Asked]:
    """All questions of both sets, from their makers' files where those are given."""
    found = [one for one in shipped() if not (banking if one.source == "banking" else clinc)]
    if banking is not None:
        for part in ("train", "test"):
            (path,) = banking.glob(f"*{part}.csv")
            with path.open(encoding="utf-8", newline="") as file:
                found += [Asked("banking", part, row["category"], row["text"]) for row in csv.DictReader(file)]
    if clinc is not None:
        text = gzip.decompress(clinc.read_bytes()) if clinc.suffix == ".gz" else clinc.read_bytes()
        for name, rows in json.loads(text).items():
            part = name.removeprefix("oos_")
            found += [Asked("clinc", part, intent, text) for text, intent in rows]
    return found


def sample(
    everything: Sequence[Asked], source: str, cached: int, asked: int, seed: int
) -> tuple[list[Asked], list[Asked]]:
    """So many questions of one set to be cached, and so many to be asked, with half as many out of scope; 0 for all."""
    chance = random.Random(seed)

    def some(part: str, most: int, *, is_in_scope: bool) -> list[Asked]:
        of = [
            one
            for one in everything
            if one.source == source and one.part == part and (one.intent != OUT_OF_SCOPE) == is_in_scope
        ]
        return chance.sample(of, most) if 0 < most < len(of) else of

    inside = some("train", cached, is_in_scope=True)
    return inside, some("test", asked, is_in_scope=True) + some("test", (asked + 1) // 2, is_in_scope=False)


async def measure(
    source: str, cached: Sequence[Asked], asked: Sequence[Asked], vectors: Mapping[str, Vector], folder: Path
) -> str:
    """The table of one set."""
    intents = {one.text: one.intent for one in cached}
    async with opened(folder / f"{source}.db", KnownVectors(vectors)) as cache:
        for text in intents:
            await cache.keep("all", text)
        await cache.filled()
        served = {one.text: (await cache.ask("all", one.text)).given for one in asked}
    nearest = nearest_of([one.text for one in asked], list(intents), vectors)
    methods: dict[str, dict[str, str | None]] = {}
    for bound in _COSINES:
        methods[f"cosine at {bound:.2f}"] = {
            text: found if cosine >= bound else None for text, (found, cosine) in nearest.items()
        }
    methods["the proxy at its default"] = served
    inside = [one for one in asked if one.intent != OUT_OF_SCOPE]
    outside = [one for one in asked if one.intent == OUT_OF_SCOPE]
    rows: list[Row] = [("", "hits", "of them on another intent", "wrong share of hits", "out of scope and served")]
    for name, found in methods.items():
        hits = [(one, other) for one in inside if (other := found[one.text]) is not None]
        others = sum(intents[other] != one.intent for one, other in hits)
        beyond = sum(found[one.text] is not None for one in outside)
        cells = (percent(len(hits) / len(inside)), str(others), percent(others / len(hits) if hits else 0.0, 2))
        rows.append((name, *cells, f"{beyond} of {len(outside)}" if outside else "-"))
    return table(f"{source}: {len(intents)} questions cached, {len(inside)} asked", rows)
