"""The HTTP servers that upstreams really run on, in one conversation: streams that pause, whole answers, one connection.

Every server frames, splits and keeps in its own way; through the proxy the client must get the very bytes, each event as soon
as it was said, and all calls must fit on one kept connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from aiohttp import web

from tests.conftest import make_settings, running_proxy
from tests.fakes.client import Client, chat
from tests.fakes.upstream import COMPLETION, DONE, chunk, finish, role, text, usage

ROOT = Path(__file__).parents[2]
NODE_SERVER = ROOT / "tests" / "node" / "server.mjs"
LLM = ROOT / "var" / "llm"

_LONG = 20

_EVENTS = [
    role() + text("Hello"),
    text(" there"),
    text(" – 海"),
    chunk({"content": "x" * 20_000}),
    finish(),
    usage(),
    DONE,
]
_SAID = b"".join(event for event in _EVENTS if event != usage())
_WHOLE = json.dumps(COMPLETION).encode()


@dataclass
class Upstream:
    """A server in the conversation. `go_on` lets it say one event more; `connections` are those that it was asked on."""

    url: str
    go_on: Callable[[], None]
    connections: set[str] = field(default_factory=set)


Serving = Callable[[Path], AbstractAsyncContextManager[Upstream]]


# ---------------------------------------------------------------------- the servers


@asynccontextmanager
async def _aiohttp(directory: Path) -> AsyncIterator[Upstream]:
    steps = asyncio.Semaphore(0)

    async def answer(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        assert request.transport is not None
        # nginx says which of its connections a request came on.
        port = str(request.transport.get_extra_info("peername")[1])
        upstream.connections.add(request.headers.get("X-Connection", port))
        if not asked.get("stream"):
            return web.Response(body=_WHOLE, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in _EVENTS:
            await response.write(event)
            await steps.acquire()
        return response

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = Upstream(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", steps.release)
    try:
        yield upstream
    finally:
        await runner.cleanup()


def _uvicorn(http: Literal["h11", "httptools"]) -> Serving:
    @asynccontextmanager
    async def serving(directory: Path) -> AsyncIterator[Upstream]:
        steps = asyncio.Semaphore(0)

        async def app(
            scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
        ) -> None:
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message["more_body"]:
                    break
            if not scope["path"].endswith("/chat/completions"):
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body"})
                return
            upstream.connections.add(str(scope["client"][1]))
            wants_stream = json.loads(body).get("stream")
            kind = b"text/event-stream" if wants_stream else b"application/json"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            if wants_stream:
                for event in _EVENTS:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    await steps.acquire()
            await send({"type": "http.response.body", "body": b"" if wants_stream else _WHOLE})

        listening = socket.create_server(("127.0.0.1", 0))
        upstream = Upstream(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", steps.release)
        config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve(sockets=[listening]))
        try:
            yield upstream
        finally:
            server.should_exit = True
            await task

    return serving


def _command(name: str) -> str:
    """Where a command is; the test is skipped when it is nowhere."""
    path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if path is None:
        pytest.skip(f"{name} is not installed on this machine")
    return path


@asynccontextmanager
async def _running(*command: str | Path, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program, ended with the block."""
    process = await asyncio.create_subprocess_exec(*command, **{"stdin": DEVNULL, **options})
    try:
        yield process
    finally:
        process.terminate()
        await asyncio.wait_for(process.communicate(), _LONG)


async def _says(stream: asyncio.StreamReader | None, words: bytes) -> str:
    """Wait until a program has printed a line with `words`, and give that line."""
    assert stream is not None
    async with asyncio.timeout(60):
        while words not in (line := await stream.readline()):
            assert line, f"it ended before it said {words!r}"
    return line.decode()


@asynccontextmanager
async def _nginx(directory: Path) -> AsyncIterator[Upstream]:
    """nginx before the aiohttp server, set up as its own manual says for streams and kept connections."""
    nginx = _command("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with _aiohttp(directory) as behind:
        config = directory / "nginx.conf"
        config.write_text(f"""
            daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log stderr notice;
            events {{ worker_connections 64; }}
            http {{
                access_log off;
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        proxy_pass {behind.url.removesuffix("/v1")};
                        proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
                        proxy_set_header X-Connection $connection;
                    }}
                }}
            }}
        """)
        async with _running(nginx, "-p", directory, "-c", config, "-e", "stderr", stderr=PIPE) as process:
            await _says(process.stderr, b"start worker process ")
            yield Upstream(f"http://127.0.0.1:{port}/v1", behind.go_on, behind.connections)


@asynccontextmanager
async def _node(directory: Path) -> AsyncIterator[Upstream]:
    script = json.dumps({"events": [event.decode() for event in _EVENTS], "whole": _WHOLE.decode()})
    async with _running(_command("node"), NODE_SERVER, script, stdin=PIPE, stdout=PIPE) as process:
        url = (await _says(process.stdout, b"listening")).split()[1]
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        upstream = Upstream(url, lambda: stdin.write(b"\n"))

        async def listen() -> None:
            while line := await stdout.readline():
                upstream.connections.add(line.decode().split()[1])

        listening = asyncio.ensure_future(listen())
        try:
            yield upstream
        finally:
            listening.cancel()


_SERVERS: dict[str, Serving] = {
    "aiohttp": _aiohttp,
    "uvicorn with h11": _uvicorn("h11"),
    "uvicorn with httptools": _uvicorn("httptools"),
    "nginx": _nginx,
    "node": _node,
}


# ---------------------------------------------------------------------- the conversation


@pytest.mark.parametrize("serving", _SERVERS.values(), ids=_SERVERS.keys())
async def test_every_server_is_relayed_byte_for_byte_on_one_connection(serving: Serving, tmp_path: Path) -> None:
    async with serving(tmp_path) as upstream, running_proxy(make_settings(tmp_path, upstream.url)) as proxy:
        async with proxy.get(
            "/v1/models"
        ) as response:  # The proxy asks for it at its start too, on a connection as well.
            assert response.status == 200
        client = await Client.to(proxy.port)
        for _ in range(3):
            client.send(chat(stream=True))
            heard = b""
            for event in _EVENTS[:4]:  # Each is here before the next one was said.
                heard += await client.heard(event[-20:])
                upstream.go_on()
            for _ in _EVENTS[4:]:
                upstream.go_on()
            heard += await client.heard(b"\r\n0\r\n\r\n")
            assert _unchunked(heard.partition(b"\r\n\r\n")[2]) == _SAID
            assert (await proxy.ledger.next())["status"] == "ok"  # By now the connection is free again.
            client.send(chat())
            assert (await client.answer()).body == _WHOLE
            assert (await proxy.ledger.next())["status"] == "ok"
        client.close()
        assert len(upstream.connections) == 1


def _unchunked(framed: bytes) -> bytes:
    parts = []
    while framed:
        size, _, framed = framed.partition(b"\r\n")
        parts.append(framed[: int(size, 16)])
        framed = framed[int(size, 16) + 2 :]
    return b"".join(parts)


# ---------------------------------------------------------------------- a real model


@pytest.fixture
def model() -> tuple[Path, Path]:
    """The Python with llama.cpp's server and the weights, where scripts/demo-llm.sh puts them."""
    python = LLM / "venv" / "bin" / "python"
    weights = next(iter(LLM.glob("*.gguf")), None)
    if weights is None or not python.exists():
        pytest.skip("no model on this machine: `make demo-llm` installs one")
    return python, weights


def _connections_to(port: int) -> int:
    """How many TCP connections of this machine lead to a port of the loopback, in any state (proc(5), /proc/net/tcp)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(remote == f"0100007F:{port:04X}" for _, _, remote, *_ in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="connections are counted in /proc")
async def test_a_real_model_says_the_same_in_a_stream_and_in_one_body(model: tuple[Path, Path], tmp_path: Path) -> None:
    python, weights = model
    command = (python, ROOT / "scripts" / "llm_server.py", weights, "0", "--slots", "1")
    async with _running(*command, stdout=PIPE, stderr=DEVNULL) as process:
        url = (await _says(process.stdout, b"listening")).split()[1]
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        async with running_proxy(make_settings(tmp_path, url)) as proxy:
            async with proxy.get("/v1/models") as response:  # The list that is asked for at the start is here as well.
                assert response.status == 200
            before = _connections_to(port)
            client = await Client.to(proxy.port)
            said = []
            for number in range(4):
                client.send(chat("Count to five.", stream=number % 2 == 0, max_tokens=24, temperature=0, seed=1))
                said.append((await client.answer()).said())
                row = await proxy.ledger.next()
                assert (row["status"], row["estimated"]) == ("ok", False)
            client.close()
            assert said[0]
            assert said == [said[0]] * 4
            assert _connections_to(port) <= before
