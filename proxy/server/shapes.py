"""What answers look like in JSON, for the document at /openapi.json: each member of each, and its type.

Nothing checks an answer against these while the proxy runs; the tests do, and fail for a member that is missing here. What
requests look like stands with the faces that read them (accountforms.py), or here where only the proxy's upstreams do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from proxy.policy.capabilities import Topic
from proxy.policy.credits import BudgetMode

# What an upstream says may hold more than is read here.
_OPEN = ConfigDict(extra="allow")

Seconds = Annotated[float, Field(description="Unix seconds (UTC).")]
_Age = Annotated[float, Field(description="Seconds.")]
_Usd = Annotated[float | None, Field(description="US dollars; null is no limit.")]
_PerMinute = Annotated[int | None, Field(description="A minute; null is no limit.")]
_Share = Annotated[float, Field(ge=0, le=1)]


# ------------------------------------------------------------------ errors, lists, probes


@with_config(_OPEN)
class ErrorObject(TypedDict):
    """An upstream's own members, such as `metadata`, are passed on beside these."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(TypedDict):
    """OpenAI's envelope."""

    error: ErrorObject


class _List(TypedDict):
    object: Literal["list"]


class Page(_List):
    total: Annotated[int, Field(description="Of all that fit, those on other pages included.")]


class Health(TypedDict):
    status: Literal["ok"]


class Readiness(TypedDict):
    status: Literal["ready", "draining"]
    in_flight: NotRequired[Annotated[int, Field(description='Calls under way; where auth.mode is "open".')]]


# ------------------------------------------------------------------ chat


@with_config(_OPEN)
class ChatMessage(TypedDict):
    role: str
    content: NotRequired[str | list[Any] | None]


@with_config(_OPEN)
class StreamOptions(TypedDict):
    include_usage: NotRequired[Any]


@with_config(_OPEN)
class ChatRequest(TypedDict):
    """OpenAI's; whatever else it holds goes to the upstream as it came."""

    model: Annotated[str, Field(pattern=r"\S")]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: NotRequired[bool | None]
    stream_options: NotRequired[StreamOptions | None]
    n: NotRequired[Annotated[int, Field(ge=1, le=128)] | None]
    user: NotRequired[Any]


@with_config(_OPEN)
class TokenUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@with_config(_OPEN)
class Choice(TypedDict):
    index: int
    message: ChatMessage
    finish_reason: str | None


@with_config(_OPEN)
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: NotRequired[TokenUsage | None]


@with_config(_OPEN)
class Delta(TypedDict):
    role: NotRequired[str | None]
    content: NotRequired[str | None]


@with_config(_OPEN)
class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    finish_reason: NotRequired[str | None]


@with_config(_OPEN)
class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[TokenUsage | None]


@with_config(_OPEN)
class NamesAModel(TypedDict):
    """The body of any other request of OpenAI's: with a virtual key it must name a model."""

    model: NotRequired[str]


@with_config(_OPEN)
class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    targets: NotRequired[Annotated[list[str], Field(description="What an alias stands for, as upstream/model.")]]


class Models(_List):
    data: list[Model]


# ------------------------------------------------------------------ targets, capabilities


class OfModel(TypedDict):
    name: str
    place: Annotated[int, Field(ge=1, description="The first is asked first.")]
    weight: float | None
    context_tokens: int | None


class LastError(TypedDict):
    code: str
    status: int
    age_s: _Age


class Target(TypedDict):
    target: str
    upstream: str
    model: str
    models: Annotated[list[OfModel], Field(description="The aliases it serves.")]
    circuit: Literal["closed", "open", "half_open"]
    failures_in_a_row: int
    probe_in_s: Annotated[float | None, Field(description="Until it may be asked again; null where it may be.")]
    attempts: int
    failures: int
    last_error: LastError | None


class Targets(_List):
    data: list[Target]


class Fact(TypedDict):
    value: bool
    evidence: str
    age_s: _Age
    is_fresh: bool


class Capability(TypedDict):
    upstream: str
    model: str
    credential: Annotated[str, Field(description="A digest of the key it was learned with.")]
    facts: dict[Topic, Fact]


class Capabilities(_List):
    data: list[Capability]


class ForgottenCapability(TypedDict):
    deleted: Literal[True]
    upstream: str
    model: str


# ------------------------------------------------------------------ the cache


class InMemory(TypedDict):
    entries: int
    bytes: int


class Semantic(TypedDict):
    is_on: bool
    embedder: str | None
    is_ready: bool
    indexed: int
    bytes: int
    threshold: float


class Saved(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    microusd: Annotated[int | None, Field(description="Millionths of a US dollar; null where no price is known.")]
    is_priced_in_full: bool


class SinceStart(TypedDict):
    lookups: int
    exact_hits: int
    semantic_hits: int
    misses: int
    of_these_too_late: int
    of_these_without_a_vector: int
    hit_rate: _Share | None
    verified_right: int
    verified_wrong: int
    saved: Saved


class CacheFigures(TypedDict):
    entries: int
    bytes: int
    in_memory: InMemory
    oldest_at: Seconds | None
    newest_at: Seconds | None
    problem: str | None
    semantic: Semantic
    since_start: SinceStart


class DeletedMany(TypedDict):
    deleted: int


class DeletedEntry(TypedDict):
    deleted: Literal[True]
    id: int


class CacheEntry(TypedDict):
    id: int
    model: str
    target: str
    namespace: str
    scope: Annotated[str, Field(description="A digest of whose answer it is.")]
    question: str | None
    is_found_by_meaning: bool
    bytes: int
    prompt_tokens: int
    completion_tokens: int
    created_at: Seconds
    age_s: _Age
    expires_at: Seconds | None
    used_at: Seconds | None
    hits: int
    verified_right: int
    verified_wrong: int


class CacheEntries(_List):
    data: list[CacheEntry]


class CacheEntryInFull(CacheEntry):
    answer: ChatCompletion


class Candidate(TypedDict):
    id: int
    question: str
    similarity: float
    score: float
    threshold: float
    objections: list[str]
    would_be_served: bool


class Explanation(TypedDict):
    verdict: Literal["off", "miss", "exact", "semantic"]
    why: str
    exact_entry: NotRequired[int | None]
    scope: NotRequired[str]
    question: NotRequired[str | None]
    threshold: NotRequired[float]
    nearest: NotRequired[list[Candidate]]


# ------------------------------------------------------------------ organisations, teams, keys


class Organisation(TypedDict):
    id: str
    name: str
    created_at: Seconds


class Organisations(Page):
    data: list[Organisation]


class _Limited(TypedDict):
    models: Annotated[list[str], Field(description="Patterns: `*` is any text, `?` any character.")]
    created_at: Seconds
    is_suspended: bool
    requests_per_minute: _PerMinute
    tokens_per_minute: _PerMinute
    parallel_calls: Annotated[int | None, Field(description="At a time; null is no limit.")]
    budget_day_usd: _Usd
    budget_month_usd: _Usd
    budget_total_usd: _Usd


class Team(_Limited):
    id: str
    organisation: str
    name: str
    budget_mode: Annotated[BudgetMode | None, Field(description="null where it needs no credits.")]
    credits_per_dollar: float
    tokens_per_credit: int
    rounds_up_credits: bool
    cost_markup_percentage: Annotated[float | None, Field(description="null where the prices say it.")]
    hard_stop: Annotated[bool, Field(description="Whether a stream ends when the credits do.")]


class Teams(Page):
    data: list[Team]


class Key(_Limited):
    id: Annotated[str, Field(description="How the key begins.")]
    team: str
    name: str
    expires_at: Seconds | None
    revoked_at: Seconds | None
    status: Literal["active", "suspended", "expired", "revoked"]


class Keys(Page):
    data: list[Key]


class NewlyMadeKey(Key):
    key: Annotated[str, Field(description="The key itself: told now, and never again.")]
