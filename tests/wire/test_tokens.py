"""The estimate, with a count that is easy to follow: one token for each word."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.chat import Usage
from proxy.wire.tokens import estimate
from tests.conftest import examples


def count(text: str) -> int:
    return len(text.split())


def said(*messages: Any, **members: Any) -> dict[str, Any]:
    return {"messages": list(messages), **members}


def answer(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": n, "message": message} for n, message in enumerate(messages)]}


NOTHING = answer()
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "many words " * 1000}}


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (said(), 3),
        ({}, 3),
        (said({"role": "user", "content": "one two"}), 3 + 3 + 1 + 2),
        (
            said({"role": "system", "content": "be brief"}, {"role": "user", "content": "why"}),
            3 + (3 + 1 + 2) + (3 + 1 + 1),
        ),
        (said({"role": "user", "content": [{"type": "text", "text": "one two"}]}), 3 + 3 + 1 + 2),
        (said({"role": "user", "content": [{"type": "text", "text": "a b"}, IMAGE, IMAGE]}), 3 + 3 + 1 + 2 + 2 * 85),
        (
            said({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "a b c"}}]}),
            3 + 3 + 1 + 85,
        ),
        (said({"role": "user", "content": [{"type": "file", "file": {"file_data": "a b c"}}]}), 3 + 3 + 1 + 85),
        (said({"role": "user", "content": None}), 3 + 3 + 1),
        (said({"role": "user", "name": "Ann", "content": "x"}), 3 + 3 + 1 + 1 + 1),
        (
            said(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "call 1", "type": "function", "function": {"name": "f", "arguments": "a b c"}}
                    ],
                }
            ),
            3 + 3 + 1 + 1 + 3,
        ),
    ],
)
def test_a_prompt_is_its_words_and_three_for_each_message_and_three_for_the_reply(body: Any, prompt: int) -> None:
    """OpenAI's cookbook: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken"""
    assert estimate(count, body, NOTHING) == Usage(prompt, 0, estimated=True)


@pytest.mark.parametrize("name", ["tools", "functions", "response_format"])
def test_what_describes_tools_and_formats_is_prompt_too(name: str) -> None:
    described = {"type": "function", "function": {"name": "f", "description": "finds all the things"}}
    without = estimate(len, said(), NOTHING).prompt
    assert estimate(len, said(**{name: [described]}), NOTHING).prompt > without + len("finds all the things")
    assert estimate(len, said(**{name: None}), NOTHING).prompt == without


@pytest.mark.parametrize(
    ("completion", "tokens"),
    [
        (NOTHING, 0),
        (answer({"role": "assistant", "content": None}), 0),
        (answer({"role": "assistant", "content": "one two three"}), 3),
        (answer({"content": "one two three"}), 3),
        (answer({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b c"}), 3),
        (answer({"role": "assistant", "reasoning_content": "hm hm", "content": "a"}), 3),
        (answer({"reasoning_content": "hm hm", "reasoning": "hm hm", "content": "a"}), 3),
        (answer({"reasoning_content": "hm", "reasoning": "so so", "content": "a"}), 4),
        (answer({"reasoning": "hm hm", "reasoning_details": [{"text": "hm hm"}], "content": "a"}), 3),
        (answer({"reasoning_details": [{"text": "hm hm"}], "content": "a"}), 3),
        (answer({"role": "assistant", "refusal": "no way"}), 2),
        (
            answer({"role": "assistant", "tool_calls": [{"id": "x y", "function": {"name": "f", "arguments": "a b"}}]}),
            3,
        ),
    ],
)
def test_a_completion_is_what_was_generated(completion: dict[str, Any], tokens: int) -> None:
    assert estimate(count, said(), completion) == Usage(3, tokens, estimated=True)


PARTS = st.one_of(
    st.text(max_size=20),
    st.none(),
    st.lists(
        st.sampled_from([IMAGE, {"type": "text", "text": "a b"}, {"type": "new", "x": ["y"]}, "text", 3]), max_size=3
    ),
)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": PARTS})


@given(st.lists(MESSAGES, max_size=5), MESSAGES, st.text(min_size=1, max_size=30))
@examples(100)
def test_more_is_never_counted_as_less(messages: list[Any], message: Any, text: str) -> None:
    before = estimate(len, said(*messages), answer({"role": "assistant", "content": text}))
    assert estimate(len, said(*messages, message), NOTHING).prompt >= before.prompt + 3
    assert (
        estimate(len, said(*messages), answer({"role": "assistant", "content": text + "!"})).completion
        > before.completion
    )
    assert before.completion == len(text)
