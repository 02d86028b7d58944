"""The vectors of all stored questions, in memory, each in its partition: which are the nearest to this one?

A partition holds what may be compared at all. There may be one with 100,000 entries, or 100,000 with one, and entries come
and go one by one. So there is nothing to train and nothing to rebuild:

- A vector is kept in one byte a number, which changes its cosine with another by a thousandth or so.
- A small partition is compared whole, in numpy.
- A large one keeps a sketch of each vector as well: on which side of 512 random planes it lies. The share of planes between
  two vectors is their angle (Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002). FAISS
  finds the sketches with the fewest bits that differ, and only those entries are compared.
- An entry that leaves gives its place to the last one.

Measured with 100,000 MiniLM vectors of real questions (384 numbers, one thread of an EPYC): a lookup takes 0.9 ms in one
partition, 0.3 ms in one of 10,000, 0.02 ms in one of a few entries; entering or removing one 0.1 ms, 20 ms where much memory
has to be moved; 55 MB in one partition, 73 MB in 100,000. The nearest at a cosine of 0.7 or more was found 999 times in 1,000,
and otherwise one as near to within 0.002; with vectors shifted to a mean cosine of 0.8, as some models have, 995 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import faiss
import numpy as np
import numpy.typing as npt

_PLANES = 512
_CANDIDATES = 256

# So many numbers are compared one by one in about 0.2 ms; partitions that have more get sketches.
_MAX_COMPARED = 2**19

# What is entered at one go: a batch of any size takes but little memory beside.
_SLICE = 256

_NO_SKETCHES = np.empty((0, _PLANES // 8), np.uint8)
_NO_IDS = np.empty(0, np.int64)

Key: TypeAlias = bytes
_Floats: TypeAlias = npt.NDArray[np.float32]


class _Partition:
    """The entries of one partition, in no order: the first `count` of `rows`; where they are many, of the others as well."""

    __slots__ = ("count", "ids", "key", "rows", "sketches")

    def __init__(self, key: Key, dtype: np.dtype[np.void]) -> None:
        self.key = key
        self.rows: npt.NDArray[np.void] = np.empty(0, dtype)
        self.sketches: npt.NDArray[np.uint8] = _NO_SKETCHES
        self.ids: npt.NDArray[np.int64] = _NO_IDS
        """The same as in `rows`, but close together: among 100,000 one is found in 0.04 ms."""
        self.count = 0

    @property
    def has_sketches(self) -> bool:
        return self.sketches is not _NO_SKETCHES

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.sketches.nbytes + self.ids.nbytes

    def row_of(self, entry: int) -> int:
        ids = self.ids if self.has_sketches else self.rows["id"]
        return int(np.flatnonzero(ids[: self.count] == entry)[0])

    def move(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]
        if self.has_sketches:
            self.sketches[target] = self.sketches[source]
            self.ids[target] = self.ids[source]

    def resize(self, capacity: int) -> None:
        """Room for so many entries. In place, which for large arrays moves pages and copies nothing: mremap(2)."""
        self.rows.resize(capacity, refcheck=False)
        if self.has_sketches:
            self.sketches.resize((capacity, _PLANES // 8), refcheck=False)
            self.ids.resize(capacity, refcheck=False)


class Index:
    """Entries with vectors of one `dimension`, by their id. Blocks; to be used in one thread at a time.

    An entry takes a byte for each number of its vector, 64 for its sketch and about 120 beside; a partition about 250.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._dtype = np.dtype([("code", np.int8, (dimension,)), ("scale", np.float32), ("id", np.int64)], align=True)
        self._max_compared = max(1, _MAX_COMPARED // dimension)
        self._partitions: dict[Key, _Partition] = {}
        self._places: dict[int, _Partition] = {}
        self._array_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def dimension(self) -> int:
        return self._dimension

    def count(self, partition: Key) -> int:
        """How many entries a partition has."""
        found = self._partitions.get(partition)
        return found.count if found is not None else 0

    @property
    def bytes(self) -> int:
        """How much memory the entries take, about."""
        return self._array_bytes + 100 * len(self._places) + 250 * len(self._partitions)

    def add(self, partition: Key, ids: Sequence[int], vectors: _Floats) -> None:
        """Enter vectors, float32[len(ids), dimension], rows of length 1. An id that is known, in whatever partition, moves here.

        ValueError when the shape is another, or an id is there twice.
        """
        if vectors.shape != (len(ids), self._dimension):
            raise ValueError(f"vectors of shape {vectors.shape} for {len(ids)} ids and {self._dimension} dimensions")
        if len(set(ids)) != len(ids):
            raise ValueError("an id is there twice")
        for entry in ids:
            self.remove(entry)
        for start in range(0, len(ids), _SLICE):
            self._add(partition, ids[start : start + _SLICE], vectors[start : start + _SLICE])

    def _add(self, partition: Key, ids: Sequence[int], vectors: _Floats) -> None:
        place = self._partitions.get(partition)
        if place is None:
            place = self._partitions[partition] = _Partition(partition, self._dtype)
        first, place.count = place.count, place.count + len(ids)
        if place.count > len(place.rows):
            self._resize(place, max(place.count, len(place.rows) + len(place.rows) // 8))
        new = place.rows[first : place.count]
        codes = np.rint(vectors * (127 / np.abs(vectors).max(axis=1, keepdims=True)))
        new["code"] = codes
        new["scale"] = 1 / np.linalg.norm(codes, axis=1)
        new["id"] = ids
        if not place.has_sketches and place.count > self._max_compared:
            place.sketches = np.zeros((len(place.rows), _PLANES // 8), np.uint8)
            place.ids = np.zeros(len(place.rows), np.int64)
            self._array_bytes += place.sketches.nbytes + place.ids.nbytes
            first = 0
        if place.has_sketches:
            self._sketch(place, first)
        self._places.update(dict.fromkeys(ids, place))

    def remove(self, entry: int) -> bool:
        """Forget an entry; false when it is not known."""
        place = self._places.pop(entry, None)
        if place is None:
            return False
        row = place.row_of(entry)
        place.count -= 1
        if not place.count:
            del self._partitions[place.key]
            self._array_bytes -= place.nbytes
            return True
        place.move(place.count, row)
        if place.has_sketches and place.count < self._max_compared // 2:
            self._array_bytes -= place.sketches.nbytes + place.ids.nbytes
            place.sketches, place.ids = _NO_SKETCHES, _NO_IDS
        if place.count < len(place.rows) - len(place.rows) // 4:
            self._resize(place, place.count + place.count // 8)
        return True

    def nearest(self, partition: Key, vector: _Floats, k: int) -> list[tuple[int, float]]:
        """The `k` entries of the partition that are nearest to a vector of length 1, best first: id and cosine.

        The cosine is right to about 0.002.
        """
        place = self._partitions.get(partition)
        if place is None:
            return []
        rows = place.rows[: place.count]
        if place.has_sketches:
            _stay_alone()
            sketch = self._sketcher.sa_encode(vector[np.newaxis])
            _, found = faiss.knn_hamming(sketch, place.sketches[: place.count], max(k, _CANDIDATES), variant="mc")
            rows = rows[found[0][found[0] >= 0]]
        # Not `@`: numpy's BLAS would wake all cores.
        cosines = np.einsum("ij,j->i", rows["code"].astype(np.float32), vector) * rows["scale"]
        best = np.argpartition(-cosines, k - 1)[:k] if k < len(rows) else np.arange(len(rows))
        best = best[np.argsort(-cosines[best])]
        return list(zip(rows["id"][best].tolist(), np.minimum(cosines[best], 1).tolist(), strict=True))

    def _sketch(self, place: _Partition, first: int) -> None:
        """Make the sketches of the entries from row `first` on."""
        _stay_alone()
        for start in range(first, place.count, _SLICE):
            part = slice(start, min(start + _SLICE, place.count))
            rows = place.rows[part]
            place.sketches[part] = self._sketcher.sa_encode(rows["code"].astype(np.float32))
            place.ids[part] = rows["id"]

    @cached_property
    def _sketcher(self) -> Any:
        """Holds the planes, the same in every run, and no vectors: 2 KB for each number of a vector. Made in 20 ms."""
        _stay_alone()
        return faiss.IndexLSH(self._dimension, _PLANES)

    def _resize(self, place: _Partition, capacity: int) -> None:
        self._array_bytes -= place.nbytes
        place.resize(capacity)
        self._array_bytes += place.nbytes


def _stay_alone() -> None:
    """Keep FAISS from waking other cores, which belong to other calls. Each thread has to ask that for itself (OpenMP 5.0,
    section 3.2.1)."""
    faiss.omp_set_num_threads(1)
