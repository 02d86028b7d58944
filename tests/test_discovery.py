"""Finding something to put the proxy in front of."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from proxy.config import load, with_upstreams
from proxy.errors import ConfigError
from proxy.settings import Settings
from proxy.upstream import demo, discovery
from proxy.upstream.discovery import PROVIDERS, from_url, in_environment, on_this_machine
from tests.fakes.upstream import FakeUpstream
from tests.test_command import children, ended


def test_a_key_in_the_environment_names_its_provider() -> None:
    (found,) = in_environment({"OPENAI_API_KEY": "sk-1", "PATH": "/bin", "OTHER_API_KEY": "x"})
    assert (found.name, found.base_url) == ("openai", "https://api.openai.com/v1")
    assert (found.api_key_env, found.models) == ("OPENAI_API_KEY", ("*",))


def test_several_keys_name_several_providers_in_an_order_that_stays() -> None:
    found = in_environment({"XAI_API_KEY": "x", "GROQ_API_KEY": "g", "OPENAI_API_KEY": "o"})
    assert [upstream.name for upstream in found] == ["openai", "groq", "xai"]


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_an_empty_key_is_none(value: str) -> None:
    assert in_environment({"OPENAI_API_KEY": value}) == ()


def test_what_is_found_makes_settings() -> None:
    environ = {provider.api_key_env: f" key-of-{provider.name}\n" for provider in PROVIDERS}
    settings = with_upstreams(Settings(), in_environment(environ), environ)
    assert settings.secrets == {provider.name: f"key-of-{provider.name}" for provider in PROVIDERS}
    assert "key-of" not in repr(settings)


@pytest.mark.parametrize("url", ["https://api.groq.com/openai/v1", "https://api.groq.com/openai/v1/"])
def test_the_url_of_a_provider_is_recognised_and_takes_its_key(url: str) -> None:
    found = from_url(url, {"GROQ_API_KEY": "gsk"})
    assert (found.name, found.base_url, found.api_key_env) == ("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY")
    assert from_url(url, {}).api_key_env is None


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com.evil.example/v1",
        "https://api.openai.com/v1.evil.example/",
        "https://api.openai.com/v1beta",
        "http://api.openai.com/v1",
        "https://evil.example/?https://api.openai.com/v1",
    ],
)
def test_a_url_that_only_looks_like_a_providers_gets_no_key(url: str) -> None:
    found = from_url(url, {provider.api_key_env: "sk-secret" for provider in PROVIDERS})
    assert found.api_key_env is None
    assert found.base_url == url.rstrip("/")


def test_any_other_url_is_taken_as_it_is() -> None:
    found = from_url("http://127.0.0.1:11434/v1/", {"OPENAI_API_KEY": "sk"})
    assert (found.name, found.base_url, found.api_key_env) == ("default", "http://127.0.0.1:11434/v1", None)


async def test_a_server_on_this_machine_is_found_by_its_list_of_models(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeUpstream() as second:
        ports = (("ollama", upstream.port), ("lmstudio", 9), ("vllm", second.port))
        monkeypatch.setattr(discovery, "LOCAL_SERVERS", ports)
        found = await on_this_machine(own_port=0)
        assert [(one.name, one.base_url) for one in found] == [("ollama", upstream.url), ("vllm", second.url)]

        assert [one.name for one in await on_this_machine(own_port=upstream.port)] == ["vllm"]
        with_upstreams(Settings(), found, {})


_NO_MODEL_SERVERS = {
    "a login page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>",
    "some other JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n[1, 2, 3,4]",
    "data that is no list": b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data": 1}',
    "a refusal": b'HTTP/1.1 401 No\r\nContent-Length: 12\r\n\r\n{"data": []}',
    "no HTTP": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "silence": b"",
    "half a body": b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"data": [',
}


@pytest.mark.parametrize("what", [*_NO_MODEL_SERVERS, "a redirect to a model server"])
async def test_what_else_may_listen_there_is_not_taken_for_one(
    upstream: FakeUpstream, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[asyncio.StreamWriter] = []
    to_models = f"HTTP/1.1 302 Found\r\nLocation: {upstream.url}/models\r\nContent-Length: 0\r\n\r\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        writer.write(_NO_MODEL_SERVERS.get(what, to_models))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setattr(discovery, "LOCAL_SERVERS", (("ollama", port),))
    assert await on_this_machine(own_port=0) == ()
    server.close()
    for writer in connections:
        writer.close()
    await server.wait_closed()


async def test_the_demo_runs_for_as_long_as_the_block() -> None:
    async with demo.running() as upstream:
        assert (upstream.name, upstream.models) == ("demo", ("demo-*",))
        host, _, port = upstream.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert "demo-stream" in [model["id"] for model in json.loads(body)["data"]]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_the_demo_ends_when_the_block_is_left_by_a_failure() -> None:
    pid = 0

    async def fail() -> None:
        nonlocal pid
        async with demo.running():
            (pid,) = [child for child in children(os.getpid()) if is_demo(child)]
            raise RuntimeError("on purpose")

    def is_demo(child: int) -> bool:
        return b"--exit-with-stdin" in Path(f"/proc/{child}/cmdline").read_bytes()

    with pytest.raises(RuntimeError, match="on purpose"):
        await fail()
    await ended(pid)


async def test_without_its_script_there_is_no_demo_but_a_word_on_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PLACES", (Path("/nowhere/demo_upstream.py"),))
    with pytest.raises(ConfigError, match="--upstream URL"):
        async with demo.running():
            pass


def test_settings_without_a_file_have_no_upstream() -> None:
    assert load(None, {}).upstream == ()
