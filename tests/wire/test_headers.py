"""Which headers pass, and in which direction."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.wire.headers import (
    STREAM_HEADERS,
    downstream_headers,
    header_lines,
    informative_headers,
    retry_after_s,
    upstream_headers,
)
from tests.conftest import examples

HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
]
HOP_BY_HOP += ["Transfer-Encoding", "Upgrade"]
SPELLINGS = [str.lower, str.upper, str.title]


@pytest.mark.parametrize("name", HOP_BY_HOP)
def test_headers_of_one_hop_stay_on_it(name: str) -> None:
    """RFC 9110 §7.6.1"""
    for spell in SPELLINGS:
        assert upstream_headers(CIMultiDict([(spell(name), "x"), ("X-Custom", "1")])) == (("X-Custom", "1"),)
        assert downstream_headers(CIMultiDict({spell(name): "x", "X-Custom": "1"})) == {"X-Custom": "1"}


def test_headers_that_connection_names_stay_on_their_hop_too() -> None:
    """RFC 9110 §7.6.1: a proxy must remove what the message's own Connection header nominates, in every one of its lines."""
    pairs = [("X-One", "1"), ("connection", "keep-alive, X-One"), ("Connection", "x-two ,,x-three"), ("X-Two", "2")]
    pairs += [("X-Three", "3"), ("X-Four", "4")]
    assert upstream_headers(CIMultiDict(pairs)) == (("X-Four", "4"),)
    assert downstream_headers(CIMultiDict(pairs)) == {"X-Four": "4"}


@pytest.mark.parametrize(
    "name", ["Authorization", "api-key", "x-api-key", "X_API_Key", "x-goog-api-key", "Cookie", "Proxy-Authorization"]
)
def test_the_clients_credentials_never_reach_an_upstream(name: str) -> None:
    for spell in SPELLINGS:
        assert upstream_headers(CIMultiDict({spell(name): "secret"})) == ()


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "Content-Length", "Content-Type", "Content-Encoding", "Accept", "Accept-Encoding", "Accept-Language"),
        *("Expect", "User-Agent", "X-Request-Id", "Origin", "Referer", "Forwarded", "Via", "X-Real-Ip"),
        *("X-Forwarded-For", "X-Headwater-Target", "Sec-Fetch-Mode", "CF-Connecting-IP", "If-None-Match"),
        # To an upstream that is told its headers as CGI has it (RFC 3875 §4.1.18) these are the same.
        *("Content_Length", "Transfer_Encoding", "X_Forwarded-For", "X_Request_ID"),
    ],
)
def test_what_describes_the_clients_own_hop_is_not_passed_on(name: str) -> None:
    """Among them Content-Encoding: the body that goes up has been decoded."""
    assert upstream_headers(CIMultiDict({name: "x"})) == ()


@pytest.mark.parametrize("name", ["OpenAI-Organization", "openai_project", "X-Goog-User-Project"])
def test_a_team_chooses_no_account_at_the_upstream(name: str) -> None:
    assert upstream_headers(CIMultiDict({name: "x", "OpenAI-Beta": "y"}), for_team=True) == (("OpenAI-Beta", "y"),)
    assert upstream_headers(CIMultiDict({name: "x"})) == ((name, "x"),)


def test_vendors_headers_reach_the_upstream_as_they_were_written() -> None:
    pairs = (
        ("OpenAI-Beta", "assistants=v2"),
        ("Idempotency-Key", "1"),
        ("X-Custom", "a"),
        ("X-Custom", "b"),
        ("traceparent", "0"),
    )
    assert upstream_headers(CIMultiDict(pairs)) == pairs


def test_a_header_line_cannot_be_smuggled_into_a_head() -> None:
    """RFC 9112 §11.1: whoever writes a value into a head sees to it that it is one line."""
    headers = {"X-One": "1", "X-Two": "2\r\nX-Evil: 1", "X-Three": "3\n", "X-Four": "4\0", "X-Five": "caf\xe9 \udcff"}
    assert header_lines(headers) == b"X-One: 1\r\nX-Five: caf\xc3\xa9 \xff\r\n"


@pytest.mark.parametrize(
    "name", ["Content-Length", "Content-Encoding", "Set-Cookie", "Server", "Date", "Alt-Svc", "X-Request-Id"]
)
def test_what_describes_the_upstreams_framing_is_not_passed_down(name: str) -> None:
    """A relayed Content-Encoding over decoded bytes breaks clients: https://github.com/rossoctl/cortex/issues/864."""
    for spell in SPELLINGS:
        assert downstream_headers(CIMultiDict({spell(name): "x"})) == {}


def test_an_upstreams_cross_origin_rules_are_not_ours() -> None:
    assert downstream_headers(CIMultiDict({"Access-Control-Allow-Origin": "*", "Content-Type": "audio/mpeg"})) == {
        "Content-Type": "audio/mpeg"
    }


def test_limits_and_times_are_told_to_the_client() -> None:
    headers = {"X-RateLimit-Remaining-Tokens": "7", "openai-processing-ms": "5", "anthropic-ratelimit-x": "1"}
    noise = {"Content-Type": "text/html", "Set-Cookie": "x", "Cache-Control": "max-age=1", "x-other": "1"}
    assert informative_headers(CIMultiDict({**headers, **noise})) == headers
    assert downstream_headers(CIMultiDict(headers)) == headers


def test_nothing_between_us_and_the_client_may_gather_a_stream() -> None:
    """https://github.com/BerriAI/litellm/issues/29557, https://github.com/blinkk/rootjs/issues/1231"""
    assert STREAM_HEADERS["Content-Type"].startswith("text/event-stream")
    assert set(STREAM_HEADERS["Cache-Control"].split(", ")) == {"no-cache", "no-transform"}
    assert STREAM_HEADERS["X-Accel-Buffering"] == "no"


# 06 Nov 1994 08:49:37 UTC is the date in RFC 9110's examples.
A_MINUTE_BEFORE = 784_111_777.0 - 60


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("1.5", 1.5),  # some write fractions, though the RFC knows none
        ("Sun, 06 Nov 1994 08:49:37 GMT", 60),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 60),
        ("Sun Nov  6 08:49:37 1994", 60),
        ("Sun, 06 Nov 1994 10:49:37 +0200", 60),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0),  # past
        (None, None),
        *((nonsense, None) for nonsense in ("", "-1", "1e3", "inf", "nan", "5, 6", "soon", "\u0663", "9" * 400, "Sun")),
    ],
)
def test_when_to_come_again_is_told_in_seconds_or_as_a_date(text: str | None, seconds: float | None) -> None:
    """RFC 9110 §10.2.3"""
    assert retry_after_s(text, A_MINUTE_BEFORE) == seconds


@given(st.text() | st.text("0123456789:,+- SunNovGMT", max_size=40), st.floats(0, 1e11))
@example("Sun, 06 Nov 1994 08:49:37 -9999999999999", 0.0)
@examples(200)
def test_whatever_stands_there_it_is_a_time_to_come_or_nothing(text: str, now: float) -> None:
    seconds = retry_after_s(text, now)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))
