"""Credits over HTTP, in credits and not in micro-credits.

For administrators (amounts are numbers with up to six decimals):

    GET   /admin/credits/teams/{id}                 the balance     POST  …/add     {amount, reason?}
    GET   /admin/credits/teams/{id}/transactions                    POST  …/adjust  {amount, reason}
    GET, PUT, DELETE  …/auto-refill  {amount, period, starts_at?}   POST  …/refund  {amount, reason?, job_id?, call_id?}

For the team itself: what another one has is as unknown as what never was.

    GET   /api/credits/teams/{id}/balance           GET   /api/credits/teams/{id}/check?amount=
    GET   /api/credits/teams/{id}/transactions

Lists of transactions begin with the newest: `?limit=` (100, at most 1000) of those with numbers below `?before=`.

A payment with a header `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07) is made once: who asks again for the same
is answered the same. Such a key is kept for good.
"""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from proxy.errors import ClientError
from proxy.policy.credits import MICRO, parse_credits
from proxy.server import accountforms as forms
from proxy.server.accounts import accounts_now, form_of
from proxy.server.auth import check_team
from proxy.server.downstream import json_response
from proxy.server.middleware import VISIT
from proxy.server.queries import behind, check_names, page_size
from proxy.server.state import STATE
from proxy.store.account_rows import Team
from proxy.store.credits import Balance, Cause, Refill, Transaction, TransactionKind
from proxy.store.payments import Paid, Payment

_MAX_KEY = 255

# ---------------------------------------------------------------------- for administrators


async def get_balance(request: web.Request) -> web.StreamResponse:
    """GET /admin/credits/teams/{id}: what it has left, and how that is refilled."""
    return json_response(await _balance(request, await _any_team(request)))


async def add(request: web.Request) -> web.StreamResponse:
    """POST /admin/credits/teams/{id}/add: `amount`, and `reason`."""
    form = await form_of(request, forms.Addition)
    return await _pay(request, TransactionKind.ALLOCATION, form["amount"], reason=form.get("reason", ""))


async def adjust(request: web.Request) -> web.StreamResponse:
    """POST /admin/credits/teams/{id}/adjust: `amount`, which may be below 0, and `reason`. 402 where less is left."""
    form = await form_of(request, forms.Adjustment)
    return await _pay(request, TransactionKind.ADJUSTMENT, form["amount"], reason=form["reason"])


async def refund(request: web.Request) -> web.StreamResponse:
    """POST /admin/credits/teams/{id}/refund: `amount`, and `reason`, `job_id`, `call_id`."""
    form = await form_of(request, forms.Refunding)
    return await _pay(
        request,
        *(TransactionKind.REFUND, form["amount"]),
        reason=form.get("reason", ""),
        job=form.get("job_id"),
        call=form.get("call_id"),
    )


async def _pay(
    request: web.Request,
    kind: TransactionKind,
    amount: int,
    *,
    reason: str,
    job: str | None = None,
    call: str | None = None,
) -> web.StreamResponse:
    state, team = request.app[STATE], (await _any_team(request)).id
    cause = Cause(time.time(), reason, job, call)
    paid = await state.ledger.pay(Payment(team, kind, amount, cause, _idempotency_key(request)))
    # What this has made of the team's terms holds from the next call on.
    await state.accounts.refresh()
    return json_response(_shown_paid(paid))


async def get_refill(request: web.Request) -> web.StreamResponse:
    """GET /admin/credits/teams/{id}/auto-refill: `auto_refill` is null where there is none."""
    team = (await _any_team(request)).id
    return json_response({"team_id": team, "auto_refill": _shown_refill(await request.app[STATE].ledger.refill(team))})


async def set_refill(request: web.Request) -> web.StreamResponse:
    """PUT /admin/credits/teams/{id}/auto-refill: `amount`, `period`, and `starts_at` (Unix seconds; otherwise now)."""
    state, team = request.app[STATE], (await _any_team(request)).id
    form = await form_of(request, forms.AutoRefill)
    made = await state.ledger.start_refill(team, form["amount"], form["period"], form.get("starts_at"), time.time())
    await state.accounts.refresh()
    return json_response(
        {
            "team_id": team,
            "auto_refill": _shown_refill(made.refill),
            "budget_mode": made.budget_mode,
            "budget_mode_was_set": made.has_set_mode,
        }
    )


async def stop_refill(request: web.Request) -> web.StreamResponse:
    """DELETE /admin/credits/teams/{id}/auto-refill: it is not refilled any more."""
    team = (await _any_team(request)).id
    await request.app[STATE].ledger.set_refill(team, None)
    return json_response({"team_id": team, "auto_refill": None})


async def list_transactions(request: web.Request) -> web.StreamResponse:
    """GET /admin/credits/teams/{id}/transactions: the newest first."""
    return await _transactions(request, await _any_team(request))


# ---------------------------------------------------------------------- for a team


async def own_balance(request: web.Request) -> web.StreamResponse:
    """GET /api/credits/teams/{id}/balance: what the team has left."""
    team = await own_team(request)
    check_names(request.query, ())
    return json_response(await _balance(request, team))


async def own_transactions(request: web.Request) -> web.StreamResponse:
    """GET /api/credits/teams/{id}/transactions: the newest first."""
    return await _transactions(request, await own_team(request))


async def check(request: web.Request) -> web.StreamResponse:
    """GET /api/credits/teams/{id}/check?amount=: `has_credits` says whether so much could be spent now.

    It always could by a team that has no budget mode: `needs_credits` is false.
    """
    team = await own_team(request)
    check_names(request.query, ("amount",))
    amount = _amount(request.query.get("amount"))
    balance = await request.app[STATE].ledger.balance(team.id)
    needs = team.budget_mode is not None
    return json_response(
        {
            "team_id": team.id,
            "has_credits": not needs or balance.remaining >= amount,
            "needs_credits": needs,
            "credits_remaining": balance.remaining / MICRO,
        }
    )


async def own_team(request: web.Request) -> Team:
    """The team that the path names, which must be that of who asks. ClientError 404 for any other."""
    check_team(request[VISIT].identity, request.match_info["id"])
    return await _any_team(request)


# ----------------------------------------------------------------------


def routes() -> list[web.RouteDef]:
    """All of these."""
    return [
        web.get("/admin/credits/teams/{id}", get_balance),
        web.get("/admin/credits/teams/{id}/transactions", list_transactions),
        web.post("/admin/credits/teams/{id}/add", add),
        web.post("/admin/credits/teams/{id}/adjust", adjust),
        web.post("/admin/credits/teams/{id}/refund", refund),
        web.get("/admin/credits/teams/{id}/auto-refill", get_refill),
        web.put("/admin/credits/teams/{id}/auto-refill", set_refill),
        web.delete("/admin/credits/teams/{id}/auto-refill", stop_refill),
        web.get("/api/credits/teams/{id}/balance", own_balance),
        web.get("/api/credits/teams/{id}/transactions", own_transactions),
        web.get("/api/credits/teams/{id}/check", check),
    ]


async def _any_team(request: web.Request) -> Team:
    """The team that the path names, as it is now, whoever changed it. ClientError 404."""
    return (await accounts_now(request)).team(request.match_info["id"])


def _idempotency_key(request: web.Request) -> str | None:
    """The key of a payment, without the quotes that make it a string (RFC 8941 §3.3.3). ClientError 400."""
    given = request.headers.getall("Idempotency-Key", [])
    if not given:
        return None
    key = given[0].strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(given) > 1 or not (0 < len(key) <= _MAX_KEY and key.isascii() and key.isprintable()):
        words = f"'Idempotency-Key' must be one text of at most {_MAX_KEY} printable ASCII characters."
        raise ClientError(400, "invalid_value", words, param="Idempotency-Key")
    return key


def _amount(written: str | None) -> int:
    """Micro-credits. ClientError 400."""
    if written is None:
        raise ClientError(400, "missing_required_parameter", "'amount' is required.", param="amount")
    try:
        amount = parse_credits(written)
    except ValueError as error:
        raise ClientError(400, "invalid_value", f"'amount' {error}.", param="amount") from None
    if amount < 0:
        raise ClientError(400, "invalid_value", "'amount' must not be negative.", param="amount")
    return amount


# ---------------------------------------------------------------------- as it is told


async def _balance(request: web.Request, team: Team) -> dict[str, Any]:
    ledger = request.app[STATE].ledger
    return {
        "team_id": team.id,
        **_shown_balance(await ledger.balance(team.id)),
        **forms.shown_terms(team),
        "auto_refill": _shown_refill(await ledger.refill(team.id)),
    }


async def _transactions(request: web.Request, team: Team) -> web.StreamResponse:
    given = request.query
    check_names(given, ("limit", "before"))
    page = await request.app[STATE].ledger.transactions(team.id, behind(given), page_size(given))
    data = [_shown_transaction(row) for row in page.rows]
    return json_response({"object": "list", "data": data, "total": page.total})


def _shown_balance(balance: Balance) -> dict[str, float]:
    return {
        "credits_allocated": balance.allocated / MICRO,
        "credits_used": balance.charged / MICRO,
        "credits_remaining": balance.remaining / MICRO,
        "credits_reserved": balance.reserved / MICRO,
    }


def _shown_paid(paid: Paid) -> dict[str, Any]:
    return {
        "team_id": paid.transaction.team,
        "transaction": _shown_transaction(paid.transaction),
        **_shown_balance(paid.balance),
        "budget_mode": paid.budget_mode,
        "budget_mode_was_set": paid.has_set_mode,
    }


def _shown_transaction(row: Transaction) -> dict[str, Any]:
    return {
        "number": row.number,
        "transaction_type": row.kind,
        "credits_amount": row.amount / MICRO,
        "credits_before": row.before / MICRO,
        "credits_after": row.after / MICRO,
        "job_id": row.job,
        "call_id": row.call,
        "reason": row.reason,
        "created_at": row.at,
    }


def _shown_refill(refill: Refill | None) -> dict[str, Any] | None:
    return None if refill is None else {"amount": refill.amount / MICRO, "period": refill.period, "next_at": refill.at}
