"""The proxy's cache beside GPTCache (https://github.com/zilliztech/GPTCache): the same pairs, the same vectors.

Every `a` is stored, every `b` asked, and counted as `pairs` does it "as a cache": right is the `a` of a pair labelled 1, or
the same text; a wrong answer is any other; missed are questions that had a right answer in the cache and got none. Both at
their defaults. GPTCache's are SearchDistanceEvaluation, which takes 4 less the squared distance of the vectors, and
similarity_threshold 0.8 of that 4; with vectors of length 1 it serves whatever has a
cosine of 0.6 or more. It is allowed to hold all that is stored, not 1,000 as by default.

The time is that of a lookup without embedding: `get` there, `AnswerCache.find` here, each with its database and index.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from proxy.semcache.embedder import Vector
from scripts.cachebench.cached import KnownVectors, opened
from scripts.cachebench.curves import percentile
from scripts.cachebench.quality import Labelled
from scripts.cachebench.tables import Row, percent, table

_SIDE = Path(__file__).with_name("gptcache_side.py")
_TIMEOUT_S = 120


def compare(pairs: Sequence[Labelled], vectors: Mapping[str, Vector], folder: Path, python: str | None) -> str:
    """The table; a line that says why there is none, where `python` has no GPTCache."""
    if python is None:
        return "\nbeside GPTCache: skipped (name a python that has it: --gptcache PYTHON)"
    stored = list(dict.fromkeys(pair.a for pair in pairs))
    asked = list(dict.fromkeys(pair.b for pair in pairs))
    right: defaultdict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        if pair.label:
            right[pair.b].add(pair.a)
    for same in set(stored) & set(asked):
        right[same].add(same)
    began = time.perf_counter()
    theirs = _theirs(stored, asked, vectors, folder, python)
    if isinstance(theirs, str):
        return f"\nbeside GPTCache: skipped, {python} does not run it: {theirs}"
    rows: list[Row] = [("", "right", "wrong", "missed", "precision", "lookup p50 ms", "p99 ms", "storing one ms")]
    for name, (answers, times_s, stored_s) in {
        "GPTCache at its defaults": theirs,
        "the proxy at its defaults": asyncio.run(_ours(stored, asked, vectors, folder)),
    }.items():
        hits = sum(found in right[text] for text, found in zip(asked, answers, strict=True) if found is not None)
        wrong = sum(found not in right[text] for text, found in zip(asked, answers, strict=True) if found is not None)
        missed = sum(found is None and bool(right[text]) for text, found in zip(asked, answers, strict=True))
        shown = [percentile(times_s, share) * 1000 for share in (0.5, 0.99)]
        precision = percent(hits / (hits + wrong)) if hits + wrong else "-"
        counts = (str(hits), str(wrong), str(missed), precision)
        rows.append((name, *counts, *(f"{one:.2f}" for one in shown), f"{stored_s * 1000 / len(stored):.2f}"))
    title = f"beside GPTCache: {len(stored)} stored, {len(asked)} asked, {time.perf_counter() - began:.0f} s"
    return table(title, rows)


_Result = tuple[list[str | None], list[float], float]


def _theirs(
    stored: Sequence[str], asked: Sequence[str], vectors: Mapping[str, Vector], folder: Path, python: str
) -> _Result | str:
    texts = list(dict.fromkeys([*stored, *asked]))
    rows = {text: row for row, text in enumerate(texts)}
    given = folder / "given.npz"
    np.savez(
        given,
        vectors=np.stack([vectors[text] for text in texts]),
        stored=np.array([rows[text] for text in stored]),
        asked=np.array([rows[text] for text in asked]),
    )
    try:
        # In its own directory, where GPTCache may leave what it likes.
        done = subprocess.run(
            [python, str(_SIDE), str(given), str(folder)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it failed"])[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    answers = [None if row is None else texts[row] for row in found["answers"]]
    return answers, found["times_s"], found["stored_s"]


async def _ours(stored: Sequence[str], asked: Sequence[str], vectors: Mapping[str, Vector], folder: Path) -> _Result:
    async with opened(folder / "ours.db", KnownVectors(vectors)) as cached:
        began = time.perf_counter()
        for text in stored:
            await cached.keep("all", text)
        await cached.filled()
        stored_s = time.perf_counter() - began
        answers, times_s = [], []
        for text in asked:
            began = time.perf_counter()
            answers.append(await cached.serve("all", text))
            times_s.append(time.perf_counter() - began)
    return answers, times_s, stored_s
