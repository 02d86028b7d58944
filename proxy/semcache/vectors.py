"""The vectors of texts, each made once, and no more than can be made in time.

An embedder makes perhaps a hundred vectors a second, so what asks for more is turned away at once (`Busy`) rather than
late. A text that is looked up has a client waiting for it; one that is only to be stored is patient: it is embedded when
no other waits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from proxy.semcache.embedder import Embedder, EmbeddingError, Vector
from proxy.tasks import Tasks


class Busy(EmbeddingError):
    """Too many texts wait to be embedded."""


@dataclass(slots=True)
class _Job:
    """A text to be embedded, for `waiters` that all want its vector."""

    text: str
    vector: asyncio.Future[Vector]
    waiters: int = 0


class Vectors:
    """Texts to vectors through one embedder, which it owns. Use from one event loop only.

    Beside the texts that are being embedded, at most `max_waiting` wait that are looked up, and `max_patient` that are to
    be stored. The last `max_remembered` vectors are kept: some 2 KB each, and not the texts.
    """

    def __init__(
        self, embedder: Embedder, *, max_waiting: int = 16, max_patient: int = 1000, max_remembered: int = 4096
    ) -> None:
        self.embedder = embedder
        self._max_waiting = max_waiting
        self._max_patient = max_patient
        self._max_remembered = max_remembered
        self._remembered: OrderedDict[bytes, Vector] = OrderedDict()
        # A text is in one of these three, by its digest; the first ones of the lines come first.
        self._embedded: dict[bytes, _Job] = {}
        self._waiting: OrderedDict[bytes, _Job] = OrderedDict()
        self._patient: OrderedDict[bytes, _Job] = OrderedDict()
        self._tasks = Tasks()
        self._is_closed = False

    async def of(self, text: str, *, is_patient: bool = False) -> Vector:
        """The vector of a text, read-only. EmbeddingError when there is none; Busy at once when too many others wait.

        Who asks for a text that another has asked for waits with it. A caller that is cancelled takes nothing from the
        others; a text that nobody waits for any more is not embedded.
        """
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        vector = self._remembered.get(key)
        if vector is not None:
            self._remembered.move_to_end(key)
            return vector
        job = self._job(key, text, is_patient=is_patient)
        job.waiters += 1
        try:
            return await asyncio.shield(job.vector)
        finally:
            job.waiters -= 1
            if not job.waiters:
                self._waiting.pop(key, None)
                self._patient.pop(key, None)

    async def close(self) -> None:
        """Embed nothing any more, and close the embedder. Who still waits gets an EmbeddingError."""
        self._is_closed = True
        await self._tasks.close()
        # A task that was cancelled before its first turn has left its job as it was.
        for job in (*self._embedded.values(), *self._waiting.values(), *self._patient.values()):
            _fail(job, EmbeddingError("the proxy is stopping"))
        await self.embedder.close()

    def _job(self, key: bytes, text: str, *, is_patient: bool) -> _Job:
        """The job for a text, in the line where it belongs now."""
        if self._is_closed:
            raise EmbeddingError("the proxy is stopping")
        job = self._embedded.get(key) or self._waiting.get(key) or (self._patient.get(key) if is_patient else None)
        if job is not None:
            return job
        line, most = (self._patient, self._max_patient) if is_patient else (self._waiting, self._max_waiting)
        if len(line) >= most and len(self._embedded) >= self.embedder.at_once:
            raise Busy(f"{len(line)} other texts wait to be embedded")
        # One that was patient until now has somebody now who is not.
        job = self._patient.pop(key, None) or _Job(text, asyncio.get_running_loop().create_future())
        line[key] = job
        self._start()
        return job

    def _start(self) -> None:
        while len(self._embedded) < self.embedder.at_once and (line := self._waiting or self._patient):
            key, job = line.popitem(last=False)
            self._embedded[key] = job
            self._tasks.spawn(self._embed(key, job), "embed")

    async def _embed(self, key: bytes, job: _Job) -> None:
        try:
            vector = await self.embedder.embed(job.text)
            vector.setflags(write=False)
            self._remember(key, vector)
            job.vector.set_result(vector)
        except EmbeddingError as error:
            _fail(job, error)
        finally:
            if not job.vector.done():
                _fail(job, EmbeddingError("the embedder was stopped, or failed"))
            del self._embedded[key]
            if not self._is_closed:
                self._start()

    def _remember(self, key: bytes, vector: Vector) -> None:
        self._remembered[key] = vector
        if len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)


def _fail(job: _Job, error: EmbeddingError) -> None:
    # What nobody waits for must not be complained of as never looked at.
    if job.waiters:
        job.vector.set_exception(error)
    else:
        job.vector.cancel()
