"""What is charged for an answer, in whichever way it comes: its tokens, each once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.caching import has_kept
from tests.fakes.client import Client, chat
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Silence,
    answer,
    chunk,
    event,
    finish,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_ledger import DOLLARS, PRICE, TOKENS, calls, credits_of, give, key_of, with_team
from tests.journeys.test_recovery import BOTH, broken
from tests.server.test_auth import KEYS

SAID = "Hello, how are you"
SAID_TOKENS = (8, 5)

AT_ONCE = stream(role() + text(SAID) + finish() + DONE, done=False)
"""A stream that comes in one piece, and tells no usage."""


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """One with a team that pays a credit for a token."""
    proxy = await with_team(await start(auth=KEYS, more=PRICE, streaming={"resume_window_s": 0}))
    await give(proxy, 10_000, **TOKENS)
    return proxy


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
    upstream.plays(AT_ONCE)
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
        ([role(), chunk({"content": "Hello"}, usage=NOW), text(SAID[5:])], False, (SAID_TOKENS[0], 20, True)),
        ([role(), text(SAID), finish() + DONE], True, (*SAID_TOKENS, True)),
    ],
    ids=["usage first", "usage so far", "more than is seen", "while it is counted"],
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
    await client.heard(SAID[-3:].encode())
    client.reset()
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"], row["status"]) == (*tokens, "cancelled")


GREETING = {
    "prompt_tokens": 7,
    "completion_tokens": 1,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 5},
}
LAST = {"prompt_tokens": 0, "completion_tokens": 20, "total_tokens": 20}


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ([chunk({"role": "assistant"}, usage=EARLY), text(SAID), finish()], (*SAID_TOKENS, True)),
        ([role(), chunk({"content": "Hello"}, usage=NOW), text(SAID[5:]), finish()], (SAID_TOKENS[0], 20, True)),
        ([role(), chunk({"content": SAID}, usage=NOW), finish()], (7, 20, False)),
        (
            [chunk({"content": "Hello"}, usage=GREETING), text(SAID[5:]), chunk(finish_reason="stop", usage=LAST)],
            (7, 20, False),
        ),
        ([chunk({"content": "Hello"}, usage=GREETING), text(SAID[5:]), finish(), usage(0, 20)], (7, 20, False)),
    ],
    ids=["first", "so far", "with the last text", "in two parts", "in two parts, alone"],
)
@pytest.mark.parametrize("wants_stream", [True, False])
async def test_the_client_is_told_the_usage_that_it_pays(
    upstream: FakeUpstream, proxy: Proxy, said: list[bytes], tokens: tuple[int, int, bool], wants_stream: bool
) -> None:
    """What is told while the answer goes on is not that of the whole."""
    upstream.plays(stream(*said))
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if wants_stream else {}
    async with proxy.chat(headers=await key_of(proxy), **options) as response:
        body = await response.text()
    told = json.loads(body.split("data: ")[-2] if wants_stream else body)["usage"]
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == tokens
    assert (told["prompt_tokens"], told["completion_tokens"], told.get("estimated", False)) == tokens
    assert told["total_tokens"] == sum(tokens[:2])


async def test_a_message_in_the_form_of_anthropic_is_paid_for_with_its_prompt(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """Its prompt is told at the beginning, and the rest at the end."""
    upstream.plays(
        stream(
            event({"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}),
            event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "word " * 2000}}),
            event({"type": "message_delta", "usage": {"output_tokens": 15}}),
            done=False,
        )
    )
    body = {"model": "model-a", "messages": [], "stream": True}
    async with proxy.post("/messages", body, headers=await key_of(proxy)) as response:
        await response.read()
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (25, 15)


async def test_what_a_client_adds_to_an_answer_does_not_hide_its_usage(upstream: FakeUpstream, proxy: Proxy) -> None:
    said = [event({"type": "response.output_text.delta", "delta": "word " * 10_000})] * 8
    told = {"usage": {"input_tokens": 8, "output_tokens": 3}, "metadata": {"note": "long " * 4000}}
    upstream.plays(stream(*said, event({"type": "response.completed", "response": told}), done=False))
    body = {"model": "model-a", "input": "Hi", "stream": True, "metadata": told["metadata"]}
    async with proxy.post("/responses", body, headers=await key_of(proxy)) as response:
        await response.read()
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (8, 3)


async def test_an_absurd_usage_beside_a_body_is_not_told_in_its_stream(upstream: FakeUpstream, proxy: Proxy) -> None:
    message = {"index": 0, "message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}
    absurd = {"prompt_tokens": -7, "completion_tokens": 10**9, "total_tokens": 1}
    upstream.plays(answer({**COMPLETION, "choices": [message], "usage": absurd}))
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    async with proxy.chat(headers=await key_of(proxy), **options) as response:
        told = json.loads((await response.text()).split("data: ")[-2])["usage"]
    row = await charged(proxy)
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (*SAID_TOKENS, True)
    assert (told["prompt_tokens"], told["completion_tokens"], told["estimated"]) == (*SAID_TOKENS, True)


@pytest.mark.parametrize("path", ["/v1/responses/resp-1", "/v1/chat/completions"])
@pytest.mark.parametrize("terms", [TOKENS, DOLLARS, {"budget_mode": "job_based"}], ids=str)
async def test_to_read_an_answer_that_was_made_before_costs_nothing(
    upstream: FakeUpstream, start: Start, path: str, terms: dict[str, Any]
) -> None:
    proxy = await start()
    upstream.plays(answer({"id": "resp-1", "usage": {"input_tokens": 8, "output_tokens": 3}}))
    async with proxy.client.post(proxy.base.removesuffix("/v1") + "/admin/credits/teams/local/add", json={"amount": 5}):
        pass
    async with proxy.client.patch(proxy.base.removesuffix("/v1") + "/admin/teams/local", json=terms) as response:
        assert response.status == 200
    async with proxy.get(path) as response:
        assert response.status == 200
        await response.read()
    row = await proxy.ledger.next()
    assert (row["mode"], row["prompt_tokens"], row["completion_tokens"]) == ("passthrough", None, None)
    async with proxy.get("/api/credits/teams/local/balance") as response:
        assert (await response.json())["credits_used"] == 0


async def test_an_estimate_from_the_cache_is_an_estimate(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(more=PRICE, cache={"exact": True, "semantic": False})
    upstream.plays(AT_ONCE)
    await proxy.stream()
    await has_kept(proxy, 1)
    await proxy.stream()
    again = (await calls(proxy, 2))[1]
    assert (again["mode"], again["prompt_tokens"], again["completion_tokens"]) == ("replay", *SAID_TOKENS)
    assert (again["estimated"], again["credits"]) == (True, 0)


DEARER = """
[[price]]
models = ["up2/*"]
input_usd_per_million = 10000
output_usd_per_million = 10000
"""


async def test_who_leaves_while_another_target_is_to_save_the_answer_pays_who_said_it(
    upstream: FakeUpstream, start: Start
) -> None:
    async with FakeUpstream() as second:
        more = DEARER + PRICE.replace(', "up2/*"', "") + BOTH
        proxy = await with_team(
            await start(upstream.url, second.url, auth=KEYS, more=more, streaming={"resume_window_s": 0})
        )
        await give(proxy, 100_000, **DOLLARS)
        key = await key_of(proxy)
        silence = Silence(role(), chunk({"content": "Hello"}, usage=NOW))
        upstream.plays(broken(role(), text(SAID)))
        second.plays(silence)
        client = await Client.to(proxy.port)
        client.send(chat("Hi", f"Authorization: {key['Authorization']}", stream=True, model="both"))
        await silence.is_heard()
        client.reset()
        (row,) = await calls(proxy, 1)
    assert (row["target"], row["status"]) == ("up/model-a", "cancelled")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (*SAID_TOKENS, True)
    assert row["cost_usd"] == 0.018
