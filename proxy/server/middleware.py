"""What every request goes through: its id, its origin, who asks, and the one place where an error becomes a response."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from proxy.addresses import host_of, is_loopback
from proxy.chat import LEFT_STATUS, LOCAL, Identity, Mode, Outcome, Status, status_of
from proxy.errors import ClientError, OverloadedError, ProxyError
from proxy.server.accounting import Entry
from proxy.server.downstream import SERVER, cut, error_response
from proxy.server.state import STATE, State

_log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Visit:
    """What is noted about a request on its way. `headers` go out with its response, whatever that is.

    `is_call` is set once a call was made of it, which then reports itself; `is_answered` once the head went out. `is_known` is
    set with who asks, and `entry` when it is known what for.
    """

    id: str
    headers: dict[str, str]
    is_call: bool = False
    is_answered: bool = False
    identity: Identity = LOCAL
    is_known: bool = False
    entry: Entry | None = None


VISIT = web.RequestKey("visit", Visit)


_ID_BYTES, _IDS_AT_ONCE = 12, 256


def _random_ids() -> Iterator[str]:
    while True:
        # Asking the system costs 5 µs each time.
        block = os.urandom(_IDS_AT_ONCE * _ID_BYTES)
        for start in range(0, len(block), _ID_BYTES):
            yield block[start : start + _ID_BYTES].hex()


_ids = _random_ids()


def new_id() -> str:
    """An id for a call: unlike any other's, in this run or another, and none tells how many there were."""
    return next(_ids)


_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch
_EXPOSED = (
    "x-request-id",
    "x-headwater-target",
    "x-headwater-attempts",
    "x-headwater-stream",
    "x-headwater-error-source",
    "x-headwater-job",
    "x-cache",
    "x-cache-score",
    "x-cache-age",
    "x-cache-entry",
    *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    "retry-after",
    "x-should-retry",
)
# Who comes back to an answer makes no new call.
_OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics", "/v1/streams/")

# Who needs which key, by the route as it is written: all that is not here needs a virtual one.
_FOR_ALL = ("/health", "/ready", "/openapi.json")
_FOR_ADMINISTRATORS = ("/admin/", "/metrics")


def needed_key(path: str) -> Literal["none", "virtual", "admin"]:
    """Which key a route needs, by its path as it is written."""
    if path in _FOR_ALL:
        return "none"
    return "admin" if path.startswith(_FOR_ADMINISTRATORS) else "virtual"


def is_open_while_draining(path: str) -> bool:
    """Whether it is answered although the proxy is stopping."""
    return path.startswith(_OPEN_WHILE_DRAINING)


def visit_of(headers: Mapping[str, str]) -> Visit:
    """A new visit. The client's `x-request-id` is kept when it is a plain short word, so that it cannot forge log lines."""
    given = headers.get("x-request-id", "")
    call_id = given if _GOOD_ID(given) else new_id()
    return Visit(call_id, {"x-request-id": call_id})


def admit(state: State, visit: Visit, path: str, headers: Mapping[str, str]) -> None:
    """Refuse what may not come in: pages of strange origins, and calls while the proxy stops. Raises ProxyError."""
    if "Origin" in headers:
        visit.headers |= _cors(headers, state)
    if state.is_draining and not is_open_while_draining(path):
        raise OverloadedError("shutting_down", "The proxy is shutting down.", retry_after_s=5)


def failure_of(error: Exception, state: State, visit: Visit, what: str) -> ProxyError:
    """The error as the client is to see it. One that is not ours is a bug: it is logged, and its words stay here."""
    match error:
        case ProxyError():
            if error.status == 401 and isinstance(error, ClientError):
                visit.headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 §15.5.2 requires one
            return error
        case web.HTTPRequestEntityTooLarge():
            limit = f"{state.settings.server.max_body_mb:g} MB"
            return ClientError(413, "request_too_large", f"The body is larger than {limit}.")
        case web.RequestPayloadError():
            return ClientError(400, "invalid_body", "The body is broken: its chunks or its coding cannot be read.")
        case web.HTTPException():
            if "Allow" in error.headers:
                visit.headers["Allow"] = error.headers["Allow"]
            code = "method_not_allowed" if error.status == 405 else "not_found"
            return ClientError(error.status, code, f"{what} is not served here.")
    _log.error("%s: %s failed", visit.id, what, exc_info=error)
    return ProxyError(500, "internal_error", "The proxy failed.")


def identify(state: State, visit: Visit, headers: Mapping[str, str]) -> None:
    """See who asks. ClientError 401, 403."""
    visit.identity = state.auth.identify(headers)
    visit.is_known = True


def report_refused(state: State, visit: Visit, failure: ProxyError, started: float) -> None:
    """Book a request that was refused before a call was made of it. The ledger has it where it is known who asked."""
    if visit.is_call:
        return
    if visit.entry is None and visit.is_known:
        visit.entry = state.accounting.entry(visit.identity, visit.id)
    state.report(_unmade(visit, status_of(failure), failure.status, failure.word, state.now() - started))


def report_left(state: State, visit: Visit, started: float) -> None:
    """Book a call whose client has left before it was made, if it was known what for."""
    if visit.entry is not None and not visit.is_call:
        state.report(_unmade(visit, Status.CANCELLED, LEFT_STATUS, None, state.now() - started))


@web.middleware
async def around(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Give the request its id, refuse what may not come in, and answer errors."""
    state = request.app[STATE]
    visit = request[VISIT] = visit_of(request.headers)
    started = state.now()
    try:
        admit(state, visit, request.path, request.headers)
        if request.method == "OPTIONS" and "Origin" in request.headers:
            return web.Response(status=204)
        _authenticate(state, visit, request)
        return await handler(request)
    except ConnectionError:
        # Upstreams' failures are mapped to ours: this is the client's connection, and nobody is left to answer.
        raise asyncio.CancelledError from None
    except Exception as error:
        failure = failure_of(error, state, visit, f"{request.method} {request.path}")
    if request.path.startswith("/v1/"):
        report_refused(state, visit, failure, started)
    if visit.is_answered:
        cut(request)
        raise asyncio.CancelledError
    return error_response(failure)


def _authenticate(state: State, visit: Visit, request: web.Request) -> None:
    """See who asks for a route. What no route serves tells nothing to anybody."""
    resource = request.match_info.route.resource
    if resource is None:
        return
    match needed_key(resource.canonical):
        case "admin":
            state.auth.admit_admin(request.headers)
        case "virtual":
            identify(state, visit, request.headers)


async def before_head(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response, streams included, the headers that `around` decided on."""
    if (visit := request.get(VISIT)) is not None:
        visit.is_answered = True
        response.headers.update(visit.headers)
        response.headers["Server"] = SERVER
        if response.status != 101 and request.headers.get("Upgrade", "").lower() == "websocket":
            # aiohttp takes nothing behind such a request for another one, upgraded or not.
            response.force_close()
            response.headers["Connection"] = "close"


def _cors(headers: Mapping[str, str], state: State) -> dict[str, str]:
    """The headers for a browser's request from another origin. ClientError 403 for an origin that is not allowed.

    A page anywhere on the web can send requests to a proxy on the visitor's own machine; only the `Origin` header tells.
    """
    origin = headers["Origin"]
    # The Host header is the page's word too: a name that a stranger has pointed at this machine is no page of ours.
    if origin == f"http://{headers.get('Host', '')}" and is_loopback(host_of(origin)):
        return {}
    allowed = state.settings.server.cors_origins
    if origin not in allowed and "*" not in allowed:
        raise ClientError(403, "origin_not_allowed", "This origin is not among server.cors_origins.")
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers", "authorization, content-type"),
        "Access-Control-Expose-Headers": ", ".join(_EXPOSED),
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }


def _unmade(visit: Visit, status: Status, http_status: int, error: str | None, duration_s: float) -> Outcome:
    return Outcome(
        call_id=visit.id,
        model=visit.entry.model if visit.entry is not None else "",
        target=None,
        mode=Mode.NONE,
        status=status,
        http_status=http_status,
        attempts=0,
        ttft_s=None,
        duration_s=duration_s,
        usage=None,
        error=error,
        ticket=visit.entry,
    )
