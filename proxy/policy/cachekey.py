"""When are two chat requests the same question? Those with the same key may share one answer.

Whatever can change an answer counts, and what nobody here knows might: sharing less is right, sharing wrongly is not.
So members and headers are told apart by what is known to change nothing; all others count.

The key is a digest of the request's canonical form, the compact JSON of what counts with sorted names. That form is of
values as they were read, and reading loses two things (see wire/encoding.py): the last digits of integers past 64 bits,
and lone surrogates. Where it shows a sign of either, the body counts byte for byte as well.
"""

from __future__ import annotations

import hashlib
import re
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

# What such a number has when it is written, in whichever way; texts may have it too.
_MAY_BE_WIDE = re.compile(rb"[0-9](?:[eE][+0-9]|[0-9]{17})").search

_REPLACED = "\ufffd".encode()

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
        is_wide = _MAY_BE_WIDE(form) is not None and _has_wide_number(kept.values())
        is_exact = not is_wide and (form.isascii() or _REPLACED not in form)
    digest = hashlib.blake2b(form, digest_size=_KEY_BYTES)
    if not is_exact:
        # Neither form holds a NUL: this one ends it.
        digest.update(b"\0")
        digest.update(raw)
    return digest.digest()


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
