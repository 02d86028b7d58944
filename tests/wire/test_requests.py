"""A client's body and wishes: what must be right is named when it is wrong, and everything else is left as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy.chat import CacheWish, Wishes
from proxy.errors import ClientError
from proxy.wire.requests import MAX_CHOICES, parse_chat_request, parse_object, parse_wishes

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def body(**members: Any) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **members}.items() if value is not ...}).encode()


def refused(raw: bytes) -> ClientError:
    with pytest.raises(ClientError) as caught:
        parse_chat_request(raw)
    error = caught.value
    assert error.status == 400
    assert error.envelope()["error"].keys() == {"message", "type", "param", "code"}
    assert error.envelope()["error"]["type"] == "invalid_request_error"
    assert str(error.param or "") in error.message
    return error


NOT_A_STRING: list[Any] = [3, 1.5, True, [], {}]
WRONG: list[tuple[str, str, list[Any]]] = [
    ("model", "invalid_type", NOT_A_STRING),
    ("model", "missing_required_parameter", [..., None]),
    ("model", "invalid_value", ["", "  "]),
    ("messages", "missing_required_parameter", [..., None]),
    ("messages", "invalid_type", ["Hi", 3, True, {}, {"role": "user"}]),
    ("messages", "empty_array", [[]]),
    ("stream", "invalid_type", ["true", 1, 0, [], {}]),
    ("stream_options", "invalid_type", [True, "x", [], 1]),
    ("n", "invalid_type", ["1", 1.0, True, [1]]),
    ("n", "invalid_value", [0, -1, MAX_CHOICES + 1, 10**30]),
]


@pytest.mark.parametrize(("param", "code", "values"), WRONG)
def test_a_wrong_member_is_named(param: str, code: str, values: list[Any]) -> None:
    for value in values:
        error = refused(body(**{param: value}))
        if value != 10**30:
            assert error.code == code, value
        assert error.param == param


@pytest.mark.parametrize("wrong", [None, "Hi", 3, [], True])
def test_a_message_that_is_none_is_named_by_its_place(wrong: Any) -> None:
    assert refused(body(messages=[GOOD["messages"][0], wrong])).param == "messages[1]"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "Hi"}, "messages[0].role"),
        ({"role": 3, "content": "Hi"}, "messages[0].role"),
        ({"role": None}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": {"type": "text"}}, "messages[0].content"),
        ({"role": "user", "content": True}, "messages[0].content"),
    ],
)
def test_a_messages_wrong_member_is_named(message: Any, param: str) -> None:
    assert refused(body(messages=[message])).param == param


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe{}", b"[" * 100_000, b"model=m&messages=Hi"]
)
def test_a_body_that_is_no_json_object_is_told_so(raw: bytes) -> None:
    error = refused(raw)
    assert error.param is None
    assert error.code in ("invalid_json", "invalid_type")
    with pytest.raises(ClientError):
        parse_object(raw)


def test_the_body_is_kept_as_it_came() -> None:
    messages = b'[{"role":"user","content":[{"type":"text","text":"Hi"}],"x":1}]'
    raw = b' {"messages" : ' + messages + b',"model":"m","new":{"a":null}, "temperature":0}'
    request = parse_chat_request(raw)
    assert request.raw is raw
    assert request.body == json.loads(raw)
    assert (request.model, request.wants_stream, request.wants_usage, request.choices) == ("m", False, False, 1)


@pytest.mark.parametrize(
    ("members", "wants_stream", "wants_usage", "choices"),
    [
        ({"stream": True}, True, False, 1),
        ({"stream": None, "n": None, "stream_options": None}, False, False, 1),
        ({"stream": True, "stream_options": {"include_usage": True}, "n": 3}, True, True, 3),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False, 1),
        ({"stream": True, "stream_options": {}, "n": MAX_CHOICES}, True, False, MAX_CHOICES),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool"}]}, False, False, 1),
    ],
)
def test_what_the_client_wants_is_read(members: Any, wants_stream: bool, wants_usage: bool, choices: int) -> None:
    request = parse_chat_request(body(**members))
    assert (request.wants_stream, request.wants_usage, request.choices) == (wants_stream, wants_usage, choices)


def test_half_an_emoji_in_a_question_is_no_reason_to_refuse_it() -> None:
    raw = body(messages=[{"role": "user", "content": "cut \ud83d"}])
    request = parse_chat_request(raw)
    assert request.body["messages"][0]["content"] == "cut \ufffd"
    assert request.raw is raw


@pytest.mark.parametrize(
    ("headers", "wishes"),
    [
        ({"Accept": "*/*"}, Wishes()),
        ({"X-Headwater-Coalesce": " No "}, Wishes(coalesces=False)),
        ({"x-headwater-coalesce": "yes"}, Wishes()),
        ({"X-HEADWATER-DELIVERY": "WHOLE\t"}, Wishes(delivers_whole=True)),
        ({"x-headwater-delivery": "stream"}, Wishes(delivers_whole=False)),
        ({"x-headwater-delivery": "whole", "x-headwater-coalesce": "no"}, Wishes(False, True)),
    ],
)
def test_wishes_are_read_in_any_case(headers: dict[str, str], wishes: Wishes) -> None:
    assert parse_wishes(CIMultiDict(headers)) == wishes


def test_without_wishes_nothing_is_made() -> None:
    assert parse_wishes(CIMultiDict()) is parse_wishes(CIMultiDict({"x-headwater": "no"}))


@pytest.mark.parametrize("value", ["", "true", "stream whole", "no, yes", "\udcff"])
@pytest.mark.parametrize("header", ["x-headwater-coalesce", "x-headwater-delivery"])
def test_a_wish_that_is_none_is_named_by_its_header(header: str, value: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_wishes(CIMultiDict({header.upper(): value}))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", header)
    assert header in caught.value.message


@pytest.mark.parametrize(
    ("headers", "wish"),
    [
        ([("Cache-Control", "no-cache")], CacheWish(looks_up=False)),
        ([("cache-control", "NO-STORE")], CacheWish(keeps=False)),
        ([("cache-control", "no-cache, no-store")], CacheWish(False, False)),
        ([("cache-control", "no-cache"), ("cache-control", "no-store")], CacheWish(False, False)),
        ([("cache-control", ' max-age = "60" ,only-if-cached')], CacheWish(max_age_s=60, only_if_cached=True)),
        ([("cache-control", "max-age=0")], CacheWish(max_age_s=0)),
        ([("cache-control", "max-age=5, max-age=9")], CacheWish(max_age_s=5)),
        *(
            ([("cache-control", f"max-age{rest}")], CacheWish(max_age_s=0))
            for rest in ("", "=", "=-1", "=1.5", "=x", "=١", f"={'9' * 40}", "=1e3", '="', "==1")
        ),
        *(
            ([("cache-control", value)], CacheWish())
            for value in (
                "",
                ",,",
                "=",
                "public",
                "s-maxage=1",
                "no_cache",
                "x-no-store",
                "max-stale",
                "\udcff",
                "no-transform",
            )
        ),
        ([("x-headwater-cache", " Exact ")], CacheWish(tier="exact")),
        ([("X-Headwater-Cache", "semantic")], CacheWish(tier="semantic")),
        ([("x-headwater-cache", "OFF"), ("cache-control", "no-store")], CacheWish(keeps=False, tier="off")),
        ([("x-headwater-namespace", "Team A")], CacheWish(namespace="Team A")),
        ([("x-headwater-namespace", "n" * 128)], CacheWish(namespace="n" * 128)),
        ([("x-headwater-namespace", "")], CacheWish()),
    ],
)
def test_what_a_client_wishes_of_the_cache(headers: list[tuple[str, str]], wish: CacheWish) -> None:
    """RFC 9111 §5.2.1; several lines are one list (RFC 9110 §5.3), and an argument that is none is stale (§4.2.1)."""
    assert parse_wishes(CIMultiDict(headers)) == Wishes(cache=wish)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *(("x-headwater-cache", value) for value in ("", "on", "exact, semantic", "no", "\udcff")),
        *(("x-headwater-namespace", value) for value in ("n" * 129, "a\tb", "\udcff", "\x7f")),
    ],
)
def test_a_wish_of_the_cache_that_is_none_is_named(header: str, value: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_wishes(CIMultiDict({header: value}))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", header)
