"""Virtual keys: whole calls of several teams, whose keys are made, suspended and revoked while the proxy runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from yarl import URL

from tests.conftest import UPSTREAM_KEY, Proxy, Start
from tests.fakes.caching import fate
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Wire,
    answer,
    finish,
    role,
    stream,
    text,
    usage,
)
from tests.server.test_auth import KEYS, admin, made_key
from tests.waiting import until

HELLO = stream(role(), text("Hello"), finish(), usage())
UP_KEY = '\napi_key_env = "UP_KEY"'
_MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
_LONG = 30
_ROOT = Path(__file__).parents[2]


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """A proxy with two teams; the tests of it bring their keys."""
    proxy = await start(
        auth=KEYS, cache={"exact": True, "semantic": False}, streaming={"resume_window_s": 60}, more=UP_KEY
    )
    for team in ("alpha", "beta"):
        assert (await admin(proxy, "POST", "/teams", {"id": team}))[0] == 201
    return proxy


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def program(proxy: Proxy, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=proxy.base, api_key=key, max_retries=0) as client:
        yield client


async def says(client: openai.AsyncOpenAI, model: str = "model-a") -> str:
    """What becomes of a call by the official client: what it hears, or the error's class and code."""
    try:
        completion = await client.chat.completions.create(model=model, messages=_MESSAGES)
    except openai.APIStatusError as error:
        return f"{type(error).__name__} {error.code}"
    return completion.choices[0].message.content or ""


async def test_the_official_client_works_with_a_key_and_is_told_what_is_wrong_with_it(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    upstream.plays(HELLO)
    made = await made_key(proxy, team="alpha", models=["model-*"])
    path = f"/keys/{made['id']}"
    async with program(proxy, made["key"]) as client:
        assert await says(client) == "Hello"
        chunks = await client.chat.completions.create(model="model-b", messages=_MESSAGES, stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices]
        assert "".join(said) == "Hello"
        assert await says(client, "gpt-4o") == "PermissionDeniedError model_not_allowed"
        assert await says(client, "no-such-model") == "PermissionDeniedError model_not_allowed"
        for method, change, fields, expected in (
            ("POST", f"{path}/suspend", None, "PermissionDeniedError key_suspended"),
            ("POST", f"{path}/resume", None, "Hello"),
            ("POST", "/teams/alpha/suspend", None, "PermissionDeniedError team_suspended"),
            ("POST", "/teams/alpha/resume", None, "Hello"),
            ("PATCH", "/teams/alpha", {"models": ["gpt-*"]}, "PermissionDeniedError model_not_allowed"),
            ("PATCH", "/teams/alpha", {"models": ["*"]}, "Hello"),
            ("PATCH", path, {"expires_at": 1}, "PermissionDeniedError key_expired"),
            ("PATCH", path, {"expires_at": None}, "Hello"),
            ("POST", f"{path}/revoke", None, "AuthenticationError invalid_api_key"),
        ):
            assert (await admin(proxy, method, change, fields))[0] == 200
            assert await says(client) == expected, change
    for wrong in ("sk-wrong", made["key"][:-1], made["id"]):
        async with program(proxy, wrong) as client:
            assert await says(client) == "AuthenticationError invalid_api_key"


async def test_another_process_revokes_a_key_while_the_proxy_runs(
    upstream: FakeUpstream, proxy: Proxy, tmp_path: Path
) -> None:
    upstream.plays(HELLO)
    key, other = [(await made_key(proxy, team="alpha"))["key"] for _ in range(2)]
    async with program(proxy, key) as client, program(proxy, other) as neighbour:
        assert await says(client) == "Hello"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "keys", "revoke", key),
            cwd=tmp_path,
            env={"PYTHONPATH": str(_ROOT), "HEADWATER_STORE__PATH": str(tmp_path / "headwater.db")},
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await asyncio.wait_for(process.wait(), _LONG) == 0
        await until(lambda: says(client), lambda said: said == "AuthenticationError invalid_api_key")
        assert await says(neighbour) == "Hello"


async def test_an_answer_under_way_may_end_when_its_key_is_revoked(upstream: FakeUpstream, proxy: Proxy) -> None:
    made = await made_key(proxy, team="alpha")
    go_on = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hel"))
        await go_on.wait()
        await wire.chunk(text("lo") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with proxy.chat(stream=True, headers=bearer(made["key"])) as response:
        await response.content.readuntil(b"Hel")
        await admin(proxy, "POST", f"/keys/{made['id']}/revoke")
        async with proxy.chat(headers=bearer(made["key"])) as other:
            assert other.status == 401
        go_on.set()
        assert (await response.read()).endswith(DONE)


async def test_no_key_passes_the_proxy_in_either_direction(upstream: FakeUpstream, proxy: Proxy) -> None:
    key = (await made_key(proxy, team="alpha"))["key"]
    upstream.plays(answer({"object": "list", "data": []}), HELLO, HELLO, answer({"data": []}))
    seen = ""
    for headers in (bearer(key), {"api-key": key}, {"x-api-key": key, "Authorization": "Basic dTpw"}):
        async with proxy.chat(headers=headers, stream=True, user=str(headers)) as response:
            seen += str(response.headers) + await response.text()
        async with proxy.post("/embeddings", {"model": "model-a", "input": "x"}, headers=headers) as response:
            seen += str(response.headers) + await response.text()
    async with proxy.get("/v1/models", headers=bearer(key)) as response:
        seen += await response.text()
    assert UPSTREAM_KEY not in seen
    assert upstream.requests
    for request in upstream.requests:
        assert request.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert key not in f"{request.path} {request.headers}"
        assert "dTpw" not in str(request.headers)


_ACCOUNT = {
    "x_ratelimit_limit_requests": "1000",
    "x_ratelimit_remaining_requests": "998",
    "anthropic_ratelimit_tokens_remaining": "77",
    "openai_organization": "org-of-the-operator",
}


@pytest.mark.parametrize("limits", [{}, {"requests_per_minute": 9}])
async def test_a_team_is_told_what_is_left_to_itself_and_not_to_all(
    upstream: FakeUpstream, proxy: Proxy, limits: dict[str, int]
) -> None:
    """They share the operator's account at the upstream: what of it is left tells what others have taken."""
    own = [str(limit) for limit in limits.values()]
    headers = bearer((await made_key(proxy, team="alpha", **limits))["key"])

    async def told(path: str, **members: Any) -> None:
        async with proxy.post(
            path, {"model": "model-a", "messages": _MESSAGES, **members}, headers=headers
        ) as response:
            assert response.status == 200
            assert await response.read()
            assert response.headers["openai-processing-ms"] == "17"
            assert response.headers.getall("x-ratelimit-limit-requests", []) == own
            assert not set(response.headers.values()) & set(_ACCOUNT.values())

    upstream.plays(answer(COMPLETION, 200, "application/json", openai_processing_ms="17", **_ACCOUNT))
    await told("/chat/completions", seed=1)
    await told("/chat/completions", seed=2, stream=True)
    await told("/embeddings", input="Hi")


async def test_nothing_tells_a_team_how_much_others_ask(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    alpha, beta = [bearer((await made_key(proxy, team=team))["key"]) for team in ("alpha", "beta")]
    found = []
    for other in range(3):
        async with proxy.chat(headers=beta, seed=other) as response:
            await response.read()
        await until(partial(fate, proxy, alpha, seed=other), lambda found: found == "hit; exact")
        async with proxy.chat(headers=alpha, seed=other) as response:
            assert response.headers["x-cache"] == "hit; exact"
            assert "x-cache-entry" not in response.headers
            found.append(int(response.headers["x-request-id"].replace("-", ""), 16))
    steps = {found[1] - found[0], found[2] - found[1]}
    assert all(abs(step) > 2**40 for step in steps), "no call's id is near that of the one before it"


async def test_a_team_shares_its_answers_and_nobody_elses(upstream: FakeUpstream, proxy: Proxy) -> None:
    """The cache, answers under way, and streams that are read again."""
    upstream.plays(HELLO)
    mine, too, other = [bearer((await made_key(proxy, team=team))["key"]) for team in ("alpha", "alpha", "beta")]
    assert await fate(proxy, mine) == "miss"
    await has_kept_for_admin(proxy, 1)
    assert [await fate(proxy, headers) for headers in (too, other)] == ["hit; exact", "miss"]

    async with proxy.chat(headers=mine, stream=True) as response:
        name = response.headers["x-headwater-stream"]
        assert b"Hello" in await response.read()
    for headers, expected in ((mine, 200), (too, 200), (other, 404), ({}, 401)):
        async with proxy.get(f"/v1/streams/{name}", headers=headers) as response:
            assert response.status == expected
            assert (b"Hello" in await response.read()) == (expected == 200)


async def has_kept_for_admin(proxy: Proxy, entries: int) -> None:
    """Wait until there are that many entries in the cache."""
    await until(lambda: admin(proxy, "GET", "/cache"), lambda found: found[1]["entries"] == entries)


async def test_calls_of_two_teams_never_wait_at_one_answer(upstream: FakeUpstream, proxy: Proxy) -> None:
    mine, too, other = [bearer((await made_key(proxy, team=team))["key"]) for team in ("alpha", "alpha", "beta")]
    go_on, asked = asyncio.Event(), asyncio.Semaphore(0)

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        asked.release()
        await go_on.wait()
        await wire.chunk(finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with (
        proxy.chat(headers=mine, stream=True) as one,
        proxy.chat(headers=too, stream=True) as two,
        proxy.chat(headers=other, stream=True) as three,
    ):
        async with asyncio.timeout(_LONG):
            await asked.acquire()
            await asked.acquire()
        go_on.set()
        for response in (one, two, three):
            assert (await response.read()).endswith(DONE)
    modes = [(await proxy.ledger.next())["mode"] for _ in range(3)]
    assert sorted(modes) == ["coalesced", "relay", "relay"]


async def test_with_a_key_only_what_names_a_model_is_passed_on(upstream: FakeUpstream, proxy: Proxy) -> None:
    """What the account at the upstream holds belongs to all teams alike."""
    headers = bearer((await made_key(proxy, team="alpha", models=["model-a"]))["key"])
    upstream.plays(answer({"data": []}))
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n'
    loose, file = form.replace(b"; name", b";NAME"), form.replace(b"name=", b'name="file"; filename=')
    forms = {"Content-Type": "multipart/form-data; boundary=x", **headers}
    named = form % b"model-a" + b"--x--\r\n"
    tries: list[tuple[str, str, dict[str, str], bytes | None, int | str]] = [
        ("POST", "/embeddings", headers, b'{"model": "model-a"}', 200),
        ("POST", "/embeddings", headers, b'{"model": "model-b"}', "model_not_allowed"),
        ("POST", "/embeddings", headers, b"{}", "model_required"),
        ("POST", "/audio/transcriptions", forms, named, 200),
        ("POST", "/audio/transcriptions", forms, form % b"model-b" + b"--x--\r\n", "model_not_allowed"),
        ("POST", "/audio/transcriptions", forms, form % b"model-a" + form % b"model-b", "several_models"),
        (
            "POST",
            "/audio/transcriptions",
            forms,
            loose % b"model-a" + form % b"model-b" + b"--x--\r\n",
            "several_models",
        ),
        *(
            (
                "POST",
                "/audio/transcriptions",
                forms,
                form.replace(b'name="model"', other) % b"model-b" + named,
                "several_models",
            )
            for other in (b"name*=utf-8''mod%%65l", b"name*0=mo; name*1=del", b'name="mo\\del"', b"name = model")
        ),
        ("POST", "/audio/transcriptions", forms, form % b"model-a" + file + b"--x--\r\n", 200),
        ("POST", "/embeddings", headers, b'{"model": "model-a", "MODEL": "model-b"}', "several_models"),
        ("POST", "/files", headers, b"whatever", "model_required"),
        ("POST", "/files", forms, form % b"model-a" + b"--x--\r\n", "model_required"),
        ("POST", "//Batches", headers, b'{"model": "model-a"}', "model_required"),
        # What these give out opens the account to whoever has it.
        ("POST", "/realtime/sessions", headers, b'{"model": "model-a"}', "model_required"),
        ("POST", "/chatkit/sessions", headers, b'{"model": "model-a"}', "model_required"),
        ("GET", "/files", headers, None, "model_required"),
        ("GET", "/batches?limit=9", headers, b'{"model": "model-a"}', "model_required"),
        ("GET", "/chat/completions", headers, None, "model_required"),
        ("DELETE", "/responses/resp_1", headers, b'{"model": "model-a"}', "model_required"),
    ]
    passed = 0
    for method, path, given, body, expected in tries:
        async with proxy.client.request(method, proxy.base + path, headers=given, data=body) as response:
            found: int | str = response.status
            if response.status != 200:
                assert response.status in (400, 403)
                found = (await response.json())["error"]["code"]
        assert found == expected, (method, path)
        passed += expected == 200
    assert len([request for request in upstream.requests if request.path != "/v1/models"]) == passed


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_with_a_key_nobody_chooses_the_account_at_the_upstream(
    upstream: FakeUpstream, proxy: Proxy, path: str
) -> None:
    """Who names an organization that the credential has no part in is answered 401, which would speak against the credential."""
    headers = bearer((await made_key(proxy, team="alpha"))["key"])
    chosen = {"OpenAI-Organization": "org-1", "OpenAI-Project": "proj_1", "X-Goog-User-Project": "p"}
    upstream.plays(answer())

    body = {"model": "model-a", "messages": _MESSAGES, "input": "Hi"}
    async with proxy.post(path, body, headers={**headers, **chosen, "OpenAI-Beta": "x"}) as response:
        assert response.status == 200

    sent = next(request.headers for request in upstream.requests if request.path == f"/v1{path}")
    assert sent["openai-beta"] == "x"
    assert not {name.lower() for name in chosen} & sent.keys()


@pytest.mark.parametrize("auth", [KEYS, {"mode": "open"}], ids=lambda auth: str(auth["mode"]))
async def test_a_chat_by_another_spelling_is_that_or_nothing(
    upstream: FakeUpstream, start: Start, auth: dict[str, str]
) -> None:
    """Some upstreams take it for a chat request, and for the usage of a stream that is passed on unread nobody asks."""
    proxy = await start(auth=auth)
    headers = bearer((await made_key(proxy))["key"]) if auth is KEYS else {}
    body = {"model": "model-a", "messages": _MESSAGES, "stream": True}
    for path in ("/Chat/Completions", "/chat/./completions", "/chat/%2e/completions", "/chat/completions/."):
        async with proxy.client.post(URL(proxy.base + path, encoded=True), json=body, headers=headers) as response:
            assert response.status == 404, path
            assert (await response.json())["error"]["code"] == "not_found"
    assert upstream.requests == []
    slips = ("//chat/completions", "/chat//completions", "/chat/completions/", "/chat/completions%2f//")
    for number, path in enumerate(slips):
        url = URL(proxy.base + path, encoded=True)
        async with proxy.client.post(url, json={**body, "seed": number}, headers=headers) as response:
            assert response.status == 200, path
            assert response.headers["x-headwater-target"] == "up/model-a"
            await response.read()
    assert [request.path for request in upstream.requests] == ["/v1/chat/completions"] * len(slips)


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_an_upstream_reads_the_model_that_was_allowed(upstream: FakeUpstream, proxy: Proxy, path: str) -> None:
    """Whichever of several members it takes."""
    headers = bearer((await made_key(proxy, team="alpha", models=["model-a"]))["key"])
    rest = b'"messages": [{"role": "user", "content": "Hi"}]'
    for body, expected in (
        (b'{"model": "model-b", "model": "model-a", %b}' % rest, 200),
        (b'{"mod\\u0065l": "model-b", "model": "model-a", %b}' % rest, 200),
        (b'{"model": "model-a", "x": {"model": 1}, %b}' % rest, 200),
        (b'{"model": "model-a", "Model": "model-b", %b}' % rest, 400),
        (b'{"model": "model-a", "model": "model-b", %b}' % rest, 403),
    ):
        upstream.plays(HELLO)
        before = len(upstream.requests)
        async with proxy.post(path, body, headers=headers) as response:
            assert response.status == expected, body
        sent = upstream.requests[before:]
        assert len(sent) <= (expected == 200)
        assert all(b"model-b" not in request.body for request in sent)


async def test_a_key_lists_the_models_it_may_ask_for(start: Start) -> None:
    proxy = await start(auth=KEYS, more='\n[[model]]\nname = "fast"\ntargets = ["up/model-a"]\n')
    headers = bearer((await made_key(proxy, models=["*-b", "fast"]))["key"])
    async with proxy.get("/v1/models", headers=headers) as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["fast", "model-b"]
    for name, expected in (("model-b", 200), ("model-a", 404), ("no-such", 404)):
        async with proxy.get(f"/v1/models/{name}", headers=headers) as response:
            assert response.status == expected


async def test_an_administrator_sees_what_a_teams_question_finds(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(HELLO)
    assert await fate(proxy, bearer((await made_key(proxy, team="alpha"))["key"])) == "miss"
    await has_kept_for_admin(proxy, 1)
    body: dict[str, Any] = {"model": "model-a", "messages": _MESSAGES}
    for team, expected in (("alpha", "exact"), ("beta", "miss")):
        assert (await admin(proxy, "POST", f"/cache/explain?team={team}", body))[1]["verdict"] == expected
    assert (await admin(proxy, "POST", "/cache/explain?team=no", body))[0] == 404
