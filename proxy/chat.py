"""Our words: what a call is made of, from the request to the row that accounts for it.

Each is immutable, and what every call makes is a NamedTuple, made in a third of a frozen dataclass's time. A call's knowledge
grows from one to the next and never flows back:
`ChatRequest` (what was asked) → `Call` (who asked, when, of whom) → `Outcome` (what became of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

from proxy.errors import ClientError, OverloadedError, ProxyError, UpstreamError

Recovery = Literal["exact", "continue", "off"]
"""What becomes of a stream that dies midway: the same answer is asked for again, or the rest of it, or nothing."""


CacheTier = Literal["semantic", "exact", "off"]
"""Which questions may get an answer that was given before: those alike in meaning, the very same, or none."""

CACHE_TIERS: tuple[CacheTier, ...] = ("off", "exact", "semantic")
"""From the one that gives the fewest answers to the one that gives most."""


class Parsed:
    """What a JSON object says, for as long as somebody needs it.

    A long prompt's value takes several times the memory of its bytes, and a stream lasts long. So it can be forgotten
    meanwhile; `read` makes it again from the bytes when it is asked for.
    """

    __slots__ = ("_raw", "_read", "_value")

    def __init__(self, raw: bytes, value: dict[str, Any], read: Callable[[bytes], dict[str, Any]]) -> None:
        self._raw = raw
        self._read = read
        self._value: dict[str, Any] | None = value

    @property
    def value(self) -> dict[str, Any]:
        if self._value is None:
            self._value = self._read(self._raw)
        return self._value

    def forget(self) -> None:
        self._value = None


class Limits(NamedTuple):
    """How much may be asked for at most, each 1 or more; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_calls: int | None = None


NO_LIMITS = Limits()


class Holder(NamedTuple):
    """Who has limits. `id` tells holders apart: keys from teams as well. `name` is what its owner reads: `team 'alpha'`."""

    id: str
    name: str
    limits: Limits


class Budgets(NamedTuple):
    """How much may be spent at most in each day, each month (UTC) and in all, in micro-dollars; None is no limit."""

    day: int | None = None
    month: int | None = None
    total: int | None = None


NO_BUDGETS = Budgets()


class Identity(NamedTuple):
    """Who asks, as far as a virtual key tells.

    `organisation` and `team` are ids; `key` is the key's id, "" where callers need none. `caller` is whose answers may be
    shared, "" where the credentials tell. A model must fit a pattern of `models` and one of `team_models`: both hold "*"
    where all are allowed. `holders` are those of the key and the team that have limits. `barred` are the names of model groups
    that are for other teams.
    """

    organisation: str
    team: str
    key: str = ""
    caller: str = ""
    models: tuple[str, ...] = ("*",)
    team_models: tuple[str, ...] = ("*",)
    holders: tuple[Holder, ...] = ()
    barred: frozenset[str] = frozenset()

    @property
    def has_key(self) -> bool:
        """Whether a virtual key says so: then the account at an upstream, which is all teams' alike, is kept from it."""
        return self.key != ""


LOCAL = Identity("local", "local")
"""Everybody, with auth.mode = "open". The organisation and the team are there from the start."""


class ChatRequest(NamedTuple):
    """A chat completion request, checked but unread: `body` keeps every member the client sent, as it was sent.

    `raw` is the very body that came in, so that a request in which nothing changes is forwarded byte for byte.
    """

    raw: bytes
    parsed: Parsed
    model: str
    wants_stream: bool
    wants_usage: bool
    wants_running_usage: bool
    choices: int

    @property
    def body(self) -> dict[str, Any]:
        return self.parsed.value


class Target(NamedTuple):
    """One model at one upstream: `openai/gpt-4o-mini`."""

    upstream: str
    model: str

    def __str__(self) -> str:
        return f"{self.upstream}/{self.model}"


@dataclass(frozen=True, slots=True)
class Route:
    """What a model's name stands for: who is asked, in which order, and how its answers are handed on.

    `weights` has one place for each target; targets in a row that have one take turns by it. `contexts` says for some
    targets how many tokens the largest request may have that they can take. `delivers_whole`: a stream begins only when
    all of the answer is there. `coalesces`: a request may share the answer to one like it that is in flight. `cache`: which
    answers are looked up and kept, the latter for `cache_ttl_s` (0: for ever). `name` tells routes apart, by all they lead to.
    """

    targets: tuple[Target, ...]
    weights: tuple[float | None, ...]
    contexts: Mapping[Target, int]
    recovery: Recovery
    delivers_whole: bool
    coalesces: bool
    cache: CacheTier = "off"
    cache_ttl_s: float = 0.0
    name: str = ""


class CacheWish(NamedTuple):
    """What a client wants of the cache, by `Cache-Control` (RFC 9111 §5.2.1) and by `x-headwater-…` headers.

    `tier` and `namespace` narrow what is looked up and kept: `tier` is None where the client leaves it to the settings.
    """

    looks_up: bool = True
    keeps: bool = True
    max_age_s: float | None = None
    only_if_cached: bool = False
    tier: CacheTier | None = None
    namespace: str = ""


NO_CACHE_WISH = CacheWish()


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client asks for in its headers, about how its answer is produced.

    `delivers_whole` is None where the client leaves it to the model's settings.
    """

    coalesces: bool = True
    delivers_whole: bool | None = None
    cache: CacheWish = NO_CACHE_WISH


MOST_TOKENS = 10**7
"""More than any model takes or gives. What a client or an upstream tells beyond that would take all credit of a team."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `estimated` means counted here, because the upstream did not say.

    `cached` are those of the prompt's that the upstream had in a cache of its own, `reasoning` those of the completion's that
    are not shown: OpenAI's `prompt_tokens_details.cached_tokens` and `completion_tokens_details.reasoning_tokens`.
    """

    prompt: int
    completion: int
    estimated: bool = False
    cached: int = 0
    reasoning: int = 0

    def at_least(self, told: Usage | None) -> Usage:
        """This, or more where an upstream has told of more: thoughts, say, that nobody sees and could count."""
        if told is None:
            return self
        return replace(
            self,
            prompt=max(self.prompt, told.prompt),
            completion=max(self.completion, told.completion),
            cached=max(self.cached, told.cached),
            reasoning=max(self.reasoning, told.reasoning),
        )

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object; an estimate carries the extra member `estimated`."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
        if self.estimated:
            usage["estimated"] = True
        return usage


class Meter(Protocol):
    """What lets an answer go on as far as it is paid for."""

    def pass_on(self, segment: bytes, outlet: Callable[[bytes], None]) -> None:
        """Give some events of it, in normal form, to `outlet`: now, or when they are paid for. Raises what that raises."""

    async def passed(self) -> None:
        """Wait until all that was given has gone on. Never done where the answer may not go on, and is stopped."""

    def close(self) -> None:
        """The answer has ended: what still waits goes nowhere."""


class Ticket(Protocol):
    """What a call is let in with, and where it is accounted for. Settled once, however the call ends; again does nothing."""

    async def open(self, targets: tuple[Target, ...], stop: Callable[[ProxyError], None] | None = None) -> Meter | None:
        """To be awaited before the first of the upstreams is asked. ProxyError when it may not be asked.

        The answer is to go through the meter, if there is one; it calls `stop` when the answer may not go on.
        """

    def hand_over(self, heir: Ticket) -> None:
        """This call leaves an answer; `heir`, the ticket of one that stays, pays for it from now on."""

    def aside(self, call_id: str, purpose: str) -> Ticket:
        """The ticket of another call, which the proxy makes by itself on account of this one: nobody is charged for it."""

    def settle(self, outcome: Outcome) -> None:
        """The call is over."""


class Call(NamedTuple):
    """One client's wish for one answer. `started` is the loop's clock in seconds; `caller` is whose answers it may share.

    `purpose` is "" for what a client asks for, and else what the proxy itself asks for. `ticket` is given back with its outcome.
    """

    id: str
    request: ChatRequest
    route: Route
    started: float
    forward_headers: tuple[tuple[str, str], ...]
    caller: str
    purpose: str = ""
    ticket: Ticket | None = None


class Lookup(NamedTuple):
    """What a call looks for in the cache, and under what its answer is kept there.

    `key` (16 bytes) stands for all that can change the answer, `scope` for whose it is, in words that tell nobody. Where
    the last user text may be compared by meaning it is the `question`, and `partition` (16 bytes) stands for all the rest.
    """

    key: bytes
    scope: str
    wish: CacheWish
    question: str = ""
    partition: bytes | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """How to put a request to an upstream."""

    stream: bool
    usage: bool
    may_fall_back: bool
    is_probe: bool = False
    """Nothing is known: this very request will show whether the target streams."""
    partial: str = ""
    """The beginning of the answer, to be continued."""
    partial_tokens: int = 0

    def without_stream(self) -> Ask:
        return replace(self, stream=False, usage=False, may_fall_back=False, is_probe=False)

    def without_usage(self) -> Ask:
        return replace(self, usage=False, is_probe=False)

    def continuing(self, partial: str, tokens: int) -> Ask:
        return replace(self, partial=partial, partial_tokens=tokens)

    def without_partial(self) -> Ask:
        return replace(self, partial="", partial_tokens=0)


class Mode(StrEnum):
    """How the answer came to be a stream, or one body."""

    # An enumeration's own is Python, and every call is counted by its mode and its status.
    __hash__ = str.__hash__

    RELAY = "relay"  # the upstream streamed, the client got that stream
    SYNTHESIS = "synthesis"  # the upstream sent one body, the client got a stream made of it
    REPLAY = "replay"  # it was given before, and came from the cache
    WHOLE = "whole"  # the client wanted one body and got one, folded from a stream where need be
    COALESCED = "coalesced"  # another call had asked the same just before, and got it in one of these ways
    PASSTHROUGH = "passthrough"  # a route that is relayed unread
    NONE = "none"  # there was no answer


class Status(StrEnum):
    """How a call ended. Every call ends in exactly one of these."""

    __hash__ = str.__hash__

    OK = "ok"
    INCOMPLETE = "incomplete"  # the upstream ended it in form, but with no finish reason
    CLIENT_ERROR = "client_error"
    UPSTREAM_ERROR = "upstream_error"
    CANCELLED = "cancelled"  # the client left
    INTERRUPTED = "interrupted"  # the proxy was told to stop
    REJECTED = "rejected"  # the proxy would not take it now
    INTERNAL_ERROR = "internal_error"  # our own bug


LEFT_STATUS = 499
"""The HTTP status of a call whose client has left, which nobody was told: nginx's name for it."""


def status_of(failure: ProxyError) -> Status:
    """How a call ended that ended with this error. What is over a limit, or unpaid, is no mistake of the request's."""
    if isinstance(failure, UpstreamError):
        return Status.UPSTREAM_ERROR
    if isinstance(failure, OverloadedError) or (isinstance(failure, ClientError) and failure.status in (402, 429)):
        return Status.REJECTED
    return Status.CLIENT_ERROR if isinstance(failure, ClientError) else Status.INTERNAL_ERROR


class Exchange(Protocol):
    """What a call asked and was answered, ready to be stored beside its row (store/content.py)."""

    def row(self, call_id: str) -> tuple[Any, ...]:
        """What is stored of it, for the call with this id."""


class Outcome(NamedTuple):
    """What became of a call: the one record made of it, when it is over."""

    call_id: str
    model: str
    target: Target | None
    mode: Mode
    status: Status
    http_status: int
    attempts: int
    ttft_s: float | None
    duration_s: float
    usage: Usage | None
    error: str | None
    cache_entry: int | None = None
    """The cached answer that it was."""
    purpose: str = ""
    ticket: Ticket | None = None
    answered_model: str | None = None
    """How the answer names the model that gave it."""
    finish_reason: str | None = None
    content: Exchange | None = None
    """What is to be stored of what was said; None where nothing is."""
