"""Which texts are embedded, in which order, and who gets what of it. The embedder is scripted: it makes a vector when told."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from proxy.semcache.embedder import EmbeddingError, Vector
from proxy.semcache.vectors import Busy, Vectors


class Scripted:
    """An embedder that notes what it is asked, and answers when `say` tells it to."""

    name = "scripted"
    dimension = 2

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self.asked: list[str] = []
        self.is_closed = False
        self._answers: dict[str, asyncio.Future[Vector]] = {}

    async def embed(self, text: str) -> Vector:
        self.asked.append(text)
        self._answers[text] = asyncio.get_running_loop().create_future()
        return await self._answers[text]

    async def close(self) -> None:
        self.is_closed = True

    def say(self, text: str) -> None:
        self._answers[text].set_result(vector_of(text))

    def fail(self, text: str, error: Exception) -> None:
        self._answers[text].set_exception(error)


def vector_of(text: str) -> Vector:
    angle = float(sum(text.encode()))
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


class Play:
    """Vectors before a scripted embedder."""

    def __init__(self, vectors: Vectors, embedder: Scripted) -> None:
        self.vectors = vectors
        self.embedder = embedder

    async def asks(self, text: str, *, is_patient: bool = False) -> asyncio.Task[Vector]:
        """A caller, who has asked and waits."""
        caller = asyncio.ensure_future(self.vectors.of(text, is_patient=is_patient))
        await settled()
        return caller

    async def says(self, *texts: str) -> None:
        for text in texts:
            self.embedder.say(text)
            await settled()


async def settled() -> None:
    """Let everybody run until all wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def play(
    at_once: int = 1, max_waiting: int = 2, max_patient: int = 3, max_remembered: int = 2
) -> AsyncIterator[Play]:
    embedder = Scripted(at_once)
    vectors = Vectors(embedder, max_waiting=max_waiting, max_patient=max_patient, max_remembered=max_remembered)
    async with asyncio.timeout(20):
        yield Play(vectors, embedder)
        await vectors.close()
    assert embedder.is_closed


async def test_who_asks_the_same_waits_for_the_same() -> None:
    async with play() as stage:
        callers = [await stage.asks("a"), await stage.asks("a"), await stage.asks("a", is_patient=True)]
        await stage.says("a")
        for caller in callers:
            assert (await caller == vector_of("a")).all()
        assert (await stage.vectors.of("a") == vector_of("a")).all()
        assert stage.embedder.asked == ["a"]


async def test_the_vectors_used_last_are_remembered() -> None:
    async with play() as stage:
        for text in "abac":  # a is used again, so c drives b out
            caller = await stage.asks(text)
            if not caller.done():
                await stage.says(text)
            await caller
        assert stage.embedder.asked == ["a", "b", "c"]
        await stage.vectors.of("a")
        await stage.asks("b")
        assert stage.embedder.asked == ["a", "b", "c", "b"]


async def test_a_vector_that_all_share_cannot_be_changed() -> None:
    async with play() as stage:
        caller = await stage.asks("a")
        await stage.says("a")
        with pytest.raises(ValueError, match="read-only"):
            (await caller)[0] = 2


async def test_texts_to_be_stored_are_embedded_when_no_other_waits() -> None:
    async with play() as stage:
        callers = [
            await stage.asks("first"),
            await stage.asks("stored", is_patient=True),
            await stage.asks("stored too", is_patient=True),
            await stage.asks("asked for after all", is_patient=True),
            await stage.asks("looked up"),
            await stage.asks("asked for after all"),
        ]
        order = ["first", "looked up", "asked for after all", "stored", "stored too"]
        await stage.says(*order)
        assert stage.embedder.asked == order
        await asyncio.gather(*callers)


async def test_an_upstream_is_asked_for_several_at_once() -> None:
    async with play(at_once=2) as stage:
        for text in "abc":
            await stage.asks(text)
        assert stage.embedder.asked == ["a", "b"]
        await stage.says("b")
        assert stage.embedder.asked == ["a", "b", "c"]


async def test_too_many_are_turned_away_at_once_each_kind_for_itself() -> None:
    async with play() as stage:
        for text in "abc":  # one is being embedded, two wait
            await stage.asks(text)
        with pytest.raises(Busy, match="2 other texts wait"):
            await stage.vectors.of("d")
        again = await stage.asks("c")
        for text in "deff":
            patient = await stage.asks(text, is_patient=True)
        with pytest.raises(Busy, match="3 other texts wait"):
            await stage.vectors.of("g", is_patient=True)
        with pytest.raises(Busy):  # it stays patient
            await stage.vectors.of("f")
        await stage.says("a", "b", "c")
        assert again.done()
        await stage.asks("g")
        await stage.says("d", "g", "e", "f")
        await patient


async def test_a_cancelled_caller_takes_nothing_from_the_others() -> None:
    async with play() as stage:
        first, other, alone = await stage.asks("a"), await stage.asks("a"), await stage.asks("b")
        first.cancel()
        alone.cancel()
        await settled()
        await stage.says("a")
        assert (await other == vector_of("a")).all()
        assert stage.embedder.asked == ["a"], "nobody waits for b any more"


async def test_a_vector_that_nobody_waits_for_any_more_is_kept_and_an_error_is_not_complained_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with play() as stage:
        for text in "ab":
            caller = await stage.asks(text)
            caller.cancel()
            await settled()
            if text == "a":
                await stage.says("a")
            else:
                stage.embedder.fail("b", EmbeddingError("no"))
                await settled()
        await stage.vectors.of("a")
        assert stage.embedder.asked == ["a", "b"]
    del caller, stage
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "words"),
    [(EmbeddingError("the model is gone"), "the model is gone"), (KeyError("a bug"), "was stopped, or failed")],
)
async def test_an_error_is_everybodys_and_the_next_text_is_embedded(error: Exception, words: str) -> None:
    async with play() as stage:
        callers = [await stage.asks("a"), await stage.asks("a")]
        other = await stage.asks("b")
        stage.embedder.fail("a", error)
        for caller in callers:
            with pytest.raises(EmbeddingError, match=words):
                await caller
        await settled()
        await stage.says("b")
        await other
        await stage.asks("a")
        assert stage.embedder.asked == ["a", "b", "a"], "an error is not remembered"


async def test_a_stop_leaves_nobody_waiting() -> None:
    async with play() as stage:
        callers = [await stage.asks("a"), await stage.asks("b"), await stage.asks("c", is_patient=True)]
        await stage.vectors.close()
        for caller in callers:
            with pytest.raises(EmbeddingError, match="stop"):
                await caller
        with pytest.raises(EmbeddingError, match="stopping"):
            await stage.vectors.of("d")
        at_its_start = Vectors(Scripted())
        caller = asyncio.ensure_future(at_its_start.of("a"))
        await asyncio.sleep(0)  # its task has not had its first turn
        await at_its_start.close()
        with pytest.raises(EmbeddingError, match="stop"):
            await caller
