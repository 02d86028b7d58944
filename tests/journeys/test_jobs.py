"""Jobs over HTTP: whole jobs of teams, from their creation to what they cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from yarl import URL

from proxy.chat import Status
from proxy.policy.credits import MICRO, BudgetMode
from proxy.store.account_rows import Team
from proxy.store.accounts import Accounts
from proxy.store.credits import Balance, Cause
from proxy.store.jobs import Job, JobState
from tests.conftest import Proxy, Start, make_settings
from tests.fakes.caching import has_kept
from tests.fakes.client import request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Silence,
    Wire,
    answer,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.server.test_auth import KEYS, admin, made_key
from tests.server.test_downstream import recorded
from tests.store.ledgers import NOW, check_books, starting

HELLO = stream(role(), text("Hello"), finish(), usage())
MESSAGES = [{"role": "user", "content": "Hi"}]
ASKED = {"model": "model-a", "messages": MESSAGES}
PRICE = """
[[price]]
models = ["up/*"]
input_usd_per_million = 1000
output_usd_per_million = 2000
markup_percent = 10
"""
NO_JOB = "0a0a0a0a-0000-4000-8000-000000000000"
_LONG = 20


@dataclass
class Api:
    """What a team does with its key."""

    proxy: Proxy
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return self.proxy.base.removesuffix("/v1")

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer, or the code of an error."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.proxy.client.request(method, self.root + path, data=data, headers=sent) as response:
            value = await response.json()
            return response.status, value["error"]["code"] if "error" in value else value

    async def create(self, **members: Any) -> str:
        status, job = await self("POST", "/api/jobs/create", {"job_type": "test", **members})
        assert (status, job["status"]) == (201, "pending"), job
        job_id: str = job["job_id"]
        return job_id

    async def end(self, job: str, status: str = "completed", **members: Any) -> tuple[int, Any]:
        return await self("POST", f"/api/jobs/{job}/complete", {"status": status, **members})

    def streams(self, path: str, **members: Any) -> Any:
        return self.proxy.client.post(self.root + path, json={**ASKED, **members}, headers=self.headers)


@pytest.fixture
async def api(start: Start) -> Api:
    return Api(await start(more=PRICE))


async def has_credits(start: Start, amount: int, mode: BudgetMode, team: str = "local") -> None:
    """Before the proxy starts: a team pays for its jobs, and has so many credits."""
    async with starting(start.directory / "headwater.db") as process_of:
        process = await process_of()
        accounts = await Accounts.open(process.connection, make_settings(start.directory, start.upstream.url))
        await accounts.change(Team, team, budget_mode=mode)
        await process.ledger.allocate(team, amount * MICRO, Cause(NOW))
        await process.stop()


async def books(start: Start) -> tuple[Balance, list[Job]]:
    """What the file says when all is settled: the account of the local team, and its jobs, the newest first."""
    async with starting(start.directory / "headwater.db") as process_of:
        process = await process_of()
        check_books(start.directory / "headwater.db")
        found = await process.ledger.balance("local"), (await process.ledger.jobs("local")).rows
        await process.stop()
        return found


# ---------------------------------------------------------------------- a whole job


async def test_a_job_is_created_called_and_completed_by_the_official_client(
    start: Start, upstream: FakeUpstream
) -> None:
    proxy = await start(auth=KEYS, more=PRICE)
    assert (await admin(proxy, "POST", "/teams", {"id": "alpha"}))[0] == 201
    key = (await made_key(proxy, team="alpha"))["key"]
    api = Api(proxy, {"x-api-key": key})
    members = {"team_id": "alpha", "job_type": "summary", "metadata": {"doc": 1}, "user_id": "ann"}
    status, job = await api("POST", "/api/jobs/create", members)
    told = {name: job[name] for name in ("team_id", "job_type", "metadata", "user_id", "status", "error_message")}
    assert (status, told) == (201, {**members, "status": "pending", "error_message": None})
    path = f"/api/jobs/{job['job_id']}"
    assert (await api("PATCH", f"{path}/metadata", {"metadata": {"page": 2}}))[1]["metadata"] == {"doc": 1, "page": 2}

    upstream.plays(answer(), HELLO)
    async with openai.AsyncOpenAI(base_url=api.root, api_key=key, max_retries=0) as client:
        whole = await client.post(
            f"{path}/llm-call",
            cast_to=ChatCompletion,
            body={"model_group": "model-a", "messages": MESSAGES, "purpose": "draft", "stream": True},
        )
        assert whole.choices[0].message.content == "Hello there, friend."
        assert whole.usage is not None
        assert whole.usage.total_tokens == 11
        more: dict[str, Any] = {**(whole.model_extra or {}), "metadata": whole.metadata}
        assert more["response"] == {"content": "Hello there, friend.", "finish_reason": "stop"}
        assert (more["metadata"]["tokens_used"], more["metadata"]["model_group"]) == (11, "model-a")
        assert more["metadata"]["latency_ms"] >= 0
        assert more["job_id"] == job["job_id"]
        chunks = await client.post(
            f"{path}/llm-call-stream",
            cast_to=ChatCompletion,
            body={"model": "model-a", "messages": MESSAGES, "user_id": "bob"},
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
        )
        assert chunks.response.headers["x-headwater-job"] == job["job_id"]
        streamed_id = chunks.response.headers["x-request-id"]
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "Hello"

    # 14 tokens in at 1,000 dollars a million, 6 out at 2,000, and a tenth more.
    sums = {"total_calls": 2, "prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20, "total_cost_usd": 0.0286}
    status, costs = await api("GET", f"{path}/costs")
    assert (status, costs["status"], {name: costs[name] for name in sums}) == (200, "in_progress", sums)
    status, ended = await api.end(job["job_id"], metadata={"page": 3})
    assert (status, ended["status"], ended["metadata"]) == (200, "completed", {"doc": 1, "page": 3})
    assert {name: ended["costs"][name] for name in sums} == sums
    calls = [(call["call_id"], call["purpose"], call["user_id"], call["cost_usd"]) for call in ended["calls"]]
    assert calls == [(more["call_id"], "draft", None, 0.0165), (streamed_id, None, "bob", 0.0121)]
    # Completing again says the same again, and changes nothing.
    assert await api.end(job["job_id"], metadata={"page": 4}) == (200, ended)
    status, found = await api("GET", path)
    assert (status, found) == (200, {name: ended[name] for name in found})
    assert found.pop("model_groups_used") == ["model-a"]
    assert await api("GET", "/api/teams/alpha/jobs") == (200, {"object": "list", "data": [found], "total": 1})


async def test_what_a_call_said_is_told_in_words_and_numbers(upstream: FakeUpstream, api: Api) -> None:
    """Mistral's models that think say it in parts: https://docs.mistral.ai/capabilities/reasoning."""
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    upstream.plays(answer({**COMPLETION, "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}))
    status, told = await api("POST", "/api/jobs/create-and-call", ASKED)
    assert (status, told["choices"]) == (200, [choice])
    assert told["response"] == {"content": "Hello", "finish_reason": "stop"}
    assert told["metadata"]["tokens_used"] == 11


async def test_a_slash_too_many_makes_no_stream_of_a_whole_answer(upstream: FakeUpstream, api: Api) -> None:
    upstream.plays(HELLO)
    status, told = await api("POST", "//api/jobs/create-and-call/", ASKED)
    assert (status, told["response"]["content"]) == (200, "Hello")


async def test_jobs_are_listed_the_newest_first_and_in_pieces(api: Api) -> None:
    made = [await api.create() for _ in range(4)]
    found = []
    query = "limit=2"
    for _ in range(3):
        _, jobs = await api("GET", f"/api/teams/local/jobs?{query}")
        assert jobs["total"] == 4
        found += [job["job_id"] for job in jobs["data"]]
        query = f"limit=2&before={found[-1]}"
    assert found == made[::-1]
    for wrong, expected in (("limit=0", 400), ("page=2", 400), ("before=7", 404)):
        assert (await api("GET", f"/api/teams/local/jobs?{wrong}"))[0] == expected


@pytest.mark.parametrize("look", ["costs", "complete"])
async def test_who_looks_at_once_sees_a_call_whose_tokens_are_still_being_counted(
    upstream: FakeUpstream, api: Api, look: str
) -> None:
    """And a client that has its answer need not wait for that."""
    upstream.plays(stream(role(), text("Hello"), finish()))
    job = await api.create()
    async with api.streams(f"/api/jobs/{job}/llm-call-stream") as response:
        assert (await response.read()).endswith(DONE)
    costs = (await api.end(job))[1]["costs"] if look == "complete" else (await api("GET", f"/api/jobs/{job}/costs"))[1]
    assert costs["total_calls"] == 1
    assert costs["total_tokens"] > 1


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize("route", ["llm-call", "llm-call-stream"])
async def test_all_members_of_openais_go_upstream_and_none_of_ours(
    upstream: FakeUpstream, api: Api, route: str
) -> None:
    """Nothing is given a default, and falsehood is no absence (C19)."""
    upstream.plays(HELLO)
    theirs = {
        "temperature": 0,
        "max_tokens": 0,
        "stop": "END",
        "metadata": {"a": "b"},
        "user": "u",
        "n": None,
        "vendor": 1.0,
    }
    ours = {"model_group": "model-a", "purpose": "draft", "user_id": "ann", "team_id": "local"}
    job = await api.create()
    for said in (ASKED, {"messages": MESSAGES}):
        wrong_way = {"stream": route == "llm-call", "stream_options": {"include_usage": True}}
        async with api.streams(f"/api/jobs/{job}/{route}", **theirs, **ours, **wrong_way) as response:
            assert response.status == 200, said
            is_stream = (await response.read()).endswith(DONE)
        assert is_stream is (route == "llm-call-stream")
        sent = upstream.requests[-1].json()
        if is_stream:
            assert (sent.pop("stream"), sent.pop("stream_options")) == (True, {"include_usage": True})
        assert sent == {**ASKED, **theirs}
    raw = b'{ "model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "seed": 1.50 }'
    assert (await api("POST", f"/api/jobs/{job}/llm-call", raw))[0] == 200
    assert upstream.requests[-1].body == raw


async def test_a_whole_answer_keeps_what_it_is_whatever_that_is(upstream: FakeUpstream, api: Api) -> None:
    job = await api.create()
    long = "word " * 30_000
    odd: list[tuple[dict[str, Any], Any]] = [
        ({"vendor": {"x": 1}, "metadata": {"theirs": 1}}, "Hello there, friend."),
        ({"choices": []}, None),
        ({"choices": [{"text": "plain"}]}, "plain"),
        ({"choices": [{"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": []}}]}, None),
        ({"choices": [{"index": 0, "message": {"role": "assistant", "content": long}}]}, long),
    ]
    for change, content in odd:
        upstream.plays(answer(json.dumps({**COMPLETION, **change}).encode() + b"\n "))
        status, whole = await api("POST", f"/api/jobs/{job}/llm-call", ASKED)
        assert (status, whole["response"]["content"], whole["job_id"]) == (200, content, job)
        assert {name: value for name, value in change.items() if name != "metadata"}.items() <= whole.items()


WRONG: list[tuple[str, Any, str | None]] = [
    ("create", b"[]", None),
    ("create", b"{", None),
    ("create", {}, "job_type"),
    ("create", {"job_type": 7}, "job_type"),
    ("create", {"job_type": "a", "metadata": []}, "metadata"),
    ("create", {"job_type": "a", "metadata": {"a": "x" * 65_536}}, "metadata"),
    ("create", b'{"job_type": "a", "metadata": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}", "metadata"),
    ("create", {"job_type": "a", "model": "m"}, "model"),
    ("JOB/complete", {"status": "pending"}, "status"),
    ("JOB/complete", {"status": "completed", "error_message": 1}, "error_message"),
    ("JOB/llm-call", b"[]", None),
    ("JOB/llm-call", {"messages": MESSAGES}, "model"),
    ("JOB/llm-call", {**ASKED, "model_group": "model-b"}, "model_group"),
    ("JOB/llm-call", {**ASKED, "model_group": 7}, "model_group"),
    ("JOB/llm-call", {**ASKED, "purpose": 7}, "purpose"),
    ("JOB/llm-call-stream", {"model": "model-a"}, "messages"),
    ("create-and-call", {**ASKED, "metadata": "x"}, "metadata"),
    ("create-and-call-stream", {"job_type": "a"}, "model"),
]


async def test_what_is_wrong_with_a_body_is_told(api: Api) -> None:
    job = await api.create()
    for path, body, param in WRONG:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with api.proxy.client.post(f"{api.root}/api/jobs/{path.replace('JOB', job)}", data=data) as response:
            assert response.status == 400, (path, body)
            assert (await response.json())["error"]["param"] == param


async def test_metadata_grows_no_longer_than_it_may_be(api: Api) -> None:
    job = await api.create(metadata={"a": "x" * 40_000})
    more = {"b": "x" * 40_000}
    assert await api("PATCH", f"/api/jobs/{job}/metadata", {"metadata": more}) == (400, "metadata_too_large")
    assert await api.end(job, metadata=more) == (400, "metadata_too_large")
    assert (await api("GET", f"/api/jobs/{job}"))[1]["status"] == "pending"


# ---------------------------------------------------------------------- ids


async def test_a_job_of_another_team_is_as_unknown_as_any_text(start: Start) -> None:
    """Whatever stands in the path, no answer is a 500 (C21), and all say the same."""
    proxy = await start(auth=KEYS)
    for team in ("alpha", "beta"):
        assert (await admin(proxy, "POST", "/teams", {"id": team}))[0] == 201
    alpha, beta = [Api(proxy, {"x-api-key": (await made_key(proxy, team=team))["key"]}) for team in ("alpha", "beta")]
    theirs = await alpha.create()
    answers = set()
    for job in (theirs, NO_JOB, "7", "not-a-uuid", "%00", "a%2Fb", "%ff%F0%9F%98%80", "x" * 3000, "..;", "{x}", "%25"):
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/costs", None),
            ("PATCH", "/metadata", {"metadata": {}}),
            ("POST", "/complete", {"status": "completed"}),
            ("POST", "/llm-call", ASKED),
            ("POST", "/llm-call-stream", ASKED),
        ):
            url = f"{beta.root}/api/jobs/{job}{path}"
            data = None if body is None else json.dumps(body).encode()
            async with proxy.client.request(
                method, URL(url, encoded=True), data=data, headers=beta.headers
            ) as response:
                answers.add((response.status, await response.text()))
    assert await beta("POST", "/v1/chat/completions", ASKED, x_headwater_job=theirs) == (404, "job_not_found")
    assert [status for status, _ in answers] == [404]
    for team in ("alpha", "no-such"):
        assert await beta("GET", f"/api/teams/{team}/jobs") == (404, "team_not_found")
        for path in ("create", "create-and-call", f"{theirs}/llm-call"):
            body = {"team_id": team, **({"job_type": "a"} if path == "create" else ASKED)}
            assert await beta("POST", f"/api/jobs/{path}", body) == (404, "team_not_found")
    assert (await alpha("GET", f"/api/jobs/{theirs}/costs"))[1]["total_calls"] == 0


async def test_paths_may_be_encoded_and_other_methods_are_refused(upstream: FakeUpstream, api: Api) -> None:
    upstream.plays(HELLO)
    job = await api.create()
    for path in (
        f"/api/jobs/{job}/llm%2Dcall",
        f"/%61pi/jobs/{job.replace('-', '%2d')}/llm-call",
        "/api/jobs/create%2dand-call",
    ):
        async with api.proxy.client.post(URL(api.root + path, encoded=True), json=ASKED) as response:
            assert response.status == 200, path
    for path in (f"{job}/llm-call", f"{job}/llm-call-stream", f"{job}/complete"):
        assert (await api("PUT", f"/api/jobs/{path}", ASKED))[0] == 405
    assert await api("POST", "/api/jobs//llm-call", ASKED) == (404, "not_found")


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
async def test_an_end_is_final(upstream: FakeUpstream, api: Api, state: str) -> None:
    """C11: no call, and no other end, whoever names the job."""
    job = await api.create()
    first = await api.end(job, state, error_message="why")
    assert (first[0], first[1]["status"], first[1]["error_message"], first[1]["calls"]) == (200, state, "why", [])
    assert await api.end(job, state, error_message="other") == first
    for other in {"completed", "failed", "cancelled"} - {state}:
        assert await api.end(job, other) == (409, "job_ended")
    for route in ("llm-call", "llm-call-stream"):
        assert await api("POST", f"/api/jobs/{job}/{route}", ASKED) == (409, "job_ended")
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        assert await api("POST", path, ASKED, x_headwater_job=job) == (409, "job_ended")
    assert upstream.requests == []
    assert (await api("PATCH", f"/api/jobs/{job}/metadata", {"metadata": {"late": 1}}))[0] == 200


async def test_who_names_a_job_that_takes_no_calls_gets_nothing_that_is_there_already(
    start: Start, upstream: FakeUpstream
) -> None:
    """Neither from the cache nor from another call in flight."""
    api = Api(await start(cache={"exact": True, "semantic": False}))
    opened, ended = await api.create(), await api.create()
    await api.end(ended)
    upstream.plays(answer())
    assert (await api("POST", "/v1/chat/completions", ASKED))[0] == 200
    await has_kept(api.proxy, 1)
    silent = Silence(role())
    upstream.plays(silent)
    other = {**ASKED, "messages": [{"role": "user", "content": "Else"}], "temperature": 0, "stream": True}
    running = asyncio.create_task(api("POST", "/v1/chat/completions", other))
    await silent.is_heard()
    for job, expected in ((NO_JOB, (404, "job_not_found")), (ended, (409, "job_ended"))):
        for body in (ASKED, other):
            assert await api("POST", "/v1/chat/completions", body, x_headwater_job=job) == expected
            assert await api("POST", f"/api/jobs/{job}/llm-call-stream", body) == expected
    running.cancel()
    # A job that is open gets it, and has a call that cost nothing.
    assert (await api("POST", f"/api/jobs/{opened}/llm-call", ASKED))[0] == 200
    assert (await api("GET", f"/api/jobs/{opened}"))[1]["status"] == "in_progress"
    _, done = await api.end(opened)
    assert [(call["cache_hit"], call["cost_usd"]) for call in done["calls"]] == [(True, 0.0)]
    assert len(upstream.requests) == 2


# ---------------------------------------------------------------------- credits


async def test_jobs_have_their_credit_before_they_begin_and_pay_it_once(start: Start, upstream: FakeUpstream) -> None:
    """C9 and C10, with many at a time."""
    await has_credits(start, 3, BudgetMode.JOB_BASED)
    upstream.plays(HELLO)
    api = Api(await start(more=PRICE))
    made = await asyncio.gather(*[api("POST", "/api/jobs/create", {"job_type": "x"}) for _ in range(8)])
    jobs = [job["job_id"] for status, job in made if status == 201]
    assert len(jobs) == 3
    assert {answer for answer in made if answer[0] != 201} == {(402, "insufficient_credits")}
    assert await api("POST", "/api/jobs/create-and-call", ASKED) == (402, "insufficient_credits")
    assert (await api("GET", f"/api/jobs/{jobs[0]}/costs"))[1]["credits_held"] == 1
    for job in jobs:
        assert (await api("POST", f"/api/jobs/{job}/llm-call", ASKED))[0] == 200
    ended = await asyncio.gather(*[api.end(jobs[0]) for _ in range(5)])
    assert all(one == ended[0] for one in ended)
    assert (ended[0][1]["costs"]["credits_charged"], ended[0][1]["costs"]["credits_held"]) == (1, 0)
    assert (await api.end(jobs[1], "failed"))[1]["costs"]["credits_charged"] == 0
    assert (await api("POST", "/api/jobs/create-and-call", ASKED))[0] == 200
    await start.stack.aclose()
    balance, _ = await books(start)
    assert balance == Balance(3 * MICRO, 0, MICRO, 2 * MICRO)


@asynccontextmanager
async def gated(start: Start, upstream: FakeUpstream) -> AsyncIterator[tuple[Api, Silence]]:
    """A team with credits whose upstream says a word and stays silent."""
    await has_credits(start, 2, BudgetMode.CONSUMPTION_TOKENS)
    silent = Silence(role(), text("Hello"))
    upstream.plays(silent)
    yield Api(await start(more=PRICE)), silent


BROKEN = stream(role(), text("Hel"), done=False)

ENDS = {
    "whole": ("create-and-call", HELLO, 200, JobState.COMPLETED),
    "streamed": ("create-and-call-stream", HELLO, 200, JobState.COMPLETED),
    "refused": ("create-and-call-stream", refuse(400), 400, JobState.FAILED),
    "broken": ("create-and-call-stream", BROKEN, 200, JobState.FAILED),
    "unknown": ("create-and-call", HELLO, 404, JobState.FAILED),
}


@pytest.mark.parametrize("how", ENDS)
async def test_a_job_for_one_call_ends_as_its_call_does(start: Start, upstream: FakeUpstream, how: str) -> None:
    """Also when that breaks midway: no job is left open (C11), and only one that completed is paid for."""
    route, play, expected, state = ENDS[how]
    await has_credits(start, 2, BudgetMode.JOB_BASED)
    upstream.plays(play)
    api = Api(await start(streaming={"max_retries": 0}, more='\nmodels = ["model-*"]\n'))
    members = {"job_type": "one", "metadata": {"a": 1}, "user_id": "ann"}
    if how == "unknown":
        members["model"] = "gpt-4o"
    async with api.streams(f"/api/jobs/{route}", **members) as response:
        body = await response.read()
        assert response.status == expected, body
        job = response.headers["x-headwater-job"]
    if how in ("streamed", "broken"):
        assert body.startswith(b": keepalive\n\ndata: {")
        assert body.count(b"keepalive") == 1
        assert body.endswith(DONE) is (how == "streamed")
    if how == "whole":
        assert json.loads(body)["job_id"] == job
    told = (await api("GET", f"/api/jobs/{job}"))[1]
    assert (told["status"], told["job_type"], told["metadata"]) == (state, "one", {"a": 1})
    assert await api("POST", f"/api/jobs/{job}/llm-call", ASKED) == (409, "job_ended")
    assert all(b"job_type" not in request.body for request in upstream.requests)
    await start.stack.aclose()
    balance, _ = await books(start)
    assert (balance.reserved, balance.charged) == (0, MICRO if state is JobState.COMPLETED else 0)


async def test_the_first_words_of_a_jobs_stream_come_before_the_last_are_said(upstream: FakeUpstream, api: Api) -> None:
    """C2, by both routes."""
    job = await api.create()
    for path in (f"/api/jobs/{job}/llm-call-stream", "/api/jobs/create-and-call-stream"):
        heard = asyncio.Event()

        async def play(request: Received, wire: Wire, heard: asyncio.Event = heard) -> None:
            await wire.head(content_type="text/event-stream")
            await wire.chunk(role() + text("Hello"))
            await heard.wait()
            await wire.chunk(finish() + usage() + DONE)
            await wire.end()

        upstream.plays(play)
        async with asyncio.timeout(_LONG), api.streams(path) as response:
            came = b""
            while b"Hello" not in came:
                came += await response.content.readany()
            assert b"[DONE]" not in came
            heard.set()
            assert (await response.content.read()).endswith(DONE)


async def test_who_leaves_a_job_for_one_call_pays_for_what_was_said(start: Start, upstream: FakeUpstream) -> None:
    """C8."""
    async with gated(start, upstream) as (api, silent):
        async with api.streams("/api/jobs/create-and-call-stream") as response:
            await silent.is_heard()
            while b"Hello" not in await response.content.readany():
                pass
            response.close()
        assert (await api.proxy.ledger.next())["status"] == "cancelled"
        await start.stack.aclose()
        balance, [job] = await books(start)
        assert job.state is JobState.COMPLETED
        assert balance.reserved == 0
        assert 0 < balance.charged == job.charged_microcredits


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 50])
async def test_who_leaves_while_a_job_is_created_leaves_none_open(
    start: Start, upstream: FakeUpstream, turns: int
) -> None:
    """And no row is missing, however early that is."""
    await has_credits(start, 2, BudgetMode.JOB_BASED)
    silent = Silence(head=False)
    upstream.plays(silent)
    settings = make_settings(start.directory, upstream.url)
    async with recorded(settings) as (connection, _, outcomes):
        for _ in range(5):
            await asyncio.sleep(0)  # aiohttp's task gets ready for requests
        connection.data_received(request("POST /api/jobs/create-and-call", body=json.dumps(ASKED).encode()))
        for _ in range(turns):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        async with asyncio.timeout(_LONG):
            outcome = await outcomes.get()
        assert (outcome.status, outcome.http_status) == (Status.CANCELLED, 499)
        assert outcome.ticket is not None
        outcome.ticket.settle(outcome)
    balance, jobs = await books(start)
    assert [job.state for job in jobs] in ([], [JobState.CANCELLED])
    assert balance == Balance(2 * MICRO, 2 * MICRO, 0, 0)
