"""How many tokens a conversation is, where the upstream does not say. An estimate, and marked as one.

The count of a message is its text plus 3, a reply is primed with 3 more (OpenAI's cookbook, "How to count tokens with
tiktoken": https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken). An image counts as 85, the figure
of a low-detail one (https://platform.openai.com/docs/guides/images-vision).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxy.chat import Usage
from proxy.wire.encoding import dumps

Count = Callable[[str], int]

_PER_MESSAGE = 3
_REPLY_PRIMING = 3
_PER_IMAGE = 85


def estimate(count: Count, body: dict[str, Any], completion: dict[str, Any]) -> Usage:
    """The usage of a request's body and its assembled completion. `count` gives the tokens of a text; it may be slow."""
    messages = body.get("messages") or []
    prompt = sum(_PER_MESSAGE + _count_value(count, message) for message in messages) + _REPLY_PRIMING
    for name in ("tools", "functions", "response_format"):
        if body.get(name):
            prompt += count(dumps(body[name]).decode())
    answer = sum(_count_value(count, _generated(choice["message"])) for choice in completion["choices"])
    return Usage(prompt, answer, estimated=True)


def _generated(message: dict[str, Any]) -> dict[str, Any]:
    """What of an answer the model has made: not its role, and once what is said under two names."""
    twice = {"role"}
    if reasoning := message.get("reasoning"):
        # The details say the same: https://openrouter.ai/docs/use-cases/reasoning-tokens
        twice.add("reasoning_details")
        if message.get("reasoning_content") == reasoning:
            twice.add("reasoning_content")
    return {name: value for name, value in message.items() if name not in twice}


def _count_value(count: Count, value: Any) -> int:
    match value:
        case str():
            return count(value)
        case {"type": "text", "text": str(text)}:
            return count(text)
        case {"type": "image_url" | "input_image" | "input_audio" | "file"}:
            return _PER_IMAGE
        case dict():
            return sum(_count_value(count, part) for name, part in value.items() if name not in ("id", "type", "index"))
        case list():
            return sum(_count_value(count, part) for part in value)
    return 0
