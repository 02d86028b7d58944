"""A completion as chunks, and chunks as a completion. Each is the other's inverse, for every member there is.

`split` writes what a streaming upstream would have sent, in normal form and in the order all clients read: role,
reasoning, content, refusal, tool calls, finish, then (by the caller) usage and `[DONE]`. Every member of the
completion appears exactly once, members nobody knows included: those of the completion on the first chunk, those of
a message beside its role, those of a choice beside its finish reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import regex

from proxy.wire.encoding import dumps, loads
from proxy.wire.sse import data_event

# A piece is a word with the white space before it, or at most 16 graphemes of it. `\X` is an extended grapheme
# cluster (Unicode UAX #29), so that no accent, flag or joined emoji is ever torn.
_PIECE = regex.compile(r"\s*+(?:(?!\s)\X){1,16}+|\s++")

_TEXT_MEMBERS = ("reasoning_content", "reasoning", "content", "refusal")
_ENVELOPE = ("id", "object", "created", "model")


# Each piece becomes an event of about 150 bytes: a text of millions of words is told in as many words a piece as it
# takes to stay below this number.
_MAX_PIECES = 20_000


def pieces(text: str) -> list[str]:
    """The text in token-like pieces, which join to the text again; at most 20,000 of them."""
    found: list[str] = _PIECE.findall(text)
    together = -(-len(found) // _MAX_PIECES)
    if together <= 1:
        return found
    return ["".join(found[start : start + together]) for start in range(0, len(found), together)]


def split(completion: dict[str, Any]) -> Iterator[bytes]:
    """The events of a stream that says what the completion says, without usage and `[DONE]`.

    The completion must have its envelope (`id`, `created`, `model`) and a list of choices with a message each;
    `fill_in` sees to it. Costs about 1 ms per 10,000 characters.
    """
    base = {name: completion.get(name) for name in _ENVELOPE} | {"object": "chat.completion.chunk"}
    extras = {name: value for name, value in completion.items() if name not in (*_ENVELOPE, "choices", "usage")}

    def event(choice: dict[str, Any]) -> bytes:
        nonlocal extras
        chunk = {**base, "choices": [choice], **extras}
        extras = {}
        return data_event(dumps(chunk))

    for choice in completion["choices"]:
        index = choice["index"]
        message = choice["message"]
        texts = {name: message[name] for name in _TEXT_MEMBERS if isinstance(message.get(name), str) and message[name]}
        given = message.get("tool_calls")
        calls = [call for call in given if isinstance(call, dict)] if isinstance(given, list) else []
        rest = {
            name: value for name, value in message.items() if name not in texts and name not in ("role", "tool_calls")
        }
        opening = {"role": message.get("role") or "assistant", **rest}
        yield event({"index": index, "delta": opening, "finish_reason": None})
        for name, text in texts.items():
            for piece in pieces(text):
                yield event({"index": index, "delta": {name: piece}, "finish_reason": None})
        for position, call in enumerate(calls):
            for delta in _call_deltas(position, call):
                yield event({"index": index, "delta": {"tool_calls": [delta]}, "finish_reason": None})
        closing = {name: value for name, value in choice.items() if name not in ("index", "message", "finish_reason")}
        yield event({"index": index, "delta": {}, "finish_reason": choice.get("finish_reason"), **closing})


def usage_event(completion: Mapping[str, Any], usage: dict[str, Any]) -> bytes:
    """The event that says a completion's usage, behind those of `split`."""
    base = {name: completion[name] for name in ("id", "created", "model")}
    return data_event(dumps(base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}))


def _call_deltas(position: int, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A tool call's head (id, name), then its arguments."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        yield {**call, "index": position}
        return
    yield {**call, "index": position, "function": {**function, "arguments": ""}}
    if function["arguments"]:
        yield {"index": position, "function": {"arguments": function["arguments"]}}


def fill_in(completion: dict[str, Any], *, fallback_id: str, created: int, model: str) -> dict[str, Any]:
    """The completion with whatever of its form is missing: envelope, indices, messages, roles.

    ValueError when it has no list of choices, which is not a completion at all.
    """
    choices = completion.get("choices")
    if not isinstance(choices, list):
        raise ValueError("no choices")
    filled = []
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise ValueError(f"choice {position} is no object")
        index = choice.get("index")
        message = choice.get("message")
        if type(index) is int and isinstance(message, dict) and message.get("role"):
            filled.append(choice)
            continue
        if not isinstance(message, dict):
            message = {"content": choice.get("text")}
        filled.append(
            {
                **choice,
                "index": index if isinstance(index, int) else position,
                "message": {**message, "role": message.get("role") or "assistant"},
            }
        )
    created_at = completion.get("created")
    return {
        **completion,
        "id": completion.get("id") or fallback_id,
        "object": "chat.completion",
        "created": created_at if isinstance(created_at, int) else created,
        "model": completion.get("model") or model,
        "choices": filled,
    }


def assemble(stream: Iterable[bytes]) -> dict[str, Any]:
    """The completion that a stream in normal form says. `stream` is its segments, each of whole events.

    Text is joined, and so are the arguments of tool calls, by their index, and of the one call of the old kind
    (`function_call`); lists (log probabilities, annotations) are appended; of anything else the last value that is not null
    counts. Costs about 1 ms per 400 chunks.
    """
    completion: dict[str, Any] = {}
    choices: dict[int, _Choice] = {}
    for segment in stream:
        for event in segment.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            chunk = loads(event[6:])
            for name, value in chunk.items():
                if name == "choices":
                    for choice in value:
                        choices.setdefault(choice["index"], _Choice()).add(choice)
                elif name not in completion or value is not None:
                    completion[name] = value
    completion["object"] = "chat.completion"
    completion["choices"] = [{"index": index, **choices[index].result()} for index in sorted(choices)]
    if usage := completion.pop("usage", None):
        completion["usage"] = usage
    return completion


class _Choice:
    """One choice of a stream, being put together."""

    __slots__ = ("_calls", "_members", "_message", "_texts")

    def __init__(self) -> None:
        self._members: dict[str, Any] = {}
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, choice: dict[str, Any]) -> None:
        for name, value in choice.items():
            if name == "delta":
                self._add_delta(value)
            elif name != "index":
                _merge(self._members, name, value)

    def _add_delta(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name == "tool_calls" and isinstance(value, list):
                for call in value:
                    self._add_call(call)
            elif name == "function_call" and isinstance(value, dict):
                _add_function(self._message, name, value)
            elif name != "role" and isinstance(value, str):
                self._texts.setdefault(name, []).append(value)
            else:
                _merge(self._message, name, value)

    def _add_call(self, delta: dict[str, Any]) -> None:
        call = self._calls.setdefault(delta["index"], {})
        for name, value in delta.items():
            if name == "function" and isinstance(value, dict):
                _add_function(call, name, value)
            elif name != "index":
                _merge(call, name, value)

    def result(self) -> dict[str, Any]:
        message = dict(self._message)
        for name, parts in self._texts.items():
            text, others = "".join(parts), message.get(name)
            if isinstance(others, list):
                # Some models think in parts before they answer in text: https://docs.mistral.ai/studio-api/conversations/reasoning
                message[name] = [*others, {"type": "text", "text": text}] if text else others
            else:
                message[name] = text
        if self._calls:
            message["tool_calls"] = [_finished(self._calls[index], "function") for index in sorted(self._calls)]
        return {"message": _finished(message, "function_call"), "finish_reason": None, **self._members}


def _add_function(into: dict[str, Any], name: str, delta: dict[str, Any]) -> None:
    """Add a part of a function's call, whose arguments come in pieces: they are a list until it is `_finished`."""
    if not isinstance(function := into.get(name), dict):
        function = into[name] = {}
    for key, part in delta.items():
        if key == "arguments" and isinstance(part, str):
            known = function.get("arguments")
            if isinstance(known, list):
                known.append(part)
            else:
                function["arguments"] = [part]
        else:
            _merge(function, key, part)


def _finished(owner: dict[str, Any], name: str) -> dict[str, Any]:
    function = owner.get(name)
    if isinstance(function, dict) and isinstance(function.get("arguments"), list):
        function["arguments"] = "".join(function["arguments"])
    return owner


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    known = into.get(name)
    if isinstance(known, list) and isinstance(value, list):
        known.extend(value)
    elif isinstance(known, dict) and isinstance(value, dict):
        for key, part in value.items():
            _merge(known, key, part)
    elif name not in into or value is not None:
        into[name] = value
