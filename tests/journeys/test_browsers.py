"""A page in a browser asks: only pages that the operator has named get an answer.

Any page on the web can send requests to a server on the visitor's own machine; the browser says in `Origin` whose
page it is (https://fetch.spec.whatwg.org/#http-origin).
"""

from __future__ import annotations

import pytest

from tests.conftest import ADMIN_KEY, Proxy, Start
from tests.fakes.upstream import FakeUpstream, answer, refuse
from tests.server.test_auth import KEYS, made_key

PAGE = "https://chat.example"


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:3000", "https://127.0.0.1", ""])
async def test_a_page_that_was_not_named_is_refused(upstream: FakeUpstream, proxy: Proxy, origin: str) -> None:
    async with proxy.chat(headers={"Origin": origin}) as response:
        assert response.status == 403
        assert (await response.json())["error"]["code"] == "origin_not_allowed"
        assert "Access-Control-Allow-Origin" not in response.headers

    assert upstream.requests == []
    assert (await proxy.ledger.next())["http_status"] == 403


@pytest.mark.parametrize("path", ["/v1/models", "/admin/capabilities", "/health", "/v1/files"])
async def test_a_page_that_was_not_named_is_refused_everywhere(proxy: Proxy, path: str) -> None:
    async with proxy.get(path, headers={"Origin": PAGE}) as response:
        assert response.status == 403


# A page's own name, which its owner points at this machine once it is loaded: with a GET a browser then sends no Origin.
HOSTS = [
    ("127.0.0.1:8100", 200),
    ("LocalHost", 200),
    ("[::1]:8100", 200),
    ("evil.example:8100", 403),
    ("127.0.0.1.evil.example", 403),
    ("[", 403),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
@pytest.mark.parametrize("path", ["/admin/keys", "/metrics"])
async def test_a_strangers_name_for_this_machine_makes_no_administrator(
    proxy: Proxy, path: str, host: str, status: int
) -> None:
    async with proxy.get(path, headers={"Host": host}) as response:
        assert response.status == status

    # A web server in front passes on the name that it is asked by.
    async with proxy.get("/v1/models", headers={"Host": host}) as response:
        assert response.status == 200


async def test_an_administrator_with_a_key_may_use_any_name(start: Start) -> None:
    proxy = await start(auth={"admin_key_env": "ADMIN_KEY"})
    async with proxy.get("/admin/keys", headers={"Host": "llm.example", "api-key": ADMIN_KEY}) as response:
        assert response.status == 200


async def test_a_page_of_our_own_is_served(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer())

    async with proxy.chat(headers={"Origin": proxy.base.removesuffix("/v1")}) as response:
        assert response.status == 200


async def test_a_page_that_was_named_is_served(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"cors_origins": [PAGE, "http://localhost:3000"]})
    upstream.plays(answer())

    async with proxy.chat(headers={"Origin": PAGE}) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert "Origin" in response.headers["Vary"]
        assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in response.headers

    async with proxy.chat(headers={"Origin": "https://evil.example"}) as response:
        assert response.status == 403


async def test_a_named_page_may_read_what_it_is_told_in_headers(upstream: FakeUpstream, start: Start) -> None:
    """A browser shows a page of another origin only the headers that are named (https://fetch.spec.whatwg.org/#cors-protocol)."""
    proxy = await start(auth=KEYS, server={"cors_origins": [PAGE]}, cache={"exact": True, "semantic": False})
    upstream.plays(answer())
    key = await made_key(proxy, requests_per_minute=1, tokens_per_minute=2000)
    for status, max_tokens in ((200, 5), (429, 5), (429, 5000)):
        asked = {"Origin": PAGE, "Authorization": f"Bearer {key['key']}"}
        async with proxy.chat(headers=asked, max_tokens=max_tokens) as response:
            assert response.status == status
            exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
            told = {name.lower() for name in response.headers}
        assert {name for name in told if name.startswith("x-") or name == "retry-after"} <= set(exposed)
    assert {"x-should-retry", "x-ratelimit-reset-tokens"} <= told


async def test_a_named_page_may_read_a_stream_and_an_error(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"cors_origins": [PAGE]})

    async with proxy.chat(stream=True, headers={"Origin": PAGE}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        await response.read()

    upstream.plays(refuse(429))
    async with proxy.chat(stream=True, headers={"Origin": PAGE}) as response:
        assert response.status == 429
        assert response.headers["Access-Control-Allow-Origin"] == PAGE

    async with proxy.get("/v1/models", headers={"Origin": PAGE}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == PAGE


async def test_a_browser_that_asks_beforehand_is_told(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"cors_origins": [PAGE]})
    asking = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }

    async with proxy.client.options(proxy.base + "/chat/completions", headers=asking) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert "x-stainless-lang" in response.headers["Access-Control-Allow-Headers"]
        assert await response.read() == b""

    async with proxy.client.options(
        proxy.base + "/chat/completions", headers={**asking, "Origin": "https://evil.example"}
    ) as response:
        assert response.status == 403
    assert upstream.requests == []


async def test_every_page_is_served_where_the_operator_says_so(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"cors_origins": ["*"]})
    upstream.plays(answer())

    for origin in (PAGE, "null"):
        async with proxy.chat(headers={"Origin": origin}) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] in (origin, "*")


async def test_a_program_that_is_no_browser_needs_no_origin(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer())

    async with proxy.chat() as response:
        assert response.status == 200
        assert "Access-Control-Allow-Origin" not in response.headers
