"""What an upstream says of the tokens that an answer took."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

from proxy.chat import MOST_TOKENS, Usage
from proxy.wire.encoding import loads

BEGINNING_BYTES = 4096
"""Within so many of its first bytes an answer tells of its prompt, where it does."""

END_BYTES = 128 * 1024
"""Within so many of its last bytes an answer says its usage, whichever the route.

Behind it there may be what the client has put there: sixteen pairs of up to 64 and 512 characters, each of which may be twelve
bytes (`metadata`, https://platform.openai.com/docs/api-reference/responses/object).
"""

_MAX_LOOKED_AT = 8

_BYTES_PER_TOKEN = 4

_READ, _WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"

_usage_member = re.compile(r'"usage"\s*:\s*(?=\{)')
_decoder = json.JSONDecoder()


def read_usage(body: dict[str, Any]) -> Usage | None:
    """What a completion or chunk says of its tokens; Groq says it in `x_groq`. A zero is a figure, not a gap.

    What is marked as an estimate, by this proxy or another one like it, is one. A count below 0 or above ten million is
    none, and what is said beside it is not believed either: nobody is to be paid for a call, or to pay for what no model
    can give.
    """
    usage = body.get("usage")
    if not usage and "x_groq" in body and isinstance(body["x_groq"], dict):
        usage = body["x_groq"].get("usage")
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    counts = [count for count in (prompt, completion) if _is_whole(count)]
    if not counts or min(counts) < 0 or max(counts) > MOST_TOKENS:
        return None
    prompt = prompt if _is_whole(prompt) else 0
    cached = _detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    if "prompt_tokens" not in usage and _count(usage, _READ) + _count(usage, _WRITTEN):
        # Anthropic's `input_tokens` are those that have nothing to do with its cache, and the prompt is all three:
        # https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching
        cached = _count(usage, _READ)
        prompt += cached + _count(usage, _WRITTEN)
    completion = completion if _is_whole(completion) else 0
    reasoning = _detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    if reasoning and usage.get("total_tokens") == prompt + completion + reasoning:
        # xAI's thoughts are beside the answer and paid for like it: https://docs.x.ai/docs/key-information/consumption-and-rate-limits
        completion += reasoning
    return Usage(
        prompt,
        completion,
        usage.get("estimated") is True,
        cached=cached,
        reasoning=reasoning,
    )


def _detail(usage: dict[str, Any], places: tuple[str, str], name: str) -> int:
    """A count within a usage object; 0 where nothing is said of it, or what cannot be."""
    for place in places:
        if isinstance(details := usage.get(place), dict) and (count := _count(details, name)):
            return count
    return 0


def _count(counts: dict[str, Any], name: str) -> int:
    """One of some counts; 0 where it is missing, or cannot be."""
    count = counts.get(name)
    return count if _is_whole(count) and 0 <= count <= MOST_TOKENS else 0


def _is_whole(count: object) -> TypeGuard[int]:
    # To Python a JSON true is the number 1.
    return isinstance(count, int) and not isinstance(count, bool)


def usage_at_ends(head: bytes, tail: bytes) -> Usage | None:
    """What both ends of an answer that nobody reads say of its tokens: the last usage object there, of JSON or of a stream.

    Where that tells only of what was generated, the first one tells of the prompt: Anthropic's `message_delta` and
    `message_start` (https://docs.anthropic.com/en/docs/build-with-claude/streaming). None where there is none.
    """
    text = tail.decode("utf-8", "replace")
    places = deque((found.end() for found in _usage_member.finditer(text)), maxlen=_MAX_LOOKED_AT)
    usage = next(_usages_at(text, reversed(places)), None)
    if usage is not None and not usage.prompt:
        text = head.decode("utf-8", "replace")
        places_in_head = (found.end() for found in islice(_usage_member.finditer(text), _MAX_LOOKED_AT))
        if (begun := next(_usages_at(text, places_in_head), None)) is not None:
            return replace(usage, prompt=begun.prompt, cached=begun.cached)
    return usage


def _usages_at(text: str, places: Iterable[int]) -> Iterator[Usage]:
    """What the usage objects say that begin at some places in a part of an answer, and stand there whole."""
    for place in places:
        try:
            value, _ = _decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        if (usage := read_usage({"usage": value})) is not None:
            yield usage


class Said(NamedTuple):
    """How much some events of an answer say: in how many pieces, and in how many bytes (UTF-8)."""

    pieces: int = 0
    size: int = 0

    def __add__(self, other: object) -> Said:
        if not isinstance(other, Said):
            return NotImplemented
        return Said(self.pieces + other.pieces, self.size + other.size)

    @property
    def tokens(self) -> int:
        """About how many tokens that is: one for four bytes, and no fewer than pieces, for many streams have a token in each.

        What was said has to be added up before: rounded up piece by piece, a stream of words would be twice as long.
        """
        return max(self.pieces, -(-self.size // _BYTES_PER_TOKEN))


def said_in(segment: bytes) -> Said:
    """How much some events of a stream in normal form say."""
    said = Said()
    for event in segment.split(b"\n\n"):
        if event.startswith(b"data: {"):
            said += _said_by(loads(event[6:]))
    return said


def _said_by(chunk: dict[str, Any]) -> Said:
    sizes = []
    for choice in chunk["choices"]:
        delta = choice["delta"]
        texts = [delta.get(name) for name in ("reasoning_content", "reasoning", "refusal")]
        texts += _texts_of(delta.get("content"))
        texts += [call.get("function", {}).get("arguments") for call in delta.get("tool_calls") or ()]
        if isinstance(old_call := delta.get("function_call"), dict):
            texts.append(old_call.get("arguments"))
        # Half a surrogate pair is a text to JSON, and none to UTF-8.
        sizes += [len(text.encode(errors="replace")) for text in texts if isinstance(text, str) and text]
    return Said(len(sizes), sum(sizes))


def _texts_of(content: Any) -> list[Any]:
    """A text, or the texts of all parts where it has parts, as of a model that thinks in parts."""
    match content:
        case list():
            return [text for part in content for text in _texts_of(part)]
        case {"thinking": inner} | {"text": inner}:
            return _texts_of(inner)
        case str():
            return [content]
    return []
