"""`make bench-cache`: how often the cache answers, how often wrongly, and what it costs.

    python scripts/cachebench/run.py [--pairs FILE] [--gptcache PYTHON] [--only A,B] [--quick]

The tables, each of which can be had alone with `--only`:

    pairs         labelled pairs (`--pairs`; without it the project's adversarial set), for plain cosine and for the proxy's
                  guard: how many true duplicates are served by what share of wrong ones. See pairs.py for what counts.
    adversarial   the project's own pairs of near questions with other answers, kind by kind.
    intents       Banking77 and CLINC150 as caches. See intents.py.
    proxy         the time and CPU of hits and misses through the proxy. See end_to_end.py.
    loop          the time of a lookup in large partitions, and how long the event loop stands still. See in_process.py.
    gptcache      the same pairs put to GPTCache, if `--gptcache` names a Python that has it. See rival.py.

What is wanted stands below a table as an aim; one that is missed is no fault of the run, which ends with status 0. The
questions' vectors are made by the default embedder, some 150 a second, and kept in `--vectors` for the next run. Samples are
drawn by `--seed`. Nothing leaves the machine: every server listens on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# As a program it finds its own folder only.
sys.path[:0] = [path for path in (str(_ROOT), str(_ROOT / "scripts" / "bench")) if path not in sys.path]

from scripts.cachebench import end_to_end, in_process, intents, pairs, rival  # noqa: E402
from scripts.cachebench.cached import MINILM  # noqa: E402
from scripts.cachebench.quality import Labelled, read_pairs  # noqa: E402
from scripts.guard.pairs import Asked  # noqa: E402
from scripts.guard.vectors import Vectors, embed_all  # noqa: E402

ADVERSARIAL = _ROOT / "tests" / "data" / "adversarial.jsonl"
TABLES = ("pairs", "adversarial", "intents", "proxy", "loop", "gptcache")

Embed = Callable[[Iterable[str]], Vectors]


class Sizes:
    """How much of everything is measured."""

    def __init__(self, is_quick: bool) -> None:
        self.pairs = 300 if is_quick else 4000
        self.rival_pairs = 300 if is_quick else 2000
        self.cached = 300 if is_quick else 1500
        self.asked = 150 if is_quick else 600
        self.entries = 1000 if is_quick else 10_000
        self.requests = 30 if is_quick else 200
        self.partitions = (10_000,) if is_quick else (10_000, 100_000)
        self.lookups = 100 if is_quick else 300


def run(args: argparse.Namespace, folder: Path) -> None:
    """Print all tables that are wanted."""
    sizes = Sizes(args.quick)
    args.vectors.mkdir(parents=True, exist_ok=True)
    remembered = args.vectors / f"{MINILM}.npz"

    def embed(texts: Iterable[str]) -> Vectors:
        return embed_all(texts, remembered)

    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, seed {args.seed}"
    )
    everything = read_pairs(args.pairs, None) if args.pairs is not None and args.pairs.exists() else []
    own = read_pairs(ADVERSARIAL, None)
    labelled = pairs.sample(everything, args.sample or sizes.pairs, args.seed)
    if "pairs" in args.only and labelled:
        _pairs(labelled, len(everything), embed, _new(folder, "pairs"))
    if "adversarial" in args.only:
        _adversarial(own, embed, _new(folder, "adversarial"))
    if "intents" in args.only:
        _intents(intents.questions(args.banking, args.clinc), args, sizes, embed, _new(folder, "intents"))
    if "proxy" in args.only:
        vectors = embed(text for pair in own for text in (pair.a, pair.b))
        near = asyncio.run(_near(own, vectors, _new(folder, "near")))
        print(end_to_end.measure(_new(folder, "proxy"), vectors, near, sizes.entries, sizes.requests))
    if "loop" in args.only:
        vectors = embed(text for pair in own for text in (pair.a, pair.b))
        print(in_process.measure(_new(folder, "loop"), vectors, sizes.partitions, sizes.lookups, args.seed))
    if "gptcache" in args.only and labelled:
        compared = pairs.sample(labelled, sizes.rival_pairs, args.seed)
        vectors = embed(text for pair in compared for text in (pair.a, pair.b)) if args.gptcache else {}
        print(rival.compare(compared, vectors, _new(folder, "gptcache"), args.gptcache))


def _pairs(labelled: list[Labelled], total: int, embed: Embed, folder: Path) -> None:
    vectors = embed(text for pair in labelled for text in (pair.a, pair.b))
    right = sum(pair.label for pair in labelled)
    print(f"\n{len(labelled)} pairs of {total}, {right} of them labelled as duplicates")
    reading, _ = asyncio.run(pairs.one_by_one(labelled, vectors, folder))
    print(pairs.report(reading))
    print(pairs.report(asyncio.run(pairs.as_cache(labelled, vectors, folder))))


def _adversarial(own: list[Labelled], embed: Embed, folder: Path) -> None:
    kinds = [json.loads(line)["kind"] for line in ADVERSARIAL.read_text("utf-8").splitlines()]
    vectors = embed(text for pair in own for text in (pair.a, pair.b))
    reading, served = asyncio.run(pairs.one_by_one(own, vectors, folder))
    print(pairs.report_adversarial(reading, own, kinds, served))


def _intents(everything: list[Asked], args: argparse.Namespace, sizes: Sizes, embed: Embed, folder: Path) -> None:
    for source in ("banking", "clinc"):
        cached, asked = intents.sample(
            everything,
            source,
            sizes.cached if args.intents is None else args.intents,
            sizes.asked if args.intents is None else args.intents,
            args.seed,
        )
        vectors = embed(one.text for one in (*cached, *asked))
        print(asyncio.run(intents.measure(source, cached, asked, vectors, folder)))


async def _near(own: list[Labelled], vectors: Vectors, folder: Path) -> list[tuple[str, str]]:
    """Some questions with rewordings that the proxy serves."""
    right = [pair for pair in own if pair.label]
    _, served = await pairs.one_by_one(right, vectors, folder)
    return [(pair.a, pair.b) for pair, found in zip(right, served, strict=True) if found.given is not None][:20]


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description="How often the cache answers, how often wrongly, and what it costs.")
    parser.add_argument("--pairs", type=Path, default=ADVERSARIAL, help="JSON lines (.gz too) with a, b, label")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of the pairs (4000; quick: 300)")
    parser.add_argument("--banking", type=Path, metavar="DIR", help="Banking77 with train.csv and test.csv")
    parser.add_argument("--clinc", type=Path, metavar="FILE", help="CLINC150's data_full.json (.gz too)")
    parser.add_argument("--intents", type=int, metavar="N", help="so many questions cached and asked of each; 0: all")
    parser.add_argument("--gptcache", metavar="PYTHON", help="a Python that has GPTCache")
    parser.add_argument("--vectors", type=Path, default=Path("var/bench-vectors"), help="where vectors are kept")
    parser.add_argument("--seed", type=int, default=1, help="what samples are drawn by")
    parser.add_argument("--only", type=_tables, default=TABLES, metavar="A,B", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="smaller samples, under 40 s")
    args = parser.parse_args()
    logging.getLogger("proxy").setLevel(logging.ERROR)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        run(args, Path(folder))
    print(f"\n{time.monotonic() - began:.0f} s")
    return 0


def _tables(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(TABLES):
        raise argparse.ArgumentTypeError(f"knows {', '.join(TABLES)}; not {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
