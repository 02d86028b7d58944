"""What answers about jobs, credits, usage and model groups look like, and the bodies of calls in jobs: as shapes.py.

Credits and US dollars are numbers with up to six decimals.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from proxy.chat import CacheTier, Mode, Recovery, Status
from proxy.policy.credits import BudgetMode
from proxy.server.shapes import ChatCompletion, ChatMessage, Page, Seconds, StreamOptions
from proxy.store.credits import RefillPeriod, TransactionKind
from proxy.store.jobs import JobState

_Usd = Annotated[float | None, Field(description="US dollars; null where the price is unknown.")]
_Ms = Annotated[float | None, Field(description="Milliseconds.")]
_Nullable = Annotated[int | None, Field(description="null where nobody counted them.")]

# ------------------------------------------------------------------ jobs


class Job(TypedDict):
    job_id: str
    team_id: str
    user_id: str | None
    job_type: str
    status: JobState
    metadata: dict[str, Any]
    error_message: str | None
    created_at: Seconds
    started_at: Seconds | None
    completed_at: Seconds | None


class JobInFull(Job):
    model_groups_used: list[str]


class Jobs(Page):
    data: list[Job]


class Costs(TypedDict):
    total_calls: int
    successful_calls: int
    failed_calls: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    total_cost_usd: _Usd
    unpriced_calls: int
    credits_held: float
    credits_charged: float


class JobCosts(Costs):
    job_id: str
    team_id: str
    status: JobState


class CallOfJob(TypedDict):
    call_id: str
    status: Status
    model_group: str
    purpose: str | None
    user_id: str | None
    prompt_tokens: _Nullable
    completion_tokens: _Nullable
    total_tokens: _Nullable
    is_estimated: bool
    cost_usd: _Usd
    cache_hit: bool
    finish_reason: str | None
    error: str | None
    ttft_ms: _Ms
    latency_ms: _Ms
    created_at: Seconds
    completed_at: Seconds


class EndedJob(JobInFull):
    costs: Costs
    calls: Annotated[list[CallOfJob], Field(description="The last 1,000, the oldest first.")]


@with_config(ConfigDict(extra="allow"))
class JobCall(TypedDict):
    """An OpenAI chat request, with a few members more. `model` and `model_group` are two names for the same."""

    model: NotRequired[str | None]
    model_group: NotRequired[str | None]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream_options: NotRequired[StreamOptions | None]
    n: NotRequired[Annotated[int, Field(ge=1, le=128)] | None]
    purpose: NotRequired[str | None]
    team_id: NotRequired[str | None]
    user_id: NotRequired[str | None]


class OneShotCall(JobCall):
    """As JobCall, and of the job that it is."""

    job_type: NotRequired[Annotated[str, Field(max_length=256)] | None]
    metadata: NotRequired[dict[str, Any] | None]


class Said(TypedDict):
    content: str | None
    finish_reason: str | None


class CallFigures(TypedDict):
    tokens_used: int | None
    latency_ms: int
    model_group: str


class JobCompletion(ChatCompletion):
    """OpenAI's, with the same for those who do not know its form."""

    call_id: str
    job_id: str
    response: Said
    metadata: CallFigures


# ------------------------------------------------------------------ credits


class AutoRefill(TypedDict):
    amount: float
    period: RefillPeriod
    next_at: Seconds


class _Balance(TypedDict):
    team_id: str
    credits_allocated: float
    credits_used: float
    credits_remaining: float
    credits_reserved: float


class Balance(_Balance):
    budget_mode: BudgetMode | None
    credits_per_dollar: float
    tokens_per_credit: int
    rounds_up_credits: bool
    hard_stop: bool
    auto_refill: AutoRefill | None


class Transaction(TypedDict):
    number: int
    transaction_type: TransactionKind
    credits_amount: float
    credits_before: float
    credits_after: float
    job_id: str | None
    call_id: str | None
    reason: str
    created_at: Seconds


class Transactions(Page):
    data: list[Transaction]


class Paid(_Balance):
    transaction: Transaction
    budget_mode: BudgetMode | None
    budget_mode_was_set: Annotated[bool, Field(description="The team had none until now.")]


class TeamRefill(TypedDict):
    team_id: str
    auto_refill: AutoRefill | None


class SetRefill(TeamRefill):
    budget_mode: BudgetMode | None
    budget_mode_was_set: Annotated[bool, Field(description="The team had none until now.")]


class CreditCheck(TypedDict):
    team_id: str
    has_credits: bool
    needs_credits: bool
    credits_remaining: float


# ------------------------------------------------------------------ usage, calls


class _TeamSums(TypedDict):
    calls: int
    failed_calls: int
    unpriced_calls: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    price_usd: _Usd


class UsageOfModel(_TeamSums):
    model: str


class JobCounts(TypedDict):
    pending: int
    in_progress: int
    completed: int
    failed: int
    cancelled: int


class TeamUsage(_TeamSums):
    jobs: Annotated[JobCounts, Field(description="Those created in the period.")]
    team_id: str
    period: str
    starts_at: Seconds
    ends_at: Seconds
    credits_charged: float
    credits_refunded: float
    models: list[UsageOfModel]


class UsageSums(TypedDict):
    calls: int
    failed_calls: int
    unpriced_calls: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    total_tokens: int
    cost_usd: _Usd
    price_usd: _Usd
    credits: float


class UsageRow(UsageSums):
    day: NotRequired[str]
    team: NotRequired[str]
    key: NotRequired[str | None]
    model: NotRequired[str]
    target: NotRequired[str | None]
    user: NotRequired[str]
    purpose: NotRequired[str]
    status: NotRequired[str]


Usage = TypedDict(
    "Usage",
    {
        "object": Literal["usage"],
        "group_by": list[str],
        "from": Annotated[str, Field(description="The first day, UTC.")],
        "to": Annotated[str, Field(description="The last day, UTC.")],
        "data": list[UsageRow],
        "total": UsageSums,
    },
)


class Call(TypedDict):
    number: int
    id: str
    team: str
    key: str | None
    user: str
    job: str | None
    purpose: str
    opened_at: Seconds
    closed_at: Seconds
    model: str
    target: str | None
    answered_model: str | None
    mode: Mode
    status: Status
    http_status: int | None
    error: str | None
    finish_reason: str | None
    attempts: int
    ttft_ms: _Ms
    duration_ms: float
    prompt_tokens: _Nullable
    completion_tokens: _Nullable
    cached_tokens: _Nullable
    reasoning_tokens: _Nullable
    estimated: bool | None
    cost_usd: _Usd
    price_usd: _Usd
    credits: float | None
    overdraft_credits: float | None
    cache_entry: int | None


class StoredText(TypedDict):
    bytes: Annotated[int, Field(description="Of the whole text.")]
    text: NotRequired[str]
    is_cut: NotRequired[bool]
    blake2b_256: NotRequired[str]


class StoredContent(TypedDict):
    form: Literal["full", "hash"]
    key_version: Annotated[int | None, Field(description="Of the key that it is sealed with.")]
    prompt: StoredText
    answer: Annotated[StoredText | None, Field(description="Null where nothing was said.")]


class WholeCall(Call):
    content: Annotated[StoredContent | None, Field(description="Null where nothing is stored.")]


class Calls(Page):
    data: list[Call]
    next: Annotated[int | None, Field(description="What to say in `before` for those that follow.")]


class CallUnderWay(TypedDict):
    id: str
    team: str
    key: str | None
    user: str
    job: str | None
    purpose: str
    opened_at: Seconds
    model: str
    held_credits: float


class CallsUnderWay(Page):
    data: list[CallUnderWay]


# ------------------------------------------------------------------ model groups


class _Asked(TypedDict):
    model: Annotated[str, Field(description="As upstream/model.")]
    weight: float | None
    context_tokens: int | None


class ModelOfGroup(_Asked):
    priority: int


class ModelGroup(TypedDict):
    name: str
    models: list[ModelOfGroup]
    delivery: Literal["stream", "whole"]
    recovery: Recovery | None
    coalesce: bool | None
    cache: CacheTier | None
    cache_ttl_s: float | None
    team_ids: Annotated[list[str] | None, Field(description="Whose it is; null is everybody's.")]
    is_active: bool
    created_at: Seconds
    problems: Annotated[list[str], Field(description="What of it this proxy cannot use, and why.")]


class ModelGroups(Page):
    data: list[ModelGroup]


class ResolvedGroup(TypedDict):
    model_group: str
    primary_model: str
    fallbacks: list[str]
    models: list[_Asked]
