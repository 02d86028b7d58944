"""How long a lookup by meaning takes, and for how long the event loop stands still meanwhile; in this process, on uvloop.

A lookup is all of `AnswerCache.candidates`: the way to the worker thread and back, the index, and the guard's judgement of
the nearest eight. The questions asked are near to stored ones, so the guard has them all to read.

The loop is watched by a callback that wants to run each millisecond. By how much it is late is how long the loop stood
still: because it had work itself ("own": CPU time of its thread meanwhile), because another thread held the interpreter's
lock, or because the machine gave it no core. On a shared machine the last is the most frequent by far. So a delay of over
5 ms counts as ours only if all threads of this process together used more than 5 ms of CPU meanwhile, which is more often
than the lock was really held. The first row is for comparison: the worker is busy, but holds no lock.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import uvloop

from proxy.semcache.embedder import Vector
from proxy.semcache.onnx import OnnxEmbedder
from proxy.semcache.vectors import Vectors
from scripts.cachebench.cached import Cached, KnownVectors, opened
from scripts.cachebench.curves import percentile
from scripts.cachebench.filling import fill
from scripts.cachebench.tables import Row, aim, table

_PARTITION = b"a large bucket.."
_SCOPE = "bench"
_TICK_S = 0.001
_MAX_BLOCKED_S = 0.005
_HASHED = bytes(4 * 2**20)
_GC_THRESHOLD = (10_000, 20, 20)


class Tick(NamedTuple):
    """By how much a callback came late, and how much CPU its thread and the whole process used meanwhile; seconds."""

    late_s: float
    own_s: float
    process_s: float

    @property
    def is_ours(self) -> bool:
        return self.late_s > _MAX_BLOCKED_S and self.process_s > _MAX_BLOCKED_S


class Watch:
    """Ticks on the running loop until it is stopped."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._wait()

    def stop(self) -> float:
        """End the ticking; seconds it went on."""
        self._timer.cancel()
        return time.perf_counter() - self._began

    def _wait(self) -> None:
        self._due = time.perf_counter() + _TICK_S
        self._own_s, self._process_s = time.thread_time(), time.process_time()
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        late_s = time.perf_counter() - self._due
        own_s, process_s = time.thread_time() - self._own_s, time.process_time() - self._process_s
        self.ticks.append(Tick(max(0.0, late_s), own_s, process_s))
        self._wait()


class Phase(NamedTuple):
    """What was going on, for how long, and the ticks meanwhile."""

    name: str
    seconds: float
    ticks: Sequence[Tick]


def measure(folder: Path, vectors: Mapping[str, Vector], sizes: Sequence[int], lookups: int, seed: int) -> str:
    """The tables: lookups in partitions of these sizes, the last of which is loaded from the database while the loop is
    watched."""
    thresholds = gc.get_threshold()
    try:
        return uvloop.run(_measure(folder, vectors, sizes, lookups, seed))
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _measure(folder: Path, vectors: Mapping[str, Vector], sizes: Sequence[int], lookups: int, seed: int) -> str:
    asked = {f"{text} ({50_000 + number})": vectors[text] for number, text in enumerate(vectors)}
    questions = list(asked)[:lookups]
    rows: list[Row] = [("a lookup by meaning, without embedding", "p50 ms", "p99 ms", "max ms")]
    phases = [await _watched("reference: worker busy with SHA-256", _hash_for_a_while)]
    for size in sizes:
        path = folder / f"{size}.db"
        async with opened(path, KnownVectors(vectors)) as cached:
            await fill(cached.cache.store, _PARTITION, _SCOPE, vectors, size, seed)
        async with opened(path, KnownVectors({**vectors, **asked})) as cached:
            # As the proxy does when it listens (proxy/__main__.py), or the collector of garbage would be what is measured.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_GC_THRESHOLD)

            async def loaded(size: int = size, cached: Cached = cached) -> None:
                await cached.filled()

            phases.append(await _watched(f"{size} entries enter the index at the start", loaded))
            times_s: list[float] = []

            async def look_up(times_s: list[float] = times_s, cached: Cached = cached) -> None:
                for question in questions:
                    began = time.perf_counter()
                    await cached.cache.meaning.candidates(_PARTITION, question)
                    times_s.append(time.perf_counter() - began)

            phases.append(await _watched(f"lookups in a partition of {size}", look_up))
            shown = [percentile(times_s, share) * 1000 for share in (0.5, 0.99, 1.0)]
            rows.append((f"partition of {size}", *(f"{one:.2f}" for one in shown)))
    phases.append(await _embedding(questions, rows))
    return "\n".join([table("lookups in this process", rows), report(phases)])


def report(phases: Sequence[Phase]) -> str:
    """The table of the loop; the first phase is for comparison only."""
    rows: list[Row] = [
        ("late by", "seconds", "ticks", "p50 ms", "p99 ms", "max ms", "own, max ms", "over 5 ms", "ours")
    ]
    ours = 0
    for phase in phases:
        late = [tick.late_s * 1000 for tick in phase.ticks]
        own = max((tick.own_s * 1000 for tick in phase.ticks), default=0.0)
        over = sum(tick.late_s > _MAX_BLOCKED_S for tick in phase.ticks)
        of_us = sum(tick.is_ours for tick in phase.ticks)
        ours += of_us if phase is not phases[0] else 0
        shown = [f"{percentile(late, share):.2f}" for share in (0.5, 0.99, 1.0)]
        rows.append((phase.name, f"{phase.seconds:.1f}", str(len(late)), *shown, f"{own:.2f}", str(over), str(of_us)))
    words = f"the event loop is never blocked for over 5 ms by what the cache does: {ours} times"
    return "\n".join([table("the event loop meanwhile", rows), aim(words, is_met=not ours)])


async def _watched(name: str, work: Callable[[], Awaitable[None]]) -> Phase:
    watch = Watch()
    try:
        await work()
    finally:
        seconds = watch.stop()
    return Phase(name, seconds, watch.ticks)


async def _hash_for_a_while() -> None:
    """As long as a second, in pieces of a few milliseconds, as embeddings are."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as worker:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            await loop.run_in_executor(worker, _hash)


def _hash() -> None:
    hashlib.sha256(_HASHED).digest()


async def _embedding(questions: Sequence[str], rows: list[Row]) -> Phase:
    """The real model, one text after the other."""
    with ThreadPoolExecutor(1) as worker:
        vectors = Vectors(OnnxEmbedder.minilm(worker))
        times_s: list[float] = []

        async def embed() -> None:
            for question in questions:
                began = time.perf_counter()
                await vectors.of(question)
                times_s.append(time.perf_counter() - began)

        await vectors.of("The model is loaded when this is done.")
        phase = await _watched(f"{len(questions)} texts are embedded", embed)
        shown = [percentile(times_s, share) * 1000 for share in (0.5, 0.99, 1.0)]
        rows.append(("and the embedding before it", *(f"{one:.2f}" for one in shown)))
        await vectors.close()
    return phase
