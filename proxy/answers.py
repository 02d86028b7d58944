"""Answers on their way, those who wait for them, and where one is found again.

An `Answer` is made by one producer task, however many calls want it. Each of those has a `Seat` at it, from its start until
it is settled. A client that goes leaves its seat; with a resume window it may come back to it for a while.

`Answers` finds an answer by what was asked, so that a second call that asks the same meanwhile shares it, and by its id, so
that a client whose connection broke reads on. A caller never finds another caller's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from proxy.answerlog import AnswerLog
from proxy.chat import Call, Lookup, Meter, Mode, Target, Usage
from proxy.errors import ProxyError

ShareKey = Hashable
"""What calls that may share an answer have in common: what is asked, and how it is to be delivered."""


@dataclass(slots=True, eq=False)
class Seat:
    """One reader's place at an answer. `call` is None for one who looks on: its reading is no call of its own.

    `leave` is to be called when the client has gone before the end. `is_gone` when it will not come back.
    """

    answer: Answer
    call: Call | None
    on_left: Callable[[Seat], None]
    timer: asyncio.TimerHandle | None = None
    is_gone: bool = False

    @property
    def log(self) -> AnswerLog:
        return self.answer.log

    def leave(self) -> None:
        self.on_left(self)


@dataclass(slots=True, eq=False)
class Answer:
    """One answer: what is found out while it is made, by its producer task alone, and who waits for it.

    `call` is the one it was begun for, `id` the completion's id as the clients read it. Times are the event loop's, in
    seconds.
    """

    call: Call
    key: ShareKey | None
    log: AnswerLog
    id: str
    delivers_whole: bool
    """Whether clients get nothing before all of it is there."""
    wants_usage: bool
    wants_whole: bool
    """Whether anybody wants it as one body."""
    head: dict[str, str] = field(default_factory=dict)
    """The response headers that are known from the start."""
    lookup: Lookup | None = None
    """What is to be looked for in the cache, and kept there; None where nothing is."""
    task: asyncio.Task[None] | None = None
    seats: list[Seat] = field(default_factory=list)
    payer: Call | None = None
    """The call that pays for it, of those at it: the one it was begun for, or when that leaves, the next."""
    draft: AnswerLog | None = None
    """Where the events are while the clients get none."""
    body: bytes = b""
    """The upstream's answer, where it was one body."""
    target: Target | None = None
    mode: Mode = Mode.NONE
    model: str | None = None
    """How the upstream names the model."""
    finish_reason: str | None = None
    attempts: int = 0
    asked_at: float = 0.0
    first_at: float | None = None
    """When the first piece of it came."""
    usage: Usage | None = None
    told: Usage | None = None
    """What was told of its usage on the way, which is no more than that of all."""
    is_counted: bool = False
    """Whether the usage was counted here, or could not be."""
    is_whole: bool = False
    has_broken: bool = False
    """Whether it broke when clients had a part of it."""
    is_mended: bool = False
    """Whether something of it could not be read, and was left out."""
    entry: int | None = None
    """The cached answer that it is."""
    meter: Meter | None = None
    refusal: ProxyError | None = None
    """Why it may not go on."""
    has_begun: bool = False
    is_given_up: bool = False
    is_stopping: bool = False

    def say(self, events: bytes) -> None:
        """It goes on: for its clients as far as it is paid for, or for its draft. UpstreamError when it gets too long."""
        if self.draft is not None:
            self.draft.append(events)
        elif self.meter is not None:
            self.meter.pass_on(events, self._tell)
        else:
            self._tell(events)

    def _tell(self, events: bytes) -> None:
        self.log.commit()
        self.log.append(events)

    async def passed(self) -> None:
        """Wait until its clients can have all that it was made to say."""
        if self.meter is not None:
            await self.meter.passed()

    @property
    def said(self) -> list[bytes] | bytes:
        """What the upstream has said so far."""
        return self.body or (self.log if self.draft is None else self.draft).segments

    @property
    def given(self) -> list[bytes] | bytes:
        """What it says, when it is over or has come so far: as one JSON body where there is one, else the events of a stream.

        Without the error that a stream may end with.
        """
        log = self.log
        if body := log.whole or self.body:
            return body
        has_error = log.failure is not None and log.is_committed
        events = log.segments[:-1] if has_error else log.segments
        if not events and self.draft is not None:
            events = self.draft.segments
        return [*events, log.usage] if events else []


@dataclass(slots=True, eq=False)
class Kept:
    """An answer that can be read again: while it is made, and for a while after. `answer` is None once it is over."""

    log: AnswerLog
    wants_usage: bool
    answer: Answer | None
    names: set[tuple[str, str]]


class Answers:
    """The answers of one server. Ended ones are kept for `window_s`, the oldest no longer than all fit `max_bytes`."""

    def __init__(self, window_s: float, max_bytes: int) -> None:
        self.window_s = window_s
        self._max_bytes = max_bytes
        self._asked: dict[ShareKey, Answer] = {}
        self._named: dict[tuple[str, str], Kept] = {}
        self._made: dict[Answer, Kept] = {}
        self._ended: dict[Kept, asyncio.TimerHandle] = {}
        self._ended_bytes = 0
        self._numbers = itertools.count(2)

    def enter(self, answer: Answer) -> None:
        """An answer is begun. Its id gets a number where another kept answer has it: clients may repeat a request's id."""
        if answer.key is not None:
            self._asked[answer.key] = answer
        if self.window_s:
            self._made[answer] = Kept(answer.log, answer.call.request.wants_usage, answer, set())
            first_id = answer.id
            while not self._name(answer, answer.id):
                answer.id = f"{first_id}-{next(self._numbers)}"

    def asked(self, key: ShareKey) -> Answer | None:
        """The answer in flight to that very question."""
        return self._asked.get(key)

    def name(self, answer: Answer, upstream_id: str) -> str:
        """The id that an answer is to have: the upstream's, unless another kept answer of this caller has it.

        Some upstreams give the same id to all their answers.
        """
        if not self.window_s or self._name(answer, upstream_id):
            answer.id = upstream_id
        return answer.id

    def _name(self, answer: Answer, name: str) -> bool:
        kept = self._made.get(answer)
        place = (answer.call.caller, name)
        if kept is None or self._named.setdefault(place, kept) is not kept:
            return False
        kept.names.add(place)
        return True

    def named(self, caller: str, name: str) -> Kept | None:
        """The answer with that id."""
        return self._named.get((caller, name))

    def withdraw(self, answer: Answer) -> None:
        """Nobody shares it any more: it is as good as over."""
        if answer.key is not None and self._asked.get(answer.key) is answer:
            del self._asked[answer.key]

    def give_up(self, answer: Answer) -> None:
        """All have left it for good: nobody shares it or comes back to it any more."""
        self.withdraw(answer)
        if (kept := self._made.pop(answer, None)) is not None:
            self._forget(kept)

    def end(self, answer: Answer) -> None:
        """It is over: whole or failed, and is kept for a while, or given up, and is not."""
        self.withdraw(answer)
        kept = self._made.pop(answer, None)
        if kept is None:
            return
        kept.answer = None
        # Those who wanted one body have it.
        kept.log.whole = None
        self._ended[kept] = asyncio.get_running_loop().call_later(self.window_s, self._forget, kept)
        self._ended_bytes += kept.log.size
        while self._ended_bytes > self._max_bytes:
            self._forget(next(iter(self._ended)))

    def _forget(self, kept: Kept) -> None:
        for place in kept.names:
            del self._named[place]
        if (timer := self._ended.pop(kept, None)) is not None:
            timer.cancel()
            self._ended_bytes -= kept.log.size

    def kept(self) -> tuple[int, int]:
        """How many answers that ended are kept, and their size in bytes."""
        return len(self._ended), self._ended_bytes

    def close(self) -> None:
        """Forget all that ended."""
        for kept in list(self._ended):
            self._forget(kept)
