"""A small OpenAI-compatible server to put behind the proxy in demos and tests. It needs aiohttp and no network.

    python scripts/demo_upstream.py [--host 127.0.0.1] [--port 0] [--exit-with-stdin]

Once it listens it prints one line, `listening http://127.0.0.1:PORT/v1`, and nothing else to stdout. Each model plays
one upstream that a proxy has to cope with:

    demo-stream           streams word by word, in OpenAI's exact event shape
    demo-refuses-stream   answers 400 when `"stream": true` is asked, else JSON
    demo-json-only        ignores `"stream": true` and answers one JSON completion
    demo-slow             thinks for some seconds before its first token, then streams
    demo-breaks           streams, but every other stream breaks off at two thirds

The text is made from the question alone, so the same question always gets the same answer. To add a model, add a line
to `MODELS` and, if it behaves in a new way, a branch in `chat_completions`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import math
import os
import re
import signal
import struct
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

MODELS = ("demo-stream", "demo-refuses-stream", "demo-json-only", "demo-slow", "demo-breaks")
JSON_ONLY_THINKING_S = 0.5
EMBEDDING_DIMENSIONS = 8
MAX_BODY_BYTES = 32 * 2**20  # aiohttp's own limit of 1 MiB is less than one photograph in a message
CREATED = 1_767_225_600  # 2026-01-01: a model's birthday, the same at every start

ANSWER = """\
## Hello from `{model}` 👋

You asked:

{quote}

This answer reaches you **a few words at a time**. In Python, such a stream is read like this:

```python
async for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
```

- every piece is passed on as soon as it is ready;
- the last one says *why* it ended.

Enjoy the water! 🌊
"""


@dataclass
class Activity:
    """What `GET /health` tells besides "ok": the answers being written, and how many were left by their client.

    And how many streams `demo-breaks` has begun, of which the first and then every other one breaks off.
    """

    answering: int = 0
    abandoned: int = 0
    breaking: int = 0

    @contextmanager
    def one_answer(self) -> Iterator[None]:
        """Counts one answer for as long as the block runs."""
        self.answering += 1
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            self.abandoned += 1
            raise
        finally:
            self.answering -= 1


ACTIVITY = web.AppKey("activity", Activity)
WORD_DELAY_S = web.AppKey("word_delay_s", float)
SLOW_S = web.AppKey("slow_s", float)


class Refusal(Exception):
    """A request this server answers with an error; `refusals_in_openai_shape` writes it in OpenAI's envelope."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@web.middleware
async def refusals_in_openai_shape(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        status, message, param, code = refusal.status, str(refusal), refusal.param, refusal.code
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as unknown:
        status, param, code = unknown.status, None, "unknown_url"
        message = f"Unknown request URL: {request.method} {request.path}."
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return web.json_response({"error": error}, status=status)


async def read_json_object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise Refusal(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The body of the request must be a JSON object.")
    return body


def text_of(content: object) -> str:
    """The text of a message's `content`: a string, or an array of parts of which only the text ones count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
    return "\n".join(text for text in texts if isinstance(text, str))


def write_answer(model: str, messages: list[dict[str, Any]]) -> str:
    """The answer to the last message of role `user`, which it quotes (200 characters of it at most)."""
    question = next((text_of(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "").strip()
    if len(question) > 200:
        question = question[:199] + "…"
    quote = "\n".join(f"> {line}".rstrip() for line in (question or "(nothing)").splitlines())
    return ANSWER.format(model=model, quote=quote).strip()


@dataclass(frozen=True)
class Completion:
    """One answer, ready to be told as one JSON object or as a stream of chunks."""

    id: str
    model: str
    created: int
    text: str
    prompt_words: int

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def words(self) -> list[str]:
        """The text cut after the blanks behind each word: joined, the pieces are the text again."""
        return re.findall(r"\S+\s*", self.text)

    def usage(self) -> dict[str, int]:
        """Words stand for tokens: simple, and easy to check by eye."""
        answer_words = len(self.words())
        return {
            "prompt_tokens": self.prompt_words,
            "completion_tokens": answer_words,
            "total_tokens": self.prompt_words + answer_words,
        }

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return self.head("chat.completion") | {"choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.head("chat.completion.chunk") | {"choices": [choice]}


def read_slow_s(request: web.Request) -> float:
    """How long `demo-slow` thinks: `?slow_s=0.2` in the address of one request beats the value set at start."""
    try:
        slow_s = float(request.query.get("slow_s", request.app[SLOW_S]))
    except ValueError:
        slow_s = math.nan
    if not 0 <= slow_s <= 3600:
        raise Refusal(400, "slow_s must be a number of seconds from 0 to 3600.", param="slow_s")
    return slow_s


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body = await read_json_object(request)
    model, messages = body.get("model"), body.get("messages")
    if model not in MODELS:
        raise Refusal(404, f"The model `{model}` does not exist.", param="model", code="model_not_found")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refusal(400, "messages must be an array of one or more message objects.", param="messages")
    asks_stream = body.get("stream") is True
    if asks_stream and model == "demo-refuses-stream":
        raise Refusal(400, f"The model `{model}` does not support streaming.", param="stream", code="unsupported_value")
    completion = Completion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model,
        created=int(time.time()),
        text=write_answer(model, messages),
        prompt_words=sum(len(text_of(message.get("content")).split()) for message in messages),
    )
    with request.app[ACTIVITY].one_answer():
        if model == "demo-slow":
            await asyncio.sleep(read_slow_s(request))
        if model == "demo-json-only":
            await asyncio.sleep(JSON_ONLY_THINKING_S)
        if not asks_stream or model == "demo-json-only":
            return web.json_response(completion.whole())
        options = body.get("stream_options")
        includes_usage = isinstance(options, dict) and options.get("include_usage") is True
        return await stream(request, completion, includes_usage=includes_usage)


async def stream(request: web.Request, completion: Completion, *, includes_usage: bool) -> web.StreamResponse:
    """Sends the completion as OpenAI does: role, content, finish reason, usage when asked for, `[DONE]`."""
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)

    async def send(chunk: dict[str, Any]) -> None:
        # OpenAI's rule: with include_usage every chunk has the key, and it is null in all but the last.
        data = {"usage": None} | chunk if includes_usage else chunk
        await response.write(f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode())

    words = completion.words()
    last = len(words)
    if completion.model == "demo-breaks":
        request.app[ACTIVITY].breaking += 1
        if request.app[ACTIVITY].breaking % 2:
            last = len(words) * 2 // 3
    await send(completion.chunk({"role": "assistant", "content": "", "refusal": None}))
    for position, word in enumerate(words):
        await asyncio.sleep(request.app[WORD_DELAY_S])
        if position == last:
            assert request.transport is not None
            request.transport.abort()
            return response
        await send(completion.chunk({"content": word}))
    await send(completion.chunk({}, finish_reason="stop"))
    if includes_usage:
        await send(completion.head("chat.completion.chunk") | {"choices": [], "usage": completion.usage()})
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def embed(text: str) -> list[float]:
    """A made-up vector of length 1: the same text has the same one, and nearness means nothing."""
    digest = hashlib.sha256(text.encode()).digest()
    numbers = [byte - 127.5 for byte in digest[:EMBEDDING_DIMENSIONS]]
    length = math.hypot(*numbers)
    return [round(number / length, 6) for number in numbers]


async def embeddings(request: web.Request) -> web.Response:
    """Takes any model name. Base64 is answered too: the official SDKs ask for it unless told otherwise."""
    body = await read_json_object(request)
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "input must be a string or an array of strings.", param="input")
    data = []
    for index, text in enumerate(texts):
        vector: list[float] | str = embed(text)
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{EMBEDDING_DIMENSIONS}f", *embed(text))).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    words = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": words, "total_tokens": words}
    return web.json_response({"object": "list", "data": data, "model": body.get("model"), "usage": usage})


async def models(request: web.Request) -> web.Response:
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "headwater-demo"} for name in MODELS]
    return web.json_response({"object": "list", "data": data})


async def health(request: web.Request) -> web.Response:
    activity = request.app[ACTIVITY]
    return web.json_response({"status": "ok", "answering": activity.answering, "abandoned": activity.abandoned})


def make_app(*, word_delay_s: float, slow_s: float) -> web.Application:
    app = web.Application(middlewares=[refusals_in_openai_shape], client_max_size=MAX_BODY_BYTES)
    app[ACTIVITY], app[WORD_DELAY_S], app[SLOW_S] = Activity(), word_delay_s, slow_s
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/v1/embeddings", embeddings)
    return app


def watch_stdin(on_end: Callable[[], object]) -> None:
    """Calls `on_end` from another thread at stdin's end. A thread, because an event loop cannot watch a plain file."""

    def read_to_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        on_end()

    threading.Thread(target=read_to_end, daemon=True).start()


async def serve(app: web.Application, *, host: str, port: int, exit_with_stdin: bool) -> None:
    """Serves until SIGINT, SIGTERM or, when asked, the end of stdin; answers still being written are cut."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop.set)
    # handler_cancellation: without it aiohttp lets a handler write on to a client that has left.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        if exit_with_stdin:
            watch_stdin(lambda: loop.call_soon_threadsafe(stop.set))
        shown_host = f"[{host}]" if ":" in host else host
        print(f"listening http://{shown_host}:{runner.addresses[0][1]}/v1", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small OpenAI-compatible server for demos and tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free port")
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin ends, as when the parent dies")
    parser.add_argument("--word-delay-ms", type=float, default=40.0, help="pause before each word (default: 40)")
    parser.add_argument(
        "--slow-s",
        type=float,
        default=os.environ.get("HEADWATER_DEMO_SLOW_S", "3"),
        help="how long demo-slow thinks (default: $HEADWATER_DEMO_SLOW_S, else 3)",
    )
    options = parser.parse_args()
    app = make_app(word_delay_s=options.word_delay_ms / 1000, slow_s=options.slow_s)
    asyncio.run(serve(app, host=options.host, port=options.port, exit_with_stdin=options.exit_with_stdin))


if __name__ == "__main__":
    main()
