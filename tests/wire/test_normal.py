"""From what upstreams stream to what all clients can read: verbatim where it can be, mended where it must be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.chat import Usage
from proxy.wire.chunks import assemble
from proxy.wire.normal import Expected, Normalizer
from proxy.wire.sse import EventTooLarge
from proxy.wire.usage import read_usage
from tests.conftest import examples

EXPECTED = Expected(fallback_id="chatcmpl-ours", created=1111, model="asked-for")
ENVELOPE: dict[str, Any] = {"id": "c1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
OURS: dict[str, Any] = {"id": "chatcmpl-ours", "object": "chat.completion.chunk", "created": 1111, "model": "asked-for"}
STOP: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": "stop"}
DONE = b"data: [DONE]\n\n"


def say(value: Any, *, separators: tuple[str, str] = (",", ":"), ensure_ascii: bool = False) -> bytes:
    """An event that holds a JSON value."""
    text = json.dumps(value, separators=separators, ensure_ascii=ensure_ascii)
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


def chunk(*choices: Any, **members: Any) -> dict[str, Any]:
    return {**ENVELOPE, "choices": list(choices), **members}


def delta(_index: int = 0, _finish: str | None = None, /, **members: Any) -> dict[str, Any]:
    return {"index": _index, "delta": members, "finish_reason": _finish}


def first(**members: Any) -> dict[str, Any]:
    """The first delta of a choice, in normal form."""
    return delta(role="assistant", **members)


def head(index: int | None, call_id: str | None, name: str, **members: Any) -> dict[str, Any]:
    """The head of a tool call, as OpenAI sends it."""
    made = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return {key: value for key, value in made.items() if value is not None} | members


def arguments(index: int | None, text: Any, **members: Any) -> dict[str, Any]:
    made = {"index": index, "function": {"arguments": text}}
    return {key: value for key, value in made.items() if value is not None} | members


def run(pieces: Iterable[bytes], expected: Expected = EXPECTED) -> tuple[bytes, Normalizer]:
    normalizer = Normalizer(expected, 1 << 24)
    return b"".join([*map(normalizer.feed, pieces), normalizer.finish()]), normalizer


def values(stream: bytes) -> list[Any]:
    """The JSON of each event of a stream, which must have the outer form."""
    assert not stream or stream.endswith(b"\n\n")
    events = stream.split(b"\n\n")[:-1]
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events), events
    return [json.loads(event[6:]) for event in events]


def normalized(*chunks: Any, expected: Expected = EXPECTED) -> list[Any]:
    """What becomes of these chunks; the same, however they arrive, and nothing more when it is done to them twice."""
    stream = b"".join(map(say, chunks))
    out, _ = run([stream], expected)
    assert run([stream[i : i + 1] for i in range(len(stream))], expected)[0] == out
    assert run([say(value) for value in chunks], expected)[0] == out
    assert run([out], expected)[0] == out
    return values(out)


def choices_of(chunks: list[Any]) -> list[Any]:
    return [choice for value in chunks for choice in value["choices"]]


# ---------------------------------------------------------------------------------------------- the fast lane

TEXTS = st.text(max_size=30) | st.sampled_from(
    ['"}}],"usage":{"prompt_tokens":1}', "\\", '\\"', "\n\r\t\x00", "é\u2028😀", "]}"]
)
KINDS = st.sampled_from(
    ["content", "reasoning_content", "reasoning", "refusal", "arguments", "obfuscated", "null usage"]
)


@st.composite
def openai_streams(draw: st.DrawFn) -> bytes:
    """Events as OpenAI and those who copy it write them; how a JSON text is spelled is up to each."""
    space = draw(st.sampled_from(["", " "]))
    spelling: dict[str, Any] = {"separators": ("," + space, ":" + space), "ensure_ascii": draw(st.booleans())}
    kind = draw(KINDS)
    events = [chunk(first(content="" if draw(st.booleans()) else None, refusal=None))]
    if kind == "arguments":
        events.append(chunk(delta(tool_calls=[head(0, "call_1", "f")])))
    for text in draw(st.lists(TEXTS, min_size=1, max_size=12)):
        match kind:
            case "arguments":
                events.append(chunk(delta(tool_calls=[arguments(0, text)])))
            case "obfuscated":
                events.append(chunk(delta(content=text), obfuscation=draw(TEXTS)))
            case "null usage":
                events.append(chunk(delta(content=text), service_tier="default", usage=None))
            case _:
                events.append(chunk(delta(**{kind: text})))
    return b"".join(say(event, **spelling) for event in [*events, chunk(STOP)])


@given(openai_streams(), st.lists(st.integers(0, 10_000), max_size=6))
@examples(200)
def test_a_stream_in_normal_form_passes_byte_for_byte(stream: bytes, cuts: list[int]) -> None:
    """Whatever the text, however it is escaped, wherever the reads end; and `[DONE]` is left to whoever knows better."""
    edges = [0, *sorted(cut % len(stream) for cut in cuts), len(stream)]
    out, normalizer = run([*(stream[start:end] for start, end in pairwise(edges)), DONE])
    assert out == stream
    assert normalizer.is_done
    assert normalizer.is_finished
    assert normalizer.malformed == 0
    assert normalizer.events == stream.count(b"\n\n")


@given(openai_streams())
@examples(100)
def test_the_fast_lane_and_the_slow_lane_say_the_same(stream: bytes) -> None:
    """Each event alone meets a normalizer that knows no shapes yet: the answer put together of those is the same."""
    events = [event + b"\n\n" for event in stream.split(b"\n\n")[:-1]]
    opening = events[0]
    if b'"call_1"' in stream:
        opening += events[1]
    alone = [opening]
    for event in events[opening.count(b"\n\n") :]:
        normalizer = Normalizer(EXPECTED, 1 << 20)
        normalizer.feed(opening)
        alone.append(normalizer.feed(event))
    assert assemble(alone) == assemble([run([stream])[0]])


def test_one_read_of_many_events_goes_out_as_the_very_object_that_came_in() -> None:
    normalizer = Normalizer(EXPECTED, 1 << 20)
    normalizer.feed(say(chunk(first(content="a"))) + say(chunk(delta(content="b"))))
    read = b"".join(say(chunk(delta(content=f"word {number}"))) for number in range(50))
    assert normalizer.feed(read) is read


PLAIN = say(chunk(delta(content="word")))[:-2]
EDITS = [
    b'"',
    b"\\",
    b"\\u12",
    b"\\x",
    b"\n",
    b"\x01",
    b"\xff",
    b"}",
    b"]",
    b",",
    b'","role":"assistant',
    b'"},"x":"',
    b'"usage":{"a":1},',
]
EDITS += [
    b'"error":{"message":"no"},',
    b'"finish_reason":"stop",',
    b'"index":1,',
    b"stop",
    b" ",
    b"0",
    b"null",
    b"{",
    b"\r",
    b"\xef\xbb\xbf",
]


@given(st.integers(0, len(PLAIN)), st.integers(0, 8), st.sampled_from(EDITS) | st.binary(max_size=3))
@examples(600)
@example(PLAIN.index(b'"finish_reason":null') + 16, 4, b'"stop"')
@example(PLAIN.index(b'"word"') + 5, 0, b'","role":"assistant')
@example(PLAIN.index(b'"index":0') + 8, 1, b"1")
@example(PLAIN.index(b'{"id"') + 1, 0, b'"error":{"message":"no"},')
@example(PLAIN.index(b'{"id"') + 1, 0, b'"usage":{"prompt_tokens":1,"completion_tokens":2},')
@example(PLAIN.index(b'"word"') + 1, 5, b"")
def test_what_only_resembles_a_known_shape_is_not_taken_for_it(position: int, length: int, edit: bytes) -> None:
    """Two normalizers in the same state, one of which has learned the shape and one a shape with other spaces."""
    event = PLAIN[:position] + edit + PLAIN[position + length :] + b"\n\n"
    knowing, unknowing = Normalizer(EXPECTED, 1 << 20), Normalizer(EXPECTED, 1 << 20)
    for separators, normalizer in (((",", ":"), knowing), ((" , ", " : "), unknowing)):
        for opening in (first(content="a"), delta(content="b"), delta(content="c")):
            normalizer.feed(say(chunk(opening), separators=separators))
    alone = knowing.feed(event)
    assert alone + knowing.finish() == unknowing.feed(event) + unknowing.finish()
    for name in ("usage", "error", "events", "malformed", "is_done", "is_finished", "has_finish"):
        assert getattr(knowing, name) == getattr(unknowing, name), name


@given(st.integers(0, len(PLAIN)), st.integers(0, 8), st.sampled_from(EDITS) | st.binary(max_size=3), st.integers(0, 3))
@examples(300)
@example(PLAIN.index(b'"word"') + 5, 0, b"\\", 1)
@example(PLAIN.index(b'"word"') + 5, 0, b"\\u12", 0)
@example(PLAIN.index(b'{"id"') + 1, 0, b'"error":{"message":"no"},', 3)
def test_many_events_in_one_read_are_recognised_as_they_are_one_by_one(
    position: int, length: int, edit: bytes, before: int
) -> None:
    odd = PLAIN[:position] + edit + PLAIN[position + length :]
    events = [event + b"\n\n" for event in [PLAIN] * before + [odd] + [PLAIN] * 2]
    together, apart = Normalizer(EXPECTED, 1 << 20), Normalizer(EXPECTED, 1 << 20)
    for normalizer in (together, apart):
        for opening in (first(content="a"), delta(content="b"), delta(content="c")):
            normalizer.feed(say(chunk(opening)))
    assert together.feed(b"".join(events)) == b"".join(map(apart.feed, events))
    for name in ("usage", "error", "events", "malformed", "is_done", "is_finished", "has_finish"):
        assert getattr(together, name) == getattr(apart, name), name


def test_shapes_are_forgotten_where_a_new_tool_call_takes_over_an_index() -> None:
    """All calls on index 0: the arguments of the second must not go where those of the first went, though they look alike.

    https://github.com/ai-dynamo/dynamo/issues/4723
    """
    parts = [first(tool_calls=[head(0, "a", "f")]), *(delta(tool_calls=[arguments(0, text)]) for text in "123")]
    parts += [delta(tool_calls=[head(0, "b", "g")]), *(delta(tool_calls=[arguments(0, text)]) for text in "456"), STOP]
    message = assemble([run([say(chunk(part)) for part in parts])[0]])["choices"][0]["message"]
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == [
        ("a", "f", "123"),
        ("b", "g", "456"),
    ]


# ---------------------------------------------------------------------------------------------- envelope, choices


def test_azures_first_and_late_events_become_events_that_clients_can_read() -> None:
    """Azure opens with `choices: []`, an empty id and an empty model, and the content-filter results of the prompt:
    https://github.com/langfuse/langfuse/issues/2833. Late come filter results in a choice that has no delta:
    https://github.com/langchain-ai/langchain/issues/18977, https://github.com/microsoft/autogen/issues/6465.
    """
    results = [{"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False}}}]
    filtered = {"content_filter_offsets": {"check_offset": 3}, "content_filter_results": {"hate": {"filtered": False}}}
    opening = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": results}
    late = {
        "id": "",
        "object": "",
        "created": 0,
        "model": "",
        "choices": [{"index": 0, "finish_reason": None, **filtered}],
    }
    out = normalized(opening, chunk(first(content="")), chunk(delta(content="Hi")), late, chunk(STOP))
    assert [(value["id"], value["model"], value["object"]) for value in out] == [
        ("c1", "m", "chat.completion.chunk")
    ] * 5
    assert out[0]["choices"] == []
    assert out[0]["prompt_filter_results"] == results
    assert out[1:3] == [chunk(first(content="")), chunk(delta(content="Hi"))]
    assert out[3]["choices"] == [{"index": 0, "finish_reason": None, **filtered, "delta": {}}]
    assert out[4] == chunk(STOP)


def test_an_event_that_waits_for_an_id_gets_ours_when_the_stream_ends_without_one() -> None:
    for end in (b"", DONE):
        out, _ = run([say({"choices": [], "note": 1}), end])
        assert values(out) == [{"choices": [], "note": 1, **OURS}]


@pytest.mark.parametrize(
    ("given_members", "expected"),
    [
        ({}, OURS),
        ({"id": None, "model": None, "created": None, "object": None}, OURS),
        ({"id": "", "model": "", "created": "", "object": ""}, OURS),
        ({"id": 7, "model": {"name": "m"}, "created": 1.5, "object": "chat.completion"}, OURS),
        ({"id": "x"}, {**OURS, "id": "x"}),
        ({"created": 5, "model": "y"}, {**OURS, "created": 5, "model": "y"}),
    ],
)
def test_an_envelope_is_filled_in_where_it_is_missing(given_members: dict[str, Any], expected: dict[str, Any]) -> None:
    """Clients need all four: `object` is checked by the official SDK's stream helper, `id` by many others."""
    parts = [{**given_members, "choices": [choice]} for choice in (first(content="a"), delta(content="b"), STOP)]
    assert [{name: value[name] for name in OURS} for value in normalized(*parts)] == [expected] * 3


def test_what_the_upstream_said_once_of_the_envelope_holds_for_later_events() -> None:
    out = normalized(chunk(first(content="a")), {"choices": [delta(content="b")]}, chunk(STOP))
    assert out[1] == chunk(delta(content="b"))


@pytest.mark.parametrize("index", [None, "0", 0.0, "missing"])
def test_a_choice_without_an_index_gets_its_place(index: Any) -> None:
    wrong = [{"index": index, "delta": {"content": text}, "finish_reason": None} for text in "ab"]
    for choice in wrong:
        if index == "missing":
            del choice["index"]
    assert [choice["index"] for choice in choices_of(normalized(chunk(*wrong)))] == [0, 1]


def test_an_entry_of_choices_that_is_no_object_goes_and_the_others_stay_whole() -> None:
    out = normalized(chunk(delta(0, "stop", role="assistant", content="a"), None, "x"))
    assert choices_of(out) == [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]


@pytest.mark.parametrize("choices", [None, {}, "x", 3])
def test_choices_that_are_no_list_are_an_empty_one(choices: Any) -> None:
    assert normalized({**ENVELOPE, "choices": choices}) == [chunk()]


@pytest.mark.parametrize(
    ("roles", "normal"),
    [
        (["assistant", None, None], ["assistant", ..., ...]),
        (["assistant"] * 3, ["assistant", ..., ...]),  # https://github.com/ollama/ollama/issues/7626
        ([...] * 3, ["assistant", ..., ...]),
        (["", "", ""], ["assistant", ..., ...]),  # https://github.com/MiniMax-AI/MiniMax-M2.5/issues/2
        ([None, "assistant", ""], ["assistant", ..., ...]),
        (["tool", "assistant", ...], ["tool", ..., ...]),
    ],
)
def test_the_role_stands_in_the_first_delta_of_a_choice_and_nowhere_else(roles: list[Any], normal: list[Any]) -> None:
    """The official SDK's stream helper adds up the roles of all deltas: `assistantassistant`."""
    deltas = [{"content": str(n)} if role is ... else {"role": role, "content": str(n)} for n, role in enumerate(roles)]
    out = choices_of(normalized(*(chunk({"index": 0, "delta": part, "finish_reason": None}) for part in deltas)))
    assert [choice["delta"].get("role", ...) for choice in out] == normal
    assert "".join(choice["delta"]["content"] for choice in out) == "012"


def test_each_choice_has_its_own_role_and_its_own_end() -> None:
    expected = Expected("x", 1, "m", choices=2)
    parts = [chunk(delta(n % 2, role="assistant", content=str(n))) for n in range(4)]
    parts += [chunk(delta(1, "stop")), chunk(delta(0, "length"))]
    for count in (5, 6):
        _, normalizer = run(map(say, parts[:count]), expected)
        assert normalizer.is_finished is (count == 6)
    out = choices_of(normalized(*parts, expected=expected))
    assert [("role" in choice["delta"], choice["finish_reason"]) for choice in out] == [
        (True, None),
        (True, None),
        (False, None),
        (False, None),
        (False, "stop"),
        (False, "length"),
    ]


def test_fewer_choices_than_were_asked_for_can_have_a_finish_but_are_not_finished() -> None:
    _, normalizer = run([say(chunk(first(content="a"))), say(chunk(STOP))], Expected("x", 1, "m", choices=3))
    assert normalizer.has_finish
    assert not normalizer.is_finished
    _, untouched = run([b""])
    assert not untouched.has_finish
    assert not untouched.is_finished


@pytest.mark.parametrize("missing", [{"delta": None}, {}, {"delta": []}, {"delta": "text"}])
def test_a_delta_that_is_no_object_is_an_empty_one(missing: dict[str, Any]) -> None:
    out = normalized(chunk(first(content="a")), chunk({"index": 0, "finish_reason": "stop", **missing}))
    assert choices_of(out)[1] == STOP


def test_a_whole_message_inside_a_stream_is_its_delta_unless_it_only_repeats() -> None:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    [alone] = choices_of(normalized(chunk({"index": 0, "message": message, "finish_reason": "stop"})))
    assert alone["delta"] == {**message, "tool_calls": [{"index": 0, **message["tool_calls"][0]}]}
    assert alone["finish_reason"] == "stop"
    assert "message" not in alone
    again = normalized(chunk(first(content="Hi")), chunk({"index": 0, "message": message, "finish_reason": "stop"}))
    assert choices_of(again)[1] == STOP


def test_a_finish_reason_is_said_once_and_an_empty_one_is_none() -> None:
    """Content and finish may share a chunk (https://github.com/theopenco/llmgateway/issues/3545); an empty string in
    every chunk is no end."""
    parts = [
        delta(0, "", role="assistant", content="a"),
        delta(0, "stop", content="b"),
        delta(0, "stop"),
        delta(0, "length"),
    ]
    out = choices_of(normalized(*map(chunk, parts)))
    assert [choice["finish_reason"] for choice in out] == [None, "stop", None, None]
    assert [choice["delta"].get("content") for choice in out] == ["a", "b", None, None]
    _, normalizer = run([say(chunk(parts[0]))])
    assert not normalizer.is_finished


def test_members_that_nobody_knows_survive_in_both_lanes() -> None:
    extra = {"x_new": {"a": [1, None]}, "service_tier": "default", "system_fingerprint": None}
    good = [chunk(first(content="a"), **extra)]
    good += [chunk({**delta(content=text, x_delta=[1]), "x_choice": {}, "logprobs": None}, **extra) for text in "bcd"]
    assert normalized(*good) == good
    mended = [{**value, "object": "nonsense"} for value in good]
    assert normalized(*mended) == good


# ---------------------------------------------------------------------------------------------- tool calls


def calls_of(*lists: Any) -> list[tuple[Any, ...]]:
    """The tool calls that a client puts together of these deltas. Checks that each index, id and name is said as it must be."""
    out = choices_of(normalized(*(chunk(delta(role="assistant", tool_calls=calls)) for calls in lists)))
    said: dict[int, dict[str, Any]] = {}
    for entry in (entry for choice in out for entry in choice["delta"].get("tool_calls", [])):
        function = entry.get("function", {})
        if entry["index"] not in said:
            assert sorted(said) == list(range(entry["index"])), "a new call has the next index"
            assert entry["type"] == "function"
            said[entry["index"]] = {"id": entry["id"], "name": function["name"], "arguments": ""}
        else:
            assert "id" not in entry
            assert "name" not in function
        said[entry["index"]]["arguments"] += function.get("arguments") or ""
    return [tuple(made.values()) for made in said.values()]


F, G = ("a", "f", '{"x":1}'), ("b", "g", "{}")
WHOLE = {"name": "f", "arguments": '{"x":1}'}
ARGS, ARGS_0, ARGS_1 = (arguments(index, WHOLE["arguments"]) for index in (None, 0, 1))
HEAD_B = head(1, "b", "g")


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        pytest.param([[head(0, "a", "f")], [arguments(0, '{"x"')], [arguments(0, ":1}")]], [F], id="as it should be"),
        pytest.param([[head(0, "a", "f"), HEAD_B], [arguments(1, "{}"), ARGS_0]], [F, G], id="interleaved"),
        pytest.param(
            [[head(None, "a", "f")], [ARGS], [head(None, "b", "g")], [arguments(None, "{}")]], [F, G], id="no index"
        ),
        pytest.param([[head(None, "a", "f") | ARGS]], None, id="no name"),
        pytest.param(
            [[head(0, "a", "f")], [ARGS_0], [head(0, "b", "g")], [arguments(0, "{}")]], [F, G], id="all on index 0"
        ),
        pytest.param(
            [[head(0, "a", "f"), head(0, "b", "g")], [arguments(0, "{}")]], [("a", "f", ""), G], id="two ids at once"
        ),
        pytest.param(
            [[head(0, "a", "f")], [ARGS_1], [HEAD_B], [arguments(2, "{}")]], [F, G], id="arguments on the next index"
        ),
        pytest.param([[head(1, "a", "f")], [ARGS_1]], None, id="counted from 1"),
        pytest.param([[head(0, "a", "f")], [head(0, "a", "f") | {"function": WHOLE}]], [F], id="id and name repeated"),
        pytest.param([[head(0, "a", "f")], [{**ARGS_0, "id": "", "type": "function"}]], [F], id="empty id repeated"),
        pytest.param([[head(0, "a", "f")], [{**ARGS_0, "id": None}]], [F], id="null id repeated"),
        pytest.param([[head(0, "a", "f", type=None)], [ARGS_0]], [F], id="no type"),
        pytest.param([[head(0, "a", "f")], [arguments(0, {"x": 1})]], [F], id="arguments as an object"),
        pytest.param([[head(0, "a", "f")], [], [ARGS_0], []], [F], id="empty lists between"),
    ],
)
def test_sloppy_tool_calls_become_calls_that_a_client_can_put_together(lists: list[Any], expected: Any) -> None:
    """Seen at https://github.com/ai-dynamo/dynamo/issues/4723, https://github.com/jin-bo/agentao/issues/117,
    https://github.com/router-for-me/CLIProxyAPI/issues/5058, https://github.com/earendil-works/pi/issues/8861,
    https://github.com/dirac-run/dirac/issues/215, https://github.com/LibreChat-AI/agents/issues/260."""
    if expected is not None:
        assert calls_of(*lists) == expected
        return
    out = normalized(*(chunk(delta(role="assistant", tool_calls=calls)) for calls in lists))
    [made] = assemble(map(say, out))["choices"][0]["message"]["tool_calls"]
    assert made["id"] == "a"
    assert made["function"]["arguments"] == '{"x":1}'


def test_calls_without_ids_get_one_each() -> None:
    one, two = calls_of([head(0, None, "f")], [arguments(0, "1")], [head(1, None, "g")], [arguments(1, "2")])
    assert (one[1:], two[1:]) == (("f", "1"), ("g", "2"))
    assert one[0]
    assert two[0]
    assert one[0] != two[0]


@pytest.mark.parametrize("calls", [[], None, "x", {}])
def test_no_tool_calls_are_no_tool_call(calls: Any) -> None:
    """`tool_calls: []` beside reasoning: https://github.com/vercel/ai/issues/20537."""
    out = normalized(
        chunk(first(reasoning_content="hm", tool_calls=calls)), chunk(delta(content="a", tool_calls=calls))
    )
    assert [choice["delta"] for choice in choices_of(out)] == [
        {"role": "assistant", "reasoning_content": "hm"},
        {"content": "a"},
    ]
    _, normalizer = run([say(chunk(first(content=None, tool_calls=calls)))])
    assert not normalizer.is_meaningful


# ---------------------------------------------------------------------------------------------- usage


def counts(completion: Any, prompt: Any = 7) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def closing(normalizer: Normalizer, estimate: Usage | None = None) -> Any:
    [value] = values(normalizer.usage_event(estimate))
    return value


USAGE_STREAMS = {
    "last, alone": [chunk(first(content="a")), chunk(STOP), chunk(usage=counts(2))],
    "null before": [chunk(first(content="a"), usage=None), chunk(STOP, usage=None), chunk(usage=counts(2))],
    "beside choices": [chunk(first(content="a")), chunk(STOP, usage=counts(2))],
    "on every chunk": [
        chunk(first(content="a"), usage=counts(1)),
        chunk(STOP, usage=counts(2)),
        chunk(usage=counts(2)),
    ],
    "first a zero": [chunk(first(content="a"), usage=counts(0)), chunk(STOP, usage=counts(2))],
    "in mid-stream": [chunk(first(content="a")), chunk(usage=counts(2)), chunk(STOP)],
    "last a zero": [chunk(first(content="a"), usage=counts(2)), chunk(STOP), chunk(usage=counts(0))],
    "an empty object behind": [chunk(first(content="a")), chunk(STOP, usage=counts(2)), chunk(usage={})],
    "empty objects all over": [
        chunk(first(content="a"), usage={}),
        chunk(STOP, usage=counts(2)),
        chunk(delta(), usage={}),
    ],
}


@pytest.mark.parametrize("chunks", USAGE_STREAMS.values(), ids=USAGE_STREAMS.keys())
def test_usage_is_taken_from_wherever_it_stands_and_said_once_at_the_end(chunks: list[Any]) -> None:
    """Beside choices: https://github.com/Portkey-AI/gateway/issues/1072; cumulative, where adding up bills many times
    over: https://github.com/tensorzero/tensorzero/issues/5481, https://github.com/modelbus/one-api-pro/issues/13."""
    out = normalized(*chunks)
    assert [value.get("usage") for value in out] == [None] * len(out)
    assert assemble(map(say, out))["choices"][0]["message"]["content"] == "a"
    _, normalizer = run(map(say, chunks))
    assert normalizer.usage == Usage(7, 2)
    assert closing(normalizer) == chunk(usage=counts(2))


def test_what_usage_says_besides_the_counts_is_passed_on() -> None:
    """Prices follow from the details: https://github.com/BerriAI/litellm/issues/42244."""
    usage = {**counts(2), "prompt_tokens_details": {"cached_tokens": 5}, "cost": 0.0001}
    for chunks in ([chunk(STOP, usage=usage)], [chunk(STOP), chunk(usage=usage)]):
        assert closing(run(map(say, chunks))[1])["usage"] == usage


@pytest.mark.parametrize("usage", [{}, {"note": "later"}, [], "x", 0])
def test_a_usage_that_gives_no_figure_is_not_sent_as_one(usage: Any) -> None:
    _, normalizer = run([say(chunk(first(content="a"), usage=usage)), say(chunk(STOP))])
    assert normalizer.usage is None
    assert closing(normalizer, Usage(3, 1, estimated=True))["usage"] == Usage(3, 1, estimated=True).as_json()


def test_an_estimate_stands_in_for_an_upstream_that_says_nothing_and_has_an_empty_list_of_choices() -> None:
    """https://github.com/tashfeenahmed/freellmapi/issues/686; `choices` must be an array:
    https://github.com/BerriAI/litellm/issues/28735."""
    _, normalizer = run([say(chunk(first(content="a"))), say(chunk(STOP))])
    assert normalizer.usage is None
    assert normalizer.usage_event(None) == b""
    estimate = Usage(3, 1, estimated=True)
    assert closing(normalizer, estimate) == chunk(usage={**estimate.as_json(), "estimated": True})


def test_groqs_usage_is_read_where_groq_writes_it() -> None:
    """https://github.com/langchain-ai/langchain-litellm/issues/56"""
    finish = chunk(STOP, x_groq={"id": "req_1", "usage": counts(2)})
    out, normalizer = run([say(chunk(first(content="a"))), say(finish)])
    assert values(out)[1] == finish
    assert normalizer.usage == Usage(7, 2)
    assert closing(normalizer, normalizer.usage)["usage"] == counts(2)


def test_running_usage_stays_where_the_client_asked_for_it() -> None:
    expected = Expected("x", 1, "m", wants_running_usage=True)
    chunks = [chunk(first(content="a"), usage=counts(1)), chunk(STOP, usage=counts(2))]
    out, normalizer = run(map(say, chunks), expected)
    assert values(out) == chunks
    assert normalizer.usage == Usage(7, 2)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"usage": counts(0, 0)}, Usage(0, 0)),  # a figure: https://github.com/InsForge/InsForge/issues/2016
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, Usage(3, 4)),
        ({"usage": {"prompt_tokens": 3}}, Usage(3, 0)),
        ({"usage": {"completion_tokens": 4, "prompt_tokens": None}}, Usage(0, 4)),
        ({"usage": None, "x_groq": {"usage": counts(2)}}, Usage(7, 2)),
        ({"x_groq": {"id": "r"}}, None),
        ({"usage": {"prompt_tokens": "3"}}, None),
        ({"usage": []}, None),
        ({}, None),
    ],
)
def test_usage_is_read_in_every_spelling_and_a_zero_is_a_figure(body: dict[str, Any], expected: Usage | None) -> None:
    assert read_usage(body) == expected


# ---------------------------------------------------------------------------------------------- errors, ends, noise


@pytest.mark.parametrize(
    "event",
    [
        say({"error": {"message": "no", "type": "server_error", "code": 500}}),
        say({"error": "no"}),
        say({"object": "error", "message": "no", "code": 40303}),
        say(chunk(delta(0, "error", content=""), error={"code": 502, "message": "no"})),
        b'event: error\ndata: {"message":"no"}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"no"}}\n\n',
        b'data: {"error":\r\ndata: {"message":"no"}}\r\n\r\n',
        b'data: {"error":{"message":"no"}}',
    ],
)
def test_an_error_event_is_taken_out_and_ends_the_reading(event: bytes) -> None:
    """Errors under a status 200, first or late: https://github.com/preloop/preloop/issues/121,
    https://github.com/Oaklight/llm-rosetta/issues/454."""
    opening = say(chunk(first(content="a"))) + say(chunk(delta(content="b")))
    for before in (b"", opening):
        out, normalizer = run([before + event, say(chunk(delta(content="ghost"))) if event.endswith(b"\n") else b""])
        assert out == before
        assert normalizer.error is not None
        assert "no" in json.dumps(normalizer.error)
        assert not normalizer.is_finished


def test_an_error_member_that_is_null_is_no_error() -> None:
    value = chunk(first(content="a"), error=None)
    assert normalized(value) == [value]


@pytest.mark.parametrize(
    "broken",
    [b'{"id":"c1","choi', b"not json", b"[1]", b"3", b"null", b'{"a":NaN}', b"{'a':1}", b"", b'{"a":1}{"b":2}'],
)
def test_malformed_events_are_left_out_and_counted_and_the_stream_goes_on(broken: bytes) -> None:
    a, b = say(chunk(first(content="a"))), say(chunk(delta(content="b")))
    out, normalizer = run([a + b"data: " + broken + b"\n\n" + b])
    assert out == a + b
    assert normalizer.malformed == 1
    assert normalizer.error is None


@pytest.mark.parametrize(
    "done", [DONE, b"data:[DONE]\n\n", b"data: [DONE] \r\n\r\n", b"data: [DONE]", b"event: done\ndata: [DONE]\n\n"]
)
def test_nothing_behind_done_is_passed_on(done: bytes) -> None:
    """Events behind `[DONE]` show as ghost text in clients, and a second `[DONE]` as an error."""
    before = say(chunk(first(content="a"))) + say(chunk(STOP))
    ghost = (
        say(chunk(delta(content="ghost"))) + say({"error": {"message": "ghost"}}) + DONE
        if done.endswith(b"\n")
        else b""
    )
    for pieces in ([before + done + ghost], [before, done, ghost], [before + done, ghost]):
        out, normalizer = run(pieces)
        assert out == before
        assert normalizer.is_done
        assert normalizer.error is None


def test_done_alone_is_no_answer() -> None:
    """https://github.com/gonka-ai/gonka/issues/1722"""
    out, normalizer = run([DONE])
    assert out == b""
    assert normalizer.is_done
    assert not normalizer.is_meaningful
    assert not normalizer.has_finish


def test_comments_and_fields_other_than_data_are_left_out() -> None:
    """`: OPENROUTER PROCESSING` sent on as data kills the official Node SDK: https://github.com/mnfst/llm-gateway/issues/2053;
    an empty `event:` and an `id:` before a comment break others."""
    a, b = say(chunk(first(content="a"))), say(chunk(delta(content="b")))
    noise = b": OPENROUTER PROCESSING\n\nretry: 100\n\nid: 1\n\nevent: ping\n\n:\n\n"
    stream = noise + b"id: 7\nevent:\n" + a + noise + b": keep-alive\nevent: message\nretry: 5\n" + b + noise
    out, normalizer = run([stream])
    assert values(out) == values(a + b)
    assert normalizer.events == 2
    assert normalizer.malformed == 0
    _, silent = run([noise])
    assert (silent.events, silent.is_meaningful) == (0, False)


@pytest.mark.parametrize(
    "spelling",
    [
        "data:{}\n\n",
        "data:  {}\n\n",
        "data: {} \n\n",
        "data: {}\r\n\r\n",
        "data: \ufeff{}\n\n",
        "id: 1\ndata: {}\n\n",
        "data: {}",
    ],
)
def test_every_legal_spelling_of_an_event_goes_out_in_one(spelling: str) -> None:
    text = json.dumps(chunk(first(content="a")), separators=(",", ":"))
    pieces = [say(chunk(first(content=""))), spelling.replace("{}", text).encode()]
    if not spelling.endswith("\n"):
        pieces[1] = pieces[1].rstrip()
    out, _ = run(pieces)
    assert assemble([out])["choices"][0]["message"]["content"] == "a"
    assert values(out)[1] == chunk(delta(content="a")) or values(out)[1] == chunk(first(content="a"))


def test_several_data_lines_are_one_json_text() -> None:
    text = json.dumps(chunk(first(content="a")), indent=1)
    out, _ = run(["".join(f"data: {line}\n" for line in text.split("\n")).encode() + b"\n"])
    assert values(out) == [chunk(first(content="a"))]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (rb"\ud83d", ["\ud83d", "\ufffd"]),
        (rb"\ude00", ["\ude00", "\ufffd"]),
        (rb"\ud83d\ude00", ["😀"]),
        (b"\xff", ["\ufffd"]),
        ("é".encode()[:1], ["\ufffd"]),
        ("é".encode("latin-1") + b"tude", ["\ufffdtude"]),
    ],
)
def test_half_characters_pass_and_bytes_that_are_no_text_never_reach_a_client(text: bytes, allowed: list[str]) -> None:
    """Half an emoji, cut by somebody's tokens, and bytes that are no UTF-8: a client that decodes strictly would raise."""
    opening = say(chunk(first(content="a"))) + say(chunk(delta(content="b")))
    event = say(chunk(delta(content="@"))).replace(b"@", text)
    for stream in (opening + event, opening + event + event):
        out, normalizer = run([stream])
        out.decode("utf-8")
        assert values(out)[2]["choices"][0]["delta"]["content"] in allowed
        assert len(values(out)) == stream.count(b"\n\n")
        assert normalizer.malformed == 0
    first_of_all, _ = run([say(chunk(first(content="@"))).replace(b"@", text)])
    first_of_all.decode("utf-8")


def test_an_event_without_end_is_an_error() -> None:
    normalizer = Normalizer(EXPECTED, 100)
    with pytest.raises(EventTooLarge):
        normalizer.feed(b"data: " + b"x" * 101)


# ---------------------------------------------------------------------------------------------- what a reader would miss


@pytest.mark.parametrize(
    ("value", "is_meaningful"),
    [
        (chunk(first()), False),
        (chunk(first(content="")), False),
        (chunk(first(content=None, tool_calls=[])), False),
        (chunk(prompt_filter_results=[]), False),
        (chunk(usage=counts(0)), False),
        (chunk(delta(0, "", role="assistant")), False),
        (chunk(first(content="a")), True),
        (chunk(first(refusal="no")), True),
        (chunk(first(tool_calls=[head(0, "a", "f")])), True),
        (chunk(first(reasoning="hm")), True),  # https://github.com/diegosouzapw/OmniRoute/issues/13806
        (chunk(first(reasoning_content="hm")), True),
        (chunk(first(reasoning_details=[{"text": "hm"}])), True),  # https://github.com/deltawi/deltallm/issues/300
        (chunk(first(audio={"data": "AA"})), True),
        (chunk(STOP), True),
    ],
)
def test_an_event_means_something_when_a_reader_would_miss_it(value: dict[str, Any], is_meaningful: bool) -> None:
    """A role, a filter result or a comment is no first token: https://github.com/docker/docker-agent/issues/2349."""
    assert run([say(value)])[1].is_meaningful is is_meaningful


# ---------------------------------------------------------------------------------------------- properties of it all

NAMES = ["id", "object", "created", "model", "choices", "usage", "index", "delta", "message", "finish_reason", "role"]
NAMES += [
    "content",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "reasoning",
    "x_groq",
    "error",
    "logprobs",
    "type",
    "new",
]
LEAVES: st.SearchStrategy[Any] = st.sampled_from([None, True, 0, 1, -1, 2.5, "", "a", "b", "stop", "assistant", [], {}])
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
SLOPPY_CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 0, 1, 2, None, "0"]),
        "id": st.sampled_from(["a", "b", "", None]),
        "type": st.sampled_from(["function", "", None]),
        "function": st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from(["f", "g", "", None]),
                "arguments": st.sampled_from(["", "{", "1}", None, {}, {"x": 1}]),
            },
        ),
    },
)
SLOPPY_DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["assistant", "", None]),
        "content": st.sampled_from(["", "a", "b c", None]),
        "reasoning": st.sampled_from(["", "hm", None]),
        "tool_calls": st.lists(SLOPPY_CALLS, max_size=2) | st.none(),
    },
)
SLOPPY_CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 0, 0, 1, None]),
        "delta": SLOPPY_DELTAS | st.none(),
        "message": SLOPPY_DELTAS,
        "finish_reason": st.sampled_from([None, None, "", "stop", "tool_calls"]),
        "logprobs": st.sampled_from([None, {"content": [{"token": "a"}]}]),
    },
)
SLOPPY_CHUNKS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["c1", "c1", "c2", "", None]),
        "object": st.sampled_from(["chat.completion.chunk", "chat.completion", "", None]),
        "created": st.sampled_from([5, 6, 0, None]),
        "model": st.sampled_from(["m", "", None]),
        "choices": st.lists(SLOPPY_CHOICES, max_size=2) | st.none(),
        "usage": st.sampled_from([None, {}, counts(0), counts(3)]),
        "new": st.sampled_from([None, 1]),
    },
)


def texts_of(value: dict[str, Any]) -> list[Any]:
    return [
        (choice["index"], choice["message"].get("content"), choice["message"].get("reasoning"))
        for choice in value["choices"]
    ]


@given(st.lists(SLOPPY_CHUNKS, max_size=7))
@examples(400)
def test_sloppy_chunks_become_normal_form_and_normal_form_stays_what_it_is(chunks: list[dict[str, Any]]) -> None:
    out, _ = run(map(say, chunks))
    assert run([out])[0] == out
    roles: dict[int, int] = {}
    seen_ids: set[tuple[int, str]] = set()
    for value in values(out):
        assert isinstance(value["id"], str)
        assert value["id"]
        assert isinstance(value["model"], str)
        assert value["model"]
        assert isinstance(value["created"], int)
        assert value["object"] == "chat.completion.chunk"
        assert value.get("usage") is None
        for choice in value["choices"]:
            assert isinstance(choice["index"], int)
            is_first = choice["index"] not in roles
            assert ("role" in choice["delta"]) is is_first
            roles[choice["index"]] = 1
            assert choice.get("finish_reason") != ""
            for entry in choice["delta"].get("tool_calls", []):
                assert isinstance(entry["index"], int)
                if "id" in entry:
                    assert entry["id"]
                    assert (choice["index"], entry["id"]) not in seen_ids
                    seen_ids.add((choice["index"], entry["id"]))
                assert isinstance(entry.get("function", {}).get("arguments", ""), str | None)
    assemble([out])


@given(st.lists(ANY_JSON, max_size=5))
@examples(500)
@example([chunk(first(tool_calls=[head(0, ["a"], "f")]))])  # type: ignore[arg-type]
@example([chunk(first(tool_calls=[None, 3, "x"]))])
@example(
    [
        chunk(first(tool_calls=[head(0, "a", "f") | {"function": {"name": "f", "arguments": None}}])),
        chunk(delta(tool_calls=[arguments(0, "{}")])),
    ]
)
@example(
    [chunk(first(tool_calls=[{"index": 0, "id": "a", "function": "f"}])), chunk(delta(tool_calls=[arguments(0, "{}")]))]
)
@example([chunk(first(function_call={"name": "f"})), chunk(delta(function_call="x"))])
def test_no_json_whatever_breaks_the_normalizer_or_what_reads_its_output(chunks: list[Any]) -> None:
    """Upstreams send anything; one odd chunk must not take the stream down with it: https://github.com/BerriAI/litellm/issues/37781."""
    out, _ = run(map(say, chunks))
    values(out)
    assemble([out])


@given(
    st.lists(
        st.binary(max_size=20) | st.sampled_from([PLAIN, b"\n\n", b"data: ", DONE, b"\r", b'{"choices":[]}']),
        max_size=12,
    )
)
@examples(200)
def test_no_bytes_whatever_break_the_normalizer(pieces: list[bytes]) -> None:
    out, _ = run(pieces)
    values(out)
