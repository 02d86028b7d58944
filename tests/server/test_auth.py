"""Who may come in: which headers let in, which routes need which key, and what an administrator may do with keys."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.chat import LOCAL, Identity
from proxy.errors import ClientError
from proxy.server.app import make_app
from proxy.server.auth import Auth, caller_of, may_ask
from proxy.server.state import State
from proxy.settings import AuthSettings, Settings
from tests.conftest import ADMIN_KEY, Proxy, Start, examples
from tests.fakes.client import Client, chat, request
from tests.fakes.upstream import FakeUpstream, finish, role, stream, text, usage

HELLO = stream(role(), text("Hello"), finish(), usage())
KEYS = {"mode": "keys", "admin_key_env": "ADMIN_KEY"}
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
async def guarded(start: Start) -> Proxy:
    return await start(auth=KEYS)


async def admin(proxy: Proxy, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """What an administrator is answered."""
    url = proxy.base.removesuffix("/v1") + "/admin" + path
    async with proxy.client.request(method, url, headers=ADMIN, json=body) as response:
        return response.status, await response.json()


async def made_key(proxy: Proxy, **fields: Any) -> dict[str, Any]:
    status, key = await admin(proxy, "POST", "/keys", fields)
    assert status == 201, key
    return cast(dict[str, Any], key)


# ------------------------------------------------------------------ headers


PRESENTED: list[tuple[dict[str, str], str | None]] = [
    ({"Authorization": "Bearer KEY"}, None),
    ({"authorization": "bearer   KEY "}, None),
    ({"api-key": "KEY"}, None),
    ({"X-API-Key": "KEY"}, None),
    ({"Authorization": "Basic dTpw", "x-api-key": "KEY"}, None),
    ({"Authorization": "Bearer KEY", "x-api-key": "sk-wrong"}, None),
    ({}, "missing_api_key"),
    ({"Authorization": "KEY"}, "missing_api_key"),
    ({"Authorization": "Basic KEY"}, "missing_api_key"),
    ({"Authorization": "Bearer"}, "missing_api_key"),
    ({"Authorization": "Bearer sk-wrong", "x-api-key": "KEY"}, "invalid_api_key"),
    ({"x-api-key": "KEYx"}, "invalid_api_key"),
    ({"x-api-key": "Schlüssel"}, "invalid_api_key"),
    ({"x-api-key": ADMIN_KEY}, "invalid_api_key"),
]


async def test_a_key_is_taken_from_each_header_that_programs_send_it_in(upstream: FakeUpstream, guarded: Proxy) -> None:
    upstream.plays(HELLO)
    key = (await made_key(guarded))["key"]
    client = await Client.to(guarded.port)
    asked = 0
    for given_headers, refused in PRESENTED:
        lines = [f"{name}: {value.replace('KEY', key)}" for name, value in given_headers.items()]
        for asking in (chat("Hi", *lines), request("GET /v1/models", *lines)):
            client.send(asking)
            answer = await client.answer()
            if refused is None:
                assert answer.status == 200, (lines, answer.body)
                continue
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-headwater-error-source"] == "client"
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == (refused, "invalid_request_error"), lines
        asked += refused is None
    assert len([got for got in upstream.requests if got.method == "POST"]) == asked
    client.close()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, {"api-key": ""}, {"x-api-key": "\udcff"}])
def test_without_keys_everybody_is_the_team_local_and_shares_with_themselves(headers: dict[str, str]) -> None:
    auth = Auth(Settings(), cast(Any, None))
    assert auth.identify(CIMultiDict(headers)) is LOCAL
    auth.admit_admin(CIMultiDict(headers))
    assert bool(caller_of(LOCAL, headers)) == bool(headers)
    assert may_ask(LOCAL, "any")


@pytest.mark.parametrize(
    ("of_key", "of_team", "model", "expected"),
    [
        (("*",), ("*",), "gpt-4o", True),
        (("gpt-*",), ("*",), "gpt-4o", True),
        (("gpt-*", "o3"), ("o*",), "o3", True),
        (("gpt-*",), ("o*",), "gpt-4o", False),
        (("gpt-*",), ("*",), "openai/gpt-4o", False),
        (("GPT-*",), ("*",), "gpt-4o", False),
        ((), ("*",), "gpt-4o", False),
    ],
)
def test_a_model_must_be_the_keys_and_the_teams(
    of_key: tuple[str, ...], of_team: tuple[str, ...], model: str, *, expected: bool
) -> None:
    assert may_ask(Identity("o", "t", "k", "", of_key, of_team), model) is expected


# ------------------------------------------------------------------ routes


def routes() -> list[tuple[str, str]]:
    """Every route there is: its method, and its path with something in it."""
    app = make_app(cast(State, SimpleNamespace(settings=Settings())))
    found = []
    for route in app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical.replace("{", "").replace("}", "")
        found.append(("PUT" if route.method == "*" else route.method, path))
    return found


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "sk-wrong"}, {"x-api-key": "KEY"}])
async def test_every_route_needs_a_key_but_three(guarded: Proxy, headers: dict[str, str]) -> None:
    """And who has a virtual key is no administrator."""
    key = (await made_key(guarded))["key"]
    presented = {name: value.replace("KEY", key) for name, value in headers.items()}
    let_in = set()
    for method, path in routes():
        url = guarded.base.removesuffix("/v1") + path
        async with guarded.client.request(method, url, headers=presented) as response:
            await response.read()
            if response.status != 401:
                let_in.add(path)
    expected = {"/health", "/ready", "/openapi.json"}
    if headers.get("x-api-key") == "KEY":
        expected |= {path for _, path in routes() if path.startswith(("/v1/", "/api/"))}
    assert let_in == expected


ADMINS: list[tuple[dict[str, Any], dict[str, str], int]] = [
    ({}, {}, 200),
    ({}, {"x-api-key": "anything"}, 200),
    ({"admin_key_env": "ADMIN_KEY"}, {}, 401),
    ({"admin_key_env": "ADMIN_KEY"}, {"x-api-key": ADMIN_KEY[:-1]}, 401),
    ({"admin_key_env": "ADMIN_KEY"}, {"x-api-key": ADMIN_KEY}, 200),
    ({"admin_key_env": "ADMIN_KEY"}, {"Authorization": "Bearer of-a-client", "api-key": ADMIN_KEY}, 200),
    ({"mode": "keys"}, {}, 403),
    ({"mode": "keys"}, {"x-api-key": ADMIN_KEY}, 403),
    (KEYS, {}, 401),
    (KEYS, ADMIN, 200),
]


@pytest.mark.parametrize(("auth", "headers", "expected"), ADMINS)
async def test_administrators_are_those_with_the_key_or_all_where_nobody_needs_one(
    start: Start, auth: dict[str, Any], headers: dict[str, str], expected: int
) -> None:
    proxy = await start(auth=auth)
    for path in ("/admin/targets", "/admin/teams", "/metrics"):
        async with proxy.get(path, headers=headers) as response:
            assert (response.status, path) == (expected, path)


async def test_a_page_asks_for_leave_without_a_key_and_reads_why_it_was_refused(start: Start) -> None:
    """Browsers send no credentials with the request that asks for leave (Fetch §3.2.2)."""
    origin = {"Origin": "https://chat.example.com"}
    proxy = await start(auth=KEYS, server={"cors_origins": ["https://chat.example.com"]})
    asking = {**origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    async with proxy.client.options(f"{proxy.base}/models", headers=asking) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Headers"] == "authorization"
    async with proxy.get("/v1/models", headers=origin) as response:
        assert response.status == 401
        assert response.headers["Access-Control-Allow-Origin"] == origin["Origin"]


async def test_strangers_do_not_learn_how_busy_it_is(proxy: Proxy, guarded: Proxy) -> None:
    async with proxy.get("/ready") as one, guarded.get("/ready") as other:
        assert await one.json() == {"status": "ready", "in_flight": 0}
        assert await other.json() == {"status": "ready"}


# ------------------------------------------------------------------ organisations, teams, keys


async def test_an_administrator_makes_and_changes_teams_and_keys(guarded: Proxy) -> None:
    assert (await admin(guarded, "POST", "/organisations", {"id": "acme", "name": "Acme"}))[0] == 201
    status, team = await admin(guarded, "POST", "/teams", {"id": "alpha", "organisation": "acme", "models": ["gpt-*"]})
    assert (status, team["name"], team["is_suspended"]) == (201, "alpha", False)
    assert await admin(guarded, "GET", "/teams/alpha") == (200, team)
    _, changed = await admin(guarded, "PATCH", "/teams/alpha", {"name": "A", "parallel_calls": 3})
    assert changed == team | {"name": "A", "parallel_calls": 3}
    assert (await admin(guarded, "PATCH", "/organisations/acme", {"name": "ACME"}))[1]["name"] == "ACME"
    assert [row["id"] for row in (await admin(guarded, "GET", "/organisations"))[1]["data"]] == ["acme", "local"]
    assert (await admin(guarded, "GET", "/teams?organisation=acme"))[1]["data"] == [changed]

    made = await made_key(guarded, team="alpha", name="ci", tokens_per_minute=100)
    shown = {name: value for name, value in made.items() if name != "key"}
    assert shown.keys() >= {"id", "team", "name", "models", "status", "expires_at", "tokens_per_minute"}
    for path in (f"/keys/{made['id']}", "/keys?team=alpha", "/keys"):
        status, said = await admin(guarded, "GET", path)
        assert status == 200
        assert (said if "status" in said else said["data"][0]) == shown
        assert made["key"] not in json.dumps(said), "a key is shown once"
    for action, expected in (("suspend", "suspended"), ("resume", "active"), ("revoke", "revoked")):
        assert (await admin(guarded, "POST", f"/keys/{made['id']}/{action}"))[1]["status"] == expected
    assert (await admin(guarded, "PATCH", f"/keys/{made['id']}", {"name": "x"}))[1]["error"]["code"] == "key_revoked"


WRONG: list[tuple[str, str, Any, str]] = [
    ("POST", "/teams", {}, "400 missing_required_parameter id"),
    ("POST", "/teams", {"id": "a b"}, "400 invalid_value id"),
    ("POST", "/teams", {"id": "a", "nmae": "x"}, "400 unknown_parameter nmae"),
    ("POST", "/teams", {"id": "a", "models": []}, "400 invalid_value models"),
    ("POST", "/teams", {"id": "a", "models": "gpt-*"}, "400 invalid_value models"),
    ("POST", "/teams", {"id": "a", "organisation": "no"}, "404 organisation_not_found organisation"),
    ("POST", "/teams", {"id": "local"}, "409 team_exists id"),
    ("POST", "/teams", [], "400 invalid_type None"),
    ("POST", "/keys", {"team": "no"}, "404 team_not_found team"),
    ("POST", "/keys", {"name": "a\nb"}, "400 invalid_value name"),
    ("POST", "/keys", {"parallel_calls": 0}, "400 invalid_value parallel_calls"),
    ("POST", "/keys", {"parallel_calls": True}, "400 invalid_value parallel_calls"),
    ("POST", "/keys", {"expires_at": "tomorrow"}, "400 invalid_value expires_at"),
    ("PATCH", "/teams/no", {"name": "x"}, "404 team_not_found team"),
    ("PATCH", "/teams/local", {"id": "x"}, "400 unknown_parameter id"),
    ("POST", "/keys/no/revoke", None, "404 key_not_found key"),
    ("GET", "/organisations/no", None, "404 organisation_not_found organisation"),
    ("GET", "/keys?limit=0", None, "400 invalid_value limit"),
    ("GET", "/keys?organisation=x", None, "400 invalid_value organisation"),
]


async def test_what_is_wrong_is_named(guarded: Proxy) -> None:
    for method, path, body, expected in WRONG:
        status, said = await admin(guarded, method, path, body)
        error = said["error"]
        assert f"{status} {error['code']} {error['param']}" == expected, (method, path, body)


async def test_whatever_is_sent_is_answered(guarded: Proxy) -> None:
    """Never a 500, on any of these routes."""
    anything = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    names = "id team organisation name models parallel_calls expires_at"
    money = "budget_mode credits_per_dollar budget_day_usd amount period starts_at reason job_id"
    fields = st.sampled_from(f"{names} {money}".split())
    tries: list[tuple[str, str, str, Any]] = []

    @examples(60)
    @given(
        st.sampled_from([route for route in routes() if "/admin/" in route[1] and "cache" not in route[1]]),
        st.text(min_size=1, max_size=6),
        st.dictionaries(fields, anything, max_size=4) | anything,
    )
    def collect(route: tuple[str, str], name: str, body: Any) -> None:
        tries.append((*route, name, body))

    collect()
    for method, path, name, body in tries:
        url = guarded.base.removesuffix("/v1") + "/admin/" + path.removeprefix("/admin/").replace("id", _quoted(name))
        async with guarded.client.request(method, url, headers=ADMIN, json=body) as response:
            assert response.status < 500, (method, url, body, await response.text())


def _quoted(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode("utf-8", "surrogatepass"))


async def test_the_admin_key_is_no_part_of_a_question(upstream: FakeUpstream, start: Start) -> None:
    """What a client's question would find is told to an administrator, whose own key does not count."""
    upstream.plays(HELLO)
    proxy = await start(auth={"admin_key_env": "ADMIN_KEY"}, cache={"exact": True, "semantic": False})
    client = {"Authorization": "Bearer of-a-client"}
    async with proxy.chat(headers=client) as response:
        await response.read()
    body = json.dumps({"model": "model-a", "messages": [{"role": "user", "content": "Hi"}]})
    url = proxy.base.removesuffix("/v1") + "/admin/cache/explain"
    for headers, expected in ((client, "exact"), ({}, "miss")):
        async with proxy.client.post(url, data=body, headers={**headers, "x-api-key": ADMIN_KEY}) as response:
            assert (await response.json())["verdict"] == expected


def test_open_admin_without_a_key_is_refused_where_keys_are_needed() -> None:
    auth = Auth(Settings(auth=AuthSettings(mode="keys")), cast(Any, None))
    with pytest.raises(ClientError) as caught:
        auth.admit_admin(CIMultiDict({"x-api-key": "None"}))
    assert (caught.value.status, caught.value.code) == (403, "no_admin_key")
