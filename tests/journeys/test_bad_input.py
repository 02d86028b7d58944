"""The client asks for something odd, wrong or hostile: it is told what is wrong, and the upstream never hears of it."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.upstream import COMPLETION, FakeUpstream, answer

HI = [{"role": "user", "content": "Hi"}]


async def refused(proxy: Proxy, body: Any, status: int = 400, path: str = "/chat/completions") -> dict[str, Any]:
    """The error that a body gets, which must be the client's fault and in the envelope."""
    async with proxy.post(path, body) as response:
        assert response.status == status, await response.text()
        assert response.content_type == "application/json"
        assert response.headers["x-headwater-error-source"] == "client"
        assert response.headers["x-request-id"]
        value = await response.json()
    assert value.keys() == {"error"}
    error: dict[str, Any] = value["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


NO_JSON = {
    "nothing": b"",
    "no JSON": b"model=model-a",
    "half an object": b'{"model": "model-a", "messages": [',
    "two objects": b"{}{}",
    "NaN": b'{"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    "no UTF-8": b'{"model": "model-a\xff", "messages": []}',
    "UTF-16": json.dumps({"model": "model-a"}).encode("utf-16"),
    "a control character in a string": b'{"model": "mod\nel-a"}',
    "a nesting bomb of arrays": b'{"model":"model-a","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a nesting bomb of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a nesting bomb with half a character": b'{"s":"\\ud83d","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
async def test_a_body_that_is_no_json_is_refused(upstream: FakeUpstream, proxy: Proxy, body: bytes) -> None:
    assert (await refused(proxy, body))["code"] == "invalid_json"

    assert upstream.requests == []
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("client_error", 400, "invalid_json")
    assert (row["attempts"], row["target"]) == (0, None)


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_a_name_that_is_far_too_long_is_nobodys_and_is_not_kept(
    upstream: FakeUpstream, proxy: Proxy, path: str
) -> None:
    error = await refused(proxy, {"model": "m" * 100_000, "messages": HI}, 404, path)
    assert error["code"] == "model_not_found"
    assert (await proxy.ledger.next())["model"] == "m" * 256
    assert upstream.requests == []


@pytest.mark.parametrize("depth", [950, 960, 970, 980, 985, 990, 995, 1000, 1010, 1020])
async def test_no_depth_of_nesting_is_our_failure(upstream: FakeUpstream, proxy: Proxy, depth: int) -> None:
    """Python's JSON parser and its writer give up at different depths; a lone surrogate needs both."""
    upstream.plays(answer())
    nested = b"[" * depth + b"]" * depth
    body = b'{"model":"model-a","messages":[{"role":"user","content":"\\ud83d"}],"stream":true,"x":' + nested + b"}"

    async with proxy.post("/chat/completions", body) as response:
        assert response.status == 400, await response.text()


async def test_a_body_that_can_be_read_but_not_written_anew_is_refused(upstream: FakeUpstream, proxy: Proxy) -> None:
    nested = b"[" * 300 + b"]" * 300
    members = b'"model":"model-a","messages":[{"role":"user","content":"Hi"}],"x":' + nested
    upstream.plays(answer())

    error = await refused(proxy, b'{"stream":true,"stream_options":{},' + members + b"}")
    assert error["code"] == "invalid_json"

    for body in (b"{" + members + b"}", b'{"stream":true,' + members + b"}"):
        async with proxy.post("/chat/completions", body) as response:
            assert response.status == 200
    untouched, with_usage = [request.body for request in upstream.requests]
    assert untouched == b"{" + members + b"}"
    assert with_usage == b'{"stream_options":{"include_usage":true},"stream":true,' + members + b"}"


@pytest.mark.parametrize("body", [b"[]", b"null", b"17", b'"model-a"', b"true"])
async def test_a_body_that_is_no_object_is_refused(upstream: FakeUpstream, proxy: Proxy, body: bytes) -> None:
    assert (await refused(proxy, body))["code"] == "invalid_type"

    assert upstream.requests == []


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"messages": HI}, "model", "missing_required_parameter"),
    "a model that is null": ({"model": None, "messages": HI}, "model", "missing_required_parameter"),
    "a model that is a number": ({"model": 4, "messages": HI}, "model", "invalid_type"),
    "a model without a name": ({"model": " ", "messages": HI}, "model", "invalid_value"),
    "no messages": ({"model": "model-a"}, "messages", "missing_required_parameter"),
    "messages that are a text": ({"model": "model-a", "messages": "Hi"}, "messages", "invalid_type"),
    "an empty list of messages": ({"model": "model-a", "messages": []}, "messages", "empty_array"),
    "a message that is a text": ({"model": "model-a", "messages": [*HI, "Hi"]}, "messages[1]", "invalid_type"),
    "a message without a role": (
        {"model": "model-a", "messages": [{"content": "Hi"}]},
        "messages[0].role",
        "invalid_type",
    ),
    "a content that is an object": (
        {"model": "model-a", "messages": [*HI, {"role": "user", "content": {}}]},
        "messages[1].content",
        "invalid_type",
    ),
    "a stream that is a text": ({"model": "model-a", "messages": HI, "stream": "true"}, "stream", "invalid_type"),
    "a stream that is a number": ({"model": "model-a", "messages": HI, "stream": 1}, "stream", "invalid_type"),
    "stream options that are a list": (
        {"model": "model-a", "messages": HI, "stream": True, "stream_options": []},
        "stream_options",
        "invalid_type",
    ),
    "no choices": ({"model": "model-a", "messages": HI, "n": 0}, "n", "invalid_value"),
    "too many choices": ({"model": "model-a", "messages": HI, "n": 1_000_000}, "n", "invalid_value"),
    "a broken number of choices": ({"model": "model-a", "messages": HI, "n": 1.5}, "n", "invalid_type"),
    "a yes for choices": ({"model": "model-a", "messages": HI, "n": True}, "n", "invalid_type"),
}


@pytest.mark.parametrize(("body", "param", "code"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_member_is_named(
    upstream: FakeUpstream, proxy: Proxy, body: dict[str, Any], param: str, code: str
) -> None:
    error = await refused(proxy, body)

    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"]
    assert upstream.requests == []
    assert (await proxy.ledger.next())["error"] == code


ODD: dict[str, dict[str, Any]] = {
    "an array of parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    "a tool's answer": {"messages": [*HI, {"role": "tool", "tool_call_id": "c1", "content": "4"}]},
    "a call without content": {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": []}]},
    "no content at all": {"messages": [{"role": "assistant"}]},
    "a role nobody knows": {"messages": [{"role": "wizard", "content": "Hi"}]},
    "nulls": {"stream": None, "n": None, "stream_options": None, "temperature": None},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "members nobody knows": {"wishes": {"three": [1, 2, 3]}},
    "a number beyond 64 bits": {"seed": 2**70},
}


@pytest.mark.parametrize("members", ODD.values(), ids=ODD.keys())
async def test_what_is_only_odd_is_the_upstreams_to_judge(
    upstream: FakeUpstream, proxy: Proxy, members: dict[str, Any]
) -> None:
    """Content may be null or an array, roles may be new, and unknown members mean something to somebody."""
    upstream.plays(answer())

    assert await proxy.ask(**members) == COMPLETION

    sent = upstream.requests[0].json()
    assert {name: sent[name] for name in members} == members


async def test_a_number_beyond_64_bits_is_no_failure_of_ours_when_streaming(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    body = (
        b'{"model":"model-a","messages":[{"role":"user","content":"Hi"}],"stream":true,"seed":1180591620717411303424}'
    )

    async with proxy.post("/chat/completions", body) as response:
        assert response.status in (200, 400), await response.text()


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_half_a_surrogate_pair_passes_or_is_mended(
    upstream: FakeUpstream, proxy: Proxy, wants_stream: bool
) -> None:
    """An emoji that somebody has cut in two: not JSON's finest, and no reason for a 500."""
    upstream.plays(answer())
    body = b'{"model":"model-a","messages":[{"role":"user","content":"a\\ud83d!"}],"stream":%s}' % (
        b"true" if wants_stream else b"false"
    )

    async with proxy.post("/chat/completions", body) as response:
        assert response.status == 200
        await response.read()

    content = upstream.requests[0].json()["messages"][0]["content"]
    assert content in ("a\ud83d!", "a\ufffd!")
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_a_byte_order_mark_is_no_matter(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer())

    async with proxy.post(
        "/chat/completions", b"\xef\xbb\xbf" + json.dumps({"model": "m", "messages": HI}).encode()
    ) as response:
        assert response.status == 200


async def test_the_body_is_read_whatever_its_content_type(upstream: FakeUpstream, proxy: Proxy) -> None:
    """`curl -d` says that it is a form."""
    upstream.plays(answer())
    body = json.dumps({"model": "model-a", "messages": HI}).encode()

    async with proxy.post(
        "/chat/completions", body, headers={"Content-Type": "application/x-www-form-urlencoded"}
    ) as response:
        assert response.status == 200
    assert upstream.requests[0].headers["content-type"] == "application/json"


# ---------------------------------------------------------------------- size


async def test_a_body_that_is_too_large_is_refused(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(server={"max_body_mb": 0.01})
    body = {"model": "model-a", "messages": [{"role": "user", "content": "x" * 20_000}]}

    for path in ("/chat/completions", "/embeddings"):
        error = await refused(proxy, body, 413, path)
        assert error["code"] == "request_too_large"
        assert "0.01 MB" in error["message"]
        assert (await proxy.ledger.next())["http_status"] == 413
    assert upstream.requests == []


async def test_a_body_that_is_too_large_is_refused_also_when_its_length_was_not_said(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(server={"max_body_mb": 0.01})

    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.base.split(":")[2].split("/")[0]))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1000\r\n"
            + b"x" * 4096
            + b"\r\n" * 1
            + b"2000\r\n"
            + b"x" * 8192
            + b"\r\n"
        )
        head = await reader.readline()
        writer.close()
        await writer.wait_closed()

    assert b" 413 " in head
    assert upstream.requests == []


async def test_a_body_of_many_megabytes_passes(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Images make bodies long; aiohttp's own limit is 1 MiB (https://github.com/rossoctl/cortex/issues/864)."""
    upstream.plays(answer())
    long = "x" * 8_000_000

    body = {"model": "model-a", "messages": [{"role": "user", "content": long}]}
    # As a file, for aiohttp warns its user of long bodies.
    data = io.BytesIO(json.dumps(body).encode())
    async with proxy.client.post(proxy.base + "/chat/completions", data=data) as response:
        assert response.status == 200

    assert upstream.requests[0].json()["messages"][0]["content"] == long


# ---------------------------------------------------------------------- models and routes


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/embeddings"])
async def test_a_model_that_nobody_serves_is_a_404_with_close_names(
    upstream: FakeUpstream, start: Start, path: str
) -> None:
    proxy = await start(more='models = ["gpt-4o", "gpt-4o-mini", "text-small"]')

    error = await refused(proxy, {"model": "gpt-4-o", "messages": HI, "input": "Hi"}, 404, path)

    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-4-o'" in error["message"]
    assert "Did you mean gpt-4o" in error["message"]
    assert upstream.requests == []
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"]) == ("client_error", 404)


async def test_a_model_like_no_other_is_a_404_without_names(start: Start) -> None:
    proxy = await start(more='models = ["gpt-4o"]')

    error = await refused(proxy, {"model": "zzzz", "messages": HI}, 404)

    assert "Did you mean" not in error["message"]


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1", "/v1/", "/chat/completions", "/admin", "/health/x"])
async def test_a_route_that_does_not_exist_is_a_404(upstream: FakeUpstream, proxy: Proxy, path: str) -> None:
    async with proxy.get(path) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert error["code"] == "not_found"
    assert path in error["message"]
    assert upstream.requests == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/admin/capabilities"])
async def test_a_wrong_method_is_a_405(proxy: Proxy, path: str) -> None:
    async with proxy.client.post(proxy.base.removesuffix("/v1") + path) as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == "method_not_allowed"
        assert "GET" in response.headers["Allow"]


@pytest.mark.parametrize("path", ["/../secrets", "/%2e%2e/secrets", "/files/..%2f..%2fsecrets", "/files/%2E%2e/x"])
async def test_a_path_cannot_climb_out_of_the_base_url(upstream: FakeUpstream, proxy: Proxy, path: str) -> None:
    port = int(proxy.base.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answered = await reader.read()
    writer.close()
    await writer.wait_closed()

    assert answered.startswith(b"HTTP/1.1 404")
    assert upstream.requests == []
