"""What answers say of the tokens they took: where nobody reads them, and while they grow."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.chat import Usage
from proxy.wire.usage import END_BYTES, said_in, usage_at_ends
from tests.fakes.upstream import event, text

DETAILS = {
    "input_tokens": 36,
    "input_tokens_details": {"cached_tokens": 30},
    "output_tokens": 87,
    "output_tokens_details": {"reasoning_tokens": 64},
}
DETAILED = Usage(36, 87, cached=30, reasoning=64)


def tail(value: Any) -> bytes:
    return json.dumps(value).encode()[-END_BYTES:]


@pytest.mark.parametrize(
    ("end", "usage"),
    [
        (tail({"data": [{"embedding": [0.25] * 5000}], "usage": {"prompt_tokens": 8, "total_tokens": 8}}), Usage(8, 0)),
        (tail({"usage": {"prompt_tokens": 8, "completion_tokens": 0}, "model": "m", "object": "list"}), Usage(8, 0)),
        (
            b"event: response.completed\ndata: " + tail({"response": {"usage": DETAILS, "user": None}}) + b"\n\n",
            DETAILED,
        ),
        # Thoughts are among the answer's tokens, or beside them, as xAI has it: the total tells.
        (tail({"usage": {**DETAILS, "total_tokens": 36 + 87}}), DETAILED),
        (tail({"usage": {**DETAILS, "total_tokens": 36 + 87 + 64}}), Usage(36, 87 + 64, cached=30, reasoning=64)),
        (tail({"usage": {"prompt_tokens": 7, "completion_tokens": 2, "estimated": True}}), Usage(7, 2, estimated=True)),
        # Behind it stands what the client has put there.
        (tail({"usage": DETAILS, "metadata": {str(number): "😀" * 512 for number in range(16)}}), DETAILED),
        # Anthropic's prompt is what is not in its cache, and what was read from there or written there.
        (
            tail({"usage": {"input_tokens": 4, "cache_read_input_tokens": 30, "cache_creation_input_tokens": 2}}),
            Usage(36, 0, cached=30),
        ),
        (tail({"usage": {"prompt_tokens": 36, "cache_read_input_tokens": 30}}), Usage(36, 0)),
        (b'{"usage": ' * 10_000 + b"0" + b"}" * 10_000, None),
        (tail({"usage": None, "choices": []}), None),
        (tail({"text": 'says "usage": {"prompt_tokens": 5}'}), None),
        (tail({"usage": {"seconds": 12}}), None),
        (tail({"usage": {"prompt_tokens": 8, "completion_tokens": -1}}), None),
        (tail({"usage": {"prompt_tokens": -8, "completion_tokens": 1}}), None),
        (tail({"usage": {"prompt_tokens": 10**7, "completion_tokens": 10**7}}), Usage(10**7, 10**7)),
        (tail({"usage": {"prompt_tokens": 8, "completion_tokens": 10**7 + 1}}), None),
        (tail({"usage": {**DETAILS, "output_tokens_details": {"reasoning_tokens": 2**63}}}), Usage(36, 87, cached=30)),
        (tail({"usage": {"prompt_tokens": True, "completion_tokens": False}}), None),
        (tail({"usage": {**DETAILS, "input_tokens_details": {"cached_tokens": -30}}}), Usage(36, 87, reasoning=64)),
        (
            b'data: {"usage": {"prompt_tokens": 3}}\n\ndata: {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}',
            Usage(7, 2),
        ),
        (b'"usage": {"prompt_tokens": 3}, "usage": {"prompt', Usage(3, 0)),
        (b"\xff\xfe", None),
        (b"", None),
    ],
)
def test_the_end_of_an_answer_says_its_usage(end: bytes, usage: Usage | None) -> None:
    assert usage_at_ends(b"", end) == usage


MESSAGE = b'data: {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}'
DELTA = b'data: {"type": "message_delta", "usage": {"output_tokens": 15}}'


@pytest.mark.parametrize(
    ("head", "end", "usage"),
    [
        (MESSAGE, DELTA, Usage(25, 15)),
        (MESSAGE + DELTA, MESSAGE + DELTA, Usage(25, 15)),
        (MESSAGE, b'{"usage": {"input_tokens": 30, "output_tokens": 15}}', Usage(30, 15)),
        (b"{}", DELTA, Usage(0, 15)),
        (MESSAGE, b"{}", None),
    ],
)
def test_the_beginning_tells_of_the_prompt_where_the_end_does_not(head: bytes, end: bytes, usage: Usage | None) -> None:
    assert usage_at_ends(head, end) == usage


@given(st.binary(max_size=200))
def test_whatever_an_answer_ends_with_is_no_failure(end: bytes) -> None:
    usage_at_ends(end, b'"usage": {' + end)


@pytest.mark.parametrize(
    ("segment", "tokens"),
    [
        (text("a"), 1),
        (text("four"), 1),
        (text("fives"), 2),
        (text("") + text("Hello") + b": ping\n\n", 2),
        (text("word ") * 100, 125),
        (text("a") * 100, 100),
        (text("\u6f22\u5b57" * 10), 15),
        (b'data: {"choices": [{"index": 0, "delta": {"content": "\\udfff"}}]}\n\n', 1),
        (event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "content": None}}]}), 1),
        (
            event(
                {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]}
            ),
            1,
        ),
        (event({"choices": [{"index": 0, "delta": {"function_call": {"arguments": '{"a":'}}}]}), 2),
        (event({"choices": [{"index": 0, "delta": {"function_call": None}}]}), 0),
        (event({"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "fives"}, 5]}}]}), 2),
        (event({"choices": [{"index": 0, "delta": {"content": [{"thinking": [{"text": "fives"}]}]}}]}), 2),
        (event({"choices": [], "usage": {}}), 0),
        (b"data: [DONE]\n\n", 0),
    ],
)
def test_what_some_events_say_in_tokens(segment: bytes, tokens: int) -> None:
    assert said_in(segment).tokens == tokens
