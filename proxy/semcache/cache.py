"""The cache of answers: looked up by the very question first, then by its meaning; kept after they were given.

    find      the exact key → the questions nearest in meaning, judged (meaning.py) → an answer
    keep      a row in the store → its question among those that can be found by meaning
    learn     what a second answer to the question showed of a near match

A lookup never makes a call fail or wait for long: whatever goes wrong, or takes more than `lookup_budget_ms`, is a miss, and a
line in the log, at most one a minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, NamedTuple

from proxy.chat import CacheWish, Lookup
from proxy.policy.guard import threshold
from proxy.policy.trust import Trust, lowest_threshold, same_answer
from proxy.semcache.embedder import EmbeddingError, make_embedder
from proxy.semcache.meaning import Meaning
from proxy.semcache.vectors import Vectors
from proxy.settings import CacheSettings, Settings
from proxy.store.answers import AnswerStore
from proxy.store.db import Connection
from proxy.store.entries import Entry, Facts, NewEntry, Question
from proxy.tasks import Tasks
from proxy.upstream.session import UpstreamSession

_log = logging.getLogger(__name__)

# Of what goes wrong with every call one line is enough.
_TELL_EVERY_S = 60.0

# So much of an answer is compared with another one. The first few hundred tokens say what it says.
_COMPARED_CHARACTERS = 2000


class Hit(NamedTuple):
    """An answer that may be given again. `score` is 1 for the very question."""

    entry: Entry
    kind: Literal["exact", "semantic"]
    score: float
    age_s: float


@dataclass(slots=True)
class Figures:
    """What became of the lookups since the start."""

    exact_hits: int = 0
    semantic_hits: int = 0
    misses: int = 0
    too_late: int = 0
    """Misses because the budget was over before anything was found."""
    unembedded: int = 0
    """Misses because there was no vector: the embedder failed, or had too much to do."""
    verified_right: int = 0
    verified_wrong: int = 0
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each target, the tokens of question and answer that it need not have been asked for."""


def age_s_of(facts: Facts) -> float:
    """How old an answer is, in seconds; 0 where the clock was set back."""
    return max(0.0, time.time() - facts.created_at)


def is_young_enough(age_s: float, wish: CacheWish) -> bool:
    """Whether an answer of that age may be given to who wishes that."""
    return wish.max_age_s is None or age_s < wish.max_age_s


class AnswerCache:
    """All answers that may be given again. `worker` has one thread; `vectors` is None where nothing is compared by meaning."""

    def __init__(
        self,
        settings: CacheSettings,
        store: AnswerStore,
        vectors: Vectors | None,
        worker: ThreadPoolExecutor,
        problem: str | None = None,
    ) -> None:
        self.store = store
        self.meaning = Meaning(store, vectors, worker, self._tell)
        self.figures = Figures()
        self.problem = problem
        """Why nothing can be kept, in words."""
        self._loop = asyncio.get_running_loop()
        self._budget_s = settings.lookup_budget_ms / 1000
        self.threshold = threshold(settings.max_error_rate)
        """The lowest score at which an entry may be given of whose near matches nothing is known."""
        self._told_at: float | None = None
        self._is_closed = False

    async def close(self) -> None:
        self._is_closed = True
        await self.meaning.close()

    # ------------------------------------------------------------------ looking up

    async def find(self, lookup: Lookup) -> Hit | None:
        """An answer that was given before; None when there is none that may be given, or none is wished."""
        if not lookup.wish.looks_up:
            return None
        hit = await self._find(lookup)
        figures = self.figures
        if hit is None:
            figures.misses += 1
            return None
        if hit.kind == "exact":
            figures.exact_hits += 1
        else:
            figures.semantic_hits += 1
        entry = hit.entry
        prompt, completion = figures.saved.get(entry.target, (0, 0))
        figures.saved[entry.target] = (prompt + entry.prompt_tokens, completion + entry.completion_tokens)
        self.store.touch(entry.id)
        return hit

    async def _find(self, lookup: Lookup) -> Hit | None:
        try:
            # Reading the disk counts as well: another process may have locked the database.
            async with asyncio.timeout(self._budget_s):
                return await self.exact(lookup) or await self._by_meaning(lookup)
        except TimeoutError:
            self.figures.too_late += 1
            self._tell(f"an answer is not found in the cache within {self._budget_s * 1000:g} ms")
        except EmbeddingError as error:
            self.figures.unembedded += 1
            self._tell(f"questions are not compared by meaning: {error}")
        return None

    async def exact(self, lookup: Lookup) -> Hit | None:
        """The answer that was given to this very question."""
        entry_id = self.store.find(lookup.key)
        return None if entry_id is None else await self._hit(entry_id, "exact", 1.0, lookup)

    async def _by_meaning(self, lookup: Lookup) -> Hit | None:
        if lookup.partition is None or not self.meaning.has(lookup.partition):
            return None
        for candidate in await self.meaning.candidates(lookup.partition, lookup.question):
            if candidate.objections or candidate.score < lowest_threshold(self.threshold):
                continue
            hit = await self._hit(candidate.id, "semantic", candidate.score, lookup)
            if hit is not None and candidate.score >= self.threshold_of(hit.entry):
                return hit
        return None

    async def _hit(self, entry_id: int, kind: Literal["exact", "semantic"], score: float, lookup: Lookup) -> Hit | None:
        """The entry as a hit, if it is still there, of that scope, and young enough."""
        entry = await self.store.get(entry_id)
        if entry is None or entry.scope != lookup.scope:
            return None
        age_s = age_s_of(entry)
        return Hit(entry, kind, score, age_s) if is_young_enough(age_s, lookup.wish) else None

    def threshold_of(self, entry: Entry) -> float:
        """The lowest score at which this entry may be given, from what is known of its near matches."""
        none = Trust()
        trust = Trust(
            entry.rights,
            entry.wrongs,
            none.lowest_right if entry.lowest_right is None else entry.lowest_right,
            none.highest_wrong if entry.highest_wrong is None else entry.highest_wrong,
        )
        return trust.threshold(self.threshold)

    # ------------------------------------------------------------------ keeping

    async def keep(self, lookup: Lookup, new: NewEntry) -> None:
        """Keep an answer that was given, in place of an earlier one to that very question.

        Its question is found by meaning a moment later, when it has its vector.
        """
        entry_id = await self.store.put(new)
        if entry_id is not None and new.partition is not None:
            self.meaning.enter(Question(entry_id, new.partition, new.question, None))

    async def refresh(self) -> None:
        """Take over what other processes have changed, and go on with what the embedder could not do."""
        self.meaning.refresh(await self.store.refresh())

    # ------------------------------------------------------------------ learning

    async def learn(self, hit: Hit, given: str, other: str) -> bool | None:
        """What another answer to the question asked shows of a hit, whose answer was `given`: whether it was right.

        None where that cannot be told.
        """
        if not given.strip() or not other.strip():
            return None
        try:
            similarity = await self.meaning.similarity(given[:_COMPARED_CHARACTERS], other[:_COMPARED_CHARACTERS])
        except EmbeddingError as error:
            self._tell(f"answers are not compared by meaning: {error}")
            return None
        if similarity is None:
            return None
        if same_answer(given, other, similarity):
            self.figures.verified_right += 1
            self.store.learn(hit.entry.id, rights=1, lowest_right=hit.score)
            return True
        self.figures.verified_wrong += 1
        self.store.learn(hit.entry.id, wrongs=1, highest_wrong=hit.score)
        return False

    # ------------------------------------------------------------------ within

    def _tell(self, words: str) -> None:
        """Say in the log what goes wrong, unless something was said within the last minute."""
        now = self._loop.time()
        if not self._is_closed and (self._told_at is None or now >= self._told_at + _TELL_EVERY_S):
            self._told_at = now
            _log.warning("%s", words)


@asynccontextmanager
async def opened(
    settings: Settings, connection: Connection, session: UpstreamSession, tasks: Tasks, problem: str | None = None
) -> AsyncIterator[AnswerCache]:
    """The cache of one server, filled from its database; what cannot be compared by meaning is compared word for word.

    With a `problem` of that database, nothing is kept nor compared.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="semcache") as worker:
        vectors: Vectors | None = None
        if "semantic" in settings.cache_tiers and problem is None:
            # Importing FAISS holds up everything for 0.1 s: before serving.
            import_module("proxy.semcache.index")
            try:
                vectors = Vectors(make_embedder(settings.cache.embedder, session, worker))
            except (EmbeddingError, ValueError) as error:
                _log.warning("questions are not compared by meaning: %s", error)
        async with opened_with(settings.cache, connection, vectors, worker, tasks, problem) as cache:
            yield cache


@asynccontextmanager
async def opened_with(
    caching: CacheSettings,
    connection: Connection,
    vectors: Vectors | None,
    worker: ThreadPoolExecutor,
    tasks: Tasks,
    problem: str | None = None,
) -> AsyncIterator[AnswerCache]:
    """The cache with these vectors, whose `worker` has one thread; they are closed with it."""
    store = await AnswerStore.open(
        connection,
        tasks,
        max_entries=caching.max_entries if problem is None else 0,
        max_bytes=int(caching.max_mb * 1024 * 1024),
        memory_bytes=int(caching.memory_mb * 1024 * 1024),
        now=time.time,
        on_gone=lambda ids: cache.meaning.gone(ids),
    )
    cache = AnswerCache(caching, store, vectors, worker, problem)
    cache.meaning.start()
    try:
        yield cache
    finally:
        await cache.close()
        await store.close()
