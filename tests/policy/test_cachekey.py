"""Which requests are the same question: never two that differ in anything that counts."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.policy.cachekey import answer_key, headers_part, neutral_header, partition_key, question_of, scope_of
from proxy.wire.encoding import loads
from tests.conftest import examples

NEUTRAL = ["stream", "stream_options", "user", "metadata", "store", "safety_identifier", "prompt_cache_key"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12)
NAMES = st.sampled_from([*NEUTRAL, "n", "role", "content"]) | TEXT
LEAVES = st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(-1e18, 1e18) | TEXT
JSON = st.recursive(
    st.none() | LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=5,
)
PRESENT = JSON.filter(lambda value: value is not None)
BODIES = st.fixed_dictionaries(
    {"model": TEXT, "messages": st.lists(st.dictionaries(NAMES, JSON, max_size=3), min_size=1, max_size=2)},
    optional={"temperature": LEAVES, "tools": PRESENT, "": PRESENT, "n": st.integers(2, 9)},
)
OTHERS = st.fixed_dictionaries({}, optional=dict.fromkeys(NEUTRAL, JSON) | {"seed": st.none(), "stop": st.none()})


def key(body: Any, *scope: str) -> bytes:
    return key_of(json.dumps(body).encode(), *scope)


def key_of(raw: bytes, *scope: str) -> bytes:
    return answer_key(loads(raw), raw, *scope)


def shuffled(value: Any, random: Random) -> Any:
    """The same value, the members of its objects in another order."""
    if isinstance(value, dict):
        return {name: shuffled(value[name], random) for name in random.sample(list(value), len(value))}
    return [shuffled(entry, random) for entry in value] if isinstance(value, list) else value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value, as the object or list it is in, and its name or position there."""
    names = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for name in names for place in [(value, name), *places(value[name])]]


@given(BODIES, OTHERS, OTHERS, st.randoms(use_true_random=False))
@examples(80)
def test_order_and_what_changes_no_answer_do_not_count(body: Any, some: Any, others: Any, random: Random) -> None:
    one = {"n": 1} if "n" not in body else {}
    assert key(shuffled(body | some, random), "c") == key(shuffled(one | body | others, random), "c") == key(body, "c")


@given(BODIES, st.data())
@examples(200)
def test_any_other_value_at_any_depth_counts(body: Any, data: st.DataObject) -> None:
    before, form = key(body), json.dumps(body, sort_keys=True)
    holder, name = data.draw(st.sampled_from(places(body)))
    match data.draw(st.sampled_from(["drop", "wrap", "replace"])):
        case "drop":
            del holder[name]
        case "wrap":
            holder[name] = [holder[name]]
        case "replace":
            holder[name] = data.draw(PRESENT.filter(lambda value: name != "n" or value != 1))
    assert (key(body) == before) == (json.dumps(body, sort_keys=True) == form)


SCOPES = st.lists(st.text(max_size=3) | st.sampled_from(["", ",", '","', "\0", "\udcff", "a", "b", "ab"]), max_size=3)


@given(SCOPES, SCOPES, st.sampled_from([b"{}", b'{"seed":99999999999999999999}']))
@examples(200)
@example(["a", "b"], ["b", "a"], b"{}")
def test_every_word_of_the_scope_counts(some: list[str], others: list[str], raw: bytes) -> None:
    assert (key_of(raw, *some) == key_of(raw, *others)) == (some == others)


DEEP = b'{"x":' + b"[" * 300 + b"%d" + b"]" * 300 + b"}"


@pytest.mark.parametrize(
    ("some", "others"),
    [
        (b'{"seed":18446744073709551616}', b'{"seed":18446744073709551617}'),
        (b'{"seed":-9223372036854775809}', b'{"seed":-9223372036854775810}'),
        (b'{"x":[{"y":[1e30]}]}', b'{"x":[{"y":[1000000000000000000000000000001]}]}'),
        (b'{"x":"\\ud83d"}', b'{"x":"\\ud83e"}'),
        (b'{"x":"\\ud83d"}', '{"x":"\ufffd"}'.encode()),
        (b'{"\\ud83d":1}', b'{"\\ud83e":1}'),
        (DEEP % 1, DEEP % 2),
    ],
)
def test_what_reading_loses_counts_byte_for_byte(some: bytes, others: bytes) -> None:
    assert key_of(some) != key_of(others)
    assert key_of(some) != key_of(some, "scope")
    assert key_of(some) == key_of(some)


@pytest.mark.parametrize(
    ("some", "others", "is_same"),
    [
        (b'{"n":1}', b"{}", True),
        (b'{"n":1.0}', b"{}", False),
        (b'{"n":true}', b"{}", False),
        (b'{"n":2}', b"{}", False),
        (b'{"x":{"n":1}}', b'{"x":{}}', False),
        (b'{"x":{"y":null}}', b'{"x":{}}', False),
        (b'{"x":1}', b'{"x":1.0}', False),
        (b'{"x":1}', b'{"x":true}', False),
        (b'{"x":18446744073709551615}', b'{ "x": 18446744073709551615 }', True),
        (b'{"x":-9223372036854775808}', b'{ "x": -9223372036854775808 }', True),
        (b'{"x":"\\u00e9"}', '{"x":"é"}'.encode(), True),
        (b'{"x":0.10}', b'{"x":0.1}', True),
        (b'{"user":"\\ud83d"}', b"{}", True),
    ],
)
def test_two_ways_to_write_a_request(some: bytes, others: bytes, is_same: bool) -> None:
    assert (key_of(some) == key_of(others)) is is_same


def test_a_key_is_short() -> None:
    assert len(key({"model": "m"})) == 16


@pytest.mark.parametrize(
    ("name", "is_neutral"),
    [
        *((name, True) for name in ("X-Stainless-Retry-Count", "Idempotency-Key", "traceparent", "b3", "X-B3-TraceId")),
        *((name, True) for name in ("sentry-trace", "x-datadog-parent-id", "Cache-Control", "uberctx-user", "DNT")),
        *(
            (name, False)
            for name in ("OpenAI-Beta", "anthropic-version", "x-new", "b3x", "x-stainless", "http-referer")
        ),
    ],
)
def test_a_header_counts_unless_it_is_known_not_to(name: str, is_neutral: bool) -> None:
    assert neutral_header(name) is is_neutral


@pytest.mark.parametrize(
    ("some", "others", "is_same"),
    [
        ([("A", "1"), ("b", "2")], [("B", "2"), ("a", "1")], True),
        ([("a", "1"), ("traceparent", "00-1")], [("traceparent", "00-2"), ("a", "1")], True),
        ([("a", "1"), ("b", "2"), ("a", "0")], [("a", "1"), ("a", "0"), ("b", "2")], True),
        ([("a", "1"), ("a", "2")], [("a", "2"), ("a", "1")], False),
        ([("a", "x")], [("a", "X")], False),
        ([("a", "1"), ("b", "2")], [("a", "1, b: 2")], False),
        ([("a", "\udcff")], [("a", "?")], False),
        ([("a", "")], [], False),
    ],
)
def test_headers_count_by_name_and_value(
    some: list[tuple[str, str]], others: list[tuple[str, str]], is_same: bool
) -> None:
    assert (headers_part(tuple(some)) == headers_part(tuple(others))) is is_same


@pytest.mark.parametrize("headers", [(), (("traceparent", "00-1"),)])
def test_no_header_that_counts_is_no_part(headers: tuple[tuple[str, str], ...]) -> None:
    assert headers_part(headers) == ""


# ---------------------------------------------------------------------- by meaning

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "What is it?"}]}
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *ASKED["messages"]]


def question(body: Any, max_turns: int = 1, max_characters: int = 20) -> str | None:
    return question_of(loads(json.dumps(body).encode()), max_turns=max_turns, max_characters=max_characters)


def said(content: Any, **members: Any) -> dict[str, Any]:
    return ASKED | {"messages": [{"role": "user", "content": content, **members}]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (ASKED, "What is it?"),
        (ASKED | {"n": 1, "tools": [], "tool_choice": None, "modalities": ["text"], "stream": True}, "What is it?"),
        (said([{"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}]), "What\nis it?"),
        (said("x" * 20), "x" * 20),
        (said("Hi", tool_calls=[], name="ann"), "Hi"),
        (ASKED | {"messages": [{"role": "system", "content": "s"}, *ASKED["messages"]]}, "What is it?"),
        *((said(content), None) for content in ("", " \n", "x" * 21, None, [], "cut \ud83d", [{"type": "text"}], ["Hi"])),
        (said([{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "u"}}]), None),
        (said([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]), None),
        *(
            (ASKED | {name: value}, None)
            for name, value in {
                "n": 2,
                "tools": [{"type": "function"}],
                "tool_choice": "auto",
                "functions": [{"name": "f"}],
                "function_call": "auto",
                "audio": {"voice": "v"},
                "modalities": ["text", "audio"],
                "web_search_options": {"x": 1},
                "prediction": {"type": "content", "content": "x"},
            }.items()
        ),
        (ASKED | {"messages": [*ASKED["messages"], {"role": "assistant", "content": "It"}]}, None),
        (ASKED | {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}, *ASKED["messages"]]}, None),
        (ASKED | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}, *ASKED["messages"]]}, None),
        (ASKED | {"messages": [{"role": "assistant", "content": None, "refusal": "no"}, *ASKED["messages"]]}, None),
        (ASKED | {"messages": HISTORY}, None),
    ],
)  # fmt: skip
def test_which_requests_may_be_compared_by_meaning(body: Any, expected: str | None) -> None:
    assert question(body) == expected


def test_more_turns_may_be_allowed() -> None:
    assert question(ASKED | {"messages": HISTORY}, max_turns=2) == "What is it?"


CONTENTS = TEXT | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}, optional={"x": LEAVES}), max_size=2
)
ASKABLE = st.fixed_dictionaries(
    {
        "model": TEXT,
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENTS}, optional={"name": TEXT}
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={"temperature": LEAVES, "response_format": PRESENT, "seed": PRESENT, "": PRESENT},
)


def but_the_question(body: Any) -> str:
    """All of a body but the texts of its last message."""
    *before, last = body["messages"]
    content = last["content"]
    rest = [{**part, "text": ""} for part in content] if isinstance(content, list) else ""
    return json.dumps({**body, "messages": [*before, {**last, "content": rest}]}, sort_keys=True)


@given(ASKABLE, st.data())
@examples(200)
def test_those_with_one_partition_differ_in_their_questions_only(body: Any, data: st.DataObject) -> None:
    other = json.loads(json.dumps(body))
    holder, name = data.draw(st.sampled_from(places(other)))
    holder[name] = data.draw(PRESENT.filter(lambda value: name != "n" or value != 1))
    if not isinstance(other["messages"], list) or None in (question(body, 3, 99), _question_if_well_formed(other)):
        return
    keys = [partition_key(value, json.dumps(value).encode(), "scope") for value in (body, other)]
    assert (keys[0] == keys[1]) == (but_the_question(body) == but_the_question(other))


def _question_if_well_formed(body: Any) -> str | None:
    """As for a request that was checked (wire/requests.py)."""
    messages = body["messages"]
    if not messages or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list | None)
        for message in messages
    ):
        return None
    return question(body, 3, 99)


def test_the_partition_is_that_of_all_but_the_question() -> None:
    def partition(body: Any, *scope: str) -> bytes:
        return partition_key(body, json.dumps(body).encode(), *scope)

    plain = partition(ASKED)
    assert plain == partition(said("Something else")) == partition(ASKED | {"stream": True, "user": "u"})
    others = [
        partition(ASKED, "scope"),
        partition(said("What is it?", name="ann")),
        partition(said([{"type": "text", "text": "What is it?"}])),
        partition(said([{"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}])),
        partition(said([{"type": "text", "text": "What is it?", "cache_control": {"type": "ephemeral"}}])),
        partition(ASKED | {"temperature": 0}),
        partition(ASKED | {"messages": HISTORY}),
        answer_key(ASKED, json.dumps(ASKED).encode()),
    ]
    assert len({plain, *others}) == 1 + len(others)
    assert len(plain) == 16


@given(st.lists(st.tuples(TEXT | st.just("1 a"), TEXT | st.just("1 a")), min_size=2, max_size=2, unique=True))
@examples(100)
@example([("a", "b"), ("", "ba")])
@example([("2 a", "1"), ("2 a", "11")])
def test_a_scope_is_one_callers_in_one_namespace(pairs: list[tuple[str, str]]) -> None:
    one, other = (scope_of(caller, namespace) for caller, namespace in pairs)
    assert one != other
    assert all(word not in one for word in pairs[0] if len(word) > 8)


def test_a_scope_may_hold_any_bytes_of_a_header() -> None:
    assert scope_of("Authorization: \udcff", "") != scope_of("Authorization: ?", "")
