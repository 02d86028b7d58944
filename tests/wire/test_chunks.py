"""A completion as chunks and back: nothing lost, nothing said twice, nothing torn."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.wire.chunks import assemble, fill_in, pieces, split
from proxy.wire.normal import Expected, Normalizer
from tests.conftest import examples

FILL: dict[str, Any] = {"fallback_id": "chatcmpl-ours", "created": 1111, "model": "asked-for"}
ORDER = ["role", "reasoning_content", "reasoning", "content", "refusal", "tool_calls", "finish_reason"]
ENVELOPE: dict[str, Any] = {"id": "c1", "object": "chat.completion", "created": 7, "model": "m"}

TEXT = st.text(max_size=60) | st.text("a \n\u0301\u200d👩🇩🇪é\u0600", max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    optional: dict[str, st.SearchStrategy[Any]] = {
        "role": st.sampled_from(["assistant", "tool"]),
        "content": st.none() | TEXT,
        "refusal": st.none() | TEXT,
        "reasoning_content": TEXT,
        "reasoning": TEXT,
        "annotations": st.lists(st.fixed_dictionaries({"type": st.just("url_citation"), "x": JSON}), max_size=2),
        "audio": st.none() | st.fixed_dictionaries({"id": st.just("audio_1"), "data": st.text(max_size=9)}),
        "function_call": st.fixed_dictionaries({"name": st.just("f"), "arguments": TEXT}),
        "x_new": JSON,
    }
    message: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": draw(TEXT)}}
        | draw(st.fixed_dictionaries({}, optional={"x_new": JSON}))
        for number in range(draw(st.integers(0, 3)))
    ]
    calls += draw(st.sampled_from([[], [{"id": "c", "type": "custom", "custom": {"name": "g", "input": "x"}}]]))
    return message | ({"tool_calls": calls} if calls else {})


COMPLETIONS = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"message": messages()},
                optional={
                    "finish_reason": st.sampled_from(["stop", "length", "tool_calls", None]),
                    "logprobs": st.none() | st.fixed_dictionaries({"content": st.lists(JSON, max_size=3)}),
                    "x_choice": JSON,
                },
            ),
            min_size=1,
            max_size=3,
        )
    },
    optional={
        "id": st.sampled_from(["c1", "", None]),
        "object": st.sampled_from(["chat.completion", ""]),
        "created": st.integers(0, 9),
        "model": st.sampled_from(["m", None]),
        "service_tier": st.none() | st.just("default"),
        "system_fingerprint": st.none() | st.just("fp"),
        "x_top": JSON,
        "usage": st.just({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
    },
)


def chunks_of(events: list[bytes]) -> list[dict[str, Any]]:
    assert all(
        event.startswith(b"data: {") and event.endswith(b"}\n\n") and event.count(b"\n") == 2 for event in events
    )
    return [json.loads(event[6:]) for event in events]


def what(choice: dict[str, Any]) -> str:
    """What a chunk is there for."""
    if choice["finish_reason"] is not None:
        return "finish_reason"
    return next((name for name in ORDER if name in choice["delta"]), "finish_reason")


@given(COMPLETIONS)
@examples(250)
def test_a_completion_survives_being_split_and_put_together(completion: dict[str, Any]) -> None:
    """https://github.com/diegosouzapw/OmniRoute/issues/3112, https://github.com/BerriAI/litellm/issues/21090"""
    before = copy.deepcopy(completion)
    filled = fill_in(completion, **FILL)
    events = list(split(filled))
    expected = copy.deepcopy(filled)
    expected.pop("usage", None)
    for choice in expected["choices"]:
        choice.setdefault("finish_reason", None)
        choice["message"].setdefault("content", None)
    assert assemble(events) == expected
    assert assemble([b"".join(events)]) == expected
    assert completion == before, "what was given is left alone"
    assert fill_in(filled, **FILL) == filled


@given(COMPLETIONS)
@examples(150)
def test_each_member_is_said_once_and_in_the_order_that_all_clients_read(completion: dict[str, Any]) -> None:
    filled = fill_in(completion, **FILL)
    chunks = chunks_of(list(split(filled)))
    envelope = {name: filled[name] for name in ("id", "created", "model")}
    assert all(chunk.items() >= envelope.items() and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    top = [name for chunk in chunks for name in chunk if name not in (*envelope, "object", "choices")]
    assert sorted(top) == sorted(filled.keys() - {*envelope, "object", "choices", "usage"})
    for position, whole in enumerate(filled["choices"]):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == position]
        assert [bool(choice["delta"].get("role")) for choice in choices] == [True] + [False] * (len(choices) - 1)
        stages = [ORDER.index(what(choice)) for choice in choices]
        assert stages == sorted(stages)
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["delta"] == {}
        said = [name for choice in choices for name in choice["delta"] if name not in ORDER]
        assert sorted(said) == sorted(whole["message"].keys() - set(ORDER))
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        assert [call["id"] for call in calls if "id" in call] == [
            c["id"] for c in whole["message"].get("tool_calls", [])
        ]
    indices = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert indices == sorted(indices)


@given(COMPLETIONS)
@examples(80)
def test_what_is_made_of_a_completion_is_in_normal_form_already(completion: dict[str, Any]) -> None:
    stream = b"".join(split(fill_in(completion, **FILL)))
    assert Normalizer(Expected("x", 1, "x"), 1 << 20).feed(stream) == stream


@given(TEXT)
@examples(300)
@example("🇩🇪🇫🇷🇮🇹" * 9)
@example("👩‍👩‍👧‍👦" * 40)
@example("Straße e\u0301 \u0301 \r\n \u200d👩 \u0600 x")
@example("क्षि" * 30)
def test_pieces_join_to_the_text_and_cut_no_character_that_is_seen_as_one(text: str) -> None:
    """A character as people see it is an extended grapheme cluster of Unicode UAX #29."""
    made = pieces(text)
    assert "".join(made) == text
    assert all(made)
    edges, position = {0}, 0
    for grapheme in regex.findall(r"\X", text):
        position += len(grapheme)
        edges.add(position)
    position = 0
    for piece in made:
        position += len(piece)
        assert position in edges, (piece, text)


def test_a_long_text_comes_in_many_pieces_and_not_in_one() -> None:
    """A cached or synthesized answer that arrives as one giant chunk is no stream to a user:
    https://github.com/BerriAI/litellm/issues/11145."""
    assert pieces("Hello, world! It is  me.") == ["Hello,", " world!", " It", " is", "  me."]
    assert len(pieces("x" * 160)) == 10
    assert len(pieces("日本語" * 100)) >= 15
    assert pieces("") == []


def test_texts_of_every_kind_come_back_in_order() -> None:
    message = {
        "role": "assistant",
        "content": "Hi there",
        "reasoning": "so",
        "reasoning_content": "hm hm",
        "refusal": "no",
    }
    events = list(split(fill_in({**ENVELOPE, "choices": [{"message": message, "finish_reason": "stop"}]}, **FILL)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(events)]
    assert deltas == [
        {"role": "assistant"},
        {"reasoning_content": "hm"},
        {"reasoning_content": " hm"},
        {"reasoning": "so"},
        {"content": "Hi"},
        {"content": " there"},
        {"refusal": "no"},
        {},
    ]


@pytest.mark.parametrize("empty", [[], None])
def test_a_message_with_no_tool_calls_does_not_begin_one(empty: Any) -> None:
    """vLLM writes `"tool_calls": []` into every message; clients take the member itself for a call:
    https://github.com/vercel/ai/issues/20537."""
    message = {"role": "assistant", "content": "Hi", "tool_calls": empty}
    events = list(split(fill_in({**ENVELOPE, "choices": [{"message": message}]}, **FILL)))
    assert b"tool_calls" not in b"".join(events)


@pytest.mark.parametrize(
    ("completion", "member", "expected"),
    [
        ({"choices": []}, "id", "chatcmpl-ours"),
        ({"id": "", "choices": []}, "id", "chatcmpl-ours"),
        ({"created": "today", "choices": []}, "created", 1111),
        ({"model": None, "choices": []}, "model", "asked-for"),
        ({"object": "text_completion", "choices": []}, "object", "chat.completion"),
        ({"x": 1, "choices": []}, "x", 1),
        (
            {"choices": [{"text": "old form"}, {"message": {"content": "b"}}]},
            "choices",
            [
                {"index": 0, "text": "old form", "message": {"role": "assistant", "content": "old form"}},
                {"index": 1, "message": {"role": "assistant", "content": "b"}},
            ],
        ),
        (
            {"choices": [{"index": 4, "message": {"role": ""}}]},
            "choices",
            [{"index": 4, "message": {"role": "assistant"}}],
        ),
    ],
)
def test_what_is_missing_is_filled_in(completion: dict[str, Any], member: str, expected: Any) -> None:
    assert fill_in(completion, **FILL)[member] == expected


@pytest.mark.parametrize(
    "completion", [{}, {"choices": None}, {"choices": {}}, {"choices": ["x"]}, {"choices": [None]}]
)
def test_what_is_no_completion_is_told(completion: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choice"):
        fill_in(completion, **FILL)


def delta(index: int = 0, /, **members: Any) -> dict[str, Any]:
    return {**ENVELOPE, "choices": [{"index": index, "delta": members, "finish_reason": None}]}


def put_together(*deltas: dict[str, Any]) -> Any:
    events = [b"data: " + json.dumps(value).encode() + b"\n\n" for value in deltas]
    return assemble(events)["choices"][0]


def test_choices_and_tool_calls_that_come_interleaved_are_told_apart() -> None:
    head = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
    stream = [delta(1, role="assistant", content="B"), delta(0, role="assistant", content="A")]
    stream += [
        delta(0, tool_calls=[head, {**head, "index": 1, "id": "b"}]),
        delta(1, content="b"),
        delta(0, content="a"),
    ]
    stream += [delta(0, tool_calls=[{"index": i, "function": {"arguments": str(i)}}]) for i in (1, 0, 0, 1)]
    made = assemble(b"data: " + json.dumps(value).encode() + b"\n\n" for value in stream)
    assert [choice["message"]["content"] for choice in made["choices"]] == ["Aa", "Bb"]
    calls = made["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "00"), ("b", "11")]


@pytest.mark.parametrize("first", [None, "", "{"])
def test_arguments_may_begin_with_null(first: str | None) -> None:
    """Some upstreams write `"arguments": null` into the head of a call, whose arguments follow."""
    head = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": first}}
    made = put_together(delta(tool_calls=[head]), delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]))
    assert made["message"]["tool_calls"][0]["function"]["arguments"] == (first or "") + "}"


def test_a_call_of_the_old_kind_is_joined_too() -> None:
    """`function_call`: https://platform.openai.com/docs/api-reference/chat-streaming"""
    head, *pieces = {"name": "f", "arguments": ""}, {"arguments": '{"a":'}, {"arguments": "1}"}
    made = put_together(delta(function_call=None), *(delta(function_call=part) for part in (head, *pieces)))
    assert made["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}


def test_thoughts_that_come_in_parts_stay_before_the_text() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
    parts = [delta(role="assistant", content=""), delta(content=[thought]), delta(content="H"), delta(content="i")]
    assert put_together(*parts[:2])["message"]["content"] == [thought]
    assert put_together(*parts)["message"]["content"] == [thought, {"type": "text", "text": "Hi"}]


def test_the_last_value_that_is_not_null_counts_and_lists_grow() -> None:
    opening = {**delta(role="assistant", content="a"), "system_fingerprint": "fp", "service_tier": None}
    opening["choices"][0]["logprobs"] = {"content": [1], "refusal": None}
    later = {**delta(content="b", annotations=[1]), "system_fingerprint": None, "service_tier": "flex", "usage": None}
    later["choices"][0] |= {"logprobs": {"content": [2]}, "finish_reason": "stop"}
    late = delta(annotations=[2]) | {"usage": {"prompt_tokens": 1}}
    late["choices"][0]["logprobs"] = None
    events = [b"data: " + json.dumps(value).encode() + b"\n\n" for value in (opening, later, late)]
    assert assemble([b": ping\n\n", *events, b"data: [DONE]\n\n"]) == {
        **ENVELOPE,
        "system_fingerprint": "fp",
        "service_tier": "flex",
        "usage": {"prompt_tokens": 1},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "annotations": [1, 2]},
                "logprobs": {"content": [1, 2], "refusal": None},
                "finish_reason": "stop",
            }
        ],
    }


def test_a_stream_of_nothing_is_a_completion_of_nothing() -> None:
    assert assemble([]) == {"object": "chat.completion", "choices": []}


NAMES = ["id", "choices", "index", "message", "delta", "role", "content", "tool_calls", "function", "arguments", "new"]
ODD = st.recursive(
    st.sampled_from([None, True, 0, 2.5, "", "a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"choices": st.lists(st.fixed_dictionaries({"message": ODD, "new": ODD}), max_size=2), "new": ODD}
    )
)
@examples(300)
@example({"choices": [{"message": {"tool_calls": "x"}}]})
@example({"choices": [{"message": {"tool_calls": 3}}]})
@example({"choices": [{"message": {"tool_calls": [None]}}]})
def test_a_body_of_odd_members_is_a_completion_or_a_value_error_and_nothing_worse(body: dict[str, Any]) -> None:
    try:
        events = list(split(fill_in(body, **FILL)))
    except ValueError:
        return
    assemble(events)
