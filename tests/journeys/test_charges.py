"""What is charged for an answer, in whichever way it comes: its tokens, each once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Client, chat
from tests.fakes.upstream import DONE, FakeUpstream, Received, Silence, Wire, chunk, finish, role, text
from tests.journeys.test_ledger import PRICE, TOKENS, calls, credits_of, give, key_of, with_team
from tests.server.test_auth import KEYS

SAID = "Hello, how are you"
SAID_TOKENS = (8, 5)


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """One with a team that pays a credit for a token."""
    proxy = await with_team(await start(auth=KEYS, more=PRICE, streaming={"resume_window_s": 0}))
    await give(proxy, 10_000, **TOKENS)
    return proxy


async def at_once(request: Received, wire: Wire) -> None:
    """A stream that comes in one piece, and tells no usage."""
    await wire.head(content_type="text/event-stream")
    await wire.chunk(role() + text(SAID) + finish() + DONE)
    await wire.end()


async def charged(proxy: Proxy) -> dict[str, Any]:
    """The row of the one call, whose tokens were charged and nothing else."""
    (row,) = await calls(proxy, 1)
    assert row["credits"] == row["prompt_tokens"] + row["completion_tokens"]
    assert await credits_of(proxy) == (10_000 - row["credits"], 0, row["credits"])
    return row


@pytest.mark.parametrize("delivery", ["whole", "stream"])
@pytest.mark.parametrize("members", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_a_stream_that_comes_at_once_is_counted(
    upstream: FakeUpstream, proxy: Proxy, members: dict[str, Any], delivery: str
) -> None:
    upstream.plays(at_once)
    async with proxy.chat(headers=await key_of(proxy) | {"x-headwater-delivery": delivery}, **members) as response:
        assert SAID in await response.text()
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (*SAID_TOKENS, True)


EARLY = {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
NOW = {"prompt_tokens": 7, "completion_tokens": 20, "total_tokens": 27}


@pytest.mark.parametrize(
    ("said", "wants_usage", "tokens"),
    [
        ([chunk({"role": "assistant"}, usage=EARLY), text(SAID)], False, (*SAID_TOKENS, True)),
        ([role(), chunk({"content": SAID}, usage=NOW)], False, (7, 20, False)),
        ([role(), text(SAID), finish() + DONE], True, (*SAID_TOKENS, True)),
    ],
    ids=["usage first", "usage so far", "while it is counted"],
)
async def test_who_leaves_pays_for_all_that_was_said(
    upstream: FakeUpstream, proxy: Proxy, said: list[bytes], wants_usage: bool, tokens: tuple[int, int, bool]
) -> None:
    """What the usage in mid-stream says is for what was said until then."""
    upstream.plays(Silence(*said))
    key = await key_of(proxy)
    client = await Client.to(proxy.port)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if wants_usage else {}
    client.send(chat("Hi", f"Authorization: {key['Authorization']}", stream=True, **options))
    await client.heard(SAID.encode())
    client.reset()
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"], row["status"]) == (*tokens, "cancelled")
