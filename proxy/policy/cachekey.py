"""When are two chat requests the same question? Those with the same key may share one answer.

Whatever can change an answer counts, and what nobody here knows might: sharing less is right, sharing wrongly is not.
So members and headers are told apart by what is known to change nothing; all others count.

The key is a digest of the request's canonical form, the compact JSON of what counts with sorted names. That form is of
values as they were read, and reading loses two things (see wire/encoding.py): the last digits of integers past 64 bits,
and lone surrogates. Where it shows a sign of either, the body counts byte for byte as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson

_KEY_BYTES = 16

# How an answer is delivered, for whom, and what is kept of it; not what it says
# (https://platform.openai.com/docs/api-reference/chat/create).
_NEUTRAL_MEMBERS = frozenset(
    ("stream", "stream_options", "user", "metadata", "store", "safety_identifier", "prompt_cache_key")
)

# From here on a number may be an integer that was read as a double; a smaller integer never is.
_WIDE = 2.0**63

_REPLACED_CHARACTER = "\ufffd"
_REPLACED = _REPLACED_CHARACTER.encode()

# What makes a request ask for more than a text, or for a text that depends on more than its messages.
_MORE_THAN_TEXT = ("tools", "tool_choice", "functions", "function_call", "audio", "web_search_options", "prediction")
_PLAIN_ROLES = frozenset(("system", "developer", "user", "assistant"))
_MORE_THAN_CONTENT = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal")

_NEUTRAL_HEADERS = frozenset(
    (
        # Who repeats a request, and what it is called:
        "idempotency-key",  # https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
        "x-client-request-id",  # https://platform.openai.com/docs/api-reference/debugging-requests
        # What caches on the way may do, and how urgent it is:
        "cache-control",  # RFC 9111 §5.2.1
        "pragma",  # RFC 9111 §5.4
        "priority",  # RFC 9218 §5
        # What a browser adds:
        "dnt",  # https://www.w3.org/TR/tracking-dnt/#dnt-header-field
        # Which trace it belongs to:
        "traceparent",  # https://www.w3.org/TR/trace-context/
        "tracestate",
        "baggage",  # https://www.w3.org/TR/baggage/
        "b3",  # https://github.com/openzipkin/b3-propagation
        "sentry-trace",  # https://develop.sentry.dev/sdk/telemetry/traces/
        "x-amzn-trace-id",  # https://docs.aws.amazon.com/elasticloadbalancing/latest/application/load-balancer-request-tracing.html
        "x-cloud-trace-context",  # https://cloud.google.com/trace/docs/trace-context
        "uber-trace-id",  # https://www.jaegertracing.io/docs/1.22/client-libraries/#propagation-format
        "newrelic",  # https://docs.newrelic.com/docs/distributed-tracing/concepts/how-new-relic-distributed-tracing-works/
        "elastic-apm-traceparent",  # https://www.elastic.co/guide/en/apm/agent/python/current/configuration.html#config-use-elastic-traceparent-header
    )
)

_NEUTRAL_PREFIXES = (
    "x-stainless-",  # which SDK asks and for which time: https://github.com/openai/openai-python
    "x-b3-",
    "x-datadog-",  # https://docs.datadoghq.com/tracing/trace_collection/trace_context_propagation/
    "uberctx-",  # baggage of uber-trace-id
)


def answer_key(body: Mapping[str, Any], raw: bytes, *scope: str) -> bytes:
    """A digest (16 bytes) of everything in a chat request that can change its answer, and of the scope.

    `body` is the value of `raw`, as `wire.encoding.loads` reads it. `scope` says what else must be the same: the
    caller, the headers that count. Not counted are the order of members, members that are null, `n: 1`, the default,
    and those that only say how the answer is delivered, for whom, and what is kept of it. A body that is nested deeper
    than JSON can be written here (some 250 levels) counts byte for byte. Costs about 3.5 µs for three short messages, 0.6 µs
    for each further one, and 2 to 3 ms for each megabyte.
    """
    kept = {name: value for name, value in body.items() if value is not None and name not in _NEUTRAL_MEMBERS}
    if "n" in kept and type(kept["n"]) is int and kept["n"] == 1:
        del kept["n"]
    is_exact = False
    try:
        form = orjson.dumps((scope, kept), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        # Too deep, or a scope that holds a header's odd bytes. A tuple's repr begins like no JSON text.
        form = repr(scope).encode()
    else:
        is_exact = (form.isascii() or _REPLACED not in form) and not _has_wide_number(kept.values())
    digest = hashlib.blake2b(form, digest_size=_KEY_BYTES)
    if not is_exact:
        # Neither form holds a NUL: this one ends it.
        digest.update(b"\0")
        digest.update(raw)
    return digest.digest()


@lru_cache(maxsize=1024)
def scope_of(caller: str, namespace: str) -> str:
    """A digest of whose answers may be shared, which tells nobody who that is."""
    form = f"{len(namespace)} {namespace}{caller}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(form, digest_size=_KEY_BYTES).hexdigest()


def question_of(body: Mapping[str, Any], *, max_turns: int, max_characters: int) -> str | None:
    """The last user text of a chat request, where it alone may be compared by meaning; None where it may not.

    It may in a plain request for one text: nothing but text in its messages, one choice, no tools, no sound, no search,
    no answer begun; a text that is neither empty nor longer than `max_characters`, and of which reading lost nothing; and
    no more than `max_turns` user messages, because what a later one means is in those before it.
    """
    if any(body.get(name) for name in _MORE_THAN_TEXT) or body.get("n") not in (None, 1):
        return None
    if body.get("modalities") not in (None, ["text"]):
        return None
    messages = body["messages"]
    if messages[-1]["role"] != "user" or sum(message["role"] == "user" for message in messages) > max_turns:
        return None
    text: str | None = None
    for message in messages:
        text = _text_of(message)
        if text is None:
            return None
    if text is None or not text.strip() or len(text) > max_characters or _REPLACED_CHARACTER in text:
        return None
    return text


def partition_key(body: Mapping[str, Any], raw: bytes, *scope: str) -> bytes:
    """A digest (16 bytes) of all of a request that has a `question_of` but that text: see `answer_key`.

    Two such requests with one partition differ in that question only.
    """
    *before, last = body["messages"]
    content = last["content"]
    # Of a text in parts, how many there are and what else they hold.
    rest = [{**part, "text": None} for part in content] if isinstance(content, list) else None
    return answer_key({**body, "messages": [*before, {**last, "content": rest}]}, raw, "by meaning", *scope)


def _text_of(message: Mapping[str, Any]) -> str | None:
    """The text of a message that holds text and nothing else; None for any other."""
    if message["role"] not in _PLAIN_ROLES or any(message.get(name) for name in _MORE_THAN_CONTENT):
        return None
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "\n".join(texts)


def _has_wide_number(values: Iterable[Any]) -> bool:
    """Whether there is a number among these values, or inside them, that may be a rounded integer.

    Nested no deeper than can be written.
    """
    for value in values:
        kind = type(value)
        if kind is str:
            continue
        if kind is dict:
            if _has_wide_number(value.values()):
                return True
        elif kind is list:
            if _has_wide_number(value):
                return True
        elif kind is float and not -_WIDE < value < _WIDE:
            return True
    return False


@lru_cache(maxsize=1024)
def neutral_header(name: str) -> bool:
    """Whether a header of the client's that goes on to the upstream is known not to change the answer."""
    low = name.lower()
    return low in _NEUTRAL_HEADERS or low.startswith(_NEUTRAL_PREFIXES)


def headers_part(headers: tuple[tuple[str, str], ...]) -> str:
    """The headers that can change the answer, as a part of a key's scope; "" for none.

    Neither the case of names nor the order of different ones counts; values, and the order of those of one name, do.
    """
    if not headers:
        return ""
    counting = [(name.lower(), value) for name, value in headers if not neutral_header(name)]
    counting.sort(key=itemgetter(0))
    return repr(counting) if counting else ""
