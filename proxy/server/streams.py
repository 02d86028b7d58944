"""Answers that are read again: a client whose connection broke goes on behind the last event it has."""

from __future__ import annotations

import re

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage

from proxy.errors import ClientError
from proxy.server.auth import caller_of
from proxy.server.door import Way
from proxy.server.downstream import Downstream
from proxy.server.middleware import Visit
from proxy.server.state import State

PREFIX = "/v1/streams/"


def resume(state: State, visit: Visit, message: RawRequestMessage, body: bytes, down: Downstream) -> None:
    """GET /v1/streams/{id}?after=N: the answer's events behind the N-th, as they come.

    A browser's EventSource says where it is in `Last-Event-ID`, and comes back at the end as well: only 204 tells it that
    there is no more (WHATWG HTML §9.2.3).
    """
    name = message.url.path.removeprefix(PREFIX)
    kept = state.pipeline.answers.named(caller_of(visit.identity, message.headers), name)
    if kept is None:
        words = "There is no such stream, or not any more: streaming.resume_window_s says how long one is kept."
        raise ClientError(404, "stream_not_found", words)
    after = _after(message)
    said = kept.log.count()
    if kept.log.is_closed:
        if kept.log.is_committed and after >= said + len(kept.log.tail(wants_usage=kept.wants_usage)):
            down.nothing()
            return
    elif after > said:
        raise _wrong(f"The answer has {said} events yet, and not {after}.")
    seat = None if kept.answer is None else state.pipeline.rejoin(kept.answer)
    on_left = (lambda: None) if seat is None else seat.leave
    down.rest(kept.log, on_left, wants_usage=kept.wants_usage, after=after)


WAY = Way("GET", re.compile(re.escape(PREFIX) + ".*", re.DOTALL), resume)


async def only_read(request: web.Request) -> web.StreamResponse:
    """Any other method: these are addresses of ours, and no upstream's."""
    raise web.HTTPMethodNotAllowed(request.method, ["GET"])


def _after(message: RawRequestMessage) -> int:
    """How many events the client has. Where it says both, the header is newer: an EventSource keeps its address."""
    given = message.headers.get("Last-Event-ID") or message.url.query.get("after") or "0"
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise _wrong("'after' and Last-Event-ID must be the number of an event.")
    return int(given)


def _wrong(words: str) -> ClientError:
    return ClientError(400, "invalid_value", words, param="after")
