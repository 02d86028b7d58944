"""The official Python client (`openai`) before the proxy, as a program would use it: only its base URL is changed.

Every upstream here is one of three: one that streams, one that refuses to, and one that answers with one JSON body
whatever it is asked. A client must not be able to tell them apart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolUnionParam

from tests.conftest import Proxy, Start
from tests.fakes.upstream import (
    COMPLETION,
    FakeUpstream,
    Play,
    Received,
    Silence,
    Wire,
    answer,
    chunk,
    event,
    finish,
    refuse,
    role,
    stream,
    text,
    usage,
)

_MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
_TOOLS: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]
_LONG = 30


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=proxy.base, api_key="sk-any", max_retries=0) as client:
        yield client


def _native(events: list[bytes], completion: dict[str, Any]) -> Play:
    async def play(request: Received, wire: Wire) -> None:
        body = request.json()
        wants_usage = (body.get("stream_options") or {}).get("include_usage")
        await (stream(*events, *([usage(7, 4)] if wants_usage else [])) if body.get("stream") else answer(completion))(
            request, wire
        )

    return play


def _refusing(events: list[bytes], completion: dict[str, Any]) -> Play:
    async def play(request: Received, wire: Wire) -> None:
        await (refuse(400, "stream") if request.json().get("stream") else answer(completion))(request, wire)

    return play


def _json_only(events: list[bytes], completion: dict[str, Any]) -> Play:
    return answer(completion)


Kind = Callable[[list[bytes], dict[str, Any]], Play]
_KINDS: dict[str, Kind] = {"streams": _native, "refuses to stream": _refusing, "sends one JSON body": _json_only}

_WORDS = [role(), text("Hello "), text("there, "), text("friend."), finish()]

_CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
]
_CALLING = {
    **COMPLETION,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": _CALLS},
            "finish_reason": "tool_calls",
        }
    ],
}


def _call(index: int, arguments: str, **head: Any) -> bytes:
    function = {"arguments": arguments, **({"name": head.pop("name")} if "name" in head else {})}
    return chunk({"tool_calls": [{"index": index, **head, "function": function}]})


_CALL_EVENTS = [
    role(),
    _call(0, "", id="call_1", type="function", name="weather"),
    _call(0, '{"city":'),
    _call(0, '"Rome"}'),
    _call(1, "", id="call_2", type="function", name="weather"),
    _call(1, '{"city":"Oslo"}'),
    finish("tool_calls"),
]


@pytest.fixture(params=_KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return _KINDS[request.param]


async def test_a_stream_is_read_to_its_end(
    upstream: FakeUpstream, proxy: Proxy, client: openai.AsyncOpenAI, kind: Kind
) -> None:
    upstream.plays(kind(_WORDS, COMPLETION))
    for _ in range(2):  # Once while nothing is known of the upstream, and once when it is.
        chunks = [
            part
            async for part in await client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
        ]
        assert "".join(part.choices[0].delta.content or "" for part in chunks) == "Hello there, friend."
        assert [part.choices[0].delta.role for part in chunks if part.choices[0].delta.role] == ["assistant"]
        assert [part.choices[0].finish_reason for part in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert {(part.object, part.id, part.model) for part in chunks} == {
            ("chat.completion.chunk", "chatcmpl-up", "model-a")
        }
        assert all(part.usage is None for part in chunks)
        assert (await proxy.ledger.next())["status"] == "ok"


async def test_usage_comes_last_where_it_is_asked_for(
    upstream: FakeUpstream, client: openai.AsyncOpenAI, kind: Kind
) -> None:
    upstream.plays(kind(_WORDS, COMPLETION))
    chunks = [
        part
        async for part in await client.chat.completions.create(
            model="model-a", messages=_MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert all(part.usage is None for part in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.total_tokens) == (7, 11)


async def test_a_whole_answer_is_whole(upstream: FakeUpstream, client: openai.AsyncOpenAI, kind: Kind) -> None:
    upstream.plays(kind(_WORDS, COMPLETION))
    completion = await client.chat.completions.create(model="model-a", messages=_MESSAGES)
    assert completion.choices[0].message.content == "Hello there, friend."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 11


async def test_tool_calls_are_put_together(upstream: FakeUpstream, client: openai.AsyncOpenAI, kind: Kind) -> None:
    """The client's stream helper adds the deltas up: what is said twice, it has twice."""
    upstream.plays(kind(_CALL_EVENTS, _CALLING))
    async with client.chat.completions.stream(model="model-a", messages=_MESSAGES, tools=_TOOLS) as answers:
        done = [
            (part.index, part.name, part.parsed_arguments)
            async for part in answers
            if part.type == "tool_calls.function.arguments.done"
        ]
        completion = await answers.get_final_completion()

    assert done == [(0, "weather", {"city": "Rome"}), (1, "weather", {"city": "Oslo"})]
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.role == "assistant"
    calls = choice.message.tool_calls or []
    assert [(call.id, call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("call_1", "function", "weather", '{"city":"Rome"}'),
        ("call_2", "function", "weather", '{"city":"Oslo"}'),
    ]


async def test_the_stream_helper_puts_text_and_usage_together(
    upstream: FakeUpstream, client: openai.AsyncOpenAI, kind: Kind
) -> None:
    upstream.plays(kind(_WORDS, COMPLETION))
    async with client.chat.completions.stream(
        model="model-a", messages=_MESSAGES, stream_options={"include_usage": True}
    ) as answers:
        deltas = [part.delta async for part in answers if part.type == "content.delta"]
        completion = await answers.get_final_completion()
    assert "".join(deltas) == completion.choices[0].message.content == "Hello there, friend."
    assert completion.usage is not None
    assert completion.usage.total_tokens == 11


async def _read_into(seen: list[str | None], answers: openai.AsyncStream[ChatCompletionChunk]) -> None:
    async for part in answers:
        seen.append(part.choices[0].delta.content)  # noqa: PERF401 - what came before a failure counts


async def test_an_error_in_mid_stream_is_raised_with_its_message(
    upstream: FakeUpstream, client: openai.AsyncOpenAI
) -> None:
    upstream.plays(
        stream(role(), text("Hello"), event({"error": {"message": "Out of luck", "code": "no_luck"}}), done=False)
    )
    answers = await client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
    seen: list[str | None] = []
    with pytest.raises(openai.APIError, match="Out of luck") as raised:
        await _read_into(seen, answers)
    assert seen == ["", "Hello"]
    assert raised.value.code == "no_luck"


async def test_a_stream_that_breaks_off_is_raised_and_not_taken_for_an_answer(
    upstream: FakeUpstream, client: openai.AsyncOpenAI
) -> None:
    """To this client a clean end without a finish reason is an end like any other."""

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await wire.reset()

    for broken in (play, stream(role(), text("Hello"), done=False)):
        upstream.plays(broken)
        answers = await client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
        with pytest.raises(openai.APIError) as raised:
            await _read_into([], answers)
        assert raised.value.code == "upstream_broke"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_upstreams_refusal_is_raised_as_what_it_is(
    upstream: FakeUpstream,
    client: openai.AsyncOpenAI,
    status: int,
    expected: type[openai.APIStatusError],
    is_stream: bool,
) -> None:
    upstream.plays(refuse(status, "model", "Out of luck", "no_luck"))
    with pytest.raises(expected, match="Out of luck") as raised:
        await client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=is_stream)
    assert (raised.value.status_code, raised.value.code, raised.value.param) == (status, "no_luck", "model")
    assert raised.value.request_id == raised.value.response.headers["x-request-id"]


async def test_a_mistake_of_the_client_is_told_apart(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="", messages=_MESSAGES)
    assert raised.value.response.headers["x-headwater-error-source"] == "client"


async def test_a_client_that_stops_reading_is_gone(
    upstream: FakeUpstream, proxy: Proxy, client: openai.AsyncOpenAI
) -> None:
    silence = Silence(role(), text("Hello"))
    upstream.plays(silence)
    answers = await client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
    async for part in answers:
        if part.choices[0].delta.content:
            break
    await answers.close()
    await silence.is_left()
    assert (await proxy.ledger.next())["status"] == "cancelled"


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["model-a", "model-b"]
    assert (await client.models.retrieve("model-a")).id == "model-a"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("model-z")


async def test_embeddings_are_passed_on(upstream: FakeUpstream, proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    """Without being told otherwise this client asks for base64, and decodes it."""
    data = [{"object": "embedding", "index": 0, "embedding": "AACAPwAAAEA="}]
    used = {"prompt_tokens": 1, "total_tokens": 1}
    upstream.plays(answer({"object": "list", "data": data, "model": "model-a", "usage": used}))
    found = await client.embeddings.create(model="model-a", input="Hi")
    assert found.data[0].embedding == [1.0, 2.0]
    assert upstream.requests[0].path == "/v1/embeddings"
    assert json.loads(upstream.requests[0].body)["encoding_format"] == "base64"
    row = await proxy.ledger.next()
    assert (row["mode"], row["status"]) == ("passthrough", "ok")


async def test_the_clients_key_stays_with_the_proxy(upstream: FakeUpstream, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model="model-a", messages=_MESSAGES)
    assert "authorization" not in upstream.requests[0].headers


async def test_the_synchronous_client_reads_the_same(upstream: FakeUpstream, proxy: Proxy, kind: Kind) -> None:
    upstream.plays(kind(_WORDS, COMPLETION))

    def use() -> tuple[str, str | None, list[str], str | None]:
        with openai.OpenAI(base_url=proxy.base, api_key="sk-any", max_retries=0) as client:
            answers = client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
            streamed = "".join(part.choices[0].delta.content or "" for part in answers)
            completion = client.chat.completions.create(model="model-a", messages=_MESSAGES)
            models = [model.id for model in client.models.list()]
            with client.chat.completions.stream(model="model-a", messages=_MESSAGES) as helped:
                helped.until_done()
                final = helped.get_final_completion().choices[0].message.content
            return streamed, completion.choices[0].message.content, models, final

    async with asyncio.timeout(_LONG):
        streamed, whole, models, final = await asyncio.to_thread(use)
    assert streamed == whole == final == "Hello there, friend."
    assert models == ["model-a", "model-b"]


async def test_the_synchronous_client_raises_the_same(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"max_retries": 0})
    upstream.plays(
        refuse(429, None, "Slow down", "rate_limit_exceeded"),
        stream(role(), text("Hello"), event({"error": {"message": "Out of luck"}}), done=False),
    )

    def use() -> None:
        with openai.OpenAI(base_url=proxy.base, api_key="sk-any", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError, match="Slow down"):
                client.chat.completions.create(model="model-a", messages=_MESSAGES)
            answers = client.chat.completions.create(model="model-a", messages=_MESSAGES, stream=True)
            with pytest.raises(openai.APIError, match="Out of luck"):
                list(answers)

    async with asyncio.timeout(_LONG):
        await asyncio.to_thread(use)


async def test_the_clients_own_retry_finds_the_answer(upstream: FakeUpstream, start: Start) -> None:
    """By itself it retries 429 and 5xx twice, and obeys Retry-After."""
    proxy = await start(streaming={"max_retries": 0})
    busy = answer({"error": {"message": "Busy", "type": "t", "param": None, "code": None}}, 429, retry_after="0.01")
    upstream.plays(busy, _native(_WORDS, COMPLETION))
    async with openai.AsyncOpenAI(base_url=proxy.base, api_key="sk-any") as client:
        completion = await client.chat.completions.create(model="model-a", messages=_MESSAGES)
    assert completion.choices[0].message.content == "Hello there, friend."
    assert len(upstream.requests) == 2
