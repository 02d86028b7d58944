"""Looks public prices up, in a process beside the server (proxy/pricelist.py), and has `Prices` remember them.

The process is started when it is first needed and ended when it had nothing to do for a while: all models that are asked for
meanwhile are looked up by the same one. One that dies, or does not answer, is replaced once. When the next one fails too, the
prices that it was asked for are unknown for now, and so are all others for some time: few calls need a price to go on, and none
is to start another process that fails.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from asyncio.subprocess import Process
from collections.abc import Iterable
from contextlib import suppress

from proxy.chat import Target
from proxy.childprocess import reply_line, running
from proxy.errors import OverloadedError
from proxy.policy.pricing import Prices, of_data
from proxy.tasks import Tasks
from proxy.wire.encoding import loads

_log = logging.getLogger(__name__)

_MAX_TRIES = 2


class PriceLookup:
    """Makes targets' prices known to `prices`. Use from one event loop only; owns a process, which `close` ends.

    The process ends after `idle_s` seconds without work, and is taken for dead when it does not answer within `limit_s`: it
    takes 0.4 s to start, about a millisecond to answer, and 40 MB. When it has failed, nothing is looked up for
    `retry_after_s`, nor is what is asked for while `max_waiting` targets wait.
    """

    def __init__(
        self,
        prices: Prices,
        *,
        idle_s: float = 10.0,
        limit_s: float = 10.0,
        retry_after_s: float = 60.0,
        max_waiting: int = 1000,
    ) -> None:
        self.prices = prices
        self._idle_s = idle_s
        self._limit_s = limit_s
        self._retry_after_s = retry_after_s
        self._max_waiting = max_waiting
        self._tasks = Tasks()
        self._waiting: dict[Target, asyncio.Future[None]] = {}
        """In order. The first one is being looked up, and is taken out when that is done."""
        self._has_some = asyncio.Event()
        self._failures = 0
        self._rests_until: float | None = None
        self._is_closed = False

    def begin(self, targets: Iterable[Target]) -> None:
        """Look up what is not known of them, in the background."""
        self._begun(targets)

    async def learn(self, *targets: Target) -> None:
        """Wait until all is known of them that can be known now. Who is cancelled while waiting takes nothing from others."""
        if begun := self._begun(targets):
            await asyncio.wait(begun)

    async def require(self, *targets: Target) -> None:
        """As `learn`, for what cannot go on without: OverloadedError (503) when one of them could not be looked up.

        Nobody knows then whether it has a price. One that was looked up may have none all the same.
        """
        await self.learn(*targets)
        for target in targets:
            if not self.prices.knows(target):
                words = f"The price of '{target}' cannot be looked up now, and this call is to be paid by its price."
                raise OverloadedError("prices_unavailable", words, retry_after_s=self._rest_s())

    async def close(self) -> None:
        """End the process. What still waits is not looked up."""
        self._is_closed = True
        await self._tasks.close()
        self._give_up()

    def _begun(self, targets: Iterable[Target]) -> list[asyncio.Future[None]]:
        """Those of them that wait to be looked up, as what is set when that is done."""
        begun = []
        for target in targets:
            if self.prices.knows(target):
                continue
            waiting = self._waiting.get(target)
            if waiting is None:
                if not self._takes_more():
                    continue
                waiting = self._waiting[target] = asyncio.get_running_loop().create_future()
            begun.append(waiting)
        if begun:
            self._has_some.set()
            if not self._tasks:
                self._tasks.spawn(self._work(), "look prices up")
        return begun

    def _takes_more(self) -> bool:
        if self._is_closed or len(self._waiting) >= self._max_waiting:
            return False
        return self._rests_until is None or asyncio.get_running_loop().time() >= self._rests_until

    def _rest_s(self) -> int:
        """In how many seconds it is worth asking again, 1 at least."""
        if self._rests_until is None:
            return 1
        return max(1, math.ceil(self._rests_until - asyncio.get_running_loop().time()))

    async def _work(self) -> None:
        while True:
            await self._has_some.wait()
            try:
                async with running("proxy.pricelist") as process:
                    await self._look_up_first(process)
                    # One that was killed while it had nothing to do is no failure.
                    while await self._comes_soon() and process.returncode is None:
                        await self._look_up_first(process)
            except (OSError, EOFError, ValueError) as error:
                self._note_failure(error)

    async def _comes_soon(self) -> bool:
        """Wait for something to look up; false when nothing came for `idle_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._idle_s):
                await self._has_some.wait()
        return bool(self._waiting)

    async def _look_up_first(self, process: Process) -> None:
        """One question and its reply. EOFError when the process ends before it, TimeoutError when it takes too long."""
        assert process.stdin is not None
        target = next(iter(self._waiting))
        # Half a surrogate pair, which orjson refuses, is a name like any other.
        question = json.dumps({"model": target.model, "base_url": self.prices.base_url(target)}).encode()
        try:
            async with asyncio.timeout(self._limit_s):
                # Where it cannot be written, there is no reply either.
                with suppress(ConnectionError):
                    process.stdin.write(question + b"\n")
                    await process.stdin.drain()
                line = await reply_line(process)
        except TimeoutError:
            raise TimeoutError(f"its process did not answer within {self._limit_s:g} s") from None
        reply = loads(line)
        if "problem" in reply:
            _log.warning("the price of '%s' was not found: %s", target, reply["problem"])
        self.prices.remember(target, of_data(reply.get("prices", [])))
        self._failures, self._rests_until = 0, None
        self._answer_first()

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures < _MAX_TRIES:
            return
        # It is told of once, until it works again.
        if self._rests_until is None:
            _log.warning("public prices cannot be looked up, and are unknown until they can: %s", error)
        self._failures = 0
        self._rests_until = asyncio.get_running_loop().time() + self._retry_after_s
        self._give_up()

    def _give_up(self) -> None:
        while self._waiting:
            self._answer_first()

    def _answer_first(self) -> None:
        self._waiting.pop(next(iter(self._waiting))).set_result(None)
        if not self._waiting:
            self._has_some.clear()
