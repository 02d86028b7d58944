"""The stored questions, found by their meaning: their vectors in an index, and a guard that judges what is near.

    candidates    the questions nearest to this one, of one partition → what the guard says of each
    enter         a question that was stored → in the background its vector → the index

Index and embedder live in one worker thread, which takes its work in order; all else is the event loop's.

An embedder that fails is asked again for what it owes whenever `refresh` is called: all that is stored is found by meaning in
the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from proxy.errors import OverloadedError
from proxy.policy.guard import judge
from proxy.policy.scale import ANCHORS, Scale
from proxy.semcache.embedder import EmbeddingError, Vector
from proxy.semcache.onnx import MINILM
from proxy.semcache.vectors import Vectors
from proxy.store.answers import AnswerStore
from proxy.store.entries import Question
from proxy.tasks import Tasks

if TYPE_CHECKING:
    from proxy.semcache.index import Index

_log = logging.getLogger(__name__)

T = TypeVar("T")

# How many of the nearest questions are judged: where the guard refuses the nearest for one word, the next one may do.
_JUDGED = 8

# Below this similarity two questions are about different things, whatever words they share.
_MIN_SIMILARITY = 0.5

_PROGRESS_EVERY = 10_000


class Candidate(NamedTuple):
    """A stored question near to one that is asked, and what the guard says of the two."""

    id: int
    question: str
    similarity: float
    score: float
    objections: tuple[str, ...]


class Meaning:
    """The stored questions, by their meaning. `worker` has one thread; without `vectors` nothing is compared.

    `tell` is told, in words, what goes wrong.
    """

    def __init__(
        self, store: AnswerStore, vectors: Vectors | None, worker: ThreadPoolExecutor, tell: Callable[[str], None]
    ) -> None:
        self._store = store
        self._vectors = vectors
        self._worker = worker
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self._index: Index | None = None
        self._scale: Scale | None = None
        self._questions: dict[int, str] = {}
        """Of all entries that are in the index, or are to be."""
        self._missing: dict[int, Question] = {}
        """Those of them that the embedder still owes a vector, in the order in which it is asked."""
        self._unread: list[int] | None = None
        """Entries whose questions are still to be read from the store; None for all there are."""
        self._filling: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        return self._vectors is not None

    @property
    def embedder(self) -> str | None:
        return None if self._vectors is None else self._vectors.embedder.name

    @property
    def indexed(self) -> int:
        """How many questions can be found."""
        return 0 if self._index is None else len(self._index)

    @property
    def index_bytes(self) -> int:
        return 0 if self._index is None else self._index.bytes

    @property
    def is_ready(self) -> bool:
        """Whether all that was stored can be found by meaning; until then it may be missed."""
        is_filling = self._filling is not None and not self._filling.done()
        return self._scale is not None and self._unread == [] and not (is_filling or self._missing)

    def start(self) -> None:
        """Begin to fill the index with what the store holds."""
        self._fill_again()

    async def close(self) -> None:
        await self._tasks.close()
        if self._vectors is not None:
            await self._vectors.close()

    # ------------------------------------------------------------------ finding

    def has(self, partition: bytes) -> bool:
        """Whether any question of that partition can be found."""
        return self._index is not None and self._index.count(partition) > 0

    async def candidates(self, partition: bytes, question: str) -> list[Candidate]:
        """The stored questions nearest to this one, judged; the best score first. EmbeddingError when there is no vector."""
        if self._vectors is None or self._index is None or self._scale is None:
            return []
        vector = await self._vectors.of(question)
        index = self._index_for(self._vectors, vector.size)
        return await self._run(self._judge_nearest, index, self._scale, partition, question, vector)

    async def similarity(self, one: str, other: str) -> float | None:
        """How near two texts are in meaning, on the guard's scale; None where nothing is compared. EmbeddingError."""
        if self._vectors is None:
            return None
        vectors = [await self._vectors.of(text, is_patient=True) for text in (one, other)]
        return (self._scale or Scale()).apply(float(vectors[0] @ vectors[1]))

    def _judge_nearest(
        self, index: Index, scale: Scale, partition: bytes, question: str, vector: Vector
    ) -> list[Candidate]:
        found: list[Candidate] = []
        for entry_id, cosine in index.nearest(partition, vector, _JUDGED):
            similarity = scale.apply(cosine)
            stored = self._questions.get(entry_id)
            if similarity < _MIN_SIMILARITY or stored is None:
                continue
            verdict = judge(question, stored, similarity)
            found.append(Candidate(entry_id, stored, similarity, verdict.score, verdict.objections))
        found.sort(key=lambda candidate: (not candidate.objections, candidate.score), reverse=True)
        return found

    # ------------------------------------------------------------------ coming and going

    def enter(self, question: Question) -> None:
        """A question was stored: it can be found a moment later, when it has its vector."""
        if self._vectors is not None:
            self._questions[question.id] = question.question
            self._tasks.spawn(self._enter(self._vectors, question), "embed a question")

    def gone(self, ids: Sequence[int]) -> None:
        """Entries have left the store: their questions are not found from now on."""
        left = [entry_id for entry_id in ids if self._questions.pop(entry_id, None) is not None]
        for entry_id in left:
            self._missing.pop(entry_id, None)
        if left and self._index is not None:
            self._loop.run_in_executor(self._worker, self._remove, self._index, left)

    def refresh(self, came: Sequence[int]) -> None:
        """Go on with what the embedder could not do, and with the entries that came by another process."""
        if self._unread is not None:
            self._unread += came
        if self._unread is None or self._unread or self._missing:
            self._fill_again()

    async def _enter(self, vectors: Vectors, question: Question) -> None:
        """Make a question's vector, and put it into the index and the store. Where there is none it is missing for now."""
        try:
            vector = await vectors.of(question.question, is_patient=True)
            index = self._index_for(vectors, vector.size)
        except EmbeddingError as error:
            if question.id in self._questions:
                self._missing[question.id] = question
            self._tell(f"questions are not compared by meaning: {error}")
            return
        if question.id in self._questions:
            self._store.set_vector(question.id, vector.astype("<f2").tobytes(), vectors.embedder.name)
            await self._run(self._put, index, [question], vector[np.newaxis])

    def _index_for(self, vectors: Vectors, dimension: int) -> Index:
        """The index, if it is for such vectors. Else EmbeddingError, and all questions are to be embedded anew."""
        if self._index is None:
            # FAISS takes 14 MB, which a server that compares nothing does not need.
            from proxy.semcache.index import Index

            self._index = Index(dimension)
        elif self._index.dimension != dimension:
            known, self._index, self._unread = self._index.dimension, None, None
            self._questions.clear()
            self._missing.clear()
            words = f"its vectors had {known} dimensions and now have {dimension}"
            raise EmbeddingError(f"{vectors.embedder.name} is another model under the same name: {words}")
        return self._index

    def _put(self, index: Index, questions: Sequence[Question], vectors: Any) -> None:
        places: dict[bytes, list[int]] = {}
        for row, question in enumerate(questions):
            places.setdefault(question.partition, []).append(row)
        for partition, rows in places.items():
            index.add(partition, [questions[row].id for row in rows], vectors[rows])

    def _remove(self, index: Index, ids: Sequence[int]) -> None:
        for entry_id in ids:
            index.remove(entry_id)

    # ------------------------------------------------------------------ filling the index

    def _fill_again(self) -> None:
        if self._vectors is not None and (self._filling is None or self._filling.done()):
            self._filling = self._tasks.spawn(self._fill(self._vectors), "fill the index")

    async def _fill(self, vectors: Vectors) -> None:
        """Put stored questions into the index: those with a vector of this embedder at once, then the others."""
        try:
            self._scale = self._scale or await self._measure(vectors)
            among, self._unread = self._unread, []
            if among is None or among:
                await self._read(vectors, among)
        except EmbeddingError as error:
            self._tell(f"questions are not compared by meaning: {error}")
            return
        except OverloadedError as error:
            self._unread = None
            self._tell(f"not all questions are compared by meaning: {error}")
            return
        is_behind = bool(self._missing)
        while self._missing:
            question = self._missing.pop(next(iter(self._missing)))
            await self._enter(vectors, question)
            if question.id in self._missing:
                return
        if is_behind:
            _log.info("all questions of cached answers have vectors of %s", vectors.embedder.name)

    async def _read(self, vectors: Vectors, among: Sequence[int] | None) -> None:
        """Put what has a vector of this embedder into the index, and note what has none."""
        done = missing = 0
        async for batch in self._store.vectors(vectors.embedder.name, among):
            # What was kept meanwhile gets its vector without that.
            fresh = [question for question in batch if question.id not in self._questions]
            self._questions |= {question.id: question.question for question in batch}
            size = vectors.embedder.dimension or self._likely_dimension(batch)
            read, found = await self._run(_read_vectors, batch, size)
            # Some may have left since they were read.
            here = [row for row, question in enumerate(read) if question.id in self._questions]
            known = [read[row] for row in here]
            with_vector = {question.id for question in known}
            unknown = {
                question.id: question
                for question in fresh
                if question.id not in with_vector and question.id in self._questions
            }
            self._missing |= unknown
            missing += len(unknown)
            if known:
                await self._run(self._put, self._index_for(vectors, size), known, found[here])
            before, done = done, done + len(known)
            if among is None and before // _PROGRESS_EVERY != done // _PROGRESS_EVERY:
                _log.info("%d questions of cached answers are in the index", done)
        if among is None and done:
            _log.info("all %d questions of cached answers are in the index", done)
            if vectors.embedder.name == MINILM:
                # Its scale was known, so it is not loaded yet, and the first lookup is not to wait for that.
                with suppress(EmbeddingError):
                    await vectors.of(next(iter(self._questions.values()), ""), is_patient=True)
        if missing:
            name = vectors.embedder.name
            _log.warning("%d questions of cached answers have no vector of %s yet: they get one now", missing, name)

    def _likely_dimension(self, batch: Sequence[Question]) -> int:
        """How many numbers a vector has that nothing tells of but those that are stored; 0 where none is."""
        if self._index is not None:
            return self._index.dimension
        sizes = Counter(len(question.vector) // 2 for question in batch if question.vector)
        return sizes.most_common(1)[0][0] if sizes else 0

    async def _measure(self, vectors: Vectors) -> Scale:
        """How this embedder's cosines compare with those the guard knows."""
        if vectors.embedder.name == MINILM:
            return Scale()
        texts = [text for anchor in ANCHORS for text in (anchor.a, anchor.b)]
        found = await asyncio.gather(*[vectors.of(text, is_patient=True) for text in texts])
        try:
            return Scale.fit([float(one @ other) for one, other in zip(found[::2], found[1::2], strict=True)])
        except ValueError as error:
            raise EmbeddingError(f"{vectors.embedder.name} cannot be used: {error}") from None

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._worker, work, *arguments)


def _read_vectors(questions: Sequence[Question], dimension: int) -> tuple[list[Question], Any]:
    """Those questions whose stored vectors are whole, and these: float32[len(questions), dimension], rows of length 1.

    A vector is stored with a length of 1, which rounding to float16 changes by less than 1 %.
    """
    read = [question for question in questions if dimension and len(question.vector or b"") == 2 * dimension]
    stored = np.frombuffer(b"".join(question.vector or b"" for question in read), "<f2").reshape(len(read), dimension)
    with np.errstate(invalid="ignore"):
        found = stored.astype(np.float32)
        lengths = np.linalg.norm(found, axis=1)
        whole = np.flatnonzero(np.abs(lengths - 1) < 0.01)
    return [read[row] for row in whole], found[whole] / lengths[whole, np.newaxis]
