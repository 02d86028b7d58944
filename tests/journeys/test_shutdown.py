"""The proxy is told to stop: running answers may finish, new calls are refused, and what takes too long is told so."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.server.app import serving
from proxy.settings import Settings
from tests.conftest import Ledger, Proxy, make_settings
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Received,
    Silence,
    Wire,
    answer,
    event,
    finish,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_slow_clients import is_same, slow_client
from tests.test_command import command
from tests.waiting import until

_LONG = 30


class Stopping:
    """A proxy that a test may tell to stop, with a client that outlives it."""

    def __init__(self, proxy: Proxy, stop: asyncio.Event, serving_: asyncio.Task[None]) -> None:
        self.proxy = proxy
        self._stop = stop
        self._serving = serving_

    async def begins_to_stop(self) -> None:
        """Tell it, and wait until it takes no more calls."""
        self._stop.set()
        await until(lambda: _status(self.proxy, "/ready"), lambda found: found[0] == 503)

    def stop(self) -> None:
        self._stop.set()

    async def has_stopped(self) -> None:
        async with asyncio.timeout(_LONG):
            await self._serving

    @property
    def is_running(self) -> bool:
        return not self._serving.done()


@asynccontextmanager
async def _stopping(settings: Settings) -> AsyncIterator[Stopping]:
    stop = asyncio.Event()
    ledger = Ledger()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with serving(settings, ledger) as number:  # type: ignore[arg-type]
            port.set_result(number)
            await stop.wait()

    task = asyncio.create_task(serve())
    async with aiohttp.ClientSession() as client:
        try:
            async with asyncio.timeout(_LONG):
                proxy = Proxy(f"http://127.0.0.1:{await port}/v1", client, ledger)
            yield Stopping(proxy, stop, task)
        finally:
            stop.set()
            await task


async def _status(proxy: Proxy, path: str) -> tuple[int, Any]:
    async with proxy.get(path) as response:
        return response.status, await response.json()


async def _first_text(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async with asyncio.timeout(_LONG):
        while b'"content":"Hello"' not in body:
            body += await response.content.readany()
    return body


class Held:
    """A stream that waits in its middle until the test lets it end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def __call__(self, request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await self.may_end.wait()
        await wire.chunk(text(" there") + finish() + usage())
        await wire.chunk(DONE)
        await wire.end()


async def test_running_answers_finish_while_new_calls_are_refused(tmp_path: Path, upstream: FakeUpstream) -> None:
    held = Held()
    upstream.plays(held)
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 25})) as stopping:
        proxy = stopping.proxy
        async with proxy.chat(stream=True) as response:
            body = await _first_text(response)
            await stopping.begins_to_stop()

            assert await _status(proxy, "/ready") == (503, {"status": "draining", "in_flight": 1})
            assert await _status(proxy, "/health") == (200, {"status": "ok"})
            for refused in (
                proxy.chat(stream=True),
                proxy.chat(),
                proxy.get("/v1/models"),
                proxy.post("/responses", {}),
            ):
                async with refused as answered:
                    assert answered.status == 503
                    assert int(answered.headers["Retry-After"]) > 0
                    assert answered.headers["x-headwater-error-source"] == "proxy"
                    assert (await answered.json())["error"]["code"] == "shutting_down"
                assert (await proxy.ledger.next())["http_status"] == 503
            assert stopping.is_running

            held.may_end.set()
            async with asyncio.timeout(_LONG):
                body += await response.read()
        assert body == role() + text("Hello") + text(" there") + finish() + DONE
        row = await proxy.ledger.next()
        assert (row["status"], row["http_status"]) == ("ok", 200)
        await stopping.has_stopped()
    assert len(upstream.requests) == 1


async def test_without_running_calls_it_stops_at_once(tmp_path: Path, upstream: FakeUpstream) -> None:
    """Kept-alive connections on which nothing is asked hold nobody up."""
    upstream.plays(answer())
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 3600})) as stopping:
        assert await stopping.proxy.ask() == COMPLETION
        stopping.stop()
        await stopping.has_stopped()


async def test_a_stream_that_takes_too_long_ends_in_an_error_event(tmp_path: Path, upstream: FakeUpstream) -> None:
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence)
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 0.2})) as stopping:
        async with stopping.proxy.chat(stream=True) as response:
            body = await _first_text(response)
            stopping.stop()
            async with asyncio.timeout(_LONG):
                body += await response.read()
        await silence.is_left()
        row = await stopping.proxy.ledger.next()
        await stopping.has_stopped()

    assert body.startswith(role() + text("Hello"))
    assert b"[DONE]" not in body
    error = json.loads(body[len(role() + text("Hello")) :].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("shutting_down", "server_overloaded")
    assert (row["status"], row["http_status"], row["error"]) == ("interrupted", 200, "shutting_down")
    assert (row["estimated"], row["completion_tokens"]) == (True, 1)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_call_without_an_answer_yet_is_told_with_a_503(
    tmp_path: Path, upstream: FakeUpstream, is_stream: bool
) -> None:
    silence = Silence(head=False)
    upstream.plays(silence)
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 0})) as stopping:
        asking = asyncio.ensure_future(stopping.proxy.chat(stream=is_stream))
        await silence.is_heard()
        stopping.stop()
        async with asyncio.timeout(_LONG):
            response = await asking
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert (await response.json())["error"]["code"] == "shutting_down"
        row = await stopping.proxy.ledger.next()
        await stopping.has_stopped()
    assert (row["status"], row["http_status"], row["error"]) == ("interrupted", 503, "shutting_down")


async def test_a_route_that_is_passed_on_may_finish_too(tmp_path: Path, upstream: FakeUpstream) -> None:
    may_end = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(event({"content": "Hello"}))
        await may_end.wait()
        await wire.chunk(event({"type": "response.completed"}))
        await wire.end()

    upstream.plays(play)
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 25})) as stopping:
        async with stopping.proxy.post("/responses", {"model": "model-a", "stream": True}) as response:
            body = await _first_text(response)
            await stopping.begins_to_stop()
            may_end.set()
            async with asyncio.timeout(_LONG):
                body += await response.read()
        assert body == event({"content": "Hello"}) + event({"type": "response.completed"})
        assert (await stopping.proxy.ledger.next())["status"] == "ok"
        await stopping.has_stopped()


async def test_a_route_that_is_passed_on_is_cut_when_it_takes_too_long(tmp_path: Path, upstream: FakeUpstream) -> None:
    silence = Silence(event({"content": "Hello"}))
    upstream.plays(silence)
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 0.2})) as stopping:
        async with stopping.proxy.post("/responses", {"model": "model-a", "stream": True}) as response:
            await _first_text(response)
            stopping.stop()
            with pytest.raises(aiohttp.ClientPayloadError):
                async with asyncio.timeout(_LONG):
                    await response.read()
        await silence.is_left()
        row = await stopping.proxy.ledger.next()
        await stopping.has_stopped()
    assert (row["mode"], row["status"]) == ("passthrough", "interrupted")


async def test_an_answer_that_waits_for_its_client_is_a_running_answer(tmp_path: Path, upstream: FakeUpstream) -> None:
    """The upstream has said everything, and a slow client still reads."""
    words = " ".join(f"word{number}" for number in range(60_000))
    message = {"role": "assistant", "content": words}
    whole = {**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    upstream.plays(answer(whole))
    async with _stopping(make_settings(tmp_path, upstream.url, server={"drain_s": 25})) as stopping:
        async with slow_client(stopping.proxy) as client:
            await client.ask()
            assert (await stopping.proxy.ledger.next())["status"] == "ok"
            stopping.stop()
            # Longer than anything but the client could still take.
            await asyncio.wait([asyncio.ensure_future(stopping.has_stopped())], timeout=2.5)
            body = await client.read_body(65_536)
        chunks = [json.loads(raw[6:]) for raw in body.removesuffix(DONE).split(b"\n\n") if raw]
        assert is_same("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks), words)
        await stopping.has_stopped()


# ---------------------------------------------------------------------- as a process


async def test_sigterm_lets_answers_finish_and_ends_with_0(tmp_path: Path, upstream: FakeUpstream) -> None:
    """aiohttp's own `run_app` would wait a minute for handlers, and then let go of them without a word
    (https://docs.aiohttp.org/en/stable/web_advanced.html#graceful-shutdown)."""
    held = Held()
    upstream.plays(held)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            command(tmp_path, "serve", "--upstream", upstream.url, "--port", "0", HEADWATER_SERVER__LOG_FORMAT="json")
        )
        base = await running.base()
        client = await stack.enter_async_context(aiohttp.ClientSession())
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with client.post(f"{base}/chat/completions", json=body) as response:
            said = await _first_text(response)
            running.process.send_signal(signal.SIGTERM)
            await running.line("headwater stops")
            async with client.get(base.removesuffix("/v1") + "/ready") as ready:
                assert ready.status == 503
            held.may_end.set()
            async with asyncio.timeout(_LONG):
                said += await response.read()
        assert said.endswith(DONE)
        assert json.loads(await running.line("{"))["status"] == "ok"
        assert await running.exit_code() == 0
        assert await running.stderr() == ""


async def test_what_is_left_after_drain_s_is_told_and_ends_with_0(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(Silence(role(), text("Hello")))
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            command(
                *(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"),
                HEADWATER_SERVER__LOG_FORMAT="json",
                HEADWATER_SERVER__DRAIN_S="0.3",
            )
        )
        base = await running.base()
        client = await stack.enter_async_context(aiohttp.ClientSession())
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with client.post(f"{base}/chat/completions", json=body) as response:
            said = await _first_text(response)
            running.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(_LONG):
                said += await response.read()
        assert b'"code":"shutting_down"' in said
        assert b"[DONE]" not in said
        row = json.loads(await running.line("{"))
        assert (row["status"], row["error"]) == ("interrupted", "shutting_down")
        assert await running.exit_code() == 0
        assert await running.stderr() == ""


async def test_the_second_signal_ends_it_at_once(tmp_path: Path, upstream: FakeUpstream) -> None:
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            command(*(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"), HEADWATER_SERVER__DRAIN_S="3600")
        )
        base = await running.base()
        client = await stack.enter_async_context(aiohttp.ClientSession())
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with client.post(f"{base}/chat/completions", json=body) as response:
            await _first_text(response)
            running.process.send_signal(signal.SIGTERM)
            await running.line("headwater stops")
            running.process.send_signal(signal.SIGTERM)
            assert await running.exit_code() == 1
            await silence.is_left()


async def test_a_database_of_a_stopped_proxy_is_whole(tmp_path: Path, upstream: FakeUpstream) -> None:
    """What was learned just before the end is known at the next start."""
    upstream.plays(answer())
    settings = make_settings(tmp_path, upstream.url)
    async with _stopping(settings) as stopping:
        await stopping.proxy.stream()
        stopping.stop()
        await stopping.has_stopped()
    upstream.requests.clear()
    upstream.plays(stream(role(), text("Hello"), finish(), usage()), answer())
    async with _stopping(settings) as stopping:
        status, known = await _status(stopping.proxy, "/admin/capabilities")
        assert status == 200
        assert known["data"][0]["facts"]["streams"]["value"] is False
