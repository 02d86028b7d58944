"""What the document says of the routes of jobs, credits, usage and model groups: as operations.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from proxy.server import accountforms as forms
from proxy.server import jobforms, jobs, modelgroups, shapes
from proxy.server import ledgershapes as shaped
from proxy.server.operations import (
    CALL,
    CSV,
    EVENTS,
    JSON,
    NO_TEAM,
    TOLD,
    Answer,
    Limit,
    Operation,
    Page,
    Wishes,
    made,
    ok,
)

_Number = Annotated[int, Field(ge=1, description="A number: those below it.")]


class _Before(TypedDict, total=False):
    limit: Limit
    before: _Number


class _JobsPage(TypedDict, total=False):
    limit: Limit
    before: Annotated[str, Field(description="A job's id: those made before it.")]


class _Period(TypedDict, total=False):
    period: Annotated[str, Field(description="`2026`, `2026-11`, `2026-11-21`, UTC. This month, if left out.")]


class _Amount(TypedDict):
    amount: Annotated[float, Field(ge=0, description="Credits.")]


class _CallsPage(_Before, total=False):
    team: str
    key: str
    job: str


class _UnderWay(TypedDict, total=False):
    limit: Limit
    team: str


_Day = Annotated[str, Field(description="A day as `2026-11-21`, UTC, or Unix seconds.")]
_Report = TypedDict(
    "_Report",
    {
        "group_by": Annotated[str, Field(description="Some of day, team, key, model, target, user, purpose, status.")],
        "from": _Day,
        "to": _Day,
        "team": str,
        "key": str,
        "user": str,
        "format": Literal["json", "csv"],
    },
    total=False,
)
_Idempotent = TypedDict(
    "_Idempotent",
    {"Idempotency-Key": Annotated[str, Field(max_length=255, description="The payment is made once for each.")]},
    total=False,
)

_NO_JOB = "There is no such job of your team: `job_not_found`"
_NO_GROUP = "There is no such group: `model_group_not_found`"
_SPENT = "The credits do not suffice: `insufficient_credits`"
_REUSED = "This Idempotency-Key was another payment's: `idempotency_key_reused`"

_MESSAGES = [{"role": "user", "content": "Hello"}]
_CALL = {"model_group": "demo-stream", "messages": _MESSAGES, "purpose": "greeting"}
_ONE_SHOT = {"model": "demo-stream", "messages": _MESSAGES, "job_type": "greeting", "metadata": {"order": 4711}}
_IN_JOB = (*TOLD, "x-headwater-job")
_WHOLE = {200: Answer("The answer.", {JSON: shaped.JobCompletion}, _IN_JOB)}
_STREAM = {200: Answer("The chunks, an event each, and at last `[DONE]`.", {EVENTS: shapes.ChatChunk}, _IN_JOB)}
_REFUSED = {**CALL, 404: f"{_NO_JOB}. {CALL[404]}. {NO_TEAM}"}
_PAID: Mapping[int | str, str] = {402: _SPENT, 404: NO_TEAM, 422: _REUSED}
_REFUND = {**_PAID, 404: f"{NO_TEAM}. The job that it is for is none of the team's: `job_not_found`"}
_GROUP = {"delivery": "stream", "models": [{"model": "up/model-a"}, {"model": "up/model-b", "priority": 1}]}

LEDGER_OPERATIONS: Mapping[tuple[str, str], Operation] = {
    # -------------------------------------------------------------- jobs
    ("POST", "/api/jobs/create"): Operation(
        made(shaped.Job, "It is there."),
        body=jobforms.JobForm,
        example={"job_type": "summary", "user_id": "ann", "metadata": {"order": 4711}},
        refuses={402: _SPENT, 404: NO_TEAM},
    ),
    ("POST", "/api/jobs/create-and-call"): Operation(
        _WHOLE,
        headers=Wishes,
        body=shaped.OneShotCall,
        example=_ONE_SHOT,
        refuses=_REFUSED,
        speaker=jobs.create_and_call,
    ),
    ("POST", "/api/jobs/create-and-call-stream"): Operation(
        _STREAM,
        headers=Wishes,
        body=shaped.OneShotCall,
        example=_ONE_SHOT,
        refuses=_REFUSED,
        speaker=jobs.create_and_call,
    ),
    ("POST", "/api/jobs/{id}/llm-call"): Operation(
        _WHOLE, headers=Wishes, body=shaped.JobCall, example=_CALL, refuses=_REFUSED, speaker=jobs.call
    ),
    ("POST", "/api/jobs/{id}/llm-call-stream"): Operation(
        _STREAM, headers=Wishes, body=shaped.JobCall, example=_CALL, refuses=_REFUSED, speaker=jobs.call
    ),
    ("GET", "/api/jobs/{id}"): Operation(ok(shaped.JobInFull), refuses={404: _NO_JOB}),
    ("PATCH", "/api/jobs/{id}/metadata"): Operation(
        ok(shaped.Job),
        body=jobforms.MetadataForm,
        example={"metadata": {"step": 2}},
        refuses={404: _NO_JOB},
    ),
    ("GET", "/api/jobs/{id}/costs"): Operation(ok(shaped.JobCosts), refuses={404: _NO_JOB}),
    ("POST", "/api/jobs/{id}/complete"): Operation(
        ok(shaped.EndedJob),
        body=jobforms.EndForm,
        example={"status": "completed", "metadata": {"pages": 3}},
        refuses={404: _NO_JOB, 409: "It has ended otherwise: `job_ended`"},
    ),
    ("GET", "/api/teams/{id}/jobs"): Operation(
        ok(shaped.Jobs), query=_JobsPage, refuses={404: f"{NO_TEAM}, or no such job: `job_not_found`"}
    ),
    # -------------------------------------------------------------- credits and usage of one's own team
    ("GET", "/api/teams/{id}/usage"): Operation(ok(shaped.TeamUsage), query=_Period, refuses={404: NO_TEAM}),
    ("GET", "/api/credits/teams/{id}/balance"): Operation(ok(shaped.Balance), refuses={404: NO_TEAM}),
    ("GET", "/api/credits/teams/{id}/transactions"): Operation(
        ok(shaped.Transactions), query=_Before, refuses={404: NO_TEAM}
    ),
    ("GET", "/api/credits/teams/{id}/check"): Operation(ok(shaped.CreditCheck), query=_Amount, refuses={404: NO_TEAM}),
    ("GET", "/api/model-groups/{name}/resolve"): Operation(ok(shaped.ResolvedGroup), refuses={404: _NO_GROUP}),
    # -------------------------------------------------------------- administrators'
    ("GET", "/admin/credits/teams/{id}"): Operation(ok(shaped.Balance), refuses={404: NO_TEAM}),
    ("GET", "/admin/credits/teams/{id}/transactions"): Operation(
        ok(shaped.Transactions), query=_Before, refuses={404: NO_TEAM}
    ),
    ("POST", "/admin/credits/teams/{id}/add"): Operation(
        ok(shaped.Paid),
        headers=_Idempotent,
        body=forms.Addition,
        example={"amount": 100, "reason": "order 4711"},
        refuses=_PAID,
    ),
    ("POST", "/admin/credits/teams/{id}/adjust"): Operation(
        ok(shaped.Paid),
        headers=_Idempotent,
        body=forms.Adjustment,
        example={"amount": -1.5, "reason": "a mistake"},
        refuses=_PAID,
    ),
    ("POST", "/admin/credits/teams/{id}/refund"): Operation(
        ok(shaped.Paid), headers=_Idempotent, body=forms.Refunding, example={"amount": 0.5}, refuses=_REFUND
    ),
    ("GET", "/admin/credits/teams/{id}/auto-refill"): Operation(ok(shaped.TeamRefill), refuses={404: NO_TEAM}),
    ("PUT", "/admin/credits/teams/{id}/auto-refill"): Operation(
        ok(shaped.SetRefill), body=forms.AutoRefill, example={"amount": 100, "period": "month"}, refuses={404: NO_TEAM}
    ),
    ("DELETE", "/admin/credits/teams/{id}/auto-refill"): Operation(ok(shaped.TeamRefill), refuses={404: NO_TEAM}),
    ("GET", "/admin/usage"): Operation(
        {
            200: Answer(
                "The sums; `text/csv` for `format=csv`, or who accepts that alone.", {JSON: shaped.Usage, CSV: str}
            )
        },
        query=_Report,
        refuses={400: "There are more rows than can be told: `too_many_rows`"},
    ),
    ("GET", "/admin/calls"): Operation(ok(shaped.Calls), query=_CallsPage),
    ("GET", "/admin/calls/under-way"): Operation(ok(shaped.CallsUnderWay), query=_UnderWay),
    ("GET", "/admin/calls/{number}"): Operation(
        ok(shaped.WholeCall),
        refuses={
            404: "There is no such call: `call_not_found`, `not_found`",
            409: "What was said is sealed with a key that the proxy was not given: `content_key_missing`",
            500: "What is stored of it is damaged: `content_damaged`",
        },
    ),
    ("GET", "/admin/model-groups"): Operation(ok(shaped.ModelGroups), query=Page),
    ("POST", "/admin/model-groups"): Operation(
        made(shaped.ModelGroup, "It is there."),
        body=modelgroups.NewGroup,
        example={"name": "chat-fast", **_GROUP},
        refuses={404: NO_TEAM, 409: "Its name is taken: `model_group_exists`"},
    ),
    ("POST", "/admin/model-groups/{name}/activate"): Operation(ok(shaped.ModelGroup), refuses={404: _NO_GROUP}),
    ("POST", "/admin/model-groups/{name}/deactivate"): Operation(ok(shaped.ModelGroup), refuses={404: _NO_GROUP}),
    ("GET", "/admin/model-groups/{name}"): Operation(ok(shaped.ModelGroup), refuses={404: _NO_GROUP}),
    ("PATCH", "/admin/model-groups/{name}"): Operation(
        ok(shaped.ModelGroup),
        body=modelgroups.GroupChanges,
        example=_GROUP,
        refuses={404: f"{_NO_GROUP}. {NO_TEAM}"},
    ),
}
