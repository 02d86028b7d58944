"""Jobs: calls that belong together, and are paid together when their work is done. Each belongs to the team whose key asks.

    POST   /api/jobs/create                          POST  /api/jobs/{id}/llm-call, …/llm-call-stream
    GET    /api/jobs/{id}, /api/jobs/{id}/costs      POST  /api/jobs/create-and-call, …/create-and-call-stream
    PATCH  /api/jobs/{id}/metadata                   POST  /api/jobs/{id}/complete
    GET    /api/teams/{id}/jobs

A call of a job is an OpenAI call with a few members more, and goes the way of all calls (openai.py): through the door. Whatever
text stands for an id that no job of the team has, the answer is 404.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage

from proxy.answers import Seat
from proxy.chat import ChatRequest, Identity, Mode, Status
from proxy.policy.credits import MICRO, job_cost
from proxy.server import jobforms as forms
from proxy.server.accounting import Entry
from proxy.server.accounts import form_of
from proxy.server.auth import check_team
from proxy.server.door import Later, Way
from proxy.server.downstream import Downstream, json_response
from proxy.server.middleware import VISIT, Visit
from proxy.server.openai import JOB, PURPOSE, enter_job, misplaced, prepared
from proxy.server.queries import check_names, page_size
from proxy.server.state import STATE, State
from proxy.store.calls import CallRow
from proxy.store.jobs import Job, JobState, NewJob
from proxy.wire.encoding import dumps, loads
from proxy.wire.usage import read_usage

_CALL_PATH = re.compile(r"/api/jobs/([^/]+)/llm-call(-stream)?")
_ONE_SHOT_PATH = "/api/jobs/create-and-call"

# What a stream that is a job begins with.
_OPENING = b": keepalive\n\n"

_MAX_CALLS = 1000


def routes() -> list[web.RouteDef]:
    """aiohttp's of all these."""
    return [
        web.post("/api/jobs/create", create),
        web.post(_ONE_SHOT_PATH, misplaced),
        web.post(f"{_ONE_SHOT_PATH}-stream", misplaced),
        web.get("/api/jobs/{id:[^/]+}", get),
        web.patch("/api/jobs/{id:[^/]+}/metadata", add_metadata),
        web.get("/api/jobs/{id:[^/]+}/costs", costs),
        web.post("/api/jobs/{id:[^/]+}/complete", complete),
        web.post("/api/jobs/{id:[^/]+}/llm-call", misplaced),
        web.post("/api/jobs/{id:[^/]+}/llm-call-stream", misplaced),
        web.get("/api/teams/{id:[^/]+}/jobs", list_jobs),
    ]


def ways() -> list[Way]:
    """The door's."""
    return [
        Way("POST", _CALL_PATH, call),
        Way("POST", _ONE_SHOT_PATH, create_and_call),
        Way("POST", f"{_ONE_SHOT_PATH}-stream", create_and_call),
    ]


# ---------------------------------------------------------------------- jobs


async def create(request: web.Request) -> web.StreamResponse:
    """POST /api/jobs/create: make one, of `job_type`, and `metadata`, `user_id`, `team_id`. CreditsSpentError (402)."""
    state, identity = request.app[STATE], request[VISIT].identity
    form = await form_of(request, forms.JobForm)
    check_team(identity, form.get("team_id"))
    job = await state.ledger.create_job(_new_job(state, identity, form))
    return json_response(_view(job), 201)


async def get(request: web.Request) -> web.StreamResponse:
    """GET /api/jobs/{id}: how it stands."""
    job = await _job(request)
    models = await request.app[STATE].ledger.job_models(job.team, job.id)
    return json_response({**_view(job), "model_groups_used": models})


async def add_metadata(request: web.Request) -> web.StreamResponse:
    """PATCH /api/jobs/{id}/metadata: `metadata`, whose members replace those with the same names."""
    form = await form_of(request, forms.MetadataForm)
    team, job_id = _named(request)
    return json_response(_view(await request.app[STATE].ledger.add_job_metadata(team, job_id, form["metadata"])))


async def costs(request: web.Request) -> web.StreamResponse:
    """GET /api/jobs/{id}/costs: what it took until now."""
    job = await _job(request)
    return json_response({"job_id": job.id, "team_id": job.team, "status": job.state, **_costs(job)})


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /api/jobs/{id}/complete: `status` is how it ends; and `metadata`, `error_message`. Again, it changes nothing."""
    state = request.app[STATE]
    form = await form_of(request, forms.EndForm)
    team, job_id = _named(request)
    await state.accounting.answered(team, job_id)
    job = await state.ledger.end_job(
        *(team, job_id, JobState(form["status"]), time.time()),
        rounds_up=state.accounts.team(team).rounds_up,
        metadata=form.get("metadata"),
        error=form.get("error_message"),
    )
    calls = await state.ledger.calls(team=team, job=job.id, limit=_MAX_CALLS)
    shown = [_call_view(row) for row in reversed(calls.rows)]
    models = await state.ledger.job_models(team, job.id)
    return json_response({**_view(job), "model_groups_used": models, "costs": _costs(job), "calls": shown})


async def list_jobs(request: web.Request) -> web.StreamResponse:
    """GET /api/teams/{id}/jobs: the newest first, `limit` of those before the job `before`."""
    ledger, team = request.app[STATE].ledger, request[VISIT].identity.team
    check_team(request[VISIT].identity, request.match_info["id"])
    check_names(request.query, ("limit", "before"))
    limit = page_size(request.query)
    # A number of the ledger's would tell how many jobs others have.
    before = request.query.get("before")
    number = None if before is None else (await ledger.job(team, before)).number
    jobs, total = await ledger.jobs(team, number, limit)
    return json_response({"object": "list", "data": [_view(job) for job in jobs], "total": total})


async def _job(request: web.Request) -> Job:
    """The job that the path names, with all calls whose answers have come to their end."""
    state = request.app[STATE]
    team, job_id = _named(request)
    await state.accounting.answered(team, job_id)
    return await state.ledger.job(team, job_id)


def _named(request: web.Request) -> tuple[str, str]:
    return request[VISIT].identity.team, request.match_info["id"]


def _new_job(state: State, identity: Identity, form: forms.JobForm | forms.OneShotForm) -> NewJob:
    terms = state.accounts.team(identity.team).terms
    return NewJob(
        id=str(uuid4()),
        team=identity.team,
        created_at=time.time(),
        type=form.get("job_type") or "",
        key=identity.key or None,
        user=form.get("user_id") or "",
        metadata=form.get("metadata") or {},
        hold_microcredits=0 if terms is None else job_cost(terms, 0),
    )


# ---------------------------------------------------------------------- calls


def call(state: State, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> Later:
    """POST /api/jobs/{id}/llm-call, /api/jobs/{id}/llm-call-stream: a call of a job."""
    found = _CALL_PATH.fullmatch(message.url.path_safe)
    assert found is not None
    given, chat = forms.parse_call(body, forms.CallForm, stream=found[2] is not None)
    entry, start = _prepared(state, visit, message, given, chat, found[1])

    async def run() -> None:
        await enter_job(visit, entry)
        _deliver(state, start(), chat, down, visit)

    return run


def create_and_call(state: State, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> Later:
    """POST /api/jobs/create-and-call, /api/jobs/create-and-call-stream: a job for one call, which ends when the call ends."""
    stream = message.url.path.rstrip("/").endswith("-stream")
    given, chat = forms.parse_call(body, forms.OneShotForm, stream=stream)
    new = _new_job(state, visit.identity, given)
    entry, start = _prepared(state, visit, message, given, chat, new.id)

    async def run() -> None:
        await entry.create_job(new)
        visit.headers[JOB] = new.id
        _deliver(state, start(), chat, down, visit, _OPENING)

    return run


def _prepared(
    state: State, visit: Visit, message: RawRequestMessage, form: forms.CallForm, chat: ChatRequest, job: str
) -> tuple[Entry, Callable[[], Seat]]:
    """A call of a job that may be made: its entry, and what starts it."""
    user = chat.body.get("user") if form.get("user_id") is None else form.get("user_id")
    purpose = form.get("purpose") or message.headers.get(PURPOSE) or ""
    visit.entry = entry = state.accounting.entry(
        visit.identity, visit.id, chat.model, user=user, job=job, purpose=purpose
    )
    check_team(visit.identity, form.get("team_id"))
    return entry, prepared(state, visit, entry, message.headers, chat)


def _deliver(state: State, seat: Seat, chat: ChatRequest, down: Downstream, visit: Visit, opening: bytes = b"") -> None:
    if chat.wants_stream:
        down.stream(seat, wants_usage=chat.wants_usage, opening=opening)
    else:
        down.whole(seat, partial(_shaped, state, visit, chat.model, seat))


def _shaped(state: State, visit: Visit, model: str, seat: Seat, whole: bytes) -> bytes:
    """A completion, with what those read who do not know OpenAI's form.

    Behind all other members, which stay as they are: of two with the same name the last counts.
    """
    assert seat.call is not None
    completion = loads(whole)
    choices = completion.get("choices")
    first = choices[0] if choices else {}
    message, usage = first.get("message"), read_usage(completion)
    members = {
        "call_id": visit.id,
        "job_id": visit.headers[JOB],
        "response": {
            "content": _in_words(message.get("content") if isinstance(message, dict) else first.get("text")),
            "finish_reason": _in_words(first.get("finish_reason")),
        },
        "metadata": {
            "tokens_used": None if usage is None else usage.prompt + usage.completion,
            "latency_ms": round((state.now() - seat.call.started) * 1000),
            "model_group": model,
        },
    }
    return whole.rstrip()[:-1] + b"," + dumps(members)[1:]


def _in_words(said: object) -> str | None:
    """A text, or the texts of what is said in parts; None for anything else."""
    if isinstance(said, list):
        texts = [part.get("text") for part in said if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return said if isinstance(said, str) else None


# ---------------------------------------------------------------------- what is shown


def _view(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "team_id": job.team,
        "user_id": job.user or None,
        "job_type": job.type,
        "status": job.state,
        "metadata": job.metadata,
        "error_message": job.error,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "completed_at": job.ended_at,
    }


def _costs(job: Job) -> dict[str, Any]:
    """What a job took until now. What upstreams ask for it is not for its team."""
    sums = job.sums
    return {
        "total_calls": sums.calls,
        "successful_calls": sums.calls - sums.failed_calls,
        "failed_calls": sums.failed_calls,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "total_tokens": sums.prompt_tokens + sums.completion_tokens,
        "cached_tokens": sums.cached_tokens,
        "reasoning_tokens": sums.reasoning_tokens,
        # What is unknown is not nothing.
        "total_cost_usd": None if sums.unpriced_calls and not sums.price_microusd else sums.price_microusd / MICRO,
        "unpriced_calls": sums.unpriced_calls,
        "credits_held": job.held_microcredits / MICRO,
        "credits_charged": job.charged_microcredits / MICRO,
    }


def _call_view(row: CallRow) -> dict[str, Any]:
    tokens = None if row.prompt_tokens is None else row.prompt_tokens + (row.completion_tokens or 0)
    return {
        "call_id": row.id,
        "status": row.status,
        "model_group": row.model,
        "purpose": row.purpose or None,
        "user_id": row.user or None,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "total_tokens": tokens,
        "is_estimated": row.is_estimated,
        "cost_usd": None if row.price_microusd is None else row.price_microusd / MICRO,
        "cache_hit": row.mode is Mode.REPLAY,
        "finish_reason": row.finish_reason,
        "error": row.error if row.status is not Status.OK else None,
        "ttft_ms": row.ttft_ms,
        "latency_ms": row.duration_ms,
        "created_at": row.opened_at,
        "completed_at": row.closed_at,
    }
