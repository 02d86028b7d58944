"""Upstreams that listen on a Unix socket."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Start
from tests.fakes.upstream import FakeUpstream
from tests.upstream.conftest import Authority, InStep, error_of


async def test_a_stream_comes_through_a_unix_socket(start: Start, tmp_path: Path) -> None:
    """`base_url` then gives only what stands in the request."""
    path = tmp_path / "llama.sock"
    async with FakeUpstream(unix_socket=path) as upstream:
        proxy = await start("http://llama.example:1234/api/v1", more=f'unix_socket = "{path}"')
        async with proxy.get("/v1/models") as response:
            assert response.status == 200

        for _ in range(2):
            upstream.plays(played := InStep())
            await played.is_heard_by(proxy)
            assert (await proxy.ledger.next())["status"] == "ok"

        assert {request.path for request in upstream.requests} == {"/api/v1/chat/completions"}
        assert upstream.requests[0].headers["host"] == "llama.example:1234"
        assert upstream.connections == 1


async def test_tls_over_a_unix_socket_asks_for_the_name_in_the_base_url(
    start: Start, tmp_path: Path, authority: Authority
) -> None:
    path = tmp_path / "llama.sock"
    async with FakeUpstream(unix_socket=path, tls=authority.server("llama.example")) as upstream:
        files = f'unix_socket = "{path}"\nca_file = "{authority.file}"'
        right, wrong = (
            await start("https://llama.example/v1", more=files),
            await start("https://other.example/v1", more=files),
        )
        upstream.plays(played := InStep())

        await played.is_heard_by(right)

        assert "its certificate is for another host name" in (await error_of(wrong))["message"]


async def test_a_socket_that_is_not_there_is_an_upstream_that_cannot_be_reached(start: Start, tmp_path: Path) -> None:
    proxy = await start("http://localhost/v1", more=f'unix_socket = "{tmp_path / "nobody.sock"}"')

    error = await error_of(proxy)

    assert error["code"] == "upstream_unreachable"
    assert error["message"] == "The upstream 'up' cannot be reached."
