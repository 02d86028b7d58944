"""The benchmark of the cache: that its arithmetic is right, and that its tables say what was really served."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from proxy.semcache.embedder import Vector
from scripts.cachebench import pairs
from scripts.cachebench.cached import KnownVectors, opened
from scripts.cachebench.client import Client, Timed, get
from scripts.cachebench.curves import Curve, Judged, percentile
from scripts.cachebench.filling import fill
from scripts.cachebench.in_process import Phase, Tick, report
from scripts.cachebench.intents import measure as measure_intents
from scripts.cachebench.intents import questions, sample
from scripts.cachebench.quality import Labelled, read_pairs
from scripts.cachebench.rival import compare
from scripts.guard.pairs import Asked

SIZE = 384


def vector(*parts: float) -> Vector:
    found = np.zeros(SIZE, np.float32)
    found[: len(parts)] = parts
    return found / np.float32(np.linalg.norm(found))


# Two subjects at right angles, and within each what is nearly the same.
TEXTS = {
    "How do I reset my password?": vector(1),
    "How can I reset my password?": vector(1, 0.1),
    "How do I reset my router?": vector(1, 0.3),
    "What is the capital of France?": vector(0, 0, 1),
    "What's the capital of France?": vector(0, 0, 1, 0.1),
    "What is the capital of Peru?": vector(0, 0, 1, 0.15),
}
PAIRS = [
    Labelled("How do I reset my password?", "How can I reset my password?", 1),
    Labelled("How do I reset my password?", "How do I reset my router?", 0),
    Labelled("What is the capital of France?", "What's the capital of France?", 1),
    Labelled("What is the capital of France?", "What is the capital of Peru?", 0),
]


# ---------------------------------------------------------------------- the curve


#                  right  wrong  right  wrong  (equal)      never served
JUDGED = [(0.9, True), (0.8, False), (0.7, True), (0.6, False), (0.6, True), (-1.0, True)]
CURVE = Curve([Judged(*each) for each in JUDGED], to_be_had=4, to_go_wrong=10)


@pytest.mark.parametrize(
    ("score", "right", "wrong"), [(1.0, 0, 0), (0.9, 1, 0), (0.75, 1, 1), (0.7, 2, 1), (0.6, 3, 2), (0.0, 3, 2)]
)
def test_all_is_served_that_scores_as_much(score: float, right: int, wrong: int) -> None:
    point = CURVE.at(score)
    assert (point.right_count, point.wrong_count) == (right, wrong)
    assert (point.served, point.wrong) == (right / 4, wrong / 10)


@pytest.mark.parametrize(("precision", "served"), [(1.0, 0.25), (0.7, 0.25), (2 / 3, 0.5), (0.6, 0.75), (0.5, 0.75)])
def test_a_precision_is_that_of_the_loosest_setting_which_has_it(precision: float, served: float) -> None:
    assert CURVE.at_precision(precision).served == served


@pytest.mark.parametrize(("wrong", "served"), [(0.0, 0.25), (0.1, 0.5), (0.19, 0.5), (0.2, 0.75), (1.0, 0.75)])
def test_a_share_of_wrong_ones_is_never_exceeded(wrong: float, served: float) -> None:
    assert CURVE.at_wrong(wrong).served == served


def test_a_curve_of_nothing_serves_nothing() -> None:
    point = Curve([], 0, 0).at_precision(0.9)
    assert (point.served, point.wrong, point.precision) == (0, 0, 1)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 51, 100, 100]
    assert percentile([], 0.5) == 0


# ---------------------------------------------------------------------- pairs


def test_pairs_are_read_packed_or_not(tmp_path: Path) -> None:
    lines = "".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS)
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    assert read_pairs(plain, None) == read_pairs(packed, None) == PAIRS


def test_a_sample_is_balanced_and_the_same_for_the_same_seed() -> None:
    many = [Labelled(f"a{number}", f"b{number}", int(number % 10 == 0)) for number in range(200)]
    found = pairs.sample(many, 20, seed=3)
    assert sum(pair.label for pair in found) == 10
    assert len(found) == 20
    assert found == pairs.sample(many, 20, seed=3) != pairs.sample(many, 20, seed=4)
    assert pairs.sample(many, 1000, seed=3) == many


async def test_pair_by_pair_the_guard_serves_what_cosine_cannot_tell(tmp_path: Path) -> None:
    reading, served = await pairs.one_by_one(PAIRS, TEXTS, tmp_path)
    assert [found.given for found in served] == [PAIRS[0].a, None, PAIRS[2].a, None]
    assert (reading.at_default.right_count, reading.at_default.wrong_count) == (2, 0)
    assert reading.guard.at_wrong(0).served == 1
    at_090 = reading.cosine.at(0.9)
    assert (at_090.right_count, at_090.wrong_count) == (2, 2)
    assert "2      0" in " ".join(line for line in pairs.report(reading).splitlines() if "its default" in line)


async def test_as_a_cache_only_the_own_entry_is_right(tmp_path: Path) -> None:
    # Nobody has said what "What's the capital of France?" has to do with the entry that answers it here.
    given = [*PAIRS[:2], PAIRS[3], Labelled("What is the capital of France?", "How do I get to Lima?", 0)]
    given.append(Labelled("How do I reset my router?", "What's the capital of France?", 0))
    reading = await pairs.as_cache(given, {**TEXTS, "How do I get to Lima?": vector(0, 0, 0, 0, 1)}, tmp_path)
    default = reading.at_default
    # Right: the reworded question, and the one that is in the cache itself. Wrong: the one nobody has labelled.
    assert (default.right_count, default.wrong_count, reading.unlabelled) == (2, 1, 1)
    assert default.served == 1
    # Cosine also takes Peru for France, which is labelled.
    assert (reading.cosine.at(0.9).right_count, reading.cosine.at(0.9).wrong_count) == (2, 2)
    assert reading.labelled is not None
    assert [curve.at(0.9).wrong_count for curve in reading.labelled] == [1, 0]


async def test_the_aims_of_the_adversarial_set_can_be_missed(tmp_path: Path) -> None:
    turned = [pair._replace(label=1 - pair.label) for pair in PAIRS]
    for of, word in ((PAIRS, "met"), (turned, "AIM MISSED")):
        folder = tmp_path / word
        folder.mkdir()
        reading, served = await pairs.one_by_one(of, TEXTS, folder)
        text = pairs.report_adversarial(reading, of, ["kind"] * 4, served)
        assert [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("aim")] == [word, word]


# ---------------------------------------------------------------------- intents


async def test_a_hit_on_another_intent_is_wrong_and_out_of_scope_must_miss(tmp_path: Path) -> None:
    cached = [Asked("clinc", "train", intent, list(TEXTS)[at]) for at, intent in ((0, "password"), (3, "capital"))]
    asked = [
        Asked("clinc", "test", "password", "How can I reset my password?"),
        Asked("clinc", "test", "password", "What's the capital of France?"),
        Asked("clinc", "test", "oos", "How do I reset my router?"),
    ]
    text = await measure_intents("clinc", cached, asked, TEXTS, tmp_path)
    rows = {line[:24].strip(): line[24:].split() for line in text.splitlines()[3:]}
    assert rows["cosine at 0.95"] == ["100.0", "%", "1", "50.00", "%", "1", "of", "1"]
    assert rows["the proxy at its default"] == ["100.0", "%", "1", "50.00", "%", "0", "of", "1"]


def test_the_makers_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,category\n"Where, please?",where\n')
    (tmp_path / "test.csv").write_text("text,category\nWhere to?,where\n")
    clinc = tmp_path / "data_full.json.gz"
    clinc.write_bytes(gzip.compress(json.dumps({"train": [["hi", "greet"]], "oos_test": [["eh", "oos"]]}).encode()))
    assert questions(tmp_path, clinc) == [
        Asked("banking", "train", "where", "Where, please?"),
        Asked("banking", "test", "where", "Where to?"),
        Asked("clinc", "train", "greet", "hi"),
        Asked("clinc", "test", "oos", "eh"),
    ]


def test_both_sets_are_shipped() -> None:
    for source, beyond in (("banking", 0), ("clinc", 20)):
        cached, asked = sample(questions(None, None), source, 50, 40, seed=1)
        assert (len(cached), len(asked)) == (50, 40 + beyond)
        assert {one.part for one in cached} == {"train"}


# ---------------------------------------------------------------------- the loop, the client, GPTCache


@pytest.mark.parametrize(
    ("tick", "word"),
    [(Tick(0.004, 0.004, 0.004), "met"), (Tick(0.050, 0.0, 0.001), "met"), (Tick(0.006, 0.0, 0.006), "AIM MISSED")],
)
def test_the_loop_counts_as_blocked_only_while_this_process_is_at_work(tick: Tick, word: str) -> None:
    text = report([Phase("reference", 1.0, [Tick(1.0, 1.0, 1.0)]), Phase("lookups", 1.0, [tick])])
    assert text.endswith(word)


@pytest.mark.parametrize(
    ("pieces", "body", "cache"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nYe", b"s."], b"Yes.", ""),
        (
            [
                b"HTTP/1.1 200 OK\r\nx-cache: hit; exact\r\ntransfer-encoding: chunked\r\n\r\n",
                b"1\r\nY\r\n0\r\n",
                b"\r\n",
            ],
            b"1\r\nY\r\n0\r\n\r\n",
            "hit; exact",
        ),
    ],
)
async def test_the_client_reads_an_answer_to_its_end(pieces: list[bytes], body: bytes, cache: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        writer.close()

    def ask(port: int) -> list[Timed]:
        client = Client(port)
        try:
            return [client.ask(get("/")) for _ in range(2)]
        finally:
            client.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        timed = await asyncio.to_thread(ask, server.sockets[0].getsockname()[1])
    assert [(one.body, one.cache) for one in timed] == [(body, cache)] * 2
    assert all(0 < one.first_s <= one.whole_s for one in timed)


async def test_a_filled_partition_is_loaded_and_searched(tmp_path: Path) -> None:
    path, partition = tmp_path / "filled.db", bytes(16)
    async with opened(path, KnownVectors(TEXTS)) as cached:
        await fill(cached.cache.store, partition, "bench", TEXTS, 20, seed=1)
    asked = {"How do I reset my password (77)?": TEXTS["How do I reset my password?"]}
    async with opened(path, KnownVectors(asked)) as cached:
        assert cached.cache.store.count == 20
        await cached.filled()
        found = await cached.cache.meaning.candidates(partition, next(iter(asked)))
    assert len(found) == 8
    assert all("numbers differ" in " ".join(one.objections) for one in found)


def test_without_gptcache_there_is_a_line_that_says_so(tmp_path: Path) -> None:
    assert "skipped" in compare(PAIRS, TEXTS, tmp_path, None)
    text = compare(PAIRS, TEXTS, tmp_path, sys.executable)
    assert "skipped" in text
    assert "gptcache" in text
