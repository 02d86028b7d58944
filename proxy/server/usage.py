"""The operator's face of the ledger: what was used and spent, and each call.

    GET  /admin/usage             sums by ?group_by= (day, or some of day, team, key, model, target, user, purpose, status), of
                                  the days ?from=&to=, and of a ?team=, ?key= or ?user=; JSON, or CSV where ?format=csv or
                                  `Accept: text/csv` asks for it
    GET  /admin/calls             calls that are over, the newest first: ?limit= (100, at most 1000) of those behind ?before=;
                                  ?team=, ?key= and ?job= narrow them
    GET  /admin/calls/under-way   calls that are not over, the oldest first: ?limit=&team=
    GET  /admin/calls/{number}    one that is over

Members that the access log has too are called as they are there. Times are Unix seconds.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web

from proxy.errors import ClientError
from proxy.policy.credits import MICRO
from proxy.server import reports
from proxy.server.downstream import json_response
from proxy.server.queries import behind, check_names, page_size
from proxy.server.state import STATE
from proxy.store.calls import CallRow, NewCall
from proxy.store.content import Content, Text
from proxy.wire.encoding import dumps

_FORMATS = ("json", "csv")
_MOST_DIGITS = 15


async def report(request: web.Request) -> web.StreamResponse:
    """GET /admin/usage: sums of what was used and spent."""
    given = request.query
    check_names(given, ("group_by", "from", "to", "team", "key", "user", "format"))
    wants_csv = _wants_csv(request)
    by = reports.groups(given.get("group_by", "day"), "group_by")
    asked = reports.days(given.get("from"), given.get("to"), time.time())
    rows = await request.app[STATE].ledger.usage(
        *(by, *asked.span),
        teams=[given["team"]] if "team" in given else None,
        key=given.get("key"),
        user=given.get("user"),
        limit=reports.MAX_ROWS + 1,
    )
    reports.check_size(rows, "group_by")
    # A report of many rows takes a while to write down.
    if wants_csv:
        body = await asyncio.to_thread(lambda: reports.as_csv(by, rows).encode())
        return web.Response(body=body, headers=_csv_headers(asked))
    body = await asyncio.to_thread(lambda: dumps(reports.as_json(by, asked, rows)))
    return web.Response(body=body, content_type="application/json")


def _wants_csv(request: web.Request) -> bool:
    wanted = request.query.get("format")
    if wanted is None:
        accepted = request.headers.get("Accept", "")
        return "text/csv" in accepted and "application/json" not in accepted
    if wanted not in _FORMATS:
        raise ClientError(400, "invalid_value", f"'format' must be {' or '.join(_FORMATS)}.", param="format")
    return wanted == "csv"


def _csv_headers(asked: reports.Days) -> dict[str, str]:
    """https://www.rfc-editor.org/rfc/rfc4180#section-3"""
    return {
        "Content-Type": "text/csv; charset=utf-8; header=present",
        "Content-Disposition": f'attachment; filename="{reports.file_name(asked)}"',
    }


async def list_calls(request: web.Request) -> web.StreamResponse:
    """GET /admin/calls: `next` is what to say in `before` for those that follow, null where none do."""
    given = request.query
    check_names(given, ("team", "key", "job", "before", "limit"))
    limit = page_size(given)
    before = behind(given)
    narrowed = {name: given.get(name) for name in ("team", "key", "job")}
    # One more than is wanted tells whether others follow.
    found, total = await request.app[STATE].ledger.calls(before=before, limit=limit + 1, **narrowed)
    following = found[limit - 1].number if len(found) > limit else None
    shown = [_call(row) for row in found[:limit]]
    return json_response({"object": "list", "data": shown, "total": total, "next": following})


async def list_calls_under_way(request: web.Request) -> web.StreamResponse:
    """GET /admin/calls/under-way: those of all processes on this database."""
    given = request.query
    check_names(given, ("team", "limit"))
    limit = page_size(given)
    found = await request.app[STATE].ledger.calls_under_way(given.get("team"))
    return json_response({"object": "list", "data": [_open_call(new) for new in found[:limit]], "total": len(found)})


async def get_call(request: web.Request) -> web.StreamResponse:
    """GET /admin/calls/{number}: one that is over; and what was said in it, where that is stored."""
    check_names(request.query, ())
    text = request.match_info["number"]
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ClientError(404, "not_found", f"There is no call '{text}'.")
    ledger = request.app[STATE].ledger
    call, content = await ledger.call(int(text)), await ledger.content(int(text))
    return json_response({**_call(call), "content": None if content is None else _content(content)})


def routes() -> list[web.RouteDef]:
    """All of these."""
    return [
        web.get("/admin/usage", report),
        web.get("/admin/calls", list_calls),
        web.get("/admin/calls/under-way", list_calls_under_way),
        web.get("/admin/calls/{number}", get_call),
    ]


def _content(content: Content) -> dict[str, Any]:
    def shown(text: Text | None) -> dict[str, Any] | None:
        if text is None:
            return None
        if content.form == "hash":
            return {"blake2b_256": text.data.hex(), "bytes": text.size}
        return {"text": text.data.decode("utf-8", "replace"), "bytes": text.size, "is_cut": text.is_cut}

    return {
        "form": content.form,
        "key_version": content.key_version,
        "prompt": shown(content.prompt),
        "answer": shown(content.answer),
    }


def _call(row: CallRow) -> dict[str, Any]:
    return {
        "number": row.number,
        "id": row.id,
        "team": row.team,
        "key": row.key,
        "user": row.user,
        "job": row.job,
        "purpose": row.purpose,
        "opened_at": row.opened_at,
        "closed_at": row.closed_at,
        "model": row.model,
        "target": row.target,
        "answered_model": row.answered_model,
        "mode": row.mode,
        "status": row.status,
        "http_status": row.http_status,
        "error": row.error,
        "finish_reason": row.finish_reason,
        "attempts": row.attempts,
        "ttft_ms": None if row.ttft_ms is None else round(row.ttft_ms, 1),
        "duration_ms": round(row.duration_ms, 1),
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "cached_tokens": row.cached_tokens,
        "reasoning_tokens": row.reasoning_tokens,
        "estimated": None if row.prompt_tokens is None else row.is_estimated,
        "cost_usd": _amount(row.cost_microusd),
        "price_usd": _amount(row.price_microusd),
        "credits": _amount(row.settled_microcredits),
        "overdraft_credits": _amount(row.overdraft_microcredits),
        "cache_entry": row.cache_entry,
    }


def _open_call(new: NewCall) -> dict[str, Any]:
    return {
        "id": new.id,
        "team": new.team,
        "key": new.key,
        "user": new.user,
        "job": new.job,
        "purpose": new.purpose,
        "opened_at": new.opened_at,
        "model": new.model,
        "held_credits": _amount(new.hold_microcredits),
    }


def _amount(micro: int | None) -> float | None:
    return None if micro is None else micro / MICRO
