"""What a team may know of itself, by a virtual key of its own: what its calls were, took and cost.

    GET   /api/teams/{id}/usage?period=     a year (2026), a month (2026-11), or a day (2026-11-21), UTC; this month where it
                                            is left out

Calls are those that were opened in the period, tokens and prices theirs. Credits are what was charged and refunded in it: a
job is charged when it is completed. What upstreams ask for is the operator's own business, and not told.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from proxy.errors import ClientError
from proxy.policy.credits import MICRO, parse_span
from proxy.server import reports
from proxy.server.credits import own_team
from proxy.server.downstream import json_response
from proxy.server.queries import check_names
from proxy.server.state import STATE
from proxy.store.credits import TransactionKind
from proxy.store.usage import Sums


async def usage(request: web.Request) -> web.StreamResponse:
    """GET /api/teams/{id}/usage: what its calls took and cost in a period."""
    team = (await own_team(request)).id
    check_names(request.query, ("period",))
    period = request.query.get("period") or datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m")
    try:
        start, end = parse_span(period)
    except ValueError as error:
        raise ClientError(400, "invalid_value", f"'period' {error}.", param="period") from None
    ledger = request.app[STATE].ledger
    models = await ledger.usage(("model",), start, end, teams=[team])
    moved = await ledger.credit_sums(team, start, end)
    return json_response(
        {
            "team_id": team,
            "period": period,
            "starts_at": start,
            "ends_at": end,
            "jobs": await ledger.job_counts(team, start, end),
            **_shown(reports.total(models)),
            "credits_charged": -moved[TransactionKind.CHARGE] / MICRO,
            "credits_refunded": moved[TransactionKind.REFUND] / MICRO,
            "models": [{"model": row.group[0], **_shown(row.sums)} for row in models],
        }
    )


def routes() -> list[web.RouteDef]:
    """All of these."""
    return [web.get("/api/teams/{id}/usage", usage)]


def _shown(sums: Sums) -> dict[str, Any]:
    """`unpriced_calls` are those whose price is unknown: it is not in `price_usd`, which is None where that is all of them."""
    _, price, _ = reports.amounts(sums)
    return {
        "calls": sums.calls,
        "failed_calls": sums.failed_calls,
        "unpriced_calls": sums.unpriced_calls,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "total_tokens": sums.prompt_tokens + sums.completion_tokens,
        "cached_tokens": sums.cached_tokens,
        "reasoning_tokens": sums.reasoning_tokens,
        "price_usd": None if price is None else price / MICRO,
    }
