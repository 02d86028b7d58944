"""The attempts at one answer: carries out what `policy/retries` decides, and tells the circuits what came of each.

Nothing here asks an upstream. Whoever does asks within `with attempts:`, and after a failure lets `after` find the next target
and wait for its time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from proxy.chat import Route, Target
from proxy.errors import UpstreamError
from proxy.policy.retries import Choice, Tried, next_step
from proxy.policy.routing import draw
from proxy.upstream.circuits import Circuits
from proxy.upstream.session import Upstream
from proxy.wire.headers import retry_after_s


class Attempts:
    """`target` is who is to be asked now. `now` is a clock in seconds; `max_retries` bounds what follows the first attempt."""

    __slots__ = ("_circuits", "_is_probe", "_max_retries", "_now", "_order", "_route", "_started", "_tried", "target")

    def __init__(self, route: Route, circuits: Circuits, max_retries: int, now: Callable[[], float]) -> None:
        self._route = route
        self._circuits = circuits
        self._max_retries = max_retries
        self._now = now
        self._order = circuits.order(draw(route, random.random))
        self._is_probe = False
        self._started = 0.0
        self._tried: list[Tried] = []
        self.target: Target = self._order[0]

    def __enter__(self) -> None:
        self._started = self._now()
        self._is_probe = self._circuits.begin(self.target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._circuits.succeed(self.target)
        elif isinstance(error, UpstreamError):
            self._circuits.fail(self.target, error)
        elif self._is_probe:
            self._circuits.let_go(self.target)

    def note_life(self) -> None:
        """The target speaks: if that was asked to find out, it has. The end of its answer may be far."""
        if self._is_probe:
            self._is_probe = False
            self._circuits.succeed(self.target)

    async def after(
        self, error: UpstreamError, upstreams: Mapping[str, Upstream], *, is_midway: bool, budget_s: float
    ) -> None:
        """Wait until the next attempt is due, and set its target. Raises the error when there is to be none.

        `is_midway`: clients have a part of the answer already. `budget_s`: how long a wait may take.
        """
        self._tried.append(
            Tried(
                self.target,
                self._started,
                error.trouble,
                retry_after_s=retry_after_s(error.retry_after, time.time()),
                is_midway=is_midway,
            )
        )
        choices = [
            Choice(
                target,
                upstreams[target.upstream].credential,
                self._route.contexts.get(target),
                self._circuits.is_open(target),
            )
            for target in self._order
        ]
        step = next_step(
            self._tried,
            choices,
            now=self._now(),
            budget_s=budget_s,
            max_retries=self._max_retries,
            luck=random.random(),
        )
        if step is None:
            raise error
        if step.delay_s:
            await asyncio.sleep(step.delay_s)
        self.target = step.target
