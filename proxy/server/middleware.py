"""What every request goes through: its id, its origin, and the one place where an error becomes a response."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from proxy.chat import Mode, Outcome, Status
from proxy.errors import ClientError, OverloadedError, ProxyError
from proxy.server.downstream import cut, error_response
from proxy.server.state import STATE, State
from proxy.settings import is_loopback

_log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Visit:
    """What is noted about a request on its way. `headers` go out with its response, whatever that is.

    `is_call` is set once a call was made of it, which then reports itself; `is_answered` once the head went out.
    """

    id: str
    headers: dict[str, str]
    is_call: bool = False
    is_answered: bool = False


VISIT = web.RequestKey("visit", Visit)

_RUN = os.urandom(6).hex()
_numbers = itertools.count(1)


def new_id() -> str:
    """An id for a call: unlike any other's, in this run or another. Asking the system for randomness costs 5 µs each."""
    return f"{_RUN}-{next(_numbers):08x}"


_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch
_OPEN_WHILE_DRAINING = frozenset(("/health", "/ready"))


@web.middleware
async def around(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Give the request its id, refuse what may not come in, and answer errors.

    The client's `x-request-id` is kept when it is a plain short word, so that it cannot forge log lines.
    """
    state = request.app[STATE]
    given = request.headers.get("x-request-id", "")
    call_id = given if _GOOD_ID(given) else new_id()
    visit = request[VISIT] = Visit(call_id, {"x-request-id": call_id})
    started = state.now()
    try:
        if "Origin" in request.headers:
            visit.headers |= _cors(request, state)
            if request.method == "OPTIONS":
                return web.Response(status=204)
        if state.is_draining and request.path not in _OPEN_WHILE_DRAINING:
            raise OverloadedError("shutting_down", "The proxy is shutting down.", retry_after_s=5)
        return await handler(request)
    except ProxyError as error:
        failure = error
    except web.HTTPRequestEntityTooLarge:
        limit = f"{state.settings.server.max_body_mb:g} MB"
        failure = ClientError(413, "request_too_large", f"The body is larger than {limit}.")
    except web.HTTPException as error:
        words = f"{request.method} {request.path} is not served here."
        code = "method_not_allowed" if error.status == 405 else "not_found"
        failure = ClientError(error.status, code, words)
        if "Allow" in error.headers:
            visit.headers["Allow"] = error.headers["Allow"]
    except ConnectionError:
        # Upstreams' failures are mapped to ours: this is the client's connection, and nobody is left to answer.
        raise asyncio.CancelledError from None
    except Exception:
        _log.exception("%s: %s %s failed", call_id, request.method, request.path)
        failure = ProxyError(500, "internal_error", "The proxy failed.")
    if not visit.is_call and request.path.startswith("/v1/"):
        state.report(_refused(call_id, failure, state.now() - started))
    if visit.is_answered:
        cut(request)
        raise asyncio.CancelledError
    return error_response(failure)


async def before_head(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response, streams included, the headers that `around` decided on."""
    if (visit := request.get(VISIT)) is not None:
        visit.is_answered = True
        response.headers.update(visit.headers)


def _cors(request: web.Request, state: State) -> dict[str, str]:
    """The headers for a browser's request from another origin. ClientError 403 for an origin that is not allowed.

    A page anywhere on the web can send requests to a proxy on the visitor's own machine; only the `Origin` header tells.
    """
    origin = request.headers["Origin"]
    # The Host header is the page's word too: a name that a stranger has pointed at this machine is no page of ours.
    if origin == f"{request.scheme}://{request.host}" and is_loopback(request.url.host or ""):
        return {}
    allowed = state.settings.server.cors_origins
    if origin not in allowed and "*" not in allowed:
        raise ClientError(403, "origin_not_allowed", "This origin is not among server.cors_origins.")
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": request.headers.get(
            "Access-Control-Request-Headers", "authorization, content-type"
        ),
        "Access-Control-Expose-Headers": "x-request-id, x-headwater-target, x-headwater-error-source, retry-after",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }


_STATUS = {ClientError: Status.CLIENT_ERROR, OverloadedError: Status.REJECTED}


def _refused(call_id: str, error: ProxyError, duration_s: float) -> Outcome:
    return Outcome(
        call_id=call_id,
        model="",
        target=None,
        mode=Mode.NONE,
        status=_STATUS.get(type(error), Status.INTERNAL_ERROR),
        http_status=error.status,
        attempts=0,
        ttft_s=None,
        duration_s=duration_s,
        usage=None,
        error=error.word,
    )
