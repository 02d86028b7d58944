"""The event loop is never held: while one call is a heavy one, everybody else's go on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import Proxy
from tests.fakes.upstream import COMPLETION, DONE, FakeUpstream, Received, Wire, finish, role, stream, text

_LONG = 60


@asynccontextmanager
async def never_held(most_s: float = 0.25) -> AsyncIterator[None]:
    """Fails when the event loop was held for longer than `most_s` while the block lasted."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        yield
        # Let it tick once more, lest the last moment be missed.
        await asyncio.sleep(0.02)
    finally:
        ticker.cancel()
    assert longest < most_s, f"the event loop was held for {longest:.2f} s"


async def test_the_ticker_sees_a_held_loop() -> None:
    with pytest.raises(AssertionError, match="the event loop was held for 0"):
        async with never_held():
            time.sleep(0.3)  # noqa: ASYNC251 - this is what must not happen


class Prepared:
    """An answer whose bytes were made before, in pieces: the upstream shares this event loop and must not hold it."""

    def __init__(self, body: bytes) -> None:
        self._pieces = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]

    async def __call__(self, request: Received, wire: Wire) -> None:
        await wire.head(content_type="application/json")
        for piece in self._pieces:
            await wire.chunk(piece)
        await wire.end()


def _completion(content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


async def _read(proxy: Proxy, **members: Any) -> tuple[int, bytes]:
    """How long the streamed answer is, and its last bytes."""
    size, last = 0, b""
    async with asyncio.timeout(_LONG), proxy.chat(stream=True, **members) as response:
        assert response.status == 200
        async for part in response.content.iter_any():
            size += len(part)
            last = (last + part)[-400:]
    return size, last


_TEXTS = {
    "words": "All happy families are alike, but every unhappy one is so in its own way. ",
    "one long word": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ",
    "an unspaced script": "すべての幸福な家庭は似ているが、不幸な家庭はそれぞれに不幸である。",
}


@pytest.mark.parametrize("words", _TEXTS)
async def test_making_a_stream_of_a_body_of_a_megabyte(upstream: FakeUpstream, proxy: Proxy, words: str) -> None:
    piece = _TEXTS[words]
    body = json.dumps(_completion(piece * (2**20 // len(piece.encode()))), ensure_ascii=False).encode()
    upstream.plays(Prepared(body))
    async with never_held():
        _, last = await _read(proxy)
    assert last.endswith(DONE)
    assert (await proxy.ledger.next())["mode"] == "synthesis"


@pytest.mark.parametrize("words", ["words", "one long word"])
async def test_making_a_stream_of_a_body_of_five_megabytes(upstream: FakeUpstream, proxy: Proxy, words: str) -> None:
    """As an answer with a picture in it has, in base64. What is far below `max_answer_bytes` as a body must not be above
    it as a stream, for the sake of the envelope around each word."""
    piece = _TEXTS[words]
    upstream.plays(Prepared(json.dumps(_completion(piece * (5 * 2**20 // len(piece)))).encode()))
    async with never_held():
        size, last = await _read(proxy)
    assert last.endswith(DONE), last[-200:]
    assert size > 5 * 2**20
    assert (await proxy.ledger.next())["status"] == "ok"


async def test_counting_the_tokens_of_a_prompt_of_a_megabyte(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("Hello"), finish()))
    prompt = _TEXTS["words"] * (2**20 // len(_TEXTS["words"]))
    async with never_held():
        _, last = await _read(
            proxy, messages=[{"role": "user", "content": prompt}], stream_options={"include_usage": True}
        )
        row = await proxy.ledger.next()
    assert last.endswith(DONE)
    assert row["estimated"] is True
    assert row["prompt_tokens"] > 100_000


async def test_loading_the_tokenizer(upstream: FakeUpstream, proxy: Proxy) -> None:
    """In a thread it held the interpreter's lock, and with it this loop, for 170 ms at one go."""
    upstream.plays(stream(role(), text("Hello"), finish()))
    async with never_held(0.12):
        await proxy.stream()
        assert (await proxy.ledger.next())["estimated"] is True


async def test_putting_a_long_stream_together_for_a_client_that_wants_one_body(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    words = [text(f"word{number} ") for number in range(30_000)]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for start in range(0, len(words), 300):
            await wire.chunk(b"".join(words[start : start + 300]))
        await wire.chunk(finish() + DONE)
        await wire.end()

    upstream.plays(play)
    async with never_held():
        async with asyncio.timeout(_LONG), proxy.chat() as response:
            body = await response.read()
        await proxy.ledger.next()
    assert body.count(b"word") == 30_000


async def test_one_event_of_five_megabytes(upstream: FakeUpstream, proxy: Proxy) -> None:
    """A picture as a data URL, in one event (https://github.com/sgl-project/sglang/issues/7301)."""
    events = role() + text("iVBORw0KGgoAAAANSUhEUgAA" * 200_000) + finish() + DONE
    pieces = [events[start : start + 65_536] for start in range(0, len(events), 65_536)]

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        for piece in pieces:
            await wire.chunk(piece)
        await wire.end()

    upstream.plays(play)
    async with never_held():
        size, last = await _read(proxy)
    assert size == len(events)
    assert last.endswith(DONE)


@pytest.mark.parametrize("unit", [b"name=model\r\n", b"; name=model", b"\r\n--b"])
async def test_a_form_that_begins_again_and_again(upstream: FakeUpstream, proxy: Proxy, unit: bytes) -> None:
    """The field that names the model is looked for once: 120 kB took 8 s, and 1.2 MB would have taken a quarter of an hour."""
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        never_held(),
        proxy.post("/audio/transcriptions", b"--b\r\n" + unit * 10_000, headers=headers) as response,
    ):
        assert response.status == 200


@pytest.mark.parametrize("unit", [b"<title>", b"<title"])
async def test_an_error_page_whose_title_begins_again_and_again(
    upstream: FakeUpstream, proxy: Proxy, unit: bytes
) -> None:
    """56 kB of it took 4 s."""

    async def page(request: Received, wire: Wire) -> None:
        await wire.head(400, content_type="text/html")
        await wire.chunk(unit * 9_000)
        await wire.end()

    upstream.plays(page)
    async with never_held(), proxy.chat() as response:
        assert response.status == 400
        assert "an HTML page" in await response.text()
