"""The upstream streams: what the client gets is that stream, as it comes."""

from __future__ import annotations

import asyncio

from tests.conftest import Proxy
from tests.fakes.upstream import DONE, FakeUpstream, Received, Wire, finish, role, stream, text, usage


async def test_events_in_normal_form_arrive_byte_for_byte(upstream: FakeUpstream, proxy: Proxy) -> None:
    events = [role(), text("Hel"), text('lo ✓ "quoted" \\ \n'), text("!"), finish()]
    upstream.plays(stream(*events, usage()))

    assert await proxy.stream() == b"".join(events) + DONE

    assert upstream.requests[0].json()["stream_options"] == {"include_usage": True}
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"], row["target"]) == ("relay", "ok", "up/model-a")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (7, 2, False)
    assert row["ttft_ms"] is not None


async def test_each_event_is_passed_on_before_the_next_one_exists(upstream: FakeUpstream, proxy: Proxy) -> None:
    """Unbuffered: the upstream sends its next event only when the client has the one before."""
    seen = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role())
        for number in range(20):
            await wire.chunk(text(f"word {number} "))
            await seen.wait()
            seen.clear()
        await wire.chunk(finish() + usage() + DONE)
        await wire.end()

    upstream.plays(play)
    async with proxy.chat(stream=True) as response:
        received = b""
        for number in range(20):
            while f"word {number} ".encode() not in received:
                received += await response.content.readany()
            seen.set()
        received += await response.content.read()
    assert received.endswith(DONE)
