"""The scripted answers that the upstream plays and the load generator checks.

Both ends of the benchmark are separate processes that share only this module: a `Plan` travels inside the request
body as `bench_*` fields (every contestant forwards fields it does not know), the upstream plays it, and the load
generator knows from the same plan what must have arrived. Every token differs from its neighbours, so an event that
was lost, doubled or moved shows in the text.

Nothing here reads a clock or does input or output.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

DONE = b"data: [DONE]\n\n"
STAMP_DIGITS = 20
"""A stamp has a fixed width, so that its event's HTTP chunk header can be built beforehand."""

_ENVELOPE: dict[str, Any] = {
    "id": "chatcmpl-BENCHaWQxMjM0NTY3ODkwYWJjZGU",
    "object": "chat.completion.chunk",
    "created": 1767225600,
    "model": "bench",
    "service_tier": "default",
    "system_fingerprint": "fp_44709d6fcb",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How one answer is played.

    chunks: content tokens; burst: tokens sent back to back (each its own write) before the next gap; first_ms: wait
    between the response head and the first event; size: a token is padded to this many characters; stamp: each
    token is the CLOCK_MONOTONIC time in ns of its own write, which any process of the same machine can compare; watched:
    the upstream can be asked what became of this answer, by its request's `bench_call`.
    """

    chunks: int
    stream: bool = True
    gap_ms: float = 0.0
    burst: int = 1
    first_ms: float = 0.0
    size: int = 0
    stamp: bool = False
    watched: bool = False

    @property
    def events(self) -> int:
        """SSE events of the whole answer as a client must see it: role, tokens, finish, [DONE]."""
        return self.chunks + 3


def to_fields(plan: Plan) -> dict[str, Any]:
    """The plan as request body fields."""
    return {name if name == "stream" else f"bench_{name}": value for name, value in asdict(plan).items()}


def from_fields(body: Mapping[str, Any]) -> Plan:
    """The plan in a request body; a request without one gets a short answer."""
    return Plan(
        chunks=int(body.get("bench_chunks", 3)),
        stream=bool(body.get("stream", False)),
        gap_ms=float(body.get("bench_gap_ms", 0.0)),
        burst=int(body.get("bench_burst", 1)),
        first_ms=float(body.get("bench_first_ms", 0.0)),
        size=int(body.get("bench_size", 0)),
        stamp=bool(body.get("bench_stamp", False)),
        watched=bool(body.get("bench_watched", False)),
    )


def token(index: int, size: int) -> str:
    return f" t{index}".ljust(size, "x")


def text(plan: Plan) -> str:
    return "".join(token(index, plan.size) for index in range(plan.chunks))


def frame(event: bytes) -> bytes:
    """One HTTP/1.1 chunk (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(event), event)


@lru_cache(maxsize=64)
def frames(chunks: int, size: int, usage: bool) -> tuple[bytes, ...]:
    """Every event of a streamed answer, each as the HTTP chunk to write; the last one also ends the body.

    With `usage` it is what OpenAI sends for `stream_options.include_usage`: `"usage": null` in every chunk and a last
    chunk with the numbers and empty `choices` (API reference, "The chat completion chunk object").
    """
    extra: dict[str, Any] = {"usage": None} if usage else {}
    events = [_event({"role": "assistant", "content": "", "refusal": None}, None, extra)]
    events += [_event({"content": token(index, size)}, None, extra) for index in range(chunks)]
    events.append(_event({}, "stop", extra))
    if usage:
        events.append(_sse(_ENVELOPE | {"choices": [], "usage": _usage(chunks)}))
    return (*map(frame, events), frame(DONE) + b"0\r\n\r\n")


@lru_cache(maxsize=2)
def stamp_frame(usage: bool) -> tuple[bytes, bytes]:
    """What stands before and after the stamp in a token's HTTP chunk."""
    mark = "#" * STAMP_DIGITS
    before, after = frame(_event({"content": mark}, None, {"usage": None} if usage else {})).split(mark.encode())
    return before, after


@lru_cache(maxsize=64)
def completion(chunks: int, size: int) -> bytes:
    """The JSON body of an answer that is not streamed."""
    content = text(Plan(chunks, size=size))
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _dump(_ENVELOPE | {"object": "chat.completion", "choices": [choice], "usage": _usage(chunks)})


def fault(body: bytes, plan: Plan) -> str | None:
    """Why `body` is not the whole answer to `plan`, or None when it is.

    Comments between events are allowed. A usage chunk is a fault: no request of the benchmark asks for one.
    """
    try:
        return _stream_fault(body, plan) if plan.stream else _json_fault(body, plan)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"not an answer: {error!r}"[:120]


def contents(body: bytes) -> list[str]:
    """The content of every token event of a streamed answer that has no fault, in order."""
    return _contents([_load(event) for event in _events(body)[:-1]])


def _contents(chunks: list[Any]) -> list[str]:
    deltas = (chunk["choices"][0]["delta"] for chunk in chunks)
    return [delta["content"] for delta in deltas if delta.get("content")]


def _json_fault(body: bytes, plan: Plan) -> str | None:
    whole = json.loads(body)["choices"][0]["message"]["content"] == text(plan)
    return None if whole else "wrong text"


def _stream_fault(body: bytes, plan: Plan) -> str | None:
    events = _events(body)
    done = DONE.rstrip()
    if not body.endswith(b"\n\n") or events.count(done) != 1 or events[-1] != done:
        return "not exactly one [DONE], at the end"
    chunks = [_load(event) for event in events[:-1]]
    if not all(chunk["choices"] for chunk in chunks):
        return "a usage chunk nobody asked for"
    if [chunk["choices"][0]["finish_reason"] for chunk in chunks].count("stop") != 1:
        return "not exactly one finish_reason"
    tokens = _contents(chunks)
    if len(tokens) != plan.chunks:
        return f"{len(tokens)} tokens of {plan.chunks}"
    expected = sorted(tokens) if plan.stamp else [token(index, plan.size) for index in range(plan.chunks)]
    return None if tokens == expected else "wrong text"


def _events(body: bytes) -> list[bytes]:
    return [event for event in body.split(b"\n\n") if event and not event.startswith(b":")]


def _load(event: bytes) -> Any:
    return json.loads(event.removeprefix(b"data: "))


def _event(delta: Mapping[str, Any], finish_reason: str | None, extra: dict[str, Any]) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _sse(_ENVELOPE | {"choices": [choice]} | extra)


def _usage(chunks: int) -> dict[str, int]:
    return {"prompt_tokens": 21, "completion_tokens": chunks, "total_tokens": 21 + chunks}


def _sse(value: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % _dump(value)


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
