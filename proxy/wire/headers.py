"""Which headers may pass, and in which direction.

Hop-by-hop headers are those of RFC 9110 §7.6.1 and whatever a message's own `Connection` header names. Toward the
upstream also go missing: everything that could carry the client's credentials, and what the HTTP client sets
itself. Toward the client: what describes the upstream's framing or coding, which is not ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache
from urllib.parse import quote

HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)

_CREDENTIALS = frozenset(("authorization", "api-key", "x-api-key", "x-goog-api-key", "x-auth-token", "cookie"))

_SET_BY_US = frozenset(
    (
        "host",
        "content-length",
        "content-type",
        "content-encoding",
        "accept",
        "accept-encoding",
        "expect",
        "user-agent",
        "x-request-id",
    )
)

# For which of those that our credential has a part in a request is to be: whose account it uses, and who pays
# (https://platform.openai.com/docs/api-reference/authentication, https://cloud.google.com/apis/docs/system-parameters).
_CHOOSE_THE_ACCOUNT = frozenset(("openai-organization", "openai-project", "x-goog-user-project"))

_NEVER_UP = HOP_BY_HOP | _CREDENTIALS | _SET_BY_US | {"origin", "referer", "forwarded", "via", "x-real-ip"}

_NEVER_UP_PREFIXES = ("x-forwarded-", "x-headwater-", "sec-", "cf-", "accept-", "if-")

_NEVER_DOWN = HOP_BY_HOP | {
    "content-length",
    "content-encoding",
    "set-cookie",
    "server",
    "date",
    "alt-svc",
    "x-request-id",
}

_UNSAFE = re.compile(r"[\r\n\0]").search

_SECONDS = re.compile(r"[0-9]{1,15}(?:\.[0-9]+)?").fullmatch

_INFORMATIVE = ("x-ratelimit-", "openai-", "anthropic-ratelimit-")

# Said about every stream: nothing between us and the client may store, gather or transform it. nginx obeys
# X-Accel-Buffering (https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering).
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


def upstream_headers(headers: Mapping[str, str], *, for_team: bool = False) -> tuple[tuple[str, str], ...]:
    """The client's headers that go on to the upstream: custom and vendor ones (`openai-beta`, `idempotency-key`, …).

    `for_team`: the client is one of several that share an account there, and none of them chooses another.
    `headers` finds names in any case, and may hold one several times, as aiohttp's do.
    """
    kept = tuple([pair for pair in headers.items() if _goes_up(pair[0])])
    if kept and "Connection" in headers:
        nominated = _nominated([value for name, value in headers.items() if name.lower() == "connection"])
        kept = tuple([pair for pair in kept if pair[0].lower() not in nominated])
    if for_team:
        kept = tuple([pair for pair in kept if _plain(pair[0]) not in _CHOOSE_THE_ACCOUNT])
    return kept


def _plain(name: str) -> str:
    """A header's name as an upstream may read it: to CGI and its kin `_` and `-` are the same (RFC 3875 §4.1.18)."""
    return name.lower().replace("_", "-")


@lru_cache(maxsize=1024)
def _goes_up(name: str) -> bool:
    low = _plain(name)
    return low not in _NEVER_UP and not low.startswith(_NEVER_UP_PREFIXES)


def downstream_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The upstream's headers that go on to the client: rate limits, vendor ids, content type and disposition."""
    nominated = _nominated([value for name, value in headers.items() if name.lower() == "connection"])
    return {
        name: value
        for name, value in headers.items()
        if (low := name.lower()) not in _NEVER_DOWN
        and low not in nominated
        and not low.startswith(("access-control-", "x-accel-"))
    }


def informative_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The upstream's headers that say something about the answer or the account: limits left, processing time."""
    return {name: value for name, value in headers.items() if _is_informative(name)}


@lru_cache(maxsize=1024)
def _is_informative(name: str) -> bool:
    return name.lower().startswith(_INFORMATIVE)


def header_lines(headers: Mapping[str, str]) -> bytes:
    """The headers as they stand in a message's head. A value that holds a line end or a NUL is left out."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items() if not _UNSAFE(value)])
    return lines.encode("utf-8", "surrogateescape")


def header_value(text: str) -> str:
    """The text as a header can carry it: what is not plain ASCII, line ends above all, is percent-encoded."""
    return text if text.isascii() and text.isprintable() else quote(text, safe=" /:")


def retry_after_s(text: str | None, now: float) -> float | None:
    """The seconds from `now`, in Unix seconds, that a `Retry-After` asks to wait; None when it says nothing to be understood.

    RFC 9110 §10.2.3: seconds, or a date in one of the three forms of §5.6.7. A date that is past is 0. Fractions of a second
    are understood too, though they are not in the RFC.
    """
    text = (text or "").strip()
    if _SECONDS(text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # The form of asctime has no zone, and means UTC.
    return max(0.0, (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp() - now)


def _nominated(values: Iterable[str]) -> frozenset[str]:
    return frozenset(part.strip().lower() for value in values for part in value.split(",") if part.strip())
