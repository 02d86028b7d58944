"""The demo upstream as a user meets it: a process that is started, talked to over HTTP, and ended by its stdin."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_upstream.py"
QUESTION = "How do rivers find the sea?"
STREAMING = ("demo-stream", "demo-slow")
COMMAND = (sys.executable, str(SCRIPT), "--exit-with-stdin")
FAST = ("--word-delay-ms", "1", "--slow-s", "0.01")


@dataclass
class Demo:
    """A client of a running demo upstream."""

    base: str
    client: aiohttp.ClientSession

    def chat(self, model: object, *, content: object = QUESTION, query: str = "", **members: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": content}], **members}
        return self.client.post(f"{self.base}/chat/completions{query}", json=body)

    async def ask(self, model: str, **members: Any) -> Any:
        """The JSON of an answer with status 200."""
        async with self.chat(model, **members) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "application/json"
            return await response.json()

    async def stream(self, model: str, **members: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ended as it should."""
        async with self.chat(model, stream=True, **members) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            *events, done, rest = (await response.text()).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    async def health(self) -> Any:
        async with self.client.get(self.base.removesuffix("/v1") + "/health") as response:
            assert response.status == 200
            return await response.json()

    async def wait_for_health(self, **expected: int) -> None:
        """Asks for /health until it says what is expected."""
        async with asyncio.timeout(10):
            while (await self.health()) != {"status": "ok", **expected}:
                pass


async def start(*options: str) -> tuple[Process, str]:
    """The process and its base URL, read from the one line it prints."""
    process = await asyncio.create_subprocess_exec(*COMMAND, *options, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 20)
    word, base = line.decode().split()
    assert word == "listening"
    return process, base


async def end(process: Process) -> tuple[int | None, bytes]:
    """Closes stdin, as the death of the parent would. Gives the exit code and what was printed after the first line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        rest = await asyncio.wait_for(process.stdout.read(), 20)
        return await asyncio.wait_for(process.wait(), 20), rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture(scope="module")
def shared_base() -> Iterator[str]:
    """The base URL of one process for the whole module: most tests ask only for what does not depend on the others."""
    with subprocess.Popen([*COMMAND, *FAST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().split()[1]
        process.stdin.close()
        assert process.wait(20) == 0


@pytest.fixture
async def demo(shared_base: str) -> AsyncIterator[Demo]:
    async with aiohttp.ClientSession() as client:
        yield Demo(shared_base, client)


@pytest.fixture
async def own_process() -> AsyncIterator[tuple[Process, str]]:
    """A process that no other test has asked anything, and its base URL."""
    process, base = await start(*FAST)
    yield process, base
    await end(process)


@pytest.fixture
async def own_demo(own_process: tuple[Process, str]) -> AsyncIterator[Demo]:
    async with aiohttp.ClientSession() as client:
        yield Demo(own_process[1], client)


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_it_ends_with_its_stdin_and_prints_one_line_only() -> None:
    process, base = await start()
    assert base.startswith("http://127.0.0.1:")
    assert base.endswith("/v1")
    assert await end(process) == (0, b"")


async def test_it_ends_with_its_stdin_while_an_answer_is_being_written(
    own_process: tuple[Process, str], own_demo: Demo
) -> None:
    asking = asyncio.create_task(own_demo.ask("demo-slow", query="?slow_s=60"))
    await own_demo.wait_for_health(answering=1, abandoned=0)
    assert await end(own_process[0]) == (0, b"")
    with pytest.raises(aiohttp.ClientError):
        await asking


async def test_it_ends_on_sigterm_and_outlives_its_stdin_unless_told_otherwise() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, str(SCRIPT), stdin=DEVNULL, stdout=PIPE)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 20)
    base = line.decode().split()[1]
    async with aiohttp.ClientSession() as client, client.get(f"{base}/models") as response:
        assert response.status == 200
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert await process.stdout.read() == b""


async def test_models_are_listed(demo: Demo) -> None:
    async with demo.client.get(f"{demo.base}/models") as response:
        body = await response.json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [
        "demo-stream",
        "demo-refuses-stream",
        "demo-json-only",
        "demo-slow",
        "demo-breaks",
    ]
    assert all(model["object"] == "model" for model in body["data"])


async def test_demo_breaks_breaks_off_every_other_stream(own_demo: Demo) -> None:
    async with own_demo.chat("demo-breaks", stream=True) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert (
        text_of(await own_demo.stream("demo-breaks"))
        == (await own_demo.ask("demo-breaks"))["choices"][0]["message"]["content"]
    )
    async with own_demo.chat("demo-breaks", stream=True) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


@pytest.mark.parametrize("model", ["demo-stream", "demo-refuses-stream", "demo-json-only", "demo-slow", "demo-breaks"])
async def test_every_model_answers_one_json_completion(demo: Demo, model: str) -> None:
    body = await demo.ask(model, stream=False)
    assert body["object"] == "chat.completion"
    assert body["model"] == model
    [choice] = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert model in choice["message"]["content"]
    assert f"> {QUESTION}" in choice["message"]["content"]
    usage = body["usage"]
    assert usage["prompt_tokens"] == 6
    assert usage["completion_tokens"] == len(choice["message"]["content"].split())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("model", STREAMING)
async def test_a_stream_has_openais_order_of_chunks(demo: Demo, model: str) -> None:
    whole = await demo.ask(model)
    chunks = await demo.stream(model)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)
    first, *words, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(word["delta"]) == {"content"} and word["finish_reason"] is None for word in words)
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert len(words) == whole["usage"]["completion_tokens"]
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("model", STREAMING)
async def test_usage_comes_last_when_asked_for(demo: Demo, model: str) -> None:
    whole = await demo.ask(model)
    *chunks, last = await demo.stream(model, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


async def test_a_stream_reaches_the_client_while_it_is_written(own_demo: Demo) -> None:
    """The first event is here while the server still counts the answer as being written."""
    async with own_demo.chat("demo-slow", stream=True, query="?slow_s=0") as response:
        assert b'"role":"assistant"' in await response.content.readuntil(b"\n\n")
        assert (await own_demo.health())["answering"] == 1
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    await own_demo.wait_for_health(answering=0, abandoned=0)


async def test_a_refused_stream_is_an_error_that_names_the_parameter(demo: Demo) -> None:
    async with demo.chat("demo-refuses-stream", stream=True) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert "does not support streaming" in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": "stream", "code": "unsupported_value"}


async def test_json_only_answers_json_to_a_client_that_asks_for_a_stream(demo: Demo) -> None:
    body = await demo.ask("demo-json-only", stream=True)
    assert body["object"] == "chat.completion"
    assert QUESTION in body["choices"][0]["message"]["content"]


async def test_the_question_may_come_in_parts_and_is_the_last_one_of_the_user(demo: Demo) -> None:
    body = await demo.ask(
        "demo-stream",
        messages=[
            {"role": "user", "content": "An older question"},
            {"role": "assistant", "content": "Its answer"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "First part"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                    {"type": "text", "text": "second part"},
                ],
            },
        ],
    )
    text = body["choices"][0]["message"]["content"]
    assert "> First part\n> second part\n" in text
    assert "An older question" not in text
    assert body["usage"]["prompt_tokens"] == 9


async def test_an_unknown_model_is_not_found(demo: Demo) -> None:
    async with demo.chat("no-such-model") as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert "no-such-model" in error["message"]
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"model": "demo-stream", ', None),
        ("[1, 2]", None),
        (b"\xff\xfe\xfd", None),
        ('{"model": "demo-stream"}', "messages"),
        ('{"model": "demo-stream", "messages": []}', "messages"),
        ('{"model": "demo-stream", "messages": ["hello"]}', "messages"),
    ],
)
async def test_a_bad_body_is_the_clients_error(demo: Demo, body: str | bytes, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    async with demo.client.post(f"{demo.base}/chat/completions", data=body, headers=headers) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize("slow_s", ["soon", "-1", "nan", "inf"])
async def test_a_bad_slow_s_is_the_clients_error(demo: Demo, slow_s: str) -> None:
    async with demo.chat("demo-slow", query=f"?slow_s={slow_s}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "slow_s"


async def test_an_unknown_address_is_answered_in_openais_shape(demo: Demo) -> None:
    async with demo.client.get(f"{demo.base}/nothing") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "unknown_url"


async def test_a_client_that_leaves_stops_the_answer(own_demo: Demo) -> None:
    async with asyncio.timeout(10):
        response = await own_demo.chat("demo-stream", stream=True)
        await response.content.readuntil(b"\n\n")
        response.close()
        await own_demo.wait_for_health(answering=0, abandoned=1)


async def test_a_client_that_leaves_stops_the_thinking(own_demo: Demo) -> None:
    asking = asyncio.create_task(own_demo.ask("demo-slow", query="?slow_s=60"))
    await own_demo.wait_for_health(answering=1, abandoned=0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await own_demo.wait_for_health(answering=0, abandoned=1)


async def test_embeddings_are_the_same_for_the_same_text(demo: Demo) -> None:
    async def embed(**members: Any) -> Any:
        body = {"model": "demo-embedding", "input": ["river", "sea", "river"], **members}
        async with demo.client.post(f"{demo.base}/embeddings", json=body) as response:
            assert response.status == 200
            return await response.json()

    body = await embed()
    assert body["object"] == "list"
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    river, sea, again = (item["embedding"] for item in body["data"])
    assert river == again != sea
    assert len(river) == 8
    assert sum(number * number for number in river) == pytest.approx(1)

    [packed, *_] = (await embed(encoding_format="base64"))["data"]
    assert struct.unpack("<8f", base64.b64decode(packed["embedding"])) == pytest.approx(river)


async def test_embeddings_need_text(demo: Demo) -> None:
    async with demo.client.post(f"{demo.base}/embeddings", json={"model": "m", "input": []}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "input"
