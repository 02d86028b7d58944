from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.semcache.index import Index
from tests.conftest import examples

Floats = npt.NDArray[np.float32]
DIMENSION = 6


def directions(count: int, dimension: int = DIMENSION, seed: int = 0) -> Floats:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, dimension), np.float32))


def unit_rows(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


POOL = directions(200)

adds = st.tuples(
    st.just("add"), st.sampled_from([b"a", b"b", b"c"]), st.lists(st.integers(0, 30), max_size=12, unique=True)
)
removes = st.tuples(st.just("remove"), st.just(b""), st.lists(st.integers(0, 35), max_size=12))


@examples(100)
@given(st.lists(adds | removes, max_size=20), st.integers(1, 8))
def test_it_finds_what_comparing_all_would_find(steps: list[tuple[str, bytes, list[int]]], k: int) -> None:
    index, known = Index(DIMENSION), dict[int, tuple[bytes, Floats]]()
    for step, (kind, partition, ids) in enumerate(steps):
        if kind == "add":
            vectors = POOL[[(entry * 7 + step * 13) % len(POOL) for entry in ids]]
            index.add(partition, ids, vectors)
            known |= {entry: (partition, vector) for entry, vector in zip(ids, vectors, strict=True)}
        else:
            for entry in ids:
                assert index.remove(entry) is (known.pop(entry, None) is not None)
    assert len(index) == len(known)
    for partition in (b"a", b"b", b"c"):
        there = {entry: float(vector @ POOL[0]) for entry, (home, vector) in known.items() if home == partition}
        assert index.count(partition) == len(there)
        found = index.nearest(partition, POOL[0], k)
        assert len({entry for entry, _ in found}) == len(found) == min(k, len(there))
        best = sorted(there.values(), reverse=True)
        for (entry, cosine), expected in zip(found, best, strict=False):
            # A vector of six numbers is rounded more than one of 384.
            assert cosine == pytest.approx(there[entry], abs=0.01)
            assert cosine == pytest.approx(expected, abs=0.02)
        cosines = [cosine for _, cosine in found]
        assert cosines == sorted(cosines, reverse=True)


class Brute:
    """The same by comparing all, for one partition."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors
        self.there = np.zeros(len(vectors), bool)

    def nearest(self, vector: Floats) -> float:
        return float(np.einsum("ij,j->i", self.vectors[self.there], vector).max())


def agree(index: Index, brute: Brute, questions: Floats) -> None:
    near = [question for question in questions if brute.nearest(question) >= 0.7]
    assert near
    for question in near:
        (entry, cosine), *_ = index.nearest(b"p", question, 3)
        assert brute.there[entry]
        assert cosine == pytest.approx(question @ brute.vectors[entry], abs=0.002)
        assert cosine == pytest.approx(brute.nearest(question), abs=0.002)


def test_a_large_partition_grows_and_shrinks_and_finds_the_nearest() -> None:
    count, dimension = 4000, 384
    # 40 topics, with a hundred entries each that are all close to one another, and to the questions.
    topics = np.tile(directions(40, dimension), (count // 40, 1))
    vectors = unit_rows(topics + 0.6 * directions(count, dimension, seed=1))
    questions = unit_rows(topics[::81] + 0.6 * directions(50, dimension, seed=2))
    questions.setflags(write=False)  # as vectors come from `Vectors`
    index, brute = Index(dimension), Brute(vectors)

    def enter(ids: Sequence[int]) -> None:
        index.add(b"p", ids, vectors[ids])
        brute.there[ids] = True

    def forget(ids: Sequence[int]) -> None:
        for entry in ids:
            assert index.remove(entry)
        brute.there[ids] = False

    enter(range(1000))
    agree(index, brute, questions)
    for entry in range(1000, 1500):  # one by one past the size at which there are sketches
        enter([entry])
    enter(range(1500, count))
    agree(index, brute, questions)
    largest = index.bytes
    forget(range(1, count, 2))
    agree(index, brute, questions)
    enter(range(1, 101, 2))
    enter(range(100))  # again
    assert len(index) == 2050
    agree(index, brute, questions)
    forget(np.flatnonzero(brute.there)[500:].tolist())
    agree(index, brute, questions)
    assert index.bytes < largest / 4
    forget(np.flatnonzero(brute.there).tolist())
    assert len(index) == 0
    assert index.nearest(b"p", questions[0], 3) == []
    assert index.bytes == 0


def test_many_partitions_take_little_more_than_their_vectors() -> None:
    index, vectors = Index(384), directions(1000, 384)
    for entry, vector in enumerate(vectors):
        index.add(entry.to_bytes(16, "big"), [entry], vector[np.newaxis])
    for entry, vector in enumerate(vectors):
        ((found, cosine),) = index.nearest(entry.to_bytes(16, "big"), vector, 3)
        assert found == entry
        assert cosine == pytest.approx(1, abs=0.001)
    assert index.bytes < 1000 * 800


@pytest.mark.parametrize(
    ("ids", "shape", "words"),
    [
        ([1, 2], (1, 6), r"shape \(1, 6\) for 2 ids and 6 dimensions"),
        ([1], (1, 5), r"shape \(1, 5\) for 1 ids and 6 dimensions"),
        ([1, 1], (2, 6), "an id is there twice"),
    ],
)
def test_what_does_not_fit_is_refused(ids: list[int], shape: Any, words: str) -> None:
    index = Index(DIMENSION)
    with pytest.raises(ValueError, match=words):
        index.add(b"p", ids, np.ones(shape, np.float32))
    assert len(index) == 0
