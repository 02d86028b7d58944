"""Counts tokens where an upstream tells none, in a process beside the server (proxy/tokenizer.py).

The event loop only hands bytes over, as they are and no faster than they are taken. The process is started when it is
first needed and ended when it had nothing to do for a while; one that dies, or does not answer, is replaced, and what it
was counting is tried once more.

An estimate is the least that a call needs, so nothing that goes wrong here is an error of the call: its usage is
unknown, and the log says why. That is also what becomes of a call that ends while too many wait to be counted, rather
than of one that has waited longer, for behind some of those a client waits for its usage.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from proxy.chat import ChatRequest, Usage
from proxy.childprocess import reply_line, running
from proxy.tasks import Tasks
from proxy.wire.encoding import dumps, loads

_log = logging.getLogger(__name__)

# A pipe of Linux holds as much, see pipe(7).
_PIECE_BYTES = 64 * 1024

_MAX_TRIES = 2


@dataclass(slots=True)
class _Question:
    head: bytes
    parts: tuple[bytes, ...]
    size: int
    usage: asyncio.Future[Usage | None]
    tries: int = 0


class Encoders:
    """Counts tokens for any model. Use from one event loop only; owns a process, which `close` ends.

    `cache_dir` is where the vocabularies are unpacked (5 MB); it is made if missing. The process ends after `idle_s`
    seconds without work, and is taken for dead when one count takes longer than `limit_s`: the longest answer that there
    can be, 64 MiB, takes some 15 s. Of calls that come while `max_waiting` others wait, or others with `max_waiting_bytes`
    of text, no tokens are counted.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        idle_s: float = 60.0,
        limit_s: float = 60.0,
        max_waiting: int = 1000,
        max_waiting_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        self._cache_dir = cache_dir
        self._idle_s = idle_s
        self._limit_s = limit_s
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._tasks = Tasks()
        self._waiting: deque[_Question] = deque()
        """The first one is being counted, and is taken out when that is done."""
        self._waiting_bytes = 0
        self._has_some = asyncio.Event()
        self._is_full = False
        self._is_closed = False

    async def estimate(
        self, model: str, request: ChatRequest, answer: Sequence[bytes] | bytes, told: Usage | None = None
    ) -> Usage | None:
        """The usage of a call: its request, and its answer as segments of a stream in normal form or as one JSON body.

        It is no less than what was `told` of it. None when it cannot be counted; the log says why.
        """
        if self._is_closed or not self._has_room():
            return None
        parts = (answer,) if isinstance(answer, bytes) else tuple(answer)
        answer_bytes = sum(map(len, parts))
        head = {
            "model": model,
            "is_stream": not isinstance(answer, bytes),
            "request_bytes": len(request.raw),
            "answer_bytes": answer_bytes,
        }
        question = _Question(
            dumps(head) + b"\n",
            (request.raw, *parts),
            len(request.raw) + answer_bytes,
            asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(question)
        self._waiting_bytes += question.size
        self._has_some.set()
        if not self._tasks:
            self._tasks.spawn(self._work(), "tokenizer")
        usage = await question.usage
        return usage and usage.at_least(told)

    async def close(self) -> None:
        """End the process. What still waits is not counted."""
        self._is_closed = True
        await self._tasks.close()
        while self._waiting:
            self._answer_first(None)

    def _has_room(self) -> bool:
        if len(self._waiting) < self._max_waiting and self._waiting_bytes < self._max_waiting_bytes:
            return True
        if not self._is_full:
            self._is_full = True
            _log.warning(
                "%d calls wait for their tokens to be counted: until they are, those of others are not",
                len(self._waiting),
            )
        return False

    def _answer_first(self, usage: Usage | None) -> None:
        question = self._waiting.popleft()
        self._waiting_bytes -= question.size
        if not question.usage.done():
            question.usage.set_result(usage)
        if not self._waiting:
            self._has_some.clear()
            self._is_full = False

    async def _work(self) -> None:
        while True:
            await self._has_some.wait()
            try:
                async with running("proxy.tokenizer", str(self._cache_dir)) as process:
                    await self._count_first(process)
                    # One that was killed while it had nothing to do is no reason to give anything up.
                    while await self._comes_soon() and process.returncode is None:
                        await self._count_first(process)
            except (OSError, EOFError) as error:
                self._note_failure(error)

    async def _count_first(self, process: Process) -> None:
        question = self._waiting[0]
        # A call whose client has left since is settled with another question.
        self._answer_first(None if question.usage.done() else await self._ask(process, question))

    async def _comes_soon(self) -> bool:
        """Wait for something to count; false when nothing came for `idle_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._idle_s):
                await self._has_some.wait()
        return bool(self._waiting)

    async def _ask(self, process: Process, question: _Question) -> Usage | None:
        """One question and its reply. EOFError when the process ends before it, TimeoutError when it takes too long."""
        assert process.stdin is not None
        try:
            async with asyncio.timeout(self._limit_s):
                # Where it cannot be written, there is no reply either.
                with suppress(ConnectionError):
                    process.stdin.write(question.head)
                    for piece in _pieces(question.parts):
                        process.stdin.write(piece)
                        await process.stdin.drain()
                        # `drain` itself lets nobody else go first while the pipe has room.
                        await asyncio.sleep(0)
                line = await reply_line(process)
        except TimeoutError:
            raise TimeoutError(f"its process did not answer within {self._limit_s:g} s") from None
        reply = loads(line)
        if "problem" in reply:
            _log.warning("the tokens of a call were not counted: %s", reply["problem"])
            return None
        return Usage(reply["prompt"], reply["completion"], estimated=True)

    def _note_failure(self, error: Exception) -> None:
        self._waiting[0].tries += 1
        if self._waiting[0].tries < _MAX_TRIES:
            _log.warning("the tokenizer failed, and is started again: %s", error)
        else:
            _log.warning("the tokens of a call were not counted: the tokenizer failed again: %s", error)
            self._answer_first(None)


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of all parts, in pieces that are small enough to be written at one go."""
    batch: list[bytes] = []
    size = 0
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            batch.append(part[start : start + _PIECE_BYTES])
            size += len(batch[-1])
            if size >= _PIECE_BYTES:
                yield b"".join(batch)
                batch.clear()
                size = 0
    yield b"".join(batch)
